"""Real images of all data sets: loaded through torchvision, kept as uint8 on the device, grouped by class.

    dataset = Dataset("cifar10", device=device)
    dataset.train, dataset.test                 # ImageSet each, read when first used

A new data set is one row of `DATASETS` here, with a function like `load_digits` unless torchvision has it, and one row
of `DATASET_SETTINGS` in utils/config/presets.py, which may be `dict()`.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.files.downloads import files_of, from_torchvision
from utils.files.imagefiles import FULL, GreyRange
from utils.files.imagefolder import Folder, Split
from utils.method.images import ImageSet, Normalize, Whiten, digest
from utils.system.errors import UsageError, UserError

log = logging.getLogger("dream")

DIGITS_SPLIT = 0  # scikit-learn's random_state of the digits' train/test split, whatever --seed says
CHUNK = 1024 * 3 * 32 * 32  # numbers that are converted at a time
WHITENED = 3 * 48 * 48  # largest C * H * W that is whitened: matrices of 200 MB, computed in a minute


def load_digits(data_dir: Path, train: bool) -> Split:
    """Split of scikit-learn's 1,797 handwritten digits, 8 x 8: three quarters for training, stratified."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    splits = train_test_split(x, y, test_size=0.25, stratify=y, random_state=DIGITS_SPLIT)
    x, y = (splits[0], splits[2]) if train else (splits[1], splits[3])
    images = np.rint(x * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)  # 0..16 -> 0..255
    return torch.from_numpy(images), torch.from_numpy(y).long(), [str(c) for c in range(10)]


@dataclass(frozen=True)
class Info:
    """Properties of a data set that are known without its images."""

    classes: int
    channels: int
    side: int
    mean: tuple[float, ...]  # per channel, in units of [0, 1], as std
    std: tuple[float, ...]
    load: Callable[[Path, bool], Split]  # (data_dir, train) -> images, labels, class names
    files: Callable[[Path], list[Path]] = lambda data_dir: []  # that `load` reads, as far as they are there
    flip: bool = True  # whether a mirror image belongs to the same class


def torchvision_set(kind: str) -> tuple[Callable[[Path, bool], Split], Callable[[Path], list[Path]]]:
    """How to load a data set of torchvision, and its files."""
    return partial(from_torchvision, kind), partial(files_of, kind)


CIFAR = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
SVHN = ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970))

DATASETS = {
    #          classes, channels, side, mean, std, load
    "mnist": Info(10, 1, 28, (0.1307,), (0.3081,), *torchvision_set("MNIST"), flip=False),
    "fashion": Info(10, 1, 28, (0.2861,), (0.3530,), *torchvision_set("FashionMNIST")),
    "svhn": Info(10, 3, 32, *SVHN, *torchvision_set("SVHN"), flip=False),
    "cifar10": Info(10, 3, 32, *CIFAR, *torchvision_set("CIFAR10")),
    "cifar100": Info(100, 3, 32, *CIFAR, *torchvision_set("CIFAR100")),
    "digits": Info(10, 1, 8, (0.3053,), (0.3758,), load_digits, flip=False),
}


def has_mirror_images(name: str) -> bool:
    """Whether an image's mirror image belongs to the same class; taken for granted in folders of one's own."""
    return name not in DATASETS or DATASETS[name].flip


FOLDER_BASE_SIDE = 32  # at which the default pixel rate holds for folders of one's own


