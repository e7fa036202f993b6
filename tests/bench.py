"""How long the parts of an inner step take: the published form and ours, side by side in one run. Not a test.

    $ python3 tests/bench.py                             # the headline work on this machine's processor
    $ python3 tests/bench.py --device cuda --json bench.json
    $ python3 tests/bench.py --work mnist cifar100 --image_folder data/cifar10_jpg
    $ python3 tests/bench.py --methods --repeats 3       # the inner step of every framework against its naive form
    $ python3 tests/bench.py --scaling --works digits    # the same parts in one process and in two, by torchrun
    $ python3 tests/bench.py --forecast                  # published budgets on many GPUs, forecast from this device

Every variant runs in a process of its own, one after the other, so that its peak memory is its own: the published form
as it comes; the same with the C allocator kept from returning memory, so that no ratio is one of page faults alone;
ours in every precision of the machine, on a GPU also with --deterministic, so that its cost can be read off. Medians
after a warm-up. Images are random unless a folder is given: their content matters for the inertia only. Keep the
machine otherwise idle.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

import models
from data import Dataset
from models import NetSpec
from tests import bench_methods, bench_ranks, forecast, published
from utils.config.presets import METHODS
from utils.method.augment import Augment
from utils.method.images import ImageSet, Normalize
from utils.method.matching import Matcher, MatchingStep
from utils.method.objectives import Comparison
from utils.method.pixels import PixelSGD
from utils.method.selection import KMEANS_ITERATIONS, batched_kmeans, embed
from utils.method.training import Recipe, Trainer, fresh_network, update_network
from utils.numerics.compilation import compiler_error
from utils.numerics.compute import Compute
from utils.system import device as machine
from utils.system.draws import Draws

DETERMINISTIC = ", deterministic"  # at the end of a variant's name
INTERVAL, BATCH, STEPS = 10, 128, 2000 * 100


@dataclass(frozen=True)
class Work:
    """One published setting's sizes."""

    channels: int
    side: int
    classes: int
    per_class: int
    ipc: int
    factor: int
    n_data: int
    metric: str

    @property
    def spec(self) -> NetSpec:
        return models.resolve("convnet", channels=self.channels, classes=self.classes, side=self.side)

    @property
    def syn(self) -> int:
        return min(self.ipc * self.factor**2, BATCH)

    def gflop(self) -> dict[str, float]:
        """Convolutions of each part: see utils/numerics/analytic.py. The first layer has no gradient to pass on."""
        net = models.build(self.spec)
        side, layers = 32 if self.side == 28 else self.side, []
        assert isinstance(net, models.ConvNet)
        for conv, _ in net.layers:
            layers.append(2e-9 * conv.weight.numel() * side**2)
            side //= 2
        everything, first = sum(layers), layers[0]
        real, syn = self.classes * BATCH, self.classes * self.syn
        return {
            "matching": real * (3 * everything - first) + syn * (7 * everything - 2 * first),
            "network update": self.n_data * (3 * everything - first),
            "embedding": self.classes * self.per_class * everything,
            "k-means": self.classes
            * self.per_class
            * BATCH
            * 2e-9
            * (net.classifier.in_features * 2)
            * KMEANS_ITERATIONS,
        }


WORKS = {
    "headline": Work(3, 32, 10, 5000, 10, 2, 2000, "mse"),
    "mnist": Work(1, 28, 10, 6000, 10, 2, 500, "l1"),
    "cifar100": Work(3, 32, 100, 500, 10, 2, 2000, "mse"),
    "cifar100_ipc50": Work(3, 32, 100, 500, 50, 2, 2000, "mse"),
    "tiny": Work(1, 8, 3, 300, 2, 2, 128, "mse"),  # to try the script itself
}
PARTS = ("matching", "network update", "embedding", "k-means")
EVALUATION = "evaluation, 5 x 1,000 epochs"  # of the decoded images, scaled up from a few epochs
FEW = 1000  # images up to which it is measured
REPEATS, EPOCHS, EVALUATION_AUGMENTATION = 5, 1000, "color_crop_flip_scale_rotate"


class Timer:
    """Medians of several calls, waited for."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device, self.repeats = device, repeats

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def __call__(self, function: Callable[[], object], repeats: int | None = None, warm: int = 2) -> list[float]:
        for _ in range(warm):
            function()
        seconds = []
        for _ in range(repeats or self.repeats):
            self.wait()
            start = time.perf_counter()
            function()
            self.wait()
            seconds.append(time.perf_counter() - start)
        return seconds


def operators(function: Callable[[], object], device: torch.device) -> int:
    """Operator calls on a CPU (nested ones too), kernel and graph launches on a GPU."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        function()
    names = ("cudaLaunchKernel", "cudaGraphLaunch", "cuLaunchKernel") if device.type == "cuda" else ("aten::",)
    return sum(event.count for event in profile.key_averages() if event.key.startswith(names))


