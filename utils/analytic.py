"""Passes through a ConvNet whose derivatives of first and second order are written out (Sec. 3.1 without autograd).

Matching gradients needs the derivative of a distance between gradients, L(G_syn, G_real). With D = dL/dG_syn held
constant, dL/dpixels is the gradient of the directional derivative of the synthetic loss along D: one tangent pass
forward, and its adjoint backward. A layer costs 7 convolutions of the synthetic images and 3 of the real ones, the
minimum for an exact step. Matching mean embeddings needs first derivatives only, 2 convolutions of the synthetic images
and 1 of the real ones; next to gradients it costs none, as all that it needs is on the way.

No graph is kept, images pass in pieces that stay in cache, and every pass over a piece is a plain function of tensors,
which compiles. Images come as (K, n, C, H, W): K classes that meet one network, or K networks that train side by side.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import NamedTuple, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from models import ConvNet, Network
from utils.compilation import compiled, cpu_stages
from utils.device import Compute
from utils.objectives import Comparison, total
from utils.stages import Stages


def suits(net: Network) -> TypeGuard[ConvNet]:
    """Whether this network's derivatives are written out here: a ConvNet whose norm looks at one image at a time."""
    return isinstance(net, ConvNet) and all(isinstance(norm, nn.GroupNorm) for _, norm in net.layers)


def covers(how: Comparison) -> bool:
    """Whether the derivatives of this comparison are written out here: gradients of weights, and mean embeddings."""
    return {*how.parts} <= {"grad", "embed"} and not (how.bias and "grad" in how.parts)


# --- Parameters as the passes see them --------------------------------------------------------------------------------


class Block(NamedTuple):
    """One block of one network, K = 1, or of several."""

    weights: tuple[Tensor, ...]  # K times (out, in, 3, 3)
    biases: tuple[Tensor, ...]  # K times (out,)
    gamma: Tensor  # (K, out)
    beta: Tensor
    padding: tuple[int, int]
    groups: int
    eps: float


class Weights(NamedTuple):
    """A ConvNet, or K of one shape."""

    blocks: tuple[Block, ...]
    classifier: Tensor  # (K, classes, D)
    offset: Tensor  # (K, 1, classes)
    stages: Stages  # how a block's norm, ReLU and pooling are computed

    def of(self, rows: slice) -> Weights:
        """The networks that these rows of images meet: theirs, or the only one there is."""
        if len(self.classifier) == 1:
            return self
        blocks = tuple(
            b._replace(weights=b.weights[rows], biases=b.biases[rows], gamma=b.gamma[rows], beta=b.beta[rows])
            for b in self.blocks
        )
        return self._replace(blocks=blocks, classifier=self.classifier[rows], offset=self.offset[rows])


def weights_of(nets: Sequence[ConvNet], dtype: torch.dtype, stages: Stages) -> Weights:
    """The parameters of networks of one shape as they are now, in this precision and the fastest layout."""
    blocks = []
    for layers in zip(*(net.layers for net in nets), strict=True):
        convs, norms = zip(*layers, strict=True)
        conv, norm = layers[0]
        assert isinstance(norm, nn.GroupNorm)
        blocks.append(
            Block(
                weights=tuple(channels_last(c.weight.detach().to(dtype)) for c in convs),
                biases=tuple(c.bias.detach().to(dtype) for c in convs),
                gamma=torch.stack([n.weight.detach() for n in norms]),
                beta=torch.stack([n.bias.detach() for n in norms]),
                padding=(int(conv.padding[0]), int(conv.padding[1])),
                groups=norm.num_groups,
                eps=norm.eps,
            )
        )
    classifier = torch.stack([net.classifier.weight.detach() for net in nets])
    offset = torch.stack([net.classifier.bias.detach() for net in nets])
    return Weights(tuple(blocks), classifier.to(dtype), offset[:, None].to(dtype), stages)


# --- Passes over one piece of images, (k, n, ...), meeting one network or k -------------------------------------------


class Matched(NamedTuple):
    """What of a class's images is compared."""

    gradients: bool  # of the convolutions' weights
    classifier: bool  # the gradient of its weight as well
    embedding: bool  # the mean of the last features


