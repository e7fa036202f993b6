"""Matching training trajectories (MTT, Cazenavette et al., CVPR 2022): a student trains on the synthetic images from
where an expert once was, and the images learn to bring it to where the expert was some epochs later.

The student takes N steps of plain SGD, theta_{t+1} = theta_t - a g_t, with the gradient g_t of the cross-entropy on the
images x_t. With lambda_N = dL/dtheta_N, the derivatives of the distance L are, from the last step to the first,

    s_t = <g_t(theta_t, x_t), lambda_{t+1}>             lambda_{t+1} held constant
    dL/da   = - (s_0 + s_1 + ... + s_{N-1})
    dL/dx_t = - a ds_t/dx_t
    lambda_t = lambda_{t+1} - a ds_t/dtheta_t

so all that has to be kept of a step is theta_t: what else its derivatives take can be made again when its turn comes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from models import Network
from utils.method.formation import decode, decoded_count
from utils.method.images import ImageSet
from utils.method.matching import Matcher
from utils.method.pixels import PixelSGD
from utils.numerics import derivatives
from utils.numerics.compute import Captured, Compute
from utils.numerics.derivatives import flattened, load, separated
from utils.system.distributed import ALONE, Group
from utils.system.draws import Draws

LEAST_STEP = 1e-6  # of a student: see TrajectoryStep


class Trajectories(Protocol):
    """Where experts were after every epoch."""

    count: int  # of experts

    def pair(self, expert: int, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Parameters after `start` and after `end` epochs, (P,) each, on the CPU."""


# --- The student ------------------------------------------------------------------------------------------------------


class Unrolled(NamedTuple):
    """How far a student ends from the expert, and the derivatives of that."""

    distance: Tensor  # (), 1 for a student that stays where it began
    images: list[Tensor]  # like each batch
    step_size: Tensor  # ()


def unrolled(
    net: Network,
    start: Tensor,
    target: Tensor,
    batches: Sequence[Tensor],
    labels: Sequence[Tensor],
    step_size: Tensor,
    compute: Compute,
    *,
    share: float = 1.0,
    add: Callable[[Tensor], Tensor] = lambda x: x,
) -> Unrolled:
    """A step on each batch, from `start` towards `target`, (P,) each.

    batches: (n, C, H, W) normalised and augmented images, labels: (n,) int64. step_size: (). The network's parameters
    are overwritten; batch norm normalises by the batch and remembers nothing. share: of the whole batches, where
    others have the rest of their images; add: the sum over all of these, in place.
    """
    net.train()
    targets = [F.one_hot(y, net.classifier.out_features).to(start.dtype) for y in labels]
    # To keep all that the way back needs takes 2 to 12 times the memory, to make it again 1.2 to 1.6 times the time.
    keep = sum(map(len, batches)) <= compute.images_kept(batches[0].shape[-1])
    path, kept = [start], []
    with derivatives.frozen_statistics(net):
        for x, y in zip(batches, targets, strict=True):
            if keep:
                parameters = separated(net, path[-1])
                kept.append(list(derivatives.pieces(net, parameters, x, y, compute, gradients=True)))
                gradient = torch.stack([flattened(piece.gradients) for piece in kept[-1]]).sum(0)
            else:
                load(net, path[-1])
                gradient = flattened(derivatives.gradients([net], x[None], y[None], compute)[0])
            path.append(path[-1] - step_size * add(share * gradient))
        missed, whole = path.pop() - target, (start - target).square().sum()
        adjoint = 2 * missed / whole
        images, by_size = [], torch.zeros_like(step_size)
        for x, y in zip(reversed(batches), reversed(targets), strict=True):
            parameters = separated(net, path.pop())
            batch = kept.pop() if keep else derivatives.pieces(net, parameters, x, y, compute, gradients=False)
            slope, by_theta, by_x = derivatives.slope(batch, separated(net, adjoint))
            by_size -= share * slope
            images.append(-step_size * share * by_x)
            adjoint = adjoint - step_size * add(share * flattened(by_theta))
    return Unrolled(missed.square().sum() / whole, images[::-1], add(by_size))


# --- The synthetic images ---------------------------------------------------------------------------------------------


