"""All flags, as fields of two dataclasses: the default, the help text and the check of every value.

utils/config/resolve.py combines flags, presets and defaults.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import models
from utils.config.flags import (
    augmentation,
    device,
    flag,
    initialisation,
    integer,
    matching,
    normalisation,
    number,
    table_file,
    tag,
)
from utils.config.presets import DATASET_SETTINGS, EVALUATION_AUGMENTATION, METHODS, POOLS, REAL_EPOCHS, TRAJECTORY
from utils.method import formation, objectives, pixels, selection, training
from utils.method.frequencies import FREQUENCIES
from utils.method.images import FLOAT32, STORES
from utils.numerics.compute import PRECISIONS
from utils.runs.normalisation import OF_DATA

RESULTS_DIR = "results"
# Options that may differ when a run goes on, about places, the machine, what is shown and how the set is stored;
# RESUMABLE: until it is finished.
FREE = (
    "data_dir", "data_threads", "results_dir", "device", "compile", "wait_minutes", "max_minutes", "dry_run",
    "experts_only", "restart", "reproduce", "snapshot_every", "tensorboard", "deterministic", "share_update",
    "show_best", "config", "store",
)  # fmt: skip
RESUMABLE = ("precision",)
BASELINES = ("random", "kmeans", "herding")
NO_BASELINES, ALL = "none", "all"
OF_ANOTHERS = ("normalized", "whitened", "classes")  # what is said of a set that has no data.json
OF_THE_SET = ("dataset", "image_folder", "npz", "ipc", "factor", "decode_type")  # what data.json says of the set itself

# One name per group of --help, so that a field below begins with its group.
_data = partial(flag, group="data")
_synthetic = partial(flag, group="synthetic set")
_subject = partial(flag, group="what to train on")
_given = partial(flag, group="a set to begin from or to evaluate")
_budget = partial(flag, group="budget")
_selection = partial(flag, group="selection")
_method = partial(flag, group="method")
_matching = partial(flag, group="matching")
_pool = partial(flag, group="networks trained on real images (--networks, --keep, --method mtt)")
_trajectories = partial(flag, group="trajectories (--method mtt)")
_network = partial(flag, group="network")
_training = partial(flag, group="network training")
_evaluation = partial(flag, group="evaluation")
_run = partial(flag, group="run")


def per_family(setting: str) -> str:
    """Defaults of depth, width or norm for every network, for --help."""
    defaults = ", ".join(f"{name} {getattr(family, setting)}" for name, family in models.FAMILIES.items())
    if setting == "width":
        large = ", ".join(f"{name} {f.large_width}" for name, f in models.FAMILIES.items() if f.large_width)
        defaults += f"; {large} from {models.resnet.LARGE} x {models.resnet.LARGE} pixels on"
    rows: dict[int, list[str]] = {}
    for name, settings in DATASET_SETTINGS.items():
        if setting in settings:
            rows.setdefault(settings[setting], []).append(name)
    return "".join([defaults, *(f"; convnet {value} for {', '.join(names)}" for value, names in rows.items())])


# fmt: off
@dataclass(frozen=True)
class Options:
    """Options of both scripts. None: not given, or derived from other options, as the help says."""

    COMMON: ClassVar[Sequence[str]] = ()  # the flags that --help begins with

    dataset: str = _data("digits", "-d", choices=tuple(DATASET_SETTINGS),
        help="data set; folder, tinyimagenet, imagenette and imagewoof need --image_folder, npz needs --npz")
    image_folder: str | None = _data(None, metavar="DIR",
        help="images in DIR/train/CLASS/* and DIR/test/CLASS/* (or val, also with a table of labels as Tiny-ImageNet "
             "has it); with -d cifar10 and the like, that data set's normalisation and settings apply to them")
    npz: str | None = _data(None, metavar="FILE",
        help="images in a .npz file of arrays train_images, train_labels, test_images and test_labels, as MedMNIST has "
             "them, or x_train, y_train and so on")
    split: float | None = _data(None, parse=number(below=1, open_end=True), metavar="F",
        help="test on this fraction of every class, where --image_folder (then also DIR/CLASS/*) or --npz has no test "
             "images; the same images for every --seed")
    size: int | None = _data(None, parse=integer(8, 2**14), metavar="PIXELS",
        help="resize and centre-crop the images of --image_folder or --npz to this side (default: their own)")
    skip_broken: bool = _data(False,
        help="leave out image files that cannot be decoded, which are counted in options.json; reads all files twice")
    whiten: str = _data("none", choices=("none", "zca"),
        help="ZCA-whiten images after normalising them, in distilling and in evaluation")
    normalized: str | None = _given(None, parse=normalisation, const=OF_DATA, metavar="NAME",
        help="the pixels of a set without data.json are normalised: by the data set's mean and std (no NAME, or data), "
             "by those of imagenet, or by MEAN/STD, such as 0.5/0.5 or 0.49,0.48,0.45/0.2,0.2,0.2")
    whitened: str | None = _given(None, choices=("yes", "no"), const="yes",
        help="its pixels are ZCA-whitened after the normalisation of --normalized (no NAME: data; 0/1 for none), or "
             "they are not (no); without the flag a set that looks so is refused or warned of")
    classes: list[str] | None = _given(None, nargs="+", metavar="NAME",
        help="classes of its label numbers, in this order, as NAME,NAME,... or NAME NAME ... (default: the data set's "
             "order; for a folder the alphabetical one)")
    data_dir: str = _data("data", metavar="DIR", help="where data sets are downloaded to and looked for")
    data_threads: int | None = _data(None, parse=integer(1, 512), metavar="N",
        help="threads that read image files (default: as many as the machine suggests)")
    results_dir: str = _run(RESULTS_DIR, metavar="DIR", help="where run folders lie")
    config: str | None = _run(None, metavar="FILE",
        help="take flags from a YAML or JSON file (ipc: 10), or the settings of another run from its options.json; "
             "flags on the command line win")
    device: str = _run("auto", parse=device, metavar="NAME",
        help="auto, cpu, cuda, or cuda:N for one of several GPUs; auto takes CUDA where there is one")
    compile: str = _run("auto", choices=("auto", "on", "off"),
        help="compile the passes through a ConvNet; auto: where there is a compiler and the run is long enough to gain "
             "more time than compiling takes")
    wait_minutes: float = _run(30, parse=number(open_end=True), metavar="MIN",
        help="under torchrun, how long a rank waits for the others before all give up")
    seed: int = _run(0, parse=integer(0), metavar="N",
        help="seed from which all random numbers derive; 0 is a seed like any other")
    deterministic: bool = _run(False,
        help="make a GPU give the same bytes at every run, which is slower; a CPU always does")
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
        help="evaluation trainings use CutMix in half of the batches (cut) or not at all (vanilla)")
    eval_aug_type: str | None = _evaluation(None, parse=augmentation, metavar="NAMES",
        help=f"augmentation of evaluation trainings (default: {EVALUATION_AUGMENTATION}, without cutout under CutMix, "
             "without flip where mirror images are other classes)")
    repeat: int = _evaluation(5, parse=integer(1), metavar="N", help="trainings per evaluation")
    show_best: bool = _evaluation(False,
        help="also show the best of four tests of each training, chosen on the test set: biased, for a comparison with "
             "published figures only")
    tensorboard: bool = _run(False,
        help="also write losses, accuracies and pictures for TensorBoard, beside the results (pip install tensorboard)")


@dataclass(frozen=True)
class CondenseOptions(Options):
    """Options of condense.py."""

    COMMON = ("dataset", "image_folder", "factor", "ipc", "reproduce", "method", "niter", "select", "tag", "dry_run")

    method: str = _method("dream", "-m", choices=tuple(METHODS),
        help="framework: " + "; ".join(f"{name}, {method.about}" for name, method in METHODS.items()))
    net_type: str = _network("convnet", "-n", metavar="NAME",
        help=f"one of {', '.join(models.FAMILIES)}, with a depth if you like, as in resnet18; or a classification "
             "network of torchvision by its name there, as in shufflenet_v2_x0_5")
    reproduce: bool = _budget(False,
        help="the published settings and budget for mnist, fashion, svhn, cifar10, cifar100")
    factor: int = _synthetic(1, "-f", parse=integer(1), metavar="F",
        help="multi-formation: every stored image holds F x F training images")
    ipc: int = _synthetic(1, "-i", parse=integer(1), metavar="N", help="stored images per class")
    init: str = _synthetic("kmeans", parse=initialisation, metavar="NAME",
        help="initial pixels: real images selected by one of the names of --select (mix, the published name of kmeans "
             "for F > 1, is accepted too), noise (of mean 0.5 and standard deviation 0.25, as in IDC), or normal "
             "(standard normal in normalised images, as in DC)")
    pack: str = _synthetic("area", choices=formation.PACKS,
        help="how initial images are shrunk into the cells of --factor: means of pixels (area), or every F-th pixel "
             "(nearest), as the published code does")
    decode_type: str = _synthetic("single", choices=formation.DECODE_TYPES,
        help="decode every stored image with factor F (single), with every factor up to F (multi), or with F as long "
             f"as a class stays within {formation.BOUND} images and smaller factors after (bound)")
    store: str = _synthetic(FLOAT32, choices=STORES,
        help="how data.pt holds pixels: as floats, or rounded to 8 or 4 bits (two pixels in a byte); pictures and "
             "evaluations are of what it holds, and the checkpoint goes on with floats. The same command with another "
             "one writes and evaluates a finished set again")
    tag: str | None = _run(None, parse=tag, metavar="TEXT",
        help="append this to the run folder's name, to keep several runs apart")
    niter: int = _budget(200, parse=integer(1), metavar="N", help="outer iterations, each with a fresh network")
    inner_loop: int = _budget(100, parse=integer(1), metavar="STEPS", help="inner steps per outer iteration")
    seconds: float | None = _budget(None, parse=number(open_end=True), metavar="S",
        help="finish when distilling, experts included, has taken so long, whatever --niter: for comparisons at equal "
             "cost")
    max_minutes: float | None = _budget(None, parse=number(open_end=True), metavar="MIN",
        help="save and stop after this time (an evaluation that has begun is finished); the same command goes on later")
    select: str = _selection("kmeans", choices=tuple(selection.STRATEGIES),
        help="real images to match: k-means representatives (DREAM), random images, those nearest the class mean "
             "(central), those with the smallest margin to another class under the current network (boundary), "
             "herding, or a random member of every k-means cluster (members; with a pool, clusters are found once "
             "per network)")
    kmeans: str = _selection("batched", choices=tuple(selection.KMEANS),
        help="k-means of all classes at once on the device, or scikit-learn's KMeans to convergence, for reference")
    interval: int = _selection(10, parse=integer(1), metavar="STEPS",
        help="inner steps between two selections; if more than --inner_loop, a selection serves several networks")
    per_cluster: int = _selection(1, parse=integer(1), metavar="IMAGES",
        help="representatives of every k-means cluster, of which there are --batch_real / IMAGES (DREAM+'s "
             "sub-clusters)")
    batch_real: int = _selection(128, parse=integer(1), metavar="IMAGES",
        help="real images per class to match, and mini-batch of the network update")
    cluster_raw: bool = _selection(False,
        help="embed un-normalised images for the selection, as the published code does; everything else normalises")
    match: str = _matching("grad", parse=matching, metavar="WHAT",
        help=f"one of {', '.join(objectives.OBJECTIVES)} (gradients, mean features of the last block, of every block, "
             f"mean embeddings), several joined by +, or {TRAJECTORY}")
    metric: str = _matching("mse", choices=tuple(objectives.METRICS), help="distance per layer, summed over layers")
    bias: bool = _matching(False, help="match the gradients of biases and norm layers as well")
    fc: bool = _matching(False, help="match the gradient of the classifier as well")
    aug_type: str = _matching("color_crop_cutout", parse=augmentation, metavar="NAMES",
        help="augmentation while matching: flip, color and cutout, as far as they are named, and one of the others "
             "named (crop, scale, rotate, translate); with one_ before the names, one of all of them (DSA). The "
             "network update uses it without cutout under CutMix")
    frequencies: str = _matching("random", choices=FREQUENCIES,
        help="where --match cf compares characteristic functions: at random frequencies, or at those of a small "
             "network that learns where they differ most (NCFM)")
    frequency_count: int = _matching(1024, parse=integer(1), metavar="N", help="frequencies of a step")
    calibrate: bool = _matching(False,
        help="after every matching step, a step on the cross-entropy of the synthetic images under a trained network "
             "of the pool (DANCE)")
    precision: str = _matching("fp32", choices=PRECISIONS,
        help="arithmetic of matching and network updates; evaluations stay in fp32")
    batch_syn_max: int = _matching(128, parse=integer(1), metavar="IMAGES",
        help="maximum of synthetic images per class in a step")
    lr_img: float = _matching(5e-3, parse=number(open_end=True), metavar="RATE",
        help="pixel learning rate, see --pixel_step")
    mom_img: float = _matching(0.5, parse=number(below=1), metavar="M", help="momentum of the pixels")
    lr_img_end: float = _matching(1.0, parse=number(open_end=True, most=1), metavar="F",
        help="the pixel learning rate falls to this fraction of itself, along half a cosine over the outer iterations")
    average: float = _matching(0.0, parse=number(below=1), metavar="D",
        help="the set is the moving average of the pixels over the inner steps, with this decay; 0: the last pixels")
    pixel_step: str = _matching("sweep", choices=pixels.STEPS,
        help="sweep: class after class with one momentum, as in IDC and DREAM; --lr_img is the rate at ipc 10 and the "
             "data set's own side, and is scaled by ipc / 10 and (side / own side)^2. joint: all classes in one step, "
             "as in DC, DM and MTT; --lr_img is the rate of normalised images")
    train_on: str = _training("real", choices=("real", "syn"),
        help="images of the network update after every inner step: --n_data real ones, or all synthetic ones")
    n_data: int = _training(500, parse=integer(0), metavar="IMAGES",
        help="real images of a network update, drawn anew every time; 0: the network is not updated")
    net_epoch: int = _training(1, parse=integer(1), metavar="N", help="epochs of a network update")
    pretrain: int = _training(0, parse=integer(0), metavar="N",
        help="epochs over all real images before a fresh network is used")
    mom_net: float | None = _training(None, parse=number(below=1), metavar="M",
        help="momentum of networks while distilling (default: --momentum)")
    wd_net: float | None = _training(None, parse=number(), metavar="W",
        help="weight decay of networks while distilling (default: --weight_decay)")
    mixup_net: str = _training("cut", choices=training.MIXUPS,
        help="network updates use CutMix in half of the batches (cut) or not at all (vanilla)")
    networks: str = _pool("fresh", choices=tuple(POOLS),
        help="networks of the outer iterations: freshly initialised ones, or of a pool of --experts: perturbed ones "
             "(early, Acc-DD) or mixtures of their initial and final weights (middle, DANCE)")
    keep: float = _pool(1.0, parse=number(open_end=True, most=1), metavar="F",
        help="use this fraction of every class's real images only, those with the lowest loss under the pool")
    experts: int = _pool(10, parse=integer(1), metavar="N",
        help="networks that are trained on real images first, once for all runs with the same settings; for mtt, "
             "--select chooses the images of their mini-batches, anew after every --interval mini-batches")
    expert_epochs: int = _pool(50, parse=integer(1), metavar="N", help="epochs of every expert")
    expert_seed: int = _pool(0, parse=integer(0), metavar="N", help="seed of the experts, in place of --seed")
    experts_only: bool = _pool(False, help="train the experts that are missing, then stop")
    student_steps: int = _trajectories(20, parse=integer(1), metavar="N",
        help="steps that a student takes on synthetic images")
    match_epochs: int = _trajectories(3, parse=integer(1), metavar="M",
        help="epochs of an expert after which the student's end is compared with it")
    max_start: int = _trajectories(25, parse=integer(1), metavar="EPOCH",
        help="a student starts where an expert was before this epoch")
    step_size: float = _trajectories(0.01, parse=number(open_end=True), metavar="RATE",
        help="initial learning rate of a student; it is learned")
    lr_step: float = _trajectories(1e-5, parse=number(), metavar="RATE",
        help="rate at which the learning rate of a student is learned")
    share_update: str = _run("auto", choices=("auto", "on", "off"),
        help="under torchrun, each rank trains the network on the images of its own classes (on), or on all images "
             "(off); auto: on where mini-batches are so large that sending gradients pays")
    eval_every: int = _evaluation(0, parse=integer(0), metavar="N",
        help="outer iterations between evaluations, of which the first is at the start; 0: only at the end")
    eval_seconds: float | None = _evaluation(None, parse=number(open_end=True), metavar="S",
        help="evaluate when distilling, experts included, has taken S seconds, and whenever that time has doubled")
    snapshot_every: int = _run(0, parse=integer(0), metavar="N",
        help="outer iterations between copies of the set (data_<iteration>.pt), the first at the start; 0: none")
    resume_from: str | None = _run(None, metavar="PATH",
        help="begin with the pixels of another run, at its outer iteration, but with this command's settings; PATH is "
             "a run folder, its checkpoint.pt, checkpoint_previous.pt or data_<iteration>.pt, or anybody's set as in "
             "train.py; give --tag as well, for a folder of its own")
    restart: bool = _run(False, help="delete what the run folder holds and begin again")
    dry_run: bool = _run(False, help="print the resolved options and the run folder, then stop")


@dataclass(frozen=True)
class TrainOptions(Options):
    """Options of train.py; a distilled set's own settings apply unless a flag says otherwise."""

    COMMON = ("run", "dataset", "factor", "normalized", "net_type", "baselines", "real", "repeat", "table", "export")

    run: list[str] | None = _subject(None, nargs="*", metavar="RUN",
        help="run folder; file (.pt, .npz, .safetensors), or several that together are one set, in order; folder with "
             "DIR/CLASS/*.png; or one of these on the Hugging Face Hub, hf://USER/NAME[/PATH][@REVISION] (default: the "
             "newest run folder under --results_dir; -d, -f and --ipc narrow it down)")
    experiment: int | None = _subject(None, parse=integer(0), metavar="N",
        help="which set of a file that holds several, counted from 0 (default: the last)")
    baselines: Sequence[str] = _subject(BASELINES, nargs="+", choices=(*selection.STRATEGIES, NO_BASELINES),
        help="for comparison with RUN, as many real images per class as it stores, selected in each of these ways, and "
             f"as many random ones as it decodes to; {NO_BASELINES}: no comparison (default: {' '.join(BASELINES)})")
    real: bool = _subject(False,
        help="all real training images, the upper bound: one more row beside RUN, or without RUN the only row; the "
             "result is kept in --results_dir and used again")
    scores: bool = _subject(False,
        help="HLR, IOR, LRS and ARS of RUN, the scores of DD-Ranking, by this protocol; adds --real, random real "
             "images, and RUN and these without augmentation")
    teacher: str | None = _subject(None, metavar="RUN|all",
        help="also train on the set, and on random real images, with soft labels: the probabilities of a network "
             f"trained on all real images ({ALL}), or on another set, RUN")
    coreset: str | None = _subject(None, choices=tuple(selection.STRATEGIES),
        help="in place of RUN, --ipc real images per class, selected in this way")
    factor: int | None = _subject(None, "-f", parse=integer(1), metavar="F",
        help="multi-formation factor, for a set without data.json")
    ipc: int | None = _subject(None, "-i", parse=integer(1), metavar="N", help="images per class")
    decode_type: str | None = _subject(None, choices=formation.DECODE_TYPES,
        help="--decode_type of condense.py, for a set without data.json (default: single)")
    store: str | None = _subject(None, choices=STORES,
        help="evaluate, or export as .safetensors, what is left of the set when its pixels are stored so: 8 or 4 bits "
             "(default: as its file holds them)")
    net_type: list[str] | None = _network(None, "-n", nargs="+", metavar="NAME",
        help=f"one or more of {', '.join(models.FAMILIES)}, with a depth if you like, as in resnet18; or torchvision's "
             f"names, as in mobilenet_v3_small; {ALL} for {' '.join(models.PAPER_TABLE)} (default: the "
             "network that distilled, or convnet)")
    precision: str = _training("fp32", choices=PRECISIONS, help="arithmetic of the trainings")
    confusion: bool = _run(False,
        help="also show accuracy by class and the confusion matrix of every row, and write them as CSV and picture "
             "beside eval.json")
    table: list[str] | None = _run(None, parse=table_file, nargs="+", metavar="FILE",
        help="write the table as Markdown, CSV or JSON, by the suffix of FILE: .md, .csv or .json")
    json: bool = _run(False, help="print one JSON object as the last line of standard output")
    export: str | None = _run(None, metavar="PATH",
        help="train nothing; write the decoded set as PNG files in PATH/CLASS with a README.md, or, if PATH ends in "
             ".safetensors, the stored set, with the content of data.json in the file's header; hf://USER/NAME[/PATH] "
             "uploads it to the Hugging Face Hub, where a new data set is private at first")
    retrain: bool = _run(False, help="train on all real images, and teachers, again, even if the result is known")
# fmt: on
