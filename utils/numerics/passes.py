"""The passes of utils/numerics/analytic.py over one piece of images: plain functions of tensors.

Images come as (k, n, C, H, W): k classes that meet one network, or k networks with n images each. Inside a pass they
are one batch (N, C, H, W), N = k n. Notation as in utils/numerics/block.py; in addition z are the logits and p their
softmax.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from models import ConvNet
from utils.numerics.block import BlockFunctions, Gradient, Norm, Tangent

# --- Parameters as the passes see them --------------------------------------------------------------------------------


class Block(NamedTuple):
    """The parameters of one block of K networks."""

    weights: tuple[Tensor, ...]  # K times (out, in, 3, 3): separate, as convolutions take one at a time
    biases: tuple[Tensor, ...] | None  # K times (out,); None where adding them would be for nothing
    gamma: Tensor  # (K, out)
    beta: Tensor
    padding: tuple[int, int]
    groups: int
    eps: float


class Weights(NamedTuple):
    """The parameters of K ConvNets of one shape."""

    blocks: tuple[Block, ...]
    classifier: Tensor  # (K, classes, D)
    offset: Tensor  # (K, 1, classes)
    functions: BlockFunctions  # how a block's norm, ReLU and pooling are computed

    def of(self, rows: slice) -> Weights:
        """The networks that these rows of images meet: one each, or the only one there is."""
        if len(self.classifier) == 1:
            return self
        blocks = tuple(
            b._replace(
                weights=b.weights[rows],
                biases=None if b.biases is None else b.biases[rows],
                gamma=b.gamma[rows],
                beta=b.beta[rows],
            )
            for b in self.blocks
        )
        return self._replace(blocks=blocks, classifier=self.classifier[rows], offset=self.offset[rows])


def weights_of(
    nets: Sequence[ConvNet], parameters: Sequence[Sequence[Tensor]], dtype: torch.dtype, functions: BlockFunctions
) -> Weights:
    """Networks shaped like `nets` with these parameters, one sequence each in the order of `parameters()`.

    dtype: of the convolutions and the classifier; gamma and beta stay as they are, since norms compute in float32.
    """
    *inner, classifier, offset = zip(*([p.detach() for p in own] for own in parameters), strict=True)
    blocks = []
    for i, (conv, norm) in enumerate(nets[0].layers):
        assert isinstance(norm, nn.GroupNorm)
        weights, biases, gamma, beta = inner[4 * i : 4 * i + 4]
        instance = norm.num_groups == norm.num_channels
        blocks.append(
            Block(
                weights=tuple(channels_last(w.to(dtype)) for w in weights),
                # A norm of single channels takes a bias away. Only a CPU's convolutions add it at no cost.
                biases=None if instance and on_gpu(weights[0]) else tuple(b.to(dtype) for b in biases),
                gamma=stacked(gamma),
                beta=stacked(beta),
                padding=(int(conv.padding[0]), int(conv.padding[1])),
                groups=norm.num_groups,
                eps=norm.eps,
            )
        )
    return Weights(tuple(blocks), stacked(classifier).to(dtype), stacked(offset)[:, None].to(dtype), functions)


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors (...) as one (K, ...); a single one is not copied."""
    return torch.stack(list(tensors)) if len(tensors) > 1 else tensors[0][None]


# --- What is compared, and along which directions it is differentiated ------------------------------------------------


class Compared(NamedTuple):
    """What is compared of the effects that images have on a network."""

    gradients: bool  # of the cross-entropy with respect to the convolutions' weights
    classifier: bool  # its gradient with respect to the classifier's weight as well
    embedding: bool  # the mean of the last features


class BlockDirection(NamedTuple):
    """Where one block's parameters move, like those of `Block`; None for those that stay."""

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...] | None = None
    gamma: Tensor | None = None  # gamma and beta move both or not at all
    beta: Tensor | None = None


class Directions(NamedTuple):
    """A direction per class or per network in the space of parameters, and one in that of embeddings."""

    blocks: list[BlockDirection]  # empty where no parameter moves
    classifier: Tensor | None  # (k, classes, D)
    embedding: Tensor | None = None  # (k, 1, D), of a single image

    def of(self, rows: slice) -> Directions:
        """The directions of these classes, in which nothing but weights moves."""
        classifier, embedding = (d if d is None else d[rows] for d in (self.classifier, self.embedding))
        return Directions([BlockDirection(block.weights[rows]) for block in self.blocks], classifier, embedding)


