"""A run folder: all files of one command, from its options to its last picture.

What has been computed survives any end of the process, and damage to any one file: each of the two checkpoints holds
options.json and metrics.jsonl as well as the state, and all other results are made from the state.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from models import NetSpec
from utils.files import atomic, tensors
from utils.files.imagefiles import grid_png
from utils.files.lock import locked
from utils.method.evaluation import Score
from utils.runs import card as cards
from utils.runs.board import FOLDER as BOARD
from utils.runs.board import Board
from utils.system.distributed import SINGLE, Group, is_first, rank_zero_only
from utils.system.errors import UsageError, UserError
from utils.system.report import logged_to

log = logging.getLogger("dream")

OPTIONS, METRICS, LOG, LOCK = "options.json", "metrics.jsonl", "log.txt", ".lock"
CHECKPOINT, PREVIOUS = "checkpoint.pt", "checkpoint_previous.pt"
CHECKPOINT_SECONDS = 120.0  # between checkpoints at most, plus one inner step
OF_METRICS = "metrics_sha256"  # in a finished run's data.json
CONDITIONS = (
    "torch",
    "device",
    "threads",
    "precision",
    "deterministic",
    "network_update",
)  # of a session, on which rounding depends


class RunFolder:
    """The files of one run. Made without touching the disk; `check` reads, `held` is the first to write.

    Under torchrun, rank 0 alone reads and writes them, whichever rank calls.
    """

    def __init__(
        self,
        path: Path,
        options: Mapping[str, Any] = MappingProxyType({}),
        *,
        free: Collection[str] = (),
        resumable: Collection[str] = (),
        restart: bool = False,
        group: Group = SINGLE,
    ) -> None:
        """options: all options of the command, by name. free: names of those that may differ from the options of the
        run in the folder; resumable: of those that may differ until that run is finished. restart: delete that run.
        """
        self.path, self.options, self.restart, self.group = path, dict(options), restart, group
        self._free, self._resumable = free, resumable
        self.board = Board(None)
        self.flaws: list[str] = []  # that `check` found, and what is done about them
        self._record: dict[str, Any] = {}  # the content of options.json, once checked
        self._metrics = ""  # the content of metrics.jsonl
        self._saved = time.monotonic()

    @contextmanager
    def held(self, session: dict[str, Any]) -> Iterator[str]:
        """Make the folder, keep other processes out of it, and keep messages in its log.txt, while the block runs.

        session: what runs now, an entry of options.json. Yields what is there by now, as `check` does; a finished run
        is left as it is. Raises UserError, naming the process that works there.
        """
        with ExitStack() as stack:
            if is_first():
                atomic.make_folder(self.path)
                refusal = "wait for it or stop it, or keep both runs with --tag NAME"
                stack.enter_context(locked(self.path / LOCK, doing="condense.py", wait=False, refusal=refusal))
            status = self.check()
            if is_first() and status != "finished":
                self._create(session)
                stack.enter_context(logged_to(self.path / LOG))
            try:
                yield status
            finally:
                self.board.close()

    @rank_zero_only
    def open_board(self, goes_on_after: int | None) -> None:
        """Show what follows on TensorBoard as well."""
        self.board = Board(self.path, goes_on_after=goes_on_after)

    # --- What is there ------------------------------------------------------------------------------------------------

    def check(self) -> str:
        """`new`, `started` or `finished`. Raises UsageError when the folder belongs to another command.

        A finished run with damaged files counts as started: going on makes them again.
        """
        return self.group.broadcast(self._check)

    def _check(self) -> str:
        self.flaws, self._record = [], {}
        # Hidden files do not count: a process killed before its options.json was complete leaves such.
        if self.restart or not self.path.exists() or (self.path.is_dir() and not any(self.path.glob("[!.]*"))):
            return "new"
        record = self._found_record()
        if record is None:
            return "new"
        self._record, finished = record, self._finished()
        differ = [
            f"--{k} {record['options'].get(k)} there, {v} here"
            for k, v in json.loads(json.dumps(self.options)).items()
            if k not in self._free and not (k in self._resumable and not finished) and record["options"].get(k) != v
        ]
        if differ:
            remedy = "--tag NAME keeps both runs, --restart deletes the old one"
            raise UsageError(f"{self.path}: belongs to another command ({'; '.join(differ)}); {remedy}")
        return "finished" if finished and not self.flaws else "started"

    def _found_record(self) -> dict[str, Any] | None:
        """What options.json says, or in its place the checkpoint; None where neither was ever complete."""
        file = self.path / OPTIONS
        try:
            if file.exists():
                return _valid_record(atomic.read_json(file), str(file))
            flaw = f"{file}: is missing"
        except UserError as error:
            flaw = str(error)
        saved = self.newest()
        if saved is not None:
            self.flaws.append(f"{flaw.split(';')[0]}; made again from the checkpoint")
            return saved["record"]
        if not file.exists():
            raise UsageError(
                f"{self.path}: is not empty and no run folder; --tag NAME uses another, --restart this one"
            )
        if (self.path / cards.DATA).exists():
            raise UserError(f"{flaw}; --tag NAME uses another folder, --restart deletes the results in this one")
        self.flaws.append(f"{flaw.split(';')[0]}; nothing had been saved yet, so the run begins again")
        return None

    def _finished(self) -> bool:
        """Whether the results are complete; what is wrong with them otherwise is a flaw."""
        card = self.path / cards.CARD
        if not card.exists():
            return False
        again = "made again from the checkpoint"
        try:
            about = atomic.read_json(card)
            if not about.get("finished"):
                return False
            tensors.read_tensors(self.path / cards.DATA, again)
        except UserError as error:
            self.flaws.append(f"{str(error).split(';')[0]}; {again}")
            return True
        if about.get(OF_METRICS) not in (None, atomic.checksum(self._metrics_there())):
            self.flaws.append(f"{self.path / METRICS}: is damaged; {again}")
        return True

    def newest(self, on_flaw: str = "not used") -> dict[str, Any] | None:
        """The content of the newest checkpoint that is whole, or None if there never was one. The others become flaws.

        Raises UserError when there are checkpoints and none is whole.
        """
        missing = 0
        for file in (self.path / CHECKPOINT, self.path / PREVIOUS):
            if not file.exists():
                missing += 1
                continue
            try:
                return valid_checkpoint(file)
            except UserError as error:
                self.flaws.append(f"{str(error).split(';')[0]}; {on_flaw}")
        if missing < 2:
            raise UserError(
                f"{self.flaws.pop().split(';')[0]}, and there is no other checkpoint; --restart begins again"
            )
        return None

    @property
    def begun(self) -> bool:
        """Whether there are checkpoints, whole or not."""
        return any((self.path / name).exists() for name in (CHECKPOINT, PREVIOUS))

    # --- Beginning ----------------------------------------------------------------------------------------------------

    def _create(self, session: dict[str, Any]) -> None:
        """Write options.json, which lists every session. Raises OSError, naming the file."""
        if self.restart:
            self._delete_results()
        sessions = self._record.get("sessions", [])
        if sessions and (changed := _differences(sessions[-1], session)):
            self.flaws.append(f"going on with {changed}: not bit for bit what an uninterrupted run gives")
        self._record = {"options": self.options, "sessions": [*sessions, session]}
        atomic.write_json(self.path / OPTIONS, self._record)

    def _delete_results(self) -> None:
        """The checkpoints first and options.json last: a process killed in between leaves nothing to go on from."""
        for name in (CHECKPOINT, PREVIOUS, METRICS, LOG, cards.DATA, cards.CARD, "eval.json"):
            (self.path / name).unlink(missing_ok=True)
        for pattern in ("stored_*.png", "decoded_*.png", cards.SNAPSHOTS):
            for old in self.path.glob(pattern):
                old.unlink()
        shutil.rmtree(self.path / BOARD, ignore_errors=True)
        (self.path / OPTIONS).unlink(missing_ok=True)

    # --- Checkpoints and metrics --------------------------------------------------------------------------------------

    def checkpoint_due(self) -> bool:
        """Whether the last checkpoint is CHECKPOINT_SECONDS old."""
        return is_first() and time.monotonic() - self._saved >= CHECKPOINT_SECONDS

    @rank_zero_only
    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """In place of the last but one. Raises OSError; both are still there then."""
        content = {**state, "record": json.dumps(self._record), "metrics": self._metrics}
        tensors.write_tensors(self.path / CHECKPOINT, content, previous=self.path / PREVIOUS)
        self._saved = time.monotonic()

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The last checkpoint, or None before the first. What metrics.jsonl says of later moments is cut off.

        Raises UserError when no checkpoint is whole.
        """
        return self.group.broadcast(self._load_checkpoint)

    def _load_checkpoint(self) -> dict[str, Any] | None:
        self.flaws = []
        saved = self.newest("going on from the one before")
        for flaw in self.flaws:
            log.warning("%s", flaw)
        if self.flaws:  # so that the next checkpoint does not take the place of the one that is whole
            (self.path / CHECKPOINT).unlink()
        elif saved is not None and not (self.path / CHECKPOINT).exists():
            log.info("%s: is missing; going on from the one before", self.path / CHECKPOINT)
        if saved is None and (self.path / cards.DATA).exists():
            raise UserError(
                f"{self.path}: has a {cards.DATA}, but no checkpoint to go on from; --tag NAME keeps it, --restart "
                "begins again"
            )
        self._metrics = "" if saved is None else saved["metrics"]
        there = self._metrics_there()
        if not there.startswith(self._metrics):
            log.warning("%s: is damaged; made again from the checkpoint", self.path / METRICS)
        if there != self._metrics:
            atomic.write_atomically(self.path / METRICS, self._metrics.encode())
        return saved

    @rank_zero_only
    def metric(self, **event: object) -> None:
        """Append one event to metrics.jsonl, and show it on the board. Raises OSError, naming the file."""
        line = json.dumps(event) + "\n"
        self._metrics += line
        with atomic.naming(self.path / METRICS), open(self.path / METRICS, "a", encoding="utf-8") as file:
            file.write(line)
        self.board.event(event)

    @rank_zero_only
    def session_metric(self, **position: float) -> None:
        """Under which conditions the events that follow were computed."""
        sessions = self._record["sessions"]
        self.metric(session=len(sessions), **position, **_conditions(sessions[-1]))

    def _metrics_there(self) -> str:
        file = self.path / METRICS
        return file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""

    # --- Results ------------------------------------------------------------------------------------------------------

    @rank_zero_only
    def save_set(self, pixels: Tensor, card: dict[str, Any]) -> None:
        """data.pt and data.json. pixels: (classes, ipc, C, H, W)."""
        cards.save_set(self.path / cards.DATA, pixels)
        atomic.write_json(self.path / cards.CARD, card)

    @rank_zero_only
    def save_final_card(self, card: dict[str, Any]) -> None:
        """data.json of a finished run, the last file to be written."""
        atomic.write_json(self.path / cards.CARD, {**card, OF_METRICS: atomic.checksum(self._metrics)})

    @rank_zero_only
    def save_snapshot(self, it: int, pixels: Tensor) -> None:
        """data_<it>.pt, which stays when the run goes on."""
        cards.save_set(self.path / cards.snapshot_name(it), pixels)

    @rank_zero_only
    def save_pictures(self, when: str, it: int, stored: Tensor, decoded: Tensor) -> None:
        """stored_<when>.png and decoded_<when>.png, from (classes, n, C, H, W) in [0, 1], of outer iteration `it`."""
        self.board.images(it, stored=stored, decoded=decoded)
        atomic.write_atomically(self.path / f"stored_{when}.png", grid_png(stored))
        atomic.write_atomically(self.path / f"decoded_{when}.png", grid_png(decoded))

    @rank_zero_only
    def say_results(self, before: str = "", after: str = "") -> None:
        """Say what a finished run came to, read from its data.json, between two more lines."""
        card = atomic.read_json(self.path / cards.CARD)
        rows = []
        for what, key, count in (
            ("distilled set", "accuracy", f"{card['ipc']} stored, {card['decoded_per_class']} decoded"),
            ("random real images", "random_real", f"{card['ipc']}"),
        ):
            rows.append(f"  {what:20}{count:>24}     {Score(tuple(card[key]['accuracies']))}")
        net, epochs = NetSpec(**card["network"]).name, card["settings"]["epochs"]
        head = f"  {'trained on':20}{'images per class':>24}     test accuracy %, {net}, {epochs} epochs"
        lines = [before, f"run folder: {self.path}", head, *rows, after]
        log.info("%s", "\n".join(filter(None, lines)))

    def say_finished(self) -> int:
        """Say that nothing is left to do, and what the run came to. Returns the exit status."""
        self.say_results(before="this run is finished; --restart begins it again")
        return 0


