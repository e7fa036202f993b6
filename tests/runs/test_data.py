"""Real images: the five torchvision sets in their true formats, digits, folders of images, and ImageSet."""

from __future__ import annotations

import logging
import re
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import Tensor

import data
from data import Dataset
from tests.archives import (
    CIFAR10_NAMES,
    FASHION_NAMES,
    TRAIN,
    Halves,
    idx,
    write_cifar10,
    write_cifar10_archive,
    write_cifar100,
    write_fashion,
    write_mnist,
    write_mnist_extracted,
    write_svhn,
)
from tests.files import image_folder, noise, save
from utils.config.presets import PUBLISHED
from utils.files import imagefolder
from utils.method.images import ImageSet, Normalize, to_unit
from utils.system.errors import UsageError, UserError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The addresses that were asked for; none of them answers."""
    found: list[str] = []

    def urlopen(request: Any, *args: object, **kwargs: object) -> None:
        found.append(getattr(request, "full_url", str(request)))
        raise URLError("no network here")

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    return found


# --- torchvision's data sets ------------------------------------------------------------------------------------------

WRITERS: list[tuple[str, Callable[[Path, pytest.MonkeyPatch], Halves], list[str]]] = [
    ("mnist", write_mnist, torchvision.datasets.MNIST.classes),
    ("mnist", write_mnist_extracted, torchvision.datasets.MNIST.classes),
    ("fashion", write_fashion, FASHION_NAMES),
    ("svhn", write_svhn, list("0123456789")),
    ("cifar10", write_cifar10, CIFAR10_NAMES),
    ("cifar10", write_cifar10_archive, CIFAR10_NAMES),
    ("cifar100", write_cifar100, [f"fine_{c}" for c in range(100)]),
]


@pytest.mark.filterwarnings("ignore:dtype.*align")  # numpy 2.4.0 to 2.4.4 about the pickles of CIFAR
@pytest.mark.parametrize(("name", "write", "names"), WRITERS, ids=[write.__name__[6:] for _, write, _ in WRITERS])
def test_files_that_are_there_are_read_without_network(
    name: str,
    write: Callable[[Path, pytest.MonkeyPatch], Halves],
    names: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    asked: list[str],
) -> None:
    written = write(tmp_path, monkeypatch)
    dataset = Dataset(name, device=CPU, data_dir=tmp_path)
    assert dataset.class_names == names
    for train, found in ((True, dataset.train), (False, dataset.test)):
        images, labels = written[train]
        order = np.argsort(labels, kind="stable")
        assert found.images.dtype == torch.uint8 and found.labels.dtype == torch.int64
        assert found.images.shape == (len(images), dataset.channels, dataset.side, dataset.side)
        assert torch.equal(found.images, torch.from_numpy(images[order]))
        assert found.labels.tolist() == sorted(labels)
        assert found.counts == [labels.count(c) for c in range(dataset.classes)]
    assert len(names) == dataset.classes == len(dataset.train.counts)
    assert asked == []


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_table_row_matches_the_published_shape(name: str) -> None:
    classes, channels, side = {
        "mnist": (10, 1, 28), "fashion": (10, 1, 28), "svhn": (10, 3, 32), "cifar10": (10, 3, 32),
        "cifar100": (100, 3, 32),
    }[name]  # fmt: skip
    dataset = Dataset(name, device=CPU)
    assert (dataset.classes, dataset.channels, dataset.side) == (classes, channels, side)
    assert dataset.base_side == side
    assert dataset.flip == (name not in ("mnist", "svhn"))
    assert [len(x) for x in dataset.statistics] == [channels, channels]


MNIST_PARTS = [
    f"{part}-ubyte.gz" for part in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
]
BY_HAND = {
    "mnist": ("MNIST/raw", MNIST_PARTS),
    "fashion": ("FashionMNIST/raw", MNIST_PARTS),
    "svhn": ("", ["train_32x32.mat", "test_32x32.mat"]),
    "cifar10": ("", ["cifar-10-python.tar.gz"]),
    "cifar100": ("", ["cifar-100-python.tar.gz"]),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_without_network_the_message_says_which_files_to_put_where(name: str, tmp_path: Path, asked: list[str]) -> None:
    folder, files = BY_HAND[name]
    with pytest.raises(UserError) as caught:
        _ = Dataset(name, device=CPU, data_dir=tmp_path).train
    message = str(caught.value)
    assert caught.value.status == 1 and "\n" not in message
    for word in (*files, str(tmp_path / folder), "--data_dir"):
        assert word in message
    assert "damaged" not in message
    assert asked
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("name", [*BY_HAND, "mnist, extracted"])
def test_a_damaged_file_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, _, extracted = name.partition(", ")
    folder, (first, *_) = BY_HAND[name]
    if extracted:
        write_mnist_extracted(tmp_path, monkeypatch)
        first = first.removesuffix(".gz")
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    (tmp_path / folder / first).write_bytes(b"half of it")
    with pytest.raises(UserError, match=rf"{re.escape(first)}\b(?!\.gz).*damaged"):
        _ = Dataset(name, device=CPU, data_dir=tmp_path).train


def test_an_unpacking_cut_short_is_mended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: list[str]) -> None:
    """torchvision asks no more of MNIST's unpacked files than that they exist; those of CIFAR have checksums."""
    images = {
        True: write_mnist(tmp_path, monkeypatch)[True][0],
        False: write_cifar10_archive(tmp_path, monkeypatch)[True][0],
    }
    raw, batches = tmp_path / "MNIST" / "raw", tmp_path / "cifar-10-batches-py"
    for name, expected in (("mnist", images[True]), ("cifar10", images[False])):
        whole = Dataset(name, device=CPU, data_dir=tmp_path).train.images
        assert len(whole) == len(expected)
        halves = [raw / "train-images-idx3-ubyte", raw / "train-labels-idx1-ubyte"]
        for file in halves if name == "mnist" else [batches / "data_batch_3", batches / "batches.meta"]:
            for kept in (0, 1, file.stat().st_size // 2):
                file.write_bytes(file.read_bytes()[:kept])
                assert torch.equal(Dataset(name, device=CPU, data_dir=tmp_path).train.images, whole)
    assert asked == [] and not list(tmp_path.rglob(".*"))


def test_an_unpacked_half_of_a_damaged_archive_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mnist(tmp_path, monkeypatch)
    _ = Dataset("mnist", device=CPU, data_dir=tmp_path).train
    file = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    half = file.read_bytes()[:1000]
    for damaged in (file, file.with_suffix(".gz")):
        damaged.write_bytes(half)
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte, .*damaged"):
        _ = Dataset("mnist", device=CPU, data_dir=tmp_path).train
    assert file.read_bytes() == half


@pytest.mark.parametrize("what", ["shape", "label", "number"])
def test_files_of_another_data_set_are_named(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mnist_extracted(tmp_path, monkeypatch)
    raw = tmp_path / "MNIST" / "raw"
    images, labels = raw / "train-images-idx3-ubyte", raw / "train-labels-idx1-ubyte"
    if what == "shape":
        images.write_bytes(idx(noise(TRAIN, 14, 56)))
    elif what == "label":
        labels.write_bytes(idx(np.full(TRAIN, 10, np.uint8)))
    else:
        labels.write_bytes(idx(np.zeros(TRAIN - 1, np.uint8)))
    says = "25 images have 24 labels.*damaged" if what == "number" else "hold images of .*labels from"
    with pytest.raises(UserError, match=f"{says}.*") as caught:
        _ = Dataset("mnist", device=CPU, data_dir=tmp_path).train
    assert "--data_dir" in str(caught.value) and str(tmp_path) in str(caught.value)


def test_a_data_dir_in_the_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_svhn(tmp_path, monkeypatch)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(Dataset("svhn", device=CPU, data_dir="~").train) == TRAIN
    image_folder(tmp_path / "photos", {"a": 1, "b": 1})
    assert len(folder_set(Path("~/photos")).train) == 2


def test_a_data_dir_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match=f"{tmp_path / 'file'}.*--data_dir"):
        _ = Dataset("cifar10", device=CPU, data_dir=tmp_path / "file").train


# --- Digits -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return Dataset("digits", device=CPU)


def rows(*images: Tensor) -> list[list[int]]:
    return sorted(torch.cat(images).flatten(1).tolist())


def test_digits_are_split_1347_to_450_by_class_and_no_image_changes_its_class(digits: Dataset) -> None:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    assert (len(digits.train), len(digits.test)) == (1347, 450)
    assert digits.train.images.shape[1:] == (1, 8, 8) and digits.class_names == list("0123456789")
    assert digits.train.images.dtype == digits.test.images.dtype == torch.uint8
    for c in range(10):
        ours = rows(digits.train.of_class(c), digits.test.images[digits.test.labels == c])
        assert ours == rows(torch.from_numpy(np.rint(x[y == c] * 255 / 16)).byte())
        assert abs(digits.train.counts[c] - 0.75 * len(ours)) < 1
    unit = digits.train.images.double().numpy() / 255
    mean, std = digits.statistics
    assert mean == pytest.approx([unit.mean()], abs=5e-4) and std == pytest.approx([unit.std()], abs=5e-4)
    np.random.seed(7)  # which has no say in the split
    torch.manual_seed(7)
    again = Dataset("digits", device=CPU)
    assert torch.equal(again.train.images, digits.train.images) and torch.equal(again.test.labels, digits.test.labels)


# --- Folders of images ------------------------------------------------------------------------------------------------


def folder_set(root: Path, name: str = "folder", size: int | None = None) -> Dataset:
    return Dataset(name, device=CPU, image_folder=root, size=size)


def test_a_colour_folder_keeps_its_pixels_and_class_order(tmp_path: Path) -> None:
    red = save(tmp_path / "train" / "b" / "0.png", noise(8, 8, 3, seed=1))
    save(tmp_path / "train" / "a" / "0.png", noise(8, 8, 3, seed=2))
    for name in "ab":
        save(tmp_path / "test" / name / "0.png", noise(8, 8, 3, seed=3))
    dataset = folder_set(tmp_path)
    assert (dataset.channels, dataset.side, dataset.classes, dataset.flip) == (3, 8, 2, True)
    assert dataset.class_names == ["a", "b"]
    assert dataset.train.images.dtype == torch.uint8 and dataset.train.labels.tolist() == [0, 1]
    expected = torch.from_numpy(np.asarray(Image.open(red)).copy()).permute(2, 0, 1)
    assert torch.equal(dataset.train.of_class(1)[0], expected)


def test_a_grey_folder_has_one_channel_until_there_is_a_colour_image(tmp_path: Path) -> None:
    dataset = folder_set(image_folder(tmp_path, {"a": 1, "b": 1}, shape=(8, 8)))
    assert (dataset.channels, dataset.side) == (1, 8) and [len(x) for x in dataset.statistics] == [1, 1]
    assert torch.equal(dataset.train.images[1, 0], torch.from_numpy(noise(8, 8, seed=1)))
    save(tmp_path / "test" / "b" / "0.png", noise(8, 8, 3))
    dataset = folder_set(tmp_path)
    assert dataset.channels == 3
    assert torch.equal(dataset.train.images[0], torch.from_numpy(noise(8, 8, seed=0)).expand(3, 8, 8))


def test_classes_may_have_different_numbers_of_images(tmp_path: Path) -> None:
    dataset = folder_set(image_folder(tmp_path, {"a": 1, "b": 4, "c": 2}, {"a": 3, "b": 1, "c": 1}))
    assert (dataset.train.counts, dataset.train.starts) == ([1, 4, 2], [0, 1, 5])
    assert dataset.test.counts == [3, 1, 1]
    for i in range(4):
        expected = torch.from_numpy(noise(8, 8, 3, seed=1 + i)).permute(2, 0, 1)
        assert torch.equal(dataset.train.of_class(1)[i], expected)


def test_images_of_different_sizes_need_a_size(tmp_path: Path) -> None:
    image_folder(tmp_path, {"a": 1, "b": 1})
    save(tmp_path / "test" / "a" / "1.png", noise(8, 20, 3))
    with pytest.raises(UsageError, match=r"8 x 8.*20 x 8.*--size"):
        folder_set(tmp_path)
    dataset = folder_set(tmp_path, size=10)
    assert dataset.train.images.shape == (2, 3, 10, 10) and dataset.test.images.shape == (3, 3, 10, 10)


@pytest.mark.parametrize("shape", [(8, 12, 3), (4, 4, 3)])
def test_images_that_are_no_squares_or_tiny_need_a_size(shape: tuple[int, ...], tmp_path: Path) -> None:
    image_folder(tmp_path, {"a": 1, "b": 1}, shape=shape)
    with pytest.raises(UsageError, match=rf"{shape[1]} x {shape[0]}.*--size"):
        folder_set(tmp_path)
    assert folder_set(tmp_path, size=8).train.images.shape == (2, 3, 8, 8)


@pytest.mark.parametrize("wide", [True, False])
def test_the_short_side_is_resized_and_the_centre_is_kept(wide: bool, tmp_path: Path) -> None:
    image_folder(tmp_path, {"a": 1, "b": 1})
    bands = np.zeros((16, 32, 3), np.uint8)
    bands[:, :8, 0], bands[:, 8:24, 1], bands[:, 24:, 2] = 255, 200, 255
    save(tmp_path / "train" / "a" / "0.png", bands if wide else bands.transpose(1, 0, 2).copy())
    found = folder_set(tmp_path, size=8).train.of_class(0)[0]
    inner = found[:, :, 1:-1] if wide else found[:, 1:-1]
    assert found.shape == (3, 8, 8)
    assert inner[1].unique().tolist() == [200] and inner[0].max() == 0 and inner[2].max() == 0


def test_statistics_come_from_the_training_images_unless_they_are_known(tmp_path: Path) -> None:
    dataset = folder_set(image_folder(tmp_path, {"a": 3, "b": 2}))
    save(tmp_path / "test" / "a" / "0.png", np.zeros((8, 8, 3), np.uint8))
    unit = np.stack([noise(8, 8, 3, seed=i) for i in range(5)]).astype(np.float64) / 255
    mean, std = dataset.statistics
    assert mean == pytest.approx(unit.mean((0, 1, 2)).tolist(), abs=1e-12)
    assert std == pytest.approx(unit.std((0, 1, 2)).tolist(), abs=1e-12)
    batch, _ = dataset.train.batch(torch.arange(5))
    assert batch.mean((0, 2, 3)).abs().max() < 1e-5
    assert batch.std((0, 2, 3), correction=0) == pytest.approx(torch.ones(3), abs=1e-5)
    known = Dataset("folder", device=CPU, image_folder=tmp_path, mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6])
    assert known.statistics == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])