def real_images(work: Work, device: torch.device, folder: str | None) -> ImageSet:
    if folder is not None:
        return Dataset("cifar10", device=device, data_dir="data", image_folder=folder, size=None).train
    n = work.classes * work.per_class
    images = torch.randint(0, 256, (n, work.channels, work.side, work.side), dtype=torch.uint8)
    labels = torch.arange(work.classes).repeat_interleave(work.per_class)
    normalize = Normalize([0.5] * work.channels, [0.25] * work.channels, device)
    return ImageSet(images.to(device), labels.to(device), classes=work.classes, normalize=normalize)


def run_published(work: Work, real: ImageSet, timer: Timer) -> dict[str, Any]:
    """Seconds of every part in the published form; the embedding and k-means of two classes stand for all."""
    device = timer.device
    net = fresh_network(work.spec, Draws(device, 0))
    pixels = torch.rand(work.classes, work.ipc, *real.images.shape[1:], device=device).requires_grad_()
    pixel_sgd = torch.optim.SGD([pixels], 1e-4, momentum=0.5)
    sgd = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)
    picks = torch.stack(
        [s + torch.randperm(n, device=device)[:BATCH] for s, n in zip(real.starts, real.counts, strict=True)]
    )

    def match() -> None:
        published.matching(net, pixels, pixel_sgd, real, picks, work.factor, work.metric)

    def update() -> None:
        published.epoch(net, sgd, real, work.n_data, BATCH, "color_crop")

    found: dict[str, Any] = {"matching": timer(match, warm=1), "network update": timer(update, warm=1)}
    seconds, classes = timer(lambda: published.embedding(net, real, 0), 2, warm=1), len(real.counts)
    found["embedding"] = [classes * s for s in seconds]
    x = published.embedding(net, real, 0)
    found["k-means"] = [classes * s for s in timer(lambda: published.kmeans(x, BATCH), 2, warm=1)]
    few = decoded_set(work, real)

    def train() -> None:
        published.epoch(net, sgd, few, len(few), 64, EVALUATION_AUGMENTATION)

    if len(few) <= FEW:
        found[EVALUATION] = [REPEATS * EPOCHS * s for s in timer(train, warm=1)]
    found["operators"] = operators(match, device) + operators(update, device)
    return found


def decoded_set(work: Work, real: ImageSet) -> ImageSet:
    """As many images as a distilled set decodes to."""
    return real.subset(torch.cat([s + torch.arange(work.syn, device=real.device) for s in real.starts]))


def run_ours(work: Work, real: ImageSet, timer: Timer, precision: str) -> dict[str, Any]:
    """Seconds of every part as condense.py runs them."""
    device = timer.device
    machine.set_precision(device, precision)
    compute = Compute(device, precision, compile=compiler_error(device) is None)
    recipe = Recipe(BATCH, Augment("color_crop"), "cut")
    trainer = Trainer([fresh_network(work.spec, Draws(device, 0))], [real], recipe, compute)
    pixels = PixelSGD(torch.rand(work.classes, work.ipc, *real.images.shape[1:], device=device), lr=1e-4, momentum=0.5)
    how = Comparison(metric=work.metric)
    matcher = Matcher(how, work.factor, "single", BATCH, Augment("color_crop_cutout"), compute)
    step = MatchingStep(matcher, trainer.nets[0], pixels, real)
    picks = torch.stack(
        [s + torch.randperm(n, device=device)[:BATCH] for s, n in zip(real.starts, real.counts, strict=True)]
    )

    def match() -> None:
        step(picks, Draws(device, "match"))

    def update() -> None:
        update_network(trainer, n_data=work.n_data, draws=Draws(device, "update"))

    start = time.perf_counter()
    match()
    update()
    first = time.perf_counter() - start
    found: dict[str, Any] = {"matching": timer(match, warm=4), "network update": timer(update, warm=4)}
    cheapest = compute.cheapest()
    embed(trainer.nets[0], real.of_class(0), real.normalize, cheapest)
    x: list[Tensor] = []

    def embed_all() -> None:
        x[:] = [embed(trainer.nets[0], real.of_class(c), real.normalize, cheapest) for c in range(real.classes)]

    found["embedding"] = timer(embed_all, 2, warm=0)
    found["k-means"] = timer(
        lambda: batched_kmeans(x, BATCH, [Draws(device, "select", c) for c in range(len(x))]), 2, warm=1
    )
    x.clear()
    few = decoded_set(work, real)
    nets = [fresh_network(work.spec, Draws(device, r)) for r in range(REPEATS)]
    evaluation = Trainer(nets, [few] * REPEATS, Recipe(64, Augment(EVALUATION_AUGMENTATION), "cut"), compute)
    everything, draws = torch.arange(len(few), device=device), [Draws(device, "evaluate", r) for r in range(REPEATS)]
    if len(few) <= FEW:
        found[EVALUATION] = [EPOCHS * s for s in timer(lambda: evaluation.epoch(everything, draws), warm=4)]
    found["operators"] = operators(match, device) + operators(update, device)
    found["first step"] = first
    found["compiled"] = compute.compile
    return found


