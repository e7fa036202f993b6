"""The parts of an inner step of several processes, for bench.py --scaling: real runs under PyTorch's launcher.

Every count of processes is a run of its own of this file under torchrun, one process included, so that all are the same
program. Each process owns classes as in condense.py. All start every part together, and the slowest one's time counts.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from utils.config import build, resolve
from utils.config.build import Parts, Problem
from utils.config.options import CondenseOptions
from utils.method.images import ImageSet, Normalize
from utils.method.selection import select
from utils.method.training import update_network
from utils.numerics.compilation import compiler_error
from utils.numerics.compute import Captured
from utils.system import device as machine
from utils.system import distributed, process
from utils.system.distributed import Group, Shard

MINUTES = 10  # that ranks wait for each other
REPEATED, SHARED = "network update, repeated", "network update, shared out"
SELECTION, MATCHING, AGREEMENT, STEP = "selection, all classes", "matching", "agreement about stopping", "inner step"
PARTS = (SELECTION, MATCHING, REPEATED, SHARED, AGREEMENT, STEP)


# --- What is measured -------------------------------------------------------------------------------------------------


class Sizes(NamedTuple):
    """Of a data set whose images are random here: how long a step takes does not depend on what they show."""

    channels: int
    side: int
    classes: int
    per_class: int

    @property
    def image_bytes(self) -> int:
        return self.channels * self.side**2


@dataclass(frozen=True)
class Work:
    """A run of condense.py. A random data set counts as a folder of one's own, of which only the name is looked at."""

    flags: str
    smaller: str = ""  # flags on a CPU, after these
    random: Sizes | None = None
    needs_folder: bool = False

    def words(self, device: torch.device, image_folder: str | None = None) -> list[str]:
        """condense.py's flags on this device."""
        smaller = self.smaller if device.type == "cpu" else ""
        folder = ["--image_folder", str(image_folder)] if self.needs_folder else []
        return [*shlex.split(self.flags), *shlex.split(smaller), *folder]


WORKS = {
    "digits": Work("-d digits --ipc 10"),
    "cifar10": Work("-d cifar10 -f 2 --ipc 10", "--batch_real 32 --n_data 512 --width 64", needs_folder=True),
    "cifar100_ipc50": Work("-d cifar100 -f 2 --ipc 50", "--n_data 128", Sizes(3, 32, 100, 500)),
    "imagenet100": Work(
        "-d folder --image_folder random -f 3 --ipc 10 --depth 5",
        "--ipc 1 --batch_real 4 --batch_syn_max 4 --n_data 8",
        Sizes(3, 224, 100, 1300),
    ),
    "tiny": Work(  # to try the script itself
        "-d folder --image_folder random -f 2 --ipc 2 --depth 1 --width 16 --batch_real 8 --n_data 32",
        random=Sizes(3, 8, 6, 20),
    ),
}


def resolved(words: Sequence[str]) -> CondenseOptions:
    return resolve.condense(list(words), "").options


class RandomImages:
    """In place of a Dataset."""

    skipped = None

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        self.channels, self.side, self.classes, self.per_class = sizes
        self.base_side, self.device = self.side, device
        self.counts = [self.per_class] * self.classes
        self.held = list(range(self.classes))
        self.class_names, self.test = [str(c) for c in self.held], self.held  # there is a test set, nobody uses it

    def shard(self, classes: list[int], all_reduce_sum: Callable[..., object]) -> None:
        self.held = classes

    @cached_property
    def train(self) -> ImageSet:
        shape = (len(self.held) * self.per_class, self.channels, self.side, self.side)
        images = torch.randint(0, 256, shape, dtype=torch.uint8, device=self.device)
        labels = torch.tensor(self.held, device=self.device).repeat_interleave(self.per_class)
        normalize = Normalize([0.5] * self.channels, [0.25] * self.channels, self.device)
        return ImageSet(images, labels, classes=self.classes, normalize=normalize)


