"""The method in its published form, class by class, autograd for everything: what bench.py compares with.

The same arithmetic as the oracle's, on whole batches: one torch.optim.SGD over all pixels stepped after every class, a
graph over each class's gradients, a class embedded at once, k-means to convergence with a look at it per iteration.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from models import Network
from tests.oracle import class_distance
from utils.augment import Augment
from utils.formation import decode
from utils.images import ImageSet
from utils.runtime import Draws


def matching(
    net: Network, pixels: Tensor, sgd: torch.optim.Optimizer, real: ImageSet, picks: Tensor, factor: int, metric: str
) -> None:
    """One matching update of every class in turn. pixels: a leaf, (classes, ipc, C, H, W)."""
    augment, draws = Augment("color_crop_cutout"), Draws(pixels.device, "published")
    for c in range(len(pixels)):
        u = augment.draw_shared(1, draws)
        syn = augment(real.normalize(decode(pixels[c], factor=factor)), u)
        wanted = augment(real.normalize(real.images[picks[c]]), u)
        sgd.zero_grad()
        class_distance(net, wanted, syn, c, metric, "grad").backward()
        sgd.step()


def epoch(net: Network, sgd: torch.optim.Optimizer, train: ImageSet, n: int, batch_size: int, names: str) -> None:
    """One pass over n images, augmented, CutMix in half of the batches, decided by the host."""
    augment, draws = Augment(names), Draws(train.device, "epoch")
    net.train()
    for index in draws.permutation(len(train))[:n].split(batch_size):
        x, y = train.batch(index)
        x = augment(x, augment.draw(1, len(x), draws))
        if draws.host.random() < 0.5:
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