def test_statistics_are_exact_in_chunks_of_any_size_and_of_equal_images_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.from_numpy(noise(2500, 2, 4, 4))
    images[:, 1] = 100
    unit = images.numpy().astype(np.float64) / 255
    for chunk in (data.CHUNK, 5, 3 * 2 * 4 * 4):
        monkeypatch.setattr(data, "CHUNK", chunk)
        mean, std = data.channel_statistics(images)
        assert mean == pytest.approx(unit.mean((0, 2, 3)).tolist(), abs=1e-12)
        assert std[0] == pytest.approx(unit[:, 0].std(), abs=1e-12)
        assert 0 < std[1] <= 1e-3


def test_a_folder_read_as_cifar10_takes_its_size_and_normalisation(tmp_path: Path) -> None:
    root = image_folder(tmp_path, {f"class{c}": 1 for c in range(10)}, shape=(40, 40))
    dataset = folder_set(root, "cifar10")
    assert dataset.train.images.shape == (10, 3, 32, 32)
    assert dataset.class_names == [f"class{c}" for c in range(10)]
    assert dataset.statistics == ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
    batch, _ = dataset.train.batch(torch.arange(10))
    expected = (dataset.train.images.float() / 255 - torch.tensor(data.CIFAR[0]).view(3, 1, 1)) / torch.tensor(
        data.CIFAR[1]
    ).view(3, 1, 1)
    assert torch.allclose(batch, expected, atol=1e-6)


