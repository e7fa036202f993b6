"""Folders of labelled image files: what is listed in them, and how they are read as uint8."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from utils.files.classnames import readable_names
from utils.files.imagefiles import (
    NAMED,
    BrokenImages,
    GreyRange,
    broken_images,
    for_each,
    grey_range_of,
    is_deep,
    is_grey,
    listing,
    mode_and_size,
    read_image,
)
from utils.files.labeltable import places_of_tables
from utils.files.listing import EXPECTED, list_images
from utils.system.device import free_memory
from utils.system.errors import UsageError, UserError, first_line, printable

log = logging.getLogger("dream")

SPARE_MEMORY = 0.5  # fraction of the free memory that images may take; the rest is for networks and gradients

Split = tuple[Tensor, Tensor, list[str]]  # images (N, C, H, W) uint8, labels (N,) int64, class names


class Headers(NamedTuple):
    """What the headers of a folder's image files say."""

    modes: set[str]  # Pillow's
    sizes: set[tuple[int, int]]  # width and height
    deep: list[str]  # training images of 16 bits a pixel


class Folder:
    """Image files in DIR/train/CLASS/* and DIR/test/CLASS/*, or another layout of utils/files/listing.py.

    classes: names of the classes in alphabetical order, with words after WordNet numbers where these are known.
    samples: path and class number of the training images (True) and the test images (False).
    """

    def __init__(
        self,
        root: Path,
        threads: int | None = None,
        *,
        split: float | None = None,
        only: Mapping[str, str] | None = None,
        skip_broken: bool = False,
        grey_range: GreyRange | None = None,
    ) -> None:
        """List a folder. split: see `list_images`; only: class folders to take, with words for people.

        skip_broken: leave out the files that cannot be decoded, for which all of them are, once. grey_range: of 16-bit
        images, where it is known already; otherwise that of the training images. Raises UserError or UsageError when
        the folder cannot be used.
        """
        self.root = root
        if grey_range is not None:
            self.grey_range = grey_range
        self.threads = threads
        try:
            folders, self.samples = list_images(root, split=split, only=only)
            self.classes = readable_names(folders, places_of_tables(root), only or {})
        except (OSError, ValueError) as error:  # ValueError: a data.json may have a name that no file can have
            where, reason = getattr(error, "filename", None) or root, getattr(error, "strerror", None)
            raise UserError(
                f"--image_folder {root}: cannot use {where} ({reason or first_line(error)}); {EXPECTED}"
            ) from error
        if len(self.classes) < 2:
            raise UserError(f"--image_folder {root}: needs two classes or more, has {len(self.classes)}")
        self.skipped = self._without_broken() if skip_broken else None

    @property
    def files(self) -> list[tuple[str, str]]:
        """Path of every image file, and its split and class."""
        return [(path, f"{train} {c}") for train, split in self.samples.items() for path, c in split]

    @property
    def counts(self) -> list[int]:
        """Number of training images of every class."""
        return torch.tensor([c for _, c in self.samples[True]]).bincount(minlength=len(self.classes)).tolist()

    def shape(self, size: int | None) -> tuple[int, int]:
        """Channels (1 if all images are grey, else 3) and side of the images; size: None, or the side to resize to.

        Raises UsageError when there is no size and the images are not squares of one size.
        """
        modes, sizes, _ = self._headers
        if size is None:
            if len(sizes) > 1:
                some = ", ".join(f"{w} x {h}" for w, h in sorted(sizes)[:3])
                raise UsageError(f"--image_folder {self.root}: images differ in size ({some} ...); give --size PIXELS")
            width, height = sizes.pop()
            if width != height or width < 8:
                raise UsageError(
                    f"--image_folder {self.root}: images are {width} x {height}; give --size PIXELS, 8 or more"
                )
            size = width
        return 1 if all(map(is_grey, modes)) else 3, size

    def load(
        self, train: bool, channels: int, side: int, device: torch.device, held: Sequence[int] | None = None
    ) -> Split:
        """Images of a split as uint8, resized and centre-cropped to `side`; held: only of these classes.

        Raises UserError when they do not fit the memory.
        """
        samples = [sample for sample in self.samples[train] if held is None or sample[1] in held]
        need, free = len(samples) * channels * side * side, free_memory(device)
        if need > SPARE_MEMORY * free:
            raise UserError(
                f"--image_folder {self.root}: {len(samples)} images of {channels} x {side} x {side} need "
                f"{need / 1e9:.1f} GB on {device.type}; {free / 1e9:.1f} GB are free, half of it for networks. "
                "Give a smaller --size, or a folder with fewer images or classes"
            )
        images, grey_range = torch.empty(len(samples), channels, side, side, dtype=torch.uint8), self.grey_range

        def read(i: int) -> None:  # into its place: a second copy might not fit
            images[i] = read_image(samples[i][0], channels=channels, side=side, grey_range=grey_range)

        self._for_each("reading")(range(len(samples)), read)
        return images, torch.tensor([label for _, label in samples]), self.classes

    @cached_property
    def grey_range(self) -> GreyRange:
        """The values of 16-bit images that become 0 and 255, in both splits: the training images' own."""
        return grey_range_of(self._headers.deep, self._for_each("measuring"))

    @cached_property
    def _headers(self) -> Headers:
        heads = self._for_each("looking at")(self._paths, mode_and_size)
        deep = [path for (path, _), (mode, _) in zip(self.samples[True], heads, strict=False) if is_deep(mode)]
        return Headers({mode for mode, _ in heads}, {size for _, size in heads}, deep)

    def _for_each(self, doing: str) -> Callable[..., list[Any]]:
        """`for_each` with what the folder knows. doing: what is done with it, for the progress bar."""
        what = f"{doing} {printable(str(self.root))}"
        remedy = ", or give --skip_broken"
        return partial(for_each, what=what, threads=self.threads, files=self._paths, remedy=remedy)

    @property
    def _paths(self) -> list[str]:
        """All image files, those of training first."""
        return [path for train in (True, False) for path, _ in self.samples[train]]

    def _without_broken(self) -> dict[str, Any] | None:
        """Take broken files out of `samples`. Returns their `count`, the `first` names and `sha256` of all; None: none.

        Raises UserError for a class without any sound file, and for files that the system cannot read now.
        """
        broken = broken_images(self._paths, what=f"checking {printable(str(self.root))}", threads=self.threads)
        if passing := [file for file in broken if not file.lasting]:
            raise BrokenImages(passing)
        gone = {file.path for file in broken}
        for train, samples in self.samples.items():
            self.samples[train] = [sample for sample in samples if sample[0] not in gone]
            for c in {label for _, label in samples} - {label for _, label in self.samples[train]}:
                where = f"{'training' if train else 'test'} image of class {self.classes[c]} in {self.root}"
                raise UserError(f"--skip_broken: no {where} can be read; repair one, or remove the class")
        if not broken:
            return None
        log.warning("left out %d files that cannot be read as images: %s", len(broken), printable(listing(broken)))
        names = sorted(os.path.relpath(path, self.root) for path in gone)
        sha256 = hashlib.sha256(os.fsencode("\0".join(names))).hexdigest()
        return {"count": len(names), "first": list(map(printable, names[:NAMED])), "sha256": sha256}
