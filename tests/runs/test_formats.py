"""Sets in the files that other tools write: nested and named in any way, in pairs, in parts; all else is refused."""

from __future__ import annotations

import argparse
import logging
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import train
from tests.faults.fuzz import little_memory
from tests.files import noise
from utils.files import pickles
from utils.files.tensors import read_tensors
from utils.runs.formats import SetFile, read
from utils.system.errors import UsageError, UserError

Said = Callable[[], str]
IMAGES = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([2, 0, 1, 1, 0, 2])
SOFT = torch.rand(6, 3, generator=torch.Generator().manual_seed(1))
OTHERS = IMAGES.flip(0)
NUMPY = {"ConvNet": [np.float64(0.31), np.float32(0.5), np.int64(3)], "curve": np.linspace(0, 1, 5)}


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Said:
    """Everything that was logged."""
    caplog.set_level(logging.INFO, "dream")
    return lambda: "\n".join(record.getMessage() for record in caplog.records)


def write(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def must_be_the_set(found: SetFile, images: Tensor = IMAGES, labels: Tensor = LABELS) -> None:
    assert found.images.dtype == images.dtype and torch.equal(found.images, images)
    assert found.labels.dtype == torch.int64 and torch.equal(found.labels, labels)


# --- In one file ------------------------------------------------------------------------------------------------------

CONTENTS: dict[str, Any] = {
    "DC, DM, DataDAM": {"data": [[OTHERS, LABELS], [IMAGES, LABELS]], "accs_all_exps": NUMPY},
    "one experiment": {"data": [[IMAGES, LABELS]], "accs_all_exps": {}},
    "a tuple": (IMAGES, LABELS),
    "labels first": [LABELS, IMAGES],
    "with a learning rate": [IMAGES, LABELS, torch.tensor(0.01)],
    "image and label": {"image": IMAGES, "label": LABELS},
    "data and targets": {"data": IMAGES, "targets": LABELS, "epoch": 3},
    "x and y": {"x": IMAGES, "y": LABELS},
    "other words": {"image_syn": IMAGES, "label_syn": LABELS, "lr_syn": torch.tensor([0.01])},
    "names that say nothing": {"a": IMAGES, "b": LABELS},
    "several of one shape": {"syn_images": IMAGES, "momentum": OTHERS, "labels": LABELS},
    "training and test images": {"train_images": IMAGES, "train_labels": LABELS, "test_images": OTHERS[:2],
                                 "test_labels": LABELS[:2]},
    "nested": {"state": {"images": IMAGES, "labels": LABELS}, "args": argparse.Namespace(lr=0.1, net="ConvNet")},
    "a list in a list": [[IMAGES, LABELS]],
    "class numbers in a list": {"images": IMAGES, "labels": LABELS.tolist()},
    "NumPy's arrays": {"images": IMAGES.numpy(), "labels": LABELS.numpy().astype(">i4")},
    "parameters": [torch.nn.Parameter(IMAGES), LABELS],
}  # fmt: skip


@pytest.mark.parametrize("what", CONTENTS)
def test_a_set_is_found_however_it_is_nested_and_named(what: str, tmp_path: Path) -> None:
    must_be_the_set(read(write(tmp_path / "theirs.pt", CONTENTS[what])))


REFUSED: dict[str, tuple[Any, str]] = {
    "two sets of names": ({"a": IMAGES, "b": OTHERS, "y": LABELS}, "holds a dict of a: float32 (6, 1, 8, 8), b:"),
    "hard and soft labels": ([IMAGES, LABELS, SOFT], "float32 (6, 3)"),
    "test images alone": ({"test_images": IMAGES, "test_labels": LABELS}, "test_labels: int64 (6,)"),
    "no images": ({"accs": [1.0]}, "holds a dict of accs: a list of a float"),
    "images alone": ({"images": IMAGES}, "holds images (float32 (6, 1, 8, 8)) and no labels"),
    "flat images": ({"images": IMAGES.flatten(1), "labels": LABELS}, "images are torch.float32 of shape (6, 64)"),
    "a matrix": (IMAGES.flatten(1), "holds labels (float32 (6, 64)) and no images"),
    "a number": (torch.tensor(0.01), "holds a single number"),
    "text": ("images", "holds a str"),
    "a long key": ({"k" * 10**5: 1}, "kkk: a int"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_holds_no_set_is_refused_with_what_was_seen(what: str, tmp_path: Path) -> None:
    content, says = REFUSED[what]
    with pytest.raises(UserError) as caught:
        read(file := write(tmp_path / "theirs.pt", content))
    message = str(caught.value)
    assert says in message and str(file) in message and len(message) < 600


def test_experiments_are_counted_from_0_and_the_last_is_taken(tmp_path: Path, said: Said) -> None:
    file = write(tmp_path / "res.pt", CONTENTS["DC, DM, DataDAM"])
    read(file)
    assert "res.pt: holds 2 sets; experiment 1, the last, is taken; --experiment N" in said()
    must_be_the_set(read(file, experiment=0), OTHERS)
    with pytest.raises(UsageError, match=r"--experiment 2: .*res\.pt holds 2, counted from 0"):
        read(file, experiment=2)


def test_a_list_that_holds_itself_many_times_is_looked_at_once(tmp_path: Path) -> None:
    content: list[Any] = [IMAGES, LABELS]
    for _ in range(6):
        content = [content] * 1000
    with little_memory(), pytest.raises(UserError, match="holds a list"):
        read(write(tmp_path / "theirs.pt", content))


# --- Other kinds of files ---------------------------------------------------------------------------------------------

SOUND: dict[str, Callable[[Path], object]] = {
    "x.pth": lambda path: torch.save([IMAGES, LABELS], path),
    "x.pt.tar": lambda path: torch.save({"images": IMAGES, "labels": LABELS}, path),
    "X.PT": lambda path: torch.save([IMAGES, LABELS], path, pickle_protocol=5),
    "of before 1.6.pt": lambda path: torch.save(CONTENTS["other words"], path, _use_new_zipfile_serialization=False),
    "x.pkl": lambda path: path.write_bytes(pickle.dumps({"images": IMAGES.numpy(), "labels": LABELS.numpy()})),
    "old.pickle": lambda path: path.write_bytes(pickle.dumps([IMAGES.numpy(), LABELS.numpy()], 2)),
    "x.npz": lambda path: np.savez_compressed(path, x_train=IMAGES, y_train=LABELS, x_test=OTHERS, y_test=LABELS),
    "X.NPZ": lambda path: path.write_bytes(_named(path.with_name("y.npz"), images=IMAGES, labels=LABELS)),
    "x.safetensors": lambda path: save_file({"x": IMAGES, "y": LABELS}, path),
}  # fmt: skip


def _named(path: Path, **arrays: Tensor) -> bytes:
    content: dict[str, Any] = {name: x.numpy() for name, x in arrays.items()}
    np.savez(path, **content)
    return path.read_bytes()


@pytest.mark.parametrize("name", SOUND)
def test_files_of_other_kinds_are_read(name: str, tmp_path: Path) -> None:
    SOUND[name](tmp_path / name)
    must_be_the_set(read(tmp_path / name))


def test_grey_bytes_with_labels_in_a_column_are_read_as_medmnist_writes_them(tmp_path: Path, said: Said) -> None:
    pixels = noise(6, 8, 8)
    held_out: dict[str, Any] = {
        f"{split}_{what}": noise(2, 8, 8) for split in ("val", "test") for what in ("images", "labels")
    }
    np.savez(tmp_path / "m.npz", train_images=pixels, train_labels=LABELS[:, None].to(torch.uint8), **held_out)
    must_be_the_set(read(tmp_path / "m.npz"), torch.from_numpy(pixels)[:, None])
    assert "images of shape (6, 8, 8) are taken as grey" in said()


def test_an_old_file_that_is_cut_is_called_truncated(tmp_path: Path) -> None:
    file = tmp_path / "old.pt"
    torch.save([IMAGES, LABELS], file, _use_new_zipfile_serialization=False)
    whole = file.read_bytes()
    for keep in (len(whole) - 1, len(whole) // 2, 40):
        file.write_bytes(whole[:keep])
        with pytest.raises(UserError, match=r"old\.pt: is truncated or damaged"):
            read(file)


def test_a_pickle_of_objects_is_refused_with_how_to_convert_it(tmp_path: Path) -> None:
    (tmp_path / "x.pkl").write_bytes(pickle.dumps([IMAGES, LABELS]))  # whose tensors are files of torch.save inside
    with pytest.raises(UserError, match=r"x\.pkl: is a pickle.*run code: refused; if you trust its maker, python3 -c"):
        read(tmp_path / "x.pkl")


def test_plain_values_come_out_of_a_pickle_as_they_went_in(tmp_path: Path) -> None:
    values = {
        "a": (1, -2.5, None, True, "text", b"\xff"),
        "b": [{3: 2**70}],
        "empty": [np.zeros((0, 2)), torch.zeros(0)],
        "size": torch.Size([2, 3]),
        "device": torch.device("cuda:1"),
    }
    for protocol in range(2, 6):
        torch.save(values, tmp_path / "x.pt", pickle_protocol=protocol)
        found = read_tensors(tmp_path / "x.pt", "")
        assert {name: found[name] for name in "ab"} == {name: values[name] for name in "ab"}
        assert found["size"] == (2, 3) and found["device"] == "cuda:1" and found["empty"][0].shape == (0, 2)


def test_tensors_share_memory_as_they_did(tmp_path: Path) -> None:
    first, second = read_tensors(write(tmp_path / "x.pt", [IMAGES, IMAGES[1:, :, ::2].mT]), "")
    assert torch.equal(second, IMAGES[1:, :, ::2].mT)
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()


def test_a_pickle_of_too_many_instructions_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickles, "MOST", 100)
    with pytest.raises(UserError, match="more than 100 instructions"):
        read(write(tmp_path / "x.pt", [IMAGES, LABELS, [0.5] * 200]))


# --- In several files -------------------------------------------------------------------------------------------------

PAIRS = [
    ("images_best.pt", "labels_best.pt"), ("images_5000.pt", "labels_5000.pt"), ("images.pt", "labels.pt"),
    ("data.pt", "target.pt"), ("images_zca_best.pt", "labels_best.pt"), ("x_train.npy", "y_train.npy"),
]  # fmt: skip


def write_half(path: Path, x: Tensor) -> Path:
    if path.suffix == ".npy":
        np.save(path, x.numpy())
    else:
        torch.save(x, path)
    return path


@pytest.mark.parametrize("names", PAIRS, ids=lambda names: names[0])
def test_two_halves_are_one_set_in_a_folder_or_by_either_name_or_by_both(names: Sequence[str], tmp_path: Path) -> None:
    images, labels = (write_half(tmp_path / name, x) for name, x in zip(names, (IMAGES, LABELS), strict=True))
    rate = write(tmp_path / "lr.pt", torch.tensor(0.01))
    ways: list[Path | list[Path]] = [tmp_path, images, labels, [images, labels], [labels, images, rate]]
    for way in ways:
        found = read(way)
        must_be_the_set(found)
        assert found.file == images


def test_of_several_pairs_the_best_is_taken_and_a_learning_rate_is_not_used(tmp_path: Path, said: Said) -> None:
    for name, images in (("best", IMAGES), ("zca_best", OTHERS), ("5000", OTHERS)):
        write(tmp_path / f"images_{name}.pt", images)
    for name in ("best", "5000"):
        write(tmp_path / f"labels_{name}.pt", SOFT)
    write(tmp_path / "lr_best.pt", torch.tensor(0.0123))
    must_be_the_set(read(tmp_path), labels=SOFT.argmax(1))
    assert "images_best.pt is taken; name the file to take another: images_zca_best.pt, images_5000.pt" in said()
    assert "lr_best.pt: holds a learning rate of 0.0123, which is not used; --lr" in said()


def test_a_folder_of_one_file_is_that_file_and_of_several_they_are_listed(tmp_path: Path) -> None:
    write(tmp_path / "res_DM.pt", CONTENTS["DC, DM, DataDAM"])
    must_be_the_set(read(tmp_path))
    write(tmp_path / "part.pt", [IMAGES, LABELS])
    with pytest.raises(UserError, match=r"data\.pt: no such file; name one of part\.pt, res_DM\.pt"):
        read(tmp_path)


def test_parts_are_one_set_in_the_order_in_which_they_are_given(tmp_path: Path) -> None:
    parts = [write(tmp_path / f"{i}.pt", [IMAGES[2 * i : 2 * i + 2], LABELS[2 * i : 2 * i + 2]]) for i in range(3)]
    must_be_the_set(read(parts))
    order = [4, 5, 2, 3, 0, 1]
    must_be_the_set(read(parts[::-1]), IMAGES[order], LABELS[order])
    halves = [write(tmp_path / f"images{i}.pt", IMAGES[2 * i : 2 * i + 2]) for i in range(3)]
    halves += [write(tmp_path / f"labels{i}.pt", SOFT[2 * i : 2 * i + 2]) for i in range(3)]
    found = read(halves)
    assert found.soft is not None and torch.equal(found.soft, SOFT)
    must_be_the_set(found, labels=SOFT.argmax(1))


OTHER_PARTS: dict[str, tuple[Any, str]] = {
    "another size": ([IMAGES[..., :4, :4], LABELS], r"other\.pt: holds images of float32 \(1, 4, 4\) each"),
    "bytes": ([IMAGES.byte() + 9, LABELS], r"other\.pt: holds images of uint8"),
    "soft labels": ([IMAGES, SOFT], r"other\.pt: holds labels of float32 \(3,\) each"),
    "labels alone": (LABELS, "0 files hold images alone, 1 labels alone"),
    "images without labels": (IMAGES, r"other\.pt: holds images .* and no labels"),
}


@pytest.mark.parametrize("what", OTHER_PARTS)
def test_parts_that_are_not_alike_are_refused(what: str, tmp_path: Path) -> None:
    content, says = OTHER_PARTS[what]
    with pytest.raises(UserError, match=says):
        read([write(tmp_path / "one.pt", [IMAGES, LABELS]), write(tmp_path / "other.pt", content)])


def test_the_command_and_python_take_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files = [write(tmp_path / f"{i}.pt", [IMAGES[2 * i : 2 * i + 2], LABELS[2 * i : 2 * i + 2]]) for i in range(3)]
    flags: dict[str, Any] = dict(dataset="digits", factor=1, epochs=1, repeat=1, width=8, depth=1, baselines=["none"])
    (row,) = train.evaluate([*files], **flags, device="cpu", experiment=0)
    assert row["images_per_class"] == 2


def test_files_with_a_card_are_no_parts(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    card = {"dataset": "digits", "ipc": 2, "factor": 1, "decode_type": "single", "settings": {},
            "normalization": {"mean": [0.5], "std": [0.2]}}  # fmt: skip
    (tmp_path / "run" / "data.json").write_text(str(card).replace("'", '"'))
    run, other = (write(tmp_path / name, [IMAGES, LABELS]) for name in ("run/data.pt", "other.pt"))
    with pytest.raises(UserError, match=r"data\.pt: is a set of its own"):
        read([run, other])
    with pytest.raises(UserError, match=r"run: is a folder; only files are parts"):
        read([run.parent, other])


# --- Types and shapes -------------------------------------------------------------------------------------------------

ONE_HOT = torch.nn.functional.one_hot(LABELS, 3)
LAYOUTS: dict[str, Tensor] = {
    "a column": LABELS[:, None], "(N, 1, 1)": LABELS[:, None, None], "floats": LABELS.float(), "one-hot": ONE_HOT,
    "one-hot bytes": ONE_HOT.byte(), "one-hot truth": ONE_HOT.bool(), "a column of floats": LABELS[:, None].double(),
}  # fmt: skip


@pytest.mark.parametrize("what", LAYOUTS)
def test_class_numbers_in_other_layouts_are_read(what: str, tmp_path: Path) -> None:
    found = read(write(tmp_path / "x.pt", [IMAGES, LAYOUTS[what]]))
    must_be_the_set(found)
    assert found.soft is None


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_whole_numbers_up_to_255_are_bytes(dtype: torch.dtype, tmp_path: Path) -> None:
    pixels = torch.from_numpy(noise(6, 1, 8, 8))
    must_be_the_set(read(write(tmp_path / "x.pt", [pixels.to(dtype), LABELS])), pixels)
