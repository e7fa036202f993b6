"""Image files: read as tensors, one or many, and grids of images written as PNG.

Files are read without trust: what is wrong with one becomes an error that names it, before memory is spent.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import stat
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import make_grid

from utils.system.errors import UserError, first_line
from utils.system.report import Progress

log = logging.getLogger("dream")

S = TypeVar("S")
T = TypeVar("T")

EXTENSIONS = IMG_EXTENSIONS  # files in class folders with other endings are no images
FORMATS = ("PNG", "JPEG", "BMP", "PPM", "WEBP", "TIFF", "GIF")  # none for which Pillow runs another program, as for EPS
MAX_PIXELS = 89_478_485  # 256 MiB as RGB: Pillow's own limit for decompression bombs
MAX_PIXEL_BYTES = 8  # of a pixel in a file: four channels of 16 bits
LARGE = 2**22  # pixels; larger images are decoded one at a time, so that threads do not multiply their memory
BLOCK = 512  # files read at a time
NO_WAIT = getattr(os, "O_NONBLOCK", 0)  # opening a pipe, which Windows has none of, waits for nobody to write into it
NAMED = 20  # broken files at most that one message names

GreyRange = tuple[int, int]  # values of 16-bit pixels that become 0 and 255
FULL: GreyRange = (0, 2**16 - 1)
TAIL = 1e-3  # share of the pixels that may lie beyond a range at either end: a detector has dead and hot pixels

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


def is_deep(mode: str) -> bool:
    """Whether images of this mode of Pillow's have 16 bits a pixel."""
    return mode.startswith("I")


def read_image(path: str, *, channels: int, side: int | None = None, grey_range: GreyRange = FULL) -> Tensor:
    """An image file as uint8, (channels, side, side), resized and centre-cropped; at its own size without a side.

    Transparency is dropped, EXIF's orientation followed; of an animation or of several pages the first is taken.
    grey_range: the 16-bit values that become 0 and 255, see `grey_range_of`. Raises BrokenImages, naming the file.
    """
    return _decoded(path, lambda file: _tensor(file, channels, side, grey_range))


def check_image(path: str) -> None:
    """Decode an image file, and keep nothing. Raises BrokenImages, naming the file."""
    _decoded(path, lambda file: None)


def _decoded(path: str, work: Callable[[Image.Image], T]) -> T:
    """What `work` makes of a decoded image file."""

    def decode(file: Image.Image) -> T:
        file.load()
        return work(file)

    with opened(path) as file:
        if _pixels(file) <= LARGE:
            return decode(file)
        with _one_large, ThreadPoolExecutor(1) as alone:  # a thread's end returns its memory to the system
            return alone.submit(decode, file).result()


def _tensor(file: Image.Image, channels: int, side: int | None, grey_range: GreyRange) -> Tensor:
    file.info.pop("transparency", None)  # converting would try to keep it
    image: Image.Image = file
    if is_deep(file.mode):
        image = Image.fromarray(_eight_bits(_values(file), grey_range))
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
        raise BrokenImages([Broken(path, _reason(error), lasting=_is_lasting(error))]) from error


class Broken(NamedTuple):
    """An image file that cannot be read. lasting: the file is to blame, not the system's state at this moment."""

    path: str
    reason: str
    lasting: bool


class BrokenImages(UserError):
    """Image files that cannot be read, the first of which the message names."""

    def __init__(self, files: Sequence[Broken], *, remedy: str = "") -> None:
        """remedy: what else helps, besides repairing or removing the files."""
        self.files = files
        if len(files) == 1:
            text = f"{files[0].path}: cannot be read as an image ({files[0].reason}); repair it or remove it{remedy}"
        else:
            text = f"{len(files)} files cannot be read as images: {listing(files)}; repair or remove them{remedy}"
        super().__init__(text)


def listing(files: Sequence[Broken]) -> str:
    """The first of some broken files and what is wrong with each, and how many there are besides."""
    more = f" and {len(files) - NAMED} more" if len(files) > NAMED else ""
    return ", ".join(f"{file.path} ({file.reason})" for file in files[:NAMED]) + more


def _is_lasting(error: Exception) -> bool:
    of_the_system = isinstance(error, OSError) and error.errno not in (None, errno.ENOENT, errno.ELOOP)
    return not (isinstance(error, MemoryError) or of_the_system)


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


