"""Differentiable augmentation of normalised images (DSA, Zhao & Bilen 2021, with the strengths that DREAM uses).

A draw is a table of uniform numbers in [0, 1), one row per image and COLUMNS wide. The column GEOMETRY, equal for all
images of a call, says which of the geometric operations named is applied, or after "one" which of all operations;
operations take their numbers from the other columns. A draw of a single row treats all images alike: that is how real
and synthetic images get the same, "siamese", augmentation (Sec. 3.1). Python never looks at the values of a draw, so
that a CUDA graph can replay the operations.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.system.draws import Draws

BRIGHTNESS, SATURATION, CONTRAST = 1.0, 2.0, 0.5
CROP, CUTOUT, TRANSLATE = 0.125, 0.5, 0.125  # fractions of the side
SCALE, ROTATE = 1.2, 15.0  # a factor, degrees

COLUMNS = 9  # more of them, for an operation of your own, change the random numbers of every run
FLIP, BRIGHT, SATURATE, CONTRASTED, MOVE_Y, MOVE_X, CUT_Y, CUT_X, GEOMETRY = range(COLUMNS)


ONE = "one"  # before the names of operations: exactly one of them is applied at a call


class Augment:
    """The operations named in e.g. `color_crop_cutout`; `none` or an empty name leaves images as they are.

    `one_color_crop_cutout` applies exactly one of the three at a call, whichever is drawn, as DSA's mode S does.
    """

    def __init__(self, names: str) -> None:
        """Parse the names. Raises ValueError, which lists the operations, for an unknown one."""
        self.names, self.one = parse(names), is_one(names)
        self.geometries = [name for name in GEOMETRIC if name in self.names]

    def draw(self, calls: int, n: int, draws: Draws) -> Tensor:
        """Draws for `calls` calls on n images each, (calls * n, COLUMNS), every image with its own numbers."""
        u = draws.uniform(calls, n, COLUMNS)
        u[:, :, GEOMETRY] = u[:, :1, GEOMETRY]
        return u.flatten(0, 1)

    def draw_shared(self, calls: int, draws: Draws) -> Tensor:
        """Draws for several calls, (calls, COLUMNS): one row for all images of a call, e.g. of a class."""
        return draws.uniform(calls, COLUMNS)

    def __call__(self, x: Tensor, u: Tensor) -> Tensor:
        """Augmented images: the operations of BEFORE, a geometric one, those of AFTER, as far as they are named.

        x: (N, C, H, W) normalised, u: (N or 1, COLUMNS).
        """
        u = u.to(x.dtype)
        if self.one:
            return self._one(x, u)
        for name, operation in BEFORE.items():
            x = operation(x, u) if name in self.names else x
        if self.geometries == ["crop"]:
            x = crop(x, u)
        elif self.geometries:
            x = warp(x, u, self.geometries, (u[:, GEOMETRY] * len(self.geometries)).long())
        for name, operation in AFTER.items():
            x = operation(x, u) if name in self.names else x
        return x

    def _one(self, x: Tensor, u: Tensor) -> Tensor:
        """Images after the operation that their draw picks. All are computed, since Python cannot look at the draw."""
        operations = [operation for name, operation in (*BEFORE.items(), *AFTER.items()) if name in self.names]
        picked, augmented = (u[:, GEOMETRY] * len(self.names)).long().view(-1, 1, 1, 1), x
        for i, operation in enumerate(operations):
            augmented = torch.where(picked == i, operation(x, u), augmented)
        if not self.geometries:
            return augmented
        geometric = picked - len(operations)  # these come last
        warped = warp(x, u, self.geometries, geometric.flatten().clamp(min=0))
        return torch.where(geometric >= 0, warped, augmented)


def is_one(names: str) -> bool:
    """Whether an augmentation's name says that one of its operations is applied at a call, and not all."""
    return names.startswith(f"{ONE}_")


def parse(names: str) -> tuple[str, ...]:
    """Operations of a name: `color_crop_cutout` -> ("color", "crop", "cutout"). Raises ValueError for unknown ones."""
    known = (*BEFORE, *GEOMETRIC, *AFTER)
    operations = tuple(name for name in names.removeprefix(f"{ONE}_").split("_") if name and name != "none")
    for name in operations:
        if name not in known:
            raise ValueError(
                f"unknown augmentation {name!r}: join any of {', '.join(known)} with '_', with {ONE}_ before them to "
                "apply one at a call, or none"
            )
    return operations


def without(names: str, *dropped: str) -> str:
    """An augmentation's name less some operations: without("color_crop_cutout", "cutout") == "color_crop"."""
    left = [name for name in parse(names) if name not in dropped]
    return "_".join([ONE] * is_one(names) + left) if left else "none"


def column(u: Tensor, i: int) -> Tensor:
    """Column i of a draw as (n, 1, 1, 1), which broadcasts against images (N, C, H, W)."""
    return u[:, i].view(-1, 1, 1, 1)


