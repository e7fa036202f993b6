"""For people: what a run will do, how much work that is, and what it came to."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from data import Dataset
from models import NetSpec, forward_flop
from utils.config import derived as recipes
from utils.config import options
from utils.config.expert_runs import experts_for
from utils.config.methods import TRAJECTORY
from utils.config.options import CondenseOptions
from utils.files import atomic
from utils.method.evaluation import Score
from utils.method.formation import decoded_count
from utils.method.state import State
from utils.runs.card import CARD, card_of_run, card_of_set
from utils.runs.folder import RunFolder
from utils.system.errors import printable


def card(
    o: CondenseOptions,
    dataset: Dataset,
    spec: NetSpec,
    state: State,
    *,
    finished: bool,
    expert_seconds: float | None = None,
) -> dict[str, object]:
    """data.json: what the set is and how to use it."""
    mean, std = dataset.statistics
    usage = card_of_set(
        dataset=o.dataset,
        image_folder=options.as_saved(o)["image_folder"],
        class_names=dataset.class_names,
        ipc=o.ipc,
        factor=o.factor,
        decode_type=o.decode_type,
        mean=mean,
        std=std,
        settings=options.remaining_settings(o),
    )
    return card_of_run(
        usage,
        shape=state.pixels.pixels.shape[2:],
        network=dataclasses.asdict(spec),
        learned={name: value[0].item() for name, value in state.match.learned.items()},
        outer_iterations=state.it,
        seconds=state.seconds,
        finished=finished,
        expert_seconds=expert_seconds,
    )


def summary(folder: RunFolder) -> str:
    """What a finished run ends with, read from its data.json."""
    card = atomic.read_json(folder.path / CARD)
    rows = []
    for what, key, count in (
        ("distilled set", "accuracy", f"{card['ipc']} stored, {card['decoded_per_class']} decoded"),
        ("random real images", "random_real", f"{card['ipc']}"),
    ):
        rows.append(f"  {what:20}{count:>24}     {Score(tuple(card[key]['accuracies']))}")
    net = NetSpec(**card["network"]).name
    head = (
        f"  {'trained on':20}{'images per class':>24}     test accuracy %, {net}, {card['settings']['epochs']} epochs"
    )
    return "\n".join([f"run folder: {folder.path}", head, *rows])


def class_work(o: CondenseOptions, counts: Sequence[int], *, decoded: int) -> list[float]:
    """What an average inner step takes for every class, in forward passes of an image: a backward pass is two of them,
    and the gradient of a distance between gradients seven in all. counts: real images per class; decoded: synthetic."""
    synthetic = min(decoded, o.batch_syn_max)
    if o.match == TRAJECTORY:
        return [10.0 * o.student_steps * synthetic] * len(counts)
    first, second = (3, 7) if "grad" in o.match else (1, 3)
    matched = first * o.batch_real + second * synthetic
    return [matched + (count / o.interval if o.select != "random" else 0) for count in counts]


def step_flop(o: CondenseOptions, spec: NetSpec, counts: Sequence[int], *, decoded: int) -> float:
    """Floating-point operations of an average inner step."""
    real, updates = sum(counts), 0
    if o.match != TRAJECTORY:
        trained = min(o.n_data, real) if o.train_on == "real" else spec.classes * decoded
        updates = (o.inner_loop - 1) * o.net_epoch * trained + o.pretrain * real  # of an outer iteration
    return forward_flop(spec) * (sum(class_work(o, counts, decoded=decoded)) + 3 * updates / o.inner_loop)


def describe(resolved: options.Resolved, dataset: Dataset, spec: NetSpec, folder: RunFolder) -> str:
    """The resolved options, where each comes from, and what derives from them."""
    o = resolved.options
    rate = recipes.pixel_rate(o, side=dataset.side, base_side=dataset.base_side)
    lines = [
        f"{name:16}{printable(str(value)):28}{resolved.origin[name]}" for name, value in dataclasses.asdict(o).items()
    ]
    derived = {
        "network": f"{spec.name}, width {spec.width}, norm {spec.norm}" if spec.norm else spec.name,
        "pixel learning rate": f"{rate:g}",
        "network update": recipes.update_summary(o),
        "evaluation": recipes.evaluation_augmentation(o, flip=dataset.flip),
        "decoded per class": decoded_count(o.ipc, factor=o.factor, decode_type=o.decode_type),
        "run folder": printable(str(folder.path)),
        **({"experts": printable(str(experts_for(o, spec).folder))} if o.match == TRAJECTORY else {}),
    }
    return "\n".join([*lines, "", *(f"{name:24}{value}" for name, value in derived.items())])
