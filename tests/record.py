"""The record of tests/gpu_record.py: results, runs, logs and compiled kernels, in a folder and in one archive."""

from __future__ import annotations

import argparse
import hashlib
import io
import tarfile
import time
import zlib
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from utils.config.build import Problem
from utils.files import atomic
from utils.runs.card import CARD, DATA
from utils.runs.folder import CHECKPOINT, PREVIOUS
from utils.system import device as machine
from utils.system.errors import UserError, first_line

ROOT = Path(__file__).resolve().parent.parent
ARCHIVE, RESULTS = "gpu_record.tar.gz", "record.json"
RESERVE = 15.0  # seconds at the end, for the last checkpoint and the last packing
PACK_EVERY = 60.0  # seconds between two packings at least, but for the last one
LARGEST = 2**30  # bytes of what an archive may unpack to


class Record:
    """The results so far, in a folder and in the archive, and the clock."""

    def __init__(self, given: argparse.Namespace, work: Path, began: float) -> None:
        """Unpack the archive to go on from, if there is one, into `work`. Raises UserError for a bad one.

        began: when the command was given, by time.monotonic().
        """
        self.given, self.work, self.device = given, work, machine.pick_device(given.device)
        self.end, self.packed = began + 60 * given.minutes, 0.0
        self.archive = atomic.make_folder(Path(given.out)) / ARCHIVE
        self.problem: Problem | None = None  # of the last run: the images are read once
        if given.continue_from:
            unpack(Path(given.continue_from), work)
        there = work / RESULTS
        self.results: dict[str, dict[str, Any]] = atomic.read_json(there) if there.exists() else {}
        name = machine.device_name(self.device)
        self.about = {"device": name, "torch": torch.__version__, "code": code()}

    @property
    def left(self) -> float:
        """Seconds until the part has to be packed for the last time."""
        return self.end - RESERVE - time.monotonic()

    def say(self, text: str) -> None:
        """Print lines, and add them to the part's log."""
        print(text, flush=True)
        with open(self.work / f"{self.given.part}.txt", "a") as file:
            file.write(text + "\n")

    def known(self, name: str) -> dict[str, Any]:
        """What this part has recorded under a name; nothing if it has not, or failed."""
        found = self.results.get(self.given.part, {}).get(name, {})
        return {} if "error" in found else found

    def same(self, name: str) -> dict[str, Any]:
        """What this part has recorded under a name, on such a device, with this PyTorch and this code."""
        found = self.known(name)
        return found if self.about.items() <= found.items() else {}

    def keep(self, name: str, found: dict[str, Any]) -> None:
        """Record a result of this part."""
        self.results.setdefault(self.given.part, {})[name] = {**self.about, **found}
        atomic.write_json(self.work / RESULTS, self.results)
        self.pack()

    def pack(self, *, last: bool = False) -> None:
        """Write the archive anew, if the one that is there is some seconds old or this is the last."""
        if not last and time.monotonic() - self.packed < PACK_EVERY:
            return
        content = io.BytesIO()
        with tarfile.open(fileobj=content, mode="w:gz", compresslevel=1) as tar:
            for path in sorted(self.work.rglob("*")):
                if path.is_file() and outlives(path):
                    tar.add(path, path.relative_to(self.work), recursive=False)
        atomic.write_atomically(self.archive, content.getvalue())
        self.packed = time.monotonic()


def outlives(path: Path) -> bool:
    """Whether the archive holds a file: of a run, nothing that follows from its other files."""
    card = path.with_name(CARD)
    finished = card.exists() and atomic.read_json(card).get("finished", False)
    unneeded = path.name in (PREVIOUS, CHECKPOINT if finished else DATA) or path.suffix == ".png"
    return not unneeded and not path.name.startswith(".")  # the lock, and what is being written


def unpack(archive: Path, folder: Path) -> None:
    """Unpack plain files of sound names and bounded size. Raises UserError otherwise."""
    try:
        with tarfile.open(archive, "r:gz") as tar:
            size = 0
            for member in tar:
                size, name = size + member.size, PurePosixPath(member.name)
                file = tar.extractfile(member) if member.isfile() else None
                if size > LARGEST or file is None or name.is_absolute() or ".." in name.parts:
                    raise UserError(f"{archive}: was not made by this script ({member.name})")
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read())  # with no other permissions than new files have
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise UserError(f"{archive}: cannot be unpacked ({first_line(error)})") from error


def code() -> str:
    """Checksum of all that computes, since a copy of the files need not come with its git history."""
    files = sorted(p for name in ("models", "utils") for p in (ROOT / name).rglob("*.*") if p.suffix in (".py", ".cpp"))
    parts = [ROOT / "condense.py", ROOT / "data.py", ROOT / "tests/bench_parts.py"]
    return hashlib.sha256(b"".join(p.read_bytes() for p in [*files, *parts])).hexdigest()[:8]
