"""Training a network on an image set: the short updates while distilling, and the full trainings of an evaluation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import models
from models import NetSpec, Network
from utils.augment import Augment
from utils.images import ImageSet
from utils.runtime import Draws, chunk_size

MIXUPS = ("cut", "vanilla")  # CutMix, or nothing
CUTMIX_PROBABILITY = 0.5


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

    def optimizer(self, net: Network) -> torch.optim.SGD:
        return torch.optim.SGD(net.parameters(), lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)


def fresh_network(spec: NetSpec, draws: Draws) -> Network:
    """A network whose initial weights depend on `draws` alone, on the device of `draws`."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(draws.network_seed())
        return models.build(spec).to(draws.device)


def update_network(
    net: Network, sgd: torch.optim.Optimizer, real: ImageSet, recipe: Recipe, *, n_data: int, draws: Draws
) -> None:
    """`recipe.epochs` passes over n_data random real images: what keeps gradients informative while distilling."""
    net.train()
    drawn = draws.permutation(len(real))[:n_data]
    for _ in range(recipe.epochs):
        train_epoch(net, sgd, real, drawn, recipe, draws)


def train_network(
    spec: NetSpec, train: ImageSet, recipe: Recipe, draws: Draws, on_epoch: Callable[[], None] = lambda: None
) -> Network:
    """A fresh network trained on the whole set; the rate falls to a fifth at 2/3 and again at 5/6 of the epochs."""
    net = fresh_network(spec, draws)
    sgd = recipe.optimizer(net)
    falls = [epoch for epoch in (2 * recipe.epochs // 3, 5 * recipe.epochs // 6) if epoch > 0]
    schedule = torch.optim.lr_scheduler.MultiStepLR(sgd, falls, gamma=0.2)
    everything = torch.arange(len(train), device=train.device)
    for _ in range(recipe.epochs):
        train_epoch(net, sgd, train, everything, recipe, draws)
        schedule.step()
        on_epoch()
    return net


def train_epoch(
    net: Network, sgd: torch.optim.Optimizer, train: ImageSet, index: Tensor, recipe: Recipe, draws: Draws
) -> None:
    """One pass over the images at `index`, in random order."""
    for batch in batches(index[draws.permutation(len(index))], recipe.batch_size):
        x, y = train.batch(batch)
        x = recipe.augment(x, recipe.augment.draw(len(x), draws))
        other, share = y, 1.0
        if recipe.mixup == "cut" and draws.host.random() < CUTMIX_PROBABILITY:
            x, other, share = cutmix(x, y, draws)
        logits = net(x)
        loss = share * F.cross_entropy(logits, y)
        if share < 1:
            loss = loss + (1 - share) * F.cross_entropy(logits, other)
        sgd.zero_grad()
        loss.backward()
        sgd.step()


def batches(index: Tensor, size: int) -> list[Tensor]:
    """`index` in pieces of `size`; a last piece of one image joins its neighbour, since batch norm needs two."""
    pieces = list(index.split(size)) if len(index) else []
    if size > 1 and len(pieces) > 1 and len(pieces[-1]) == 1:
        pieces[-2:] = [torch.cat(pieces[-2:])]
    return pieces


def cutmix(x: Tensor, y: Tensor, draws: Draws) -> tuple[Tensor, Tensor, float]:
    """Paste a box of a random other image of the batch (Yun et al., ICCV 2019).

    Returns the images, the labels of the pasted boxes, and the share of the area that an image keeps.
    """
    height, width = x.shape[2:]
    cut = (1 - draws.host.random()) ** 0.5  # lambda ~ Beta(1, 1), the box has sides sqrt(1 - lambda)
    centre_y, centre_x = draws.host.randrange(height), draws.host.randrange(width)
    half_y, half_x = int(height * cut) // 2, int(width * cut) // 2
    top, bottom = max(centre_y - half_y, 0), min(centre_y + half_y, height)
    left, right = max(centre_x - half_x, 0), min(centre_x + half_x, width)
    order = draws.permutation(len(x))
    mixed = x.clone()
    mixed[:, :, top:bottom, left:right] = x[order][:, :, top:bottom, left:right]
    return mixed, y[order], 1 - (bottom - top) * (right - left) / (height * width)


@torch.no_grad()
def accuracy(net: Network, test: ImageSet) -> float:
    """Per cent of the test images that the network classifies correctly."""
    net.eval()
    right = torch.zeros((), dtype=torch.int64, device=test.device)
    for index in torch.arange(len(test), device=test.device).split(chunk_size(test.device, test.side)):
        x, y = test.batch(index)
        right += (net(x).argmax(1) == y).sum()
    return 100 * right.item() / len(test)
