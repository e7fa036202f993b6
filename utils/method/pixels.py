"""The optimiser of the synthetic pixels: the published per-class SGD, all classes at once, exactly.

The published loop visits the classes in turn and steps ONE torch.optim.SGD over all pixels after each visit, with zero
gradient for the other classes. So within an inner step a class coasts on its momentum until its turn, moves by its own
gradient, and coasts on. The network is fixed meanwhile, so each class's gradient depends on its own pixels alone, and
the whole sweep has a closed form. With C classes, rate eta, momentum mu and S(k) = 1 + mu + ... + mu^(k-1):

    q_c = p_c - eta mu S(c) v_c                          where class c's gradient g_c is taken
    p_c <- p_c - eta (mu S(C) v_c + S(C - c) g_c)
    v_c <- mu^C v_c + mu^(C-1-c) g_c

DC, DM and MTT step all classes together instead, and on normalised images. Put C = 1 and c = 0 for every class: with
S(0) = 0 and S(1) = 1 the formulas are then those of an ordinary step of SGD.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from utils.method.images import Normalize

STEPS = ("sweep", "joint")  # class after class on pixels in [0, 1]; all classes together on normalised images


class PixelSGD:
    """SGD with momentum over pixels of shape (classes, ipc, C, H, W); updates them in place."""

    def __init__(
        self,
        pixels: Tensor,
        *,
        lr: float,
        momentum: float,
        joint: Normalize | None = None,
        held: Sequence[int] | None = None,
        classes: int | None = None,
        average: float = 0.0,
    ) -> None:
        """Begin with zero velocity.

        joint: the normalisation of images for steps of all classes together; None for the published sweep over the
        classes. held: the numbers of the classes in `pixels`; classes: how many there are in all. None for both:
        `pixels` holds every class. average: decay of a moving average of the pixels over steps; 0: there is none.
        """
        self.pixels = pixels
        self.velocity = torch.zeros_like(pixels)
        self.decay, self.average = average, pixels.clone() if average else None
        # A CUDA graph reads the rate from memory: a number would stay as captured.
        self.lr: float | Tensor = torch.tensor(lr, device=pixels.device) if pixels.device.type == "cuda" else lr
        self.momentum = momentum
        self.joint = joint
        turns = [0] * len(pixels) if joint else held or range(len(pixels))
        self.visits = 1 if joint else classes or len(pixels)
        sums = [0.0]  # S(0), S(1), ..., S(C)
        for _ in range(self.visits):
            sums.append(1.0 + momentum * sums[-1])

        def per_class(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, dtype=pixels.dtype, device=pixels.device).view(-1, 1, 1, 1, 1)

        self._before = per_class([sums[c] for c in turns])  # S(c)
        self._after = per_class([sums[self.visits - c] for c in turns])  # S(C - c)
        self._decay = per_class([momentum ** (self.visits - 1 - c) for c in turns])  # mu^(C-1-c)
        self._sweep = sums[self.visits]  # S(C)

    def set_lr(self, lr: float) -> None:
        """Set the learning rate; on a GPU in place, where CUDA graphs read it."""
        self.lr = self.lr.fill_(lr) if isinstance(self.lr, Tensor) else lr

    def lookahead(self) -> Tensor:
        """Pixels q at which the next gradients have to be taken, (classes, ipc, C, H, W)."""
        return self.pixels - self.lr * self.momentum * self._before * self.velocity

    @torch.no_grad()
    def step(self, gradients: Tensor) -> None:
        """Step the pixels of every class. gradients: shaped like the pixels, taken at `lookahead()`."""
        if self.joint is not None:
            gradients = self.joint.preconditioned(gradients)
        self.pixels -= self.lr * (self.momentum * self._sweep * self.velocity + self._after * gradients)
        self.velocity.mul_(self.momentum**self.visits).add_(self._decay * gradients)
        if self.average is not None:
            self.average.lerp_(self.pixels, 1 - self.decay)

    @torch.no_grad()
    def clamp(self) -> None:
        """Clamp the pixels to [0, 1], as published at the start of every outer iteration and nowhere else."""
        self.pixels.clamp_(0, 1)
