"""Selection of the real images that synthetic ones are matched against: DREAM's representatives (Sec. 3.3), and others.

The others are for comparison: random images, central images, images at the decision boundary, herding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from torch import Tensor

from models import Network
from utils.method.formation import pack
from utils.method.images import ImageSet, to_unit
from utils.numerics import derivatives
from utils.numerics.compute import Captured, Compute
from utils.system.draws import Draws

KMEANS_ITERATIONS = 15  # inertia within 1 % of scikit-learn's at a third of the iterations to convergence
EMBEDDING_BYTES = 2**28  # embeddings of the classes that are embedded, and then clustered, together


@dataclass(frozen=True)
class Clusters:
    """The clusters of a network's embeddings, kept for many selections: the cluster of every image of a class, (N,)."""

    draws: Draws  # from which they follow, whenever they are found
    of_class: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Context:
    """Input of a selection strategy, whose random numbers all come from `draws`."""

    net: Network
    real: ImageSet
    draws: Draws
    compute: Compute
    raw: bool = False  # embed un-normalised images, as the published code does
    kmeans: str = "batched"
    per_cluster: int = 1  # representatives of every cluster, those nearest its centroid
    captured: Captured | None = field(default=None, kw_only=True)  # `cluster`, kept by a run that selects repeatedly
    clusters: Clusters | None = field(default=None, kw_only=True)  # of `member_images`, found once for many selections
    embeddings: dict[int, Tensor] = field(default_factory=dict, init=False)  # of one group of classes at a time

    @cached_property
    def groups(self) -> list[list[int]]:
        """The classes that are held, in groups that are embedded together: as many as EMBEDDING_BYTES hold.

        A GPU embeds a group as one sequence of images, in pieces of one shape. A CPU embeds class by class.
        """
        image = self.net.classifier.in_features * self.compute.dtype(torch.get_default_dtype()).itemsize
        room = EMBEDDING_BYTES // image if self.compute.classes_together else 0  # in images
        groups: list[list[int]] = []
        for c in self.real.held:
            if groups and sum(self.real.counts[each] for each in (*groups[-1], c)) <= room:
                groups[-1].append(c)
            else:
                groups.append([c])
        return groups

    def embedded(self, c: int) -> Tensor:
        """Embeddings of all images of class c, (counts[c], D), in the precision of `compute`.

        They are computed with those of the other classes of its group, and kept until another group is asked for.
        """
        if c not in self.embeddings:
            self.embeddings.clear()
            (group,) = (group for group in self.groups if c in group)
            counts = [self.real.counts[each] for each in group]
            images = self.real.images[self.real.starts[group[0]] :][: sum(counts)]  # grouped by class
            prepare = to_unit if self.raw else self.real.normalize
            self.embeddings.update(
                zip(group, embed(self.net, images, prepare, self.compute).split(counts), strict=True)
            )
        return self.embeddings[c]


def select(context: Context, count: int, *, strategy: str) -> Tensor:
    """Positions in the real set of `count` selected images per class, (classes, count) int64.

    They are all different if the class has so many images; a smaller class gives all its images, in turn, until there
    are enough. The selection in a class does not depend on other classes, except by rounding on a GPU.
    """
    real = context.real
    selected = STRATEGIES[strategy](context, [min(count, real.counts[c]) for c in context.real.held])
    context.embeddings.clear()  # whoever keeps the context does not keep a quarter of a gigabyte
    positions = []
    for c, within in zip(real.held, selected, strict=True):
        available = real.counts[c]
        wanted = min(count, available)
        if within.shape != (wanted,):  # values are not looked at, since that would stall a GPU
            raise ValueError(f"--select {strategy}: {wanted} positions in class {c} wanted, got {tuple(within.shape)}")
        if available < count:  # which images are repeated is random
            within = within[context.draws.of_class(c).permutation(available)]
            within = within[torch.arange(count, device=real.device) % available]
        positions.append(real.starts[c] + within)
    return torch.stack(positions)


