"""How good a small training set is: networks trained on it from scratch, tested once, at the last epoch.

There is no choice among test results anywhere: not among epochs, not among repeats.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from models import NetSpec
from utils.device import Compute
from utils.errors import UserError
from utils.images import ImageSet
from utils.runtime import Draws
from utils.training import Recipe, accuracy, train_networks


@dataclass(frozen=True)
class Score:
    """Test accuracies in per cent, one per training."""

    accuracies: tuple[float, ...]

    @property
    def n(self) -> int:
        return len(self.accuracies)

    @property
    def mean(self) -> float:
        return statistics.fmean(self.accuracies)

    @property
    def std(self) -> float | None:
        """The sample standard deviation (n - 1); None for a single training."""
        return statistics.stdev(self.accuracies) if self.n > 1 else None

    def __str__(self) -> str:
        spread = "" if self.std is None else f" +- {self.std:.1f}"
        return f"{self.mean:.1f}{spread} (n={self.n})"

    def as_dict(self) -> dict[str, object]:
        """For JSON files."""
        return {
            "accuracy_mean": round(self.mean, 4),
            "accuracy_std": None if self.std is None else round(self.std, 4),
            "n": self.n,
            "accuracies": [round(a, 4) for a in self.accuracies],
        }


TOGETHER = 4096  # images of a set up to which trainings run side by side; a larger one fills the machine by itself


def evaluate(
    spec: NetSpec,
    training_set: Callable[[int], ImageSet],
    test: ImageSet,
    recipe: Recipe,
    *,
    repeat: int,
    seed: int,
    compute: Compute,
    on_epoch: Callable[[int], None] = lambda count: None,
) -> Score:
    """Train `repeat` fresh networks and test each once. `training_set(r)` gives the r-th training its images.

    The trainings are independent of each other, whether they run side by side or in turn. on_epoch: told how many
    trainings have finished an epoch.
    """
    sets = [training_set(r) for r in range(repeat)]
    draws = [Draws(test.device, seed, "evaluate", r) for r in range(repeat)]
    size = min(len(sets[0]), recipe.batch_size) * test.side**2  # pixels of one step of one training
    few = all(len(train) == len(sets[0]) <= TOGETHER for train in sets)
    together = repeat if few and (test.device.type == "cuda" or repeat * size <= compute.pixels) else 1
    found = []
    for first in range(0, repeat, together):
        now = range(first, min(first + together, repeat))
        nets = train_networks(
            spec, [sets[r] for r in now], recipe, [draws[r] for r in now], compute, partial(on_epoch, len(now))
        )
        for r, net in zip(now, nets, strict=True):
            if not all(torch.isfinite(p).all() for p in net.parameters()):
                raise UserError(
                    f"training {r + 1} of {spec.name} left the range of numbers; lower --lr ({recipe.lr:g})"
                )
            found.append(accuracy(net, test, compute))
    return Score(tuple(found))
