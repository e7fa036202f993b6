"""The process: exit status, signals, versions, and the terminal, about which nothing else asks."""

from __future__ import annotations

import errno
import io
import os
import platform
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn, TextIO

import torch

from utils.system import distributed
from utils.system.device import device_name, keep_freed_memory, out_of_memory
from utils.system.distributed import Group
from utils.system.errors import UserError, first_line, printable
from utils.system.waiting import spin_only_when_idle

OUT_OF_MEMORY = (
    "error: the memory is full ({}); lower --batch_real, --batch_syn_max, --batch_size, --width or --size, or use a "
    "--device that has more; what was saved last is as it was"
)
DEADLINE = 1  # a reason to stop; signals come after it
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def run_main(main: Callable[[Sequence[str]], int]) -> NoReturn:
    """Run a script's main and exit with its status; errors that users can mend become one line on standard error."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # the scripts set this while they import PyTorch
        signal.signal(signal.SIGINT, signal.default_int_handler)
    keep_freed_memory()
    spin_only_when_idle()
    prepare_output()
    if not distributed.is_first() and sys.stdout is not None:
        discard(sys.stdout)
    name = Path(sys.argv[0]).name
    status, message, lost = 1, None, False
    try:
        status = main(sys.argv[1:])
    except UserError as error:
        status, message, lost = error.status, f"error: {error}", isinstance(error, distributed.LostRank)
    except BrokenPipeError:  # the reader of the output went away, so nobody would see a message
        pass
    except OSError as error:
        hint = "; make room for it and run the same command again" if error.errno in NO_ROOM else ""
        message = f"error: {error.filename or 'a file'}: {error.strerror or first_line(error)}{hint}"
    except KeyboardInterrupt as stop:
        status, message = 130, f"stopped {stop}".rstrip()
    except (RuntimeError, MemoryError, ImportError) as error:
        if out_of_memory(error):
            message = OUT_OF_MEMORY.format(first_line(error))
        elif "does not have a deterministic implementation" in str(error):
            message = f"error: --deterministic: {first_line(error)}"
        else:
            raise
    if message is not None and (text := distributed.message_of_rank(message, lost=lost)) is not None:
        with suppress(OSError):
            print(f"{name}: {printable(text)}", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):  # at its own exit the interpreter would change the status if this fails
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            discard(stream)
    sys.exit(status)


def prepare_output() -> None:
    """Make printing safe: neither characters that the terminal lacks nor a closed stream may do harm.

    The system would give a closed stream's number to the next file that is opened, and messages would go into it.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a closed stream is None
            stream.reconfigure(errors="backslashreplace")


def output_failed(error: OSError) -> None:
    """Handle an error of printing: raise it again, unless a Stopper will end the program.

    A Stopper that is active has received SIGPIPE as well, and stops after the current step; output is discarded then.
    """
    if not callable(signal.getsignal(getattr(signal, "SIGPIPE", signal.SIGTERM))):
        raise error
    discard(sys.stdout)


def discard(stream: TextIO) -> None:
    """Discard all that is in a stream's buffer, and all that will be written to it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class Stopped(Exception):
    """Raised between two steps to stop a computation that can go on later; the message says why."""


class Stopper:
    """Requests to stop, which the main loop asks for between two steps; as a context manager it catches signals.

    They are Ctrl-C, SIGTERM, a closed terminal or pipe, and a time limit. A second Ctrl-C stops at once.
    """

    NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGPIPE")  # Windows has the first two
    SIGNALS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))

    def __init__(self, max_minutes: float | None = None) -> None:
        self.signal: signal.Signals | None = None
        self.max_minutes = max_minutes
        self.deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> Stopper:
        if threading.current_thread() is not threading.main_thread():  # Python allows it nowhere else
            return self
        for number in self.SIGNALS:
            # Ignored, as under nohup: the run is to outlive the terminal. (SIGPIPE is ignored by Python itself.)
            if number.name != "SIGPIPE" and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal() itself returned

    def _note(self, number: int, frame: FrameType | None) -> None:
        """Signal handler: remember the signal, and say on standard error what happens."""
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt("at once; the same command goes on from what was saved last")
        self.signal = signal.Signals(number)
        if number in (signal.SIGINT, signal.SIGTERM):  # after the other signals nobody reads a message
            again = "; again to stop at once" if number == signal.SIGINT else ""
            # os.write, since the signal may have interrupted a print, which must not be entered twice.
            with suppress(OSError):
                if distributed.is_first():
                    os.write(2, f"{self.signal.name}: finishing this step and saving{again}\n".encode())

    def reason(self, *, signals_only: bool = False) -> int:
        """Reason to stop as a number, 0 for none, so that ranks can agree on the largest.

        signals_only: leave the time limit out.
        """
        if self.signal is not None:
            return DEADLINE + self.signal.value
        late = self.deadline is not None and time.monotonic() >= self.deadline
        return DEADLINE if late and not signals_only else 0

    def obey(self, reason: float) -> None:
        """Raise Stopped for a reason that `reason` returned, on this rank or another; 0 does nothing."""
        if reason > DEADLINE:
            self.signal = signal.Signals(int(reason) - DEADLINE)
            raise Stopped(self.signal.name)
        if reason:
            raise Stopped(f"--max_minutes {self.max_minutes:g}")

    def check(self, *, signals_only: bool = False) -> None:
        """Raise Stopped if this process has a reason to stop. signals_only: leave the time limit out."""
        self.obey(self.reason(signals_only=signals_only))

    @contextmanager
    def stopping_together(self, group: Group) -> Iterator[None]:
        """Run a block that a signal may end on single ranks, then raise Stopped on all ranks if it did on any."""
        with suppress(Stopped):
            yield
        (reason,) = group.all_reduce_max(self.reason(signals_only=True))
        self.obey(reason)

    @property
    def status(self) -> int:
        """Exit status after a stop: 0 for the time limit, 128 + the signal's number for a signal."""
        return 0 if self.signal is None else 128 + self.signal.value


def session(program: str, argv: Sequence[str], device: torch.device, **conditions: Any) -> dict[str, Any]:
    """Record of a command for the files that it leaves: what ran, when, on which device and with which versions.

    conditions: entries to add.
    """
    return {
        "command": printable(shlex.join([program, *argv])),
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        **conditions,
        "versions": versions(),
    }


def environment(**more: str) -> dict[str, str]:
    """Environment variables for a process that is to be started: this one's, and more."""
    return {**os.environ, **more}


def versions() -> dict[str, str]:
    """Versions of Python and the libraries, and the git commit of this code, by name."""
    import numpy
    import sklearn
    import torchvision

    here = Path(__file__).resolve().parent
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
        commit = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        commit = ""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": numpy.__version__,
        "scikit-learn": sklearn.__version__,
        "git_commit": commit or "unknown",
    }


def import_matplotlib() -> None:
    """Import matplotlib, whatever MPLBACKEND says: all figures are drawn on canvases of their own.

    A notebook sets it for all processes that it starts, and where this Python lacks that backend, importing would fail.
    """
    if "matplotlib" in sys.modules:
        return
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    if backend is not None:
        with suppress(ValueError):  # for a caller who goes on to use pyplot
            matplotlib.rcParams["backend"] = backend


def on_terminal() -> bool:
    """Whether progress is drawn on a terminal: standard error is one, and this is rank 0."""
    return distributed.is_first() and sys.stderr is not None and sys.stderr.isatty()
