"""Run folder: all files of one run, from its options to its last picture.

What has been computed survives any end of the process, and damage to any one file: each of the two checkpoints holds
options.json and metrics.jsonl besides the state, and all other results can be made again from the state.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from data import Dataset
from models import NetSpec
from utils.files import atomic, tensors
from utils.files.imagefiles import grid_png
from utils.files.lock import locked
from utils.method.evaluation import BEST_OF_FOUR, Score
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
OF_METRICS = "metrics_sha256"  # entry of a finished run's data.json: the checksum of metrics.jsonl
UNCLEAR = "finished?"
# Entries of a session that rounding depends on
CONDITIONS = ("torch", "device", "threads", "precision", "deterministic", "network_update")


class RunFolder:
    """Files of one run; `check` is the first to read them, `held` the first to write.

    Under torchrun all ranks call its methods, and rank 0 alone reads and writes.
    """

    def __init__(
        self,
        path: Path,
        options: Mapping[str, Any] = MappingProxyType({}),
        *,
        free: Collection[str] = (),
        resumable: Collection[str] = (),
        defaults: Mapping[str, Any] = MappingProxyType({}),
        restart: bool = False,
        group: Group = SINGLE,
        data: Dataset | None = None,
    ) -> None:
        """Remember what belongs into the folder, without a look at the disk.

        options: all options of the command, by name. free: names of options that may differ from those of the run in
        the folder; resumable: of those that may differ until that run is finished. defaults: values of options that
        the version which began that run did not have. restart: delete that run. data: the images of the command, which
        have to be those of the run in the folder; None: any.
        """
        self.path, self.options, self.restart, self.group = path, dict(options), restart, group
        self._data = data
        self._free, self._resumable, self._defaults = free, resumable, defaults
        self.board = Board(None)
        self.flaws: list[str] = []  # messages about damaged files that `check` saw, and what is done about them
        self._record: dict[str, Any] = {}  # the content of options.json, once checked
        self._metrics = ""  # the content of metrics.jsonl
        self._untouched = data is None  # the image files, since the run there recorded them
        self._saved = time.monotonic()

    @contextmanager
    def held(self, session: dict[str, Any]) -> Iterator[str]:
        """Create the folder, lock it, and write messages to its log.txt while the block runs.

        session: a record of this command, for options.json. Yields the folder's state: `new`, `started` or `finished`;
        a finished run is left as it is. Raises UserError when another process works there, and names it, or when the
        run there was made with other images.
        """
        with ExitStack() as stack:
            if is_first():
                atomic.make_folder(self.path)
                refusal = "wait for it or stop it, or keep both runs with --tag NAME"
                stack.enter_context(locked(self.path / LOCK, doing="condense.py", wait=False, refusal=refusal))
            status = self.check()
            images = {} if status == "finished" else self._images()
            status = "finished" if status == UNCLEAR else status
            if is_first() and status != "finished":
                self._create(session, images)
                stack.enter_context(logged_to(self.path / LOG))
            try:
                yield status
            finally:
                self.board.close()

    @rank_zero_only
    def open_board(self, goes_on_after: int | None) -> None:
        """Write what follows for TensorBoard as well; goes_on_after: outer iteration of the checkpoint, if any."""
        self.board = Board(self.path, goes_on_after=goes_on_after)

    # --- What is there ------------------------------------------------------------------------------------------------

    def check(self) -> str:
        """State of the folder: `new`, `started` or `finished`. Raises UsageError when it belongs to another command.

        A finished run with damaged files, or stored otherwise, counts as started: going on makes them again. One whose
        image files have been touched since is UNCLEAR until `held` has compared the images.
        """
        status, self._untouched = self.group.broadcast(self._check_all)
        return status

    def _check_all(self) -> tuple[str, bool]:
        """State of the folder, and whether its run has recorded the image files as they are now."""
        status, recorded = self._check(), images_in(self._record)
        if self._data is None or not recorded:
            return status, self._data is None
        untouched = recorded.get("files") == self._data.files
        return UNCLEAR if status == "finished" and self._data.files and not untouched else status, untouched

    def _check(self) -> str:
        self.flaws, self._record = [], {}
        # Hidden files do not count: a process that is killed while it writes options.json leaves some.
        if self.restart or not self.path.exists() or (self.path.is_dir() and not any(self.path.glob("[!.]*"))):
            return "new"
        record = self._read_record()
        if record is None:
            return "new"
        self._record, finished = record, self._read_results()
        may_differ = {*self._free, *(() if finished else self._resumable)}
        here, there = json.loads(json.dumps(self.options)), {**self._defaults, **record["options"]}
        if differ := differing(there, here, [k for k in here if k not in may_differ], prefix="--"):
            remedy = "--tag NAME keeps both runs, --restart deletes the old one"
            raise UsageError(f"{self.path}: belongs to another command ({differ}); {remedy}")
        return "finished" if finished and not self.flaws else "started"

    def _images(self) -> dict[str, str]:
        """What options.json is to say about the images. Raises UserError when they are not those of the run there."""
        if self._data is None or self._untouched:
            return images_in(self._record)
        digests = self._data.digests
        now = {"files": self._data.files, **digests}
        self.group.broadcast(lambda: self._compare_images(now))
        return now

    def _compare_images(self, now: Mapping[str, str]) -> None:
        there = images_in(self._record)
        if changed := [split for split in ("training", "test") if there.get(split, now[split]) != now[split]]:
            where = self.options.get("image_folder") or self.options.get("data_dir")
            raise UserError(
                f"{self.path}: was made with other {' and '.join(changed)} images than {where} holds now; --tag NAME "
                "begins a new run and keeps this one, --restart deletes it"
            )

    def _read_record(self) -> dict[str, Any] | None:
        """Content of options.json, or its copy in a checkpoint; None where neither was ever complete."""
        file = self.path / OPTIONS
        flaw = UserError(f"{file}: is missing")
        try:
            if file.exists():
                return _valid_record(atomic.read_json(file), str(file))
        except UserError as error:
            flaw = error
        saved = self.read_newest()
        if saved is not None:
            self.flaws.append(f"{flaw.problem}; made again from the checkpoint")
            return saved["record"]
        if not file.exists():
            raise UsageError(f"{self.path}: is not empty and no run folder; --tag NAME uses another, --restart this")
        if (self.path / cards.DATA).exists():
            raise UserError(f"{flaw}; --tag NAME uses another folder, --restart deletes the results in this one")
        self.flaws.append(f"{flaw.problem}; nothing had been saved yet, so the run begins again")
        return None

    def _read_results(self) -> bool:
        """Read the results, and note in `flaws` which have to be made again. True if the run is finished."""
        card, remedy = self.path / cards.CARD, "made again from the checkpoint"
        try:
            content = atomic.read_json(card) if card.exists() else {}
            if not content.get("finished"):
                return False
            tensors.read_tensors(self.path / cards.DATA, remedy)
        except UserError as error:
            self.flaws.append(f"{error.problem}; {remedy}")
            return True
        if (store := cards.store_of(content)) != self.options.get("store", store):
            flaw = f"{self.path / cards.DATA}: holds pixels as {store}"
            self.flaws.append(f"{flaw}; made again from the checkpoint, as {self.options['store']}")
        if content.get(OF_METRICS) not in (None, atomic.checksum(self._read_metrics())):
            self.flaws.append(f"{self.path / METRICS}: is damaged; {remedy}")
        return True

    def read_newest(self, on_flaw: str = "not used") -> dict[str, Any] | None:
        """Content of the newest undamaged checkpoint, or None if there never was one.

        Damaged ones are added to `flaws`, with the words on_flaw. Raises UserError when all checkpoints are damaged.
        """
        for file in self.checkpoints:
            try:
                return valid_checkpoint(file)
            except UserError as error:
                self.flaws.append(f"{error.problem}; {on_flaw}")
        if self.checkpoints:
            problem = self.flaws.pop().split(";")[0]
            raise UserError(f"{problem}, and there is no other checkpoint; --restart begins again")
        return None

    @property
    def checkpoints(self) -> list[Path]:
        """The checkpoints that are there, damaged or not, the newest first."""
        return [file for name in (CHECKPOINT, PREVIOUS) if (file := self.path / name).exists()]

    # --- Beginning ----------------------------------------------------------------------------------------------------

    def _create(self, session: dict[str, Any], images: dict[str, str]) -> None:
        """Write options.json, which lists every session and names the images. Raises OSError, naming the file."""
        if self.restart:
            self._delete_results()
        sessions = self._record.get("sessions", [])
        if sessions and (changed := _differences(sessions[-1], session)):
            self.flaws.append(f"going on with {changed}: not bit for bit what an uninterrupted run gives")
        self._record = {"options": self.options, "images": images, "sessions": [*sessions, session]}
        atomic.write_json(self.path / OPTIONS, self._record)

    def _delete_results(self) -> None:
        """Delete the files of the run, checkpoints first and options.json last.

        So a process that is killed in between leaves nothing that another could go on from.
        """
        files = (CHECKPOINT, PREVIOUS, METRICS, LOG, cards.DATA, cards.CARD, "eval.json")
        for pattern in (*files, "stored_*.png", "decoded_*.png", cards.SNAPSHOTS):
            for old in self.path.glob(pattern):
                old.unlink(missing_ok=True)
        shutil.rmtree(self.path / BOARD, ignore_errors=True)
        (self.path / OPTIONS).unlink(missing_ok=True)

    # --- Checkpoints and metrics --------------------------------------------------------------------------------------

    def checkpoint_due(self) -> bool:
        """Whether the last checkpoint is CHECKPOINT_SECONDS old."""
        return is_first() and time.monotonic() - self._saved >= CHECKPOINT_SECONDS

    @rank_zero_only
    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Write a checkpoint in place of the last but one. Raises OSError, and the older two are then still there."""
        content = {**state, "record": json.dumps(self._record), "metrics": self._metrics}
        tensors.write_tensors(self.path / CHECKPOINT, content, previous=self.path / PREVIOUS)
        self._saved = time.monotonic()

    def load_checkpoint(self) -> dict[str, Any] | None:
        """Content of the last checkpoint, or None before the first; later lines of metrics.jsonl are cut off.

        Raises UserError when all checkpoints are damaged.
        """
        return self.group.broadcast(self._load_checkpoint)

    def _load_checkpoint(self) -> dict[str, Any] | None:
        self.flaws = []
        saved = self.read_newest("going on from the one before")
        for flaw in self.flaws:
            log.warning("%s", flaw)
        if self.flaws:  # otherwise the next checkpoint would take the place of the only undamaged one
            (self.path / CHECKPOINT).unlink()
        elif saved is not None and not (self.path / CHECKPOINT).exists():
            log.info("%s: is missing; going on from the one before", self.path / CHECKPOINT)
        if saved is None and (self.path / cards.DATA).exists():
            remedy = "--tag NAME keeps it, --restart begins again"
            raise UserError(f"{self.path}: has a {cards.DATA}, but no checkpoint to go on from; {remedy}")
        self._metrics = "" if saved is None else saved["metrics"]
        on_disk = self._read_metrics()
        if not on_disk.startswith(self._metrics):
            log.warning("%s: is damaged; made again from the checkpoint", self.path / METRICS)
        if on_disk != self._metrics:
            atomic.write_atomically(self.path / METRICS, self._metrics.encode())
        return saved

    @rank_zero_only
    def metric(self, **event: object) -> None:
        """Append an event to metrics.jsonl and to the TensorBoard log. Raises OSError, naming the file."""
        line = json.dumps(event) + "\n"
        self._metrics += line
        with atomic.naming(self.path / METRICS), open(self.path / METRICS, "a", encoding="utf-8") as file:
            file.write(line)
        self.board.event(event)

    @rank_zero_only
    def session_metric(self, **position: float) -> None:
        """Append an event to metrics.jsonl that holds the conditions of the following ones."""
        sessions = self._record["sessions"]
        self.metric(session=len(sessions), **position, **_conditions(sessions[-1]))

    def _read_metrics(self) -> str:
        """Content of metrics.jsonl on disk, empty if there is none."""
        file = self.path / METRICS
        return file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""

    # --- Results ------------------------------------------------------------------------------------------------------

    @rank_zero_only
    def save_set(self, pixels: Tensor, card: dict[str, Any]) -> None:
        """Write data.pt and data.json. pixels: (classes, ipc, C, H, W)."""
        cards.save_set(self.path / cards.DATA, pixels, self.options["store"])
        atomic.write_json(self.path / cards.CARD, card)

    @rank_zero_only
    def save_final_card(self, card: dict[str, Any]) -> None:
        """Write data.json of a finished run, the last of its files."""
        atomic.write_json(self.path / cards.CARD, {**card, OF_METRICS: atomic.checksum(self._metrics)})

    @rank_zero_only
    def save_snapshot(self, it: int, pixels: Tensor) -> None:
        """Write data_<it>.pt, a copy of the set that stays when the run goes on. pixels: (classes, ipc, C, H, W)."""
        cards.save_set(self.path / cards.snapshot_name(it), pixels, self.options["store"])

    @rank_zero_only
    def save_pictures(self, when: str, it: int, stored: Tensor, decoded: Tensor) -> None:
        """Write stored_<when>.png and decoded_<when>.png, of images (classes, n, C, H, W) in [0, 1]."""
        self.board.images(it, stored=stored, decoded=decoded)
        atomic.write_atomically(self.path / f"stored_{when}.png", grid_png(stored))
        atomic.write_atomically(self.path / f"decoded_{when}.png", grid_png(decoded))

    @rank_zero_only
    def say_results(self, before: str = "", after: str = "") -> None:
        """Show the accuracies in a finished run's data.json, with lines before and after them."""
        card = atomic.read_json(self.path / cards.CARD)
        ours, random = (Score.from_dict(card[name]) for name in ("accuracy", "random_real"))
        rows = [
            f"  {what:20}{count:>24}     {score}"
            for what, count, score in (
                ("distilled set", f"{card['ipc']} stored, {card['decoded_per_class']} decoded", ours),
                ("random real images", str(card["ipc"]), random),
            )
        ]
        if self.options.get("show_best"):
            best, other = (score.best_of_four or "unknown" for score in (ours, random))
            rows.append(f"  {BEST_OF_FOUR}: distilled set {best}, random real images {other}")
        net, epochs = NetSpec(**card["network"]).name, card["settings"]["epochs"]
        head = f"  {'trained on':20}{'images per class':>24}     test accuracy %, {net}, {epochs} epochs"
        log.info("%s", "\n".join(filter(None, [before, f"run folder: {self.path}", head, *rows, after])))

    def say_finished(self) -> int:
        """Show that the run is finished, and its accuracies. Returns the exit status."""
        self.say_results(before="this run is finished; --restart begins it again")
        return 0


