"""How OpenMP's threads wait: asleep while idle threads are held, spinning otherwise, with the same results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Seconds of processor time per tensor operation, most of which are what the second thread spins for after it; the
# number of threads; and a result. They do not depend on other work of the machine.
PROGRAM = """
import ctypes, json, os, sys, time
from threading import Thread
import torch
from utils.system import waiting

torch.set_num_threads(len(os.sched_getaffinity(0)))
x = torch.linspace(0, 1, 2**18)

def state():
    start = time.process_time()
    for _ in range(20):
        x.cos()
        time.sleep(0.05)
    return (time.process_time() - start) / 20, len(os.listdir("/proc/self/task")), x.cos().sum().item()

def until(there):
    while len(os.listdir("/proc/self/task")) != there:
        time.sleep(0.01)

usual = state()
waiting.CONTENDED, waiting.HOLD = float(sys.argv[1]), 3.0
waiting.spin_only_when_idle()
watched = len(os.listdir("/proc/self/task"))
time.sleep(1.5)
during = state()
if watched > usual[1]:
    until(watched)  # what was held is let go
print(json.dumps([usual, during, watched]))
"""

linux = pytest.mark.skipif(
    not Path("/proc/self/task").exists() or len(os.sched_getaffinity(0)) < 2,
    reason="needs Linux and two processors",
)


def measured(contended: float, **environment: str) -> tuple[list[float], list[float], int]:
    """Seconds, threads and result as usual and while contended, and the number of threads with the one that watches."""
    own = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    command = [sys.executable, "-c", PROGRAM, str(contended)]
    done = subprocess.run(command, env=own | environment, capture_output=True, text=True, timeout=120, check=True)
    usual, during, watched = json.loads(done.stdout)
    return usual, during, watched


@linux
def test_threads_sleep_while_processors_are_contended_and_results_stay() -> None:
    usual, during, watched = measured(-1.0)  # whatever happens counts as contended
    assert watched == usual[1] + 1  # the one that watches
    assert during[1] > watched
    assert during[0] < usual[0] / 3
    assert during[2] == usual[2]


@linux
def test_threads_spin_as_usual_while_processors_are_free() -> None:
    usual, during, watched = measured(float("inf"))
    assert during[1] == watched == usual[1] + 1
    assert during[0] > usual[0] / 3


@linux
@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT"])
def test_what_the_user_has_set_is_left_alone(name: str) -> None:
    usual, during, watched = measured(-1.0, **{name: {"OMP_WAIT_POLICY": "active", "GOMP_SPINCOUNT": "20000"}[name]})
    assert usual[1] == during[1] == watched
