"""How long an inner step of many GPUs takes, given the parts on one of them, what is sent, and what links can do.

The model behind bench.py --forecast; nothing is measured here.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from utils.system.distributed import shares

WORTH = 1.25  # what doubling the GPUs has to gain
DRAWN = 128  # mini-batches whose fullest part is averaged


def duration(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


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
    shard = shares(load.class_work, ranks)
    most = max(map(len, shard))
    always = (most, load.matching.at(most), load.selection.at(most))
    if ranks == 1:
        return Step(*always, load.update.at(1), False, 0.0, 0.0, 0.0)
    exchange = load.exchanges * links.all_reduce(load.drawn / load.exchanges, ranks)
    gradients = load.batches * links.all_reduce(4 * load.parameters, ranks)
    agreement = links.agreement(ranks)
    repeated = Step(*always, load.update.at(1), False, exchange, 0.0, agreement)
    fullest = fullest_part(list(map(len, shard)), load.batch)
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