def test_a_folder_read_as_mnist_turns_grey_and_needs_its_number_of_classes(tmp_path: Path) -> None:
    root = image_folder(tmp_path, {str(c): 1 for c in range(10)}, shape=(28, 28, 3))
    dataset = folder_set(root, "mnist")
    grey = Image.fromarray(noise(28, 28, 3, seed=4)).convert("L")
    assert dataset.train.images.shape == (10, 1, 28, 28)
    assert torch.equal(dataset.train.images[4, 0], torch.from_numpy(np.asarray(grey).copy()))
    with pytest.raises(UsageError, match=r"--image_folder.*10 classes.*100.*-d folder"):
        folder_set(root, "cifar100")


@pytest.mark.parametrize("colour", [False, True])
def test_16_bit_grey_is_scaled_not_clipped(colour: bool, tmp_path: Path) -> None:
    image_folder(tmp_path, {"a": 1, "b": 1}, shape=(8, 8, 3) if colour else (8, 8))
    wanted = noise(8, 8, seed=9)
    deep = wanted.astype(np.uint16) * 257
    file = tmp_path / "train" / "a" / "0.png"
    Image.fromarray(deep).save(file)
    with Image.open(file) as image:
        assert image.mode.startswith("I")
    dataset = folder_set(tmp_path)
    assert dataset.channels == (3 if colour else 1)
    for channel in dataset.train.images[0]:
        assert (channel.int() - torch.from_numpy(wanted).int()).abs().max() <= 1


