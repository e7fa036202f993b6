"""Distilled sets in files, ours and other people's: read without trust, whatever their ranges and classes mean.

    source = read(path)      # types and shapes are checked; its card may name the data set

A set may be a run folder or .pt file with [images, labels] or what else utils/runs/contents.py finds in it, a .npz or
.safetensors file with both, the latter perhaps with a card in its header, two files with images and labels, several
files that are parts of one set, or a folder of class folders with image files. utils/runs/sets.py says what its numbers
mean.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from utils.files.imagefiles import (
    for_each,
    grey_range_of,
    image_files,
    inside,
    is_deep,
    is_grey,
    mode_and_size,
    read_image,
)
from utils.files.npz import load_arrays
from utils.files.tensors import is_plain, read_tensors
from utils.files.untrusted import must_fit, readable
from utils.method.images import FLOAT32, UINT4, UINT8, Normalize
from utils.runs.card import CARD, CARD_BYTES, DATA, Card, check_card, load_card, unpacked
from utils.runs.contents import HELD_OUT, IMAGES, LABELS, RATES, WORDS, Found, find, number, shown, words
from utils.system.errors import UsageError, UserError, first_line, printable

log = logging.getLogger("dream")

SAFETENSORS, NUMPY = ".safetensors", (".npz", ".npy")
SUFFIXES = (".pt", ".pth", ".tar", ".ckpt", ".pkl", ".pickle", *NUMPY, SAFETENSORS)
REMEDY = "name a run folder, a .pt, .npz or .safetensors file, or a folder with images in DIR/CLASS/*"
RATE_NOT_USED = "%s: holds a learning rate of %.4g, which is not used; --lr sets one"
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True)
class SetFile:
    """What a file says of a distilled set: types and shapes are checked, ranges and classes are not yet."""

    file: Path  # the file or folder that messages name
    images: Tensor  # (N, C, H, W) float32 or uint8, in whatever range
    labels: Tensor  # (N,) int64: the class, the most probable one of `soft`, or the position in `names`
    soft: Tensor | None = None  # (N, classes) float32, probabilities or logits
    card: Card | None = None
    names: list[str] | None = None  # names of the class folders
    packed: bool = False  # the file holds two pixels of 4 bits in a byte

    @property
    def card_file(self) -> Path:
        """The file that the card is in, or would be."""
        if self.names is not None:
            return self.file / CARD
        return self.file if self.file.suffix.lower() == SAFETENSORS else self.file.with_name(CARD)

    @property
    def in_run_folder(self) -> bool:
        """Whether the set lies in a folder with a data.json, where results about it can be kept."""
        return self.card is not None and self.card_file.name == CARD

    @property
    def store(self) -> str:
        """How the file holds pixels, one of STORES."""
        return UINT4 if self.packed else UINT8 if self.images.dtype == torch.uint8 else FLOAT32

    @property
    def normalize(self) -> Normalize | None:
        """The normalisation that the images went through, as the card says; None for plain pixels."""
        if self.card is None or not self.card.get("normalized", False):
            return None
        return Normalize(self.card["normalization"]["mean"], self.card["normalization"]["std"])


def read(path: Path | Sequence[Path], *, experiment: int | None = None) -> SetFile:
    """Read a set in any of the forms above, from one file or folder, or from several files that together are one set.

    experiment: which set of a file with several, from 0; the last by default. Raises UserError for everything else.
    """
    paths = [path] if isinstance(path, Path) else list(path)
    try:
        if len(paths) > 1:
            for folder in filter(Path.is_dir, paths):
                raise UserError(f"{folder}: is a folder; only files are parts of one set; evaluate one after the other")
            return _joined([_read_file(file, experiment) for file in paths])
        file = _file_in(paths[0]) if paths[0].is_dir() else paths[0]
        if file is not None:
            return _checked(_completed(_read_file(file, experiment)))
    except OSError as error:
        raise UserError(f"{paths[0]}: cannot be read ({error.strerror or first_line(error)}); {REMEDY}") from error
    if experiment is not None:
        raise UsageError(f"--experiment {experiment}: {paths[0]} is a folder of images")
    return _read_folder(paths[0])


class Part(NamedTuple):
    """What one file holds: a set, or one half of it."""

    file: Path
    found: Found
    card: Card | None = None


# --- One file ---------------------------------------------------------------------------------------------------------


def _read_file(file: Path, experiment: int | None) -> Part:
    """The set in a file, or its half of one. Raises UserError, saying what there is, when nothing looks like it."""
    card_file, kind = file.with_name(CARD), file.suffix.lower()
    card: Card | None = None
    content: Any
    if file.is_file():
        must_fit(file, 4 * file.stat().st_size)  # a copy of each byte is checked, and unpacked
    if kind == SAFETENSORS:
        content, card = _read_safetensors(file)
    elif kind in NUMPY:
        content = load_arrays(file, REMEDY)
    else:
        content = read_tensors(file, REMEDY)
        card = check_card(load_card(card_file), card_file) if card_file.exists() else None
    sets = find(content)
    if not sets:
        raise refusal(file, f"holds {shown(content)}")
    if experiment is not None and experiment >= len(sets):
        raise UsageError(f"--experiment {experiment}: {file} holds {len(sets)}, counted from 0")
    which = len(sets) - 1 if experiment is None else experiment
    if len(sets) > 1:
        taken = f"experiment {which}{', the last,' if experiment is None else ''} is taken"
        log.info("%s: holds %d sets; %s; --experiment N takes another, from 0", file, len(sets), taken)
    if (rate := sets[which].rate) is not None:
        log.info(RATE_NOT_USED, file, rate)
    return Part(file, sets[which], card)


def _file_in(folder: Path) -> Path | None:
    """The file of a folder that holds its set, or the images of it; None for a folder of class folders."""
    if (folder / DATA).exists():
        return folder / DATA
    files, folders = [], False
    for path in sorted(folder.iterdir()):
        folders |= path.is_dir() and not path.name.startswith(".")
        files += [path] if path.suffix.lower() in SUFFIXES and path.is_file() else []
    images = [file for file in files if _role(file) == IMAGES and _partner(file, files)]
    if images:
        images.sort(key=lambda file: ("zca" not in words(file.stem), "best" in words(file.stem), _numbers_in(file)))
        if len(images) > 1:
            others = listed([file.name for file in images[:-1]])
            log.info("%s: %s is taken; name the file to take another: %s", folder, images[-1].name, others)
        return images[-1]
    if folders or not files:
        return None
    if len(files) > 1:
        there = listed([file.name for file in files])
        raise UserError(f"{folder / DATA}: no such file; name one of {there}, or several that together are one set")
    return files[0]


# --- Two halves, and parts --------------------------------------------------------------------------------------------


def _role(file: Path) -> str | None:
    """What a file's name says that it holds: images, labels, or nothing."""
    named = [role for role in WORDS if words(file.stem) & WORDS[role]]
    return named[0] if len(named) == 1 and not words(file.stem) & HELD_OUT else None


