"""The machine: devices, memory, precision, CUDA graphs. Nothing else asks about CUDA or the processor."""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import resource
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import torch

from utils.system.errors import UsageError

log = logging.getLogger("dream")

PRECISIONS = ("fp32", "tf32", "bf16")
LEAST_PIXELS = 2**12  # of images that pass through a network together, however little memory there is
T = TypeVar("T")


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