@pytest.mark.parametrize("transparency", [None, 3, bytes(range(256))])
def test_palette_images_give_their_colours(transparency: int | bytes | None, tmp_path: Path) -> None:
    image_folder(tmp_path, {"a": 1, "b": 1})
    palette = noise(256, 3, seed=1)
    index = noise(8, 8, seed=2)
    image = Image.frombytes("P", (8, 8), index.tobytes())
    image.putpalette(palette.tobytes())
    image.info["transparency"] = transparency
    image.save(tmp_path / "train" / "a" / "0.png")
    dataset = folder_set(tmp_path)
    assert dataset.channels == 3
    assert torch.equal(dataset.train.images[0], torch.from_numpy(palette[index]).permute(2, 0, 1))
    save(tmp_path / "train" / "a" / "0.png", noise(8, 8, 4))  # whose transparency is dropped
    expected = torch.from_numpy(noise(8, 8, 4)[..., :3].copy()).permute(2, 0, 1)
    assert torch.equal(folder_set(tmp_path).train.images[0], expected)


def test_files_that_are_no_images_are_named_in_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    image_folder(tmp_path, {"a": 1, "b": 1})
    stray = tmp_path / "train" / "a" / "labels.csv"
    stray.write_text("a,b")
    (tmp_path / "test" / "b" / ".DS_Store").write_text("hidden")
    with caplog.at_level(logging.WARNING, "dream"):
        dataset = folder_set(tmp_path)
    assert [str(stray) in record.getMessage() for record in caplog.records] == [True]
    assert dataset.train.counts == [1, 1]


