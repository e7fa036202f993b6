"""train.py --scores and --teacher: the scores by hand, and what networks are trained on for them."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import models
import train
from data import Dataset
from tests.files import last_json, refused
from utils.config import derived
from utils.config.options import TrainOptions
from utils.files import tensors
from utils.method.images import ImageSet, Normalize
from utils.method.training import fresh_network
from utils.runs import scores
from utils.runs.formats import SetFile
from utils.runs.teacher import Teacher
from utils.runs.training_data import TrainingDataOf
from utils.system.distributed import SINGLE
from utils.system.draws import Draws
from utils.system.errors import UserError

OURS, RANDOM, REAL = "distilled set", "random real images", "all real images"
QUICK = ["--device", "cpu", "-d", "digits", "--epochs", "1", "--repeat", "2", "--width", "4", "--lr", "0.2"]
QUICK += ["--baselines", "random"]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def saved(file: str, ipc: int = 1, *, soft: bool = False) -> str:
    """A set of noise for digits; its soft labels, if any, give the next class 0.4."""
    labels = torch.arange(10).repeat_interleave(ipc)
    images = torch.rand(len(labels), 1, 8, 8, generator=torch.Generator().manual_seed(0))
    mixed = 0.6 * torch.eye(10) + 0.4 * torch.eye(10).roll(1, 1)
    torch.save([images, mixed[labels] if soft else labels], file)
    return file


# --- By hand ----------------------------------------------------------------------------------------------------------


def test_scores_are_those_published() -> None:
    """DD-Ranking's rows for CIFAR-10 at ipc 10: HLR, IOR and LRS of DC, DSA, DM and MTT."""
    for hlr, ior, lrs in ((36.7, 18.5, 0.232), (35.1, 19.6, 0.237), (39.4, 16.1, 0.222), (23.7, 30.9, 0.285)):
        assert scores.label_robust(hlr, ior) == pytest.approx(lrs, abs=5e-4)
    assert [scores.label_robust(hlr, ior) for hlr, ior in ((-100, 100), (100, -100))] == pytest.approx([1, 0])
    assert scores.augmentation_robust(20, 10) == pytest.approx(
        (math.exp(0.15) - math.exp(-1)) / (math.e - math.exp(-1))
    )


def row(name: str, per_class: float, *accuracies: float) -> dict[str, Any]:
    return {
        "net": "convnet3", "trained_on": name, "images_per_class": per_class, "accuracies": accuracies,
        "stored_bytes": round(1000 * per_class),
    }  # fmt: skip


ROWS = [
    row(OURS, 1, 50, 52), row(RANDOM, 1, 20, 26), row(RANDOM, 4, 40, 41),
    row(OURS + ", teacher's labels", 1, 60, 60), row(RANDOM + ", teacher's labels", 1, 61, 59),
    row(RANDOM + ", teacher's labels", 4, 66, 64), row(REAL, 500, 90, 91),
    row(OURS + ", plain", 1, 40, 40), row(RANDOM + ", plain", 1, 10, 20), row(RANDOM + ", plain", 4, 38, 40),
]  # fmt: skip


def test_every_score_is_computed_beside_random_images_of_both_budgets() -> None:
    stored, decoded = scores.comparisons(ROWS)
    assert (stored["budget"], stored["random_bytes"], decoded["random_bytes"], decoded["set_bytes"]) == (
        "stored", 1000, 4000, 1000,
    )  # fmt: skip
    found = [(c["hlr"], c["ior"], c["ior_taught"]) for c in (stored, decoded)]
    assert found == [(39.5, 28, 0), (39.5, 10.5, -5)]
    # IOR by training: 30 and 26, 10 and 11; HLR 40 and 39.
    assert [c["ior_std"] for c in (stored, decoded)] == pytest.approx([8**0.5, 0.5**0.5], abs=1e-4)
    assert stored["hlr_std"] == pytest.approx(0.5**0.5, abs=1e-4)
    assert stored["lrs"] == pytest.approx(scores.scale((0.28 - 0.395) / 2), abs=1e-4)
    assert decoded["ars"] == pytest.approx(scores.scale((0.105 + 0.01) / 2), abs=1e-4)
    single = [scores.scale((0.30 - 0.40) / 2), scores.scale((0.26 - 0.39) / 2)]
    assert stored["lrs_std"] == pytest.approx(abs(single[0] - single[1]) / 2**0.5, abs=1e-4)


def test_a_set_of_soft_labels_is_scored_by_its_row_of_hard_ones() -> None:
    hard = [row(OURS + ", hard labels", 1, 30, 30), row(OURS + ", hard labels, plain", 1, 10, 20)]
    stored, _ = scores.comparisons([*ROWS[:7], *hard, *ROWS[8:]])
    assert (stored["ior"], stored["hlr"], stored["ior_taught"]) == (7, 60.5, 0)


