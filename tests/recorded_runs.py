"""The parts of tests/gpu_record.py that distil: runs that are evaluated beside published figures, as time allows."""

from __future__ import annotations

import gc
import itertools
import logging
import math
import shlex
import time
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

import condense
from tests.record import Record
from utils.config import build, resolve
from utils.config.build import Parts, Problem
from utils.config.experts import experts_of, train_experts
from utils.config.options import FREE, RESUMABLE
from utils.config.presets import METHODS, REPRODUCE
from utils.method.evaluation import OnEpoch, Score
from utils.method.images import ImageSet
from utils.method.training import Trainer
from utils.runs.folder import RunFolder
from utils.system import process
from utils.system.distributed import SINGLE
from utils.system.errors import UserError, first_line
from utils.system.process import Stopped, Stopper
from utils.system.report import span

log = logging.getLogger("dream")

# Published accuracies in per cent, CIFAR-10: at outer iterations, ipc 10, f = 2 (read off a curve, +-0.5), and of other
# frameworks. All are the best of several tests, each by a protocol of its own.
CURVES = {
    "kmeans": {0: 54.2, 40: 64.0, 200: 66.9, 1000: 68.9},
    "random": {0: 48.8, 40: 58.6, 200: 65.2, 1000: 66.5},
}
PUBLISHED_METHODS = {  # with random sampling and the published budget, those first that take the least time
    "dc, ipc 1": 28.3, "dsa, ipc 1": 28.8, "dm, ipc 1": 26.0, "dm, ipc 10": 48.9, "dc, ipc 10": 44.9,
    "dsa, ipc 10": 52.1, "idc, ipc 1": 50.6, "idc, ipc 10": 67.5,
}  # fmt: skip
# The table of accuracy against time, with f = 2 and the published budgets: flags, the images that are selected as
# published, and published accuracies at ipc 10 and 1. Those first that take the least time.
FASTER = {
    "dance": ("--method dance", "random", {10: 70.8, 1: 47.1}),
    "ncfm": ("--method ncfm", "random", {10: 71.8, 1: 49.5}),
    "dm": ("--method dm", "", {}),
    "dream, early": ("--networks early --lr_img 0.01", "", {}),  # the rate of Acc-DD
    "idc": ("--method idc", "random", {10: 67.5, 1: 50.6}),
    "dream": ("", "kmeans", {10: 69.4, 1: 51.1}),
}
# The paper's comparison in its parts: what the images begin with, and what they are matched against.
ARMS = [(init, select) for init in ("random", "kmeans") for select in ("random", "kmeans")]
ARMS_AT = range(0, 31, 3)  # outer iterations of an evaluation
ARMS_BUDGET = ["-f", "2", "--ipc", "10", "--niter", str(ARMS_AT[-1]), "--epochs", "200", "--repeat", "1"]
CIFAR10 = ["--reproduce", "-d", "cifar10"]
TINY = shlex.split(
    "-d digits --niter 2 --inner_loop 4 --interval 2 --batch_real 4 --n_data 8 --net_epoch 1 --width 4 --epochs 4 "
    "--experts 2 --expert_epochs 1"
)


# By name: flags, and published accuracies in per cent by outer iteration, see `distil`.
Runs = dict[str, tuple[list[str], Mapping[int, float | None]]]


class NoTime(Exception):
    """An evaluation would not end in time. (Stopped is for signals while networks are trained.)"""


