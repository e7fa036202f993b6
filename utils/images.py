"""Labelled images as they lie on the device: grouped by class, small, and converted only when used."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Normalize:
    """Images in [0, 1] (float) or 0..255 (uint8), (N, C, H, W), to zero mean and unit variance per channel."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device | str = "cpu") -> None:
        self.mean = torch.tensor(mean, device=device).view(1, -1, 1, 1)
        self.std = torch.tensor(std, device=device).view(1, -1, 1, 1)

    def __call__(self, x: Tensor) -> Tensor:
        x = to_unit(x)
        return (x - self.mean.to(x.dtype)) / self.std.to(x.dtype)

    def preconditioned(self, gradients: Tensor) -> Tensor:
        """Gradients by pixels, (..., C, H, W), as the step on pixels that equals a step on normalised images."""
        return self.std.to(gradients.dtype).square().squeeze(0) * gradients


def to_unit(x: Tensor) -> Tensor:
    """uint8 images to float32 in [0, 1]; float images as they are."""
    return x.float() / 255 if x.dtype == torch.uint8 else x


class ImageSet:
    """Labelled images, grouped by class.

    images: (N, C, H, W), uint8 for real images, float32 in [0, 1] for synthetic ones, never normalised.
    labels: (N,) int64, ascending. counts[c] images of class c begin at starts[c].
    soft: None, or (N, classes) float32, the probabilities that a network learns in place of the labels, which then are
    the most probable classes.
    """

    def __init__(
        self, images: Tensor, labels: Tensor, *, classes: int, normalize: Normalize, soft: Tensor | None = None
    ) -> None:
        """Takes images in any order and groups them, keeping the order within a class."""
        assert soft is None or soft.shape == (len(labels), classes)
        order = labels.argsort(stable=True)
        already = bool((order == torch.arange(len(order), device=order.device)).all())
        self.images = images if already else images[order]
        self.labels = labels[order]
        self.soft = soft if soft is None or already else soft[order]
        self.normalize = normalize
        self.counts: list[int] = torch.bincount(labels, minlength=classes).tolist()
        self.starts: list[int] = [sum(self.counts[:c]) for c in range(classes)]

    def __len__(self) -> int:
        return len(self.images)

    @property
    def classes(self) -> int:
        return len(self.counts)

    @property
    def side(self) -> int:
        return self.images.shape[-1]

    @property
    def device(self) -> torch.device:
        return self.images.device

    def of_class(self, c: int) -> Tensor:
        """All images of class c: a view, (counts[c], C, H, W)."""
        return self.images[self.starts[c] : self.starts[c] + self.counts[c]]

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised float images and labels at the given positions, (B, C, H, W) and (B,)."""
        return self.normalize(self.images[index]), self.labels[index]

    def subset(self, index: Tensor) -> ImageSet:
        """The images at the given positions as a set of their own."""
        soft = None if self.soft is None else self.soft[index]
        return ImageSet(
            self.images[index], self.labels[index], classes=self.classes, normalize=self.normalize, soft=soft
        )