def repeats(asked: str, count: int, counts: Sequence[int], names: Sequence[str], what: str) -> list[str]:
    """A warning if some class has fewer real images than the `count` that is asked for; empty if none has.

    asked: what the count is; what: what follows. counts, names: images and name of every class.
    """
    smallest, few = min(counts), sum(n < count for n in counts)
    if not few:
        return []
    others = f", {few - 1} of the others fewer than that" if few > 1 else ""
    return [f"{asked} is {count}, class {names[counts.index(smallest)]} has {smallest} images{others}: {what}"]


def kmeans_images(context: Context, counts: Sequence[int]) -> list[Tensor]:
    """Representatives of every class: the image nearest each k-means centroid of ALL its images (Sec. 3.3).

    The network's embeddings are clustered, into as many clusters as images are selected. With `per_cluster` = m there
    are m times fewer clusters, and the m images nearest each centroid are selected (DREAM+, Liu et al., 2023).
    """
    real, wanted = context.real, dict(zip(context.real.held, counts, strict=True))
    kmeans = KMEANS[context.kmeans]
    if context.captured and len(context.groups) == 1:  # graphs of many groups would take too much memory for good
        kmeans = partial(batched_kmeans, cluster=context.captured)
    picks = {c: torch.arange(k, device=real.device) for c, k in wanted.items() if k == real.counts[c]}
    for group in context.groups:
        if todo := [c for c in group if c not in picks]:
            x, draws = [context.embedded(c) for c in todo], [context.draws.of_class(c) for c in todo]
            picks.update(zip(todo, kmeans(x, wanted[todo[0]], draws, context.per_cluster), strict=True))
    return [picks[c] for c in context.real.held]


def member_images(context: Context, counts: Sequence[int]) -> list[Tensor]:
    """A random member of every k-means cluster: a stratified draw from the whole class, other images each time.

    Clusters are found where the context has none of a class yet; from then on images are neither embedded nor clustered
    again.
    """
    real, wanted = context.real, dict(zip(context.real.held, counts, strict=True))
    clusters = context.clusters or Clusters(Draws(context.draws.device, *context.draws.key, "clusters"))
    picks = {c: torch.arange(k, device=real.device) for c, k in wanted.items() if k == real.counts[c]}
    for group in context.groups:
        if not (todo := [c for c in group if c not in picks]):
            continue
        k = wanted[todo[0]]
        if missing := [c for c in todo if c not in clusters.of_class]:
            points, is_real = padded([context.embedded(c) for c in missing])
            chance, _ = padded([clusters.draws.of_class(c).uniform(real.counts[c]) for c in missing])
            _, nearest, _ = lloyd(points, is_real, k, chance)
            for c, row in zip(missing, nearest, strict=True):
                clusters.of_class[c] = row[: real.counts[c]].clone()
        keys, is_real = padded([context.draws.of_class(c).uniform(real.counts[c]) for c in todo])
        nearest, _ = padded([clusters.of_class[c] for c in todo])
        # With random numbers in place of distances, the member nearest a centroid is a random one.
        picks.update(zip(todo, representatives(is_real, nearest, keys, k), strict=True))
    return [picks[c] for c in context.real.held]


def class_by_class(
    choose: Callable[[Context, int, int], Tensor], context: Context, counts: Sequence[int]
) -> list[Tensor]:
    """Images that `choose(context, c, k)` chooses in every class by itself, k of class c."""
    return [choose(context, c, k) for c, k in zip(context.real.held, counts, strict=True)]


def random_images(context: Context, c: int, k: int) -> Tensor:
    """Random images of a class, drawn without replacement."""
    return context.draws.of_class(c).permutation(context.real.counts[c])[:k]


