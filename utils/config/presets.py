"""Tables of settings: one row for every data set, for --reproduce, and for every framework of --method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from data import has_mirror_images
from utils.method.augment import ONE, without

# --- Data sets and --reproduce ----------------------------------------------------------------------------------------

# Settings of each data set, in place of the defaults; the published ones are those of Liu et al. (ICCV 2023).
# lr_img holds at ipc 10, see `pixel_rate`. Digits and folders are not in the paper; digits is tuned for a CPU. Of
# (Tiny-)ImageNet, side and depth are those of Cazenavette et al. (CVPR 2022) and the factor is that of Kim et al. (ICML
# 2022), which they use with ResNet-AP-10 (-n resnet_ap10); the rate, CIFAR-10's by area, and n_data are ours, untuned.
DATASET_SETTINGS: dict[str, dict[str, Any]] = {
    "mnist": dict(metric="l1", lr_img=1e-4, n_data=500),
    # The published code scales this rate by an accidental (28/32)^2. Kept, so that the step is the published one.
    "fashion": dict(metric="l1", lr_img=1e-4 * (28 / 32) ** 2, n_data=500),
    "svhn": dict(metric="mse", lr_img=5e-3, n_data=500),
    "cifar10": dict(metric="mse", lr_img=5e-3, n_data=2000),
    "cifar100": dict(metric="mse", lr_img=5e-3, n_data=2000),
    "digits": dict(depth=2, lr_img=5e-3, n_data=128, niter=10, inner_loop=20, batch_real=32, epochs=300),
    "tinyimagenet": dict(depth=4, metric="mse", lr_img=5e-3 * (64 / 32) ** 2, n_data=2000),
    "imagenette": dict(factor=3, depth=5, metric="mse", lr_img=5e-3 * (128 / 32) ** 2),
    "imagewoof": dict(factor=3, depth=5, metric="mse", lr_img=5e-3 * (128 / 32) ** 2),
    "folder": dict(),
    "npz": dict(),
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

EVALUATION_AUGMENTATION = "color_crop_cutout_flip_scale_rotate"


def exceptions(dataset: str, factor: int, ipc: int) -> dict[str, Any]:
    """Published settings that depend on the factor or ipc besides the data set; mostly empty."""
    if dataset == "svhn" and factor == 1 and ipc == 1:
        return dict(mixup="vanilla")
    if dataset == "mnist" and factor > 1:
        return dict(
            aug_type="color_crop", mixup_net="vanilla", mixup="vanilla", eval_aug_type="color_crop_scale_rotate"
        )
    return {}


# --- Methods ----------------------------------------------------------------------------------------------------------
#
# The frameworks that representative matching plugs into: what is matched, what the network trains on, how the pixels
# step, and the budget. Another one is one more row of METHODS.


@dataclass(frozen=True)
class Asked:
    """Flags that some settings of a method depend on."""

    dataset: str
    ipc: int
    select: str
    networks: str


TRAJECTORY = "trajectory"  # value of --match: students follow experts, and no two sets of images are compared
Settings = Mapping[str, Any | Callable[[Asked], Any]]


@dataclass(frozen=True)
class Method:
    """Framework of --method: its settings, in place of those of the data set, and its budgets.

    A setting may be a function of `Asked`. published: what --reproduce adds. digits: a budget of minutes on a CPU, for
    -d digits. about: a few words for --help. caveat: in what --reproduce is not the published setting.
    """

    about: str
    settings: Settings
    published: Settings = field(default_factory=dict)
    digits: Settings = field(default_factory=dict)
    caveat: str = ""


# Zhao et al. (ICLR 2021), by images per class: matching updates per network, and synthetic epochs after each.
LOOPS = {1: (1, 1), 10: (10, 50), 20: (20, 25), 30: (30, 20), 40: (40, 15), 50: (50, 10)}


def loops(asked: Asked) -> tuple[int, int]:
    """Inner steps, and epochs on the synthetic images after each, of DC at --ipc or the next smaller published ipc."""
    return LOOPS[max(ipc for ipc in LOOPS if ipc <= asked.ipc)]


def siamese(asked: Asked) -> str:
    """DSA's augmentation, one of six operations at a call; no flips where a mirror image belongs to another class."""
    return f"{ONE}_" + without(EVALUATION_AUGMENTATION, *([] if has_mirror_images(asked.dataset) else ["flip"]))


def selection_interval(asked: Asked) -> int:
    """Inner steps between two selections: ten, and one for images that are drawn without embedding any.

    Those are random images, which IDC draws anew at every step, and members of a pool's clusters.
    """
    return 1 if asked.select == "random" or (asked.select == "members" and asked.networks != "fresh") else 10


def real_init(asked: Asked) -> str:
    """Value of --init: real images by k-means if --select has its clusters, random ones otherwise."""
    return "kmeans" if asked.select in ("kmeans", "members") else "random"


