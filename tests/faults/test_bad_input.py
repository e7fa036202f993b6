"""Mistakes of the user and the surroundings: one line with the culprit and the remedy, and nothing half-written."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
from PIL import Image
from torch import Tensor

import condense
import train
from models import FAMILIES
from tests.files import Payload, image_folder, noise, quick, refused, tree
from tests.tally import injected
from utils.config.options import DATASET_SETTINGS
from utils.files.tensors import read_tensors
from utils.method.objectives import METRICS
from utils.method.state import State
from utils.runs import folder as run_module
from utils.system.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ["--epochs", "1", "--repeat", "1", "--device", "cpu"]
SMALLEST = {"cat": 3, "dog": 5}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes to the default --results_dir must not lie in the repository."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on digits."""
    results = tmp_path_factory.mktemp("finished")
    assert condense.main(quick(results)) == 0
    return results / "digits" / "convnet2_f1_ipc1"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it to spoil, in tmp_path/results/digits."""
    return Path(shutil.copytree(finished, tmp_path / "results" / "digits" / finished.name))


def refused_condense(tmp_path: Path, flags: list[str], *says: str, status: int) -> str:
    """The message of a condense.py that must not even make its results folder."""
    message = refused(condense.main, quick(tmp_path / "results", *flags), *says, status=status, unchanged=tmp_path)
    assert not (tmp_path / "results").exists()
    return message


def refused_train(tmp_path: Path, argv: list[str], *says: str, status: int) -> str:
    return refused(train.main, [*TRAIN, *argv], *says, status=status, unchanged=tmp_path)


# --- As a program -----------------------------------------------------------------------------------------------------


def one_error_line(script: str, *argv: str, status: int, **environment: str) -> str:
    """What a script that must fail says on standard error."""
    done = subprocess.run(
        [sys.executable, script, *argv],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith(f"{script}: error: ")
    return lines[0]


def test_a_misspelt_flag_ends_the_program_with_one_line_and_status_2(tmp_path: Path) -> None:
    line = one_error_line("condense.py", *quick(tmp_path), "--facter", "2", status=2)
    assert "--facter" in line and "--factor" in line
    assert tree(tmp_path) == {}


def test_a_download_without_network_ends_the_program_with_one_line_and_status_1(tmp_path: Path) -> None:
    dead = "http://127.0.0.1:9"
    flags = quick(tmp_path / "results", "-d", "cifar10", "--data_dir", str(tmp_path / "data"))
    line = one_error_line("condense.py", *flags, status=1, http_proxy=dead, https_proxy=dead, no_proxy="")
    assert "cifar-10-python.tar.gz" in line and str(tmp_path / "data") in line
    assert not (tmp_path / "results").exists()


def test_a_spoilt_data_file_ends_the_program_with_one_line_and_status_1(run: Path) -> None:
    marker = run / "ran"
    torch.save([Payload(marker)], run / "data.pt")
    line = one_error_line("train.py", str(run), *TRAIN, status=1)
    assert str(run / "data.pt") in line
    assert not marker.exists()


# --- Names and numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "choices"),
    [
        (["-d", "cifar11"], DATASET_SETTINGS),
        (["--metric", "l3"], METRICS),
        (["-n", "lenet"], FAMILIES),
        (["-n", "resnet_xy"], FAMILIES),
    ],
)
def test_an_unknown_name_is_answered_with_the_choices(
    flags: list[str], choices: Mapping[str, object], tmp_path: Path
) -> None:
    refused_condense(tmp_path, flags, flags[0], flags[1], *choices, status=2)


def test_an_unknown_network_for_evaluation_is_answered_with_the_choices(run: Path, tmp_path: Path) -> None:
    refused_train(tmp_path, [str(run), "-n", "convnet", "lenet"], "--net_type", "lenet", *FAMILIES, status=2)


@pytest.mark.parametrize(
    ("wrong", "right"), [("--facter", "--factor"), ("--batch-reel", "--batch_real"), ("--nitter", "--niter")]
)
def test_a_misspelt_flag_is_answered_with_the_right_one(wrong: str, right: str, tmp_path: Path) -> None:
    refused_condense(tmp_path, [wrong, "2"], right, status=2)
    refused_condense(tmp_path, [f"{wrong}=2"], right, status=2)


def test_a_misspelt_flag_of_train_is_answered_with_the_right_one(tmp_path: Path) -> None:
    refused_train(tmp_path, ["--core-set", "random", "--ipc", "1"], "--coreset", status=2)


@pytest.mark.parametrize("flag", ["--ipc", "--factor"])
@pytest.mark.parametrize("value", ["0", "-1", "1.5", "ten", ""])
def test_ipc_and_factor_are_whole_numbers_of_1_or_more(flag: str, value: str, tmp_path: Path) -> None:
    refused_condense(tmp_path, [flag, value], flag, "whole number of 1 or more", status=2)
    refused_train(tmp_path, [flag, value], flag, "whole number of 1 or more", status=2)


def test_a_factor_larger_than_the_image_is_refused(tmp_path: Path) -> None:
    refused_condense(tmp_path, ["-f", "9"], "-f 9", "8 pixels", status=2)


def test_a_depth_that_does_not_fit_the_image_is_refused(tmp_path: Path) -> None:
    refused_condense(tmp_path, ["--depth", "4"], "--depth", "8 x 8", "1 to 3", status=2)


@pytest.mark.parametrize("name", ["a/b", "../up", "..", "", "a b"])
def test_a_tag_that_is_no_part_of_a_folder_name_is_refused(name: str, tmp_path: Path) -> None:
    refused_condense(tmp_path, ["--tag", name], "--tag", "folder name", status=2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none_is_refused(tmp_path: Path) -> None:
    refused_condense(tmp_path, ["--device", "cuda"], "--device cuda", "--device cpu", status=2)
    refused_train(tmp_path, ["--real", "--device", "cuda"], "--device cuda", "--device cpu", status=2)


# --- Flags that do not go together ------------------------------------------------------------------------------------


def test_reproduce_needs_a_published_data_set(tmp_path: Path) -> None:
    refused_condense(tmp_path, ["--reproduce", "-d", "digits"], "--reproduce", "digits", "cifar10", status=2)


def test_size_is_refused_for_a_data_set_of_fixed_size(tmp_path: Path) -> None:
    refused_condense(tmp_path, ["-d", "cifar10", "--size", "16"], "--size", "cifar10", status=2)


def test_folder_needs_an_image_folder_and_digits_takes_none(tmp_path: Path) -> None:
    refused_condense(tmp_path, ["-d", "folder"], "-d folder", "--image_folder", status=2)
    refused_condense(tmp_path, ["-d", "digits", "--image_folder", str(tmp_path)], "--image_folder", "-d", status=2)


def test_an_image_folder_needs_the_classes_of_the_data_set_it_stands_for(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "photos", SMALLEST)
    flags = ["-d", "cifar10", "--image_folder", str(root)]
    refused_condense(tmp_path, flags, f"--image_folder {root}", "2 classes", "10", "-d folder", status=2)


def test_a_coreset_needs_ipc(tmp_path: Path) -> None:
    refused_train(tmp_path, ["--coreset", "random"], "--coreset", "--ipc", status=2)


def test_real_and_coreset_exclude_each_other(tmp_path: Path) -> None:
    refused_train(tmp_path, ["--real", "--coreset", "random", "--ipc", "1"], "--real", "--coreset", status=2)


def test_a_coreset_and_a_distilled_set_exclude_each_other(run: Path, tmp_path: Path) -> None:
    argv = [str(run), "--coreset", "random", "--ipc", "1"]
    refused_train(tmp_path, argv, "--coreset", str(run), "--baselines", status=2)


@pytest.mark.parametrize(
    ("flag", "value", "stored"),
    [
        ("--factor", "2", "1"),
        ("--dataset", "mnist", "digits"),
        ("--ipc", "3", "1"),
        ("--decode_type", "multi", "single"),
    ],
)
def test_a_flag_that_contradicts_data_json_is_refused(
    flag: str, value: str, stored: str, run: Path, tmp_path: Path
) -> None:
    refused_train(tmp_path, [str(run), flag, value], f"{flag} {value}", "data.json", stored, status=2)


# --- Small classes ----------------------------------------------------------------------------------------------------


def test_ipc_above_the_smallest_class_is_refused(tmp_path: Path) -> None:
    root = str(image_folder(tmp_path / "photos", SMALLEST))
    refused_condense(tmp_path, ["--image_folder", root, "--ipc", "4"], "--ipc 4", "cat", "3", status=2)
    argv = ["--image_folder", root, "--coreset", "random", "--ipc", "4", "--results_dir", str(tmp_path / "results")]
    refused_train(tmp_path, argv, "--ipc 4", "cat", "3", status=2)


@pytest.mark.parametrize(
    ("flags", "word"), [(["--batch_real", "4"], "--batch_real"), (["--batch_real", "3", "-f", "2"], "--ipc")]
)
def test_a_class_that_is_too_small_is_named_in_a_warning_and_the_run_goes_on(
    flags: list[str], word: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = image_folder(tmp_path / "photos", SMALLEST)
    with caplog.at_level(logging.WARNING, "dream"):
        assert condense.main(quick(tmp_path / "results", "--image_folder", str(root), *flags)) == 0
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and "n_data" not in r.msg]
    assert word in warning and "cat" in warning and "3" in warning
    (card,) = (tmp_path / "results").rglob("data.json")
    assert json.loads(card.read_text())["finished"] is True
    assert train.main([*TRAIN, str(card.parent)]) == 0


def test_one_image_per_class_under_batch_norm_is_no_crash(tmp_path: Path) -> None:
    before = tree(tmp_path)
    flags = ["-n", "resnet10", "--depth", "10", "--width", "4"]
    try:
        assert condense.main(quick(tmp_path / "results", *flags)) == 0
    except UserError as error:
        assert "norm" in str(error)
        assert tree(tmp_path) == before


# --- Image folders ----------------------------------------------------------------------------------------------------


def test_a_missing_image_folder_is_named(tmp_path: Path) -> None:
    flags = ["--image_folder", str(tmp_path / "photos")]
    refused_condense(tmp_path, flags, f"--image_folder {tmp_path / 'photos'}", "DIR/train/CLASS", status=1)


@pytest.mark.parametrize("kind", ["nothing", "no classes", "no images", "no test", "files instead of folders"])
def test_an_empty_image_folder_is_named(kind: str, tmp_path: Path) -> None:
    root = tmp_path / "photos"
    root.mkdir()
    if kind == "no classes":
        (root / "train").mkdir()
        (root / "test").mkdir()
    elif kind == "no images":
        (root / "train" / "cat").mkdir(parents=True)
        (root / "test" / "cat").mkdir(parents=True)
    elif kind == "no test":
        image_folder(root, SMALLEST, {})
    elif kind == "files instead of folders":
        (root / "train").write_text("a file")
    refused_condense(tmp_path, ["--image_folder", str(root)], f"--image_folder {root}", "DIR/train/CLASS", status=1)


def test_an_image_folder_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = image_folder(tmp_path / "photos", SMALLEST)
    scandir = os.scandir

    def forbidden(path: Any = ".") -> Any:
        if Path(path) == root / "train":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    before = tree(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", forbidden)
        with pytest.raises(UserError, match=f"--image_folder {root}.*Permission denied") as caught:
            condense.main(quick(tmp_path / "results", "--image_folder", str(root)))
    assert caught.value.status == 1
    assert tree(tmp_path) == before


def test_a_single_class_is_refused(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "photos", {"cat": 3})
    refused_condense(tmp_path, ["--image_folder", str(root)], f"--image_folder {root}", "two classes", status=1)


def test_different_train_and_test_classes_are_named(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "photos", SMALLEST, {"cat": 1, "cow": 1})
    refused_condense(tmp_path, ["--image_folder", str(root)], str(root), "cow", "dog", status=1)


def truncated_jpeg(path: Path) -> None:
    Image.fromarray(noise(64, 64, 3)).save(path, quality=95)
    path.write_bytes(path.read_bytes()[:3000])


SPOILT: dict[str, tuple[str, Callable[[Path], object]]] = {
    "text": ("x.png", lambda path: path.write_text("no image")),
    "empty": ("x.png", lambda path: path.touch()),
    "truncated": ("x.jpg", truncated_jpeg),
    "dangling link": ("x.png", lambda path: path.symlink_to("nowhere")),
}


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("kind", SPOILT)
def test_a_file_that_is_no_image_is_named(kind: str, split: str, tmp_path: Path) -> None:
    root = image_folder(tmp_path / "photos", SMALLEST)
    name, spoil = SPOILT[kind]
    file = root / split / "dog" / name
    spoil(file)
    flags = ["--image_folder", str(root), "--size", "8"]
    refused_condense(tmp_path, flags, str(file), "image", "remove it", status=1)


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_file_that_is_no_image_is_named_under_the_name_of_a_data_set(split: str, tmp_path: Path) -> None:
    root = image_folder(tmp_path / "photos", {str(c): 1 for c in range(10)}, shape=(28, 28))
    file = root / split / "3" / "0.png"
    file.write_text("no image")
    flags = ["-d", "mnist", "--image_folder", str(root)]
    refused_condense(tmp_path, flags, str(file), "image", "remove it", status=1)


# --- Downloads --------------------------------------------------------------------------------------------------------


def test_without_network_nothing_is_left_but_a_hint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def urlopen(*args: object, **kwargs: object) -> None:
        raise URLError("no network here")

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    place = tmp_path / "data"
    for main, flags in (
        (condense.main, quick(tmp_path / "results", "-d", "svhn")),
        (train.main, ["-d", "svhn", "--real"]),
    ):
        with pytest.raises(UserError) as caught:
            main([*flags, "--data_dir", str(place), "--results_dir", str(tmp_path / "results")])
        message = str(caught.value)
        assert caught.value.status == 1 and "\n" not in message
        for word in ("train_32x32.mat", "test_32x32.mat", str(place), "--data_dir"):
            assert word in message
        assert not (tmp_path / "results").exists()
        assert not [path for path in place.rglob("*") if path.is_file()]


# --- Distilled sets ---------------------------------------------------------------------------------------------------


IMAGES, LABELS = torch.full((10, 1, 8, 8), 0.5), torch.arange(10)


def with_pixel(value: float) -> Tensor:
    images = IMAGES.clone()
    images[3, 0, 4, 4] = value
    return images


WRONG_SETS: dict[str, Any] = {
    "a dictionary": {"images": IMAGES, "labels": LABELS},
    "a tensor": IMAGES,
    "one item": [IMAGES],
    "three items": [IMAGES, LABELS, LABELS],
    "items that are no tensors": [IMAGES, LABELS.tolist()],
    "images of three dimensions": [IMAGES[:, 0], LABELS],
    "labels of two dimensions": [IMAGES, LABELS[:, None]],
    "fewer labels than images": [IMAGES, LABELS[:9]],
    "no images": [IMAGES[:0], LABELS[:0]],
    "whole numbers as images": [IMAGES.long(), LABELS],
    "fractions as labels": [IMAGES, LABELS.float()],
    "a pixel that is no number": [with_pixel(float("nan")), LABELS],
    "a pixel of infinity": [with_pixel(float("inf")), LABELS],
    "a pixel above 1": [with_pixel(1.5), LABELS],
    "a pixel below 0": [with_pixel(-0.5), LABELS],
    "a negative label": [IMAGES, LABELS - 1],
    "a label outside the classes": [IMAGES, LABELS + 1],
    "images of another size": [torch.zeros(10, 1, 28, 28), LABELS],
    "images of other channels": [torch.zeros(10, 3, 8, 8), LABELS],
    "images that are no squares": [torch.zeros(10, 1, 8, 4), LABELS],
}


@pytest.mark.parametrize("what", WRONG_SETS)
def test_a_data_file_with_wrong_content_is_refused(what: str, run: Path, tmp_path: Path) -> None:
    torch.save(WRONG_SETS[what], run / "data.pt")
    refused_train(tmp_path, [str(run)], str(run), status=1)
    (run / "data.json").unlink()
    refused_train(tmp_path, [str(run / "data.pt"), "-d", "digits", "-f", "1"], str(run / "data.pt"), status=1)


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.99])
def test_a_truncated_data_file_is_refused(keep: float, run: Path, tmp_path: Path) -> None:
    content = (run / "data.pt").read_bytes()
    (run / "data.pt").write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    refused_train(tmp_path, [str(run)], str(run / "data.pt"), status=1)


def test_a_missing_data_file_is_named(run: Path, tmp_path: Path) -> None:
    (run / "data.pt").unlink()
    refused_train(tmp_path, [str(run)], str(run / "data.pt"), "no such file", status=1)


def test_a_run_that_does_not_exist_is_called_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"{tmp_path / 'typo'}.*(no such|not exist|missing|not found)"):
        train.main([*TRAIN, str(tmp_path / "typo")])


def test_no_distilled_set_at_all_is_answered_with_how_to_make_one(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "nowhere"):
        refused_train(tmp_path, ["--results_dir", str(place)], str(place), "condense.py", status=1)


@pytest.mark.parametrize("protocol", [None, 2, 5])
def test_code_in_a_data_file_never_runs(protocol: int | None, run: Path, tmp_path: Path) -> None:
    file, marker = run / "data.pt", tmp_path / "ran"
    content = [IMAGES, LABELS, Payload(marker)]
    if protocol is None:
        torch.save(content, file)
    else:
        file.write_bytes(pickle.dumps(content, protocol))
    refused_train(tmp_path, [str(run)], str(file), "refused", status=1)
    (run / "data.json").unlink()
    refused_train(tmp_path, [str(file), "-d", "digits", "-f", "1"], str(file), "refused", status=1)
    assert not marker.exists()
    if protocol is None:
        torch.load(file, weights_only=False)
    else:
        pickle.loads(file.read_bytes())
    assert marker.exists()


def test_a_data_file_without_data_json_needs_data_set_and_factor(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "data.json").unlink()
    file = str(run / "data.pt")
    for flags in ([], ["-d", "digits"], ["-f", "1"]):
        refused_train(tmp_path, [file, *flags], file, "data.json", "-d", "-f", status=2)
    network = ["--depth", "2", "--width", "8"]
    assert train.main([*TRAIN, file, "-d", "digits", "-f", "2", *network, "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["decoded_per_class"] == 4
    assert (tmp_path / "results" / "digits" / "evaluated_data" / "eval.json").exists()


def edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the content of a JSON file as a person would who knows of its checksum."""
    card = json.loads(file.read_text())
    del card["sha256"]
    change(card)
    file.write_text(json.dumps(card))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00", '{"dataset": "digits"}'])
