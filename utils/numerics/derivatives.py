"""Derivatives of any network: written out (utils/numerics/analytic.py) where they are, by autograd otherwise.

The only place that chooses; both give the same numbers up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap

from models import Network
from utils.numerics import analytic
from utils.numerics.analytic import Analytic, Metric, Traced
from utils.numerics.compute import Compute
from utils.numerics.passes import Compared, Slope


class Distance(NamedTuple):
    """How far the effect of synthetic images on a network is from that of real ones, in equivalent descriptions.

    between: (net, real, syn, label) -> (), for images (N, C, H, W) of one class, differentiable by autograd with
    respect to syn. It runs under vmap for all classes at once, so it never looks at a value from Python.
    compared, metric: the same number as the metric of what is compared. compared is None for what `Compared` cannot
    express. of_embeddings: the same number from the embeddings of the images, like `between`; None for what is no
    function of them. A distance with neither is left to autograd.
    learned: leaves that `between` and `of_embeddings` use, whose gradients are added to their `grad`.
    """

    between: Callable[[Network, Tensor, Tensor, Tensor], Tensor]
    compared: Compared | None
    metric: Metric
    of_embeddings: Callable[[Network, Tensor, Tensor, Tensor], Tensor] | None = None
    learned: Sequence[Tensor] = ()


@torch.no_grad()
def embed(
    net: Network, x: Tensor, compute: Compute, prepare: Callable[[Tensor], Tensor] = lambda piece: piece
) -> Tensor:
    """(N, C, H, W) images -> (N, D) embeddings in the precision of `compute`, in `net`'s mode.

    prepare: normalises a piece of images that are not normalised yet.
    """
    if analytic.is_supported(net):
        return Analytic([net], compute, prepare(x[:0]).dtype).embed(x, prepare)
    with compute.autocast():
        return torch.cat([net.embed(prepare(piece)) for piece in x.split(compute.images_at_once(x.shape[-1]))])


@torch.no_grad()
def logits(net: Network, x: Tensor, compute: Compute) -> Tensor:
    """(N, C, H, W) normalised images -> (N, classes), in `net`'s mode."""
    found: Tensor = net.classifier(embed(net, x, compute).to(x.dtype))
    return found


def gradients(nets: Sequence[Network], x: Tensor, target: Tensor, compute: Compute) -> list[list[Tensor]]:
    """Gradients of each network's mean cross-entropy with respect to its parameters, in their order.

    x: (K, n, C, H, W) normalised images of K networks; target: (K, n, classes), probabilities.
    """
    supported = [net for net in nets if analytic.is_supported(net)]
    if len(supported) == len(nets):
        return Analytic(supported, compute, x.dtype).gradients(x, target)
    found = []
    for net, images, wanted in zip(nets, x, target, strict=True):
        with compute.autocast():
            loss = F.cross_entropy(net(images), wanted)
        found.append(list(torch.autograd.grad(loss, list(net.parameters()))))
    return found


# --- A distance between real and synthetic images, and its gradient by the latter -------------------------------------


def distances(
    net: Network, real: Tensor, syn: Tensor, labels: Tensor, distance: Distance, compute: Compute
) -> tuple[Tensor, Tensor]:
    """Distances of K classes, (K,), and their derivatives, like syn.

    real: (K, B, C, H, W), syn: (K, S, C, H, W), augmented; labels: (K,).
    """
    if analytic.is_supported(net):
        written_out = Analytic([net], compute, syn.dtype)
        if distance.compared is not None:
            return written_out.distances(real, syn, labels, distance.compared, distance.metric)
        if distance.of_embeddings is not None:
            of_embeddings = partial(distance.of_embeddings, net)
            return written_out.distances_of_embeddings(real, syn, labels, of_embeddings, distance.learned)
    return distances_by_autograd(net, real, syn, labels, distance, compute)


