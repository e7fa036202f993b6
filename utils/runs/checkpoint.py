"""State of another run, from which a run with other settings begins (--resume_from)."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from data import Dataset
from utils.files.tensors import is_plain
from utils.method.images import Whiten
from utils.runs import formats
from utils.runs.card import DATA, Card, snapshot_iteration
from utils.runs.folder import RunFolder, differing, valid_checkpoint
from utils.runs.layout import factor_warning
from utils.runs.sets import interpret, whitening_of
from utils.system.errors import UsageError, UserError

log = logging.getLogger("dream")

REMEDY = "--resume_from takes a run folder, its checkpoint.pt, checkpoint_previous.pt or data_<iteration>.pt, or a set"
MUST_AGREE = ("dataset", "ipc", "factor", "decode_type")  # without which the pixels would mean something else


class Earlier(NamedTuple):
    """Earlier state of another run; its outer iteration begins anew, since the network is another one here."""

    source: str  # path, for messages
    pixels: Tensor  # (classes, ipc, C, H, W)
    velocity: Tensor  # like pixels; zero from a snapshot, which does not hold it
    learned: dict[str, Tensor]  # what a method learns besides pixels; empty from a snapshot
    it: int  # number of finished outer iterations
    seconds: float  # of distilling so far; 0 from a snapshot


class Said(TypedDict, total=False):
    """What flags say of a set's pixels and labels, see `interpret`."""

    normalized: str | None
    whitened: str | None
    classes: Sequence[str] | None


def resumed_from(
    source: str | None, folder: RunFolder, shape: tuple[int, ...], dataset: Dataset, said: Said
) -> Earlier | None:
    """State that the run in a folder begins from by --resume_from; None without it, or once the run has checkpoints.

    shape: of the run's pixels, (classes, ipc, C, H, W). said: of a set that is no run of ours. Raises UserError or
    UsageError, naming the file, when there is no such state, when it does not fit, and when the run would overwrite it.
    """
    if source is None or folder.group.broadcast(lambda: bool(folder.checkpoints) and not folder.restart):
        return None
    # By all ranks, each of which has the images of some classes; what follows is up to rank 0.
    whitening = whitening_of(dataset, said.get("normalized")) if said.get("whitened") == "yes" else None

    path = Path(source)

    def fields() -> list[Any]:  # plain values, which ranks can send each other
        if folder.path.resolve() in (path.resolve(), *path.resolve().parents):
            raise UsageError(f"--resume_from {path}: is in this run's own folder; use --tag NAME for another")
        earlier = read_earlier(path, folder.options, dataset, said, whitening)
        if earlier.pixels.shape != shape:
            raise UsageError(
                f"--resume_from {path}: holds pixels of {tuple(earlier.pixels.shape)}, this run has {shape} "
                "(classes, images per class, channels, height, width); use the same -d, --ipc and --size"
            )
        if (it := earlier.it) >= folder.options["niter"]:
            raise UsageError(
                f"--resume_from {path}: is after outer iteration {it} already; use --niter {it + 1} or more"
            )
        return list(earlier)

    return Earlier(*folder.group.broadcast(fields))


def read_earlier(
    path: Path, options: Mapping[str, Any], dataset: Dataset, said: Said | None = None, whitening: Whiten | None = None
) -> Earlier:
    """State in a run folder (the newest), checkpoint, snapshot or anybody's set, for a run with these options.

    Raises UserError or UsageError, naming the file, when there is none, or when it is of another kind of set.
    """
    said = said or {}
    if path.is_dir():
        folder = RunFolder(path)
        saved = folder.read_newest()
        for flaw in folder.flaws:
            log.warning("%s", flaw)
        if saved is not None:
            return _of_checkpoint(path, saved, options, said)
    elif path.name.startswith("checkpoint"):
        return _of_checkpoint(path, _checkpoint(path), options, said)
    try:
        source = formats.read(path)
    except UserError as error:
        try:
            saved = valid_checkpoint(path)  # of another name
        except (OSError, UserError):
            raise UserError(f"{error.problem}; {REMEDY}") from error
        return _of_checkpoint(path, saved, options, said)
    if source.card is not None:
        _must_agree(path, source.card, options, said)
    content = interpret(source, dataset, **said, whitening=whitening)
    if source.card is None:
        warning = factor_warning(path, content.images, dataset.train.images.cpu(), factor=options["factor"])
        if warning is not None:
            log.warning("%s", warning)
    return _of_set(path, content.images, content.labels, source.card)


def _checkpoint(path: Path) -> dict[str, Any]:
    try:
        return valid_checkpoint(path)
    except UserError as error:
        raise UserError(f"{error.problem}; {REMEDY}") from error


def _of_checkpoint(path: Path, saved: dict[str, Any], options: Mapping[str, Any], said: Said) -> Earlier:
    """State in a checkpoint's content, which may be anybody's. Raises UserError or UsageError."""
    _must_agree(path, saved["record"]["options"], options, said)
    pixels, velocity, it, seconds = (saved.get(name, 0) for name in ("pixels", "velocity", "it", "seconds"))
    if not (_are_numbers(pixels, 5) and _are_numbers(velocity, 5) and pixels.shape == velocity.shape):
        raise UserError(f"{path}: holds no pixels; {REMEDY}")
    if type(it) is not int or it < 0 or not isinstance(seconds, float) or not 0 <= seconds < math.inf:
        raise UserError(f"{path}: does not say where it was; {REMEDY}")
    learned = saved.get("learned", {})
    if not isinstance(learned, dict) or not all(_are_numbers(x) for x in learned.values()):
        raise UserError(f"{path}: holds something else than numbers under `learned`; {REMEDY}")
    return Earlier(str(path), pixels, velocity, learned, it, seconds)


def _of_set(path: Path, images: Tensor, labels: Tensor, card: Card | None) -> Earlier:
    """State in a set, at the iteration in its file's name, or in its card; otherwise at the beginning.

    Raises UserError unless all classes have equally many images.
    """
    counts = labels.bincount()
    if counts.min() != counts.max():
        raise UserError(
            f"{path}: its classes have {counts.min()} to {counts.max()} images; a run begins with equally many of each"
        )
    pixels = images[labels.argsort(stable=True)].unflatten(0, (len(counts), -1)).contiguous()
    it = snapshot_iteration(path)
    if it is None and card is not None and (path.is_dir() or path.name == DATA):
        it = card.get("outer_iterations")
    it = it if type(it) is int and it >= 0 else 0
    return Earlier(str(path), pixels, torch.zeros_like(pixels), {}, it, 0.0)


def _must_agree(path: Path, there: Mapping[str, Any], here: Mapping[str, Any], said: Said) -> None:
    """Check that two runs have the same kind of set: the options in MUST_AGREE, and nothing is said of the other one.

    Raises UsageError.
    """
    if flags := [f"--{name}" for name, value in said.items() if value]:
        raise UsageError(f"--resume_from {path}: is described by its own run; leave {' and '.join(flags)} out")
    if differ := differing(there, here, MUST_AGREE, prefix="--"):
        raise UsageError(f"--resume_from {path}: is of another kind of set ({differ})")


def _are_numbers(x: Any, dimensions: int | None = None) -> bool:
    """Whether x is a contiguous float32 tensor, of so many dimensions if given, without NaN and infinity."""
    sound = is_plain(x) and x.dtype == torch.float32 and x.is_contiguous() and dimensions in (None, x.dim())
    return sound and bool(x.isfinite().all())
