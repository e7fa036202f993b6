"""The experts that a run asks for, and training those that are missing."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

from utils.config import derived, resolve
from utils.config.build import Problem
from utils.config.options import CondenseOptions
from utils.config.presets import TRAJECTORY
from utils.files.atomic import checksum
from utils.numerics.compilation import computing
from utils.runs.expert_training import Selecting, train_missing
from utils.runs.experts import Experts, other_images
from utils.system.distributed import SINGLE, Group
from utils.system.errors import UsageError
from utils.system.process import Stopped, Stopper

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


def train_experts(o: CondenseOptions, problem: Problem, experts: Experts, stopper: Stopper, group: Group) -> int | None:
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
            data, spec = problem.data, problem.spec
            recipe = derived.expert_recipe(o, flip=data.flip)
            compute = computing(data.device, o.compile, o.precision, derived.experts_flop(o, spec, len(data.train)))
            everything = o.match != TRAJECTORY or o.select == "random"
            selecting = None if everything else Selecting(o.select, o.interval, o.cluster_raw, o.kmeans)
            with stopper, experts.held({"files": data.files, "training": data.digests["training"]}):
                train_missing(
                    experts, spec, recipe, data.train, compute, stopper, seed=o.expert_seed, selecting=selecting
                )
    except Stopped as stop:
        log.info("stopped (%s), the experts are saved in %s; %s", stop, experts.folder, resolve.how_to_go_on(o))
        return stopper.status
    log.info("the experts are ready in %s", experts.folder)
    return None
