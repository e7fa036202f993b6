"""Labelled images on the device: grouped by class, uint8 where they are real, normalised only when used."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 0.1  # added to the eigenvalues of a covariance that images are whitened by
EXACT = 1024  # images per chunk: as many products of integers up to 128 add up to 2^24 at most, exact in float32


class Normalize:
    """Normalisation of images to zero mean and unit variance per channel.

    A call takes (N, C, H, W), float in [0, 1] or uint8 in 0..255, and returns float.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device | str = "cpu") -> None:
        self.mean = torch.tensor(mean, device=device).view(1, -1, 1, 1)
        self.std = torch.tensor(std, device=device).view(1, -1, 1, 1)

    def __call__(self, x: Tensor) -> Tensor:
        x = to_unit(x)
        return (x - self.mean.to(x.dtype)) / self.std.to(x.dtype)

    def inverse(self, y: Tensor) -> Tensor:
        """Images (N, C, H, W) in [0, 1] from normalised ones, in their dtype."""
        return y * self.std.to(y) + self.mean.to(y)

    def preconditioned(self, gradients: Tensor) -> Tensor:
        """Direction in pixels that equals a gradient step on normalised images; gradients: by pixels, (..., C, H, W).

        With J the derivative of normalised images by pixels, it is J^-1 J^-T times the gradients.
        """
        return self.std.to(gradients.dtype).square().squeeze(0) * gradients


