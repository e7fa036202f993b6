"""Folders of labelled image files: what is listed in them, and how they are read as uint8."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from utils.files.classnames import readable_names
from utils.files.imagefiles import for_each, is_grey, mode_and_size, read_image
from utils.files.labeltable import places_of_tables
from utils.files.listing import EXPECTED, list_images
from utils.system.device import free_memory
from utils.system.errors import UsageError, UserError, first_line, printable

log = logging.getLogger("dream")

SPARE_MEMORY = 0.5  # fraction of the free memory that images may take; the rest is for networks and gradients

Split = tuple[Tensor, Tensor, list[str]]  # images (N, C, H, W) uint8, labels (N,) int64, class names


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
    ) -> None:
        """List a folder. split: see `list_images`; only: class folders to take, with words for people.

        Raises UserError or UsageError when the folder cannot be used.
        """
        self.root = root
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

    @property
    def counts(self) -> list[int]:
        """Number of training images of every class."""
        return torch.tensor([c for _, c in self.samples[True]]).bincount(minlength=len(self.classes)).tolist()

    def shape(self, size: int | None) -> tuple[int, int]:
        """Channels (1 if all images are grey, else 3) and side of the images; size: None, or the side to resize to.

        Raises UsageError when there is no size and the images are not squares of one size.
        """
        paths = [path for split in (True, False) for path, _ in self.samples[split]]
        heads = for_each(paths, mode_and_size, what=f"looking at {printable(str(self.root))}", threads=self.threads)
        modes, sizes = {mode for mode, _ in heads}, {size for _, size in heads}
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
        images = torch.empty(len(samples), channels, side, side, dtype=torch.uint8)

        def read(i: int) -> None:  # into its place: a second copy might not fit
            images[i] = read_image(samples[i][0], channels=channels, side=side)

        what = f"reading {printable(str(self.root))}"
        for_each(range(len(samples)), read, what=what, threads=self.threads)
        return images, torch.tensor([label for _, label in samples]), self.classes
