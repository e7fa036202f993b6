"""The experts that a run asks for, and training those that are missing."""

from __future__ import annotations

import dataclasses
import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch

from utils.config import derived, resolve
from utils.config.build import Problem
from utils.config.options import CondenseOptions
from utils.config.presets import TRAJECTORY
from utils.files.atomic import checksum
from utils.method.images import ImageSet
from utils.method.pool import image_losses
from utils.method.selection import Context
from utils.method.training import Trainer, fresh_network
from utils.numerics.compilation import computing
from utils.runs.experts import Experts, other_images, portions, selected
from utils.system.distributed import SINGLE, Group
from utils.system.draws import Draws
from utils.system.errors import UsageError
from utils.system.process import Stopped, Stopper
from utils.system.report import Progress

log = logging.getLogger("dream")

# Options that trajectories depend on; CLUSTERING_OPTIONS only where images are clustered.
EXPERT_OPTIONS = (
    "dataset", "image_folder", "size", "whiten", "batch_real", "select", "expert_epochs", "expert_seed", "precision",
)  # fmt: skip
CLUSTERING_OPTIONS = ("interval", "kmeans", "cluster_raw")


def experts_of(o: CondenseOptions, problem: Problem, group: Group = SINGLE) -> Experts | None:
    """Experts whose trajectories a run matches, or which make its pool of networks, trained or not; None for neither.

    Raises UserError when their folder cannot be used.
    """
    trajectories = o.match == TRAJECTORY
    if not trajectories and not derived.has_pool(o):
        return None
    spec, data, saved = problem.spec, problem.data, resolve.as_saved(o)
    given = [name for name in ("npz", "split") if saved[name] is not None]  # else the identity is as it always was
    recipe = derived.expert_recipe(o, flip=data.flip)
    names = (*EXPERT_OPTIONS, *given, *(CLUSTERING_OPTIONS if trajectories and o.select != "random" else ()))
    identity = {
        **{name: saved[name] for name in names},
        **({} if trajectories else {"batch_real": recipe.batch_size, "select": "random", "kept": "both ends"}),
        "network": dataclasses.asdict(spec),
        "augmentation": derived.expert_augmentation(o, flip=data.flip),
        **{name: getattr(recipe, name) for name in ("mixup", "lr", "momentum", "weight_decay")},
    }
    kind = f"experts_{spec.name}_{o.select}" if trajectories else f"pool_{spec.name}"
    name = f"{kind}_{checksum(identity)[:8]}"
    folder = Path(o.results_dir) / o.dataset / name
    if other := group.broadcast(lambda: other_images(folder, data.files, data.training_digest)):
        folder = folder.with_name(f"{name}_{other[:8]}")
    kept: dict[str, Any] = {} if trajectories else {"ends_only": True, "images": sum(data.counts)}
    return Experts(folder, identity, count=o.experts, epochs=o.expert_epochs, **kept)


def train(o: CondenseOptions, problem: Problem, experts: Experts, stopper: Stopper, group: Group) -> int | None:
    """Train the experts that are missing. Returns the exit status if that was stopped, else None.

    Raises UsageError under torchrun, where none may be missing.
    """
    if not group.alone:
        if missing := group.broadcast(experts.missing):
            raise UsageError(
                f"{derived.needs_experts(o)}: {len(missing)} experts are missing in {experts.folder}; train them "
                "first, in one process: the same flags and --experts_only, without torchrun"
            )
        return None
    try:
        if experts.missing():
            data = problem.data
            with stopper, experts.held({"files": data.files, "training": data.digests["training"]}):
                _train_missing(experts, o, problem, stopper)
    except Stopped as stop:
        log.info("stopped (%s), the experts are saved in %s; %s", stop, experts.folder, resolve.how_to_go_on(o))
        return stopper.status
    log.info("the experts are ready in %s", experts.folder)
    return None


def _train_missing(experts: Experts, o: CondenseOptions, problem: Problem, stopper: Stopper) -> None:
    """Train the missing experts in turn, epoch by epoch. Raises Stopped on request, after saving."""
    real, device, spec = problem.data.train, problem.data.device, problem.spec
    done, total = experts.done(), o.experts * o.expert_epochs
    compute = computing(device, o.compile, o.precision, derived.experts_flop(o, spec, len(real)))
    log.info("%s: %d of %d epochs of experts to train", experts.folder, total - done, total)
    with compute.rounding(), Progress(total, "training experts", "epoch", done=done, keep=True) as progress:
        for k in experts.missing():
            net = fresh_network(spec, _expert_draws(o, device, "network", k))
            trainer = Trainer([net], [real], derived.expert_recipe(o, flip=problem.data.flip), compute)
            judged = partial(image_losses, images=real, compute=compute) if experts.ends_only else None
            for e in experts.epochs_left(k, trainer, stopper.reason, judged):
                _train_epoch(trainer, o, real, k, e)
                progress.advance()
            stopper.check()


def _train_epoch(trainer: Trainer, o: CondenseOptions, real: ImageSet, k: int, e: int) -> None:
    """Train expert k for epoch e: on all real images, or on as many that --select chooses anew every few batches."""
    if o.select == "random" or o.match != TRAJECTORY:
        trainer.all_images([_expert_draws(o, real.device, k, e)])
        return
    for number, count in enumerate(portions(len(trainer), o.batch_real, o.interval)):
        draws = _expert_draws(o, real.device, k, e, number)
        selecting = _expert_draws(o, real.device, "select", k, e, number)
        context = Context(trainer.nets[0], real, selecting, trainer.compute.cheapest(), o.cluster_raw, o.kmeans)
        trainer.epoch(selected(context, count, o.select, draws), [draws])


def _expert_draws(o: CondenseOptions, device: torch.device, *position: int | str) -> Draws:
    """Random numbers for one position in the training of experts; they depend on --expert_seed, not on --seed."""
    return Draws(device, o.expert_seed, "expert", *position)
