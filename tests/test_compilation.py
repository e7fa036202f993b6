"""Compiled code gives what the code that it stands for gives."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.conftest import interpreter_error
from utils.numerics import block, compilation
from utils.numerics.block import BlockFunctions
from utils.numerics.compilation import LANES, compiler_error, cpu_functions, cpu_supports, gpu_functions

EXACT = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 1e-2}
NORMS = {"instance": LANES * 2, "group": 4, "layer": 1}
CASES = {  # side lengths, channels, whether every image has a network of its own
    "even": (8, 8, LANES * 2, False),
    "odd": (7, 11, LANES * 2, False),
    "networks": (6, 5, LANES * 2, True),
    "a row of cells": (3, 2, LANES * 2, False),
}


@pytest.fixture(scope="module")
def quick() -> BlockFunctions:
    if problem := compiler_error(torch.device("cpu")):
        pytest.skip(problem)
    return cpu_functions()


def noise(*shape: int, key: int, dtype: torch.dtype) -> Tensor:
    """Numbers that `dtype` can hold, for convolutions' layout."""
    x = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(key)).to(dtype)
    return x.contiguous(memory_format=torch.channels_last)


def every_result(
    how: BlockFunctions, dtype: torch.dtype, groups: int, case: tuple[int, int, int, bool], images: int = 3
) -> list[Tensor]:
    """What the functions find on the same images, each given what the plain ones before it found."""
    height, width, c, own = case
    wide = torch.float32 if dtype == torch.bfloat16 else dtype
    gamma, beta, *moving = (noise(images if own else 1, c, 1, 1, key=k, dtype=wide) for k in (1, 2, 7, 8))
    a, a_dot = (
        2 * noise(images, c, height, width, key=3, dtype=dtype) + 1,
        noise(images, c, height, width, key=4, dtype=dtype),
    )
    dh, h_bar = (noise(images, c, height // 2, width // 2, key=k, dtype=dtype) for k in (5, 6))
    _, norm = block.forward(a, gamma, beta, groups, 1e-5)
    _, gradient = block.backward(norm, dh)
    _, tangent = block.tangent(norm, a_dot)
    h, (_, m, r, *_) = how.forward(a, gamma, beta, groups, 1e-5)
    da, (_, s0, s1) = how.backward(norm, dh)
    h_dot, (_, t0, t1) = how.tangent(norm, a_dot)
    h_moved, (_, m0, m1) = how.tangent(norm, a_dot, *moving)
    a_bar, _ = how.adjoint(norm, gradient, tangent, h_bar)
    a_moved, means = how.adjoint(norm, gradient, tangent, h_bar, moving[0])
    return [h, m, r, da, s0, s1, h_dot, t0, t1, h_moved, m0, m1, a_bar, a_moved, *means]


@pytest.mark.parametrize(
    ("case", "values", "dtype"),
    [
        *(((7, 5, 20, True), 2**14, dtype) for dtype in EXACT),  # channels that do not fill a program
        ((4, 4, LANES, False), 2**14, torch.float32),
        ((4, 5, LANES, False), 2**8, torch.float64),  # an image in several parts
    ],
    ids=str,
)
def test_kernels_give_the_same(
    case: tuple[int, int, int, bool], values: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if problem := interpreter_error():
        pytest.skip(problem)
    monkeypatch.setattr("utils.numerics.block_triton.VALUES", values)
    for ours, exact in zip(
        *(every_result(how, dtype, case[2], case) for how in (gpu_functions(), BlockFunctions())), strict=True
    ):
        assert ours.shape == exact.shape and ours.dtype == exact.dtype
        assert (ours - exact).double().norm() <= EXACT[dtype] * exact.double().norm()


@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("case", CASES)
def test_compiled_functions_give_the_same(quick: BlockFunctions, case: str, norm: str, dtype: torch.dtype) -> None:
    groups = NORMS[norm] if norm != "instance" else CASES[case][2]
    for ours, exact in zip(
        *(every_result(how, dtype, groups, CASES[case]) for how in (quick, BlockFunctions())), strict=True
    ):
        assert ours.shape == exact.shape and ours.dtype == exact.dtype
        assert (ours - exact).double().norm() <= EXACT[dtype] * exact.double().norm()


@pytest.fixture(scope="module")
def without_avx512() -> BlockFunctions:
    """Those that processors without AVX-512 get, which handle fewer channels at a time."""
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        pytest.skip("needs a processor with AVX2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compilation, "TARGET", "x86-64-v3")
        try:
            return cpu_functions.__wrapped__()
        except (OSError, subprocess.SubprocessError) as error:
            pytest.skip(str(error))


@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_processors_without_avx512_get_the_same(
    quick: BlockFunctions, without_avx512: BlockFunctions, norm: str, dtype: torch.dtype
) -> None:
    groups = NORMS[norm] if norm != "instance" else CASES["odd"][2]
    for ours, usual in zip(
        *(every_result(how, dtype, groups, CASES["odd"]) for how in (without_avx512, quick)), strict=True
    ):
        assert (ours - usual).double().norm() <= EXACT[dtype] * usual.double().norm()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_kernels_find_the_same_patches(layout: torch.memory_format) -> None:
    if problem := interpreter_error():
        pytest.skip(problem)
    for shape, kernel, padding, width in (((2, 3, 6, 5), (3, 3), (1, 1), 32), ((3, 1, 4, 13), (3, 1), (3, 0), 8)):
        h = noise(*shape, key=0, dtype=torch.float32).contiguous(memory_format=layout)
        ours, plain = (how.patches(h, kernel, padding, width, h.dtype) for how in (gpu_functions(), BlockFunctions()))
        assert torch.equal(ours, plain) and ours.stride() == plain.stride()
        unfolded = torch.nn.functional.unfold(h, kernel, padding=padding)  # a channel's numbers together
        unfolded = unfolded.unflatten(1, (h.shape[1], -1)).transpose(1, 2).flatten(1, 2)
        assert torch.equal(plain.flatten(2)[:, : unfolded.shape[1]], unfolded)
        assert not plain[:, unfolded.shape[1] :].any()


def test_every_layout_is_understood(quick: BlockFunctions) -> None:
    a = noise(2, LANES, 6, 6, key=0, dtype=torch.float32)
    gamma = beta = torch.ones(1, LANES, 1, 1)
    for layout in (a.contiguous(), torch.cat([a, a], 1)[:, :LANES], torch.cat([a, a], 3)[..., :6]):
        (h, norm), (expected, exact) = (quick.forward(x, gamma, beta, 4, 1e-5) for x in (layout, a))
        assert torch.equal(h, expected) and torch.equal(norm.m, exact.m) and torch.equal(norm.r, exact.r)


def test_a_gradient_may_take_the_place_of_what_is_not_kept(quick: BlockFunctions) -> None:
    a, dh = noise(3, LANES, 6, 6, key=0, dtype=torch.float32), noise(3, LANES, 3, 3, key=1, dtype=torch.float32)
    gamma = beta = torch.ones(1, LANES, 1, 1)
    _, norm = block.forward(a, gamma, beta, 4, 1e-5)
    (da, kept), before = quick.backward(norm, dh), a.clone()
    assert torch.equal(a, before)
    over, lost = quick.backward(norm, dh, keep=False)
    assert over.data_ptr() == a.data_ptr() and torch.equal(da, over)
    assert all(torch.equal(*pair) for pair in zip(kept, lost, strict=True))


def test_results_do_not_depend_on_the_number_of_threads(quick: BlockFunctions) -> None:
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(every_result(quick, torch.float32, 4, CASES["even"], images=7))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_what_is_not_a_number_stays_visible(quick: BlockFunctions, dtype: torch.dtype) -> None:
    gamma = beta = torch.ones(1, LANES, 1, 1, dtype=compilation.COMPUTED_IN[dtype])
    for value in (float("nan"), float("inf")):
        a = noise(2, LANES, 4, 4, key=0, dtype=dtype)
        a[1, 3, 2, 2] = value
        h, *_ = quick.forward(a, gamma, beta, LANES, 1e-5)
        assert h[1, 3].isnan().any() and h[0].isfinite().all() and h[1, :3].isfinite().all()


def test_what_the_functions_are_not_made_for_is_not_supported() -> None:
    assert cpu_supports(2 * LANES, torch.bfloat16, torch.float32)
    assert not cpu_supports(LANES + 4, torch.float32, torch.float32)
    assert not cpu_supports(LANES, torch.bfloat16, torch.float64)
    assert not cpu_supports(LANES, torch.float16, torch.float32)


def test_a_missing_or_failing_compiler_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = tmp_path / "broken.cpp"
    source.write_text("this is no program")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"no C\+\+ compiler"):
        compilation._library(source)
    failing = tmp_path / "c++"
    failing.write_text("#!/bin/sh\necho 'broken.cpp:1: error: not understood' >&2\nexit 1\n")
    failing.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda name: str(failing))
    with pytest.raises(subprocess.SubprocessError, match=r"c\+\+ failed: broken.cpp:1: error: not understood"):
        compilation._library(source)
