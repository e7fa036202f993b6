"""The published method in its most naive form: loops over classes, images and layers, one optimiser step per class.

Slow and obviously right; the fast parts are tested against it in float64.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import Network
from utils.augment import Draw
from utils.images import ImageSet, Normalize
from utils.runtime import Draws
from utils.training import Recipe


def decode_single(stored: Tensor, factor: int) -> Tensor:
    """(ipc, C, H, W) -> (ipc * factor^2, C, H, W), a crop and a resize at a time."""
    side = stored.shape[-1]
    found = []
    for image in stored:
        for i in range(factor):
            for j in range(factor):
                top, bottom = i * side // factor, (i + 1) * side // factor
                left, right = j * side // factor, (j + 1) * side // factor
                cell = image[None, :, top:bottom, left:right]
                found.append(F.interpolate(cell, size=(side, side), mode="bilinear", align_corners=False)[0])
    return torch.stack(found)


def augment_one(x: Tensor, u: Tensor, names: tuple[str, ...], geometry: str | None) -> Tensor:
    """One image (C, H, W) under one draw of eight numbers, operation by operation, pixel by pixel where it can be."""
    channels, height, width = x.shape
    flip, bright, saturate, contrast, move_y, move_x, cut_y, cut_x = (float(v) for v in u)
    if "color" in names:
        x = x + (bright - 0.5) * 1.0
        grey = sum(x[c] for c in range(channels)) / channels
        x = torch.stack([(x[c] - grey) * (saturate * 2.0) + grey for c in range(channels)])
        x = (x - x.mean()) * (contrast + 0.5) + x.mean()
    if "flip" in names and flip < 0.5:
        x = torch.stack([x[:, :, width - 1 - j] for j in range(width)], 2)
    if geometry == "crop":
        reach = round(0.125 * height)
        dy, dx = math.floor(move_y * (2 * reach + 1)) - reach, math.floor(move_x * (2 * reach + 1)) - reach
        rows = []
        for i in range(height):
            row = []
            for j in range(width):
                inside = 0 <= i + dy < height and 0 <= j + dx < width
                row.append(x[:, i + dy, j + dx] if inside else torch.zeros(channels, dtype=x.dtype))
            rows.append(torch.stack(row, 1))
        x = torch.stack(rows, 1)
    elif geometry is not None:
        if geometry == "scale":
            low, high = 1 / 1.2, 1.2
            matrix = [[low + (high - low) * move_x, 0, 0], [0, low + (high - low) * move_y, 0]]
        elif geometry == "rotate":
            angle = math.radians(15) * (2 * move_x - 1)
            matrix = [[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0]]
        else:
            matrix = [[1, 0, (2 * move_x - 1) * 0.25], [0, 1, (2 * move_y - 1) * 0.25]]
        grid = F.affine_grid(torch.tensor([matrix], dtype=x.dtype), [1, channels, height, width], align_corners=False)
        x = F.grid_sample(x[None], grid, align_corners=False)[0]
    if "cutout" in names:
        length = round(0.5 * height)
        top, left = math.floor(cut_y * height) - length // 2, math.floor(cut_x * width) - length // 2
        mask = torch.ones(height, width, dtype=x.dtype)
        mask[max(top, 0) : max(top + length, 0), max(left, 0) : max(left + length, 0)] = 0
        x = x * mask
    return x


def augment_shared(x: Tensor, draw: Draw, names: tuple[str, ...]) -> Tensor:
    """A batch under one draw."""
    return torch.stack([augment_one(image, draw.u[0], names, draw.geometry) for image in x])


def layer_distance(metric: str, real: Tensor, syn: Tensor) -> Tensor:
    """The metrics, written out."""
    if metric == "mse":
        return ((real - syn) ** 2).sum()
    if metric == "l1":
        return (real - syn).abs().sum()
    if metric == "l1_mean":
        return (real - syn).abs().sum() / real.numel()
    total = real.new_zeros(())
    for a, b in zip(real.reshape(len(real), -1), syn.reshape(len(syn), -1), strict=True):
        total = total + 1 - (a @ b) / (a.norm().clamp(min=1e-6) * b.norm().clamp(min=1e-6))
    return total


def conv_weights(net: Network) -> list[nn.Parameter]:
    return [p for name, p in net.named_parameters() if p.dim() == 4]


def class_distance(net: Network, real: Tensor, syn: Tensor, label: int, metric: str, match: str) -> Tensor:
    """Distance of one class, by plain backward passes with a graph over everything."""
    if match == "feat":
        pairs = [(a.mean(0), b.mean(0)) for a, b in zip(net.features(real), net.features(syn), strict=True)]
        return sum((layer_distance(metric, a.detach(), b) for a, b in pairs), real.new_zeros(()))
    weights = conv_weights(net)
    target = torch.tensor([label])
    loss_real = F.cross_entropy(net(real), target.expand(len(real)))
    loss_syn = F.cross_entropy(net(syn), target.expand(len(syn)))
    wanted = [g.detach() for g in torch.autograd.grad(loss_real, weights)]
    given = torch.autograd.grad(loss_syn, weights, create_graph=True)
    return sum((layer_distance(metric, a, b) for a, b in zip(wanted, given, strict=True)), real.new_zeros(()))


class PublishedPixels:
    """One torch.optim.SGD over all classes' pixels, stepped after every class, as the published loop does."""

    def __init__(self, pixels: Tensor, lr: float, momentum: float) -> None:
        self.pixels = pixels.clone().requires_grad_()
        self.sgd = torch.optim.SGD([self.pixels], lr=lr, momentum=momentum)

    def inner_step(
        self,
        net: Network,
        real: ImageSet,
        picks: Tensor,
        draws: list[Draw],
        *,
        factor: int,
        names: tuple[str, ...],
        metric: str,
        match: str,
        normalize: Normalize,
    ) -> list[float]:
        """Every class in turn. Returns the distances."""
        distances = []
        for c in range(len(self.pixels)):
            syn = augment_shared(normalize(decode_single(self.pixels[c], factor)), draws[c], names)
            wanted = augment_shared(normalize(real.images[picks[c]]), draws[c], names)
            loss = class_distance(net, wanted, syn, c, metric, match)
            self.sgd.zero_grad(set_to_none=False)
            loss.backward()  # fills the other classes' gradients with zeros
            self.sgd.step()
            distances.append(loss.item())
        return distances


