"""How long a run takes beside other programs: alone, and beside processes that keep the processors busy. Not a test.

    $ python3 tests/bench_busy.py                                                # the first command of the README
    $ python3 tests/bench_busy.py --busy 2 --repeats 5 -- --niter 1 --epochs 20  # a short one
    $ GOMP_SPINCOUNT=300000 python3 tests/bench_busy.py                          # without utils/system/waiting.py

Share: of a processor, what each busy process got while the command ran, which a thread of ours could have had as well.
Explained: the seconds alone divided by it. Ratio: the seconds beside the busy processes over those. Alone, keep the
machine otherwise idle.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
TICKS = os.sysconf("SC_CLK_TCK")


class Run(NamedTuple):
    """Seconds of one command, those of all processors that it used, and the share of a processor per busy process."""

    wall: float
    cpu: float
    share: float


@contextmanager
def busy_processes(count: int) -> Iterator[list[int]]:
    """Process ids of programs that do nothing but keep a processor busy; they end with the block."""
    command = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(command) for _ in range(count)]
    try:
        yield [process.pid for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def seconds_used(pid: int) -> float:
    """Processor seconds that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def condense(flags: Sequence[str], busy: int) -> Run:
    """Run condense.py in a results folder of its own beside so many busy processes."""
    with tempfile.TemporaryDirectory() as folder, busy_processes(busy) as pids:
        command = [sys.executable, "condense.py", "--results_dir", folder, *flags]
        start, before = time.perf_counter(), [seconds_used(pid) for pid in pids]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)}: exit status {process.returncode}")
        others = [seconds_used(pid) - first for pid, first in zip(pids, before, strict=True)]
        share = min(1.0, statistics.fmean(others) / wall) if others else 1.0
        return Run(wall, usage.ru_utime + usage.ru_stime, share)


def spread(values: Sequence[float]) -> str:
    """Median and extremes."""
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def main(argv: Sequence[str]) -> int:
    """Run both in turn, and print a row of each and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--busy", type=int, default=4, help="busy processes (default: 4)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each kind, in turn (default: 3)")
    parser.add_argument("flags", nargs="*", help="flags of condense.py, behind --")
    given = parser.parse_args(argv)
    alone: list[Run] = []
    beside: list[Run] = []
    for _ in range(given.repeats):
        alone.append(condense(given.flags, 0))
        print("alone", alone[-1], file=sys.stderr, flush=True)
        beside.append(condense(given.flags, given.busy))
        print("beside", beside[-1], file=sys.stderr, flush=True)
    usual = statistics.median(run.wall for run in alone)
    explained = [usual / run.share for run in beside]
    print(f"{len(os.sched_getaffinity(0))} processors, n = {given.repeats}: median (extremes)")
    print("| | wall, s | processor seconds | share | explained, s | ratio |\n|---|---|---|---|---|---|")
    print(f"| alone | {spread([r.wall for r in alone])} | {spread([r.cpu for r in alone])} | | | |")
    ratio = spread([r.wall / e for r, e in zip(beside, explained, strict=True)])
    cells = [[r.wall for r in beside], [r.cpu for r in beside], [r.share for r in beside], explained]
    print(f"| beside {given.busy} | {' | '.join(map(spread, cells))} | {ratio} |")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