def for_each(
    items: Sequence[S],
    work: Callable[[S], T],
    *,
    what: str,
    threads: int | None = None,
    files: Sequence[str] = (),
    remedy: str = "",
) -> list[T]:
    """The results of `work` on every item, in their order, by several threads, under a progress bar.

    threads: None for ThreadPoolExecutor's own number. Pillow's warnings, which name no file, are not shown.
    Raises BrokenImages after a try of all items, and then of all `files`, so that all that are broken are named at
    once; remedy: what else helps if they are to blame. Any other error of `work` ends it early.
    """
    done: list[T] = []
    broken: list[Broken] = []

    def attempt(item: S) -> T | BrokenImages:
        try:
            return work(item)
        except BrokenImages as error:
            return BrokenImages(error.files)  # another one: a traceback would keep the file's pixels in memory

    try:
        with (
            warnings.catch_warnings(),  # not in `work`: filters belong to the process, not to a thread
            Progress(len(items), what, "image") as progress,
            ThreadPoolExecutor(threads) as pool,
        ):
            warnings.simplefilter("ignore")
            for first in range(0, len(items), BLOCK):
                block = items[first : first + BLOCK]
                for result in pool.map(attempt, block):
                    if isinstance(result, BrokenImages):
                        broken += result.files
                    elif not broken:  # otherwise nobody will see it
                        done.append(result)
                progress.advance(len(block))
    except RuntimeError as error:  # the system allows no more threads
        raise UserError(f"{what}: {first_line(error)}; give fewer --data_threads") from error
    if broken:
        others = broken_images(files, what=f"checking, {what}", threads=threads)
        named = {file.path: file for file in (*broken, *others)}
        lasting = all(file.lasting for file in named.values())
        raise BrokenImages(sorted(named.values()), remedy=remedy if lasting else "")
    return done


def broken_images(paths: Sequence[str], *, what: str, threads: int | None = None) -> Sequence[Broken]:
    """The image files that cannot be decoded; all are tried."""
    try:
        for_each(paths, check_image, what=what, threads=threads)
    except BrokenImages as error:
        return error.files
    return []


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


# --- 16 bits a pixel --------------------------------------------------------------------------------------------------


def grey_range_of(paths: Sequence[str], each: Callable[..., object]) -> GreyRange:
    """The values that become 0 and 255, from all pixels of 16-bit image files: TAIL of them lie beyond either end.

    Files of 16 bits often hold 12, or 10. A message says so. FULL where that would gain less than one bit, and for no
    files. each: `for_each` with its settings. Raises BrokenImages.
    """
    if not paths:
        return FULL
    counts, adding = np.zeros(2**16, dtype=np.int64), threading.Lock()

    def count(file: Image.Image) -> None:
        values = _values(file).ravel()
        for first in range(0, len(values), LARGE):  # bincount makes copies of four times the size
            own = np.bincount(values[first : first + LARGE], minlength=len(counts))
            with adding:
                np.add(counts, own, out=counts)

    each(paths, partial(_decoded, work=count))
    total = counts.cumsum()
    low = int(total.searchsorted(TAIL * total[-1], side="right"))
    high = int(total.searchsorted((1 - TAIL) * total[-1]))
    if low >= high:  # nearly all pixels are the same
        low, high = (int(end) for end in counts.nonzero()[0][[0, -1]])
    if not 0 < high - low < 2**15:
        return FULL
    log.info("16-bit values from %d to %d, all but %g %% at either end of the range, become 0 to 255 (%d files)",
             low, high, 100 * TAIL, len(paths))  # fmt: skip
    return low, high


def _eight_bits(pixels: npt.NDArray[np.integer], grey_range: GreyRange) -> npt.NDArray[np.uint8]:
    """Pixels (H, W) of 16 bits as 8 bits."""
    table, result = eight_bits(grey_range), np.empty(pixels.shape, dtype=np.uint8)
    rows = max(1, LARGE // pixels.shape[1])  # at a time: a look-up makes a copy of four times the size
    for first in range(0, len(pixels), rows):
        result[first : first + rows] = table[pixels[first : first + rows]]
    return result


@lru_cache(maxsize=8)
def eight_bits(grey_range: GreyRange) -> npt.NDArray[np.uint8]:
    """What each value of 16 bits becomes, (65536,) uint8: the range becomes 0 to 255, values beyond it are clamped."""
    values, (low, high) = np.arange(2**16), grey_range
    if grey_range == FULL:
        return (values >> 8).astype(np.uint8)
    return np.rint(((values - low) * (255 / (high - low))).clip(0, 255)).astype(np.uint8)


def _values(file: Image.Image) -> npt.NDArray[np.integer]:
    """Pixels of an image with 16 bits a pixel, (H, W), from 0 to 65535."""
    pixels = np.asarray(file)
    return pixels if pixels.dtype.itemsize == 2 else pixels.clip(*FULL)  # mode I has 32 bits


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
