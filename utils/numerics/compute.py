"""How numbers are computed: precision, pieces that fit the memory, CUDA graphs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from utils.system.device import fast_bfloat16, out_of_memory, return_freed_memory
from utils.system.errors import first_line

log = logging.getLogger("dream")

PRECISIONS = ("fp32", "tf32", "bf16")
LEAST_PIXELS = 2**12  # of images that pass through a network together, however little memory there is
T = TypeVar("T")


@dataclass
class Compute:
    """How numbers are computed, whatever is computed: where, in which precision, in pieces of which size.

    precision: fp32 is the tensors' own (float64 stays float64); tf32 shortens the factors of matrix products on a GPU;
    bf16 computes networks in bfloat16, with float32 master weights, sums and distances.
    """

    device: torch.device
    precision: str = "fp32"
    compile: bool = False
    pixels: int = 0  # of all images that pass through a network together; 0: as fits the device

    def __post_init__(self) -> None:
        self.pixels = self.pixels or (2**21 if self.device.type == "cuda" else 2**16)

    def dtype(self, own: torch.dtype) -> torch.dtype:
        """What a network's arithmetic is done in, for images that are `own`."""
        return torch.bfloat16 if self.precision == "bf16" else own

    def cheapest(self) -> Compute:
        """For the selection, which does not suffer from bfloat16, where the device is fast at it."""
        return replace(self, precision="bf16") if fast_bfloat16(self.device) else self

    def images(self, side: int) -> int:
        """Images that pass through a network together: few stay in a CPU's cache, many fill a GPU."""
        return max(1, self.pixels // side**2)

    @property
    def classes_together(self) -> bool:
        """Whether several classes are computed in one call. A GPU is not full otherwise. On a CPU there is nothing to
        be had from it but rounding that depends on which classes they are."""
        return self.device.type != "cpu"

    def group(self, images: int, side: int) -> int:
        """Classes of so many images each that are matched together: as many as a few gigabytes hold."""
        return max(1, self.kept(side) // images) if self.classes_together else 1

    def kept(self, side: int) -> int:
        """Images of which everything that derivatives take is kept: some gigabytes."""
        return (4 if self.device.type == "cpu" else 1) * self.pixels // side**2

    def autocast(self) -> AbstractContextManager[object]:
        """For what autograd does by itself."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def retry(self, function: Callable[[], T]) -> T:
        """Call it; when the memory does not suffice, call it again with smaller pieces."""
        while True:
            try:
                return function()
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error) or self.pixels <= LEAST_PIXELS:
                    raise
            self.pixels //= 2
            return_freed_memory(self.device)
            log.warning("the memory of the %s is full: going on with pieces half as large", self.device.type.upper())


# --- CUDA graphs ------------------------------------------------------------------------------------------------------


class Captured:
    """A function of tensors that a GPU replays as one launch; on a CPU, the function.

    The function must do the same whatever the values of its inputs are: no look at them from Python, no random draws,
    everything else that it uses always at the same addresses. Per set of input shapes, the first calls run as usual, so
    that libraries choose their kernels, the next one is captured, the others replay it. Results are overwritten by the
    next call. Where capturing fails, a warning says so, and everything runs launch by launch.
    """

    WARM = 3  # calls before the capture

    def __init__(self, function: Callable[..., Any], device: torch.device, *, replay: bool = True) -> None:
        """replay: False for a function that does not keep to this, and runs as it is."""
        self.function = function
        self.off = device.type != "cuda" or not replay
        self.calls: dict[Any, int] = {}
        self.graphs: dict[Any, tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], Any]] = {}

    def __call__(self, *inputs: Tensor) -> Any:
        if self.off:
            return self.function(*inputs)
        key = tuple((x.shape, x.dtype) for x in inputs)
        self.calls[key] = self.calls.get(key, 0) + 1
        if self.calls[key] <= self.WARM:
            return self._aside(inputs)
        if key not in self.graphs:
            try:
                self.graphs[key] = self._capture(inputs)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                log.warning("this step cannot be captured (%s): it runs launch by launch", first_line(error))
                self.off = True
                return self.function(*inputs)
        graph, static, result = self.graphs[key]
        for mine, given in zip(static, inputs, strict=True):
            mine.copy_(given)
        graph.replay()
        return result

    def _aside(self, inputs: tuple[Tensor, ...]) -> Any:
        """Run on another stream than the default one, which capturing asks of the calls before it."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            result = self.function(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        return result

    def _capture(self, inputs: tuple[Tensor, ...]) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], Any]:
        static = tuple(x.clone() for x in inputs)
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as NCCL's, may look at the device meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = self.function(*static)
        return graph, static, result
