"""How the threads that PyTorch computes with on a CPU wait for each other: those of libgomp, GCC's OpenMP.

A thread that has done its part spins for up to 300,000 rounds before it sleeps. That is fastest while every thread has
a processor of its own. Beside other programs it burns the time slices that the thread it waits for would need, and a
run takes many times what its share of the processors explains. libgomp spins for 100 rounds where a process has more
threads than there are processors (its manual, GOMP_SPINCOUNT), so while processors are contended we hold threads that
do nothing. The threads that compute, and with them all results, stay as they are.
"""

from __future__ import annotations

import ctypes
import os
import time
from contextlib import suppress
from pathlib import Path
from threading import Thread

import torch

CONTENDED = 0.2  # seconds of a second for which a thread that could run had no processor
HOLD = 30.0  # seconds until spinning is tried again, since the other programs may have ended


def spin_only_when_idle() -> None:
    """Watch in the background whether processors are contended, and let threads wait asleep while they are.

    OMP_WAIT_POLICY and GOMP_SPINCOUNT, where the user has set one, are left alone. Nothing happens either with a single
    thread, without libgomp, and on systems other than Linux.
    """
    by_user = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys()
    if by_user or torch.get_num_threads() == 1 or not any(waiting_seconds().values()):
        return
    with suppress(OSError, RuntimeError):  # libgomp is not loaded, or the system allows no more threads
        libgomp = ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOLOAD)
        Thread(target=watch, args=(libgomp,), daemon=True).start()


def watch(libgomp: ctypes.CDLL) -> None:
    """Hold idle threads whenever the processors were contended for a second; for ever."""
    while True:
        before = waiting_seconds()
        time.sleep(1)
        if any(seconds - before.get(thread, seconds) > CONTENDED for thread, seconds in waiting_seconds().items()):
            with suppress(RuntimeError):  # the system allows no more threads
                holder = Thread(target=hold_idle_threads, args=(libgomp, HOLD), daemon=True)
                holder.start()
                holder.join()


def hold_idle_threads(libgomp: ctypes.CDLL, seconds: float) -> None:
    """Make libgomp count more threads than processors for a while.

    OpenMP's threads belong to the thread that needed them, here the calling one: they end with it.
    """
    count = max(2, len(os.sched_getaffinity(0)) + 2 - torch.get_num_threads())  # the caller is one of them
    libgomp.GOMP_parallel(ctypes.CDLL(None).getpid, None, count, 0)  # each calls this function, which does no harm
    time.sleep(seconds)


def waiting_seconds() -> dict[str, float]:
    """Seconds for which each thread of this process could run and had no processor, by its number; Linux only."""
    found = {}
    for file in Path("/proc/self/task").glob("*/schedstat"):
        with suppress(OSError):  # the thread has ended meanwhile
            found[file.parent.name] = int(file.read_text().split()[1]) / 1e9
    return found
