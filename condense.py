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
    # Until run_main sets it back, so that Ctrl-C shows no traceback while PyTorch is imported.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from utils.config import build, derived, resolve
from utils.config.build import Parts
from utils.config.experts import experts_of, train_experts
from utils.config.flags import as_argv
from utils.config.options import CondenseOptions
from utils.method.evaluation import BEST_OF_FOUR, Score
from utils.method.images import quantise, to_unit
from utils.method.selection import select
from utils.method.state import NotFinite
from utils.method.training import update_network
from utils.runs.folder import RunFolder
from utils.system import process
from utils.system.device import backends
from utils.system.distributed import process_group
from utils.system.errors import UserError, printable
from utils.system.process import Stopped, Stopper
from utils.system.report import messages

log = logging.getLogger("dream")


def condense(run: Run) -> None:
    """Distil from the position of a run's state to the last outer iteration (Algorithm 1). Raises Stopped on request.

    Under torchrun all ranks draw the same random numbers, and each works on the classes that it owns.
    """
    o, parts, state = run.o, run.parts, run.state
    while state.it < o.niter and not run.out_of_time:
        it, step = state.it, state.step
        if step == 0:
            run.before_iteration(it)
            state.begin_iteration(parts.network(it), *parts.set_up(it))  # another network; pixels back in [0, 1]
            for epoch in range(o.pretrain):
                state.trainer.all_images([parts.draws("pretrain", it, epoch)])
        if parts.matches_images and state.selection_due(o.interval, o.inner_loop):
            context = parts.selecting(state.net, it, step)
            state.set_picks(select(context, o.batch_real, strategy=o.select))  # (classes, batch_real)

        # Moves the pixels. Its distances (classes,) stay on the device: reading them at every step would stall a GPU.
        state.losses += state.matching_step(state.picks, parts.draws("match", it, step))
        if step + 1 < o.inner_loop:  # after the last step a fresh network follows
            update_network(state.trainer, n_data=parts.n_data, draws=parts.draws("update", it, step))

        state.advance(o.inner_loop)
        run.after_step()


