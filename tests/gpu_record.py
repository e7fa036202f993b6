"""What a GPU is worth ten minutes for: tests, speed and accuracies, part by part, in a record that goes on. Not a test.

    $ python3 tests/gpu_record.py check --out record         # is everything right?
    $ python3 tests/gpu_record.py speed --out record         # how fast, in every precision and in the published form
    $ python3 tests/gpu_record.py headline --out record --image_folder data/cifar10_jpg  # beside the published curve
    $ python3 tests/gpu_record.py arms --out record --image_folder data/cifar10_jpg   # what k-means is worth where
    $ python3 tests/gpu_record.py methods --out record --image_folder data/cifar10_jpg   # dc, dsa, dm, idc
    $ python3 tests/gpu_record.py faster --out record --image_folder data/cifar10_jpg    # accuracy against time, pools

For machines that are lent for minutes and keep nothing. A part stops within --minutes, prints a table that grows line
by line, and packs results, runs, logs and compiled kernels into one file, DIR/gpu_record.tar.gz, again and again.
`--continue_from FILE`, with a copy of that file, goes on from there. Take only your own: it holds compiled kernels, and
these are run. What follows `--` goes to condense.py (headline, arms, methods, faster) or pytest (check) as it is.
"""

from __future__ import annotations

import time

if __name__ == "__main__":
    began = time.monotonic()  # before PyTorch is imported, which takes seconds

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from tests import bench, bench_parts, recorded_runs
from tests.record import ARCHIVE, ROOT, Record
from utils.numerics.compute import PRECISIONS
from utils.system import device as machine
from utils.system.errors import first_line
from utils.system.process import run_main
from utils.system.report import messages, span

if TYPE_CHECKING:  # only `check` needs it
    import pytest

# --- Check ------------------------------------------------------------------------------------------------------------

GPU_TESTS = "tests/test_gpu.py"
MARK = "RECORD "  # before the lines that pytest's process writes for this one