def test_a_damaged_data_json_is_named(text: str, run: Path, tmp_path: Path) -> None:
    (run / "data.json").write_text(text)
    refused_train(tmp_path, [str(run)], str(run / "data.json"), status=1)


def test_a_data_json_that_is_no_text_is_named(run: Path, tmp_path: Path) -> None:
    (run / "data.json").write_bytes(b"\xff\xfe\x00\x80")
    refused_train(tmp_path, [str(run)], str(run / "data.json"), status=1)


@pytest.mark.parametrize("name", ["dataset", "ipc", "factor", "decode_type", "normalization", "settings"])
def test_a_data_json_that_lacks_an_entry_is_named(name: str, run: Path, tmp_path: Path) -> None:
    edit(run / "data.json", lambda card: card.pop(name))
    refused_train(tmp_path, [str(run)], str(run / "data.json"), name, status=1)


@pytest.mark.parametrize(
    ("name", "value"), [("dataset", "imagenet"), ("dataset", 5), ("factor", 0), ("ipc", "1"), ("decode_type", "double")]
)
def test_a_data_json_with_an_impossible_entry_is_named(name: str, value: object, run: Path, tmp_path: Path) -> None:
    edit(run / "data.json", lambda card: (card.update({name: value}), card["settings"].update({name: value})))
    refused_train(tmp_path, [str(run)], str(run / "data.json"), status=1)


