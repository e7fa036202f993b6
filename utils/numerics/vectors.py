"""All parameters of a network, or all gradients, as one vector."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from models import Network


def flattened(net: Network) -> Tensor:
    """All parameters, in the order of `parameters()`: a copy, (P,)."""
    return joined([p.detach() for p in net.parameters()])


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """One after the other, (P,)."""
    return torch.cat([x.reshape(-1) for x in tensors])


def separated(net: Network, theta: Tensor) -> list[Tensor]:
    """(P,) -> views like the network's parameters."""
    like = list(net.parameters())
    return [part.view(p.shape) for p, part in zip(like, theta.split([p.numel() for p in like]), strict=True)]


@torch.no_grad()
def load(net: Network, theta: Tensor) -> None:
    """Take over parameters (P,), at the same addresses."""
    for p, part in zip(net.parameters(), separated(net, theta), strict=True):
        p.copy_(part)
