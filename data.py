"""Real images of all data sets: loaded through torchvision, kept as uint8 on the device, grouped by class.

    dataset = Dataset("cifar10", device=device)
    dataset.train, dataset.test                 # ImageSet each, read when first used

A new data set is one row of `DATASETS` here, with a function like `load_digits` unless torchvision has it or
--image_folder names its images, and one row of `DATASET_SETTINGS` in utils/config/presets.py, which may be `dict()`.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from utils.files.arrayfile import ArrayFile
from utils.files.downloads import files_of, from_torchvision
from utils.files.imagefiles import FULL, GreyRange
from utils.files.imagefolder import Folder, Split
from utils.method.images import ImageSet, Normalize, Whiten, digest
from utils.system.errors import UsageError, UserError, printable

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
    load: Callable[[Path, bool], Split] | None = None  # (data_dir, train) -> images, labels, class names
    files: Callable[[Path], list[Path]] = lambda data_dir: []  # that `load` reads, as far as they are there
    flip: bool = True  # whether a mirror image belongs to the same class
    where: str = ""  # to get the images that --image_folder names, for data sets that have no `load`
    only: Mapping[str, str] | None = None  # the class folders to take of ImageNet's, with words for people


def torchvision_set(kind: str) -> tuple[Callable[[Path, bool], Split], Callable[[Path], list[Path]]]:
    """How to load a data set of torchvision, and its files."""
    return partial(from_torchvision, kind), partial(files_of, kind)


CIFAR = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
SVHN = ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
TINY = "http://cs231n.stanford.edu/tiny-imagenet-200.zip, as it is unpacked"
SUBSET = "https://github.com/fastai/imagenette, or use the folders of ImageNet itself"
NETTE = {
    "n01440764": "tench", "n02102040": "English springer", "n02979186": "cassette player", "n03000684": "chain saw",
    "n03028079": "church", "n03394916": "French horn", "n03417042": "garbage truck", "n03425413": "gas pump",
    "n03445777": "golf ball", "n03888257": "parachute",
}  # fmt: skip
WOOF = {
    "n02086240": "Shih-Tzu", "n02087394": "Rhodesian ridgeback", "n02088364": "beagle",
    "n02089973": "English foxhound", "n02093754": "Border terrier", "n02096294": "Australian terrier",
    "n02099601": "golden retriever", "n02105641": "Old English sheepdog", "n02111889": "Samoyed", "n02115641": "dingo",
}  # fmt: skip

DATASETS = {
    #          classes, channels, side, mean, std, load
    "mnist": Info(10, 1, 28, (0.1307,), (0.3081,), *torchvision_set("MNIST"), flip=False),
    "fashion": Info(10, 1, 28, (0.2861,), (0.3530,), *torchvision_set("FashionMNIST")),
    "svhn": Info(10, 3, 32, *SVHN, *torchvision_set("SVHN"), flip=False),
    "cifar10": Info(10, 3, 32, *CIFAR, *torchvision_set("CIFAR10")),
    "cifar100": Info(100, 3, 32, *CIFAR, *torchvision_set("CIFAR100")),
    "digits": Info(10, 1, 8, (0.3053,), (0.3758,), load_digits, flip=False),
    "tinyimagenet": Info(200, 3, 64, *IMAGENET, where=TINY),
    "imagenette": Info(10, 3, 128, *IMAGENET, where=SUBSET, only=NETTE),
    "imagewoof": Info(10, 3, 128, *IMAGENET, where=SUBSET, only=WOOF),
}


def has_mirror_images(name: str) -> bool:
    """Whether an image's mirror image belongs to the same class; taken for granted in folders of one's own."""
    return name not in DATASETS or DATASETS[name].flip


FOLDER_BASE_SIDE = 32  # at which the default pixel rate holds for images of one's own


class Source(Protocol):
    """Images of one's own: a folder of image files, or a file of arrays."""

    root: Path
    classes: list[str]

    @property
    def files(self) -> list[tuple[str, str]]:
        """Path of every file that images are read from, and what is known of its split and label."""

    @property
    def counts(self) -> list[int]:
        """Number of training images of every class."""

    def shape(self, size: int | None) -> tuple[int, int]:
        """Channels and side of the images; size: None, or the side to resize to."""

    def load(
        self, train: bool, channels: int, side: int, device: torch.device, held: Sequence[int] | None = None
    ) -> Split:
        """Images of a split as uint8 (N, channels, side, side); held: only of these classes."""


