"""Experts: networks trained on real images. Their parameters after every epoch are the trajectories that --method mtt
matches (utils/method/trajectory.py); those before and after all epochs make a pool of networks (utils/method/pool.py).
They are trained once, kept in a folder, and shared by all runs that need them.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from models import Network
from utils.files import atomic, tensors
from utils.files.lock import locked
from utils.files.tensors import is_plain
from utils.method.training import Trainer
from utils.numerics.derivatives import flattened
from utils.runs.folder import CHECKPOINT_SECONDS, differing
from utils.system.errors import UserError, first_line

log = logging.getLogger("dream")

IDENTITY, LOCK = "experts.json", ".lock"
IMAGES = "images"  # entry of experts.json: digests of the images that the experts were trained on
MEMORY = 2 * 10**9  # bytes of trajectories that are kept at hand
AGAIN = "run the same command again, which trains this expert again"


class Experts:
    """The trajectories in a folder. Nothing is written before `held`."""

    def __init__(
        self,
        folder: Path,
        identity: dict[str, Any],
        *,
        count: int,
        epochs: int,
        ends_only: bool = False,
        images: int | None = None,
    ) -> None:
        """identity: everything that trajectories depend on. ends_only: of a trajectory keep its two ends, and what the
        network at its end makes of the training images. images: how many these are, if known. Raises UserError when the
        folder has other experts.
        """
        self.folder, self.count, self.epochs = folder, count, epochs
        self.ends_only, self.images = ends_only, images
        self.identity: dict[str, Any] = json.loads(json.dumps(identity))
        self._at_hand: dict[int, Tensor] = {}  # the last used one at the end
        self._damaged: set[int] = set()
        self._check()

    @contextmanager
    def held(self, images: Mapping[str, str] = MappingProxyType({})) -> Iterator[None]:
        """Make the folder and lock it, after waiting for any process that trains there, so that `missing` may have
        changed. Raises UserError when it cannot be written or has other experts.

        images: digests of the image files and of the training images, for experts.json; see `other_images`.
        """
        atomic.make_folder(self.folder)
        with locked(self.folder / LOCK, doing="training experts", wait=True):
            if not self._check():
                atomic.write_json(self.folder / IDENTITY, {**self.identity, IMAGES: dict(images)})
            yield

    def _check(self) -> bool:
        """Whether experts.json is there and names these experts. Raises UserError when it names others."""
        file = self.folder / IDENTITY
        if not file.exists():
            return False
        try:
            there = atomic.read_json(file)
            there.pop(IMAGES, None)
        except UserError as error:  # harmless: every expert's file says what it belongs to
            log.warning("%s; written again", error.problem)
            return False
        if differ := differing(there, self.identity, sorted({*there, *self.identity})):
            raise UserError(f"{self.folder}: holds other experts ({differ}); use another folder, or delete this one")
        return True

    # --- What is there ------------------------------------------------------------------------------------------------

    def missing(self) -> list[int]:
        """Numbers of the experts that are not trained to the end."""
        return [k for k in range(self.count) if self._epochs_done(k) < self.epochs]

    def done(self) -> int:
        """Epochs that are trained already, all experts together."""
        return sum(self._epochs_done(k) for k in range(self.count))

    @cached_property
    def seconds(self) -> float:
        """Seconds that training all experts has taken, whichever runs did it. All of them must be there."""
        return sum(float(self._read(k)["seconds"]) for k in range(self.count))

    def pair(self, expert: int, start: int, end: int) -> tuple[Tensor, Tensor]:
        """An expert's parameters after so many epochs, (P,) each, on the CPU; of ends only, after none and all.

        Raises UserError for a damaged file.
        """
        trajectory = self._at_hand.pop(expert, None)
        if trajectory is None:
            trajectory = self._read(expert)["trajectory"]
        self._keep(expert, trajectory)
        if self.ends_only:
            start, end = min(start, 1), min(end, 1)
        return trajectory[start], trajectory[end]

    def losses(self, k: int) -> Tensor:
        """Cross-entropy of every training image under expert k at its end, (N,), of ends only.

        Raises UserError for a damaged file.
        """
        losses: Tensor = self._read(k)["losses"]
        return losses

    def _file(self, k: int) -> Path:
        return self.folder / f"expert_{k:03}.pt"

    def _owner(self, k: int) -> str:
        """The checksum, in the file of expert k, of what it belongs to."""
        return atomic.checksum([self.identity, k])

    def _read(self, k: int) -> dict[str, Any]:
        """The content of an expert's file: its trajectory so far, (epochs done + 1, P), and more.

        Raises UserError unless it is whole and belongs to this expert.
        """
        content = tensors.read_tensors(self._file(k), AGAIN)
        if not isinstance(content, dict) or content.get("of") != self._owner(k):
            raise UserError(f"{self._file(k)}: is of another expert; {AGAIN}")
        rows = content.get("trajectory")
        plain = is_plain(rows) and rows.dtype == torch.get_default_dtype() and rows.dim() == 2
        most = 2 if self.ends_only else self.epochs + 1
        if rows is None or not plain or not 1 <= len(rows) <= most or not rows.isfinite().all():
            raise UserError(f"{self._file(k)}: holds no trajectory of {self.epochs} epochs; {AGAIN}")
        if self.ends_only and not (type(content.get("epochs")) is int and 1 <= content["epochs"] <= self.epochs):
            raise UserError(f"{self._file(k)}: does not say after how many epochs it was written; {AGAIN}")
        if self.ends_only and (len(rows) < 2 or not self._is_judged(content)):
            raise UserError(f"{self._file(k)}: lacks an end, or the losses of the training images; {AGAIN}")
        if not isinstance(content.get("seconds"), float):
            raise UserError(f"{self._file(k)}: does not say how long its training took; {AGAIN}")
        return content

    def _is_judged(self, content: dict[str, Any]) -> bool:
        """Whether a file of ends only holds a loss of every training image, if its expert is trained to the end."""
        losses = content.get("losses")
        if content["epochs"] < self.epochs:
            return losses is None
        if losses is None or not is_plain(losses) or losses.dim() != 1 or not losses.is_floating_point():
            return False
        return self.images in (None, len(losses)) and bool(losses.isfinite().all())

    def _read_if_whole(self, k: int) -> dict[str, Any] | None:
        """The content of an expert's file, or None where there is none or, after a warning, where it is damaged."""
        try:
            return self._read(k) if self._file(k).exists() else None
        except UserError as error:
            self._warn(k, error)
            return None

    def _warn(self, k: int, error: UserError) -> None:
        """Say once that an expert's file is damaged."""
        if k not in self._damaged:
            log.warning("%s; trained again", error.problem)
        self._damaged.add(k)

    def _epochs_done(self, k: int) -> int:
        """Epochs that an expert is trained already."""
        if k in self._at_hand:
            return self.epochs
        file = self._read_if_whole(k)
        if file is None:
            return 0
        if (done := self._epochs_of(file)) == self.epochs:
            self._keep(k, file["trajectory"])
        return done

    def _epochs_of(self, content: dict[str, Any]) -> int:
        """Epochs that the content of an expert's file has behind it."""
        return int(content["epochs"]) if self.ends_only else len(content["trajectory"]) - 1

    def _keep(self, k: int, trajectory: Tensor) -> None:
        """Keep a finished expert's trajectory in memory, in place of those that were not used for longest."""
        self._at_hand[k] = trajectory
        while sum(other.nbytes for other in self._at_hand.values()) > MEMORY and len(self._at_hand) > 1:
            del self._at_hand[next(iter(self._at_hand))]

    # --- Training -----------------------------------------------------------------------------------------------------

    def epochs_left(
        self,
        k: int,
        trainer: Trainer,
        stopping: Callable[[], object],
        judged: Callable[[Network], Tensor] | None = None,
    ) -> Iterator[int]:
        """Numbers of the epochs that expert k lacks: the caller trains each before it asks for the next.

            for e in experts.epochs_left(k, trainer, stopper.reason):
                trainer.all_images([draws(k, e)])

        Saves the trajectory every few minutes, at the end, and when `stopping` is true, which ends the iteration early.
        trainer: of one network, as initialised for this expert; it is brought to where the training goes on. judged:
        gives the loss of every training image under the network, (N,), for `losses`. The folder must be `held`. Raises
        UserError for parameters that are NaN or infinite, OSError naming the file.
        """
        rows, first, spent = self._resumed(k, trainer)
        began = saved = time.monotonic()
        for e in range(first, self.epochs):
            yield e
            rows[1 if self.ends_only else e + 1 :] = [flattened(trainer.nets[0].parameters()).cpu()]
            if not rows[-1].isfinite().all():
                raise UserError(f"expert {k}: parameters are NaN or infinite after epoch {e + 1}; use a lower --lr")
            now, stop = time.monotonic(), stopping()
            if stop or e + 1 == self.epochs or now - saved >= CHECKPOINT_SECONDS:
                losses = judged(trainer.nets[0]).cpu() if judged and e + 1 == self.epochs else None
                self._save(k, rows, e + 1, trainer, losses, spent + time.monotonic() - began)
                saved = now
            if stop:
                return

    def _resumed(self, k: int, trainer: Trainer) -> tuple[list[Tensor], int, float]:
        """The trajectory so far, its epochs, and the seconds that it took; the trainer is where it ends."""
        file = self._read_if_whole(k)
        if file is not None:
            initial = {name: x.clone() for name, x in trainer.nets[0].state_dict().items()}
            try:
                restore(trainer, file)
                if not torch.equal(flattened(trainer.nets[0].parameters()).cpu(), file["trajectory"][-1]):
                    raise ValueError("the trajectory ends elsewhere")
                return list(file["trajectory"]), self._epochs_of(file), file["seconds"]
            except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
                self._warn(k, UserError(f"{self._file(k)}: does not fit ({first_line(error)})"))
                restore(trainer, {"net": initial, "momentum": [torch.zeros_like(v) for v in trainer.momentum]})
        return [flattened(trainer.nets[0].parameters()).cpu()], 0, 0.0

    def _save(
        self, k: int, rows: list[Tensor], epochs: int, trainer: Trainer, losses: Tensor | None, seconds: float
    ) -> None:
        """Write an expert's file; a finished one leaves out what its training would need to go on."""
        content: dict[str, Any] = {"of": self._owner(k), "trajectory": torch.stack(rows), "seconds": seconds}
        if self.ends_only:
            content["epochs"] = epochs
        if losses is not None:
            content["losses"] = losses
        if epochs < self.epochs:
            content["net"] = {name: x.cpu() for name, x in trainer.nets[0].state_dict().items()}
            content["momentum"] = [velocity.cpu() for velocity in trainer.momentum]
        tensors.write_tensors(self._file(k), content)


def other_images(folder: Path, files: str, training_digest: Callable[[], str]) -> str | None:
    """Digest of the training images if the experts in a folder were trained on others; None if not, or if unknown.

    files: a digest of the image files; where it is as it was, the images are not read.
    """
    try:
        there = atomic.read_json(folder / IDENTITY).get(IMAGES)
    except UserError:  # there is none, or a damaged one
        return None
    if not isinstance(there, dict) or "training" not in there or not files or there.get("files") == files:
        return None
    digest = training_digest()
    if there["training"] == digest:
        return None
    log.info("%s: its experts were trained on other images than there are now; not used", folder)
    return digest


def restore(trainer: Trainer, saved: dict[str, Any]) -> None:
    """Bring a trainer of one network to where it was saved."""
    trainer.nets[0].load_state_dict(saved["net"])
    for own, then in zip(trainer.momentum, saved["momentum"], strict=True):
        own.copy_(then)
