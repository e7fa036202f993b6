"""The command lines: every flag once, the data sets' settings once, and how they are laid over each other.

Precedence is default < the data set's settings (and --reproduce) < flag. A flag that the user gave is never changed.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import models
from utils import augment, formation, matching, selection, training
from utils.errors import UsageError, UserError

RESULTS_DIR = "results"

# Settings of each data set, laid over the defaults; the published ones are those of Liu et al. (ICCV 2023).
# lr_img holds at ipc 10, see `pixel_lr`. Digits and folders are not in the paper: digits is tuned for minutes on a CPU.
DATASET_SETTINGS: dict[str, dict[str, Any]] = {
    "mnist": dict(metric="l1", lr_img=1e-4, n_data=500),
    # The published code scales this rate by an accidental (28/32)^2. Kept, so that the step is the published one.
    "fashion": dict(metric="l1", lr_img=1e-4 * (28 / 32) ** 2, n_data=500),
    "svhn": dict(metric="mse", lr_img=5e-3, n_data=500),
    "cifar10": dict(metric="mse", lr_img=5e-3, n_data=2000),
    "cifar100": dict(metric="mse", lr_img=5e-3, n_data=2000),
    "digits": dict(depth=2, lr_img=5e-3, n_data=128, niter=10, inner_loop=20, batch_real=32, epochs=300, repeat=3),
    "folder": dict(),
}
PUBLISHED = ("mnist", "fashion", "svhn", "cifar10", "cifar100")

# What --reproduce adds: the published budget and protocol, whatever the defaults become.
REPRODUCE: dict[str, Any] = dict(
    niter=2000, inner_loop=100, interval=10, batch_real=128, batch_syn_max=128, mom_img=0.5, match="grad",
    select="kmeans", init="kmeans", net_type="convnet", depth=3, width=128, norm_type="instance",
    aug_type="color_crop_cutout", mixup_net="cut", net_epoch=1, epochs=1000, batch_size=64, lr=0.01, momentum=0.9,
    weight_decay=5e-4, mixup="cut",
)  # fmt: skip

REAL_EPOCHS = 100  # of train.py --real: a thousand are for sets of a few images
PLACES = ("data_dir", "results_dir", "device")  # where to compute, not what
OF_THE_SET = ("dataset", "image_folder", "ipc", "factor", "decode_type")  # what data.json says of the set itself

EVALUATION_AUGMENTATION = "color_crop_cutout_flip_scale_rotate"


def exceptions(dataset: str, factor: int, ipc: int) -> dict[str, Any]:
    """The two published settings that depend on more than the data set."""
    if dataset == "svhn" and factor == 1 and ipc == 1:
        return dict(mixup="vanilla")
    if dataset == "mnist" and factor > 1:
        return dict(
            aug_type="color_crop", mixup_net="vanilla", mixup="vanilla", eval_aug_type="color_crop_scale_rotate"
        )
    return {}


# --- Values -----------------------------------------------------------------------------------------------------------


def integer(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of {least} or more")
        return value

    return parse


def number(least: float = 0.0, *, below: float = math.inf, open_end: bool = False) -> Callable[[str], float]:
    """least <= value < below; with open_end, least < value."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (least < value if open_end else least <= value) or not value < below:
            low = f"above {least:g}" if open_end else f"of {least:g} or more"
            high = "" if below == math.inf else f" and below {below:g}"
            raise argparse.ArgumentTypeError(f"{text!r} is not a number {low}{high}")
        return value

    return parse


def augmentation(text: str) -> str:
    try:
        augment.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def initialisation(text: str) -> str:
    """`mix` is the published name of k-means initialisation with a factor above 1."""
    name = "kmeans" if text == "mix" else text
    if name not in ("kmeans", "random", "noise"):
        raise argparse.ArgumentTypeError(f"{text!r} is not one of kmeans, random, noise")
    return name


def tag(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} becomes part of a folder name: use up to 100 letters, digits, '.', '_', '-'"
        )
    return text


def flag(
    default: Any,
    *names: str,
    help: str,
    group: str,
    parse: Callable[[str], Any] = str,
    choices: Sequence[str] | None = None,
    metavar: str | None = None,
    nargs: str | None = None,
) -> Any:
    """A dataclass field that is also a command-line flag; a default of False makes a switch."""
    metadata = dict(names=names, help=help, group=group, parse=parse, choices=choices, metavar=metavar, nargs=nargs)
    return dataclasses.field(default=default, metadata=metadata)


