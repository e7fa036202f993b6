"""Pictures as people have them: broken ones, those of 12 bits, too few of a class, and names that are no UTF-8."""

from __future__ import annotations

import csv
import errno
import io
import json
import logging
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import condense
import train
from data import Dataset
from figs import distilled
from tests.files import image_folder, last_json, noise, quick, refused, save
from utils.config import resolve
from utils.files import imagefiles
from utils.files.imagefiles import FULL, NAMED, BrokenImages, eight_bits
from utils.runs import confusion, formats
from utils.runs.card import check_card, how_to_use
from utils.system.errors import UserError, short
from utils.system.report import drawing

CPU = torch.device("cpu")
NONE = ["--baselines", "none", "--epochs", "1", "--repeat", "1", "--device", "cpu", "--compile", "off"]


def messages_of(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records)


# --- Broken files -----------------------------------------------------------------------------------------------------


def broken_folder(root: Path) -> list[str]:
    """Two classes with four broken files, of which the header of one is sound; returns their paths below root."""
    image_folder(root, {"cat": 4, "dog": 3}, {"cat": 2, "dog": 2}, (32, 32, 3))
    cut = root / "train" / "cat" / "9.jpg"
    Image.fromarray(noise(32, 32, 3)).save(cut)
    cut.write_bytes(cut.read_bytes()[:-200])
    for name, content in (("train/cat/1.png", b""), ("train/dog/x.jpg", b"<html>404</html>"), ("test/dog/1.png", b"x")):
        (root / name).write_bytes(content)
    for name in ("._0.png", "Thumbs.db"):  # of other systems
        (root / "train" / "cat" / name).write_bytes(b"no image")
    return ["test/dog/1.png", "train/cat/1.png", "train/cat/9.jpg", "train/dog/x.jpg"]


def test_all_broken_files_are_named_at_once(tmp_path: Path) -> None:
    names = broken_folder(tmp_path / "photos")
    argv = quick(tmp_path / "results", "--image_folder", str(tmp_path / "photos"))
    refused(condense.main, argv, "4 files", *names, "truncated", "--skip_broken", status=1, unchanged=tmp_path)


def test_of_many_broken_files_some_are_named_and_the_others_counted(tmp_path: Path) -> None:
    root = image_folder(tmp_path, {"a": 1, "b": 1})
    for i in range(NAMED + 3):
        (root / "train" / "a" / f"broken{i}.png").touch()
    with pytest.raises(BrokenImages, match=f"^{NAMED + 3} files .* and 3 more; repair") as caught:
        Dataset("folder", device=CPU, image_folder=root)
    assert str(caught.value).count("/broken") == NAMED


def test_broken_files_of_a_set_are_all_named(tmp_path: Path) -> None:
    root = image_folder(tmp_path, {"a": 2, "b": 1})
    png = (root / "train" / "a" / "1.png").read_bytes()
    (root / "train" / "a" / "1.png").write_bytes(png[:-30])
    (root / "train" / "b" / "0.png").write_bytes(b"")
    with pytest.raises(BrokenImages, match=r"^2 files .*a/1\.png.*b/0\.png.*; repair or remove them$"):
        formats.read(root / "train")


def test_a_run_without_broken_files_counts_them_and_its_set_is_evaluated_without_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, results = tmp_path / "photos", tmp_path / "results"
    names = broken_folder(root)
    argv = quick(results, "--image_folder", str(root), "--batch_real", "2", "--skip_broken")
    assert condense.main(argv) == 0
    assert "left out 4 files that cannot be read as images" in capsys.readouterr().out
    run = resolve.run_folder(resolve.condense(argv, "").options)
    (session,) = json.loads((run / "options.json").read_text())["sessions"]
    assert session["skipped_files"]["count"] == 4 and session["skipped_files"]["first"] == names
    assert json.loads((run / "data.json").read_text())["skipped_files"] == session["skipped_files"]

    assert train.main([str(run), *NONE]) == 0
    assert "other files" not in capsys.readouterr().out
    save(root / names[0], noise(32, 32, 3))  # repaired
    assert train.main([str(run), *NONE]) == 0
    assert "left out 3 files" in (out := capsys.readouterr().out) and "other files" in out


def test_counts_are_right_before_images_are_read_and_the_same_as_without_the_broken_files(tmp_path: Path) -> None:
    names = broken_folder(tmp_path)
    kept = Dataset("folder", device=CPU, image_folder=tmp_path, skip_broken=True)
    assert kept.counts == [3, 3] and "train" not in vars(kept)
    for name in names:
        (tmp_path / name).unlink()
    removed = Dataset("folder", device=CPU, image_folder=tmp_path, skip_broken=True)
    assert removed.skipped is None and kept.skipped is not None
    for ours, theirs in ((kept.train, removed.train), (kept.test, removed.test)):
        assert torch.equal(ours.images, theirs.images) and torch.equal(ours.labels, theirs.labels)


