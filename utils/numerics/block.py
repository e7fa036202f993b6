"""A ConvNet block after its convolution, norm -> ReLU -> 2x2 mean pool, and its first and second derivatives.

Plain functions of tensors, which a compiler turns into a few loops each; there is no autograd graph. With a the
convolution's output, m and r the mean and 1/std of a norm group of one image, x = (a - m) r, and gamma, beta the
norm's parameters:

    forward    h = pool(relu(gamma x + beta))
    backward   g = gamma mask up(dh),  da = r (g - mean g - x mean(x g))
    tangent    x. = r (a. - mean a. - x mean(x a.)),  h. = pool(mask (gamma x. + gamma. x + beta.))
    adjoint    of the tangent, with respect to a, gamma and beta; see there

mask is ReLU's slope, up() the adjoint of the pooling, means run over a norm group. Shapes: a and all that is like it
(N, C, H, W); h, dh, h., hbar (N, C, H // 2, W // 2); gamma, beta (1 or N, C, 1, 1); m, r, means (N, groups, 1, 1, 1);
channel means (N, C, 1, 1). Half-precision tensors are computed with in float32 and returned in their own precision.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = (2, 3, 4)  # the dimensions of a norm group in (N, groups, C / groups, H, W)


def forward(a: Tensor, gamma: Tensor, beta: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """h, m, r."""
    grouped = wide(a).unflatten(1, (groups, -1))
    variance, m = torch.var_mean(grouped, GROUP, correction=0, keepdim=True)
    r = (variance + eps).rsqrt()
    y = ((grouped - m) * r).flatten(1, 2) * gamma + beta
    return F.avg_pool2d(y.relu(), 2).to(a.dtype), m, r


def backward(
    a: Tensor, m: Tensor, r: Tensor, gamma: Tensor, beta: Tensor, dh: Tensor, keep: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """da, and the channel means of s and s x with s = mask up(dh), which are the gradients of beta and gamma.

    Unless a is to be kept, da may take its place in memory, which a CPU's cache thanks for.
    """
    x, mask = normalized(a, m, r, gamma, beta)
    s = mask * unpool(dh, a)
    s0, s1 = s.mean((2, 3), keepdim=True), (s * x).mean((2, 3), keepdim=True)
    g0, g1 = group_mean(gamma * s0, m), group_mean(gamma * s1, m)
    return (spread(r, a) * (gamma * s - spread(g0, a) - x * spread(g1, a))).to(a.dtype), s0, s1


def tangent(
    a: Tensor,
    m: Tensor,
    r: Tensor,
    gamma: Tensor,
    beta: Tensor,
    a_dot: Tensor,
    gamma_dot: Tensor | None = None,
    beta_dot: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """h., mean a., mean(x a.). gamma and beta move both or not at all."""
    x, mask = normalized(a, m, r, gamma, beta)
    t = wide(a_dot)
    t0, t1 = group_mean(t, m), group_mean(x * t, m)
    y_dot = gamma * mask * (spread(r, a) * (t - spread(t0, a) - x * spread(t1, a)))
    if gamma_dot is not None and beta_dot is not None:
        y_dot = y_dot + mask * (gamma_dot * x + beta_dot)
    return F.avg_pool2d(y_dot, 2).to(a.dtype), t0, t1


def adjoint(
    a: Tensor,
    m: Tensor,
    r: Tensor,
    gamma: Tensor,
    beta: Tensor,
    dh: Tensor,
    s0: Tensor,
    s1: Tensor,
    a_dot: Tensor,
    t0: Tensor,
    t1: Tensor,
    h_bar: Tensor,
) -> Tensor:
    """abar, the gradient of <dh, h.> + <hbar, h> with respect to a: what a tangent does to the gradient of a loss.

    abar = r (q - mean q - x mean(x q)) - r^2 [x (K - 3 P Q) + Q (g - mean g) + P (a. - mean a.)]  with
    q = gamma mask up(hbar),  P = mean(x g),  Q = mean(x a.),  K = mean(g a.) - mean(g) mean(a.)
    """
    x, mask = normalized(a, m, r, gamma, beta)
    slope = gamma * mask
    g, q = slope * unpool(dh, a), slope * unpool(h_bar, a)
    return _through_norm(a, m, r, x, g, group_mean(gamma * s0, m), group_mean(gamma * s1, m), a_dot, t0, t1, q)


def whole_adjoint(
    a: Tensor,
    m: Tensor,
    r: Tensor,
    gamma: Tensor,
    beta: Tensor,
    dh: Tensor,
    s0: Tensor,
    s1: Tensor,
    a_dot: Tensor,
    t0: Tensor,
    t1: Tensor,
    h_bar: Tensor,
    gamma_dot: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same where gamma and beta move: abar, and the channel means of u and u x + s x., which are the gradients of
    beta and gamma. q = gamma u + gamma. s  with  u = mask up(hbar),  s = mask up(dh).
    """
    x, mask = normalized(a, m, r, gamma, beta)
    s, u, t = mask * unpool(dh, a), mask * unpool(h_bar, a), wide(a_dot)
    g0, p = group_mean(gamma * s0, m), group_mean(gamma * s1, m)
    x_dot = spread(r, a) * (t - spread(t0, a) - x * spread(t1, a))
    a_bar = _through_norm(a, m, r, x, gamma * s, g0, p, a_dot, t0, t1, gamma * u + gamma_dot * s)
    return a_bar, u.mean((2, 3), keepdim=True), (u * x + s * x_dot).mean((2, 3), keepdim=True)


