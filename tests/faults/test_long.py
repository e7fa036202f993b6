"""What shows in the long run or in another process only: leaks, files that grow, output that floods, other bytes.

The soak tests print what they measure.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

import condense
from tests.files import image_folder, quick
from tests.outcome import Outcome, metrics, outcome
from tests.tally import injected
from utils.runs import recorder

ROOT = Path(__file__).resolve().parents[2]

# --- Soak -------------------------------------------------------------------------------------------------------------

SOAK = 3000  # outer iterations
# MB that may come to the resident ones after the first third: 2 were measured, 56 where the system had taken back pages
# that were not in use. The heap, whose growth is asserted beside it, is what would show a leak.
MEMORY_GROWTH = 100.0
HEAP_GROWTH = 1.0  # MB that may come to the allocated ones then, in 1,000 iterations; 0.13 were measured in 2,000

# A program with a checkpoint every second, and a thread that notes several times a second what the process has: the
# resident memory hides a leak for as long as the allocator has memory to reuse, which are hundreds of megabytes here.
PROBED = f"""
import ctypes, importlib, os, sys, threading, time
sys.path.insert(0, {str(ROOT)!r})
from utils.runs import folder
from utils.system import process

class Heap(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks used".split()]
    _fields_ += [(name, ctypes.c_size_t) for name in ("fordblks", "keepcost")]

def look():
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", Heap)  # of glibc 2.33 or later
    mallinfo.restype = Heap
    with open(notes, "w", buffering=1) as file:
        while True:
            resident = int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            counts = [len(os.listdir(f"/proc/self/{{what}}")) for what in ("fd", "task")]
            print(resident / 1e6, mallinfo().used / 1e6, *counts, file=file)
            time.sleep(0.2)

notes, program = sys.argv.pop(1), importlib.import_module(sys.argv.pop(1)).main
folder.CHECKPOINT_SECONDS = 1.0
threading.Thread(target=look, daemon=True).start()
process.run_main(program)
"""


def soaked(notes: Path, program: str, argv: Sequence[str], timeout: float) -> tuple[str, str]:
    """The output of a program that has to leave its process as it is after its first third; and what was measured."""
    command = [sys.executable, "-c", PROBED, str(notes), program, *argv]
    began = time.monotonic()
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", timeout=timeout, cwd=notes.parent
    )
    assert done.returncode == 0, done.stdout[-2000:]
    samples = [[float(x) for x in line.split()] for line in notes.read_text().splitlines()[:-1]]
    third = len(samples) // 3
    early, late = (list(zip(*part, strict=True)) for part in (samples[third : 2 * third], samples[2 * third :]))
    for what in (2, 3):  # file handles and threads: a file that is being written adds one or two for a moment
        assert statistics.mode(late[what]) == statistics.mode(early[what])
        assert max(late[what]) <= max(early[what]) + 2
    resident, heap = (min(late[what]) - min(early[what]) for what in (0, 1))
    assert resident < MEMORY_GROWTH and heap < HEAP_GROWTH
    return done.stdout, (
        f"{time.monotonic() - began:.0f} s, {min(early[0]):.1f} MB resident, {resident:.1f} MB more later,"
        f" {min(early[1]):.2f} MB allocated, {heap:.2f} MB more later"
    )


def say(capsys: pytest.CaptureFixture[str], figures: str) -> None:
    with capsys.disabled():
        print(f"\n{figures}")


MESSAGE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (INFO   |WARNING|ERROR  ) \S.*")


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="looks at processes as Linux shows them")
def test_thousands_of_iterations_leave_memory_and_handles(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results, every = tmp_path / "results", SOAK // 6
    more = shlex.split(f"--niter {SOAK} --batch_real 2 --n_data 4 --eval_every {every} --tag soak")
    with injected(f"soak: {SOAK:,} outer iterations in one process") as fault:
        output, measured = soaked(tmp_path / "notes", "condense", quick(results, *more), timeout=1200)
        (folder,) = results.glob("digits/*soak")
        events = metrics(folder)
        assert [e["iteration"] for e in events if "loss" in e] == list(range(1, SOAK + 1))
        assert [e["iteration"] for e in events if "accuracy_mean" in e] == list(range(0, SOAK + 1, every))
        assert len(events) <= recorder.METRIC_LINES + 8

        text = (folder / "log.txt").read_text(encoding="utf-8")
        lines = text.splitlines()
        table = 4  # rows below the last message
        assert all(MESSAGE.fullmatch(line) for line in lines[:-table])
        assert text.endswith("\n") and all(line.isprintable() for line in lines)
        assert len(lines) < 30 and len(text) < 5000

        assert len(output.splitlines()) < 30 and "\r" not in output and "\x1b" not in output
        assert fault.kept(json.loads((folder / "data.json").read_text())["finished"])
        assert not [p.name for p in folder.glob(".*")]
    say(capsys, f"soak: {SOAK:,} outer iterations, {measured}, {len(text):,} bytes of log.txt")


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="looks at processes as Linux shows them")
def test_hundreds_of_trainings_leave_memory_and_handles(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    count = 600
    argv = shlex.split(f"--coreset random --ipc 1 --epochs 3 --width 8 --repeat {count} --device cpu --json")
    with injected(f"soak: {count} trainings in one process") as fault:
        argv += ["--results_dir", str(tmp_path)]
        output, measured = soaked(tmp_path / "notes", "train", argv, timeout=200)
        *lines, result = output.splitlines()
        assert len(lines) < 10
        assert fault.kept(json.loads(result)["n"] == count)
    say(capsys, f"soak: {count} trainings, {measured}")


@pytest.mark.parametrize(("niter", "expected"), [(4, [1, 2, 3, 4]), (10, [3, 6, 9, 10])])
def test_a_longer_run_logs_the_loss_of_every_nth_iteration_and_of_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, niter: int, expected: list[int]
) -> None:
    monkeypatch.setattr(recorder, "METRIC_LINES", 4)
    assert condense.main(quick(tmp_path, "--niter", str(niter), "--batch_real", "2")) == 0
    (folder,) = tmp_path.glob("digits/*")
    assert [event["iteration"] for event in metrics(folder) if "loss" in event] == expected


# --- Determinism ------------------------------------------------------------------------------------------------------

AGAIN = shlex.split(
    "--niter 3 --inner_loop 3 --interval 2 --batch_real 4 -f 2 --ipc 2 --batch_syn_max 6 --epochs 2 --repeat 2 "
    "--eval_every 1 --snapshot_every 1"
)


@dataclass(frozen=True)
class Way:
    """One of several ways to run the same command."""

    place: str  # working directory
    results: str  # seen from there, unless absolute
    hash_seed: str
    flags: Sequence[str] = ()

    def run(self, root: Path) -> Outcome:
        """In a process of its own."""
        place = root / self.place
        place.mkdir(parents=True, exist_ok=True)
        results = place / self.results
        environment = {**os.environ, "PYTHONHASHSEED": self.hash_seed}
        command = [sys.executable, str(ROOT / "condense.py"), *quick(Path(self.results), *AGAIN, *self.flags)]
        done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        (folder,) = results.glob("*/*")
        return outcome(folder)


def run_all(ways: Sequence[Way], root: Path) -> list[Outcome]:
    """Two at a time."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda way: way.run(root), ways))


@pytest.mark.slow
@pytest.mark.faults
def test_fresh_processes_give_the_same_bytes_wherever_they_run_and_whatever_the_hash_seed(tmp_path: Path) -> None:
    ways = [
        Way("here", "results", "0"),
        Way("here", "again", "0"),
        Way("somewhere/else", "../deep/er/results", "1"),
        Way("here", str(tmp_path / "absolute"), "random", ["--deterministic"]),
    ]
    with injected("another process, working directory, hash seed", times=len(ways)) as fault:
        expected, *others = run_all(ways, tmp_path)
        assert len(expected.losses) == 3 and len(expected.accuracies) == 4 + 1
        for found in others:
            assert fault.kept(found == expected)


@pytest.mark.slow
@pytest.mark.faults
def test_an_image_folder_gives_the_same_bytes_with_any_number_of_threads_and_order_of_files(tmp_path: Path) -> None:
    counts = {"cat": 9, "dog": 14, "eel": 6}
    photos = image_folder(tmp_path / "photos", counts, {"cat": 5, "dog": 4, "eel": 3}, shape=(12, 10, 3))
    for file in sorted(photos.rglob("*.png"), reverse=True):
        target = tmp_path / "copy" / file.relative_to(photos)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    size = ["--size", "8"]
    ways = [
        Way("one", "results", "0", ["--image_folder", "../photos", *size, "--data_threads", "1"]),
        Way("two", "results", "1", ["--image_folder", str(tmp_path / "copy"), *size, "--data_threads", "2"]),
        Way("seven", "results", "random", ["--image_folder", str(photos), *size, "--data_threads", "7"]),
    ]
    with injected("another number of threads that read images", times=len(ways)) as fault:
        expected, *others = run_all(ways, tmp_path)
        for found in others:
            assert fault.kept(found == expected)


@pytest.mark.gpu
def test_deterministic_gives_the_same_bytes_on_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And says what it costs."""
    larger = shlex.split("--device cuda --niter 3 --inner_loop 40 --width 64 --batch_real 64 --n_data 256")
    plain, once, again = (
        Way(name, "results", "random", [*larger, *flags])
        for name, flags in (("plain", []), ("once", ["--deterministic"]), ("again", ["--deterministic"]))
    )
    expected = once.run(tmp_path)
    assert again.run(tmp_path) == expected
    plain.run(tmp_path)
    seconds = [last_seconds(tmp_path / name / "results") for name in ("plain", "once")]
    say(capsys, f"--deterministic: {seconds[1]:.1f} s of distilling in place of {seconds[0]:.1f} s")


def last_seconds(results: Path) -> float:
    """Of distilling, as metrics.jsonl has them."""
    (file,) = results.glob("*/*/metrics.jsonl")
    return float(json.loads(file.read_text().splitlines()[-1])["seconds"])
