"""Distil a labelled image set into a few synthetic images per class (DREAM, Liu et al., ICCV 2023).

    $ python3 condense.py                                       # scikit-learn's digits, minutes on a CPU
    $ python3 condense.py --reproduce -d cifar10 -f 2 --ipc 10  # the published setting, hours on a GPU
    $ python3 condense.py --image_folder photos --size 64       # images of your own
    $ python3 condense.py --method dm --select kmeans           # another framework, with representatives

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
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data import Dataset
from models import NetSpec, Network
from utils import checks, options, overview, recipes, runtime
from utils.augment import Augment
from utils.board import Board, check_board
from utils.compilation import computing
from utils.device import Compute, be_deterministic, peak_memory, pick_device, set_precision
from utils.earlier import Earlier, begin_from
from utils.errors import UserError, first_line, printable
from utils.evaluation import Score, evaluate
from utils.expert_runs import experts_for, train_experts
from utils.experts import Experts
from utils.flags import make_parser
from utils.formation import decode, decoded_count
from utils.images import ImageSet
from utils.matching import Matcher, MatchingStep
from utils.methods import TRAJECTORY
from utils.objectives import Comparison
from utils.options import CondenseOptions
from utils.pixels import PixelSGD
from utils.report import Progress, logged_to, messages, span
from utils.run import RunFolder
from utils.runtime import Draws, Stopped, Stopper
from utils.selection import Context, select
from utils.state import State, Step
from utils.synthetic import BASELINE, coreset, initial_pixels, training_images
from utils.training import Trainer, fresh_network, update_network
from utils.trajectory import TrajectoryStep

log = logging.getLogger("dream")

METRIC_LINES = 10_000  # losses in metrics.jsonl at most: of every outer iteration, or of every n-th


def condense(job: Job, state: State) -> None:
    """Bring the state from wherever it is to the last outer iteration (Algorithm 1). Raises Stopped on request."""
    o = job.o
    while state.it < o.niter:
        it, step = state.it, state.step
        if step == 0:
            job.observe(it, state)
            state.begin_iteration(fresh_network(job.spec, job.draws("network", it)))
            for epoch in range(o.pretrain):
                state.trainer.all_images([job.draws("pretrain", it, epoch)])
        if job.experts is None and state.selection_due(o.interval, o.inner_loop):
            context = job.context(state.net, job.draws("select", it, step), per_cluster=o.per_cluster)
            state.picks.copy_(select(context, o.batch_real, strategy=o.select))  # (classes, batch_real)

        # (classes,), on the device: reading them at every step would stall a GPU.
        state.losses += state.match(state.picks, job.draws("match", it, step))
        if step + 1 < o.inner_loop:  # after the last one another network comes
            update_network(state.trainer, n_data=job.n_data, draws=job.draws("update", it, step))

        state.advance(o.inner_loop)
        job.after_step(state)


class Job:
    """One command's fixed parts, and what happens around the steps: reports, evaluations, files."""

    def __init__(
        self,
        o: CondenseOptions,
        dataset: Dataset,
        spec: NetSpec,
        folder: RunFolder,
        stopper: Stopper,
        compute: Compute,
        earlier: Earlier | None = None,
        experts: Experts | None = None,
    ) -> None:
        """earlier: of another run, what to begin from when there is no checkpoint. experts: whose trajectories are
        matched, instead of the effect of real images."""
        self.o, self.dataset, self.spec, self.folder, self.stopper = o, dataset, spec, folder, stopper
        self.device = dataset.device
        self.shape = (dataset.classes, o.ipc, dataset.channels, dataset.side, dataset.side)  # of the stored pixels
        self.real, self.test = dataset.train, dataset.test
        self.compute, self.earlier, self.experts = compute, earlier, experts
        self.n_data = o.n_data if o.train_on == "real" else None  # None: all there are
        self.selecting = compute.cheapest()
        self.matcher = Matcher(
            how=Comparison(objective=o.match, metric=o.metric, bias=o.bias, fc=o.fc),
            factor=o.factor,
            decode_type=o.decode_type,
            batch_syn_max=o.batch_syn_max,
            augment=Augment(o.aug_type),
            compute=compute,
        )
        self.update = recipes.update_recipe(o)
        self.protocol = recipes.evaluation_recipe(o, flip=dataset.flip)
        self.progress = Progress(o.niter * o.inner_loop, "distilling", "step", keep=True)
        self.steps_here = 0
        self.first_step = self.started = time.monotonic()

    def draws(self, purpose: str, *position: int) -> Draws:
        return Draws(self.device, self.o.seed, purpose, *position)

    def context(self, net: Network, draws: Draws, *, per_cluster: int = 1) -> Context:
        """What representatives are selected from."""
        o = self.o
        return Context(net, self.real, draws, self.selecting, o.cluster_raw, o.kmeans, per_cluster)

    # --- State --------------------------------------------------------------------------------------------------------

    def start(self) -> State:
        """The state to go on from: the last checkpoint's, another run's, or the initial one; these two are saved."""
        o, saved = self.o, self.folder.load_checkpoint()
        if o.tensorboard:
            self.folder.board = Board(self.folder.path, goes_on_after=None if saved is None else saved.get("it"))
        given = saved is not None or self.earlier is not None
        pixels = torch.zeros(self.shape, device=self.device) if given else self.initial_pixels()
        rate = recipes.pixel_rate(o, side=self.dataset.side, base_side=self.dataset.base_side)
        net = fresh_network(self.spec, self.draws("network", 0))
        joint = self.real.normalize if o.pixel_step == "joint" else None
        sgd = PixelSGD(pixels, lr=rate, momentum=o.mom_img, joint=joint)
        state = State(
            pixels=sgd,
            trainer=self.trainer(net, pixels),
            match=self.step(net, sgd),
            picks=torch.zeros(self.real.classes, o.batch_real, dtype=torch.int64, device=self.device),
            losses=torch.zeros(self.real.classes, device=self.device),
        )
        if saved is not None:
            self.restore(state, saved)
        elif self.earlier is not None:
            e = self.earlier
            state.begin_at(e.pixels, e.velocity, e.learned, it=e.it, seconds=e.seconds)
            log.info("beginning with the pixels of %s, after its outer iteration %d", e.source, e.it)
        self.folder.session_metric(iteration=state.it, step=state.step, seconds=round(state.seconds, 1))
        if saved is None:
            self.save_pictures("initial", state.it, state.pixels.pixels)
            self.save(state)
        self.progress.start_at(state.it * o.inner_loop + state.step)
        return state

    def trainer(self, net: Network, pixels: Tensor) -> Trainer:
        """Of the network, on real images, or on the synthetic ones as they are whenever it trains."""
        o = self.o
        if o.train_on == "real":
            return Trainer([net], [self.real], self.update, self.compute)

        def current() -> Tensor:
            return decode(pixels, factor=o.factor, decode_type=o.decode_type).flatten(0, 1)

        return Trainer([net], [self.synthetic(pixels)], self.update, self.compute, current)

    def step(self, net: Network, sgd: PixelSGD) -> Step:
        """How pixels learn: from the effect of real images on the network, or from experts' trajectories."""
        o = self.o
        if self.experts is None:
            return MatchingStep(self.matcher, net, sgd, self.real)
        return TrajectoryStep(
            self.matcher,
            net,
            sgd,
            self.real,
            self.experts,
            steps=o.student_steps,
            epochs=o.match_epochs,
            max_start=o.max_start,
            step_size=o.step_size,
            lr_step=o.lr_step,
        )

    def initial_pixels(self) -> Tensor:
        net = fresh_network(self.spec, draws := self.draws("init"))
        return initial_pixels(self.context(net, draws), self.o.init, ipc=self.o.ipc, factor=self.o.factor)

    def restore(self, state: State, saved: dict[str, Any]) -> None:
        """Take over a checkpoint. Raises UserError when it does not fit."""
        try:
            state.restore(saved)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = first_line(error)
            raise UserError(
                f"{self.folder.path}: the checkpoint does not fit this run ({reason}); --restart"
            ) from error
        log.info("going on after outer iteration %d, inner step %d of %d", state.it, state.step, self.o.inner_loop)

    def save(self, state: State) -> None:
        """Checkpoint, data.pt and pictures of now. Never saves a state that has gone wrong."""
        self.mean_loss(state)
        state.seconds, self.started = self.seconds(state), time.monotonic()
        self.folder.save_checkpoint(state.save())
        self.folder.save_set(state.pixels.pixels, self.card(state, finished=False))
        self.save_pictures("latest", state.it, state.pixels.pixels)

    def seconds(self, state: State) -> float:
        """Of distilling so far, in all processes; evaluations don't count."""
        return state.seconds + time.monotonic() - self.started

    def save_pictures(self, when: str, it: int, pixels: Tensor) -> None:
        stored = pixels.clamp(0, 1)
        decoded = decode(stored, factor=self.o.factor, decode_type=self.o.decode_type)
        self.folder.save_pictures(when, it, stored, decoded)

    def card(self, state: State, *, finished: bool) -> dict[str, object]:
        of_experts = {} if self.experts is None else {"expert_seconds": round(self.experts.seconds, 1)}
        return {**overview.card(self.o, self.dataset, self.spec, state, finished=finished), **of_experts}

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
        self.stopper.check()
        if self.folder.checkpoint_due():
            self.save(state)

    def mean_loss(self, state: State) -> float:
        """Matching distance per class and inner step of this outer iteration. Raises UserError when it is no number."""
        it, steps = (state.it + 1, state.step) if state.step else (state.it, self.o.inner_loop)  # counted from one
        right = torch.isfinite(state.losses) & torch.isfinite(state.pixels.pixels.flatten(1)).all(1)  # (classes,)
        if not (right.all() and all(torch.isfinite(p).all() for p in state.net.parameters())):
            raise UserError(self.diverged(it, steps, [c for c, fine in enumerate(right.tolist()) if not fine]))
        return state.losses.mean().item() / steps

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
            self.folder.save_snapshot(it, state.pixels.pixels)

    def evaluate_at(self, it: int, state: State) -> Score:
        """Test the current set and log it."""
        began = time.monotonic()
        try:
            with self.progress.paused():
                training_set = self.synthetic(state.pixels.pixels.clamp(0, 1))
                score = self.evaluate(lambda r: training_set, f"evaluating iteration {it}")
        finally:  # also when it is stopped halfway
            elapsed = time.monotonic() - began
            self.started += elapsed
        state.accuracy = score.mean
        times = {"seconds": round(self.seconds(state), 1), "evaluation_seconds": round(elapsed, 1)}
        self.folder.metric(iteration=it, **score.as_dict(), net=self.spec.name, **times)
        log.info("iteration %d: test accuracy %% %s", it, score)
        return score

    def evaluate(self, training_set: Callable[[int], ImageSet], what: str) -> Score:
        o = self.o
        with Progress(o.repeat * o.epochs, what, "epoch") as progress:

            def on_epoch(count: int) -> None:
                progress.advance(count)
                self.stopper.check(signals_only=True)

            return evaluate(
                self.spec,
                training_set,
                self.test,
                self.protocol,
                repeat=o.repeat,
                seed=o.seed,
                compute=dataclasses.replace(self.compute, precision="fp32"),
                on_epoch=on_epoch,
            )

    def synthetic(self, pixels: Tensor) -> ImageSet:
        """The training images that pixels (classes, ipc, C, H, W) decode to now."""
        labels = torch.arange(len(pixels), device=self.device).repeat_interleave(self.o.ipc)
        return training_images(
            pixels.flatten(0, 1),
            labels,
            factor=self.o.factor,
            decode_type=self.o.decode_type,
            classes=self.real.classes,
            normalize=self.real.normalize,
        )

    def random_real(self, r: int) -> ImageSet:
        """As many randomly drawn real images per class as the set stores, other ones for every training."""
        draws = self.draws(BASELINE, r)
        return coreset(self.context(fresh_network(self.spec, draws), draws), "random", ipc=self.o.ipc)

    def finish(self, state: State) -> None:
        """Save, and evaluate once beside random real images."""
        self.save(state)
        self.save_pictures("final", state.it, state.pixels.pixels)
        if self.o.snapshot_every:
            self.folder.save_snapshot(state.it, state.pixels.pixels)
        random = self.evaluate(self.random_real, "evaluating random real images")
        scores = {"accuracy": self.evaluate_at(state.it, state).as_dict(), "random_real": random.as_dict()}
        self.folder.save_final_card({**self.card(state, finished=True), **scores})


