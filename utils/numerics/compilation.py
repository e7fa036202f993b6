"""Compiled block functions: in C++ on a CPU (block.cpp), as Triton kernels on a GPU (block_triton.py).

What counts on both is that an activation stays in a cache or in registers while it is swept over several times, which
neither PyTorch's operators nor torch.compile arrange.
"""

from __future__ import annotations

import ctypes
import logging
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn

from utils.numerics.block import BlockFunctions, Gradient, Norm, Tangent
from utils.numerics.compute import Compute
from utils.system.errors import UsageError, first_line

log = logging.getLogger("dream")


def block_functions(device: torch.device, norms: Sequence[nn.GroupNorm], activations: torch.dtype) -> BlockFunctions:
    """The fastest functions for blocks with these norms, whose activations have this dtype."""
    channels, parameters = norms[0].num_channels, norms[0].weight.dtype  # the same in all blocks
    if device.type == "cpu" and cpu_supports(channels, activations, parameters):
        return cpu_functions()
    if device.type == "cuda" and all(norm.num_groups == norm.num_channels for norm in norms):
        return gpu_functions()
    return BlockFunctions()


def gpu_functions() -> BlockFunctions:
    """The functions of utils/numerics/block.py as Triton kernels, for norms that look at one channel at a time.

    Every kernel is compiled for every size and dtype of activations at its first use, in about a second. Raises
    ImportError where there is no Triton.
    """
    from utils.numerics.block_triton import FUNCTIONS  # not at the top, as PyTorch brings Triton for GPUs alone

    return FUNCTIONS


def compiler_error(device: torch.device) -> str | None:
    """Why code cannot be compiled here, found out by doing it; None where it can."""
    # On a machine with a CUDA toolkit and no GPU, loading the compiler is worth no warning to us.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    try:
        if device.type == "cpu":
            cpu_functions()
        else:
            a = torch.ones(1, LANES, 2, 2, device=device)
            gpu_functions().forward(a, a[:, :, :1, :1], a[:, :, :1, :1], LANES, 1e-5)
    except Exception as error:  # whatever the compiler's parts raise: there is no common base
        return first_line(error)
    return None


# --- utils/numerics/block.cpp ----------------------------------------------------------------------------------------

LANES = 16  # channels that block.cpp handles at a time; their number must be a multiple of it
COMPUTED_IN = {torch.float64: torch.float64, torch.float32: torch.float32, torch.bfloat16: torch.float32}

# What each function of block.cpp writes, in order: tensors like the block's input (N, C, H, W) or its output
# (N, C, H // 2, W // 2), or numbers per norm group (N, groups, 1, 1, 1) or channel (N, C, 1, 1).
RESULTS = {
    "forward": ("output", "group", "group"),
    "backward": ("input", "channel", "channel"),
    "tangent": ("output", "group", "group"),
    "whole_tangent": ("output", "group", "group"),
    "adjoint": ("input",),
    "whole_adjoint": ("input", "channel", "channel"),
}


def cpu_supports(channels: int, activations: torch.dtype, parameters: torch.dtype) -> bool:
    """Whether `cpu_functions` can compute a block of these channels, whose gamma and beta have the second dtype."""
    return channels % LANES == 0 and COMPUTED_IN.get(activations) == parameters