def test_a_class_without_sound_files_is_an_error(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "photos", {"a": 1, "b": 1})
    (root / "test" / "b" / "0.png").write_bytes(b"")
    argv = quick(tmp_path / "results", "--image_folder", str(root), "--skip_broken")
    refused(condense.main, argv, "--skip_broken", "test image of class b", status=1, unchanged=tmp_path)


def test_what_the_system_cannot_read_now_is_not_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = image_folder(tmp_path, {"a": 2, "b": 1})

    def tired(*words: object, **settings: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(imagefiles.Image, "open", tired)
    with pytest.raises(BrokenImages, match="Too many open files"):
        Dataset("folder", device=CPU, image_folder=root, skip_broken=True)


@pytest.mark.parametrize("value", [1, "yes", []])
def test_a_card_with_a_switch_that_is_none_is_damaged(value: object) -> None:
    card = {"dataset": "digits", "image_folder": None, "ipc": 1, "factor": 1, "decode_type": "single"}
    with pytest.raises(UserError, match=r"x\.json: is damaged .*skip_broken"):
        resolve.train_options({}, {**card, "settings": {"skip_broken": value}}, Path("x.json"))


# --- 12 bits in 16 ----------------------------------------------------------------------------------------------------


def deep_folder(root: Path, high: int = 4095, ending: str = "png") -> Path:
    """Random pictures of values up to `high`, in 16 bits; the test images reach beyond them."""
    for split, most in (("train", high), ("test", min(2 * high, 65535))):
        for c, name in enumerate("ab"):
            for i in range(3):
                pixels = np.random.default_rng([c, i]).integers(0, most + 1, (32, 32), dtype=np.uint16)
                (root / split / name).mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(root / split / name / f"{i}.{ending}")
    return root


@pytest.mark.parametrize("ending", ["png", "tif", "pgm"])
def test_12_bits_use_all_grey_values_by_the_range_of_the_training_images(
    ending: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = deep_folder(tmp_path, ending=ending)
    hot = np.array(Image.open(root / "train" / "a" / f"0.{ending}"), dtype=np.uint16)
    hot[5, 5] = 65535  # one pixel of a detector must not decide
    Image.fromarray(hot).save(root / "train" / "a" / f"0.{ending}")
    with caplog.at_level(logging.INFO, "dream"):
        dataset = Dataset("folder", device=CPU, image_folder=root)
        pixels = dataset.train.images
    low, high = dataset.grey_range
    assert low < 40 and 4050 < high <= 4095 and pixels.shape[1:] == (1, 32, 32)
    assert len(pixels.unique()) == 256
    assert f"from {low} to {high}" in messages_of(caplog)
    stored = np.array(Image.open(root / "test" / "b" / f"1.{ending}")).clip(low, high)
    expected = torch.from_numpy(np.rint((stored - low) * (255 / (high - low))).astype(np.uint8))
    assert torch.equal(dataset.test.of_class(1)[1, 0], expected)
    assert torch.equal(formats.read(root / "train").images, pixels)  # a set in such files likewise


def test_16_bits_that_are_used_stay_as_they_were(tmp_path: Path) -> None:
    root = deep_folder(tmp_path, high=65535)
    dataset = Dataset("folder", device=CPU, image_folder=root)
    assert dataset.grey_range == FULL
    stored = torch.from_numpy(np.array(Image.open(root / "train" / "a" / "2.png")) >> 8)
    assert torch.equal(dataset.train.images[2, 0].int(), stored.int())


def test_pictures_of_one_value_are_read_as_before(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for name in "ab":
            (tmp_path / split / name).mkdir(parents=True)
            Image.fromarray(np.full((8, 8), 700, np.uint16)).save(tmp_path / split / name / "0.png")
    assert (Dataset("folder", device=CPU, image_folder=tmp_path).train.images == 700 >> 8).all()


def test_the_range_is_in_the_card_and_evaluation_reads_by_it(tmp_path: Path) -> None:
    root = deep_folder(tmp_path / "scans")
    argv = quick(tmp_path / "results", "--image_folder", str(root), "--batch_real", "2")
    assert condense.main(argv) == 0
    run = resolve.run_folder(resolve.condense(argv, "").options)
    card = json.loads((run / "data.json").read_text())
    dataset = Dataset("folder", device=CPU, image_folder=root)
    assert card["grey_range"] == list(dataset.grey_range) and str(card["grey_range"][1]) in how_to_use(card, 32)
    narrow = Dataset("folder", device=CPU, image_folder=root, grey_range=(0, 255))
    assert narrow.train.images.float().mean() > 200  # nearly all of them lie above
    for wrong in ([5, 5], [-1, 9], [0, 70000], [0.0, 9.0], 7, None):
        with pytest.raises(UserError, match="grey_range"):
            check_card({**card, "grey_range": wrong}, run / "data.json")


def test_a_table_of_16_bits_rises_from_0_to_255() -> None:
    table = eight_bits((1000, 1255)).astype(int)
    assert table[1000] == 0 and table[1255] == 255 and (np.diff(table) >= 0).all()
    assert (table[1000:1256] == np.arange(256)).all() and table[0] == 0 and table[65535] == 255


# --- Few images -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["noise", "kmeans", "herding"])
def test_a_class_smaller_than_ipc_is_warned_of_and_distilled(
    init: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = image_folder(tmp_path / "photos", {"a": 9, "b": 2, "c": 1}, {"a": 1, "b": 1, "c": 1})
    argv = quick(tmp_path / "results", "--image_folder", str(root), "--ipc", "4", "--init", init, "--batch_real", "2")
    assert condense.main(argv) == 0
    assert "is 4, class c has 1 images" in capsys.readouterr().out
    run = resolve.run_folder(resolve.condense(argv, "").options)
    card = json.loads((run / "data.json").read_text())
    assert card["finished"] and card["random_real"]["n"] == 1
    if init != "kmeans":
        return
    arguments = ["--baselines", "random", "kmeans", "--json", *NONE[2:]]
    assert train.main([str(run), *arguments]) == 0
    rows = last_json(capsys)["results"]
    assert [row["decoded_per_class"] for row in rows] == [4, 4, 4]
    assert [row["images_per_class"] for row in rows] == [4, 7 / 3, 7 / 3]  # each real image counts once
    assert rows[1]["stored_bytes"] == 7 * 3 * 8 * 8


def test_a_coreset_larger_than_a_class_repeats_its_images_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = image_folder(tmp_path / "photos", {"a": 3, "b": 1})
    flags = ["--image_folder", str(root), "--coreset", "herding", "--ipc", "3", "--width", "8", *NONE[2:]]
    assert train.main([*flags, "--results_dir", str(tmp_path / "results"), "--json"]) == 0
    out = capsys.readouterr().out
    assert "is 3, class b has 1 images" in out and "herded real images, 2 per class" in out
    assert json.loads(out.splitlines()[-1])["decoded_per_class"] == 3


# --- Names ------------------------------------------------------------------------------------------------------------

# Bytes of another encoding, a formula to matplotlib, characters that its font lacks, two lines, and a cell's end.
NAMES = [os.fsdecode(b"\xb9\xb7"), r"$\frac$", "猫", "a\nb", "n" * 200, "x|y"]


def test_names_of_any_kind_end_in_no_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("dream"), "propagate", False)  # pytest-xdist cannot report such names
    odd = tmp_path / os.fsdecode(b"\xff$x$")
    root = image_folder(odd / "photos", dict.fromkeys(NAMES, 2), dict.fromkeys(NAMES, 1))
    argv = quick(odd / "results", "--image_folder", str(root), "--batch_real", "2", "--tensorboard")
    assert condense.main(argv) == 0
    run = resolve.run_folder(resolve.condense(argv, "").options)
    assert json.loads((run / "data.json").read_text())["class_names"] == sorted(NAMES)
    tables = [str(odd / f"table.{kind}") for kind in ("md", "csv", "json")]
    assert train.main([str(run), *NONE, "--confusion", "--json", "--table", *tables]) == 0
    (matrix,) = (run / "confusion").glob("*.csv")
    rows = list(csv.reader(io.StringIO(matrix.read_text(encoding="utf-8"))))
    assert [row[0] for row in rows[1:]] == [r"$\frac$", r"a\nb", "n" * 200, "x|y", "猫", r"\udcb9\udcb7"]
    assert train.main([str(run), "--export", str(odd / "out"), "--device", "cpu"]) == 0
    assert train.main([str(odd / "out"), "--image_folder", str(root), "-f", "1", "--width", "8", *NONE]) == 0
    capsys.readouterr()
    assert distilled.main([str(run), "--out", str(odd / "x.png")]) == 0
    said = capsys.readouterr().out
    assert said.count("the font lacks characters") == 1 and len(said.splitlines()) == 2
    for file in odd.rglob("*"):
        if file.suffix in (".md", ".csv", ".json", ".jsonl", ".txt"):
            file.read_bytes().decode("utf-8")


def test_a_figure_of_any_names_is_drawn_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    matrix = torch.ones(len(NAMES), len(NAMES), dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert confusion.as_png(matrix, NAMES, "title").startswith(b"\x89PNG")
    assert messages_of(caplog).count("the font lacks characters") == 1
    text = confusion.as_text(matrix, NAMES)
    assert all(line.isprintable() and len(line) < 120 for line in text.split("\n"))


def test_other_warnings_of_a_figure_are_not_swallowed() -> None:
    with pytest.warns(UserWarning, match="something else"), drawing():
        warnings.warn("something else", stacklevel=1)


def test_a_long_name_keeps_its_ends() -> None:
    assert short("a" * 40) == "a" * 40
    long = short("begin" + "x" * 100 + "end")
    assert len(long) == 40 and long.startswith("begin") and long.endswith("end")
