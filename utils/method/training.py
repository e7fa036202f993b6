"""Training networks on image sets: the short updates while distilling, and the full trainings of an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import models
from models import NetSpec, Network
from utils.method.augment import COLUMNS, GEOMETRY, Augment
from utils.method.images import ImageSet, RealImages, SyntheticImages
from utils.numerics import derivatives
from utils.numerics.compute import Captured, Compute
from utils.numerics.derivatives import flattened, separated
from utils.system.draws import Draws

MIXUPS = ("cut", "vanilla")  # CutMix, or images as they are
CUTMIX_PROBABILITY = 0.5
APPLY, SIZE, CENTRE_Y, CENTRE_X = range(4)  # columns of `mix`, the uniform numbers of a batch's CutMix
GATHERED = 2**24  # bytes of images that are gathered from a source at a time


@dataclass(frozen=True)
class Recipe:
    """Settings of a network's training: SGD with momentum, augmentation per image, with or without CutMix."""

    batch_size: int
    augment: Augment
    mixup: str
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    epochs: int = 1

    def lr_at(self, epoch: int) -> float:
        """Learning rate of an epoch: a fifth of `lr` from 2/3 of the epochs on, a twenty-fifth from 5/6."""
        drops = [start for start in (2 * self.epochs // 3, 5 * self.epochs // 6) if 0 < start <= epoch]
        return self.lr * 0.2 ** len(drops)


def fresh_network(spec: NetSpec, draws: Draws) -> Network:
    """Freshly initialised network whose weights depend on `draws` alone, on the device of `draws`."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(draws.host.getrandbits(63))
        net = models.build(spec)
    if draws.device.type == "cpu":
        return net
    # Convolutions on a GPU take weights, and return gradients, channels last.
    return net.to(draws.device).to(memory_format=torch.channels_last)


class Plan(NamedTuple):
    """Random choices of a network's epoch over n images, drawn on the device at once."""

    order: Tensor  # (n,) positions in the set
    u: Tensor  # (n, COLUMNS) for the augmentation, see utils/method/augment.py
    partner: Tensor  # (n,) CutMix: the image whose box is pasted into this one, by its position in the batch
    mix: Tensor  # (batches, 4) CutMix: whether, and with which box


def plan(index: Tensor, edges: list[tuple[int, int]], draws: Draws) -> Plan:
    """Random choices of a pass over the images at `index` (n,), in batches from edges[i][0] to edges[i][1]."""
    n, device = len(index), index.device
    order = index[draws.permutation(n)]
    u, chance, mix = draws.uniform(n, COLUMNS), draws.uniform(n), draws.uniform(len(edges), 4)
    sizes = torch.tensor([end - start for start, end in edges], dtype=torch.int64).to(device, non_blocking=True)
    batch = torch.arange(len(edges), device=device).repeat_interleave(sizes, output_size=n)
    first = (sizes.cumsum(0) - sizes)[batch]
    u[:, GEOMETRY] = u[first, GEOMETRY]  # one geometric operation per batch
    # In double precision: in float32, 15 + 0.99999997 is 16, and a partner would be of another batch.
    return Plan(order, u, (batch + chance.double()).argsort() - first, mix)


class Together(NamedTuple):
    """Ranks that train one network on the same batches, each on the images of its own classes."""

    is_own: Tensor  # (classes,) bool, True for this rank's classes
    all_reduce_sum: Callable[[Tensor], Tensor]  # sum over the ranks, in place


class Trainer:
    """Trainer of K networks of one shape, side by side, each on an image set of its own or all on the same."""

    def __init__(
        self,
        nets: Sequence[Network],
        sets: Sequence[ImageSet],
        recipe: Recipe,
        compute: Compute,
        source: RealImages | SyntheticImages | None = None,
        together: Together | None = None,
    ) -> None:
        """Prepare to train, with zero momentum.

        sets: one per network, all of one size. source: for a single set, where its images are taken from whenever a
        batch needs them; they have the shape and dtype of those in the set. together: the ranks that a single network
        is trained with.
        """
        self.source, self.together = source, together
        self.nets, self.recipe, self.compute = list(nets), recipe, compute
        shared = all(train is sets[0] for train in sets)
        # (K or 1, N, C, H, W) and (K or 1, N)
        self.images = sets[0].images[None] if shared else torch.stack([train.images for train in sets])
        self.labels = sets[0].labels[None] if shared else torch.stack([train.labels for train in sets])
        self.at_once = max(1, GATHERED // (recipe.batch_size * sets[0].images[0].nbytes))
        if source is not None:  # self.images and self.labels are then a buffer for a few batches
            room = min(len(source), self.at_once * recipe.batch_size + 1)  # see `batches`
            self.images = self.images.new_empty(1, room, *self.images.shape[2:])
            self.labels = self.labels.new_empty(1, room)
        soft = [train.soft for train in sets if train.soft is not None]
        assert len(soft) in (0, len(sets))
        self.soft = None if not soft else soft[0][None] if shared else torch.stack(soft)  # (K or 1, N, classes)
        self.normalize, self.classes = sets[0].normalize, sets[0].classes
        self.rows = torch.arange(len(self.images), device=compute.device)[:, None]
        self.parameters = [p for net in self.nets for p in net.parameters()]
        self.sgd = torch.optim.SGD(
            self.parameters, recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay, fused=True
        )
        if compute.device.type == "cuda":  # a CUDA graph reads the rate from memory: a number would stay as captured
            self.sgd.param_groups[0]["lr"] = torch.tensor(recipe.lr, device=compute.device)
        for p in self.parameters:
            self.sgd.state[p]["momentum_buffer"] = torch.zeros_like(p)
        # No CUDA graph of steps with other ranks: they wait for them, and a share of a batch is of random size.
        self.steps = Captured(self._steps, compute.device, replay=together is None)

    def __len__(self) -> int:
        """Number of images that each network trains on."""
        return self.images.shape[1] if self.source is None else len(self.source)

    @property
    def momentum(self) -> list[Tensor]:
        """Momentum buffers, in parameter order (the optimiser's own tensors)."""
        return [self.sgd.state[p]["momentum_buffer"] for p in self.parameters]

    def restart(self, net: Network) -> None:
        """Copy the weights of `net` into the only network trained here, and zero its momentum.

        Tensors keep their addresses, which CUDA graphs depend on.
        """
        self.nets[0].load_state_dict(net.state_dict())
        for buffer in self.momentum:
            buffer.zero_()

    def set_lr(self, lr: float) -> None:
        """Set the learning rate; on a GPU in place, where CUDA graphs read it."""
        group = self.sgd.param_groups[0]
        group["lr"] = group["lr"].fill_(lr) if isinstance(group["lr"], Tensor) else lr

    def epoch(self, index: Tensor, draws: Sequence[Draws]) -> None:
        """Train for one pass over the images at `index` (n,); every network has its own order and random numbers."""
        for net in self.nets:
            net.train()
        edges = batches(len(index), self.recipe.batch_size)
        plans = [plan(index, edges, d) for d in draws]
        order, u, partner, mix = map(torch.stack, zip(*plans, strict=True))
        # A GPU takes all batches that are at hand in one go. A CPU takes one, whose images then are in its cache.
        in_one_go = 1 if self.compute.device.type == "cpu" else self.at_once
        for first in range(0, len(edges), self.at_once):
            some = edges[first : first + self.at_once]
            offset = some[0][0]
            rows = self._gathered(order[:, offset : some[-1][1]])
            for i in range(0, len(some), in_one_go):
                start, end = some[i][0], some[i : i + in_one_go][-1][1]
                here, numbers = slice(start, end), slice(first + i, first + i + in_one_go)
                self.steps(rows[:, start - offset : end - offset], u[:, here], partner[:, here], mix[:, numbers])

    def _gathered(self, order: Tensor) -> Tensor:
        """Rows of self.images that hold the images at these positions, fetched from the source if there is one.

        order, and the rows: (K, n).
        """
        if self.source is None:
            return order
        images, labels = self.source.take(order[0])
        self.images[0, : len(labels)] = images
        self.labels[0, : len(labels)] = labels
        return torch.arange(len(labels), device=order.device)[None]

    def all_images(self, draws: Sequence[Draws]) -> None:
        """Train for one pass over all images."""
        self.epoch(torch.arange(len(self), device=self.images.device), draws)

    @torch.no_grad()
    def losses(self) -> Tensor:
        """Mean cross-entropy of every network on its images without augmentation and CutMix, (K,) float64."""
        assert self.source is None
        n = self.images.shape[1]
        total = self.images.new_zeros(len(self.nets), dtype=torch.float64)
        for k, net in enumerate(self.nets):
            net.eval()
            row = min(k, len(self.images) - 1)
            size = self.compute.images_at_once(self.images.shape[-1])
            for index in torch.arange(n, device=self.images.device).split(size):
                x = self.normalize(self.images[row, index])
                target = self.labels[row, index] if self.soft is None else self.soft[row, index].to(x.dtype)
                total[k] += F.cross_entropy(derivatives.logits(net, x, self.compute), target, reduction="sum")
        return total / n

    def _steps(self, index: Tensor, u: Tensor, partner: Tensor, mix: Tensor) -> None:
        """Take an SGD step of every network on each of its batches, whose images are prepared together.

        index, partner: (K, n); u: (K, n, COLUMNS); mix: (K, batches, 4).
        """
        labels, images = self.labels[self.rows, index], self.images[self.rows, index]
        x = self.recipe.augment(self.normalize(images.flatten(0, 1)), u.flatten(0, 1)).unflatten(0, index.shape)
        if self.soft is None:
            target = torch.eye(self.classes, dtype=x.dtype, device=x.device)[labels]
        else:
            target = self.soft[self.rows, index].to(x.dtype)
        if self.recipe.mixup == "cut":
            x, target = cutmix(x, target, partner, mix, self.recipe.batch_size)
        for start, end in batches(index.shape[1], self.recipe.batch_size):
            here = slice(start, end)
            self._step(x[:, here], target[:, here], labels[0, here])

    def _step(self, x: Tensor, target: Tensor, labels: Tensor) -> None:
        """Take an SGD step of every network on a batch. x: (K, n, C, H, W); target: (K, n, classes); labels: (n,)."""
        if self.together is None:
            gradients = self._gradients(x, target)
        else:
            gradients = [self._gradients_together(x, target, self.together, labels)]
        for p, g in zip(self.parameters, [g for of_net in gradients for g in of_net], strict=True):
            # The fused step reads all tensors in memory order.
            p.grad = g if g.stride() == p.stride() else torch.empty_like(p).copy_(g)
        self.sgd.step()

    def _gradients(self, x: Tensor, target: Tensor) -> list[list[Tensor]]:
        return self.compute.retry(lambda: derivatives.gradients(self.nets, x, target, self.compute))

    def _gradients_together(self, x: Tensor, target: Tensor, together: Together, labels: Tensor) -> list[Tensor]:
        """Gradients of a batch's mean loss, summed over ranks; each rank computes those of its own images."""
        rows = together.is_own[labels].nonzero().flatten()
        total = torch.zeros(sum(p.numel() for p in self.parameters), dtype=x.dtype, device=x.device)
        if len(rows):
            total += flattened(self._gradients(x[:, rows], target[:, rows])[0]) * (len(rows) / len(labels))
        return separated(self.nets[0], together.all_reduce_sum(total))


def update_network(trainer: Trainer, *, n_data: int | None, draws: Draws) -> None:
    """Train the network a little while distilling, so that its gradients stay informative (Algorithm 1).

    Takes the recipe's `epochs` over the same n_data random images, or over all for None.
    """
    index = draws.permutation(len(trainer))[:n_data]
    for _ in range(trainer.recipe.epochs):
        trainer.epoch(index, [draws])


def train_networks(
    spec: NetSpec, sets: Sequence[ImageSet], recipe: Recipe, draws: Sequence[Draws], compute: Compute
) -> Iterator[tuple[int, Trainer]]:
    """Train fresh networks side by side, each on all images of its set; the sets are of one size.

    Yields (number of epochs done, trainer) after every epoch.
    """
    trainer = Trainer([fresh_network(spec, d) for d in draws], sets, recipe, compute)
    for epoch in range(recipe.epochs):
        trainer.set_lr(recipe.lr_at(epoch))
        trainer.all_images(draws)
        yield epoch + 1, trainer


def batches(n: int, size: int) -> list[tuple[int, int]]:
    """(start, end) of every mini-batch of `size` among n images.

    A last batch of a single image joins the one before it, since batch norm needs two.
    """
    edges = [(start, min(start + size, n)) for start in range(0, n, size)]
    if size > 1 and len(edges) > 1 and edges[-1] == (n - 1, n):
        edges[-2:] = [(edges[-2][0], n)]
    return edges


def cutmix(x: Tensor, target: Tensor, partner: Tensor, mix: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
    """Paste a box of another image into every image of half of the batches (Yun et al., ICCV 2019).

    x: (K, n, C, H, W), images of some `batches` of `batch_size` one after the other; target: (K, n, classes); partner:
    (K, n) positions of the other images within their batch; mix: (K, batches, 4) uniform numbers, see Plan. Returns the
    images, and targets that are weighted by the area that each of the two images has in pixels, after clipping and
    rounding of the box.
    """
    strips = []
    for size, centre in ((x.shape[3], CENTRE_Y), (x.shape[4], CENTRE_X)):
        half = (size * (1 - mix[..., SIZE].double()).sqrt()).floor() // 2  # lambda ~ Beta(1, 1), sides sqrt(1 - lambda)
        middle = (size * mix[..., centre].double()).floor()
        at = torch.arange(size, device=x.device)
        strips.append((at >= (middle - half)[..., None]) & (at < (middle + half)[..., None]))  # (K, batches, size)
    applied = (mix[..., APPLY] < CUTMIX_PROBABILITY)[..., None, None]
    inside = strips[0][..., :, None] & strips[1][..., None, :] & applied  # (K, batches, H, W)
    share = inside.to(x.dtype).mean((2, 3))[..., None]
    # The batch of every image; a single image more than fits belongs to the last one.
    batch = (torch.arange(x.shape[1], device=x.device) // batch_size).clamp(max=mix.shape[1] - 1)
    inside, share = inside[:, batch, None], share[:, batch]
    rows = torch.arange(len(x), device=x.device)[:, None]
    other = partner + batch * batch_size
    return torch.where(inside, x[rows, other], x), (1 - share) * target + share * target[rows, other]


@torch.no_grad()
def predict(net: Network, images: ImageSet, compute: Compute) -> Tensor:
    """Logits of all images, (N, classes), without augmentation and by the statistics that batch norm has learned."""
    net.eval()
    at_once = max(512, compute.images_at_once(images.side))
    indices = torch.arange(len(images), device=images.device).split(at_once)
    batches = (images.batch(index)[0] for index in indices)
    return torch.cat([compute.retry(partial(derivatives.logits, net, x, compute)) for x in batches])


def confusion_matrix(net: Network, test: ImageSet, compute: Compute) -> Tensor:
    """Confusion matrix of a network, (classes, classes) int64: test images by class (row) and prediction (column)."""
    pairs = test.labels * test.classes + predict(net, test, compute).argmax(1)
    return torch.bincount(pairs, minlength=test.classes**2).view(test.classes, test.classes)
