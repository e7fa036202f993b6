"""The networks, by name. A new one is one class with a stem, stages and a classifier, and one row of `FAMILIES`."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from models.convnet import ConvNet
from models.densenet import DenseNet
from models.network import NORMS, Network
from models.resnet import ResNet

__all__ = [
    "FAMILIES",
    "NORMS",
    "ConvNet",
    "Family",
    "NetSpec",
    "Network",
    "build",
    "forward_flop",
    "resolve",
    "smallest_batch",
    "split_name",
]


@dataclass(frozen=True)
class Family:
    """A network class and the defaults of its three settings."""

    make: Callable[..., Network]
    depth: int
    width: int
    norm: str


FAMILIES = {
    #                    class                           depth width norm
    "convnet": Family(ConvNet, 3, 128, "instance"),
    "resnet": Family(ResNet, 10, 64, "batch"),
    "resnet_ap": Family(partial(ResNet, average=True), 10, 64, "instance"),
    "densenet": Family(DenseNet, 121, 12, "batch"),
}


@dataclass(frozen=True)
class NetSpec:
    """Everything that `build` needs: a row of `FAMILIES`, its settings, and the images' shape."""

    family: str
    depth: int
    width: int
    norm: str
    channels: int
    classes: int
    side: int

    @property
    def name(self) -> str:
        """Family and depth, e.g. `convnet3`, as used in folder names and tables."""
        return f"{self.family}{self.depth}"


def split_name(name: str) -> tuple[str, int | None]:
    """`resnet18` -> ("resnet", 18), `convnet` -> ("convnet", None). Raises ValueError for an unknown family."""
    match = re.fullmatch(r"([a-z_]+?)(\d+)?", name)
    if not match or match[1] not in FAMILIES:
        raise ValueError(
            f"unknown network {name!r}: choose one of {', '.join(FAMILIES)}, with a depth if you like (resnet18)"
        )
    return match[1], int(match[2]) if match[2] else None


def resolve(
    name: str,
    *,
    channels: int,
    classes: int,
    side: int,
    depth: int | None = None,
    width: int | None = None,
    norm: str | None = None,
) -> NetSpec:
    """The full specification of a network name such as `convnet`, `resnet18` or `resnet_ap10`.

    Raises ValueError, naming the choices, for an unknown name or a depth that contradicts the name's.
    """
    family, named = split_name(name)
    if named is not None and depth is not None and named != depth:
        raise ValueError(f"network {name!r} has depth {named}, which contradicts depth {depth}")
    usual = FAMILIES[family]
    return NetSpec(
        family=family,
        depth=depth or named or usual.depth,
        width=width or usual.width,
        norm=norm or usual.norm,
        channels=channels,
        classes=classes,
        side=side,
    )


def build(spec: NetSpec) -> Network:
    """A freshly initialised network (PyTorch's default initialisation, from the global generator), on the CPU.

    Raises ValueError when depth, norm and image side do not fit together.
    """
    if spec.norm == "group" and spec.width % 4:
        raise ValueError(f"norm group needs a width that 4 divides, not {spec.width}")
    return FAMILIES[spec.family].make(
        channels=spec.channels,
        classes=spec.classes,
        side=spec.side,
        depth=spec.depth,
        width=spec.width,
        norm=spec.norm,
    )


def forward_flop(spec: NetSpec) -> int:
    """Floating-point operations of one image's forward pass, two per multiplication and addition."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        build(spec).eval()(torch.zeros(1, spec.channels, spec.side, spec.side))
    return int(counter.get_total_flops())


def smallest_batch(spec: NetSpec) -> int:
    """Images that one training step needs: 2 where batch norm meets maps of a single pixel, otherwise 1."""
    try:
        build(spec).train()(torch.zeros(1, spec.channels, spec.side, spec.side))
    except ValueError:  # PyTorch's "expected more than 1 value per channel"
        return 2
    return 1