def central_images(context: Context, c: int, k: int) -> Tensor:
    """Images nearest the mean of their class in the network's embedding: typical, and much alike."""
    x = widened(context.embedded(c))
    return (x - x.mean(0)).square().sum(1).topk(k, largest=False).indices


def boundary_images(context: Context, c: int, k: int) -> Tensor:
    """Images with the smallest margin to another class under the network as it is now, rightly classified or not.

    The margin is the distance between the logit of the image's own class and the highest other logit.
    """
    with torch.no_grad():
        logits = context.net.classifier(widened(context.embedded(c)))
    own = logits[:, c].clone()
    logits[:, c] = -torch.inf
    return (own - logits.amax(1)).abs().topk(k, largest=False).indices


def herded_images(context: Context, c: int, k: int) -> Tensor:
    """Herded images of a class (Welling, ICML 2009): a greedy choice whose mean is near the mean of the class.

    One image is chosen after the other: each brings the mean of all chosen so far as near to the mean of the class as
    an image can, in the network's embedding.
    """
    x = widened(context.embedded(c))
    mean, total, penalty = x.mean(0), torch.zeros_like(x[0]), x.new_zeros(len(x))
    herd = []
    for chosen in range(1, k + 1):
        # (1,): indexing by a single number would wait for the GPU
        herd.append((((total + x) / chosen - mean).square().sum(1) + penalty).argmin(0, keepdim=True))
        total = total + x[herd[-1]][0]
        penalty.index_fill_(0, herd[-1], torch.inf)  # so that no image is chosen twice
    return torch.cat(herd)


# A strategy takes how many images to select of each of the context's classes, and returns their positions within the
# class, one int64 tensor (counts[i],) per class. `class_by_class` makes one of a function that looks at one class.
# Random numbers for class c are those of context.draws.of_class(c), so that classes do not depend on each other.
STRATEGIES: dict[str, Callable[[Context, Sequence[int]], list[Tensor]]] = {
    "kmeans": kmeans_images,
    "members": member_images,
    "random": partial(class_by_class, random_images),
    "central": partial(class_by_class, central_images),
    "boundary": partial(class_by_class, boundary_images),
    "herding": partial(class_by_class, herded_images),
}


def widened(x: Tensor) -> Tensor:
    """Tensor in float32 if it is bfloat16, in which sums and distances would be too coarse; otherwise unchanged."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@torch.no_grad()
def embed(net: Network, images: Tensor, prepare: Callable[[Tensor], Tensor], compute: Compute) -> Tensor:
    """Embeddings (N, D) of images (N, C, H, W); prepare: normalises images, piece by piece.

    The network is in evaluation mode: with batch norm an image's embedding must not depend on the rest of its piece.
    (Running statistics come from the network updates alone, so before the first update batch norm does not normalise.)
    """
    training = net.training
    net.eval()
    embeddings = compute.retry(lambda: derivatives.embed(net, images, compute, prepare))
    net.train(training)
    return embeddings


# --- Sets of real images, selected by a strategy ----------------------------------------------------------------------

NOISES = ("noise", "normal")  # the other ways to begin, beside STRATEGIES
NOISE_MEAN, NOISE_STD = 0.5, 0.25
BASELINE = "random real"  # key of the draws of the random real images shown beside a set, in both scripts


def initial_pixels(context: Context, init: str, *, ipc: int, factor: int, mode: str = "area") -> Tensor:
    """Initial stored images, (classes, ipc, C, H, W) float in [0, 1] (Sec. 3.3, "clustering initialisation").

    init = one of STRATEGIES: ipc * factor^2 real images per class, selected by it and shrunk into the cells.
    init = noise: normal random numbers of mean 0.5 and standard deviation 0.25 (IDC, DREAM).
    init = normal: standard normal random numbers as normalised images (DC).
    mode: see `pack`. Random numbers are clamped to [0, 1].
    """
    real = context.real
    if init in NOISES:
        noise = torch.stack([context.draws.of_class(c).normal(ipc, *real.images.shape[1:]) for c in real.held])
        mean, std = (NOISE_MEAN, NOISE_STD) if init == "noise" else (real.normalize.mean, real.normalize.std)
        return (mean + std * noise).clamp_(0, 1)
    index = select(context, ipc * factor**2, strategy=init)
    return pack(to_unit(real.images[index]), factor=factor, mode=mode)


def coreset(
    context: Context, strategy: str, *, ipc: int, all_gather: Callable[[Tensor], Tensor] = lambda rows: rows
) -> ImageSet:
    """Baseline of `ipc` real images per class, selected by a strategy.

    all_gather: returns the rows of all classes on every rank, from each rank's rows of its own classes.
    """
    real = context.real
    images = all_gather(real.images[select(context, ipc, strategy=strategy)])
    labels = torch.arange(len(images), device=real.device).repeat_interleave(ipc)
    return ImageSet(images.flatten(0, 1), labels, classes=real.classes, normalize=real.normalize)


# --- Clustering: points (N, D) of several classes, k representatives of each, all k < N ------------------------------


def cluster(points: Tensor, real: Tensor, chance: Tensor, *, k: int, each: int) -> Tensor:
    """Representatives of every class, (classes, k * each): Lloyd's algorithm from random points; see `lloyd`."""
    _, nearest, distance = lloyd(points, real, k, chance)
    return representatives(real, nearest, distance, k, each)