class Dataset:
    """Data set whose properties are known at once, and whose images are read when they are first used.

    mean, std: per channel of a folder's images, where they are known; otherwise computed from the training images.
    threads: number that read image files; None: as many as the machine suggests. whiten: none or zca, which whitens
    both splits by the covariance of the training images. skip_broken: leave out a folder's files that cannot be read.
    grey_range: of a folder's 16-bit images, where it is known. Raises UsageError or UserError, naming the flag or the
    file, when a folder cannot be used.
    """

    def __init__(
        self,
        name: str,
        *,
        device: torch.device,
        data_dir: str | Path = "data",
        image_folder: str | Path | None = None,
        size: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        threads: int | None = None,
        whiten: str = "none",
        skip_broken: bool = False,
        grey_range: GreyRange | None = None,
    ) -> None:
        assert whiten in ("none", "zca")
        self.name = name
        self.whiten = whiten
        self._kept_classes: list[int] | None = None  # None: all
        self._all_reduce_sum: Callable[[Tensor], Tensor] = lambda x: x
        self._files = ""
        self.device = device
        self.data_dir = Path(os.path.expanduser(data_dir))
        self.folder: Folder | None = None
        if image_folder is not None:
            root = Path(os.path.expanduser(image_folder))
            self.folder = Folder(root, threads, skip_broken=skip_broken, grey_range=grey_range)
        info = DATASETS.get(name)
        self.flip = has_mirror_images(name)
        if info is not None:
            self.classes, self.channels, self.side = info.classes, info.channels, info.side
            self.base_side = info.side
            self._statistics: tuple[Sequence[float], Sequence[float]] | None = (info.mean, info.std)
            if self.folder is not None and len(self.folder.classes) != self.classes:
                raise UsageError(
                    f"--image_folder {image_folder}: has {len(self.folder.classes)} classes, but {name} has "
                    f"{self.classes}; use -d folder for a data set of your own"
                )
        else:
            assert self.folder is not None
            self.channels, self.side = self.folder.shape(size)
            self.classes = len(self.folder.classes)
            self.base_side = FOLDER_BASE_SIDE
            self._statistics = None if mean is None or std is None else (mean, std)
            if mean is not None and len(mean) != self.channels:
                raise UserError(
                    f"--image_folder {image_folder}: has {self.channels} channels, the set's normalization {len(mean)}"
                )
        if whiten != "none" and self.channels * self.side**2 > WHITENED:
            raise UsageError(
                f"--whiten {whiten}: takes a matrix for all pairs of an image's numbers, at most {WHITENED} of them; "
                f"{name} has images of {self.channels} x {self.side} x {self.side}. Give a smaller --size, or leave "
                "--whiten out"
            )

    @cached_property
    def counts(self) -> list[int]:
        """Number of training images of every class; the images of a folder are not read for it."""
        if self.folder is not None:
            labels = torch.tensor([label for _, label in self.folder.samples[True]])
        else:
            labels = self._train[1]
        return torch.bincount(labels, minlength=self.classes).tolist()

    def shard(self, classes: list[int], all_reduce_sum: Callable[[Tensor], Tensor]) -> None:
        """Keep the training images of some classes only, since other ranks keep the others.

        To be called before the training images are first used. all_reduce_sum: the sum of a tensor over all ranks, for
        statistics of all classes.
        """
        assert "train" not in vars(self) and "normalize" not in vars(self), "the images of all classes are in use"
        self._kept_classes, self._all_reduce_sum = classes, all_reduce_sum

    @cached_property
    def train(self) -> ImageSet:
        """Training images, of all classes or those that `shard` has named."""
        self._drop_others()
        normalize = self.normalize  # first, since it may need self._train
        images = self._image_set(*self._train, normalize)
        del self._train  # only one copy stays in memory
        return images

    @cached_property
    def test(self) -> ImageSet:
        """Test images of all classes."""
        images, labels, _ = self._load(train=False)
        return self._image_set(images, labels, self.normalize)

    @cached_property
    def normalize(self) -> Normalize:
        """Normalisation of both splits by the training images' statistics, with whitening if asked for."""
        mean, std = self.statistics
        if self.whiten == "none":
            return Normalize(mean, std, self.device)
        self._drop_others()
        images = self._train[0]  # still there: `train`, which deletes it, computes the normalisation first
        log.info("whitening: the covariance of %d images of %d numbers", sum(self.counts), images[0].numel())
        return Whiten(images, mean, std, self.device, all_reduce_sum=self._all_reduce_sum)

    @property
    def statistics(self) -> tuple[Sequence[float], Sequence[float]]:
        """Mean and standard deviation per channel, in units of [0, 1]."""
        if self._statistics is None:
            self._drop_others()
            self._statistics = channel_statistics(self._train[0], self._all_reduce_sum)
        return self._statistics

    # --- Which images these are ---------------------------------------------------------------------------------------

    @property
    def files(self) -> str:
        """SHA-256 of the names, labels, sizes and times of change of all files that images are read from.

        As long as it stays, the images are taken to be the same. Empty where there are no files, or none yet.
        """
        self._files = self._files or self._fingerprint()
        return self._files

    def _fingerprint(self) -> str:
        if self.folder is None:
            root = self.data_dir
            samples = [(str(path), "") for path in DATASETS[self.name].files(root)]
        else:
            root = self.folder.root
            samples = [(path, f"{train} {c}") for train, split in self.folder.samples.items() for path, c in split]
        sha256 = hashlib.sha256()
        for path, label in samples:
            about, name = os.stat(path), path.removeprefix(str(root))
            sha256.update(f"{name}\0{label} {about.st_size} {about.st_mtime_ns}\0".encode(errors="surrogateescape"))
        return sha256.hexdigest() if samples else ""

    @cached_property
    def digests(self) -> dict[str, str]:
        """SHA-256 of the training and of the test images of all classes. All ranks have to ask for it together."""
        return {"training": digest(self.train, self._all_reduce_sum), "test": digest(self.test)}

    def training_digest(self) -> str:
        """SHA-256 of the training images of all classes, for one rank alone: it reads them all and keeps none."""
        images, labels, _ = self._load(train=True)
        return digest(ImageSet(images, labels, classes=self.classes, normalize=Normalize([0], [1])))

    @property
    def class_names(self) -> list[str]:
        """Name of every class."""
        if self.folder is not None:
            return self.folder.classes
        return self._names

    @property
    def grey_range(self) -> GreyRange:
        """The values of 16-bit images that become 0 and 255."""
        return FULL if self.folder is None else self.folder.grey_range

    @property
    def skipped(self) -> dict[str, Any] | None:
        """Which broken files were left out: their `count`, the `first` names, and `sha256` of all names; None: none."""
        return None if self.folder is None else self.folder.skipped

    @property
    def reading(self) -> dict[str, Any]:
        """What data.json says of how a folder's files were read, where there is something to say."""
        grey_range = {} if self.grey_range == FULL else {"grey_range": list(self.grey_range)}
        return grey_range | ({} if self.skipped is None else {"skipped_files": self.skipped})

    @cached_property
    def _train(self) -> tuple[Tensor, Tensor]:
        images, labels, _ = self._load(train=True)
        return images, labels

    def _drop_others(self) -> None:
        """Delete the training images of classes that `shard` has not named, after a count of all."""
        if self._kept_classes is not None and sum(self.counts) == len(self._train[0]):
            keep = torch.isin(self._train[1], torch.tensor(self._kept_classes))
            self._train = self._train[0][keep], self._train[1][keep]

    @cached_property
    def _names(self) -> list[str]:
        return self._load(train=False)[2]

    def _load(self, *, train: bool) -> Split:
        if self.folder is not None:
            held = self._kept_classes if train else None
            return self.folder.load(train, self.channels, self.side, self.device, held)
        images, labels, names = DATASETS[self.name].load(self.data_dir, train)
        shape, expected = tuple(images.shape[1:]), (self.channels, self.side, self.side)
        if shape != expected or not 0 <= labels.min() <= labels.max() < self.classes:
            raise UserError(
                f"--data_dir {self.data_dir}: {self.name} has images of {expected} and labels below {self.classes}, "
                f"but its files hold images of {shape} and labels from {labels.min()} to {labels.max()}; delete them"
            )
        self._names = names
        return images, labels, names

    def _image_set(self, images: Tensor, labels: Tensor, normalize: Normalize) -> ImageSet:
        return ImageSet(images.to(self.device), labels.to(self.device), classes=self.classes, normalize=normalize)


def channel_statistics(
    images: Tensor, all_reduce_sum: Callable[[Tensor], Tensor] = lambda x: x
) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel of uint8 images (N, C, H, W), in units of [0, 1].

    all_reduce_sum: the sum of a tensor over ranks that have other images; of integers, so it is exact.
    """
    sums = torch.zeros(3, images.shape[1], dtype=torch.int64)  # of ones, values, and squares
    sums[0] = images.numel() // images.shape[1]
    for chunk in images.split(max(1, CHUNK // images[0].numel())):
        value = chunk.long()
        sums[1] += value.sum((0, 2, 3))
        sums[2] += value.square().sum((0, 2, 3))
    count, total, squares = all_reduce_sum(sums).double()
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt().clamp(min=0.255)  # a constant channel stays finite
    return (mean / 255).tolist(), (std / 255).tolist()
