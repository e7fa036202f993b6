"""ResNet-10/18 (He et al., CVPR 2016) and ResNet-AP, which has average pools in place of strides.

As published for distillation: weights as in He et al. (ICCV 2015), and half the usual width on small images.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from models.network import Network, norm2d

STAGES = {10: (1, 1, 1, 1), 18: (2, 2, 2, 2)}  # basic blocks per stage
LARGE = 96  # from this side on, the stem shrinks images by 4, and models.FAMILIES has another default width


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; `shrink` halves the side, by stride, or by an average pool before a norm."""

    def __init__(self, fan_in: int, fan_out: int, *, norm: str, shrink: bool, average: bool) -> None:
        super().__init__()
        stride = 2 if shrink and not average else 1
        self.down = nn.AvgPool2d(2) if shrink and average else nn.Identity()
        self.conv1 = nn.Conv2d(fan_in, fan_out, 3, stride=stride, padding=1, bias=False)
        self.norm1 = norm2d(norm, fan_out)
        self.conv2 = nn.Conv2d(fan_out, fan_out, 3, padding=1, bias=False)
        self.norm2 = norm2d(norm, fan_out)
        self.shortcut: nn.Module = nn.Identity()
        if shrink or fan_in != fan_out:
            conv = nn.Conv2d(fan_in, fan_out, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(conv, self.down, norm2d(norm, fan_out))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.down(self.conv1(x))))
        y = self.norm2(self.conv2(y))
        return F.relu(y + self.shortcut(x))


class ResNet(Network):
    """ResNet: four stages of basic blocks, global average pool, one linear layer; a 7x7 stem from side `LARGE` on."""

    def __init__(
        self, *, channels: int, classes: int, side: int, depth: int, width: int, norm: str, average: bool = False
    ) -> None:
        super().__init__()
        if depth not in STAGES:
            raise ValueError(f"depth {depth} does not exist for a ResNet here: use one of {sorted(STAGES)}")
        last = side // (32 if side >= LARGE else 8)
        if norm == "instance" and last < 2:
            raise ValueError(
                f"instance norm erases the last stage of a ResNet on {side} x {side} images, which is one pixel: "
                "use norm batch, or images of 16 x 16 and more"
            )
        stride = 1 if side < LARGE or average else 2
        kernel = 3 if side < LARGE else 7
        stem: list[nn.Module] = [nn.Conv2d(channels, width, kernel, stride=stride, padding=kernel // 2, bias=False)]
        if side >= LARGE and average:
            stem.append(nn.AvgPool2d(4))
        stem += [norm2d(norm, width), nn.ReLU()]
        if side >= LARGE and not average:
            stem.append(nn.MaxPool2d(3, stride=2, padding=1))
        self.stem = nn.Sequential(*stem)
        stages = []
        fan_in = width
        for i, count in enumerate(STAGES[depth]):
            fan_out = width << i
            blocks = [
                BasicBlock(fan_in if j == 0 else fan_out, fan_out, norm=norm, shrink=i > 0 and j == 0, average=average)
                for j in range(count)
            ]
            stages.append(nn.Sequential(*blocks))
            fan_in = fan_out
        self.stages = nn.ModuleList(stages)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self._add_classifier(channels, side, classes)

    def pool(self, last: Tensor) -> Tensor:
        return last.mean((2, 3))
