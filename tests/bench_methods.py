"""The frameworks' inner steps for bench.py --methods: their naive forms, and ours as condense.py composes them.

Without the selection, which the other tables measure, and without the epoch that dream+ pre-trains a network for.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from data import Dataset
from models import NetSpec
from tests import published
from utils.config import derived, resolve
from utils.config.build import Parts, Problem
from utils.config.options import CondenseOptions
from utils.config.presets import METHODS, TRAJECTORY
from utils.method.images import ImageSet, Normalize
from utils.method.pixels import PixelSGD
from utils.method.training import fresh_network, update_network
from utils.numerics.compilation import compiler_error
from utils.numerics.compute import Captured
from utils.numerics.derivatives import flattened
from utils.system.device import set_precision
from utils.system.draws import Draws

NAIVE = ("naive", "naive, allocator kept")
PER_CLASS = 500  # real images: what there is beyond those that are matched does not matter


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--methods", nargs="*", choices=tuple(METHODS), help="measure these frameworks (default: all)")
    parser.add_argument(
        "--flags", default="--reproduce --ipc 10", metavar="WORDS",
        help="condense.py's flags for --methods (default: --reproduce --ipc 10)",
    )  # fmt: skip


@dataclass(frozen=True)
class Step:
    """One framework's sizes and settings on images of CIFAR-10's shape; factor 2 where it is published with it."""

    o: CondenseOptions
    spec: NetSpec
    real: ImageSet
    picks: Tensor  # (classes, batch_real), random

    @classmethod
    def of(cls, method: str, flags: str, device: torch.device) -> Step:
        factor = "2" if method in ("dream", "idc", "dream+") else "1"
        words = ["-d", "cifar10", "-f", factor, "--method", method, *shlex.split(flags)]
        o = resolve.condense(words, "").options
        images = torch.randint(0, 256, (10 * PER_CLASS, 3, 32, 32), dtype=torch.uint8).to(device)
        labels = torch.arange(10, device=device).repeat_interleave(PER_CLASS)
        real = ImageSet(images, labels, classes=10, normalize=Normalize([0.5] * 3, [0.25] * 3, device))
        picks = torch.stack([s + torch.randperm(PER_CLASS, device=device)[: o.batch_real] for s in real.starts])
        return cls(o, resolve.network(o, o.net_type, Dataset("cifar10", device=device)), real, picks)

    def start(self) -> tuple[Any, Tensor]:
        """A fresh network, and pixels."""
        net = fresh_network(self.spec, Draws(self.real.device, 0))
        return net, torch.rand(10, self.o.ipc, 3, 32, 32, device=self.real.device)


def near(start: Tensor) -> tuple[Tensor, Tensor]:
    """Both ends of a made-up trajectory."""
    return start, start + 0.01 * torch.randn_like(start)


def naive(step: Step) -> Callable[[], None]:
    """The inner step, class by class, by autograd, with one optimiser of all pixels."""
    o, real, (net, start) = step.o, step.real, step.start()
    pixels, update = start.requires_grad_(), derived.update_recipe(o)
    sgd = torch.optim.SGD([pixels], 1e-4, momentum=0.5)
    if o.match == TRAJECTORY:
        ends, size = near(flattened(net.parameters())), torch.tensor(0.01, device=real.device, requires_grad=True)
        sgds = (sgd, torch.optim.SGD([size], 1e-5, momentum=0.5))
        return lambda: published.trajectory(
            net, pixels, size, sgds, ends, real, o.factor, steps=o.student_steps, names=o.aug_type
        )
    weights = torch.optim.SGD(net.parameters(), update.lr, update.momentum, weight_decay=update.weight_decay)
    labels, names = torch.arange(10, device=real.device).repeat_interleave(o.ipc), derived.update_augmentation(o)
    cutmix = 0.5 if o.mixup_net == "cut" else 0.0
    net.requires_grad_(o.match != "embed")  # without which the distance's gradient by the weights is computed in vain
    how: dict[str, Any] = dict(match=o.match, fc=o.fc, names=o.aug_type, joint=o.pixel_step == "joint")

    def inner_step() -> None:
        published.matching(net, pixels, sgd, real, step.picks, o.factor, o.metric, **how)
        if o.inner_loop == 1:
            return
        images = real if o.train_on == "real" else ImageSet(
            pixels.detach().flatten(0, 1), labels, classes=10, normalize=real.normalize
        )  # fmt: skip
        count = o.n_data if o.train_on == "real" else len(images)
        for _ in range(o.net_epoch):
            published.epoch(net, weights, images, count, o.batch_real, names, cutmix=cutmix)

    return inner_step


def ours(step: Step, precision: str) -> Callable[[], None]:
    """The same as condense.py does it."""
    o, real, (net, start) = step.o, step.real, step.start()
    device = real.device
    set_precision(device, precision)
    ends = near(flattened(net.parameters()))
    experts: Any = SimpleNamespace(count=1, pair=lambda expert, start, end: ends) if o.match == TRAJECTORY else None
    about: Any = SimpleNamespace(
        device=device, train=real, test=real, counts=real.counts, classes=10, channels=3, side=32, base_side=32,
        class_names=[str(c) for c in range(10)],
    )  # fmt: skip
    compile = "on" if compiler_error(device) is None else "off"
    parts = Parts(replace(o, precision=precision, compile=compile), Problem(about, step.spec), experts=experts)
    joint = real.normalize if o.pixel_step == "joint" else None
    pixels = PixelSGD(start, lr=1e-4, momentum=0.5, joint=joint)
    trainer, match = parts.trainer(net, start), parts.matching_step(net, pixels)

    def inner_step() -> None:
        match(step.picks, Draws(device, "match"))
        if o.inner_loop > 1:
            update_network(trainer, n_data=parts.n_data, draws=Draws(device, "update"))

    return inner_step


def measure(
    method: str, variant: str, flags: str, timer: Callable[..., list[float]], device: torch.device
) -> dict[str, Any]:
    """Seconds of some inner steps; in this process."""
    step = Step.of(method, flags, device)
    inner_step = naive(step) if variant in NAIVE else ours(step, variant.removeprefix("ours "))
    return {
        "seconds": timer(inner_step, warm=1 if variant in NAIVE else 2 if device.type == "cpu" else Captured.WARM + 1)
    }


def table(results: dict[str, dict[str, dict[str, Any]]], flags: str) -> str:
    """What a person reads. results: by method and variant."""
    variants = list(next(iter(results.values())))
    lines = [f"inner steps, {flags}: seconds (median), x over the naive form / over it with the allocator kept, GB", ""]
    lines += ["| | " + " | ".join(variants) + " |", "|---" * (len(variants) + 1) + "|"]
    for method, found in results.items():
        seconds = {variant: statistics.median(one["seconds"]) for variant, one in found.items() if "error" not in one}
        cells = []
        for variant, one in found.items():
            if "error" in one:
                cells.append(f"failed: {one['error']}")
                continue
            ratios = " / ".join(f"{seconds[form] / seconds[variant]:.2f} x" for form in NAIVE if form in seconds)
            ratio = "" if variant in NAIVE or not ratios else f", {ratios}"
            cells.append(f"{seconds[variant]:.3g} s{ratio}, {one['peak memory'] / 1e9:.1f} GB")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
