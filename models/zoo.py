"""torchvision's classification networks, by their names there, with fresh weights.

torchvision is imported only when one of them is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from models.network import Network


def names() -> list[str]:
    """Names of torchvision's classification networks."""
    import torchvision

    return torchvision.models.list_models(module=torchvision.models)


class ZooNetwork(Network):
    """Network of torchvision: one stage, and its last linear layer as the classifier.

    Its features are a single (N, D) tensor, the input of the classifier.
    """

    def __init__(self, name: str, *, channels: int, classes: int, side: int) -> None:
        """Build the network. Raises ValueError when it has no linear classifier, or does not take such images."""
        super().__init__()
        if channels not in (1, 3):
            raise ValueError(f"torchvision's networks see images of 1 or 3 channels, not {channels}")
        with refusals(name, side):
            body = published(name, classes, side)
        linear = {path: module for path, module in body.named_modules() if isinstance(module, nn.Linear)}
        if not linear:
            raise ValueError(f"torchvision's {name} has no linear classifier, with which every network here ends")
        last, self.classifier = list(linear.items())[-1]
        body.set_submodule(last, nn.Identity())
        self.stem = Grey() if channels == 1 else nn.Identity()
        self.stages = nn.ModuleList([body])
        with refusals(name, side), torch.no_grad():
            logits = self.eval()(torch.zeros(2, channels, side, side))
        if logits.shape != (2, classes):
            raise ValueError(f"torchvision's {name} gives {tuple(logits.shape)} for two images, no logits")
        self.train()


class Grey(nn.Module):
    """Stem that repeats a grey channel as three colours, (N, 1, H, W) -> (N, 3, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.expand(-1, 3, -1, -1)


def published(name: str, classes: int, side: int) -> nn.Module:
    """torchvision's own network with fresh weights, and without dropout, so that training draws no random numbers."""
    import torchvision

    settings: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        settings = {"aux_logits": False, "init_weights": True}  # logits only; False would warn
    elif name.startswith("vit_"):
        settings = {"image_size": side}
    elif name.startswith("maxvit_"):
        settings = {"input_size": (side, side)}
    net = torchvision.models.get_model(name, weights=None, num_classes=classes, **settings)
    for module in net.modules():
        if isinstance(module, (nn.Dropout, torchvision.ops.StochasticDepth)):
            # All random numbers of a training derive from --seed (utils/system/draws.py). These layers would draw from
            # PyTorch's global generator, and a run could not be reproduced.
            module.p = 0.0
    return net


@contextmanager
def refusals(name: str, side: int) -> Iterator[None]:
    """Turn all exceptions of networks that refuse images (asserts, shapes, divisions by zero) into ValueError."""
    try:
        yield
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(f"torchvision's {name} cannot be built for images of {side} x {side} ({reason})") from None
