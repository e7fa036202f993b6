"""Image files: read as tensors, one or many, and grids of images written as PNG.

Files are read without trust: what is wrong with one becomes an error that names it, before memory is spent.
"""

from __future__ import annotations

import io
import os
import stat
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import make_grid

from utils.system.errors import UserError, first_line
from utils.system.report import Progress

S = TypeVar("S")
T = TypeVar("T")

EXTENSIONS = IMG_EXTENSIONS  # files in class folders with other endings are no images
FORMATS = ("PNG", "JPEG", "BMP", "PPM", "WEBP", "TIFF", "GIF")  # none for which Pillow runs another program, as for EPS
MAX_PIXELS = 89_478_485  # 256 MiB as RGB: Pillow's own limit for decompression bombs
MAX_PIXEL_BYTES = 8  # of a pixel in a file: four channels of 16 bits
LARGE = 2**22  # pixels; larger images are decoded one at a time, so that threads do not multiply their memory
BLOCK = 512  # files read at a time
NO_WAIT = getattr(os, "O_NONBLOCK", 0)  # opening a pipe, which Windows has none of, waits for nobody to write into it

_one_large = threading.Lock()

Turn = Image.Transpose
UPRIGHT = dict(enumerate((  # how to turn an image of each of EXIF's orientations, from 2 on
    Turn.FLIP_LEFT_RIGHT, Turn.ROTATE_180, Turn.FLIP_TOP_BOTTOM, Turn.TRANSPOSE, Turn.ROTATE_270, Turn.TRANSVERSE,
    Turn.ROTATE_90,
), start=2))  # fmt: skip


# --- One file ---------------------------------------------------------------------------------------------------------


def mode_and_size(path: str) -> tuple[str, tuple[int, int]]:
    """Pillow's mode, and width and height in pixels, from an image file's header; EXIF may ask to turn it."""
    with opened(path) as image:
        return image.mode, image.size


def is_grey(mode: str) -> bool:
    """Whether images of this mode of Pillow's have no colours. Mode I is that of PGM files of 16 bits."""
    return mode in ("1", "L", "LA", "I") or mode.startswith("I;16")


def read_image(path: str, *, channels: int, side: int | None = None) -> Tensor:
    """An image file as uint8, (channels, side, side), resized and centre-cropped; at its own size without a side.

    Transparency is dropped, EXIF's orientation followed; of an animation or of several pages the first is taken.
    Raises UserError, naming the file.
    """
    with opened(path) as file:
        if _pixels(file) <= LARGE:
            return _tensor(file, channels, side)
        with _one_large, ThreadPoolExecutor(1) as alone:  # a thread's end returns its memory to the system
            return alone.submit(_tensor, file, channels, side).result()


def _tensor(file: Image.Image, channels: int, side: int | None) -> Tensor:
    file.load()
    file.info.pop("transparency", None)  # converting would try to keep it
    image: Image.Image = file
    if file.mode.startswith("I"):  # 16 bits a pixel
        image = Image.fromarray((np.asarray(file) >> 8).astype(np.uint8))
    if image.mode != (mode := "L" if channels == 1 else "RGB"):
        image = image.convert(mode)
    turn = None
    with suppress(Exception):  # broken EXIF data are no reason to refuse the image
        turn = UPRIGHT.get(file.getexif().get(ExifTags.Base.Orientation, 1))
    if turn is not None:
        image = image.transpose(turn)
    if side is not None and image.size != (side, side):
        short = min(image.size)
        left, top = ((length - short) / 2 for length in image.size)
        # Cropped before it is resized: a strip of 1 x 60,000 pixels would grow beyond any memory.
        box = (left, top, left + short, top + short)
        image = image.resize((side, side), Image.Resampling.BILINEAR, box)
    return pil_to_tensor(image)


@contextmanager
def opened(path: str) -> Iterator[Image.Image]:
    """Open an image that is safe to decode. Raises UserError, naming the file, also for errors in the block."""
    try:
        with open(path, "rb", opener=lambda path, flags: os.open(path, flags | NO_WAIT)) as file:
            about = os.fstat(file.fileno())
            if not stat.S_ISREG(about.st_mode):
                raise ValueError("no regular file")
            if about.st_size > MAX_PIXELS * MAX_PIXEL_BYTES:  # Pillow reads a PNG's text chunk as a whole
                raise ValueError(f"{about.st_size / 1e9:.1f} GB in one file")
            with Image.open(file, formats=FORMATS) as image:
                if _pixels(image) > MAX_PIXELS:
                    raise Image.DecompressionBombError
                if image.mode in ("F", "LAB") or (image.mode == "I" and image.format not in ("PNG", "PPM")):
                    raise ValueError(f"mode {image.mode}: neither grey nor RGB in a known range")
                yield image
    except Exception as error:  # each of Pillow's plugins raises errors of its own
        raise UserError(f"{path}: cannot be read as an image ({_reason(error)}); repair it or remove it") from error


