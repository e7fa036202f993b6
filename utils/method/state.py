"""Where a run is: the pixels, the network of the current outer iteration, and the position. Saved as a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from models import Network
from utils.method.pixels import PixelSGD
from utils.method.training import Trainer
from utils.system.draws import Draws

PER_CLASS = ("pixels", "velocity", "picks", "losses")  # what a checkpoint holds a row of for every class


class Step(Protocol):
    """One matching step: moves the pixels, and returns the distances, (classes,), valid until the next call.

    learned: what else it learns, which belongs to the state.
    """

    learned: dict[str, Tensor]

    def __call__(self, picks: Tensor, draws: Draws) -> Tensor: ...


@dataclass
class State:
    """All that a run needs to go on; everything else, random numbers included, derives from options and position."""

    pixels: PixelSGD
    trainer: Trainer  # of the network of this outer iteration
    match: Step  # of the pixels against it
    picks: Tensor  # (classes, batch_real) positions of the real images that are matched at present
    losses: Tensor  # (classes,) summed over the inner steps of this outer iteration
    it: int = 0  # the next inner step to take: outer iteration, and step in it
    step: int = 0
    selected: bool = False  # whether picks hold anything yet
    seconds: float = 0.0  # of distilling in all processes up to the last save, without evaluations
    accuracy: float | None = None  # of the latest evaluation, per cent

    @property
    def net(self) -> Network:
        return self.trainer.nets[0]

    def begin_iteration(self, net: Network) -> None:
        """A fresh network; pixels back in [0, 1], their velocity kept, as published."""
        self.trainer.restart(net)
        self.pixels.clamp()
        self.losses.zero_()

    def begin_at(
        self, pixels: Tensor, velocity: Tensor, learned: dict[str, Tensor], *, it: int, seconds: float
    ) -> None:
        """Take over pixels and velocity, (classes, ipc, C, H, W), at the beginning of outer iteration `it`, and of what
        else was learned whatever is learned here, too."""
        with torch.no_grad():
            self.pixels.pixels.copy_(pixels)
            self.pixels.velocity.copy_(velocity)
            for name in self.match.learned.keys() & learned.keys():
                self.match.learned[name].copy_(learned[name])
        self.it, self.seconds = it, seconds

    def selection_due(self, interval: int, inner_loop: int) -> bool:
        """Every so many inner steps of an outer iteration, its first one included; where it has fewer, of the run."""
        taken = self.step if interval <= inner_loop else self.it * inner_loop + self.step
        due, self.selected = not self.selected or taken % interval == 0, True
        return due

    def advance(self, inner_loop: int) -> None:
        """On to the next inner step."""
        self.step += 1
        if self.step == inner_loop:
            self.it, self.step = self.it + 1, 0

    def save(self) -> dict[str, Any]:
        """A checkpoint's content: tensors and plain values only."""
        return {
            "pixels": self.pixels.pixels,
            "velocity": self.pixels.velocity,
            "learned": self.match.learned,
            "net": dict(self.net.state_dict()),  # plain, so that nothing but tensors is in the file
            "momentum": self.trainer.momentum,
            "picks": self.picks,
            "selected": self.selected,
            "losses": self.losses,
            "it": self.it,
            "step": self.step,
            "seconds": self.seconds,
            "accuracy": self.accuracy,
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Take over a checkpoint. Raises KeyError or RuntimeError when it does not fit this run."""
        self.begin_at(saved["pixels"], saved["velocity"], saved["learned"], it=saved["it"], seconds=saved["seconds"])
        self.net.load_state_dict(saved["net"])
        for own, then in zip(self.trainer.momentum, saved["momentum"], strict=True):
            own.copy_(then)
        self.picks.copy_(saved["picks"])
        self.losses.copy_(saved["losses"])
        self.step, self.selected, self.accuracy = saved["step"], saved["selected"], saved["accuracy"]
