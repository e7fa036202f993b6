"""Where and how tensors are computed: device, precision, pieces that fit the memory, CUDA graphs."""

from __future__ import annotations

import inspect
import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from utils.system.device import fast_bfloat16, is_capturing, out_of_memory, return_freed_memory, with_precision
from utils.system.errors import first_line

log = logging.getLogger("dream")

PRECISIONS = ("fp32", "tf32", "bf16")
LEAST_PIXELS = 2**12  # below which `Compute.retry` does not cut pieces, however little memory there is
T = TypeVar("T")


@dataclass
class Compute:
    """The device, the precision, and the size of the pieces in which images pass through networks.

    precision: fp32 computes in the tensors' own type (float64 stays float64); tf32 shortens the factors of matrix
    products on a GPU; bf16 computes networks in bfloat16, with float32 parameters, sums and distances.
    compile: whether passes are compiled, see utils/numerics/compilation.py.
    """

    device: torch.device
    precision: str = "fp32"
    compile: bool = False
    pixels: int = 0  # of all images of one piece; 0: as many as suit the device

    def __post_init__(self) -> None:
        self.pixels = self.pixels or (2**21 if self.device.type == "cuda" else 2**16)

    def dtype(self, own: torch.dtype) -> torch.dtype:
        """The type in which a network is computed for images of type `own`."""
        return torch.bfloat16 if self.precision == "bf16" else own

    def cheapest(self) -> Compute:
        """The fastest way for the selection, which does not suffer from bfloat16: in it where the device is fast."""
        return replace(self, precision="bf16") if fast_bfloat16(self.device) else self

    def images_at_once(self, side: int) -> int:
        """The number of images that pass through a network together: few stay in a CPU's cache, many fill a GPU."""
        return max(1, self.pixels // side**2)

    def images_kept(self, side: int) -> int:
        """The number of images of which all that derivatives take may be kept: some gigabytes."""
        return (4 if self.device.type == "cpu" else 1) * self.pixels // side**2

    @property
    def classes_together(self) -> bool:
        """Whether several classes are computed in one call.

        A GPU is not full otherwise. A CPU gains nothing by it, and rounding would depend on which classes they are.
        """
        return self.device.type != "cpu"

    def classes_at_once(self, images: int, side: int) -> int:
        """The number of classes of so many images each that are matched together: as many as a few gigabytes hold."""
        return max(1, self.images_kept(side) // images) if self.classes_together else 1

    def rounding(self) -> AbstractContextManager[None]:
        """The context in which a GPU multiplies float32 numbers in this precision, and captures CUDA graphs that do."""
        return with_precision(self.device, self.precision)

    def autocast(self) -> AbstractContextManager[object]:
        """The context in which autograd computes a network in this precision."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def retry(self, function: Callable[[], T]) -> T:
        """The function's result; when the memory is full, it is called again with pieces half as large.

        They stay small afterwards. Raises the function's error when there is still no room for LEAST_PIXELS, and while
        a CUDA graph is captured, which must not free memory: see `Captured`.
        """
        while True:
            try:
                return function()
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error) or self.pixels <= LEAST_PIXELS or is_capturing(self.device):
                    raise
            # Outside of the handler, which holds the traceback and with it the tensors of the failed call.
            self.pixels //= 2
            return_freed_memory(self.device)
            log.warning("the memory of the %s is full: going on with pieces half as large", self.device.type.upper())


# --- CUDA graphs ------------------------------------------------------------------------------------------------------


class Captured:
    """A function of tensors that is captured as a CUDA graph and replayed as one launch; on a CPU it is just called.

    The function must do the same whatever the values of its inputs are: no look at them from Python, no random draws,
    everything else that it uses always at the same addresses. For each set of input shapes (and of keywords, which are
    plain values) the first WARM calls run as usual, so that libraries choose their kernels, the next one is captured,
    and the others replay it. A result is overwritten by the next call. Where capturing fails, a warning says so, the
    graphs made so far are given up, and every call runs as usual.

    A bound method is held weakly: its object holds this one, and with the object the graphs and their memory go.
    """

    WARM = 3  # calls before the capture

    def __init__(self, function: Callable[..., Any], device: torch.device, *, replay: bool = True) -> None:
        """replay: False for a function that breaks these rules; it is just called."""
        self._function = weakref.WeakMethod(function) if inspect.ismethod(function) else lambda: function
        self.device = device
        self.off = device.type != "cuda" or not replay
        self.calls: dict[Any, int] = {}
        self.graphs: dict[Any, Graph] = {}

    @property
    def function(self) -> Callable[..., Any]:
        """The function itself."""
        function = self._function()
        assert function is not None, "the object of this method is gone"
        return function

    def __call__(self, *inputs: Tensor, **settings: Any) -> Any:
        function = partial(self.function, **settings) if settings else self.function
        if self.off:
            return function(*inputs)
        key = (tuple((x.shape, x.dtype) for x in inputs), tuple(settings.items()))
        if key not in self.graphs:
            self.calls[key] = self.calls.get(key, 0) + 1
            if self.calls[key] <= self.WARM:
                with aside(self.device):
                    return function(*inputs)
            if not self._capture(key, function, inputs):
                return function(*inputs)
        graph = self.graphs[key]
        for mine, given in zip(graph.inputs, inputs, strict=True):
            mine.copy_(given)
        graph.kernels.replay()
        return graph.result

    def _capture(self, key: Any, function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> bool:
        """Capture the function for these inputs' shapes. Returns False, and captures nothing any more, if it fails."""
        # A graph has memory of its own, and what the calls before it have left unused would be missing for it.
        torch.cuda.synchronize()
        return_freed_memory(self.device)
        try:
            self.graphs[key] = capture(function, tuple(x.clone() for x in inputs), self.device)
            return True
        except (RuntimeError, MemoryError) as error:
            reason = first_line(error)
        # Outside of the handler, which holds the traceback and with it the tensors of the failed call.
        self.off = True
        self.graphs.clear()
        return_freed_memory(self.device)
        log.warning("this step cannot be captured (%s): it runs launch by launch", reason)
        return False


@cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream for calls before a capture and for the capture; always the same, as every stream has memory apart."""
    return torch.cuda.Stream(device)


@contextmanager
def aside(device: torch.device) -> Iterator[None]:
    """Run a block on `side_stream`, after what the current stream has been given, and before what it is given next."""
    stream = side_stream(device)
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        torch.cuda.current_stream().wait_stream(stream)


class Graph(NamedTuple):
    """A captured call: its kernels, the inputs that they read, and the result that they write."""

    kernels: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    result: Any


def capture(function: Callable[..., Any], inputs: tuple[Tensor, ...], device: torch.device) -> Graph:
    """The function's call on these inputs as a graph; the call itself is not made.

    Raises the function's error, or RuntimeError if it did what a capture forbids, and leaves stream and allocator as
    they were. (torch.cuda.graph would leave both in the middle of the capture.)
    """
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    with torch.cuda.stream(side_stream(device)):
        try:
            # Other threads, such as NCCL's, may look at the device meanwhile.
            graph.capture_begin(pool, capture_error_mode="thread_local")
            result = function(*inputs)
            graph.capture_end()
        except BaseException:
            undo_capture(graph, pool)
            raise
    return Graph(graph, inputs, result)


def undo_capture(graph: torch.cuda.CUDAGraph, pool: Any) -> None:
    """End a capture that failed, wherever it did, and release its memory pool; the capture's stream is the current."""
    with suppress(RuntimeError):  # that the capture is invalid or over: the stream has left it then
        graph.capture_end()
    index = torch.cuda.current_device()
    with suppress(RuntimeError):  # that the allocator has ended the capture: `reset` releases the pool then
        torch._C._cuda_endAllocateToPool(index, pool)
        torch._C._cuda_releasePool(index, pool)
    graph.reset()
