"""Evaluation of a small training set: networks trained on it from scratch and tested.

The result is the accuracy after the last epoch, and no test is chosen for it: neither the best of the epochs nor the
best of the repeats. The published figures of the field are the best of several tests of each training, so that
statistic is kept apart, for a comparison with them, and never shown without its name, BEST_OF_FOUR.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from models import NetSpec
from utils.method.images import ImageSet
from utils.method.training import Recipe, Trainer, confusion_matrix, train_networks
from utils.numerics.compute import Compute
from utils.system.distributed import Group
from utils.system.draws import Draws
from utils.system.errors import UserError
from utils.system.process import Stopper
from utils.system.report import Progress

TOGETHER = 4096  # images of a set up to which trainings run side by side; a larger one fills the machine by itself
BEST_OF_FOUR = "best of 4 tests %, as published: chosen on the test set"


def tested_epochs(epochs: int) -> set[int]:
    """Epochs after which a training is tested: the last of every quarter, or each where there are fewer than four."""
    return {-(-epochs * quarter // 4) for quarter in (1, 2, 3, 4)}


@dataclass(frozen=True)
class Score:
    """Test accuracies in per cent after the last epoch, one per training, and the confusion matrix summed over them.

    best_of_four: the best of the tests of each training, one after each quarter of its epochs, in place of the last
    one; None where it is unknown.
    """

    accuracies: tuple[float, ...]
    best_of_four: Score | None = None
    confusion: Tensor | None = field(default=None, compare=False, repr=False)  # (classes, classes), true by predicted

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any], repeat: int | None = None) -> Score:
        """The score that as_dict wrote, of the first `repeat` trainings only if given.

        Raises KeyError, TypeError, ValueError or OverflowError when the entries are no score.
        """
        accuracies = tuple(map(float, entries["accuracies"][:repeat]))
        best = entries.get("best_of_four")  # older files lack it
        return cls(accuracies, None if best is None else cls(tuple(map(float, best["accuracies"][:repeat]))))

    @property
    def n(self) -> int:
        """Number of trainings."""
        return len(self.accuracies)

    @property
    def mean(self) -> float:
        """Mean test accuracy in per cent."""
        return statistics.fmean(self.accuracies)

    @property
    def std(self) -> float | None:
        """Sample standard deviation of the accuracies (n - 1 degrees of freedom); None for a single training."""
        return statistics.stdev(self.accuracies) if self.n > 1 else None

    def __str__(self) -> str:
        spread = "" if self.std is None else f" +- {self.std:.1f}"
        return f"{self.mean:.1f}{spread} (n={self.n})"

    def as_dict(self) -> dict[str, object]:
        """Mean, standard deviation, n and single accuracies, rounded, as entries of a JSON file.

        So those of the best of four tests, under `best_of_four`.
        """
        best = {} if self.best_of_four is None else {"best_of_four": self.best_of_four.as_dict()}
        return {
            "accuracy_mean": round(self.mean, 4),
            "accuracy_std": None if self.std is None else round(self.std, 4),
            "n": self.n,
            "accuracies": [round(a, 4) for a in self.accuracies],
            **best,
        }

    def all_reduce(self, trainings: Sequence[int], group: Group, *, repeat: int) -> Score:
        """Score of all `repeat` trainings, from each rank's score of its own; trainings: the numbers of these."""
        assert self.confusion is not None and self.best_of_four is not None
        own = [self.accuracies, self.best_of_four.accuracies]
        accuracies = torch.zeros(2, repeat, dtype=torch.float64)
        accuracies[:, list(trainings)] = torch.tensor(own, dtype=torch.float64)
        last, best = map(tuple, group.all_reduce_disjoint(accuracies).tolist())
        return Score(last, Score(best), group.all_reduce_sum(self.confusion))


# Called with the numbers of the trainings that run side by side, the epoch, and their trainer.
OnEpoch = Callable[[Sequence[int], int, Trainer], None]


def evaluate_networks(
    spec: NetSpec,
    training_set: Callable[[int], ImageSet],
    test: ImageSet,
    recipe: Recipe,
    *,
    trainings: Sequence[int],
    seed: int,
    compute: Compute,
    title: str = "evaluating",
    stopper: Stopper | None = None,
    on_epoch: OnEpoch | None = None,
) -> Score:
    """Train fresh networks and test each after every quarter of its epochs, under a progress bar.

    training_set(r) returns the images of training number r. Trainings are independent: their results do not depend on
    whether they run side by side, one after the other or on other ranks. on_epoch is called after every epoch. Raises
    Stopped between two epochs when a signal asks for it, and UserError when a network's weights are NaN.
    """
    with compute.rounding(), Progress(len(trainings) * recipe.epochs, title, "epoch") as progress:
        with progress.paused():  # selecting real images may take longer than training on them
            sets = {r: training_set(r) for r in trainings}
        draws = {r: Draws(test.device, seed, "evaluate", r) for r in trainings}
        together = _side_by_side(list(sets.values()), recipe, test, compute)
        accuracies: list[float] = []
        bests: list[float] = []
        confusion = torch.zeros(test.classes, test.classes, dtype=torch.int64, device=test.device)
        for first in range(0, len(trainings), together):
            now = trainings[first : first + together]
            trained = train_networks(spec, [sets[r] for r in now], recipe, [draws[r] for r in now], compute)
            best = [0.0] * len(now)
            for epoch, trainer in trained:
                progress.advance(len(now))
                if stopper is not None:
                    stopper.check(signals_only=True)
                if on_epoch is not None:
                    on_epoch(now, epoch, trainer)
                if epoch in tested_epochs(recipe.epochs):
                    for r, net in zip(now, trainer.nets, strict=True):
                        if not all(torch.isfinite(p).all() for p in net.parameters()):
                            raise UserError(f"training {r + 1} of {spec.name} gave NaN; lower --lr ({recipe.lr:g})")
                    matrices = [confusion_matrix(net, test, compute) for net in trainer.nets]
                    last = [100 * matrix.trace().item() / len(test) for matrix in matrices]
                    best = list(map(max, best, last))
            accuracies += last
            bests += best
            confusion += sum(matrices)
            del trainer  # and its CUDA graphs, before the next one's are captured
    return Score(tuple(accuracies), Score(tuple(bests)), confusion.cpu())


def _side_by_side(sets: Sequence[ImageSet], recipe: Recipe, test: ImageSet, compute: Compute) -> int:
    """Number of trainings that run side by side: all of them if the sets are small and of one size, else one."""
    sizes = {len(train) for train in sets}
    if len(sizes) != 1 or max(sizes) > TOGETHER:
        return 1
    pixels = len(sets) * min(*sizes, recipe.batch_size) * test.side**2  # of one step
    return len(sets) if test.device.type == "cuda" or pixels <= compute.pixels else 1