class Dataset:
    """Data set whose properties are known at once, and whose images are read when they are first used.

    image_folder, npz: the images, unless the data set comes with them. split: see utils/files/listing.py. mean, std:
    per channel of images of one's own, where they are known; otherwise computed from the training images. threads:
    number that read image files; None: as many as the machine suggests. whiten: none or zca, which whitens both splits
    by the covariance of the training images. skip_broken: leave out a folder's files that cannot be read. grey_range:
    of a folder's 16-bit images, where it is known. Raises UsageError or UserError, naming the flag or the file, when a
    folder or file cannot be used.
    """

    def __init__(
        self,
        name: str,
        *,
        device: torch.device,
        data_dir: str | Path = "data",
        image_folder: str | Path | None = None,
        npz: str | Path | None = None,
        split: float | None = None,
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
        info = DATASETS.get(name)
        self.source: Source | None = None
        if image_folder is not None:
            only = None if info is None else info.only
            root = Path(os.path.expanduser(image_folder))
            self.source = Folder(root, threads, split=split, only=only, skip_broken=skip_broken, grey_range=grey_range)
        elif npz is not None:
            self.source = ArrayFile(Path(os.path.expanduser(npz)), split=split)
        place = f"--npz {npz}" if image_folder is None else f"--image_folder {image_folder}"
        self.flip = has_mirror_images(name)
        if info is not None:
            self.classes, self.channels, self.side = info.classes, info.channels, info.side
            self.base_side = info.side
            self._statistics: tuple[Sequence[float], Sequence[float]] | None = (info.mean, info.std)
            if self.source is not None and (found := len(self.source.classes)) != self.classes:
                if found > self.classes or info.load is not None:
                    own = "npz" if image_folder is None else "folder"
                    raise UsageError(
                        f"{place}: has {found} classes, but {name} has {self.classes}; use -d {own} for a data set of "
                        "your own"
                    )
                log.warning("%s", printable(f"{place}: has {found} of the {self.classes} classes of {name}"))
                self.classes = found
        else:
            assert self.source is not None
            self.channels, self.side = self.source.shape(size)
            self.classes = len(self.source.classes)
            self.base_side = FOLDER_BASE_SIDE
            self._statistics = None if mean is None or std is None else (mean, std)
            if mean is not None and len(mean) != self.channels:
                raise UserError(f"{place}: has {self.channels} channels, the set's normalization {len(mean)}")
        if whiten != "none":
            self._check_whitening(f"--whiten {whiten}")

    @cached_property
    def counts(self) -> list[int]:
        """Number of training images of every class; the images of a folder are not read for it."""
        if self.source is not None:
            return self.source.counts
        return torch.bincount(self._train[1], minlength=self.classes).tolist()

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
        return self._whitening(self._train[0], mean, std)  # `train`, which deletes it, computes the normalisation first

    def whitening(self, mean: Sequence[float], std: Sequence[float]) -> Whiten:
        """ZCA whitening by the training images after a normalisation of one's own. Under torchrun, all ranks call it.

        Raises UsageError where images are too large for it.
        """
        own = self.normalize
        if isinstance(own, Whiten) and [own.mean.flatten().tolist(), own.std.flatten().tolist()] == [mean, std]:
            return own
        self._check_whitening("--whitened")
        return self._whitening(self.train.images, mean, std)

    def _whitening(self, images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Whiten:
        log.info("whitening: the covariance of %d images of %d numbers", sum(self.counts), images[0].numel())
        return Whiten(images, mean, std, self.device, all_reduce_sum=self._all_reduce_sum)

    def _check_whitening(self, flag: str) -> None:
        """Check that images are small enough to be whitened. Raises UsageError."""
        if self.channels * self.side**2 > WHITENED:
            raise UsageError(
                f"{flag}: takes a matrix for all pairs of an image's numbers, at most {WHITENED} of them; {self.name} "
                f"has images of {self.channels} x {self.side} x {self.side}. Give a smaller --size, or leave "
                f"{flag.split()[0]} out"
            )

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
        if self.source is None:
            root = self.data_dir
            files = [(str(path), "") for path in DATASETS[self.name].files(root)]
        else:
            root, files = self.source.root, self.source.files
        sha256 = hashlib.sha256()
        for path, label in files:
            about, name = os.stat(path), path.removeprefix(str(root))
            sha256.update(f"{name}\0{label} {about.st_size} {about.st_mtime_ns}\0".encode(errors="surrogateescape"))
        return sha256.hexdigest() if files else ""

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
        if self.source is not None:
            return self.source.classes
        return self._names

    @property
    def grey_range(self) -> GreyRange:
        """The values of 16-bit images that become 0 and 255."""
        return self.source.grey_range if isinstance(self.source, Folder) else FULL

    @property
    def skipped(self) -> dict[str, Any] | None:
        """Which broken files were left out: their `count`, the `first` names, and `sha256` of all names; None: none."""
        return self.source.skipped if isinstance(self.source, Folder) else None

    @property
    def reading(self) -> dict[str, Any]:
        """What data.json says of how a folder's files were read, where there is something to say."""
        grey_range = {} if self.grey_range == FULL else {"grey_range": list(self.grey_range)}
        return grey_range | ({} if self.skipped is None else {"skipped_files": self.skipped})

    @property
    def has_own_classes(self) -> bool:
        """Whether the images themselves say what the classes are, and not the data set's name."""
        return self.name not in DATASETS or DATASETS[self.name].load is None

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
        if self.source is not None:
            held = self._kept_classes if train else None
            return self.source.load(train, self.channels, self.side, self.device, held)
        load = DATASETS[self.name].load
        assert load is not None
        images, labels, names = load(self.data_dir, train)
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