GROUPS = (
    "data", "synthetic set", "what to train on", "budget", "selection", "matching", "network", "network training",
    "evaluation", "run",
)  # fmt: skip

# One name per group of --help, so that the lines below say the rest.
_data, _synthetic, _subject, _budget, _selection, _matching, _network, _training, _evaluation, _run = (
    partial(flag, group=group) for group in GROUPS
)


# fmt: off
@dataclass(frozen=True)
class Options:
    """What both scripts understand. None means: derived from other options, as the help says."""

    dataset: str = _data("digits", "-d", choices=tuple(DATASET_SETTINGS),
        help="data set; folder needs --image_folder")
    image_folder: str | None = _data(None, metavar="DIR",
        help="images in DIR/train/CLASS/* and DIR/test/CLASS/*; with -d cifar10 and the like, that data set's "
             "normalisation and settings apply to them")
    size: int | None = _data(None, parse=integer(8), metavar="PIXELS",
        help="resize and centre-crop the images of a folder to this side (default: their own)")
    data_dir: str = _data("data", metavar="DIR", help="where data sets are downloaded to and looked for")
    results_dir: str = _run(RESULTS_DIR, metavar="DIR", help="where run folders lie")
    device: str = _run("auto", choices=("auto", "cpu", "cuda"), help="auto takes CUDA where there is one")
    seed: int = _run(0, parse=integer(0), metavar="N",
        help="every random draw derives from it; 0 is a seed like any other")
    depth: int | None = _network(None, parse=integer(1), metavar="N",
        help="blocks of a ConvNet, layers of the others (default: convnet 3, resnet 10, densenet 121)")
    width: int | None = _network(None, parse=integer(1), metavar="CHANNELS",
        help="channels of a ConvNet, of a ResNet's first stage, growth of a DenseNet (default: 128, 64, 12)")
    norm_type: str | None = _network(None, choices=models.NORMS,
        help="normalisation layers (default: instance for convnet and resnet_ap, batch for resnet and densenet)")
    lr: float = _training(0.01, parse=number(open_end=True), metavar="RATE",
        help="learning rate of networks, while distilling and in evaluation")
    momentum: float = _training(0.9, parse=number(below=1), metavar="M", help="momentum of networks")
    weight_decay: float = _training(5e-4, parse=number(), metavar="W", help="weight decay of networks")
    epochs: int = _evaluation(1000, parse=integer(1), metavar="N",
        help=f"epochs of an evaluation training (default: 1000; digits 300; train.py --real {REAL_EPOCHS})")
    batch_size: int = _evaluation(64, parse=integer(1), metavar="IMAGES",
        help="mini-batch of an evaluation training")
    mixup: str = _evaluation("cut", choices=training.MIXUPS,
        help="CutMix (in half of the batches) or none in evaluation trainings")
    eval_aug_type: str | None = _evaluation(None, parse=augmentation, metavar="NAMES",
        help=f"augmentation of evaluation trainings (default: {EVALUATION_AUGMENTATION}, without cutout under CutMix, "
             "without flip where mirror images are other classes)")
    repeat: int = _evaluation(5, parse=integer(1), metavar="N", help="trainings per evaluation")


