"""Folders of labelled image files: what is listed in them, and how they are read as uint8."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from utils.files.imagefiles import EXTENSIONS, for_each, image_files, inside, is_grey, mode_and_size, read_image
from utils.system.device import free_memory
from utils.system.errors import UsageError, UserError, first_line, printable

log = logging.getLogger("dream")

SPARE_MEMORY = 0.5  # fraction of the free memory that images may take; the rest is for networks and gradients

Split = tuple[Tensor, Tensor, list[str]]  # images (N, C, H, W) uint8, labels (N,) int64, class names


class Folder:
    """Image files in DIR/train/CLASS/* and DIR/test/CLASS/*; classes are numbered in alphabetical order."""

    def __init__(self, root: Path, threads: int | None = None) -> None:
        self.root = root
        self.threads = threads
        self.samples: dict[bool, list[tuple[str, int]]] = {}
        for train, split in ((True, "train"), (False, "test")):
            try:
                classes, self.samples[train] = self._listed(str(root / split))
            except (OSError, ValueError) as error:  # ValueError: a data.json may have a name that no file can have
                where, reason = getattr(error, "filename", None) or root / split, getattr(error, "strerror", None)
                raise UserError(
                    f"--image_folder {root}: cannot use {where} ({reason or first_line(error)}); expected images in "
                    "DIR/train/CLASS/* and DIR/test/CLASS/*"
                ) from error
            if train:
                self.classes = classes
            elif classes != self.classes:
                odd = sorted(set(classes) ^ set(self.classes))
                raise UserError(
                    f"--image_folder {root}: train and test have different classes: only one has {', '.join(odd[:5])}"
                )
        if len(self.classes) < 2:
            raise UserError(f"--image_folder {root}: needs two classes or more, has {len(self.classes)}")

    def _listed(self, split: str) -> tuple[list[str], list[tuple[str, int]]]:
        """Names of the classes, and (path, class number) of every image, in a split's folder. Raises OSError."""
        classes, stray = inside(split)
        ignored = [os.path.join(split, name) for name in stray]
        samples: list[tuple[str, int]] = []
        for c, name in enumerate(classes):
            folder = os.path.join(split, name)
            images, others = image_files(folder)
            if not images:
                raise FileNotFoundError(0, f"no file is a {', '.join(EXTENSIONS)}", folder)
            samples += [(path, c) for path in images]
            ignored += others
        if not classes:
            raise FileNotFoundError(0, "no class folder in it", split)
        if ignored:
            some = printable(ignored[0])
            log.warning("ignored, being no image file in a class folder: %s (%d such files)", some, len(ignored))
        return classes, samples

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