def parts_of(
    work: Work,
    group: Group,
    device: torch.device,
    precision: str,
    compile: bool,
    *,
    image_folder: str | None = None,
    held: int | None = None,
) -> Parts:
    """What condense.main makes of these flags, with the classes shared out as there; pixels begin as random images.

    held: so many classes only, all on this process.
    """
    compiled = "on" if compile else "off"
    more = shlex.split(f"--init random --share_update off --precision {precision} --compile {compiled}")
    o = resolved([*work.words(device, image_folder), *more])
    data: Any = build.dataset(o) if work.random is None else RandomImages(work.random, device)
    shard = None if held is None else Shard(group, list(range(held)), data.classes)
    return Parts(o, Problem(data, resolve.network(o, o.net_type, data)), group, shard=shard)


# --- In every process -------------------------------------------------------------------------------------------------


class Timed(NamedTuple):
    """Repeated calls of one part."""

    seconds: list[float]  # of the slowest rank, each
    sent: int  # bytes that a rank gives to others in one call


class Clock:
    """Times what all ranks do together."""

    def __init__(self, group: Group, device: torch.device, repeats: int) -> None:
        self.group, self.device, self.repeats = group, device, repeats
        self.warm = 1 if device.type == "cpu" else Captured.WARM + 1

    def __call__(self, part: Callable[[], object]) -> Timed:
        for _ in range(self.warm):
            part()
        seconds, sent = [], 0
        for _ in range(self.repeats):
            self.finish()
            self.group.all_reduce_max(0)  # all have come here, and start together
            before, began = self.group.sent, time.perf_counter()
            part()
            self.finish()
            seconds.append(time.perf_counter() - began)
            sent = self.group.sent - before
        *slowest, most = self.group.all_reduce_max(*seconds, sent)
        return Timed(slowest, int(most))

    def finish(self) -> None:
        """Wait until the device has done all that it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def measure(parts: Parts, repeats: int) -> dict[str, Timed]:
    """Every part, on all ranks."""
    o, group, state = parts.o, parts.group, parts.state(None)
    clock, turn = Clock(group, parts.device, repeats), itertools.count()  # the same on all ranks

    def selection() -> None:
        context = parts.context(state.net, parts.draws("select", next(turn)), per_cluster=o.per_cluster)
        state.picks.copy_(select(context, o.batch_real, strategy=o.select))

    def matching() -> None:
        state.matching_step(state.picks, parts.draws("match", next(turn)))

    def update(together: bool) -> Callable[[], None]:
        trainer = parts.trainer(state.net, state.optimizer.pixels, shared=together)
        return lambda: update_network(trainer, n_data=parts.n_data, draws=parts.draws("update", next(turn)))

    def agreement() -> None:
        group.all_reduce_max(0, 0)

    ways = {REPEATED: update(False), SHARED: update(True)}
    found = {SELECTION: clock(selection), MATCHING: clock(matching)}
    found |= {name: clock(way) for name, way in ways.items()}
    found[AGREEMENT] = clock(agreement)
    faster = ways[min(ways, key=lambda name: statistics.median(found[name].seconds))]  # all ranks know the same seconds

    def step() -> None:
        matching()
        faster()
        agreement()

    without, now_and_then = clock(step), statistics.median(found[SELECTION].seconds) / o.interval
    found[STEP] = without._replace(seconds=[s + now_and_then for s in without.seconds])
    return found


def report(parts: Parts, found: dict[str, Timed]) -> dict[str, Any]:
    """For the table: what the first rank prints."""
    per_step = [found[part].sent for part in (MATCHING, AGREEMENT)]
    always = sum(per_step) + found[SELECTION].sent / parts.o.interval
    return {
        "device": machine.device_name(parts.device),
        "classes": sorted({len(own) for own in parts.group.shares}, reverse=True),
        "seconds": {part: timed.seconds for part, timed in found.items()},
        "bytes": {part: always + found[part].sent for part in (REPEATED, SHARED)},
    }


def worker(argv: Sequence[str]) -> int:
    """One process of a run."""
    parser = argparse.ArgumentParser()
    for name in ("--work", "--device", "--precision", "--image_folder"):
        parser.add_argument(name)
    parser.add_argument("--repeats", type=int)
    given = parser.parse_args(argv)
    with distributed.process_group(machine.backends(), minutes=MINUTES) as group:
        device = machine.pick_device(given.device, distributed.local_rank())
        machine.set_precision(device, given.precision)
        compile = compiler_error(device) is None
        parts = parts_of(WORKS[given.work], group, device, given.precision, compile, image_folder=given.image_folder)
        found = report(parts, measure(parts, given.repeats))
        distributed.rank_zero_only(print)(json.dumps(found))
    return 0


# --- The runs, one after the other ------------------------------------------------------------------------------------


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--scaling",
        action="store_true",
        help="measure the parts in several processes, by torchrun, in the first of --precisions (fp32)",
    )
    parser.add_argument(
        "--processes", nargs="+", type=int, default=[1, 2], metavar="N", help="of --scaling (default: 1 2)"
    )
    parser.add_argument(
        "--works", nargs="+", choices=tuple(WORKS), default=["digits"],
        help="of --scaling; cifar10 reads --image_folder, the two largest have random images (default: digits)",
    )  # fmt: skip


def problem(given: argparse.Namespace) -> str | None:
    """What is wrong with the command line."""
    lacking = [name for name in given.works if WORKS[name].needs_folder and not given.image_folder]
    if lacking:
        return f"--works {' '.join(lacking)}: say where its images are with --image_folder DIR (DIR/train/CLASS/*)"
    return None


def launched(work: str, processes: int, given: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """One run. Ends the program when it fails, which has said why."""
    words = ["--work", work, "--device", device.type, "--repeats", str(given.repeats)]
    words += ["--precision", given.precisions[0]]
    words += ["--image_folder", given.image_folder] if WORKS[work].needs_folder else []
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
    print("...", work, processes, "process" if processes == 1 else "processes", file=sys.stderr, flush=True)
    # A thread each, as the launcher sets it by itself for two processes and more.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, __file__, *words], stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{work}: {processes} processes did not get to the end (status {done.returncode})")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


Results = dict[str, dict[int, dict[str, Any]]]  # by work and count of processes


def run(given: argparse.Namespace, device: torch.device) -> tuple[str, Results]:
    """All runs: the table, and what was measured."""
    results: Results = {w: {n: launched(w, n, given, device) for n in given.processes} for w in given.works}
    words = {w: shlex.join(WORKS[w].words(device, given.image_folder)) for w in given.works}
    return table(results, words, given.repeats, given.precisions[0]), results


def table(results: Results, words: dict[str, str], repeats: int, precision: str) -> str:
    """What a person reads. words: condense.py's flags of every work."""
    runs = [(work, n, one) for work, found in results.items() for n, one in found.items()]
    lines = [
        f"{runs[0][2]['device']} for each process, {os.cpu_count()} CPU cores in all, {precision}: seconds of the "
        f"slowest process (median of {repeats}), x faster than {runs[0][1]}; MB that a process gives to collectives",
        "",
        *(f"{work}: condense.py {flags}" for work, flags in words.items()),
        "",
        "| | " + " | ".join(f"{work}, {n} process{'es' * (n > 1)}" for work, n, _ in runs) + " |",
        "|---" * (len(runs) + 1) + "|",
        row("classes of a process", (" or ".join(map(str, one["classes"])) for _, _, one in runs)),
    ]
    for part in PARTS:
        cells = []
        for work, n, one in runs:
            base_n, base = next(iter(results[work].items()))
            value, first = (statistics.median(r["seconds"][part]) for r in (one, base))
            compared = n != base_n and part != AGREEMENT  # which one process has none of
            cells.append(f"{value:.3g} s" + (f", {first / value:.2f} x" if compared else ""))
        lines.append(row(part, cells))
    for part in (REPEATED, SHARED):
        lines.append(row(f"MB per inner step, {part}", (f"{one['bytes'][part] / 1e6:.4g}" for _, _, one in runs)))
    return "\n".join(lines)


def row(name: str, cells: Sequence[str] | Iterator[str]) -> str:
    return f"| {name} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    process.run_main(worker)
