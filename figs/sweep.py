"""Run condense.py once for every combination of some flags' values and seeds; runs that are finished are skipped.

$ python3 -m figs.sweep --vary select=random,kmeans --seeds 3 -- -d digits --ipc 1 --eval_every 2
$ python3 -m figs.sweep --vary interval=1,10 --vary batch_real=16,64 --seeds 3 -- -d digits

$ python3 -m figs.sweep --vary method=dc,dm:niter=400 --vary select=random,kmeans --table frameworks.md -- -d digits

$ python3 -m figs.sweep --vary method=dream,dream:networks=early,dance --figure pace.png -- -d digits --seconds 60 \\
      --eval_seconds 1

Flags behind a value, as in dm:niter=400, are set together with it. What follows `--` goes to condense.py as it is.
Every run is a command of its own, printed before it starts, in a folder of its own (--tag). Stop with Ctrl-C at any
time: the same command goes on. Ends with a table, mean +- std over seeds of the runs' accuracies and the mean of their
seconds of distilling, and the run folders, which figs.curves and figs.ablation draw; --table writes the table with the
first flag downwards and the others across; --figure draws accuracy over seconds, as figs.pace does. With --jobs N, N
runs at a time share the machine, each with one thread: their seconds are comparable with each other only.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cache, cached_property
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from data import Dataset
from figs import pace
from figs.common import OF_IMAGES, ending, style, write
from utils.config import build, resolve
from utils.config.options import FREE, CondenseOptions
from utils.method.evaluation import Score
from utils.runs.card import CARD, Card, load_card
from utils.system.errors import UsageError, UserError, printable
from utils.system.process import environment, run_main
from utils.system.report import messages, span

log = logging.getLogger("dream")
STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)
SCRIPT = Path(__file__).resolve().parent.parent / "condense.py"


class Value(NamedTuple):
    """One value of a varied flag."""

    name: str
    value: str
    more: tuple[tuple[str, str], ...]  # names and values of the flags that are set together with it

    @property
    def words(self) -> list[str]:
        """The flags for the command line."""
        return [part for name, value in ((self.name, self.value), *self.more) for part in (f"--{name}", value)]

    @property
    def tag(self) -> str:
        """The value in a folder's name, which has the method anyway."""
        own = [] if self.name == "method" else [(self.name, self.value)]
        return "_".join(f"{name}-{value}" for name, value in (*own, *self.more))

    @property
    def label(self) -> str:
        """The value without its flag's name: `dream`, or `dream, networks=early`."""
        return ", ".join([self.value, *(f"{name}={value}" for name, value in self.more)])

    def __str__(self) -> str:
        return f"{self.name}={self.label}"


class Planned:
    """A run of the sweep: its flags, and the results in its folder."""

    def __init__(self, setting: Sequence[Value], seed: int, more: Sequence[str]) -> None:
        """setting: one value of every varied flag. Raises UsageError for flags that condense.py refuses."""
        self.setting = setting
        self.title = title(setting)
        tag = "_".join([*(one.tag for one in setting if one.tag), f"seed{seed}"])
        varied = [word for one in setting for word in one.words]
        self.words = [*more, *varied, "--seed", str(seed), "--tag", tag]
        self.options = resolve.condense(self.words, "").options
        self.folder = build.run_folder(self.options)

    @property
    def finished(self) -> bool:
        """Whether the run's results are complete. Raises UsageError when the folder belongs to another command."""
        return self.folder.check() == "finished"

    @property
    def up_to_date(self) -> bool:
        """Whether the run is finished and its images untouched since; condense.py compares them otherwise."""
        if not self.finished:
            return False
        place = {name: getattr(self.options, name) for name in (*OF_IMAGES, "data_dir")}
        data = dataset(CondenseOptions(device="cpu", **place))
        return build.run_folder(self.options, data=data).check() == "finished"

    @property
    def accuracy(self) -> float:
        """Mean test accuracy at the end, in per cent."""
        return float(self.card["accuracy"]["accuracy_mean"])

    @property
    def seconds(self) -> float:
        """Seconds of distilling."""
        return float(self.card["seconds"])

    @property
    def expert_seconds(self) -> float:
        """Seconds of training the experts that were matched, which other runs may share."""
        return float(self.card.get("expert_seconds", 0))

    @cached_property
    def card(self) -> Card:
        """The run's data.json, once it is finished."""
        return load_card(self.folder.path / CARD)