def peaks(timer: Timer, precision: str) -> dict[str, float]:
    """GFLOP/s of a matrix product and of 3x3 convolutions with 128 channels, the best of several sizes."""
    device = timer.device
    machine.set_precision(device, precision)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product = 2e-9 * size**3 / min(timer(lambda: a @ b, 7))
    best = 0.0
    for side in (8, 16):
        for n in (32, 128, 1280) if device.type == "cuda" else (20, 32, 64, 128):
            x = torch.randn(n, 128, side, side, device=device, dtype=dtype).to(memory_format=torch.channels_last)
            w = torch.randn(128, 128, 3, 3, device=device, dtype=dtype).to(memory_format=torch.channels_last)
            seconds = min(timer(lambda: torch.nn.functional.conv2d(x, w, padding=1), 9))  # noqa: B023 - called here
            best = max(best, 2e-9 * n * side**2 * w.numel() / seconds)
    return {"matrix product": product, "convolution": best}


def inertia(work: Work, real: ImageSet, timer: Timer) -> dict[str, float]:
    """Sum of squared distances to the centroids after our k-means of one class, by scikit-learn's: all in float32
    embeddings, the centroids of ours found in the precision in which selection embeds."""
    from sklearn.cluster import KMeans

    from utils.method.selection import lloyd, padded

    compute = Compute(timer.device)
    net = fresh_network(work.spec, Draws(timer.device, 0))
    trainer = Trainer([net], [real], Recipe(BATCH, Augment("color_crop"), "cut"), compute)
    ratios: dict[str, list[float]] = {"untrained": [], "after 20 updates": []}
    for state, kept in ratios.items():
        if state != "untrained":
            for i in range(20):
                update_network(trainer, n_data=work.n_data, draws=Draws(timer.device, "update", i))
        for c in range(3):
            exact = embed(net, real.of_class(c), real.normalize, compute)
            cheap = embed(net, real.of_class(c), real.normalize, compute.cheapest())
            points, rows = padded([cheap])
            _, nearest, _ = lloyd(points, rows, BATCH, Draws(timer.device, c).uniform(*rows.shape))
            member = torch.nn.functional.one_hot(nearest[0], BATCH).to(exact.dtype)
            means = (member.T @ exact) / member.sum(0).clamp(min=1)[:, None]
            ours = torch.cdist(exact, means).square().min(1).values.sum().item()
            theirs = KMeans(BATCH, n_init=1, random_state=c).fit(exact.cpu().numpy()).inertia_
            kept.append(ours / theirs)
    return {state: statistics.fmean(kept) for state, kept in ratios.items()}


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """One variant of one work, in this process."""
    device = machine.pick_device(given.device)
    work, timer = WORKS[given.work[0]], Timer(device, given.repeats)
    if given.variant == "peaks":
        machine.keep_freed_memory()
        return {p: peaks(timer, p) for p in given.precisions}
    if given.variant not in ("published", bench_methods.NAIVE[0]):
        machine.keep_freed_memory()
    if given.variant.endswith(DETERMINISTIC):
        machine.be_deterministic(device)
    if given.methods:
        found = bench_methods.measure(given.methods[0], given.variant, given.flags, timer, device)
        return {**found, "peak memory": machine.peak_memory(device)}
    real = real_images(work, device, given.image_folder if given.work[0] == "headline" else None)
    if given.variant == "inertia":
        return dict(inertia(work, real, timer))
    found = (
        run_published(work, real, timer)
        if given.variant.startswith("published")
        else run_ours(work, real, timer, precision_of(given.variant))
    )
    return {**found, "peak memory": machine.peak_memory(device)}


def precision_of(variant: str) -> str:
    """`ours bf16, deterministic` -> bf16."""
    return variant.removeprefix("ours ").removesuffix(DETERMINISTIC)