def test_without_the_rows_that_a_score_needs_there_is_none() -> None:
    (found,) = scores.comparisons(ROWS[:2])
    assert found.keys() & scores.SCORES.keys() == {"ior"}
    single = [row(OURS, 1, 50), row(RANDOM, 1, 20)]
    assert scores.comparisons(single)[0]["ior_std"] is None
    head, cells = scores.cells(scores.with_scores(single))
    assert head[-2:] == ["IOR", "n"] and cells[-2:] == ["30.0", "1"]


# --- As a user runs it ------------------------------------------------------------------------------------------------


def test_scores_and_a_teacher_add_their_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [saved("set.pt"), *QUICK, "-f", "2", "--scores", "--teacher", "all", "--json"]
    assert train.main([*argv, "--table", "t.md", "t.csv"]) == 0
    found = last_json(capsys)
    rows = found["results"]
    labelled, plain = ", teacher's labels", ", plain"
    assert [(r["trained_on"], r["stored_bytes"]) for r in rows] == [
        (OURS, 2560), (RANDOM, 640), (RANDOM, 2560),
        (OURS + labelled, 2560 + 40 * 10 * 4), (RANDOM + labelled, 640 + 400), (RANDOM + labelled, 2560 + 1600),
        (REAL, 1347 * 64), (OURS + plain, 2560), (RANDOM + plain, 640), (RANDOM + plain, 2560),
    ]  # fmt: skip
    protocols = [(r["protocol"]["mixup"], r["protocol"]["eval_aug_type"]) for r in rows]
    assert protocols == [("cut", "color_crop_scale_rotate")] * 7 + [("vanilla", "none")] * 3
    assert rows[7]["accuracies"] != rows[0]["accuracies"]  # the protocol is not only said
    (file,) = tmp_path.rglob("evaluated_set/eval.json")
    assert len(json.loads(file.read_text())["results"]) == 9  # that of all real images lies elsewhere
    stored, decoded = found["scores"]
    mean = [r["accuracy_mean"] for r in rows]
    assert stored["hlr"] == decoded["hlr"] == pytest.approx(mean[6] - mean[0], abs=2e-4)
    assert (stored["ior"], decoded["ior"]) == pytest.approx((mean[0] - mean[1], mean[0] - mean[2]), abs=2e-4)
    assert decoded["ior_taught"] == pytest.approx(mean[3] - mean[5], abs=2e-4)
    (first, *_) = csv.DictReader(Path("t.csv").read_text().splitlines())
    assert float(first["lrs_decoded"]) == decoded["lrs"] and float(first["ars_stored_std"]) == stored["ars_std"]
    text = Path("t.md").read_text()
    teacher = rows[3]["teacher"]["accuracy"]
    assert "| HLR | IOR | LRS | ARS | IOR, teacher's labels | n |" in text
    assert f"convnet2 on all real images, 134.7 per class {teacher:.1f} %" in text and "1 epochs, batches of 64" in text
    # Again: all real images and the teacher are known, and the same.
    assert train.main(argv) == 0
    out = capsys.readouterr().out
    assert out.count("known from") == 2
    assert [r["accuracies"] for r in json.loads(out.splitlines()[-1])["results"]] == [r["accuracies"] for r in rows]


def test_a_set_of_soft_labels_is_also_trained_on_by_its_hard_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([saved("hard.pt"), *QUICK, "-f", "1", "--json"]) == 0
    hard = last_json(capsys)
    teacher = ["--teacher", saved("teacher.pt", 2)]
    assert train.main([saved("soft.pt", soft=True), *QUICK, "-f", "1", *teacher, "--json"]) == 0
    out = capsys.readouterr().out
    assert "scored by its hard labels" in out and "teacher convnet2, trained on teacher.pt, 2 per class" in out
    ours, own_hard, random, taught, random_taught = json.loads(out.splitlines()[-1])["results"]
    assert own_hard["trained_on"] == "distilled set, hard labels"
    assert own_hard["set"] == hard["set"] and own_hard["set"] != ours["set"]
    assert own_hard["accuracies"] == hard["accuracies"] and own_hard["accuracies"] != ours["accuracies"]
    sizes = [r["stored_bytes"] for r in (ours, own_hard, random, taught, random_taught)]
    assert sizes == [2560 + 400, 2560, 640, 2560 + 400, 640 + 400]
    (comparison,) = ours["scores"]
    assert comparison["ior"] == pytest.approx(own_hard["accuracy_mean"] - random["accuracy_mean"], abs=2e-4)


@pytest.mark.parametrize(
    ("more", "says", "status"),
    [
        (["--scores", "--baselines", "none"], "--scores: compares with random real images", 2),
        (["--teacher", "all", "--baselines", "none"], "--teacher: compares with random real images", 2),
        (["--teacher", "missing.pt"], "missing.pt", 1),
    ],
)
def test_what_cannot_be_compared_is_refused(more: list[str], says: str, status: int, tmp_path: Path) -> None:
    argv = [saved("set.pt"), *QUICK[:-2], "-f", "1", *more]
    refused(train.main, argv, says, status=status, unchanged=tmp_path)


