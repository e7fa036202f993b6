"""Records around the inner steps of a run: progress, losses, the time left, requests to stop."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from utils.method.state import Losses, State
from utils.runs.folder import RunFolder
from utils.system.device import peak_in_words, peak_memory
from utils.system.distributed import Group
from utils.system.process import Stopper
from utils.system.report import Progress, span

log = logging.getLogger("dream")

REPORT_SECONDS = {"cpu": 0.0, "cuda": 1.0}  # from one look at the losses to the next: a GPU has to be waited for
METRIC_LINES = 10_000  # losses in metrics.jsonl at most; longer runs record every n-th outer iteration only


class Due(NamedTuple):
    """What is to be done after an inner step: save a checkpoint, evaluate the set, finish since the time is spent."""

    save: bool
    evaluation: bool
    finish: bool


class Recorder:
    """The clock, the progress bar and metrics.jsonl of a run."""

    def __init__(
        self,
        folder: RunFolder,
        stopper: Stopper,
        group: Group,
        *,
        niter: int,
        inner_loop: int,
        interval: int,
        spent: float | None = None,
        budget: float | None = None,
        first_evaluation: float | None = None,
    ) -> None:
        """interval: inner steps, of niter * inner_loop, between two selections.

        spent: seconds that experts took before the run. budget: seconds, these included, after which the run is
        finished. first_evaluation: seconds, likewise, after which an evaluation is due, as at every doubling of them.
        """
        self.spent, self.budget, self.first_evaluation = spent or 0.0, budget or math.inf, first_evaluation or math.inf
        self.folder, self.stopper, self.group = folder, stopper, group
        self.niter, self.inner_loop, self.interval = niter, inner_loop, interval
        self.steps_here = 0
        self.now = 0.0  # `total` after the latest step, by the rank whose clock is furthest
        self._unread: list[tuple[Losses, float]] = []  # of finished outer iterations, and the seconds until then
        self._late = 0.0  # whether the next report is due, on any rank: they wait for each other in it
        self._estimated = False
        self._first_step = self._started = self._reported = time.monotonic()

    def start(self, state: State) -> bool:
        """Begin to record at the position of the state. Returns whether the budget of seconds is spent, on any rank."""
        self.folder.session_metric(iteration=state.it, step=state.step, seconds=round(state.seconds, 1))
        state.timed = max(state.timed, self.spent)
        done = state.it * self.inner_loop + state.step
        self.progress = Progress(self.niter * self.inner_loop, "distilling", "step", done=done, keep=True)
        (self.now,) = self.group.all_reduce_max(self.total(state))
        return self.now >= self.budget

    def seconds(self, state: State) -> float:
        """Seconds of distilling so far, in all sessions; evaluations don't count."""
        return state.seconds + time.monotonic() - self._started

    def total(self, state: State) -> float:
        """Seconds of distilling so far, those of the experts included."""
        return self.spent + self.seconds(state)

    def book(self, state: State) -> None:
        """Add the seconds since the last call to state.seconds; to be called before every save."""
        state.seconds, self._started = self.seconds(state), time.monotonic()

    @contextmanager
    def interrupted(self) -> Iterator[None]:
        """Stop the clock and the progress bar while the block runs."""
        began = time.monotonic()
        try:
            with self.progress.paused():
                yield
        finally:
            elapsed = time.monotonic() - began
            self._started += elapsed
            self._first_step += elapsed

    def after_step(self, state: State) -> Due:
        """Report progress, and return what is due on any rank. Raises Stopped on request."""
        self.progress.advance()
        self.steps_here += 1
        if state.step == 0 and (state.it % math.ceil(self.niter / METRIC_LINES) == 0 or state.it == self.niter):
            self._unread.append((state.losses_so_far(self.inner_loop), self.seconds(state)))
        if self.steps_here == 1 or (self._late and (self._unread or self.steps_here % self.interval == 0)):
            self.report(state)
        late = time.monotonic() - self._reported >= REPORT_SECONDS[state.losses.device.type]
        asked = (self.stopper.reason(), self.folder.checkpoint_due(), late, self.total(state))
        reason, save, self._late, self.now = self.group.all_reduce_max(*asked)
        self.stopper.obey(reason)
        finish, evaluation = self.now >= self.budget, self.now >= next_doubling(self.first_evaluation, state.timed)
        return Due(bool(save), evaluation and not finish, finish)

    def report(self, state: State) -> None:
        """Record the losses of the outer iterations that are finished, and show the present one's.

        To be called before every save and evaluation. Raises NotFinite for NaN in the state.
        """
        *means, now = state.mean_losses([losses for losses, _ in self._unread], self.inner_loop)
        for mean, (losses, seconds) in zip(means, self._unread, strict=True):
            self.folder.metric(iteration=losses.it, loss=round(mean, 6), seconds=round(seconds, 1))
        self._unread.clear()
        self._reported = time.monotonic()
        if self.steps_here:
            accuracy = "" if state.accuracy is None else f", accuracy {state.accuracy:.1f} %"
            self.progress.say(f"iteration {state.it}/{self.niter}, loss {now:.4g}{accuracy}")
            self._estimate(state)

    def _estimate(self, state: State) -> None:
        """Show once how long the run will take, when a selection and the steps after it have been timed.

        To be called after a look at the device, which may be far behind.
        """
        if self.steps_here == 1:
            self._first_step = self._reported
        elif self.steps_here > self.interval and not self._estimated:
            self._estimated = True
            pace = (self._reported - self._first_step) / (self.steps_here - 1)
            left = min(pace * (self.progress.total - self.progress.done), self.budget - self.total(state))
            if left > 60:
                log.info("about %s for the steps that are left; stop at any time, the same command goes on", span(left))

    def resources(self, device: torch.device) -> str:
        """Description for people: peak memory, and under torchrun the bytes sent to other ranks."""
        (peak,) = self.group.all_reduce_max(peak_memory(device))
        memory = peak_in_words(peak)
        if self.group.alone:
            return memory
        sent = f"{self.group.sent / 1e6:.3g} MB to others in {self.steps_here} inner steps"
        return f"{memory}, of the rank that took most; the first one has given {sent}"


def next_doubling(first: float, after: float) -> float:
    """The first of `first`, twice, four times as much, and so on, that is more than `after`."""
    while first <= after < math.inf:
        first *= 2
    return first