Vectors = tuple[Tensor, Tensor, Tensor]  # gradients of a block's bias, gamma and beta, (k, out) each
Parameters = list[Tensor]  # gradients of k networks in the order of `parameters()`, (k, ...) each


# --- What a pass leaves for the next one ------------------------------------------------------------------------------


class Trace(NamedTuple):
    """One block's part of `FirstOrder`."""

    h: Tensor  # the block's `conv_input`
    norm: Norm
    gradient: Gradient
    da: Tensor


class FirstOrder(NamedTuple):
    """All that the second derivatives of the cross-entropy take from its first ones."""

    traces: list[Trace]
    last: Tensor  # the last features, (k, n, D)
    p: Tensor  # softmax, (k, n, classes)
    dz: Tensor  # the logits' gradient, like p


class Forward(NamedTuple):
    """All that the derivatives of the last features take from the forward pass."""

    h: Tensor  # the last features, (N, C, H, W)
    norms: list[Norm]


class Slope(NamedTuple):
    """The directional derivative of a cross-entropy in the space of parameters, and its gradients."""

    value: Tensor  # ()
    by_parameters: list[Tensor]
    by_images: Tensor


# --- The passes -------------------------------------------------------------------------------------------------------


def features(net: Weights, x: Tensor) -> Tensor:
    """The last features, (k, n, D)."""
    return in_rows(forward(net, x)[0].flatten(1), x)


def traced_features(net: Weights, x: Tensor) -> tuple[Tensor, Forward]:
    """The last features, (k, n, D) in the precision of images, and what `backward` needs."""
    h, _, norms = forward(net, x)
    return in_rows(h.flatten(1), x).to(x.dtype), Forward(h, norms)


def effect(net: Weights, x: Tensor, target: Tensor, count: int, compared: Compared) -> list[Tensor]:
    """What is compared of the images, summed over n and divided by `count`.

    target: (k, n or 1, classes). Returns (k, out, in, 3, 3) per block and (k, classes, D) for the classifier's weight,
    gradients of the cross-entropy, and (k, D) for the embedding, as far as they are compared.
    """
    return traced_effect(net, x, target, count, compared, keep=False)[0]


def traced_effect(
    net: Weights, x: Tensor, target: Tensor, count: int, compared: Compared, keep: bool = True
) -> tuple[list[Tensor], FirstOrder | Forward]:
    """The result of `effect`, and what `pull_back` needs. keep: False allows the traces' a to be overwritten."""
    if not compared.gradients:  # the forward pass is enough
        last, forwarded = traced_features(net, x)
        return [last.sum(1) / count], forwarded
    found, kept = first_order(net, x, target, count, keep)
    if compared.classifier:
        found.append(kept.dz.to(kept.last.dtype).mT @ kept.last)
    if compared.embedding:
        found.append(kept.last.to(x.dtype).sum(1) / count)
    return found, kept


def pull_back(net: Weights, kept: FirstOrder | Forward, along: Directions, count: int) -> Tensor:
    """The gradient with respect to the images, (k, n, C, H, W), of the effect's product with these directions.

    All classes meet one network. The product with a gradient is the directional derivative of the cross-entropy, which
    takes a tangent pass and its adjoint; that with an embedding takes a backward pass only.
    """
    if isinstance(kept, Forward):
        assert along.embedding is not None
        return backward(net, kept, along.embedding)
    p, last = kept.p, kept.last
    steps, h_dot = tangents(net, kept, along)
    z_dot = (in_rows(h_dot.flatten(1), p) @ net.classifier.mT).to(p.dtype)
    if along.classifier is not None:
        z_dot = z_dot + (last @ along.classifier.mT).to(p.dtype)
    return adjoints(net, kept, along, steps, logits_adjoint(p, z_dot, count))[0]


def all_gradients(net: Weights, x: Tensor, target: Tensor, count: int) -> Parameters:
    """Gradients of the cross-entropy, summed over n and divided by `count`, with respect to all parameters."""
    return by_all_parameters(net, *first_order(net, x, target, count, keep=False))


def traced_gradients(
    net: Weights, x: Tensor, target: Tensor, count: int, wanted: bool
) -> tuple[Parameters, FirstOrder]:
    """The result of `all_gradients`, empty unless wanted, and what `slope` needs."""
    weights, kept = first_order(net, x, target, count, keep=True, weights=wanted)
    return by_all_parameters(net, weights, kept) if wanted else [], kept