def color(x: Tensor, u: Tensor) -> Tensor:
    """Change brightness, saturation and contrast, in this order."""
    x = x + (column(u, BRIGHT) - 0.5) * BRIGHTNESS
    grey = x.mean(1, keepdim=True)
    x = (x - grey) * (column(u, SATURATE) * SATURATION) + grey
    mean = x.mean((1, 2, 3), keepdim=True)
    return (x - mean) * (column(u, CONTRASTED) + CONTRAST) + mean


def flip(x: Tensor, u: Tensor) -> Tensor:
    """Mirror half of the images, left to right."""
    return torch.where(column(u, FLIP) < 0.5, x.flip(3), x)


def shifts(u: Tensor, i: int, size: int) -> Tensor:
    """Shifts of a crop along one axis in whole pixels, (n,), at most CROP * size either way."""
    reach = round(CROP * size)
    return (u[:, i] * (2 * reach + 1)).floor() - reach


def crop(x: Tensor, u: Tensor) -> Tensor:
    """Shift images by whole pixels, up to an eighth of the side on each axis; zeros come in."""
    n, channels, height, width = x.shape
    reach = round(CROP * max(height, width))
    row, column = (
        torch.arange(size, device=x.device) + (reach + shifts(u, i, size).long()).view(-1, 1)  # (n or 1, size)
        for size, i in ((height, MOVE_Y), (width, MOVE_X))
    )
    index = row[:, :, None] * (width + 2 * reach) + column[:, None, :]
    padded = F.pad(x, [reach] * 4).flatten(2)
    return padded.gather(2, index.flatten(1)[:, None].expand(n, channels, -1)).view_as(x)


def cutout(x: Tensor, u: Tensor) -> Tensor:
    """Zero a square of half the side around a random pixel, clipped at the border."""
    inside = []
    for size, i in ((x.shape[2], CUT_Y), (x.shape[3], CUT_X)):
        length = round(CUTOUT * size)
        first = (u[:, i] * size).floor().view(-1, 1) - length // 2
        at = torch.arange(size, device=x.device)
        inside.append((at >= first) & (at < first + length))  # (n or 1, size)
    hole = inside[0][:, None, :, None] & inside[1][:, None, None, :]
    return x.masked_fill(hole, 0)


def warp(x: Tensor, u: Tensor, geometries: list[str], picked: Tensor) -> Tensor:
    """Apply to every image the geometric operation of its number in `geometries`; picked: (N or 1,) int64.

    All operations are affine maps, so that one resampling does them, whichever is picked.
    """
    matrices = torch.stack([GEOMETRIC[name](u, x.shape[2], x.shape[3]) for name in geometries])
    theta = matrices[picked, torch.arange(len(u), device=x.device)].expand(len(x), 2, 3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


def rows(*entries: Tensor) -> Tensor:
    """Matrices (n, 2, 3) of affine maps, from six tensors (n,)."""
    return torch.stack(entries, 1).view(-1, 2, 3)


def cropping(u: Tensor, height: int, width: int) -> Tensor:
    """Affine maps, (n, 2, 3), that do what `crop` does; their coordinates run from -1 to 1."""
    dy, dx = 2 * shifts(u, MOVE_Y, height) / height, 2 * shifts(u, MOVE_X, width) / width
    one, zero = torch.ones_like(dx), torch.zeros_like(dx)
    return rows(one, zero, dx, zero, one, dy)


def scaling(u: Tensor, height: int, width: int) -> Tensor:
    """Affine maps, (n, 2, 3), that scale each axis by its own factor in [1 / 1.2, 1.2]."""
    low, high = 1 / SCALE, SCALE
    sx, sy = (low + (high - low) * u[:, i] for i in (MOVE_X, MOVE_Y))
    zero = torch.zeros_like(sx)
    return rows(sx, zero, zero, zero, sy, zero)


def rotation(u: Tensor, height: int, width: int) -> Tensor:
    """Affine maps, (n, 2, 3), that rotate by an angle in +-15 degrees."""
    angle = (u[:, MOVE_X] - 0.5) * 2 * math.radians(ROTATE)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    return rows(cos, -sin, zero, sin, cos, zero)


def translation(u: Tensor, height: int, width: int) -> Tensor:
    """Affine maps, (n, 2, 3), that shift by up to an eighth of the side on each axis, not by whole pixels as `crop`."""
    dx, dy = ((u[:, i] - 0.5) * 4 * TRANSLATE for i in (MOVE_X, MOVE_Y))
    one, zero = torch.ones_like(dx), torch.zeros_like(dx)
    return rows(one, zero, dx, zero, one, dy)


# Operations by name, which has no "_": functions of images (N, C, H, W) and a draw (N or 1, COLUMNS). Those of BEFORE
# that are named are applied first, then one of GEOMETRIC (affine maps), drawn anew for every call, then those of AFTER.
BEFORE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"color": color, "flip": flip}
GEOMETRIC: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "crop": cropping,
    "scale": scaling,
    "rotate": rotation,
    "translate": translation,
}
AFTER: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"cutout": cutout}
