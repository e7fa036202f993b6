"""The command lines: every flag once, and how flags, presets and defaults are laid over each other.

Precedence is default < the data set's settings (and --reproduce) < the method's < flag. A flag that the user gave is
never changed.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import models
from utils.config.checks import check_weights
from utils.config.flags import (
    augmentation,
    flag,
    initialisation,
    integer,
    make_parser,
    matching,
    number,
    table_file,
    tag,
)
from utils.config.methods import METHODS, TRAJECTORY, method_settings
from utils.config.presets import (
    DATASET_SETTINGS,
    EVALUATION_AUGMENTATION,
    PUBLISHED,
    REAL_EPOCHS,
    REPRODUCE,
    exceptions,
)
from utils.method import formation, objectives, pixels, selection, training
from utils.numerics.compute import PRECISIONS
from utils.system.errors import UsageError, UserError

log = logging.getLogger("dream")

RESULTS_DIR = "results"
PLACES = (
    "data_dir",
    "data_threads",
    "results_dir",
    "device",
    "compile",
    "wait_minutes",
)  # where and how to compute, not what
# What may differ when a run goes on, and what may until it is finished.
FREE = (
    *PLACES,
    "max_minutes",
    "dry_run",
    "experts_only",
    "restart",
    "reproduce",
    "snapshot_every",
    "tensorboard",
    "deterministic",
    "share_update",
)
RESUMABLE = ("precision",)
BASELINES = ("random", "kmeans", "herding")
NO_BASELINES, ALL_NETWORKS = "none", "all"
OF_THE_SET = ("dataset", "image_folder", "ipc", "factor", "decode_type")  # what data.json says of the set itself

# One name per group of --help, so that the lines below say the rest.
_data = partial(flag, group="data")
_synthetic = partial(flag, group="synthetic set")
_subject = partial(flag, group="what to train on")
_budget = partial(flag, group="budget")
_selection = partial(flag, group="selection")
_method = partial(flag, group="method")
_matching = partial(flag, group="matching")
_trajectories = partial(flag, group="trajectories (--method mtt)")
_network = partial(flag, group="network")
_training = partial(flag, group="network training")
_evaluation = partial(flag, group="evaluation")
_run = partial(flag, group="run")


def per_family(setting: str) -> str:
    """The default of depth, width or norm for every network, for --help."""
    found = ", ".join(f"{name} {getattr(family, setting)}" for name, family in models.FAMILIES.items())
    own = DATASET_SETTINGS["digits"].get(setting)
    return found if own is None else f"{found}; convnet {own} for digits"


# fmt: off
@dataclass(frozen=True)
class Options:
    """What both scripts understand. None means: derived from other options, as the help says."""

    dataset: str = _data("digits", "-d", choices=tuple(DATASET_SETTINGS),
        help="data set; folder needs --image_folder")
    image_folder: str | None = _data(None, metavar="DIR",
        help="images in DIR/train/CLASS/* and DIR/test/CLASS/*; with -d cifar10 and the like, that data set's "
             "normalisation and settings apply to them")
    size: int | None = _data(None, parse=integer(8, 2**14), metavar="PIXELS",
        help="resize and centre-crop the images of a folder to this side (default: their own)")
    whiten: str = _data("none", choices=("none", "zca"),
        help="ZCA-whiten images after normalising them, in distilling and in evaluation")
    data_dir: str = _data("data", metavar="DIR", help="where data sets are downloaded to and looked for")
    data_threads: int | None = _data(None, parse=integer(1, 512), metavar="N",
        help="threads that read image files (default: as many as the machine suggests)")
    results_dir: str = _run(RESULTS_DIR, metavar="DIR", help="where run folders lie")
    device: str = _run("auto", choices=("auto", "cpu", "cuda"), help="auto takes CUDA where there is one")
    compile: str = _run("auto", choices=("auto", "on", "off"),
        help="compile the passes through a ConvNet; auto: when there is a compiler and work enough to earn its time")
    wait_minutes: float = _run(30, parse=number(open_end=True), metavar="MIN",
        help="under torchrun, how long a rank waits for the others before all give up")
    seed: int = _run(0, parse=integer(0), metavar="N",
        help="every random draw derives from it; 0 is a seed like any other")
    deterministic: bool = _run(False,
        help="have a GPU give the same bytes at every run, too, which is slower; a CPU always does")
    depth: int | None = _network(None, parse=integer(1), metavar="N",
        help=f"blocks of a ConvNet, layers of the others (default: {per_family('depth')})")
    width: int | None = _network(None, parse=integer(1), metavar="CHANNELS",
        help="channels of a ConvNet, of the first stage of a ResNet, VGG or AlexNet, growth of a DenseNet (default: "
             f"{per_family('width')})")
    norm_type: str | None = _network(None, choices=models.NORMS,
        help=f"normalisation layers (default: {per_family('norm')})")
    lr: float = _training(0.01, parse=number(open_end=True), metavar="RATE",
        help="learning rate of networks, while distilling and in evaluation")
    momentum: float = _training(0.9, parse=number(below=1), metavar="M", help="momentum of networks")
    weight_decay: float = _training(5e-4, parse=number(), metavar="W", help="weight decay of networks")
    epochs: int = _evaluation(1000, parse=integer(1), metavar="N",
        help=f"epochs of an evaluation training (default: 1000; {DATASET_SETTINGS['digits']['epochs']} for digits; "
             f"{REAL_EPOCHS} for train.py --real)")
    batch_size: int = _evaluation(64, parse=integer(1), metavar="IMAGES",
        help="mini-batch of an evaluation training")
    mixup: str = _evaluation("cut", choices=training.MIXUPS,
        help="CutMix (in half of the batches) or none in evaluation trainings")
    eval_aug_type: str | None = _evaluation(None, parse=augmentation, metavar="NAMES",
        help=f"augmentation of evaluation trainings (default: {EVALUATION_AUGMENTATION}, without cutout under CutMix, "
             "without flip where mirror images are other classes)")
    repeat: int = _evaluation(5, parse=integer(1), metavar="N", help="trainings per evaluation")
    tensorboard: bool = _run(False,
        help="write losses, accuracies and pictures for TensorBoard as well (pip install tensorboard), beside the "
             "results")


@dataclass(frozen=True)
class CondenseOptions(Options):
    """condense.py"""

    method: str = _method("dream", "-m", choices=tuple(METHODS),
        help="framework: " + "; ".join(f"{name}, {method.about}" for name, method in METHODS.items()))
    net_type: str = _network("convnet", "-n", metavar="NAME",
        help=f"one of {', '.join(models.FAMILIES)}, a depth may follow, as in resnet18; or one of torchvision's "
             "classification networks by its name there, as in shufflenet_v2_x0_5")
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
        help="real images to match: k-means representatives (DREAM), a random draw, those nearest the class mean, "
             "those with the smallest margin to another class under the current network, or herding")
    kmeans: str = _selection("batched", choices=tuple(selection.KMEANS),
        help="k-means of all classes at once on the device, or scikit-learn's KMeans to convergence, for reference")
    interval: int = _selection(10, parse=integer(1), metavar="STEPS",
        help="inner steps between two selections; with more than --inner_loop, one serves several networks")
    per_cluster: int = _selection(1, parse=integer(1), metavar="IMAGES",
        help="k-means representatives of a cluster, so --batch_real divided by it clusters (DREAM+'s sub-clusters)")
    batch_real: int = _selection(128, parse=integer(1), metavar="IMAGES",
        help="real images per class to match, and mini-batch of the network update")
    cluster_raw: bool = _selection(False,
        help="embed un-normalised images for the selection, as the published code does; everything else normalises")
    match: str = _matching("grad", parse=matching, metavar="WHAT",
        help=f"one of {', '.join(objectives.OBJECTIVES)} (gradients, mean features of every block, mean embeddings), "
             f"several joined by +, or {TRAJECTORY}")
    metric: str = _matching("mse", choices=tuple(objectives.METRICS), help="distance per layer, summed over layers")
    bias: bool = _matching(False, help="match the gradients of biases and norm layers as well")
    fc: bool = _matching(False, help="match the gradient of the classifier as well")
    aug_type: str = _matching("color_crop_cutout", parse=augmentation, metavar="NAMES",
        help="augmentation while matching; the network update uses it without cutout under CutMix")
    precision: str = _matching("fp32", choices=PRECISIONS,
        help="arithmetic of matching and network updates; evaluations stay in fp32")
    batch_syn_max: int = _matching(128, parse=integer(1), metavar="IMAGES",
        help="synthetic images per class and step at most")
    lr_img: float = _matching(5e-3, parse=number(open_end=True), metavar="RATE",
        help="pixel learning rate, see --pixel_step")
    mom_img: float = _matching(0.5, parse=number(below=1), metavar="M", help="momentum of the pixels")
    pixel_step: str = _matching("sweep", choices=pixels.STEPS,
        help="sweep: class after class with one momentum, as IDC and DREAM, rate at ipc 10 and the data set's own "
             "side, scaled by ipc / 10 and (side / own side)^2; joint: all classes in one step, the rate being that of "
             "normalised images, as DC, DM and MTT")
    train_on: str = _training("real", choices=("real", "syn"),
        help="images that the network trains on after every inner step: --n_data real ones, or all synthetic ones")
    n_data: int = _training(500, parse=integer(0), metavar="IMAGES",
        help="real images of that kind, drawn anew every time; 0: the network stays as it is")
    net_epoch: int = _training(1, parse=integer(1), metavar="N", help="epochs over them")
    pretrain: int = _training(0, parse=integer(0), metavar="N",
        help="epochs over all real images that every fresh network begins with")
    mom_net: float | None = _training(None, parse=number(below=1), metavar="M",
        help="momentum of networks while distilling (default: --momentum)")
    wd_net: float | None = _training(None, parse=number(), metavar="W",
        help="weight decay of networks while distilling (default: --weight_decay)")
    mixup_net: str = _training("cut", choices=training.MIXUPS, help="CutMix or none in the network update")
    experts: int = _trajectories(10, parse=integer(1), metavar="N",
        help="networks that are trained on real images first, once for all runs with the same settings; --select says "
             "which mini-batches they see, --interval after how many of these anew")
    expert_epochs: int = _trajectories(50, parse=integer(1), metavar="N", help="epochs of each")
    expert_seed: int = _trajectories(0, parse=integer(0), metavar="N", help="their --seed")
    experts_only: bool = _trajectories(False, help="train what is missing of them, then stop")
    student_steps: int = _trajectories(20, parse=integer(1), metavar="N",
        help="steps that a student takes on synthetic images")
    match_epochs: int = _trajectories(3, parse=integer(1), metavar="M",
        help="epochs of an expert that these have to make up for")
    max_start: int = _trajectories(25, parse=integer(1), metavar="EPOCH",
        help="a student starts where an expert was before this epoch")
    step_size: float = _trajectories(0.01, parse=number(open_end=True), metavar="RATE",
        help="the student's learning rate to begin with; it is learned")
    lr_step: float = _trajectories(1e-5, parse=number(), metavar="RATE", help="at this rate")
    share_update: str = _run("auto", choices=("auto", "on", "off"),
        help="under torchrun, whether each rank trains the network on the images of its classes only, or on all of "
             "them like every other; auto measures which is faster")
    eval_every: int = _evaluation(0, parse=integer(0), metavar="N",
        help="outer iterations between evaluations, the start included; 0: only at the end")
    snapshot_every: int = _run(0, parse=integer(0), metavar="N",
        help="outer iterations between copies of the set (data_<iteration>.pt), the start included; 0: none")
    resume_from: str | None = _run(None, metavar="PATH",
        help="begin from the pixels of another run, at its outer iteration, with this command's settings: a run folder "
             "or its checkpoint.pt, checkpoint_previous.pt or data_<iteration>.pt; --tag gives this run its own folder")
    restart: bool = _run(False, help="delete what the run folder holds and begin again")
    dry_run: bool = _run(False, help="print the resolved options and the run folder, then stop")


@dataclass(frozen=True)
class TrainOptions(Options):
    """train.py. Options that a distilled set brings along (data set, network, protocol) come from it unless given."""

    run: str | None = _subject(None, metavar="RUN",
        help="run folder, .pt or .safetensors file, or folder with DIR/CLASS/*.png (default: the newest run folder "
             "under --results_dir; -d, -f and --ipc narrow it down)")
    baselines: Sequence[str] = _subject(BASELINES, nargs="+", choices=(*selection.STRATEGIES, NO_BASELINES),
        help="beside RUN, as many real images as it stores per class, chosen in these ways, and random ones as many as "
             f"it decodes to; {NO_BASELINES} leaves them out (default: {' '.join(BASELINES)})")
    real: bool = _subject(False,
        help="the whole real training set, the upper bound: with RUN one more row, alone nothing else; trained once, "
             "and found again in --results_dir")
    coreset: str | None = _subject(None, choices=tuple(selection.STRATEGIES),
        help="in place of RUN, --ipc real images per class, chosen in this way")
    factor: int | None = _subject(None, "-f", parse=integer(1), metavar="F",
        help="multi-formation factor, for a set without data.json")
    ipc: int | None = _subject(None, "-i", parse=integer(1), metavar="N", help="images per class")
    decode_type: str | None = _subject(None, choices=formation.DECODE_TYPES,
        help="for a set without data.json (default: single)")
    normalized: bool = _subject(False,
        help="the set's pixels have mean and standard deviation of the data set taken out (and are not whitened)")
    net_type: list[str] | None = _network(None, "-n", nargs="+", metavar="NAME",
        help=f"one or more of {', '.join(models.FAMILIES)}, a depth may follow, as in resnet18; or the name of one of "
             f"torchvision's, as in mobilenet_v3_small; {ALL_NETWORKS} for {' '.join(models.PAPER_TABLE)} (default: "
             "the network that distilled, or convnet)")
    precision: str = _training("fp32", choices=PRECISIONS, help="arithmetic of the trainings")
    confusion: bool = _run(False,
        help="accuracy by class and confusion matrix of every row, on the screen and as CSV and picture beside "
             "eval.json")
    table: list[str] | None = _run(None, parse=table_file, nargs="+", metavar="FILE",
        help="write the table as Markdown, CSV or JSON, by the suffix .md, .csv, .json")
    json: bool = _run(False, help="print one JSON object as the last line of standard output")
    export: str | None = _run(None, metavar="PATH",
        help="train nothing; write the decoded set as PNG files in PATH/CLASS with a README.md, or, if PATH ends in "
             ".safetensors, the stored one with everything that data.json says in its header")
    retrain: bool = _run(False, help="train again what eval.json already knows")
# fmt: on


def as_saved(options: CondenseOptions) -> dict[str, Any]:
    """All options as options.json holds them; paths are absolute, so that they can be compared."""
    paths = {name: getattr(options, name) for name in ("image_folder", "resume_from")}
    resolved = {name: str(Path(path).resolve()) for name, path in paths.items() if path is not None}
    return {**dataclasses.asdict(options), **resolved}


def run_folder(options: CondenseOptions) -> Path:
    """results/<dataset>/<net>_f<f>_ipc<n>[_<method>][_<tag>], the method unless it is dream.

    Raises UsageError for an unknown network.
    """
    try:
        spec = models.resolve(options.net_type, channels=1, classes=1, side=1, depth=options.depth)
    except ValueError as error:
        raise UsageError(f"--net_type: {error}") from None
    more = ["" if options.method == "dream" else options.method, options.tag]
    name = "_".join([spec.name, f"f{options.factor}", f"ipc{options.ipc}", *filter(None, more)])
    return Path(options.results_dir) / options.dataset / name


# --- Resolution -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Resolved:
    """Options with the origin of each: flag, method, --reproduce, data set, or default."""

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
    ipc = given.get("ipc", first["ipc"])
    peculiar = exceptions(dataset, given.get("factor", first["factor"]), ipc)
    method, select = given.get("method", first["method"]), given.get("select")
    own = method_settings(method, dataset, ipc=ipc, select=select, reproduce="reproduce" in given)
    layers += [("data set", peculiar), ("method", own), ("flag", given)]
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for name, layer in layers:
        if layer is not given and layer is not first and "net_type" in given:
            layer = suited(layer, given["net_type"])
        values.update(layer)
        origin.update(dict.fromkeys(layer, name))
    options = CondenseOptions(**values)
    check_common(options)
    return Resolved(options, origin)


NETWORK = ("net_type", "depth", "width", "norm_type")


def split_name(name: str) -> tuple[str, int | None]:
    """Family and depth of a network's name. Raises UsageError for an unknown family."""
    try:
        return models.split_name(name)
    except ValueError as error:
        raise UsageError(f"--net_type: {error}") from None


