"""CUDA graphs without a GPU: what `Captured` asks of torch.cuda, which is replaced by an account of it."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import models
from utils.method.augment import Augment
from utils.method.formation import Formation
from utils.method.frequencies import Frequencies
from utils.method.images import ImageSet, Normalize
from utils.method.matching import Matcher, MatchingStep
from utils.method.objectives import Comparison
from utils.method.pixels import PixelSGD
from utils.method.training import Recipe, Trainer, fresh_network
from utils.method.trajectory import TrajectoryStep
from utils.numerics.compute import Captured, Compute
from utils.system.draws import Draws

GPU = torch.device("cuda", 7)  # nobody else's, so that no stream kept for it is a real one
FORBIDDEN = "CUDA error: operation not permitted when stream is capturing"
INVALID = "CUDA error: operation failed due to a previous error during capture"


class Stream:
    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def wait_stream(self, other: Stream) -> None:
        pass


@dataclass
class Account:
    """What becomes of a graph."""

    complete: bool = False  # its capture has ended well
    replays: int = 0
    released: bool = False  # its memory is free again


class Cuda:
    """The state of a GPU's driver and of PyTorch's allocator for it, as far as graphs change it."""

    def __init__(self) -> None:
        self.default = self.stream = Stream()
        self.capturing: FakeGraph | None = None
        self.invalid = False  # whether something forbidden was done in the capture under way
        self.pools = 0  # captures for which the allocator still keeps memory apart
        self.graphs: list[Account] = []
        self.freed_in_capture = False

    def at_rest(self) -> bool:
        """Whether nothing of a capture is left."""
        return self.stream is self.default and self.capturing is None and self.pools == 0

    def item(self) -> None:
        """What a capture forbids: the host waits for the device."""
        if self.capturing is not None:
            self.invalid = True
            raise RuntimeError(FORBIDDEN)

    def empty_cache(self) -> None:
        self.freed_in_capture |= self.capturing is not None

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        """torch.cuda.stream."""
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before

    def end_pool(self, *_: Any) -> None:
        """The allocator's end of a capture; RuntimeError where there is none."""
        if not self.pools:
            raise RuntimeError("the allocator is not in a capture")
        self.pools -= 1


class FakeGraph:
    """torch.cuda.CUDAGraph."""

    def __init__(self, cuda: Cuda) -> None:
        self.cuda, self.account = cuda, Account()
        cuda.graphs.append(self.account)

    def pool(self) -> tuple[int, int]:
        return (0, 1)

    def capture_begin(self, *_: Any, **__: Any) -> None:
        assert self.cuda.stream is not self.cuda.default and self.cuda.capturing is None
        self.cuda.capturing, self.cuda.invalid = self, False
        self.cuda.pools += 1

    def capture_end(self) -> None:
        if self.cuda.capturing is not self:
            raise RuntimeError("capture_end without capture_begin")
        self.cuda.capturing = None
        if self.cuda.invalid:  # the allocator is told of the end only after this
            raise RuntimeError(INVALID)
        self.cuda.end_pool()
        self.account.complete = True

    def replay(self) -> None:
        assert self.account.complete and not self.account.released
        self.account.replays += 1

    def reset(self) -> None:
        self.account.released = True

    __del__ = reset


