"""The test split says how good a set is, and nothing else: it has no part in pixels, selection, length of training or
the choice of a number that is reported, but for the one that says so. Shown by other test splits in its place, by one
that cannot be read outside of a test, and by made-up results of tests."""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import condense
import data
import train
from data import Dataset, Split
from models import Network
from tests.files import last_json, noise, quick, save
from tests.outcome import metrics, outcome
from tests.tally import injected
from utils.files import atomic
from utils.method import evaluation
from utils.method.images import ImageSet
from utils.method.selection import STRATEGIES
from utils.numerics.compute import Compute
from utils.system import process

pytestmark = pytest.mark.faults

CPU = torch.device("cpu")
SMALL = shlex.split(
    "--niter 2 --inner_loop 2 --batch_real 4 --ipc 2 -f 2 --epochs 2 --repeat 2 --eval_every 1 --snapshot_every 1"
)


def distil(results: Path, *flags: str) -> Path:
    """condense.py in this process, evaluating and copying the set after every outer iteration; the run folder."""
    assert condense.main(quick(results, *SMALL, *flags)) == 0
    return next(results.glob("*/*"))


def replace_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another test split for digits: noise, other labels, another number of images."""
    info = data.DATASETS["digits"]

    def load(data_dir: Path, train: bool) -> Split:
        images, labels, names = data.load_digits(data_dir, train)
        if not train:
            images = torch.from_numpy(noise(123, *images.shape[1:], seed=9))
            labels = torch.from_numpy(np.random.default_rng(9).permutation(123) % len(names))
        return images, labels, names

    monkeypatch.setitem(data.DATASETS, "digits", dataclasses.replace(info, load=load))


# --- Another test split -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "strategy", [pytest.param(s, marks=[] if s == "kmeans" else pytest.mark.slow) for s in STRATEGIES]
)
def test_the_test_split_changes_accuracies_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str) -> None:
    expected = outcome(distil(tmp_path / "real", "--select", strategy))
    with injected("test split replaced by noise") as fault:
        replace_digits(monkeypatch)
        found = outcome(distil(tmp_path / "noise", "--select", strategy))
        assert fault.kept(found.distilled == expected.distilled)
        assert {"data.pt", "data_000000.pt", "data_000001.pt", "data_000002.pt"} <= expected.files.keys()
        for ours, other in zip(found.accuracies, expected.accuracies, strict=True):
            assert ours != other


def folder_with_test(root: Path, brightness: tuple[int, int], count: int) -> Path:
    """Dark training images, always the same, and `count` test images per class within the given brightness."""
    shutil.rmtree(root, ignore_errors=True)
    for c, name in enumerate(("cat", "dog")):
        for i in range(6):
            save(root / "train" / name / f"{i}.png", noise(8, 8, 3, seed=100 * c + i) // 4)
        for i in range(count):
            pixels = np.random.default_rng(1000 * c + i).integers(*brightness, (8, 8, 3), dtype=np.uint8)
            save(root / "test" / name / f"{i}.png", pixels)
    return root


def test_another_test_folder_changes_no_statistics_and_nothing_else_of_a_distillation(tmp_path: Path) -> None:
    outcomes, cards = [], []

    def distilled(brightness: tuple[int, int], count: int) -> None:
        root = folder_with_test(tmp_path / "images", brightness, count)
        folder = distil(tmp_path / f"results_{count}", "--image_folder", str(root))
        outcomes.append(outcome(folder))
        cards.append(json.loads((folder / "data.json").read_text()))

    distilled((0, 64), 5)
    with injected("test split replaced by noise") as fault:
        distilled((128, 256), 9)
        assert fault.kept(outcomes[0].distilled == outcomes[1].distilled)
        assert outcomes[0].accuracies != outcomes[1].accuracies
    x = np.stack([noise(8, 8, 3, seed=100 * c + i) // 4 for c in range(2) for i in range(6)]) / 255
    statistics_of_training = {"mean": x.mean((0, 1, 2)).tolist(), "std": x.std((0, 1, 2)).tolist()}
    for card in cards:
        assert card["normalization"] == {k: pytest.approx(v) for k, v in statistics_of_training.items()}


# --- A sealed test split ----------------------------------------------------------------------------------------------


class Sealed:
    """A test split of which, outside of a test, only size and shape can be read."""

    tests_under_way = 0

    def __init__(self, whole: ImageSet) -> None:
        self.whole = whole

    def __len__(self) -> int:
        return len(self.whole)

    def __getattr__(self, name: str) -> Any:
        if Sealed.tests_under_way or name in ("classes", "side", "device"):
            return getattr(self.whole, name)
        raise AssertionError(f"{name} of the test split was read, and no network is being tested")


def seal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every Dataset's test split is sealed from now on but for the time of a confusion matrix or a digest."""
    whole = Dataset.__dict__["test"].func

    def unsealed(function: Any) -> Any:
        def called(*given: Any) -> Any:
            Sealed.tests_under_way += 1
            try:
                return function(*given)
            finally:
                Sealed.tests_under_way -= 1

        return called

    monkeypatch.setattr(Dataset, "test", property(lambda dataset: Sealed(whole(dataset))))
    monkeypatch.setattr(evaluation, "confusion_matrix", unsealed(evaluation.confusion_matrix))
    monkeypatch.setattr(data, "digest", unsealed(data.digest))


