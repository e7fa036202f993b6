"""A distilled set on disk: data.pt with its images and labels, and data.json, its card, which says how to use it.

The card may come from anywhere: it is checked before anything in it is believed.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.files.atomic import CHECKSUM, parse_json
from utils.files.imagefiles import FULL
from utils.files.tensors import write_tensors
from utils.method.formation import BOUND
from utils.method.images import EPS, FLOAT32, UINT4, UINT8, pack, quantise, unpack
from utils.system.errors import UserError, printable

log = logging.getLogger("dream")

DATA, CARD = "data.pt", "data.json"
SNAPSHOTS = "data_*.pt"  # the set as it was after so many outer iterations, described by the same data.json
Card = dict[str, Any]


# --- data.pt and its snapshots ----------------------------------------------------------------------------------------


def save_set(file: Path, pixels: Tensor, store: str = FLOAT32) -> None:
    """Write data.pt, or a snapshot of the same form. pixels: (classes, ipc, C, H, W), clamped to [0, 1] here.

    store: one of STORES, to which pixels are rounded.
    """
    images = pixels.detach().flatten(0, 1).float().cpu().contiguous()
    labels = torch.arange(len(pixels)).repeat_interleave(pixels.shape[1])
    write_tensors(file, [as_stored(images, store), labels])


def storage(store: str | None, shape: Sequence[int]) -> Card:
    """The entries of a card that say how a file holds pixels. store: one of STORES, floats if it is not known; shape:
    of one image, (C, H, W)."""
    ranges: dict[str, list[float]] = {FLOAT32: [0.0, 1.0], UINT8: [0, 255], UINT4: [0, 15]}
    store = store or FLOAT32
    return {"store": store, "value_range": ranges[store], "shape": list(shape)}


def as_stored(images: Tensor, store: str) -> Tensor:
    """The tensor that a file holds for images (N, C, H, W) of floats in [0, 1]: of their shape, but for uint4."""
    images = quantise(images, store)
    return pack(images) if store == UINT4 else images


def unpacked(images: Tensor, card: Mapping[str, Any] | None, file: Path) -> Tensor:
    """Images (N, C, H, W) uint8 of a file's tensor (N, bytes), which holds two pixels in a byte.

    Raises UserError unless the card's shape of an image says that it does.
    """
    shape = None if card is None else card.get("shape")
    right = isinstance(shape, list) and len(shape) == 3 and all(type(size) is int and size > 0 for size in shape)
    if shape is None or not right or images.shape[1] != (math.prod(shape) + 1) // 2:
        says = f"no {CARD} says of what shape" if card is None else f"the card's shape is {str(shape)[:100]}"
        raise UserError(
            f"{file}: images are {images.dtype} of shape {tuple(images.shape)}: pixels of 4 bits, two in a byte, or no "
            f"images (N, C, H, W), and {says}; put the {CARD} of its run beside it"
        )
    return unpack(images, shape)


def store_of(card: Mapping[str, Any]) -> str:
    """How a card says that pixels are stored: as float32 where it says nothing."""
    return str(card.get("store", FLOAT32))


def snapshot_name(iteration: int) -> str:
    """File name of the set after so many outer iterations."""
    return SNAPSHOTS.replace("*", f"{iteration:06}")


def snapshot_iteration(file: Path) -> int | None:
    """The outer iteration in a snapshot's file name, data_000040.pt or IDC's data40.pt; None for other names."""
    number = re.fullmatch(r"data_?([0-9]{1,9})\.pt", file.name)
    return None if number is None else int(number[1])


def newest_distilled(results: Path, *, dataset: str | None, factor: int | None, ipc: int | None) -> Path:
    """The run folder with the newest data.pt that fits. Raises UserError when there is none."""
    fitting = []
    for file in results.glob(f"{dataset or '*'}/*/{DATA}"):
        try:
            card = parse_json(file.with_name(CARD))[0] if file.with_name(CARD).exists() else {}
        except UserError as error:
            log.warning("%s; passed over", error.problem)
            continue
        if factor in (None, card.get("factor")) and ipc in (None, card.get("ipc")):
            fitting.append(file)
    if not fitting:
        wanted = [f"{k} {v}" for k, v in (("data set", dataset), ("factor", factor), ("ipc", ipc)) if v is not None]
        what = f" with {', '.join(wanted)}" if wanted else ""
        raise UserError(f"{results}: holds no distilled set{what}; make one with condense.py, or name a data.pt")
    return max(fitting, key=lambda file: file.stat().st_mtime).parent


# --- A card in words --------------------------------------------------------------------------------------------------

WHITENING = (
    f"then ZCA-whitened: without the mean image, flattened, times (covariance + {EPS:g} I)^(-1/2), mean image and "
    "covariance being those of the real training images so normalised"
)


def is_whitened(card: Mapping[str, Any]) -> bool:
    """Whether networks see the set ZCA-whitened."""
    return card.get("settings", {}).get("whiten") == "zca"


def title(card: Mapping[str, Any]) -> str:
    """The data set's name, for images of one's own their folder's or file's; fit for a cell of a Markdown table."""
    name = card["dataset"]
    if place := card.get({"folder": "image_folder", "npz": "npz"}.get(name, "")):
        name = Path(place).name.removesuffix(".npz")
    return table_cell(name)


def table_cell(value: object) -> str:
    """Anything as one line that does not end a cell of a Markdown table."""
    return printable(" ".join(str(value).split())).replace("|", "\\|")


def how_to_use(card: Mapping[str, Any], side: int) -> str:
    """One sentence for somebody who has nothing but the file. side: of the stored images, in pixels."""
    f, norm = card["factor"], card["normalization"]
    which = {
        "multi": f" for each n from {f} down to 1",
        "bound": f" with n = {f} for as many of a class's images as keep it within {BOUND}, smaller n for the others",
    }.get(card["decode_type"], f" with n = {f}")
    decode = f"cut every image into n x n cells{which}, enlarge each cell bilinearly to {side} x {side}, "
    whitened = f"; {WHITENING}" if is_whitened(card) else ""
    low, high = card.get("grey_range", FULL)
    deep = f"; of real images of 16 bits, {low} is 0 here and {high} is 1" if "grey_range" in card else ""
    return (
        f"{title(card)}, distilled: {_reading(card)}, not normalised; {decode if f > 1 else ''}subtract the mean "
        f"{norm['mean']} and divide by the standard deviation {norm['std']} of each channel{whitened}{deep}"
    )


def _reading(card: Mapping[str, Any]) -> str:
    """How the file's images become floats in [0, 1]."""
    store, shape = store_of(card), card.get("shape")
    if store == UINT4 and isinstance(shape, list):
        unpacking = "torch.stack([images >> 4, images & 15], 2).flatten(1)"
        sizes = ", ".join(map(str, shape))
        return (
            f"images hold two pixels of 4 bits in a byte, the first in its upper half; {unpacking}[:, :"
            f"{math.prod(shape)}].reshape(-1, {sizes}) / 15 are images (N, {sizes}) in [0, 1]"
        )
    return "images are bytes, and divided by 255 in [0, 1]" if store == UINT8 else "images are in [0, 1]"


