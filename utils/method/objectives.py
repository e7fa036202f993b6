"""What is compared of real and synthetic images, and by which distance: OBJECTIVES and METRICS (Sec. 3.1)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, grad

from models import Network
from utils.numerics.derivatives import Distance
from utils.numerics.passes import Compared


def channels(x: Tensor) -> Tensor:
    """A layer's tensor as one row per output channel, (channels, M); a vector counts as one channel."""
    return x.flatten(1) if x.dim() > 1 else x[None]


def cosine_distance(real: Tensor, syn: Tensor) -> Tensor:
    """The sum over output channels of 1 - cosine, ()."""
    return (1 - F.cosine_similarity(channels(real), channels(syn), dim=1, eps=1e-6)).sum()


# A metric compares one layer's tensors, real and synthetic; the layers' distances are summed. l1_mean: a mean over each
# output channel, summed.
METRICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": lambda real, syn: (real - syn).square().sum(),
    "l1": lambda real, syn: (real - syn).abs().sum(),
    "l1_mean": lambda real, syn: channels(real - syn).abs().mean(1).sum(),
    "cos": cosine_distance,
}


@dataclass(frozen=True)
class Comparison:
    """How one class's real and synthetic images are compared; for bias and fc see `matched_parameters`.

    DC (Zhao et al., ICLR 2021) compares gradients by cos, with fc; DM (Zhao and Bilen, WACV 2023) embeddings by mse;
    DREAM+ (Liu et al., arXiv 2310.15052) both at once, grad+embed; NCFM (Wang et al., CVPR 2025) characteristic
    functions of embeddings, cf.
    """

    objective: str = "grad"  # one of OBJECTIVES, or several joined by +
    metric: str = "mse"
    bias: bool = False  # gradients of biases and of norms' parameters as well
    fc: bool = False  # gradients of the classifier as well
    frequencies: Tensor | None = field(default=None, compare=False)  # (M, D) of cf; see utils/method/frequencies.py

    @property
    def parts(self) -> tuple[str, ...]:
        """The objectives whose distances are summed."""
        return parse(self.objective)

    @property
    def distance(self) -> Distance:
        """The distance as a function and, where its derivatives are written out in utils/numerics, a description of it.

        Those of gradients of weights and of mean embeddings are written out, and those of EMBEDDED, whatever they
        compare of embeddings. All else (biases, norms, features, objectives of your own) goes through autograd.
        """
        gradients, embedding = "grad" in self.parts, "embed" in self.parts
        fast = {*self.parts} <= {"grad", "embed"} and not (gradients and self.bias)
        compared = Compared(gradients, gradients and self.fc, embedding) if fast else None
        of_embeddings = partial(embedded_distance, how=self) if {*self.parts} <= EMBEDDED.keys() else None
        learned = () if self.frequencies is None or not self.frequencies.requires_grad else (self.frequencies,)
        return Distance(partial(distance, how=self), compared, partial(total, self.metric), of_embeddings, learned)


LAST = slice(-1, None)  # of the blocks


def gradient_distance(net: Network, real: Tensor, syn: Tensor, label: Tensor, how: Comparison) -> Tensor:
    """Distance between the gradients of the mean cross-entropy, (). real, syn: (N, C, H, W) augmented, one class."""
    params = matched_parameters(net, bias=how.bias, fc=how.fc)

    def loss(params: dict[str, Tensor], images: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(net, params, images), label.expand(len(images)))

    wanted, given = grad(loss)(params, real), grad(loss)(params, syn)
    return total(how.metric, [wanted[name].detach() for name in params], [given[name] for name in params])


def feature_distance(
    net: Network, real: Tensor, syn: Tensor, label: Tensor, how: Comparison, blocks: slice = LAST
) -> Tensor:
    """Distance between the mean features of some blocks, (). real, syn: (N, C, H, W) augmented, one class."""
    wanted = [features.mean(0).to(real.dtype).detach() for features in net.features(real)[blocks]]
    given = [features.mean(0).to(syn.dtype) for features in net.features(syn)[blocks]]
    return total(how.metric, wanted, given)


# --- Objectives of embeddings: real (B, D), detached, and syn (S, D), of one class ------------------------------------


def mean_distance(net: Network, real: Tensor, syn: Tensor, label: Tensor, how: Comparison) -> Tensor:
    """Distance between the mean embeddings, ()."""
    return total(how.metric, [real.mean(0)], [syn.mean(0)])


