"""A run folder: what belongs to one command, from the first option to the last picture."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import Tensor

from utils import files, pictures
from utils.board import FOLDER as BOARD
from utils.board import Board
from utils.errors import UsageError, UserError

OPTIONS, METRICS, LOG, CHECKPOINT = "options.json", "metrics.jsonl", "log.txt", "checkpoint.pt"
CHECKPOINT_SECONDS = 120.0  # between checkpoints at most, plus one inner step


class RunFolder:
    """Made without touching the disk; `check` reads, `create` is the first to write."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.board = Board(None)
        self._saved = time.monotonic()

    def check(self, options: dict[str, Any], *, free: Collection[str], restart: bool) -> str:
        """`new`, `started` or `finished`. Raises UsageError when the folder belongs to another command.

        free: names of the options that may differ from those of the run in the folder.
        """
        # Hidden files do not count: a process killed before its options.json was complete leaves such.
        if restart or not self.path.exists() or (self.path.is_dir() and not any(self.path.glob("[!.]*"))):
            return "new"
        remedy = "--tag NAME keeps both runs, --restart deletes the old one"
        if not (self.path / OPTIONS).exists():
            raise UsageError(f"{self.path}: is not empty and no run folder; {remedy}")
        there = files.read_json(self.path / OPTIONS).get("options")
        if not isinstance(there, dict):
            raise UserError(f"{self.path / OPTIONS}: holds no options; {remedy}")
        differ = [
            f"--{k} {there.get(k)} there, {v} here"
            for k, v in json.loads(json.dumps(options)).items()
            if k not in free and there.get(k) != v
        ]
        if differ:
            raise UsageError(f"{self.path}: belongs to another command ({'; '.join(differ)}); {remedy}")
        card = self.path / files.CARD
        return "finished" if card.exists() and files.read_json(card).get("finished") else "started"

    def create(self, options: dict[str, Any], session: dict[str, Any], *, restart: bool) -> None:
        """Make the folder and options.json, which lists every session. Raises UserError when it cannot be written."""
        files.make_folder(self.path)
        if restart:
            for name in (OPTIONS, METRICS, LOG, CHECKPOINT, files.DATA, files.CARD, "eval.json"):
                (self.path / name).unlink(missing_ok=True)
            for pattern in ("stored_*.png", "decoded_*.png", files.SNAPSHOTS):
                for old in self.path.glob(pattern):
                    old.unlink()
            shutil.rmtree(self.path / BOARD, ignore_errors=True)
        file = self.path / OPTIONS
        sessions = files.read_json(file).get("sessions", []) if file.exists() else []
        files.write_json(file, {"options": options, "sessions": [*sessions, session]})

    # --- Checkpoints and metrics --------------------------------------------------------------------------------------

    def checkpoint_due(self) -> bool:
        return time.monotonic() - self._saved >= CHECKPOINT_SECONDS

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        files.write_tensors(self.path / CHECKPOINT, {**state, "metrics_bytes": self._metrics_size()})
        self._saved = time.monotonic()

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The last state, or None before the first. What metrics.jsonl says of later moments is cut off."""
        if not (self.path / CHECKPOINT).exists():
            self._cut_metrics(0)
            return None
        state = files.read_tensors(self.path / CHECKPOINT, "begin again with --restart")
        if not isinstance(state, dict) or not isinstance(state.get("metrics_bytes"), int):
            raise UserError(f"{self.path / CHECKPOINT}: is no checkpoint; begin again with --restart")
        self._cut_metrics(state["metrics_bytes"])
        return state

    def metric(self, **event: object) -> None:
        """Append one event to metrics.jsonl, and show it on the board."""
        with open(self.path / METRICS, "a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")
        self.board.event(event)

    def _metrics_size(self) -> int:
        file = self.path / METRICS
        return file.stat().st_size if file.exists() else 0

    def _cut_metrics(self, size: int) -> None:
        if self._metrics_size() > size:
            os.truncate(self.path / METRICS, size)

    # --- Results ------------------------------------------------------------------------------------------------------

    def save_set(self, pixels: Tensor, card: dict[str, Any]) -> None:
        """data.pt and data.json. pixels: (classes, ipc, C, H, W)."""
        files.save_set(self.path / files.DATA, pixels)
        files.write_json(self.path / files.CARD, card)

    def save_snapshot(self, it: int, pixels: Tensor) -> None:
        """data_<it>.pt, which stays when the run goes on."""
        files.save_set(self.path / files.SNAPSHOTS.replace("*", f"{it:06}"), pixels)

    def save_pictures(self, when: str, it: int, stored: Tensor, decoded: Tensor) -> None:
        """stored_<when>.png and decoded_<when>.png, from (classes, n, C, H, W) in [0, 1], of outer iteration `it`."""
        self.board.images(it, stored=stored, decoded=decoded)
        files.write_atomically(self.path / f"stored_{when}.png", pictures.grid_png(stored))
        files.write_atomically(self.path / f"decoded_{when}.png", pictures.grid_png(decoded))