def _rest(file: Path) -> tuple[set[str], str]:
    """What the names of two halves have in common: images_zca_best.pt belongs to labels_best.pt."""
    return words(file.stem) - WORDS[IMAGES] - WORDS[LABELS] - {"zca"}, file.suffix.lower()


def _numbers_in(file: Path) -> list[int]:
    return [int(word) for word in re.findall("[0-9]{1,9}", file.stem)]


def _partner(file: Path, files: Iterable[Path]) -> Path | None:
    """The file with the other half of a set, by its name."""
    other = {IMAGES: LABELS, LABELS: IMAGES}.get(_role(file) or "")
    fitting = [there for there in files if _role(there) == other and _rest(there) == _rest(file)]
    return min(fitting, key=lambda there: (len(there.name), there.name)) if other and fitting else None


def _completed(part: Part) -> Part:
    """A set, half of which may be in the file beside it that is named like it."""
    if part.found.whole:
        return part
    if not _halves(part):
        raise refusal(part.file, "holds a single number")
    file = _partner(part.file, sorted(part.file.parent.iterdir()))
    if file is None:
        missing = IMAGES if part.found.images is None else LABELS
        problem = f"holds {_seen(part)} and no {missing}, and no file beside it is named like it"
        raise UserError(f"{part.file}: {problem}; name both files, or call them images_X.pt and labels_X.pt")
    log.info("%s: goes with %s", part.file, file.name)
    for rate in part.file.parent.glob("*.pt"):
        if words(rate.stem) & RATES and _rest(rate)[0] - RATES == _rest(part.file)[0]:
            with suppress(UserError):
                if (value := number(read_tensors(rate, REMEDY))) is not None:
                    log.info(RATE_NOT_USED, rate, value)
    return _matched(part, _read_file(file, None))