def test_images_that_do_not_fit_into_memory_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = image_folder(tmp_path, {"a": 3, "b": 2})
    dataset = folder_set(root, size=16)
    monkeypatch.setattr(imagefolder, "free_memory", lambda device: 5 * 3 * 16 * 16)
    with pytest.raises(UserError, match=rf"{re.escape(str(root))}: 5 images of 3 x 16 x 16 .*GB.*--size") as caught:
        _ = dataset.train
    assert caught.value.status == 1
    monkeypatch.setattr(imagefolder, "free_memory", lambda device: 10 * 3 * 16 * 16)
    assert len(dataset.train) == 5


def test_images_are_read_when_first_used_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = image_folder(tmp_path, {"a": 2, "b": 1})
    read: list[str] = []
    read_image = imagefolder.read_image

    def spy(path: str, **how: Any) -> Tensor:
        read.append(str(Path(path).relative_to(root)))
        return read_image(path, **how)

    monkeypatch.setattr(imagefolder, "read_image", spy)
    dataset = folder_set(root)
    assert dataset.class_names == ["a", "b"] and read == []
    _ = dataset.statistics, dataset.train, dataset.train
    assert sorted(read) == ["train/a/0.png", "train/a/1.png", "train/b/0.png"]
    read.clear()
    _ = dataset.test, dataset.test
    assert sorted(read) == ["test/a/0.png", "test/a/1.png", "test/b/0.png"]


