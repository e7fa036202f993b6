"""Networks of outer iterations from a pool that was trained on real images once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from models import NetSpec, Network
from utils.method.images import ImageSet
from utils.method.training import fresh_network, predict
from utils.method.trajectory import Trajectories
from utils.numerics.compute import Compute
from utils.numerics.derivatives import load
from utils.system.distributed import SINGLE, Group
from utils.system.draws import Draws

NETWORKS = ("fresh", "early", "middle")
DIRECTIONS, LEAST, MOST = 2, 0.01, 0.09  # of a perturbation, and the sizes of its coefficients


class Pool:
    """Networks made of the initial and final weights of some that were trained on real images.

    early (Acc-DD, Zhang et al., CVPR 2023): final weights, after few epochs, perturbed. middle (DANCE, Zhang et al.,
    IJCAI 2024): l * initial + (1 - l) * final weights, with l uniform in [0, 1). fresh: new networks; the pool then
    only judges images.
    """

    def __init__(self, trained: Trajectories, spec: NetSpec, epochs: int, how: str, group: Group = SINGLE) -> None:
        """epochs: of training, after which weights are final. how: one of NETWORKS. group: the ranks; the first alone
        reads `trained`."""
        self.trained, self.spec, self.epochs, self.how, self.group = trained, spec, epochs, how, group

    def __len__(self) -> int:
        return self.trained.count

    def final(self, k: int) -> Tensor:
        """Final parameters of network k, (P,), on the CPU. Raises UserError for a damaged file."""
        return self._ends(k)[1]

    def _ends(self, k: int) -> list[Tensor]:
        """Initial and final parameters of network k, on the CPU; the same on all ranks."""
        return self.group.broadcast(lambda: [theta.clone() for theta in self.trained.pair(k, 0, self.epochs)])

    def trained_network(self, k: int, draws: Draws) -> Network:
        """Network k as it was trained, on the device of `draws`."""
        net = fresh_network(self.spec, draws)
        load(net, self.final(k).to(draws.device, non_blocking=True))
        return net

    def network(self, k: int, draws: Draws) -> Network:
        """Network of an outer iteration, made of network k. Raises UserError for a damaged file."""
        net = fresh_network(self.spec, draws)
        if self.how == "fresh":
            return net
        # Otherwise the host would wait until the device has done all that it was given so far.
        initial, final = (theta.to(draws.device, non_blocking=True) for theta in self._ends(k))
        if self.how == "middle":
            share = draws.host.random()
            load(net, share * initial + (1 - share) * final)
        else:
            load(net, final)
            perturb(net, draws)
        return net


@torch.no_grad()
def perturb(net: Network, draws: Draws) -> None:
    """Move all weights along two random directions, in which every filter is as long as the network's own.

    A coefficient of random sign and a size in [0.01, 0.09] belongs to a direction. Biases and norms stay.
    """
    weights: list[Tensor] = [p for p in net.parameters() if p.dim() > 1]
    steps = [torch.zeros_like(p) for p in weights]
    for _ in range(DIRECTIONS):
        coefficient = draws.host.choice((-1, 1)) * draws.host.uniform(LEAST, MOST)
        for p, step in zip(weights, steps, strict=True):
            direction = draws.normal(*p.shape).to(p.dtype)
            step += coefficient * direction * (filter_norms(p) / filter_norms(direction))
    for p, step in zip(weights, steps, strict=True):
        p += step


def filter_norms(weight: Tensor) -> Tensor:
    """Norm of every filter or row of a weight, shaped so that it can be multiplied with it."""
    return weight.flatten(1).norm(dim=1).view(-1, *[1] * (weight.dim() - 1))


# --- What a pool's networks make of real images -----------------------------------------------------------------------


def image_losses(net: Network, images: ImageSet, compute: Compute) -> Tensor:
    """Cross-entropy of every image under a network, (N,), without augmentation."""
    return F.cross_entropy(predict(net, images, compute), images.labels, reduction="none")


def lowest(losses: Tensor, count: int) -> Tensor:
    """Positions of the `count` lowest losses (N,), in ascending order; on ties the first win."""
    return losses.argsort(stable=True)[:count].sort().values
