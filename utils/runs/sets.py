"""Distilled sets in files, ours and other people's: read without trust, then checked against their data set.

    source = read(path)                       # types and shapes are checked; its card may name the data set
    images, labels, soft = interpret(source, dataset, normalized=False)

A set may be a run folder or .pt file with [images, labels], a .safetensors file with both and perhaps a card in its
header, or a folder of class folders with image files.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from data import Dataset
from utils.files.imagefiles import for_each, image_files, inside, is_grey, mode_and_size, read_image
from utils.files.tensors import is_plain, read_tensors
from utils.method.images import Normalize, to_unit
from utils.runs.card import CARD, CARD_BYTES, DATA, Card, check_card, load_card
from utils.system.device import free_memory
from utils.system.errors import UserError, first_line, printable

log = logging.getLogger("dream")

SAFETENSORS = ".safetensors"
REMEDY = "name a run folder, a .pt or .safetensors file, or a folder with images in DIR/CLASS/*"
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
ROUNDING = 1e-2  # by which the sum of a row of probabilities may differ from 1
OVERSHOOT = 0.25  # by which pixels of others' sets may leave [0, 1]: the published loop saves without clamping
SPARE_MEMORY = 0.5  # of the free memory: a set is copied once or twice on its way to a network


@dataclass(frozen=True)
class SetFile:
    """What a file says of a distilled set: types and shapes are checked, ranges and classes are not yet."""

    file: Path  # the file or folder that messages name
    images: Tensor  # (N, C, H, W) float32 or uint8, in whatever range
    labels: Tensor  # (N,) int64: the class, the most probable one of `soft`, or the position in `names`
    soft: Tensor | None = None  # (N, classes) float32, probabilities or logits
    card: Card | None = None
    names: list[str] | None = None  # names of the class folders

    @property
    def card_file(self) -> Path:
        """The file that the card is in, or would be."""
        if self.names is not None:
            return self.file / CARD
        return self.file if self.file.suffix.lower() == SAFETENSORS else self.file.with_name(CARD)

    @property
    def normalize(self) -> Normalize | None:
        """The normalisation that the images went through, as the card says; None for plain pixels."""
        if self.card is None or not self.card.get("normalized", False):
            return None
        return Normalize(self.card["normalization"]["mean"], self.card["normalization"]["std"])


class DistilledSet(NamedTuple):
    """A set that fits its data set."""

    images: Tensor  # (N, C, H, W) float32 in [0, 1]
    labels: Tensor  # (N,) int64
    soft: Tensor | None  # (N, classes) float32, probabilities; `labels` are then the most probable classes


# --- Reading ----------------------------------------------------------------------------------------------------------


def read(path: Path) -> SetFile:
    """Read a set in any of the forms above. Raises UserError for everything else."""
    try:
        if path.suffix.lower() == SAFETENSORS and not path.is_dir():
            return _read_safetensors(path)
        if path.is_dir() and not (path / DATA).exists():
            return _read_folder(path)
        return _read_pt(path / DATA if path.is_dir() else path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or first_line(error)}); {REMEDY}") from error


def _read_pt(file: Path) -> SetFile:
    if file.exists():
        must_fit(file, file.stat().st_size)  # a copy of each byte is checked, and unpacked
    content = read_tensors(file, REMEDY)
    if not isinstance(content, (list, tuple)) or len(content) != 2 or not all(isinstance(x, Tensor) for x in content):
        raise _refusal(file, "is not a list of two tensors")
    card_file = file.with_name(CARD)
    return _checked(file, *content, card=check_card(load_card(card_file), card_file) if card_file.exists() else None)


def _refusal(file: Path, what: str) -> UserError:
    labels = "labels, (N,) whole numbers or (N, classes) probabilities"
    return UserError(f"{file}: {what}; expected images (N, C, H, W), floats in [0, 1] or bytes, and {labels}")


def _checked(file: Path, images: Tensor, labels: Tensor, *, card: Card | None) -> SetFile:
    """Two tensors of any kind as images and labels. Raises UserError unless they can be."""
    must_fit(file, images.numel() + labels.numel())
    for x in (images, labels):
        if not is_plain(x):
            raise _refusal(file, f"holds a tensor of an unusual kind ({type(x).__name__}, {x.layout}, {x.device})")
    images, labels = images.detach(), labels.detach()
    if images.dim() != 4 or images.dtype not in (*FLOATS, torch.uint8) or not images.numel():
        raise _refusal(file, f"images are {images.dtype} of shape {tuple(images.shape)}")
    images = images if images.dtype == torch.uint8 else images.float()
    if labels.shape == images.shape[:1] and labels.dtype in INTEGERS:
        return SetFile(file, images, labels.long(), card=card)
    if not (labels.dim() == 2 and len(labels) == len(images) and labels.shape[1] and labels.dtype in FLOATS):
        raise _refusal(file, f"labels are {labels.dtype} of shape {tuple(labels.shape)} for {len(images)} images")
    labels = labels.float()
    if not labels.isfinite().all():
        raise _refusal(file, "soft labels hold NaN or infinity")
    return SetFile(file, images, labels.argmax(1), soft=labels, card=card)


def must_fit(file: Path, numbers: int, why: str = "") -> None:
    """Raise UserError when so many float32 numbers do not fit into memory. why: a reason besides the file's size."""
    need, free = 4 * numbers, free_memory(torch.device("cpu"))
    if need > SPARE_MEMORY * free:
        problem = f"needs {need / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free{why}"
        raise UserError(f"{file}: {problem}; it is damaged, no distilled set, or one for a larger machine")


