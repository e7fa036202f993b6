"""No room for what condense.py writes, or no right: one line, both checkpoints whole, and the same command goes on."""

from __future__ import annotations

import os
import random
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.killing import FOLDER, Operation, Server, goes_on, must_be, must_say, tiny, two_at_a_time
from tests.outcome import Outcome
from tests.tally import injected

pytestmark = pytest.mark.faults


@pytest.mark.slow
def test_a_limit_of_a_file_s_size_ends_in_one_line(server: Server, undisturbed: Outcome, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    assert server.run(tiny(whole)).status == 0
    sizes = sorted({file.stat().st_size for file in (whole / FOLDER).iterdir()})

    def check(size: int) -> None:
        results = tmp_path / str(size)
        with injected("file-size limit") as fault:
            ended = server.run(tiny(results), file_bytes=size - 1)
            must_say(ended, "EFBIG", results)
            goes_on(server, results, undisturbed, fault)

    two_at_a_time(check, [size for size in sizes if size > 200])


# --- A disk that is really full ---------------------------------------------------------------------------------------


@pytest.fixture
def on_disk(server: Server, tmp_path: Path) -> Iterator[tuple[Server, Path]]:
    """A file system of four megabytes, and a server whose runs see it; skipped where none can be mounted."""
    place, alone = tmp_path / "disk", ["unshare", "-Urm"]
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True).returncode == 0:
        try:
            yield server, place
        finally:
            subprocess.run(["umount", "--lazy", str(place)], check=True)
        return
    mounted = subprocess.run([*alone, *mount], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted: {mounted.stderr.decode().strip()}")
    with Server(*alone, "sh", "-c", f'{shlex.join(mount)} && exec "$@"', "sh") as apart:  # and gone with it
        yield apart, Path(f"/proc/{apart.pid}/root{place}")


def fill(disk: Path) -> Path:
    """Everything but a few random kilobytes."""
    ballast = disk / "ballast"
    with open(ballast, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
    return ballast


@pytest.mark.slow
def test_a_disk_that_fills_up_at_random_loses_nothing(on_disk: tuple[Server, Path], undisturbed: Outcome) -> None:
    server, disk = on_disk
    draw, failed = random.Random(0), 0
    for turn in range(14):
        results = disk / f"results {turn}"
        flags = ["--tensorboard"] if turn % 3 == 1 and find_spec("tensorboard") else []
        with injected(f"full disk (tmpfs){', with TensorBoard' if flags else ''}") as fault:
            ballast = disk / "ballast"
            if turn % 2:  # full before it starts but for a little
                fill(disk)
                os.truncate(ballast, max(ballast.stat().st_size - 4096 * draw.randrange(60), 0))
            child = server.start(tiny(results, *flags))
            if not turn % 2:
                time.sleep(draw.uniform(0, 0.5))
                fill(disk)
            ended = child.wait()
            if ended.status:
                failed += 1
                must_say(ended, "ENOSPC", disk)
            ballast.unlink()
            goes_on(server, results, undisturbed, fault, *flags)
    assert failed > 5


def test_a_disk_that_is_full_when_a_signal_asks_to_save_is_told_in_one_line(
    on_disk: tuple[Server, Path], operations: list[Operation], undisturbed: Outcome
) -> None:
    server, disk = on_disk
    results = disk / "results"
    at = [o.at for o in operations if (o.what, o.file) == ("write", "metrics.jsonl")][2]
    with injected("full disk (tmpfs), and a signal") as fault:
        child = server.start(tiny(results), root=str(results), at=at, then="SIGSTOP")
        child.until_paused()
        ballast = fill(disk)
        child.send(signal.SIGTERM)
        child.send(signal.SIGCONT)
        ended = child.wait()
        notice = "SIGTERM: finishing this step and saving\n"
        assert ended.err.startswith(notice), ended
        must_say(replace(ended, err=ended.err.removeprefix(notice)), "ENOSPC", results)
        ballast.unlink()
        goes_on(server, results, undisturbed, fault)


# --- No right to write ------------------------------------------------------------------------------------------------


def test_a_results_folder_that_is_read_only_is_named(server: Server, undisturbed: Outcome, tmp_path: Path) -> None:
    results = tmp_path / "results"
    results.mkdir()
    with injected("read-only results folder") as fault:
        results.chmod(0o555)
        ended = server.run(tiny(results), plain_user=True)
        says = r"condense\.py: error: [^\n]*cannot be written \(Permission denied\)[^\n]*--results_dir\n"
        assert ended.status == 1 and re.fullmatch(says, ended.err) and str(results) in ended.err, ended
        assert not list(results.iterdir())
        results.chmod(0o755)
        goes_on(server, results, undisturbed, fault)


def test_a_run_folder_that_turns_read_only_ends_the_run_in_one_line(
    server: Server, operations: list[Operation], undisturbed: Outcome, tmp_path: Path
) -> None:
    results = tmp_path / "results"
    at = next(o.at for o in operations if (o.what, o.file) == ("write", "metrics.jsonl"))
    with injected("read-only results folder") as fault:
        child = server.start(tiny(results), root=str(results), at=at, then="SIGSTOP", plain_user=True)
        child.until_paused()
        (results / FOLDER).chmod(0o555)
        child.send(signal.SIGCONT)
        must_say(child.wait(), "EACCES", results)
        (results / FOLDER).chmod(0o755)
        must_be(undisturbed, server.run(tiny(results)), results / FOLDER, fault)