@pytest.mark.parametrize(("name", "value"), [("epochs", "many"), ("epochs", 0), ("lr", "high"), ("mixup", "maybe")])
def test_a_data_json_with_impossible_settings_is_named(name: str, value: object, run: Path, tmp_path: Path) -> None:
    edit(run / "data.json", lambda card: card["settings"].update({name: value}))
    argv = ["--repeat", "1", "--device", "cpu", str(run)]
    refused(train.main, argv, str(run / "data.json"), status=1, unchanged=tmp_path)


@pytest.mark.parametrize("value", [{"mean": [0.5] * 3}, {"mean": ["a"] * 3, "std": [1] * 3}, {"mean": [0], "std": [0]}])
def test_a_data_json_with_impossible_normalization_is_named(value: dict[str, Any], tmp_path: Path) -> None:
    root = image_folder(tmp_path / "photos", SMALLEST)
    assert condense.main(quick(tmp_path / "results", "--image_folder", str(root), "--batch_real", "3")) == 0
    (file,) = (tmp_path / "results").rglob("data.json")
    edit(file, lambda card: card.update(normalization=value))
    refused_train(tmp_path, [str(file.parent)], str(file), status=1)


# --- Run folders ------------------------------------------------------------------------------------------------------


def test_a_results_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    argv = quick(tmp_path / "file" / "x")
    refused(condense.main, argv, str(tmp_path / "file" / "x"), "--results_dir", status=1, unchanged=tmp_path)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--lr_img", "0.1"], ["--lr_img", "0.1"]),
        (["--seed", "1", "--metric", "cos"], ["--seed", "--metric", "cos"]),
    ],
)
def test_another_command_for_the_same_folder_names_the_difference(
    flags: list[str], says: list[str], run: Path, tmp_path: Path
) -> None:
    argv = quick(tmp_path / "results", *flags)
    message = refused(condense.main, argv, str(run), *says, "--tag", "--restart", status=2, unchanged=tmp_path)
    assert "--batch_real" not in message


