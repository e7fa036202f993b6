"""What published budgets would take on many GPUs, for bench.py --forecast: the parts measured on one device, a model of
who does what and what is sent, and stated assumptions about links. On a machine with several GPUs nothing is forecast:
the same works are run on them.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

import models
from models import NetSpec
from tests import bench_ranks
from tests.bench_ranks import WORKS, Clock, RandomImages, Sizes, Work, resolved
from utils import device as machine
from utils import overview
from utils.compilation import compiler_error
from utils.device import Compute
from utils.formation import decoded_count
from utils.images import starts
from utils.options import CondenseOptions, network
from utils.parts import Parts
from utils.ranks import ALONE, Owned, shares
from utils.selection import KMEANS_ITERATIONS, assign, embed, padded, update_centroids, widened
from utils.training import GATHERED, batches, update_network

FORECAST = ("cifar100_ipc50", "imagenet100")
STEPS = 2000 * 100  # inner steps of the published budget
WORTH = 1.25  # what doubling the GPUs has to gain
DRAWN = 128  # mini-batches whose fullest part is averaged
UPDATE, SHARED = "network update", "network update, one class of it"


# --- The model --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Links:
    """What connects GPUs: assumptions, in bytes per second each way of a GPU, and in seconds."""

    machine: int = 8  # GPUs of one machine
    within: float = 450e9  # NVLink as published for the H100
    between: float = 50e9  # InfiniBand of 400 Gbit/s per GPU
    latency_within: float = 20e-6
    latency_between: float = 40e-6
    latency_host: float = 100e-6  # between processors

    def all_reduce(self, size: float, ranks: int) -> float:
        """A ring's traffic over the slowest link that takes part, 2 (R - 1) / R times the bytes, and a tree's steps,
        log2 R of them."""
        alone = ranks <= self.machine
        bandwidth, latency = (self.within, self.latency_within) if alone else (self.between, self.latency_between)
        return 2 * (ranks - 1) / ranks * size / bandwidth + latency * steps(ranks)

    def agreement(self, ranks: int) -> float:
        """On when to stop: a few bytes."""
        return self.latency_host * steps(ranks)


def steps(ranks: int) -> int:
    """Of a tree that joins so many ranks."""
    return math.ceil(math.log2(ranks))


@dataclass(frozen=True)
class Curve:
    """Seconds by an amount of work, at one or more amounts."""

    points: tuple[tuple[float, float], ...]  # (amount, seconds), the amounts ascending

    def at(self, amount: float) -> float:
        """Straight between the points; beyond the last one, and where there is but one, in proportion to it; below the
        first of several, as there."""
        last, seconds = self.points[-1]
        if amount >= last or len(self.points) == 1:
            return seconds * amount / last
        for (a, low), (b, high) in itertools.pairwise(self.points):
            if amount <= b:
                return low + max(0.0, amount - a) / (b - a) * (high - low)
        raise AssertionError


@dataclass(frozen=True)
class Load:
    """What an inner step of one work takes of one GPU, and what it sends."""

    class_work: tuple[float, ...]  # of every class, as `shares` takes it
    matching: Curve  # by classes
    selection: Curve  # by classes; of one inner step, so a tenth of a selection
    update: Curve  # by the part of every mini-batch's images that is trained on; 1: as it is without sharing it out
    drawn: float  # bytes of the images of an update
    exchanges: int  # in which they are exchanged
    batches: int  # of an update, each with one exchange of gradients where it is shared out
    batch: int  # images of each
    parameters: int


class Step(NamedTuple):
    """An inner step of the slowest rank: seconds, and classes of the rank that has most."""

    classes: int
    matching: float
    selection: float
    update: float
    shared: bool
    images: float  # their exchange
    gradients: float
    agreement: float

    @property
    def of_classes(self) -> float:
        return self.matching + self.selection

    @property
    def communication(self) -> float:
        return self.images + self.gradients + self.agreement

    @property
    def seconds(self) -> float:
        return self.of_classes + self.update + self.communication


def inner_step(load: Load, ranks: int, links: Links) -> Step:
    """On so many GPUs, with the faster of both kinds of update."""
    owned = shares(load.class_work, ranks)
    most = max(map(len, owned))
    always = (most, load.matching.at(most), load.selection.at(most))
    if ranks == 1:
        return Step(*always, load.update.at(1), False, 0.0, 0.0, 0.0)
    exchange = load.exchanges * links.all_reduce(load.drawn / load.exchanges, ranks)
    gradients = load.batches * links.all_reduce(4 * load.parameters, ranks)
    agreement = links.agreement(ranks)
    repeated = Step(*always, load.update.at(1), False, exchange, 0.0, agreement)
    fullest = fullest_part(list(map(len, owned)), load.batch)
    shared = Step(*always, load.update.at(fullest), True, exchange, gradients, agreement)
    return min(repeated, shared, key=lambda step: step.seconds)


def fullest_part(classes: Sequence[int], batch: int) -> float:
    """The part of a mini-batch that the rank has whose classes chance gave most of its images, on average over some.

    classes: of every rank, all with as many images. Ranks wait for the fullest one: 64 ranks have 2 of 128 images each
    on average, but one of them has 6 or so.
    """
    rank = torch.arange(len(classes)).repeat_interleave(torch.tensor(classes))
    drawn = torch.randint(len(rank), (DRAWN, batch), generator=torch.Generator().manual_seed(0))
    most = [torch.bincount(rank[one]).max().item() for one in drawn]
    return statistics.fmean(most) / batch


def limit(load: Load, links: Links) -> str:
    """Where it stops scaling, and why, in a sentence."""
    total = len(load.class_work)
    counts = [2**i for i in range(total.bit_length()) if 2**i <= total]
    found = [inner_step(load, n, links) for n in counts]
    gains = [a.seconds / b.seconds for a, b in itertools.pairwise(found)]
    stop = len(gains)
    while stop and gains[stop - 1] < WORTH:
        stop -= 1
    if stop == len(gains):
        last = f"doubling {counts[-2]} GPUs still gains {gains[-1]:.2f} x" if gains else "there is one class"
        return f"It scales up to {counts[-1]} GPUs: {last}, and {total} classes have no use for more than {total}."
    before, after = found[stop], found[stop + 1]
    halved = after.seconds - max(0.0, after.of_classes - before.of_classes / 2)
    if before.seconds / halved >= WORTH:
        why = (
            f"classes are whole: the rank that has most goes from {before.classes} to {after.classes} of {total}, not "
            "to half as many"
        )
    else:
        kind = "shared out" if after.shared else "repeated"
        rest = {
            f"network update, {kind}": after.update,
            "exchange of drawn images": after.images,
            "exchange of gradients": after.gradients,
            "agreement about stopping": after.agreement,
        }
        name = max(rest, key=lambda part: rest[part])
        why = (
            f"the {name} does not shrink along: {duration(rest[name])} of {duration(after.seconds)} on "
            f"{counts[stop + 1]}"
        )
    return f"It stops scaling at {counts[stop]} GPUs, which gain {gains[stop]:.2f} x from being doubled: {why}."


# --- The parts, measured on one device --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Amount:
    """GFLOP of a work's parts, of every class or of the whole update: a backward pass is two forward ones, and the
    gradient of a distance between gradients seven in all (utils/overview.py)."""

    o: CondenseOptions
    sizes: Sizes

    @cached_property
    def spec(self) -> NetSpec:
        s = self.sizes
        return network(self.o, self.o.net_type, channels=s.channels, classes=s.classes, side=s.side)

    @cached_property
    def forward(self) -> float:
        return 1e-9 * models.forward_flop(self.spec)

    @property
    def decoded(self) -> int:
        return decoded_count(self.o.ipc, factor=self.o.factor, decode_type=self.o.decode_type)

    @property
    def matching(self) -> float:
        return self.forward * overview.class_work(self.o, [0], decoded=self.decoded)[0]

    @property
    def embedding(self) -> float:
        return self.forward * self.sizes.per_class

    @property
    def features(self) -> int:
        return models.outline(self.spec).classifier.in_features

    @property
    def kmeans(self) -> float:
        """Two products in every iteration: distances, and means as sums over members."""
        return 4e-9 * self.sizes.per_class * self.o.batch_real * self.features * KMEANS_ITERATIONS

    @property
    def update(self) -> float:
        return 3 * self.forward * self.o.n_data


class Part(NamedTuple):
    """One measured part: of so many classes, or of an update (0)."""

    name: str
    classes: int
    what: str  # was measured
    seconds: list[float]
    gflop: float  # of what was measured; 0: not counted
    whole: float  # times as much there is in the work itself

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def rate(self) -> float:
        return self.gflop / self.median


def measured(work: Work, device: torch.device, repeats: int, precision: str, compile: bool) -> list[Part]:
    """All parts of a work, of one class and of as many as this device computes together.

    On a CPU of fewer images where the work says so, except for k-means: networks take as long as there are images.
    """
    assert work.random is not None
    o, full = (
        resolved([*words, "--init", "random", "--precision", precision])
        for words in (work.words(device), work.words(torch.device("meta")))
    )
    amount, whole = Amount(o, work.random), Amount(full, work.random)
    compute = Compute(device, precision, compile=compile)
    counts = sorted({1, min(work.random.classes, compute.group(o.batch_real + amount.decoded, work.random.side))})
    found = []
    for count in counts:
        found += of_classes(count, amount, whole, compute, Clock(ALONE, device, repeats))
    return found


def of_classes(count: int, amount: Amount, whole: Amount, compute: Compute, clock: Clock) -> list[Part]:
    """The parts that go class by class, of so many, and the update."""
    o, sizes, device = amount.o, amount.sizes, compute.device
    # As many times fewer as are matched, where there are fewer of these.
    few = sizes._replace(per_class=sizes.per_class * o.batch_real // whole.o.batch_real)
    images: Any = RandomImages(few, device)
    images.hold(list(range(count)), ALONE.add)
    parts = Parts(o, images, amount.spec, compute, Owned(ALONE, list(range(count)), sizes.classes))
    state, real, turn = parts.state(empty=False), images.train, itertools.count()
    first = torch.tensor(starts([few.per_class] * count), device=device)[:, None]
    state.picks.copy_(first + torch.arange(o.batch_real, device=device))
    cheapest = compute.cheapest()
    each = [embed(state.net, real.of_class(c), real.normalize, cheapest) for c in range(count)]
    points = [torch.rand(sizes.per_class, x.shape[1], device=device).to(x.dtype) for x in each]

    def update(together: bool) -> Callable[[], None]:
        trainer = parts.trainer(state.net, state.pixels.pixels, together=together)
        return lambda: update_network(trainer, n_data=o.n_data, draws=parts.draws("update", next(turn)))

    def part(name: str, way: Callable[[], object], what: str, gflop: float, times: float, n: int = count) -> Part:
        return Part(name, n, what, clock(way).seconds, gflop, times)

    classes = f"{count} class{'es' * (count > 1)}"
    found = [
        part(
            "matching",
            lambda: state.match(state.picks, parts.draws("match", next(turn))),
            f"{classes}, {o.batch_real} real and {min(amount.decoded, o.batch_syn_max)} synthetic images each",
            count * amount.matching,
            whole.matching / amount.matching,
        ),
        part(
            "embedding",
            lambda: [embed(state.net, real.of_class(c), real.normalize, cheapest) for c in range(count)],
            f"{classes} of {few.per_class} images",
            count * amount.forward * few.per_class,
            sizes.per_class / few.per_class,
        ),
        part(
            "k-means",
            lambda: all_iterations(points, whole.o.batch_real),
            f"{classes} of {sizes.per_class} points of {amount.features}",
            count * whole.kmeans,
            1.0,
        ),
    ]
    if count == 1:
        times = whole.o.n_data / o.n_data
        what = f"{o.n_data} images in mini-batches of {min(o.n_data, o.batch_real)}"
        found.append(part(UPDATE, update(False), what, amount.update, times, 0))
        found.append(part(SHARED, update(True), f"{what}, those of one class of {sizes.classes}", 0.0, times, 0))
    return found


def all_iterations(x: Sequence[Tensor], k: int) -> None:
    """Of k-means, without the early end that a CPU allows itself where nothing moves any more."""
    points, real = padded(x)
    squares, centroids = widened(points).square().sum(2), points[:, :k]
    for _ in range(KMEANS_ITERATIONS):
        centroids = update_centroids(points, real, *assign(points, squares, real, centroids), k)


def load_of(work: Work, parts: Sequence[Part], ratio: float) -> Load:
    """The model's numbers. ratio: seconds of a GPU's per second here."""
    assert work.random is not None
    sizes, o = work.random, resolved(work.words(torch.device("meta")))
    amount = Amount(o, sizes)

    def seconds(name: str) -> list[float]:
        return [ratio * part.whole * part.median for part in parts if part.name == name]

    counts = [part.classes for part in parts if part.name == "matching"]
    selection = [(a + b) / o.interval for a, b in zip(seconds("embedding"), seconds("k-means"), strict=True)]
    (whole,), (one_class,) = seconds(UPDATE), seconds(SHARED)
    mini = batches(o.n_data, o.batch_real)
    at_once = max(1, GATHERED // (o.batch_real * sizes.image_bytes))
    return Load(
        class_work=tuple(overview.class_work(o, [sizes.per_class] * sizes.classes, decoded=amount.decoded)),
        matching=Curve(tuple(zip(counts, seconds("matching"), strict=True))),
        selection=Curve(tuple(zip(counts, selection, strict=True))),
        update=Curve(((1 / sizes.classes, min(one_class, whole)), (1.0, whole))),
        drawn=o.n_data * sizes.image_bytes,
        exchanges=math.ceil(len(mini) / at_once),
        batches=len(mini),
        batch=o.batch_real,
        parameters=sum(p.numel() for p in models.outline(amount.spec).parameters()),
    )


# --- For people -------------------------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--forecast", action="store_true",
        help="forecast two published budgets on many GPUs, in the first of --precisions (fp32); where there are "
        "several GPUs, measure on them instead",
    )  # fmt: skip
    assumed = Links()
    for name, default, about in (
        ("gpu_tflops", 100.0, "what a GPU sustains in matching, where there is none to measure, in TFLOP/s"),
        ("bandwidth_within", assumed.within / 1e9, "of a GPU to others of its machine, each way, in GB/s"),
        ("bandwidth_between", assumed.between / 1e9, "of a GPU to other machines, each way, in GB/s"),
        ("latency_within", assumed.latency_within * 1e6, "of a step of a collective in a machine, in microseconds"),
        ("latency_between", assumed.latency_between * 1e6, "and between machines"),
        ("latency_host", assumed.latency_host * 1e6, "and between processors"),
    ):
        parser.add_argument(
            f"--{name}",
            type=float,
            default=default,
            metavar="X",
            help=f"assumed, for --forecast: {about} ({default:g})",
        )
    parser.add_argument("--gpus_per_machine", type=int, default=assumed.machine, metavar="N")
    parser.add_argument(
        "--gpus", nargs="+", type=int, default=[1, 2, 8, 16, 32, 64, 100], metavar="N", help="rows of --forecast"
    )


def links_of(given: argparse.Namespace) -> Links:
    return Links(
        machine=given.gpus_per_machine,
        within=1e9 * given.bandwidth_within,
        between=1e9 * given.bandwidth_between,
        latency_within=1e-6 * given.latency_within,
        latency_between=1e-6 * given.latency_between,
        latency_host=1e-6 * given.latency_host,
    )


def run(given: argparse.Namespace, device: torch.device) -> tuple[str, dict[str, Any]]:
    """The report, and its numbers."""
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if count > 1:
        given.works = list(FORECAST)
        given.processes = sorted({n for i in range(count.bit_length()) if (n := 2**i) <= count} | {count})
        return bench_ranks.run(given, device)
    machine.keep_freed_memory()
    machine.set_precision(device, given.precisions[0])
    compile, links = compiler_error(device) is None, links_of(given)
    texts, numbers = [assumptions(given, device, links)], {}
    for name in FORECAST:
        parts = measured(WORKS[name], device, given.repeats, given.precisions[0], compile)
        ratio = 1.0 if device.type == "cuda" else parts[0].rate / (1e3 * given.gpu_tflops)
        load = load_of(WORKS[name], parts, ratio)
        texts.append(forecast(name, parts, load, links, given.gpus))
        numbers[name] = {"parts": [part._asdict() for part in parts], "load": asdict(load)}
    return "\n\n".join(texts), numbers


def assumptions(given: argparse.Namespace, device: torch.device, links: Links) -> str:
    """What is taken for granted."""
    if device.type == "cuda":
        on = f"GPUs like this one, {machine.device_name(device)}, in {given.precisions[0]}"
    else:
        on = (
            f"GPUs that sustain {given.gpu_tflops:g} TFLOP/s in matching (--gpu_tflops: an ASSUMPTION, not a "
            f"measurement). Measured on {machine.device_name(device)}, in {given.precisions[0]}: all seconds are "
            "scaled by the one ratio of that rate to matching's here, so the proportions of the parts are this "
            "processor's, and that a GPU is not full with few images, and waits for launches, is not in it"
        )
    return "\n".join(
        [
            f"Forecast, not a measurement, for {on}.",
            "",
            f"Assumed links: {links.within / 1e9:g} GB/s each way per GPU in a machine of {links.machine}, "
            f"{links.between / 1e9:g} GB/s between machines. An all-reduce of B bytes over R ranks takes "
            "2 (R - 1) / R x B / bandwidth + ceil(log2 R) x latency, by the slowest link that takes part; latencies "
            f"{links.latency_within * 1e6:g} us in a machine, {links.latency_between * 1e6:g} us between machines, "
            f"{links.latency_host * 1e6:g} us between processors. Nothing overlaps.",
            "",
            "Inner step = matching + selection / interval of the rank that has most classes + network update, repeated "
            "or shared out, whichever is faster, + exchange of the drawn images (+ gradients) + agreement. Shared out, "
            "an update takes as long as the rank that chance gave most images of a mini-batch.",
        ]
    )


def forecast(name: str, parts: Sequence[Part], load: Load, links: Links, gpus: Sequence[int]) -> str:
    """One work's measured parts, bytes, table and limit."""
    sizes = WORKS[name].random
    assert sizes is not None
    lines = [f"{name}: condense.py {WORKS[name].flags}, {sizes.classes} classes of {sizes.per_class} images", ""]
    lines += ["| part | measured of | seconds (n, least to most) | GFLOP/s | the work / this |", "|---" * 5 + "|"]
    for part in parts:
        spread = f"{part.median:.3g} ({len(part.seconds)}, {min(part.seconds):.3g} to {max(part.seconds):.3g})"
        rate = f"{part.rate:.3g}" if part.gflop else ""
        lines.append(f"| {part.name} | {part.what} | {spread} | {rate} | {part.whole:.4g} |")
    lines += [
        "",
        f"Bytes per inner step: {load.drawn / 1e6:.4g} MB of drawn images in {load.exchanges} exchange(s); shared out, "
        f"also {load.batches} x {4e-6 * load.parameters:.4g} MB of gradients; 16 bytes to agree.",
        "",
        "| GPUs | classes (most) | real images, GB each | matching | selection / interval | network update | "
        "communication | inner step | 200,000 steps | speed-up | efficiency |",
        "|---" * 11 + "|",
    ]
    alone = inner_step(load, 1, links).seconds
    for n in gpus:
        if n > sizes.classes:
            lines.append(f"| {n} | classes are not divided" + " |" * 10)
            continue
        s = inner_step(load, n, links)
        times = list(map(duration, (s.matching, s.selection, s.update, s.communication, s.seconds)))
        times[2] += "" if n == 1 else ", shared out" if s.shared else ", repeated"
        held = s.classes * sizes.per_class * sizes.image_bytes / 1e9
        gain = alone / s.seconds
        cells = [str(n), str(s.classes), f"{held:.3g}", *times, f"{STEPS * s.seconds / 3600:.3g} h"]
        lines.append("| " + " | ".join([*cells, f"{gain:.2f} x", f"{100 * gain / n:.0f} %"]) + " |")
    return "\n".join([*lines, "", limit(load, links)])
