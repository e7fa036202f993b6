"""The method in its published form, class by class, autograd for everything: what bench.py compares with.

The same arithmetic as the oracle's, on whole batches: one torch.optim.SGD over all pixels stepped after every class, a
graph over each class's gradients, a class embedded at once, k-means to convergence with a look at it per iteration.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from models import Network
from tests.oracle import class_distance
from utils.method.augment import Augment
from utils.method.formation import Formation
from utils.method.images import ImageSet
from utils.numerics.derivatives import separated
from utils.system.draws import Draws


def matching(
    net: Network,
    pixels: Tensor,
    sgd: torch.optim.Optimizer,
    real: ImageSet,
    picks: Tensor,
    factor: int,
    metric: str,
    *,
    match: str = "grad",
    fc: bool = False,
    names: str = "color_crop_cutout",
    joint: bool = False,
) -> None:
    """One matching update of every class in turn. pixels: a leaf, (classes, ipc, C, H, W).

    joint: the optimiser steps once, after the last class.
    """
    augment, draws = Augment(names), Draws(pixels.device, "published")
    for c in range(len(pixels)):
        u = augment.draw_shared(1, draws)
        syn = augment(real.normalize(Formation(factor).decode(pixels[c])), u)
        wanted = augment(real.normalize(real.images[picks[c]]), u)
        if not joint or c == 0:
            sgd.zero_grad()
        class_distance(net, wanted, syn, c, metric, match, fc=fc).backward()
        if not joint or c == len(pixels) - 1:
            sgd.step()


def trajectory(
    net: Network,
    pixels: Tensor,
    step_size: Tensor,
    sgds: Sequence[torch.optim.Optimizer],
    ends: tuple[Tensor, Tensor],
    real: ImageSet,
    factor: int,
    *,
    steps: int,
    names: str,
) -> None:
    """One update of pixels and step size through a student's steps, in one graph. ends: of the expert, (P,) each."""
    augment, draws = Augment(names), Draws(pixels.device, "published")
    parameters = [name for name, _ in net.named_parameters()]
    theta = ends[0].clone().requires_grad_()
    for _ in range(steps):
        syn = Formation(factor).decode(pixels)  # (classes, S, C, H, W)
        labels = torch.arange(len(syn), device=syn.device).repeat_interleave(syn.shape[1])
        x = augment(real.normalize(syn.flatten(0, 1)), augment.draw(1, len(labels), draws))
        weights = dict(zip(parameters, separated(net, theta), strict=True))
        loss = F.cross_entropy(functional_call(net, weights, x), labels)
        theta = theta - step_size * torch.autograd.grad(loss, theta, create_graph=True)[0]
    for sgd in sgds:
        sgd.zero_grad()
    ((theta - ends[1]).square().sum() / (ends[0] - ends[1]).square().sum()).backward()
    for sgd in sgds:
        sgd.step()


def epoch(
    net: Network,
    sgd: torch.optim.Optimizer,
    train: ImageSet,
    n: int,
    batch_size: int,
    names: str,
    *,
    cutmix: float = 0.5,
) -> None:
    """One pass over n images, augmented, CutMix in that share of the batches, decided by the host."""
    augment, draws = Augment(names), Draws(train.device, "epoch")
    net.train()
    for index in draws.permutation(len(train))[:n].split(batch_size):
        x, y = train.batch(index)
        x = augment(x, augment.draw(1, len(x), draws))
        if draws.host.random() < cutmix:
            order = draws.permutation(len(x))
            half = int(x.shape[2] * (1 - draws.host.random()) ** 0.5) // 2
            i, j = draws.host.randrange(x.shape[2]), draws.host.randrange(x.shape[3])
            box = (slice(max(i - half, 0), i + half), slice(max(j - half, 0), j + half))
            mixed = x.clone()
            mixed[:, :, box[0], box[1]] = x[order][:, :, box[0], box[1]]
            share = mixed[0, 0, box[0], box[1]].numel() / x[0, 0].numel()
            logits = net(mixed)
            loss = (1 - share) * F.cross_entropy(logits, y) + share * F.cross_entropy(logits, y[order])
        else:
            loss = F.cross_entropy(net(x), y)
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        loss.item()  # for the running average that is printed


def embedding(net: Network, real: ImageSet, c: int) -> Tensor:
    """All images of a class at once."""
    with torch.no_grad():
        return net.embed(real.normalize(real.of_class(c)))


def kmeans(x: Tensor, k: int) -> Tensor:
    """Lloyd's algorithm until no centroid moves, then the nearest image of each centroid."""
    centroids = x[torch.randperm(len(x), device=x.device)[:k]]
    for _ in range(100):
        nearest = torch.cdist(x, centroids).argmin(1)
        sums = torch.zeros_like(centroids).index_add_(0, nearest, x)
        moved = sums / nearest.bincount(minlength=k).clamp(min=1)[:, None]
        shift = (moved - centroids).norm(dim=1).sum().item()
        centroids = moved
        if shift < 1e-4:
            break
    return torch.cdist(x, centroids).argmin(0)
