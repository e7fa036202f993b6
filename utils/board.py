"""TensorBoard, for those who asked for it: the same numbers and pictures that the files hold."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from utils import pictures
from utils.errors import UsageError

FOLDER = "tensorboard"
SHOWN = {"loss": "matching loss", "accuracy_mean": "test accuracy %"}  # of a metrics event, against its iteration


def check_board() -> None:
    """Raises UsageError when the package is missing, which is optional."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise UsageError(f"--tensorboard: needs TensorBoard ({error}); pip install tensorboard") from None


class Board:
    """Writes into folder/tensorboard; without a folder, nowhere."""

    def __init__(self, folder: Path | None, *, goes_on_after: int | None = None) -> None:
        """goes_on_after: the last step that counts of what an earlier process wrote; later ones are taken back."""
        self._writer = None
        if folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            purge = None if goes_on_after is None else goes_on_after + 1
            self._writer = SummaryWriter(str(folder / FOLDER), purge_step=purge)

    @property
    def on(self) -> bool:
        return self._writer is not None

    def event(self, event: Mapping[str, object]) -> None:
        """What is worth a curve of one line of metrics.jsonl."""
        for name, title in SHOWN.items():
            if isinstance(value := event.get(name), float) and isinstance(step := event["iteration"], int):
                self.scalar(title, value, step)

    def scalar(self, title: str, value: float, step: int) -> None:
        if self._writer is not None:
            self._writer.add_scalar(title, value, step)
            self._writer.flush()

    def images(self, step: int, **sets: Tensor) -> None:
        """A grid each, one row per class. sets: (classes, n, C, H, W) in [0, 1]."""
        if self._writer is not None:
            for name, images in sets.items():
                self._writer.add_image(name, pictures.grid(images), step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