def test_a_folder_of_other_things_is_not_overwritten(tmp_path: Path) -> None:
    folder = tmp_path / "results" / "digits" / "convnet2_f1_ipc1"
    folder.mkdir(parents=True)
    (folder / "thesis.tex").write_text("precious")
    refused(condense.main, quick(tmp_path / "results"), str(folder), "--tag", status=2, unchanged=tmp_path)


def stop_early(results: Path) -> Path:
    """A run that was stopped after its first step, to go on later."""
    assert condense.main(quick(results, "--inner_loop", "2", "--max_minutes", "1e-9")) == 0
    (checkpoint,) = results.rglob("checkpoint.pt")
    return checkpoint


SPOILT_STATES: dict[str, Callable[[dict[str, Any]], object]] = {
    "has other pixels": lambda state: {**state, "pixels": torch.zeros(3)},
    "has another network": lambda state: {**state, "net": {"other.weight": torch.zeros(3)}},
    "lacks the position": lambda state: {k: v for k, v in state.items() if k != "it"},
}


@pytest.mark.parametrize("what", SPOILT_STATES)
def test_a_checkpoint_with_wrong_content_is_named_in_one_line(what: str, tmp_path: Path) -> None:
    checkpoint = stop_early(tmp_path / "results")
    torch.save(SPOILT_STATES[what](read_tensors(checkpoint, "")), checkpoint)
    with pytest.raises(UserError, match=f"{checkpoint.parent}.*--restart") as caught:
        condense.main(quick(tmp_path / "results", "--inner_loop", "2"))
    assert caught.value.status == 1 and "\n" not in str(caught.value)