def pytest_collection_finish(session: pytest.Session) -> None:
    """Hook of pytest, for which this file is a plugin as well: how many tests there are."""
    print(f"\n{MARK}{json.dumps({'tests': len(session.items)})}", flush=True)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Hook of pytest: how a test ended, and why."""
    if report.when == "call" or report.outcome != "passed":
        why = [line for line in report.longreprtext.splitlines() if line.startswith("E ")][:4]
        found = {"name": report.nodeid, "outcome": report.outcome, "seconds": report.duration, "why": why}
        print(f"\n{MARK}{json.dumps(found)}", flush=True)


def check(record: Record) -> bool:
    """Run the GPU tests, warnings not as errors. Returns whether all passed, in time."""
    given, seconds, counts = record.given, [], dict.fromkeys(("passed", "failed", "skipped"), 0)
    words = [sys.executable, "-m", "pytest", "-v", "-s", "--tb=short", "-p", "no:cacheprovider", "-p"]
    words += ["tests.gpu_record", "-o", "addopts=", "-W", "default", "-m"]
    words += ["gpu" if record.device.type == "cuda" else "not gpu", GPU_TESTS, *given.more]
    total = 0
    with (
        open(record.work / "pytest.txt", "w") as output,
        subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as tests,
    ):
        killer = threading.Timer(max(record.left, 0), tests.kill)
        killer.daemon = True
        killer.start()
        for line in tests.stdout or ():
            output.write(line)
            if not line.startswith(MARK):
                continue
            output.flush()
            found = json.loads(line.removeprefix(MARK))
            if "tests" in found:
                total = found["tests"]
                continue
            counts[found["outcome"]] += 1
            seconds.append(found["seconds"])
            reasons = "".join(f"\n    {why}" for why in found["why"])
            record.say(f"{found['outcome']:8}{found['seconds']:7.1f} s  {found['name'].split('::')[-1]}{reasons}")
            record.keep(found.pop("name"), found)
            if len(seconds) == 5:
                record.say(f"... {total} tests, about {span((total - 5) * sum(seconds) / 5)} to go")
        killer.cancel()
    everything = sum(counts.values()) == total > 0
    ended = "" if everything else f"; {total - sum(counts.values())} did not run (exit status {tests.returncode})"
    record.say(", ".join(f"{count} {outcome}" for outcome, count in counts.items()) + ended)
    if not total:
        record.say((record.work / "pytest.txt").read_text()[-2000:])
    return everything and not counts["failed"]


# --- Speed ------------------------------------------------------------------------------------------------------------


def speed(record: Record) -> bool:
    """Measure the parts of an inner step, ours and the published form. Returns whether all was measured."""
    device, work = record.device, bench_parts.WORKS["tiny" if record.given.tiny else "headline"]
    timer = bench_parts.Timer(device, 1 if record.given.tiny else 5)
    real = bench_parts.real_images(work, device, None)
    precisions = ["bf16", *(["tf32"] if device.type == "cuda" else []), "fp32"]

    def ours(precision: str) -> dict[str, Any]:
        return bench_parts.run_ours(work, real, timer, precision)

    def in_published_form(measure: Callable[..., dict[str, Any]]) -> dict[str, Any]:
        machine.set_precision(device, "fp32")
        if device.type == "cuda":  # PyTorch's own setting, which the published code leaves as it is
            torch.backends.cudnn.conv.fp32_precision = "tf32"  # type: ignore[attr-defined]  # made at run time
        return measure(work, real, timer)

    def apart(variant: str) -> dict[str, Any]:
        words = ["--device", device.type, "--repeats", str(timer.repeats), "--precisions", *precisions]
        return bench.apart(variant, [*words, "--work", "tiny" if record.given.tiny else "headline"], record.left)

    variants: dict[str, Callable[[], dict[str, Any]]] = {f"ours {p}": partial(ours, p) for p in precisions}
    variants["published"] = partial(in_published_form, bench_parts.run_published)
    for p in reversed(precisions):  # fp32 first, which evaluations are in
        variants[f"evaluation, ours {p}"] = partial(bench_parts.our_evaluation, work, real, timer, p)
    variants["evaluation, published"] = partial(in_published_form, bench_parts.published_evaluation)
    if device.type == "cuda":  # in processes of their own, since cuBLAS has to be told before it starts
        names = [f"ours {p}{bench.DETERMINISTIC}" for p in precisions]
        variants |= {name: partial(apart, name) for name in names}

    record.say(f"median (least-most) of {timer.repeats}; see tests/bench.py")
    longest, complete = 0.0, True
    for number, (variant, measure) in enumerate(variants.items()):
        found = record.same(variant)
        if not found and record.left > longest:
            found = measured(measure, device)
            longest = max(longest, found["took"])
            record.keep(variant, found)
        complete &= bool(record.same(variant))
        record.say(f"{variant}: {bench_parts.row(found) if found else 'no time left'}")
        if number == 0 and found:
            record.say(f"... {len(variants)} variants, the first took {span(found['took'])}")
    return complete


def measured(measure: Callable[[], dict[str, Any]], device: torch.device) -> dict[str, Any]:
    """What a variant measures, its peak memory and its seconds; `error` where it fails."""
    began = time.monotonic()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        found = measure()
    except Exception as error:  # whatever it is, the others are to be measured
        found = {"error": f"{type(error).__name__}: {first_line(error)}"}
    return {"peak memory": machine.peak_memory(device), **found, "took": time.monotonic() - began}


# --- The program ------------------------------------------------------------------------------------------------------

RECORDED = {
    "check": check,
    "speed": speed,
    "headline": recorded_runs.headline,
    "arms": recorded_runs.arms,
    "methods": recorded_runs.methods,
    "faster": recorded_runs.faster,
}


def main(argv: Sequence[str], began: float | None = None) -> int:
    """Work on a part, and pack. Returns the exit status, 1 for failed tests; raises UserError."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=tuple(RECORDED), metavar="PART", help=", ".join(RECORDED))
    parser.add_argument("--minutes", type=float, default=9, help="end within this time (default: 9)")
    parser.add_argument("--out", required=True, metavar="DIR", help=f"where to write {ARCHIVE}")
    parser.add_argument("--continue_from", metavar="FILE", help=f"an earlier {ARCHIVE}")
    parser.add_argument("--image_folder", metavar="DIR", help="CIFAR-10 as image files (default: torchvision's)")
    parser.add_argument("--precision", choices=PRECISIONS, help="of distilling (default: tf32 on a GPU)")
    parser.add_argument(
        "--evaluation_precision", choices=PRECISIONS, default="fp32", help="of evaluations (default: fp32)"
    )
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="of arms, methods and faster (default: 1)")
    parser.add_argument(
        "--runs", nargs="+", default=[""], metavar="NAME", help="only runs whose names begin so (arms, methods, faster)"
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--tiny", action="store_true", help="at the size of a test, to try the script itself")
    end = argv.index("--") if "--" in argv else len(argv)
    given = parser.parse_args(argv[:end])
    given.more = argv[end + 1 :]
    with tempfile.TemporaryDirectory(prefix="gpu_record_") as work, messages():
        os.environ["TRITON_CACHE_DIR"] = str(Path(work, "kernels"))
        record = Record(given, Path(work), time.monotonic() if began is None else began)
        record.say(f"{given.part}, {given.minutes:g} minutes: {', '.join(record.about.values())}")
        try:
            complete = RECORDED[given.part](record)
        finally:
            record.pack(last=True)
        size = record.archive.stat().st_size / 2**20
        how = "complete" if complete else "not complete: go on, or try again, with --continue_from that file"
        print(f"{given.part}: {how}\n{record.archive}: {size:.1f} MiB", flush=True)
    return int(given.part == "check" and not complete)


if __name__ == "__main__":
    run_main(lambda argv: main(argv, began))
