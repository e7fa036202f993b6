"""Training networks on image sets: the short updates while distilling, and the full trainings of an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import models
from models import NetSpec, Network
from utils.method.augment import GEOMETRY, Augment
from utils.method.images import ImageSet
from utils.method.sources import Source
from utils.numerics import derivatives
from utils.numerics.compute import Captured, Compute
from utils.numerics.derivatives import flattened, separated
from utils.system.draws import Draws

MIXUPS = ("cut", "vanilla")  # CutMix, or nothing
CUTMIX_PROBABILITY = 0.5
APPLY, SIZE, CENTRE_Y, CENTRE_X = range(4)  # the uniform numbers of a CutMix
GATHERED = 2**24  # bytes of images that are gathered from a source at a time


@dataclass(frozen=True)
class Recipe:
    """How a network is trained: SGD with momentum, augmentation per image, CutMix or not."""

    batch_size: int
    augment: Augment
    mixup: str
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    epochs: int = 1

    def lr_at(self, epoch: int) -> float:
        """A fifth of it from 2/3 of the epochs on, and a fifth of that from 5/6."""
        falls = [fall for fall in (2 * self.epochs // 3, 5 * self.epochs // 6) if 0 < fall <= epoch]
        return self.lr * 0.2 ** len(falls)


def fresh_network(spec: NetSpec, draws: Draws) -> Network:
    """A network whose initial weights depend on `draws` alone, on the device of `draws`."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(draws.network_seed())
        return models.build(spec).to(draws.device)


@dataclass(frozen=True)
class Plan:
    """All random choices of one epoch over n images of one network, drawn on the device at once."""

    order: Tensor  # (n,) positions in the set
    u: Tensor  # (n, 9) for the augmentation, see utils/method/augment.py
    partner: Tensor  # (n,) whose box an image gets: numbers within its batch
    mix: Tensor  # (batches, 4) for CutMix


def plan(index: Tensor, edges: list[tuple[int, int]], draws: Draws) -> Plan:
    """One pass over the images at `index` in random order, in batches that begin and end at `edges`."""
    n, device = len(index), index.device
    order = index[draws.permutation(n)]
    u, chance, mix = draws.uniform(n, 9), draws.uniform(n), draws.uniform(len(edges), 4)
    sizes = torch.tensor([end - start for start, end in edges], dtype=torch.int64).to(device, non_blocking=True)
    batch = torch.arange(len(edges), device=device).repeat_interleave(sizes, output_size=n)
    first = (sizes.cumsum(0) - sizes)[batch]
    u[:, GEOMETRY] = u[first, GEOMETRY]  # one geometric operation per batch
    return Plan(order, u, (batch + chance).argsort() - first, mix)


class Together(NamedTuple):
    """Processes that train one network on the same batches, each on the images of its own classes."""

    ours: Tensor  # (classes,) bool
    add: Callable[[Tensor], Tensor]  # the sum over all of them, in place


