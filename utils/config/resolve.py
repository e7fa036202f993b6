"""Complete options from a command line, data set settings, and presets.

Precedence is default < the data set's settings < --reproduce < the data set's exceptions for some -f and --ipc < the
method's settings < the file of --config < flag. A flag that the user gave is never overridden.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

import models
from data import Dataset
from utils.config import checks, configfile
from utils.config.flags import make_parser
from utils.config.options import (
    ALL,
    FREE,
    NO_BASELINES,
    OF_ANOTHERS,
    OF_THE_SET,
    CondenseOptions,
    Options,
    TrainOptions,
)
from utils.config.presets import DATASET_SETTINGS, PUBLISHED, REAL_EPOCHS, REPRODUCE, exceptions, method_settings
from utils.system.device import free_memory
from utils.system.errors import UsageError, UserError

NETWORK = ("net_type", "depth", "width", "norm_type")  # options that belong to one network
PLACES = ("image_folder", "npz")  # options that say where images lie, which may be elsewhere now
COPIES = 4  # of a network's weights in memory, at least: weights, gradients, momentum, and a temporary one

# --- condense.py ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Resolved:
    """Complete options, and the origin of each: flag, --config, method, --reproduce, data set, or default."""

    options: CondenseOptions
    origin: Mapping[str, str]


def condense(argv: Sequence[str], description: str) -> Resolved:
    """Options of a command line of condense.py. Raises UsageError for wrong flags, UserError for a file of --config."""
    given = make_parser(CondenseOptions, description).parse_given(argv)
    return condense_options(given, _config(CondenseOptions, given))


def condense_options(flags: Mapping[str, Any], config: Mapping[str, Any] = MappingProxyType({})) -> Resolved:
    """Options of condense.py for the flags given, by name, and those in a file of --config.

    Raises UsageError for wrong combinations.
    """
    given = {**config, **flags}
    defaults = default_options()
    defaults["dataset"] = dataset = _dataset(given)
    layers: list[tuple[str, Mapping[str, Any]]] = [("default", defaults), ("data set", DATASET_SETTINGS[dataset])]
    if given.get("reproduce"):
        if dataset not in PUBLISHED:
            raise UsageError(f"--reproduce: the paper has no settings for {dataset}; use -d {'|'.join(PUBLISHED)}")
        layers.append(("--reproduce", REPRODUCE))
    ipc = given.get("ipc", defaults["ipc"])
    exceptional = exceptions(dataset, given.get("factor", defaults["factor"]), ipc)
    method, select = given.get("method", defaults["method"]), given.get("select")
    of_method = method_settings(
        method,
        dataset,
        ipc=ipc,
        select=select,
        networks=given.get("networks"),
        judged=given.get("keep", 1) < 1 or given.get("calibrate", False),
        reproduce=bool(given.get("reproduce")),
    )
    layers += [("data set", exceptional), ("method", of_method)]
    if "net_type" in given:
        layers[1:] = [(name, concerning(layer, given["net_type"])) for name, layer in layers[1:]]
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for name, layer in (*layers, ("--config", config), ("flag", flags)):
        if unknown := layer.keys() - defaults.keys():
            raise UsageError(f"utils/config/presets.py: unknown settings of the {name}: {', '.join(sorted(unknown))}")
        values.update(layer)
        origin.update(dict.fromkeys(layer, name))
    options = CondenseOptions(**values)
    checks.check_data(options)
    for name in OF_ANOTHERS:
        if name in given and options.resume_from is None:
            raise UsageError(f"--{name}: is said of a set to begin from; name it with --resume_from, or leave it out")
    return Resolved(options, origin)


def _dataset(given: Mapping[str, Any]) -> str:
    """The data set that the flags name: by -d, else that of one's own images if there are any."""
    own = "folder" if "image_folder" in given else "npz" if "npz" in given else Options.dataset
    return str(given.get("dataset", own))


def default_options() -> dict[str, Any]:
    """Options of condense.py by name, before any preset or flag."""
    return {field.name: field.default for field in dataclasses.fields(CondenseOptions)}


def as_saved(options: CondenseOptions) -> dict[str, Any]:
    """All options as options.json holds them; paths are absolute, so that they can be compared."""
    paths = {name: getattr(options, name) for name in ("image_folder", "npz", "resume_from")}
    resolved = {name: str(Path(path).resolve()) for name, path in paths.items() if path is not None}
    return {**dataclasses.asdict(options), **resolved}


def saved_settings(options: CondenseOptions) -> dict[str, Any]:
    """Settings in data.json: all options but those of FREE, and those that are entries of data.json themselves."""
    return {k: v for k, v in dataclasses.asdict(options).items() if k not in (*FREE, *OF_THE_SET)}


