"""Distilled sets as their data set understands them: layout, class numbers, and pixels in [0, 1].

source = read(path)                       # utils/runs/formats.py
images, labels, soft = interpret(source, dataset, normalized="data")
"""

from __future__ import annotations

import logging
import math
import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from data import Dataset
from utils.files.arrayfile import ArrayFile
from utils.files.classnames import spellings
from utils.method.images import Normalize, Whiten, to_unit
from utils.runs.card import Card
from utils.runs.confusion import better_order
from utils.runs.formats import SetFile, listed, read, refusal
from utils.runs.normalisation import LARGEST, OF_DATA, OVERSHOOT, better, looks_whitened, named, overshoot
from utils.system.errors import UsageError, UserError

log = logging.getLogger("dream")

ROUNDING = 1e-2  # by which the sum of a row of probabilities may differ from 1
UNLIKELY = 0.05  # share of un-whitened pixels beyond OVERSHOOT that those of images do not have
ABOUT = 0.8  # share of the accuracy of random real images: misread sets reach 0.7 of it with the best order of classes
GREY = 1e-3  # by which the channels of a grey image may differ


class DistilledSet(NamedTuple):
    """A set that fits its data set."""

    images: Tensor  # (N, C, H, W) float32 in [0, 1]
    labels: Tensor  # (N,) int64
    soft: Tensor | None  # (N, classes) float32, probabilities; `labels` are then the most probable classes


# --- Interpreting -----------------------------------------------------------------------------------------------------


def interpret(
    source: SetFile,
    dataset: Dataset,
    *,
    normalized: str | None = None,
    whitened: str | None = None,
    classes: Sequence[str] | None = None,
    whitening: Whiten | None = None,
) -> DistilledSet:
    """The set that a file holds, with the layout, the class numbers and the range of pixels of its data set.

    normalized: name of the normalisation that the pixels went through; a card may hold its numbers, too. whitened: yes
    if they were ZCA-whitened after it, no if not, None to judge by the pixels if there is no card. classes: names of
    the classes in the order of the set's label numbers. whitening: the one to undo, where it is computed already.
    Raises UserError when the set does not fit the data set, and warns of what looks odd.
    """
    file, labels, soft = source.file, source.labels, source.soft
    images, done = _channels_first(source, dataset)
    if source.names is not None:
        labels = torch.tensor(class_numbers(source.names, dataset, file))[labels]
    elif (order := class_order(source, dataset, classes)) is not None:
        labels, soft = _renumbered(labels, soft, order, dataset, file)
    expects = f"{dataset.name} has {dataset.classes} classes, from 0; name the data set with -d"
    if soft is not None and soft.shape[1] != dataset.classes:
        raise UserError(f"{file}: has soft labels of {soft.shape[1]} classes, {expects}")
    for label in (int(labels.min()), int(labels.max())):
        if not 0 <= label < dataset.classes:
            raise UserError(f"{file}: has a label {label}, {expects}")
    if (present := len(labels.unique())) < dataset.classes:
        log.warning("%s: holds %d of the %d classes", file, present, dataset.classes)
    went_through = source.normalize
    if whitened == "yes":
        went_through = whitening or whitening_of(dataset, normalized)
        done.append(f"un-whitened by the covariance of {dataset.name}, normalised by {normalized or OF_DATA}")
    elif went_through is None and normalized:
        went_through = named(normalized, dataset)
        done.append(f"un-normalised by {normalized}")
    if source.card is None and source.names is None and images.is_floating_point():
        _check_pixels(images, dataset, file, normalized, whitened)
    images = _in_range(images, went_through, file, done)
    images = _with_channels(images, dataset, file, done)
    if done:
        log.info("%s: %s", file, "; ".join(done))
    return DistilledSet(images, labels, None if soft is None else _probabilities(soft, file))


def load_distilled(path: Path) -> tuple[Tensor, Tensor, Card | None]:
    """Images (N, C, H, W) float32 in [0, 1], labels (N,) int64, and the card if there is one: for use without the data
    set. Raises UserError for everything that is no such set."""
    source = read(path)
    if source.labels.min() < 0:
        raise refusal(source.file, f"a label is {int(source.labels.min())}")
    return _in_range(source.images, source.normalize, source.file, []), source.labels, source.card


# --- Layout -----------------------------------------------------------------------------------------------------------


