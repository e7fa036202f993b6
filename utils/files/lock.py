"""Locks between processes that share a folder. A lock ends with its process, however that ends.

On Windows the lock's file stays behind, unlocked. A system without either kind of locks is used without.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from utils.system.errors import UserError, printable

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]
    with suppress(ImportError):
        import msvcrt

log = logging.getLogger("dream")

BEYOND = 2**30  # the position of the byte that Windows locks: nobody else can read it then


@contextmanager
def locked(file: Path, *, doing: str, wait: bool, refusal: str = "") -> Iterator[None]:
    """Hold the lock while the block runs. The file says who holds it, and is removed afterwards.

    doing: what the block does, for others to read. wait: whether to wait for a process that holds the lock, saying so
    once; otherwise UserError, with that process's host and number, and `refusal`. Where the folder cannot be written,
    or its file system has no locks, the block runs without one.
    """
    handle = _acquired(file, wait=wait, refusal=refusal)
    if handle is None:
        yield
        return
    about = {
        "host": platform.node(),
        "pid": os.getpid(),
        "doing": doing,
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }
    with suppress(OSError):  # on a full disk the file stays empty, and locked
        os.ftruncate(handle, 0)
        os.write(handle, (json.dumps(about) + "\n").encode())
    try:
        yield
    finally:
        with suppress(OSError):  # the folder has become read-only; a file that nobody locks does no harm
            file.unlink()
        os.close(handle)


def _acquired(file: Path, *, wait: bool, refusal: str) -> int | None:
    """The descriptor of the locked file, or None where there cannot be a lock."""
    said = False
    while True:
        try:
            handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError:
            return None
        try:
            _lock(handle)
        except OSError as error:
            holder = _holder(handle)
            os.close(handle)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                return None
            if not wait:
                raise UserError(f"{file.parent}: in use by {holder}; {refusal}") from error
            if not said:
                log.info("%s: waiting for %s", printable(str(file.parent)), holder)
            said = True
            time.sleep(0.2)
            continue
        # Its last holder may have removed the file in between; then others would lock a new file of this name.
        with suppress(FileNotFoundError):
            if os.fstat(handle).st_ino == os.stat(file).st_ino:
                return handle
        os.close(handle)


def _lock(handle: int) -> None:
    """Lock a file until it is closed. Raises OSError: EWOULDBLOCK or EACCES when another process has locked it."""
    if fcntl is not None:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    elif "msvcrt" in globals():
        os.lseek(handle, BEYOND, os.SEEK_SET)
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        finally:
            os.lseek(handle, 0, os.SEEK_SET)
    else:
        raise OSError(errno.ENOLCK, "no locks")


def _holder(handle: int) -> str:
    """The process that holds a lock, in words; its file may not say it yet."""
    try:
        about = json.loads(os.read(handle, 4096))
        return f"process {about['pid']} on {about['host']} ({about['doing']}, since {about['since']})"
    except (OSError, ValueError, TypeError, KeyError):
        return "another process"
