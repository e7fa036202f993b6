"""The functions of utils/numerics/block.py as Triton kernels, for a GPU and norms that look at one channel at a time.

A program takes some channels of one image. It reads an activation from memory once where these fit its registers, and
again from a cache where they do not: PyTorch's operators read and write it at every step of the formulas. Notation as
in utils/numerics/block.py. As every channel is a norm group of its own, group means are channel means, so that three
sums over an image's pixels are all that a function needs before it can write its result.

A cell is the four pixels that are pooled into one. Activations are channels last, and odd sizes have cells at the
border that are not whole: they count in the norm and are left out of the pooling.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from utils.numerics.block import BlockFunctions, Gradient, Norm, Tangent

VALUES = 2**14  # of an activation that a program takes at a time, at most
MOST_CHANNELS = 64  # of a program: a line of the cache in half precision
PATCHES = 128  # of a program


# --- Where numbers are ------------------------------------------------------------------------------------------------


@triton.jit
def pixels(first, corner, c, H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, CELLS: tl.constexpr):
    """Offsets of one corner (0 to 3) of the cells from `first` on in an image's activation, and whether they exist."""
    cell = first + tl.arange(0, CELLS)
    columns: tl.constexpr = (W + 1) // 2
    y, x = cell // columns * 2 + corner // 2, cell % columns * 2 + corner % 2
    exists = (y < H) & (x < W)
    return (y * W + x)[:, None] * C + c[None, :], exists[:, None] & (c < C)[None, :]


