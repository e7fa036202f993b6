"""What the pixels of a set went through: normalisations by the names of --normalized, and what the pixels show of it.

Files of others rarely say it. Real images fill the range from 0 to 1 to both ends, and so do most distilled sets, so
that the right mean and std are those that bring the pixels back into that range.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from data import DATASETS, IMAGENET, WHITENED, Dataset
from utils.method.images import EPS, Normalize, moments
from utils.runs.layout import thinned

OF_DATA, OF_IMAGENET, OF_HALF = "data", "imagenet", "0.5/0.5"  # the latter brings [0, 1] to [-1, 1]
CIFAR_PIXELS = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))  # std of all pixels, not the mean of images' stds
EXACT = 5e-3  # by which pixels that fill [0, 1] may miss its ends: statistics are rounded, and float16 is in use
SPREADS = 0.6, 1.7  # share of the data set's std that such pixels have
OVERSHOOT = 0.25  # by which pixels of others' sets may leave [0, 1]: the published loop saves without clamping
CLEARLY = 0.03  # by how much a fit must be better, in nats per number of an image
LARGEST = 255.0

# --- By name ----------------------------------------------------------------------------------------------------------


def statistics(text: str) -> tuple[list[float], list[float]]:
    """Mean and std per channel, in units of [0, 1], from MEAN/STD such as 0.49,0.48,0.45/0.2.

    Numbers above 1 are in units of 0 to 255. Raises ValueError for other texts.
    """
    mean, std = ([float(number) for number in part.split(",")] for part in text.split("/"))
    most = max(len(mean), len(std))
    if not {len(mean), len(std)} <= {1, most} or most not in (1, 3):
        raise ValueError
    if not all(0 <= number <= LARGEST for number in mean) or not all(0 < number <= LARGEST for number in std):
        raise ValueError
    unit = LARGEST if max(*mean, *std) > 1 else 1.0
    return [x / unit for x in mean * (most // len(mean))], [x / unit for x in std * (most // len(std))]


def named(name: str, dataset: Dataset) -> Normalize:
    """The normalisation that --normalized names, for a data set."""
    if name == OF_DATA:
        return Normalize(dataset.normalize.mean.flatten().tolist(), dataset.normalize.std.flatten().tolist())
    return Normalize(*(IMAGENET if name == OF_IMAGENET else statistics(name)))


def text_of(mean: object, std: object) -> str:
    """MEAN/STD as statistics() reads it."""
    return "/".join(",".join(f"{x:.4g}" for x in numbers) for numbers in (mean, std))  # type: ignore[attr-defined]


def candidates(dataset: Dataset, channels: int) -> dict[str, Normalize]:
    """Normalisations in use for images of so many channels, by the names of --normalized; the likeliest first."""
    known = [(info.mean, info.std) for info in DATASETS.values()]
    names = [OF_DATA, OF_IMAGENET, OF_HALF, *dict.fromkeys(text_of(*pair) for pair in (CIFAR_PIXELS, *known))]
    found = {name: named(name, dataset) for name in names}
    return {name: normalize for name, normalize in found.items() if normalize.mean.shape[1] in (1, channels)}


# --- By the pixels ----------------------------------------------------------------------------------------------------


def better(images: Tensor, dataset: Dataset, assumed: str | None = None) -> str | None:
    """The normalisation of a set where its pixels clearly show another one than the assumed.

    images: (N, C, H, W) as stored. assumed: a name of --normalized; None: none at all. Noise, blurred images and others
    that do not fill [0, 1] under any normalisation show nothing, unless the assumed one is impossible.
    """
    images = thinned(images)
    fits = {name: normalize.inverse(images) for name, normalize in candidates(dataset, images.shape[1]).items()}
    taken = images if assumed is None else named(assumed, dataset).inverse(images)
    if fills(taken, dataset):
        return None
    for name, pixels in fits.items():
        if fills(pixels, dataset):
            return name
    if overshoot(taken) <= OVERSHOOT:
        return None
    possible = {name: pixels for name, pixels in fits.items() if overshoot(pixels) <= OVERSHOOT}
    best = min(possible, key=lambda name: abs(math.log(spread(possible[name], dataset))), default=None)
    return best if best is not None and SPREADS[0] < spread(possible[best], dataset) < SPREADS[1] else None


def overshoot(pixels: Tensor) -> float:
    """By how much pixels leave [0, 1]."""
    low, high = (x.item() for x in pixels.aminmax())
    return max(-low, high - 1)


def spread(pixels: Tensor, dataset: Dataset) -> float:
    """Std of pixels as a share of the data set's, the mean over channels."""
    return max((pixels.std((0, 2, 3)).mean() / dataset.normalize.std.mean().cpu()).item(), 1e-6)


def fills(pixels: Tensor, dataset: Dataset) -> bool:
    """Whether pixels fill [0, 1] to both ends, and do not leave it, as real images and clamped ones do."""
    ends = [((pixels - end).abs() <= EXACT).sum().item() for end in (0, 1)]
    return overshoot(pixels) <= EXACT and min(ends) >= 3 and SPREADS[0] < spread(pixels, dataset) < SPREADS[1]


# --- Whitening --------------------------------------------------------------------------------------------------------


def looks_whitened(images: Tensor, dataset: Dataset, normalize: Normalize) -> Literal["yes", "no", "unclear"]:
    """Whether a set's pixels look ZCA-whitened after this normalisation, by their variances along the data set's
    principal components.

    Plain images vary as real ones do, plus noise in all directions; whitened ones alike wherever real ones vary at all;
    noise alike everywhere. "unclear": noise, or nearly, that is far beyond the range of images.
    images: (N, C, H, W), not whole numbers.
    """
    real = dataset.train.images
    beyond = overshoot(normalize.inverse(images))
    can_tell = len(images) >= 4 and images[0].numel() <= WHITENED and images.shape[1:] == real.shape[1:]
    if not can_tell or images.min() >= 0 or beyond < OVERSHOOT / 2:
        return "no"
    _, covariance = moments(real[:: -(-len(real) // (2 * images[0].numel() + 1000))], real.device)
    std = normalize.std.to(covariance).expand(1, *real.shape[1:]).flatten()  # (D,)
    values, vectors = torch.linalg.eigh(covariance / (std[:, None] * std))
    values = values.clamp(min=0)
    seen = (thinned(images).to(covariance).flatten(1) @ vectors).var(0)  # (D,)

    def misfit(expected: Tensor) -> float:
        """Negative log-likelihood of a Gaussian with such variances times the best factor, per number of an image."""
        return (expected.log().mean() + (seen / expected).mean().log()).item()

    plain = min(misfit(values + noise) for noise in (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0))
    white = min(misfit(values / (values + EPS) + noise) for noise in (3e-3, 1e-2, 3e-2, 0.1, 0.3))
    flat = misfit(torch.ones_like(values))
    if white < min(plain, flat) - CLEARLY:
        return "yes"
    return "unclear" if plain > min(white, flat) and beyond > 2 * OVERSHOOT else "no"
