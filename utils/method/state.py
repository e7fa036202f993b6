"""The state of a run: the pixels, the network of the current outer iteration, and the position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models import Network
from utils.method.images import RealImages
from utils.method.matching import MatchingStep
from utils.method.pixels import PixelSGD
from utils.method.training import Trainer
from utils.method.trajectory import TrajectoryStep
from utils.system.distributed import Shard

PER_CLASS = ("pixels", "velocity", "picks", "losses")  # entries of a checkpoint with one row per class


class NotFinite(ArithmeticError):
    """Losses, pixels or weights are NaN or infinite; says where in the run, and in which classes."""

    def __init__(self, it: int, step: int, classes: list[int]) -> None:
        """Name the outer iteration, counted from one, the inner steps done in it, and the classes (or no class)."""
        super().__init__(f"outer iteration {it}, inner step {step}")
        self.it, self.step, self.classes = it, step, classes


class Losses(NamedTuple):
    """Matching distances of every class, summed over the inner steps of an outer iteration so far."""

    it: int  # the outer iteration, counted from one
    steps: int
    sums: Tensor  # (classes,) of this rank's classes


@dataclass
class State:
    """All that a run needs to go on; everything else, random numbers included, follows from options and position.

    Tensors hold the rows of this rank's classes; `state_dict` gathers those of all classes.
    """

    optimizer: PixelSGD  # of the synthetic pixels
    trainer: Trainer  # of the network of this outer iteration
    matching_step: MatchingStep | TrajectoryStep  # moves the pixels
    picks: Tensor  # (classes, batch_real) positions of the real images that are matched at present
    losses: Tensor  # (classes,) summed over the inner steps of this outer iteration
    shard: Shard
    real_images: RealImages
    it: int = 0  # outer iteration of the next inner step
    step: int = 0  # the next inner step within it
    selected: bool = False  # whether picks hold a selection yet
    seconds: float = 0.0  # of distilling in all sessions up to the last save, without evaluations
    accuracy: float | None = None  # of the latest evaluation, per cent
    timed: float = 0.0  # seconds, experts included, of the latest evaluation; one that is stopped is due again

    @property
    def net(self) -> Network:
        """The network of this outer iteration."""
        return self.trainer.nets[0]

    @property
    def pixels(self) -> Tensor:
        """Stored images of all classes as they are now, (classes, ipc, C, H, W)."""
        return self.shard.all_gather(self.optimizer.pixels)

    @property
    def result(self) -> Tensor:
        """The distilled set as it is now, like `pixels`: their moving average, if there is one."""
        average = self.optimizer.average
        return self.pixels if average is None else self.shard.all_gather(average)

    # --- The steps of Algorithm 1 -------------------------------------------------------------------------------------

    def begin_iteration(self, net: Network, pixel_rate: float, judge: Tensor | None = None) -> None:
        """Begin an outer iteration: another network, pixels clamped to [0, 1]. Their velocity stays, as published.

        pixel_rate, judge: see `set_up`.
        """
        self.trainer.restart(net)
        self.set_up(pixel_rate, judge)
        self.optimizer.clamp()
        self.losses.zero_()

    def set_up(self, pixel_rate: float, judge: Tensor | None = None) -> None:
        """Set what holds for an outer iteration: the pixels' learning rate, and parameters (P,) to calibrate under."""
        self.optimizer.set_lr(pixel_rate)
        if judge is not None:
            assert isinstance(self.matching_step, MatchingStep)
            self.matching_step.judge_by(judge)

    def selection_due(self, interval: int, inner_loop: int) -> bool:
        """Whether real images are to be selected before the next inner step (Sec. 3.3).

        The steps of every outer iteration are counted from zero, and real images selected where `interval` divides the
        count. If an interval is longer than an outer iteration, the steps of the whole run are counted instead.
        """
        taken = self.step if interval <= inner_loop else self.it * inner_loop + self.step
        return not self.selected or taken % interval == 0

    def set_picks(self, picks: Tensor) -> None:
        """Match against these real images from now on; picks: (classes, batch_real) positions in the real set."""
        self.picks.copy_(picks)
        self.selected = True

    def advance(self, inner_loop: int) -> None:
        """Go on to the next inner step."""
        self.step += 1
        if self.step == inner_loop:
            self.it, self.step = self.it + 1, 0

    def losses_so_far(self, inner_loop: int) -> Losses:
        """The losses of this outer iteration, or between two, of the last; the device is not waited for."""
        it, steps = (self.it + 1, self.step) if self.step else (self.it, inner_loop)
        return Losses(it, steps, self.losses.clone())

    def mean_losses(self, earlier: Sequence[Losses], inner_loop: int) -> list[float]:
        """Mean matching distance per class and inner step of earlier losses and, last, of `losses_so_far`.

        The device is waited for once. Raises NotFinite about the first losses that are NaN or infinite, or about the
        pixels or weights as they are now, on any rank.
        """
        taken = [*earlier, self.losses_so_far(inner_loop)]
        sums = torch.stack([losses.sums for losses in taken], 1)  # (classes, times)
        finite = torch.isfinite(sums)
        finite[:, -1] &= torch.isfinite(self.optimizer.pixels.flatten(1)).all(1)
        weights = torch.stack([torch.isfinite(p).all() for p in self.net.parameters()]).all()
        all_sums, all_finite = self.shard.all_gather(sums).mT, self.shard.all_gather(finite.byte()).mT
        means = torch.stack([row.mean() for row in all_sums.contiguous()])
        # (times, 2 + classes): a single copy from the device
        rows = torch.cat([means[:, None], weights.expand(len(taken), 1), all_finite], 1).tolist()
        (broken,) = self.shard.group.all_reduce_max(not rows[-1][1])
        for losses, (_, _, *row) in zip(taken, rows, strict=True):
            if not all(row) or (broken and losses is taken[-1]):
                raise NotFinite(losses.it, losses.steps, [c for c, is_finite in enumerate(row) if not is_finite])
        return [row[0] / losses.steps for losses, row in zip(taken, rows, strict=True)]

    # --- Saving and going on ------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Content of a checkpoint: tensors and plain values of all classes, independent of which rank owns them."""
        rows = {
            "pixels": self.optimizer.pixels,
            "velocity": self.optimizer.velocity,
            "picks": self.real_images.to_global(self.picks),
            "losses": self.losses,
        }
        return {
            **{name: self.shard.all_gather(rows[name]) for name in PER_CLASS},
            **({} if self.optimizer.average is None else {"average": self.result}),
            "learned": self.matching_step.learned,
            "net": dict(self.net.state_dict()),  # plain, so that nothing but tensors is in the file
            "momentum": self.trainer.momentum,
            "selected": self.selected,
            "it": self.it,
            "step": self.step,
            "seconds": self.seconds,
            "accuracy": self.accuracy,
            "timed": self.timed,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Take over a checkpoint's content.

        Raises KeyError, IndexError, RuntimeError, TypeError or ValueError when it does not fit this run.
        """
        rows = {name: self.shard.local(saved[name]) for name in PER_CLASS}
        self.begin_from(saved["pixels"], saved["velocity"], saved["learned"], it=saved["it"], seconds=saved["seconds"])
        if self.optimizer.average is not None:
            self.optimizer.average.copy_(self.shard.local(saved["average"]))
        self.net.load_state_dict(saved["net"])
        for buffer, value in zip(self.trainer.momentum, saved["momentum"], strict=True):
            buffer.copy_(value)
        self.picks.copy_(self.real_images.to_local(rows["picks"].to(self.picks.device)))
        self.losses.copy_(rows["losses"])
        self.step, self.selected, self.accuracy = saved["step"], saved["selected"], saved["accuracy"]
        self.timed = float(saved.get("timed", 0.0))  # older checkpoints have none

    def begin_from(
        self, pixels: Tensor, velocity: Tensor, learned: dict[str, Tensor], *, it: int, seconds: float
    ) -> None:
        """Take over another run's pixels and their velocity at the beginning of outer iteration `it`.

        pixels, velocity: of all classes, (classes, ipc, C, H, W). learned: what else was learned; entries that this
        run does not learn are ignored. seconds: of distilling that it took.
        """
        with torch.no_grad():
            self.optimizer.pixels.copy_(self.shard.local(pixels))
            self.optimizer.velocity.copy_(self.shard.local(velocity))
            if self.optimizer.average is not None:
                self.optimizer.average.copy_(self.optimizer.pixels)
            for name in self.matching_step.learned.keys() & learned.keys():
                self.matching_step.learned[name].copy_(learned[name])
        self.it, self.seconds = it, seconds