@triton.jit
def pooled(first, c, H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, CELLS: tl.constexpr):
    """Offsets of the cells from `first` on in an image's pooled activation, and whether they exist."""
    cell = first + tl.arange(0, CELLS)
    columns: tl.constexpr = (W + 1) // 2
    y, x = cell // columns, cell % columns
    exists = (y < H // 2) & (x < W // 2)
    return (y * (W // 2) + x)[:, None] * C + c[None, :], exists[:, None] & (c < C)[None, :]


@triton.jit
def read(start, offsets, exists, WIDE: tl.constexpr, WHOLE: tl.constexpr):
    """Numbers in the wide type; zero where there are none."""
    if WHOLE:
        return tl.load(start + offsets).to(WIDE)
    return tl.load(start + offsets, mask=exists, other=0).to(WIDE)


@triton.jit
def write(start, offsets, value, exists, WHOLE: tl.constexpr):
    """Store numbers where they exist."""
    if WHOLE:
        tl.store(start + offsets, value.to(start.dtype.element_ty))
    else:
        tl.store(start + offsets, value.to(start.dtype.element_ty), mask=exists)


@triton.jit
def numbers(start, n, each, c, C: tl.constexpr, WIDE: tl.constexpr):
    """One number per channel, (1, channels), of image n; each: the distance from one image's to the next one's."""
    return tl.load(start + n * each + c, mask=c < C, other=0).to(WIDE)[None, :]


@triton.jit
def keep(start, value, n, c, C: tl.constexpr):
    """Store one number per channel, (1, channels), of image n."""
    tl.store(start + n * C + c[None, :], value, mask=(c < C)[None, :])


# --- The kernels ------------------------------------------------------------------------------------------------------


@triton.jit
def forward_kernel(
    a, gamma, beta, h, m, r, each_gamma, each_beta,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, CELLS: tl.constexpr, CHANNELS: tl.constexpr, ALL: tl.constexpr,
    WIDE: tl.constexpr, WHOLE: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """h, m and r of an image's channels."""
    n = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    a, h = a + n * (H * W * C), h + n * ((H // 2) * (W // 2) * C)
    total = tl.zeros((CELLS, CHANNELS), WIDE)
    for first in range(0, ALL, CELLS):
        for corner in tl.static_range(4):
            at, exists = pixels(first, corner, c, H, W, C, CELLS)
            total += read(a, at, exists, WIDE, WHOLE)
    mean = tl.sum(total, 0)[None, :] / (H * W)
    total = tl.zeros((CELLS, CHANNELS), WIDE)
    for first in range(0, ALL, CELLS):
        for corner in tl.static_range(4):
            at, exists = pixels(first, corner, c, H, W, C, CELLS)
            away = read(a, at, exists, WIDE, WHOLE) - mean
            total += away * away if WHOLE else tl.where(exists, away * away, 0)
    rate = 1 / tl.sqrt(tl.sum(total, 0)[None, :] / (H * W) + EPS)
    keep(m, mean, n, c, C)
    keep(r, rate, n, c, C)
    scale, offset = numbers(gamma, n, each_gamma, c, C, WIDE), numbers(beta, n, each_beta, c, C, WIDE)
    for first in range(0, ALL, CELLS):
        total = tl.zeros((CELLS, CHANNELS), WIDE)
        for corner in tl.static_range(4):
            at, exists = pixels(first, corner, c, H, W, C, CELLS)
            y = (read(a, at, exists, WIDE, WHOLE) - mean) * rate * scale + offset
            total += tl.where(y <= 0, 0, y)  # NaN stays
        at, exists = pooled(first, c, H, W, C, CELLS)
        write(h, at, total / 4, exists, WHOLE)


@triton.jit
def backward_kernel(
    a, m, r, gamma, beta, dh, da, s0, s1, each_gamma, each_beta,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr,
    CELLS: tl.constexpr, CHANNELS: tl.constexpr, ALL: tl.constexpr, WIDE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """da, s0 and s1 of an image's channels: da = r gamma (s - s0 - x s1)."""
    n = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    a, da, dh = a + n * (H * W * C), da + n * (H * W * C), dh + n * ((H // 2) * (W // 2) * C)
    mean, rate = numbers(m, n, C, c, C, WIDE), numbers(r, n, C, c, C, WIDE)
    scale, offset = numbers(gamma, n, each_gamma, c, C, WIDE), numbers(beta, n, each_beta, c, C, WIDE)
    total, product = tl.zeros((CELLS, CHANNELS), WIDE), tl.zeros((CELLS, CHANNELS), WIDE)
    for first in range(0, ALL, CELLS):
        at, exists = pooled(first, c, H, W, C, CELLS)
        up = read(dh, at, exists, WIDE, WHOLE) / 4
        for corner in tl.static_range(4):
            at, exists = pixels(first, corner, c, H, W, C, CELLS)
            x = (read(a, at, exists, WIDE, WHOLE) - mean) * rate
            s = tl.where(x * scale + offset > 0, up, 0)
            total += s
            product += s * x
    mean_s, mean_sx = tl.sum(total, 0)[None, :] / (H * W), tl.sum(product, 0)[None, :] / (H * W)
    keep(s0, mean_s, n, c, C)
    keep(s1, mean_sx, n, c, C)
    for first in range(0, ALL, CELLS):
        at, exists = pooled(first, c, H, W, C, CELLS)
        up = read(dh, at, exists, WIDE, WHOLE) / 4
        for corner in tl.static_range(4):
            at, exists = pixels(first, corner, c, H, W, C, CELLS)
            x = (read(a, at, exists, WIDE, WHOLE) - mean) * rate
            s = tl.where(x * scale + offset > 0, up, 0)
            write(da, at, rate * scale * (s - mean_s - x * mean_sx), exists, WHOLE)


@triton.jit
def tangent_kernel(
    a, m, r, gamma, beta, a_dot, gamma_dot, beta_dot, h_dot, t0, t1, each_gamma, each_beta, each_dot,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr,
    CELLS: tl.constexpr, CHANNELS: tl.constexpr, ALL: tl.constexpr, WIDE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """h_dot, t0 and t1 of an image's channels. gamma_dot None: gamma and beta stay."""
    n = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    a, a_dot, h_dot = a + n * (H * W * C), a_dot + n * (H * W * C), h_dot + n * ((H // 2) * (W // 2) * C)
    mean, rate = numbers(m, n, C, c, C, WIDE), numbers(r, n, C, c, C, WIDE)
    scale, offset = numbers(gamma, n, each_gamma, c, C, WIDE), numbers(beta, n, each_beta, c, C, WIDE)
    total, product = tl.zeros((CELLS, CHANNELS), WIDE), tl.zeros((CELLS, CHANNELS), WIDE)
    for first in range(0, ALL, CELLS):
        for corner in tl.static_range(4):
            at, exists = pixels(first, corner, c, H, W, C, CELLS)
            t = read(a_dot, at, exists, WIDE, WHOLE)
            total += t
            product += t * (read(a, at, exists, WIDE, WHOLE) - mean) * rate
    mean_t, mean_xt = tl.sum(total, 0)[None, :] / (H * W), tl.sum(product, 0)[None, :] / (H * W)
    keep(t0, mean_t, n, c, C)
    keep(t1, mean_xt, n, c, C)
    for first in range(0, ALL, CELLS):
        total = tl.zeros((CELLS, CHANNELS), WIDE)
        for corner in tl.static_range(4):
            at, exists = pixels(first, corner, c, H, W, C, CELLS)
            x = (read(a, at, exists, WIDE, WHOLE) - mean) * rate
            x_dot = rate * (read(a_dot, at, exists, WIDE, WHOLE) - mean_t - x * mean_xt)
            y_dot = scale * x_dot
            if gamma_dot is not None:
                y_dot += numbers(gamma_dot, n, each_dot, c, C, WIDE) * x + numbers(beta_dot, n, each_dot, c, C, WIDE)
            total += tl.where(x * scale + offset > 0, y_dot, 0)
        at, exists = pooled(first, c, H, W, C, CELLS)
        write(h_dot, at, total / 4, exists, WHOLE)


@triton.jit
def adjoint_kernel(
    a, m, r, gamma, beta, dh, s0, s1, a_dot, t0, t1, h_bar, gamma_dot, a_bar, by_beta, by_gamma,
    each_gamma, each_beta, each_dot,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr,
    CELLS: tl.constexpr, CHANNELS: tl.constexpr, ALL: tl.constexpr, WIDE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """a_bar of an image's channels, and the channel means of the gradients by beta and gamma.

    gamma_dot None: gamma and beta stay, and nobody asks for these means.
    """
    n = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    pooled_size: tl.constexpr = (H // 2) * (W // 2) * C
    a, a_dot, a_bar = a + n * (H * W * C), a_dot + n * (H * W * C), a_bar + n * (H * W * C)
    dh, h_bar = dh + n * pooled_size, h_bar + n * pooled_size
    mean, rate = numbers(m, n, C, c, C, WIDE), numbers(r, n, C, c, C, WIDE)
    scale, offset = numbers(gamma, n, each_gamma, c, C, WIDE), numbers(beta, n, each_beta, c, C, WIDE)
    mean_s, mean_sx = numbers(s0, n, C, c, C, WIDE), numbers(s1, n, C, c, C, WIDE)
    mean_t, mean_xt = numbers(t0, n, C, c, C, WIDE), numbers(t1, n, C, c, C, WIDE)
    sum_u, sum_ux = tl.zeros((CELLS, CHANNELS), WIDE), tl.zeros((CELLS, CHANNELS), WIDE)
    sum_st = tl.zeros((CELLS, CHANNELS), WIDE)
    for first in range(0, ALL, CELLS):
        at, exists = pooled(first, c, H, W, C, CELLS)
        up, up_bar = read(dh, at, exists, WIDE, WHOLE) / 4, read(h_bar, at, exists, WIDE, WHOLE) / 4
        for corner in tl.static_range(4):
            at, exists = pixels(first, corner, c, H, W, C, CELLS)
            x = (read(a, at, exists, WIDE, WHOLE) - mean) * rate
            above = x * scale + offset > 0
            u = tl.where(above, up_bar, 0)
            sum_u += u
            sum_ux += u * x
            sum_st += tl.where(above, up, 0) * read(a_dot, at, exists, WIDE, WHOLE)
    mean_u, mean_ux = tl.sum(sum_u, 0)[None, :] / (H * W), tl.sum(sum_ux, 0)[None, :] / (H * W)
    mean_st = tl.sum(sum_st, 0)[None, :] / (H * W)
    p = scale * mean_sx
    k = scale * (mean_st - mean_s * mean_t)
    mean_q, mean_xq = scale * mean_u, scale * mean_ux
    moved = tl.zeros_like(scale)
    if gamma_dot is not None:
        moved = numbers(gamma_dot, n, each_dot, c, C, WIDE)
        mean_q += moved * mean_s
        mean_xq += moved * mean_sx
        mean_sx_dot = rate * (mean_st - mean_t * mean_s - mean_xt * mean_sx)  # of s x_dot
        keep(by_beta, mean_u, n, c, C)
        keep(by_gamma, mean_ux + mean_sx_dot, n, c, C)
    for first in range(0, ALL, CELLS):
        at, exists = pooled(first, c, H, W, C, CELLS)
        up, up_bar = read(dh, at, exists, WIDE, WHOLE) / 4, read(h_bar, at, exists, WIDE, WHOLE) / 4
        for corner in tl.static_range(4):
            at, exists = pixels(first, corner, c, H, W, C, CELLS)
            x = (read(a, at, exists, WIDE, WHOLE) - mean) * rate
            t = read(a_dot, at, exists, WIDE, WHOLE)
            above = x * scale + offset > 0
            s, u = tl.where(above, up, 0), tl.where(above, up_bar, 0)
            q = scale * u + moved * s
            second = x * (k - 3 * p * mean_xt) + mean_xt * scale * (s - mean_s) + p * (t - mean_t)
            write(a_bar, at, rate * (q - mean_q - x * mean_xq - rate * second), exists, WHOLE)


@triton.jit
def patches_kernel(
    x, found, next_image, next_channel, next_row, next_column, H, W, OUT_W, PIXELS,
    CHANNELS: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, TOP: tl.constexpr, LEFT: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, NUMBERS: tl.constexpr,
):  # fmt: skip
    """Patches at BLOCK pixels of one image; TOP, LEFT: the padding."""
    n = tl.program_id(0).to(tl.int64)
    pixel, number = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, NUMBERS)
    channel, corner = number % CHANNELS, number // CHANNELS
    y = (pixel // OUT_W - TOP)[:, None] + (corner // KW)[None, :]
    column = (pixel % OUT_W - LEFT)[:, None] + (corner % KW)[None, :]
    inside = (y >= 0) & (y < H) & (column >= 0) & (column < W) & (corner < KH * KW)[None, :]
    at = channel[None, :] * next_channel + y * next_row + column * next_column
    value = tl.load(x + n * next_image + at, mask=inside, other=0)
    exists = (pixel < PIXELS)[:, None] & (number < WIDTH)[None, :]
    at = pixel[:, None] * WIDTH + number[None, :]
    tl.store(found + n * PIXELS * WIDTH + at, value.to(found.dtype.element_ty), mask=exists)


# --- The functions of utils/numerics/block.py -------------------------------------------------------------------------


def forward(a: Tensor, gamma: Tensor, beta: Tensor, groups: int, eps: float) -> tuple[Tensor, Norm]:
    """See utils/numerics/block.py; groups: as many as channels."""
    a = channels_last(a)
    h, m, r = half(a), per_channel(a), per_channel(a)
    launch(forward_kernel, a, (a, gamma, beta, h, m, r), (gamma, beta), EPS=eps)
    return h, Norm(a, in_groups(m), in_groups(r), gamma, beta)


def backward(norm: Norm, dh: Tensor, keep: bool = True) -> tuple[Tensor, Gradient]:
    """See utils/numerics/block.py."""
    dh = channels_last(dh)
    da, s0, s1 = torch.empty_like(norm.a), per_channel(norm.a), per_channel(norm.a)
    launch(backward_kernel, norm.a, (*norm, dh, da, s0, s1), (norm.gamma, norm.beta))
    return da, Gradient(dh, s0, s1)


def tangent(
    norm: Norm, a_dot: Tensor, gamma_dot: Tensor | None = None, beta_dot: Tensor | None = None
) -> tuple[Tensor, Tangent]:
    """See utils/numerics/block.py."""
    a_dot = channels_last(a_dot)
    h_dot, t0, t1 = half(norm.a), per_channel(norm.a), per_channel(norm.a)
    tensors = (*norm, a_dot, gamma_dot, beta_dot, h_dot, t0, t1)
    launch(tangent_kernel, norm.a, tensors, (norm.gamma, norm.beta, gamma_dot))
    return h_dot, Tangent(a_dot, in_groups(t0), in_groups(t1))


def adjoint(
    norm: Norm, gradient: Gradient, tangent: Tangent, h_bar: Tensor, gamma_dot: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """See utils/numerics/block.py."""
    a_bar = torch.empty_like(norm.a)
    means = [] if gamma_dot is None else [per_channel(norm.a), per_channel(norm.a)]
    tensors = (*norm, *gradient, *tangent, channels_last(h_bar), gamma_dot, a_bar, *(means or (None, None)))
    launch(adjoint_kernel, norm.a, tensors, (norm.gamma, norm.beta, gamma_dot))
    return a_bar, means


def patches(h: Tensor, kernel: tuple[int, int], padding: tuple[int, int], width: int, dtype: torch.dtype) -> Tensor:
    """See utils/numerics/block.py."""
    n, channels, height, wide = h.shape
    out = [size + 2 * p - k + 1 for size, p, k in zip((height, wide), padding, kernel, strict=True)]
    found = h.new_empty((n, *out, width), dtype=dtype)
    pixels = out[0] * out[1]
    patches_kernel[(n, triton.cdiv(pixels, PATCHES))](
        h, found, *h.stride(), height, wide, out[1], pixels,
        CHANNELS=channels, KH=kernel[0], KW=kernel[1], TOP=padding[0], LEFT=padding[1],
        WIDTH=width, BLOCK=PATCHES, NUMBERS=triton.next_power_of_2(width),
    )  # fmt: skip
    return found.permute(0, 3, 1, 2)


def launch(
    kernel: Any, a: Tensor, tensors: Sequence[Tensor | None], parameters: Sequence[Tensor | None], **constants: Any
) -> None:
    """Run a kernel for all channels of all images.

    a: an activation (N, C, H, W), channels last. tensors: what the kernel reads and writes, in its order. parameters:
    those of which there is one set per image or one for all. constants: further arguments, known when it is compiled.
    """
    n, channels, height, width = a.shape
    cells = ((height + 1) // 2) * ((width + 1) // 2)
    together = min(triton.next_power_of_2(channels), MOST_CHANNELS)
    chunk = min(triton.next_power_of_2(cells), VALUES // (4 * together) // (1 if cells > 64 else 2))
    kernel[(n, triton.cdiv(channels, together))](
        *tensors,
        *(0 if p is None or len(p) == 1 else p.stride(0) for p in parameters),
        H=height,
        W=width,
        C=channels,
        CELLS=chunk,
        CHANNELS=together,
        ALL=cells,
        WIDE=tl.float64 if a.dtype == torch.float64 else tl.float32,
        WHOLE=not (height % 2 or width % 2 or cells % chunk or channels % together),
        num_warps=max(1, chunk * together // 512),
        **constants,
    )


def channels_last(x: Tensor) -> Tensor:
    """In the layout that the kernels read."""
    return x.contiguous(memory_format=torch.channels_last)


def half(a: Tensor) -> Tensor:
    """Room for a pooled activation, (N, C, H // 2, W // 2)."""
    n, channels, height, width = a.shape
    shape, layout = (n, channels, height // 2, width // 2), torch.channels_last
    return torch.empty(shape, dtype=a.dtype, device=a.device, memory_format=layout)


def per_channel(a: Tensor) -> Tensor:
    """Room for a number per image and channel, (N, C, 1, 1), in the wide type."""
    return a.new_empty((*a.shape[:2], 1, 1), dtype=torch.float64 if a.dtype == torch.float64 else torch.float32)


def in_groups(x: Tensor) -> Tensor:
    """(N, C, 1, 1) as the group means of as many groups, (N, C, 1, 1, 1)."""
    return x[..., None]


FUNCTIONS = BlockFunctions(forward, backward, tangent, adjoint, patches)