def _valid_record(record: Any, file: str) -> dict[str, Any]:
    """options.json's content. Raises UserError unless it has what `check` and `create` look at."""
    known = record if isinstance(record, dict) else {}
    sessions = known.get("sessions")
    if not isinstance(known.get("options"), dict) or not isinstance(sessions, list):
        raise UserError(f"{file}: holds no options; restore it, or begin again with --restart")
    if not all(isinstance(session, dict) for session in sessions):
        raise UserError(f"{file}: holds no sessions; restore it, or begin again with --restart")
    return known


def valid_checkpoint(file: Path) -> dict[str, Any]:
    """A checkpoint's content, its `record` unpacked. Raises UserError when it is damaged or none."""
    saved = tensors.read_tensors(file, "")
    try:
        record = _valid_record(json.loads(saved["record"]), str(file))
        if not isinstance(saved["metrics"], str):
            raise TypeError
    except (KeyError, TypeError, ValueError, IndexError, RecursionError) as error:
        raise UserError(f"{file}: is no checkpoint; begin again with --restart") from error
    return {**saved, "record": record}


def _conditions(session: dict[str, Any]) -> dict[str, Any]:
    """What a session's rounding depends on, and the code's commit."""
    versions = session.get("versions")
    known = {**session, **(versions if isinstance(versions, dict) else {})}
    return {name: known.get(name) for name in (*CONDITIONS, "git_commit")}


def _differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """For people: the conditions that changed between two sessions."""
    old, new = _conditions(before), _conditions(now)
    return ", ".join(f"{name} {new[name]} after {old[name]}" for name in CONDITIONS if new[name] != old[name])