@dataclass(frozen=True)
class CondenseOptions(Options):
    """condense.py"""

    net_type: str = _network("convnet", "-n", metavar="NAME",
        help=f"one of {', '.join(models.FAMILIES)}; a depth may follow, as in resnet18")
    reproduce: bool = _budget(False,
        help="the published settings and budget for mnist, fashion, svhn, cifar10, cifar100")
    factor: int = _synthetic(1, "-f", parse=integer(1), metavar="F",
        help="multi-formation: every stored image holds F x F training images")
    ipc: int = _synthetic(1, "-i", parse=integer(1), metavar="N", help="stored images per class")
    init: str = _synthetic("kmeans", parse=initialisation, metavar="{kmeans,random,noise}",
        help="initial pixels: k-means representatives (published as mix for F > 1), random images, noise")
    decode_type: str = _synthetic("single", choices=formation.DECODE_TYPES,
        help=f"decode with factor F; with all factors up to F; or with F while a class stays within {formation.BOUND} "
             "images")
    tag: str | None = _run(None, parse=tag, metavar="TEXT",
        help="appended to the run folder's name, to keep several runs apart")
    niter: int = _budget(200, parse=integer(1), metavar="N", help="outer iterations, each with a fresh network")
    inner_loop: int = _budget(100, parse=integer(1), metavar="STEPS", help="inner steps per outer iteration")
    max_minutes: float | None = _budget(None, parse=number(open_end=True), metavar="MIN",
        help="stop cleanly after this time; the same command goes on later (an evaluation under way is finished)")
    select: str = _selection("kmeans", choices=tuple(selection.STRATEGIES),
        help="real images to match: k-means representatives (DREAM) or a random draw")
    interval: int = _selection(10, parse=integer(1), metavar="STEPS", help="inner steps between two selections")
    batch_real: int = _selection(128, parse=integer(1), metavar="IMAGES",
        help="real images per class to match, and mini-batch of the network update")
    cluster_raw: bool = _selection(False,
        help="cluster un-normalised images, as the published code does; everything else normalises")
    match: str = _matching("grad", choices=tuple(matching.OBJECTIVES), help="match gradients or mean features")
    metric: str = _matching("mse", choices=tuple(matching.METRICS), help="distance per layer, summed over layers")
    bias: bool = _matching(False, help="match the gradients of biases as well")
    fc: bool = _matching(False, help="match the gradient of the classifier as well")
    aug_type: str = _matching("color_crop_cutout", parse=augmentation, metavar="NAMES",
        help="augmentation while matching; the network update uses it without cutout under CutMix")
    batch_syn_max: int = _matching(128, parse=integer(1), metavar="IMAGES",
        help="synthetic images per class and step at most")
    lr_img: float = _matching(5e-3, parse=number(open_end=True), metavar="RATE",
        help="pixel learning rate at ipc 10 and the data set's own side; scaled by ipc / 10 and (side / own side)^2")
    mom_img: float = _matching(0.5, parse=number(below=1), metavar="M", help="momentum of the pixels")
    n_data: int = _training(500, parse=integer(0), metavar="IMAGES",
        help="real images that the network trains on after every inner step")
    net_epoch: int = _training(1, parse=integer(1), metavar="N", help="epochs over them")
    mixup_net: str = _training("cut", choices=training.MIXUPS, help="CutMix or none in the network update")
    eval_every: int = _evaluation(0, parse=integer(0), metavar="N",
        help="outer iterations between evaluations, the start included; 0: only at the end")
    restart: bool = _run(False, help="delete what the run folder holds and begin again")
    dry_run: bool = _run(False, help="print the resolved options and the run folder, then stop")


@dataclass(frozen=True)
class TrainOptions(Options):
    """train.py. Options that a distilled set brings along (data set, network, protocol) come from it unless given."""

    run: str | None = _subject(None, metavar="RUN",
        help="run folder or data.pt (default: the newest under --results_dir; -d, -f and --ipc narrow it down)")
    real: bool = _subject(False, help="the whole real training set, the upper bound")
    coreset: str | None = _subject(None, choices=("random", "kmeans"),
        help="--ipc real images per class, random or k-means representatives")
    factor: int | None = _subject(None, "-f", parse=integer(1), metavar="F",
        help="multi-formation factor, for a data.pt without data.json")
    ipc: int | None = _subject(None, "-i", parse=integer(1), metavar="N", help="images per class")
    decode_type: str | None = _subject(None, choices=formation.DECODE_TYPES,
        help="for a data.pt without data.json (default: single)")
    net_type: list[str] | None = _network(None, "-n", nargs="+", metavar="NAME",
        help=f"one or more of {', '.join(models.FAMILIES)}; a depth may follow, as in resnet18 (default: the network "
             "that distilled, or convnet)")
    json: bool = _run(False, help="print one JSON object as the last line of standard output")
# fmt: on


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, `-` for `_` in flag names, and a guess at what a misspelt flag meant."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")

    def parse_given(self, argv: Sequence[str]) -> dict[str, Any]:
        """Only what the user gave."""
        words = [re.sub(r"^--[^=]*", lambda name: "--" + name[0][2:].replace("-", "_"), word) for word in argv]
        given, unknown = self.parse_known_args(words)
        for word in unknown:
            name = word.split("=")[0]
            close = difflib.get_close_matches(name, self._option_string_actions, 1)
            self.error(f"unknown option {name}" + (f" (did you mean {close[0]}?)" if close else ""))
        return vars(given)