@cache
def cpu_functions() -> BlockFunctions:
    """The functions of utils/numerics/block.py in C++, for blocks that are supported; a few seconds once per process.

    Raises OSError or subprocess.SubprocessError where there is no compiler, or none that can make them.
    """
    library = _library(Path(__file__).with_name("block.cpp"))

    def call(
        name: str, tensors: Iterable[Tensor], groups: int, eps: float = 0, overwrite: bool = False
    ) -> list[Tensor]:
        """The results of one function. overwrite: write the first over the activation, the first of `tensors`."""
        # Activations are channels last there; numbers per group or per channel are dense already.
        given = [x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x for x in tensors]
        a, wide = given[0], given[1].dtype
        assert cpu_supports(a.shape[1], a.dtype, wide)
        (n, c, h, w), empty = a.shape, partial(torch.empty, memory_format=torch.channels_last, dtype=a.dtype)
        make: dict[str, Callable[[], Tensor]] = {
            "input": lambda: a if overwrite else empty((n, c, h, w)),
            "output": lambda: empty((n, c, h // 2, w // 2)),
            "group": lambda: torch.empty((n, groups, 1, 1, 1), dtype=wide),
            "channel": lambda: torch.empty((n, c, 1, 1), dtype=wide),
        }
        results = [make[kind]() for kind in RESULTS[name]]
        # Every image's numbers are dense; a stride of 0 has all images share the only one, such as one network's gamma.
        views = [_Tensor(x.data_ptr(), x.stride(0) * x.element_size() if len(x) > 1 else 0) for x in (*given, *results)]
        function = getattr(library, f"{name}_{str(a.dtype).removeprefix('torch.')}")
        function(ctypes.byref(_Shape(n, h, w, c, groups, eps)), (_Tensor * len(views))(*views))
        return results

    def forward(a: Tensor, gamma: Tensor, beta: Tensor, groups: int, eps: float) -> tuple[Tensor, Norm]:
        h, m, r = call("forward", (a, gamma, beta), groups, eps)
        return h, Norm(a, m, r, gamma, beta)

    def backward(norm: Norm, dh: Tensor, keep: bool = True) -> tuple[Tensor, Gradient]:
        da, s0, s1 = call("backward", (*norm, dh), norm.m.shape[1], overwrite=not keep)
        return da, Gradient(dh, s0, s1)

    def tangent(norm: Norm, a_dot: Tensor, *vectors: Tensor) -> tuple[Tensor, Tangent]:
        name = "whole_tangent" if vectors else "tangent"
        h_dot, t0, t1 = call(name, (*norm, a_dot, *vectors), norm.m.shape[1])
        return h_dot, Tangent(a_dot, t0, t1)

    def adjoint(
        norm: Norm, gradient: Gradient, tangent: Tangent, h_bar: Tensor, *gamma_dot: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        name, tensors = "whole_adjoint" if gamma_dot else "adjoint", (*norm, *gradient, *tangent, h_bar, *gamma_dot)
        a_bar, *means = call(name, tensors, norm.m.shape[1])
        return a_bar, means

    return BlockFunctions(forward, backward, tangent, adjoint)


TARGET = "native"  # the processor that C++ is compiled for: the one that it runs on


def _library(source: Path) -> ctypes.CDLL:
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        raise FileNotFoundError("there is no C++ compiler (c++, g++ or clang++)")
    # The threads are to be PyTorch's own: two pools would wait for each other.
    openmp = sorted(Path(torch.__file__).with_name("lib").glob("lib*omp*"))
    # No -ffast-math: NaN has to stay NaN. -w: GCC warns about the vector types, which no other library meets.
    flags = ["-std=c++17", "-O2", f"-march={TARGET}", "-w", "-fPIC", "-shared", "-fopenmp"]
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "block.so")
        command = [compiler, *flags, str(source), "-o", str(target), *map(str, openmp)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if "error" in line]
            raise subprocess.SubprocessError(f"{compiler} failed: {said[0] if said else done.stderr}")
        return ctypes.CDLL(str(target))  # stays in memory when the file is removed


class _Shape(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("images", "height", "width", "channels", "groups")),
        ("eps", ctypes.c_double),
    )


class _Tensor(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("stride", ctypes.c_int64))


# --- Whether to compile -----------------------------------------------------------------------------------------------

# Operations that save the 5 and 8 s that compiling takes. Without it an H200 did 23 TFLOP/s of --method dc, with it 66
# TFLOP/s of the headline, both in TF32.
WORTH_COMPILING = {"cpu": 1e12, "cuda": 3e14}


def computing(device: torch.device, compile: str, precision: str, flop: float) -> Compute:
    """Whether to compile follows from the amount of work, so that a resumed run goes on in the same way.

    Raises UsageError when compilation is asked for and fails.
    """
    wanted = compile == "on" or (compile == "auto" and flop >= WORTH_COMPILING[device.type])
    problem = compiler_error(device) if wanted else None
    if problem and compile == "on":
        raise UsageError(f"--compile on: {problem}; install a C++ compiler (g++ or clang++), or use --compile auto")
    if problem:
        log.info("not compiled (%s): slower, with the same results up to rounding", problem)
    return Compute(device, precision, compile=wanted and problem is None)