@cache
def dataset(o: CondenseOptions) -> Dataset:
    """Data set of some options, whose images nobody reads; looked for once."""
    return build.dataset(o)


def title(setting: Sequence[Value]) -> str:
    """A setting in words: `select=kmeans, interval=10`."""
    return printable(", ".join(map(str, setting)))


def axis(text: str) -> list[Value]:
    """The values in FLAG=VALUE,VALUE:FLAG=VALUE,... Raises UsageError for other words."""
    name, _, values = text.partition("=")
    name = name.lstrip("-").replace("-", "_")
    if name in ("seed", "tag", *FREE) or not values or "" in values.split(","):
        raise UsageError(
            f"--vary {text}: expected FLAG=VALUE,VALUE,... with a flag of condense.py; --seeds N is for seeds"
        )
    parsed = []
    for word in values.split(","):
        value, *more = word.split(":")
        together = [other.partition("=") for other in more]
        if not all(left and right for left, _, right in together):
            raise UsageError(f"--vary {text}: expected VALUE:FLAG=VALUE, not {word!r}")
        parsed.append(Value(name, value, tuple((left.replace("-", "_"), right) for left, _, right in together)))
    return parsed


def plan(vary: Sequence[str], seeds: int, more: Sequence[str]) -> list[Planned]:
    """All runs: every setting with the first seed, then with the next. Raises UsageError for flags that are refused."""
    axes = [axis(text) for text in vary]
    for reserved in ("--seed", "--tag", "--restart", "--dry_run"):
        if any(word.replace("-", "_").split("=")[0] == reserved.replace("-", "_") for word in more):
            raise UsageError(
                f"{reserved}: the sweep sets seeds and tags itself, and neither deletes nor pretends; leave it out"
            )
    return [Planned(setting, seed, more) for seed in range(seeds) for setting in itertools.product(*axes)]


def run(planned: Planned, *, beside_others: bool = False) -> None:
    """Run condense.py in a process of its own. Raises UserError when it fails or is stopped.

    beside_others: with one thread, and silently: its messages are in its folder's log.txt.
    """
    command = [sys.executable, str(SCRIPT), *planned.words]
    log.info("python3 condense.py %s", shlex.join(planned.words))
    more: dict[str, Any] = {}
    if beside_others:
        more = {"stdout": subprocess.DEVNULL, "env": environment(OMP_NUM_THREADS="1")}
    with subprocess.Popen(command, **more) as process:
        status = None
        while status is None:
            try:
                status = process.wait()
            except KeyboardInterrupt:  # the run has received it too, and saves what it has
                continue
    if status in STOPPED:
        raise UserError("stopped; the same command goes on")
    if status:
        raise UserError(f"this run ended with status {status}; the same command goes on after what it said is mended")
    if not planned.finished:
        raise UserError("stopped before the run was finished; the same command goes on")