def suited(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Settings as far as they concern the network of that name: a ConvNet's depth and width say nothing of a ResNet."""
    found = {k: v for k, v in settings.items() if k not in NETWORK}
    family, depth = split_name(name)
    if family == split_name(settings.get("net_type") or "convnet")[0]:
        found |= {k: settings[k] for k in NETWORK[1:] if k in settings and not (k == "depth" and depth)}
    return found


def resolve_training(
    given: dict[str, Any], card: Mapping[str, Any] | None, source: Path, *, ipc: int | None = None
) -> TrainOptions:
    """train.py's flags to complete options. card: the set's data.json, which knows its settings; source: its path.

    ipc: images per class of a set without a card.

    Raises UsageError for a flag that contradicts the card, and for combinations that make no sense.
    """
    values: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(TrainOptions)}
    if card is not None:
        for name in OF_THE_SET:
            if name in given and given[name] != card[name] and name != "image_folder":
                raise UsageError(f"--{name} {given[name]}: the set's data.json says {card[name]}; leave the flag out")
        values.update(_settings_of(card, source))
    else:
        values["dataset"] = given.get("dataset", "folder" if "image_folder" in given else values["dataset"])
        peculiar = exceptions(values["dataset"], given.get("factor") or 1, given.get("ipc") or ipc or 10)
        for layer in (
            DATASET_SETTINGS[values["dataset"]],
            peculiar,
            {"epochs": REAL_EPOCHS} if given.get("real") else {},
        ):
            values.update({k: v for k, v in layer.items() if k in values})
    if card is not None and not card.get("normalized", False) and given.get("normalized"):
        raise UsageError("--normalized: the set's data.json says that it is not; leave the flag out")
    options = TrainOptions(**{**values, **given})
    check_common(options)
    if NO_BASELINES in options.baselines and len(options.baselines) > 1:
        raise UsageError(f"--baselines: {NO_BASELINES} and other words exclude each other")
    return options