class Directions(NamedTuple):
    """The slopes of k classes' distances with respect to what is compared; empty or None where something is not."""

    weights: list[tuple[Tensor, ...]]  # per block, k times (out, in, 3, 3)
    classifier: Tensor | None  # (k, classes, D)
    embedding: Tensor | None  # (k, 1, D), with respect to one image's features

    def of(self, rows: slice) -> Directions:
        """Those of these classes."""
        classifier, embedding = (d if d is None else d[rows] for d in (self.classifier, self.embedding))
        return Directions([layer[rows] for layer in self.weights], classifier, embedding)


class Trace(NamedTuple):
    """What `first_order` leaves of one block for `second_order`; N = k * n, see utils/stages.py."""

    h: Tensor  # the block's input
    a: Tensor
    m: Tensor
    r: Tensor
    dh: Tensor
    da: Tensor
    s0: Tensor
    s1: Tensor


class FirstOrder(NamedTuple):
    """What `first_order` leaves in all."""

    traces: list[Trace]
    last: Tensor  # the last features, (k, n, D)
    p: Tensor  # softmax, (k, n, classes)
    dz: Tensor  # the logits' gradient, like p


class Forward(NamedTuple):
    """What `forward` leaves for `backward`."""

    h: Tensor  # the last features, (N, C, H, W)
    outputs: list[tuple[Tensor, Tensor, Tensor]]  # a, m, r of every block


def features(net: Weights, x: Tensor) -> Tensor:
    """The last features, (k, n, D)."""
    return forward(net, x)[0].flatten(1).unflatten(0, x.shape[:2])


def effect(net: Weights, x: Tensor, target: Tensor, count: int, what: Matched) -> list[Tensor]:
    """What of the images is compared, summed over them and divided by `count`.

    Gradients of the cross-entropy with `target` (k, n or 1, classes): (k, out, in, 3, 3) per block, and (k, classes, D)
    of the classifier's weight; last features: (k, D).
    """
    return traced_effect(net, x, target, count, what, keep=False)[0]


def traced_effect(
    net: Weights, x: Tensor, target: Tensor, count: int, what: Matched, keep: bool = True
) -> tuple[list[Tensor], FirstOrder | Forward]:
    """The same, and what `pull_back` needs. Unless it is to be kept, the traces' a may be lost."""
    if not what.gradients:  # forward is enough
        h, _, outputs = forward(net, x)
        return [each(h.flatten(1), x).to(x.dtype).sum(1) / count], Forward(h, outputs)
    found, kept = first_order(net, x, target, count, keep)
    if what.classifier:
        found.append(kept.dz.to(kept.last.dtype).mT @ kept.last)
    if what.embedding:
        found.append(kept.last.to(x.dtype).sum(1) / count)
    return found, kept


def pull_back(net: Weights, kept: FirstOrder | Forward, along: Directions, count: int) -> Tensor:
    """Gradient of the effect's change along these directions with respect to the images, (k, n, C, H, W)."""
    return second_order(net, kept, along, count) if isinstance(kept, FirstOrder) else backward(net, kept, along)


def all_gradients(net: Weights, x: Tensor, target: Tensor, count: int) -> tuple[list[Tensor], ...]:
    """Gradients of the same with respect to all parameters, a list each, per block: weights, biases, gamma, beta; then,
    with the k networks in front as well, classifier and offset."""
    weights, (traces, last, _, dz) = first_order(net, x, target, count, keep=False)
    biases, gammas, betas = [], [], []
    for block, t in zip(net.blocks, traces, strict=True):
        pixels = t.a.shape[2] * t.a.shape[3]
        gammas.append(pixels * each(t.s1.flatten(1), x).sum(1))
        betas.append(pixels * each(t.s0.flatten(1), x).sum(1))
        instance = block.groups == t.a.shape[1]  # takes out whatever a bias adds
        biases.append(torch.zeros_like(betas[-1]) if instance else each(t.da.sum((2, 3)), x).sum(1))
    return weights, biases, gammas, betas, [dz.to(last.dtype).mT @ last], [dz.sum(1)]


