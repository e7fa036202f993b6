"""Multi-formation: several training images in the pixels of one stored image (IDC's idea, kept by DREAM, Sec. 4.1).

A stored image is an f x f grid of cells. Decoding crops every cell and upsamples it bilinearly to the full size.
All functions take any leading dimensions: (..., ipc, C, H, W) holds one class's stored images in its last four.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.method.images import ImageSet, Normalize

DECODE_TYPES = ("single", "multi", "bound")
BOUND = 128  # decoded images per class that `bound` does not exceed
PACKS = ("area", "nearest")  # how an image is shrunk into a cell, in the words of F.interpolate


@dataclass(frozen=True)
class Formation:
    """Layout of stored images: how many training images each of them holds.

    factor: f; a stored image holds f x f cells. decode_type, one of DECODE_TYPES:
    single: every stored image with factor f, f^2 images each.
    multi:  every stored image with each of the factors f, f - 1, ..., 1.
    bound:  every stored image with one factor: f for the first ones, as long as a class stays within BOUND training
            images, then smaller factors.
    """

    factor: int = 1
    decode_type: str = "single"

    def decode(self, stored: Tensor) -> Tensor:
        """Training images of stored ones: (..., ipc, C, H, W) -> (..., S, C, H, W), S = decoded_count(ipc)."""
        parts = [_decode_grid(stored[..., rows, :, :, :], f) for rows, f in self._portions(stored.shape[-4])]
        return torch.cat(parts, -4) if len(parts) > 1 else parts[0]

    def decoded_count(self, ipc: int) -> int:
        """Number of training images per class that `decode` makes of `ipc` stored ones."""
        return sum(len(range(ipc)[rows]) * f * f for rows, f in self._portions(ipc))

    def sources(self, ipc: int) -> list[int]:
        """Index of the stored image that each decoded one comes from, in the order of `decode`."""
        return [i for rows, f in self._portions(ipc) for i in range(ipc)[rows] for _ in range(f * f)]

    def _portions(self, ipc: int) -> list[tuple[slice, int]]:
        """Slices of a class's stored images, each with the factor that it is decoded with."""
        all_rows, factor = slice(0, ipc), self.factor
        if self.decode_type == "single":
            return [(all_rows, factor)]
        if self.decode_type == "multi":
            return [(all_rows, f) for f in range(factor, 0, -1)]
        if self.decode_type != "bound":
            raise ValueError(f"unknown decode type {self.decode_type!r}: choose one of {', '.join(DECODE_TYPES)}")
        portions = []
        # spare: training images left of BOUND when every stored image gives one; a factor f takes f^2 - 1 of them.
        done, spare = 0, max(BOUND - ipc, 0)
        for f in range(factor, 1, -1):
            count = min(ipc - done, spare // (f * f - 1))
            if count:
                portions.append((slice(done, done + count), f))
            done, spare = done + count, spare - count * (f * f - 1)
        if done < ipc:
            portions.append((slice(done, ipc), 1))
        return portions


def _decode_grid(stored: Tensor, factor: int) -> Tensor:
    """Cells of stored images, each upsampled to full size: (..., n, C, H, W) -> (..., n * factor^2, C, H, W).

    The cells of a stored image stay together, in reading order.
    """
    if factor == 1:
        return stored
    *lead, n, channels, height, width = stored.shape
    flat = stored.reshape(-1, channels, height, width)
    cells = [upsampled(flat[..., rows, columns], (height, width)) for rows, columns in cells_of(height, width, factor)]
    return torch.stack(cells, 1).view(*lead, n * factor**2, channels, height, width)


def upsampled(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Images (N, C, h, w) at a larger size, bilinearly."""
    resize = partial(F.interpolate, size=size, mode="bilinear", align_corners=False)
    if not x.is_cuda:
        return resize(x)
    # A GPU takes images one after the other, and what is channels last in parallel: so all planes are channels there.
    planes = x.flatten(0, 1)[None].contiguous(memory_format=torch.channels_last)
    return resize(planes)[0].view(*x.shape[:2], *size)


def pack(images: Tensor, *, factor: int, mode: str = "area") -> Tensor:
    """Stored images, of training images shrunk and tiled ("mix"): (..., ipc * f^2, C, H, W) -> (..., ipc, C, H, W).

    mode: one of PACKS. Decoding inverts it, up to the resolution that shrinking loses.
    """
    if factor == 1:
        return images
    *lead, n, channels, height, width = images.shape
    grouped = images.reshape(-1, factor**2, channels, height, width)
    stored = images.new_empty(len(grouped), channels, height, width)
    for i, (rows, columns) in enumerate(cells_of(height, width, factor)):
        size = (rows.stop - rows.start, columns.stop - columns.start)
        stored[..., rows, columns] = F.interpolate(grouped[:, i], size, mode=mode)
    return stored.view(*lead, n // factor**2, channels, height, width)


def cells_of(height: int, width: int, factor: int) -> list[tuple[slice, slice]]:
    """Rows and columns of every cell of an image, in reading order.

    Where `factor` does not divide a side, cells differ by one pixel.
    """
    rows, columns = (
        [slice(i * side // factor, (i + 1) * side // factor) for i in range(factor)] for side in (height, width)
    )
    return list(itertools.product(rows, columns))


def training_images(
    images: Tensor,
    labels: Tensor,
    formation: Formation,
    *,
    soft: Tensor | None = None,
    classes: int,
    normalize: Normalize,
) -> ImageSet:
    """Training set that stored images decode to: (N, C, H, W) in [0, 1] with labels (N,) int64.

    soft: None, or (N, classes) soft labels; every training image takes those of the stored image that it comes from.
    Decoding is per class, so classes may have different numbers of images.
    """
    decoded, sources = [], []
    for c in labels.unique().tolist():
        rows = (labels == c).nonzero().flatten()
        decoded.append(formation.decode(images[rows]))
        sources.append(rows[torch.tensor(formation.sources(len(rows)), device=rows.device)])
    source = torch.cat(sources)
    taken = None if soft is None else soft[source]
    return ImageSet(torch.cat(decoded), labels[source], classes=classes, normalize=normalize, soft=taken)
