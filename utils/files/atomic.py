"""Files that are written whole or not at all, folders, and JSON files with a checksum of their content."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from utils.system.errors import UserError, first_line


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Any OSError in the block names this file, which the system's own messages often leave out."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise


def write_atomically(path: Path, content: bytes, *, previous: Path | None = None) -> None:
    """Replace a file in one step: after a crash at any moment it holds the old content or the new one.

    previous: where the old content is kept. After a crash between the two renames it is there alone, and nothing at
    `path`. A killed process leaves at most one hidden file beside it, which the next write overwrites.
    Raises OSError, naming the file.
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
            with suppress(OSError):  # the first error is the one to report
                temporary.unlink()
            raise
        if hasattr(os, "O_DIRECTORY"):  # Windows opens no folders
            directory = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(directory)  # without it a power cut may undo the renaming
            finally:
                os.close(directory)


def make_folder(path: Path) -> Path:
    """Make a folder, and its parents, and return its path. Raises UserError when it cannot be made or written into."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()  # has no name, so that nothing can stay behind
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise UserError(f"{path}: cannot be written ({reason}); choose another --results_dir") from error
    return path


# --- JSON -------------------------------------------------------------------------------------------------------------

CHECKSUM = "sha256"  # a file's last entry: the checksum of all others, so that a flipped bit is noticed


def checksum(content: Any) -> str:
    """SHA-256 of anything that JSON can hold, in hexadecimal digits."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write an object and its checksum. Raises OSError, naming the file."""
    write_atomically(path, (json.dumps({**content, CHECKSUM: checksum(content)}, indent=2) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """The object that write_json wrote, without its checksum.

    Raises UserError, naming the file, when it holds no object or contradicts its checksum, if it has one.
    """
    content, unchanged = parse_json(path)
    if not unchanged:
        remedy = "restore it, or delete that entry if the change is meant"
        raise UserError(f"{path}: is damaged, or was changed since it was written (its {CHECKSUM} differs); {remedy}")
    return content


def parse_json(path: Path) -> tuple[dict[str, Any], bool]:
    """The object in a file, without its checksum, and whether the checksum is right or missing.

    Raises UserError, naming the file, when it holds no object.
    """
    remedy = "restore it, or begin again with --restart"
    try:
        if path.exists() and not path.is_file():  # reading a pipe would wait for a writer
            raise OSError("no regular file")
        content = json.loads(path.read_text(encoding="utf-8"))
        claimed = content.pop(CHECKSUM, None) if isinstance(content, dict) else None
        unchanged = claimed is None or claimed == checksum(content)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)}); {remedy}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no JSON object; {remedy}")
    return content, unchanged
