"""Distilled sets as their data set understands them: class numbers, channels, and pixels in [0, 1].

source = read(path)                       # utils/runs/formats.py
images, labels, soft = interpret(source, dataset, normalized=False)
"""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from data import Dataset
from utils.files.classnames import spellings
from utils.method.images import Normalize, to_unit
from utils.runs.card import Card
from utils.runs.formats import SetFile, listed, read, refusal
from utils.system.errors import UserError

log = logging.getLogger("dream")

ROUNDING = 1e-2  # by which the sum of a row of probabilities may differ from 1
OVERSHOOT = 0.25  # by which pixels of others' sets may leave [0, 1]: the published loop saves without clamping


class DistilledSet(NamedTuple):
    """A set that fits its data set."""

    images: Tensor  # (N, C, H, W) float32 in [0, 1]
    labels: Tensor  # (N,) int64
    soft: Tensor | None  # (N, classes) float32, probabilities; `labels` are then the most probable classes


# --- Interpreting -----------------------------------------------------------------------------------------------------


def interpret(source: SetFile, dataset: Dataset, *, normalized: bool = False) -> DistilledSet:
    """The set that a file holds, with the class numbers and the range of pixels of its data set.

    normalized: the data set's mean and std have been taken out of the pixels. A card may say so, too.
    Raises UserError when the set does not fit the data set, and warns of what looks odd.
    """
    file, labels = source.file, source.labels
    images, expected = source.images, (dataset.channels, dataset.side, dataset.side)
    if source.names is not None:
        images = _with_channels(images, dataset.channels)
        labels = torch.tensor(class_numbers(source.names, dataset, file))[labels]
    if tuple(images.shape[1:]) != expected:
        problem = f"holds images of {tuple(images.shape[1:])}, {dataset.name} has {expected}"
        raise UserError(f"{file}: {problem}; name the data set with -d, or --size")
    soft, expects = source.soft, f"{dataset.name} has {dataset.classes} classes, from 0; name the data set with -d"
    if soft is not None and soft.shape[1] != dataset.classes:
        raise UserError(f"{file}: has soft labels of {soft.shape[1]} classes, {expects}")
    for label in (int(labels.min()), int(labels.max())):
        if not 0 <= label < dataset.classes:
            raise UserError(f"{file}: has a label {label}, {expects}")
    if (present := len(labels.unique())) < dataset.classes:
        log.warning("%s: holds %d of the %d classes", file, present, dataset.classes)
    images = _in_range(images, source.normalize or (dataset.normalize if normalized else None), file)
    return DistilledSet(images, labels, None if soft is None else _probabilities(soft, file))


def load_distilled(path: Path) -> tuple[Tensor, Tensor, Card | None]:
    """Images (N, C, H, W) float32 in [0, 1], labels (N,) int64, and the card if there is one: for use without the data
    set. Raises UserError for everything that is no such set."""
    source = read(path)
    if source.labels.min() < 0:
        raise refusal(source.file, f"a label is {int(source.labels.min())}")
    return _in_range(source.images, source.normalize, source.file), source.labels, source.card


def _in_range(images: Tensor, normalize: Normalize | None, file: Path) -> Tensor:
    """Pixels as float32 in [0, 1], clamped; normalize: what they went through, if anything.

    Raises UserError when they are far from what they should be.
    """
    if normalize is not None:
        mean, std = normalize.mean.cpu(), normalize.std.cpu()
        if mean.shape[1] != images.shape[1]:
            raise UserError(f"{file}: has {images.shape[1]} channels, its normalisation {mean.shape[1]}; check -d")
        if images.dtype == torch.uint8:
            raise UserError(f"{file}: holds bytes from 0 to 255, which are not normalised; leave --normalized out")
    elif images.dtype == torch.uint8:
        return to_unit(images)
    low, high = (x.item() for x in images.aminmax())
    seen = f"{file}: pixels range from {low:.3g} to {high:.3g}"
    if not (math.isfinite(low) and math.isfinite(high)):
        raise UserError(f"{file}: pixels hold NaN or infinity; the set is damaged, make it again")
    if normalize is not None:
        if low >= 0:
            log.warning("%s, none is negative: they look un-normalised, as without --normalized", seen)
        images = images * std + mean
        if images.min() < -OVERSHOOT or images.max() > 1 + OVERSHOOT:
            expected = (-mean / std).min().item(), ((1 - mean) / std).max().item()
            log.warning("%s, but %.3g to %.3g was expected of normalised ones; clamped", seen, *expected)
    elif low < -OVERSHOOT or high > 1 + OVERSHOOT:
        remedy = "say --normalized if mean and std have been taken out of them"
        if low >= 0 and 2 < high <= 255:
            remedy = f"they look like 0 to 255: divide them by 255 or save them as uint8, or {remedy}"
        raise UserError(f"{seen} in place of 0 to 1; {remedy}")
    elif low < 0 or high > 1:
        log.warning("%s; clamped to [0, 1]", seen)
    return images.clamp(0, 1)