def _through_norm(
    a: Tensor,
    m: Tensor,
    r: Tensor,
    x: Tensor,
    g: Tensor,
    g0: Tensor,
    p: Tensor,
    a_dot: Tensor,
    t0: Tensor,
    t1: Tensor,
    q: Tensor,
) -> Tensor:
    """abar. g0: mean g."""
    t = wide(a_dot)
    k = group_mean(g * t, m) - g0 * t0
    r = spread(r, a)
    first = q - spread(group_mean(q, m), a) - x * spread(group_mean(x * q, m), a)
    second = x * spread(k - 3 * p * t1, a) + spread(t1, a) * (g - spread(g0, a)) + spread(p, a) * (t - spread(t0, a))
    return (r * (first - r * second)).to(a.dtype)


def normalized(a: Tensor, m: Tensor, r: Tensor, gamma: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """x, and ReLU's slope there."""
    x = (wide(a) - spread(m, a)) * spread(r, a)
    return x, (x * gamma + beta > 0).to(x.dtype)


def wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def unpool(h: Tensor, a: Tensor) -> Tensor:
    """The adjoint of 2x2 mean pooling; a last odd row or column of `a` has no part in it."""
    up = F.interpolate(wide(h), scale_factor=2, mode="nearest") / 4
    odd = (a.shape[2] % 2, a.shape[3] % 2)
    return F.pad(up, (0, odd[1], 0, odd[0])) if any(odd) else up


def group_mean(x: Tensor, m: Tensor) -> Tensor:
    """Mean over every norm group; `m` says how many there are."""
    return x.unflatten(1, (m.shape[1], -1)).mean(GROUP, keepdim=True)


def spread(value: Tensor, a: Tensor) -> Tensor:
    """(N, groups, 1, 1, 1) -> (N, C or 1, 1, 1), to meet a."""
    groups, channels = value.shape[1], a.shape[1]
    return value.flatten(2, 4).expand(-1, -1, channels // groups).flatten(1)[:, :, None, None]


class Stages(NamedTuple):
    """The functions, as they are or compiled for a CPU (utils/numerics/compilation.py)."""

    forward: Callable[..., tuple[Tensor, Tensor, Tensor]] = forward
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]] = backward
    tangent: Callable[..., tuple[Tensor, Tensor, Tensor]] = tangent
    adjoint: Callable[..., Tensor] = adjoint
    whole_adjoint: Callable[..., tuple[Tensor, Tensor, Tensor]] = whole_adjoint
