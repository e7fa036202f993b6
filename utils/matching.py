"""The matching update: how far the synthetic images' effect on a network is from the representatives' (Sec. 3.1)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import Network
from utils.augment import Augment
from utils.formation import decode
from utils.images import ImageSet
from utils.runtime import Draws


def cosine_distance(real: Tensor, syn: Tensor) -> Tensor:
    """Sum over output channels of 1 - cosine; a vector counts as one channel."""
    rows_real = real.flatten(1) if real.dim() > 1 else real[None]
    rows_syn = syn.flatten(1) if syn.dim() > 1 else syn[None]
    return (1 - F.cosine_similarity(rows_real, rows_syn, dim=1, eps=1e-6)).sum()


# A metric compares one layer's tensors, real and synthetic; the layers' distances are summed.
METRICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": lambda real, syn: (real - syn).square().sum(),
    "l1": lambda real, syn: (real - syn).abs().sum(),
    "l1_mean": lambda real, syn: (real - syn).abs().mean(),
    "cos": cosine_distance,
}


@dataclass(frozen=True)
class Comparison:
    """How one class's real and synthetic images are compared; for bias and fc see `matched_parameters`."""

    metric: str = "mse"
    bias: bool = False
    fc: bool = False


def gradient_distance(net: Network, real: Tensor, syn: Tensor, label: int, how: Comparison) -> Tensor:
    """Distance between the gradients of the mean cross-entropy. real, syn: (N, C, H, W) augmented, one class."""
    params = matched_parameters(net, bias=how.bias, fc=how.fc)
    wanted = torch.autograd.grad(class_loss(net, real, label), params)
    given = torch.autograd.grad(class_loss(net, syn, label), params, create_graph=True)
    return total(how.metric, wanted, given)


def feature_distance(net: Network, real: Tensor, syn: Tensor, label: int, how: Comparison) -> Tensor:
    """Distance between the mean features of every block. real, syn: (N, C, H, W) augmented, one class."""
    with torch.no_grad():
        wanted = [features.mean(0) for features in net.features(real)]
    given = [features.mean(0) for features in net.features(syn)]
    return total(how.metric, wanted, given)


# An objective gives a scalar that is differentiable with respect to the synthetic images.
OBJECTIVES: dict[str, Callable[[Network, Tensor, Tensor, int, Comparison], Tensor]] = {
    "grad": gradient_distance,
    "feat": feature_distance,
}


def total(metric: str, wanted: list[Tensor] | tuple[Tensor, ...], given: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    """The metric summed over layers."""
    return torch.stack([METRICS[metric](w, g) for w, g in zip(wanted, given, strict=True)]).sum()


def class_loss(net: Network, images: Tensor, label: int) -> Tensor:
    """Mean cross-entropy of images that all belong to one class."""
    target = torch.full((len(images),), label, device=images.device)
    return F.cross_entropy(net(images), target)


def matched_parameters(net: Network, *, bias: bool, fc: bool) -> list[Tensor]:
    """The weights of all convolutions; with `bias` also their biases and the norm layers' parameters; with `fc` the
    classifier's weight, and its bias if both."""
    found: list[Tensor] = [p for p in net.parameters() if p.dim() == 4 or (bias and p.dim() == 1)]
    classifier = list(net.classifier.parameters())
    found = [p for p in found if all(p is not own for own in classifier)]
    return found + [p for p in classifier if fc and (bias or p.dim() == 2)]


@contextmanager
def frozen_statistics(net: Network) -> Iterator[None]:
    """Batch norm normalises by the batch but remembers nothing: a batch of one class says little of all images."""
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, before, strict=True):
            norm.momentum = momentum


@dataclass(frozen=True)
class Matcher:
    """One matching update for all classes: decode, thin out, normalise, augment, compare, differentiate."""

    objective: str
    comparison: Comparison
    factor: int
    decode_type: str
    batch_syn_max: int
    augment: Augment

    def __call__(
        self, net: Network, pixels: Tensor, real: ImageSet, picks: Tensor, draws: Draws
    ) -> tuple[Tensor, Tensor]:
        """Distances per class (classes,) and their gradients, like pixels; both stay on the device.

        pixels: (classes, ipc, C, H, W) stored images. picks: (classes, B) positions in `real`.
        The network is fixed meanwhile, so the classes are independent of each other.
        """
        distance = OBJECTIVES[self.objective]
        shared = self.augment.draw_shared(len(pixels), draws)  # one siamese draw per class
        distances, gradients = [], []
        for c, stored in enumerate(pixels.detach()):
            stored = stored.requires_grad_()  # (ipc, C, H, W)
            syn = decode(stored, factor=self.factor, decode_type=self.decode_type)  # (S, C, H, W)
            if len(syn) > self.batch_syn_max:
                syn = syn[draws.permutation(len(syn))[: self.batch_syn_max]]
            syn = self.augment(real.normalize(syn), shared[c])
            wanted = self.augment(real.normalize(real.images[picks[c]]), shared[c])
            with frozen_statistics(net):
                loss = distance(net, wanted, syn, c, self.comparison)
            gradients.append(torch.autograd.grad(loss, stored)[0])
            distances.append(loss.detach())
        return torch.stack(distances), torch.stack(gradients)