def run_all(runs: Sequence[Planned], jobs: int) -> None:
    """Run those that are not finished yet, `jobs` at a time. Raises UserError when one fails or is stopped."""
    todo = [one for one in runs if not one.up_to_date]
    before, began, ended = len(runs) - len(todo), time.monotonic(), 0
    if before:
        log.info("sweep: %d of %d runs are finished already", before, len(runs))

    def run_one(number: int, one: Planned) -> None:
        nonlocal ended
        # Lines and no bar: the run draws one itself.
        left = (time.monotonic() - began) / max(ended, 1) * (len(todo) - ended)
        words = f"about {span(left)} left" if ended else "time left unknown"
        log.info("sweep: run %d of %d (%s, seed %d), %s", number, len(runs), one.title, one.options.seed, words)
        run(one, beside_others=True) if jobs > 1 else run(one)
        ended += 1
        if jobs > 1:
            log.info("sweep: run %d is finished: test accuracy %% %s", number, result([one]))

    numbered = list(enumerate(todo, before + 1))
    if jobs == 1:
        for number, one in numbered:
            run_one(number, one)
        return
    with ThreadPoolExecutor(jobs) as pool:  # of threads that wait for processes
        futures = [pool.submit(run_one, number, one) for number, one in numbered]
        try:
            for future in as_completed(futures):
                future.result()
        except (KeyboardInterrupt, UserError) as error:
            # Those that run have received Ctrl-C too, and save; leaving the block waits for them.
            pool.shutdown(wait=False, cancel_futures=True)
            if isinstance(error, KeyboardInterrupt):
                raise UserError("stopped; the same command goes on") from None
            raise


def result(runs: Sequence[Planned]) -> str:
    """The result of repeats in words: `93.1 +- 0.4 (n=3), 31 s`."""
    score = Score(tuple(one.accuracy for one in runs))
    seconds, experts = (
        round(fmean(of_runs)) for of_runs in zip(*((r.seconds, r.expert_seconds) for r in runs), strict=True)
    )
    return f"{score}, {seconds} s" + (f" (experts: {experts} s)" if experts else "")


def table(runs: Sequence[Planned]) -> str:
    """A line for each setting: accuracy and time."""
    titles = list(dict.fromkeys(one.title for one in runs))
    wide = max(map(len, titles))
    lines = [f"{'':{wide}}   test accuracy %, mean +- std over seeds, and seconds of distilling"]
    lines += [f"{title:{wide}}   {result([one for one in runs if one.title == title])}" for title in titles]
    return "\n".join(lines)


def markdown(runs: Sequence[Planned]) -> str:
    """The table in Markdown: values of the first flag as rows, combinations of the others as columns."""
    rows = list(dict.fromkeys(one.setting[0].label for one in runs))
    columns = list(dict.fromkeys(title(one.setting[1:]) for one in runs))
    name = runs[0].setting[0].name
    lines = [f"| {name} | " + " | ".join(column or "test accuracy %" for column in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for row in rows:
        cells = [[r for r in runs if (r.setting[0].label, title(r.setting[1:])) == (row, c)] for c in columns]
        lines.append(f"| {row} | " + " | ".join(map(result, cells)) + " |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str]) -> int:
    """The program. Raises UserError for mistakes of the user, and when a run fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--vary", action="append", required=True, metavar="FLAG=VALUES", help="values with commas; may be repeated"
    )
    parser.add_argument(
        "--seeds", type=int, default=3, help="runs of every setting, with --seed 0, 1, ... (default: 3)"
    )
    parser.add_argument("--table", type=ending(".md"), metavar="FILE", help="write the table as Markdown, FILE.md")
    parser.add_argument(
        "--figure", type=ending(".png", ".pdf"), metavar="FILE", help="draw accuracy over seconds, and print its table"
    )
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="runs at a time, with one thread each if several (default: 1)"
    )
    parser.add_argument("more", nargs="*", metavar="FLAGS", help="flags of condense.py, after --")
    given = parser.parse_args(argv)
    if given.seeds < 1:
        raise UsageError(f"--seeds {given.seeds}: is not 1 or more")
    if given.jobs < 1:
        raise UsageError(f"--jobs {given.jobs}: is not 1 or more")
    runs = plan(given.vary, given.seeds, given.more)
    with messages():
        run_all(runs, given.jobs)
    print("\n".join(printable(str(one.folder.path)) for one in runs))
    print(table(runs))
    if given.table is not None:
        write(given.table, markdown(runs).encode(), flag="--table")
    if given.figure is not None:
        with messages(), style():
            pace.report(pace.measured([one.folder.path for one in runs]), given.figure)
    return 0


if __name__ == "__main__":
    run_main(main)
