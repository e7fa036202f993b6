"""The matching update: how far the effect of synthetic images on a network is from that of real ones (Sec. 3.1), class
by class, and the gradient of that distance with respect to the pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from models import Network
from utils.method.augment import Augment
from utils.method.formation import Formation
from utils.method.frequencies import Frequencies, Made
from utils.method.images import ImageSet
from utils.method.objectives import Comparison
from utils.method.pixels import PixelSGD
from utils.numerics import derivatives
from utils.numerics.compute import Captured, Compute
from utils.numerics.derivatives import load
from utils.system.draws import Draws


@dataclass(frozen=True)
class Matcher:
    """The matching of all classes: decode, thin out, normalise, augment, compare, differentiate."""

    how: Comparison
    formation: Formation
    batch_syn_max: int
    augment: Augment
    compute: Compute

    def draw(self, classes: int, ipc: int, draws: Draws) -> tuple[Tensor, ...]:
        """Random numbers of one update, which `__call__` takes as `shared` and `chosen`.

        shared: one siamese augmentation per class, (classes, COLUMNS) of augment.py. chosen: which decoded images of
        each class take part, (classes, batch_syn_max); left out where all of them do.
        """
        shared = self.augment.draw_shared(classes, draws)
        count = self.formation.decoded_count(ipc)
        if count <= self.batch_syn_max:
            return (shared,)
        return shared, draws.uniform(classes, count).argsort(1)[:, : self.batch_syn_max]

    def __call__(
        self, net: Network, pixels: Tensor, real: ImageSet, picks: Tensor, shared: Tensor, chosen: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Distances of the classes, (classes,), and their gradients, like pixels; both stay on the device.

        pixels: (classes, ipc, C, H, W) stored images. picks: (classes, B) positions in `real`, whose labels say which
        classes these are. shared, chosen: from `draw`, rows of the same classes; chosen None: all images take part.
        The network is fixed meanwhile, so classes do not depend on each other: groups of any size give the same.
        """
        classes = real.labels[picks[:, 0]]
        each = picks.shape[1] + self.formation.decoded_count(pixels.shape[1])
        distances, gradients = [], []
        count = self.compute.classes_at_once(each, real.side)
        for group in torch.arange(len(pixels), device=pixels.device).split(count):
            stored = pixels[group].detach().requires_grad_()
            syn = self.formation.decode(stored)  # (k, S, C, H, W)
            if chosen is not None:
                syn = syn[torch.arange(len(group), device=pixels.device)[:, None], chosen[group]]
            syn = self._prepared(syn, real, shared[group])
            wanted = self._prepared(real.images[picks[group]], real, shared[group])
            distance, gradient = derivatives.distances(
                net, wanted, syn.detach(), classes[group], self.how.distance, self.compute
            )
            # From the augmented images back through augmentation and decoding, which autograd differentiates.
            gradients.append(torch.autograd.grad(syn, stored, gradient)[0])
            distances.append(distance)
        return torch.cat(distances), torch.cat(gradients)

    def _prepared(self, images: Tensor, real: ImageSet, shared: Tensor) -> Tensor:
        """Images (k, n, C, H, W) normalised, and augmented with one draw per class."""
        u = shared.repeat_interleave(images.shape[1], 0)
        return self.augment(real.normalize(images.flatten(0, 1)), u).unflatten(0, images.shape[:2])


class MatchingStep:
    """One step of a run's pixels against one network; a GPU captures it as a whole, so networks and pixels must stay at
    their addresses.

    `learned` is what is learned besides the pixels: frequencies, if a small network makes them. A checkpoint saves it,
    and copies into it in place.
    """

    def __init__(
        self,
        matcher: Matcher,
        net: Network,
        pixels: PixelSGD,
        real: ImageSet,
        *,
        frequencies: Frequencies | None = None,
        judge: Network | None = None,
    ) -> None:
        """real: images of the classes that the pixels are of; they may be some of all classes.

        frequencies: those of the objective cf. judge: a network for the parameters of `judge_by`, under which the
        cross-entropy of the synthetic images is lowered in a step of its own (the calibration of DANCE).
        """
        self.matcher, self.net, self.pixels, self.real = matcher, net, pixels, real
        self.frequencies, self.judge = frequencies, judge
        self.calibrator = replace(matcher, how=Comparison("ce"))
        self.learned: dict[str, Tensor] = {} if frequencies is None else frequencies.learned
        self.held = torch.tensor(real.held, device=real.device)
        # No CUDA graph where ranks learn frequencies together: they wait for each other.
        replay = frequencies is None or not frequencies.together
        self._captured = Captured(self._step, matcher.compute.device, replay=replay)
        self._captured_calibration = Captured(self._calibrate, matcher.compute.device)

    def judge_by(self, theta: Tensor) -> None:
        """Calibrate under a network with the parameters (P,) from now on."""
        assert self.judge is not None
        load(self.judge, theta)

    def __call__(self, picks: Tensor, draws: Draws) -> Tensor:
        """Move the pixels; return the distances, (classes,), which the next call overwrites."""
        drawn = self._draw(draws)
        z = None if self.frequencies is None else self.frequencies.draw(draws)
        distances: Tensor = self._captured(picks, *drawn) if z is None else self._captured(picks, z, *drawn)
        if self.judge is not None:
            self._captured_calibration(picks[:, :1], *self._draw(draws))
        return distances

    def _draw(self, draws: Draws) -> list[Tensor]:
        # For all classes, held here or not: what a class gets does not depend on how classes are shared out.
        drawn = self.matcher.draw(self.real.classes, self.pixels.pixels.shape[1], draws)
        return [d[self.held] for d in drawn]

    def _step(self, picks: Tensor, *drawn: Tensor) -> Tensor:
        ahead = self.pixels.lookahead()
        if self.frequencies is None:
            distances, gradients = self.matcher.compute.retry(
                lambda: self.matcher(self.net, ahead, self.real, picks, *drawn)
            )
        else:
            distances, gradients, made = self.matcher.compute.retry(lambda: self._at_frequencies(ahead, picks, *drawn))
            self.frequencies.ascend(made)
        self.pixels.step(gradients)
        return distances

    def _at_frequencies(self, pixels: Tensor, picks: Tensor, z: Tensor, *drawn: Tensor) -> tuple[Tensor, Tensor, Made]:
        """Distances and gradients of the pixels, at the frequencies of this step, whose gradient is in their leaf."""
        assert self.frequencies is not None
        made = self.frequencies(z)
        matcher = replace(self.matcher, how=replace(self.matcher.how, frequencies=made.leaf))
        return *matcher(self.net, pixels, self.real, picks, *drawn), made

    def _calibrate(self, picks: Tensor, *drawn: Tensor) -> None:
        """Step down the cross-entropy under the judge; picks: an image per class, which says what class it is."""
        assert self.judge is not None
        judge, ahead = self.judge, self.pixels.lookahead()
        _, gradients = self.matcher.compute.retry(lambda: self.calibrator(judge, ahead, self.real, picks, *drawn))
        self.pixels.step(gradients)
