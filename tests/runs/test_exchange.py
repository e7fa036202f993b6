"""Distilled sets of every form: read, refused, interpreted, exported and read back; and how packed ones look."""

from __future__ import annotations

import json
import logging
import os
import pickle
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file, save
from torch import Tensor

from data import Dataset
from tests.faults import hostile
from tests.files import Payload, noise, tree
from tests.files import save as save_image
from utils.method.formation import Formation, pack, training_images
from utils.method.images import ImageSet, Normalize
from utils.runs import export
from utils.runs.export import check_target, export_folder, export_safetensors
from utils.runs.formats import SetFile, read
from utils.runs.layout import factor_warning, other_factor
from utils.runs.sets import DistilledSet, folder_names, interpret, load_distilled
from utils.system.errors import UsageError, UserError

Writer = Callable[..., Path]
Warnings = Callable[[], list[str]]
CPU = torch.device("cpu")
FASHION = torchvision.datasets.FashionMNIST.classes


class Real(Dataset):
    """A data set as far as interpreting needs it, without images."""

    def __init__(self, class_names: Sequence[str] = ("cat", "dog", "cow"), channels: int = 1, side: int = 8) -> None:
        self.name, self.source, self._names = "animals", None, list(class_names)
        self.classes, self.channels, self.side, self.whiten = len(class_names), channels, side, "none"
        self.normalize = Normalize([0.5, 0.4, 0.3][:channels], [0.25, 0.2, 0.5][:channels])
        images, labels = torch.from_numpy(noise(60, channels, side, side)), torch.arange(60) % self.classes
        self.train = ImageSet(images, labels, classes=self.classes, normalize=self.normalize)


IMAGES = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([2, 0, 1, 1, 0, 2])
SOFT = torch.rand(6, 3, generator=torch.Generator().manual_seed(1)).softmax(1)
CARD: dict[str, Any] = {
    "dataset": "digits", "image_folder": None, "class_names": ["cat", "dog", "cow"], "ipc": 2, "factor": 2,
    "decode_type": "single", "value_range": [0.0, 1.0], "normalized": False,
    "normalization": {"mean": [0.5], "std": [0.25]}, "settings": {}, "finished": True, "store": "float32",
    "shape": [1, 8, 8],
}  # fmt: skip


def pt(folder: Path, *content: object) -> Path:
    torch.save(list(content), folder / "theirs.pt")
    return folder / "theirs.pt"


def safe(folder: Path, header: dict[str, str] | None = None, **tensors: Tensor) -> Path:
    (folder / "theirs.safetensors").write_bytes(save(tensors, header))
    return folder / "theirs.safetensors"


@contextmanager
def refusal(*says: object, status: int = 1) -> Iterator[None]:
    """What is inside must be refused in one line that says these words."""
    with pytest.raises(UserError) as caught:
        yield
    message = str(caught.value)
    assert caught.value.status == status and "\n" not in message, message
    for word in says:
        assert str(word) in message, f"{word!r} is not in: {message}"


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Warnings:
    """The warnings so far."""
    caplog.set_level(logging.WARNING, "dream")
    return lambda: [record.getMessage() for record in caplog.records]


# --- Two tensors in a file --------------------------------------------------------------------------------------------