def first_order(net: Weights, x: Tensor, target: Tensor, count: int, keep: bool) -> tuple[list[Tensor], FirstOrder]:
    """The gradients of the convolutions' weights, and what `second_order` needs. All as above."""
    h, inputs, outputs = forward(net, x)
    last = each(h.flatten(1), x)
    p = (last @ net.classifier.mT + net.offset).to(target.dtype).softmax(2)
    dz = (p - target) / count
    dh = unflattened(dz.to(last.dtype) @ net.classifier, h)
    gradients, traces = [], []
    for i in reversed(range(len(net.blocks))):
        block, h, (a, m, r) = net.blocks[i], inputs[i], outputs[i]
        da, s0, s1 = net.stages.backward(a, m, r, per_image(block.gamma, a), per_image(block.beta, a), dh, keep)
        gradients.append(
            torch.stack(
                [
                    conv2d_weight(inside, block.weights[0].shape, d, padding=block.padding)
                    for inside, d in zip(each(h, x), each(da, x), strict=True)
                ]
            )
        )
        traces.append(Trace(h, a, m, r, dh, da, s0, s1))
        if i:
            dh = transposed(da, block.weights, block.padding)
    return gradients[::-1], FirstOrder(traces[::-1], last, p, dz)


def second_order(net: Weights, kept: FirstOrder, along: Directions, count: int) -> Tensor:
    """Of the loss's derivative along the directions of the weights, and of the features' product with that of the
    embedding, the gradient with respect to the images, (k, n, C, H, W). All classes meet one network.
    """
    traces, last, p, dz = kept
    tangents = []
    h_dot: Tensor | None = None
    for block, t, direction in zip(net.blocks, traces, along.weights, strict=True):
        a_dot = conv(t.h, direction, block.padding)
        if h_dot is not None:  # the images themselves do not move
            a_dot = a_dot + conv(h_dot, block.weights, block.padding)
        gamma, beta = per_image(block.gamma, t.a), per_image(block.beta, t.a)
        h_dot, t0, t1 = net.stages.tangent(t.a, t.m, t.r, gamma, beta, a_dot)
        tangents.append((a_dot, t0, t1))
    assert h_dot is not None
    z_dot = (each(h_dot.flatten(1), p) @ net.classifier.mT).to(p.dtype)
    if along.classifier is not None:
        z_dot = z_dot + (last @ along.classifier.mT).to(p.dtype)
    z_bar = p * (z_dot - (p * z_dot).sum(2, keepdim=True)) / count
    flat = z_bar.to(last.dtype) @ net.classifier
    if along.classifier is not None:
        flat = flat + dz.to(last.dtype) @ along.classifier
    if along.embedding is not None:
        flat = flat + along.embedding
    bar = unflattened(flat, h_dot)
    for i in reversed(range(len(net.blocks))):
        block, t = net.blocks[i], traces[i]
        gamma, beta = per_image(block.gamma, t.a), per_image(block.beta, t.a)
        a_bar = net.stages.adjoint(t.a, t.m, t.r, gamma, beta, t.dh, t.s0, t.s1, *tangents[i], bar)
        bar = transposed(a_bar, block.weights, block.padding) + transposed(t.da, along.weights[i], block.padding)
    return each(bar, p)


