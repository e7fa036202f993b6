"""The second half of a ConvNet block, norm -> ReLU -> 2x2 mean pool, with its first and second derivatives.

Plain functions of tensors without an autograd graph, of which each can be turned into a few loops. The notation of
utils/numerics: a is an activation (a convolution's output), h what the block makes of it, da and dh the gradients of a
loss with respect to them. For any v, v_dot is its tangent, the derivative along a direction in which parameters move,
and v_bar its adjoint, the gradient of a scalar that contains tangents. With m and r the mean and 1/std of a norm group
of one image, gamma and beta the norm's parameters, and x = (a - m) r:

    forward    h = pool(relu(gamma x + beta))
    backward   g = gamma mask up(dh),  da = r (g - mean g - x mean(x g))
    tangent    x_dot = r (a_dot - mean a_dot - x mean(x a_dot)),
               h_dot = pool(mask (gamma x_dot + gamma_dot x + beta_dot))
    adjoint    the gradient of <dh, h_dot> + <h_bar, h>; see `adjoint`

mask is the slope of ReLU, 0 or 1; up() is the adjoint of the pooling; a mean runs over a norm group. Shapes: a and all
that is like it (N, C, H, W); h, dh, h_dot, h_bar (N, C, H // 2, W // 2); gamma, beta (1 or N, C, 1, 1); m, r and group
means (N, groups, 1, 1, 1); channel means (N, C, 1, 1). Half-precision tensors are widened to float32 for the arithmetic
and results like a or h are rounded back; all small tensors stay wide.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = (2, 3, 4)  # the dimensions of a norm group in (N, groups, C / groups, H, W)


class Norm(NamedTuple):
    """A norm's input, its statistics and its parameters: all that `forward` leaves for the derivatives."""

    a: Tensor
    m: Tensor
    r: Tensor
    gamma: Tensor
    beta: Tensor


class Gradient(NamedTuple):
    """A loss's gradient at a block's output, and the channel means of s = mask up(dh) and of s x.

    Times the number of pixels, s0 and s1 are the gradients of beta and gamma.
    """

    dh: Tensor
    s0: Tensor
    s1: Tensor


class Tangent(NamedTuple):
    """The tangent of a norm's input, and the group means of a_dot and of x a_dot."""

    a_dot: Tensor
    t0: Tensor
    t1: Tensor


def forward(a: Tensor, gamma: Tensor, beta: Tensor, groups: int, eps: float) -> tuple[Tensor, Norm]:
    """The block's output h, and what the derivatives need."""
    grouped = wide(a).unflatten(1, (groups, -1))
    variance, m = torch.var_mean(grouped, GROUP, correction=0, keepdim=True)
    r = (variance + eps).rsqrt()
    y = ((grouped - m) * r).flatten(1, 2) * gamma + beta
    return F.avg_pool2d(y.relu(), 2).to(a.dtype), Norm(a, m, r, gamma, beta)


def backward(norm: Norm, dh: Tensor, keep: bool = True) -> tuple[Tensor, Gradient]:
    """The gradient da of a loss whose gradient with respect to h is dh, and what the second derivatives need.

    keep: False allows da to be written over norm.a, which is wrong from then on. The compiled functions do so: every
    pixel is read before it is written, and a CPU's cache then holds one tensor instead of two.
    """
    x, mask = normalized(norm)
    s = mask * unpool(dh, norm.a)
    gradient = Gradient(dh, channel_mean(s), channel_mean(s * x))
    g0, g1 = gradient_means(norm, gradient)
    da = spread(norm.r, norm.a) * (norm.gamma * s - spread(g0, norm.a) - x * spread(g1, norm.a))
    return da.to(norm.a.dtype), gradient


def tangent(
    norm: Norm, a_dot: Tensor, gamma_dot: Tensor | None = None, beta_dot: Tensor | None = None
) -> tuple[Tensor, Tangent]:
    """The tangent h_dot of the block's output, and what the adjoint needs. gamma and beta move both or not at all."""
    x, mask = normalized(norm)
    t = wide(a_dot)
    moved = Tangent(a_dot, group_mean(t, norm.m), group_mean(x * t, norm.m))
    y_dot = norm.gamma * mask * x_tangent(norm, x, moved)
    if gamma_dot is not None and beta_dot is not None:
        y_dot = y_dot + mask * (gamma_dot * x + beta_dot)
    return F.avg_pool2d(y_dot, 2).to(norm.a.dtype), moved