def batched_kmeans(
    x: Sequence[Tensor],
    k: int,
    draws: Sequence[Draws],
    each: int = 1,
    *,
    cluster: Callable[..., Tensor] = cluster,
) -> list[Tensor]:
    """Representatives by Lloyd's algorithm for all classes at once: row numbers of k different points, (k,) per class.

    They are the `each` points nearest each centroid of k / each clusters. x: points (N, D) of every class; draws: of
    every class; cluster: the function of that name, or the same captured. Starts from random points and takes a fixed
    number of iterations, so that a GPU is never waited for. Clusters that run empty move to the points farthest from
    their own centroid.
    """
    points, real = padded(x)
    chance, _ = padded([d.uniform(len(own)) for d, own in zip(draws, x, strict=True)])
    return list(cluster(points, real, chance, k=k // each, each=each).clone())  # a graph's next call overwrites it


def lloyd(
    points: Tensor, real: Tensor, k: int, chance: Tensor, *, iterations: int = KMEANS_ITERATIONS
) -> tuple[Tensor, Tensor, Tensor]:
    """Lloyd's algorithm: centroids (classes, k, D), and every point's nearest one and squared distance, (classes, N).

    points: (classes, N, D). real: (classes, N) bool, False for padding. chance: (classes, N) random numbers; the k
    smallest say which points to start from.
    """
    start = chance.masked_fill(~real, torch.inf).topk(k, largest=False).indices  # different points of each class
    centroids = points[torch.arange(len(points), device=points.device)[:, None], start]
    squares = widened(points).square().sum(2)  # products of bfloat16, distances in float32
    for _ in range(iterations):
        previous, (nearest, distance) = centroids, assign(points, squares, real, centroids)
        centroids = update_centroids(points, real, nearest, distance, k)
        if points.device.type == "cpu" and torch.equal(centroids, previous):  # asking a GPU would stall it
            break
    return centroids, *assign(widened(points), squares, real, widened(centroids))


def sklearn_kmeans(x: Sequence[Tensor], k: int, draws: Sequence[Draws], each: int = 1) -> list[Tensor]:
    """Representatives by scikit-learn's KMeans: to convergence from k-means++, on the CPU, class by class.

    The reference for `batched_kmeans`, with the same arguments and results of the same form.
    """
    from sklearn.cluster import KMeans

    picks = []
    for points, d in zip(x, draws, strict=True):
        fitted = KMeans(k // each, n_init=1, random_state=d.host.getrandbits(31)).fit(points.float().cpu().numpy())
        centroids = torch.from_numpy(fitted.cluster_centers_).to(points.device, torch.float32)
        one, real = padded([points.float()])
        nearest, distance = assign(one, one.square().sum(2), real, centroids[None])
        picks.append(representatives(real, nearest, distance, k // each, each)[0])
    return picks


KMEANS: dict[str, Callable[[Sequence[Tensor], int, Sequence[Draws], int], list[Tensor]]] = {
    "batched": batched_kmeans,
    "sklearn": sklearn_kmeans,
}


def padded(x: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Classes of different sizes padded to one tensor (classes, N, ...), and which rows are real, (classes, N) bool."""
    sizes = torch.tensor([len(points) for points in x]).to(x[0].device, non_blocking=True)
    real = torch.arange(max(map(len, x)), device=x[0].device) < sizes[:, None]
    return torch.nn.utils.rnn.pad_sequence(list(x), batch_first=True), real


def assign(points: Tensor, squares: Tensor, real: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Number of every point's nearest centroid, and the squared distance to it, both (classes, N).

    squares: |point|^2, (classes, N). Padding has distance -inf.
    """
    norms = centroids.to(squares.dtype).square().sum(2)[:, None]
    value, nearest = (norms - 2 * (points @ centroids.mT)).min(2)  # |c|^2 - 2 x.c
    return nearest, (value + squares).clamp_(min=0).masked_fill_(~real, -torch.inf)


def update_centroids(points: Tensor, real: Tensor, nearest: Tensor, distance: Tensor, k: int) -> Tensor:
    """Means of the clusters, (classes, k, D); a class's j-th empty cluster moves to its j-th farthest point."""
    member = torch.zeros(len(points), k, points.shape[1], dtype=points.dtype, device=points.device)
    member.scatter_(1, nearest[:, None], real[:, None].to(points.dtype))  # (classes, k, N), a one per real point
    sizes = member.sum(2, keepdim=True, dtype=distance.dtype)
    means = ((member @ points) / sizes.clamp(min=1)).to(points.dtype)
    empty = sizes[:, :, 0] == 0
    turn = (empty.cumsum(1) - 1).clamp(min=0)
    farthest = distance.topk(k, dim=1).indices.gather(1, turn)  # where each cluster would move if it were empty
    spare = points[torch.arange(len(points), device=points.device)[:, None], farthest]
    return torch.where(empty[:, :, None], spare, means)


def representatives(real: Tensor, nearest: Tensor, distance: Tensor, k: int, each: int = 1) -> Tensor:
    """Row numbers of the `each` members nearest every cluster's centroid, (classes, k * each); all different.

    On ties the first rows win. Only members of a cluster stand for it, so that no image stands for two centroids. Where
    a cluster has too few members (duplicate images), the farthest points that are not taken yet fill up.
    """
    classes, n = distance.shape
    closest = distance.masked_fill(~real, torch.inf).argsort(dim=1, stable=True)
    cluster, order = nearest.masked_fill(~real, k).gather(1, closest).sort(dim=1, stable=True)
    rows = closest.gather(1, order)  # cluster after cluster, the nearest first
    rank = torch.arange(n, device=distance.device) - torch.searchsorted(cluster, cluster)
    place = torch.where((rank < each) & (cluster < k), cluster * each + rank, k * each)
    picks = rows.new_full((classes, k * each + 1), n).scatter_(1, place, rows)[:, :-1]  # last column: not picked

    taken = torch.zeros(classes, n + 1, dtype=torch.bool, device=distance.device).scatter_(1, picks, True)[:, :n]
    spare = distance.masked_fill(taken | ~real, -torch.inf).topk(k * each, dim=1).indices
    empty = picks == n
    return torch.where(empty, spare.gather(1, (empty.cumsum(1) - 1).clamp(min=0)), picks)