class Run:
    """A run of condense.py: its state, and what is saved and measured around the steps."""

    def __init__(self, o: CondenseOptions, parts: Parts, folder: RunFolder, stopper: Stopper) -> None:
        """Begin at the folder's last checkpoint, else at --resume_from, else with initial pixels.

        Raises UserError when a checkpoint does not fit.
        """
        self.o, self.parts, self.folder, self.stopper = o, parts, folder, stopper
        self.recorder = parts.recorder(folder, stopper)
        saved = folder.load_checkpoint()
        if o.tensorboard:
            folder.open_board(goes_on_after=None if saved is None else saved.get("it"))
        self.state = parts.state(saved)
        self.out_of_time = self.recorder.start(self.state)  # of --seconds
        if saved is None:
            self.save_pictures("initial")
            self.save()

    def save(self) -> None:
        """Save checkpoint, data.pt and pictures. Raises NotFinite, and saves nothing, for NaN in the state."""
        self.recorder.report(self.state)  # raises NotFinite
        self.recorder.book(self.state)
        content = self.state.state_dict()
        self.folder.save_checkpoint(content)
        self.folder.save_set(content.get("average", content["pixels"]), self.card(finished=False))
        self.save_pictures("latest")

    def save_pictures(self, when: str) -> None:
        """Save the set's pictures, as stored and as decoded; when: initial, latest or final."""
        stored = self.stored()
        self.folder.save_pictures(when, self.state.it, stored, self.parts.formation.decode(stored))

    def stored(self) -> Tensor:
        """Pixels as data.pt holds them, (classes, ipc, C, H, W) in [0, 1]: rounded, if --store says so."""
        return to_unit(quantise(self.state.result, self.o.store))

    def card(self, *, finished: bool) -> dict[str, Any]:
        """The content of data.json."""
        return derived.run_card(self.o, *self.parts.problem, self.state, self.parts.expert_seconds, finished=finished)

    # --- Around the steps ---------------------------------------------------------------------------------------------

    def before_iteration(self, it: int) -> None:
        """Evaluate the set, and save a copy of it, if --eval_every and --snapshot_every say so."""
        if self.o.eval_every and it % self.o.eval_every == 0:
            self.evaluate()
        if self.o.snapshot_every and it % self.o.snapshot_every == 0:
            self.folder.save_snapshot(it, self.state.result)

    def after_step(self) -> None:
        """Report, save every few minutes, evaluate if --eval_seconds says so. Raises Stopped on request."""
        due = self.recorder.after_step(self.state)
        self.out_of_time = due.finish
        if due.save:
            self.save()
        if due.evaluation:
            self.evaluate()

    def evaluate(self) -> Score:
        """Train networks on the set as it is, test them, and log the score. Raises Stopped on request."""
        self.recorder.report(self.state)
        it, began = self.state.it, time.monotonic()
        with self.recorder.interrupted():
            sets = [self.parts.synthetic(self.stored())] * self.o.repeat
            score = self.parts.evaluate(sets, f"evaluating iteration {it}", self.stopper)
        self.state.accuracy, self.state.timed = score.mean, self.recorder.now
        times = {"seconds": self.recorder.seconds(self.state), "evaluation_seconds": time.monotonic() - began}
        rounded = {name: round(value, 1) for name, value in times.items()}
        self.folder.metric(iteration=it, **score.as_dict(), net=self.parts.spec.name, **rounded)
        best = f"; {BEST_OF_FOUR}: {score.best_of_four}" if self.o.show_best else ""
        log.info("iteration %d: test accuracy %% %s%s", it, score, best)
        return score

    def finish(self) -> None:
        """Save the finished set, and evaluate it beside random real images."""
        self.save()
        self.save_pictures("final")
        if self.o.snapshot_every:
            self.folder.save_snapshot(self.state.it, self.state.result)
        sets = [self.parts.random_real(r) for r in range(self.o.repeat)]
        random = self.parts.evaluate(sets, "evaluating random real images", self.stopper)
        scores = {"accuracy": self.evaluate().as_dict(), "random_real": random.as_dict()}
        self.folder.save_final_card({**self.card(finished=True), **scores})

    def to_the_end(self) -> int:
        """Distil until the run is finished or stopped. Returns the exit status."""
        try:
            try:
                with self.recorder.progress:
                    condense(self)
                self.finish()
            except Stopped as stop:
                self.save()
                log.info("stopped (%s) and saved in %s; %s", stop, self.folder.path, resolve.how_to_go_on(self.o))
                return self.stopper.status
        except NotFinite as error:
            names = self.parts.data.class_names
            raise UserError(derived.diverged(self.o, error, names, self.folder.path)) from error
        self.folder.say_results(after=self.recorder.resources(self.parts.device))
        return 0


def main(argv: Sequence[str]) -> int:
    """Run a command line of condense.py. Returns the exit status; raises UserError for what the user can mend."""
    resolved = resolve.condense(argv, __doc__ or "")
    o = resolved.options
    with messages(), process_group(backends(), minutes=o.wait_minutes) as group:
        # --- What is asked for: every rule between flags, data and network is checked here ---
        problem = build.problem(o)
        folder, stopper = build.run_folder(o, group, problem.data), Stopper(o.max_minutes)
        experts = experts_of(o, problem, group)
        if o.dry_run:
            print(derived.describe(resolved, *problem, folder.path, experts))
            return 0

        # --- What is there ---
        if not o.experts_only and folder.check() == "finished":
            return folder.say_finished()
        status = None if experts is None else train_experts(o, problem, experts, stopper, group)
        if status is not None or o.experts_only:
            return status or 0

        # --- Distil ---
        parts = Parts(o, problem, group, experts, folder)
        session = process.session("condense.py", argv, parts.device, **parts.conditions)
        with folder.held(session) as there:
            if there == "finished":  # by another process in the meantime
                return folder.say_finished()
            with stopper, parts.compute.rounding():
                log.info("%s", printable(f"{session['command']} on {session['device']}: {folder.path}"))
                for warning in (*folder.flaws, *parts.warnings):
                    log.warning("%s", warning)
                log.info("%s", parts.describe())
                return Run(o, parts, folder, stopper).to_the_end()


def distil(**flags: Any) -> Path:
    """Distil from Python, with the flags of condense.py as keywords: distil(dataset="digits", ipc=10, eval_every=5).

    Returns the run folder, which `train.evaluate` takes. Raises UserError with a message for the user, and
    KeyboardInterrupt after Ctrl-C, when everything is saved and the same call goes on.
    """
    argv = as_argv(flags)
    if main(argv):
        raise KeyboardInterrupt("stopped and saved; the same call goes on")
    return resolve.run_folder(resolve.condense(argv, "").options)


if __name__ == "__main__":
    process.run_main(main)
