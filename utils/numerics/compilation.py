"""Compiled code: the passes by torch.compile on a GPU; on a CPU, whose cache asks for more, utils/numerics/block.cpp."""

from __future__ import annotations

import ctypes
import logging
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from utils.numerics import block as stages
from utils.numerics.block import Stages
from utils.numerics.compute import Compute
from utils.system.errors import UsageError, first_line

log = logging.getLogger("dream")
T = TypeVar("T")


def compiled(function: Callable[..., T]) -> Callable[..., T]:
    """The function, compiled for every new combination of shapes at its first call (a few seconds each)."""
    import torch._dynamo

    torch._dynamo.config.recompile_limit = 256  # every block, chunk and remainder has its own shapes
    return torch.compile(function, dynamic=False, fullgraph=True)


def compiler_error(device: torch.device) -> str | None:
    """Why code cannot be compiled here, found out by doing it; None where it can."""
    # On a machine with a CUDA toolkit and no GPU, loading the compiler is worth no warning to us.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    try:
        if device.type == "cpu":
            cpu_stages()
        else:
            compiled(_probe)(torch.ones(4, device=device))
    except Exception as error:  # whatever the compiler's parts raise: there is no common base
        return first_line(error)
    return None


def _probe(x: Tensor) -> Tensor:
    return x * 2 + 1


# --- utils/numerics/block.cpp -------------------------------------------------------------------------------------------------

LANES = 16  # channels come in as many, or in several times as many
COMPUTED_IN = {torch.float64: torch.float64, torch.float32: torch.float32, torch.bfloat16: torch.float32}


@cache
def cpu_stages() -> Stages:
    """The stages as compiled functions, made once per process in a few seconds.

    What they are not made for, such as a number of channels that 16 does not divide, takes those of utils/numerics/block.py.
    Raises OSError or subprocess.SubprocessError where there is no compiler, or none that can make them.
    """
    library = _library(Path(__file__).with_name("block.cpp"))

    def run(stage: str, groups: int, eps: float, a: Tensor, *rest: Tensor) -> None:
        """rest: all other tensors, arguments and results, dense along every image, one number for all or one each."""
        tensors = [_Tensor(x.data_ptr(), x.stride(0) * x.element_size() if len(x) > 1 else 0) for x in (a, *rest)]
        n, c, h, w = a.shape
        function = getattr(library, f"{stage}_{str(a.dtype).removeprefix('torch.')}")
        function(ctypes.byref(_Shape(n, h, w, c, groups, eps)), (_Tensor * len(tensors))(*tensors))

    def forward(a: Tensor, gamma: Tensor, beta: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        if not _fits(a, gamma):
            return stages.forward(a, gamma, beta, groups, eps)
        a, gamma, beta = map(_dense, (a, gamma, beta))
        h, m, r = _pooled(a), *(gamma.new_empty(len(a), groups, 1, 1, 1) for _ in range(2))
        run("forward", groups, eps, a, gamma, beta, h, m, r)
        return h, m, r

    def backward(
        a: Tensor, m: Tensor, r: Tensor, gamma: Tensor, beta: Tensor, dh: Tensor, keep: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        if not _fits(a, gamma):
            return stages.backward(a, m, r, gamma, beta, dh)
        a, gamma, beta, dh = map(_dense, (a, gamma, beta, dh))
        da = torch.empty_like(a) if keep else a
        s0, s1 = (gamma.new_empty(*a.shape[:2], 1, 1) for _ in range(2))
        run("backward", m.shape[1], 0, a, m, r, gamma, beta, dh, da, s0, s1)
        return da, s0, s1

    def tangent(a: Tensor, m: Tensor, r: Tensor, gamma: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if not _fits(a, gamma):
            return stages.tangent(a, m, r, gamma, *rest)
        a = _dense(a)
        h_dot, t0, t1 = _pooled(a), torch.empty_like(m), torch.empty_like(m)
        _, _, *moving = rest  # whether gamma and beta move
        stage = "whole_tangent" if moving else "tangent"
        run(stage, m.shape[1], 0, a, m, r, *map(_dense, (gamma, *rest)), h_dot, t0, t1)
        return h_dot, t0, t1

    def adjoint(a: Tensor, m: Tensor, r: Tensor, gamma: Tensor, *rest: Tensor) -> Tensor:
        if not _fits(a, gamma):
            return stages.adjoint(a, m, r, gamma, *rest)
        a = _dense(a)
        a_bar = torch.empty_like(a)
        run("adjoint", m.shape[1], 0, a, m, r, *map(_dense, (gamma, *rest)), a_bar)
        return a_bar

    def whole_adjoint(a: Tensor, m: Tensor, r: Tensor, gamma: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if not _fits(a, gamma):
            return stages.whole_adjoint(a, m, r, gamma, *rest)
        a = _dense(a)
        a_bar = torch.empty_like(a)
        u0, u1 = (gamma.new_empty(*a.shape[:2], 1, 1) for _ in range(2))
        run("whole_adjoint", m.shape[1], 0, a, m, r, *map(_dense, (gamma, *rest)), a_bar, u0, u1)
        return a_bar, u0, u1

    return Stages(forward, backward, tangent, adjoint, whole_adjoint)


def _library(source: Path) -> ctypes.CDLL:
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        raise FileNotFoundError("there is no C++ compiler (c++, g++ or clang++)")
    # The threads are to be PyTorch's own: two pools would wait for each other.
    openmp = sorted(Path(torch.__file__).with_name("lib").glob("lib*omp*"))
    flags = ["-std=c++17", "-O2", "-march=native", "-w", "-fPIC", "-shared", "-fopenmp"]
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "stages.so")
        command = [compiler, *flags, str(source), "-o", str(target), *map(str, openmp)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if "error" in line]
            raise subprocess.SubprocessError(f"{compiler} failed: {said[0] if said else done.stderr}")
        return ctypes.CDLL(str(target))


class _Shape(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("images", "height", "width", "channels", "groups")),
        ("eps", ctypes.c_double),
    )


class _Tensor(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("stride", ctypes.c_int64))


def _fits(a: Tensor, gamma: Tensor) -> bool:
    return a.device.type == "cpu" and not a.shape[1] % LANES and COMPUTED_IN.get(a.dtype) == gamma.dtype


def _dense(x: Tensor) -> Tensor:
    """(N, C, H, W) in convolutions' layout; anything else is small and dense already."""
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def _pooled(a: Tensor) -> Tensor:
    n, c, h, w = a.shape
    return torch.empty((n, c, h // 2, w // 2), dtype=a.dtype, memory_format=torch.channels_last)


# --- Whether to compile -----------------------------------------------------------------------------------------------

WORTH_COMPILING = {"cpu": 1e12, "cuda": 2e15}  # operations that save the 5 s and the half minute that compiling takes


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
