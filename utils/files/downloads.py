"""Data sets that torchvision downloads, MNIST and the like: read where their files lie, or downloaded.

Files are also found under other names that they go by, such as Kaggle's, up to two folders below --data_dir.
"""

from __future__ import annotations

import gzip
import logging
import os
import shutil
import tarfile
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from urllib.error import URLError

import torch
import torchvision
from torchvision.datasets.utils import check_integrity, extract_archive

from utils.files.atomic import write_atomically
from utils.files.imagefolder import Split
from utils.files.lock import locked
from utils.system.errors import UserError, printable

log = logging.getLogger("dream")

LARGEST = 2**26  # bytes of a file that is unpacked; MNIST's training images are 47,040,016

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
LIKE_MNIST = ("fashion", "kmnist", "kuzushiji", "emnist", "qmnist")  # data sets whose files have the names of MNIST's


def from_torchvision(kind: str, data_dir: Path, train: bool) -> Split:
    """Training or test split of a torchvision data set, downloaded unless its files lie in data_dir.

    Of several processes one downloads while the others wait. Raises UserError, which says what files to put where.
    """
    folder, files = PUBLISHED[kind]
    read = partial(_read, kind, data_dir, train)
    with suppress(Exception):  # pickle, struct, scipy ...: each has its own errors for missing and truncated files
        return read()  # without the lock: nothing is written if all files are there
    if found := _elsewhere(kind, data_dir):
        where = printable(os.path.commonpath(found.values()))
        try:
            split = _read_laid_out(kind, found, train)
            if train:  # once is enough
                log.info("%s is read from %s", kind, where)
            return split
        except Exception as error:  # as above
            log.warning("%s looks like %s but cannot be read (%s)", where, kind, _reason(error))
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
            f"{kind} can be neither read nor downloaded ({_reason(error)}). "
            f"Without network, put {', '.join(files)} into {data_dir / folder} by hand{broken} (--data_dir)"
        ) from error


def files_of(kind: str, data_dir: Path) -> list[Path]:
    """Files that a torchvision data set is read from; none where it has to be unpacked or downloaded first."""
    folder, names = _layout(kind)
    files = [data_dir / folder / name for name in names]
    if not all(map(os.path.isfile, files)):
        files = list(dict.fromkeys((_elsewhere(kind, data_dir) or {}).values()))
    return files


def _reason(error: BaseException) -> str:
    """Why a download failed, in one line that is never empty: some errors of the network have no text.

    What MNIST's mirrors answered stands below the first line of torchvision's error.
    """
    if isinstance(error, URLError) and isinstance(error.reason, BaseException):
        return _reason(error.reason)
    text = " ".join(str(error).split()).replace("<urlopen error >", "no reason given")
    return text[:300] or type(error).__name__


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


# --- Under other names ------------------------------------------------------------------------------------------------


def _read_laid_out(kind: str, found: dict[str, Path], train: bool) -> Split:
    """Split from files or an archive, of which torchvision gets a temporary folder in its own layout.

    found: by the names that torchvision knows. Raises whatever torchvision and its libraries raise.
    """
    folder, names = _layout(kind)
    with tempfile.TemporaryDirectory() as root:
        place = Path(root, folder)
        place.mkdir(parents=True, exist_ok=True)
        for name in names:
            if ".tar" in found[name].suffixes:
                with tarfile.open(found[name]) as tar:
                    content = tar.extractfile(f"{folder}/{name}")
                    assert content is not None
                    (place / name).write_bytes(content.read(LARGEST))
            elif found[name].suffix == ".gz":
                with gzip.open(found[name]) as file:
                    (place / name).write_bytes(file.read(LARGEST))
            else:
                try:
                    (place / name).symlink_to(found[name].resolve())
                except OSError:  # Windows allows links to few users
                    shutil.copyfile(found[name], place / name)
        return _read(kind, Path(root), train)


def _layout(kind: str) -> tuple[str, list[str]]:
    """The folder that torchvision reads below its root, and the names of the files that it reads there."""
    source = getattr(torchvision.datasets, kind)
    if kind == "SVHN":
        return "", [source.split_list[split][1] for split in ("train", "test")]
    if kind.startswith("CIFAR"):
        return source.base_folder, [
            *(name for name, _ in source.train_list + source.test_list),
            source.meta["filename"],
        ]
    folder, files = PUBLISHED[kind]
    return folder, [name.removesuffix(".gz") for name in files]


def _elsewhere(kind: str, data_dir: Path) -> dict[str, Path] | None:
    """All files of a data set in one folder, by the names that torchvision knows, or the archive that has them.

    None where there are none, or where torchvision itself looks for them.
    """
    folder, names = _layout(kind)
    home, published = data_dir / folder, PUBLISHED[kind][1]
    for place in _folders(data_dir):
        where = str(place.absolute().relative_to(data_dir.absolute().parent)).lower()
        if kind == "MNIST" and any(other in where for other in LIKE_MNIST):
            continue
        if kind == "FashionMNIST" and "fashion" not in where:
            continue
        found = {name: file for name in names if (file := _spelled(place, name)) is not None}
        if len(found) == len(names) and any(file not in (home / n, home / f"{n}.gz") for n, file in found.items()):
            return found
        for archive in (place / name.removesuffix(end) for name in published for end in ("", ".gz")):
            if ".tar" in archive.suffixes and archive != data_dir / published[0] and archive.is_file():
                return dict.fromkeys(names, archive)
    return None


def _spelled(folder: Path, name: str) -> Path | None:
    """A file as torchvision or Kaggle calls it, packed or not, maybe in a folder of such a name; None if there is none.

    Kaggle calls train-images-idx3-ubyte also train-images.idx3-ubyte.
    """
    names = [f"{stem}{end}" for stem in dict.fromkeys((name, name.replace("-idx", ".idx"))) for end in ("", ".gz")]
    paths = (path for outer in names for path in (folder / outer, *(folder / outer / inner for inner in names)))
    return next((path for path in paths if os.path.isfile(path)), None)


def _folders(top: Path, levels: int = 2) -> Iterator[Path]:
    """A folder, and those below it up to some levels deeper, in the order of their names."""
    yield top
    with suppress(OSError):
        for path in sorted(top.iterdir()) if levels else ():
            if os.path.isdir(path):
                yield from _folders(path, levels - 1)
