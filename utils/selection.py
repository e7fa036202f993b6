"""Which real images the synthetic ones are matched against: DREAM's representatives, or a random draw (Sec. 3.3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from models import Network
from utils.images import ImageSet, to_unit
from utils.runtime import Draws, chunk_size

KMEANS_ITERATIONS = 10  # inertia within 0.2 % of convergence on ConvNet embeddings, at a third of the time


@dataclass(frozen=True)
class Context:
    """What a strategy may look at. Strategies draw from `draws` only."""

    net: Network
    real: ImageSet
    draws: Draws
    raw: bool = False  # cluster un-normalised images, as the published code does


def select(context: Context, count: int, *, strategy: str) -> Tensor:
    """Positions in the real set of `count` images of every class, (classes, count) int64.

    All different within a class that has as many; a smaller class gives all its images, repeated in turn.
    """
    choose = STRATEGIES[strategy]
    real = context.real
    rows = []
    for c in range(real.classes):
        have = real.counts[c]
        within = choose(context, c, min(count, have))
        if have < count:  # let chance say which images come twice
            within = within[context.draws.permutation(have)]
        turns = torch.arange(count, device=real.device) % len(within)
        rows.append(real.starts[c] + within[turns])
    return torch.stack(rows)


def random_images(context: Context, c: int, count: int) -> Tensor:
    """A true random draw without replacement."""
    return context.draws.permutation(context.real.counts[c])[:count]


def kmeans_images(context: Context, c: int, count: int) -> Tensor:
    """The image nearest each of `count` k-means centroids of ALL images of the class, in the network's embedding."""
    found = embed(context.net, context.real.of_class(c), context.real.normalize if not context.raw else to_unit)
    return kmeans_representatives(found, count, context.draws)


STRATEGIES: dict[str, Callable[[Context, int, int], Tensor]] = {"kmeans": kmeans_images, "random": random_images}


@torch.no_grad()
def embed(net: Network, images: Tensor, prepare: Callable[[Tensor], Tensor]) -> Tensor:
    """Images (N, C, H, W) as they lie on the device -> (N, D) embeddings, chunk by chunk.

    In evaluation mode: with batch norm an image's embedding must not depend on its neighbours in a chunk. (Running
    statistics come from the network updates alone, so before the first update batch norm does not normalise.)
    """
    training = net.training
    net.eval()
    found = torch.cat(
        [net.embed(prepare(chunk)) for chunk in images.split(chunk_size(images.device, images.shape[-1]))]
    )
    net.train(training)
    return found


@torch.no_grad()
def kmeans_representatives(x: Tensor, k: int, draws: Draws, *, iterations: int = KMEANS_ITERATIONS) -> Tensor:
    """Row numbers of k different points of x (N, D), each the nearest to the centroid of its k-means cluster; (k,).

    Lloyd's algorithm from k random points, a fixed number of iterations and no wait for the device in it. Clusters
    that run empty move to the points farthest from their own centroid. Taking the nearest *member* of a cluster keeps
    an image from standing for two centroids.
    """
    n = len(x)
    assert 1 <= k <= n, (k, n)
    if k == n:
        return torch.arange(n, device=x.device)
    centroids = x[draws.permutation(n)[:k]]
    for _ in range(iterations):
        nearest, distance = assign(x, centroids)
        centroids = update_centroids(x, nearest, distance, k)
    nearest, distance = assign(x, centroids)

    # Nearest member of every cluster, first row on ties; empty clusters keep the out-of-range number n.
    best = distance.new_full((k,), torch.inf).scatter_reduce(0, nearest, distance, "amin")
    rows = torch.arange(n, device=x.device)
    candidate = torch.where(distance == best[nearest], rows, n)
    picks = rows.new_full((k,), n).scatter_reduce(0, nearest, candidate, "amin")

    # Clusters that are empty even so (duplicate images) take the farthest points that nobody has picked.
    taken = torch.zeros(n + 1, dtype=torch.bool, device=x.device).index_fill(0, picks, True)[:n]
    spare = distance.masked_fill(taken, -torch.inf).topk(k).indices
    empty = picks == n
    return torch.where(empty, spare[empty.cumsum(0) - 1], picks)


def assign(x: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Number of the nearest centroid of every point (N,), and the squared distance to it (N,)."""
    partial = torch.addmm(centroids.square().sum(1), x, centroids.T, alpha=-2)  # |c|^2 - 2 x.c, (N, k)
    value, nearest = partial.min(1)
    return nearest, (value + x.square().sum(1)).clamp_(min=0)


def update_centroids(x: Tensor, nearest: Tensor, distance: Tensor, k: int) -> Tensor:
    """Means of the clusters, (k, D); the j-th empty cluster moves to the j-th farthest point."""
    sums = torch.zeros(k, x.shape[1], dtype=x.dtype, device=x.device).index_add_(0, nearest, x)
    sizes = torch.zeros_like(sums[:, 0]).index_add_(0, nearest, torch.ones_like(x[:, 0]))
    empty = sizes == 0
    farthest = x[distance.topk(k).indices]  # (k, D)
    return torch.where(empty[:, None], farthest[empty.cumsum(0) - 1], sums / sizes.clamp(min=1)[:, None])