def test_scores_and_teachers_need_a_set(tmp_path: Path) -> None:
    for flag in (["--scores"], ["--teacher", "all"]):
        refused(train.main, ["--real", *flag], f"{flag[0]}: only for a distilled set", status=2, unchanged=tmp_path)


def test_random_images_are_compared_with_in_any_case() -> None:
    assert derived.baselines(TrainOptions(baselines=("kmeans",), scores=True)) == ["random", "kmeans"]
    assert derived.baselines(TrainOptions(baselines=("kmeans", "random"), teacher="all")) == ["random", "kmeans"]
    assert derived.baselines(TrainOptions(baselines=("kmeans",))) == ["kmeans"]
    assert derived.baselines(TrainOptions(baselines=("none",))) == []


def test_a_teacher_s_set_is_of_the_same_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    other = SetFile(Path("data.pt"), torch.zeros(1, 1, 8, 8), torch.zeros(1), card={"dataset": "mnist"})
    monkeypatch.setattr(train, "read_named", lambda name, data_dir: other)
    rows = TrainingDataOf(Dataset("digits", device=CPU), results_dir="results", seed=0, epochs=1)
    with pytest.raises(UserError, match="--teacher run: is a set of mnist; name one of digits, or all"):
        train.teaching_set(TrainOptions(teacher="run"), rows)


# --- Teachers ---------------------------------------------------------------------------------------------------------

SPEC = models.resolve("convnet", channels=1, classes=3, side=8, depth=1, width=4, norm="instance")


def images(count: int = 7) -> ImageSet:
    pixels = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return ImageSet(pixels, torch.arange(count) % 3, classes=3, normalize=Normalize([0.5], [0.2]))


def taught(folder: Path, identity: str, key: int) -> tuple[Teacher, bool]:
    """A teacher, which is trained, if at all, to the network of this key; whether it was trained."""
    trained = []

    def train() -> tuple[models.Network, float]:
        trained.append(key)
        return fresh_network(SPEC, Draws("cpu", key)), float(key)

    data = Dataset("digits", device=CPU)
    learned = TrainingDataOf(data, results_dir=str(folder), seed=0, epochs=1).real(1)
    teacher = Teacher(dataclasses.replace(learned, identity={"images": identity}), {"epochs": 1}, folder, data)
    teacher.learn(SPEC, train, SINGLE)
    return teacher, bool(trained)


def accuracy_of(teacher: Teacher) -> float:
    """What a record of labelled images says of the teacher."""
    accuracy = teacher.labelled(teacher.trained_on).about(SPEC)["teacher"]["accuracy"]
    assert isinstance(accuracy, float)
    return accuracy


def test_a_teacher_gives_probabilities_and_the_classes_stay(tmp_path: Path) -> None:
    teacher, _ = taught(tmp_path, "a", 1)
    given = images()
    labelled, net = teacher.label(SPEC, given), fresh_network(SPEC, Draws("cpu", 1)).eval()
    assert labelled.soft is not None and given.soft is None
    expected = net(given.normalize(given.images)).softmax(1)
    torch.testing.assert_close(labelled.soft, expected)
    assert torch.equal(labelled.labels, given.labels) and torch.equal(labelled.images, given.images)


def test_a_teacher_is_kept_for_the_same_images_network_and_protocol(tmp_path: Path) -> None:
    first, trained = taught(tmp_path, "a", 1)
    again, trained_again = taught(tmp_path, "a", 2)
    other, trained_other = taught(tmp_path, "b", 3)
    assert (trained, trained_again, trained_other) == (True, False, True)
    assert [accuracy_of(teacher) for teacher in (first, again, other)] == [1, 1, 3]
    labels = [teacher.label(SPEC, images()).soft for teacher in (first, again, other)]
    assert labels[0] is not None and labels[1] is not None and labels[2] is not None
    assert torch.equal(labels[0], labels[1]) and not torch.equal(labels[0], labels[2])


@pytest.mark.parametrize("damage", ["bytes", "owner", "shape", "nan", "missing"])
def test_a_damaged_teacher_is_trained_again(tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    taught(tmp_path, "a", 1)
    (file,) = tmp_path.glob("convnet1_*.pt")
    if damage == "bytes":
        file.write_bytes(file.read_bytes()[:100])
    else:
        content = tensors.read_tensors(file, "")
        weights = content["weights"]
        name = next(iter(weights))
        if damage == "owner":
            content["of"] = "another"
        elif damage == "missing":
            del weights[name]
        else:
            weights[name] = weights[name].flatten() if damage == "shape" else weights[name] * math.nan
        tensors.write_tensors(file, content)
    teacher, trained = taught(tmp_path, "a", 2)
    assert trained and accuracy_of(teacher) == 2
    assert not taught(tmp_path, "a", 3)[1]  # the file is whole again
