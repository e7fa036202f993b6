"""Locks between processes: they exclude, name their holder, wait, and end with it."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tally import injected
from utils.files.lock import locked
from utils.system.errors import UserError

ROOT = Path(__file__).resolve().parents[2]

HOLD = """
import sys, time
from pathlib import Path
from utils.files.lock import locked
with locked(Path(sys.argv[1]), doing="the test", wait=False):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""
COUNT = """
import sys
from pathlib import Path
from utils.files.lock import locked
lock, counter = Path(sys.argv[1]), Path(sys.argv[2])
for _ in range(int(sys.argv[3])):
    with locked(lock, doing="counting", wait=True):
        counter.write_text(str(int(counter.read_text()) + 1))
"""


def start(code: str, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", code, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True)


def holder(lock: Path, seconds: float) -> subprocess.Popen[str]:
    process = start(HOLD, str(lock), str(seconds))
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


@pytest.mark.faults
def test_a_lock_that_another_process_holds_names_it_and_ends_with_it(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    with injected("a lock's holder is killed"), holder(lock, 60) as process:
        says = rf"in use by process {process.pid} on {platform.node()} \(the test, since .*\); go away"
        with pytest.raises(UserError, match=says), locked(lock, doing="x", wait=False, refusal="go away"):
            pytest.fail("it is held")
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert lock.exists()
        with locked(lock, doing="x", wait=False):
            assert str(os.getpid()) in lock.read_text()
    assert not lock.exists()


@pytest.mark.faults
@pytest.mark.parametrize("content", [b"", b"\xff\x00", b'{"host": "elsewhere", "pid": 1, "doing": "x", "since": "y"}'])
def test_what_a_dead_process_left_does_not_block(content: bytes, tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    lock.write_bytes(content)
    with injected("lock file of a process that is gone"):
        with locked(lock, doing="x", wait=False):
            pass
        assert not lock.exists()


def test_waiting_ends_with_the_other_one_and_says_so_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with holder(tmp_path / ".lock", 0.7) as process, caplog.at_level("INFO", "dream"):
        began = time.monotonic()
        with locked(tmp_path / ".lock", doing="x", wait=True):
            assert time.monotonic() - began > 0.2
        assert [f"waiting for process {process.pid}" in message for message in caplog.messages] == [True]


def test_a_folder_that_cannot_hold_a_lock_is_used_without(tmp_path: Path) -> None:
    with locked(tmp_path / "missing" / ".lock", doing="x", wait=False):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.faults
def test_processes_that_take_turns_never_overlap(tmp_path: Path) -> None:
    """Also while locks are removed and made again all the time."""
    counter = tmp_path / "counter"
    counter.write_text("0")
    with injected("processes that write one file", times=4):
        processes = [start(COUNT, str(tmp_path / ".lock"), str(counter), "50") for _ in range(4)]
        for process in processes:
            process.communicate(timeout=60)
            assert process.returncode == 0
        assert counter.read_text() == "200"
    assert [path.name for path in tmp_path.iterdir()] == ["counter"]