WRITERS: list[Writer] = [pt, lambda folder, images, labels: safe(folder, images=images, labels=labels)]
both = pytest.mark.parametrize("write", WRITERS, ids=["pt", "safetensors"])


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("whole", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_floats_and_whole_numbers_of_any_width_are_read(
    write: Writer, dtype: torch.dtype, whole: torch.dtype, tmp_path: Path
) -> None:
    stored = read(write(tmp_path, IMAGES.to(dtype), LABELS.to(whole)))
    assert (stored.images.dtype, stored.labels.dtype, stored.soft) == (torch.float32, torch.int64, None)
    assert torch.equal(stored.images, IMAGES.to(dtype).float()) and torch.equal(stored.labels, LABELS)


@both
def test_bytes_are_divided_by_255(write: Writer, tmp_path: Path) -> None:
    pixels = torch.from_numpy(noise(6, 1, 8, 8))
    images, labels, soft = interpret(read(write(tmp_path, pixels, LABELS)), Real())
    assert torch.equal(images, pixels.float() / 255) and torch.equal(labels, LABELS) and soft is None


@both
@pytest.mark.parametrize(
    ("images", "labels", "says"),
    [
        (IMAGES[0], LABELS, "images are torch.float32 of shape (1, 8, 8)"),
        (IMAGES[:0], LABELS[:0], "shape (0, 1, 8, 8)"),
        (IMAGES.int(), LABELS, "torch.int32"),
        (IMAGES > 0.5, LABELS, "torch.bool"),
        (IMAGES, LABELS[:5], "labels are torch.int64 of shape (5,) for 6 images"),
        (IMAGES, LABELS + 0.5, "labels are torch.float32 of shape (6,)"),
        (IMAGES, LABELS / torch.tensor(0.0), "labels are torch.float32 of shape (6,)"),
        (IMAGES, LABELS[:, None].expand(-1, 2), "labels are torch.int64 of shape (6, 2)"),
        (1000 * IMAGES.int() - 1, LABELS, "torch.int32 from -1 to"),
        (IMAGES, LABELS > 1, "torch.bool"),
        (IMAGES, SOFT[:, :0], "shape (6, 0)"),
        (IMAGES, SOFT / 0, "NaN or infinity"),
    ],
)
def test_tensors_of_another_type_or_shape_are_refused(
    write: Writer, images: Tensor, labels: Tensor, says: str, tmp_path: Path
) -> None:
    file = write(tmp_path, images.contiguous(), labels.contiguous())
    with refusal(file, says, "expected images (N, C, H, W)"):
        read(file)


ODD: dict[str, Callable[[], Tensor]] = {
    "sparse": lambda: IMAGES.to_sparse(),
    "meta": lambda: IMAGES.to("meta"),
    "nested": lambda: torch.nested.nested_tensor([IMAGES[0], IMAGES[1]]),
    "endless": lambda: torch.zeros(1).expand(10**8, 3, 1000, 1000),  # in a small file
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_tensors_of_an_unusual_kind_are_refused(kind: str, tmp_path: Path) -> None:
    with refusal(tmp_path / "theirs.pt", "GB of memory" if kind == "endless" else ""):
        read(pt(tmp_path, ODD[kind](), LABELS))


@pytest.mark.parametrize("name", ["typo", "typo.pt", "typo.safetensors"])
def test_a_file_that_is_not_there_is_called_missing(name: str, tmp_path: Path) -> None:
    with refusal(tmp_path / name, "no such file", "run folder"):
        read(tmp_path / name)


@pytest.mark.parametrize("name", ["x.pt", "x", "x.safetensors"])
def test_pickled_objects_never_run(name: str, tmp_path: Path) -> None:
    file, marker = tmp_path / name, tmp_path / "ran"
    for write in (torch.save, lambda content, file: file.write_bytes(pickle.dumps(content))):
        write([IMAGES, LABELS, Payload(marker)], file)
        with refusal(file):
            read(file)
    assert not marker.exists()


# --- .safetensors -----------------------------------------------------------------------------------------------------


WHOLE = save({"images": IMAGES, "labels": LABELS})
GARBAGE = {  # tests/faults/test_fuzz.py has more
    **{f"{keep} bytes": WHOLE[:keep] for keep in (0, 4, 50, len(WHOLE) - 9)},
    "noise": np.random.default_rng(0).bytes(1000),
    "a header of endless length": b"\xff" * 8 + b"{}",
    "no JSON": struct.pack("<Q", 4) + b"{{{{",
    "a huge shape of few bytes": hostile.safe(
        {"images": hostile.described("F32", [10**6, 3, 10**6, 10**6], 0, 16)}, bytes(16)
    ),
}


@pytest.mark.parametrize("what", GARBAGE)
def test_garbage_in_place_of_a_safetensors_file_is_refused(what: str, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(GARBAGE[what])
    with refusal(file, "truncated or damaged", "run folder"):
        read(file)


def test_a_safetensors_file_of_something_else_is_refused_with_what_it_holds(tmp_path: Path) -> None:
    with refusal("holds a dict of first: float32 (6, 1, 8, 8), labels: int64 (6,), second: float32 (6, 1, 8, 8)"):
        read(safe(tmp_path, first=IMAGES, second=IMAGES.clone(), labels=LABELS))
    with refusal("holds a dict;"):
        read(safe(tmp_path))


def test_the_card_in_the_header_describes_the_set(tmp_path: Path) -> None:
    stored = read(safe(tmp_path, {"card": json.dumps(CARD)}, images=IMAGES, labels=LABELS))
    assert stored.card == CARD and stored.card_file == tmp_path / "theirs.safetensors"
    assert read(safe(tmp_path, {"format": "pt"}, images=IMAGES, labels=LABELS)).card is None


@pytest.mark.parametrize(
    "card", ["", "our best set", "[]", "5", "[" * 10**5, '{"dataset": "digits"}', json.dumps({**CARD, "factor": "2"})]
)
def test_a_card_that_is_not_ours_is_passed_over(card: str, tmp_path: Path, warnings: Warnings) -> None:
    stored = read(safe(tmp_path, {"card": card}, images=IMAGES, labels=LABELS))
    (warning,) = warnings()
    assert stored.card is None and str(stored.file) in warning and "not used" in warning


def test_without_the_package_its_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = safe(tmp_path, images=IMAGES, labels=LABELS)
    for module in ("safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, module, None)
    with refusal(file, "pip install safetensors"):
        read(file)
    with refusal("--export", "pip install safetensors"):
        export_safetensors(tmp_path / "new.safetensors", DistilledSet(IMAGES, LABELS, None), card=CARD)


# --- Pixels -----------------------------------------------------------------------------------------------------------


def with_pixel(value: float) -> Tensor:
    images = IMAGES.clone()
    images[3, 0, 4, 4] = value
    return images


def stored(images: Tensor, labels: Tensor = LABELS, **more: Any) -> SetFile:
    return SetFile(Path("theirs.pt"), images, labels, **more)


OTHER_CHANNELS = {**CARD, "normalized": True, "normalization": {"mean": [0.1] * 3, "std": [0.7] * 3}}
BYTES = torch.from_numpy(noise(6, 1, 8, 8))
REFUSED: dict[str, tuple[SetFile, Real, bool, str]] = {  # the file, whether --normalized was given, what is said
    **{f"{x}": (stored(with_pixel(x)), Real(), False, "NaN or infinity") for x in (torch.nan, torch.inf, -torch.inf)},
    "NaN, normalised": (stored(with_pixel(torch.nan)), Real(), True, "NaN or infinity"),
    "above 1": (stored(with_pixel(1.5)), Real(), False, "to 1.5|--normalized"),
    "below 0": (stored(with_pixel(-0.5)), Real(), False, "from -0.5|--normalized"),
    "0 to 60": (stored(60 * IMAGES), Real(), False, "0 to 255|divide them by 255|--normalized"),
    "normalised bytes": (stored(BYTES), Real(), True, "0 to 255|--normalized"),
    "a card of other channels": (stored(IMAGES, card=OTHER_CHANNELS), Real(), False, "1 channels|3"),
    "other channels": (stored(IMAGES), Real(channels=3), False, "(1, 8, 8)|(3, 8, 8)|-d|3 channels"),
    "another side": (stored(IMAGES), Real(side=9), False, "(1, 8, 8)|(1, 9, 9)|-d|--size"),
    "label -1": (stored(IMAGES, LABELS - 1), Real(), False, "label -1|animals has 3 classes|-d"),
    "label 3": (stored(IMAGES, LABELS + 1), Real(), False, "label 3|animals has 3 classes|-d"),
    "soft labels": (
        stored(IMAGES, SOFT.argmax(1), soft=SOFT), Real(["cat", "dog", "cow", "pig"]), False,
        "soft labels of 3 classes|animals has 4 classes|-d",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_interpreted_is_refused(what: str) -> None:
    file, real, normalized, says = REFUSED[what]
    with refusal("theirs.pt", *says.split("|")):
        interpret(file, real, normalized="data" if normalized else None)


RANGE = f"from {IMAGES.min():.3g} to {IMAGES.max():.3g}"


@pytest.mark.parametrize(
    ("images", "labels", "normalized", "says"),
    [
        (with_pixel(1.2), LABELS, False, ["1.2; clamped"]),
        (IMAGES, LABELS, True, [RANGE, "un-normalised"]),
        (2 * Real().normalize(IMAGES), LABELS, True, ["-2 to 2 was expected"]),  # of another data set
        (IMAGES, LABELS.clamp(max=1), False, ["theirs.pt: holds 2 of the 3 classes"]),
    ],
)
def test_what_looks_odd_is_used_with_a_warning(
    images: Tensor, labels: Tensor, normalized: bool, says: list[str], warnings: Warnings
) -> None:
    found, _, _ = interpret(stored(images, labels), Real(), normalized="data" if normalized else None)
    (warning,) = warnings()
    assert all(word in warning for word in says) and found.min() >= 0 and found.max() <= 1


@pytest.mark.parametrize("channels", [1, 3])
def test_mean_and_std_are_put_back_as_the_flag_or_the_card_says(channels: int, warnings: Warnings) -> None:
    real = Real(channels=channels)
    expected = IMAGES.expand(-1, channels, -1, -1)
    images, _, _ = interpret(stored(real.normalize(expected)), real, normalized="data")
    torch.testing.assert_close(images, expected)
    own = {"mean": [0.1] * channels, "std": [0.7] * channels}  # a card knows its numbers better than the data set
    card = {**CARD, "normalized": True, "normalization": own}
    images, _, _ = interpret(stored(Normalize(own["mean"], own["std"])(expected), card=card), real)
    torch.testing.assert_close(images, expected)
    assert warnings() == []


# --- Labels -----------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_rows_that_sum_to_one_are_probabilities(
    write: Writer, dtype: torch.dtype, tmp_path: Path, warnings: Warnings
) -> None:
    found = read(write(tmp_path, IMAGES, SOFT.to(dtype)))
    assert torch.equal(found.labels, SOFT.argmax(1))
    _, labels, soft = interpret(found, Real())
    assert soft is not None and torch.equal(labels, soft.argmax(1))
    torch.testing.assert_close(soft, SOFT, rtol=0, atol=1e-3)
    torch.testing.assert_close(soft.sum(1), torch.ones(6))
    assert not [text for text in warnings() if "soft" in text]


def test_other_rows_are_logits_and_a_warning_says_what_was_seen(warnings: Warnings) -> None:
    logits = SOFT.log() + 5
    _, labels, soft = interpret(stored(IMAGES, logits.argmax(1), soft=logits), Real())
    assert soft is not None and torch.equal(labels, soft.argmax(1))
    torch.testing.assert_close(soft, SOFT)
    assert f"range from {logits.min():.3g} to {logits.max():.3g}" in warnings()[-1] and "logits" in warnings()[-1]


def test_a_set_can_be_looked_at_without_its_data_set(tmp_path: Path) -> None:
    file = pt(tmp_path, (IMAGES - 0.5) / 0.25, LABELS)
    (tmp_path / "data.json").write_text(json.dumps({**CARD, "normalized": True}))
    images, labels, card = load_distilled(file)
    torch.testing.assert_close(images, IMAGES)
    assert torch.equal(labels, LABELS) and card is not None and card["factor"] == 2
    with refusal(file, "label is -1"):
        load_distilled(pt(tmp_path, IMAGES, LABELS - 1))


# --- Class folders ----------------------------------------------------------------------------------------------------


def class_folders(root: Path, names: Sequence[str], *shape: int) -> Path:
    """Two images per class, whose first pixel is the class's place in `names`."""
    for c, name in enumerate(names):
        for i in range(2):
            pixels = noise(*(shape or (8, 8)), seed=2 * c + i)
            pixels[0, 0] = c
            save_image(root / name / f"{i}.png", pixels)
    return root


def labels_of(root: Path, real: Real) -> list[int]:
    """The label that each of `class_folders`'s classes gets."""
    images, labels, _ = interpret(read(root), real)
    places = images[:, 0, 0, 0].mul(255).round().long().tolist()
    return [dict(zip(places, labels.tolist(), strict=True))[c] for c in sorted(set(places))]


@pytest.mark.parametrize(
    ("names", "classes", "labels"),
    [
        (["cow", "cat", "dog"], None, [2, 0, 1]),
        (["2_cow", "0_cat", "1_dog"], None, [2, 0, 1]),  # as exported
        (["2", "0", "1"], None, [2, 0, 1]),
        (["2_Kuh", "0_Katze", "1_Hund"], None, [2, 0, 1]),
        (["02", "0", "01"], None, [2, 0, 1]),
        (["T-shirt_top", "Ankle boot"], FASHION, [0, 9]),  # names that a file system cannot hold
        (["7", "3"], [f"{c} - {c}" for c in range(10)], [7, 3]),  # digits are their own numbers
        (["10", "2"], ["1", "10", "2"], [1, 2]),
    ],
)
def test_class_folders_are_matched_by_name_or_number(
    names: list[str], classes: list[str] | None, labels: list[int], tmp_path: Path
) -> None:
    assert labels_of(class_folders(tmp_path, names), Real(classes) if classes else Real()) == labels


@pytest.mark.parametrize(
    ("names", "odd"),
    [
        (["cat", "dog", "horse"], ["horse"]),
        (["a", "b", "c"], ["a, b, c"]),
        (["0", "1", "3"], ["3"]),  # one too many, or counted from one
        (["0_dog", "1_cat", "2_cow"], ["0_dog", "1_cat"]),  # another order
        (["cat", "0_cat"], ["cat", "0_cat"]),
        (["1", "01"], ["1", "01"]),
        (["0", "dog"], ["0"]),
    ],
)
def test_class_folders_that_fit_no_class_are_listed(names: list[str], odd: list[str], tmp_path: Path) -> None:
    with refusal(tmp_path, *odd, "animals", "0_cat, 1_dog, 2_cow", "-d"):
        interpret(read(class_folders(tmp_path, names)), Real())


@pytest.mark.parametrize("channels", [1, 3])
def test_grey_images_may_lie_in_files_of_either_kind(channels: int, tmp_path: Path) -> None:
    class_folders(tmp_path / "grey", ["cat", "dog", "cow"])
    for path in (tmp_path / "grey").rglob("*.png"):
        with Image.open(path) as image:
            grey = np.asarray(image)
        save_image(tmp_path / "colour" / path.parent.name / path.name, np.stack([grey] * 3, 2))
    first, second = (interpret(read(tmp_path / kind), Real(channels=channels))[0] for kind in ("grey", "colour"))
    assert first.shape == (6, channels, 8, 8) and torch.equal(first, second)


@pytest.mark.parametrize("shape", [(9, 9), (8, 12), None])
def test_an_image_of_another_size_or_a_broken_one_is_named(shape: tuple[int, ...] | None, tmp_path: Path) -> None:
    odd = class_folders(tmp_path, ["cat", "dog"]) / "dog" / "1.png"
    if shape:
        save_image(odd, noise(*shape))
    else:
        os.truncate(odd, 60)
    with refusal(odd, "one size" if shape else "cannot be read as an image"):
        read(tmp_path)


def test_hidden_and_empty_folders_do_not_count_other_files_are_named(tmp_path: Path, warnings: Warnings) -> None:
    class_folders(tmp_path, ["cat", ".cache"])
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "README.md").write_text("about it")
    (tmp_path / "cat" / "labels.csv").write_text("a,b")
    assert read(tmp_path).names == ["cat"]
    assert warnings() == [f"ignored, being no image file: {tmp_path / 'cat' / 'labels.csv'} (1 such files)"]


def test_a_folder_without_a_set_names_both_forms(tmp_path: Path) -> None:
    (tmp_path / "train" / "cat").mkdir(parents=True)
    with refusal(tmp_path / "data.pt", "no such file", f"{tmp_path}/CLASS/*"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["airplane", "bird", "cat"], ["airplane", "bird", "cat"]),
        (["T-shirt/top", "Ankle boot"], ["0_T-shirt_top", "1_Ankle_boot"]),
        (["a/b", "a_b"], ["0_a_b", "1_a_b"]),
        (["a", "A"], ["0_a", "1_A"]),
        (["..", "x"], ["class", "x"]),
        (["bus", "trained", "train"], ["bus", "trained", "trains"]),  # a split, for Hugging Face
        (["dog", "test tube", "train"], ["dog", "tests_tube", "trains"]),
        ([f"c{10 - c}" for c in range(11)], [f"{c:02}_c{10 - c}" for c in range(11)]),
    ],
)
def test_class_folders_have_safe_names_in_the_order_of_the_labels(names: list[str], expected: list[str]) -> None:
    assert folder_names(names) == expected


# --- Export -----------------------------------------------------------------------------------------------------------


def exported(folder: Path, names: list[str], *, soft: Tensor | None = None, **card: Any) -> ImageSet:
    """Six images, decoded with factor 2 and exported to a folder."""
    labels = LABELS if soft is None else soft.argmax(1)
    train = training_images(
        IMAGES, labels, soft=soft, formation=Formation(2), classes=3, normalize=Normalize([0.5], [0.25])
    )
    export_folder(folder, train, class_names=names, stored=6, card={**CARD, **card})
    return train


@pytest.mark.parametrize("names", [["cat", "cow", "dog"], ["T-shirt/top", "Ankle boot", "train"]])
def test_an_exported_folder_is_read_back_by_us_and_by_torchvision(names: list[str], tmp_path: Path) -> None:
    train = exported(tmp_path / "out", names)
    images, labels, soft = interpret(read(tmp_path / "out"), Real(names))
    assert torch.equal(labels, train.labels) and soft is None
    torch.testing.assert_close(images, train.images, rtol=0, atol=0.5001 / 255)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    prepare = torchvision.transforms.Compose([torchvision.transforms.Grayscale(), torchvision.transforms.ToTensor()])
    theirs = torchvision.datasets.ImageFolder(str(tmp_path / "out"), prepare)
    assert [label for _, label in theirs] == train.labels.tolist()
    torch.testing.assert_close(torch.stack([x for x, _ in theirs]), images)


def test_the_readme_of_an_export_says_what_it_is(tmp_path: Path) -> None:
    run: dict[str, Any] = {
        "outer_iterations": 7, "finished": True, "accuracy": {"accuracies": [50.0, 52.0]},
        "network": dict(family="convnet", depth=2, width=8, norm="instance", channels=1, classes=3, side=8),
        "settings": {"match": "grad", "metric": "mse", "select": "kmeans", "init": "noise", "epochs": 5},
    }  # fmt: skip
    exported(tmp_path / "out", ["cat", "cow", "a|dog"], **run)
    text = (tmp_path / "out" / "README.md").read_text()
    header = text.split("---\n")[1]
    assert "\n- image-classification\n" in header and "\n- dataset-distillation\n" in header
    for word in (
        "digits", "6 stored images, 2 per class", "24, 8 per class", "factor 2", "grad matching", "7", "n<1K",
        "51.0 +- 1.4 (n=2), convnet2", "8 bits", "ImageFolder", "Normalize([0.5], [0.25])", "a\\|dog", "0_cat",
    ):  # fmt: skip
        assert word in text, word
    assert "soft" not in text and "unfinished" not in text
    assert "Under which licence" in text and "license" not in header, "which the owner of the real images decides"
    exported(tmp_path / "unfinished", ["cat", "cow", "dog"], **{**run, "finished": False, "accuracy": "good"})
    assert "unfinished" in (tmp_path / "unfinished" / "README.md").read_text()


UCI = "UCI Optical Recognition of Handwritten Digits (scikit-learn)"


@pytest.mark.parametrize(
    ("card", "names", "header"),
    [
        ({}, [UCI], '["extended|other-UCI_Optical_Recognition_of_Handwritten_Digits_scikit-learn"]'),  # as older ones
        ({"dataset": "cifar10"}, ["uoft-cs/cifar10"], '["uoft-cs/cifar10"]'),
        ({"dataset": "folder", "image_folder": "/x/my photos"}, ["my photos"], '["extended|other-my_photos"]'),
        ({"source_datasets": ["me/mine", "a|b"]}, ["me/mine", "a|b"], '["me/mine", "extended|other-a_b"]'),
        *(
            ({"source_datasets": wrong, "dataset": "mnist"}, ["ylecun/mnist"], '["ylecun/mnist"]')
            for wrong in ("x", [], [3], ["x", None], ["a\n- b"], [" "], ["x" * 201], ["x"] * 21, {"a": 1})
        ),
    ],
)
def test_a_card_names_the_data_sets_that_its_images_come_from(
    card: dict[str, Any], names: list[str], header: str, tmp_path: Path
) -> None:
    export_safetensors(tmp_path / "x.safetensors", DistilledSet(IMAGES, LABELS, None), card={**CARD, **card})
    found = read(tmp_path / "x.safetensors").card
    assert found is not None and found["source_datasets"] == names
    exported(tmp_path / "out", ["cat", "cow", "dog"], **card)
    text = (tmp_path / "out" / "README.md").read_text()
    assert f"\nsource_datasets: {header}\n---\n" in text and f"| {names[0]}" in text


def test_soft_labels_are_reduced_in_a_folder_with_a_warning(tmp_path: Path, warnings: Warnings) -> None:
    soft = torch.eye(3)[LABELS] * 0.5 + 1 / 6
    train = exported(tmp_path / "out", ["cat", "cow", "dog"], soft=soft)
    assert "soft labels" in warnings()[0] and "soft labels" in (tmp_path / "out" / "README.md").read_text()
    assert train.soft is not None
    assert torch.equal(interpret(read(tmp_path / "out"), Real(["cat", "cow", "dog"]))[1], train.soft.argmax(1))


def test_an_export_replaces_nothing(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("precious")
    (tmp_path / "set.safetensors").write_text("precious")
    before = tree(tmp_path)
    with refusal("--export", tmp_path / "full", "not empty", status=2):
        exported(tmp_path / "full", ["cat", "cow", "dog"])
    with refusal("--export", tmp_path / "set.safetensors", "there already", status=2):
        export_safetensors(tmp_path / "set.safetensors", DistilledSet(IMAGES, LABELS, None), card=CARD)
    for path in (tmp_path / "full", tmp_path / "set.safetensors", tmp_path / "full" / "thesis.tex"):
        with pytest.raises(UsageError, match="--export"):
            check_target(path)
    assert tree(tmp_path) == before
    (tmp_path / "empty").mkdir()
    check_target(tmp_path / "empty")
    exported(tmp_path / "empty", ["cat", "cow", "dog"])
    assert read(tmp_path / "empty").names == ["cat", "cow", "dog"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with refusal("--export", tmp_path / "file", "cannot be written"):
        exported(tmp_path / "file" / "x", ["cat", "cow", "dog"])
    with refusal("--export", tmp_path / "file", "cannot be written"):
        export_safetensors(tmp_path / "file" / "x.safetensors", DistilledSet(IMAGES, LABELS, None), card=CARD)


def test_an_export_that_is_cut_short_leaves_nothing_to_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: object, **kwargs: object) -> str:
        (part,) = tmp_path.iterdir()
        assert part.name.startswith(".") and len(list(part.rglob("*.png"))) == 24
        raise KeyboardInterrupt

    (tmp_path / ".out.part" / "cat").mkdir(parents=True)  # of one that was killed
    (tmp_path / ".out.part" / "cat" / "stale.png").touch()
    with monkeypatch.context() as patch:
        patch.setattr(export, "readme", stop)
        with pytest.raises(KeyboardInterrupt):
            exported(tmp_path / "out", ["cat", "cow", "dog"])
    assert tree(tmp_path) == {}
    exported(tmp_path / "out", ["cat", "cow", "dog"])
    assert "stale.png" not in str(tree(tmp_path))


def test_a_folder_without_images_of_a_class_would_number_the_others_wrongly(tmp_path: Path) -> None:
    train = ImageSet(IMAGES, LABELS.clamp(min=1), classes=3, normalize=Normalize([0.5], [0.25]))
    with refusal("--export", "cat has no images", ".safetensors"):
        export_folder(tmp_path / "out", train, class_names=["cat", "cow", "dog"], stored=6, card=CARD)
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("soft", [None, SOFT])
def test_an_exported_safetensors_file_is_read_back_bit_for_bit(soft: Tensor | None, tmp_path: Path) -> None:
    file = tmp_path / "new" / "set.safetensors"
    export_safetensors(file, DistilledSet(IMAGES, LABELS, soft), card={**CARD, "normalized": True})
    found = read(file)
    assert torch.equal(found.images, IMAGES)
    assert torch.equal(found.labels, LABELS if soft is None else SOFT.argmax(1))
    assert (found.soft is None) if soft is None else found.soft is not None and torch.equal(found.soft, SOFT)
    assert found.card == {**CARD, "source_datasets": [UCI]}
    assert load_file(file)["images"].dtype == torch.float32
    images, _, _ = interpret(found, Real())
    assert torch.equal(images, IMAGES)


@pytest.mark.parametrize(
    ("factor", "decode_type", "says"),
    [(1, "single", "; subtract"), (2, "single", "n = 2,"), (3, "multi", "from 3 down"), (2, "bound", "within 128")],
)
def test_the_header_of_an_export_says_how_to_use_it(factor: int, decode_type: str, says: str, tmp_path: Path) -> None:
    card = {**CARD, "factor": factor, "decode_type": decode_type}
    file = tmp_path / "x.safetensors"
    export_safetensors(file, DistilledSet(IMAGES, LABELS, None), card=card)
    (length,) = struct.unpack("<Q", file.read_bytes()[:8])
    header = json.loads(file.read_bytes()[8 : 8 + length])["__metadata__"]
    assert header["format"] == "pt"
    for word in ("digits", "[0, 1]", "[0.5]", "[0.25]", says):
        assert word in header["about"], header["about"]


# --- How a packed set looks -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits() -> ImageSet:
    return Dataset("digits", device=CPU).train


def packed(digits: ImageSet, factor: int, seed: int, ipc: int = 1, spread: float = 0.1) -> Tensor:
    """Noisy stored images of random digits, as a distilled set has them."""
    draw = torch.Generator().manual_seed(seed)
    cells = ipc * factor**2
    rows = [digits.of_class(c)[torch.randperm(digits.counts[c], generator=draw)[:cells]] for c in range(10)]
    images = torch.cat([pack(row.float() / 255, factor=factor) for row in rows])
    return (images + spread * torch.randn(images.shape, generator=draw)).clamp(0, 1)


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_ten_packed_images_show_their_factor(factor: int, digits: ImageSet) -> None:
    for seed in range(10):
        images = packed(digits, factor, seed)
        assert [other_factor(images, digits.images, factor=claimed) for claimed in (1, 2, 3)] == [
            None if claimed == factor else factor for claimed in (1, 2, 3)
        ]


def test_noise_and_sets_without_structure_are_not_judged(digits: ImageSet) -> None:
    for seed in range(10):
        draw = torch.Generator().manual_seed(seed)
        images = (0.5 + 0.25 * torch.randn(10, 1, 8, 8, generator=draw)).clamp(0, 1)
        assert [other_factor(images, digits.images, factor=f) for f in (1, 2, 3)] == [None] * 3
    assert other_factor(torch.full((10, 1, 8, 8), 0.5), digits.images, factor=1) is None
    assert other_factor(packed(digits, 2, 0), torch.zeros(10, 1, 8, 8), factor=1) is None
    assert other_factor(packed(digits, 1, 0), digits.images, factor=4) is None  # cells that are too small to tell


def test_the_warning_names_file_and_both_factors(digits: ImageSet) -> None:
    """A few real images suffice."""
    few = digits.images[:: len(digits) // 20]
    for factor, claimed, looks in ((2, 1, "looks packed with factor 2"), (1, 2, "looks like whole images")):
        warning = factor_warning(Path("theirs.pt"), packed(digits, factor, 0), few, factor=claimed)
        assert warning is not None and f"theirs.pt: {looks}" in warning and f"-f {claimed} was given" in warning
        assert factor_warning(Path("theirs.pt"), packed(digits, factor, 0), few, factor=factor) is None
