"""train.py as a user runs it, on tiny settings: tables, baselines, the upper bound, others' sets, exports."""

from __future__ import annotations

import csv
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

import condense
import train
from data import Dataset
from tests.distilling import TINY, distilled
from tests.files import image_folder, last_json, tree
from utils.config import resolve
from utils.config.flags import make_parser
from utils.config.options import TrainOptions
from utils.files import atomic
from utils.system.errors import UsageError, UserError

Evaluate = Callable[..., dict[str, Any]]
FEW = ["--device", "cpu", "--epochs", "1", "--repeat", "2", "--width", "4"]
ONCE = ["--niter", "1", "--inner_loop", "1", "--epochs", "1", "--repeat", "1"]
ALONE = ["--baselines", "none"]
ROWS = ["distilled set", "random real images", "random real images", "k-means representatives", "herded real images"]


def run(results: Path, *more: str) -> Path:
    """condense.py on digits in this process; the run folder."""
    return distilled(results, [*TINY, *more])


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes to the default --results_dir must not lie in the repository."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("results"))


@pytest.fixture
def evaluated(capsys: pytest.CaptureFixture[str]) -> Evaluate:
    """train.py with few epochs in this process; what it prints as JSON."""

    def evaluate(*argv: object) -> dict[str, Any]:
        assert train.main([*FEW, *map(str, argv), "--json"]) == 0
        return last_json(capsys)

    return evaluate


def rows(found: dict[str, Any]) -> list[tuple[object, ...]]:
    return [
        (r["trained_on"], r["images_per_class"], r["decoded_per_class"], r["stored_bytes"]) for r in found["results"]
    ]


# --- Tables -----------------------------------------------------------------------------------------------------------


def test_a_set_stands_beside_real_images_of_both_budgets(finished: Path, evaluated: Evaluate) -> None:
    sizes = [(2, 8, 20 * 64 * 4), (2, 2, 20 * 64), (8, 8, 80 * 64), (2, 2, 20 * 64), (2, 2, 20 * 64)]
    assert rows(evaluated(finished)) == [(what, *size) for what, size in zip(ROWS, sizes, strict=True)]


def test_random_real_images_are_those_of_condense(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--device", "cpu", str(finished), "--baselines", "random", "--json"]) == 0
    card = json.loads((finished / "data.json").read_text())
    ours, random, _ = last_json(capsys)["results"]
    assert (ours["accuracies"], random["accuracies"]) == (
        card["accuracy"]["accuracies"], card["random_real"]["accuracies"],
    )  # fmt: skip


def test_baselines_are_those_asked_for(finished: Path, evaluated: Evaluate) -> None:
    assert [row[0] for row in rows(evaluated(finished, "--baselines", "central", "boundary"))] == [
        "distilled set", "central real images", "random real images", "boundary real images",
    ]  # fmt: skip
    with pytest.raises(UsageError, match="--baselines: none and other words"):
        train.main([*FEW, str(finished), "--baselines", "none", "random"])


def test_the_upper_bound_is_trained_once(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*FEW, str(finished), "--real", "--results_dir", str(tmp_path), *ALONE, "--json"]
    assert train.main(argv) == 0
    ours, real = last_json(capsys)["results"]
    assert real["trained_on"] == "all real images" and real["images_per_class"] == pytest.approx(134.7)
    assert (tmp_path / "digits" / "real" / "eval.json").exists()
    table = tmp_path / "table.csv"
    assert train.main([*argv, "--table", str(table), "--repeat", "1"]) == 0
    out = capsys.readouterr().out
    assert out.count("known from") == 1  # the set itself is trained on again
    _, again = json.loads(out.splitlines()[-1])["results"]
    assert again["accuracies"] == real["accuracies"][:1] and again["n"] == 1
    share, whole = (float(row["share_of_real"]) for row in csv.DictReader(table.read_text().splitlines()))
    assert whole == 100
    assert share == pytest.approx(100 * ours["accuracies"][0] / real["accuracies"][0])
    assert "of all real" in out and f"{share:.1f} %" in out
    for change in (["--retrain"], ["--lr", "0.02"], ["--width", "8"], ["--repeat", "3"]):
        assert train.main([*argv, *change]) == 0
        out = capsys.readouterr().out
        assert "known from" not in out
    assert json.loads(out.splitlines()[-1])["results"][1]["accuracies"][:2] == real["accuracies"]


@pytest.mark.parametrize("changed", ["train", "test"])
def test_the_upper_bound_of_other_images_with_the_same_names_is_another_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changed: str
) -> None:
    root = image_folder(tmp_path / "images", {"a": 9, "b": 9}, {"a": 3, "b": 3})
    argv = ["--real", "--image_folder", str(root), "--depth", "2"]
    for known in (False, True):
        assert train.main([*FEW, *argv]) == 0
        assert ("known from" in capsys.readouterr().out) == known
    with Image.open(root / changed / "a" / "0.png") as image:
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(root / changed / "a" / "0.png")  # of the same statistics
    assert train.main([*FEW, *argv]) == 0
    assert "known from" not in capsys.readouterr().out


