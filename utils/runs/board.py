"""TensorBoard, for those who asked for it: the same numbers and pictures that the files hold."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from utils.files import pictures
from utils.files.atomic import naming
from utils.system.errors import UsageError

FOLDER = "tensorboard"
SHOWN = {"loss": "matching loss", "accuracy_mean": "test accuracy %"}  # of a metrics event, against its iteration


def check_board() -> None:
    """Raises UsageError when the package is missing, which is optional."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise UsageError(f"--tensorboard: needs TensorBoard ({error}); pip install tensorboard") from None


class Board:
    """Writes into folder/tensorboard; without a folder, nowhere. Whatever writes raises OSError, naming the file.

    Not with SummaryWriter: it writes in a thread, whose errors are tracebacks on the screen and come late or never.
    """

    def __init__(self, folder: Path | None, *, goes_on_after: int | None = None) -> None:
        """goes_on_after: the last step that counts of what an earlier process wrote; later ones are taken back."""
        self._file: BinaryIO | None = None
        if folder is None:
            return
        from tensorboard.compat.proto.event_pb2 import SessionLog

        # TensorBoard reads the files of a folder in the order of their names.
        name = f"events.out.tfevents.{time.time():.6f}.{platform.node()}.{os.getpid()}"
        self._path = folder / FOLDER / name
        with naming(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._path, "ab")  # noqa: SIM115  # `close` does it
        self._add(file_version="brain.Event:2")
        if goes_on_after is not None:
            self._add(step=goes_on_after + 1, session_log=SessionLog(status=SessionLog.START))

    @property
    def on(self) -> bool:
        return self._file is not None

    def event(self, event: Mapping[str, object]) -> None:
        """What is worth a curve of one line of metrics.jsonl."""
        for name, title in SHOWN.items():
            if isinstance(value := event.get(name), float) and isinstance(step := event["iteration"], int):
                self.scalar(title, value, step)

    def scalar(self, title: str, value: float, step: int) -> None:
        if self.on:
            from torch.utils.tensorboard.summary import scalar

            self._add(step=step, summary=scalar(title, value))

    def images(self, step: int, **sets: Tensor) -> None:
        """A grid each, one row per class. sets: (classes, n, C, H, W) in [0, 1]."""
        if self.on:
            from torch.utils.tensorboard.summary import image

            for name, images in sets.items():
                self._add(step=step, summary=image(name, pictures.grid(images), dataformats="CHW"))

    def _add(self, **event: Any) -> None:
        """fields of TensorBoard's Event."""
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
            with suppress(OSError):  # it tries again to write what could not be written, which has been said
                self._file.close()
            self._file = None
