"""condense.py in a terminal or a pipe that is closed, beside other processes on one folder, in folders of any name."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import random
import shlex
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from tests.killing import (
    CHECKPOINT_WRITE,
    FOLDER,
    ROOT,
    Operation,
    Server,
    finished,
    goes_on,
    must_be,
    program,
    the,
    tiny,
    two_at_a_time,
)
from tests.outcome import Outcome
from tests.tally import injected

pytestmark = pytest.mark.faults

# --- Streams and terminals --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("streams", ["", "2>&1"])
def test_a_broken_pipe_ends_a_run_cleanly(server: Server, undisturbed: Outcome, tmp_path: Path, streams: str) -> None:
    results = tmp_path / "results"
    command = shlex.join([sys.executable, str(ROOT / "condense.py"), *tiny(results, "--niter", "500", "--tag", "x")])
    with injected("reader of the output gone") as fault:
        script = f"{command} {streams} | head -1; exit ${{PIPESTATUS[0]}}"
        found = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=120)
        assert found.returncode == 128 + signal.SIGPIPE and found.stderr == "", found
        assert found.stdout.count("\n") == 1
        folder = results / FOLDER.with_name(f"{FOLDER.name}_x")
        assert json.loads((folder / "data.json").read_text())["finished"] is False and not list(folder.glob(".*"))
        assert "stopped (SIGPIPE)" in (folder / "log.txt").read_text()
        goes_on(server, results, undisturbed, fault)


def pseudo_terminal() -> tuple[int, str]:
    """Our end, and the path of the other one, which nobody holds open yet."""
    ours, theirs = os.openpty()
    fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    path = os.ttyname(theirs)
    os.close(theirs)
    return ours, path


def read_until(handle: int, text: bytes) -> bytes:
    """From a terminal; what there was in half a minute at most."""
    shown, deadline = b"", time.monotonic() + 30
    while text not in shown and time.monotonic() < deadline:
        try:
            shown += os.read(handle, 4096)
        except OSError:  # EIO: nobody has the other end open yet, or any more
            time.sleep(0.01)
    return shown


def test_a_closed_terminal_ends_the_run_like_a_signal(server: Server, undisturbed: Outcome, tmp_path: Path) -> None:
    results = tmp_path / "results"
    with injected("terminal closed") as fault:
        ours, path = pseudo_terminal()
        child = server.start(tiny(results, "--niter", "500", "--tag", "x"), terminal=path)
        assert b"distilling:" in read_until(ours, b"step/s")
        os.close(ours)
        ended = child.wait()
        assert ended.status == 128 + signal.SIGHUP, ended
        log = (results / FOLDER.with_name(f"{FOLDER.name}_x") / "log.txt").read_text()
        assert "stopped (SIGHUP)" in log and "Error" not in log
        goes_on(server, results, undisturbed, fault)


@pytest.mark.slow
def test_a_terminal_closed_at_random_loses_nothing(server: Server, undisturbed: Outcome, tmp_path: Path) -> None:
    def check(seed: int) -> None:
        with injected("terminal closed") as fault:
            results = tmp_path / f"results_{seed}"
            ours, path = pseudo_terminal()
            child = server.start(tiny(results), terminal=path)
            time.sleep(random.Random(seed).uniform(0, 1))
            os.close(ours)
            ended = child.wait()
            assert ended.status in (0, -signal.SIGHUP, 128 + signal.SIGHUP), ended
            goes_on(server, results, undisturbed, fault)

    two_at_a_time(check, range(12))


@pytest.mark.slow
def test_a_terminal_that_knows_only_ascii_shows_any_path(undisturbed: Outcome, tmp_path: Path) -> None:
    with injected("terminal that lacks characters") as fault:
        results = tmp_path / "r\u00e9sultats \u96ea"
        found = finished(program(results, PYTHONIOENCODING="ascii", PYTHONUTF8="0", LC_ALL="C"))
        must_be(undisturbed, found, results / FOLDER, fault)
        assert found.out.isascii() and "\\udcc3\\udca9sultats" in found.out


# --- Several processes ------------------------------------------------------------------------------------------------


def test_of_processes_started_together_on_one_folder_exactly_one_runs(
    server: Server, operations: list[Operation], undisturbed: Outcome, tmp_path: Path
) -> None:
    results = tmp_path / "results"
    at = next(o.at for o in operations if (o.what, o.file) == CHECKPOINT_WRITE)
    with injected("another process on the same run folder", times=5) as fault:
        children = [server.start(tiny(results), root=str(results), at=at, then="SIGSTOP") for _ in range(6)]
        lock = results / FOLDER / ".lock"
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and not any(child.paused for child in children):
            time.sleep(0.01)
        (holder,) = [child for child in children if child.paused]
        assert json.loads(lock.read_text())["pid"] == holder.pid
        for child in children:
            if child is not holder:
                ended = child.wait()
                says = f"condense.py: error: {results / FOLDER}: in use by process {holder.pid} on {platform.node()} ("
                assert ended.status == 1 and ended.out == "" and ended.err.startswith(says), ended
                assert ended.err.count("\n") == 1 and "--tag" in ended.err
        holder.send(signal.SIGCONT)
        must_be(undisturbed, holder.wait(), results / FOLDER, fault)


# --- Folders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["-d %s {x}", "two\nlines \x1b[31m", "\u00e9t\u00e9 \u96ea"], ids=ascii)
def test_a_results_folder_may_have_any_name_and_be_named_in_several_ways(
    server: Server, operations: list[Operation], undisturbed: Outcome, tmp_path: Path, name: str
) -> None:
    with injected("strange name of the results folder") as fault:
        at = the(operations, *CHECKPOINT_WRITE).at
        relative = [*tiny(""), f"--results_dir={name}"]
        ended = server.run(relative, cwd=str(tmp_path), root=str(tmp_path / name), at=at, then="SIGTERM")
        assert ended.status == 128 + signal.SIGTERM, ended
        assert all(character.isprintable() for character in ended.out.replace("\n", "")), ended
        goes_on(server, tmp_path / name, undisturbed, fault)


@pytest.mark.parametrize("depth", [0, 1, 2], ids=["results folder", "folder of the data set", "run folder"])
def test_a_folder_may_be_a_link(
    server: Server, operations: list[Operation], undisturbed: Outcome, tmp_path: Path, depth: int
) -> None:
    link, elsewhere = Path(tmp_path / "results", *FOLDER.parts[:depth]), tmp_path / "elsewhere"
    elsewhere.mkdir()
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(elsewhere)
    with injected("folder that is a link") as fault:
        at = the(operations, *CHECKPOINT_WRITE).at
        ended = server.run(tiny(tmp_path / "results"), root=str(tmp_path), at=at, then="SIGTERM")
        assert ended.status == 128 + signal.SIGTERM, ended
        must_be(undisturbed, server.run(tiny(tmp_path / "results")), tmp_path / "results" / FOLDER, fault)
        assert Path(elsewhere, *FOLDER.parts[depth:], "data.pt").exists()