def _matched(first: Part, second: Part) -> Part:
    """Two halves in any order as one part. Raises UserError when they are two of the same."""
    for images, labels in ((first, second), (second, first)):
        if images.found.labels is None and labels.found.images is None:
            return Part(images.file, Found(images.found.images, labels.found.labels), images.card)
    raise UserError(f"{first.file}: does not belong to {second.file} ({_seen(first)}; {_seen(second)}); {REMEDY}")


def _halves(part: Part) -> dict[str, Tensor]:
    halves = {IMAGES: part.found.images, LABELS: part.found.labels}
    return {name: x for name, x in halves.items() if x is not None}


def _seen(part: Part) -> str:
    return " and ".join(f"{name} ({shown(x)})" for name, x in _halves(part).items())


def _joined(parts: Sequence[Part]) -> SetFile:
    """Several files as one set, one after the other; halves are matched in the order in which they are given."""
    for part in parts:
        if part.card is not None:
            raise UserError(f"{part.file}: is a set of its own, with a {CARD}; evaluate one after the other")
    parts = [part for part in parts if not _is_rate(part)] or parts[:1]
    halves = [[p for p in parts if p.found.labels is None], [p for p in parts if p.found.images is None]]
    if not halves[1]:
        parts = [_completed(part) for part in parts]
    elif len(halves[0]) == len(halves[1]) and 2 * len(halves[0]) == len(parts):
        parts = [_matched(*pair) for pair in zip(*halves, strict=True)]
    else:
        counts = f"{len(halves[0])} files hold images alone, {len(halves[1])} labels alone"
        raise UserError(f"{parts[0].file} and others: {counts}; name as many of both, or only files with both")
    sets = [_checked(part) for part in parts]
    first = sets[0]
    for other in sets[1:]:
        for what, a, b in (("images", first.images[0], other.images[0]), ("labels", _row(first), _row(other))):
            if (a.shape, a.dtype) != (b.shape, b.dtype):
                problem = f"holds {what} of {shown(b)} each, {first.file.name} of {shown(a)}"
                raise UserError(f"{other.file}: {problem}; give parts of one set, or evaluate one after the other")
    must_fit(first.file, 4 * sum(part.images.numel() for part in sets))
    images, labels = (torch.cat([getattr(part, name) for part in sets]) for name in (IMAGES, LABELS))
    if len(sets) > 1:
        log.info("%d images of %d files are one set", len(images), len(sets))
    soft = None if first.soft is None else torch.cat([part.soft for part in sets if part.soft is not None])
    return SetFile(first.file, images, labels, soft=soft)


def _is_rate(part: Part) -> bool:
    """Whether a file holds nothing but a learning rate, or is named so: lr_best.pt is easily given with its set."""
    return not (part.found.whole or (_halves(part) and not words(part.file.stem) & RATES))


def _row(part: SetFile) -> Tensor:
    return part.labels[0] if part.soft is None else part.soft[0]


# --- Types and shapes -------------------------------------------------------------------------------------------------


def refusal(file: Path, what: str) -> UserError:
    labels = "labels, (N,) whole numbers or (N, classes) probabilities"
    return UserError(f"{file}: {what}; expected images (N, C, H, W), floats in [0, 1] or bytes, and {labels}")


