"""The state of a run: the pixels, the network of the current outer iteration, and the position."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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

    @property
    def net(self) -> Network:
        """The network of this outer iteration."""
        return self.trainer.nets[0]

    @property
    def pixels(self) -> Tensor:
        """Stored images of all classes as they are now, (classes, ipc, C, H, W)."""
        return self.shard.all_gather(self.optimizer.pixels)

    # --- The steps of Algorithm 1 -------------------------------------------------------------------------------------

    def begin_iteration(self, net: Network) -> None:
        """Begin an outer iteration: a fresh network, pixels clamped to [0, 1]. Their velocity stays, as published."""
        self.trainer.restart(net)
        self.optimizer.clamp()
        self.losses.zero_()

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

    def mean_loss(self, inner_loop: int) -> float:
        """Mean matching distance per class and inner step of this outer iteration.

        Raises NotFinite when losses, pixels or weights are NaN or infinite, on any rank.
        """
        it, steps = (self.it + 1, self.step) if self.step else (self.it, inner_loop)  # counted from one
        finite = torch.isfinite(self.losses) & torch.isfinite(self.optimizer.pixels.flatten(1)).all(1)  # (classes,)
        wrong = self.shard.all_gather((~finite).byte()).tolist()
        broken = not all(torch.isfinite(p).all() for p in self.net.parameters())
        if any((*wrong, *self.shard.group.all_reduce_max(broken))):
            raise NotFinite(it, steps, [c for c, is_wrong in enumerate(wrong) if is_wrong])
        return self.shard.all_gather(self.losses).mean().item() / steps

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
            "learned": self.matching_step.learned,
            "net": dict(self.net.state_dict()),  # plain, so that nothing but tensors is in the file
            "momentum": self.trainer.momentum,
            "selected": self.selected,
            "it": self.it,
            "step": self.step,
            "seconds": self.seconds,
            "accuracy": self.accuracy,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Take over a checkpoint's content.

        Raises KeyError, IndexError, RuntimeError, TypeError or ValueError when it does not fit this run.
        """
        rows = {name: self.shard.local(saved[name]) for name in PER_CLASS}
        self.begin_from(saved["pixels"], saved["velocity"], saved["learned"], it=saved["it"], seconds=saved["seconds"])
        self.net.load_state_dict(saved["net"])
        for buffer, value in zip(self.trainer.momentum, saved["momentum"], strict=True):
            buffer.copy_(value)
        self.picks.copy_(self.real_images.to_local(rows["picks"].to(self.picks.device)))
        self.losses.copy_(rows["losses"])
        self.step, self.selected, self.accuracy = saved["step"], saved["selected"], saved["accuracy"]

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
            for name in self.matching_step.learned.keys() & learned.keys():
                self.matching_step.learned[name].copy_(learned[name])
        self.it, self.seconds = it, seconds
