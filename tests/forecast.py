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
from tests.scaling_model import Curve, Links, Load, duration, inner_step, limit
from utils.config import overview
from utils.config.build import Parts
from utils.config.options import CondenseOptions, network
from utils.method.formation import decoded_count
from utils.method.images import starts
from utils.method.selection import KMEANS_ITERATIONS, assign, embed, padded, update_centroids, widened
from utils.method.training import GATHERED, batches, update_network
from utils.numerics.compilation import compiler_error
from utils.numerics.compute import Compute
from utils.system import device as machine
from utils.system.distributed import ALONE, Shard

FORECAST = ("cifar100_ipc50", "imagenet100")
STEPS = 2000 * 100  # inner steps of the published budget
UPDATE, SHARED = "network update", "network update, one class of it"


# --- The parts, measured on one device --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Amount:
    """GFLOP of a work's parts, of every class or of the whole update: a backward pass is two forward ones, and the
    gradient of a distance between gradients seven in all (utils/config/overview.py)."""

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
    counts = sorted(
        {1, min(work.random.classes, compute.classes_at_once(o.batch_real + amount.decoded, work.random.side))}
    )
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
    images.hold(list(range(count)), ALONE.all_reduce_sum)
    parts = Parts(o, images, amount.spec, compute, Shard(ALONE, list(range(count)), sizes.classes))
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
