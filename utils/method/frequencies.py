"""Frequencies at which characteristic functions are compared (NCFM, Wang et al., CVPR 2025): random ones, or those of a
small network that learns where real and synthetic images differ.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from utils.system.distributed import SINGLE, Group
from utils.system.draws import Draws

FREQUENCIES = ("random", "learned")
HIDDEN = 64  # units of the small network
RATE, MOMENTUM = 0.002, 0.9  # of its steps, each along a gradient of length one


class Made(NamedTuple):
    """Frequencies (M, D) of a step, as a leaf for distances and with their graph, and the parameters of this graph."""

    leaf: Tensor
    graph: Tensor
    parameters: Tensor


class Frequencies:
    """Makes the frequencies of every step, (M, D), from normal random numbers z of that shape.

    learned: they are z + tanh(z A^T) B^T, each scaled to the length of its z, so that the small network chooses
    directions and no lengths. It takes a step up the distance after every step of the pixels, on the same images; so
    pixels and frequencies learn in alternation.
    """

    def __init__(
        self,
        count: int,
        size: int,
        *,
        how: str,
        draws: Draws,
        group: Group = SINGLE,
    ) -> None:
        """Begin with random frequencies.

        count, size: M and D. how: one of FREQUENCIES. group: the ranks that learn them together, each of which compares
        images of other classes.
        """
        self.count, self.size, self.group = count, size, group
        self.learned: dict[str, Tensor] = {}  # parameters (A, B) and their velocity, (2, 2, HIDDEN, D)
        if how == "learned":
            first = draws.normal(HIDDEN, size) / size**0.5
            nothing = torch.zeros_like(first)
            parameters = torch.stack([first, nothing])  # B = 0
            self.learned["frequencies"] = torch.stack([parameters, torch.zeros_like(parameters)])

    @property
    def together(self) -> bool:
        """Whether ranks learn them together, for which they wait for each other."""
        return bool(self.learned) and not self.group.alone

    def draw(self, draws: Draws) -> Tensor:
        """Random numbers z of a step, (M, D)."""
        return draws.normal(self.count, self.size)

    def __call__(self, z: Tensor) -> Made:
        """Frequencies of a step from its random numbers (M, D)."""
        if not self.learned:
            return Made(z, z, z)
        parameters = self.learned["frequencies"][0].clone().requires_grad_()
        with torch.enable_grad():
            a, b = parameters
            moved = z + (z @ a.mT).tanh() @ b
            made = moved * (z.norm(dim=1, keepdim=True) / moved.norm(dim=1, keepdim=True))
        return Made(made.detach().requires_grad_(), made, parameters)

    @torch.no_grad()
    def ascend(self, made: Made) -> None:
        """Step up the distance whose gradient by the frequencies is in `made.leaf.grad`."""
        if not self.learned:
            return
        assert made.leaf.grad is not None
        (gradient,) = torch.autograd.grad(made.graph, made.parameters, self.group.all_reduce_sum(made.leaf.grad))
        parameters, velocity = self.learned["frequencies"]
        velocity.mul_(MOMENTUM).add_(gradient / gradient.norm().clamp(min=1e-12))
        parameters.add_(RATE * velocity)
