"""train.py as a user runs it, on tiny settings: tables, baselines, the upper bound, others' sets, exports."""

from __future__ import annotations

import csv
import json
import logging
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

import condense
import train
from tests.files import image_folder, last_json, noise, save, tree
from utils.config.flags import make_parser
from utils.config.options import TrainOptions
from utils.system.errors import UsageError, UserError

TINY = shlex.split(
    "--device cpu --ipc 2 -f 2 --niter 3 --inner_loop 4 --interval 2 --batch_real 8 --n_data 16 --batch_syn_max 6 "
    "--width 8 --epochs 2 --repeat 2"
)
FEW = ["--device", "cpu", "--epochs", "1", "--repeat", "2", "--width", "4"]
ALONE = ["--baselines", "none"]
ROWS = ["distilled set", "random real images", "random real images", "k-means representatives", "herded real images"]


def run(results: Path, *more: str) -> Path:
    """condense.py on digits in this process; the run folder."""
    assert condense.main([*TINY, "--results_dir", str(results), *more]) == 0
    return next((results / "digits").iterdir())


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes to the default --results_dir must not lie in the repository."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("results"))


def rows(found: dict[str, Any]) -> list[tuple[object, ...]]:
    return [
        (r["trained_on"], r["images_per_class"], r["decoded_per_class"], r["stored_bytes"]) for r in found["results"]
    ]


# --- Tables -----------------------------------------------------------------------------------------------------------