class TrajectoryStep:
    """One step of one run's pixels and of the student's step size, against a random part of a random trajectory.

    What it learns besides the pixels is `learned`: the step size and its velocity, (2,), which a checkpoint saves and
    copies back in place. The network given serves the student: its parameters are overwritten.
    """

    def __init__(
        self,
        matcher: Matcher,
        net: Network,
        pixels: PixelSGD,
        real: ImageSet,
        trajectories: Trajectories,
        *,
        steps: int,
        epochs: int,
        max_start: int,
        step_size: float,
        lr_step: float,
        group: Group = ALONE,
    ) -> None:
        """steps: of the student, `epochs` of the expert's worth, from one of the first `max_start` epochs on.

        step_size: to begin with. lr_step: its learning rate, with the momentum of the pixels. group: with whom the
        student is trained, each rank on the images of its classes.
        """
        self.matcher, self.net, self.pixels, self.real, self.trajectories = matcher, net, pixels, real, trajectories
        self.group = group
        self.steps, self.epochs, self.max_start, self.lr_step = steps, epochs, max_start, lr_step
        stored = pixels.pixels
        self.held = torch.tensor(real.held, device=stored.device)
        self.decoded = decoded_count(stored.shape[1], factor=matcher.factor, decode_type=matcher.decode_type)
        self.each = min(self.decoded, matcher.batch_syn_max)  # images per class and step of the student
        self.learned = {"step_size": torch.tensor([step_size, 0.0], dtype=stored.dtype, device=stored.device)}
        self.labels = self.held.repeat_interleave(self.each)
        self._captured = Captured(self._step, matcher.compute.device, replay=group.alone)

    def __call__(self, picks: Tensor, draws: Draws) -> Tensor:
        """Moves the pixels; returns the distance once per class, (classes,), valid until the next call.

        picks: not used, no real images take part.
        """
        expert, start = draws.host.randrange(self.trajectories.count), draws.host.randrange(self.max_start)
        pair = self.trajectories.pair
        ends = self.group.broadcast(
            lambda: [theta.clone() for theta in pair(expert, start, start + self.epochs)]
        )  # no views
        return self._captured(*(theta.to(self.real.device) for theta in ends), *self.draw(draws))

    def draw(self, draws: Draws) -> tuple[Tensor, ...]:
        """For every step of the student, an augmentation of every image, (steps, n, 9), and, where more images are
        decoded than may take part, which of each class do, (steps, classes, each)."""
        classes = self.real.classes  # drawn for all there are
        u = self.matcher.augment.draw(self.steps, classes * self.each, draws)
        u = u.unflatten(0, (self.steps, classes, self.each))[:, self.held].flatten(1, 2)
        if self.each == self.decoded:
            return (u,)
        return u, draws.uniform(self.steps, classes, self.decoded).argsort(2)[:, self.held, : self.each]

    def _step(self, start: Tensor, target: Tensor, *drawn: Tensor) -> Tensor:
        ahead = self.pixels.lookahead()
        if self.group.alone:
            found = self.matcher.compute.retry(lambda: self._gradients(ahead, start, target, *drawn))
        else:  # others have got on, or wait: it cannot be tried again
            found = self._gradients(ahead, start, target, *drawn)
        distance, by_pixels, by_size = found
        self.pixels.step(by_pixels)
        size, velocity = self.learned["step_size"]
        velocity.mul_(self.pixels.momentum).add_(by_size)
        # A student with a step of zero stays where it is and teaches the images nothing, one below climbs the loss.
        size.sub_(self.lr_step * velocity).clamp_(min=LEAST_STEP)
        return distance.expand(len(self.held))

    def _gradients(
        self, pixels: Tensor, start: Tensor, target: Tensor, u: Tensor, chosen: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The distance, (), and its derivatives by the pixels and by the step size."""
        stored = pixels.detach().requires_grad_()
        decoded = decode(stored, factor=self.matcher.factor, decode_type=self.matcher.decode_type)
        everything = decoded.detach().requires_grad_()
        picked = [None] * self.steps if chosen is None else chosen
        with torch.no_grad():
            batches = [self._prepared(everything, *each) for each in zip(u, picked, strict=True)]
        size = self.learned["step_size"][0].clone()
        labels, share = [self.labels] * self.steps, len(self.held) / self.real.classes
        compute, add = self.matcher.compute, self.group.all_reduce_sum
        found = unrolled(self.net, start, target, batches, labels, size, compute, share=share, add=add)
        total = torch.zeros_like(everything)
        for gradient, *each in zip(
            found.images, u, picked, strict=True
        ):  # made again: N graphs would be kept otherwise
            total += torch.autograd.grad(self._prepared(everything, *each), everything, gradient)[0]
        return found.distance, torch.autograd.grad(decoded, stored, total)[0], found.step_size

    def _prepared(self, decoded: Tensor, u: Tensor, chosen: Tensor | None) -> Tensor:
        """A batch of the student: (classes, S, C, H, W) -> (n, C, H, W), thinned out, normalised and augmented."""
        if chosen is not None:
            decoded = decoded[torch.arange(len(decoded), device=decoded.device)[:, None], chosen]
        return self.matcher.augment(self.real.normalize(decoded.flatten(0, 1)), u)
