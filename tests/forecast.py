"""How long published budgets take on many GPUs, for bench.py --forecast: parts measured on one device, assumed links.

Every class costs the same in these works, so a rank's classes are all that its matching and its selection depend on. On
a machine with several GPUs nothing is forecast: the same works are run on them.
"""

from __future__ import annotations

import argparse
import math
import statistics
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch

import models
from tests import bench_ranks
from tests.bench_ranks import MATCHING, REPEATED, SELECTION, SHARED, WORKS, Work, measure, parts_of, resolved
from utils.config import derived
from utils.method.training import GATHERED, batches
from utils.numerics.compilation import compiler_error
from utils.system import device as machine
from utils.system.distributed import SINGLE

FORECAST = ("cifar100_ipc50", "imagenet100")
STEPS = 2000 * 100  # inner steps of the published budget
DRAWN = 128  # mini-batches whose fullest share is averaged


class Links(NamedTuple):
    """What connects GPUs: assumptions, in bytes per second each way of a GPU, and in seconds."""

    machine: int = 8  # GPUs of one machine
    within: float = 450e9  # NVLink as published for the H100
    between: float = 50e9  # InfiniBand of 400 Gbit/s per GPU
    latency_within: float = 20e-6  # of a step of a collective
    latency_between: float = 40e-6
    latency_host: float = 100e-6  # between processors

    def all_reduce(self, size: float, ranks: int) -> float:
        """Seconds for `size` bytes: a ring's traffic over the slowest link that takes part, and a tree's steps."""
        one = ranks <= self.machine
        bandwidth, latency = (self.within, self.latency_within) if one else (self.between, self.latency_between)
        return 2 * (ranks - 1) / ranks * size / bandwidth + latency * math.ceil(math.log2(ranks))


class Load(NamedTuple):
    """What an inner step of one work takes of one GPU, and what it sends. Curves are (amount, seconds), ascending."""

    classes: int
    matching: list[tuple[float, float]]  # by classes
    selection: list[tuple[float, float]]  # by classes; of one inner step, so a tenth of a selection
    update: list[tuple[float, float]]  # by the share of every mini-batch that is trained on
    drawn: float  # bytes of an update's images
    exchanges: int  # in which they are exchanged
    batches: int  # of an update, each with one exchange of gradients where it is shared out
    batch: int  # images of each
    parameters: int


class Step(NamedTuple):
    """Seconds of an inner step of the slowest rank."""

    classes: int  # of the rank that has most
    matching: float
    selection: float
    update: float
    shared: bool
    communication: float

    @property
    def seconds(self) -> float:
        return self.matching + self.selection + self.update + self.communication


def at(curve: list[tuple[float, float]], amount: float) -> float:
    """Seconds: straight between a curve's points, as at the first one below it, proportional beyond the last one."""
    amounts, seconds = zip(*curve, strict=True)
    return float(np.interp(amount, amounts, seconds)) * max(1.0, amount / amounts[-1])


def fullest_share(ranks: int, classes: int, batch: int) -> float:
    """The share of a mini-batch that chance gives the rank that gets most of it, on average over some mini-batches.

    Ranks wait for it: 64 ranks have 2 of 128 images each on average, but one of them has 6 or so.
    """
    drawn = torch.randint(classes, (DRAWN, batch), generator=torch.Generator().manual_seed(0)) % ranks
    return statistics.fmean(row.bincount().max().item() for row in drawn) / batch


