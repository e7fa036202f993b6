"""Distil a labelled image set into a few synthetic images per class (DREAM, Liu et al., ICCV 2023).

    $ python3 condense.py                                       # scikit-learn's digits, minutes on a CPU
    $ python3 condense.py --reproduce -d cifar10 -f 2 --ipc 10  # the published setting, hours on a GPU
    $ python3 condense.py --image_folder photos --size 64       # images of your own
    $ python3 condense.py --method dm --select kmeans           # another framework, with representatives
    $ torchrun --nproc_per_node=8 condense.py --reproduce -d cifar100 -f 2 --ipc 50   # on eight GPUs

Run the same command again to go on after a stop. `python3 train.py` evaluates the result.
"""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # So that Ctrl-C shows no traceback while PyTorch is loaded; run_main takes it back.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor

from data import Dataset
from models import NetSpec
from utils.config import checks, options, overview
from utils.config import derived as recipes
from utils.config.build import Parts
from utils.config.expert_runs import experts_for, train_experts
from utils.config.flags import make_parser
from utils.config.methods import TRAJECTORY
from utils.config.options import CondenseOptions
from utils.method.evaluation import Score, evaluate, gathered
from utils.method.formation import decode, decoded_count
from utils.method.images import ImageSet
from utils.method.selection import select
from utils.method.state import State
from utils.method.training import update_network
from utils.numerics.compilation import computing
from utils.runs.board import check_board
from utils.runs.checkpoint import Earlier, begin_from
from utils.runs.experts import Experts
from utils.runs.folder import Elsewhere, RunFolder
from utils.system import distributed, process
from utils.system.device import backends, be_deterministic, peak_memory, pick_device, set_precision
from utils.system.errors import UsageError, UserError, first_line, printable
from utils.system.process import Stopped, Stopper
from utils.system.report import Progress, messages, span

log = logging.getLogger("dream")

METRIC_LINES = 10_000  # losses in metrics.jsonl at most: of every outer iteration, or of every n-th


def condense(job: Job, state: State) -> None:
    """Bring the state from wherever it is to the last outer iteration (Algorithm 1). Raises Stopped on request.

    Of the classes that this process owns, if others work on the same run: they draw the same random numbers.
    """
    o, parts = job.o, job.parts
    while state.it < o.niter:
        it, step = state.it, state.step
        if step == 0:
            job.observe(it, state)
            state.begin_iteration(parts.network(it))
            for epoch in range(o.pretrain):
                state.trainer.all_images([parts.draws("pretrain", it, epoch)])
        if job.experts is None and state.selection_due(o.interval, o.inner_loop):
            context = parts.context(state.net, parts.draws("select", it, step), per_cluster=o.per_cluster)
            state.picks.copy_(select(context, o.batch_real, strategy=o.select))  # (classes, batch_real)

        # (classes,), on the device: reading them at every step would stall a GPU.
        state.losses += state.match(state.picks, parts.draws("match", it, step))
        if step + 1 < o.inner_loop:  # after the last one another network comes
            update_network(state.trainer, n_data=parts.n_data, draws=parts.draws("update", it, step))

        state.advance(o.inner_loop)
        job.after_step(state)