def run_folder(options: CondenseOptions) -> Path:
    """Path of a run folder: results/<dataset>/<net>_f<f>_ipc<n>[_<method>][_<tag>], the method unless it is dream.

    Raises UsageError for an unknown network.
    """
    try:
        spec = models.resolve(options.net_type, channels=1, classes=1, side=1, depth=options.depth)
    except ValueError as error:
        raise UsageError(f"--net_type: {error}") from None
    more = ["" if options.method == "dream" else options.method, options.tag]
    name = "_".join([spec.name, f"f{options.factor}", f"ipc{options.ipc}", *filter(None, more)])
    return Path(options.results_dir) / options.dataset / name


def how_to_go_on(options: CondenseOptions) -> str:
    """Advice on how to go on after a stop, for a message."""
    return f"run the same command {'without --restart' if options.restart else 'again'} to go on"


# --- Files of --config ------------------------------------------------------------------------------------------------

# What presets follow from. A run's file counts as these flags, and those for whatever they do not explain of that run.
DECIDING = (
    "dataset", "image_folder", "npz", "method", "select", "networks", "factor", "ipc", "net_type", "reproduce",
)  # fmt: skip
OF_THE_FOLDER = ("image_folder", "npz", "split", "size", "skip_broken")


def _config(kind: type[Options], flags: Mapping[str, Any]) -> dict[str, Any]:
    """Values in the file of --config, by name, without those that lose their meaning beside the flags.

    Raises UsageError or UserError, naming the file.
    """
    if "config" not in flags:
        return {}
    path = Path(flags["config"])
    values, of_a_run = configfile.read(path, kind)
    if of_a_run and kind is CondenseOptions:
        values = _of_experiment(values, path)
    elif of_a_run:
        values = _of_evaluation(values)
    else:
        values = {name: value for name, value in values.items() if value is not None}
    if "dataset" in values and flags.get("dataset", values["dataset"]) != values["dataset"]:
        values = {name: value for name, value in values.items() if name not in OF_THE_FOLDER}
    if flags.keys() & PLACES:
        values = {name: value for name, value in values.items() if name not in PLACES}
    if "net_type" in values and "net_type" in flags:
        own, new = ([x] if isinstance(x, str) else x for x in (values["net_type"], flags["net_type"]))
        one_each = len(own) == len(new) == 1 and ALL not in (*own, *new)
        other = concerning({**values, "net_type": own[0]}, new[0]) if one_each else values
        values = {name: value for name, value in other.items() if one_each or name not in NETWORK}
    return values