def main(argv: Sequence[str]) -> int:
    """The program. Returns the exit status; raises UserError for mistakes of the user or the surroundings."""
    parser = make_parser(CondenseOptions, __doc__ or "")
    resolved = options.resolve(parser.parse_given(argv))
    o = resolved.options
    stopper = Stopper(o.max_minutes)
    with messages():
        device = pick_device(o.device)
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
        folder, saved = RunFolder(options.run_folder(o)), options.as_saved(o)
        if o.tensorboard:
            check_board()
        if o.dry_run:
            print(overview.describe(resolved, dataset, spec, folder))
            return 0
        experts = experts_for(o, spec) if o.match == TRAJECTORY else None
        if experts is not None and o.experts_only:
            return prepare(experts, o, dataset, spec, stopper) or 0
        check = partial(folder.check, saved, free=options.FREE, resumable=options.RESUMABLE, restart=o.restart)
        if check() == "finished":
            return say_finished(folder)

        if not len(dataset.test):
            raise UserError(f"{o.dataset}: has no test images")
        if experts is not None and (status := prepare(experts, o, dataset, spec, stopper)) is not None:
            return status
        shape = (dataset.classes, o.ipc, dataset.channels, dataset.side, dataset.side)
        earlier = None if o.resume_from is None else begin_from(Path(o.resume_from), saved, folder, shape)
        asked = {name: getattr(o, name) for name in ("ipc", "factor", "init", "n_data")}
        asked["batch_real"] = o.batch_real if experts is None else 0
        warnings = checks.check_sizes(dataset.train.counts, dataset.class_names, **asked)
        about = runtime.session("condense.py", argv, device, precision=o.precision, deterministic=o.deterministic)
        with folder.held():
            if check() == "finished":  # by another process in the meantime
                return say_finished(folder)
            folder.create(saved, about, restart=o.restart)
            with logged_to(folder.path / "log.txt"), stopper:
                shown = printable(f"{about['command']} on {about['device']}: {folder.path}")
                log.info("%s", shown)
                for warning in [*folder.flaws, *warnings]:
                    log.warning("%s", warning)
                flop = o.niter * o.inner_loop * overview.step_flop(o, spec, decoded=decoded, real=len(dataset.train))
                compute = computing(device, o.compile, o.precision, flop)
                compiled = ", compiled" if compute.compile else ""
                log.info("%.3g TFLOP to go in %s%s", flop / 1e12, o.precision, compiled)
                return run(Job(o, dataset, spec, folder, stopper, compute, earlier, experts))


def prepare(experts: Experts, o: CondenseOptions, dataset: Dataset, spec: NetSpec, stopper: Stopper) -> int | None:
    """Train the experts that are missing. Returns an exit status if that was stopped."""
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
    log.info("%s\npeak memory: %.2g GB", overview.summary(job.folder), peak_memory(job.device) / 1e9)
    return 0


def again(o: CondenseOptions) -> str:
    return "run the same command " + ("without --restart" if o.restart else "again")


def say_finished(folder: RunFolder) -> int:
    log.info("this run is finished; --restart begins it again\n%s", overview.summary(folder))
    return 0


if __name__ == "__main__":
    runtime.run_main(main)
