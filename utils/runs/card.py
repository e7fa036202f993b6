"""data.json, the card of a distilled set: what the set is and how to use it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.files.atomic import read_json
from utils.files.tensors import write_tensors
from utils.system.errors import UserError

log = logging.getLogger("dream")

DATA, CARD = "data.pt", "data.json"
SNAPSHOTS = "data_*.pt"  # the set as it was after so many outer iterations, described by the same data.json


def save_set(file: Path, pixels: Tensor) -> None:
    """data.pt, or a snapshot of the same form. pixels: (classes, ipc, C, H, W), clamped to [0, 1] here."""
    images = pixels.detach().clamp(0, 1).flatten(0, 1).float().cpu().contiguous()
    labels = torch.arange(len(pixels)).repeat_interleave(pixels.shape[1])
    write_tensors(file, [images, labels])


CARD_BYTES = 2**24  # at most: a larger data.json is none, and would take many times its size in memory
LARGE = 1e6  # beyond what mean and standard deviation of pixels are
# What data.json must hold for train.py, and of what type.
CARD_FIELDS: dict[str, type | tuple[type, ...]] = {
    "dataset": str,
    "ipc": int,
    "factor": int,
    "decode_type": str,
    "normalization": dict,
    "settings": dict,
    "image_folder": (str, type(None)),
}


def read_card(file: Path) -> dict[str, Any]:
    """data.json's content. Raises UserError when something that evaluation needs is missing."""
    if file.stat().st_size > CARD_BYTES:
        raise UserError(f"{file}: is too large to describe a set; move it away and describe the set with -d and -f")
    return check_card(read_json(file), file)


def check_card(card: Any, file: Path) -> dict[str, Any]:
    """The card, if it holds what evaluation needs. Raises UserError, naming the file that it is from, otherwise."""
    known = card if isinstance(card, dict) else {}
    wrong = [name for name, kind in CARD_FIELDS.items() if not isinstance(known.get(name), kind)]
    if not wrong:
        mean, std = known["normalization"].get("mean"), known["normalization"].get("std")
        if not (_numbers(mean) and _numbers(std) and len(mean) == len(std) and min(std) > 1 / LARGE):
            wrong = ["normalization"]
        elif not isinstance(known.get("normalized", False), bool):
            wrong = ["normalized"]
    if wrong:
        raise UserError(f"{file}: lacks a valid {wrong[0]!r}; move the file away and describe the set with -d and -f")
    return known


def _numbers(values: object) -> bool:
    return (
        isinstance(values, list)
        and len(values) > 0
        and all(type(v) in (int, float) and abs(v) <= LARGE for v in values)
    )


def newest_distilled(results: Path, *, dataset: str | None, factor: int | None, ipc: int | None) -> Path:
    """The run folder with the newest data.pt that fits. Raises UserError when there is none."""
    fitting = []
    for file in results.glob(f"{dataset or '*'}/*/{DATA}"):
        try:
            card = read_json(file.with_name(CARD)) if file.with_name(CARD).exists() else {}
        except UserError as error:
            log.warning("%s; passed over", str(error).split(";")[0])
            continue
        if factor in (None, card.get("factor")) and ipc in (None, card.get("ipc")):
            fitting.append(file)
    if not fitting:
        wanted = [f"{k} {v}" for k, v in (("data set", dataset), ("factor", factor), ("ipc", ipc)) if v is not None]
        what = f" with {', '.join(wanted)}" if wanted else ""
        raise UserError(f"{results}: holds no distilled set{what}; make one with condense.py, or name a data.pt")
    return max(fitting, key=lambda file: file.stat().st_mtime).parent
