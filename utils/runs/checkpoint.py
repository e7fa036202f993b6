"""State of another run, from which a run with other settings begins (--resume_from)."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from utils.files.tensors import is_plain
from utils.runs.card import Card, snapshot_iteration
from utils.runs.folder import RunFolder, differing, valid_checkpoint
from utils.runs.sets import load_distilled
from utils.system.errors import UsageError, UserError

log = logging.getLogger("dream")

REMEDY = "--resume_from takes a run folder, or its checkpoint.pt, checkpoint_previous.pt or data_<iteration>.pt"
MUST_AGREE = ("dataset", "ipc", "factor", "decode_type")  # without which the pixels would mean something else


class Earlier(NamedTuple):
    """Earlier state of another run; its outer iteration begins anew, since the network is another one here."""

    source: str  # path, for messages
    pixels: Tensor  # (classes, ipc, C, H, W)
    velocity: Tensor  # like pixels; zero from a snapshot, which does not hold it
    learned: dict[str, Tensor]  # what --method mtt learns besides pixels; empty from a snapshot
    it: int  # number of finished outer iterations
    seconds: float  # of distilling so far; 0 from a snapshot


def resumed_from(source: str | None, folder: RunFolder, shape: tuple[int, ...]) -> Earlier | None:
    """State that the run in a folder begins from by --resume_from; None without it, or once the run has checkpoints.

    shape: of the run's pixels, (classes, ipc, C, H, W). Raises UserError or UsageError, naming the file, when there is
    no such state, when it does not fit, and when the run would overwrite it.
    """
    if source is None:
        return None
    fields = folder.group.broadcast(lambda: _fields(Path(source), folder, shape))
    return None if fields is None else Earlier(*fields)


def _fields(path: Path, folder: RunFolder, shape: tuple[int, ...]) -> list[Any] | None:
    """Fields of the Earlier at a path, as plain values that ranks can send each other."""
    if folder.checkpoints and not folder.restart:
        return None
    if folder.path.resolve() in (path.resolve(), *path.resolve().parents):
        raise UsageError(f"--resume_from {path}: is in this run's own folder; use --tag NAME for another")
    earlier = read_earlier(path, folder.options)
    if earlier.pixels.shape != shape:
        raise UsageError(
            f"--resume_from {path}: holds pixels of {tuple(earlier.pixels.shape)}, this run has {shape} "
            "(classes, images per class, channels, height, width); use the same -d, --ipc and --size"
        )
    if (it := earlier.it) >= folder.options["niter"]:
        raise UsageError(f"--resume_from {path}: is after outer iteration {it} already; use --niter {it + 1} or more")
    return list(earlier)


def read_earlier(path: Path, options: Mapping[str, Any]) -> Earlier:
    """State in a run folder (the newest), checkpoint or snapshot, for a run with these options.

    Raises UserError or UsageError, naming the file, when there is none, or when it is of another kind of set.
    """
    if path.is_dir():
        folder = RunFolder(path)
        saved = folder.read_newest()
        for flaw in folder.flaws:
            log.warning("%s", flaw)
        if saved is None:
            raise UserError(f"{path}: holds no checkpoint; {REMEDY}")
        return _of_checkpoint(path, saved, options)
    try:
        content = valid_checkpoint(path) if snapshot_iteration(path) is None else load_distilled(path)
    except UserError as error:
        raise UserError(f"{error.problem}; {REMEDY}") from error
    if isinstance(content, dict):
        return _of_checkpoint(path, content, options)
    return _of_snapshot(path, *content, options)


def _of_checkpoint(path: Path, saved: dict[str, Any], options: Mapping[str, Any]) -> Earlier:
    """State in a checkpoint's content, which may be anybody's. Raises UserError or UsageError."""
    _must_agree(path, saved["record"]["options"], options)
    pixels, velocity, it, seconds = (saved.get(name, 0) for name in ("pixels", "velocity", "it", "seconds"))
    if not (_are_numbers(pixels, 5) and _are_numbers(velocity, 5) and pixels.shape == velocity.shape):
        raise UserError(f"{path}: holds no pixels; {REMEDY}")
    if type(it) is not int or it < 0 or not isinstance(seconds, float) or not 0 <= seconds < math.inf:
        raise UserError(f"{path}: does not say where it was; {REMEDY}")
    learned = saved.get("learned", {})
    if not isinstance(learned, dict) or not all(_are_numbers(x, 1) and len(x) == 2 for x in learned.values()):
        raise UserError(f"{path}: holds something else than numbers under `learned`; {REMEDY}")
    return Earlier(str(path), pixels, velocity, learned, it, seconds)


def _of_snapshot(path: Path, images: Tensor, labels: Tensor, card: Card | None, options: Mapping[str, Any]) -> Earlier:
    """State in a snapshot, data_<iteration>.pt. Raises UserError or UsageError."""
    classes = int(labels.max()) + 1
    ipc = len(labels) // classes
    if not ipc or not torch.equal(labels, torch.arange(classes).repeat_interleave(ipc)):
        raise UserError(f"{path}: its classes do not have equally many images, one class after the other; {REMEDY}")
    if card is not None:
        _must_agree(path, card, options)
    pixels = images.unflatten(0, (classes, ipc))
    return Earlier(str(path), pixels, torch.zeros_like(pixels), {}, snapshot_iteration(path) or 0, 0.0)


def _must_agree(path: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Check that two runs have the same kind of set: the options in MUST_AGREE. Raises UsageError."""
    if differ := differing(there, here, MUST_AGREE, prefix="--"):
        raise UsageError(f"--resume_from {path}: is of another kind of set ({differ})")


def _are_numbers(x: Any, dimensions: int) -> bool:
    """Whether x is a contiguous float32 tensor of so many dimensions, without NaN and infinity."""
    sound = is_plain(x) and x.dtype == torch.float32 and x.is_contiguous() and x.dim() == dimensions
    return sound and bool(x.isfinite().all())