def backward(net: Weights, kept: Forward, along: Directions) -> Tensor:
    """The gradient of the features' product with the direction of the embedding alone. The outputs' a may be lost."""
    assert along.embedding is not None
    k = len(along.embedding)
    bar = unflattened(along.embedding.expand(-1, len(kept.h) // k, -1), kept.h)
    for block, (a, m, r) in zip(net.blocks[::-1], kept.outputs[::-1], strict=True):
        da, *_ = net.stages.backward(a, m, r, per_image(block.gamma, a), per_image(block.beta, a), bar, False)
        bar = transposed(da, block.weights, block.padding)
    return bar.unflatten(0, (k, -1))


def forward(net: Weights, x: Tensor) -> tuple[Tensor, list[Tensor], list[tuple[Tensor, Tensor, Tensor]]]:
    """The last features (N, C, H, W), every block's input, and its a, m, r."""
    h = channels_last(x.flatten(0, 1).to(net.classifier.dtype))
    inputs, outputs = [], []
    for block in net.blocks:
        a = conv(h, block.weights, block.padding, block.biases)
        inputs.append(h)
        h, m, r = net.stages.forward(a, per_image(block.gamma, a), per_image(block.beta, a), block.groups, block.eps)
        outputs.append((a, m, r))
    return h, inputs, outputs


def unflattened(flat: Tensor, h: Tensor) -> Tensor:
    """(k, n, D) -> (N, C, H, W), like h."""
    return channels_last(flat.to(h.dtype).reshape(h.shape))


def conv(
    h: Tensor, weights: tuple[Tensor, ...], padding: tuple[int, int], biases: tuple[Tensor, ...] | None = None
) -> Tensor:
    """(N, C, H, W) under one weight, or its K equal parts under one each."""
    b = biases or (None,) * len(weights)
    parts = h.chunk(len(weights)) if len(weights) > 1 else (h,)
    found = [F.conv2d(part, w, bias, padding=padding) for part, w, bias in zip(parts, weights, b, strict=True)]
    return torch.cat(found) if len(found) > 1 else found[0]


def transposed(da: Tensor, weights: tuple[Tensor, ...], padding: tuple[int, int]) -> Tensor:
    """The adjoint of `conv` with respect to its input."""
    parts = da.chunk(len(weights)) if len(weights) > 1 else (da,)
    found = [F.conv_transpose2d(part, w, padding=padding) for part, w in zip(parts, weights, strict=True)]
    return torch.cat(found) if len(found) > 1 else found[0]


def each(x: Tensor, like: Tensor) -> Tensor:
    """(N, ...) -> (k, n, ...), the leading dimensions of `like`."""
    return x.unflatten(0, like.shape[:2])


def per_image(parameter: Tensor, a: Tensor) -> Tensor:
    """(K, C) -> (1 or N, C, 1, 1)."""
    if len(parameter) > 1:
        parameter = parameter.repeat_interleave(len(a) // len(parameter), 0, output_size=len(a))
    return parameter[:, :, None, None]


def channels_last(x: Tensor) -> Tensor:
    """The layout in which convolutions are fastest."""
    return x.contiguous(memory_format=torch.channels_last)


class Passes(NamedTuple):
    """The functions, as they are or compiled."""

    features: Callable[..., Tensor] = features
    effect: Callable[..., list[Tensor]] = effect
    traced_effect: Callable[..., tuple[list[Tensor], FirstOrder | Forward]] = traced_effect
    pull_back: Callable[..., Tensor] = pull_back
    all_gradients: Callable[..., tuple[list[Tensor], ...]] = all_gradients


@cache
def compiled_passes() -> Passes:
    """Compiled once per process; every new shape compiles at its first use."""
    return Passes(**{name: compiled(function) for name, function in Passes()._asdict().items()})


# --- Any number of images, piece by piece -----------------------------------------------------------------------------

Span = tuple[slice, slice]  # of the K classes or networks, and of the n images of each


class Analytic:
    """A ConvNet, or several of one shape side by side, as they are at this moment."""

    def __init__(self, nets: Sequence[ConvNet], compute: Compute, own: torch.dtype) -> None:
        """own: precision of images and results."""
        self.compute, self.own = compute, own
        on_cpu = compute.device.type == "cpu"
        self.passes = compiled_passes() if compute.compile and not on_cpu else Passes()
        stages = cpu_stages() if compute.compile and on_cpu else Stages()
        self.net = weights_of(nets, compute.dtype(own), stages)

    @torch.no_grad()
    def embed(self, x: Tensor) -> Tensor:
        """(N, C, H, W) normalised images -> (N, D) of one network, in the precision of the pass."""
        size, found = self.compute.images(x.shape[-1]), []
        for piece in x.split(size):  # all of one shape, filled up if need be, whatever the sizes of classes are
            short = size - len(piece)
            full = F.pad(piece, [0] * 7 + [short]) if short and len(x) > size else piece
            found.append(self.passes.features(self.net, full[None])[0, : len(piece)])
        return torch.cat(found)

    @torch.no_grad()
    def gradients(self, x: Tensor, target: Tensor) -> list[list[Tensor]]:
        """Gradients of each network's mean cross-entropy, in the order of `parameters()`.

        x: (K, n, C, H, W) normalised images. target: (K, n, classes), probabilities.
        """
        sums: list[list[Tensor]] = []
        for span in self._pieces(x):
            found = self.passes.all_gradients(self.net.of(span[0]), x[span], target[span], x.shape[1])
            sums = sums or [[] for _ in found]
            sums = [self._add(kind, part, span[0], len(x)) for kind, part in zip(sums, found, strict=True)]
        *inner, classifier, offset = sums
        blocks = list(zip(*inner, strict=True))
        return [[*(g[i] for block in blocks for g in block), classifier[0][i], offset[0][i]] for i in range(len(x))]

    @torch.no_grad()
    def match(self, real: Tensor, syn: Tensor, labels: Tensor, how: Comparison) -> tuple[Tensor, Tensor]:
        """Distances of K classes, (K,), and their derivatives, like syn.

        real: (K, B, C, H, W), syn: (K, S, C, H, W), augmented; labels: (K,). how: one that is covered.
        """
        gradients = "grad" in how.parts
        what = Matched(gradients, gradients and how.fc, "embed" in how.parts)
        target = torch.eye(self.net.classifier.shape[1], dtype=self.own, device=real.device)[labels][:, None]
        wanted: list[Tensor] = []
        given: list[Tensor] = []
        for span in self._pieces(real):
            found = self.passes.effect(self.net, real[span], target[span[0]], real.shape[1], what)
            wanted = self._add(wanted, found, span[0], len(real))
        traces = []
        for span in self._pieces(syn):
            found, kept = self.passes.traced_effect(self.net, syn[span], target[span[0]], syn.shape[1], what)
            given = self._add(given, found, span[0], len(syn))
            traces.append((span, kept))

        with torch.enable_grad():
            given = [g.requires_grad_() for g in given]
            losses = torch.func.vmap(partial(total, how.metric))(wanted, given)
            slopes = list(torch.autograd.grad(losses.sum(), given))
        dtype = self.net.classifier.dtype
        embedding = slopes.pop()[:, None] / syn.shape[1] if what.embedding else None
        classifier = slopes.pop().to(dtype) if what.classifier else None
        weights = [tuple(channels_last(d) for d in slope.to(dtype)) for slope in slopes]
        along, result = Directions(weights, classifier, embedding), torch.empty_like(syn)
        for span, kept in traces:
            result[span] = self.passes.pull_back(self.net, kept, along.of(span[0]), syn.shape[1])
        return losses.detach(), result

    def _pieces(self, x: Tensor) -> list[Span]:
        return pieces(x.shape[0], x.shape[1], self.compute.images(x.shape[-1]))

    def _add(self, sums: list[Tensor], found: list[Tensor], rows: slice, k: int) -> list[Tensor]:
        """The sums of K rows with what was found of some of them; no sums yet are zeros."""
        sums = sums or [self._zeros(k, part) for part in found]
        for so_far, part in zip(sums, found, strict=True):
            so_far[rows] += part
        return sums

    def _zeros(self, k: int, like: Tensor) -> Tensor:
        """K rows like those of `like`, convolution weights in the layout of their gradients."""
        shape = (k * like.shape[1], *like.shape[2:])
        layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
        found = torch.empty(shape, dtype=self.own, device=like.device, memory_format=layout)
        return found.zero_().unflatten(0, (k, like.shape[1]))


def pieces(k: int, n: int, limit: int) -> list[Span]:
    """(k, n) images in pieces of at most `limit`, as even as can be: whole rows, or parts of a single one."""
    if n <= limit:
        return [(rows, slice(0, n)) for rows in even(k, limit // max(n, 1))]
    return [(slice(c, c + 1), part) for c in range(k) for part in even(n, limit)]


def even(n: int, limit: int) -> list[slice]:
    """range(n) in the fewest parts of at most `limit`, sizes differing by one at most."""
    count = max(1, -(-n // limit))
    edges = [i * n // count for i in range(count + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(edges)]
