"""Experts: networks trained on real images, whose parameters after every epoch are the trajectories that
utils/method/trajectory.py matches. They are trained once, stored in a folder, and shared by all runs that need the same ones.
"""

from __future__ import annotations

import json
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.files import atomic, tensors
from utils.files.lock import locked
from utils.files.tensors import is_plain
from utils.method.selection import Context, select
from utils.method.training import Trainer, batches
from utils.numerics.derivatives import flattened
from utils.runs.folder import CHECKPOINT_SECONDS
from utils.system.draws import Draws
from utils.system.errors import UserError, first_line

log = logging.getLogger("dream")

IDENTITY, LOCK = "experts.json", ".lock"
MEMORY = 2 * 10**9  # bytes of trajectories that are kept at hand
AGAIN = "run the same command again, which trains this expert again"


class Experts:
    """The trajectories in a folder. Made without writing anything; `held` is the first to write."""

    def __init__(self, folder: Path, identity: dict[str, Any], *, count: int, epochs: int) -> None:
        """identity: all that the trajectories depend on. Raises UserError when the folder has others."""
        self.folder, self.count, self.epochs = folder, count, epochs
        self.identity: dict[str, Any] = json.loads(json.dumps(identity))
        self._at_hand: OrderedDict[int, Tensor] = OrderedDict()  # the one that was used last at the end
        self._damaged: set[int] = set()
        self._check()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Make the folder and keep other processes out of it, after waiting for one that trains there; what is
        `missing` has to be asked afterwards. Raises UserError when it cannot be written or has other experts."""
        atomic.make_folder(self.folder)
        with locked(self.folder / LOCK, doing="training experts", wait=True):
            if not self._check():
                atomic.write_json(self.folder / IDENTITY, self.identity)
            yield

    def _check(self) -> bool:
        """Whether the folder says that it is ours. Raises UserError when it says otherwise."""
        file = self.folder / IDENTITY
        if not file.exists():
            return False
        try:
            there = atomic.read_json(file)
        except UserError as error:  # harmless: every expert's file says what it belongs to
            log.warning("%s; written again", str(error).split(";")[0])
            return False
        names = {*there, *self.identity}
        differ = [
            f"{name} {there.get(name)} there, {self.identity.get(name)} here"
            for name in sorted(names)
            if there.get(name) != self.identity.get(name)
        ]
        if differ:
            raise UserError(
                f"{self.folder}: holds other experts ({'; '.join(differ)}); use another folder, or delete this one"
            )
        return True

    # --- What is there ------------------------------------------------------------------------------------------------

    def missing(self) -> list[int]:
        """Numbers of the experts that are not there, or not to the end."""
        return [k for k in range(self.count) if self._epochs_done(k) < self.epochs]

    def done(self) -> int:
        """Epochs that need not be trained any more, of all experts."""
        return sum(max(0, self._epochs_done(k)) for k in range(self.count))

    @cached_property
    def seconds(self) -> float:
        """Of their training, all together, by whichever runs; once they are all there."""
        return sum(float(self._read(k)["seconds"]) for k in range(self.count))

    def pair(self, expert: int, start: int, end: int) -> tuple[Tensor, Tensor]:
        """An expert's parameters after so many epochs, (P,) each, on the CPU. Raises UserError for a damaged file."""
        if expert in self._at_hand:
            self._at_hand.move_to_end(expert)
        else:
            self._keep(expert, self._read(expert)["trajectory"])
        trajectory = self._at_hand[expert]
        return trajectory[start], trajectory[end]

    def _file(self, k: int) -> Path:
        return self.folder / f"expert_{k:03}.pt"

    def _of(self, k: int) -> str:
        """What a file of expert k belongs to."""
        return atomic.checksum([self.identity, k])

    def _read(self, k: int) -> dict[str, Any]:
        """The file of an expert. Raises UserError unless it is whole, and this expert's."""
        found = tensors.read_tensors(self._file(k), AGAIN)
        if not isinstance(found, dict) or found.get("of") != self._of(k):
            raise UserError(f"{self._file(k)}: is of another expert; {AGAIN}")
        if not self._fits(found.get("trajectory")) or not isinstance(found.get("seconds"), float):
            raise UserError(f"{self._file(k)}: holds no trajectory of {self.epochs} epochs; {AGAIN}")
        return found

    def _fits(self, rows: object) -> bool:
        """Whether it is a trajectory, (epochs done + 1, P)."""
        if not isinstance(rows, Tensor) or not is_plain(rows) or rows.dtype != torch.float32 or rows.dim() != 2:
            return False
        return 1 <= len(rows) <= self.epochs + 1 and bool(rows.isfinite().all())

    def _begun(self, k: int) -> dict[str, Any] | None:
        """The file of an expert if it is of use; one that is damaged is reported, once."""
        if not self._file(k).exists():
            return None
        try:
            return self._read(k)
        except UserError as error:
            self._report(k, error)
            return None

    def _report(self, k: int, error: UserError) -> None:
        if k not in self._damaged:
            log.warning("%s; trained again", str(error).split(";")[0])
        self._damaged.add(k)

    def _epochs_done(self, k: int) -> int:
        """-1 where nothing is there."""
        if k in self._at_hand:
            return self.epochs
        found = self._begun(k)
        if found is None:
            return -1
        trajectory: Tensor = found["trajectory"]
        if len(trajectory) == self.epochs + 1:
            self._keep(k, trajectory)
        return len(trajectory) - 1

    def _keep(self, k: int, trajectory: Tensor) -> None:
        """Of a finished expert, in place of those that have not been used for longest."""
        self._at_hand[k] = trajectory
        while sum(other.nbytes for other in self._at_hand.values()) > MEMORY and len(self._at_hand) > 1:
            self._at_hand.popitem(last=False)

    # --- Training -----------------------------------------------------------------------------------------------------

    def train(
        self,
        make: Callable[[int], Trainer],
        epoch: Callable[[Trainer, int, int], None],
        *,
        on_epoch: Callable[[int], None],
        stop: Callable[[], None],
    ) -> None:
        """Train what is missing, from wherever it is; while the folder is `held`.

        make(k): a fresh network of one expert. epoch(trainer, k, e): one epoch of it. on_epoch: told of each. stop:
        asked after each; what it raises goes on once the expert is saved. Raises UserError for numbers that left their
        range, OSError naming the file.
        """
        for k in self.missing():
            trainer, rows, spent = self._begin(k, make)
            began = saved = time.monotonic()
            for e in range(len(rows) - 1, self.epochs):
                epoch(trainer, k, e)
                rows.append(flattened(trainer.nets[0].parameters()).cpu())
                if not rows[-1].isfinite().all():
                    raise UserError(f"expert {k}: parameters are no numbers after epoch {e + 1}; use a lower --lr")
                on_epoch(1)
                try:
                    stop()
                except BaseException:
                    self._save(k, rows, trainer, spent + time.monotonic() - began)
                    raise
                if e + 1 == self.epochs or time.monotonic() - saved >= CHECKPOINT_SECONDS:
                    saved = time.monotonic()
                    self._save(k, rows, trainer, spent + saved - began)

    def _begin(self, k: int, make: Callable[[int], Trainer]) -> tuple[Trainer, list[Tensor], float]:
        """A trainer where its file ends, or a fresh one, the trajectory so far, and the seconds that it took."""
        trainer, found = make(k), self._begun(k)
        if found is not None:
            try:
                restore(trainer, found)
                if not torch.equal(flattened(trainer.nets[0].parameters()).cpu(), found["trajectory"][-1]):
                    raise ValueError("the trajectory ends elsewhere")
                return trainer, list(found["trajectory"]), float(found["seconds"])
            except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
                self._report(k, UserError(f"{self._file(k)}: does not fit ({first_line(error)})"))
                trainer = make(k)
        return trainer, [flattened(trainer.nets[0].parameters()).cpu()], 0.0

    def _save(self, k: int, rows: list[Tensor], trainer: Trainer, seconds: float) -> None:
        """What a trainer needs to go on is left out once it need not."""
        content: dict[str, Any] = {"of": self._of(k), "trajectory": torch.stack(rows), "seconds": seconds}
        if len(rows) <= self.epochs:
            content["net"] = {name: x.cpu() for name, x in trainer.nets[0].state_dict().items()}
            content["momentum"] = [velocity.cpu() for velocity in trainer.momentum]
        tensors.write_tensors(self._file(k), content)


def restore(trainer: Trainer, saved: dict[str, Any]) -> None:
    """Where a trainer of one network was."""
    trainer.nets[0].load_state_dict(saved["net"])
    for own, then in zip(trainer.momentum, saved["momentum"], strict=True):
        own.copy_(then)


# --- One epoch on real images -----------------------------------------------------------------------------------------


def representative_epoch(
    trainer: Trainer,
    context_of: Callable[[int], Context],
    strategy: str,
    *,
    interval: int,
    draws_of: Callable[[int], Draws],
) -> None:
    """As many mini-batches, of the same sizes, of images that a selection strategy finds under the network as it is.

    The images of `interval` mini-batches at a time are selected together, as many of every class, and their order is
    random. context_of, draws_of: given the number of the selection in this epoch.
    """
    edges = batches(len(trainer), trainer.recipe.batch_size)
    for number, first in enumerate(range(0, len(edges), interval)):
        count = edges[min(first + interval, len(edges)) - 1][1] - edges[first][0]
        context, draws = context_of(number), draws_of(number)
        found = select(context, -(-count // context.real.classes), strategy=strategy).flatten()
        trainer.epoch(found[draws.permutation(len(found))[:count]], [draws])
