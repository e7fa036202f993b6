"""Values that follow from the options: rates, recipes, amounts of work, and descriptions of a run for people."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data import Dataset
from models import NetSpec, forward_flop
from utils.config import resolve
from utils.config.options import NO_BASELINES, CondenseOptions, Options, TrainOptions
from utils.config.presets import EVALUATION_AUGMENTATION, METHODS, TRAJECTORY
from utils.method.augment import Augment, without
from utils.method.formation import Formation
from utils.method.state import NotFinite, State
from utils.method.training import Recipe
from utils.runs.card import DATA, Card, how_to_use, source_datasets, storage
from utils.runs.experts import Experts
from utils.system.errors import printable

# --- Training of pixels and networks ----------------------------------------------------------------------------------


def formation(o: CondenseOptions | TrainOptions) -> Formation:
    """Formation by --factor and --decode_type: how stored images are decoded."""
    return Formation(o.factor or 1, o.decode_type or "single")


def pixel_rate(o: CondenseOptions, *, side: int, base_side: int, it: int = 0) -> float:
    """Pixel learning rate of outer iteration `it`: --lr_img itself for --pixel_step joint; scaled by ipc and area for
    sweep. Gradients of a mean over images fall with ipc, those of a pixel with the area.

    With --lr_img_end it falls along half a cosine.
    """
    rate = o.lr_img * (o.ipc / 10) * (side / base_side) ** 2 if o.pixel_step == "sweep" else o.lr_img
    if o.lr_img_end == 1:
        return rate
    return rate * (o.lr_img_end + (1 - o.lr_img_end) * (1 + math.cos(math.pi * it / o.niter)) / 2)


# --- Networks trained on real images ----------------------------------------------------------------------------------


def has_pool(o: CondenseOptions) -> bool:
    """Whether a run needs a pool of networks that were trained on real images."""
    return o.networks != "fresh" or o.keep < 1 or o.calibrate


def needs_experts(o: CondenseOptions) -> str:
    """The flag for which a run needs experts, in words for a message."""
    if o.match == TRAJECTORY:
        return f"--match {TRAJECTORY}"
    if o.networks != "fresh":
        return f"--networks {o.networks}"
    return f"--keep {o.keep:g}" if o.keep < 1 else "--calibrate"


def expert_recipe(o: CondenseOptions, *, flip: bool) -> Recipe:
    """Recipe of experts: that of network updates for trajectories; for a pool that of evaluation trainings, at a
    constant rate, so that runs of all methods can share it."""
    return update_recipe(o) if o.match == TRAJECTORY else evaluation_recipe(o, flip=flip, epochs=1)


def expert_augmentation(o: CondenseOptions, *, flip: bool) -> str:
    """Augmentation of experts, see `expert_recipe`."""
    return update_augmentation(o) if o.match == TRAJECTORY else evaluation_augmentation(o, flip=flip)


def kept_counts(o: CondenseOptions, counts: Sequence[int]) -> list[int]:
    """Real images of every class that a run uses, by --keep; counts: those that there are."""
    return [math.ceil(round(o.keep * count, 6)) for count in counts]  # 0.07 * 100 is above 7


def update_augmentation(options: CondenseOptions) -> str:
    """Augmentation of network updates: that of matching, without cutout where CutMix takes its place."""
    return without(options.aug_type, "cutout") if options.mixup_net == "cut" else options.aug_type


def update_recipe(options: CondenseOptions) -> Recipe:
    """Recipe of the network's training between two matching steps."""
    return Recipe(
        batch_size=options.batch_real,
        augment=Augment(update_augmentation(options)),
        mixup=options.mixup_net,
        lr=options.lr,
        momentum=options.momentum if options.mom_net is None else options.mom_net,
        weight_decay=options.weight_decay if options.wd_net is None else options.wd_net,
        epochs=options.net_epoch,
    )


def has_update(o: CondenseOptions) -> bool:
    """Whether networks are trained between two matching steps at all."""
    return o.inner_loop > 1 and (o.train_on == "syn" or o.n_data > 0)


def baselines(o: TrainOptions) -> list[str]:
    """Strategies of --baselines; scores and a teacher's labels are compared with random images in any case."""
    needed = ["random"] if o.scores or o.teacher else []
    return [name for name in dict.fromkeys([*needed, *o.baselines]) if name != NO_BASELINES]


def evaluation_augmentation(options: Options, *, flip: bool) -> str:
    """Augmentation of evaluation trainings: as given, or the published one for the data set and CutMix."""
    if options.eval_aug_type is not None:
        return options.eval_aug_type
    dropped = [name for name, drop in (("cutout", options.mixup == "cut"), ("flip", not flip)) if drop]
    return without(EVALUATION_AUGMENTATION, *dropped)


def evaluation_recipe(options: Options, *, flip: bool, epochs: int | None = None) -> Recipe:
    """Recipe of the trainings of an evaluation; epochs: used in place of --epochs if given."""
    return Recipe(
        batch_size=options.batch_size,
        augment=Augment(evaluation_augmentation(options, flip=flip)),
        mixup=options.mixup,
        lr=options.lr,
        momentum=options.momentum,
        weight_decay=options.weight_decay,
        epochs=options.epochs if epochs is None else epochs,
    )


# --- Work -------------------------------------------------------------------------------------------------------------


