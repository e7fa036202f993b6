"""torchvision's data sets under the names of other places, and why a download failed."""

from __future__ import annotations

import gzip
import shutil
import tarfile
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError

import pytest
import torch

from data import Dataset
from tests.archives import Halves, write_cifar10, write_cifar100, write_fashion, write_idx, write_mnist, write_svhn
from tests.files import tree
from utils.system.errors import UserError

CPU = torch.device("cpu")
Writer = Callable[[Path, pytest.MonkeyPatch], Halves]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def urlopen(*args: object, **kwargs: object) -> None:
        raise URLError("no network here")

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)


# --- Under other names ------------------------------------------------------------------------------------------------


def as_kaggle(there: Path, here: Path) -> None:
    """Some files with a dot, some in a folder of the same name."""
    for file in (there / "MNIST" / "raw").iterdir():
        name = file.name.removesuffix(".gz")
        target = here / name / name if "labels" in name else here / name.replace("-idx", ".idx")
        target.parent.mkdir(parents=True, exist_ok=True)
        content = file.read_bytes()
        target.write_bytes(gzip.decompress(content) if file.suffix == ".gz" else content)


def as_tar(there: Path, here: Path) -> None:
    """As a browser leaves it that unpacks what ends in .gz."""
    here.mkdir()
    with tarfile.open(here / "cifar-10-python.tar", "w") as tar:
        tar.add(there / "cifar-10-batches-py", "cifar-10-batches-py")


def under(*place: str, of: str = ".") -> Callable[[Path, Path], object]:
    """The folder `of` as a publisher leaves it, somewhere else."""
    return lambda there, here: shutil.copytree(there / of, Path(here, *place))


LAYOUTS: dict[str, tuple[str, Writer, Callable[[Path, Path], object]]] = {
    "Kaggle's MNIST": ("mnist", write_mnist, as_kaggle),
    "archives of MNIST": ("mnist", write_mnist, under("MNIST", of="MNIST/raw")),
    "unpacked MNIST": ("mnist", lambda *a: write_idx("MNIST", *a, packed=False), under("x", "y", of="MNIST/raw")),
    "Fashion-MNIST": ("fashion", write_fashion, under("Fashion_MNIST", of="FashionMNIST/raw")),
    "CIFAR-10, unpacked": ("cifar10", write_cifar10, under("cifar10")),
    "CIFAR-10, half unpacked": ("cifar10", write_cifar10, as_tar),
    "CIFAR-100, files alone": ("cifar100", write_cifar100, under("archive", of="cifar-100-python")),
    "SVHN": ("svhn", write_svhn, under("svhn")),
}


@pytest.mark.filterwarnings("ignore:dtype.*align")  # numpy 2.4.0 to 2.4.4 about the pickles of CIFAR
@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_under_other_known_names_are_read_where_they_lie(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    name, write, lay_out = LAYOUTS[layout]
    there, here = tmp_path / "there", tmp_path / "here"
    there.mkdir()
    write(there, monkeypatch)
    usual = Dataset(name, device=CPU, data_dir=there)
    expected = [usual.train.images, usual.test.images]
    lay_out(there, here)
    before = tree(here)
    caplog.clear()
    with caplog.at_level("INFO", "dream"):
        found = Dataset(name, device=CPU, data_dir=here)
        assert all(map(torch.equal, expected, [found.train.images, found.test.images]))
    assert tree(here) == before
    (message,) = caplog.messages
    assert f"is read from {here}" in message


def test_mnist_and_fashion_mnist_which_have_the_same_names_are_told_apart_by_their_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_idx("MNIST", tmp_path / "there", monkeypatch, packed=False)
    shutil.copytree(tmp_path / "there" / "MNIST" / "raw", tmp_path / "fashion" / "files")
    with pytest.raises(UserError, match="MNIST can be neither read nor downloaded"):
        _ = Dataset("mnist", device=CPU, data_dir=tmp_path / "fashion").train
    assert len(Dataset("fashion", device=CPU, data_dir=tmp_path / "fashion").train)
    (tmp_path / "fashion").rename(tmp_path / "data")
    assert len(Dataset("mnist", device=CPU, data_dir=tmp_path / "data").train)
    with pytest.raises(UserError, match="FashionMNIST can be neither read nor downloaded"):
        _ = Dataset("fashion", device=CPU, data_dir=tmp_path / "data").train


def test_damaged_files_under_another_name_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_mnist(tmp_path / "there", monkeypatch)
    as_kaggle(tmp_path / "there", tmp_path / "here")
    (tmp_path / "here" / "train-images.idx3-ubyte").write_bytes(b"half of it")
    with pytest.raises(UserError, match="MNIST can be neither read nor downloaded"):
        _ = Dataset("mnist", device=CPU, data_dir=tmp_path / "here").train
    assert f"{tmp_path / 'here'} looks like MNIST but cannot be read (" in caplog.text


# --- Why a download failed --------------------------------------------------------------------------------------------

REASONS: list[tuple[str, Exception, str]] = [
    ("mnist", URLError(""), "no reason given"),  # of both mirrors, in lines of their own
    ("mnist", URLError(OSError(101, "Network is unreachable")), "Network is unreachable"),
    ("cifar10", URLError(""), "no reason given"),
    ("cifar10", URLError(TimeoutError()), "TimeoutError"),
    ("cifar10", ConnectionResetError(), "ConnectionResetError"),
    ("svhn", HTTPError("http://x", 503, "", None, None), "HTTP Error 503"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("name", "error", "says"), REASONS)
def test_the_reason_of_a_failed_download_is_never_empty(
    name: str, error: Exception, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def urlopen(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    with pytest.raises(UserError, match=r"can be neither read nor downloaded \([^)]*" + says) as caught:
        _ = Dataset(name, device=CPU, data_dir=tmp_path).train
    assert "\n" not in str(caught.value)
