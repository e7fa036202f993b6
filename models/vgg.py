"""VGG for small images (Simonyan & Zisserman, ICLR 2015): the published convolutions and a single linear layer."""

from __future__ import annotations

from models.plain import Plain

LAYOUTS = {11: ((1,), (2,), (4, 4), (8, 8), (8, 8))}  # per stage, each convolution's channels in multiples of `width`


class VGG(Plain):
    """VGG of five stages of 3x3 convolutions; `width` is the channels of the first convolution."""

    def __init__(self, *, channels: int, classes: int, side: int, depth: int, width: int, norm: str) -> None:
        if depth not in LAYOUTS:
            raise ValueError(f"depth {depth} does not exist for a VGG here: use one of {sorted(LAYOUTS)}")
        layout = [[(times * width, 3) for times in stage] for stage in LAYOUTS[depth]]
        super().__init__(layout, channels=channels, classes=classes, side=side, norm=norm)