def noise_init(asked: Asked) -> str:
    """Value of --init: as `real_init` if --select is k-means, noise otherwise."""
    return "normal" if real_init(asked) == "random" else "kmeans"


# What --networks adds: the published pools, and without --reproduce smaller ones. Where networks are fresh, --keep and
# --calibrate take the pool of early.
POOLS: dict[str, dict[str, Any]] = {
    "fresh": {},
    "early": dict(experts=5, expert_epochs=2),
    "middle": dict(experts=5, expert_epochs=20),
}
PUBLISHED_POOLS: dict[str, dict[str, Any]] = {**POOLS, "middle": dict(experts=20, expert_epochs=60)}


DREAM = dict(interval=selection_interval)
JOINT = dict(pixel_step="joint", mom_img=0.5, batch_real=256, interval=selection_interval)
NO_MOMENTUM = dict(mom_net=0.0, wd_net=0.0, mixup_net="vanilla")

DC = dict(
    JOINT, **NO_MOMENTUM, select="random", match="grad", metric="cos", fc=True, bias=False, aug_type="none",
    lr_img=0.1, init=noise_init, train_on="syn", inner_loop=lambda asked: loops(asked)[0],
    net_epoch=lambda asked: loops(asked)[1], niter=100,
)  # fmt: skip
DM = dict(
    JOINT, select="random", match="embed", metric="mse", aug_type=siamese, lr_img=1.0, init=real_init, n_data=0,
    inner_loop=1, niter=2000,
)  # fmt: skip
MTT = dict(
    JOINT, **NO_MOMENTUM, select="random", match=TRAJECTORY, aug_type=siamese, lr_img=1e3, init=real_init,
    n_data=0, inner_loop=1, niter=500, experts=10,
)  # fmt: skip
# Zhang et al. (IJCAI 2024) and Wang et al. (CVPR 2025): networks of a pool, and no training between two steps.
DANCE = dict(
    DREAM, select="random", init=real_init, match="embed", metric="mse", networks="middle", calibrate=True, n_data=0,
    inner_loop=1, lr_img=0.1, niter=1000,
)  # fmt: skip
NCFM = dict(
    DREAM, select="random", init=real_init, match="cf", frequencies="learned", networks="middle", n_data=0,
    inner_loop=1, lr_img=10.0, niter=2000,
)  # fmt: skip

METHODS = {
    "dream": Method("gradients of representatives", DREAM),
    "idc": Method(
        "gradients of random images",
        dict(DREAM, select="random", init=real_init, batch_real=64),
        digits=dict(batch_real=32),
    ),
    "dc": Method("gradients", DC, dict(niter=1000), dict(batch_real=32, niter=20)),
    "dsa": Method(
        "gradients under augmentation",
        dict(DC, aug_type=siamese, init=real_init),
        dict(niter=1000),
        dict(batch_real=32, niter=20),
    ),
    "dm": Method("mean embeddings", DM, dict(niter=20000), dict(batch_real=32, niter=400)),
    "mtt": Method(
        "training trajectories",
        MTT,
        dict(niter=5000, experts=100),
        dict(batch_real=32, lr_img=30.0, niter=150, experts=4),
        "one set of settings for every --ipc; the paper has steps, epochs, start, rate and ZCA of each",
    ),
    "dance": Method(
        "mean embeddings under networks in the middle of their training, and cross-entropy at its end",
        DANCE,
        dict(niter=10000),
        dict(batch_real=32, niter=400, experts=3, expert_epochs=10),
    ),
    "ncfm": Method(
        "characteristic functions of embeddings under networks in the middle of their training",
        NCFM,
        dict(niter=20000),
        dict(batch_real=32, lr_img=1.0, niter=400, experts=3, expert_epochs=10),
        "the learned frequencies and the pixels' learning rate are ours",
    ),
    "dream+": Method("gradients and mean embeddings", dict(DREAM, match="grad+embed", pretrain=1)),
}


def method_settings(
    method: str,
    dataset: str,
    *,
    ipc: int,
    select: str | None,
    networks: str | None,
    judged: bool,
    reproduce: bool,
) -> dict[str, Any]:
    """Settings of a method, by name, for these flags; select, networks: None where the flag is absent.

    judged: whether a flag asks for a pool that judges images, whatever the networks are.
    reproduce: with the published budget.
    """
    row = METHODS[method]
    networks = str(networks or row.settings.get("networks", "fresh"))
    asked = Asked(dataset, ipc, str(select or row.settings.get("select", "kmeans")), networks)
    pools = PUBLISHED_POOLS if reproduce else POOLS
    pool = pools.get("early" if judged and networks == "fresh" else networks, {})  # a wrong name is refused later
    layers = [pool, row.settings, row.published if reproduce else {}, row.digits if dataset == "digits" else {}]
    return {name: value(asked) if callable(value) else value for layer in layers for name, value in layer.items()}