def _checked(part: Part) -> SetFile:
    """Two tensors of any kind as images and labels. Raises UserError unless they can be."""
    file, (images, labels, _) = part.file, part.found
    assert images is not None and labels is not None
    must_fit(file, 4 * (images.numel() + labels.numel()))
    for x in (images, labels):
        if not is_plain(x):
            raise refusal(file, f"holds a tensor of an unusual kind ({type(x).__name__}, {x.layout}, {x.device})")
    images, labels = images.detach(), _as_labels(labels.detach())
    if packed := images.dim() == 2 and images.dtype == torch.uint8:
        images = unpacked(images, part.card, file)
    images = _as_images(file, images, len(labels))
    if labels.shape == images.shape[:1] and labels.dtype in INTEGERS:
        return SetFile(file, images, labels.long(), card=part.card, packed=packed)
    if not (labels.dim() == 2 and len(labels) == len(images) and labels.shape[1] and labels.dtype in FLOATS):
        raise refusal(file, f"labels are {labels.dtype} of shape {tuple(labels.shape)} for {len(images)} images")
    labels = labels.float()
    if not labels.isfinite().all():
        raise refusal(file, "soft labels hold NaN or infinity")
    return SetFile(file, images, labels.argmax(1), soft=labels, card=part.card, packed=packed)


def _as_images(file: Path, images: Tensor, count: int) -> Tensor:
    """Images (N, C, H, W), uint8 or float32. Whole numbers of other types become bytes, if they can only be that."""
    if images.dim() == 3 and len(images) == count:
        log.info("%s: images of shape %s are taken as grey ones, (N, H, W)", file, tuple(images.shape))
        images = images[:, None]
    if images.dim() == 4 and images.numel() and images.dtype in INTEGERS and images.dtype != torch.uint8:
        low, high = (int(x) for x in images.aminmax())
        if low < 0 or not 1 < high <= 255:
            raise refusal(file, f"images are {images.dtype} from {low} to {high}")
        images = images.to(torch.uint8)
    if images.dim() != 4 or images.dtype not in (*FLOATS, torch.uint8) or not images.numel():
        raise refusal(file, f"images are {images.dtype} of shape {tuple(images.shape)}")
    return images if images.dtype == torch.uint8 else images.float()


def _as_labels(labels: Tensor) -> Tensor:
    """Labels (N,) of whole numbers where they can be read as such: (N, 1), floats without fractions, one-hot rows."""
    if labels.dim() > 1 and labels.numel() == len(labels):
        labels = labels.flatten()
    if labels.dim() == 1 and labels.dtype in FLOATS and ((labels == labels.round()) & (labels.abs() < 2**31)).all():
        return labels.long()
    if labels.dim() == 2 and labels.numel() and labels.dtype in (*INTEGERS, torch.bool):
        ones = labels.long()
        if ones.min() == 0 and ones.max() == 1 and (ones.sum(1) == 1).all():
            return ones.argmax(1)
    return labels


# --- Other kinds of files ---------------------------------------------------------------------------------------------


def _read_safetensors(file: Path) -> tuple[dict[str, Tensor], Card | None]:
    """The tensors of a .safetensors file by name, and the card in its header."""
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise UserError(f"{file}: cannot be read without safetensors; pip install safetensors") from error
    with readable(file, REMEDY), safe_open(file, framework="pt", device="cpu") as content:
        header = content.metadata() or {}
        tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118  # no dict
    return tensors, _card_in(header, file)


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
    heads = for_each(files, mode_and_size, what=f"looking at {shown}", files=files)
    side = heads[0][1][0]
    for path, (_, (w, h)) in zip(files, heads, strict=True):
        if (w, h) != (side, side):
            problem = f"is {w} x {h} pixels, the first image of the set is {side} pixels wide"
            raise UserError(f"{path}: {problem}; make all images squares of one size")
    channels = 1 if all(is_grey(mode) for mode, _ in heads) else 3
    must_fit(folder, 4 * len(files) * channels * side**2)
    labels = torch.arange(len(classes)).repeat_interleave(torch.tensor(list(map(len, classes.values()))))
    deep = [path for path, (mode, _) in zip(files, heads, strict=True) if is_deep(mode)]
    grey_range = grey_range_of(deep, partial(for_each, what=f"measuring {shown}", files=files))
    pixels = for_each(files, partial(read_image, channels=channels, grey_range=grey_range), what=f"reading {shown}")
    return SetFile(folder, torch.stack(pixels), labels, names=list(classes))


def listed(names: Sequence[str], most: int = 5) -> str:
    """The first few names, separated by commas."""
    return ", ".join(names[:most]) + (" ..." if len(names) > most else "")
