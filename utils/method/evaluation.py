"""Evaluation of a small training set: networks trained on it from scratch, each tested once, after its last epoch.

No test result is ever chosen: neither the best of the epochs nor the best of the repeats.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

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


@dataclass(frozen=True)
class Score:
    """Test accuracies in per cent, one per training, and the confusion matrix summed over the trainings."""

    accuracies: tuple[float, ...]
    confusion: Tensor | None = field(default=None, compare=False, repr=False)  # (classes, classes), true by predicted

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
        """Mean, standard deviation, n and single accuracies, rounded, as entries of a JSON file."""
        return {
            "accuracy_mean": round(self.mean, 4),
            "accuracy_std": None if self.std is None else round(self.std, 4),
            "n": self.n,
            "accuracies": [round(a, 4) for a in self.accuracies],
        }

    def all_reduce(self, trainings: Sequence[int], group: Group, *, repeat: int) -> Score:
        """Score of all `repeat` trainings, from each rank's score of its own; trainings: the numbers of these."""
        accuracies = torch.zeros(repeat, dtype=torch.float64)
        accuracies[list(trainings)] = torch.tensor(self.accuracies, dtype=torch.float64)
        assert self.confusion is not None
        return Score(tuple(group.all_reduce_disjoint(accuracies).tolist()), group.all_reduce_sum(self.confusion))


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
    """Train fresh networks and test each once, under a progress bar.

    training_set(r) returns the images of training number r. Trainings are independent: their results do not depend on
    whether they run side by side, one after the other or on other ranks. on_epoch is called after every epoch. Raises
    Stopped between two epochs when a signal asks for it, and UserError when a network's weights are NaN.
    """
    with compute.rounding(), Progress(len(trainings) * recipe.epochs, title, "epoch") as progress:
        with progress.paused():  # selecting real images may take longer than training on them
            sets = {r: training_set(r) for r in trainings}
        draws = {r: Draws(test.device, seed, "evaluate", r) for r in trainings}
        together = _side_by_side(list(sets.values()), recipe, test, compute)
        accuracies, confusion = [], torch.zeros(test.classes, test.classes, dtype=torch.int64, device=test.device)
        for first in range(0, len(trainings), together):
            now = trainings[first : first + together]
            trained = train_networks(spec, [sets[r] for r in now], recipe, [draws[r] for r in now], compute)
            for epoch, trainer in trained:
                progress.advance(len(now))
                if stopper is not None:
                    stopper.check(signals_only=True)
                if on_epoch is not None:
                    on_epoch(now, epoch, trainer)
            for r, net in zip(now, trainer.nets, strict=True):
                if not all(torch.isfinite(p).all() for p in net.parameters()):
                    raise UserError(f"training {r + 1} of {spec.name} gave NaN; lower --lr ({recipe.lr:g})")
                matrix = confusion_matrix(net, test, compute)
                accuracies.append(100 * matrix.trace().item() / len(test))
                confusion += matrix
            del trainer  # and its CUDA graphs, before the next one's are captured
    return Score(tuple(accuracies), confusion.cpu())


def _side_by_side(sets: Sequence[ImageSet], recipe: Recipe, test: ImageSet, compute: Compute) -> int:
    """Number of trainings that run side by side: all of them if the sets are small and of one size, else one."""
    sizes = {len(train) for train in sets}
    if len(sizes) != 1 or max(sizes) > TOGETHER:
        return 1
    pixels = len(sets) * min(*sizes, recipe.batch_size) * test.side**2  # of one step
    return len(sets) if test.device.type == "cuda" or pixels <= compute.pixels else 1
