"""Pictures of image sets: one row per class."""

from __future__ import annotations

import io

import torch
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

COLUMNS = 20  # at most; a larger set shows the first of each class
TILE = 32  # pixels at least; smaller images are enlarged by whole factors


def grid_png(images: Tensor) -> bytes:
    """(classes, n, C, H, W) in [0, 1] -> a PNG file's content."""
    buffer = io.BytesIO()
    to_pil_image(grid(images).mul(255).round().to(torch.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def grid(images: Tensor) -> Tensor:
    """(classes, n, C, H, W) in [0, 1] -> one picture, (3, height, width) in [0, 1]."""
    images = images[:, :COLUMNS].detach().clamp(0, 1).cpu()
    enlarge = -(-TILE // images.shape[-1])
    rows = images.flatten(0, 1).repeat_interleave(enlarge, 2).repeat_interleave(enlarge, 3)
    return make_grid(rows, nrow=images.shape[1], padding=2, pad_value=1.0)