def test_two_truncated_checkpoints_are_named_and_restart_helps(tmp_path: Path) -> None:
    checkpoint = stop_early(tmp_path / "results")
    for file in (checkpoint, checkpoint.with_name("checkpoint_previous.pt")):
        file.write_bytes(file.read_bytes()[:2000])
    argv = quick(tmp_path / "results", "--inner_loop", "2")
    with pytest.raises(
        UserError, match=r"checkpoint_previous.pt: is truncated.*no other checkpoint; --restart"
    ) as caught:
        condense.main(argv)
    assert caught.value.status == 1
    assert condense.main([*argv, "--restart"]) == 0


# --- Numbers that run away --------------------------------------------------------------------------------------------

RUN_AWAY = ["--lr_img", "1e38", "--inner_loop", "4"]


def test_a_loss_that_is_no_number_names_iteration_class_and_settings_and_the_state_to_go_on_from(
    tmp_path: Path,
) -> None:
    with pytest.raises(UserError, match=r"outer iteration \d.*class \d.*--lr_img.*1e\+38.*--resume_from") as caught:
        condense.main(quick(tmp_path, *RUN_AWAY))
    assert caught.value.status == 1 and "\n" not in str(caught.value)
    assert json.loads(next(tmp_path.rglob("data.json")).read_text())["outer_iterations"] == 0