class Job:
    """One command, and what happens around the steps: reports, evaluations, files."""

    def __init__(self, parts: Parts, folder: RunFolder, stopper: Stopper, earlier: Earlier | None = None) -> None:
        """earlier: of another run, what to begin from when there is no checkpoint."""
        self.parts, self.folder, self.stopper, self.earlier = parts, folder, stopper, earlier
        self.o = o = parts.o
        self.dataset, self.device = parts.dataset, parts.device
        self.group, self.shard, self.experts = parts.group, parts.shard, parts.experts
        self.protocol = recipes.evaluation_recipe(o, flip=self.dataset.flip)
        self.progress = Progress(o.niter * o.inner_loop, "distilling", "step", keep=True)
        self.steps_here = 0
        self.first_step = self.started = time.monotonic()

    # --- State --------------------------------------------------------------------------------------------------------

    def start(self) -> State:
        """The state to go on from: the last checkpoint's, another run's, or the initial one; these two are saved."""
        o, saved = self.o, self.group.broadcast(self.folder.load_checkpoint)
        if o.tensorboard:
            self.folder.open_board(goes_on_after=None if saved is None else saved.get("it"))
        state = self.parts.state(empty=saved is not None or self.earlier is not None)
        if saved is not None:
            self.restore(state, saved)
        elif self.earlier is not None:
            e, own = self.earlier, self.shard.local
            state.begin_at(own(e.pixels), own(e.velocity), e.learned, it=e.it, seconds=e.seconds)
            log.info("beginning with the pixels of %s, after its outer iteration %d", e.source, e.it)
        self.folder.session_metric(iteration=state.it, step=state.step, seconds=round(state.seconds, 1))
        if saved is None:
            self.save_pictures("initial", state.it, self.parts.pixels(state))
            self.save(state)
        self.progress.start_at(state.it * o.inner_loop + state.step)
        return state

    def restore(self, state: State, saved: dict[str, Any]) -> None:
        """Take over a checkpoint. Raises UserError when it does not fit."""
        try:
            self.parts.restore(state, saved)
        except (IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = first_line(error)
            raise UserError(
                f"{self.folder.path}: the checkpoint does not fit this run ({reason}); --restart"
            ) from error
        log.info("going on after outer iteration %d, inner step %d of %d", state.it, state.step, self.o.inner_loop)

    def save(self, state: State) -> None:
        """Checkpoint, data.pt and pictures of now. Never saves a state that has gone wrong."""
        self.mean_loss(state)
        state.seconds, self.started = self.seconds(state), time.monotonic()
        content = self.parts.saved(state)
        self.folder.save_checkpoint(content)
        self.folder.save_set(content["pixels"], self.card(state, finished=False))
        self.save_pictures("latest", state.it, content["pixels"])

    def seconds(self, state: State) -> float:
        """Of distilling so far, in all sessions; evaluations don't count."""
        return state.seconds + time.monotonic() - self.started

    def save_pictures(self, when: str, it: int, pixels: Tensor) -> None:
        stored = pixels.clamp(0, 1)
        decoded = decode(stored, factor=self.o.factor, decode_type=self.o.decode_type)
        self.folder.save_pictures(when, it, stored, decoded)

    def card(self, state: State, *, finished: bool) -> dict[str, object]:
        experts, spec = self.experts, self.parts.spec
        seconds = None if experts is None else self.group.broadcast(lambda: experts.seconds)
        return overview.card(self.o, self.dataset, spec, state, finished=finished, expert_seconds=seconds)

    # --- Around a step ------------------------------------------------------------------------------------------------

    def after_step(self, state: State) -> None:
        """Report now and then, stop when asked to, save every few minutes."""
        o = self.o
        self.progress.advance()
        self.steps_here += 1
        if state.step == 0 and (state.it % -(-o.niter // METRIC_LINES) == 0 or state.it == o.niter):
            loss, seconds = self.mean_loss(state), self.seconds(state)
            self.folder.metric(iteration=state.it, loss=round(loss, 6), seconds=round(seconds, 1))
        if self.steps_here % o.interval == 0:
            accuracy = "" if state.accuracy is None else f", accuracy {state.accuracy:.1f} %"
            self.progress.say(f"iteration {state.it}/{o.niter}, loss {self.mean_loss(state):.4g}{accuracy}")
        if self.steps_here == 1:
            self.first_step = time.monotonic()
        if self.steps_here == o.interval + 1:  # one selection and its steps have been seen
            left = (time.monotonic() - self.first_step) / o.interval * (self.progress.total - self.progress.done)
            if left > 60:
                log.info("about %s for the steps that are left; stop at any time, the same command goes on", span(left))
        reason, due = self.group.all_reduce_max(self.stopper.reason(), self.folder.checkpoint_due())
        self.stopper.obey(reason)
        if due:
            self.save(state)

    def mean_loss(self, state: State) -> float:
        """Matching distance per class and inner step of this outer iteration. Raises UserError when it is no number."""
        it, steps = (state.it + 1, state.step) if state.step else (state.it, self.o.inner_loop)  # counted from one
        right = torch.isfinite(state.losses) & torch.isfinite(state.pixels.pixels.flatten(1)).all(1)  # (classes,)
        wrong = self.shard.all_gather((~right).byte()).tolist()
        broken = not all(torch.isfinite(p).all() for p in state.net.parameters())
        if any((*wrong, *self.group.all_reduce_max(broken))):
            raise UserError(self.diverged(it, steps, [c for c, is_wrong in enumerate(wrong) if is_wrong]))
        return self.shard.all_gather(state.losses).mean().item() / steps

    def diverged(self, it: int, steps: int, classes: list[int]) -> str:
        """The message about numbers that left their range: where, with which settings, and the way on."""
        o = self.o
        names = [self.dataset.class_names[c] for c in classes]
        where = f", class {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}" if names else ", in the network"
        return (
            f"not a number: matching loss, pixels or network in outer iteration {it}, by inner step {steps}{where}, "
            f"with --lr_img {o.lr_img:g} --mom_img {o.mom_img:g} --lr {o.lr:g} --precision {o.precision}. Nothing of "
            "this state was saved. To go on from the last one that was with a lower rate, add --resume_from "
            f"{self.folder.path} --lr_img {o.lr_img / 2:g} --tag NAME, or name an earlier data_<iteration>.pt "
            "(--snapshot_every)"
        )

    # --- Evaluation ---------------------------------------------------------------------------------------------------

    def observe(self, it: int, state: State) -> None:
        """Between two outer iterations: an evaluation and a copy of the set, where they are due."""
        o = self.o
        if o.eval_every and it % o.eval_every == 0:
            self.evaluate_at(it, state)
        if o.snapshot_every and it % o.snapshot_every == 0:
            self.folder.save_snapshot(it, self.parts.pixels(state))

    def evaluate_at(self, it: int, state: State) -> Score:
        """Test the current set and log it."""
        began = time.monotonic()
        try:
            with self.progress.paused():
                training_set = self.parts.synthetic(self.parts.pixels(state).clamp(0, 1))
                score = self.evaluate(lambda r: training_set, f"evaluating iteration {it}")
        finally:  # also when it is stopped halfway
            elapsed = time.monotonic() - began
            self.started += elapsed
        state.accuracy = score.mean
        times = {"seconds": round(self.seconds(state), 1), "evaluation_seconds": round(elapsed, 1)}
        self.folder.metric(iteration=it, **score.as_dict(), net=self.parts.spec.name, **times)
        log.info("iteration %d: test accuracy %% %s", it, score)
        return score

    def evaluate(self, training_set: Callable[[int], ImageSet], what: str) -> Score:
        """By all ranks, each of which does some of the trainings. Raises Stopped on request."""
        o, score = self.o, Score(())
        mine = self.group.assigned([1.0] * o.repeat)
        with Progress(len(mine) * o.epochs, what, "epoch") as progress:

            def on_epoch(count: int) -> None:
                progress.advance(count)
                self.stopper.check(signals_only=True)

            with suppress(Stopped):
                score = evaluate(
                    self.parts.spec,
                    training_set,
                    self.dataset.test,
                    self.protocol,
                    trainings=mine,
                    seed=o.seed,
                    compute=dataclasses.replace(self.parts.compute, precision="fp32"),
                    on_epoch=on_epoch,
                )
        (reason,) = self.group.all_reduce_max(self.stopper.reason(signals_only=True))
        self.stopper.obey(reason)
        return gathered(score, mine, self.group, o.repeat)

    def finish(self, state: State) -> None:
        """Save, and evaluate once beside random real images."""
        self.save(state)
        self.save_pictures("final", state.it, pixels := self.parts.pixels(state))
        if self.o.snapshot_every:
            self.folder.save_snapshot(state.it, pixels)
        sets = [self.parts.random_real(r) for r in range(self.o.repeat)]
        random = self.evaluate(sets.__getitem__, "evaluating random real images")
        scores = {"accuracy": self.evaluate_at(state.it, state).as_dict(), "random_real": random.as_dict()}
        self.folder.save_final_card({**self.card(state, finished=True), **scores})

    def say_finished(self) -> None:
        """What the run came to."""
        (peak,) = self.group.all_reduce_max(peak_memory(self.device))
        memory = f"peak memory: {peak / 1e9:.2g} GB"
        if not self.group.alone:
            sent = f"{self.group.sent / 1e6:.3g} MB to others in {self.steps_here} inner steps"
            memory += f", of the rank that took most; the first one has given {sent}"
        self.group.once(lambda: log.info("%s\n%s", overview.summary(self.folder), memory))


def main(argv: Sequence[str]) -> int:
    """The program. Returns the exit status; raises UserError for mistakes of the user or the surroundings."""
    parser = make_parser(CondenseOptions, __doc__ or "")
    resolved = options.resolve(parser.parse_given(argv))
    o = resolved.options
    stopper = Stopper(o.max_minutes)
    with messages(), distributed.joined(backends(), minutes=o.wait_minutes) as group:
        device = pick_device(o.device, distributed.local_rank())
        if o.deterministic:
            be_deterministic(device)
        set_precision(device, o.precision)
        dataset = Dataset(
            o.dataset,
            device=device,
            data_dir=o.data_dir,
            image_folder=o.image_folder,
            size=o.size,
            threads=o.data_threads,
            whiten=o.whiten,
        )
        spec = options.network(o, o.net_type, channels=dataset.channels, classes=dataset.classes, side=dataset.side)
        checks.check_method(dataclasses.asdict(o))
        checks.check_matching(o.match, spec)
        checks.check_factor(o.factor, dataset.side)
        decoded = decoded_count(o.ipc, factor=o.factor, decode_type=o.decode_type)
        checks.check_batches(spec, min(decoded, o.batch_syn_max), o.batch_real, o.batch_size, o.n_data or 2)
        folder, saved = group.either(RunFolder, Elsewhere)(options.run_folder(o)), options.as_saved(o)
        if o.tensorboard:
            check_board()
        if o.dry_run:
            print(overview.describe(resolved, dataset, spec, folder))
            return 0
        experts = experts_for(o, spec) if o.match == TRAJECTORY else None
        if experts is not None and o.experts_only:
            return prepare(experts, o, dataset, spec, stopper, group) or 0
        restart = o.restart and not distributed.restarts()
        check = partial(folder.check, saved, free=options.FREE, resumable=options.RESUMABLE, restart=restart)
        if group.broadcast(check) == "finished":
            return say_finished(folder, group)

        if not len(dataset.test):
            raise UserError(f"{o.dataset}: has no test images")
        if experts is not None and (status := prepare(experts, o, dataset, spec, stopper, group)) is not None:
            return status
        shard = group.shard(overview.class_work(o, dataset.counts, decoded=decoded))
        if not group.alone:
            dataset.hold(shard.classes, group.all_reduce_sum)
        shape = (dataset.classes, o.ipc, dataset.channels, dataset.side, dataset.side)
        begin = partial(begin_from, o.resume_from or "", {**saved, "restart": restart}, folder, shape)
        found = None if o.resume_from is None else group.broadcast(lambda: vars(e) if (e := begin()) else None)
        earlier = None if found is None else Earlier(**found)
        asked = {name: getattr(o, name) for name in ("ipc", "factor", "init", "n_data")}
        asked["batch_real"] = o.batch_real if experts is None else 0
        warnings = checks.check_sizes(dataset.counts, dataset.class_names, **asked)
        flop = o.niter * o.inner_loop * overview.step_flop(o, spec, counts=dataset.counts, decoded=decoded)
        compute = computing(device, o.compile, o.precision, flop)
        parts = Parts(o, dataset, spec, compute, shard, experts, group.broadcast(lambda: folder.last_session))
        about = process.session("condense.py", argv, device, precision=o.precision, deterministic=o.deterministic)
        with folder.held():
            if group.broadcast(check) == "finished":  # by another process in the meantime
                return say_finished(folder, group)
            about |= {"ranks": group.count, "network_update": parts.update_kind}
            folder.create(saved, about, restart=restart)
            with folder.logged(), stopper:
                shown = printable(f"{about['command']} on {about['device']}: {folder.path}")
                log.info("%s", shown)
                for warning in [*folder.flaws, *warnings]:
                    log.warning("%s", warning)
                compiled = ", compiled" if compute.compile else ""
                log.info("%.3g TFLOP to go in %s%s%s", flop / 1e12, o.precision, compiled, parts.shared_by)
                return run(Job(parts, folder, stopper, earlier))


def prepare(
    experts: Experts, o: CondenseOptions, dataset: Dataset, spec: NetSpec, stopper: Stopper, group: distributed.Group
) -> int | None:
    """Train the experts that are missing. Returns an exit status if that was stopped."""
    if not group.alone:
        if missing := group.broadcast(experts.missing):
            raise UsageError(
                f"--method mtt: {len(missing)} experts are missing in {experts.folder}; train them first, in one "
                "process: the same flags and --experts_only, without torchrun"
            )
        return None
    try:
        train_experts(experts, o, dataset, spec, stopper)
    except Stopped as stop:
        log.info("stopped (%s), the experts are saved in %s; %s to go on", stop, experts.folder, again(o))
        return stopper.status
    log.info("the experts are ready in %s", experts.folder)
    return None


def run(job: Job) -> int:
    """Distil, from wherever the run folder is to the end or a stop. Returns the exit status."""
    try:
        with job.progress:
            state = job.start()
            condense(job, state)
        job.finish(state)
    except Stopped as stop:
        job.save(state)
        log.info("stopped (%s) and saved in %s; %s to go on", stop, job.folder.path, again(job.o))
        return job.stopper.status
    finally:
        job.folder.board.close()
    job.say_finished()
    return 0


def again(o: CondenseOptions) -> str:
    return "run the same command " + ("without --restart" if o.restart else "again")


def say_finished(folder: RunFolder, group: distributed.Group) -> int:
    group.once(lambda: log.info("this run is finished; --restart begins it again\n%s", overview.summary(folder)))
    return 0


if __name__ == "__main__":
    process.run_main(main)