def slope(net: Weights, kept: FirstOrder, along: Weights, count: int) -> Slope:
    """The slope of the cross-entropy in a direction of all parameters, which is shaped like a network."""
    p, last, dz = kept.p, kept.last, kept.dz
    blocks = [BlockDirection(b.weights, b.biases, b.gamma, b.beta) for b in along.blocks]
    directions = Directions(blocks, along.classifier)
    steps, h_dot = tangents(net, kept, directions)
    last_dot = in_rows(h_dot.flatten(1), p)
    z_dot = (last_dot @ net.classifier.mT + last @ along.classifier.mT + along.offset).to(p.dtype)
    z_bar = logits_adjoint(p, z_dot, count)
    by_images, weights, others = adjoints(net, kept, directions, steps, z_bar)
    classifier = z_bar.to(last.dtype).mT @ last + dz.to(last.dtype).mT @ last_dot
    return Slope((dz * z_dot).sum(), in_order(weights, others, classifier, z_bar.sum(1)), by_images)


# --- Forward, backward, and both once more for the second derivatives -------------------------------------------------


def forward(net: Weights, x: Tensor) -> tuple[Tensor, list[Tensor], list[Norm]]:
    """The last features (N, C, H, W), and every block's `conv_input` and norm."""
    h = x.flatten(0, 1)
    if not as_product(net.blocks[0].weights[0]):  # patches have the layout and the dtype from the beginning
        h = channels_last(h.to(net.classifier.dtype))
    inputs, norms = [], []
    for block in net.blocks:
        h = conv_input(h, block, net.functions)
        inputs.append(h)
        a = conv(h, block.weights, block.padding, block.biases)
        h, norm = net.functions.forward(a, per_image(block.gamma, a), per_image(block.beta, a), block.groups, block.eps)
        norms.append(norm)
    return h, inputs, norms


