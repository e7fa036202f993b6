"""Random numbers from a key, so that a run can go on anywhere without a stored generator."""

from __future__ import annotations

import hashlib
import random

import torch
from torch import Tensor


class Draws:
    """Random numbers that depend on nothing but a key such as (seed, "select", iteration, step).

    So a run can stop and go on anywhere without storing a generator's state. `host` is for choices that Python makes,
    which then need no copy from the device; the methods return tensors, drawn on the device.
    """

    def __init__(self, device: torch.device | str, *key: int | str) -> None:
        digest = hashlib.sha256(repr(key).encode()).digest()
        seed = int.from_bytes(digest[:8], "little") >> 1
        self.device, self.key = torch.device(device), key
        self.host = random.Random(seed)
        self.generator = torch.Generator(self.device).manual_seed(seed)

    def of_class(self, c: int) -> Draws:
        """Random numbers for one class, which do not depend on which other classes there are."""
        return Draws(self.device, *self.key, "class", c)

    def uniform(self, *shape: int) -> Tensor:
        """Uniform random numbers in [0, 1), float32 on the device."""
        return torch.rand(shape, generator=self.generator, device=self.device)

    def normal(self, *shape: int) -> Tensor:
        """Normal random numbers of zero mean and unit variance, float32 on the device."""
        return torch.randn(shape, generator=self.generator, device=self.device)

    def permutation(self, n: int) -> Tensor:
        """Integers below n in random order, (n,) int64; the first k are a draw without replacement."""
        return torch.randperm(n, generator=self.generator, device=self.device)
