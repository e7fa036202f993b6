"""The frameworks that representative matching plugs into, each a row of settings: what is matched, what the network
trains on, how the pixels step, and the budget. Another one is one more row of METHODS.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from utils.config.presets import EVALUATION_AUGMENTATION, NOT_MIRRORED
from utils.method.augment import without


@dataclass(frozen=True)
class Asked:
    """What some settings depend on."""

    dataset: str
    ipc: int
    select: str


TRAJECTORY = "trajectory"  # what --match says when no two sets of images are compared
Settings = Mapping[str, Any | Callable[[Asked], Any]]


@dataclass(frozen=True)
class Method:
    """Settings laid over those of the data set; a function is called with what was asked for.

    published: the budget that --reproduce adds. digits: what suits minutes on a CPU.
    """

    about: str
    settings: Settings
    published: Settings = field(default_factory=dict)
    digits: Settings = field(default_factory=dict)

    def resolved(self, asked: Asked, *, reproduce: bool) -> dict[str, Any]:
        layers = [self.settings, self.published if reproduce else {}, self.digits if asked.dataset == "digits" else {}]
        return {name: value(asked) if callable(value) else value for layer in layers for name, value in layer.items()}


# Zhao et al. (ICLR 2021), by images per class: matching updates per network, and synthetic epochs after each.
LOOPS = {1: (1, 1), 10: (10, 50), 20: (20, 25), 30: (30, 20), 40: (40, 15), 50: (50, 10)}


def loops(asked: Asked) -> tuple[int, int]:
    """Those of the most images per class that are not more than asked for."""
    return LOOPS[max(ipc for ipc in LOOPS if ipc <= asked.ipc)]


def siamese(asked: Asked) -> str:
    """All augmentations of DSA; no mirror images where they are other classes."""
    return without(EVALUATION_AUGMENTATION, *(["flip"] if asked.dataset in NOT_MIRRORED else []))


def anew(asked: Asked) -> int:
    """Inner steps between two selections: a random draw is free, clustering is not."""
    return 1 if asked.select == "random" else 10


def real_images(asked: Asked) -> str:
    """Initial pixels: real images, chosen in the way of the real images that are matched."""
    return "kmeans" if asked.select == "kmeans" else "random"


JOINT = dict(pixel_step="joint", mom_img=0.5, batch_real=256, interval=anew)
NO_MOMENTUM = dict(mom_net=0.0, wd_net=0.0, mixup_net="vanilla")

DC = dict(
    JOINT, **NO_MOMENTUM, select="random", match="grad", metric="cos", fc=True, bias=False, aug_type="none",
    lr_img=0.1, init="noise", train_on="syn", inner_loop=lambda asked: loops(asked)[0],
    net_epoch=lambda asked: loops(asked)[1], niter=100,
)  # fmt: skip
DM = dict(
    JOINT, select="random", match="embed", metric="mse", aug_type=siamese, lr_img=1.0, init=real_images, n_data=0,
    inner_loop=1, niter=2000,
)  # fmt: skip
MTT = dict(
    JOINT, **NO_MOMENTUM, select="random", match=TRAJECTORY, aug_type=siamese, lr_img=1e3, init=real_images,
    n_data=0, inner_loop=1, niter=500, experts=10,
)  # fmt: skip

METHODS = {
    "dream": Method("gradients of representatives", {}),
    "idc": Method("the same of random images", dict(select="random", interval=anew, init=real_images)),
    "dc": Method("gradients", DC, dict(niter=1000), dict(batch_real=32, niter=20)),
    "dsa": Method(
        "gradients under augmentation", {**DC, "aug_type": siamese}, dict(niter=1000), dict(batch_real=32, niter=20)
    ),
    "dm": Method("mean embeddings", DM, dict(niter=20000), dict(batch_real=32, niter=400)),
    "mtt": Method(
        "training trajectories",
        MTT,
        dict(niter=5000, experts=100),
        dict(batch_real=32, lr_img=30.0, niter=150, experts=4),
    ),
    "dream+": Method("gradients and mean embeddings", dict(match="grad+embed", pretrain=1)),
}


def method_settings(method: str, dataset: str, *, ipc: int, select: str | None, reproduce: bool) -> dict[str, Any]:
    """The row's settings. select: None where no flag says it."""
    row = METHODS[method]
    chosen = str(select or row.settings.get("select", "kmeans"))
    return row.resolved(Asked(dataset, ipc, chosen), reproduce=reproduce)
