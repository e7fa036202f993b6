"""Random numbers from a key, so that a run can go on anywhere without a stored generator."""

from __future__ import annotations

import hashlib
import random

import torch
from torch import Tensor


class Draws:
    """Random numbers that depend on nothing but a key such as (seed, "select", iteration, step).

    A run can therefore stop and go on anywhere without storing a generator's state. `host` serves choices that Python
    makes (no copy from the device is ever waited for), the methods serve tensors, drawn on the device.
    """

    def __init__(self, device: torch.device | str, *key: int | str) -> None:
        digest = hashlib.sha256(repr(key).encode()).digest()
        seed = int.from_bytes(digest[:8], "little") >> 1
        self.device, self.key = torch.device(device), key
        self.host = random.Random(seed)
        self.generator = torch.Generator(self.device).manual_seed(seed)

    def of_class(self, c: int) -> Draws:
        """Numbers for one class that do not depend on which other classes are drawn for."""
        return Draws(self.device, *self.key, "class", c)

    def uniform(self, *shape: int) -> Tensor:
        """In [0, 1)."""
        return torch.rand(shape, generator=self.generator, device=self.device)

    def normal(self, *shape: int) -> Tensor:
        """Zero mean, unit variance."""
        return torch.randn(shape, generator=self.generator, device=self.device)

    def permutation(self, n: int) -> Tensor:
        """The numbers below n in random order; its head is a draw without replacement."""
        return torch.randperm(n, generator=self.generator, device=self.device)

    def network_seed(self) -> int:
        """A seed for PyTorch's global generator, from which networks are initialised."""
        return self.host.getrandbits(63)
