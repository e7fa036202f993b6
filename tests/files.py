"""What the tests put on disk, and what they look for there."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from utils.system.errors import UserError

Pixels = npt.NDArray[np.uint8]

QUICK = shlex.split(
    "--niter 1 --inner_loop 1 --interval 1 --batch_real 8 --n_data 8 --width 8 --depth 2 --epochs 1 --repeat 1 "
    "--ipc 1 --device cpu"
)


def quick(results: Path, *flags: str) -> list[str]:
    """A command line of condense.py that takes less than a second; later flags win."""
    return [*QUICK, "--results_dir", str(results), *flags]


def noise(*shape: int, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(path: Path, pixels: Pixels) -> Path:
    """An image file of (H, W) or (H, W, 3 or 4) pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def image_folder(
    root: Path, train: Mapping[str, int], test: Mapping[str, int] | None = None, shape: Sequence[int] = (8, 8, 3)
) -> Path:
    """PNG files root/train/CLASS/0.png ... with as many images per class as given; test like train unless given."""
    seed = 0
    for split, counts in (("train", train), ("test", train if test is None else test)):
        for name, count in counts.items():
            for i in range(count):
                save(root / split / name / f"{i}.png", noise(*shape, seed=seed))
                seed += 1
    return root


class Payload:
    """Unpickling it makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.marker),)


def tree(root: Path) -> dict[str, bytes | None]:
    """Everything below a folder: the content of files, None for folders."""
    return {str(p.relative_to(root)): p.read_bytes() if p.is_file() else None for p in sorted(root.rglob("*"))}


def refused(main: Callable[[Sequence[str]], int], argv: Sequence[str], *says: str, status: int, unchanged: Path) -> str:
    """The message of a command that must end with this status, say these words in one line and leave no trace."""
    before = tree(unchanged)
    with pytest.raises(UserError) as caught:
        main(argv)
    message = str(caught.value)
    assert caught.value.status == status, message
    assert "\n" not in message, message
    for word in says:
        assert word in message, f"{word!r} is not in: {message}"
    after = tree(unchanged)
    assert after == before, f"left behind or changed: {sorted(k for k in after if after[k] != before.get(k, ''))}"
    return message


def last_json(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """What a command with --json printed last."""
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert isinstance(found, dict)
    return found