class Watch:
    """What an evaluation is watched for: the time that it will take."""

    def __init__(self, record: Record, title: str, count: int) -> None:
        """count: of trainings."""
        self.record, self.title, self.count = record, title, count

    def __call__(self, trainings: Sequence[int], epoch: int, trainer: Trainer) -> None:
        """Time the first epochs, from `few` to twice as many, in which CUDA graphs are replayed. Raises NoTime."""
        epochs, groups = trainer.recipe.epochs, math.ceil(self.count / len(trainings))
        few = max(1, epochs // 50)
        if trainings[0] != 0 or epoch > 2 * few:
            return
        if self.record.left <= 0:
            raise NoTime(f"no time for {self.title}")
        if epoch == few:
            trainer.parameters[0].sum().item()  # waits for the device
            self.began = time.monotonic()
        elif epoch == 2 * few:
            trainer.parameters[0].sum().item()
            needed = (time.monotonic() - self.began) / few * (groups * epochs - epoch)
            log.info("%s: about %s", self.title, span(needed))
            if needed > self.record.left:
                raise NoTime(f"{self.title} needs {span(needed)}, there are {span(max(self.record.left, 0))}")


class TimedParts(Parts):
    """Parts of a run whose evaluations stop where they would not end in time."""

    record: Record

    def evaluate(self, sets: list[ImageSet], title: str, stopper: Stopper, on_epoch: OnEpoch | None = None) -> Score:
        """Evaluate as condense.py does, under watch. Raises Stopped for want of time."""
        assert on_epoch is None
        try:
            return super().evaluate(sets, title, stopper, Watch(self.record, title, len(sets)))
        except NoTime as error:
            raise Stopped(str(error)) from None


class RecordedRun(condense.Run):
    """A run with a row in the record for some outer iterations and for its end, packed whenever it is saved."""

    parts: TimedParts

    def __init__(self, name: str, published: Mapping[int, float | None], snapshots: bool, *of_any_run: Any) -> None:
        """published: accuracies in per cent, or None, by the outer iterations to evaluate; snapshots: keep those."""
        self.name, self.published, self.snapshots = name, published, snapshots
        self.record = of_any_run[1].record
        super().__init__(*of_any_run)

    def save(self) -> None:
        """Save and pack."""
        super().save()
        self.record.pack()

    def before_iteration(self, it: int) -> None:
        """Evaluate the set, and keep a copy of it, where there is something to compare it with."""
        if it in self.published and not self.record.known(self.row(it)):
            if self.snapshots:
                self.folder.save_snapshot(it, self.state.result)
            self.evaluate()

    def after_step(self) -> None:
        """Say once how far this call will come."""
        super().after_step()
        steps, few = self.recorder.steps_here, max(20, 2 * self.o.interval)
        if steps == few:
            self.began = self.recorder.seconds(self.state)
        if steps == 2 * few:
            pace = (self.recorder.seconds(self.state) - self.began) / few
            there = min(self.state.it + self.record.left / pace / self.o.inner_loop, self.o.niter)
            whole = span(pace * self.o.niter * self.o.inner_loop)
            log.info("%.3g ms a step: %s in all, to iteration %.0f in this call", 1e3 * pace, whole, there)

    def row(self, it: int) -> str:
        """Name of an evaluation in the record."""
        return f"{self.name}, iteration {it}"

    def evaluate(self) -> Score:
        """Evaluate as condense.py does, and record a row."""
        score, it = super().evaluate(), self.state.it
        self.keep(self.row(it), score, published=self.published.get(it))
        return score

    def keep(self, row: str, score: Score, *, published: float | None = None) -> None:
        """Record and print a row."""
        minutes = self.recorder.total(self.state) / 60  # with those of the experts
        precision = {"precision": self.o.precision, "evaluation_precision": self.parts.evaluation_precision}
        self.record.keep(row, {**score.as_dict(), "published": published, "minutes": minutes, **precision})
        self.record.say(line(row, self.record.known(row)))

    def finish(self) -> None:
        """Evaluate the finished set, and random real images, these once for all runs with as many."""
        self.save()
        last, random = self.row(self.o.niter), f"random real images, ipc {self.o.ipc}"
        if not self.record.known(last):
            self.evaluate()
        if not self.record.known(random):
            sets = [self.parts.random_real(r) for r in range(self.o.repeat)]
            self.keep(random, self.parts.evaluate(sets, f"evaluating {random}", self.stopper))
        scores = {"accuracy": self.record.known(last), "random_real": self.record.known(random)}
        self.folder.save_final_card({**self.card(finished=True), **scores})


def line(row: str, found: dict[str, Any]) -> str:
    """One line of the table: accuracies in per cent, mean +- std, the published one, minutes of distilling."""
    last = Score.from_dict(found)
    return f"{row:54}{last!s:>22}{last.best_of_four!s:>22}{found['published'] or '':>12}{found['minutes']:>10.1f}"


def distil(
    record: Record, name: str, words: Sequence[str], published: Mapping[int, float | None], *, snapshots: bool = True
) -> bool:
    """Distil and evaluate as far as the time allows. Returns whether the run is finished.

    published: accuracies in per cent, or None, by outer iteration; -1: of the published budget's end.
    """
    gc.collect()  # the run before, and its memory on the device
    given = record.given
    precision = given.precision or ("tf32" if record.device.type == "cuda" else "fp32")
    argv = [*(TINY if given.tiny else CIFAR10), *words, *(TINY if given.tiny else [])]
    argv += ["--precision", precision, "--device", record.device.type]
    argv += ["--image_folder", given.image_folder] if given.image_folder else []
    argv += ["--results_dir", str(record.work / "results"), *given.more]
    o = resolve.condense(argv, "").options
    if record.problem is None:
        record.problem = build.problem(o)
    problem = Problem(record.problem.data, resolve.network(o, o.net_type, record.problem.data))
    free = (*FREE, "image_folder")  # the next machine may have the images elsewhere
    folder = RunFolder(resolve.run_folder(o), resolve.as_saved(o), free=free, resumable=RESUMABLE)
    stopper, experts = Stopper(record.left / 60), experts_of(o, problem)
    if experts is not None and train_experts(o, problem, experts, stopper, SINGLE) is not None:
        no_more_after(stopper, record)
        return False
    parts = TimedParts(o, problem, experts=experts, folder=folder)
    parts.record, parts.evaluation_precision = record, given.evaluation_precision
    whole = o.niter == METHODS[o.method].published.get("niter", REPRODUCE["niter"])
    known = {it: accuracy for it, accuracy in published.items() if it >= 0}
    known |= {o.niter: published[-1]} if -1 in published and whole else {}
    session = process.session("gpu_record.py", argv, parts.device, **parts.conditions)
    with folder.held(session) as there, stopper, parts.compute.rounding():
        if there == "finished":
            return True
        log.info("%s: %s", name, parts.describe())
        RecordedRun(name, known, snapshots, o, parts, folder, stopper).to_the_end()
        no_more_after(stopper, record)
        return folder.check() == "finished"


def no_more_after(stopper: Stopper, record: Record) -> None:
    """Begin no further run after a signal."""
    if stopper.signal is not None:
        record.end = 0.0


def headline(record: Record) -> bool:
    """Distil at the published setting, and evaluate where its curve was read off. Returns whether that ended."""
    say_table(record)
    select = resolve.condense(record.given.more, "").options.select
    return distil(record, f"ipc 10, {select}", ["-f", "2", "--ipc", "10", "--tag", select], CURVES.get(select, {}))


def methods(record: Record) -> bool:
    """Distil by other frameworks, from random images and from representatives. Returns whether all runs ended."""
    runs: Runs = {}
    for seed, (setting, accuracy), select in itertools.product(
        range(record.given.seeds), PUBLISHED_METHODS.items(), ("random", "kmeans")
    ):
        method, ipc = setting.split(", ipc ")
        words = ["--method", method, "-f", "2" if method == "idc" else "1", "--ipc", ipc, "--select", select]
        runs[f"{setting}, {select}, seed {seed}"] = (
            [*words, "--seed", str(seed), "--tag", f"{select}_seed{seed}"],
            {-1: accuracy} if select == "random" else {},
        )
    return all_of(record, runs)


def faster(record: Record) -> bool:
    """Distil by faster ways to the same accuracy, with pools of networks. Returns whether all runs ended.

    A pool is kept in the record, for a machine that has the images in the same place.
    """
    runs: Runs = {}
    for seed, ipc, (name, (flags, own, published)), select in itertools.product(
        range(record.given.seeds), (10, 1), FASTER.items(), ("random", "kmeans")
    ):
        words = [*flags.split(), "-f", "2", "--ipc", str(ipc), "--select", select, "--seed", str(seed)]
        tag = f"{name.replace(', ', '_')}_{select}_seed{seed}"
        known = {-1: published[ipc]} if select == own else {}
        runs[f"{name}, ipc {ipc}, {select}, seed {seed}"] = ([*words, "--tag", tag], known)
    return all_of(record, runs)


def arms(record: Record) -> bool:
    """Distil from random or k-means images, matching random ones or representatives. Returns whether all runs ended."""
    runs: Runs = {}
    for seed, (init, select) in itertools.product(range(record.given.seeds), ARMS):
        name = f"init {init}, select {select}, seed {seed}"
        words = ["--init", init, "--select", select, "--seed", str(seed), "--tag", f"{init}_{select}_seed{seed}"]
        runs[name] = ([*ARMS_BUDGET, *words], dict.fromkeys(ARMS_AT))
    return all_of(record, runs)


def all_of(record: Record, runs: Runs) -> bool:
    """Do the runs that --runs names, one after the other, as far as the time allows. Returns whether all ended."""
    say_table(record)
    ended = []
    for name, (words, published) in runs.items():
        if not name.startswith(tuple(record.given.runs)):
            continue
        try:
            ended.append(record.left > 0 and distil(record, name, words, published, snapshots=False))
        except (UserError, RuntimeError) as error:  # the others are to be tried
            record.say(f"{name}: failed: {first_line(error)}\n{traceback.format_exc()}")
            ended.append(False)
    return all(ended)


def say_table(record: Record) -> None:
    """Print the table's head, and the rows that are known already."""
    heads = ("last epoch, %", "best of 4 tests, %", "published", "minutes")
    record.say("{:54}{:>22}{:>22}{:>12}{:>10}".format("", *heads))
    for row, found in record.results.get(record.given.part, {}).items():
        record.say(line(row, found))
