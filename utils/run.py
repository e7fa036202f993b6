"""A run folder: what belongs to one command, from the first option to the last picture."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

from utils import files, pictures
from utils.errors import UsageError, UserError
from utils.formation import decode
from utils.options import PLACES, CondenseOptions

OPTIONS, METRICS, LOG, CHECKPOINT = "options.json", "metrics.jsonl", "log.txt", "checkpoint.pt"
CHECKPOINT_SECONDS = 120.0  # between checkpoints at most, plus one inner step

# Options that may differ when a run goes on: they say where and how long to compute, not what.
FREE = (*PLACES, "max_minutes", "dry_run", "restart", "reproduce")


def folder_of(options: CondenseOptions, network: str) -> Path:
    """results/<dataset>/<net>_f<f>_ipc<n>[_<tag>]"""
    name = f"{network}_f{options.factor}_ipc{options.ipc}" + (f"_{options.tag}" if options.tag else "")
    return Path(options.results_dir) / options.dataset / name


def identity(options: CondenseOptions) -> dict[str, Any]:
    """The options that a resumed run must share with the first one."""
    found = {k: v for k, v in dataclasses.asdict(options).items() if k not in FREE}
    if options.image_folder is not None:
        found["image_folder"] = str(Path(options.image_folder).resolve())
    return found


class RunFolder:
    """Made without touching the disk; `check` reads, `create` is the first to write."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._saved = time.monotonic()

    def check(self, options: CondenseOptions) -> str:
        """`new`, `started` or `finished`. Raises UsageError when the folder belongs to another command."""
        if options.restart or not self.path.exists() or (self.path.is_dir() and not any(self.path.iterdir())):
            return "new"
        remedy = "--tag NAME keeps both runs, --restart deletes the old one"
        if not (self.path / OPTIONS).exists():
            raise UsageError(f"{self.path}: is not empty and no run folder; {remedy}")
        there = files.read_json(self.path / OPTIONS).get("options")
        if not isinstance(there, dict):
            raise UserError(f"{self.path / OPTIONS}: holds no options; {remedy}")
        wanted = json.loads(json.dumps(identity(options)))
        differ = [f"--{k} {there.get(k)} there, {v} here" for k, v in wanted.items() if there.get(k) != v]
        if differ:
            raise UsageError(f"{self.path}: belongs to another command ({'; '.join(differ)}); {remedy}")
        card = self.path / files.CARD
        return "finished" if card.exists() and files.read_json(card).get("finished") else "started"

    def create(self, options: CondenseOptions, about: dict[str, Any]) -> None:
        """Make the folder and options.json. Raises UserError when it cannot be written."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if options.restart:
                for name in (OPTIONS, METRICS, LOG, CHECKPOINT, files.DATA, files.CARD, "eval.json"):
                    (self.path / name).unlink(missing_ok=True)
                for picture in [*self.path.glob("stored_*.png"), *self.path.glob("decoded_*.png")]:
                    picture.unlink()
            files.write_json(self.path / OPTIONS, {"options": identity(options), **about})
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be written ({error.strerror}); choose another --results_dir"
            ) from error

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
        """Append one event to metrics.jsonl."""
        with open(self.path / METRICS, "a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")

    def _metrics_size(self) -> int:
        file = self.path / METRICS
        return file.stat().st_size if file.exists() else 0

    def _cut_metrics(self, size: int) -> None:
        if self._metrics_size() > size:
            os.truncate(self.path / METRICS, size)

    # --- Results ------------------------------------------------------------------------------------------------------

    def save_pictures(self, when: str, pixels: Any, options: CondenseOptions) -> None:
        """stored_<when>.png and decoded_<when>.png. pixels: (classes, ipc, C, H, W)."""
        shown = pixels.detach().clamp(0, 1)
        files.write_atomically(self.path / f"stored_{when}.png", pictures.grid_png(shown))
        decoded = decode(shown[:, : pictures.COLUMNS], factor=options.factor, decode_type=options.decode_type)
        files.write_atomically(self.path / f"decoded_{when}.png", pictures.grid_png(decoded))