def make_parser(kind: type[Options], description: str) -> Parser:
    """The parser of an options class. Absent flags stay absent, so that defaults and settings can fill them."""
    parser = Parser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    fields = dataclasses.fields(kind)
    used = {field.metadata["group"] for field in fields}
    groups = {name: parser.add_argument_group(name) for name in GROUPS if name in used}
    for field in fields:
        meta = field.metadata
        group = groups[meta["group"]]
        positional = field.name == "run"
        names = [field.name] if positional else [*meta["names"], f"--{field.name}"]
        text = meta["help"].replace("%", "%%")
        if field.default is False:
            group.add_argument(*names, action="store_true", help=text)
            continue
        if field.default is not None and "default" not in text:
            text += f" (default: {default_text(field)})"
        nargs = "?" if positional else meta["nargs"]
        group.add_argument(
            *names, type=meta["parse"], choices=meta["choices"], metavar=meta["metavar"], nargs=nargs, help=text
        )
    return parser


def default_text(field: dataclasses.Field[Any]) -> str:
    """The default, and the data sets that have another one."""
    others: dict[str, list[str]] = {}
    for dataset, settings in DATASET_SETTINGS.items():
        if field.name in settings and settings[field.name] != field.default:
            others.setdefault(
                f"{settings[field.name]:.4g}" if field.name == "lr_img" else str(settings[field.name]), []
            ).append(dataset)
    return "; ".join([str(field.default), *(f"{value} for {', '.join(names)}" for value, names in others.items())])


# --- Resolution -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Resolved:
    """Options with the origin of each: flag, --reproduce, data set, or default."""

    options: CondenseOptions
    origin: Mapping[str, str]


def resolve(given: dict[str, Any]) -> Resolved:
    """condense.py's flags to complete options. Raises UsageError for combinations that make no sense."""
    first = {field.name: field.default for field in dataclasses.fields(CondenseOptions)}
    if "image_folder" in given:
        first["dataset"] = "folder"
    dataset = given.get("dataset", first["dataset"])
    layers = [("default", first), ("data set", DATASET_SETTINGS[dataset])]
    if given.get("reproduce"):
        if dataset not in PUBLISHED:
            raise UsageError(f"--reproduce: the paper has no settings for {dataset}; use -d {'|'.join(PUBLISHED)}")
        layers.append(("--reproduce", REPRODUCE))
    peculiar = exceptions(dataset, given.get("factor", first["factor"]), given.get("ipc", first["ipc"]))
    layers += [("data set", peculiar), ("flag", given)]
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for name, layer in layers:
        values.update(layer)
        origin.update(dict.fromkeys(layer, name))
    options = CondenseOptions(**values)
    check_common(options)
    return Resolved(options, origin)


def resolve_training(given: dict[str, Any], card: Mapping[str, Any] | None, source: Path) -> TrainOptions:
    """train.py's flags to complete options. card: the set's data.json, which knows its settings; source: its path.

    Raises UsageError for a flag that contradicts the card, and for combinations that make no sense.
    """
    values: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(TrainOptions)}
    if card is not None:
        for name in OF_THE_SET:
            if name in given and given[name] != card[name] and name != "image_folder":
                raise UsageError(f"--{name} {given[name]}: the set's data.json says {card[name]}; leave the flag out")
        own = _settings_of(card, source)
        if "net_type" in given:  # depth, width and norm belonged to the network that distilled
            own = {k: v for k, v in own.items() if k not in ("depth", "width", "norm_type")}
        values.update(own)
    else:
        values["dataset"] = given.get("dataset", "folder" if "image_folder" in given else values["dataset"])
        peculiar = exceptions(values["dataset"], given.get("factor") or 1, given.get("ipc") or 10)
        for layer in (
            DATASET_SETTINGS[values["dataset"]],
            peculiar,
            {"epochs": REAL_EPOCHS} if given.get("real") else {},
        ):
            values.update({k: v for k, v in layer.items() if k in values})
    options = TrainOptions(**{**values, **given})
    check_common(options)
    if options.real and options.coreset:
        raise UsageError("--real and --coreset exclude each other")
    if (options.real or options.coreset) and options.run is not None:
        raise UsageError(f"{options.run}: --real and --coreset train on real images; leave the folder out")
    if options.coreset and options.ipc is None:
        raise UsageError("--coreset: say how many images per class with --ipc N")
    if (options.real or options.coreset) and options.factor is not None:
        raise UsageError("-f: real images are not decoded; leave it out with --real and --coreset")
    return options