def test_a_named_data_set_is_not_touched_before_its_images_are_used(tmp_path: Path, asked: list[str]) -> None:
    dataset = Dataset("svhn", device=CPU, data_dir=tmp_path / "nowhere")
    _ = dataset.statistics, dataset.normalize, dataset.classes
    assert asked == [] and not (tmp_path / "nowhere").exists()


# --- ImageSet ---------------------------------------------------------------------------------------------------------

LABELS = [2, 0, 2, 3, 0, 2]


def numbered(labels: Sequence[int] = LABELS, classes: int = 4) -> ImageSet:
    """Image i has the value 10 * i everywhere."""
    images = (torch.arange(len(labels), dtype=torch.uint8) * 10).view(-1, 1, 1, 1).expand(-1, 2, 3, 3).contiguous()
    normalize = Normalize([0.5, 0.25], [0.5, 0.125])
    return ImageSet(images, torch.tensor(labels), classes=classes, normalize=normalize)


def test_an_image_set_is_grouped_by_class_with_its_order_kept() -> None:
    found = numbered()
    assert found.labels.tolist() == [0, 0, 2, 2, 2, 3]
    assert (len(found), found.classes, found.side, found.device) == (6, 4, 3, CPU)
    assert (found.counts, found.starts) == ([2, 0, 3, 1], [0, 2, 2, 5])  # empty classes included
    assert [found.of_class(c)[:, 0, 0, 0].tolist() for c in range(4)] == [[10, 40], [], [0, 20, 50], [30]]
    again = ImageSet(found.images, found.labels, classes=4, normalize=found.normalize)
    assert again.images.data_ptr() == found.images.data_ptr() == found.of_class(0).data_ptr()  # no copies


def test_uint8_stays_uint8_until_a_batch_normalises_it() -> None:
    found = numbered()
    x, y = found.batch(torch.tensor([5, 0]))
    assert found.images.dtype == torch.uint8 and x.dtype == torch.float32
    assert y.tolist() == [3, 0]
    for row, value in zip(x, (30, 10), strict=True):
        assert torch.allclose(row[0], torch.tensor((value / 255 - 0.5) / 0.5))
        assert torch.allclose(row[1], torch.tensor((value / 255 - 0.25) / 0.125))


def test_float_images_are_not_divided_by_255() -> None:
    images = torch.rand(2, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    found = ImageSet(images, torch.tensor([0, 1]), classes=2, normalize=Normalize([0.5], [0.5]))
    assert torch.allclose(found.batch(torch.arange(2))[0], (images - 0.5) / 0.5)
    assert torch.equal(to_unit(images), images)
    assert to_unit(torch.tensor([0, 51, 255], dtype=torch.uint8)).tolist() == pytest.approx([0, 0.2, 1])


def test_a_subset_is_grouped_and_keeps_classes_and_normalisation() -> None:
    found = numbered()
    part = found.subset(torch.tensor([5, 2, 0]))
    assert part.labels.tolist() == [0, 2, 3] and part.counts == [1, 0, 1, 1]
    assert part.images[:, 0, 0, 0].tolist() == [10, 0, 30]
    assert part.normalize is found.normalize
