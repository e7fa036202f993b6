"""Labelled images as they lie on the device: grouped by class, small, and converted only when used."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

EPS = 0.1  # added to the eigenvalues of a covariance that images are whitened by
EXACT = 1024  # products of two numbers of up to 128 whose sum is at most 2^24: whole numbers that float32 holds


class Normalize:
    """Images in [0, 1] (float) or 0..255 (uint8), (N, C, H, W), to zero mean and unit variance per channel."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device | str = "cpu") -> None:
        self.mean = torch.tensor(mean, device=device).view(1, -1, 1, 1)
        self.std = torch.tensor(std, device=device).view(1, -1, 1, 1)

    def __call__(self, x: Tensor) -> Tensor:
        x = to_unit(x)
        return (x - self.mean.to(x.dtype)) / self.std.to(x.dtype)

    def preconditioned(self, gradients: Tensor) -> Tensor:
        """Gradients by pixels, (..., C, H, W), as the step on pixels that equals a step on normalised images.

        With J the derivative of normalised images by pixels, that is J^-1 J^-T times the gradients.
        """
        return self.std.to(gradients.dtype).square().squeeze(0) * gradients


class Whiten(Normalize):
    """Images as above, ZCA-whitened as well (an option of MTT, Cazenavette et al., CVPR 2022).

    Normalised images without their mean image, flattened to D = C * H * W numbers, are multiplied by the symmetric
    (cov + eps I)^(-1/2), of their covariance. Whitening an image takes 2 D^2 operations.
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device | str = "cpu",
        *,
        centre: Tensor,
        covariance: Tensor,
        eps: float = EPS,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """centre: (C, H, W), the mean image, and covariance: (D, D), of images in [0, 1]; float64.

        dtype: of the matrices, which images of another one are multiplied by at the cost of converting them.
        """
        super().__init__(mean, std, device)
        divisor = self.std.to(covariance).expand(1, *centre.shape).flatten()  # (D,)
        square = covariance / (divisor[:, None] * divisor)
        square.diagonal().add_(eps)
        values, vectors = torch.linalg.eigh(square)
        self.centre = centre.to(device, dtype)[None]  # (1, C, H, W)
        self.square = square.to(device, dtype)  # cov + eps I
        self.matrix = ((vectors * values.rsqrt()) @ vectors.T).to(device, dtype)

    @classmethod
    def of(
        cls,
        images: Tensor,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device | str = "cpu",
        *,
        eps: float = EPS,
        dtype: torch.dtype = torch.float32,
        add: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> Whiten:
        """With the mean image and the covariance of training images, (N, C, H, W) uint8, wherever they lie.

        add: see `moments`.
        """
        centre, covariance = moments(images, device, add)
        return cls(mean, std, device, centre=centre, covariance=covariance, eps=eps, dtype=dtype)

    def __call__(self, x: Tensor) -> Tensor:
        x = to_unit(x)
        x = (x - self.centre.to(x.dtype)) / self.std.to(x.dtype)
        return (x.flatten(1) @ self.matrix.to(x.dtype)).view(x.shape)

    def preconditioned(self, gradients: Tensor) -> Tensor:
        """As above; J^-1 J^-T is here std (cov + eps I) std."""
        std = self.std.to(gradients.dtype).squeeze(0)
        product = (std * gradients).flatten(-3) @ self.square.to(gradients.dtype)
        return std * product.view(gradients.shape)


def moments(
    images: Tensor, device: torch.device | str = "cpu", add: Callable[[Tensor], Tensor] = lambda x: x
) -> tuple[Tensor, Tensor]:
    """Mean (C, H, W) and unbiased covariance (D, D) of uint8 images (N, C, H, W), in units of [0, 1], float64.

    Products are those of whole numbers in float32, at its speed, and so few are added up there that all sums are exact.
    add: the sum over processes that have other images.
    """
    count = int(add(torch.tensor([len(images)])))
    size = images[0].numel()
    first = torch.zeros(size, dtype=torch.float64, device=device)
    second = torch.zeros(size, size, dtype=torch.float64, device=device)
    for chunk in images.split(EXACT):
        x = chunk.to(device).flatten(1).float() - 128
        first += x.sum(0)
        second += x.T @ x
    first, second = add(first), add(second)
    second -= first[:, None] * first / count
    return (first / count + 128).view(images.shape[1:]) / 255, second / (255**2 * max(1, count - 1))


def to_unit(x: Tensor) -> Tensor:
    """Images in [0, 1]: bytes in PyTorch's default precision, float images as they are."""
    return x.to(torch.get_default_dtype()) / 255 if x.dtype == torch.uint8 else x


