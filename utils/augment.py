"""Differentiable augmentation of normalised images (DSA, Zhao & Bilen 2021, with the strengths that DREAM uses).

One draw is eight uniform numbers and the name of one geometric operation. A draw with one row treats all images of
a batch alike: that is how real and synthetic images meet the same, "siamese", augmentation (Sec. 3.1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.runtime import Draws

ALWAYS = ("flip", "color", "cutout")  # applied whenever named
ONE_OF = ("crop", "scale", "rotate", "translate")  # one of those named is drawn per call

BRIGHTNESS, SATURATION, CONTRAST = 1.0, 2.0, 0.5
CROP, CUTOUT, TRANSLATE = 0.125, 0.5, 0.125  # of the side
SCALE, ROTATE = 1.2, 15.0  # a factor, degrees

# The columns of a draw.
FLIP, BRIGHT, SATURATE, CONTRASTED, MOVE_Y, MOVE_X, CUT_Y, CUT_X = range(8)


@dataclass(frozen=True)
class Draw:
    """u: (n, 8) uniform numbers in [0, 1), n = 1 for a shared draw; geometry: the operation drawn, if any is named."""

    u: Tensor
    geometry: str | None


class Augment:
    """The operations named in e.g. `color_crop_cutout`; `none` or an empty name leaves images as they are."""

    def __init__(self, names: str) -> None:
        """Raises ValueError, listing the operations, for an unknown one."""
        self.names = parse(names)
        self.geometries = [name for name in ONE_OF if name in self.names]

    def draw(self, n: int, draws: Draws) -> Draw:
        """One draw for a call on n images, each with numbers of its own."""
        return Draw(draws.uniform(n, 8), self._geometry(draws))

    def draw_shared(self, calls: int, draws: Draws) -> list[Draw]:
        """Independent shared draws for several calls, e.g. one per class."""
        return [Draw(row, self._geometry(draws)) for row in draws.uniform(calls, 8).split(1)]

    def _geometry(self, draws: Draws) -> str | None:
        return draws.host.choice(self.geometries) if self.geometries else None

    def __call__(self, x: Tensor, draw: Draw) -> Tensor:
        """x: (N, C, H, W) normalised -> the same shape. Colour, flip, geometry, cutout, in this order."""
        u = draw.u.to(x.dtype)
        if "color" in self.names:
            x = color(x, u)
        if "flip" in self.names:
            x = torch.where(column(u, FLIP) < 0.5, x.flip(3), x)
        if draw.geometry is not None:
            x = GEOMETRY[draw.geometry](x, u)
        if "cutout" in self.names:
            x = cutout(x, u)
        return x


def parse(names: str) -> tuple[str, ...]:
    """`color_crop_cutout` -> ("color", "crop", "cutout"). Raises ValueError for an unknown operation."""
    found = tuple(name for name in names.split("_") if name and name != "none")
    for name in found:
        if name not in ALWAYS + ONE_OF:
            raise ValueError(
                f"unknown augmentation {name!r}: join any of {', '.join(ALWAYS + ONE_OF)} with '_', or none"
            )
    return found


def without(names: str, *dropped: str) -> str:
    """The augmentation less some operations: without("color_crop_cutout", "cutout") == "color_crop"."""
    return "_".join(name for name in parse(names) if name not in dropped) or "none"


def column(u: Tensor, i: int) -> Tensor:
    """One number per image, shaped to meet (N, C, H, W)."""
    return u[:, i].view(-1, 1, 1, 1)


def color(x: Tensor, u: Tensor) -> Tensor:
    """Brightness, saturation, contrast."""
    x = x + (column(u, BRIGHT) - 0.5) * BRIGHTNESS
    grey = x.mean(1, keepdim=True)
    x = (x - grey) * (column(u, SATURATE) * SATURATION) + grey
    mean = x.mean((1, 2, 3), keepdim=True)
    return (x - mean) * (column(u, CONTRASTED) + CONTRAST) + mean


def crop(x: Tensor, u: Tensor) -> Tensor:
    """Shift by whole pixels, zeros coming in: up to an eighth of the side on each axis."""
    n, _, height, width = x.shape
    for dim, size, i in ((2, height, MOVE_Y), (3, width, MOVE_X)):
        reach = round(CROP * size)
        shift = (u[:, i] * (2 * reach + 1)).floor().long() - reach
        pad = [0, 0, reach, reach] if dim == 2 else [reach, reach, 0, 0]
        index = torch.arange(size, device=x.device) + (reach + shift).view(-1, 1)  # (n or 1, size)
        index = index.view(-1, 1, size, 1) if dim == 2 else index.view(-1, 1, 1, size)
        shape = (n, x.shape[1], size, x.shape[3]) if dim == 2 else (n, x.shape[1], x.shape[2], size)
        x = F.pad(x, pad).gather(dim, index.expand(shape))
    return x


def cutout(x: Tensor, u: Tensor) -> Tensor:
    """Zeros in a square of half the side around a random pixel, clipped at the border."""
    inside = []
    for size, i in ((x.shape[2], CUT_Y), (x.shape[3], CUT_X)):
        length = round(CUTOUT * size)
        first = (u[:, i] * size).floor().view(-1, 1) - length // 2
        at = torch.arange(size, device=x.device)
        inside.append((at >= first) & (at < first + length))  # (n or 1, size)
    hole = inside[0][:, None, :, None] & inside[1][:, None, None, :]
    return x.masked_fill(hole, 0)


def scale(x: Tensor, u: Tensor) -> Tensor:
    """Each axis by its own factor in [1 / 1.2, 1.2]."""
    low, high = 1 / SCALE, SCALE
    sx, sy = (low + (high - low) * u[:, i] for i in (MOVE_X, MOVE_Y))
    zero = torch.zeros_like(sx)
    return affine(x, [sx, zero, zero, zero, sy, zero])


def rotate(x: Tensor, u: Tensor) -> Tensor:
    """By an angle in +-15 degrees."""
    angle = (u[:, MOVE_X] - 0.5) * 2 * math.radians(ROTATE)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    return affine(x, [cos, -sin, zero, sin, cos, zero])


def translate(x: Tensor, u: Tensor) -> Tensor:
    """By up to an eighth of the side on each axis, in fractions of a pixel (crop moves by whole ones)."""
    dx, dy = ((u[:, i] - 0.5) * 4 * TRANSLATE for i in (MOVE_X, MOVE_Y))  # the grid is 2 wide
    one, zero = torch.ones_like(dx), torch.zeros_like(dx)
    return affine(x, [one, zero, dx, zero, one, dy])


def affine(x: Tensor, entries: list[Tensor]) -> Tensor:
    """Resample x under the 2 x 3 matrices whose six entries are given, each (n,) or (1,)."""
    theta = torch.stack(entries, 1).view(-1, 2, 3).expand(len(x), 2, 3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


GEOMETRY = {"crop": crop, "scale": scale, "rotate": rotate, "translate": translate}
