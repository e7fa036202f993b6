"""How good a small training set is: networks trained on it from scratch, tested once, at the last epoch.

There is no choice among test results anywhere: not among epochs, not among repeats.
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


@dataclass(frozen=True)
class Score:
    """Test accuracies in per cent, one per training; and what was taken for what in all of them together."""

    accuracies: tuple[float, ...]
    confusion: Tensor | None = field(default=None, compare=False, repr=False)  # see confusion_matrix

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


LOSSES = 50  # points of a curve
TOGETHER = 4096  # images of a set up to which trainings run side by side; a larger one fills the machine by itself


def evaluate(
    spec: NetSpec,
    training_set: Callable[[int], ImageSet],
    test: ImageSet,
    recipe: Recipe,
    *,
    trainings: Sequence[int],
    seed: int,
    compute: Compute,
    on_epoch: Callable[[int], None] = lambda count: None,
    on_loss: Callable[[int, int, float], None] | None = None,
) -> Score:
    """Train fresh networks and test each once. `training_set(r)` gives the training of number r its images.

    The trainings are independent of each other, whether they run side by side or in turn, here or elsewhere. on_epoch:
    told how many trainings have finished an epoch. on_loss: told a training's number, its epochs so far, and the loss
    on its own images, LOSSES times in a training.
    """
    sets = {r: training_set(r) for r in trainings}
    draws = {r: Draws(test.device, seed, "evaluate", r) for r in trainings}
    sizes = {len(train) for train in sets.values()}
    step = min(*sizes, recipe.batch_size) * test.side**2 if sizes else 0  # pixels of one step of one training
    few = len(sizes) == 1 and max(sizes) <= TOGETHER
    at_once = test.device.type == "cuda" or len(trainings) * step <= compute.pixels
    together = max(1, len(trainings)) if few and at_once else 1
    found = []
    total = torch.zeros(test.classes, test.classes, dtype=torch.int64, device=test.device)
    for first in range(0, len(trainings), together):
        now = trainings[first : first + together]

        def after(epoch: int, trainer: Trainer, now: Sequence[int] = now) -> None:
            on_epoch(len(now))
            if on_loss is not None and epoch % -(-recipe.epochs // LOSSES) == 0:
                for r, loss in zip(now, trainer.losses().tolist(), strict=True):
                    on_loss(r, epoch, loss)

        nets = train_networks(spec, [sets[r] for r in now], recipe, [draws[r] for r in now], compute, after)
        for r, net in zip(now, nets, strict=True):
            if not all(torch.isfinite(p).all() for p in net.parameters()):
                raise UserError(
                    f"training {r + 1} of {spec.name} left the range of numbers; lower --lr ({recipe.lr:g})"
                )
            matrix = confusion_matrix(net, test, compute)
            found.append(100 * matrix.trace().item() / len(test))
            total += matrix
    return Score(tuple(found), total.cpu())


def gathered(score: Score, trainings: Sequence[int], group: Group, repeat: int) -> Score:
    """Of all `repeat` trainings, from the score of those that each rank has done."""
    accuracies = torch.zeros(repeat, dtype=torch.float64)
    accuracies[list(trainings)] = torch.tensor(score.accuracies, dtype=torch.float64)
    assert score.confusion is not None
    return Score(tuple(group.all_reduce_disjoint(accuracies).tolist()), group.all_reduce_sum(score.confusion))