def _reason(error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombError):
        return f"it claims more than {MAX_PIXELS / 1e6:.0f} million pixels"
    if isinstance(error, UnidentifiedImageError):
        return f"damaged, or none of {', '.join(FORMATS)}"
    return getattr(error, "strerror", None) or first_line(error)


def _pixels(image: Image.Image) -> int:
    """Pixels of the image, or of a tile where that is larger, as TIFF allows."""
    tags = getattr(image, "tag_v2", {})
    tile = [tags.get(tag, 0) for tag in (322, 323)]
    return max(image.width * image.height, tile[0] * tile[1])


# --- Many files -------------------------------------------------------------------------------------------------------


def for_each(items: Sequence[S], work: Callable[[S], T], *, what: str, threads: int | None = None) -> list[T]:
    """The results of `work` on every item, in their order, by several threads, under a progress bar.

    threads: None for ThreadPoolExecutor's own number. An error of `work` ends it early. Pillow's warnings, which name
    no file, are not shown.
    """
    done: list[T] = []
    try:
        with (
            warnings.catch_warnings(),  # not in `work`: filters belong to the process, not to a thread
            Progress(len(items), what, "image") as progress,
            ThreadPoolExecutor(threads) as pool,
        ):
            warnings.simplefilter("ignore")
            for first in range(0, len(items), BLOCK):
                block = items[first : first + BLOCK]
                done += pool.map(work, block)
                progress.advance(len(block))
    except RuntimeError as error:  # the system allows no more threads
        raise UserError(f"{what}: {first_line(error)}; give fewer --data_threads") from error
    return done


def image_files(folder: str, *, nested: bool = True) -> tuple[list[str], list[str]]:
    """Paths of the images, and of the other files, in a class folder, and below it if nested. Raises OSError.

    The order is that of torchvision's ImageFolder. Hidden files and folders do not count. Links are followed, but not
    into a folder that has been read or that contains the class folder, so that links in a circle come to an end.
    """
    listed: list[tuple[str, str]] = []
    waiting, path = [folder], Path(folder)
    seen = {_identity(above) for above in (*path.absolute().parents, *path.resolve().parents)}
    while waiting:
        top = waiting.pop()
        if _identity(top) in seen:
            continue
        seen.add(_identity(top))
        folders, files = inside(top)
        waiting += [os.path.join(top, name) for name in reversed(folders) if nested]
        listed += [(top, name) for name in files]
    paths = [os.path.join(top, name) for top, name in sorted(listed)]
    images = [path for path in paths if path.lower().endswith(EXTENSIONS)]
    return images, [path for path in paths if not path.lower().endswith(EXTENSIONS)]


def _identity(folder: str | Path) -> tuple[int, int]:
    """What a folder is, however it is called: device and inode."""
    about = os.stat(folder)
    return about.st_dev, about.st_ino


def inside(folder: str) -> tuple[list[str], list[str]]:
    """Names of the folders and of the files in a folder, sorted, without hidden ones. Raises OSError."""

    def fail(error: OSError) -> None:
        raise error

    _, *both = next(os.walk(folder, onerror=fail))
    folders, files = (sorted(name for name in names if not name.startswith(".")) for names in both)
    return folders, files


# --- Grids of images --------------------------------------------------------------------------------------------------

GRID_COLUMNS = 20  # at most; a larger set shows the first images of each class
TILE = 32  # pixels of an image's side at least; smaller images are enlarged by whole factors


def grid_png(images: Tensor) -> bytes:
    """A PNG file's content with one row per class. images: (classes, n, C, H, W) in [0, 1]."""
    buffer = io.BytesIO()
    to_pil_image(grid(images).mul(255).round().to(torch.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def grid(images: Tensor) -> Tensor:
    """One picture, (3, height, width) in [0, 1], with one row per class. images: (classes, n, C, H, W) in [0, 1]."""
    images = images[:, :GRID_COLUMNS].detach().clamp(0, 1).cpu()
    enlarge = -(-TILE // images.shape[-1])
    rows = images.flatten(0, 1).repeat_interleave(enlarge, 2).repeat_interleave(enlarge, 3)
    return make_grid(rows, nrow=images.shape[1], padding=2, pad_value=1.0)
