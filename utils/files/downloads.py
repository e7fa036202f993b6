"""Data sets that torchvision downloads, MNIST and the like: read where their files lie, or downloaded."""

from __future__ import annotations

import gzip
import logging
import warnings
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
import torchvision
from torchvision.datasets.utils import check_integrity, extract_archive

from utils.files.atomic import write_atomically
from utils.files.imagefolder import Split
from utils.files.lock import locked
from utils.system.errors import UserError, first_line, printable

log = logging.getLogger("dream")

_MNIST = [
    f"{part}-ubyte.gz" for part in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
]
PUBLISHED = {  # the folder below --data_dir where torchvision looks for a data set, and its files as published
    "MNIST": ("MNIST/raw", _MNIST),
    "FashionMNIST": ("FashionMNIST/raw", _MNIST),
    "SVHN": ("", ["train_32x32.mat", "test_32x32.mat"]),
    "CIFAR10": ("", ["cifar-10-python.tar.gz"]),
    "CIFAR100": ("", ["cifar-100-python.tar.gz"]),
}


def from_torchvision(kind: str, data_dir: Path, train: bool) -> Split:
    """Training or test split of a torchvision data set, downloaded unless its files lie in data_dir.

    Of several processes one downloads while the others wait. Raises UserError, which says what files to put where.
    """
    folder, files = PUBLISHED[kind]
    read = partial(_read, kind, data_dir, train)
    with suppress(Exception):  # pickle, struct, scipy ...: each has its own errors for missing and truncated files
        return read()  # without the lock: nothing is written if all files are there
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with locked(data_dir / f".{kind}.lock", doing=f"downloading {kind}", wait=True):
            with suppress(Exception):  # another process may have downloaded it in the meantime
                return read()
            log.info("%s is not ready in %s: unpacking or downloading it", kind, printable(str(data_dir)))
            _unpack(kind, data_dir / folder)
            return read(download=True)
    except Exception as error:  # of urllib, http, tarfile, gzip and the libraries above
        candidates = [name.removesuffix(".gz") for name in files if name.endswith("ubyte.gz")] + list(files)
        there = [name for name in candidates if (data_dir / folder / name).exists()]
        broken = f"; {', '.join(there)} is there but may be damaged: delete it first" if there else ""
        raise UserError(
            f"{kind} can be neither read nor downloaded ({first_line(error)}). "
            f"Without network, put {', '.join(files)} into {data_dir / folder} by hand{broken} (--data_dir)"
        ) from error


def _read(kind: str, data_dir: Path, train: bool, *, download: bool = False) -> Split:
    """Split of a torchvision data set as tensors. Raises whatever torchvision and its libraries raise."""
    split = {"split": "train" if train else "test"} if kind == "SVHN" else {"train": train}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's about the pickles of CIFAR
        source = getattr(torchvision.datasets, kind)(data_dir, download=download, **split)
    images = torch.as_tensor(source.data)
    if images.dim() == 3:  # (N, H, W), grey
        images = images[:, None]
    elif images.shape[-1] == 3:  # (N, H, W, C)
        images = images.permute(0, 3, 1, 2)
    labels = torch.as_tensor(source.labels if kind == "SVHN" else source.targets).long()
    if len(images) != len(labels):
        raise ValueError(f"{len(images)} images have {len(labels)} labels")
    names = getattr(source, "classes", [str(c) for c in range(10)])
    return images.contiguous(), labels, [str(name) for name in names]


def _unpack(kind: str, folder: Path) -> None:
    """Unpack the undamaged archives of a data set again.

    torchvision never looks into MNIST's unpacked files and CIFAR's list of classes once they exist, even if truncated.
    """
    source = getattr(torchvision.datasets, kind)
    for name, md5 in getattr(source, "resources", ()):
        archive = folder / name
        if check_integrity(archive, md5):
            write_atomically(archive.with_suffix(""), gzip.decompress(archive.read_bytes()))
    if hasattr(source, "tgz_md5") and check_integrity(folder / source.filename, source.tgz_md5):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python's, that extracting will change
            extract_archive(str(folder / source.filename))
