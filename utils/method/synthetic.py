"""The synthetic set's beginning and its use: initial pixels, and the training images that stored images decode to."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from utils.method.formation import decode, decoded_sources, pack
from utils.method.images import ImageSet, Normalize, to_unit
from utils.method.selection import Context, select

NOISE_MEAN, NOISE_STD = 0.5, 0.25
BASELINE = "random real"  # purpose of the draws behind real images beside a set: both scripts show the same ones


def initial_pixels(context: Context, init: str, *, ipc: int, factor: int) -> Tensor:
    """Stored images to begin with, (classes, ipc, C, H, W) float32 in [0, 1] (Sec. 3.3, "clustering initialisation").

    kmeans, random: ipc * factor^2 real images per class, chosen by that strategy, shrunk into the cells.
    noise: normal, clamped.
    """
    real = context.real
    if init == "noise":
        noise = [context.draws.of_class(c).normal(ipc, *real.images.shape[1:]) for c in context.classes]
        return (NOISE_MEAN + NOISE_STD * torch.stack(noise)).clamp_(0, 1)
    index = select(context, ipc * factor**2, strategy=init)
    return pack(to_unit(real.images[index]), factor=factor).clamp_(0, 1)


def training_images(
    images: Tensor,
    labels: Tensor,
    *,
    soft: Tensor | None = None,
    factor: int,
    decode_type: str,
    classes: int,
    normalize: Normalize,
) -> ImageSet:
    """Stored images (N, C, H, W) in [0, 1] with labels (N,) -> the set that networks are trained on.

    soft: (N, classes) probabilities, of which the labels are the most probable classes; every image decoded from a
    stored one takes over its own. Decoding is per class, so classes may have different numbers of images.
    """
    decoded, sources = [], []
    for c in labels.unique().tolist():
        own = (labels == c).nonzero().flatten()
        decoded.append(decode(images[own], factor=factor, decode_type=decode_type))
        rows = decoded_sources(len(own), factor=factor, decode_type=decode_type)
        sources.append(own[torch.tensor(rows, device=own.device)])
    source = torch.cat(sources)
    return ImageSet(
        torch.cat(decoded),
        labels[source],
        classes=classes,
        normalize=normalize,
        soft=None if soft is None else soft[source],
    )


def coreset(
    context: Context, strategy: str, *, ipc: int, whole: Callable[[Tensor], Tensor] = lambda rows: rows
) -> ImageSet:
    """`ipc` real images per class: the baseline of the same size.

    whole: rows of the context's classes -> rows of all.
    """
    real = context.real
    images = whole(real.images[select(context, ipc, strategy=strategy)])
    labels = torch.arange(len(images), device=real.device).repeat_interleave(ipc)
    return ImageSet(images.flatten(0, 1), labels, classes=real.classes, normalize=real.normalize)