def inner_step(load: Load, ranks: int, links: Links) -> Step:
    """An inner step of so many GPUs, with the faster one of both kinds of update."""
    most = -(-load.classes // ranks)
    of_classes = most, at(load.matching, most), at(load.selection, most)
    if ranks == 1:
        return Step(*of_classes, at(load.update, 1), False, 0.0)
    sent = load.exchanges * links.all_reduce(load.drawn / load.exchanges, ranks)
    sent += links.latency_host * math.ceil(math.log2(ranks))  # the agreement about stopping
    gradients = load.batches * links.all_reduce(4 * load.parameters, ranks)
    share = fullest_share(ranks, load.classes, load.batch)
    repeated = Step(*of_classes, at(load.update, 1), False, sent)
    shared = Step(*of_classes, at(load.update, share), True, sent + gradients)
    return min(repeated, shared, key=lambda step: step.seconds)


def measured(work: Work, device: torch.device, repeats: int, precision: str) -> tuple[Load, float]:
    """The parts of one class and of as many as this device computes together, and GFLOP/s in matching.

    On a CPU of fewer images where the work says so: networks take as long as there are images, and what k-means takes
    beside them is left out of account.
    """
    assert work.random is not None
    sizes, compile = work.random, compiler_error(device) is None
    o, whole = (resolved(work.words(where)) for where in (device, torch.device("meta")))
    images = derived.formation(o).decoded_count(o.ipc)
    few = sizes._replace(per_class=sizes.per_class * o.batch_real // whole.batch_real)
    work = replace(work, random=few)
    flop, all_flop = (derived.class_work(each, [0])[0] for each in (o, whole))
    matching, selection, update = [], [], []
    parts = parts_of(work, SINGLE, device, precision, compile, held=1)
    together = parts.compute.classes_at_once(o.batch_real + images, sizes.side)
    for count in sorted({1, min(sizes.classes, together)}):
        parts = parts_of(work, SINGLE, device, precision, compile, held=count)
        found = {name: statistics.median(timed.seconds) for name, timed in measure(parts, repeats).items()}
        matching.append((float(count), found[MATCHING] * all_flop / flop))
        selection.append((float(count), found[SELECTION] / o.interval * sizes.per_class / few.per_class))
        if count == 1:
            times = whole.n_data / o.n_data
            one, everything = times * found[SHARED], times * found[REPEATED]
            update = [(1 / sizes.classes, min(one, everything)), (1.0, everything)]
            rate = 1e-9 * models.forward_flop(parts.spec) * flop / found[MATCHING]
    mini = batches(whole.n_data, whole.batch_real)
    return Load(
        classes=sizes.classes,
        matching=matching,
        selection=selection,
        update=update,
        drawn=whole.n_data * sizes.image_bytes,
        exchanges=math.ceil(len(mini) / max(1, GATHERED // (whole.batch_real * sizes.image_bytes))),
        batches=len(mini),
        batch=whole.batch_real,
        parameters=sum(p.numel() for p in models.outline(parts.spec).parameters()),
    ), rate


def scaled(load: Load, ratio: float) -> Load:
    """The same on a device on which everything takes `ratio` times as long."""

    def slower(curve: list[tuple[float, float]]) -> list[tuple[float, float]]:
        return [(amount, ratio * seconds) for amount, seconds in curve]

    return load._replace(matching=slower(load.matching), selection=slower(load.selection), update=slower(load.update))


# --- For people -------------------------------------------------------------------------------------------------------


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--forecast", action="store_true",
        help="forecast two published budgets on many GPUs, in the first of --precisions (fp32); where there are "
        "several GPUs, measure on them instead",
    )  # fmt: skip
    parser.add_argument(
        "--gpu_tflops", type=float, default=100.0, metavar="X",
        help="what a GPU sustains in matching, where there is none to measure, in TFLOP/s (default: 100)",
    )  # fmt: skip
    parser.add_argument("--gpus", nargs="+", type=int, default=[1, 2, 8, 16, 32, 64, 100], help="rows of --forecast")


def run(given: argparse.Namespace, device: torch.device) -> tuple[str, dict[str, Any]]:
    """The report, and its numbers."""
    count, precision = torch.cuda.device_count() if device.type == "cuda" else 1, given.precisions[0]
    if count > 1:
        given.works = list(FORECAST)
        given.processes = sorted({n for i in range(count.bit_length()) if (n := 2**i) <= count} | {count})
        return bench_ranks.run(given, device)
    machine.keep_freed_memory()
    machine.set_precision(device, precision)
    texts, numbers = [], {}
    for name in FORECAST:
        load, rate = measured(WORKS[name], device, given.repeats, precision)
        what = f"{name}: forecast from parts measured on {machine.device_name(device)} in {precision}"
        if device.type != "cuda":
            load = scaled(load, rate / (1e3 * given.gpu_tflops))
            what += f", {rate:.3g} GFLOP/s in matching, for GPUs that sustain {given.gpu_tflops:g} TFLOP/s (ASSUMED)"
        texts.append(f"{what}\ncondense.py {WORKS[name].flags}\n\n{table(load, Links(), given.gpus)}")
        numbers[name] = {**load._asdict(), "links": Links()._asdict()}
    return f"Assumed: {Links()}; nothing overlaps.\n\n" + "\n\n".join(texts), numbers


def table(load: Load, links: Links, gpus: list[int]) -> str:
    """A row per number of GPUs."""
    alone = inner_step(load, 1, links).seconds
    columns = "GPUs, classes (most), matching, selection / interval, network update, communication, inner step"
    columns += f", {STEPS:_} steps, speed-up"
    lines = ["| " + columns.replace(", ", " | ") + " |", "|---" * 9 + "|"]
    for n in (n for n in gpus if n <= load.classes):
        s = inner_step(load, n, links)
        times = [f"{1e3 * t:.3g} ms" for t in (s.matching, s.selection, s.update, s.communication, s.seconds)]
        times[2] += "" if n == 1 else ", shared out" if s.shared else ", repeated"
        hours, gain = f"{STEPS * s.seconds / 3600:.3g} h", f"{alone / s.seconds:.2f} x"
        lines.append("| " + " | ".join([str(n), str(s.classes), *times, hours, gain]) + " |")
    return "\n".join(lines)
