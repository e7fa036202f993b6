"""DenseNet for small images (Huang et al., CVPR 2017): the 121-layer layout with a 3x3 stem and a narrow growth."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.network import Network, norm2d

LAYOUTS = {121: (6, 12, 24, 16)}  # bottlenecks per dense block


class Bottleneck(nn.Module):
    """Bottleneck: norm -> ReLU -> 1x1 -> norm -> ReLU -> 3x3, whose `growth` channels are appended to the input."""

    def __init__(self, fan_in: int, growth: int, norm: str) -> None:
        super().__init__()
        self.norm1 = norm2d(norm, fan_in)
        self.conv1 = nn.Conv2d(fan_in, 4 * growth, 1, bias=False)
        self.norm2 = norm2d(norm, 4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        new = self.conv1(F.relu(self.norm1(x)))
        new = self.conv2(F.relu(self.norm2(new)))
        return torch.cat([x, new], 1)


class DenseNet(Network):
    """DenseNet of four dense blocks with transitions that halve the side between them; `width` is the growth rate."""

    def __init__(self, *, channels: int, classes: int, side: int, depth: int, width: int, norm: str) -> None:
        super().__init__()
        if depth not in LAYOUTS:
            raise ValueError(f"depth {depth} does not exist for a DenseNet here: use one of {sorted(LAYOUTS)}")
        if norm == "instance" and side < 16:
            raise ValueError(
                f"instance norm erases the last block of a DenseNet on {side} x {side} images, which is one pixel: "
                "use norm batch, or images of 16 x 16 and more"
            )
        fan = 2 * width
        self.stem = nn.Conv2d(channels, fan, 3, padding=1, bias=False)
        blocks = []
        for i, count in enumerate(LAYOUTS[depth]):
            layers: list[nn.Module] = []
            if i > 0:  # transition: half the channels, half the side
                layers += [norm2d(norm, fan), nn.ReLU(), nn.Conv2d(fan, fan // 2, 1, bias=False), nn.AvgPool2d(2)]
                fan //= 2
            for _ in range(count):
                layers.append(Bottleneck(fan, width, norm))
                fan += width
            if i == len(LAYOUTS[depth]) - 1:
                layers += [norm2d(norm, fan), nn.ReLU()]
            blocks.append(nn.Sequential(*layers))
        self.stages = nn.ModuleList(blocks)
        self._add_classifier(channels, side, classes)

    def pool(self, last: Tensor) -> Tensor:
        return last.mean((2, 3))