# --- Where its real images come from ----------------------------------------------------------------------------------

# Ids of data sets on the Hugging Face Hub; a name without a slash is that of a data set elsewhere.
SOURCES = {
    "mnist": "ylecun/mnist",
    "fashion": "zalando-datasets/fashion_mnist",
    "svhn": "ufldl-stanford/svhn",
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "tinyimagenet": "zh-plus/tiny-imagenet",
    "imagenette": "frgfm/imagenette",
    "imagewoof": "frgfm/imagewoof",
    "digits": "UCI Optical Recognition of Handwritten Digits (scikit-learn)",
}
NAME_CHARACTERS, MOST_SOURCES = 200, 20  # longer entries, and more of them, are no names


def source_datasets(card: Mapping[str, Any]) -> list[str]:
    """Names of the data sets that a set was distilled from: the card's own, or what its data set says.

    Older cards do not hold them, and a card may say anything.
    """
    names = card.get("source_datasets")
    if isinstance(names, list) and 0 < len(names) <= MOST_SOURCES:
        fit = [isinstance(x, str) and x.isprintable() and 0 < len(x.strip()) <= NAME_CHARACTERS for x in names]
        if all(fit):
            return names
    place = card.get("image_folder") or card.get("npz")
    return [SOURCES.get(card["dataset"]) or (Path(place).name if place else "") or card["dataset"]]


# --- Reading without trust --------------------------------------------------------------------------------------------

CARD_BYTES = 2**24  # a larger data.json is no card, and would take many times its size in memory
LARGE = 1e6  # beyond what mean and standard deviation of pixels are
FIELDS: dict[str, type | tuple[type, ...]] = {  # that evaluation needs, with their types
    "dataset": str,
    "ipc": int,
    "factor": int,
    "decode_type": str,
    "normalization": dict,
    "settings": dict,
    "image_folder": (str, type(None)),
    "npz": (str, type(None)),
}


def load_card(file: Path) -> Card:
    """The content of a data.json, whatever it holds; if it was edited since it was written, this gives a warning.

    Raises UserError when it holds no JSON object.
    """
    if file.stat().st_size > CARD_BYTES:
        raise UserError(f"{file}: is too large to describe a set; move it away and describe the set with -d and -f")
    card, unchanged = parse_json(file)
    if not unchanged:
        log.warning("%s: was changed since it was written (its %s differs); used as it is now", file, CHECKSUM)
    return card


def check_card(card: object, file: Path) -> Card:
    """The card, if it holds what evaluation needs. Raises UserError, naming the file that it is from, otherwise."""
    known = card if isinstance(card, dict) else {}
    wrong = [name for name, kind in FIELDS.items() if not isinstance(known.get(name), kind)]
    if not wrong:
        mean, std = known["normalization"].get("mean"), known["normalization"].get("std")
        lists = isinstance(mean, list) and isinstance(std, list) and 0 < len(mean) == len(std)
        if (
            not lists
            or not all(type(v) in (int, float) and abs(v) <= LARGE for v in mean + std)
            or min(std) <= 1 / LARGE
        ):
            wrong = ["normalization"]
        elif not isinstance(known.get("normalized", False), bool):
            wrong = ["normalized"]
        elif not _is_range(known.get("grey_range", list(FULL))):
            wrong = ["grey_range"]
    if wrong:
        raise UserError(f"{file}: lacks a valid {wrong[0]!r}; move the file away and describe the set with -d and -f")
    return known


def _is_range(value: Any) -> bool:
    """Whether a value of JSON is a range of 16-bit numbers."""
    whole = isinstance(value, list) and len(value) == 2 and all(type(end) is int for end in value)
    return whole and FULL[0] <= value[0] < value[1] <= FULL[1]
