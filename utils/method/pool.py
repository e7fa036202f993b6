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

MEMORY = 2**29  # bytes of weights that stay on the device
DIRECTIONS, LEAST, MOST = 2, 0.01, 0.09  # of a perturbation, and the sizes of its coefficients


class Pool:
    """Networks made of the initial and final weights of some that were trained on real images.

    early (Acc-DD, Zhang et al., CVPR 2023): final weights, after few epochs, perturbed. middle (DANCE, Zhang et al.,
    IJCAI 2024): l * initial + (1 - l) * final weights, with l uniform in [0, 1). fresh: new networks; the pool then
    only judges images.
    """

    def __init__(
        self,
        trained: Trajectories,
        spec: NetSpec,
        epochs: int,
        how: str,
        device: torch.device | str,
        group: Group = SINGLE,
    ) -> None:
        """epochs: of training, after which weights are final. how: one of the values of --networks. device: where the
        networks are used. group: the ranks, of which the first alone reads `trained`."""
        self.trained, self.spec, self.epochs, self.how = trained, spec, epochs, how
        self.device, self.group = torch.device(device), group
        self._net = fresh_network(spec, Draws(device, "pool"))  # for the weights of every outer iteration
        self._held: dict[int, list[Tensor]] = {}  # ends on the device

    def __len__(self) -> int:
        return self.trained.count

    def ends(self, k: int) -> list[Tensor]:
        """Initial and final parameters of network k, (P,) each, on the device; the same on all ranks.

        Raises UserError for a damaged file.
        """
        if k not in self._held:
            ends = self.group.broadcast(lambda: [theta.clone() for theta in self.trained.pair(k, 0, self.epochs)])
            if sum(theta.nbytes for held in self._held.values() for theta in held) > MEMORY:
                self._held.clear()
            # Otherwise the host would wait until the device has done all that it was given so far.
            self._held[k] = [theta.to(self.device, non_blocking=True) for theta in ends]
        return self._held[k]

    def trained_network(self, k: int) -> Network:
        """Network k as it was trained, by itself. Raises UserError for a damaged file."""
        net = fresh_network(self.spec, Draws(self.device, "pool", k))
        load(net, self.ends(k)[1])
        return net

    def network(self, k: int, draws: Draws) -> Network:
        """Network of an outer iteration, made of network k; the next call overwrites it.

        Raises UserError for a damaged file.
        """
        if self.how == "fresh":
            return fresh_network(self.spec, draws)
        initial, final = self.ends(k)
        if self.how == "middle":
            share = draws.host.random()
            load(self._net, share * initial + (1 - share) * final)
        else:
            load(self._net, final)
            perturb(self._net, draws)
        return self._net


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
