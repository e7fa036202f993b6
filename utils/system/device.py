"""The machine: devices, memory, precision, CUDA graphs. Nothing else asks about CUDA or the processor."""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import resource
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from utils.system.errors import UsageError, first_line

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


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the memory of a GPU or of the machine is full."""
    text = str(error)  # on a CPU, neither PyTorch nor the oneDNN below it has a class of its own for it
    words = ("allocate memory", "bad_alloc", "could not create a primitive", "failed to map segment")
    return any(word in text for word in words) or isinstance(error, (torch.OutOfMemoryError, MemoryError))


def pick_device(name: str, number: int | None = None) -> torch.device:
    """`auto` is CUDA where there is one. number: which GPU, where processes have one each.

    Raises UsageError when CUDA is asked for in vain.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: PyTorch sees no CUDA device here; use --device auto or --device cpu")
    if name == "cpu" or number is None:
        return torch.device(name)
    if number >= torch.cuda.device_count():
        raise UsageError(
            f"torchrun: process {number} of this machine has no GPU, there are {torch.cuda.device_count()}; start as "
            "many processes (--nproc_per_node=gpu), or use --device cpu"
        )
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def backends() -> str:
    """What connects processes here with others, in PyTorch's words: gloo between processors, NCCL between GPUs."""
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


def wait_for(device: torch.device) -> None:
    """Until it has done what it was given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_name(device: torch.device) -> str:
    """For people: the GPU's name, or the processor and its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def free_memory(device: torch.device) -> int:
    """Bytes that are free on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:  # Linux counts the reclaimable cache in; elsewhere the whole memory is the best that is known
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def keep_freed_memory() -> None:
    """Tell glibc to keep what PyTorch frees instead of returning it to the system after every large tensor.

    Getting it back costs a page fault per 4 KiB, up to half of a step's time on a CPU. Results are the same.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library than glibc
        return
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # M_... of malloc.h
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(top_pad, 2**28)


def return_freed_memory(device: torch.device) -> None:
    """Give back to the system what is free, so that others than PyTorch's tensors, such as libraries, can have it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    with suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)


def fast_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 faster than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(known.get("avx512_bf16") or known.get("amx_bf16"))


def peak_memory(device: torch.device) -> int:
    """Bytes that this process has used at most: on a GPU of its memory, on a CPU resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def set_precision(device: torch.device, precision: str) -> None:
    """Whether a GPU may shorten the factors of float32 products to TF32. Raises UsageError for tf32 elsewhere."""
    if precision == "tf32" and device.type != "cuda":
        raise UsageError("--precision tf32: only NVIDIA GPUs have it; use fp32 or bf16")
    short = "ieee" if precision == "fp32" else "tf32"
    torch.backends.cuda.matmul.fp32_precision = short
    torch.backends.cudnn.conv.fp32_precision = short  # type: ignore[attr-defined]  # made at run time


def be_deterministic(device: torch.device) -> None:
    """Have a GPU give the same bytes at every run, at some cost in time; a CPU does so anyway.

    To be called before the device is first used. Operations that cannot be deterministic raise RuntimeError.
    """
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by cuBLAS when it starts
        torch.use_deterministic_algorithms(True)


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