def _channels_first(source: SetFile, dataset: Dataset) -> tuple[Tensor, list[str]]:
    """Images (N, C, H, W) of the data set's size, and what was done to them; grey ones may still have other channels.

    Raises UserError for every other shape.
    """
    images, side, shape = source.images, dataset.side, tuple(source.images.shape[1:])
    channels = {dataset.channels, *([3] if dataset.channels == 1 else []), *([1] if source.names else [])}
    done, expected = [], (dataset.channels, side, side)
    problem = f"{source.file}: holds images of {shape}, {dataset.name} has {expected}"
    if shape[0] not in channels and shape[0] == shape[1] and shape[2] in (1, 3, 4):
        done.append(f"channels last, (N, H, W, C) with {shape}, made (N, C, H, W)")
        problem += ", and their channels seem to be last, (N, H, W, C)"
        images = images.permute(0, 3, 1, 2).contiguous()
    count, height, width = images.shape[1:]
    if count in channels and (height, width) == (side, side):
        if dataset.channels < count and (images == images[:, :1]).all():
            images = images[:, :1]
            done.append(f"grey with {count} equal channels, of which one is kept")
        return images, done
    remedy = "name the data set with -d"
    if count not in channels:
        remedy += f", or save the images with {dataset.channels} channels, (N, C, H, W)"
    elif height != width:
        remedy += f", or save them as {side} x {side}"
    elif dataset.name == "folder":
        remedy += f", or read the real images with --size {width}"
    else:
        remedy += f", resize or crop the set to {side} x {side}, or give --image_folder DIR --size {width}"
    raise UserError(f"{problem}; {remedy}")


def _with_channels(images: Tensor, dataset: Dataset, file: Path, done: list[str]) -> Tensor:
    """Images in [0, 1] with the data set's channels, where this loses nothing: grey images are often saved as RGB.

    Raises UserError for coloured images of a grey data set.
    """
    if dataset.channels == 1 and images.shape[1] == 3:
        if (images - images[:, :1]).abs().max() > GREY:
            raise UserError(f"{file}: holds coloured images, {dataset.name} has grey ones; name the data set with -d")
        done.append("grey with 3 equal channels, of which one is kept")
        return images[:, :1].contiguous()
    return images.expand(-1, dataset.channels, -1, -1)


# --- Range ------------------------------------------------------------------------------------------------------------


def whitening_of(dataset: Dataset, normalized: str | None) -> Whiten:
    """The data set's whitening of images that were normalised so before. Under torchrun, all ranks have to call it."""
    normalize = named(normalized or OF_DATA, dataset)
    mean, std = (x.flatten().expand(dataset.channels).tolist() for x in (normalize.mean, normalize.std))
    return dataset.whitening(mean, std)


def _check_pixels(images: Tensor, dataset: Dataset, file: Path, normalized: str | None, whitened: str | None) -> None:
    """Compare what is said of the pixels of somebody's set with what they look like.

    Raises UserError where whitened images would be whitened again, and where pixels are not those of images; warns
    where a normalisation other than the given one fits clearly better.
    """
    if not images.isfinite().all() or _like_bytes(images):
        return
    if whitened is None:
        looks = looks_whitened(images, dataset, named(normalized or OF_DATA, dataset))
        if looks == "yes" or (looks == "unclear" and dataset.whiten != "none"):
            seen = f"{file}: the pixels " + ("look ZCA-whitened" if looks == "yes" else "may be ZCA-whitened")
            remedy = "say --whitened if they are, --whitened no if they are not"
            if dataset.whiten != "none" or normalized is None:
                raise UserError(f"{seen}; {remedy}")
            log.warning("%s, and are used as if they were not; %s", seen, remedy)
            return
    if whitened == "yes" or (other := better(images, dataset, normalized)) is None:
        return
    flag = "--normalized" if other == OF_DATA else f"--normalized {other}"
    if normalized is not None:
        log.warning("%s: the pixels fit %s better than %s", file, flag, normalized)
    elif overshoot(images) > OVERSHOOT:
        low, high = (x.item() for x in images.aminmax())
        raise UserError(f"{file}: pixels range from {low:.3g} to {high:.3g} in place of 0 to 1; {flag} fits them")


def _like_bytes(images: Tensor) -> bool:
    """Whether floats can only be pixels from 0 to 255, within what a set may leave that range."""
    low, high = (x.item() / LARGEST for x in images.aminmax())
    return low >= -OVERSHOOT and OVERSHOOT < high <= 1 + OVERSHOOT


