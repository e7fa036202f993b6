"""Base class of the networks, which offers logits, an embedding, and a list of features."""

from __future__ import annotations

import torch
from torch import Tensor, nn

NORMS = ("instance", "batch", "group", "layer", "none")
GROUPS = 4  # of the "group" norm


def norm2d(kind: str, channels: int) -> nn.Module:
    """Normalisation layer over (N, channels, H, W), by its name in NORMS. Raises ValueError for another name.

    `instance` is a group norm with one group per channel: the same arithmetic, with affine parameters and without
    running statistics, so that an image's gradient never depends on the rest of its batch.
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
    """Network of a stem, stages in a row, and a linear classifier."""

    stem: nn.Module
    stages: nn.ModuleList
    classifier: nn.Linear

    def features(self, x: Tensor) -> list[Tensor]:
        """Outputs of the stages, (N, C', H', W') each, first stage first; torchvision's networks have one, (N, D).

        x: (N, C, H, W) normalised images.
        """
        x = self.stem(x)
        outputs = []
        for stage in self.stages:
            x = stage(x)
            outputs.append(x)
        return outputs

    def pool(self, last: Tensor) -> Tensor:
        """Embedding (N, D) from the output of the last stage: all of it, unless a network averages first."""
        return last.flatten(1)

    def embed(self, x: Tensor) -> Tensor:
        """Embeddings of normalised images, (N, C, H, W) -> (N, D): the space in which images are clustered."""
        return self.pool(self.features(x)[-1])

    def forward(self, x: Tensor) -> Tensor:
        """Logits of normalised images, (N, C, H, W) -> (N, classes)."""
        return self.classifier(self.embed(x))

    def _add_classifier(self, channels: int, side: int, classes: int) -> None:
        """Make the classifier, whose input size a pass over an empty batch (0, channels, side, side) tells."""
        training = self.training
        with torch.no_grad():
            width = self.eval().embed(torch.zeros(0, channels, side, side)).shape[1]
        self.train(training)
        self.classifier = nn.Linear(width, classes)
