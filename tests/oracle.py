"""The published method in its most naive form: loops over classes, images and layers, one optimiser step per class.

Slow and obviously right; the fast parts are tested against it in float64.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import Network
from utils.method.augment import GEOMETRIC, Augment
from utils.method.images import ImageSet, Normalize
from utils.method.objectives import METRICS
from utils.method.training import Recipe, plan, train_networks
from utils.system.draws import Draws


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


def decode_naively(stored: Tensor, factor: int, decode_type: str) -> Tensor:
    """(ipc, C, H, W) -> (S, C, H, W) by every decode type, one stored image and one factor at a time."""
    if decode_type == "single":
        return decode_single(stored, factor)
    if decode_type == "multi":
        return torch.cat([decode_single(stored[[i]], f) for f in range(factor, 0, -1) for i in range(len(stored))])
    found: list[Tensor] = []
    for i in range(len(stored)):  # bound: the largest factor that leaves room for one image of each that follows
        done, follow = sum(map(len, found)), len(stored) - i - 1
        while factor > 1 and done + factor**2 + follow > 128:
            factor -= 1
        found.append(decode_single(stored[[i]], factor))
    return torch.cat(found)


def augment_one(x: Tensor, u: Tensor, augment: Augment) -> Tensor:
    """One image (C, H, W) under one draw, operation by operation, pixel by pixel where it can be."""
    channels, height, width = x.shape
    flip, bright, saturate, contrast, move_y, move_x, cut_y, cut_x, pick = u[:9].tolist()
    names, geometries = augment.names, augment.geometries
    if augment.one:
        known = [name for name in ("color", "flip", "cutout", *GEOMETRIC) if name in names]
        names = (known[math.floor(pick * len(known))],)
        geometries, pick = [name for name in names if name in GEOMETRIC], 0
    geometry = geometries[math.floor(pick * len(geometries))] if geometries else None
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


def augment_shared(x: Tensor, u: Tensor, augment: Augment) -> Tensor:
    """A batch under one draw."""
    return torch.stack([augment_one(image, u, augment) for image in x])


def layer_distance(metric: str, real: Tensor, syn: Tensor) -> Tensor:
    """The metrics, written out; one that is not known here stands for itself."""
    if metric == "mse":
        return ((real - syn) ** 2).sum()
    if metric == "l1":
        return (real - syn).abs().sum()
    if metric == "l1_mean":
        rows = zip(real, syn, strict=True) if real.dim() > 1 else [(real, syn)]
        return torch.stack([(a - b).abs().sum() / a.numel() for a, b in rows]).sum()
    if metric != "cos":
        return METRICS[metric](real, syn)
    total = real.new_zeros(())
    channels = len(real) if real.dim() > 1 else 1
    for a, b in zip(real.reshape(channels, -1), syn.reshape(channels, -1), strict=True):
        total = total + 1 - (a @ b) / (a.norm().clamp(min=1e-6) * b.norm().clamp(min=1e-6))
    return total


def matched(net: Network, *, bias: bool, fc: bool) -> list[Tensor]:
    """Layer by layer: a convolution's weight; with `bias` all other parameters of a block; the classifier's alike."""
    found: list[Tensor] = []
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d) or (fc and isinstance(layer, nn.Linear)):
            found += [layer.weight] + ([layer.bias] if bias and layer.bias is not None else [])
        elif bias and isinstance(layer, (nn.GroupNorm, nn.BatchNorm2d)):
            found += [layer.weight, layer.bias]
    return found


def class_distance(
    net: Network,
    real: Tensor,
    syn: Tensor,
    label: int,
    metric: str,
    match: str,
    *,
    bias: bool = False,
    fc: bool = False,
    frequencies: Tensor | None = None,
) -> Tensor:
    """Distance of one class, by plain backward passes with a graph over everything. frequencies: (M, D), of cf."""
    if "+" in match:
        more: dict[str, Any] = dict(bias=bias, fc=fc, frequencies=frequencies)
        found = [class_distance(net, real, syn, label, metric, m, **more) for m in match.split("+")]
        return sum(found, real.new_zeros(()))
    if match == "cf":
        assert frequencies is not None
        return characteristic_distance(net.embed(real).detach(), net.embed(syn), frequencies)
    if match == "ce":
        return -sum((scores[label] - scores.logsumexp(0) for scores in net(syn)), real.new_zeros(())) / len(syn)
    if match == "embed":
        mean_real, mean_syn = (sum(net.embed(x), real.new_zeros(())) / len(x) for x in (real, syn))
        return layer_distance(metric, mean_real.detach(), mean_syn)
    if match in ("feat", "blocks"):
        pairs = [(a.mean(0), b.mean(0)) for a, b in zip(net.features(real), net.features(syn), strict=True)]
        pairs = pairs if match == "blocks" else pairs[-1:]
        return sum((layer_distance(metric, a.detach(), b) for a, b in pairs), real.new_zeros(()))
    weights = matched(net, bias=bias, fc=fc)
    target = torch.tensor([label], device=real.device)
    loss_real = F.cross_entropy(net(real), target.expand(len(real)))
    loss_syn = F.cross_entropy(net(syn), target.expand(len(syn)))
    wanted = [g.detach() for g in torch.autograd.grad(loss_real, weights)]
    given = torch.autograd.grad(loss_syn, weights, create_graph=True)
    return sum((layer_distance(metric, a, b) for a, b in zip(wanted, given, strict=True)), real.new_zeros(()))


def characteristic_distance(real: Tensor, syn: Tensor, frequencies: Tensor) -> Tensor:
    """Mean modulus of the difference between characteristic functions, frequency by frequency, image by image.

    real: (B, D), syn: (S, D), frequencies: (M, D). Embeddings are centred and scaled by the real ones.
    """
    nothing = real.new_zeros(())
    centre = sum(real, nothing) / len(real)
    spread = (sum(((x - centre) @ (x - centre) for x in real), nothing) / len(real)).sqrt()
    found = nothing
    for t in frequencies:
        wanted, given = (
            sum((torch.exp(1j * (t @ ((x - centre) / spread))) for x in images), nothing) / len(images)
            for images in (real, syn)
        )
        found = found + (wanted - given).abs()
    return found / len(frequencies)


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
        shared: Tensor,
        chosen: Tensor | None = None,
        *,
        factor: int,
        decode_type: str = "single",
        augment: Augment,
        metric: str,
        match: str,
        bias: bool = False,
        fc: bool = False,
        normalize: Normalize,
    ) -> list[float]:
        """Every class in turn. shared: (classes, COLUMNS), the draws. chosen: which decoded images take part; else all.

        Returns the distances.
        """
        distances = []
        for c in range(len(self.pixels)):
            decoded = decode_naively(self.pixels[c], factor, decode_type)
            if chosen is not None:
                decoded = torch.stack([decoded[i] for i in chosen[c].tolist()])
            syn = augment_shared(normalize(decoded), shared[c], augment)
            wanted = augment_shared(normalize(real.images[picks[c]]), shared[c], augment)
            loss = class_distance(net, wanted, syn, c, metric, match, bias=bias, fc=fc)
            self.pixels.grad = torch.autograd.grad(loss, self.pixels)[0]  # zero for the other classes
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


def naive_epoch(
    net: Network, velocity: dict[str, Tensor], train: ImageSet, index: Tensor, recipe: Recipe, draws: Draws
) -> None:
    """One pass over the images at `index`: image by image, SGD written out. Only the random numbers are a Plan's."""
    edges = [(i, min(i + recipe.batch_size, len(index))) for i in range(0, len(index), recipe.batch_size)]
    if len(edges) > 1 and edges[-1][1] - edges[-1][0] == 1 < recipe.batch_size:
        edges = [*edges[:-2], (edges[-2][0], edges[-1][1])]
    drawn = plan(index, edges, draws)
    for (start, end), numbers in zip(edges, drawn.mix.tolist(), strict=True):
        geometry = drawn.u[start, 8]
        x, y = [], []
        for n in range(start, end):
            position, u = int(drawn.order[n]), torch.cat([drawn.u[n, :8], geometry[None]])
            image = train.normalize(train.images[[position]])[0]
            x.append(augment_one(image, u, recipe.augment))
            y.append(int(train.labels[position]))
        partner, kept = list(range(len(x))), 1.0
        apply, size, centre_y, centre_x = numbers
        if recipe.mixup == "cut" and apply < 0.5:
            side = x[0].shape[1]
            length = int(side * math.sqrt(1 - size)) // 2
            row, column = int(side * centre_y), int(side * centre_x)
            partner = drawn.partner[start:end].tolist()
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


def trained_networks(*arguments: Any) -> list[Network]:
    """Networks at the end of `train_networks`, with its arguments."""
    *_, (_, trainer) = train_networks(*arguments)
    return trainer.nets
