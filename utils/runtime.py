"""The process: its errors and signals, random draws, versions. Nothing else asks about the terminal."""

from __future__ import annotations

import errno
import hashlib
import os
import platform
import random
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn

import torch
from torch import Tensor

from utils.device import device_name, keep_freed_memory
from utils.errors import UserError, first_line


def run_main(main: Callable[[Sequence[str]], int]) -> NoReturn:
    """Call a script's main as a program: mistakes become one line on standard error, results the exit status."""
    keep_freed_memory()
    name = Path(sys.argv[0]).name
    try:
        status = main(sys.argv[1:])
    except UserError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        status = error.status
    except torch.OutOfMemoryError:
        print(
            f"{name}: error: the GPU's memory is full; lower --batch_real, --batch_syn_max or --batch_size, "
            "or use --device cpu",
            file=sys.stderr,
        )
        status = 1
    except RuntimeError as error:
        if "allocate memory" not in str(error):
            raise
        print(
            f"{name}: error: the memory is full ({first_line(error)}); lower --width, --size or batches",
            file=sys.stderr,
        )
        status = 1
    except BrokenPipeError:  # the reader of our output went away: nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except OSError as error:
        hint = "; free some space and run the same command again" if error.errno == errno.ENOSPC else ""
        print(f"{name}: error: {error.filename or 'a file'}: {error.strerror or error}{hint}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt as stop:
        print(f"{name}: stopped {stop}".rstrip(), file=sys.stderr)
        status = 130
    sys.exit(status)


class Draws:
    """Random numbers that depend on nothing but a key such as (seed, "select", iteration, step).

    A run can therefore stop and go on anywhere without storing a generator's state. `host` serves choices that Python
    makes (no copy from the device is ever waited for), the methods serve tensors, drawn on the device.
    """

    def __init__(self, device: torch.device | str, *key: int | str) -> None:
        digest = hashlib.sha256(repr(key).encode()).digest()
        seed = int.from_bytes(digest[:8], "little") >> 1
        self.device = torch.device(device)
        self.host = random.Random(seed)
        self.generator = torch.Generator(self.device).manual_seed(seed)

    def uniform(self, *shape: int) -> Tensor:
        """In [0, 1)."""
        return torch.rand(shape, generator=self.generator, device=self.device)

    def normal(self, *shape: int) -> Tensor:
        """Zero mean, unit variance."""
        return torch.randn(shape, generator=self.generator, device=self.device)

    def permutation(self, n: int) -> Tensor:
        """The numbers below n in random order; its head is a draw without replacement."""
        return torch.randperm(n, generator=self.generator, device=self.device)

    def network_seed(self) -> int:
        """A seed for PyTorch's global generator, from which networks are initialised."""
        return self.host.getrandbits(63)


class Stopped(Exception):
    """Raised between two steps to leave a computation that can go on later; says why."""


class Stopper:
    """Turns Ctrl-C, SIGTERM and a time limit into a question that the main loop asks between two steps.

    A second Ctrl-C stops at once.
    """

    def __init__(self, max_minutes: float | None = None) -> None:
        self.signal: signal.Signals | None = None
        self.max_minutes = max_minutes
        self.deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> Stopper:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal() itself returned

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt("at once; the same command goes on from what was saved last")
        self.signal = signal.Signals(number)
        again = "; again to stop at once" if number == signal.SIGINT else ""
        # Not print: the signal may have come in the middle of one, which must not be entered twice.
        os.write(2, f"{self.signal.name}: finishing this step and saving{again}\n".encode())

    def check(self, *, signals_only: bool = False) -> None:
        """Raise Stopped if there is a reason; with `signals_only` the time limit is none."""
        if self.signal is not None:
            raise Stopped(self.signal.name)
        if not signals_only and self.deadline is not None and time.monotonic() >= self.deadline:
            raise Stopped(f"--max_minutes {self.max_minutes:g}")

    @property
    def status(self) -> int:
        """The exit status after a stop: 0 when it was planned, 128 + the signal's number otherwise."""
        return 0 if self.signal is None else 128 + self.signal.value


def session(program: str, argv: Sequence[str], device: torch.device) -> dict[str, Any]:
    """What ran, when, on what, for the files that it leaves."""
    return {
        "command": shlex.join([program, *argv]),
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "device": device_name(device),
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
    return sys.stderr.isatty()