class Whiten(Normalize):
    """Normalisation with ZCA whitening (an option of MTT, Cazenavette et al., CVPR 2022).

    Normalised images minus their mean image, flattened to D = C * H * W numbers, are multiplied by the symmetric
    matrix (cov + eps I)^(-1/2), where cov is their covariance. Whitening an image takes 2 D^2 operations.
    """

    def __init__(
        self,
        images: Tensor,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device | str = "cpu",
        *,
        eps: float = EPS,
        dtype: torch.dtype = torch.float32,
        all_reduce_sum: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> None:
        """Compute the whitening matrix from training images, (N, C, H, W) uint8 on any device.

        dtype: of the matrices that are kept; images of another dtype are whitened at the cost of converting the
        matrices. all_reduce_sum: see `moments`.
        """
        super().__init__(mean, std, device)
        centre, covariance = moments(images, device, all_reduce_sum)
        divisor = self.std.to(covariance).expand(1, *centre.shape).flatten()  # (D,)
        square = covariance / (divisor[:, None] * divisor)
        square.diagonal().add_(eps)
        values, vectors = torch.linalg.eigh(square)
        self.centre = centre.to(device, dtype)[None]  # (1, C, H, W)
        self.square = square.to(device, dtype)  # cov + eps I
        self.matrix = ((vectors * values.rsqrt()) @ vectors.T).to(device, dtype)

    def __call__(self, x: Tensor) -> Tensor:
        x = to_unit(x)
        x = (x - self.centre.to(x.dtype)) / self.std.to(x.dtype)
        return (x.flatten(1) @ self.matrix.to(x.dtype)).view(x.shape)

    def inverse(self, y: Tensor) -> Tensor:
        """Images (N, C, H, W) in [0, 1] from whitened ones, in their dtype."""
        root = (self.matrix.double() @ self.square.double()).to(y)  # A^(-1/2) A = A^(1/2), with A = cov + eps I
        return (y.flatten(1) @ root).view(y.shape) * self.std.to(y) + self.centre.to(y)

    def preconditioned(self, gradients: Tensor) -> Tensor:
        """Direction in pixels that equals a gradient step on whitened images: J^-1 J^-T is std (cov + eps I) std."""
        std = self.std.to(gradients.dtype).squeeze(0)
        product = (std * gradients).flatten(-3) @ self.square.to(gradients.dtype)
        return std * product.view(gradients.shape)


def moments(
    images: Tensor, device: torch.device | str = "cpu", all_reduce_sum: Callable[[Tensor], Tensor] = lambda x: x
) -> tuple[Tensor, Tensor]:
    """Mean (C, H, W) and unbiased covariance (D, D) of uint8 images (N, C, H, W), in units of [0, 1], float64.

    Products are computed in float32, for its speed. All sums are exact nevertheless: they are of integers, and a chunk
    adds up EXACT of them. all_reduce_sum: the sum over ranks, each of which has other images.
    """
    count = int(all_reduce_sum(torch.tensor([len(images)])))
    size = images[0].numel()
    sums = torch.zeros(size, dtype=torch.float64, device=device)
    products = torch.zeros(size, size, dtype=torch.float64, device=device)
    for chunk in images.split(EXACT):
        x = chunk.to(device).flatten(1).float() - 128
        sums += x.sum(0)
        products += x.T @ x
    sums, products = all_reduce_sum(sums), all_reduce_sum(products)
    products -= sums[:, None] * sums / count
    return (sums / count + 128).view(images.shape[1:]) / 255, products / (255**2 * max(1, count - 1))


def to_unit(x: Tensor) -> Tensor:
    """Images as floats in [0, 1]: uint8 divided by 255 in PyTorch's default dtype, float images unchanged."""
    return x.to(torch.get_default_dtype()) / 255 if x.dtype == torch.uint8 else x


def starts(counts: Sequence[int]) -> list[int]:
    """Position of every class's first image among images grouped by class; counts: images of every class."""
    return [0, *itertools.accumulate(counts)][: len(counts)]


def digest(images: ImageSet, all_reduce_sum: Callable[[Tensor], Tensor] = lambda x: x) -> str:
    """SHA-256 of a set's images, class by class in their order, in hexadecimal digits.

    all_reduce_sum: the sum over ranks, each of which holds the images of other classes. It does not change the result.
    """
    of_classes = torch.zeros(images.classes, 32, dtype=torch.uint8)
    for c in images.held:
        sha256 = hashlib.sha256()
        for chunk in images.of_class(c).split(EXACT):  # a copy of all images might not fit
            sha256.update(chunk.cpu().contiguous().numpy())
        of_classes[c] = torch.tensor(list(sha256.digest()))
    about = f"{images.images.dtype} {tuple(images.images.shape[1:])}".encode()
    return hashlib.sha256(about + all_reduce_sum(of_classes).numpy().tobytes()).hexdigest()


class ImageSet:
    """Labelled images, grouped by class.

    images: (N, C, H, W), uint8 for real images, float32 in [0, 1] for synthetic ones, never normalised.
    labels: (N,) int64, ascending. counts[c] images of class c begin at starts[c].
    held: the classes that have images; under torchrun a rank may have those of some classes only.
    soft: None, or soft labels, (N, classes) float32 probabilities that networks learn in place of the labels, which
    then serve for the grouping alone.
    """

    def __init__(
        self, images: Tensor, labels: Tensor, *, classes: int, normalize: Normalize, soft: Tensor | None = None
    ) -> None:
        """Group images, which come in any order, by class; within a class the order stays."""
        assert soft is None or soft.shape == (len(labels), classes)
        order = labels.argsort(stable=True)
        grouped = bool((order == torch.arange(len(order), device=order.device)).all())  # then nothing is copied
        self.images = images if grouped else images[order]
        self.labels = labels[order]
        self.soft = soft if soft is None or grouped else soft[order]
        self.normalize = normalize
        self.counts: list[int] = torch.bincount(labels, minlength=classes).tolist()
        self.starts: list[int] = starts(self.counts)
        self.held = [c for c, count in enumerate(self.counts) if count]

    def __len__(self) -> int:
        return len(self.images)

    @property
    def classes(self) -> int:
        """Number of classes, those without images included."""
        return len(self.counts)

    @property
    def side(self) -> int:
        """Height and width of the images, in pixels."""
        return self.images.shape[-1]

    @property
    def device(self) -> torch.device:
        return self.images.device

    def of_class(self, c: int) -> Tensor:
        """Images of class c, (counts[c], C, H, W): a view, no copy."""
        return self.images[self.starts[c] : self.starts[c] + self.counts[c]]

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised float images and labels at the given positions, (B, C, H, W) and (B,)."""
        return self.normalize(self.images[index]), self.labels[index]

    def with_soft(self, soft: Tensor) -> ImageSet:
        """Set of the same images with soft labels, (N, classes) in their order."""
        return ImageSet(self.images, self.labels, classes=self.classes, normalize=self.normalize, soft=soft)

    def subset(self, index: Tensor) -> ImageSet:
        """The images at the given positions as a set of their own."""
        soft = None if self.soft is None else self.soft[index]
        return ImageSet(
            self.images[index], self.labels[index], classes=self.classes, normalize=self.normalize, soft=soft
        )


# --- Images for the training of the condensation network --------------------------------------------------------------


class RealImages:
    """Real images of all classes, whichever ranks hold them."""

    def __init__(
        self, held: ImageSet, counts: Sequence[int], all_reduce: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        """Number the images of all classes; held: those of this rank's classes, counts: images of every class.

        all_reduce: sums a tensor, in which images of other ranks are zeros, over all ranks. Without it they stay zeros.
        """
        self.held, self.all_reduce = held, all_reduce
        classes, sizes = torch.arange(len(counts), device=held.device), torch.tensor(counts, device=held.device)
        self.labels = classes.repeat_interleave(sizes, output_size=sum(counts))  # (N,)
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
    """Training images that the synthetic set decodes to at the moment they are taken."""

    def __init__(self, current: Callable[[], Tensor], classes: int, each: int) -> None:
        """Take images from `current`, which returns them as they are now, (classes, each, C, H, W)."""
        self.current, self.classes, self.each = current, classes, each

    def __len__(self) -> int:
        return self.classes * self.each

    def take(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Images (n, C, H, W) and labels (n,) at positions, class after class."""
        return self.current().flatten(0, 1)[index], index // self.each


# --- How pixels are stored --------------------------------------------------------------------------------------------

# Rounding is to the nearest of levels that are equally far apart in [0, 1]. As 255 = 15 * 17, the 16 levels of 4 bits
# are bytes as well: whatever reads uint8 images can read these.
FLOAT32, UINT8, UINT4 = "float32", "uint8", "uint4"
BITS = {FLOAT32: 32, UINT8: 8, UINT4: 4}  # of a pixel in one channel
STORES = tuple(BITS)
STEP = {UINT8: 1, UINT4: 17}  # between two levels, as bytes


def quantise(pixels: Tensor, store: str) -> Tensor:
    """Images of floats in [0, 1], of any shape, as bytes with 256 or 16 levels; clamped, but floats, for float32."""
    pixels = pixels.clamp(0, 1)
    if store == FLOAT32:
        return pixels
    return (pixels * (255 // STEP[store])).round().to(torch.uint8) * STEP[store]


def stored_bytes(images: Tensor, store: str) -> int:
    """Size of images (N, C, H, W) when they are stored so; an image of 4-bit pixels begins with a byte of its own."""
    return len(images) * math.ceil(images[0].numel() * BITS[store] / 8)


def pack(images: Tensor) -> Tensor:
    """Images (N, C, H, W) of the 16 levels as two pixels in a byte, (N, ceil(C * H * W / 2)), the first in its upper
    half."""
    levels = images.flatten(1) // STEP[UINT4]
    levels = F.pad(levels, (0, levels.shape[1] % 2))
    return levels[:, ::2] << 4 | levels[:, 1::2]


def unpack(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """Images (N, *shape) that were packed, as bytes from 0 to 255; shape: of one image, (C, H, W)."""
    levels = torch.stack([packed >> 4, packed & 15], 2).flatten(1)[:, : math.prod(shape)]
    return levels.unflatten(1, tuple(shape)) * STEP[UINT4]
