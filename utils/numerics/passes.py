"""The passes of utils/numerics/analytic.py over one piece of images, plain functions of tensors.

Images come as (k, n, C, H, W) and meet one network, or k networks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from models import ConvNet
from utils.numerics.block import Stages
from utils.numerics.compilation import compiled

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


def weights_of(
    nets: Sequence[ConvNet], values: Sequence[Sequence[Tensor]], dtype: torch.dtype, stages: Stages
) -> Weights:
    """Networks of one shape with these parameters, in their order, in this precision and the fastest layout."""
    *inner, classifier, offset = zip(*([p.detach() for p in own] for own in values), strict=True)
    blocks = []
    for i, (conv, norm) in enumerate(nets[0].layers):
        assert isinstance(norm, nn.GroupNorm)
        weights, biases, gamma, beta = inner[4 * i : 4 * i + 4]
        blocks.append(
            Block(
                weights=tuple(channels_last(w.to(dtype)) for w in weights),
                biases=tuple(b.to(dtype) for b in biases),
                gamma=torch.stack(gamma),
                beta=torch.stack(beta),
                padding=(int(conv.padding[0]), int(conv.padding[1])),
                groups=norm.num_groups,
                eps=norm.eps,
            )
        )
    return Weights(tuple(blocks), torch.stack(classifier).to(dtype), torch.stack(offset)[:, None].to(dtype), stages)


Parameters = list[Tensor]  # gradients with respect to all of them, in their order, the k networks in front


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
    """What `first_order` leaves of one block for `second_order`; N = k * n, see utils/numerics/block.py."""

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


def all_gradients(net: Weights, x: Tensor, target: Tensor, count: int) -> Parameters:
    """Gradients of the same cross-entropy with respect to all parameters."""
    return of_all(net, *first_order(net, x, target, count, keep=False))


def traced_gradients(
    net: Weights, x: Tensor, target: Tensor, count: int, wanted: bool
) -> tuple[Parameters, FirstOrder]:
    """The same, if they are wanted, and what `slope` needs."""
    weights, kept = first_order(net, x, target, count, keep=True, weights=wanted)
    return of_all(net, weights, kept) if wanted else [], kept


def first_order(
    net: Weights, x: Tensor, target: Tensor, count: int, keep: bool, weights: bool = True
) -> tuple[list[Tensor], FirstOrder]:
    """The gradients of the convolutions' weights, if they are wanted, and what `second_order` needs. All as above."""
    h, inputs, outputs = forward(net, x)
    last = each(h.flatten(1), x)
    p = (last @ net.classifier.mT + net.offset).to(target.dtype).softmax(2)
    dz = (p - target) / count
    dh = unflattened(dz.to(last.dtype) @ net.classifier, h)
    gradients, traces = [], []
    for i in reversed(range(len(net.blocks))):
        block, h, (a, m, r) = net.blocks[i], inputs[i], outputs[i]
        da, s0, s1 = net.stages.backward(a, m, r, per_image(block.gamma, a), per_image(block.beta, a), dh, keep)
        if weights:
            gradients.append(by_weights(h, da, block, x))
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


