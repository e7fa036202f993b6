"""Memory that is full: smaller pieces first, then a clear message, and nothing is lost."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import condense
from tests.files import quick
from tests.tally import injected
from utils.files import tensors
from utils.numerics import derivatives
from utils.numerics.compute import LEAST_PIXELS, Compute
from utils.runs.folder import valid_checkpoint
from utils.system.device import out_of_memory

ROOT = Path(__file__).resolve().parents[2]


def scarce(function: Callable[..., Any], most: int, failures: list[int]) -> Callable[..., Any]:
    """A function of derivatives.py on a device whose memory suffices for pieces of `most` pixels."""

    def limited(*words: Any) -> Any:
        (compute,) = (word for word in words if isinstance(word, Compute))
        if compute.pixels > most:
            failures.append(compute.pixels)
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
        return function(*words)

    return limited


@pytest.mark.faults
@pytest.mark.parametrize("name", ["distances", "gradients", "embed"])
def test_a_step_that_does_not_fit_is_made_in_smaller_pieces(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert condense.main(quick(tmp_path / "ample", "--inner_loop", "2")) == 0
    failures: list[int] = []
    with injected("the memory does not suffice for a step") as fault, monkeypatch.context() as patch:
        patch.setattr(derivatives, name, scarce(getattr(derivatives, name), LEAST_PIXELS, failures))
        assert condense.main(quick(tmp_path / "scarce", "--inner_loop", "2")) == 0
        assert (
            failures and "the memory of the CPU is full: going on with pieces half as large" in capsys.readouterr().out
        )
        ours, expected = (
            tensors.read_tensors(tmp_path / which / "digits" / "convnet2_f1_ipc1" / "data.pt", "")[0]
            for which in ("scarce", "ample")
        )
        fault.kept(torch.allclose(ours, expected, rtol=0, atol=1e-5))


def test_pieces_are_halved_until_they_fit_and_not_without_end() -> None:
    compute = Compute(torch.device("cpu"), pixels=4 * LEAST_PIXELS)
    tried: list[int] = []

    def fails(until: int) -> int:
        tried.append(compute.pixels)
        if compute.pixels > until:
            raise MemoryError
        return compute.pixels

    assert compute.retry(lambda: fails(LEAST_PIXELS)) == LEAST_PIXELS
    assert tried == [4 * LEAST_PIXELS, 2 * LEAST_PIXELS, LEAST_PIXELS]
    with pytest.raises(MemoryError):
        compute.retry(lambda: fails(0))


def test_smaller_pieces_mean_fewer_classes_at_once_and_a_cpu_computes_one() -> None:
    groups = [Compute(torch.device("cuda"), pixels=2**n).classes_at_once(images=64, side=16) for n in (14, 16, 18)]
    assert groups == [1, 4, 16]
    assert Compute(torch.device("cpu")).classes_at_once(images=1, side=8) == 1


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("could not create a primitive"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (MemoryError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
    ids=str,
)
def test_errors_of_full_memory_are_told_from_others(error: Exception, full: bool) -> None:
    assert out_of_memory(error) is full


LIMITED = """
import resource, sys
import torch, sklearn.datasets, sklearn.model_selection, PIL.Image
import condense
from utils.system import process
now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
limit = now + int(sys.argv.pop(1)) * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
process.run_main(condense.main)
"""
LARGE = shlex.split(
    "--niter 1 --inner_loop 1 --batch_real 512 --width 128 --ipc 10 -f 2 --n_data 64 --epochs 1 --repeat 1 "
    "--init random --device cpu"
)


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_little_memory_ends_in_a_result_or_in_one_line_and_the_command_goes_on(tmp_path: Path) -> None:
    """With address spaces of many sizes above what importing takes: the steps take half a gigabyte."""

    def run(*words: str, megabytes: int) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", LIMITED, str(megabytes), *LARGE, *words],
            cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120,
        )  # fmt: skip

    for megabytes in (450, 300, 150):
        with injected("an address space of a few hundred megabytes") as fault:
            results = tmp_path / str(megabytes)
            done = run("--results_dir", str(results), megabytes=megabytes)
            if done.returncode:
                assert done.returncode == 1 and re.fullmatch(r"[^\n]*: error: [^\n]*memory[^\n]*\n", done.stderr)
                if checkpoints := list(results.rglob("checkpoint.pt")):
                    fault.kept("pixels" in valid_checkpoint(checkpoints[0]))
                done = run("--results_dir", str(results), megabytes=8000)
            assert done.returncode == 0, done.stderr
