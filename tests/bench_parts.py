"""The parts of an inner step as bench.py and gpu_record.py measure them: in the published form, and in ours."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import models
from data import Dataset
from models import NetSpec
from tests import published
from utils.method.augment import Augment
from utils.method.formation import Formation
from utils.method.images import ImageSet, Normalize
from utils.method.matching import Matcher, MatchingStep
from utils.method.objectives import Comparison
from utils.method.pixels import PixelSGD
from utils.method.selection import KMEANS_ITERATIONS, Context, batched_kmeans, embed
from utils.method.training import Recipe, Trainer, fresh_network, update_network
from utils.numerics.compilation import compiler_error
from utils.numerics.compute import Compute
from utils.system import device as machine
from utils.system.draws import Draws

INTERVAL, BATCH = 10, 128


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
    width: int = 128

    @property
    def spec(self) -> NetSpec:
        return models.resolve("convnet", channels=self.channels, classes=self.classes, side=self.side, width=self.width)

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
    "tiny": Work(1, 8, 3, 300, 2, 2, 128, "mse", width=16),  # to try the script itself
}
PARTS = ("matching", "network update", "embedding", "k-means")
EVALUATION = "evaluation, 5 x 1,000 epochs"  # of the decoded images, scaled up from a few epochs
SELECTION, STEP = "selection, all classes", "inner step"
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


def operators(*functions: Callable[[], object]) -> int:
    """Operator calls of some functions on a CPU, nested ones too."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        for function in functions:
            function()
    return sum(event.count for event in profile.key_averages() if event.key.startswith("aten::"))


def kernels(function: Callable[[], object]) -> tuple[int, float]:
    """Number and seconds of what a GPU runs for a function: kernels, copies and fills, those of CUDA graphs too."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        function()
        torch.cuda.synchronize()
    on_device = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return len(on_device), 1e-6 * sum(event.time_range.elapsed_us() for event in on_device)


def counts(match: Callable[[], None], update: Callable[[], None], device: torch.device) -> dict[str, Any]:
    """Operators of a matching step and a network update on a CPU, kernels of each on a GPU."""
    if device.type == "cpu":
        return {"operators": operators(match, update)}
    try:
        return {"kernels": {"matching": kernels(match), "network update": kernels(update)}}
    except RuntimeError:  # a machine that forbids profiling is no reason to lose the times
        return {}


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
    return {**found, **counts(match, update, device)}


def published_evaluation(work: Work, real: ImageSet, timer: Timer) -> dict[str, Any]:
    """Seconds of an evaluation in the published form, one training after the other."""
    few, net = decoded_set(work, real), fresh_network(work.spec, Draws(timer.device, 0))
    sgd = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)

    def train() -> None:
        published.epoch(net, sgd, few, len(few), 64, EVALUATION_AUGMENTATION)

    return {EVALUATION: [REPEATS * EPOCHS * s for s in timer(train, warm=1)]} if len(few) <= FEW else {}


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
    matcher = Matcher(how, Formation(work.factor), BATCH, Augment("color_crop_cutout"), compute)
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
    net, cheapest = trainer.nets[0], compute.cheapest()
    x: list[Tensor] = []
    repeats, warm = (2, 0) if device.type == "cpu" else (timer.repeats, 1)  # an embedding takes 20 s or 50 ms
    embed(net, real.of_class(0), real.normalize, cheapest)

    def embed_all() -> None:
        context = Context(net, real, Draws(device, "select"), cheapest)
        x[:] = [context.embedded(c) for c in range(real.classes)]

    found["embedding"] = timer(embed_all, repeats, warm=warm)
    found["k-means"] = timer(
        lambda: batched_kmeans(x, BATCH, [Draws(device, "select", c) for c in range(len(x))]), repeats, warm=1
    )
    x.clear()
    return {**found, **counts(match, update, device), "first step": first, "compiled": compute.compile}


def our_evaluation(work: Work, real: ImageSet, timer: Timer, precision: str) -> dict[str, Any]:
    """Seconds of an evaluation as train.py does it, all trainings side by side."""
    device, few = timer.device, decoded_set(work, real)
    if len(few) > FEW:
        return {}
    machine.set_precision(device, precision)
    compute = Compute(device, precision, compile=compiler_error(device) is None)
    nets = [fresh_network(work.spec, Draws(device, r)) for r in range(REPEATS)]
    trainer = Trainer(nets, [few] * REPEATS, Recipe(64, Augment(EVALUATION_AUGMENTATION), "cut"), compute)
    everything, draws = torch.arange(len(few), device=device), [Draws(device, "evaluate", r) for r in range(REPEATS)]
    return {EVALUATION: [EPOCHS * s for s in timer(lambda: trainer.epoch(everything, draws), warm=4)]}


def seconds(found: dict[str, Any], part: str) -> float:
    """Median seconds of a part of a variant; a step's selection counts a tenth."""
    if part == SELECTION:
        return seconds(found, "embedding") + seconds(found, "k-means")
    if part == STEP and part not in found:
        return seconds(found, "matching") + seconds(found, "network update") + seconds(found, SELECTION) / INTERVAL
    return statistics.median(found[part])


def row(found: dict[str, Any]) -> str:
    """One line about a variant: milliseconds of every part as median (least-most), and those that kernels run."""
    if "error" in found:
        return f"failed: {found['error']}"
    cells = [
        f"{part} {1e3 * seconds(found, part):,.1f} ({1e3 * min(found[part]):,.1f}-{1e3 * max(found[part]):,.1f})"
        for part in (*PARTS, EVALUATION, STEP)
        if part in found
    ]
    if set(PARTS) <= set(found):
        cells.append(f"{STEP} {1e3 * seconds(found, STEP):,.1f}")
    for part, (number, busy) in found.get("kernels", {}).items():
        cells.append(f"{part} {number} kernels, {1e3 * busy:,.1f}")
    return "ms: " + "; ".join([*cells, f"{found['peak memory'] / 1e9:.1f} GB"])