def slope(net: Weights, kept: FirstOrder, along: Weights, count: int) -> tuple[Tensor, Parameters, Tensor]:
    """The derivative of the cross-entropy along a direction in the space of all parameters, (), and its gradients with
    respect to the parameters and to the images, (k, n, C, H, W)."""
    traces, last, p, dz = kept
    tangents = []
    h_dot: Tensor | None = None
    for block, direction, t in zip(net.blocks, along.blocks, traces, strict=True):
        a_dot = conv(t.h, direction.weights, block.padding, direction.biases)
        if h_dot is not None:  # the images themselves do not move
            a_dot = a_dot + conv(h_dot, block.weights, block.padding)
        parameters = (per_image(v, t.a) for v in (block.gamma, block.beta))
        moving = (per_image(v, t.a) for v in (direction.gamma, direction.beta))
        before = h_dot
        h_dot, t0, t1 = net.stages.tangent(t.a, t.m, t.r, *parameters, a_dot, *moving)
        tangents.append((before, (a_dot, t0, t1)))
    assert h_dot is not None
    last_dot = each(h_dot.flatten(1), p)
    z_dot = (last_dot @ net.classifier.mT + last @ along.classifier.mT + along.offset).to(p.dtype)
    z_bar = p * (z_dot - (p * z_dot).sum(2, keepdim=True)) / count
    flat, flat_dz = z_bar.to(last.dtype), dz.to(last.dtype)
    bar = unflattened(flat @ net.classifier + flat_dz @ along.classifier, h_dot)
    weights, vectors = [], []
    for i in reversed(range(len(net.blocks))):
        block, direction, t, (h_dot, tangent) = net.blocks[i], along.blocks[i], traces[i], tangents[i]
        gamma, beta, gamma_dot = (per_image(v, t.a) for v in (block.gamma, block.beta, direction.gamma))
        a_bar, u0, u1 = net.stages.whole_adjoint(t.a, t.m, t.r, gamma, beta, t.dh, t.s0, t.s1, *tangent, bar, gamma_dot)
        found = by_weights(t.h, a_bar, block, p)
        weights.append(found if h_dot is None else found + by_weights(h_dot, t.da, block, p))
        vectors.append(by_vectors(a_bar, u0, u1, block, p))
        bar = transposed(a_bar, block.weights, block.padding) + transposed(t.da, direction.weights, block.padding)
    classifier = flat.mT @ last + flat_dz.mT @ last_dot
    return (dz * z_dot).sum(), in_order(weights[::-1], vectors[::-1], classifier, z_bar.sum(1)), each(bar, p)


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


def by_weights(h: Tensor, da: Tensor, block: Block, like: Tensor) -> Tensor:
    """The adjoint of `conv` with respect to the weights, (k, out, in, 3, 3), with (k, n) the leading dimensions of
    `like`."""
    shape, padding = block.weights[0].shape, block.padding
    pairs = zip(each(h, like), each(da, like), strict=True)
    return torch.stack([conv2d_weight(inside, shape, outside, padding=padding) for inside, outside in pairs])


def by_vectors(da: Tensor, s0: Tensor, s1: Tensor, block: Block, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the bias, gamma and beta, (k, out): the sums of da, and of what s1 and s0 are means of."""
    pixels = da.shape[2] * da.shape[3]
    gamma, beta = (pixels * each(s.flatten(1), like).sum(1) for s in (s1, s0))
    instance = block.groups == da.shape[1]  # takes out whatever a bias adds
    return torch.zeros_like(beta) if instance else each(da.sum((2, 3)), like).sum(1), gamma, beta


def of_all(net: Weights, weights: list[Tensor], kept: FirstOrder) -> Parameters:
    """Gradients with respect to all parameters, where those of the convolutions' weights are known."""
    traces, last, p, dz = kept
    vectors = [by_vectors(t.da, t.s0, t.s1, block, p) for block, t in zip(net.blocks, traces, strict=True)]
    return in_order(weights, vectors, dz.to(last.dtype).mT @ last, dz.sum(1))


def in_order(
    weights: list[Tensor], vectors: list[tuple[Tensor, Tensor, Tensor]], classifier: Tensor, offset: Tensor
) -> Parameters:
    """The blocks' gradients and the classifier's."""
    blocks = zip(weights, vectors, strict=True)
    return [*(g for weight, others in blocks for g in (weight, *others)), classifier, offset]


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
    all_gradients: Callable[..., Parameters] = all_gradients
    traced_gradients: Callable[..., tuple[Parameters, FirstOrder]] = traced_gradients
    slope: Callable[..., tuple[Tensor, Parameters, Tensor]] = slope


@cache
def compiled_passes() -> Passes:
    """Compiled once per process; every new shape compiles at its first use."""
    return Passes(**{name: compiled(function) for name, function in Passes()._asdict().items()})
