"""The networks, by name. A new one is one class with a stem, stages and a classifier, and one row of `FAMILIES`.

A name that none of them has may be one of torchvision's classification networks (models/zoo.py).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial

import torch

from models import alexnet, densenet, resnet, vgg, zoo
from models.alexnet import AlexNet
from models.convnet import ConvNet
from models.densenet import DenseNet
from models.network import NORMS, Network
from models.resnet import ResNet
from models.vgg import VGG

__all__ = [
    "FAMILIES",
    "NORMS",
    "PAPER_TABLE",
    "ConvNet",
    "Family",
    "NetSpec",
    "Network",
    "build",
    "forward_flop",
    "has_batch_norm",
    "outline",
    "resolve",
    "second_derivative_error",
    "smallest_batch",
    "split_name",
]


@dataclass(frozen=True)
class Family:
    """Network class with the defaults of its three settings and the depths that it has (None: see the class).

    large_width: the default width for images of side `resnet.LARGE` and more, where that is another.
    """

    make: Callable[..., Network]
    depth: int
    width: int
    norm: str
    depths: Collection[int] | None
    large_width: int | None = None


FAMILIES = {
    #                    class                           depth width norm      depths
    "convnet": Family(ConvNet, 3, 128, "instance", None),
    "resnet": Family(ResNet, 10, 32, "batch", resnet.STAGES, large_width=64),
    "resnet_ap": Family(partial(ResNet, average=True), 10, 32, "instance", resnet.STAGES, large_width=64),
    "densenet": Family(DenseNet, 121, 12, "batch", densenet.LAYOUTS),
    "vgg": Family(VGG, 11, 64, "batch", vgg.LAYOUTS),
    "alexnet": Family(AlexNet, 5, 128, "batch", alexnet.LAYOUTS),
}

MOST_WIDTH = 2**16  # far beyond any memory, and below widths at which the sizes of weights overflow

# The networks of a table across architectures: how far a set that one network distilled serves others.
PAPER_TABLE = ("convnet", "resnet10", "resnet18", "densenet", "vgg11", "alexnet")


@dataclass(frozen=True)
class NetSpec:
    """Specification of a network, all that `build` needs: a row of `FAMILIES`, its settings, and the images' shape.

    A network of torchvision has its name as family, and depth 0, width 0 and norm "".
    """

    family: str
    depth: int
    width: int
    norm: str
    channels: int
    classes: int
    side: int

    @property
    def name(self) -> str:
        """Family and depth, e.g. `convnet3`, or torchvision's name, as used in folder names and tables."""
        return f"{self.family}{self.depth}" if self.family in FAMILIES else self.family


def split_name(name: str) -> tuple[str, int | None]:
    """Family and depth in a network's name: `resnet18` -> ("resnet", 18), `convnet` -> ("convnet", None).

    A name that `FAMILIES` does not have, or not with that depth, may be torchvision's: `resnet50` -> ("resnet50",
    None). Raises ValueError for an unknown name.
    """
    parts = re.fullmatch(r"([a-z_]+?)(\d+)?", name)
    family, depth = (parts[1], int(parts[2]) if parts[2] else None) if parts else (name, None)
    row = FAMILIES.get(family)
    if row and (depth is None or row.depths is None or depth in row.depths):
        return family, depth
    torchvision_names = zoo.names()
    if name in torchvision_names:
        return name, None
    if row:  # no such depth: the error of building it lists those that there are
        return family, depth
    close = difflib.get_close_matches(name, [*FAMILIES, *torchvision_names], n=1)
    raise ValueError(
        f"unknown network {name!r}: choose one of {', '.join(FAMILIES)}, with a depth if you like (resnet18), or a "
        "classification network of torchvision.models.list_models()" + "".join(f"; did you mean {c}?" for c in close)
    )


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
    """Full specification of a network name such as `convnet`, `resnet18` or torchvision's `mobilenet_v3_small`.

    Settings that are None come from `FAMILIES`. Raises ValueError, which lists the choices, for an unknown name, a
    depth that contradicts the name's, or settings that a network of torchvision does not have.
    """
    family, named = split_name(name)
    if family not in FAMILIES:
        if (depth, width, norm) != (None, None, None):
            raise ValueError("torchvision's networks have a fixed depth, width and norm: give none of them")
        return NetSpec(family, depth=0, width=0, norm="", channels=channels, classes=classes, side=side)
    if named is not None and depth is not None and named != depth:
        raise ValueError(f"network {name!r} has depth {named}, which contradicts depth {depth}")
    defaults = FAMILIES[family]
    if depth is None:
        depth = defaults.depth if named is None else named
    large_width = defaults.large_width if side >= resnet.LARGE else None
    return NetSpec(
        family=family,
        depth=depth,
        width=width or large_width or defaults.width,
        norm=norm or defaults.norm,
        channels=channels,
        classes=classes,
        side=side,
    )


def outline(spec: NetSpec) -> Network:
    """Network whose parameters have shapes but no values and no memory, on PyTorch's `meta` device.

    torchvision's are built in full, since some compute with their values while they are built. Raises ValueError like
    `build`.
    """
    if spec.family not in FAMILIES:
        return build(spec)
    with torch.device("meta"):
        return build(spec)


def build(spec: NetSpec) -> Network:
    """Freshly initialised network on the CPU; its weights come from PyTorch's global generator.

    Those of `FAMILIES` have PyTorch's default initialisation, but for the convolutions of ResNets (models/resnet.py);
    torchvision's have theirs. Raises ValueError when depth, norm and image side do not fit together.
    """
    if spec.family not in FAMILIES:
        return zoo.ZooNetwork(spec.family, channels=spec.channels, classes=spec.classes, side=spec.side)
    if spec.width > MOST_WIDTH:
        raise ValueError(f"width {spec.width} is too large: use at most {MOST_WIDTH}")
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
    """Floating-point operations of an image's forward pass; a multiplication with its addition counts two."""
    from torch.utils.flop_counter import FlopCounterMode

    net = outline(spec).eval()  # before counting begins, since building may pass images through the network
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(an_image(net, spec))
    return int(counter.get_total_flops())


def an_image(net: Network, spec: NetSpec) -> torch.Tensor:
    """Batch of one empty image, (1, C, H, W), on the network's device."""
    return torch.zeros(1, spec.channels, spec.side, spec.side, device=net.classifier.weight.device)


def has_batch_norm(spec: NetSpec) -> bool:
    """Whether a network has batch norm, whose statistics are no parameters."""
    return any(isinstance(module, torch.nn.BatchNorm2d) for module in outline(spec).modules())


def smallest_batch(spec: NetSpec) -> int:
    """Number of images that a training step needs: 2 where batch norm has maps of a single pixel, otherwise 1."""
    net = outline(spec).train()
    try:
        net(an_image(net, spec))
    except ValueError:  # PyTorch's "expected more than 1 value per channel"
        return 2
    return 1


def second_derivative_error(spec: NetSpec) -> str:
    """PyTorch's message why a network has no gradient of a gradient; empty where it has one.

    All layers of the networks in `FAMILIES` have it.
    """
    if spec.family in FAMILIES:
        return ""
    net = build(spec).train()
    x = torch.rand(2, spec.channels, spec.side, spec.side, requires_grad=True)
    first = torch.autograd.grad(net(x).logsumexp(1).sum(), list(net.parameters()), create_graph=True)
    try:
        torch.autograd.grad(torch.stack([g.square().sum() for g in first]).sum(), x)
    except RuntimeError as error:
        return str(error).strip().splitlines()[0]
    return ""
