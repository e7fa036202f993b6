"""Matching of training trajectories (MTT, Cazenavette et al., CVPR 2022).

A student starts from the parameters of an expert after some epoch, and trains on the synthetic images. The images learn
to bring it to where the expert was some epochs later.

The student takes N steps of plain SGD, theta_{t+1} = theta_t - a g_t, with the gradient g_t of the cross-entropy on the
images x_t. With lambda_N = dL/dtheta_N, the derivatives of the distance L are, from the last step to the first,

    s_t = <g_t(theta_t, x_t), lambda_{t+1}>             lambda_{t+1} held constant
    dL/da   = - (s_0 + s_1 + ... + s_{N-1})
    dL/dx_t = - a ds_t/dx_t
    lambda_t = lambda_{t+1} - a ds_t/dtheta_t

So only theta_t has to be kept of a step: everything else can be computed again on the way back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from models import Network
from utils.method.images import ImageSet
from utils.method.matching import Matcher
from utils.method.pixels import PixelSGD
from utils.numerics import derivatives
from utils.numerics.compute import Captured, Compute
from utils.numerics.derivatives import flattened, load, separated
from utils.system.distributed import SINGLE, Group
from utils.system.draws import Draws

LEAST_STEP = 1e-6  # smallest step size of a student, see TrajectoryStep._step


class Trajectories(Protocol):
    """Parameters of trained experts after each of their epochs."""

    count: int  # number of experts

    def pair(self, expert: int, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Parameters of an expert after `start` and after `end` epochs, (P,) each, on the CPU."""


# --- The student ------------------------------------------------------------------------------------------------------


class Unrolled(NamedTuple):
    """Distance between where a student ends and where the expert ends, and its derivatives."""

    distance: Tensor  # (), squared, in units of the expert's own way: 1 for a student that does not move
    images: list[Tensor]  # derivative by the images of every step, shaped like its batch
    step_size: Tensor  # (), derivative by the step size


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
    all_reduce_sum: Callable[[Tensor], Tensor] = lambda x: x,
) -> Unrolled:
    """Train a student for one SGD step on each batch, and differentiate its distance to the expert.

    start, target: (P,) parameters of the expert, where the student starts and where it should end. batches: (n, C, H,
    W) each, normalised and augmented; labels: (n,) int64 each; step_size: (). share: fraction of every batch that this
    rank has; all_reduce_sum: the sum over the ranks that have the rest, in place. The network's parameters are
    overwritten; batch norm normalises by the batch and updates no running statistics.
    """
    net.train()
    targets = [F.one_hot(y, net.classifier.out_features).to(start.dtype) for y in labels]
    # Keeping every step's graph for the way back takes 2 to 12 times the memory, computing it again 1.2 to 1.6 times
    # the time.
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
            path.append(path[-1] - step_size * all_reduce_sum(share * gradient))
        error, norm = path.pop() - target, (start - target).square().sum()
        adjoint = 2 * error / norm  # lambda_N
        images, by_size = [], torch.zeros_like(step_size)
        for x, y in zip(reversed(batches), reversed(targets), strict=True):
            parameters = separated(net, path.pop())
            batch = kept.pop() if keep else derivatives.pieces(net, parameters, x, y, compute, gradients=False)
            slope, by_theta, by_x = derivatives.slope(batch, separated(net, adjoint))
            by_size -= share * slope  # s_t
            images.append(-step_size * share * by_x)
            adjoint = adjoint - step_size * all_reduce_sum(share * flattened(by_theta))
    return Unrolled(error.square().sum() / norm, images[::-1], all_reduce_sum(by_size))


# --- The synthetic images ---------------------------------------------------------------------------------------------