def _valid_record(record: Any, file: str) -> dict[str, Any]:
    """Content of options.json, if it has options and sessions. Raises UserError otherwise."""
    content = record if isinstance(record, dict) else {}
    sessions = content.get("sessions")
    sound = isinstance(sessions, list) and all(isinstance(session, dict) for session in sessions)
    if not isinstance(content.get("options"), dict) or not sound:
        raise UserError(f"{file}: holds no options and sessions; restore it, or begin again with --restart")
    return content


def valid_checkpoint(file: Path) -> dict[str, Any]:
    """Content of a checkpoint, its `record` parsed. Raises UserError when it is damaged or no checkpoint."""
    saved = tensors.read_tensors(file, "")
    try:
        record = _valid_record(json.loads(saved["record"]), str(file))
        if not isinstance(saved["metrics"], str):
            raise TypeError
    except (KeyError, TypeError, ValueError, IndexError, RecursionError) as error:
        raise UserError(f"{file}: is no checkpoint; begin again with --restart") from error
    return {**saved, "record": record}


def images_in(record: Mapping[str, Any]) -> dict[str, str]:
    """Digests of the images in options.json: of the training and test images, and of their files; empty if unknown."""
    images = record.get("images")
    return images if isinstance(images, dict) else {}


def _conditions(session: dict[str, Any]) -> dict[str, Any]:
    """Conditions that a session's rounding depends on, and the code's git commit."""
    versions = session.get("versions")
    entries = {**session, **(versions if isinstance(versions, dict) else {})}
    return {name: entries.get(name) for name in (*CONDITIONS, "git_commit")}


def differing(there: Mapping[str, Any], here: Mapping[str, Any], names: Iterable[str], *, prefix: str = "") -> str:
    """Entries in which two records differ, for a message: `lr 0.01 there, 0.1 here; ...`; prefix: of the names."""
    differ = [name for name in names if there.get(name) != here.get(name)]
    return "; ".join(f"{prefix}{name} {there.get(name)} there, {here.get(name)} here" for name in differ)


def _differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Conditions that changed between two sessions, for a message."""
    old, new = _conditions(before), _conditions(now)
    return ", ".join(f"{name} {new[name]} after {old[name]}" for name in CONDITIONS if new[name] != old[name])
