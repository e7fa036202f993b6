"""A ConvNet's derivatives of first and second order, written out (Sec. 3.1 without autograd).

Matching gradients needs the derivative of a distance between gradients, L(G_syn, G_real). With D = dL/dG_syn held
constant, dL/dpixels is the gradient of the directional derivative of the synthetic loss along D: one tangent pass
forward, and its adjoint backward. A layer costs 7 convolutions of the synthetic images and 3 of the real ones, the
minimum for an exact step. Matching mean embeddings needs first derivatives only, 2 convolutions of the synthetic images
and 1 of the real ones; next to gradients it costs none, as all that it needs is on the way. Matching trajectories asks
for the gradients of a directional derivative by all parameters as well: 8 convolutions.

No graph is kept. Images pass in pieces that stay in a CPU's cache or fit a GPU's memory; utils/numerics/passes.py has
the passes over a piece. Images come as (K, n, C, H, W): K classes that meet one network, or K networks that train side
by side.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import ConvNet, Network
from utils.numerics import passes
from utils.numerics.block import BlockFunctions
from utils.numerics.compilation import block_functions
from utils.numerics.compute import Compute
from utils.numerics.passes import (
    BlockDirection,
    Compared,
    Directions,
    FirstOrder,
    Parameters,
    Slope,
    Weights,
    channels_last,
    weights_of,
)

Metric = Callable[[list[Tensor], list[Tensor]], Tensor]  # the distance of two lists of layers' tensors, ()


def is_supported(net: Network) -> TypeGuard[ConvNet]:
    """Whether this network's derivatives are written out here: a ConvNet whose norm looks at one image at a time."""
    return isinstance(net, ConvNet) and all(isinstance(norm, nn.GroupNorm) for _, norm in net.layers)


# --- Any number of images, piece by piece -----------------------------------------------------------------------------

Span = tuple[slice, slice]  # of the K classes or networks, and of the n images of each


