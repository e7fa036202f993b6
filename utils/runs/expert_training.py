"""Training the experts that are missing, epoch by epoch, on all real images or on those that a strategy selects."""

from __future__ import annotations

import logging
from functools import partial
from typing import NamedTuple

from torch import Tensor

from models import NetSpec
from utils.method.images import ImageSet
from utils.method.pool import image_losses
from utils.method.selection import Context, select
from utils.method.training import Recipe, Trainer, batches, fresh_network
from utils.numerics.compute import Compute
from utils.runs.experts import Experts
from utils.system.draws import Draws
from utils.system.process import Stopper
from utils.system.report import Progress

log = logging.getLogger("dream")


class Selecting(NamedTuple):
    """How the images of an epoch are selected anew, every `interval` mini-batches."""

    strategy: str
    interval: int
    raw: bool  # embed un-normalised images
    kmeans: str


def train_missing(
    experts: Experts,
    spec: NetSpec,
    recipe: Recipe,
    real: ImageSet,
    compute: Compute,
    stopper: Stopper,
    *,
    seed: int,
    selecting: Selecting | None = None,
) -> None:
    """Train the missing experts in turn, each with networks and mini-batches that depend on `seed` and its number.

    selecting: where epochs are not on all real images. Raises Stopped on request, after saving, and UserError as
    `Experts.epochs_left` does. The experts' folder must be held.
    """
    done, total = experts.done(), experts.count * experts.epochs
    log.info("%s: %d of %d epochs of experts to train", experts.folder, total - done, total)
    with compute.rounding(), Progress(total, "training experts", "epoch", done=done, keep=True) as progress:
        for k in experts.missing():
            trainer = Trainer([fresh_network(spec, _draws(real, seed, "network", k))], [real], recipe, compute)
            judged = partial(image_losses, images=real, compute=compute) if experts.ends_only else None
            for e in experts.epochs_left(k, trainer, stopper.reason, judged):
                if selecting is None:
                    trainer.all_images([_draws(real, seed, k, e)])
                else:
                    _selected_epoch(trainer, real, selecting, seed, k, e)
                progress.advance()
            stopper.check()


def _draws(real: ImageSet, seed: int, *position: int | str) -> Draws:
    """Random numbers for one position in the training of experts."""
    return Draws(real.device, seed, "expert", *position)


# --- One epoch on representatives -------------------------------------------------------------------------------------


def _selected_epoch(trainer: Trainer, real: ImageSet, selecting: Selecting, seed: int, k: int, e: int) -> None:
    """Train expert k for epoch e on as many images as there are, selected anew every few mini-batches."""
    for number, count in enumerate(portions(len(trainer), trainer.recipe.batch_size, selecting.interval)):
        draws, order = _draws(real, seed, "select", k, e, number), _draws(real, seed, k, e, number)
        compute = trainer.compute.cheapest()
        context = Context(trainer.nets[0], real, draws, compute, selecting.raw, selecting.kmeans)
        trainer.epoch(selected(context, count, selecting.strategy, order), [order])


def portions(n: int, batch_size: int, interval: int) -> list[int]:
    """How many images each selection of an epoch has to find, so that the epoch has the mini-batches of one on all n
    images, and `interval` of them are selected together."""
    edges = batches(n, batch_size)
    firsts = range(0, len(edges), interval)
    return [edges[min(first + interval, len(edges)) - 1][1] - edges[first][0] for first in firsts]


def selected(context: Context, count: int, strategy: str, draws: Draws) -> Tensor:
    """Positions of `count` images that a strategy selects, equally many of every class up to one, in random order."""
    picks = select(context, -(-count // context.real.classes), strategy=strategy).flatten()
    return picks[draws.permutation(len(picks))[:count]]
