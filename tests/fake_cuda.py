"""What the CUDA path does, operator by operator, on a machine without a GPU: launches, bytes, and broken rules.

    $ python3 tests/fake_cuda.py                                     # every work at small size
    $ python3 tests/fake_cuda.py --work headline --precision bf16    # CIFAR-10, f=2, ipc 10, at full size
    $ python3 tests/fake_cuda.py --work dream --operators            # which operators the launches are
    $ python3 tests/fake_cuda.py --work dream mtt --json             # one JSON object, for tests/test_fake_cuda.py

The loop of condense.py runs on fake tensors (tests/fake_device.py) for two outer iterations, each with a network of its
own; between them a checkpoint is restored. Every function that a GPU would capture as a CUDA graph is audited at every
call. All numbers are counts and no times; bytes are those that an operator reads and writes, whatever a cache would
save.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

import condense
import models
from data import Dataset
from models import NetSpec
from tests.fake_device import NEEDS_VALUES, Audit, Recorder, fake_cuda, unsupported
from utils.config import derived, resolve
from utils.config.build import Parts, Problem
from utils.config.options import CondenseOptions
from utils.config.presets import METHODS, TRAJECTORY
from utils.method.images import ImageSet, Normalize, starts
from utils.method.selection import STRATEGIES, Context, select
from utils.method.state import State
from utils.method.training import fresh_network, train_networks
from utils.numerics.compute import PRECISIONS, Compute
from utils.runs.experts import Experts
from utils.system.draws import Draws

DEVICE = torch.device("cuda", 0)


# --- Images without values --------------------------------------------------------------------------------------------


def grouped_evenly(
    self: ImageSet, images: Tensor, labels: Tensor, *, classes: int, normalize: Normalize, soft: Tensor | None = None
) -> None:
    """ImageSet.__init__ without a look at the labels: images are grouped already, as many of every class."""
    self.images, self.labels, self.soft, self.normalize = images, labels, soft, normalize
    set_counts(self, [len(images) // classes] * classes)


def set_counts(images: ImageSet, counts: Sequence[int]) -> None:
    """Say how many images a set has of every class."""
    images.counts, images.starts, images.held = list(counts), starts(counts), list(range(len(counts)))


class FakeData:
    """Data set of such images: the part of data.Dataset that utils/config/build.py asks for."""

    flip = True
    skipped = None
    device = DEVICE

    def __init__(self, counts: Sequence[int], channels: int, side: int) -> None:
        self.counts, self.channels, self.side, self.base_side = list(counts), channels, side, side
        self.classes = len(counts)
        self.class_names = [str(c) for c in range(self.classes)]
        normalize = Normalize([0.5] * channels, [0.2] * channels, DEVICE)
        images = torch.empty(sum(counts), channels, side, side, dtype=torch.uint8, device=DEVICE)
        labels = torch.empty(sum(counts), dtype=torch.int64, device=DEVICE)
        self.train = self.test = ImageSet(images, labels, classes=self.classes, normalize=normalize)
        set_counts(self.train, counts)


Shape = tuple[Sequence[int], int, int]  # of a data set: images of every class, channels, side
SMALL: Shape = ([30] * 3, 3, 16)
CIFAR10: Shape = ([5000] * 10, 3, 32)


# --- Works ------------------------------------------------------------------------------------------------------------

Flags = dict[str, Any]
NARROW: Flags = dict(depth=3, width=16)
SMALL_NETWORK: Flags = dict(depth=2, width=16)
SMALL_FLAGS: Flags = dict(
    **SMALL_NETWORK, dataset="cifar10", ipc=2, factor=2, batch_real=16, batch_syn_max=5, n_data=40, batch_size=8,
    student_steps=2,
)  # fmt: skip
EARLY: Flags = dict(networks="early", select="members", average=0.9, lr_img_end=0.1)
HEADLINE_FLAGS: Flags = dict(dataset="cifar10", ipc=10, factor=2, reproduce=True)
ITERATIONS, INNER_LOOP = 2, 2  # two networks
RESTORED = 1  # the outer iteration before which a checkpoint is restored


class FakeExperts:
    """Trajectories on the CPU, where condense.py keeps them."""

    count, seconds = 2, 0.0

    def __init__(self, spec: NetSpec) -> None:
        self.size = sum(p.numel() for p in models.build(spec).parameters())

    def pair(self, expert: int, start: int, end: int) -> tuple[Tensor, Tensor]:
        return torch.zeros(self.size), torch.zeros(self.size)


class FakeRun:
    """The part of condense.Run that its loop asks for."""

    out_of_time = False

    def __init__(self, o: CondenseOptions, parts: Parts, state: State, recorder: Recorder) -> None:
        self.o, self.parts, self.state, self.recorder = o, parts, state, recorder

    def before_iteration(self, it: int) -> None:
        if it == RESTORED:
            with self.recorder.paused():
                self.state.load_state_dict(_on_cpu(self.state.state_dict()))

    def after_step(self) -> None:
        pass


def _on_cpu(saved: Any) -> Any:
    """A checkpoint's content as torch.load gives it."""
    return torch.utils._pytree.tree_map_only(Tensor, lambda x: x.cpu(), saved)