class Trainer:
    """K networks of one shape that train side by side, each on an image set of its own, or all on one."""

    def __init__(
        self,
        nets: Sequence[Network],
        sets: Sequence[ImageSet],
        recipe: Recipe,
        compute: Compute,
        source: Source | None = None,
        together: Together | None = None,
    ) -> None:
        """source: where the images come from whenever they are needed, like those of the one set in shape and type.

        together: with whom the one network is trained.
        """
        self.source, self.together = source, together
        self.nets, self.recipe, self.compute = list(nets), recipe, compute
        shared = all(train is sets[0] for train in sets)
        self.images, self.labels = (
            tensors[0][None] if shared else torch.stack(tensors)
            for tensors in ([train.images for train in sets], [train.labels for train in sets])
        )  # (K or 1, N, C, H, W) and (K or 1, N)
        if source is not None:  # these then hold a few batches at a time
            batch = recipe.batch_size * sets[0].images[0].nbytes
            self.at_once = max(1, GATHERED // batch)
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
        if compute.device.type == "cuda":  # where a captured step reads it
            self.sgd.param_groups[0]["lr"] = torch.tensor(recipe.lr, device=compute.device)
        for p in self.parameters:
            self.sgd.state[p]["momentum_buffer"] = torch.zeros_like(p)
        # What waits for other processes, and has as many images as chance gives this one, is not replayed.
        self.step = Captured(self._step, compute.device, replay=together is None)

    def __len__(self) -> int:
        """Images of each network."""
        return self.images.shape[1] if self.source is None else len(self.source)

    @property
    def momentum(self) -> list[Tensor]:
        """Of every parameter, where the optimiser has it."""
        return [self.sgd.state[p]["momentum_buffer"] for p in self.parameters]

    def restart(self, net: Network) -> None:
        """Begin again with the weights of `net`, at the same addresses, and without momentum. For a single network."""
        self.nets[0].load_state_dict(net.state_dict())
        for velocity in self.momentum:
            velocity.zero_()

    def set_lr(self, lr: float) -> None:
        group = self.sgd.param_groups[0]
        group["lr"] = group["lr"].fill_(lr) if isinstance(group["lr"], Tensor) else lr

    def epoch(self, index: Tensor, draws: Sequence[Draws]) -> None:
        """One pass over the images at `index`, in an order and with draws of its own for every network."""
        for net in self.nets:
            net.train()
        edges = batches(len(index), self.recipe.batch_size)
        plans = [plan(index, edges, d) for d in draws]
        order, u, partner, mix = (
            torch.stack([getattr(p, name) for p in plans]) for name in ("order", "u", "partner", "mix")
        )
        at_once = len(edges) if self.source is None else self.at_once
        for first in range(0, len(edges), max(1, at_once)):
            some = edges[first : first + at_once]
            offset = some[0][0]
            rows = self._gathered(order[:, offset : some[-1][1]])
            for number, (start, end) in enumerate(some, first):
                here = slice(start, end)
                self.step(rows[:, start - offset : end - offset], u[:, here], partner[:, here], mix[:, number])

    def _gathered(self, order: Tensor) -> Tensor:
        """Where the images at these positions are to be found, (K, n) both."""
        if self.source is None:
            return order
        images, labels = self.source.take(order[0])
        self.images[0, : len(labels)] = images
        self.labels[0, : len(labels)] = labels
        return torch.arange(len(labels), device=order.device)[None]

    def all_images(self, draws: Sequence[Draws]) -> None:
        """One pass over all images."""
        self.epoch(torch.arange(len(self), device=self.images.device), draws)

    @torch.no_grad()
    def losses(self) -> Tensor:
        """Mean cross-entropy of every network on its images as they are, neither augmented nor mixed, (K,)."""
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

    def _step(self, index: Tensor, u: Tensor, partner: Tensor, mix: Tensor) -> None:
        """One batch of every network. index, partner: (K, n); u: (K, n, 9); mix: (K, 4)."""
        images = self.images[self.rows, index]
        x = self.recipe.augment(self.normalize(images.flatten(0, 1)), u.flatten(0, 1)).unflatten(0, index.shape)
        if self.soft is None:
            target = torch.eye(self.classes, dtype=x.dtype, device=x.device)[self.labels[self.rows, index]]
        else:
            target = self.soft[self.rows, index].to(x.dtype)
        if self.recipe.mixup == "cut":
            x, target = cutmix(x, target, partner, mix)
        if self.together is None:
            found = self._gradients(x, target)
        else:
            found = [self._gradients_together(x, target, self.together, self.labels[0, index[0]])]
        for p, g in zip(self.parameters, [g for net in found for g in net], strict=True):
            p.grad = g.contiguous()  # like p: the fused step takes both as they lie in memory
        self.sgd.step()

    def _gradients(self, x: Tensor, target: Tensor) -> list[list[Tensor]]:
        return self.compute.retry(lambda: derivatives.gradients(self.nets, x, target, self.compute))

    def _gradients_together(self, x: Tensor, target: Tensor, together: Together, labels: Tensor) -> list[Tensor]:
        """Of the whole batch, from each process's share of it, which counts as much as it has images."""
        rows = together.ours[labels].nonzero().flatten()
        total = torch.zeros(sum(p.numel() for p in self.parameters), dtype=x.dtype, device=x.device)
        if len(rows):
            total += flattened(self._gradients(x[:, rows], target[:, rows])[0]) * (len(rows) / len(labels))
        return separated(self.nets[0], together.add(total))


def update_network(trainer: Trainer, *, n_data: int | None, draws: Draws) -> None:
    """`epochs` passes over n_data random images, or all: what keeps gradients informative while distilling."""
    drawn = draws.permutation(len(trainer))[:n_data]
    for _ in range(trainer.recipe.epochs):
        trainer.epoch(drawn, [draws])


def train_networks(
    spec: NetSpec,
    sets: Sequence[ImageSet],
    recipe: Recipe,
    draws: Sequence[Draws],
    compute: Compute,
    on_epoch: Callable[[int, Trainer], None] = lambda epoch, trainer: None,
) -> list[Network]:
    """Fresh networks side by side, each trained on the whole of its set; the sets are of one size.

    on_epoch: told how many epochs are done.
    """
    trainer = Trainer([fresh_network(spec, d) for d in draws], sets, recipe, compute)
    for epoch in range(recipe.epochs):
        trainer.set_lr(recipe.lr_at(epoch))
        trainer.all_images(draws)
        on_epoch(epoch + 1, trainer)
    return trainer.nets


def batches(n: int, size: int) -> list[tuple[int, int]]:
    """range(n) in pieces of `size`, (start, end); a last one of a single image joins its neighbour, since batch norm
    needs two."""
    edges = [(start, min(start + size, n)) for start in range(0, n, size)]
    if size > 1 and len(edges) > 1 and edges[-1] == (n - 1, n):
        edges[-2:] = [(edges[-2][0], n)]
    return edges


def cutmix(x: Tensor, target: Tensor, partner: Tensor, mix: Tensor) -> tuple[Tensor, Tensor]:
    """Paste a box of another image into every image of half of the batches (Yun et al., ICCV 2019).

    x: (K, n, C, H, W); target: (K, n, classes); partner: (K, n) positions of the other images; mix: (K, 4) uniform
    numbers. Returns the images, and the targets weighted by the area that each kind of image really has.
    """
    inside = None
    for size, centre, dim in ((x.shape[3], CENTRE_Y, 0), (x.shape[4], CENTRE_X, 1)):
        half = (size * (1 - mix[:, SIZE].double()).sqrt()).floor() // 2  # lambda ~ Beta(1, 1), sides sqrt(1 - lambda)
        middle = (size * mix[:, centre].double()).floor()
        at = torch.arange(size, device=x.device)
        strip = (at >= (middle - half)[:, None]) & (at < (middle + half)[:, None])  # (K, size)
        strip = strip[:, :, None] if dim == 0 else strip[:, None, :]
        inside = strip if inside is None else inside & strip
    assert inside is not None
    inside = inside & (mix[:, APPLY] < CUTMIX_PROBABILITY)[:, None, None]  # (K, H, W)
    share = inside.to(x.dtype).mean((1, 2))[:, None, None]
    rows = torch.arange(len(x), device=x.device)[:, None]
    mixed = torch.where(inside[:, None, None], x[rows, partner], x)
    return mixed, (1 - share) * target + share * target[rows, partner]


@torch.no_grad()
def confusion_matrix(net: Network, test: ImageSet, compute: Compute) -> Tensor:
    """How many test images of each class (row) the network takes for each class (column), (classes, classes) int64."""
    net.eval()
    counts = torch.zeros(test.classes**2, dtype=torch.int64, device=test.device)
    for index in torch.arange(len(test), device=test.device).split(max(512, compute.images_at_once(test.side))):
        x, y = test.batch(index)
        found = compute.retry(partial(derivatives.predict, net, x, compute))
        counts += torch.bincount(y * test.classes + found, minlength=test.classes**2)
    return counts.view(test.classes, test.classes)