def table(name: str, results: dict[str, dict[str, Any]], top: dict[str, dict[str, float]]) -> str:
    """What a person reads."""
    gflop = WORKS[name].gflop()
    lines = [
        f"{name}: seconds (median), x over the published form / over it with the allocator kept, GFLOP/s, % of peak",
        "",
        "| | " + " | ".join(results) + " |",
        "|---" * (len(results) + 1) + "|",
    ]

    def seconds(variant: str, part: str) -> float:
        if part == "selection, all classes":
            return sum(seconds(variant, p) for p in ("embedding", "k-means"))
        if part == "inner step":
            selection = seconds(variant, "selection, all classes") / INTERVAL
            return seconds(variant, "matching") + seconds(variant, "network update") + selection
        return statistics.median(results[variant][part])

    timed = [part for part in (*PARTS, EVALUATION) if part in results["published"]]
    for part in (*timed, "selection, all classes", "inner step"):
        cells = []
        for variant in results:
            value = seconds(variant, part)
            cell = f"{value:.3g} s"
            if variant.startswith("ours"):
                first, second = (seconds(v, part) / value for v in ("published", "published, allocator kept"))
                cell += f", {first:.2f} x / {second:.2f} x"
                if part in ("matching", "network update"):
                    rate = gflop[part] / value
                    peak = top[precision_of(variant)]["convolution"]
                    cell += f", {rate:.0f}, {100 * rate / peak:.0f} %"
            cells.append(cell)
        lines.append(f"| {part} | " + " | ".join(cells) + " |")
    lines.append("| operators or launches | " + " | ".join(str(r["operators"]) for r in results.values()) + " |")
    lines.append("| peak memory, GB | " + " | ".join(f"{r['peak memory'] / 1e9:.1f}" for r in results.values()) + " |")
    forecast = (f"{STEPS * seconds(v, 'inner step') / 3600:.3g} h" for v in results)
    lines.append("| 2,000 outer iterations | " + " | ".join(forecast) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Run the variants, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--work", nargs="+", default=["headline"], choices=tuple(WORKS))
    parser.add_argument("--image_folder", help="CIFAR-10 as image files, for the headline's inertia")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", help="write everything that was measured to this file")
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    parser.add_argument("--precisions", nargs="+", help="of fp32, tf32, bf16 (default: those that the device has)")
    for more in (bench_methods, bench_ranks, forecast):
        more.add_flags(parser)
    given = parser.parse_args(argv)
    device = machine.pick_device(given.device)
    if given.precisions is None:
        given.precisions = ["fp32", *(["tf32"] if device.type == "cuda" else [])]
        given.precisions += ["bf16"] if machine.fast_bfloat16(device) else []
    if given.variant:
        print(json.dumps(measure(given)))
        return 0

    def apart(variant: str, work: str, *more: str) -> dict[str, Any]:
        words = ["--device", device.type, "--work", work, "--repeats", str(given.repeats), "--variant", variant]
        words += ["--precisions", *given.precisions]
        words += ["--image_folder", given.image_folder] if given.image_folder else []
        words += more
        print("...", work, *more[1:2], variant, file=sys.stderr, flush=True)
        done = subprocess.run([sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True, check=True)
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found

    about = {
        "device": machine.device_name(device),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "repeats": given.repeats,
    }
    if given.scaling or given.forecast:
        if given.scaling and (problem := bench_ranks.problem(given)):
            parser.error(problem)
        text, numbers = (bench_ranks if given.scaling else forecast).run(given, device)
        print(json.dumps(about) + "\n\n" + text)
        if given.json:
            Path(given.json).write_text(json.dumps({"machine": about, "ranks": numbers}, indent=1) + "\n")
        return 0
    if given.methods is not None:
        variants = [*bench_methods.NAIVE, *(f"ours {p}" for p in given.precisions)]
        results = {
            method: {v: apart(v, "headline", "--methods", method, f"--flags={given.flags}") for v in variants}
            for method in given.methods or METHODS
        }
        print(json.dumps(about) + "\n\n" + bench_methods.table(results, given.flags))
        if given.json:
            Path(given.json).write_text(json.dumps({"machine": about, "methods": results}, indent=1) + "\n")
        return 0
    report: dict[str, Any] = {"machine": about, "peaks": apart("peaks", "headline"), "works": {}}
    print(json.dumps({**about, "peaks in GFLOP/s": report["peaks"]}))
    for work in given.work:
        variants = ["published", "published, allocator kept", *(f"ours {p}" for p in given.precisions)]
        variants += [f"ours {p}{DETERMINISTIC}" for p in given.precisions if device.type == "cuda"]
        report["works"][work] = {variant: apart(variant, work) for variant in variants}
        print("\n" + table(work, report["works"][work], report["peaks"]))
        if given.image_folder and work == "headline":
            report["inertia"] = apart("inertia", work)
            print("\ninertia over scikit-learn's:", report["inertia"])
        if given.json:
            Path(given.json).write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
