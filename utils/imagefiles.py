"""Single image files as tensors. Whatever is wrong with one becomes an error that names it."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import functional as transforms

from utils.errors import UserError, first_line

EXTENSIONS = IMG_EXTENSIONS  # of the files that data sets in folders are made of


def mode_and_size(path: str) -> tuple[str, tuple[int, int]]:
    """What an image file's header says."""
    with opened(path) as image:
        return image.mode, image.size


def is_grey(mode: str) -> bool:
    """Whether images of this mode have no colours."""
    return mode in ("1", "L", "LA") or mode.startswith("I;16")


def read_image(path: str, *, channels: int, side: int | None = None) -> Tensor:
    """One image file as uint8, (channels, side, side), resized and centre-cropped; without a side as large as it is."""
    with opened(path) as image:
        if image.mode.startswith("I;16"):
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.mode in ("I", "F"):
            raise ValueError("32-bit images have no fixed range")
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")
        image = ImageOps.exif_transpose(image.convert("L" if channels == 1 else "RGB"))
    if side is not None and image.size != (side, side):
        image = transforms.center_crop(transforms.resize(image, side), [side, side])
    return transforms.pil_to_tensor(image)


class opened:
    """`with opened(path) as image`: whatever goes wrong with an image file becomes an error that names it."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __enter__(self) -> Image.Image:
        try:
            self.image = Image.open(self.path)
        except Exception as error:
            raise self._named(error) from error
        return self.image

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: object) -> None:
        if hasattr(self, "image"):
            self.image.close()
        if isinstance(error, Exception):
            raise self._named(error) from error

    def _named(self, error: Exception) -> UserError:
        return UserError(f"{self.path}: cannot be read as an image ({first_line(error)}); repair it or remove it")
