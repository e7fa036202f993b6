"""How OpenMP's threads wait: asleep while idle threads are held, spinning otherwise, with the same results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Prints, before and while processors count as contended: seconds of processor time per operation, most of which are
# what the second thread spins for after it, whatever else the machine does; the number of threads; and a result.
PROGRAM = """
import json, os, time
import torch
from utils.system import waiting

torch.set_num_threads(len(os.sched_getaffinity(0)))
x = torch.linspace(0, 1, 2**18)

def threads():
    return len(os.listdir("/proc/self/task"))

def state():
    x.cos()
    start = time.process_time()
    for _ in range(10):
        x.cos()
        time.sleep(0.03)
    return (time.process_time() - start) / 10, threads(), x.cos().sum().item()

usual = state()
waiting.CONTENDED, waiting.HOLD = -1.0, 4.0  # always contended
waiting.spin_only_when_idle()
watched = threads()
during = usual
if watched > usual[1]:
    for more in (True, False):  # idle threads are held, and let go
        while (threads() > watched) != more:
            time.sleep(0.01)
        if more:
            time.sleep(0.1)
            during = state()
print(json.dumps([usual, during, watched]))
"""

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/schedstat").exists() or len(os.sched_getaffinity(0)) < 2,
    reason="needs Linux and two processors",
)


def measured(**environment: str) -> tuple[list[float], list[float], int]:
    """Seconds, threads and result before and while contended, and the number of threads with the one that watches."""
    own = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=own | environment, capture_output=True, text=True, timeout=300, check=True)
    usual, during, watched = json.loads(done.stdout)
    return usual, during, watched


@pytest.mark.slow
def test_threads_sleep_while_processors_are_contended_and_results_stay() -> None:
    usual, during, watched = measured()
    assert watched == usual[1] + 1  # the one that watches
    assert during[1] > watched
    assert during[0] < usual[0] / 3
    assert during[2] == usual[2]


def test_what_the_user_has_set_is_left_alone() -> None:
    usual, _, watched = measured(GOMP_SPINCOUNT="20000")
    assert watched == usual[1]
