"""Distilled sets in files, ours and other people's: read without trust, whatever their ranges and classes mean.

    source = read(path)      # types and shapes are checked; its card may name the data set

A set may be a run folder or .pt file with [images, labels], a .safetensors file with both and perhaps a card in its
header, or a folder of class folders with image files. utils/runs/sets.py says what its numbers mean.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from utils.files.imagefiles import for_each, image_files, inside, is_grey, mode_and_size, read_image
from utils.files.tensors import is_plain, must_fit, read_tensors
from utils.method.images import FLOAT32, UINT4, UINT8, Normalize
from utils.runs.card import CARD, CARD_BYTES, DATA, Card, check_card, load_card, unpacked
from utils.system.errors import UserError, first_line, printable

log = logging.getLogger("dream")

SAFETENSORS = ".safetensors"
REMEDY = "name a run folder, a .pt or .safetensors file, or a folder with images in DIR/CLASS/*"
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
        must_fit(file, 4 * file.stat().st_size)  # a copy of each byte is checked, and unpacked
    content = read_tensors(file, REMEDY)
    if not isinstance(content, (list, tuple)) or len(content) != 2 or not all(isinstance(x, Tensor) for x in content):
        raise refusal(file, "is not a list of two tensors")
    card_file = file.with_name(CARD)
    return _checked(file, *content, card=check_card(load_card(card_file), card_file) if card_file.exists() else None)


def refusal(file: Path, what: str) -> UserError:
    labels = "labels, (N,) whole numbers or (N, classes) probabilities"
    return UserError(f"{file}: {what}; expected images (N, C, H, W), floats in [0, 1] or bytes, and {labels}")


def _checked(file: Path, images: Tensor, labels: Tensor, *, card: Card | None) -> SetFile:
    """Two tensors of any kind as images and labels. Raises UserError unless they can be."""
    must_fit(file, 4 * (images.numel() + labels.numel()))
    for x in (images, labels):
        if not is_plain(x):
            raise refusal(file, f"holds a tensor of an unusual kind ({type(x).__name__}, {x.layout}, {x.device})")
    images, labels = images.detach(), labels.detach()
    if packed := images.dim() == 2 and images.dtype == torch.uint8:
        images = unpacked(images, card, file)
    if images.dim() != 4 or images.dtype not in (*FLOATS, torch.uint8) or not images.numel():
        raise refusal(file, f"images are {images.dtype} of shape {tuple(images.shape)}")
    images = images if images.dtype == torch.uint8 else images.float()
    if labels.shape == images.shape[:1] and labels.dtype in INTEGERS:
        return SetFile(file, images, labels.long(), card=card, packed=packed)
    if not (labels.dim() == 2 and len(labels) == len(images) and labels.shape[1] and labels.dtype in FLOATS):
        raise refusal(file, f"labels are {labels.dtype} of shape {tuple(labels.shape)} for {len(images)} images")
    labels = labels.float()
    if not labels.isfinite().all():
        raise refusal(file, "soft labels hold NaN or infinity")
    return SetFile(file, images, labels.argmax(1), soft=labels, card=card, packed=packed)


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
        raise refusal(file, f"holds {listed(names) or 'nothing'} in place of images and labels")
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
    must_fit(folder, 4 * len(files) * channels * side**2)
    labels = torch.arange(len(classes)).repeat_interleave(torch.tensor(list(map(len, classes.values()))))
    pixels = for_each(files, partial(read_image, channels=channels), what=f"reading {shown}")
    return SetFile(folder, torch.stack(pixels), labels, names=list(classes))


def listed(names: Sequence[str], most: int = 5) -> str:
    """The first few names, separated by commas."""
    return ", ".join(names[:most]) + (" ..." if len(names) > most else "")
