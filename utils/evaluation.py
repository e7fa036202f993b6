"""How good a small training set is: networks trained on it from scratch, tested once, at the last epoch.

There is no choice among test results anywhere: not among epochs, not among repeats.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

from models import NetSpec
from utils.errors import UserError
from utils.images import ImageSet
from utils.runtime import Draws
from utils.training import Recipe, accuracy, train_network


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


def evaluate(
    spec: NetSpec,
    training_set: Callable[[int], ImageSet],
    test: ImageSet,
    recipe: Recipe,
    *,
    repeat: int,
    seed: int,
    on_epoch: Callable[[], None] = lambda: None,
) -> Score:
    """Train `repeat` fresh networks and test each once. `training_set(r)` gives the r-th training its images."""
    found = []
    for r in range(repeat):
        draws = Draws(test.device, seed, "evaluate", r)
        net = train_network(spec, training_set(r), recipe, draws, on_epoch)
        if not all(torch.isfinite(p).all() for p in net.parameters()):
            raise UserError(f"training {r + 1} of {spec.name} left the range of numbers; lower --lr ({recipe.lr:g})")
        found.append(accuracy(net, test))
    return Score(tuple(found))
