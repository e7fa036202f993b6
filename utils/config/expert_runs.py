"""The experts of a run with --method mtt: which ones its options ask for, and training those that are missing."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import torch

from data import Dataset
from models import NetSpec, forward_flop
from utils.config import options
from utils.config.derived import update_augmentation, update_recipe
from utils.config.options import CondenseOptions
from utils.files import atomic
from utils.method.images import ImageSet
from utils.method.selection import Context
from utils.method.training import Trainer, fresh_network
from utils.numerics.compilation import computing
from utils.runs.experts import Experts, portions, selected
from utils.system.draws import Draws
from utils.system.process import Stopper
from utils.system.report import Progress

log = logging.getLogger("dream")

# Options that trajectories depend on, and those that they depend on where images are selected.
NEEDED = (
    "dataset", "image_folder", "size", "whiten", "batch_real", "select", "expert_epochs", "expert_seed", "precision",
)  # fmt: skip
SELECTED = ("interval", "kmeans", "cluster_raw")


def experts_for(o: CondenseOptions, spec: NetSpec) -> Experts:
    """The experts that a run matches, trained or not. Raises UserError when their folder cannot be used."""
    saved = options.as_saved(o)
    names = (*NEEDED, *(SELECTED if o.select != "random" else ()))
    recipe = update_recipe(o)
    identity = {
        **{name: saved[name] for name in names},
        "network": dataclasses.asdict(spec),
        "augmentation": update_augmentation(o),
        **{name: getattr(recipe, name) for name in ("mixup", "lr", "momentum", "weight_decay")},
    }
    name = f"experts_{spec.name}_{o.select}_{atomic.checksum(identity)[:8]}"
    return Experts(Path(o.results_dir) / o.dataset / name, identity, count=o.experts, epochs=o.expert_epochs)


def experts_flop(o: CondenseOptions, spec: NetSpec, real: int) -> float:
    """Floating-point operations of training all experts on `real` images."""
    batches = -(-real // o.batch_real)
    selecting = -(-batches // o.interval) * real if o.select != "random" else 0
    return forward_flop(spec) * o.experts * o.expert_epochs * (3 * real + selecting)


def train_experts(experts: Experts, o: CondenseOptions, dataset: Dataset, spec: NetSpec, stopper: Stopper) -> None:
    """Train the experts that are missing. Raises Stopped on request, after saving; the same command goes on."""
    if not experts.missing():
        return
    real, device = dataset.train, dataset.device
    with stopper, experts.held():
        done, total = experts.done(), o.experts * o.expert_epochs
        compute = computing(device, o.compile, o.precision, experts_flop(o, spec, len(real)))
        log.info("%s: %d of %d epochs of experts to train", experts.folder, total - done, total)
        with Progress(total, "training experts", "epoch", keep=True) as progress:
            progress.start_at(done)
            for k in experts.missing():
                net = fresh_network(spec, expert_draws(o, device, "network", k))
                trainer = Trainer([net], [real], update_recipe(o), compute)
                for e in experts.epochs_left(k, trainer, stopper.reason):
                    train_epoch(trainer, o, real, k, e)
                    progress.advance()
                stopper.check()


def train_epoch(trainer: Trainer, o: CondenseOptions, real: ImageSet, k: int, e: int) -> None:
    """Epoch e of expert k: on all real images, or on as many that --select picks anew every few mini-batches."""
    if o.select == "random":
        trainer.all_images([expert_draws(o, real.device, k, e)])
        return
    for number, count in enumerate(portions(len(trainer), o.batch_real, o.interval)):
        draws = expert_draws(o, real.device, k, e, number)
        selecting = expert_draws(o, real.device, "select", k, e, number)
        context = Context(trainer.nets[0], real, selecting, trainer.compute.cheapest(), o.cluster_raw, o.kmeans)
        trainer.epoch(selected(context, count, o.select, draws), [draws])


def expert_draws(o: CondenseOptions, device: torch.device, *position: int | str) -> Draws:
    """Random numbers of one moment in the training of experts; they do not depend on --seed."""
    return Draws(device, o.expert_seed, "expert", *position)