def real_epochs(given: Mapping[str, Any]) -> int:
    """Of a training on all real images: a thousand are for sets of a few."""
    return int(given.get("epochs", REAL_EPOCHS))


def _settings_of(card: Mapping[str, Any], source: Path) -> dict[str, Any]:
    """The settings in a data.json, which may be anybody's: checked as if they were flags."""
    known = {**card["settings"], **{name: card[name] for name in OF_THE_SET}}
    # How the set was computed says nothing of how it is to be evaluated, and what only train.py has, such as the
    # names of files to write, is not for a set to say.
    names = {field.name for field in dataclasses.fields(CondenseOptions)} - {*FREE, "precision"}
    words = [
        f"--{field.name}={known[field.name]}"
        for field in dataclasses.fields(TrainOptions)
        if field.name in names and known.get(field.name) is not None
    ]
    try:
        found = make_parser(TrainOptions, "").parse_given(words)
        for name in found.get("net_type", []):
            split_name(name)
        return found
    except UsageError as error:
        reason = str(error).rsplit("; see", 1)[0]
        raise UserError(
            f"{source}: is damaged ({reason}); move the file away and describe the set with -d and -f"
        ) from None


def remaining_settings(options: CondenseOptions) -> dict[str, Any]:
    """What data.json keeps under `settings`: all but what it says of the set itself, and of places."""
    return {k: v for k, v in dataclasses.asdict(options).items() if k not in (*FREE, *OF_THE_SET)}


