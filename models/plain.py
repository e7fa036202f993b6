"""Networks without shortcuts, built from a layout: the base of VGG and AlexNet."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from models.network import Network, norm2d


class Plain(Network):
    """Network of stages of convolution -> norm -> ReLU with a 2x2 max pool at their end, then one linear layer.

    A stage whose maps are a single pixel has no pool, so that images may be small.
    """

    def __init__(
        self, layout: Sequence[Sequence[tuple[int, int]]], *, channels: int, classes: int, side: int, norm: str
    ) -> None:
        """Build the stages; layout: for every stage, (channels, kernel side) of its convolutions."""
        super().__init__()
        kind, fan, now = type(self).__name__, channels, side
        stages = []
        for convolutions in layout:
            if norm == "instance" and now < 2:
                raise ValueError(
                    f"instance norm erases the last maps of {kind} on {side} x {side} images, which are one pixel: "
                    f"use norm batch, or images of {2 ** len(layout)} x {2 ** len(layout)} and more"
                )
            layers: list[nn.Module] = []
            for fan_out, kernel in convolutions:
                layers += [nn.Conv2d(fan, fan_out, kernel, padding=kernel // 2), norm2d(norm, fan_out), nn.ReLU()]
                fan = fan_out
            if now > 1:
                layers.append(nn.MaxPool2d(2))
                now //= 2
            stages.append(nn.Sequential(*layers))
        self.stem = nn.Identity()
        self.stages = nn.ModuleList(stages)
        self._add_classifier(channels, side, classes)