def _in_range(images: Tensor, normalize: Normalize | None, file: Path, done: list[str]) -> Tensor:
    """Pixels as float32 in [0, 1], clamped; normalize: what they went through, if anything. `done` is added to.

    Raises UserError when they are far from what they should be.
    """
    if normalize is not None and normalize.mean.shape[1] not in (1, images.shape[1]):
        channels = f"has {images.shape[1]} channels, its normalisation {normalize.mean.shape[1]}"
        raise UserError(f"{file}: {channels}; check -d and --normalized")
    if images.dtype == torch.uint8 and normalize is None:
        return to_unit(images)
    low, high = (x.item() for x in images.aminmax())
    seen = f"{file}: pixels range from {low:.3g} to {high:.3g}"
    if not (math.isfinite(low) and math.isfinite(high)):
        raise UserError(f"{file}: pixels hold NaN or infinity; the set is damaged, make it again")
    if images.dtype == torch.uint8 or _like_bytes(images):
        if normalize is not None:
            raise UserError(f"{seen}, as bytes from 0 to 255, which are not normalised; leave --normalized out")
        done.append(f"pixels from {low:.3g} to {high:.3g} divided by 255")
        images, low, high = images / LARGEST, low / LARGEST, high / LARGEST
    if normalize is not None:
        if low >= 0:
            log.warning("%s, none is negative: they look un-normalised, as without --normalized", seen)
        back = normalize.inverse(images.to(normalize.mean.device)).cpu()
        if isinstance(normalize, Whiten):
            _check_unwhitened(back, seen)
        elif overshoot(back) > OVERSHOOT:
            ends = [normalize(torch.full((1, images.shape[1], 1, 1), float(end))) for end in (0, 1)]
            expected = f"{ends[0].min():.3g} to {ends[1].max():.3g}"
            log.warning("%s, but %s was expected of normalised ones; clamped", seen, expected)
        images = back
    elif low < -OVERSHOOT or high > 1 + OVERSHOOT:
        remedy = "say --normalized if mean and std have been taken out of them"
        if low >= 0 and 2 < high <= LARGEST:
            remedy = f"they look like 0 to 255: divide them by 255 or save them as uint8, or {remedy}"
        raise UserError(f"{seen} in place of 0 to 1; {remedy}")
    elif low < 0 or high > 1:
        log.warning("%s; clamped to [0, 1]", seen)
    return images.clamp(0, 1)


def _check_unwhitened(pixels: Tensor, seen: str) -> None:
    """Check that un-whitened pixels are those of images. Raises UserError when most are not, and warns when some."""
    low, high = (x.item() for x in pixels.aminmax())
    outside = ((pixels < -OVERSHOOT) | (pixels > 1 + OVERSHOOT)).float().mean().item()
    now = f"{low:.3g} to {high:.3g} when un-whitened"
    if outside > UNLIKELY:
        raise UserError(
            f"{seen}, and from {now} in place of 0 to 1: --whitened does not fit them, at least not after this "
            "normalisation; name another with --normalized (0/1 for whitened plain pixels), or leave --whitened out"
        )
    if outside:
        log.warning("%s, and from %s; clamped to [0, 1]", seen, now)


def _probabilities(soft: Tensor, file: Path) -> Tensor:
    """Soft labels (N, classes) as probabilities that sum to 1, whether they are such or logits."""
    sums = soft.sum(1)
    if soft.min() >= 0 and (sums - 1).abs().max() <= ROUNDING:
        return soft / sums[:, None]
    ranges = " and sum to ".join(f"{x.min():.3g} to {x.max():.3g}" for x in (soft, sums))
    log.warning("%s: soft labels range from %s per image: no probabilities, so taken as logits", file, ranges)
    return soft.softmax(1)


# --- Numbers of classes -----------------------------------------------------------------------------------------------


def class_order(source: SetFile, dataset: Dataset, classes: Sequence[str] | None = None) -> list[int] | None:
    """The class of every label number, where a set's numbers are not those of its data set; None where they are.

    classes: the value of --classes. Without it a card names the classes. Says what is assumed where the data set is a
    folder and nothing names them. Raises UserError for names that are not the data set's.
    """
    if classes:
        return named_classes(classes, dataset)
    if dataset.source is None:
        return None
    names = dataset.class_names
    if source.card is None:
        if names != [str(c) for c in range(len(names))]:
            others = "".join(f", {c} for {names[c]!r}" for c in range(1, min(3, len(names))))
            shown = f"label 0 is taken for {names[0]!r}{others}{', ...' if len(names) > 3 else ''}"
            log.info("%s: %s (class order: alphabetical; --classes A,B,... names another)", source.file, shown)
        return None
    of_card = source.card.get("class_names")
    known, numbers = _class_spellings(dataset), []
    for name in of_card if isinstance(of_card, list) else []:
        words = [name, *spellings(name), safe_name(name)] if isinstance(name, str) else []
        numbers += [known[word] for word in words if word in known][:1]
    if sorted(numbers) == list(range(len(names))):
        if numbers != sorted(numbers):
            log.info("%s: its classes are in another order than the real images', and are matched by name", source.file)
        return numbers
    if dataset.has_own_classes:
        place = f"--{'npz' if isinstance(dataset.source, ArrayFile) else 'image_folder'} {dataset.source.root}"
        raise UserError(f"{place}: has other classes than the set, {of_card}")
    return None