def backward(net: Weights, kept: Forward, embedding: Tensor) -> Tensor:
    """The gradient with respect to the images of the product of features and `embedding`, (k, n or 1, D).

    It is the last pass over a piece, so the norms' a may be overwritten.
    """
    k = len(embedding)
    dh = like_features(embedding.expand(-1, len(kept.h) // k, -1), kept.h)
    for block, norm in zip(net.blocks[::-1], kept.norms[::-1], strict=True):
        da, _ = net.functions.backward(norm, dh, keep=False)
        dh = transposed(da, block.weights, block.padding)
    return dh.unflatten(0, (k, -1))


def first_order(
    net: Weights, x: Tensor, target: Tensor, count: int, keep: bool, weights: bool = True
) -> tuple[list[Tensor], FirstOrder]:
    """Gradients of the convolutions' weights, if wanted, of the cross-entropy divided by `count`; and the traces."""
    h, inputs, norms = forward(net, x)
    last = in_rows(h.flatten(1), x)
    p = (last @ net.classifier.mT + net.offset).to(target.dtype).softmax(2)
    dz = (p - target) / count
    dh = like_features(dz.to(last.dtype) @ net.classifier, h)
    gradients, traces = [], []
    for i in reversed(range(len(net.blocks))):
        block = net.blocks[i]
        da, gradient = net.functions.backward(norms[i], dh, keep)
        if weights:
            gradients.append(by_weights(inputs[i], da, block, x))
        traces.append(Trace(inputs[i], norms[i], gradient, da))
        if i:  # nobody asks for the images' own gradient
            dh = transposed(da, block.weights, block.padding)
    return gradients[::-1], FirstOrder(traces[::-1], last, p, dz)


class Step(NamedTuple):
    """One block's part of the tangent pass."""

    h_dot: Tensor | None  # the tangent of the block's input; None for images, which do not move
    tangent: Tangent
    vectors: list[Tensor]  # the directions of gamma and beta, per image; empty where they do not move


def tangents(net: Weights, kept: FirstOrder, along: Directions) -> tuple[list[Step], Tensor]:
    """The forward half of a second derivative: every block's step, and the tangent of the last features."""
    steps: list[Step] = []
    h_dot: Tensor | None = None
    for block, trace, direction in zip(net.blocks, kept.traces, along.blocks, strict=True):
        # The convolution is bilinear: its weights move, and its input does where an earlier block's weights moved it.
        a_dot = conv(trace.h, direction.weights, block.padding, direction.biases)
        if h_dot is not None:
            a_dot = a_dot + conv(h_dot, block.weights, block.padding)
        vectors = [per_image(v, a_dot) for v in (direction.gamma, direction.beta) if v is not None]
        before = h_dot
        h_dot, tangent = net.functions.tangent(trace.norm, a_dot, *vectors)
        steps.append(Step(before, tangent, vectors))
    assert h_dot is not None
    return steps, h_dot


def adjoints(
    net: Weights, kept: FirstOrder, along: Directions, steps: list[Step], z_bar: Tensor
) -> tuple[Tensor, list[Tensor], list[Vectors]]:
    """The backward half of a second derivative, from the adjoint of the logits on.

    Returns the gradients with respect to the images, (k, n, C, H, W), and, where all parameters move, with respect to
    the blocks' weights and to their other parameters.
    """
    traces, last, p, dz = kept
    flat = z_bar.to(last.dtype) @ net.classifier
    if along.classifier is not None:
        flat = flat + dz.to(last.dtype) @ along.classifier
    if along.embedding is not None:
        flat = flat + along.embedding
    h_bar = like_features(flat, traces[-1].gradient.dh)
    weights: list[Tensor] = []
    others: list[Vectors] = []
    for i in reversed(range(len(net.blocks))):
        block, trace, (h_dot, tangent, vectors) = net.blocks[i], traces[i], steps[i]
        a_bar, means = net.functions.adjoint(trace.norm, trace.gradient, tangent, h_bar, *vectors[:1])
        if means:  # all parameters move
            found = by_weights(trace.h, a_bar, block, p)
            weights.append(found if h_dot is None else found + by_weights(h_dot, trace.da, block, p))
            others += by_vectors([block], [a_bar], [means], p)
        # The same bilinearity: what reaches a, and what reaches a_dot, which is da.
        h_bar = transposed(a_bar, block.weights, block.padding)
        h_bar = h_bar + transposed(trace.da, along.blocks[i].weights, block.padding)
    return in_rows(h_bar, p), weights[::-1], others[::-1]


def logits_adjoint(p: Tensor, z_dot: Tensor, count: int) -> Tensor:
    """The adjoint z_bar of the logits: the gradient of <dz, z_dot> with respect to z, where dz = (p - target) / count.

    The derivative of the softmax is symmetric, so this is also the tangent of dz.
    """
    return p * (z_dot - (p * z_dot).sum(2, keepdim=True)) / count


# --- Convolutions and their adjoints ----------------------------------------------------------------------------------

PATCH = 32  # numbers up to which a GPU is faster with a matrix product of patches: cuDNN pads few channels at each call
MULTIPLE = 8  # of numbers, that matrix units want


def conv(
    h: Tensor, weights: tuple[Tensor, ...], padding: tuple[int, int], biases: tuple[Tensor, ...] | None = None
) -> Tensor:
    """(N, C, H, W) under one weight, or its K equal parts under one each; h: from `conv_input`."""
    if as_product(weights[0]):
        a = conv_of_patches(h, weights)
        return a if biases is None else a + per_image(stacked(biases), a)
    b = biases or (None,) * len(weights)
    parts = h.chunk(len(weights)) if len(weights) > 1 else (h,)
    found = [F.conv2d(part, w, bias, padding=padding) for part, w, bias in zip(parts, weights, b, strict=True)]
    return joined(found)


def transposed(da: Tensor, weights: tuple[Tensor, ...], padding: tuple[int, int]) -> Tensor:
    """The adjoint of `conv` with respect to its input."""
    parts = da.chunk(len(weights)) if len(weights) > 1 else (da,)
    return joined([F.conv_transpose2d(part, w, padding=padding) for part, w in zip(parts, weights, strict=True)])


def by_weights(h: Tensor, da: Tensor, block: Block, like: Tensor) -> Tensor:
    """The adjoint of `conv` with respect to the weights, (k, out, in, 3, 3); k, n: the first dimensions of `like`."""
    if as_product(block.weights[0]):
        return by_weights_of_patches(h, da, block.weights[0], like)
    shape, padding = block.weights[0].shape, block.padding
    pairs = zip(in_rows(h, like), in_rows(da, like), strict=True)
    found = joined([conv2d_weight(inside, shape, outside, padding=padding) for inside, outside in pairs])
    return found.unflatten(0, (len(like), -1))


def joined(parts: list[Tensor]) -> Tensor:
    """Tensors one after the other; a single one as it is."""
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def as_product(weight: Tensor) -> bool:
    """Whether the convolution of this weight is computed as a matrix product of patches."""
    return on_gpu(weight) and weight[0].numel() <= PATCH


def on_gpu(x: Tensor) -> bool:
    """Whether a tensor is on a GPU."""
    return x.is_cuda


def conv_input(h: Tensor, block: Block, functions: BlockFunctions) -> Tensor:
    """What `conv` and `by_weights` take of a block's input (N, C, H, W): the input, or its patches, channels last."""
    weight = block.weights[0]
    if not as_product(weight):
        return h
    count, kernel = weight[0].numel(), (weight.shape[2], weight.shape[3])
    return functions.patches(h, kernel, block.padding, count + -count % MULTIPLE, weight.dtype)


def conv_of_patches(h: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
    """The result of `conv` without biases, as one matrix product for each weight."""
    x = h.permute(0, 2, 3, 1)  # (N, H, W, numbers)
    rows = stacked([w.permute(0, 2, 3, 1).flatten(1) for w in weights])  # (K, out, numbers)
    rows = F.pad(rows, (0, x.shape[3] - rows.shape[2]))
    found = x.reshape(len(weights), -1, x.shape[3]) @ rows.mT
    return found.view(*x.shape[:3], -1).permute(0, 3, 1, 2)


def by_weights_of_patches(h: Tensor, da: Tensor, weight: Tensor, like: Tensor) -> Tensor:
    """The result of `by_weights`, as one matrix product for each image, which are then added up."""
    inside, outside = (x.permute(0, 2, 3, 1).flatten(1, 2) for x in (h, channels_last(da)))
    if da.dtype in (torch.bfloat16, torch.float16):  # they would round what is added up
        found = torch.bmm(outside.mT, inside, torch.float32)
    else:
        found = torch.bmm(outside.mT, inside)
    sums = in_rows(found[..., : weight[0].numel()], like).sum(1)
    return sums.unflatten(2, (*weight.shape[2:], weight.shape[1])).permute(0, 1, 4, 2, 3)


def by_vectors(
    blocks: Sequence[Block], das: Sequence[Tensor], means: Sequence[Sequence[Tensor]], like: Tensor
) -> list[Vectors]:
    """The gradients of every block's vectors; means: each block's channel means, of beta's gradient and gamma's."""
    flat = [s.flatten(1) for pair in means for s in pair]
    sums = in_rows(torch.cat(flat, 1), like).sum(1).split([s.shape[1] for s in flat], 1)
    found = []
    for block, da, beta, gamma in zip(blocks, das, sums[::2], sums[1::2], strict=True):
        instance = block.groups == da.shape[1]  # such a norm takes whatever a bias adds away: zero, not rounding
        bias = torch.zeros_like(beta) if instance else in_rows(da.sum((2, 3)), like).sum(1)
        pixels = da.shape[2] * da.shape[3]
        found.append((bias, pixels * gamma, pixels * beta))
    return found


def by_all_parameters(net: Weights, weights: list[Tensor], kept: FirstOrder) -> Parameters:
    """Gradients of the cross-entropy with respect to all parameters, given those of the convolutions' weights."""
    traces, last, p, dz = kept
    others = by_vectors(net.blocks, [t.da for t in traces], [t.gradient[1:] for t in traces], p)
    return in_order(weights, others, dz.to(last.dtype).mT @ last, dz.sum(1))


def in_order(weights: list[Tensor], others: list[Vectors], classifier: Tensor, offset: Tensor) -> Parameters:
    """Gradients in the order of `parameters()`: block by block, then the classifier's."""
    blocks = zip(weights, others, strict=True)
    return [*(g for weight, vectors in blocks for g in (weight, *vectors)), classifier, offset]


# --- Shapes and layouts -----------------------------------------------------------------------------------------------


def in_rows(x: Tensor, like: Tensor) -> Tensor:
    """(N, ...) -> (k, n, ...), the first dimensions of `like`."""
    return x.unflatten(0, like.shape[:2])


def per_image(parameter: Tensor, a: Tensor) -> Tensor:
    """(K, C) -> (1, C, 1, 1) for one network, (N, C, 1, 1) for several."""
    if len(parameter) > 1:
        # output_size is known here; without it a GPU would have to be waited for.
        parameter = parameter.repeat_interleave(len(a) // len(parameter), 0, output_size=len(a))
    return parameter[:, :, None, None]


def like_features(flat: Tensor, h: Tensor) -> Tensor:
    """(k, n, D) -> (N, C, H, W), like h."""
    return channels_last(flat.to(h.dtype).reshape(h.shape))


def channels_last(x: Tensor) -> Tensor:
    """In the memory layout in which convolutions are fastest, on CPUs and on GPUs."""
    return x.contiguous(memory_format=torch.channels_last)