def adjoint(
    norm: Norm, gradient: Gradient, tangent: Tangent, h_bar: Tensor, gamma_dot: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """The gradient a_bar of <dh, h_dot> + <h_bar, h> with respect to a; and, where gamma and beta move, channel means
    that times the number of pixels are its gradients with respect to beta and gamma.

    With s = mask up(dh), u = mask up(h_bar), g = gamma s and q = gamma u + gamma_dot s, the scalar is
    <g, x_dot> + <q, x> and something that does not depend on a. The second term gives r (q - mean q - x mean(x q)), as
    in `backward`. The first is n r (K - P Q) for a group of n pixels, with P = mean(x g), Q = mean(x a_dot) and
    K = mean(g a_dot) - mean(g) mean(a_dot). It depends on a in two ways, since mask and with it g stay as they are:
    through r, whose gradient is -r^2 x / n: -r^2 x (K - P Q);
    through the x in P and Q: what `backward` makes of -r (Q g + P a_dot), where mean(x (Q g + P a_dot)) = 2 P Q.
    Together:

    a_bar = r (q - mean q - x mean(x q)) - r^2 [x (K - 3 P Q) + Q (g - mean g) + P (a_dot - mean a_dot)]
    """
    a, m, t = norm.a, norm.m, wide(tangent.a_dot)
    x, mask = normalized(norm)
    slope, up, up_bar = norm.gamma * mask, unpool(gradient.dh, a), unpool(h_bar, a)
    g, q, means = slope * up, slope * up_bar, []
    if gamma_dot is not None:
        s, u = mask * up, mask * up_bar
        q = q + gamma_dot * s
        means = [channel_mean(u), channel_mean(u * x + s * x_tangent(norm, x, tangent))]
    g0, p = gradient_means(norm, gradient)
    k = group_mean(g * t, m) - g0 * tangent.t0
    r, t0, t1 = spread(norm.r, a), spread(tangent.t0, a), spread(tangent.t1, a)
    first = q - spread(group_mean(q, m), a) - x * spread(group_mean(x * q, m), a)
    second = x * spread(k - 3 * p * tangent.t1, a) + t1 * (g - spread(g0, a)) + spread(p, a) * (t - t0)
    return (r * (first - r * second)).to(a.dtype), means


def patches(h: Tensor, kernel: tuple[int, int], padding: tuple[int, int], width: int, dtype: torch.dtype) -> Tensor:
    """The numbers that a convolution's weight meets at every pixel of its result, (N, width, H', W'), channels last.

    h: (N, C, H, W) in any layout. The numbers are in the order in which a weight (out, C, *kernel) that is channels
    last has them in memory, with zeros up to `width`.
    """
    x = F.pad(h, (padding[1], padding[1], padding[0], padding[0]))
    windows = x.unfold(2, kernel[0], 1).unfold(3, kernel[1], 1).permute(0, 2, 3, 4, 5, 1)  # (N, H', W', *kernel, C)
    count = windows[0, 0, 0].numel()
    found = h.new_zeros(*windows.shape[:3], width, dtype=dtype)
    found[..., :count].unflatten(3, windows.shape[3:]).copy_(windows)
    return found.permute(0, 3, 1, 2)


def normalized(norm: Norm) -> tuple[Tensor, Tensor]:
    """The normalised activation x, and the slope of ReLU there, 0 or 1."""
    x = (wide(norm.a) - spread(norm.m, norm.a)) * spread(norm.r, norm.a)
    return x, (x * norm.gamma + norm.beta > 0).to(x.dtype)


def x_tangent(norm: Norm, x: Tensor, tangent: Tangent) -> Tensor:
    """The tangent of the normalised activation."""
    t0, t1 = spread(tangent.t0, norm.a), spread(tangent.t1, norm.a)
    return spread(norm.r, norm.a) * (wide(tangent.a_dot) - t0 - x * t1)


def gradient_means(norm: Norm, gradient: Gradient) -> tuple[Tensor, Tensor]:
    """The group means of g and of x g: those of gamma s and gamma s x, since gamma is constant over a channel."""
    return group_mean(norm.gamma * gradient.s0, norm.m), group_mean(norm.gamma * gradient.s1, norm.m)


def wide(x: Tensor) -> Tensor:
    """In float32 if it is in half precision."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def unpool(h: Tensor, a: Tensor) -> Tensor:
    """The adjoint of 2x2 mean pooling, like a; zero in a last odd row or column, which the pooling leaves out."""
    up = F.interpolate(wide(h), scale_factor=2, mode="nearest") / 4
    odd = (a.shape[2] % 2, a.shape[3] % 2)
    return F.pad(up, (0, odd[1], 0, odd[0])) if any(odd) else up


def channel_mean(x: Tensor) -> Tensor:
    """The mean over an image's pixels, (N, C, H, W) -> (N, C, 1, 1)."""
    return x.mean((2, 3), keepdim=True)


def group_mean(x: Tensor, m: Tensor) -> Tensor:
    """The mean over every norm group, like m, of pixels (N, C, H, W) or of channel means."""
    return x.unflatten(1, (m.shape[1], -1)).mean(GROUP, keepdim=True)


def spread(value: Tensor, a: Tensor) -> Tensor:
    """One number per norm group, (N, groups, 1, 1, 1), as (N, C, 1, 1), which broadcasts against a."""
    groups, channels = value.shape[1], a.shape[1]
    return value.flatten(2, 4).expand(-1, -1, channels // groups).flatten(1)[:, :, None, None]


class BlockFunctions(NamedTuple):
    """The functions above, or what utils/numerics/compilation.py has in their place."""

    forward: Callable[..., tuple[Tensor, Norm]] = forward
    backward: Callable[..., tuple[Tensor, Gradient]] = backward
    tangent: Callable[..., tuple[Tensor, Tangent]] = tangent
    adjoint: Callable[..., tuple[Tensor, list[Tensor]]] = adjoint
    patches: Callable[..., Tensor] = patches
