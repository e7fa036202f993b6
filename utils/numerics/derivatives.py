"""The forms in which a network is computed, and the only place that chooses: written out (utils/numerics/analytic.py) where that
exists for the network, by autograd otherwise. Both give the same numbers up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap

from models import Network
from utils.method.objectives import Comparison, distance
from utils.numerics import analytic
from utils.numerics.compute import Compute


@torch.no_grad()
def embed(net: Network, x: Tensor, compute: Compute) -> Tensor:
    """(N, C, H, W) normalised images -> (N, D) embeddings in the precision of `compute`, in `net`'s mode."""
    if analytic.suits(net):
        return analytic.Analytic([net], compute, x.dtype).embed(x)
    with compute.autocast():
        return torch.cat([net.embed(piece) for piece in x.split(compute.images(x.shape[-1]))])


@torch.no_grad()
def logits(net: Network, x: Tensor, compute: Compute) -> Tensor:
    """(N, C, H, W) normalised images -> (N, classes), in `net`'s mode."""
    found: Tensor = net.classifier(embed(net, x, compute).to(x.dtype))
    return found


def predict(net: Network, x: Tensor, compute: Compute) -> Tensor:
    """(N, C, H, W) normalised images -> (N,) classes, in `net`'s mode."""
    return logits(net, x, compute).argmax(1)


def gradients(nets: Sequence[Network], x: Tensor, target: Tensor, compute: Compute) -> list[list[Tensor]]:
    """Of each network's mean cross-entropy with respect to its parameters, in their order.

    x: (K, n, C, H, W) normalised images of K networks; target: (K, n, classes), probabilities.
    """
    written_out = [net for net in nets if analytic.suits(net)]
    if len(written_out) == len(nets):
        return analytic.Analytic(written_out, compute, x.dtype).gradients(x, target)
    found = []
    for net, images, wanted in zip(nets, x, target, strict=True):
        with compute.autocast():
            loss = F.cross_entropy(net(images), wanted)
        found.append(list(torch.autograd.grad(loss, list(net.parameters()))))
    return found


def match(
    net: Network, real: Tensor, syn: Tensor, labels: Tensor, how: Comparison, compute: Compute
) -> tuple[Tensor, Tensor]:
    """Distances of K classes, (K,), and their derivatives, like syn.

    real: (K, B, C, H, W), syn: (K, S, C, H, W), augmented; labels: (K,).
    """
    if analytic.suits(net) and analytic.covers(how):
        return analytic.Analytic([net], compute, syn.dtype).match(real, syn, labels, how)
    return match_by_autograd(net, real, syn, labels, how, compute)


def match_by_autograd(
    net: Network, real: Tensor, syn: Tensor, labels: Tensor, how: Comparison, compute: Compute
) -> tuple[Tensor, Tensor]:
    """Distances of K classes and their gradients, for any network, metric and objective, in one graph.

    real: (K, B, C, H, W), syn: (K, S, C, H, W), augmented; labels: (K,). Returns (K,) and a tensor like syn.
    """

    def of_class(real: Tensor, syn: Tensor, label: Tensor) -> Tensor:
        return distance(net, real, syn, label, how)

    syn = syn.detach().requires_grad_()
    # Under vmap, PyTorch takes batch norm's gradient of gamma for one of constants, and autocast for nothing.
    one_by_one = compute.precision == "bf16" or any(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    with frozen_statistics(net), compute.autocast():
        if one_by_one:
            losses = torch.stack([of_class(*each) for each in zip(real, syn, labels, strict=True)])
        else:
            losses = vmap(of_class)(real, syn, labels)
    return losses.detach(), torch.autograd.grad(losses.sum(), syn)[0]


class Piece(Protocol):
    """Some images of a batch, and all that is needed of them for derivatives of the mean cross-entropy."""

    @property
    def gradients(self) -> Sequence[Tensor]:
        """What they add to the gradient with respect to the parameters."""

    def along(self, direction: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor], Tensor]:
        """What they add to the slope in a direction, like the parameters; and the derivatives of that, by the
        parameters and by the images."""


def pieces(
    net: Network, parameters: Sequence[Tensor], x: Tensor, target: Tensor, compute: Compute, *, gradients: bool
) -> Iterator[Piece]:
    """A batch, (n, C, H, W), with targets, (n, classes), under these parameters. gradients: whether they are wanted."""
    if analytic.suits(net):
        return analytic.Analytic([net], compute, x.dtype, [parameters]).traced(x, target, gradients)
    return graphs(net, parameters, x, target, compute)


def along(batch: Iterable[Piece], direction: Sequence[Tensor]) -> tuple[Tensor, list[Tensor], Tensor]:
    """The slope of a batch's mean cross-entropy in a direction, like the parameters; and the derivatives of that, by
    the parameters and by the images."""
    slope, by_parameters, by_x = direction[0].new_zeros(()), [torch.zeros_like(d) for d in direction], []
    for piece in batch:
        part, found, by_piece = piece.along(direction)
        del piece  # before the next one is made
        slope += part
        for sums, added in zip(by_parameters, found, strict=True):
            sums += added
        by_x.append(by_piece)
    return slope, by_parameters, torch.cat(by_x)


class Graph(NamedTuple):
    """A piece of any network's, by autograd."""

    parameters: list[Tensor]
    x: Tensor
    gradients: tuple[Tensor, ...]

    def along(self, direction: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor], Tensor]:
        part = torch.stack([(g * d).sum() for g, d in zip(self.gradients, direction, strict=True)]).sum()
        *by_parameters, by_x = torch.autograd.grad(part, [*self.parameters, self.x])
        return part.detach(), by_parameters, by_x


def graphs(net: Network, parameters: Sequence[Tensor], x: Tensor, target: Tensor, compute: Compute) -> Iterator[Graph]:
    """The pieces by autograd: the batch as a whole where batch norm looks at all of it."""
    names = [name for name, _ in net.named_parameters()]
    together = any(isinstance(module, nn.BatchNorm2d) for module in net.modules())
    for rows in analytic.even(len(x), len(x) if together else compute.images(x.shape[-1])):
        weights = [w.detach().requires_grad_() for w in parameters]
        part = x[rows].detach().requires_grad_()
        with compute.autocast():
            logits = functional_call(net, dict(zip(names, weights, strict=True)), (part,))
            loss = F.cross_entropy(logits, target[rows], reduction="sum") / len(x)
        yield Graph(weights, part, torch.autograd.grad(loss, weights, create_graph=True))


@contextmanager
def frozen_statistics(net: Network) -> Iterator[None]:
    """Batch norm normalises by the batch but remembers nothing: a batch of one class says little of all images."""
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
