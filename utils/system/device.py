"""The machine: devices, their memory and precision. Beside utils/numerics/compute.py, nothing else asks about CUDA."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

from utils.system import memory
from utils.system.errors import UsageError

# Full memory in the words of those that have no exception class of their own for it: PyTorch on a CPU, C++, oneDNN, the
# dynamic linker; CUDA where PyTorch does not allocate, its libraries.
FULL_MEMORY = (
    *("allocate memory", "bad_alloc", "could not create a primitive", "failed to map segment"),
    *("CUDA error: out of memory", "_STATUS_ALLOC_FAILED"),
)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the memory of a GPU or of the machine is full."""
    text = str(error)
    return any(words in text for words in FULL_MEMORY) or isinstance(error, (torch.OutOfMemoryError, MemoryError))


def is_capturing(device: torch.device) -> bool:
    """Whether what the device is given now goes into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def pick_device(name: str, number: int | None = None) -> torch.device:
    """Device of a --device flag: auto, cpu, cuda or cuda:N; auto is CUDA where PyTorch sees a GPU.

    number: which GPU, where torchrun gives every process one; None: the flag's. Raises UsageError when there is no such
    GPU, or the flag names one beside `number`.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device(name)
    if not torch.cuda.is_available():
        raise UsageError(f"--device {name}: PyTorch sees no CUDA device here; use --device auto or --device cpu")
    chosen, count = torch.device(name).index, torch.cuda.device_count()
    if number is not None:
        if chosen is not None:
            raise UsageError(f"--device {name}: torchrun gives every process a GPU of its own; use --device cuda")
        if number >= count:
            raise UsageError(
                f"torchrun: process {number} of this machine has no GPU, there are {count}; start as many processes "
                "(--nproc_per_node=gpu), or use --device cpu"
            )
        chosen = number
    if chosen is None:
        return torch.device(name)
    if chosen >= count:
        raise UsageError(f"--device {name}: PyTorch sees {count} here, numbered from cuda:0 to cuda:{count - 1}")
    torch.cuda.set_device(chosen)  # also for streams, CUDA graphs and Triton, which ask for the current one
    return torch.device("cuda", chosen)


def backends() -> str:
    """Backends of process groups for this machine: gloo for CPU tensors, NCCL for tensors on GPUs."""
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


def device_name(device: torch.device) -> str:
    """Name of a device for people: the GPU's model, or the processor and its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def free_memory(device: torch.device) -> int:
    """Free memory of a device, in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return memory.free()


def keep_freed_memory() -> None:
    """Tell glibc to keep the memory that PyTorch frees, rather than return it to the system after every large tensor.

    Getting it back costs a page fault per 4 KiB, up to half of a step's time on a CPU. Results are not affected.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another C library than glibc; TypeError: Windows
        return
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # M_... of malloc.h
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(top_pad, 2**28)


def return_freed_memory(device: torch.device) -> None:
    """Return unused memory to the system, for allocations that PyTorch does not make, such as a library's."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    with suppress(OSError, AttributeError, TypeError):  # as above
        ctypes.CDLL(None).malloc_trim(0)


def fast_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 faster than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def peak_memory(device: torch.device) -> int:
    """Peak memory of this process in bytes: reserved on a GPU, or resident in the machine for a CPU; 0 if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return memory.peak()


def peak_in_words(peak: float) -> str:
    """What `peak_memory` returned, for people."""
    return f"peak memory: {peak / 1e9:.2g} GB" if peak else "peak memory: not known on this system without psutil"


def check_precision(device: torch.device, precision: str) -> None:
    """Raise UsageError for tf32 on a CPU."""
    if precision == "tf32" and device.type != "cuda":
        raise UsageError("--precision tf32: only NVIDIA GPUs have it; use fp32 or bf16")


def set_precision(device: torch.device, precision: str) -> None:
    """Let GPUs round the factors of float32 products to TF32 from now on, unless precision is fp32.

    PyTorch itself begins with TF32 in convolutions and without it in matrix products. Raises UsageError for tf32 on a
    CPU.
    """
    check_precision(device, precision)
    short = "ieee" if precision == "fp32" else "tf32"
    torch.backends.cuda.matmul.fp32_precision = short
    torch.backends.cudnn.conv.fp32_precision = short  # type: ignore[attr-defined]  # made at run time


@contextmanager
def with_precision(device: torch.device, precision: str) -> Iterator[None]:
    """Run a block after `set_precision`, and go back to what was before."""
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = matmul.fp32_precision, conv.fp32_precision
    set_precision(device, precision)
    try:
        yield
    finally:
        matmul.fp32_precision, conv.fp32_precision = before


def be_deterministic(device: torch.device) -> None:
    """Make a GPU give the same bytes at every run, at some cost in time; a CPU does so anyway.

    To be called before the device is first used. From then on, operations without a deterministic implementation raise
    RuntimeError.
    """
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by cuBLAS when it starts
        torch.use_deterministic_algorithms(True)