class FakeParts(Parts):
    """Objects of a run on such data."""

    def synthetic(self, pixels: Tensor) -> ImageSet:
        """Training images that pixels decode to; formation.training_images would look at the labels for them."""
        images = self.formation.decode(pixels)
        labels = torch.arange(len(images), device=DEVICE).repeat_interleave(images.shape[1])
        return ImageSet(images.flatten(0, 1), labels, classes=len(images), normalize=self.real.normalize)


def parts_of(flags: Flags, data: Shape) -> tuple[CondenseOptions, FakeParts]:
    """Options and objects of a command of condense.py with these flags, on fake data."""
    given = {**flags, "inner_loop": INNER_LOOP, "niter": ITERATIONS}
    o, fake = resolve.condense_options(given).options, FakeData(*data)
    spec = resolve.network(o, o.net_type, cast(Dataset, fake))
    needed = o.match == TRAJECTORY or derived.has_pool(o)
    experts = cast(Experts, FakeExperts(spec)) if needed else None
    return o, FakeParts(o, Problem(cast(Dataset, fake), spec), experts=experts)


def distil(recorder: Recorder, how: Flags, *, flags: Flags, data: Shape) -> None:
    """The loop of condense.py; what happens between its captured functions is audited as well."""
    o, parts = parts_of({**how, **flags}, data)
    state = parts.state(None)
    with recorder.audit("between", captured=False):
        condense.condense(cast(condense.Run, FakeRun(o, parts, state, recorder)))


def evaluate(recorder: Recorder, how: Flags, *, soft: bool) -> None:
    """Two trainings side by side, through a drop of the learning rate; soft: on soft labels."""
    o, parts = parts_of({**SMALL_FLAGS, **how, "precision": "fp32"}, SMALL)
    train = parts.synthetic(torch.empty(len(parts.counts), *parts.shape, device=DEVICE))
    train.soft = torch.empty(len(train), train.classes, device=DEVICE) if soft else None
    draws = [Draws(DEVICE, "evaluate", r) for r in range(2)]
    recipe = derived.evaluation_recipe(o, flip=True, epochs=3)
    trained = train_networks(parts.spec, [train, train], recipe, draws, parts.compute)
    next(trained)  # while they are set up, the host may wait
    with recorder.audit("between", captured=False):
        for _ in trained:
            pass


def choose(
    recorder: Recorder, how: Flags, *, data: Shape, strategy: str = "kmeans", count: int = 16, network: Flags
) -> None:
    """One selection of `count` real images per class by a strategy, under a ConvNet of these settings."""
    fake = FakeData(*data)
    shape: Flags = dict(channels=fake.channels, classes=fake.classes, side=fake.side)
    net = fresh_network(models.resolve("convnet", **shape, **network), Draws(DEVICE, "network"))
    context = Context(
        net, fake.train, Draws(DEVICE, "select"), Compute(DEVICE, compile=how["compile"] == "on").cheapest()
    )
    with recorder.audit("select", captured=False):
        select(context, count, strategy=strategy)


