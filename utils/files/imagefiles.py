"""Image files as tensors, one or many. What is wrong with one becomes an error naming it, before memory is spent."""

from __future__ import annotations

import os
import stat
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import functional as transforms

from utils.system.errors import UserError, first_line
from utils.system.report import Progress

S = TypeVar("S")
T = TypeVar("T")

EXTENSIONS = IMG_EXTENSIONS  # of the files that data sets in folders are made of
FORMATS = ("PNG", "JPEG", "BMP", "PPM", "WEBP", "TIFF", "GIF")  # none that Pillow hands to another program, as EPS
MAX_PIXELS = 89_478_485  # 256 MiB as RGB, beyond which Pillow suspects a bomb; our images have a few hundred a side
MAX_PIXEL_BYTES = 8  # of a file: four channels of 16 bits
LARGE = 2**22  # pixels; larger images are decoded one at a time, since memory is threads times what one image takes
BLOCK = 512  # files read at a time

_only_one = threading.Lock()  # of the large images

UPRIGHT = {  # EXIF's orientations
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


# --- One file ---------------------------------------------------------------------------------------------------------


def mode_and_size(path: str) -> tuple[str, tuple[int, int]]:
    """What an image file's header says. Width and height of an image that EXIF turns are those before it is turned."""
    with opened(path) as image:
        return image.mode, image.size


def is_grey(mode: str) -> bool:
    """Whether images of this mode have no colours. I is what Pillow makes of 16 bits in PGM files."""
    return mode in ("1", "L", "LA", "I") or mode.startswith("I;16")


def read_image(path: str, *, channels: int, side: int | None = None) -> Tensor:
    """One image file as uint8, (channels, side, side), resized and centre-cropped; without a side as large as it is.

    Transparency is dropped, EXIF's orientation followed; of an animation or several pages the first is taken.
    """
    with opened(path) as file:
        if _pixels(file) <= LARGE:
            return _tensor(file, channels, side)
        with _only_one, ThreadPoolExecutor(1) as alone:  # every thread keeps the memory that it has freed
            return alone.submit(_tensor, file, channels, side).result()


def _tensor(file: Image.Image, channels: int, side: int | None) -> Tensor:
    file.load()
    file.info.pop("transparency", None)  # which converting would try to keep
    image = _upright(_converted(_of_8_bits(file), "L" if channels == 1 else "RGB"), file)
    if side is not None and image.size != (side, side):
        short = min(image.size)
        left, top = ((length - short) / 2 for length in image.size)
        # The crop first: a strip of 1 x 60,000 pixels would grow beyond any memory.
        box = (left, top, left + short, top + short)
        image = image.resize((side, side), Image.Resampling.BILINEAR, box)
    return transforms.pil_to_tensor(image)


@contextmanager
def opened(path: str) -> Iterator[Image.Image]:
    """An image that is safe to decode. Raises UserError, naming the file, also for what goes wrong in the block."""
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            about = os.fstat(file.fileno())
            if not stat.S_ISREG(about.st_mode):
                raise ValueError("no regular file")
            if about.st_size > MAX_PIXELS * MAX_PIXEL_BYTES:  # a chunk of text would be read as a whole
                raise ValueError(f"{about.st_size / 1e9:.1f} GB in one file")
            with Image.open(file, formats=FORMATS) as image:
                if _pixels(image) > MAX_PIXELS:
                    raise Image.DecompressionBombError
                if image.mode in ("F", "LAB") or (image.mode == "I" and image.format not in ("PNG", "PPM")):
                    raise ValueError(f"mode {image.mode}: neither grey nor RGB in a known range")
                yield image
    except Exception as error:  # Pillow's plugins: each has errors of its own
        raise UserError(f"{path}: cannot be read as an image ({_reason(error)}); repair it or remove it") from error


def _without_waiting(path: str, flags: int) -> int:
    """Opened at once; a pipe would be waited for until somebody writes into it."""
    return os.open(path, flags | os.O_NONBLOCK)


def _reason(error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombError):
        return f"it claims more than {MAX_PIXELS / 1e6:.0f} million pixels"
    if isinstance(error, UnidentifiedImageError):
        return f"damaged, or none of {', '.join(FORMATS)}"
    return getattr(error, "strerror", None) or first_line(error)


def _pixels(image: Image.Image) -> int:
    """Of the image, or of a tile if that is larger, which TIFF allows."""
    tags = getattr(image, "tag_v2", {})
    tile = [tags.get(tag, 0) for tag in (322, 323)]
    return max(image.width * image.height, tile[0] * tile[1])


def _of_8_bits(image: Image.Image) -> Image.Image:
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))


def _converted(image: Image.Image, mode: str) -> Image.Image:
    return image if image.mode == mode else image.convert(mode)


def _upright(image: Image.Image, file: Image.Image) -> Image.Image:
    """Turned as the file's EXIF data say."""
    try:
        turn = UPRIGHT.get(file.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # broken EXIF data, for which nobody would miss the image
        turn = None
    return image if turn is None else image.transpose(turn)


# --- Many files -------------------------------------------------------------------------------------------------------


def for_each(items: Sequence[S], work: Callable[[S], T], *, what: str, threads: int | None = None) -> list[T]:
    """`work` on every item, in their order, while a bar says how many images are done.

    threads: as many as the machine suggests unless given. An error ends it before all the others are read. `work` may
    raise UserError; Pillow's warnings, which name no file, are not shown.
    """
    done: list[T] = []
    try:
        with (
            warnings.catch_warnings(),  # here, since threads cannot have filters of their own
            Progress(len(items), what, "image") as progress,
            ThreadPoolExecutor(threads) as pool,
        ):
            warnings.simplefilter("ignore")
            for first in range(0, len(items), BLOCK):
                block = items[first : first + BLOCK]
                done += pool.map(work, block)
                progress.advance(len(block))
    except RuntimeError as error:  # a limit of the system
        raise UserError(f"{what}: {first_line(error)}; give fewer --data_threads") from error
    return done


def image_files(folder: str) -> tuple[list[str], list[str]]:
    """Paths below a class folder, subfolders included: those of images, and of other files. Raises OSError.

    The order is that of torchvision's ImageFolder. Hidden ones do not count. Links are followed, but neither into a
    folder that has been read nor into one that the class folder is in, so that links in a circle come to an end.
    """
    found: list[tuple[str, str]] = []
    waiting, path = [folder], Path(folder)
    seen = {_identity(above) for above in (*path.absolute().parents, *path.resolve().parents)}
    while waiting:
        top = waiting.pop()
        if _identity(top) in seen:
            continue
        seen.add(_identity(top))
        folders, files = inside(top)
        waiting += [os.path.join(top, name) for name in reversed(folders)]
        found += [(top, name) for name in files]
    paths = [os.path.join(top, name) for top, name in sorted(found)]
    images = [path for path in paths if path.lower().endswith(EXTENSIONS)]
    return images, [path for path in paths if not path.lower().endswith(EXTENSIONS)]


def _identity(folder: str | Path) -> tuple[int, int]:
    about = os.stat(folder)
    return about.st_dev, about.st_ino


def inside(folder: str) -> tuple[list[str], list[str]]:
    """Names of the folders and of the files in a folder, in alphabetical order, without hidden ones. Raises OSError."""
    names: dict[bool, list[str]] = {True: [], False: []}
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.name.startswith("."):
                names[_is_folder(entry)].append(entry.name)
    return sorted(names[True]), sorted(names[False])


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, say
        return False
