"""Images that a network trains on while distilling, gathered when they are needed: real ones, of which this process may
hold some classes only, and synthetic ones, which change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from utils.method.images import ImageSet, starts

Merge = Callable[
    [Tensor], Tensor
]  # of tensors that are zero wherever they belong to others, see utils/system/distributed.py


class Source(Protocol):
    """Labelled images, grouped by class."""

    def __len__(self) -> int: ...

    def take(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Those at the given positions, (n, C, H, W), and their labels, (n,)."""


class RealImages:
    """All real images, those of the classes that this process holds and those that others do."""

    def __init__(self, held: ImageSet, counts: Sequence[int], merge: Merge | None) -> None:
        """counts: of all classes. merge: brings the images of other processes, where there are any that are needed;
        without it their places are zero."""
        self.held, self.merge = held, merge
        sizes = torch.tensor(counts, device=held.device)
        self.labels = torch.arange(len(counts), device=held.device).repeat_interleave(sizes)  # (N,)
        # How much farther back in all of them an image lies than in those that are held.
        first = torch.tensor(starts(counts), device=held.device)
        self.shift = first - torch.tensor(held.starts, device=held.device)  # (classes,)
        self.complete = len(held) == len(self.labels)
        self.ours = torch.isin(self.labels, torch.tensor(held.held, device=held.device))  # (N,)

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> tuple[Tensor, Tensor]:
        labels = self.labels[index]
        if self.complete:
            return self.held.images[index], labels
        ours = self.ours[index]
        found = self.held.images[(index - self.shift[labels]) * ours] * ours[:, None, None, None]
        return self.merge(found) if self.merge else found, labels

    def everywhere(self, positions: Tensor) -> Tensor:
        """Positions among the images held, of any shape -> those among all."""
        return positions + self.shift[self.held.labels[positions]]

    def here(self, positions: Tensor) -> Tensor:
        """And back."""
        return positions - self.shift[self.labels[positions]]


class SyntheticImages:
    """All training images that the synthetic set decodes to at the moment."""

    def __init__(self, current: Callable[[], Tensor], classes: int, each: int) -> None:
        """current: gives them, (classes, each, C, H, W)."""
        self.current, self.classes, self.each = current, classes, each

    def __len__(self) -> int:
        return self.classes * self.each

    def take(self, index: Tensor) -> tuple[Tensor, Tensor]:
        return self.current().flatten(0, 1)[index], index // self.each
