"""The process: its errors and signals, random draws, versions. Nothing else asks about the terminal."""

from __future__ import annotations

import errno
import io
import os
import platform
import shlex
import signal
import subprocess
import sys
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

OUT_OF_MEMORY = (
    "error: the memory is full ({}); lower --batch_real, --batch_syn_max, --batch_size, --width or --size, or use a "
    "--device that has more; what was saved last is as it was"
)
DEADLINE = 1  # a reason to stop; signals come after it
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def run_main(main: Callable[[Sequence[str]], int]) -> NoReturn:
    """Call a script's main as a program: mistakes become one line on standard error, results the exit status."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # which scripts set while they load
        signal.signal(signal.SIGINT, signal.default_int_handler)
    keep_freed_memory()
    prepare_output()
    if not distributed.is_first() and sys.stdout is not None:
        discard(sys.stdout)
    name = Path(sys.argv[0]).name
    status, message, lost = 1, None, False
    try:
        status = main(sys.argv[1:])
    except UserError as error:
        status, message, lost = error.status, f"error: {error}", isinstance(error, distributed.LostRank)
    except BrokenPipeError:  # the reader of our output went away: nobody is left to tell
        pass
    except OSError as error:
        hint = "; make room for it and run the same command again" if error.errno in NO_ROOM else ""
        message = f"error: {error.filename or 'a file'}: {error.strerror or error}{hint}"
    except KeyboardInterrupt as stop:
        status, message = 130, f"stopped {stop}".rstrip()
    except (RuntimeError, MemoryError, ImportError) as error:
        if "does not have a deterministic implementation" in str(error):
            message = f"error: --deterministic: {first_line(error)}"
        elif not out_of_memory(error):
            raise
        else:
            message = OUT_OF_MEMORY.format(first_line(error))
    if message is not None and (said := distributed.message_of_rank(message, lost=lost)) is not None:
        with suppress(OSError):
            print(f"{name}: {printable(said)}", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):  # here, since the interpreter would change the status if it cannot
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            discard(stream)
    sys.exit(status)


def prepare_output() -> None:
    """Nothing that is printed may do harm: neither for characters that the terminal lacks, nor for a closed stream,
    whose number the system would give to the next file that is opened."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a closed one is None
            stream.reconfigure(errors="backslashreplace")


def output_failed(error: OSError) -> None:
    """What to do when something could not be printed. With a Stopper on watch, which the system has told as well, the
    program will end where it is fit to, and the rest goes nowhere; otherwise the error is raised again."""
    if not callable(signal.getsignal(signal.SIGPIPE)):
        raise error
    discard(sys.stdout)


def discard(stream: TextIO) -> None:
    """Whatever is and will be written to a stream goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class Stopped(Exception):
    """Raised between two steps to leave a computation that can go on later; says why."""


class Stopper:
    """Turns Ctrl-C, SIGTERM, a closed terminal or pipe, and a time limit into a question that the main loop asks
    between two steps.

    A second Ctrl-C stops at once.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE)

    def __init__(self, max_minutes: float | None = None) -> None:
        self.signal: signal.Signals | None = None
        self.max_minutes = max_minutes
        self.deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> Stopper:
        for number in self.SIGNALS:
            # As under nohup: the run is meant to outlive the terminal. (Python itself ignores SIGPIPE.)
            if number != signal.SIGPIPE and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal() itself returned

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt("at once; the same command goes on from what was saved last")
        self.signal = signal.Signals(number)
        if number in (signal.SIGINT, signal.SIGTERM):  # after the others nobody reads it
            again = "; again to stop at once" if number == signal.SIGINT else ""
            # Not print: the signal may have come in the middle of one, which must not be entered twice.
            with suppress(OSError):
                if distributed.is_first():
                    os.write(2, f"{self.signal.name}: finishing this step and saving{again}\n".encode())

    def reason(self, *, signals_only: bool = False) -> int:
        """Why to stop, as a number, 0 for no reason; the larger one counts. With `signals_only` the time is none."""
        if self.signal is not None:
            return DEADLINE + self.signal.value
        late = self.deadline is not None and time.monotonic() >= self.deadline
        return DEADLINE if late and not signals_only else 0

    def obey(self, reason: float) -> None:
        """Raise Stopped if there is a reason, here or in another process."""
        if reason > DEADLINE:
            self.signal = signal.Signals(int(reason) - DEADLINE)
            raise Stopped(self.signal.name)
        if reason:
            raise Stopped(f"--max_minutes {self.max_minutes:g}")

    def check(self, *, signals_only: bool = False) -> None:
        """Raise Stopped if there is a reason here."""
        self.obey(self.reason(signals_only=signals_only))

    @contextmanager
    def stopping_together(self, group: Group) -> Iterator[None]:
        """Run a block that a signal ends on one rank, then raise Stopped on all ranks if it did on any."""
        with suppress(Stopped):
            yield
        (reason,) = group.all_reduce_max(self.reason(signals_only=True))
        self.obey(reason)

    @property
    def status(self) -> int:
        """The exit status after a stop: 0 when it was planned, 128 + the signal's number otherwise."""
        return 0 if self.signal is None else 128 + self.signal.value


def session(program: str, argv: Sequence[str], device: torch.device, **conditions: Any) -> dict[str, Any]:
    """What ran, when, on what, for the files that it leaves; conditions: entries to add."""
    return {
        "command": shlex.join([program, *argv]),
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        **conditions,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Versions, and the code's own commit."""
    import numpy
    import sklearn
    import torchvision

    here = Path(__file__).resolve().parent
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=10,
        ).stdout.strip()
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


def on_terminal() -> bool:
    """Whether a person sees the progress as it is drawn."""
    return distributed.is_first() and sys.stderr is not None and sys.stderr.isatty()
