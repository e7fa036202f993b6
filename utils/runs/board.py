"""TensorBoard files with --tensorboard: the same numbers and pictures as in a run's other files."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from utils.files.atomic import naming
from utils.files.imagefiles import grid
from utils.system.errors import UsageError

FOLDER = "tensorboard"
SHOWN = {"loss": "matching loss", "accuracy_mean": "test accuracy %"}  # entries of metrics.jsonl, and their titles


def check_board() -> None:
    """Check that TensorBoard, which is optional, is installed. Raises UsageError when it is not."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise UsageError(f"--tensorboard: needs TensorBoard ({error}); pip install tensorboard") from None


class Board:
    """A file in folder/tensorboard; without a folder, nothing is written. Writing raises OSError, naming the file.

    SummaryWriter is not used: it writes in a thread, whose errors are tracebacks on the screen and come late or never.
    """

    def __init__(self, folder: Path | None, *, goes_on_after: int | None = None) -> None:
        """goes_on_after: the last step of an earlier process that counts; TensorBoard hides its later ones."""
        self._file: BinaryIO | None = None
        if folder is None:
            return
        from tensorboard.compat.proto.event_pb2 import SessionLog

        # TensorBoard reads the files of a folder in the order of their names.
        self._path = folder / FOLDER / f"events.out.tfevents.{time.time():.6f}.{platform.node()}.{os.getpid()}"
        with naming(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._path, "ab")  # noqa: SIM115  # closed in `close`
        self._add(file_version="brain.Event:2")
        if goes_on_after is not None:
            self._add(step=goes_on_after + 1, session_log=SessionLog(status=SessionLog.START))

    @property
    def on(self) -> bool:
        return self._file is not None

    def event(self, event: Mapping[str, object]) -> None:
        """Add the loss or the accuracy of one line of metrics.jsonl."""
        for name, title in SHOWN.items():
            if isinstance(value := event.get(name), float) and isinstance(step := event["iteration"], int):
                self.scalar(title, value, step)

    def scalar(self, title: str, value: float, step: int) -> None:
        """Add a point to the curve of this title."""
        if self.on:
            from torch.utils.tensorboard.summary import scalar

            self._add(step=step, summary=scalar(title, value))

    def images(self, step: int, **sets: Tensor) -> None:
        """Add a grid for each set, one row per class. sets: (classes, n, C, H, W) in [0, 1]."""
        if self.on:
            from torch.utils.tensorboard.summary import image

            for name, images in sets.items():
                self._add(step=step, summary=image(name, grid(images), dataformats="CHW"))

    def _add(self, **event: Any) -> None:
        """Write one Event of TensorBoard's with these fields."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        try:
            with naming(self._path):
                writer = RecordWriter(self._file)
                writer.write(Event(wall_time=time.time(), **event).SerializeToString())
                writer.flush()
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        if self._file is not None:
            with suppress(OSError):  # closing writes again what could not be written, which has been reported
                self._file.close()
            self._file = None
