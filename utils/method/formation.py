"""Multi-formation: several training images in the pixels of one stored image (IDC's idea, kept by DREAM, Sec. 4.1).

A stored image is an f x f grid of cells. Decoding crops every cell and upsamples it bilinearly to the full size.
All functions take any leading dimensions: (..., ipc, C, H, W) holds one class's stored images in its last four.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

DECODE_TYPES = ("single", "multi", "bound")
BOUND = 128  # decoded images per class that `bound` does not exceed


def decode(stored: Tensor, *, factor: int, decode_type: str = "single") -> Tensor:
    """Stored images to training images, (..., ipc, C, H, W) -> (..., S, C, H, W) with S = decoded_count(...).

    single: every stored image with factor f, f^2 images each.
    multi:  every stored image with each of the factors f, f - 1, ..., 1.
    bound:  every stored image with one factor: f for as many as keep a class within BOUND images, smaller ones after.
    """
    parts = []
    for images, f in _portions(stored.shape[-4], factor, decode_type):
        parts.append(_decode_grid(stored[..., images, :, :, :], f))
    return torch.cat(parts, -4) if len(parts) > 1 else parts[0]


def decoded_count(ipc: int, *, factor: int, decode_type: str = "single") -> int:
    """Training images per class that `decode` makes of `ipc` stored ones."""
    return sum(len(range(ipc)[images]) * f * f for images, f in _portions(ipc, factor, decode_type))


def decoded_sources(ipc: int, *, factor: int, decode_type: str = "single") -> list[int]:
    """Which of a class's `ipc` stored images each training image comes from, in the order of `decode`."""
    portions = _portions(ipc, factor, decode_type)
    return [i for images, f in portions for i in range(ipc)[images] for _ in range(f * f)]


def _portions(ipc: int, factor: int, decode_type: str) -> list[tuple[slice, int]]:
    """Which stored images are decoded with which factor."""
    everything = slice(0, ipc)
    if decode_type == "single":
        return [(everything, factor)]
    if decode_type == "multi":
        return [(everything, f) for f in range(factor, 0, -1)]
    if decode_type != "bound":
        raise ValueError(f"unknown decode type {decode_type!r}: choose one of {', '.join(DECODE_TYPES)}")
    portions = []
    done, spare = 0, max(BOUND - ipc, 0)  # spare: images beyond the one that every stored image gives
    for f in range(factor, 1, -1):
        count = min(ipc - done, spare // (f * f - 1))
        if count:
            portions.append((slice(done, done + count), f))
        done, spare = done + count, spare - count * (f * f - 1)
    if done < ipc:
        portions.append((slice(done, ipc), 1))
    return portions


def _decode_grid(stored: Tensor, factor: int) -> Tensor:
    """(..., n, C, H, W) -> (..., n * factor^2, C, H, W), a stored image's cells together, in reading order."""
    if factor == 1:
        return stored
    *lead, n, channels, height, width = stored.shape
    flat = stored.reshape(-1, channels, height, width)
    cells = [
        F.interpolate(flat[:, :, top:bottom, left:right], (height, width), mode="bilinear", align_corners=False)
        for top, bottom in cell_edges(height, factor)
        for left, right in cell_edges(width, factor)
    ]
    return torch.stack(cells, 1).view(*lead, n * factor**2, channels, height, width)


def pack(images: Tensor, *, factor: int) -> Tensor:
    """Training images to stored ones, (..., ipc * f^2, C, H, W) -> (..., ipc, C, H, W): shrink and tile ("mix").

    The inverse of decoding up to the resolution that shrinking loses.
    """
    if factor == 1:
        return images
    *lead, n, channels, height, width = images.shape
    grouped = images.reshape(-1, factor**2, channels, height, width)
    stored = images.new_empty(len(grouped), channels, height, width)
    cell = 0
    for top, bottom in cell_edges(height, factor):
        for left, right in cell_edges(width, factor):
            size = (bottom - top, right - left)
            stored[:, :, top:bottom, left:right] = F.interpolate(
                grouped[:, cell], size, mode="bilinear", align_corners=False, antialias=True
            )
            cell += 1
    return stored.view(*lead, n // factor**2, channels, height, width)


def cell_edges(side: int, factor: int) -> list[tuple[int, int]]:
    """Where the cells of one axis begin and end; their sizes differ by one pixel where `factor` does not divide."""
    edges = [i * side // factor for i in range(factor + 1)]
    return list(itertools.pairwise(edges))