def class_work(o: CondenseOptions, counts: Sequence[int]) -> list[float]:
    """Cost of an average inner step for every class, in forward passes of one image; counts: real images per class.

    A backward pass costs two forward passes, the gradient of a distance between gradients seven in all.
    """
    synthetic = min(formation(o).decoded_count(o.ipc), o.batch_syn_max)
    if o.match == TRAJECTORY:
        return [10.0 * o.student_steps * synthetic] * len(counts)
    first, second = (3, 7) if "grad" in o.match.split("+") else (1, 3)
    matched = first * o.batch_real + second * synthetic + (3 * synthetic if o.calibrate else 0)
    every = o.interval
    if o.select == "members" and has_pool(o):  # each of the pool's networks embeds images once
        every = max(every, o.niter * o.inner_loop // o.experts)
    return [matched + (count / every if o.select != "random" else 0) for count in counts]


def run_flop(o: CondenseOptions, spec: NetSpec, counts: Sequence[int]) -> float:
    """Floating-point operations of a run from its beginning to its end, without evaluations."""
    real, updates = sum(counts), 0
    if o.match != TRAJECTORY:
        synthetic = spec.classes * formation(o).decoded_count(o.ipc)
        trained = min(o.n_data, real) if o.train_on == "real" else synthetic
        updates = (o.inner_loop - 1) * o.net_epoch * trained + o.pretrain * real  # images per outer iteration
    return o.niter * forward_flop(spec) * (o.inner_loop * sum(class_work(o, counts)) + 3 * updates)


def experts_flop(o: CondenseOptions, spec: NetSpec, real: int) -> float:
    """Floating-point operations of training all experts on `real` images."""
    batches = -(-real // o.batch_real)
    selects = o.match == TRAJECTORY and o.select != "random"
    selected = -(-batches // o.interval) * real if selects else 0
    return forward_flop(spec) * o.experts * o.expert_epochs * (3 * real + selected)


# --- Descriptions for people ------------------------------------------------------------------------------------------


def caveat(o: CondenseOptions) -> str:
    """In what --reproduce with a method is not the published setting; empty where it is, or is not asked for."""
    text = METHODS[o.method].caveat if o.reproduce else ""
    return text and f"--method {o.method} --reproduce: {text}"


def describe(resolved: resolve.Resolved, dataset: Dataset, spec: NetSpec, folder: Path, experts: Experts | None) -> str:
    """Text of --dry_run: the resolved options, the origin of each, and what follows from them."""
    o = resolved.options
    rate = pixel_rate(o, side=dataset.side, base_side=dataset.base_side)
    lines = [
        f"{name:16}{printable(str(value)):41} {resolved.origin[name]}" for name, value in dataclasses.asdict(o).items()
    ]
    images = f"{o.n_data} real images" if o.train_on == "real" else "all synthetic images"
    update = f"{images}, {o.net_epoch} x, {update_augmentation(o)}" if has_update(o) else "none"
    derived = {
        "network": f"{spec.name}, width {spec.width}, norm {spec.norm}" if spec.norm else spec.name,
        "pixel learning rate": f"{rate:g}",
        "network update": update,
        **({"caveat": caveat(o)} if caveat(o) else {}),
        "evaluation": evaluation_augmentation(o, flip=dataset.flip),
        "decoded per class": formation(o).decoded_count(o.ipc),
        "run folder": printable(str(folder)),
        **({} if experts is None else {"experts": printable(str(experts.folder))}),
    }
    return "\n".join([*lines, "", *(f"{name:24}{value}" for name, value in derived.items())])


def set_card(o: CondenseOptions | TrainOptions, data: Dataset, *, ipc: int, settings: dict[str, Any]) -> Card:
    """The card of a set of whose making nothing is known: how to use it. settings: the other options, where known."""
    (mean, std), layout = data.statistics, formation(o)
    places = {"image_folder": o.image_folder, "npz": o.npz}
    origin = {"dataset": o.dataset, **{k: None if v is None else str(Path(v).resolve()) for k, v in places.items()}}
    return {
        **origin,
        "source_datasets": source_datasets(origin),
        "class_names": list(data.class_names),
        "ipc": ipc,
        "factor": layout.factor,
        "decode_type": layout.decode_type,
        "decoded_per_class": layout.decoded_count(ipc),
        **storage(o.store, (data.channels, data.side, data.side)),
        "normalized": False,
        "normalization": {"mean": list(mean), "std": list(std)},  # per channel, in units of [0, 1]
        **data.reading,
        "settings": settings,
        "finished": True,
    }


def run_card(
    o: CondenseOptions, data: Dataset, spec: NetSpec, state: State, expert_seconds: float | None, *, finished: bool
) -> Card:
    """The content of data.json: how to use a run's set, how it was made, and how far the run has come."""
    card = set_card(o, data, ipc=o.ipc, settings=resolve.saved_settings(o))
    return {
        "about": f"{DATA} holds a list of two tensors, images and labels. {how_to_use(card, data.side)}.",
        **card,
        "network": dataclasses.asdict(spec),
        "learned": {name: x[0].item() for name, x in state.matching_step.learned.items() if x.dim() == 1},
        "outer_iterations": state.it,
        "seconds": round(state.seconds, 1),  # of distilling, without evaluations
        "finished": finished,
        **({} if expert_seconds is None else {"expert_seconds": round(expert_seconds, 1)}),
    }


def diverged(o: CondenseOptions, error: NotFinite, class_names: Sequence[str], run: Path) -> str:
    """Message about NaN in a run: where, with which settings, and how to go on."""
    names = [class_names[c] for c in error.classes]
    where = f", class {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}" if names else ", in the network"
    return (
        f"NaN or infinity in the matching loss, the pixels or the network, in outer iteration {error.it}, by inner "
        f"step {error.step}{where}, with --lr_img {o.lr_img:g} --mom_img {o.mom_img:g} --lr {o.lr:g} --precision "
        f"{o.precision}. Nothing of this state was saved. To go on from the last sound state with a lower rate, add "
        f"--resume_from {run} --lr_img {o.lr_img / 2:g} --tag NAME, or name an earlier data_<iteration>.pt "
        "(--snapshot_every)"
    )