def test_a_damaged_eval_json_is_said_and_begun_again(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = finished / "eval.json"
    good = {"accuracies": [1.0], "seconds": 1.0}
    for damaged in ("{", "[]", '{"results": 3}', *(json.dumps({"results": [r]}) for r in (
        {"accuracies": [10**400], "seconds": 1},
        7, {**good, "accuracies": ["x"]}, {"accuracies": [1.0]}, {**good, "versions": 5}, {**good, "best_of_four": [1]},
    ))):  # fmt: skip
        file.write_text(damaged)
        assert train.main([*FEW, str(finished), *ALONE]) == 0
        assert "was damaged, and is begun again" in capsys.readouterr().out
        assert len(json.loads(file.read_text())["results"]) == 1


def test_the_table_is_written_as_markdown_csv_and_json(finished: Path, tmp_path: Path) -> None:
    tables = [tmp_path / f"table{suffix}" for suffix in (".md", ".csv", ".json")]
    assert train.main([*FEW, str(finished), "-n", "convnet", "resnet10", "--table", *map(str, tables)]) == 0
    lines = tables[0].read_text().splitlines()
    assert lines[0].startswith("| network | trained on | stored/class |") and "of all real" not in lines[0]
    assert len([line for line in lines if line.startswith("| convnet2 | ")]) == 5
    assert "train.py" in lines[-1] and "commit" in lines[-1] and torch.__version__ in lines[-1]
    with tables[1].open() as file:
        by_csv = list(csv.DictReader(file))
    by_json = json.loads(tables[2].read_text())["results"]
    assert len(by_csv) == len(by_json) == 10
    for row, record in zip(by_csv, by_json, strict=True):
        assert (row["net"], row["trained_on"]) == (record["net"], record["trained_on"])
        assert float(row["accuracy_mean"]) == record["accuracy_mean"] and row["n"] == "2"


CHOSEN = "as published: chosen on the test set"


def test_the_best_of_four_tests_is_shown_on_request_only_and_with_its_name(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tables = [tmp_path / f"table{suffix}" for suffix in (".md", ".csv", ".json")]
    argv = ["--device", "cpu", "--epochs", "5", "--repeat", "2", "--width", "4", *ALONE, "--table", *map(str, tables)]
    for more in ([], ["--show_best"]):
        assert train.main([str(finished), *argv, *more]) == 0
        for shown in (capsys.readouterr().out, *(table.read_text() for table in tables[:2])):
            assert (CHOSEN in shown) == bool(more)
        (record,) = json.loads(tables[2].read_text())["results"]
        best = record["best_of_four"]
        assert len(best["accuracies"]) == best["n"] == 2
        assert all(b >= a for a, b in zip(record["accuracies"], best["accuracies"], strict=True))
    text = tables[0].read_text()
    assert f"{best['accuracy_mean']:.1f} +- {best['accuracy_std']:.1f} (n=2)" in text and "biased upwards" in text
    (row,) = csv.DictReader(tables[1].read_text().splitlines())
    (name,) = (name for name in row if name.endswith(CHOSEN) and not name.startswith("std"))
    assert float(row[name]) == best["accuracy_mean"]
    (finished / "eval.json").unlink()


def test_an_upper_bound_of_an_older_version_is_used_again_without_four_tests(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*FEW, "--real", "--results_dir", str(tmp_path), "--show_best", "--json"]
    assert train.main([*argv, "--repeat", "3"]) == 0
    (real,) = last_json(capsys)["results"]
    assert train.main(argv) == 0
    (again,) = last_json(capsys)["results"]
    assert again["best_of_four"]["accuracies"] == real["best_of_four"]["accuracies"][:2]
    file = tmp_path / "digits" / "real" / "eval.json"
    content = atomic.read_json(file)
    del content["results"][0]["best_of_four"]
    atomic.write_json(file, content)
    assert train.main(argv) == 0
    out = capsys.readouterr().out
    assert "known from" in out and "knows no best of four tests of all real images; --retrain makes one" in out
    (older,) = json.loads(out.splitlines()[-1])["results"]
    assert older["accuracies"] == real["accuracies"][:2] and "unknown" in out


@pytest.mark.parametrize("name", ["table.txt", "table", "nowhere/table.md"])
def test_a_table_that_cannot_be_written_is_refused_before_training(finished: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="--table"):
        train.main([*FEW, str(finished), "--table", str(tmp_path / name)])


def test_all_names_the_networks_of_the_paper_s_table_and_torchvision_s_are_known_by_name() -> None:
    given = make_parser(TrainOptions, "").parse_given(["-n", "all"])
    specs = resolve.networks(TrainOptions(**given), given, None, Dataset("cifar10", device=torch.device("cpu")))
    names = ["convnet3", "resnet10", "resnet18", "densenet121", "vgg11", "alexnet5"]
    assert [spec.name for spec in specs] == names


def test_a_network_of_torchvision_is_evaluated(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--device", "cpu", "--epochs", "1", "--repeat", "1"]
    assert train.main([*few, str(finished), "-n", "shufflenet_v2_x0_5", *ALONE, "--json"]) == 0
    assert last_json(capsys)["net"] == "shufflenet_v2_x0_5"


def test_the_confusion_matrix_is_printed_and_written(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([*FEW, str(finished), "--confusion", "--baselines", "random", "--json"]) == 0
    out = capsys.readouterr().out
    found = json.loads(out.splitlines()[-1])["results"]
    files = sorted((finished / "confusion").glob("*.csv"))
    assert len(files) == 3 and all(file.with_suffix(".png").exists() for file in files)
    with Image.open(files[0].with_suffix(".png")) as image:
        assert min(image.size) > 400
    matrix = torch.tensor(found[0]["confusion"])
    assert matrix.sum() == 2 * 450
    assert found[0]["accuracy_mean"] == pytest.approx(100 * matrix.trace().item() / 900, abs=1e-3)
    with next(file for file in files if "distilled_set" in file.name).open() as file:
        head, *lines = csv.reader(file)
    assert head == ["class", *map(str, range(10)), "accuracy %"]
    assert [list(map(int, line[1:-1])) for line in lines] == matrix.tolist()
    assert out.count("taken for %") == 1


# --- Warnings ---------------------------------------------------------------------------------------------------------


def bare(finished: Path, file: Path, change: Any = lambda images: images) -> Path:
    """A set without data.json."""
    images, labels = torch.load(finished / "data.pt", weights_only=True)
    torch.save([change(images), labels], file)
    return file


def warnings_of(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(r.getMessage() for r in caplog.records if r.levelno == logging.WARNING)


def test_the_wrong_factor_is_noticed(finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for factor, warned in ((1, True), (2, False)):
        caplog.clear()
        file = bare(finished, tmp_path / f"{factor}.pt")
        assert train.main([*FEW, str(file), "-d", "digits", "-f", str(factor), *ALONE]) == 0
        assert ("looks packed with factor 2" in warnings_of(caplog)) == warned


def test_a_normalised_file_has_to_be_called_so(finished: Path, tmp_path: Path, evaluated: Evaluate) -> None:
    mean, std = 0.3053, 0.3758
    file = bare(finished, tmp_path / "theirs.pt", lambda images: (images - mean) / std)
    argv = ["-d", "digits", "-f", "2", *ALONE]
    with pytest.raises(UserError, match="--normalized"):
        evaluated(file, *argv)
    ours = evaluated(bare(finished, tmp_path / "ours.pt"), *argv)
    assert (ours["images_per_class"], ours["decoded_per_class"]) == (2, 8)
    assert evaluated(file, *argv, "--normalized")["accuracies"] == pytest.approx(ours["accuracies"], abs=1)


def test_a_set_like_random_images_is_questioned(
    finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    noise = torch.Generator().manual_seed(0)
    file = bare(finished, tmp_path / "noise.pt", lambda images: torch.rand(images.shape, generator=noise))
    for baselines in ("random", "none"):
        caplog.clear()
        argv = ["--device", "cpu", "--epochs", "60", "--repeat", "2", "--width", "8", "--baselines", baselines]
        assert train.main([str(file), *argv, "-d", "digits", "-f", "1"]) == 0
        assert "check the data set (-d), the factor (-f) and --normalized" in warnings_of(caplog)


def test_a_card_that_says_not_normalised_is_not_overruled(finished: Path) -> None:
    with pytest.raises(UsageError, match=r"--normalized: the set's data.json says that it is not"):
        train.main([*FEW, str(finished), "--normalized"])


def test_the_wrong_data_set_is_an_error_where_shapes_tell_and_a_warning_where_classes_do(
    finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(UsageError, match=r"--dataset mnist: the set's data.json says digits"):
        train.main([*FEW, str(finished), "-d", "mnist"])
    with pytest.raises(UserError, match="images of"):
        train.main([*FEW, str(bare(finished, tmp_path / "x.pt")), "-d", "cifar10", "-f", "2"])
    images, labels = torch.load(finished / "data.pt", weights_only=True)
    torch.save([images[labels < 7], labels[labels < 7]], tmp_path / "seven.pt")
    assert train.main([*FEW, str(tmp_path / "seven.pt"), "-d", "digits", "-f", "2", *ALONE]) == 0
    assert "holds 7 of the 10 classes" in warnings_of(caplog)


# --- Others' sets and exports -----------------------------------------------------------------------------------------


def test_results_of_others_sets_lie_apart_and_their_files_stay_as_they_are(finished: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    assert train.main([str(finished), "--export", str(theirs / "folder")]) == 0
    bare(finished, theirs / "set.pt")
    before = tree(theirs)
    for name, factor in (("folder", 1), ("set.pt", 2)):
        argv = [*FEW, str(theirs / name), "-d", "digits", "-f", str(factor), "--results_dir", str(tmp_path / "results")]
        assert train.main([*argv, "--confusion", *ALONE]) == 0
    assert tree(theirs) == before
    found = sorted(p.name for p in (tmp_path / "results" / "digits").iterdir())
    assert found == ["evaluated_folder", "evaluated_set"]


def test_soft_labels_that_are_certain_train_like_hard_ones_and_uncertain_ones_do_not(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, labels = torch.load(finished / "data.pt", weights_only=True)
    certain = torch.eye(10)[labels]
    argv = ["--device", "cpu", "--epochs", "40", "--repeat", "1", "--width", "8", "-d", "digits", "-f", "2", *ALONE]
    found = {}
    for name, given in (("hard", labels), ("certain", certain), ("uniform", torch.full((20, 10), 0.1))):
        torch.save([images, given], tmp_path / f"{name}.pt")
        assert train.main([str(tmp_path / f"{name}.pt"), *argv, "--json"]) == 0
        found[name] = last_json(capsys)
    assert found["hard"]["accuracies"] == found["certain"]["accuracies"]
    assert found["uniform"]["accuracies"] != found["hard"]["accuracies"]
    assert found["certain"]["stored_bytes"] == found["hard"]["stored_bytes"] + 20 * 10 * 4


def test_a_safetensors_export_is_evaluated_like_the_run_it_came_from(
    finished: Path, tmp_path: Path, evaluated: Evaluate
) -> None:
    file = tmp_path / "set.safetensors"
    assert train.main([str(finished), "--export", str(file)]) == 0
    assert not (finished / "eval.json").exists() or "safetensors" not in (finished / "eval.json").read_text()
    found = [evaluated(path, *ALONE) for path in (finished, file)]
    assert found[0]["accuracies"] == found[1]["accuracies"] and rows(found[0]) == rows(found[1])
    with pytest.raises(UsageError, match="--export"):
        train.main([str(finished), "--export", str(file)])


def test_a_folder_export_is_read_by_train(finished: Path, tmp_path: Path, evaluated: Evaluate) -> None:
    folder = tmp_path / "exported"
    assert train.main([str(finished), "--export", str(folder)]) == 0
    images = ImageFolder(str(folder))
    assert len(images) == 80 and images.classes == [str(c) for c in range(10)]
    assert rows(evaluated(folder, "-d", "digits", "-f", "1", *ALONE)) == [("distilled set, 8 bits", 8, 8, 80 * 64)]


def test_a_snapshot_is_evaluated_by_its_run_s_card(tmp_path: Path, evaluated: Evaluate) -> None:
    folder = run(tmp_path, *ONCE, "--niter", "3", "--snapshot_every", "2")
    assert [p.name for p in sorted(folder.glob("data_*.pt"))] == ["data_000000.pt", "data_000002.pt", "data_000003.pt"]
    assert (folder / "data_000003.pt").read_bytes() == (folder / "data.pt").read_bytes()
    assert rows(evaluated(folder / "data_000000.pt", *ALONE)) == [("distilled set", 2, 8, 20 * 64 * 4)]


@pytest.mark.parametrize(
    "more", [["-f", "2"], ["--normalized"], ["--export", "x"], ["--baselines", "random"], ["--decode_type", "multi"]]
)
def test_flags_for_a_set_are_refused_where_there_is_none(more: list[str], tmp_path: Path) -> None:
    for alone in (["--real"], ["--coreset", "random", "--ipc", "1"]):
        with pytest.raises(UsageError, match="only for a distilled set"):
            train.main([*FEW, *alone, *more, "--results_dir", str(tmp_path)])


# --- TensorBoard ------------------------------------------------------------------------------------------------------


def test_tensorboard_shows_losses_accuracies_and_pictures_of_both_scripts(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = run(tmp_path, *ONCE, "--niter", "3", "--tensorboard", "--eval_every", "2")
    assert train.main([*FEW, str(folder), "--tensorboard", "--epochs", "3", *ALONE]) == 0
    events = accumulator.EventAccumulator(str(folder / "tensorboard")).Reload()
    tags = events.Tags()
    assert {"stored", "decoded", "training images/distilled set, 2 per class"} == set(tags["images"])
    expected = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for tag, name in (("matching loss", "loss"), ("test accuracy %", "accuracy_mean")):
        shown = [(event.step, pytest.approx(event.value)) for event in events.Scalars(tag)]
        assert shown == [(e["iteration"], e[name]) for e in expected if name in e]
    losses = [tag for tag in tags["scalars"] if tag.startswith("training loss/convnet2, distilled set")]
    assert len(losses) == 2 and all(len(events.Scalars(tag)) == 3 for tag in losses)


def test_a_run_that_stopped_goes_on_with_its_curves(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = distilled(tmp_path, [*TINY, *ONCE, "--niter", "3", "--tensorboard"], 2)
    events = accumulator.EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("matching loss")] == [1, 2, 3]


def test_without_tensorboard_it_is_asked_for(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    for main, argv in ((condense.main, TINY), (train.main, [*FEW, str(finished)])):
        with pytest.raises(UsageError, match=r"--tensorboard: needs TensorBoard .*pip install tensorboard"):
            main([*argv, "--results_dir", str(tmp_path / "results"), "--tensorboard"])
    assert not (tmp_path / "results").exists()


# --- Which set, and how -----------------------------------------------------------------------------------------------


def test_train_evaluates_the_newest_set_and_names_it(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--device", "cpu", "--results_dir", str(finished.parent.parent), "--json", *ALONE]) == 0
    out = capsys.readouterr().out
    assert str(finished) in out
    found = json.loads(out.splitlines()[-1])
    card = json.loads((finished / "data.json").read_text())
    assert found["accuracy_mean"] == card["accuracy"]["accuracy_mean"]  # the same protocol, seeds and set
    assert (found["net"], found["n"], found["images_per_class"]) == ("convnet2", 2, 2)
    assert set(found) >= {"accuracy_std"}
    written = json.loads((finished / "eval.json").read_text())["results"]
    assert written[-1]["accuracies"] == card["accuracy"]["accuracies"] and written[-1]["command"].startswith("train.py")
    (finished / "eval.json").unlink()


def test_several_networks_and_earlier_results_stay(finished: Path, evaluated: Evaluate) -> None:
    for argv in (["-n", "convnet", "resnet10"], ["-n", "resnet10"]):
        assert evaluated(finished, *ALONE, *argv)["net"].startswith(argv[1])
    written = json.loads((finished / "eval.json").read_text())["results"]
    assert [r["net"] for r in written] == ["convnet2", "resnet10"]
    (finished / "eval.json").unlink()


def test_train_picks_by_data_set_factor_and_ipc(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    older = run(tmp_path, *ONCE, "--ipc", "1", "-f", "1")
    run(tmp_path, *ONCE)
    few = ["--results_dir", str(tmp_path), "--epochs", "1", "--repeat", "1", *ALONE]
    assert train.main(["--device", "cpu", *few, "-d", "digits", "-f", "1", "--ipc", "1"]) == 0
    assert str(older) in capsys.readouterr().out
    with pytest.raises(UserError, match="no distilled set with data set digits, factor 7"):
        train.main(["--device", "cpu", *few, "-d", "digits", "-f", "7"])


def test_an_own_folder_goes_through_both_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = image_folder(tmp_path / "own", {"cat": 9, "dog": 6}, {"cat": 4, "dog": 4}, shape=(16, 20, 3))
    folder = run(tmp_path / "r", "--image_folder", str(root), "--size", "16")
    assert "--batch_real is 8, class dog has 6 images" in capsys.readouterr().out
    card = json.loads((folder / "data.json").read_text())
    assert card["class_names"] == ["cat", "dog"] and len(card["normalization"]["mean"]) == 3
    assert train.main(["--device", "cpu", "--results_dir", str(tmp_path / "r"), "--json", *ALONE]) == 0
    assert last_json(capsys)["accuracy_mean"] == card["accuracy"]["accuracy_mean"]
