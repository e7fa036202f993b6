"""Which real images the synthetic ones are matched against: DREAM's representatives (Sec. 3.3), or what they are
compared with: a random draw, central images, those at the decision boundary, herding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models import Network
from utils.method.images import ImageSet, to_unit
from utils.numerics import derivatives
from utils.numerics.compute import Compute
from utils.system.draws import Draws

KMEANS_ITERATIONS = 15  # inertia within 1 % of scikit-learn's at a third of the iterations to convergence
EMBEDDING_BYTES = 2**28  # of the classes that are clustered together


@dataclass(frozen=True)
class Context:
    """What a strategy may look at. Strategies draw from `draws` only."""

    net: Network
    real: ImageSet
    draws: Draws
    compute: Compute
    raw: bool = False  # embed un-normalised images, as the published code does
    kmeans: str = "batched"
    per_cluster: int = 1  # representatives of every cluster, those nearest its centroid

    @property
    def classes(self) -> list[int]:
        """Those that are selected from, whatever others there are."""
        return self.real.held

    def embedded(self, c: int) -> Tensor:
        """All images of class c in the network's embedding, (counts[c], D), in the precision of `compute`."""
        return embed(self.net, self.real.of_class(c), to_unit if self.raw else self.real.normalize, self.compute)


def select(context: Context, count: int, *, strategy: str) -> Tensor:
    """Positions in the real set of `count` images of each of its classes, (classes, count) int64.

    All different within a class that has as many; a smaller class gives all its images, repeated in turn. What is found
    of a class does not depend on the others, except on a GPU by rounding.
    """
    real = context.real
    found = STRATEGIES[strategy](context, [min(count, real.counts[c]) for c in context.classes])
    rows = []
    for c, within in zip(context.classes, found, strict=True):
        if (have := real.counts[c]) < count:  # let chance say which images come twice
            within = within[context.draws.of_class(c).permutation(have)]
            within = within[torch.arange(count, device=real.device) % have]
        rows.append(real.starts[c] + within)
    return torch.stack(rows)


def random_images(context: Context, counts: Sequence[int]) -> list[Tensor]:
    """A true random draw without replacement."""
    each = zip(context.classes, counts, strict=True)
    return [context.draws.of_class(c).permutation(context.real.counts[c])[:k] for c, k in each]


def kmeans_images(context: Context, counts: Sequence[int]) -> list[Tensor]:
    """The image nearest each of k k-means centroids of ALL images of a class, in the network's embedding.

    Or several of each of as many times fewer clusters (DREAM+, Liu et al., 2023).
    """
    real, found = context.real, {}
    todo = []
    for c, k in zip(context.classes, counts, strict=True):
        if k == real.counts[c]:
            found[c] = torch.arange(k, device=real.device)
        else:
            todo.append((c, k))
    together = EMBEDDING_BYTES if context.compute.classes_together else 0
    while todo:
        group: list[int] = []
        clusters = todo[0][1]
        x: list[Tensor] = []
        while todo and (not group or sum(e.nbytes for e in x) < together):
            group.append(todo.pop(0)[0])
            x.append(context.embedded(group[-1]))
        draws = [context.draws.of_class(c) for c in group]
        found.update(zip(group, KMEANS[context.kmeans](x, clusters, draws, context.per_cluster), strict=True))
    return [found[c] for c in context.classes]


def central_images(context: Context, counts: Sequence[int]) -> list[Tensor]:
    """The images nearest the mean of their class, in the network's embedding: typical, and much alike."""
    found = []
    for c, k in zip(context.classes, counts, strict=True):
        x = widened(context.embedded(c))
        found.append((x - x.mean(0)).square().sum(1).topk(k, largest=False).indices)
    return found


def boundary_images(context: Context, counts: Sequence[int]) -> list[Tensor]:
    """The images with the smallest margin to another class, right or wrong, under the network as it is now.

    The margin is the distance between the logit of the image's own class and the highest of the others.
    """
    found = []
    for c, k in zip(context.classes, counts, strict=True):
        x = widened(context.embedded(c))
        with torch.no_grad():
            logits = context.net.classifier(x)
        own = logits[:, c].clone()
        logits[:, c] = -torch.inf
        found.append((own - logits.amax(1)).abs().topk(k, largest=False).indices)
    return found


