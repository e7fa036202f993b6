"""Files of torchvision's data sets as their publishers made them, only smaller; it is told their checksums."""

from __future__ import annotations

import gzip
import hashlib
import io
import pickle
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torchvision

from tests.files import Pixels, noise

CIFAR10_NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
FASHION_NAMES = [
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
]  # fmt: skip
TRAIN, TEST = 25, 15  # images in the files that the tests write; 25 is five CIFAR-10 batches of five

Halves = dict[bool, tuple[Pixels, list[int]]]  # train or not -> images (N, C, H, W), labels, in the order of the file


def halves(classes: int, *shape: int) -> Halves:
    def half(n: int, seed: int) -> tuple[Pixels, list[int]]:
        labels = np.random.default_rng(seed).integers(0, classes, n)
        labels[:3] = classes - 1, 0, classes - 1
        return noise(n, *shape, seed=seed), labels.tolist()

    return {True: half(TRAIN, 1), False: half(TEST, 2)}


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def idx(values: Pixels) -> bytes:
    return struct.pack(f">I{values.ndim}I", 0x800 + values.ndim, *values.shape) + values.tobytes()


def idx_files(found: Halves) -> dict[str, bytes]:
    files = {}
    for train, part in ((True, "train"), (False, "t10k")):
        images, labels = found[train]
        files[f"{part}-images-idx3-ubyte"] = idx(images[:, 0])
        files[f"{part}-labels-idx1-ubyte"] = idx(np.array(labels, np.uint8))
    return files


def write_idx(kind: str, root: Path, patch: pytest.MonkeyPatch, *, packed: bool = True) -> Halves:
    found = halves(10, 1, 28, 28)
    raw = root / kind / "raw"
    raw.mkdir(parents=True)
    for name, content in idx_files(found).items():
        if packed:
            (raw / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (raw / name).write_bytes(content)
    if packed:
        resources = [(file.name, md5(file)) for file in sorted(raw.iterdir())]
        patch.setattr(getattr(torchvision.datasets, kind), "resources", resources)
    return found


def write_mnist(root: Path, patch: pytest.MonkeyPatch) -> Halves:
    return write_idx("MNIST", root, patch)


def write_mnist_extracted(root: Path, patch: pytest.MonkeyPatch) -> Halves:
    return write_idx("MNIST", root, patch, packed=False)


def write_fashion(root: Path, patch: pytest.MonkeyPatch) -> Halves:
    return write_idx("FashionMNIST", root, patch)


def write_svhn(root: Path, patch: pytest.MonkeyPatch) -> Halves:
    import scipy.io

    found = halves(10, 3, 32, 32)
    splits = {}
    for train, name in ((True, "train"), (False, "test")):
        images, labels = found[train]
        file = root / f"{name}_32x32.mat"
        y = np.array([10 if label == 0 else label for label in labels], np.uint8)[:, None]
        scipy.io.savemat(file, {"X": images.transpose(2, 3, 1, 0), "y": y}, do_compression=True)
        splits[name] = [f"http://nowhere/{file.name}", file.name, md5(file)]
    patch.setattr(torchvision.datasets.SVHN, "split_list", splits)
    return found


class Python2Pickler(pickle._Pickler):
    """Writes as Python 2 and its numpy did: byte strings, and a dtype's flags as 0 and 1."""

    dispatch: ClassVar[dict[type, Callable[..., None]]] = dict(pickle._Pickler.dispatch)

    def save_bytes(self, text: str | bytes) -> None:
        raw = text if isinstance(text, bytes) else text.encode("latin1")
        self.write(pickle.BINSTRING + struct.pack("<i", len(raw)) + raw)  # type: ignore[attr-defined]
        self.memoize(text)  # type: ignore[attr-defined]

    dispatch[str] = dispatch[bytes] = save_bytes

    def reducer_override(self, value: object) -> Any:
        if isinstance(value, np.dtype):
            return np.dtype, (value.str[1:], 0, 1), (3, "|", None, None, None, -1, -1, 0)
        return NotImplemented


def python2_pickle(content: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    Python2Pickler(buffer, 2).dump(content)
    return buffer.getvalue().replace(b"numpy._core.", b"numpy.core.")


def write_cifar(kind: type[torchvision.datasets.CIFAR10], root: Path, patch: pytest.MonkeyPatch) -> Halves:
    hundred = kind is torchvision.datasets.CIFAR100
    found = halves(100 if hundred else 10, 3, 32, 32)
    folder = root / kind.base_folder
    folder.mkdir()
    for train, listed in ((True, "train_list"), (False, "test_list")):
        images, labels = found[train]
        names = [name for name, _ in getattr(kind, listed)]
        for name, part, numbers in zip(
            names, np.split(images, len(names)), np.split(np.array(labels), len(names)), strict=True
        ):
            content = {"batch_label": name, "data": part.reshape(len(part), -1), "filenames": ["x.png"] * len(part)}
            content["fine_labels" if hundred else "labels"] = numbers.tolist()
            if hundred:
                content["coarse_labels"] = [n % 20 for n in numbers.tolist()]
            (folder / name).write_bytes(python2_pickle(content))
        patch.setattr(kind, listed, [[name, md5(folder / name)] for name in names])
    meta = (
        {
            "fine_label_names": [f"fine_{c}" for c in range(100)],
            "coarse_label_names": [f"coarse_{c}" for c in range(20)],
        }
        if hundred
        else {"num_cases_per_batch": 5, "label_names": CIFAR10_NAMES, "num_vis": 3072}
    )
    file = folder / kind.meta["filename"]
    file.write_bytes(python2_pickle(meta))
    patch.setattr(kind, "meta", {**kind.meta, "md5": md5(file)})
    return found


def write_cifar10(root: Path, patch: pytest.MonkeyPatch) -> Halves:
    return write_cifar(torchvision.datasets.CIFAR10, root, patch)


def write_cifar100(root: Path, patch: pytest.MonkeyPatch) -> Halves:
    return write_cifar(torchvision.datasets.CIFAR100, root, patch)


def write_cifar10_archive(root: Path, patch: pytest.MonkeyPatch) -> Halves:
    kind = torchvision.datasets.CIFAR10
    found = write_cifar(kind, root, patch)
    folder, archive = root / kind.base_folder, root / kind.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, kind.base_folder)
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    patch.setattr(kind, "tgz_md5", md5(archive))
    return found
