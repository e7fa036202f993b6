"""ConvNet, the usual network for distillation: depth 3, width 128, instance norm on 32 x 32 images (Sec. 4.1)."""

from __future__ import annotations

from torch import nn

from models.network import Network, norm2d


class ConvNet(Network):
    """ConvNet: `depth` blocks of 3x3 convolution -> norm -> ReLU -> 2x2 average pool, then one linear layer.

    Images of 28 x 28 are padded to 32 x 32 by the first convolution, as published for MNIST.
    """

    def __init__(self, *, channels: int, classes: int, side: int, depth: int, width: int, norm: str) -> None:
        super().__init__()
        padded = 32 if side == 28 else side
        if depth < 1 or padded >> depth < 1:
            raise ValueError(
                f"depth {depth} does not fit images of {side} x {side}: every block halves the side, "
                f"so use a depth from 1 to {padded.bit_length() - 1}"
            )
        blocks = []
        for i in range(depth):
            padding = 1 + (padded - side) // 2 if i == 0 else 1
            conv = nn.Conv2d(channels if i == 0 else width, width, 3, padding=padding)
            blocks.append(nn.Sequential(conv, norm2d(norm, width), nn.ReLU(), nn.AvgPool2d(2)))
        self.stem = nn.Identity()
        self.stages = nn.ModuleList(blocks)
        self.classifier = nn.Linear(width * (padded >> depth) ** 2, classes)

    @property
    def layers(self) -> list[tuple[nn.Conv2d, nn.Module]]:
        """Convolution and norm of every block."""
        return [(stage[0], stage[1]) for stage in self.stages]  # type: ignore[index]  # a Sequential, see above