def herded_images(context: Context, counts: Sequence[int]) -> list[Tensor]:
    """Herding (Welling, ICML 2009): one image after the other, each the one that brings the mean of those chosen so
    far nearest the mean of the class, in the network's embedding."""
    found = []
    for c, k in zip(context.classes, counts, strict=True):
        x = widened(context.embedded(c))
        mean, total, free = x.mean(0), torch.zeros_like(x[0]), x.new_zeros(len(x))
        picks = []
        for chosen in range(1, k + 1):
            picks.append((((total + x) / chosen - mean).square().sum(1) + free).argmin())
            total = total + x[picks[-1]]
            free[picks[-1]] = torch.inf
        found.append(torch.stack(picks))
    return found


# A strategy names images of each of the context's classes by their position within it, as many as counts says.
STRATEGIES: dict[str, Callable[[Context, Sequence[int]], list[Tensor]]] = {
    "kmeans": kmeans_images,
    "random": random_images,
    "central": central_images,
    "boundary": boundary_images,
    "herding": herded_images,
}


def widened(x: Tensor) -> Tensor:
    """bfloat16 as float32, in which sums and distances keep their meaning; float64 as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@torch.no_grad()
def embed(net: Network, images: Tensor, prepare: Callable[[Tensor], Tensor], compute: Compute) -> Tensor:
    """Images (N, C, H, W) as they lie on the device -> (N, D) embeddings, piece by piece.

    In evaluation mode: with batch norm an image's embedding must not depend on its neighbours in a piece. (Running
    statistics come from the network updates alone, so before the first update batch norm does not normalise.)
    """
    training = net.training
    net.eval()
    pieces = images.split(max(512, compute.images_at_once(images.shape[-1])))
    found = compute.retry(lambda: torch.cat([derivatives.embed(net, prepare(piece), compute) for piece in pieces]))
    net.train(training)
    return found


# --- Clustering: points (N, D) of several classes, k representatives of each, all k < N ------------------------------


def batched_kmeans(
    x: Sequence[Tensor], k: int, draws: Sequence[Draws], each: int = 1, *, iterations: int = KMEANS_ITERATIONS
) -> list[Tensor]:
    """Row numbers of k different points of every class: of k / each clusters those nearest the centroid.

    draws: of every class.

    Lloyd's algorithm from k random points, for all classes at once, so many iterations and no wait for a GPU in them.
    Clusters that run empty move to the points farthest from their own centroid.
    """
    points, real = padded(x)
    chance, _ = padded([d.uniform(len(own)) for d, own in zip(draws, x, strict=True)])
    _, nearest, distance = lloyd(points, real, k // each, chance, iterations=iterations)
    return list(representatives(real, nearest, distance, k // each, each))


def lloyd(
    points: Tensor, real: Tensor, k: int, chance: Tensor, *, iterations: int = KMEANS_ITERATIONS
) -> tuple[Tensor, Tensor, Tensor]:
    """Centroids (classes, k, D), and of every point the number of its own and the squared distance to it.

    chance: (classes, N) random numbers, which say where to start.
    """
    start = chance.masked_fill(~real, torch.inf).topk(k, largest=False).indices  # different points of each class
    centroids = points[torch.arange(len(points), device=points.device)[:, None], start]
    squares = widened(points).square().sum(2)  # products of bfloat16, distances in float32
    for _ in range(iterations):
        before, (nearest, distance) = centroids, assign(points, squares, real, centroids)
        centroids = update_centroids(points, real, nearest, distance, k)
        if points.device.type == "cpu" and torch.equal(centroids, before):  # a GPU would have to be waited for
            break
    return centroids, *assign(widened(points), squares, real, widened(centroids))


def sklearn_kmeans(x: Sequence[Tensor], k: int, draws: Sequence[Draws], each: int = 1) -> list[Tensor]:
    """The same by scikit-learn's KMeans to convergence, from k-means++: the reference, on the CPU, class by class."""
    from sklearn.cluster import KMeans

    found = []
    for points, d in zip(x, draws, strict=True):
        fitted = KMeans(k // each, n_init=1, random_state=d.host.getrandbits(31)).fit(points.float().cpu().numpy())
        centroids = torch.from_numpy(fitted.cluster_centers_).to(points.device, torch.float32)
        one, real = padded([points.float()])
        nearest, distance = assign(one, one.square().sum(2), real, centroids[None])
        found.append(representatives(real, nearest, distance, k // each, each)[0])
    return found


KMEANS: dict[str, Callable[[Sequence[Tensor], int, Sequence[Draws], int], list[Tensor]]] = {
    "batched": batched_kmeans,
    "sklearn": sklearn_kmeans,
}


def padded(x: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Classes of different sizes as one tensor (classes, N, ...), and which rows are real, (classes, N)."""
    longest = max(map(len, x))
    sizes = torch.tensor([len(points) for points in x]).to(x[0].device, non_blocking=True)
    return torch.nn.utils.rnn.pad_sequence(list(x), batch_first=True), torch.arange(
        longest, device=x[0].device
    ) < sizes[:, None]


def assign(points: Tensor, squares: Tensor, real: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Number of the nearest centroid of every point, and the squared distance to it, both (classes, N).

    squares: |point|^2, (classes, N). A row that is padding has distance -inf.
    """
    norms = centroids.to(squares.dtype).square().sum(2)[:, None]
    value, nearest = (norms - 2 * (points @ centroids.mT)).min(2)  # |c|^2 - 2 x.c
    return nearest, (value + squares).clamp_(min=0).masked_fill_(~real, -torch.inf)


def update_centroids(points: Tensor, real: Tensor, nearest: Tensor, distance: Tensor, k: int) -> Tensor:
    """Means of the clusters, (classes, k, D); the j-th empty cluster of a class moves to its j-th farthest point."""
    member = torch.zeros(len(points), k, points.shape[1], dtype=points.dtype, device=points.device)
    member.scatter_(1, nearest[:, None], real[:, None].to(points.dtype))  # (classes, k, N), a one per real point
    sizes = member.sum(2, keepdim=True, dtype=distance.dtype)
    means = ((member @ points) / sizes.clamp(min=1)).to(points.dtype)
    empty = sizes[:, :, 0] == 0
    turn = (empty.cumsum(1) - 1).clamp(min=0)
    farthest = distance.topk(k, dim=1).indices.gather(1, turn)  # for each cluster, were it empty
    spare = points[torch.arange(len(points), device=points.device)[:, None], farthest]
    return torch.where(empty[:, :, None], spare, means)


def representatives(real: Tensor, nearest: Tensor, distance: Tensor, k: int, each: int = 1) -> Tensor:
    """The nearest members of every cluster, (classes, k * each), the first ones on ties; all different.

    Taking members keeps an image from standing for two centroids. Where a cluster has too few (duplicate images), the
    farthest points take their places that nobody else has taken.
    """
    classes, n = distance.shape
    closest = distance.masked_fill(~real, torch.inf).argsort(dim=1, stable=True)
    cluster, order = nearest.masked_fill(~real, k).gather(1, closest).sort(dim=1, stable=True)
    rows = closest.gather(1, order)  # cluster after cluster, the nearest first
    rank = torch.arange(n, device=distance.device) - torch.searchsorted(cluster, cluster)
    place = torch.where((rank < each) & (cluster < k), cluster * each + rank, k * each)
    picks = rows.new_full((classes, k * each + 1), n).scatter_(1, place, rows)[:, :-1]  # the last: of all others

    taken = torch.zeros(classes, n + 1, dtype=torch.bool, device=distance.device).scatter_(1, picks, True)[:, :n]
    spare = distance.masked_fill(taken | ~real, -torch.inf).topk(k * each, dim=1).indices
    empty = picks == n
    return torch.where(empty, spare.gather(1, (empty.cumsum(1) - 1).clamp(min=0)), picks)
