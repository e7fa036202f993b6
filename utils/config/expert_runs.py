"""The experts of a run of condense.py: which ones its options ask for, and the training of those that are missing."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

from data import Dataset
from models import NetSpec, forward_flop
from utils.config import derived as recipes
from utils.config import options
from utils.config.options import CondenseOptions
from utils.files import atomic
from utils.method.selection import Context
from utils.method.training import Trainer, fresh_network
from utils.numerics.compilation import computing
from utils.runs.experts import Experts, representative_epoch
from utils.system.draws import Draws
from utils.system.process import Stopper
from utils.system.report import Progress

log = logging.getLogger("dream")

# Options on which trajectories depend; and those on which they do where images are clustered.
DEPEND = (
    "dataset", "image_folder", "size", "whiten", "batch_real", "select", "expert_epochs", "expert_seed", "precision",
)  # fmt: skip
CLUSTERED = ("interval", "kmeans", "cluster_raw")


def experts_for(o: CondenseOptions, spec: NetSpec) -> Experts:
    """The experts that a run matches, trained or not. Raises UserError when their folder cannot be used."""
    saved = options.as_saved(o)
    names = (*DEPEND, *(CLUSTERED if o.select != "random" else ()))
    recipe = recipes.update_recipe(o)
    identity = {
        **{name: saved[name] for name in names},
        "network": dataclasses.asdict(spec),
        "augmentation": recipes.update_augmentation(o),
        **{name: getattr(recipe, name) for name in ("mixup", "lr", "momentum", "weight_decay")},
    }
    name = f"experts_{spec.name}_{o.select}_{atomic.checksum(identity)[:8]}"
    return Experts(Path(o.results_dir) / o.dataset / name, identity, count=o.experts, epochs=o.expert_epochs)


def experts_flop(o: CondenseOptions, spec: NetSpec, real: int) -> float:
    """Floating-point operations of all their training on `real` images."""
    batches = -(-real // o.batch_real)
    selected = -(-batches // o.interval) * real if o.select != "random" else 0
    return forward_flop(spec) * o.experts * o.expert_epochs * (3 * real + selected)


def train_experts(experts: Experts, o: CondenseOptions, dataset: Dataset, spec: NetSpec, stopper: Stopper) -> None:
    """Train what is missing of them. Raises Stopped on request, after saving; the same command goes on."""
    if not experts.missing():
        return
    real, device = dataset.train, dataset.device
    with stopper, experts.held():
        done, total = experts.done(), o.experts * o.expert_epochs
        compute = computing(device, o.compile, o.precision, experts_flop(o, spec, len(real)))
        log.info("%s: %d of %d epochs of experts to train", experts.folder, total - done, total)

        def draws(*position: int | str) -> Draws:
            return Draws(device, o.expert_seed, "expert", *position)

        def make(k: int) -> Trainer:
            return Trainer([fresh_network(spec, draws("network", k))], [real], recipes.update_recipe(o), compute)

        def epoch(trainer: Trainer, k: int, e: int) -> None:
            if o.select == "random":
                return trainer.all_images([draws(k, e)])

            def context(number: int) -> Context:
                chosen = draws("select", k, e, number)
                return Context(trainer.nets[0], real, chosen, compute.cheapest(), o.cluster_raw, o.kmeans)

            return representative_epoch(
                trainer, context, o.select, interval=o.interval, draws_of=lambda number: draws(k, e, number)
            )

        with Progress(total, "training experts", "epoch", keep=True) as progress:
            progress.start_at(done)
            experts.train(make, epoch, on_epoch=progress.advance, stop=stopper.check)