def characteristic_distance(net: Network, real: Tensor, syn: Tensor, label: Tensor, how: Comparison) -> Tensor:
    """Distance between the characteristic functions E exp(i <t, x>) of the embeddings x, a mean over frequencies t, ().

    Embeddings are centred at the mean of the real ones and divided by their root mean square distance from it, so that
    normal random frequencies see the whole spread of a class.
    """
    assert how.frequencies is not None
    t, centre = how.frequencies.to(real.dtype), real.mean(0)
    spread = (real - centre).square().sum(1).mean().sqrt().clamp(min=1e-6)
    wanted, given = ((x - centre) / spread @ t.mT for x in (real, syn))  # (B, M), (S, M)
    cosine, sine = (f(wanted).mean(0) - f(given).mean(0) for f in (torch.cos, torch.sin))
    # The root has no derivative at zero.
    return (cosine.square() + sine.square() + 1e-12).sqrt().mean()


def cross_entropy(net: Network, real: Tensor, syn: Tensor, label: Tensor, how: Comparison) -> Tensor:
    """Mean cross-entropy of the synthetic images under the network, (); real images do not take part."""
    return F.cross_entropy(net.classifier(syn), label.expand(len(syn)))


EMBEDDED: dict[str, Callable[[Network, Tensor, Tensor, Tensor, Comparison], Tensor]] = {
    "embed": mean_distance,
    "cf": characteristic_distance,
    "ce": cross_entropy,
}


def embedded_distance(net: Network, real: Tensor, syn: Tensor, label: Tensor, how: Comparison) -> Tensor:
    """The sum of the distances that `how` names, all of EMBEDDED, ()."""
    return torch.stack([EMBEDDED[part](net, real, syn, label, how) for part in how.parts]).sum()


def embedding_distance(net: Network, real: Tensor, syn: Tensor, label: Tensor, how: Comparison, *, part: str) -> Tensor:
    """One of EMBEDDED as an objective of images, (). real, syn: (N, C, H, W) augmented, one class."""
    wanted, given = (net.embed(images).to(images.dtype) for images in (real, syn))
    return EMBEDDED[part](net, wanted.detach(), given, label, how)


# Objectives by name, which has no "+". Each gives a scalar that is differentiable with respect to the synthetic images;
# what comes from the real ones is detached. All classes go through it at once under torch.func.vmap, so it takes
# gradients by torch.func and never looks at a value from Python.
OBJECTIVES: dict[str, Callable[[Network, Tensor, Tensor, Tensor, Comparison], Tensor]] = {
    "grad": gradient_distance,
    "feat": feature_distance,  # of the last block, as in IDC
    "blocks": partial(feature_distance, blocks=slice(None)),  # of every block
    **{part: partial(embedding_distance, part=part) for part in EMBEDDED},
}


def parse(text: str) -> tuple[str, ...]:
    """The objectives that a text names, `grad+embed` -> ("grad", "embed").

    Raises ValueError for an objective that is unknown or named twice.
    """
    parts = tuple(text.split("+"))
    if len(set(parts)) < len(parts) or not OBJECTIVES.keys() >= set(parts):
        raise ValueError(f"{text!r} is not one of {', '.join(OBJECTIVES)}, or several of them joined by +")
    return parts


def distance(net: Network, real: Tensor, syn: Tensor, label: Tensor, how: Comparison) -> Tensor:
    """The sum of the distances that `how` names, (). real, syn: (N, C, H, W) augmented, one class."""
    return torch.stack([OBJECTIVES[part](net, real, syn, label, how) for part in how.parts]).sum()


def total(metric: str, wanted: list[Tensor], given: list[Tensor]) -> Tensor:
    """The metric summed over layers, (). wanted: of real images, given: of synthetic ones."""
    return torch.stack([METRICS[metric](w, g) for w, g in zip(wanted, given, strict=True)]).sum()


def matched_parameters(net: Network, *, bias: bool, fc: bool) -> dict[str, Tensor]:
    """The parameters whose gradients are compared, by name, detached.

    The weights of all convolutions; with `bias` also their biases and the norm layers' parameters; with `fc` the
    classifier's weight, and its bias if both.
    """
    return {
        name: p.detach()
        for name, p in net.named_parameters()
        if (fc or not name.startswith("classifier.")) and (bias or p.dim() > 1)
    }