class TrajectoryStep:
    """Step of the pixels and of the student's step size, against a random part of a random expert's trajectory.

    `learned` is what is learned besides the pixels: the step size and its velocity, (2,). A checkpoint saves it, and
    copies into it in place. The student uses the network given, whose parameters are overwritten.
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
        group: Group = SINGLE,
    ) -> None:
        """Prepare students of `steps` steps, which are to do what an expert does in `epochs` epochs.

        They start where the expert was after fewer than `max_start` epochs. step_size: its initial value. lr_step: the
        learning rate of the step size, which has the momentum of the pixels. group: the ranks that train a student
        together, each on the images of its classes.
        """
        self.matcher, self.net, self.pixels, self.real, self.trajectories = matcher, net, pixels, real, trajectories
        self.group = group
        self.steps, self.epochs, self.max_start, self.lr_step = steps, epochs, max_start, lr_step
        stored = pixels.pixels
        self.held = torch.tensor(real.held, device=stored.device)
        self.decoded = matcher.formation.decoded_count(stored.shape[1])
        self.each = min(self.decoded, matcher.batch_syn_max)  # images per class and step of the student
        self.learned = {"step_size": torch.tensor([step_size, 0.0], dtype=stored.dtype, device=stored.device)}
        self.labels = self.held.repeat_interleave(self.each)
        self._captured = Captured(self._step, matcher.compute.device, replay=group.alone)

    def __call__(self, picks: Tensor, draws: Draws) -> Tensor:
        """Move the pixels and the step size. Returns the distance, repeated per class, (classes,), until the next call.

        picks: not used, since no real images take part.
        """
        expert, start = draws.host.randrange(self.trajectories.count), draws.host.randrange(self.max_start)
        part = (expert, start, start + self.epochs)
        ends = self.group.broadcast(lambda: [theta.clone() for theta in self.trajectories.pair(*part)])  # no views
        # Otherwise the host would wait until the device has done all that it was given so far.
        ends = [theta.to(self.real.device, non_blocking=True) for theta in ends]
        return self._captured(*ends, *self.draw(draws))

    def draw(self, draws: Draws) -> tuple[Tensor, ...]:
        """Random choices of a student's steps: augmentations (steps, n, COLUMNS), and images (steps, classes, each).

        The latter are positions within the class, drawn only where more images are decoded than may take part.
        """
        classes = self.real.classes  # draws are for all classes, so that they do not depend on the number of ranks
        u = self.matcher.augment.draw(self.steps, classes * self.each, draws)
        u = u.unflatten(0, (self.steps, classes, self.each))[:, self.held].flatten(1, 2)
        if self.each == self.decoded:
            return (u,)
        return u, draws.uniform(self.steps, classes, self.decoded).argsort(2)[:, self.held, : self.each]

    def _step(self, start: Tensor, target: Tensor, *drawn: Tensor) -> Tensor:
        ahead = self.pixels.lookahead()
        if self.group.alone:
            results = self.matcher.compute.retry(lambda: self._gradients(ahead, start, target, *drawn))
        else:  # without retry when memory is full: the other ranks have gone on, or wait
            results = self._gradients(ahead, start, target, *drawn)
        distance, by_pixels, by_size = results
        self.pixels.step(by_pixels)
        size, velocity = self.learned["step_size"]
        velocity.mul_(self.pixels.momentum).add_(by_size)
        # With a step size of zero the student would not move and the images would learn nothing; below zero it would
        # climb the loss.
        size.sub_(self.lr_step * velocity).clamp_(min=LEAST_STEP)
        return distance.expand(len(self.held))

    def _gradients(
        self, pixels: Tensor, start: Tensor, target: Tensor, u: Tensor, chosen: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Distance (), and its derivatives by the pixels, (classes, ipc, C, H, W), and by the step size, ()."""
        stored = pixels.detach().requires_grad_()
        decoded = self.matcher.formation.decode(stored)
        leaf = decoded.detach().requires_grad_()
        picked = [None] * self.steps if chosen is None else chosen
        with torch.no_grad():
            batches = [self._prepared(leaf, *step) for step in zip(u, picked, strict=True)]
        size = self.learned["step_size"][0].clone()
        labels, share = [self.labels] * self.steps, len(self.held) / self.real.classes
        compute, all_reduce_sum = self.matcher.compute, self.group.all_reduce_sum
        student = unrolled(
            self.net, start, target, batches, labels, size, compute, share=share, all_reduce_sum=all_reduce_sum
        )
        total = torch.zeros_like(leaf)
        # Batches are prepared a second time, one by one: otherwise the graphs of all steps would be in memory at once.
        for gradient, *step in zip(student.images, u, picked, strict=True):
            total += torch.autograd.grad(self._prepared(leaf, *step), leaf, gradient)[0]
        return student.distance, torch.autograd.grad(decoded, stored, total)[0], student.step_size

    def _prepared(self, decoded: Tensor, u: Tensor, chosen: Tensor | None) -> Tensor:
        """Batch of a student's step, (n, C, H, W): the chosen of (classes, S, C, H, W), normalised and augmented."""
        if chosen is not None:
            decoded = decoded[torch.arange(len(decoded), device=decoded.device)[:, None], chosen]
        return self.matcher.augment(self.real.normalize(decoded.flatten(0, 1)), u)
