"""Labelled images in a .npz file, as MedMNIST and Keras distribute data sets, read as uint8."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from utils.files.imagefolder import Split
from utils.files.listing import TEST, TRAIN, held_out
from utils.files.npz import load_arrays
from utils.files.untrusted import must_fit
from utils.system.errors import UsageError, UserError, printable

log = logging.getLogger("dream")

EXPECTED = "train_images, train_labels, test_images and test_labels, or x_train, y_train, x_test and y_test"
IMAGES = ("images", "image", "imgs", "x", "data")
LABELS = ("labels", "label", "y", "targets", "target")
CHUNK = 1024  # images that are converted at a time


class ArrayFile:
    """Images and labels under MedMNIST's or Keras' names; `val` serves where there is no `test`, and is said.

    classes: names of the classes, which are the labels that the training images have, in order.
    """

    def __init__(self, path: Path, *, split: float | None = None) -> None:
        """Read a file. split: the fraction of every class to test on, in (0, 1), where it has no test images.

        Raises UserError or UsageError when it cannot be used.
        """
        self.path, self.root = path, path.parent
        pairs = self._pairs(load_arrays(path, f"expected {EXPECTED}"))
        train = next((word for word in (*TRAIN, "") if word in pairs), None)
        tests = [word for word in TEST if word in pairs]
        if train is None or (not train and tests):
            raise UserError(f"--npz {path}: has no training images; expected {EXPECTED}")
        if split is None and not tests:
            raise UserError(
                f"--npz {path}: has no test images; expected {EXPECTED}, or --split 0.2 takes a fifth of every class "
                "to test on"
            )
        if split is not None and tests:
            raise UsageError(f"--split {split:g}: {path} has {tests[0]} images; leave --split out")
        used = {True: pairs[train]} | ({False: pairs[tests[0]]} if tests else {})
        images = self._images({part: pair[0] for part, pair in used.items()})
        labels = {part: self._labels(pair[1], len(images[part])) for part, pair in used.items()}
        values = labels[True].unique()  # in order
        self.classes = [str(value) for value in values.tolist()]
        if len(values) < 2:
            raise UserError(f"--npz {path}: needs two classes or more, has {len(values)}")
        if not torch.isin(torch.cat([*labels.values()]), values).all():
            raise UserError(f"--npz {path}: the test images have labels that no training image has; correct them")
        self._splits = {part: (images[part], torch.searchsorted(values, labels[part])) for part in used}
        if split is not None:
            self._hold_out(split)
        elif tests != ["test"]:
            unused = "".join(f"; {word} is not used" for word in tests[1:])
            log.info("%s", printable(f"--npz {path}: {tests[0]} is tested on{unused}"))

    @property
    def files(self) -> list[tuple[str, str]]:
        """Path of the file, in which splits and labels are."""
        return [(str(self.path), "")]

    @property
    def counts(self) -> list[int]:
        """Number of training images of every class."""
        return self._splits[True][1].bincount(minlength=len(self.classes)).tolist()

    def shape(self, size: int | None) -> tuple[int, int]:
        """Channels and side of the images; size: None, or the side to resize to.

        Raises UsageError when there is no size and the images are no squares of one size.
        """
        shapes = {tuple(images.shape[1:]) for images, _ in self._splits.values()}
        channels = max(shape[0] for shape in shapes)
        _, height, width = min(shapes)
        if size is None and (len({shape[1:] for shape in shapes}) > 1 or height != width or width < 8):
            seen = " and ".join(f"{w} x {h}" for _, h, w in sorted(shapes))
            raise UsageError(f"--npz {self.path}: images are {seen}; give --size PIXELS, 8 or more")
        return channels, size or width

    def load(
        self, train: bool, channels: int, side: int, device: torch.device, held: Sequence[int] | None = None
    ) -> Split:
        """Images of a split as uint8, resized and centre-cropped to `side`; held: only of these classes.

        Raises UserError when they do not fit the memory.
        """
        images, labels = self._splits[train]
        if held is not None:
            keep = torch.isin(labels, torch.tensor(held))
            images, labels = images[keep], labels[keep]
        if images.shape[1:] != (channels, side, side):
            must_fit(self.path, len(images) * channels * side * side, ", half of it for networks")
            images = torch.cat([_fitted(chunk, channels, side) for chunk in images.split(CHUNK)])
        return images, labels, self.classes

    # --- Reading ------------------------------------------------------------------------------------------------------

    def _pairs(self, arrays: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """Images and labels by the word for their split in the arrays' names, "" where there is none."""
        found: dict[tuple[str, str], Tensor] = {}
        for name, array in arrays.items():
            words = re.findall("[a-z]+", name.lower())
            split = next((word for word in words if word in TRAIN + TEST), "")
            for kind, known in (("images", IMAGES), ("labels", LABELS)):
                if any(word in known for word in words) and "names" not in words:
                    found[split, kind] = array
        splits = {split for split, _ in found if {(split, "images"), (split, "labels")} <= found.keys()}
        if not splits:
            raise UserError(f"--npz {self.path}: holds {', '.join(arrays)[:200]}; expected {EXPECTED}")
        return {split: (found[split, "images"], found[split, "labels"]) for split in splits}

    def _labels(self, labels: Tensor, count: int) -> Tensor:
        """Labels (N,), (N, 1) or one-hot (N, classes) as int64 (N,). Raises UserError for others."""
        if labels.dim() == 2 and labels.shape[1] > 1 and _is_one_hot(labels):
            labels = labels.long().argmax(1)
        if labels.dim() not in (1, 2) or labels.numel() != len(labels):
            raise UserError(f"--npz {self.path}: has labels of shape {tuple(labels.shape)}; one per image is needed")
        if len(labels) != count:
            raise UserError(f"--npz {self.path}: has {len(labels)} labels for {count} images; correct the file")
        if labels.is_floating_point() and not ((labels == labels.round()) & labels.isfinite()).all():
            raise UserError(f"--npz {self.path}: has labels that are no whole numbers; one class per image is needed")
        return labels.flatten().long()

    def _images(self, images: Mapping[bool, Tensor]) -> dict[bool, Tensor]:
        """Images as uint8 (N, C, H, W): from 0 to 1 or to 255 as such, larger numbers divided by the largest."""
        layouts = {part: self._channels_first(x) for part, x in images.items()}
        ranges = [x.aminmax() for x in layouts.values() if x.dtype not in (torch.uint8, torch.bool)]
        low, high = (float(f(bound[i] for bound in ranges)) if ranges else 0.0 for i, f in enumerate((min, max)))
        if not (low >= 0 and high < float("inf")):
            raise UserError(f"--npz {self.path}: pixels range from {low:g} to {high:g}; expected 0 to 255, or 0 to 1")
        is_float = any(x.is_floating_point() for x in layouts.values())
        scale = 255 / high if high > 255 else 255 if is_float and high <= 1 else 1
        if scale != 1:
            log.info("%s", printable(f"--npz {self.path}: pixels from 0 to {max(high, 1):g} are taken as 0 to 255"))

        def converted(x: Tensor) -> Tensor:
            if x.dtype == torch.uint8:
                return x
            if x.dtype == torch.bool:
                return x.byte() * 255
            out = torch.empty(x.shape, dtype=torch.uint8)
            for part, chunk in zip(out.split(CHUNK), x.split(CHUNK), strict=True):
                part.copy_((chunk.double() * scale).round())
            return out

        return {part: converted(x) for part, x in layouts.items()}

    def _channels_first(self, images: Tensor) -> Tensor:
        """Images (N, H, W), (N, H, W, C) or (N, C, H, W), with C 1, 3 or 4, as (N, 1 or 3, H, W)."""
        shape = tuple(images.shape)
        if images.dim() == 3:
            images = images[:, None]
        elif images.dim() == 4 and shape[3] in (1, 3, 4):
            images = images.permute(0, 3, 1, 2)
        elif images.dim() != 4 or shape[1] not in (1, 3, 4):
            raise UserError(
                f"--npz {self.path}: has images of shape {shape}; expected (N, H, W), or (N, H, W, C) with 1 or 3 "
                "channels"
            )
        if not images.numel():
            raise UserError(f"--npz {self.path}: has images of shape {shape}, which are none")
        return images[:, :3]  # the fourth is transparency

    def _hold_out(self, fraction: float) -> None:
        """Divide the images into training and test images."""
        images, labels = self._splits[True]
        tested = held_out([str(i) for i in range(len(labels))], labels.tolist(), self.classes, fraction)
        is_tested = torch.tensor(tested)
        self._splits = {part: (images[is_tested != part], labels[is_tested != part]) for part in (True, False)}
        counts = f"{len(self._splits[True][1])} images to train and {len(self._splits[False][1])} to test on"
        said = f"--split {fraction:g} gives {counts}, the same ones for every --seed"
        log.info("%s", printable(f"--npz {self.path}: {said}"))


def _is_one_hot(labels: Tensor) -> bool:
    return bool(((labels == 0) | (labels == 1)).all() and (labels.long().sum(1) == 1).all())


def _fitted(images: Tensor, channels: int, side: int) -> Tensor:
    """Images (N, C, H, W) uint8 with that many channels, cropped to the central square and resized to the side."""
    if images.shape[1] > channels:
        images = functional.rgb_to_grayscale(images)
    short = min(images.shape[2:])
    square = functional.center_crop(images, [short, short])
    if short != side:
        square = functional.resize(square, [side, side], antialias=True)
    return square.expand(-1, channels, -1, -1)
