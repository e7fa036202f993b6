"""What every network offers: logits, an embedding, and its list of features."""

from __future__ import annotations

import torch
from torch import Tensor, nn

NORMS = ("instance", "batch", "group", "layer", "none")
GROUPS = 4  # of the "group" norm


def norm2d(kind: str, channels: int) -> nn.Module:
    """A normalisation layer over (N, channels, H, W) by name.

    `instance` is written as a group norm with one group per channel: the same arithmetic, with affine parameters,
    and no running statistics, so that an image's gradient never depends on the rest of its batch.
    """
    if kind == "instance":
        return nn.GroupNorm(channels, channels)
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    if kind == "group":
        return nn.GroupNorm(GROUPS, channels)
    if kind == "layer":
        return nn.GroupNorm(1, channels)
    if kind == "none":
        return nn.Identity()
    raise ValueError(f"unknown norm {kind!r}: choose one of {', '.join(NORMS)}")


class Network(nn.Module):
    """A stem, stages in a row, and a linear classifier: what every network here consists of and offers."""

    stem: nn.Module
    stages: nn.ModuleList
    classifier: nn.Linear

    def features(self, x: Tensor) -> list[Tensor]:
        """One (N, C, H, W) tensor per stage, first stage first; torchvision's networks are one stage, (N, D).

        x: (N, C, H, W) normalised images.
        """
        x = self.stem(x)
        found = []
        for stage in self.stages:
            x = stage(x)
            found.append(x)
        return found

    def pool(self, last: Tensor) -> Tensor:
        """What the classifier sees of the last features: all of them, unless a network averages first."""
        return last.flatten(1)

    def embed(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, D): the space in which images are clustered."""
        return self.pool(self.features(x)[-1])

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, classes) logits."""
        return self.classifier(self.embed(x))

    def _add_classifier(self, channels: int, side: int, classes: int) -> None:
        """Size the classifier by one pass over an empty batch of shape (0, channels, side, side)."""
        training = self.training
        with torch.no_grad():
            width = self.eval().embed(torch.zeros(0, channels, side, side)).shape[1]
        self.train(training)
        self.classifier = nn.Linear(width, classes)