class Analytic:
    """The derivatives of a ConvNet, or of several of one shape side by side, with the parameters that it has now."""

    def __init__(
        self,
        nets: Sequence[ConvNet],
        compute: Compute,
        dtype: torch.dtype,
        parameters: Sequence[Sequence[Tensor]] | None = None,
    ) -> None:
        """dtype: of images and results; arithmetic has that of `compute`. parameters: each network's, in place of its
        own."""
        self.nets, self.compute, self.dtype = nets, compute, dtype
        parameters = parameters or [list(net.parameters()) for net in nets]
        self.functions = BlockFunctions()
        if compute.compile:
            norms = [norm for _, norm in nets[0].layers if isinstance(norm, nn.GroupNorm)]
            self.functions = block_functions(compute.device, norms, compute.dtype(dtype))
        self.net = self.weights(parameters)

    def weights(self, parameters: Sequence[Sequence[Tensor]]) -> Weights:
        """Parameters of each network, or directions like them, as the passes take them."""
        return weights_of(self.nets, parameters, self.compute.dtype(self.dtype), self.functions)

    @torch.no_grad()
    def embed(self, x: Tensor, prepare: Callable[[Tensor], Tensor] = lambda piece: piece) -> Tensor:
        """(N, C, H, W) images -> (N, D) of one network, in the precision of the pass; prepare: normalises a piece."""
        size, found = self.compute.images_at_once(x.shape[-1]), []
        for piece in map(prepare, x.split(size)):
            # Zeros fill up the last piece, so that all have one shape, for which a GPU's kernels are chosen once.
            short = size - len(piece)
            full = F.pad(piece, [0] * 7 + [short]) if short and len(x) > size else piece
            found.append(passes.features(self.net, full[None])[0, : len(piece)])
        return torch.cat(found)

    @torch.no_grad()
    def gradients(self, x: Tensor, target: Tensor) -> list[list[Tensor]]:
        """Gradients of each network's mean cross-entropy, in the order of `parameters()`.

        x: (K, n, C, H, W) normalised images. target: (K, n, classes), probabilities.
        """
        sums: list[Tensor] = []
        for span in self._spans(x):
            found = passes.all_gradients(self.net.of(span[0]), x[span], target[span], x.shape[1])
            sums = self._add(sums, found, span[0], len(x))
        return [[g[i] for g in sums] for i in range(len(x))]

    @torch.no_grad()
    def traced(self, x: Tensor, target: Tensor, gradients: bool) -> Iterator[Traced]:
        """Pieces of one network's images: x (n, C, H, W), target (n, classes). gradients: whether they are wanted."""
        for rows in even(len(x), self.compute.images_at_once(x.shape[-1])):
            part = (x[None, rows], target[None, rows])
            yield Traced(self, len(x), *passes.traced_gradients(self.net, *part, len(x), gradients))

    @torch.no_grad()
    def distances(
        self, real: Tensor, syn: Tensor, labels: Tensor, compared: Compared, metric: Metric
    ) -> tuple[Tensor, Tensor]:
        """Distances of K classes, (K,), and their derivatives, like syn.

        real: (K, B, C, H, W), syn: (K, S, C, H, W), augmented; labels: (K,). The sums over a class's real images come
        first, then those over its synthetic ones. From both, the metric gives the directions in which the traces of
        the synthetic images are pulled back to their pixels.
        """
        target = torch.eye(self.net.classifier.shape[1], dtype=self.dtype, device=real.device)[labels][:, None]
        wanted: list[Tensor] = []
        given: list[Tensor] = []
        for span in self._spans(real):
            found = passes.effect(self.net, real[span], target[span[0]], real.shape[1], compared)
            wanted = self._add(wanted, found, span[0], len(real))
        traces = []
        for span in self._spans(syn):
            found, kept = passes.traced_effect(self.net, syn[span], target[span[0]], syn.shape[1], compared)
            given = self._add(given, found, span[0], len(syn))
            traces.append((span, kept))

        # The metric can be any function, so autograd differentiates it; the graph begins at the sums.
        with torch.enable_grad():
            given = [g.requires_grad_() for g in given]
            if len(real) == 1:  # without vmap's overhead: a CPU computes class by class
                losses = metric([w[0] for w in wanted], [g[0] for g in given])[None]
            else:
                losses = torch.func.vmap(metric)(wanted, given)
            slopes = list(torch.autograd.grad(losses.sum(), given))
        directions, result = self._directions(slopes, compared, syn.shape[1]), torch.empty_like(syn)
        for span, kept in traces:
            result[span] = passes.pull_back(self.net, kept, directions.of(span[0]), syn.shape[1])
        return losses.detach(), result

    @torch.no_grad()
    def distances_of_embeddings(
        self,
        real: Tensor,
        syn: Tensor,
        labels: Tensor,
        distance: Callable[[Tensor, Tensor, Tensor], Tensor],
        learned: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Distances of K classes that are functions of all embeddings, (K,), and their derivatives, like syn.

        real: (K, B, C, H, W), syn: (K, S, C, H, W), augmented; labels: (K,). distance: (B, D), (S, D), () -> (), run by
        autograd under vmap. learned: leaves that it uses, whose gradients are added to their `grad`.
        """
        wanted, given = (x.new_empty(*x.shape[:2], self.net.classifier.shape[2]) for x in (real, syn))
        for span in self._spans(real):
            wanted[span] = passes.features(self.net, real[span]).to(self.dtype)
        traces = []
        for span in self._spans(syn):
            given[span], kept = passes.traced_features(self.net, syn[span])
            traces.append((span, kept))
        with torch.enable_grad():
            given.requires_grad_()
            if len(real) == 1:
                losses = distance(wanted[0], given[0], labels[0])[None]
            else:
                losses = torch.func.vmap(distance)(wanted, given, labels)
            losses.sum().backward(inputs=[given, *learned])
        assert given.grad is not None
        result = torch.empty_like(syn)
        for span, kept in traces:
            result[span] = passes.backward(self.net, kept, given.grad[span])
        return losses.detach(), result

    def _directions(self, slopes: list[Tensor], compared: Compared, count: int) -> Directions:
        """The derivatives of the distances, in the order of `effect`, as directions; an embedding's for each of
        `count` images."""
        dtype = self.net.classifier.dtype
        embedding = slopes.pop()[:, None] / count if compared.embedding else None  # stays in the images' precision
        classifier = slopes.pop().to(dtype) if compared.classifier else None
        blocks = [BlockDirection(tuple(channels_last(d) for d in slope.to(dtype))) for slope in slopes]
        return Directions(blocks, classifier, embedding)

    def _spans(self, x: Tensor) -> list[Span]:
        return spans(x.shape[0], x.shape[1], self.compute.images_at_once(x.shape[-1]))

    def _add(self, sums: list[Tensor], found: list[Tensor], rows: slice, k: int) -> list[Tensor]:
        """Sums of K rows plus what was found for some of them. An empty list stands for zeros."""
        if not sums and len(found[0]) == k:
            return [part.to(self.dtype) for part in found]
        sums = sums or [self._zeros(k, part) for part in found]
        for so_far, part in zip(sums, found, strict=True):
            so_far[rows] += part
        return sums

    def _zeros(self, k: int, like: Tensor) -> Tensor:
        """K rows like those of `like`, in the precision of images.

        Convolution weights are channels last, like the gradients that convolutions return, so that adding is one plain
        sweep. Rows and output channels are one dimension meanwhile, since that layout has four.
        """
        shape = (k * like.shape[1], *like.shape[2:])
        layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
        found = torch.empty(shape, dtype=self.dtype, device=like.device, memory_format=layout)
        return found.zero_().unflatten(0, (k, like.shape[1]))


class Traced(NamedTuple):
    """Some of a network's n images, with all that derivatives of the mean cross-entropy take from them."""

    analytic: Analytic
    n: int
    by_parameters: Parameters  # (1, ...) each; empty where they were not wanted
    kept: FirstOrder

    @property
    def gradients(self) -> list[Tensor]:
        """What these images add to the gradient of the mean cross-entropy, in the order of `parameters()`."""
        return [g[0] for g in self.by_parameters]

    @torch.no_grad()
    def slope(self, direction: Sequence[Tensor]) -> Slope:
        """What these images add to the slope of the mean cross-entropy in a direction, like the parameters."""
        analytic = self.analytic
        found = passes.slope(analytic.net, self.kept, analytic.weights([direction]), self.n)
        return Slope(found.value, [g[0] for g in found.by_parameters], found.by_images[0].to(analytic.dtype))


def spans(k: int, n: int, limit: int) -> list[Span]:
    """(k, n) images in pieces of at most `limit`: several whole rows, or parts of a single one."""
    if n <= limit:
        return [(rows, slice(0, n)) for rows in even(k, limit // max(n, 1))]
    return [(slice(c, c + 1), part) for c in range(k) for part in even(n, limit)]


def even(n: int, limit: int) -> list[slice]:
    """range(n) in the fewest parts of at most `limit`, sizes differing by one at most.

    Two sizes are two shapes to compile, and no small remainder leaves a GPU idle.
    """
    count = max(1, -(-n // limit))
    edges = [i * n // count for i in range(count + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(edges)]
