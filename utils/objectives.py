"""What is matched and how far apart it is: METRICS and OBJECTIVES (Sec. 3.1)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, grad

from models import Network


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

    objective: str = "grad"
    metric: str = "mse"
    bias: bool = False
    fc: bool = False


def gradient_distance(net: Network, real: Tensor, syn: Tensor, label: Tensor, how: Comparison) -> Tensor:
    """Distance between the gradients of the mean cross-entropy. real, syn: (N, C, H, W) augmented, one class."""
    params = matched_parameters(net, bias=how.bias, fc=how.fc)

    def loss(params: dict[str, Tensor], images: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(net, params, images), label.expand(len(images)))

    wanted, given = grad(loss)(params, real), grad(loss)(params, syn)
    return total(how.metric, [wanted[name].detach() for name in params], [given[name] for name in params])


def feature_distance(net: Network, real: Tensor, syn: Tensor, label: Tensor, how: Comparison) -> Tensor:
    """Distance between the mean features of every block. real, syn: (N, C, H, W) augmented, one class."""
    wanted = [features.mean(0).to(real.dtype).detach() for features in net.features(real)]
    given = [features.mean(0).to(syn.dtype) for features in net.features(syn)]
    return total(how.metric, wanted, given)


# An objective gives a scalar that is differentiable with respect to the synthetic images. All classes go through it
# at once under torch.func.vmap, so it takes gradients by torch.func and never looks at a value from Python.
OBJECTIVES: dict[str, Callable[[Network, Tensor, Tensor, Tensor, Comparison], Tensor]] = {
    "grad": gradient_distance,
    "feat": feature_distance,
}


def total(metric: str, wanted: list[Tensor], given: list[Tensor]) -> Tensor:
    """The metric summed over layers."""
    return torch.stack([METRICS[metric](w, g) for w, g in zip(wanted, given, strict=True)]).sum()


def matched_parameters(net: Network, *, bias: bool, fc: bool) -> dict[str, Tensor]:
    """The weights of all convolutions; with `bias` also their biases and the norm layers' parameters; with `fc` the
    classifier's weight, and its bias if both."""
    return {
        name: p.detach()
        for name, p in net.named_parameters()
        if (fc or not name.startswith("classifier.")) and (bias or p.dim() > 1)
    }