def test_the_test_split_is_read_while_a_network_is_tested_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = outcome(distil(tmp_path / "open"))
    with injected("test split sealed outside of tests") as fault:
        seal(monkeypatch)
        with pytest.raises(AssertionError, match="labels of the test split was read"):
            _ = Dataset("digits", device=CPU).test.labels
        folder = distil(tmp_path / "sealed")
        assert fault.kept(outcome(folder) == expected)
        argv = shlex.split(f"--device cpu --epochs 1 --repeat 1 --width 4 --results_dir {tmp_path}")
        assert train.main([*argv, str(folder), "--baselines", *STRATEGIES, "--real"]) == 0
        assert train.main([*argv, "--coreset", "kmeans", "--ipc", "3"]) == 0
        assert train.main([*argv, str(folder), "--export", str(tmp_path / "exported")]) == 0


# --- Made-up results --------------------------------------------------------------------------------------------------


class Examiner:
    """Stands in for the test of networks: makes up how many images each gets right, and takes notes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, right: Iterable[int]) -> None:
        self.right = iter(right)
        self.tested: list[tuple[Network, list[float]]] = []  # with its results in per cent
        monkeypatch.setattr(evaluation, "confusion_matrix", self.test)

    def test(self, net: Network, test: ImageSet, compute: Compute) -> Tensor:
        right, classes = next(self.right), test.classes
        if not any(net is other for other, _ in self.tested):
            self.tested.append((net, []))
        (results,) = (results for other, results in self.tested if net is other)
        results.append(round(100 * right / len(test), 4))
        matrix = torch.zeros(classes, classes, dtype=torch.int64)
        matrix[0, 0], matrix[0, 1] = right, len(test) - right
        return matrix

    def groups(self, repeat: int) -> list[list[list[float]]]:
        """The results of every network, by evaluation."""
        results = [results for _, results in self.tested]
        return [results[i : i + repeat] for i in range(0, len(results), repeat)]


FALLING, RISING = range(440, 0, -7), range(1, 450, 7)  # of 450 images; 63 tests at least


def matches(record: dict[str, Any], results: list[list[float]]) -> bool:
    """Whether a record reports the last result of every network, and apart from it the best, with mean and spread."""

    def reports(entries: dict[str, Any], accuracies: list[float]) -> bool:
        """Exactly these, and their mean and spread rounded to four places."""
        spread = (entries["accuracy_mean"], entries["accuracy_std"])
        expected = (statistics.fmean(accuracies), statistics.stdev(accuracies))
        return (entries["accuracies"], entries["n"]) == (accuracies, len(accuracies)) and spread == pytest.approx(
            expected, abs=2e-4
        )

    last, best = [tests[-1] for tests in results], [max(tests) for tests in results]
    return reports(record, last) and reports(record["best_of_four"], best)


def test_the_last_test_of_every_network_is_reported_and_the_best_only_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether results get worse or better on the way, accuracies are those of the last epoch and evaluation."""
    runs = []
    for right in (FALLING, RISING):
        with monkeypatch.context() as patch, injected("made-up test results") as fault:
            examiner = Examiner(patch, right)
            folder = distil(tmp_path / str(right.step), "--repeat", "3", "--epochs", "5")
            start, middle, random, end = examiner.groups(3)
            assert all(len(results) == 4 for results in end)
            card = json.loads((folder / "data.json").read_text())
            events = [event for event in metrics(folder) if "accuracy_mean" in event]
            assert fault.kept(matches(card["accuracy"], end) and matches(card["random_real"], random))
            assert all(matches(event, group) for event, group in zip(events, (start, middle, end), strict=True))
            runs.append(outcome(folder).distilled)
    assert runs[0] == runs[1]


def test_a_table_holds_all_trainings_of_a_row_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = distil(tmp_path / "results", "--eval_every", "0")
    for right in (FALLING, RISING):
        with monkeypatch.context() as patch, injected("made-up test results") as fault:
            examiner = Examiner(patch, right)
            argv = ["--device", "cpu", str(folder), "--epochs", "3", "--repeat", "3", "--retrain", "--width", "4"]
            assert train.main([*argv, "--baselines", "random"]) == 0
            records = atomic.read_json(folder / "eval.json")["results"]
            rows = zip(records, examiner.groups(3), strict=True)
            assert fault.kept(all(matches(record, group) for record, group in rows)) and len(records) == 3


def test_fewer_trainings_than_are_known_are_the_first_ones_not_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    versions = {**process.versions(), "git_commit": "0123456789abcdef"}
    monkeypatch.setattr(process, "versions", lambda: versions)
    argv = ["--device", "cpu", "--results_dir", str(tmp_path), "--real", "--epochs", "2", "--width", "4", "--json"]
    for right in (FALLING, RISING):
        with monkeypatch.context() as patch:
            examiner = Examiner(patch, right)
            assert train.main([*argv, "--repeat", "3", "--retrain"]) == 0
            assert train.main([*argv, "--repeat", "2"]) == 0
        (results,) = examiner.groups(3)
        assert matches(last_json(capsys), results[:2])
