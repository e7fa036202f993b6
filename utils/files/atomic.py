"""Files that a run leaves: written whole or not at all, described by themselves, read without trust."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from utils.system.errors import UserError, first_line

log = logging.getLogger("dream")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Whatever the system refuses inside the block is about this file, which its errors often do not say."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise


def write_atomically(path: Path, content: bytes, *, previous: Path | None = None) -> None:
    """Replace a file in one step: after a crash at any moment it holds the old content or the new one.

    previous: where the old content stays. A crash can leave it there alone, before the new content is at its place.
    What a killed process leaves is one hidden file beside it, which the next write takes over. Raises OSError, naming
    the file.
    """
    temporary = path.with_name(f".{path.name}.part")
    with naming(path):
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            if previous is not None and path.exists():
                os.replace(path, previous)
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):  # of the two errors the first one counts
                temporary.unlink()
            raise
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def make_folder(path: Path) -> None:
    """Raises UserError when the folder cannot be made or written into."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):  # which never has a name that could stay behind
            pass
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another --results_dir") from error


# --- JSON -------------------------------------------------------------------------------------------------------------

CHECKSUM = "sha256"  # the last entry of a file: of all others, so that a flipped bit is noticed


def checksum(content: Any) -> str:
    """Of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """With a checksum. Raises OSError, naming the file."""
    write_atomically(path, (json.dumps({**content, CHECKSUM: checksum(content)}, indent=2) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """Raises UserError, naming the file, when it is no JSON object or contradicts its checksum, if it has one."""
    try:
        if path.exists() and not path.is_file():  # a pipe would have us wait
            raise OSError("no regular file")
        found = json.loads(path.read_text(encoding="utf-8"))
        claimed = found.pop(CHECKSUM, None) if isinstance(found, dict) else None
        right = claimed is None or claimed == checksum(found)
    except (OSError, ValueError, RecursionError) as error:
        reason = first_line(error)
        raise UserError(f"{path}: cannot be read ({reason}); restore it, or begin again with --restart") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: holds no JSON object; restore it, or begin again with --restart")
    if not right:
        raise UserError(
            f"{path}: is damaged, or was changed since it was written (its {CHECKSUM} differs); restore it, or delete "
            "that entry if the change is meant"
        )
    return found
