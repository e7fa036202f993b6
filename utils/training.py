"""Training networks on image sets: the short updates while distilling, and the full trainings of an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import models
from models import NetSpec, Network
from utils import forms
from utils.augment import GEOMETRY, Augment
from utils.device import Captured, Compute
from utils.images import ImageSet
from utils.runtime import Draws

MIXUPS = ("cut", "vanilla")  # CutMix, or nothing
CUTMIX_PROBABILITY = 0.5
APPLY, SIZE, CENTRE_Y, CENTRE_X = range(4)  # the uniform numbers of a CutMix


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
    u: Tensor  # (n, 9) for the augmentation, see utils/augment.py
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


class Trainer:
    """K networks of one shape that train side by side, each on an image set of its own, or all on one."""

    def __init__(
        self,
        nets: Sequence[Network],
        sets: Sequence[ImageSet],
        recipe: Recipe,
        compute: Compute,
        current: Callable[[], Tensor] | None = None,
    ) -> None:
        """current: gives the images of the one set as they are by now, (N, C, H, W), where they change."""
        self.current = current
        self.nets, self.recipe, self.compute = list(nets), recipe, compute
        shared = all(train is sets[0] for train in sets)
        self.images, self.labels = (
            tensors[0][None] if shared else torch.stack(tensors)
            for tensors in ([train.images for train in sets], [train.labels for train in sets])
        )  # (K or 1, N, C, H, W) and (K or 1, N)
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
        self.step = Captured(self._step, compute.device)

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
        for number, (start, end) in enumerate(edges):
            self.step(order[:, start:end], u[:, start:end], partner[:, start:end], mix[:, number])

    def all_images(self, draws: Sequence[Draws]) -> None:
        """One pass over all images."""
        self.epoch(torch.arange(self.images.shape[1], device=self.images.device), draws)

    @torch.no_grad()
    def losses(self) -> Tensor:
        """Mean cross-entropy of every network on its images as they are, neither augmented nor mixed, (K,)."""
        n = self.images.shape[1]
        total = self.images.new_zeros(len(self.nets), dtype=torch.float64)
        for k, net in enumerate(self.nets):
            net.eval()
            row = min(k, len(self.images) - 1)
            for index in torch.arange(n, device=self.images.device).split(self.compute.images(self.images.shape[-1])):
                x = self.normalize(self.images[row, index])
                target = self.labels[row, index] if self.soft is None else self.soft[row, index].to(x.dtype)
                total[k] += F.cross_entropy(forms.logits(net, x, self.compute), target, reduction="sum")
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
        found = self.compute.retry(lambda: forms.gradients(self.nets, x, target, self.compute))
        for p, g in zip(self.parameters, [g for net in found for g in net], strict=True):
            p.grad = g.contiguous()  # like p: the fused step takes both as they lie in memory
        self.sgd.step()


def update_network(trainer: Trainer, *, n_data: int | None, draws: Draws) -> None:
    """`epochs` passes over n_data random images, or all: what keeps gradients informative while distilling."""
    if trainer.current is not None:
        trainer.images.copy_(trainer.current()[None])
    drawn = draws.permutation(trainer.images.shape[1])[:n_data]
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
    for index in torch.arange(len(test), device=test.device).split(max(512, compute.images(test.side))):
        x, y = test.batch(index)
        found = compute.retry(partial(forms.predict, net, x, compute))
        counts += torch.bincount(y * test.classes + found, minlength=test.classes**2)
    return counts.view(test.classes, test.classes)