POISON: dict[str, Callable[[State], Tensor]] = {
    "loss": lambda state: state.losses[3:5],
    "pixel": lambda state: state.pixels.pixels[3:5, 0, 0, 0, :1],
    "weight": lambda state: state.net.classifier.weight[:1],
}


@pytest.mark.faults
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("what", POISON)
def test_numbers_that_are_none_stop_the_run_before_anything_is_overwritten(
    what: str, value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "CHECKPOINT_SECONDS", 0.0)
    argv = quick(tmp_path, "--inner_loop", "4", "--interval", "2")
    folder, before, steps = tmp_path / "digits" / "convnet2_f1_ipc1", {}, 0
    original = condense.Job.after_step

    def after_step(job: condense.Job, state: State) -> None:
        nonlocal steps
        if (steps := steps + 1) == 3:
            before.update({name: (folder / name).read_bytes() for name in ("checkpoint.pt", "data.pt", "data.json")})
            with torch.no_grad():
                POISON[what](state).fill_(value)
        original(job, state)

    where = "in the network" if what == "weight" else "class 3, 4,"
    with injected("a number that is none, in loss, pixels or network") as fault:
        with monkeypatch.context() as patch:
            patch.setattr(condense.Job, "after_step", after_step)
            says = rf"iteration 1, by inner step 3, {where}.*--lr_img 0.005 .*--lr 0.01 .*--resume_from {folder}"
            with pytest.raises(UserError, match=says) as caught:
                condense.main(argv)
        assert caught.value.status == 1 and "\n" not in str(caught.value)
        assert before == {name: (folder / name).read_bytes() for name in before}
        assert condense.main(argv) == 0
        assert condense.main([*argv, "--tag", "undisturbed"]) == 0
        undisturbed = folder.with_name("convnet2_f1_ipc1_undisturbed")
        fault.kept((folder / "data.pt").read_bytes() == (undisturbed / "data.pt").read_bytes())