class FakeCapture:
    """torch.cuda.graph, which leaves its stream only after a capture that ended well."""

    def __init__(self, cuda: Cuda, graph: FakeGraph, **_: Any) -> None:
        self.cuda, self.graph, self.context = cuda, graph, cuda.on(Stream())

    def __enter__(self) -> None:
        self.context.__enter__()
        self.graph.capture_begin()

    def __exit__(self, *error: Any) -> None:
        self.graph.capture_end()
        self.context.__exit__(*error)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    cuda = Cuda()
    for name, value in {
        "Stream": Stream,
        "stream": cuda.on,
        "current_stream": lambda *_: cuda.stream,
        "default_stream": lambda *_: cuda.default,
        "current_device": lambda: GPU.index,
        "synchronize": lambda *_: cuda.item(),
        "empty_cache": cuda.empty_cache,
        "is_current_stream_capturing": lambda: cuda.capturing is not None,
        "graph_pool_handle": lambda: (0, 1),
        "CUDAGraph": lambda *_: FakeGraph(cuda),
        "graph": lambda graph, **more: FakeCapture(cuda, graph, **more),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", cuda.end_pool, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda *_: None, raising=False)
    return cuda


def until_captured(captured: Captured, x: Tensor) -> list[Tensor]:
    """Results of the calls before a capture, and of the one that captures."""
    return [captured(x).clone() for _ in range(Captured.WARM + 1)]


# --- Captures ---------------------------------------------------------------------------------------------------------


def test_calls_of_new_shapes_warm_up_and_are_captured_and_replayed(cuda: Cuda) -> None:
    calls: list[bool] = []

    def double(x: Tensor) -> Tensor:
        calls.append(cuda.capturing is not None)
        return 2 * x

    captured = Captured(double, GPU)
    for n in (3, 4):
        assert all(torch.equal(y, 2 * torch.ones(n)) for y in until_captured(captured, torch.ones(n)))
        captured(torch.ones(n))
    assert calls == 2 * [*Captured.WARM * [False], True]
    assert [graph.replays for graph in cuda.graphs] == [2, 2] and cuda.at_rest()


def test_the_calls_before_a_capture_run_on_one_stream_beside_the_default_one(cuda: Cuda) -> None:
    streams: list[Stream] = []

    def noted(x: Tensor) -> Tensor:
        if cuda.capturing is None:
            streams.append(cuda.stream)
        return x

    for captured in (Captured(noted, GPU), Captured(noted, GPU)):
        for n in (3, 4):
            until_captured(captured, torch.ones(n))
    assert len(streams) == 4 * Captured.WARM and len(set(streams)) == 1 and streams[0] is not cuda.default


def waits(cuda: Cuda) -> None:
    cuda.item()


def fails_without_a_word_to_the_driver(cuda: Cuda) -> None:
    if cuda.capturing is not None:
        raise RuntimeError("an operator does not support this")


def runs_out_of_memory(cuda: Cuda) -> None:
    if cuda.capturing is not None:
        raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("failure", [waits, fails_without_a_word_to_the_driver, runs_out_of_memory])
def test_a_capture_that_fails_leaves_nothing_behind_and_the_call_runs_as_usual(
    failure: Callable[[Cuda], None], cuda: Cuda, caplog: pytest.LogCaptureFixture
) -> None:
    def double(x: Tensor) -> Tensor:
        failure(cuda)
        return 2 * x

    captured = Captured(double, GPU)
    with caplog.at_level(logging.WARNING, "dream"):
        for _ in range(3):
            assert all(torch.equal(y, torch.full((3,), 2.0)) for y in until_captured(captured, torch.ones(3)))
    assert cuda.at_rest()
    assert [graph.released for graph in cuda.graphs] == [True], "a capture is tried once"
    assert len(caplog.messages) == 1 and "captured" in caplog.text


def test_an_interruption_during_a_capture_leaves_nothing_behind(cuda: Cuda) -> None:
    def interrupted(x: Tensor) -> Tensor:
        if cuda.capturing is not None:
            raise KeyboardInterrupt
        return x

    with pytest.raises(KeyboardInterrupt):
        until_captured(Captured(interrupted, GPU), torch.ones(3))
    assert cuda.at_rest()


def test_memory_is_neither_freed_nor_halved_while_a_graph_is_captured(cuda: Cuda) -> None:
    compute = Compute(GPU)
    pixels = compute.pixels

    def double(x: Tensor) -> Tensor:
        runs_out_of_memory(cuda)
        return 2 * x

    captured = Captured(lambda x: compute.retry(lambda: double(x)), GPU)
    assert all(torch.equal(y, torch.full((3,), 2.0)) for y in until_captured(captured, torch.ones(3)))
    assert not cuda.freed_in_capture and compute.pixels == pixels and cuda.at_rest()


# --- The memory of graphs ---------------------------------------------------------------------------------------------


def real_set() -> ImageSet:
    normalize = Normalize((0.5,), (0.2,))
    return ImageSet(torch.zeros(6, 1, 8, 8, dtype=torch.uint8), torch.arange(6) % 2, classes=2, normalize=normalize)


def step(kind: type[Any]) -> Any:
    """A step of a run on the CPU, whose function is captured on a GPU."""
    compute = Compute(torch.device("cpu"))
    spec = models.resolve("convnet", channels=1, classes=2, side=8, depth=1, width=4)
    net, real = fresh_network(spec, Draws("cpu", 0)), real_set()
    if kind is Trainer:
        return Trainer([net], [real], Recipe(4, Augment("none"), "vanilla"), compute)
    pixels = PixelSGD(torch.zeros(2, 1, 1, 8, 8), lr=0.1, momentum=0.5)
    matcher = Matcher(Comparison("cf"), Formation(1), 4, Augment("none"), compute)
    if kind is MatchingStep:
        frequencies = Frequencies(4, net.classifier.in_features, how="learned", draws=Draws("cpu", 1))
        return MatchingStep(matcher, net, pixels, real, frequencies=frequencies, judge=net)

    no_experts: Any = SimpleNamespace(count=0)  # they are not asked for any
    return TrajectoryStep(
        matcher, net, pixels, real, no_experts, steps=1, epochs=1, max_start=1, step_size=0.1, lr_step=0.1
    )


@pytest.mark.parametrize("kind", [Trainer, MatchingStep, TrajectoryStep])
def test_what_a_step_holds_is_freed_with_it_at_once(kind: type[Any]) -> None:
    gc.collect()
    gc.disable()  # a cycle would keep it, and with it its graphs, until the next collection
    try:
        freed = weakref.ref(step(kind))
        assert freed() is None
    finally:
        gc.enable()


class Owner:
    """An object with a captured method."""

    def __init__(self) -> None:
        self.captured = Captured(self.double, GPU)

    def double(self, x: Tensor) -> Tensor:
        return 2 * x


def test_a_graph_is_freed_with_the_object_whose_method_it_is(cuda: Cuda) -> None:
    gc.collect()
    gc.disable()
    try:
        owner = Owner()
        until_captured(owner.captured, torch.ones(3))
        assert cuda.graphs == [Account(complete=True, replays=1)]
        del owner
        assert cuda.graphs[0].released
    finally:
        gc.enable()