def test_a_set_stands_beside_real_images_of_its_stored_and_of_its_decoded_budget(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main([*FEW, str(finished), "--json"]) == 0
    sizes = [(2, 8, 20 * 64 * 4), (2, 2, 20 * 64), (8, 8, 80 * 64), (2, 2, 20 * 64), (2, 2, 20 * 64)]
    assert rows(last_json(capsys)) == [(what, *size) for what, size in zip(ROWS, sizes, strict=True)]


def test_random_real_images_are_those_that_condense_has_measured(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(["--device", "cpu", str(finished), "--baselines", "random", "--json"]) == 0
    card = json.loads((finished / "data.json").read_text())
    ours, random, _ = last_json(capsys)["results"]
    assert (ours["accuracies"], random["accuracies"]) == (
        card["accuracy"]["accuracies"], card["random_real"]["accuracies"],
    )  # fmt: skip


def test_baselines_are_those_asked_for(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([*FEW, str(finished), "--baselines", "central", "boundary", "--json"]) == 0
    assert [row[0] for row in rows(last_json(capsys))] == [
        "distilled set", "central real images", "random real images", "boundary real images",
    ]  # fmt: skip
    with pytest.raises(UsageError, match="--baselines: none and other words"):
        train.main([*FEW, str(finished), "--baselines", "none", "random"])


def test_the_upper_bound_is_trained_once_and_gives_every_row_its_share(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = [*FEW, str(finished), "--real", "--results_dir", str(tmp_path), *ALONE, "--json"]
    assert train.main(argv) == 0
    first = last_json(capsys)
    ours, real = first["results"]
    assert real["trained_on"] == "all real images" and real["images_per_class"] == pytest.approx(134.7)
    assert (tmp_path / "digits" / "real" / "eval.json").exists()
    trained: list[object] = []
    evaluate = train.evaluate

    def counted(spec: Any, *rest: Any, **more: Any) -> Any:
        trained.append(spec)
        return evaluate(spec, *rest, **more)

    monkeypatch.setattr(train, "evaluate", counted)
    table = tmp_path / "table.csv"
    assert train.main([*argv, "--table", str(table), "--repeat", "1"]) == 0
    out = capsys.readouterr().out
    assert len(trained) == 1 and "known from" in out  # the set alone
    again = json.loads(out.splitlines()[-1])["results"][1]
    assert again["accuracies"] == real["accuracies"][:1] and again["n"] == 1
    share, whole = (float(row["share_of_real"]) for row in csv.DictReader(table.read_text().splitlines()))
    assert whole == 100
    assert share == pytest.approx(100 * ours["accuracies"][0] / real["accuracies"][0])
    assert "of all real" in out and f"{share:.1f} %" in out
    assert train.main([*argv, "--retrain"]) == 0
    assert len(trained) == 3 and last_json(capsys)["results"][1]["accuracies"] == real["accuracies"]


def test_rows_other_than_all_real_images_are_always_trained(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*FEW, str(finished), "--baselines", "random", "--seed", "7", "--json"]
    assert train.main(argv) == 0
    first = last_json(capsys)["results"]
    assert train.main(argv) == 0
    out = capsys.readouterr().out
    assert "known from" not in out
    again = json.loads(out.splitlines()[-1])["results"]
    assert [row["accuracies"] for row in again] == [row["accuracies"] for row in first]


def test_real_images_of_another_content_are_trained_on_even_where_their_folder_has_the_same_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = image_folder(tmp_path / "photos", {"a": 8, "b": 8})
    argv = [*FEW, "--real", "--image_folder", str(root), "--results_dir", str(tmp_path / "results")]
    for known in (False, True):
        assert train.main(argv) == 0
        assert ("known from" in capsys.readouterr().out) == known
    moved = root.rename(tmp_path / "moved")
    argv[argv.index(str(root))] = str(moved)
    assert train.main(argv) == 0
    assert "known from" in capsys.readouterr().out
    for split in ("train", "test"):
        save(moved / split / "a" / "0.png", noise(8, 8, 3, seed=999))
        assert train.main(argv) == 0
        assert "known from" not in capsys.readouterr().out


def test_a_damaged_eval_json_is_said_and_begun_again(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*FEW, str(finished), *ALONE, "--seed", "9"]
    file = finished / "eval.json"
    good = {"accuracies": [1.0], "seconds": 1.0}
    for damaged in ("{", "[]", '{"results": 3}', *(json.dumps({"results": [r]}) for r in (
        {"accuracies": [10**400], "seconds": 1},
        7, {**good, "accuracies": ["x"]}, {"accuracies": [1.0]}, {**good, "versions": 5},
    ))):  # fmt: skip
        file.write_text(damaged)
        assert train.main(argv) == 0
        assert "was damaged, and is begun again" in capsys.readouterr().out
        assert len(json.loads(file.read_text())["results"]) == 1


@pytest.mark.parametrize("change", [["--lr", "0.02"], ["--epochs", "2"], ["--width", "8"], ["--repeat", "3"]])
def test_another_protocol_is_another_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: list[str]
) -> None:
    argv = [*FEW, "--real", "-d", "digits", "--results_dir", str(tmp_path)]
    assert train.main(argv) == 0
    capsys.readouterr()
    assert train.main([*argv, *change]) == 0
    assert "known from" not in capsys.readouterr().out


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


@pytest.mark.parametrize("name", ["table.txt", "table", "nowhere/table.md"])
def test_a_table_that_could_not_be_written_is_refused_before_training(
    finished: Path, tmp_path: Path, name: str
) -> None:
    with pytest.raises(UsageError, match="--table"):
        train.main([*FEW, str(finished), "--table", str(tmp_path / name)])


def test_all_names_the_networks_of_the_paper_s_table_and_torchvision_s_are_known_by_name() -> None:
    given = make_parser(TrainOptions, "").parse_given(["-n", "all"])
    specs = train.options.networks(TrainOptions(**given), given, None, channels=3, classes=10, side=32)
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


def test_a_normalised_file_is_refused_until_it_is_called_so(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mean, std = 0.3053, 0.3758
    file = bare(finished, tmp_path / "theirs.pt", lambda images: (images - mean) / std)
    argv = [*FEW, str(file), "-d", "digits", "-f", "2", *ALONE, "--json"]
    with pytest.raises(UserError, match="--normalized"):
        train.main(argv)
    assert train.main([*argv, "--normalized"]) == 0
    theirs = last_json(capsys)
    assert train.main([*FEW, str(bare(finished, tmp_path / "ours.pt")), *argv[len(FEW) + 1 :]]) == 0
    assert last_json(capsys)["accuracies"] == pytest.approx(theirs["accuracies"], abs=1)


def test_a_set_that_trains_no_better_than_random_images_is_questioned(
    finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = bare(finished, tmp_path / "noise.pt", torch.rand_like)
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
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "set.safetensors"
    assert train.main([str(finished), "--export", str(file)]) == 0
    assert not (finished / "eval.json").exists() or "safetensors" not in (finished / "eval.json").read_text()
    found = []
    for path in (finished, file):
        assert train.main([*FEW, str(path), *ALONE, "--json"]) == 0
        found.append(last_json(capsys))
    assert found[0]["accuracies"] == found[1]["accuracies"] and rows(found[0]) == rows(found[1])
    with pytest.raises(UsageError, match="--export"):
        train.main([str(finished), "--export", str(file)])


def test_a_folder_export_is_read_by_imagefolder_and_by_train(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "exported"
    assert train.main([str(finished), "--export", str(folder)]) == 0
    images = ImageFolder(str(folder))
    assert len(images) == 80 and images.classes == [str(c) for c in range(10)]
    assert "(Liu" in (folder / "README.md").read_text() or "digits" in (folder / "README.md").read_text()
    assert train.main([*FEW, str(folder), "-d", "digits", "-f", "1", *ALONE, "--json"]) == 0
    assert rows(last_json(capsys)) == [("distilled set", 8, 8, 80 * 64)]


def test_a_snapshot_is_evaluated_with_the_card_of_its_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run(tmp_path, "--snapshot_every", "2", "--epochs", "1", "--repeat", "1")
    assert [p.name for p in sorted(folder.glob("data_*.pt"))] == ["data_000000.pt", "data_000002.pt", "data_000003.pt"]
    assert (folder / "data_000003.pt").read_bytes() == (folder / "data.pt").read_bytes()
    assert train.main([*FEW, str(folder / "data_000000.pt"), *ALONE, "--json"]) == 0
    assert rows(last_json(capsys)) == [("distilled set", 2, 8, 20 * 64 * 4)]


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
    folder = run(tmp_path, "--tensorboard", "--eval_every", "2")
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
    argv = [*TINY, "--results_dir", str(tmp_path), "--tensorboard"]
    assert condense.main([*argv, "--max_minutes", "0.0001"]) == 0
    assert condense.main(argv) == 0
    (card,) = tmp_path.glob("digits/*/data.json")
    events = accumulator.EventAccumulator(str(card.parent / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("matching loss")] == [1, 2, 3]


def test_without_tensorboard_the_package_is_named_and_nothing_is_begun(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_train_takes_several_networks_and_keeps_earlier_results(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for argv in (["-n", "convnet", "resnet10", "--width", "4"], ["-n", "resnet10", "--width", "4"]):
        assert (
            train.main(["--device", "cpu", str(finished), "--epochs", "1", "--repeat", "1", "--json", *ALONE, *argv])
            == 0
        )
    assert last_json(capsys)["net"] == "resnet10"
    written = json.loads((finished / "eval.json").read_text())["results"]
    assert [r["net"] for r in written] == ["convnet2", "resnet10"]
    (finished / "eval.json").unlink()


def test_train_picks_by_data_set_factor_and_ipc(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick = ["--niter", "1", "--inner_loop", "1", "--epochs", "1", "--repeat", "1"]
    older = run(tmp_path, *quick, "--ipc", "1", "-f", "1")
    run(tmp_path, *quick)
    few = ["--results_dir", str(tmp_path), "--epochs", "1", "--repeat", "1"]
    assert train.main(["--device", "cpu", *few, "-d", "digits", "-f", "1", "--ipc", "1"]) == 0
    assert str(older) in capsys.readouterr().out
    with pytest.raises(UserError, match="no distilled set with data set digits, factor 7"):
        train.main(["--device", "cpu", *few, "-d", "digits", "-f", "7"])


def test_a_bare_data_pt_is_evaluated_as_described(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "theirs.pt"
    bare.write_bytes((finished / "data.pt").read_bytes())
    few = ["--epochs", "1", "--repeat", "1", "--width", "4", "--json"]
    assert train.main(["--device", "cpu", str(bare), "-d", "digits", "-f", "2", *few]) == 0
    found = last_json(capsys)
    assert (found["images_per_class"], found["decoded_per_class"]) == (2, 8)


@pytest.mark.parametrize(("argv", "count"), [(["--real"], 134.7), (["--coreset", "kmeans", "--ipc", "3"], 3)])
def test_real_images_are_the_bounds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: list[str], count: float
) -> None:
    few = ["--epochs", "1", "--repeat", "1", "--width", "4", "--results_dir", str(tmp_path), "--json"]
    assert train.main(["--device", "cpu", *argv, *few]) == 0
    found = last_json(capsys)
    assert found["images_per_class"] == pytest.approx(count)
    assert len(list(tmp_path.glob("digits/*/eval.json"))) == 1


def test_an_own_folder_goes_through_both_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split, counts in (("train", (9, 6)), ("test", (4, 4))):
        for c, name in enumerate(("cat", "dog")):
            (tmp_path / "own" / split / name).mkdir(parents=True)
            for i in range(counts[c]):
                colour = tuple(torch.randint(0, 256, (3,)).tolist())
                Image.new("RGB", (20, 16), colour).save(tmp_path / "own" / split / name / f"{i}.png")
    argv = [*TINY, "--image_folder", str(tmp_path / "own"), "--size", "16", "--results_dir", str(tmp_path / "r")]
    assert condense.main(argv) == 0
    out = capsys.readouterr().out
    assert "--batch_real is 8, class dog has 6 images" in out
    card = json.loads((tmp_path / "r/folder/convnet3_f2_ipc2/data.json").read_text())
    assert card["class_names"] == ["cat", "dog"] and len(card["normalization"]["mean"]) == 3
    assert train.main(["--device", "cpu", "--results_dir", str(tmp_path / "r"), "--json"]) == 0
    assert last_json(capsys)["accuracy_mean"] == card["accuracy"]["accuracy_mean"]