def lloyd(x: Tensor, centroids: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """k-means by loops: (nearest centroid of every point, centroids). Clusters must not run empty."""
    for _ in range(iterations):
        nearest = torch.tensor([min(range(len(centroids)), key=lambda j: float((p - centroids[j]).norm())) for p in x])
        centroids = torch.stack([x[nearest == j].mean(0) for j in range(len(centroids))])
    nearest = torch.tensor([min(range(len(centroids)), key=lambda j: float((p - centroids[j]).norm())) for p in x])
    return nearest, centroids


def naive_epoch(net: Network, velocity: dict[str, Tensor], train: ImageSet, recipe: Recipe, draws: Draws) -> None:
    """One pass over a set: an image at a time, SGD written out. Draws in the order in which the fast form does."""
    order = draws.permutation(len(train)).tolist()
    size = recipe.batch_size
    for batch in [order[i : i + size] for i in range(0, len(order), size)]:
        draw = recipe.augment.draw(len(batch), draws)
        x = [
            augment_one(train.normalize(train.images[[i]])[0], u, recipe.augment.names, draw.geometry)
            for i, u in zip(batch, draw.u, strict=True)
        ]
        y = [int(train.labels[i]) for i in batch]
        partner, kept = list(range(len(batch))), 1.0
        if recipe.mixup == "cut" and draws.host.random() < 0.5:
            side = x[0].shape[1]
            length = int(side * math.sqrt(1 - draws.host.random())) // 2
            row, column = draws.host.randrange(side), draws.host.randrange(side)
            partner = draws.permutation(len(batch)).tolist()
            whole = [image.clone() for image in x]
            inside = [
                (i, j)
                for i in range(side)
                for j in range(side)
                if row - length <= i < row + length and column - length <= j < column + length
            ]
            for n, other in enumerate(partner):
                for i, j in inside:
                    x[n][:, i, j] = whole[other][:, i, j]
            kept = 1 - len(inside) / side**2
        losses = []
        for n, image in enumerate(x):
            scores = net(image[None])[0].log_softmax(0)
            losses.append(-kept * scores[y[n]] - (1 - kept) * scores[y[partner[n]]])
        loss = torch.stack(losses).mean()
        grads = torch.autograd.grad(loss, list(net.parameters()))
        with torch.no_grad():
            for (name, p), g in zip(net.named_parameters(), grads, strict=True):
                step = g + recipe.weight_decay * p
                velocity[name] = recipe.momentum * velocity[name] + step if name in velocity else step
                p.sub_(recipe.lr * velocity[name])