def check_common(options: Options) -> None:
    """Rules between flags that need no data."""
    if options.dataset == "folder" and options.image_folder is None:
        raise UsageError("-d folder: say where the images are with --image_folder DIR")
    if options.dataset == "digits" and options.image_folder is not None:
        raise UsageError("--image_folder: digits comes with scikit-learn; leave -d out to use the folder")
    if options.size is not None and options.dataset != "folder":
        raise UsageError(f"--size: only for folders of one's own; {options.dataset} has a fixed image size")


def networks(
    options: TrainOptions,
    given: Mapping[str, Any],
    card: Mapping[str, Any] | None,
    *,
    channels: int,
    classes: int,
    side: int,
) -> list[models.NetSpec]:
    """train.py's networks; each takes the flags given, and of the set's own settings those that concern it."""
    found = []
    own = {k: getattr(options, k) for k in NETWORK[1:] if k not in given}
    distilled_with = card["settings"].get("net_type") if card else None
    names = options.net_type or ["convnet"]
    for name in dict.fromkeys(models.PAPER_TABLE if ALL_NETWORKS in names else names):
        concerned = suited({**own, "net_type": distilled_with}, name)
        settings: dict[str, Any] = {k: concerned.get(k) for k in own}
        apart = dataclasses.replace(options, **settings)
        found.append(network(apart, name, channels=channels, classes=classes, side=side))
    return found


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
        net = models.outline(spec)
    except ValueError as error:
        raise UsageError(f"--net_type {name} (--depth, --width, --norm_type): {error}") from None
    check_weights(net, name)
    return spec
