"""A guess, from its pixels, of the factor that a set of stored images was packed with: for files that do not say it.

Where two cells meet, neighbouring pixels differ more than elsewhere, or less where cells have dark borders. Real images
packed with every candidate factor show what to expect of the data set at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from utils.method.formation import pack
from utils.method.images import to_unit

FACTORS = (1, 2, 3, 4, 5)
LAGS = (1, 2, 4)  # distances of the pixels that are compared: noise differs equally over all of them, pictures do not
ENOUGH = 500  # images of the set, and real ones, that are looked at
# A set looks packed with a factor that leaves less than this share of it unexplained; noise is near 1 for every factor.
# Packed sets that are distilled from noise show blobs before they show seams: 0.41 for factor 1, 0.57 for their own.
KNOWN = 0.4
CLEARLY = 1.5  # how many times better a factor must fit than the claimed one


def layout_of(images: Tensor, real_images: Tensor, factors: Sequence[int] = FACTORS) -> dict[int, float]:
    """The share of a set's structure that each factor leaves unexplained: near 0 for the right one, 1 for noise.

    images: (N, C, H, W) stored images in [0, 1]; real_images: (M, C, H, W) in [0, 1] or uint8, a class's images
    together. Cells of less than three pixels have no structure, so that their factors are not tried.
    """
    seen = profile(thinned(images))
    real = to_unit(thinned(real_images))
    shares = {}
    for factor in factors:
        if 2 * factor < min(images.shape[2:]):
            cells = max(len(real) // factor**2, 1) * factor**2
            packed = pack(real[torch.arange(cells, device=real.device) % len(real)], factor=factor)
            shares[factor] = unexplained(seen, profile(packed))
    return shares


def other_factor(images: Tensor, real_images: Tensor, *, factor: int) -> int | None:
    """The factor that the set looks packed with where it clearly is not the claimed `factor`; None elsewhere."""
    shares = layout_of(images, real_images, sorted({*FACTORS, factor}))
    if factor not in shares:
        return None
    best = min(shares, key=lambda f: shares[f])
    return best if shares[best] < KNOWN and shares[factor] > CLEARLY * shares[best] else None


def factor_warning(file: Path, images: Tensor, real_images: Tensor, *, factor: int) -> str | None:
    """A warning for somebody who gave -f `factor`, where the set looks packed with another one."""
    other = other_factor(images, real_images, factor=factor)
    if other is None:
        return None
    looks = f"looks packed with factor {other}" if other > 1 else "looks like whole images, not packed ones"
    return f"{file}: {looks}, -f {factor} was given; if the accuracy is poor, try -f {other}"


def thinned(images: Tensor) -> Tensor:
    """Every n-th image, so that about ENOUGH are left."""
    return images[:: -(-len(images) // ENOUGH)]


def profile(images: Tensor) -> Tensor:
    """Mean squared difference of pixels, by distance and by position along each axis, one after the other.

    Squares, since noise then adds the same number everywhere, whatever the image below it.
    """
    rows = []
    for lag in LAGS:
        rows.append((images[..., lag:] - images[..., :-lag]).square().mean((0, 1, 2)))
        rows.append((images[..., lag:, :] - images[..., :-lag, :]).square().mean((0, 1, 3)))
    return torch.cat(rows).double()


def unexplained(seen: Tensor, expected: Tensor) -> float:
    """The share of the variance of `seen` that no a + b * expected explains; a >= 0 is noise, b >= 0 contrast."""
    around, shape = seen - seen.mean(), expected - expected.mean()
    b = ((around @ shape) / (shape @ shape).clamp(min=1e-30)).clamp(min=0)
    rest = around - b * shape
    if b * expected.mean() > seen.mean():  # the best fit would need less than no noise
        rest = seen - (seen @ expected) / (expected @ expected) * expected
    return (rest @ rest / (around @ around).clamp(min=1e-30)).item()
