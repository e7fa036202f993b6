"""What can go wrong with a process's files, done to the process from inside, at an exact operation of its own.

Operations are what changes something on disk: opening for writing, writing, fsync, truncating, renaming, removing,
making a folder. The program under test has no part in this: Python's audit events and the modules `os` and `io` do it.
"""

from __future__ import annotations

import builtins
import errno
import io
import itertools
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

NEEDS_NO_ROOM = ("fsync", "truncate", "rename", "remove")  # and does not fail on a full disk
FULL = ("ENOSPC", "EDQUOT")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
DECADE = 10 * 365.25 * 86400


class Operations:
    """Counts them below one folder, and does one thing at one of them."""

    def __init__(self, root: str, *, at: int | None, then: str, record: str) -> None:
        self.root, self.at, self.then = os.path.realpath(root), at, then
        self.count = 0
        self.failing = False
        self.record = os.open(record, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) if record else None
        self.write = os.write  # the real one

    def name(self, file: Any) -> str | None:
        """Of a path or handle, below the folder; None elsewhere."""
        path = os.readlink(f"/proc/self/fd/{file}") if isinstance(file, int) else os.path.abspath(os.fsdecode(file))
        inside = os.path.relpath(
            os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path)), self.root
        )
        return None if inside == ".." or inside.startswith("../") else inside

    def before(self, what: str, file: Any) -> bool:
        """Called before an operation. Whether the process is to die halfway through it. Raises OSError if it fails."""
        name = self.name(file)
        if name is None:
            return False
        if self.record is not None:
            self.write(self.record, f"{what} {name}\n".encode())
        now = self.count == self.at
        self.count += 1
        if now and self.then == "kill":
            die()
        if now and self.then == "halfway":
            return True
        if now and self.then.startswith("SIG"):
            for number in self.then.split():
                os.kill(os.getpid(), signal.Signals[number])
        elif now:
            self.failing = True
        if self.failing and not (self.then in FULL and what in NEEDS_NO_ROOM):
            number = getattr(errno, self.then)
            raise OSError(number, os.strerror(number), *([] if isinstance(file, int) else [file]))
        return False


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)  # a signal arrives a moment later


def watch(root: str, *, at: int | None, then: str, record: str) -> None:
    """From now on, in this process."""
    operations = Operations(root, at=at, then=then, record=record)

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if not isinstance(path, int) and flags & WRITING:
                operations.before("open", path)
        elif event == "os.rename":
            operations.before("rename", arguments[1])
        elif event in ("os.remove", "os.truncate", "os.mkdir"):
            operations.before(event.removeprefix("os."), arguments[0])

    class Watched(io.FileIO):
        def write(self, content: Any) -> int | None:  # type: ignore[override]
            if operations.before("write", self.fileno()):
                super().write(bytes(content)[: len(bytes(content)) // 2])
                die()
            return super().write(content)

    real_open: Callable[..., Any] = builtins.open

    def watched_open(file: Any, mode: str = "r", buffering: int = -1, *more: Any, **options: Any) -> Any:
        plain = mode.replace("b", "").replace("t", "")
        if isinstance(file, int) or plain not in ("w", "a", "x") or operations.name(file) is None:
            return real_open(file, mode, buffering, *more, **options)
        binary = io.BufferedWriter(Watched(file, plain))
        return binary if "b" in mode else io.TextIOWrapper(binary, *more, **options)

    def watched_write(handle: int, content: Any) -> int:
        if os.path.isfile(f"/proc/self/fd/{handle}") and operations.before("write", handle):
            operations.write(handle, bytes(content)[: len(content) // 2])
            die()
        return operations.write(handle, content)

    real_fsync = os.fsync

    def watched_fsync(handle: int) -> None:
        operations.before("fsync", handle)
        real_fsync(handle)

    builtins.open = io.open = watched_open
    os.write, os.fsync = watched_write, watched_fsync  # type: ignore[assignment]
    sys.addaudithook(audit)


def derange_clock() -> None:
    """time.time jumps by a decade and back, from call to call."""
    real, jumps = time.time, itertools.cycle((0.0, DECADE, -DECADE, 3600.0))
    time.time = lambda: real() + next(jumps)


def interrupt(at: int, then: str) -> None:
    """Something happens at the computation of this number, of those that may run out of memory."""
    from utils.numerics.compute import Compute

    real, number = Compute.retry, itertools.count()

    def retry(compute: Any, function: Callable[[], Any]) -> Any:
        now = next(number)
        if then == "full" and now >= at:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 10 bytes")
        if now == at and then == "kill":
            die()
        if now == at and then.startswith("SIG"):
            os.kill(os.getpid(), signal.Signals[then])
        return real(compute, function)

    Compute.retry = retry  # type: ignore[assignment, method-assign]