def _settings_of(card: Mapping[str, Any], source: Path) -> dict[str, Any]:
    """The settings in a data.json, which may be anybody's: checked as if they were flags."""
    known = {**card["settings"], **{name: card[name] for name in OF_THE_SET}}
    words = [
        f"--{field.name}={known[field.name]}"
        for field in dataclasses.fields(TrainOptions)
        if known.get(field.name) is not None and field.name not in PLACES
    ]
    try:
        return make_parser(TrainOptions, "").parse_given(words)
    except UsageError as error:
        reason = str(error).rsplit("; see", 1)[0]
        raise UserError(
            f"{source}: is damaged ({reason}); move the file away and describe the set with -d and -f"
        ) from None


def remaining_settings(options: CondenseOptions) -> dict[str, Any]:
    """What data.json keeps under `settings`: all but what it says of the set itself, and of places."""
    return {k: v for k, v in dataclasses.asdict(options).items() if k not in OF_THE_SET and k not in PLACES}


def check_common(options: Options) -> None:
    """Rules between flags that need no data."""
    if options.dataset == "folder" and options.image_folder is None:
        raise UsageError("-d folder: say where the images are with --image_folder DIR")
    if options.dataset == "digits" and options.image_folder is not None:
        raise UsageError("--image_folder: digits comes with scikit-learn; leave -d out to use the folder")
    if options.size is not None and options.dataset != "folder":
        raise UsageError(f"--size: only for folders of one's own; {options.dataset} has a fixed image size")


def check_factor(factor: int, side: int) -> None:
    """Raises UsageError when cells would be smaller than a pixel."""
    if factor > side:
        raise UsageError(f"-f {factor}: a cell would be smaller than a pixel, images are {side} pixels wide")


def check_batches(spec: models.NetSpec, *sizes: int) -> None:
    """Raises UsageError when a network with batch norm would have to train on a single image that it cannot."""
    if min(sizes) < models.smallest_batch(spec):
        raise UsageError(
            f"--norm_type batch: {spec.name} cannot train on a batch of one image of this size; use more images "
            "(--ipc, -f, --batch_real, --batch_size, --batch_syn_max, --n_data) or --norm_type instance"
        )


def pixel_lr(lr_img: float, *, ipc: int, side: int, base_side: int) -> float:
    """The pixel learning rate that is used: gradients of a mean fall with ipc, those per pixel with the area."""
    return lr_img * (ipc / 10) * (side / base_side) ** 2


def update_augmentation(options: CondenseOptions) -> str:
    """Of the network update: the matching augmentation, without cutout where CutMix takes its place."""
    return augment.without(options.aug_type, "cutout") if options.mixup_net == "cut" else options.aug_type


def evaluation_augmentation(options: Options, *, flip: bool) -> str:
    """Of evaluation trainings: as given, or the published one for the data set and CutMix."""
    if options.eval_aug_type is not None:
        return options.eval_aug_type
    dropped = [name for name, drop in (("cutout", options.mixup == "cut"), ("flip", not flip)) if drop]
    return augment.without(EVALUATION_AUGMENTATION, *dropped)


def evaluation_recipe(options: Options, *, flip: bool) -> training.Recipe:
    """The evaluation protocol."""
    return training.Recipe(
        batch_size=options.batch_size,
        augment=augment.Augment(evaluation_augmentation(options, flip=flip)),
        mixup=options.mixup,
        lr=options.lr,
        momentum=options.momentum,
        weight_decay=options.weight_decay,
        epochs=options.epochs,
    )


def network(options: Options, name: str, *, channels: int, classes: int, side: int) -> models.NetSpec:
    """The specification of a network that really can be built. Raises UsageError naming the flags."""
    try:
        spec = models.resolve(
            name,
            channels=channels,
            classes=classes,
            side=side,
            depth=options.depth,
            width=options.width,
            norm=options.norm_type,
        )
        models.build(spec)
    except ValueError as error:
        raise UsageError(f"--net_type {name} (--depth, --width, --norm_type): {error}") from None
    return spec