SELECTIONS: dict[str, Shape] = {  # the data sets that images are selected from
    "cifar10": CIFAR10,
    "mnist": ([5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949], 1, 28),
    "folder": ([100 + 7 * c for c in range(100)], 3, 32),
}
Work = Callable[[Recorder, Flags], None]  # takes --precision and --compile
WORKS: dict[str, Work] = {
    **{name: partial(distil, flags={**SMALL_FLAGS, "method": name}, data=SMALL) for name in METHODS},
    "early": partial(distil, flags={**SMALL_FLAGS, **EARLY}, data=SMALL),
    "dream without Triton": partial(distil, flags={**SMALL_FLAGS, "compile": "off"}, data=SMALL),
    "hard labels": partial(evaluate, soft=False),
    "soft labels": partial(evaluate, soft=True),
    **{f"select {name}": partial(choose, data=SMALL, strategy=name, network=SMALL_NETWORK) for name in STRATEGIES},
    **{f"embed {name}": partial(choose, data=data, network=NARROW) for name, data in SELECTIONS.items()},
}
FULL_SIZE: dict[str, Work] = {
    "headline": partial(distil, flags=HEADLINE_FLAGS, data=CIFAR10),
    "headline selection": partial(choose, data=CIFAR10, count=128, network={}),
}


# --- Results ----------------------------------------------------------------------------------------------------------


class Result(NamedTuple):
    """What a function of a work does in a call with inputs of some shapes: the most of all calls, and all problems."""

    function: str
    calls: int
    launches: int
    bytes: int
    peak: int  # bytes of the tensors made in the call, all that are in use at a time
    shapes: int  # different shapes of the images that are embedded together
    operators: dict[str, int]  # the launches of one call, most frequent first
    problems: dict[str, int]


def results(work: Work, how: Flags) -> list[Result]:
    """What the functions of a work do."""
    ImageSet.__init__ = grouped_evenly  # type: ignore[method-assign]
    with fake_cuda() as recorder, suppress(*NEEDS_VALUES):  # which the recorder has noted as a problem
        work(recorder, how)
    calls: dict[str, list[Audit]] = {}
    for audit in recorder.audits:
        calls.setdefault(audit.name, []).append(audit)
    return [result(name, audits) for name, audits in calls.items()]


def result(name: str, audits: Sequence[Audit]) -> Result:
    """The result of all calls of a function."""
    most = max(audits, key=lambda audit: audit.launches)
    problems = sum((audit.problems for audit in audits), Counter[str]())
    return Result(
        function=name,
        calls=len(audits),
        launches=most.launches,
        bytes=max(audit.bytes for audit in audits),
        peak=max(audit.peak for audit in audits),
        shapes=len(set().union(*(audit.passed for audit in audits))),
        operators=dict(most.operators.most_common()),
        problems=dict(problems),
    )


def table(name: str, found: Sequence[Result], operators: bool) -> str:
    """The results of a work for people."""
    lines = [f"{name:60} {'calls':>5} {'launches':>8} {'MB':>10} {'peak MB':>10} {'shapes':>6}"]
    for r in found:
        lines.append(
            f"  {r.function:58} {r.calls:5} {r.launches:8} {r.bytes / 1e6:10.2f} {r.peak / 1e6:10.2f} {r.shapes:6}"
        )
        lines += [f"    PROBLEM {problem}: {n} times" for problem, n in r.problems.items()]
        lines += [f"    {n:6} {operator}" for operator, n in r.operators.items() if operators]
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    """Run the works that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    everything = {**WORKS, **FULL_SIZE}
    parser.add_argument(
        "--work",
        nargs="+",
        choices=everything,
        default=list(WORKS),
        metavar="NAME",
        help=f"some of: {', '.join(everything)} (default: all but {', '.join(FULL_SIZE)})",
    )
    parser.add_argument("--precision", default="fp32", choices=PRECISIONS)
    parser.add_argument(
        "--compile", default="on", choices=("on", "off"), help="Triton's kernels, or PyTorch's operators"
    )
    parser.add_argument("--operators", action="store_true", help="also show the operators of every function")
    parser.add_argument("--json", action="store_true", help="print one JSON object: work -> functions")
    args = parser.parse_args(argv)
    if reason := unsupported():
        raise SystemExit(f"this PyTorch cannot compute with fake CUDA tensors: {reason}")
    found = {}
    for name in args.work:
        found[name] = results(everything[name], {"precision": args.precision, "compile": args.compile})
        if not args.json:
            print(table(name, found[name], args.operators), flush=True)
    if args.json:
        print(json.dumps({name: [r._asdict() for r in of_work] for name, of_work in found.items()}))


if __name__ == "__main__":
    main(sys.argv[1:])