def named_classes(classes: Sequence[str], dataset: Dataset) -> list[int]:
    """Class numbers of the value of --classes. Raises UsageError, listing the data set's classes, for other names."""
    words = classes[0].split(",") if len(classes) == 1 else classes
    return class_numbers([word.strip() for word in words], dataset, flag="--classes")


def _renumbered(
    labels: Tensor, soft: Tensor | None, order: list[int], dataset: Dataset, file: Path
) -> tuple[Tensor, Tensor | None]:
    """Labels and soft labels with the data set's class numbers; order: the class of every label number.

    Raises UserError for labels that have none.
    """
    for label in (int(labels.min()), int(labels.max())):
        if not 0 <= label < len(order):
            raise UserError(f"{file}: has a label {label}, but {len(order)} classes are named; name all with --classes")
    if soft is not None:
        if soft.shape[1] != len(order):
            problem = f"has soft labels of {soft.shape[1]} classes, but {len(order)} are named"
            raise UserError(f"{file}: {problem}; name all with --classes")
        named_only = _probabilities(soft, file)
        soft = torch.zeros(len(soft), dataset.classes)
        soft[:, order] = named_only
    return torch.tensor(order)[labels], soft


def order_warnings(
    confusions: Mapping[str, Tensor], random: Mapping[str, float], dataset: Dataset, classes: Sequence[str] | None
) -> list[str]:
    """Warnings, a network each, that label numbers seem to mean the classes in another order.

    confusions: (classes, classes) counts of the networks trained on a set, true by predicted. random: accuracies of as
    many random real images, in per cent, where they are known; with another order the set has to be about as good, or
    right for most images where they are not. classes: the value of --classes.
    """
    warnings, names = [], dataset.class_names
    order = list(range(len(names)))
    if classes:
        order = named_classes(classes, dataset)
    for net, matrix in confusions.items():
        found = better_order(matrix, least=ABOUT * random[net] if net in random else 50.0)
        if found is not None:
            meant, accuracy = found
            assumed = "that of --classes" if classes else "alphabetical" if dataset.source else "the data set's"
            warnings.append(
                f"{net}: the labels seem to be numbered in another class order than the assumed one ({assumed}): the "
                f"same networks are right for {accuracy:.1f} % of the test images in the order that fits best, where "
                "classes that they confuse may be swapped: --classes "
                f"{as_words([names[meant[c]] for c in order])}"
            )
    return warnings


def as_words(names: Sequence[str]) -> str:
    """Class names as the value of --classes, for a shell: a,b,c, or quoted words where names have commas or spaces."""
    plain = all(re.fullmatch(r"[\w.+@-]+", name) for name in names)
    return ",".join(names) if plain else " ".join(map(shlex.quote, names))


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


def class_numbers(
    names: Sequence[str], dataset: Dataset, file: Path | None = None, *, flag: str | None = None
) -> list[int]:
    """Class number of every folder: by its name, or by its number if all have one and no name contradicts it.

    It is never the folder's place in the alphabet. flag: the flag that gives the names, if they are no folders'.
    Raises UserError listing the names that fit no class.
    """
    wanted, known = list(dataset.class_names), _class_spellings(dataset)
    by_name = [known.get(name) for name in names]
    by_number = [_number(name, known) for name in names]
    chosen = by_number if None in by_name and None not in by_number else by_name
    right = [c for c in chosen if c is not None and c < dataset.classes and chosen.count(c) == 1]
    if len(right) < len(names):
        odd = [name for name, c in zip(names, chosen, strict=True) if c not in right]
        if flag is not None:
            wrong = f"{flag}: no class of {dataset.name}, or one twice: {listed(odd)}"
            raise UsageError(f"{wrong}; its classes are {listed(wanted, 20)}, to be given in the order of the labels")
        raise UserError(
            f"{file}: class folders that are no class of {dataset.name}, or one twice: {listed(odd)}; name them like "
            f"its classes ({listed(folder_names(wanted))}), or all by number (0, 1_NAME), and check -d"
        )
    return right


def _class_spellings(dataset: Dataset) -> dict[str, int]:
    """The class number of every name that only one class may be called by."""
    names = list(dataset.class_names)
    spelt = [
        {folder, *spellings(name), *map(safe_name, spellings(name))}
        for name, folder in zip(names, folder_names(names), strict=True)
    ]
    times = Counter(spelling for own in spelt for spelling in own)
    return {spelling: c for c, own in enumerate(spelt) for spelling in own if times[spelling] == 1}


def _number(folder: str, known: Mapping[str, int]) -> int | None:
    """The number of a folder `3` or `3_NAME`; None where the folder's name, or NAME, is known to be another class."""
    match = re.fullmatch(r"([0-9]+)(?:_(.*))?", folder)
    if match is None:
        return None
    number = int(match[1])
    return number if all(known.get(name, number) == number for name in (folder, match[2])) else None