def starts(counts: Sequence[int]) -> list[int]:
    """Where each class begins among images that are grouped by class."""
    return [0, *itertools.accumulate(counts)][: len(counts)]


def digest(images: ImageSet) -> str:
    """SHA-256 of a set's images and labels, in hexadecimal digits: the same for the same content in the same order."""
    total = hashlib.sha256(f"{images.images.dtype} {tuple(images.images.shape)}".encode())
    for chunk in (*images.images.split(EXACT), images.labels):  # a copy of everything might not fit beside a GPU
        total.update(chunk.cpu().contiguous().numpy())
    return total.hexdigest()


class ImageSet:
    """Labelled images, grouped by class.

    images: (N, C, H, W), uint8 for real images, float32 in [0, 1] for synthetic ones, never normalised.
    labels: (N,) int64, ascending. counts[c] images of class c begin at starts[c]. held: the classes that have images,
    which may be some of all.
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
        self.starts: list[int] = starts(self.counts)
        self.held = [c for c, count in enumerate(self.counts) if count]

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


# --- Images for the training of the condensation network --------------------------------------------------------------


class RealImages:
    """The real images of all classes, whichever ranks hold them."""

    def __init__(
        self, held: ImageSet, counts: Sequence[int], all_reduce: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        """held: the images of this rank's classes. counts: images of every class.

        all_reduce: the sum over all ranks of tensors that are zero wherever another rank holds the image. Without it,
        images of other ranks are zeros.
        """
        self.held, self.all_reduce = held, all_reduce
        sizes = torch.tensor(counts, device=held.device)
        self.labels = torch.arange(len(counts), device=held.device).repeat_interleave(sizes)  # (N,)
        # By how much an image's position among all images exceeds its position among those that are held.
        first = torch.tensor(starts(counts), device=held.device)
        self.shift = first - torch.tensor(held.starts, device=held.device)  # (classes,)
        self.complete = len(held) == len(self.labels)
        self.is_held = torch.isin(self.labels, torch.tensor(held.held, device=held.device))  # (N,)

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Images (n, C, H, W) and labels (n,) at positions among all images."""
        labels = self.labels[index]
        if self.complete:
            return self.held.images[index], labels
        here = self.is_held[index]
        images = self.held.images[(index - self.shift[labels]) * here] * here[:, None, None, None]
        return self.all_reduce(images) if self.all_reduce else images, labels

    def to_global(self, positions: Tensor) -> Tensor:
        """Positions among all images, from positions among the images held; any shape."""
        return positions + self.shift[self.held.labels[positions]]

    def to_local(self, positions: Tensor) -> Tensor:
        """Positions among the images held, from positions among all images; any shape."""
        return positions - self.shift[self.labels[positions]]


class SyntheticImages:
    """The training images that the synthetic set decodes to at the moment they are taken."""

    def __init__(self, current: Callable[[], Tensor], classes: int, each: int) -> None:
        """current: returns them as they are now, (classes, each, C, H, W)."""
        self.current, self.classes, self.each = current, classes, each

    def __len__(self) -> int:
        return self.classes * self.each

    def take(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Images (n, C, H, W) and labels (n,) at positions, class after class."""
        return self.current().flatten(0, 1)[index], index // self.each