def _probabilities(soft: Tensor, file: Path) -> Tensor:
    """Soft labels (N, classes) as probabilities that sum to 1, whether they are such or logits."""
    sums = soft.sum(1)
    if soft.min() >= 0 and (sums - 1).abs().max() <= ROUNDING:
        return soft / sums[:, None]
    ranges = " and sum to ".join(f"{x.min():.3g} to {x.max():.3g}" for x in (soft, sums))
    log.warning("%s: soft labels range from %s per image: no probabilities, so taken as logits", file, ranges)
    return soft.softmax(1)


def _with_channels(images: Tensor, channels: int) -> Tensor:
    """Images with that many channels where this loses nothing: grey images are often saved as RGB files."""
    if channels == 1 and images.shape[1] == 3 and (images == images[:, :1]).all():
        return images[:, :1]
    return images.expand(-1, channels, -1, -1) if images.shape[1] == 1 else images


# --- Names of class folders -------------------------------------------------------------------------------------------

# Hugging Face's imagefolder reads a folder with one of these words in its name as a split, and ignores the others.
SPLITS = ("train", "training", "validation", "valid", "dev", "val", "test", "testing", "eval", "evaluation")


def folder_names(class_names: Sequence[str]) -> list[str]:
    """Names for class folders whose alphabetical order is that of the classes, safe for file systems.

    Numbers are put in front where the names' own order is another one, or where two are the same.
    """
    names = [safe_name(name) for name in class_names]
    if names == sorted(names) and len({name.lower() for name in names}) == len(names):
        return names
    digits = len(str(len(names) - 1))
    return [f"{c:0{digits}}_{name}" for c, name in enumerate(names)]


def safe_name(name: str) -> str:
    """A class name as a folder's name: `T-shirt/top` -> `T-shirt_top`; `train` -> `trains`."""
    name = re.sub(r"[^\w.-]+", "_", name)
    name = re.sub(rf"(?<![^\W\d_])({'|'.join(SPLITS)})(?![^\W\d_])", r"\1s", name)
    return name.strip("._")[:100] or "class"


def class_numbers(names: Sequence[str], dataset: Dataset, file: Path) -> list[int]:
    """Class number of every folder: by its name, or by its number if all have one and no name contradicts it.

    It is never the folder's place in the alphabet. Raises UserError listing the folders that fit no class.
    """
    wanted = list(dataset.class_names)
    spelt = [
        {folder, *spellings(name), *map(safe_name, spellings(name))}
        for name, folder in zip(wanted, folder_names(wanted), strict=True)
    ]
    times = Counter(spelling for own in spelt for spelling in own)
    known = {spelling: c for c, own in enumerate(spelt) for spelling in own if times[spelling] == 1}
    by_name = [known.get(name) for name in names]
    by_number = [_number(name, known) for name in names]
    chosen = by_number if None in by_name and None not in by_number else by_name
    right = [c for c in chosen if c is not None and c < dataset.classes and chosen.count(c) == 1]
    if len(right) < len(names):
        odd = [name for name, c in zip(names, chosen, strict=True) if c not in right]
        raise UserError(
            f"{file}: class folders that are no class of {dataset.name}, or one twice: {listed(odd)}; name them like "
            f"its classes ({listed(folder_names(wanted))}), or all by number (0, 1_NAME), and check -d"
        )
    return right


def _number(folder: str, known: Mapping[str, int]) -> int | None:
    """The number of a folder `3` or `3_NAME`; None where the folder's name, or NAME, is known to be another class."""
    match = re.fullmatch(r"([0-9]+)(?:_(.*))?", folder)
    if match is None:
        return None
    number = int(match[1])
    return number if all(known.get(name, number) == number for name in (folder, match[2])) else None
