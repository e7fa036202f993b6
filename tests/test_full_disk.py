"""No room for what condense.py writes, or no right: one line, both checkpoints whole, and the same command goes on."""

from __future__ import annotations

import importlib.util
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults import injected
from tests.killing import FOLDER, Ended, Operation, Server, goes_on, must_be, one_of_each_kind, tiny, two_at_a_time
from tests.outcome import Outcome
from utils.run import CHECKPOINT, PREVIOUS, valid_checkpoint

pytestmark = pytest.mark.faults

CANNOT = r"condense\.py: error: [^\n]*{}[^\n]*\n"
REASONS = {
    "ENOSPC": "No space left on device",
    "EDQUOT": "Disk quota exceeded",
    "EFBIG": "File too large",
    "EROFS": "Read-only file system",
    "EIO": "Input/output error",
    "EACCES": "Permission denied",
}


def must_say(ended: Ended, reason: str, results: Path) -> None:
    """One line that names a file, and checkpoints that are whole as far as there are any."""
    assert ended.status == 1 and re.fullmatch(CANNOT.format(REASONS[reason]), ended.err), ended
    assert str(results) in ended.err, ended
    for name in (CHECKPOINT, PREVIOUS):
        if (file := results / FOLDER / name).exists():
            valid_checkpoint(file)
    assert reason in ("EROFS", "EIO") or not list((results / FOLDER).glob(".*.part"))  # where it can be removed


@pytest.mark.parametrize(
    ("what", "file", "reason"),
    [
        ("write", ".checkpoint.pt.part", "ENOSPC"),
        ("write", "metrics.jsonl", "EDQUOT"),
        ("open", ".data.pt.part", "EROFS"),
        ("fsync", ".data.json.part", "EIO"),
        ("write", "log.txt", "ENOSPC"),
    ],
)
def test_a_write_that_fails_ends_in_one_line_and_the_run_goes_on(
    server: Server,
    operations: list[Operation],
    undisturbed: Outcome,
    tmp_path: Path,
    what: str,
    file: str,
    reason: str,
) -> None:
    results = tmp_path / "results"
    operation = next(o for o in one_of_each_kind(operations) if (o.what, o.file) == (what, file))
    with injected("full or failing disk at a file operation") as fault:
        ended = server.run(tiny(results), root=str(results), at=operation.at, then=reason)
        must_say(ended, reason, results)
        goes_on(server, results, undisturbed, fault)


@pytest.mark.slow
@pytest.mark.parametrize("reason", ["ENOSPC", "EROFS"])
def test_a_disk_that_fails_at_any_kind_of_file_operation_loses_nothing(
    server: Server, operations: list[Operation], undisturbed: Outcome, tmp_path: Path, reason: str
) -> None:
    def check(operation: Operation) -> None:
        results = tmp_path / str(operation.at)
        with injected("full or failing disk at a file operation") as fault:
            ended = server.run(tiny(results), root=str(results), at=operation.at, then=reason)
            if ended.status:  # after the last result, neither the log nor the lock is worth an error
                must_say(ended, reason, results)
            results.mkdir(exist_ok=True)
            goes_on(server, results, undisturbed, fault)

    two_at_a_time(check, one_of_each_kind(operations))


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
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of four megabytes; the test is skipped where none can be mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted: {mounted.stderr.decode().strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


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
def test_a_disk_that_fills_up_at_random_moments_loses_nothing(server: Server, undisturbed: Outcome, disk: Path) -> None:
    draw, failed = random.Random(0), 0
    for turn in range(14):
        results = disk / f"results {turn}"
        with injected("full disk (tmpfs)") as fault:
            ballast = disk / "ballast"
            if turn % 2:  # full before it starts but for a little
                fill(disk)
                os.truncate(ballast, max(ballast.stat().st_size - 4096 * draw.randrange(60), 0))
            child = server.start(tiny(results))
            if not turn % 2:
                time.sleep(draw.uniform(0, 0.5))
                fill(disk)
            ended = child.wait()
            if ended.status:
                failed += 1
                must_say(ended, "ENOSPC", disk)
            ballast.unlink()
            goes_on(server, results, undisturbed, fault)
    assert failed > 5


@pytest.mark.slow
def test_a_full_disk_ends_a_run_with_tensorboard_in_one_line(server: Server, disk: Path) -> None:
    if importlib.util.find_spec("tensorboard") is None:
        pytest.skip("TensorBoard is not installed")
    for kilobytes in (40, 120, 200):
        with injected("full disk (tmpfs), with TensorBoard"):
            fill(disk)
            os.truncate(disk / "ballast", (disk / "ballast").stat().st_size - 1024 * kilobytes)
            argv = tiny(disk / str(kilobytes), "--tensorboard", "--niter", "40")
            ended = server.run(argv)
            assert ended.status == 1 and re.fullmatch(CANNOT.format(REASONS["ENOSPC"]), ended.err), ended
            (disk / "ballast").unlink()
            assert server.run(argv).status == 0
            shutil.rmtree(disk / str(kilobytes))


# --- No right to write ------------------------------------------------------------------------------------------------


def test_a_results_folder_that_may_not_be_written_is_named(
    server: Server, undisturbed: Outcome, tmp_path: Path
) -> None:
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
        deadline = time.monotonic() + 30
        while not child.paused and time.monotonic() < deadline:
            time.sleep(0.01)
        (results / FOLDER).chmod(0o555)
        child.send(signal.SIGCONT)
        must_say(child.wait(), "EACCES", results)
        (results / FOLDER).chmod(0o755)
        must_be(undisturbed, server.run(tiny(results)), results / FOLDER, fault)