def _of_experiment(run: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Settings of a run of condense.py that count as given.

    What presets explain is left to them, so that they follow when a flag names another data set, method or ipc.
    """
    defaults = default_options()
    run = {k: v for k, v in run.items() if v is not None or defaults[k] is None}
    chosen = {name: run[name] for name in DECIDING if run.get(name)}
    try:
        others = {name: value for name, value in chosen.items() if name != "select"}
        if chosen.get("select") == condense_options(others).options.select:
            chosen = others
        explained = dataclasses.asdict(condense_options(chosen).options)
    except UsageError as error:
        raise UsageError(f"--config {path}: {error}") from None
    return {**chosen, **{k: v for k, v in run.items() if v != explained[k]}}


def _of_evaluation(run: Mapping[str, Any]) -> dict[str, Any]:
    """How a run of condense.py trains networks to evaluate its set. What a set is, its own data.json or flags say."""
    fields = {field.name: field.metadata["group"] for field in dataclasses.fields(TrainOptions)}
    left_out = (*OF_THE_SET, "precision")
    return {k: v for k, v in run.items() if v is not None and k not in left_out and fields[k] != "data"}


# --- train.py ---------------------------------------------------------------------------------------------------------


def train_flags(argv: Sequence[str], description: str) -> dict[str, Any]:
    """Flags of a command line of train.py, by name, on top of those in a file of --config. Raises UsageError for wrong
    flags, UserError for such a file."""
    given = make_parser(TrainOptions, description).parse_given(argv)
    named = {name: value for name, value in _config(TrainOptions, given).items() if value is not False}
    return {**named, **given}


def train_options(
    given: dict[str, Any], card: Mapping[str, Any] | None, source: Path, *, ipc: int | None = None
) -> TrainOptions:
    """Options of train.py for the flags given, by name, and the settings of the set.

    card: the content of the set's data.json, if it has one; source: the path of that file. ipc: images per class of a
    set without it. Raises UsageError for a flag that contradicts the card, and for wrong combinations.
    """
    values: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(TrainOptions)}
    if card is not None:
        for name in OF_THE_SET:
            if name in given and given[name] != card.get(name) and name not in PLACES:
                raise UsageError(f"--{name} {given[name]}: the set's data.json says {card[name]}; leave the flag out")
        if given.get("split", split := card["settings"].get("split")) != split:  # some were distilled, then tested on
            raise UsageError(f"--split {given['split']:g}: the set was distilled with {split}; leave the flag out")
        values.update(_settings_of(card, source))
        if given.keys() & PLACES:  # the images lie elsewhere now
            values.update(dict.fromkeys(PLACES))
    else:
        values["dataset"] = _dataset(given)
        exceptional = exceptions(values["dataset"], given.get("factor") or 1, given.get("ipc") or ipc or 10)
        epochs = {"epochs": REAL_EPOCHS} if given.get("real") else {}
        for layer in (DATASET_SETTINGS[values["dataset"]], exceptional, epochs):
            values.update({k: v for k, v in layer.items() if k in values})
    checks.check_described(given, card)
    options = TrainOptions(**{**values, **given})
    checks.check_data(options)
    if NO_BASELINES in options.baselines and len(options.baselines) > 1:
        raise UsageError(f"--baselines: {NO_BASELINES} and other words exclude each other")
    for name in ("scores", "teacher"):
        if NO_BASELINES in options.baselines and getattr(options, name):
            raise UsageError(f"--{name}: compares with random real images; leave --baselines {NO_BASELINES} out")
    return options


def _settings_of(card: Mapping[str, Any], source: Path) -> dict[str, Any]:
    """Settings in a data.json, checked as if they were flags, since the file may be anybody's."""
    known = {**card["settings"], **{name: card.get(name) for name in OF_THE_SET}}
    # Where and how the set was computed has no influence on its evaluation. Nor have options that only train.py has,
    # such as the names of files to write: a set must not choose those.
    names = {field.name for field in dataclasses.fields(CondenseOptions)} - {*FREE, *OF_ANOTHERS, "precision"}
    words = []
    for field in dataclasses.fields(TrainOptions):
        value = known.get(field.name)
        is_switch = field.default is False and isinstance(value, bool)
        if field.name in names and value is not None and not (is_switch and not value):
            words.append(f"--{field.name}" + ("" if is_switch else f"={value}"))
    try:
        settings = make_parser(TrainOptions, "").parse_given(words)
        for name in settings.get("net_type", []):
            split_name(name)
        return settings
    except UsageError as error:
        reason = str(error).rsplit("; see", 1)[0]
        raise UserError(
            f"{source}: is damaged ({reason}); move the file away and describe the set with -d and -f"
        ) from None


# --- Networks ---------------------------------------------------------------------------------------------------------


def split_name(name: str) -> tuple[str, int | None]:
    """Family and depth of a network's name. Raises UsageError for an unknown family."""
    try:
        return models.split_name(name)
    except ValueError as error:
        raise UsageError(f"--net_type: {error}") from None


def concerning(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Settings without those of another network than `name`: a ConvNet's depth and width are not for a ResNet."""
    concerned = {k: v for k, v in settings.items() if k not in NETWORK}
    family, depth = split_name(name)
    if family == split_name(settings.get("net_type") or "convnet")[0]:
        concerned |= {k: settings[k] for k in NETWORK[1:] if k in settings and not (k == "depth" and depth)}
    return concerned


def networks(
    options: TrainOptions, given: Mapping[str, Any], card: Mapping[str, Any] | None, data: Dataset
) -> list[models.NetSpec]:
    """Specifications of train.py's networks, from the flags given and those of the set's settings that concern each."""
    specs = []
    own = {k: getattr(options, k) for k in NETWORK[1:] if k not in given}
    distilled_with = card["settings"].get("net_type") if card else None
    names = options.net_type or ["convnet"]
    for name in dict.fromkeys(models.PAPER_TABLE if ALL in names else names):
        settings = concerning({**own, "net_type": distilled_with}, name)
        replaced: dict[str, Any] = {k: settings.get(k) for k in own}
        specs.append(network(dataclasses.replace(options, **replaced), name, data))
    return specs


def network(options: Options, name: str, data: Dataset) -> models.NetSpec:
    """Specification of a network, after a try to build it.

    Raises UsageError, naming the flags, if that fails, or if the memory is too small for training it.
    """
    settings = {"depth": options.depth, "width": options.width, "norm": options.norm_type}
    try:
        shape = {"channels": data.channels, "classes": data.classes, "side": data.side}
        spec = models.resolve(name, **shape, **settings)  # type: ignore[arg-type]
        net = models.outline(spec)
    except ValueError as error:
        raise UsageError(f"--net_type {name} (--depth, --width, --norm_type): {error}") from None
    need, free = 4 * sum(p.numel() for p in net.parameters()), free_memory(torch.device("cpu"))
    if COPIES * need > free:
        raise UsageError(
            f"--net_type {name} (--depth, --width, --size): its weights take {need / 1e9:.1f} GB, {COPIES} times, and "
            f"{free / 1e9:.1f} GB of memory are free"
        )
    return spec
