"""Files that a run leaves: written whole or not at all, described by themselves, read without trust."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.files import tensors as tensorfile
from utils.system.errors import UserError, first_line

log = logging.getLogger("dream")

DATA, CARD = "data.pt", "data.json"
SNAPSHOTS = "data_*.pt"  # the set as it was after so many outer iterations, described by the same data.json


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Whatever the system refuses inside the block is about this file, which its errors often do not say."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise


def write_atomically(path: Path, content: bytes, *, previous: Path | None = None) -> None:
    """Replace a file in one step: after a crash at any moment it holds the old content or the new one.

    previous: where the old content stays. A crash can leave it there alone, before the new content is at its place.
    What a killed process leaves is one hidden file beside it, which the next write takes over. Raises OSError, naming
    the file.
    """
    temporary = path.with_name(f".{path.name}.part")
    with naming(path):
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            if previous is not None and path.exists():
                os.replace(path, previous)
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):  # of the two errors the first one counts
                temporary.unlink()
            raise
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def make_folder(path: Path) -> None:
    """Raises UserError when the folder cannot be made or written into."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):  # which never has a name that could stay behind
            pass
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another --results_dir") from error


# --- JSON -------------------------------------------------------------------------------------------------------------

CHECKSUM = "sha256"  # the last entry of a file: of all others, so that a flipped bit is noticed


def checksum(content: Any) -> str:
    """Of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """With a checksum. Raises OSError, naming the file."""
    write_atomically(path, (json.dumps({**content, CHECKSUM: checksum(content)}, indent=2) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """Raises UserError, naming the file, when it is no JSON object or contradicts its checksum, if it has one."""
    try:
        if path.exists() and not path.is_file():  # a pipe would have us wait
            raise OSError("no regular file")
        found = json.loads(path.read_text(encoding="utf-8"))
        claimed = found.pop(CHECKSUM, None) if isinstance(found, dict) else None
        right = claimed is None or claimed == checksum(found)
    except (OSError, ValueError, RecursionError) as error:
        reason = first_line(error)
        raise UserError(f"{path}: cannot be read ({reason}); restore it, or begin again with --restart") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: holds no JSON object; restore it, or begin again with --restart")
    if not right:
        raise UserError(
            f"{path}: is damaged, or was changed since it was written (its {CHECKSUM} differs); restore it, or delete "
            "that entry if the change is meant"
        )
    return found


# --- Tensors ----------------------------------------------------------------------------------------------------------


def write_tensors(path: Path, content: Any, *, previous: Path | None = None) -> None:
    """torch.save, atomically and with the same bytes for the same content; `previous` as in write_atomically."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, buffer.getvalue(), previous=previous)


def read_tensors(path: Path, remedy: str) -> Any:
    """What write_tensors wrote; no code from the file is run, and its checksums are compared. Raises UserError with the
    remedy for anything unreadable."""
    try:
        return tensorfile.load(path)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; {remedy}") from error
    except tensorfile.Refused as error:
        raise UserError(
            f"{path}: holds pickled objects other than tensors, which could run code: refused ({error}); {remedy}"
        ) from error
    except Exception as error:  # zip, pickle and storage errors of any kind
        raise UserError(f"{path}: is truncated or damaged ({first_line(error)}); {remedy}") from error


# --- Distilled sets ---------------------------------------------------------------------------------------------------


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