def distances_by_autograd(
    net: Network, real: Tensor, syn: Tensor, labels: Tensor, distance: Distance, compute: Compute
) -> tuple[Tensor, Tensor]:
    """Distances of K classes and their derivatives for any network and any distance, in one autograd graph."""
    of_class = partial(distance.between, net)
    syn = syn.detach().requires_grad_()
    # Under vmap, PyTorch takes batch norm's gradient of gamma for one of constants, and autocast for nothing.
    one_by_one = compute.precision == "bf16" or any(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    with frozen_statistics(net), compute.autocast():
        if one_by_one:
            losses = torch.stack([of_class(*each) for each in zip(real, syn, labels, strict=True)])
        else:
            losses = vmap(of_class)(real, syn, labels)
    losses.sum().backward(inputs=[syn, *distance.learned])
    assert syn.grad is not None
    return losses.detach(), syn.grad


# --- The slope of a cross-entropy in a direction, and its gradients: what a step of training hands back ---------------


def pieces(
    net: Network, parameters: Sequence[Tensor], x: Tensor, target: Tensor, compute: Compute, *, gradients: bool
) -> Iterator[Traced | Graph]:
    """A batch piece by piece, each with all that `slope` needs of it, under these parameters.

    x: (n, C, H, W) normalised images; target: (n, classes). gradients: whether those of the pieces are wanted.
    """
    if analytic.is_supported(net):
        return Analytic([net], compute, x.dtype, [parameters]).traced(x, target, gradients)
    return graphs(net, parameters, x, target, compute)


def slope(batch: Iterable[Traced | Graph], direction: Sequence[Tensor]) -> Slope:
    """The slope of a batch's mean cross-entropy in a direction, like the parameters, and its gradients."""
    value, by_parameters, by_images = direction[0].new_zeros(()), [torch.zeros_like(d) for d in direction], []
    for piece in batch:
        found = piece.slope(direction)
        del piece  # an iterator makes the next one before the name is bound again: two would be in memory
        value += found.value
        for sums, added in zip(by_parameters, found.by_parameters, strict=True):
            sums += added
        by_images.append(found.by_images)
    return Slope(value, by_parameters, torch.cat(by_images))


class Graph(NamedTuple):
    """Some images of a batch with their autograd graph: what `Traced` is, for any network."""

    parameters: list[Tensor]
    x: Tensor
    gradients: tuple[Tensor, ...]

    def slope(self, direction: Sequence[Tensor]) -> Slope:
        """What these images add to the slope of the mean cross-entropy in a direction, like the parameters."""
        value = torch.stack([(g * d).sum() for g, d in zip(self.gradients, direction, strict=True)]).sum()
        *by_parameters, by_images = torch.autograd.grad(value, [*self.parameters, self.x])
        return Slope(value.detach(), by_parameters, by_images)


def graphs(net: Network, parameters: Sequence[Tensor], x: Tensor, target: Tensor, compute: Compute) -> Iterator[Graph]:
    """The pieces of a batch by autograd; a single one where batch norm looks at all images together."""
    names = [name for name, _ in net.named_parameters()]
    together = any(isinstance(module, nn.BatchNorm2d) for module in net.modules())
    for rows in analytic.even(len(x), len(x) if together else compute.images_at_once(x.shape[-1])):
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


# --- Parameters or gradients as one vector ----------------------------------------------------------------------------


def flattened(tensors: Iterable[Tensor]) -> Tensor:
    """Parameters or gradients one after the other, (P,): a copy without a graph."""
    # parameters_to_vector takes views, which gradients in channels-last layout do not have.
    return torch.cat([x.detach().reshape(-1) for x in tensors])


def separated(net: Network, theta: Tensor) -> list[Tensor]:
    """A vector (P,) as views in the shapes of the network's parameters."""
    like = list(net.parameters())
    return [part.view(p.shape) for p, part in zip(like, theta.split([p.numel() for p in like]), strict=True)]


@torch.no_grad()
def load(net: Network, theta: Tensor) -> None:
    """Copy a vector (P,) into the network's parameters."""
    # vector_to_parameters would move them to other addresses, where a captured CUDA graph does not look.
    for p, part in zip(net.parameters(), separated(net, theta), strict=True):
        p.copy_(part)
