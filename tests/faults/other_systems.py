"""A process that lacks what only Unix has, as on Windows: modules, signals, flags and functions of the system.

A test runs `commands` in a fork of tests/killing.py, which has imported the libraries, as those are for Linux.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

MODULES = ("fcntl", "grp", "pwd", "resource", "termios")
SIGNALS = ("SIGALRM", "SIGCHLD", "SIGHUP", "SIGKILL", "SIGPIPE", "SIGQUIT", "SIGUSR1")
OF_OS = (
    "O_CLOEXEC", "O_DIRECTORY", "O_NOFOLLOW", "O_NONBLOCK", "O_SYNC", "RTLD_NOLOAD", "fork", "getuid", "killpg", "link",
    "mkfifo", "pread", "pwrite", "sched_getaffinity", "setsid", "statvfs", "sync", "sysconf", "uname",
)  # fmt: skip


def commands(argv: Sequence[str]) -> int:
    """Run condense.py --help, condense.py with these flags, train.py and a figure, and print the exit status of each.

    argv: four flags of condense.py alone, then those of both; the last one is --results_dir=FOLDER.
    """
    forget_unix()
    memory, process = map(importlib.import_module, ("utils.system.memory", "utils.system.process"))
    vars(memory).update(MEMINFO=Path("nowhere"), MEMBERSHIP=Path("nowhere"))
    run = Path(argv[-1].partition("=")[2], "digits", "convnet2_f1_ipc1")
    for script, given in (
        ("condense", ["--help"]),
        ("condense", argv),
        ("train", ["--confusion", "--baselines=none", *argv[4:]]),
        ("figs.curves", [str(run), f"--out={run / 'curves.png'}"]),
    ):
        sys.argv[1:] = given
        try:
            process.run_main(importlib.import_module(script).main)
        except SystemExit as end:
            print("status", end.code)
    return 0


def forget_unix() -> None:
    """Take away what only Unix has, and forget our modules, so that they are imported anew."""
    for name in MODULES:
        sys.modules[name] = None  # type: ignore[assignment]
    for name in SIGNALS:
        delattr(signal, name)
    for name in OF_OS:
        delattr(os, name)
    refuse(os, "open", os.path.isdir, PermissionError(13, "Permission denied"))
    refuse(time, "strftime", lambda text: "%F" in text or "%T" in text, ValueError("Invalid format string"))
    refuse(ctypes, "CDLL", lambda name: name is None, TypeError("must be str, not None"))
    shutil._use_fd_functions = False  # type: ignore[attr-defined]
    for name in list(sys.modules):
        if name.partition(".")[0] in ("condense", "data", "figs", "models", "train", "utils"):
            del sys.modules[name]


def refuse(module: ModuleType, name: str, wrong: Callable[[Any], object], error: Exception) -> None:
    """Have a module's function raise an error where its first argument is wrong."""
    function = getattr(module, name)

    def guarded(first: Any, *more: Any, **named: Any) -> Any:
        if wrong(first):
            raise error
        return function(first, *more, **named)

    setattr(module, name, guarded)
