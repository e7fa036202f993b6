"""A ConvNet's derivatives of first and second order, written out (Sec. 3.1 without autograd).

Matching gradients needs the derivative of a distance between gradients, L(G_syn, G_real). With D = dL/dG_syn held
constant, dL/dpixels is the gradient of the directional derivative of the synthetic loss along D: one tangent pass
forward, and its adjoint backward. A layer costs 7 convolutions of the synthetic images and 3 of the real ones, the
minimum for an exact step. Matching mean embeddings needs first derivatives only, 2 convolutions of the synthetic images
and 1 of the real ones; next to gradients it costs none, as all that it needs is on the way. Matching trajectories asks
for the gradients of a directional derivative by all parameters as well: 8 convolutions.

No graph is kept, images pass in pieces that stay in cache, and every pass over a piece (utils/numerics/passes.py) is a plain
function of tensors, which compiles. Images come as (K, n, C, H, W): K classes that meet one network, or K networks that
train side by side.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import ConvNet, Network
from utils.method.objectives import Comparison, total
from utils.numerics.block import Stages
from utils.numerics.compilation import cpu_stages
from utils.numerics.compute import Compute
from utils.numerics.passes import (
    Directions,
    FirstOrder,
    Matched,
    Parameters,
    Passes,
    channels_last,
    compiled_passes,
    weights_of,
)


def suits(net: Network) -> TypeGuard[ConvNet]:
    """Whether this network's derivatives are written out here: a ConvNet whose norm looks at one image at a time."""
    return isinstance(net, ConvNet) and all(isinstance(norm, nn.GroupNorm) for _, norm in net.layers)


def covers(how: Comparison) -> bool:
    """Whether the derivatives of this comparison are written out here: gradients of weights, and mean embeddings."""
    return {*how.parts} <= {"grad", "embed"} and not (how.bias and "grad" in how.parts)


# --- Any number of images, piece by piece -----------------------------------------------------------------------------

Span = tuple[slice, slice]  # of the K classes or networks, and of the n images of each


class Analytic:
    """A ConvNet, or several of one shape side by side, as they are at this moment."""

    def __init__(
        self,
        nets: Sequence[ConvNet],
        compute: Compute,
        own: torch.dtype,
        values: Sequence[Sequence[Tensor]] | None = None,
    ) -> None:
        """own: precision of images and results. values: each network's parameters, in place of its own."""
        self.compute, self.own = compute, own
        on_cpu = compute.device.type == "cpu"
        self.passes = compiled_passes() if compute.compile and not on_cpu else Passes()
        stages = cpu_stages() if compute.compile and on_cpu else Stages()
        self.take = partial(weights_of, nets, dtype=compute.dtype(own), stages=stages)
        self.net = self.take(values or [list(net.parameters()) for net in nets])

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
        sums: list[Tensor] = []
        for span in self._pieces(x):
            found = self.passes.all_gradients(self.net.of(span[0]), x[span], target[span], x.shape[1])
            sums = self._add(sums, found, span[0], len(x))
        return [[g[i] for g in sums] for i in range(len(x))]

    @torch.no_grad()
    def traced(self, x: Tensor, target: Tensor, gradients: bool) -> Iterator[Traced]:
        """Pieces of one network's images: x (n, C, H, W), target (n, classes). gradients: whether they are wanted."""
        for rows in even(len(x), self.compute.images(x.shape[-1])):
            part = (x[None, rows], target[None, rows])
            yield Traced(self, len(x), *self.passes.traced_gradients(self.net, *part, len(x), gradients))

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
            if len(real) == 1:  # without vmap's overhead, as on a CPU
                losses = total(how.metric, [w[0] for w in wanted], [g[0] for g in given])[None]
            else:
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


class Traced(NamedTuple):
    """Some of n images, and what they add to the gradient of the mean cross-entropy."""

    form: Analytic
    n: int
    by_parameters: Parameters  # (1, ...) each; empty where they were not wanted
    kept: FirstOrder

    @property
    def gradients(self) -> list[Tensor]:
        """In the order of `parameters()`."""
        return [g[0] for g in self.by_parameters]

    @torch.no_grad()
    def along(self, direction: Sequence[Tensor]) -> tuple[Tensor, list[Tensor], Tensor]:
        """The slope of the cross-entropy in a direction, and its derivatives by the parameters and by the images."""
        form = self.form
        slope, by_parameters, by_x = form.passes.slope(form.net, self.kept, form.take([direction]), self.n)
        return slope, [g[0] for g in by_parameters], by_x[0].to(form.own)


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