def _read_safetensors(file: Path) -> SetFile:
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise UserError(f"{file}: cannot be read without safetensors; pip install safetensors") from error
    if not file.is_file():  # reading a pipe would wait for a writer
        raise UserError(f"{file}: {'is no regular file' if file.exists() else 'no such file'}; {REMEDY}")
    try:
        with safe_open(file, framework="pt", device="cpu") as content:
            names, header = list(content.keys()), content.metadata() or {}
            tensors = [content.get_tensor(name) for name in ("images", "labels") if name in names]
    except Exception as error:  # a broken header, broken JSON in it, types that PyTorch lacks
        raise UserError(f"{file}: is truncated or damaged ({first_line(error)}); {REMEDY}") from error
    if len(tensors) != 2:
        raise _refusal(file, f"holds {listed(names) or 'nothing'} in place of images and labels")
    return _checked(file, *tensors, card=_card_in(header, file))


def _card_in(header: dict[str, str], file: Path) -> Card | None:
    """The card in a header, if there is a valid one. Another is ignored with a warning, since nobody can take it out
    of the file."""
    if "card" not in header:
        return None
    try:
        return check_card(json.loads(header["card"][:CARD_BYTES]), file)  # cut off, a longer one is no JSON
    except (ValueError, RecursionError):
        log.warning("%s: the card in its header is no JSON, and is not used", file)
    except UserError as error:
        log.warning("%s; the card in its header is not used", error.problem)
    return None


def _read_folder(folder: Path) -> SetFile:
    """A set of image files DIR/CLASS/*; hidden files, and folders without images, do not count."""
    found = {name: image_files(str(folder / name), nested=False) for name in inside(str(folder))[0]}
    classes = {name: images for name, (images, _) in found.items() if images}
    files = [path for images in classes.values() for path in images]
    ignored = [path for name in classes for path in found[name][1]]
    if not files:
        raise UserError(f"{folder / DATA}: no such file, nor are there images in {folder}/CLASS/*; {REMEDY}")
    if ignored:
        log.warning("ignored, being no image file: %s (%d such files)", printable(ignored[0]), len(ignored))
    shown = printable(str(folder))
    heads = for_each(files, mode_and_size, what=f"looking at {shown}")
    side = heads[0][1][0]
    for path, (_, (w, h)) in zip(files, heads, strict=True):
        if (w, h) != (side, side):
            problem = f"is {w} x {h} pixels, the first image of the set is {side} pixels wide"
            raise UserError(f"{path}: {problem}; make all images squares of one size")
    channels = 1 if all(is_grey(mode) for mode, _ in heads) else 3
    must_fit(folder, len(files) * channels * side**2)
    labels = torch.arange(len(classes)).repeat_interleave(torch.tensor(list(map(len, classes.values()))))
    pixels = for_each(files, partial(read_image, channels=channels), what=f"reading {shown}")
    return SetFile(folder, torch.stack(pixels), labels, names=list(classes))


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
        raise _refusal(source.file, f"a label is {int(source.labels.min())}")
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
    spellings = [{name, safe_name(name), folder} for name, folder in zip(wanted, folder_names(wanted), strict=True)]
    times = Counter(spelling for own in spellings for spelling in own)
    known = {spelling: c for c, own in enumerate(spellings) for spelling in own if times[spelling] == 1}
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


def listed(names: Sequence[str], most: int = 5) -> str:
    """The first few names, separated by commas."""
    return ", ".join(names[:most]) + (" ..." if len(names) > most else "")
