"""The matching update of all classes: how far the synthetic images' effect on a network is from the representatives'
(Sec. 3.1), and the pixels' gradient of that distance.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models import Network
from utils.method.augment import Augment
from utils.method.formation import Formation
from utils.method.images import ImageSet
from utils.method.objectives import Comparison
from utils.method.pixels import PixelSGD
from utils.numerics import derivatives as forms
from utils.numerics.compute import Captured, Compute
from utils.system.draws import Draws


@dataclass(frozen=True)
class Matcher:
    """How all classes' synthetic images are compared: decode, thin out, normalise, augment, compare, differentiate."""

    how: Comparison
    formation: Formation
    batch_syn_max: int
    augment: Augment
    compute: Compute

    def draw(self, classes: int, ipc: int, draws: Draws) -> tuple[Tensor, ...]:
        """One siamese draw per class, and which images take part where more are decoded than may."""
        shared = self.augment.draw_shared(classes, draws)
        count = self.formation.decoded_count(ipc)
        if count <= self.batch_syn_max:
            return (shared,)
        return shared, draws.uniform(classes, count).argsort(1)[:, : self.batch_syn_max]

    def __call__(
        self, net: Network, pixels: Tensor, real: ImageSet, picks: Tensor, shared: Tensor, chosen: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Distances per class (classes,) and their gradients, like pixels; both stay on the device.

        pixels: (classes, ipc, C, H, W) stored images. picks: (classes, B) positions in `real`, which say what classes
        they are; the rest as drawn. The network is fixed meanwhile, so the classes are independent of each other.
        """
        classes = real.labels[picks[:, 0]]
        each = picks.shape[1] + self.formation.decoded_count(pixels.shape[1])
        distances, gradients = [], []
        for group in torch.arange(len(pixels), device=pixels.device).split(self.compute.group(each, real.side)):
            stored = pixels[group].detach().requires_grad_()
            syn = self.formation.decode(stored)  # (k, S, C, H, W)
            if chosen is not None:
                syn = syn[torch.arange(len(group), device=pixels.device)[:, None], chosen[group]]
            syn = self._prepared(syn, real, shared[group])
            wanted = self._prepared(real.images[picks[group]], real, shared[group])
            distance, gradient = forms.match(net, wanted, syn.detach(), classes[group], self.how, self.compute)
            gradients.append(torch.autograd.grad(syn, stored, gradient)[0])
            distances.append(distance)
        return torch.cat(distances), torch.cat(gradients)

    def _prepared(self, images: Tensor, real: ImageSet, shared: Tensor) -> Tensor:
        """Normalised, and augmented with one draw per class; images: (k, n, C, H, W)."""
        u = shared.repeat_interleave(images.shape[1], 0)
        return self.augment(real.normalize(images.flatten(0, 1)), u).unflatten(0, images.shape[:2])


class MatchingStep:
    """One step of one run's pixels, against one network that stays at its place; on a GPU it is captured as a whole."""

    def __init__(self, matcher: Matcher, net: Network, pixels: PixelSGD, real: ImageSet) -> None:
        """real: images of the classes that the pixels are of, which may be some of all."""
        self.matcher, self.net, self.pixels, self.real = matcher, net, pixels, real
        self.learned: dict[str, Tensor] = {}  # nothing but pixels
        self.held = torch.tensor(real.held, device=real.device)
        self._captured = Captured(self._step, matcher.compute.device)

    def __call__(self, picks: Tensor, draws: Draws) -> Tensor:
        """Moves the pixels; returns the distances, (classes,), valid until the next call."""
        drawn = self.matcher.draw(self.real.classes, self.pixels.pixels.shape[1], draws)  # for all there are
        return self._captured(picks, *(d[self.held] for d in drawn))

    def _step(self, picks: Tensor, *drawn: Tensor) -> Tensor:
        ahead = self.pixels.lookahead()
        distances, gradients = self.matcher.compute.retry(
            lambda: self.matcher(self.net, ahead, self.real, picks, *drawn)
        )
        self.pixels.step(gradients)
        return distances
