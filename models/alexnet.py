"""AlexNet for small images (Krizhevsky et al., NeurIPS 2012): five convolutions without strides, one linear layer."""

from __future__ import annotations

from models.plain import Plain

# Per stage, each convolution's channels in halves of `width`, and its kernel.
LAYOUTS = {5: (((2, 5),), ((3, 5),), ((4, 3), (3, 3), (3, 3)))}


class AlexNet(Plain):
    """AlexNet of three stages, without dropout; `width` is the channels of the first convolution."""

    def __init__(self, *, channels: int, classes: int, side: int, depth: int, width: int, norm: str) -> None:
        if depth not in LAYOUTS:
            raise ValueError(f"depth {depth} does not exist for an AlexNet here: use one of {sorted(LAYOUTS)}")
        layout = [[(scaled(halves, width), kernel) for halves, kernel in stage] for stage in LAYOUTS[depth]]
        super().__init__(layout, channels=channels, classes=classes, side=side, norm=norm)


def scaled(halves: int, width: int) -> int:
    """Channels of a convolution: `halves` halves of `width`; an odd number of them rounds up to a multiple of 4.

    So the groups of group norm divide it.
    """
    return halves // 2 * width if halves % 2 == 0 else 4 * -(-halves * width // 8)
