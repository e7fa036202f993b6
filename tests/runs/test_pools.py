"""Runs on a pool of networks: one pool for all methods, resuming bit for bit, budgets in seconds, and errors."""

from __future__ import annotations

import json
import math
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import condense
from tests.distilling import STOPPED, distilled, signals
from tests.files import image_folder, quick, refused, tree
from tests.outcome import metrics, outcome
from utils.config import build, derived, resolve
from utils.config.experts import experts_of
from utils.files import atomic, tensors
from utils.method.matching import MatchingStep
from utils.runs import recorder
from utils.runs.folder import CHECKPOINT, OPTIONS
from utils.runs.recorder import next_doubling

POOL = ["--experts", "2", "--expert_epochs", "2"]
STEPS = shlex.split("--niter 2 --inner_loop 3 --interval 2 --batch_real 4")


def argv(results: Path, flags: str = "", *more: str) -> list[str]:
    """A command on the few images beside the results."""
    words = [*STEPS, *POOL, "--image_folder", str(results.parent / "photos"), *shlex.split(flags), *more]
    return quick(results, *words)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    image_folder(tmp_path / "photos", {"a": 12, "b": 9, "c": 14}, {"a": 1, "b": 1, "c": 1})
    return tmp_path / "results"


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results folder with a finished pool, whose two networks took a second each by its files."""
    folder = tmp_path_factory.mktemp("pool")
    image_folder(folder / "photos", {"a": 12, "b": 9, "c": 14}, {"a": 1, "b": 1, "c": 1})
    assert condense.main(argv(folder / "results", "--networks middle --experts_only")) == 0
    for file in folder.rglob("expert_*.pt"):
        tensors.write_tensors(file, {**tensors.read_tensors(file, ""), "seconds": 1.0})
    return folder / "results"


def distil(results: Path, flags: str, *more: str, stops: tuple[int, ...] = ()) -> Path:
    """The run folder of a run on the pool that is there."""
    found = distilled(results, argv(results, flags, *more), *stops)
    assert len(list(results.glob("folder/pool_*"))) == 1
    return found


# --- One pool for all -------------------------------------------------------------------------------------------------


def needed(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Name of the folder of experts that --dry_run shows."""
    assert condense.main([*words, "--dry_run"]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("experts  ") and "/" in line)
    return Path(line.split()[1]).name


def test_a_pool_is_shared_by_runs_that_train_it_alike(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shared = {
        needed(argv(results, flags), capsys)
        for flags in (
            "--networks early", "--method dance --seed 3", "--keep 0.5 --batch_real 16 --select random --ipc 3",
            "--method ncfm -f 2 --experts 7 --epochs 9 --n_data 4",
        )
    }  # fmt: skip
    others = {
        needed(argv(results, f"--networks early {flags}"), capsys)
        for flags in (
            "--lr 0.02",
            "--expert_epochs 3",
            "--expert_seed 1",
            "--width 4",
            "--whiten zca",
            "--mixup vanilla",
        )
    }
    assert len(shared) == 1 and len(others) == 6 and not shared & others
    assert all(name.startswith("pool_convnet2_") for name in shared) and not results.exists()


def test_experts_of_trajectories_are_where_they_always_were(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert needed(quick(tmp_path, "--method", "mtt"), capsys) == "experts_convnet2_random_c9cb83e3"
    assert (
        needed(quick(tmp_path, "--method", "mtt", "--select", "kmeans"), capsys) == "experts_convnet2_kmeans_0a1bd27e"
    )


# --- Resuming ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        "--method dance --n_data 8",
        "--networks early --select members --keep 0.5 --average 0.9 --lr_img_end 0.1 -f 2",
        pytest.param("--keep 0.5 --match feat", marks=pytest.mark.slow),
        pytest.param("--method ncfm --frequency_count 8 --n_data 8", marks=pytest.mark.slow),
    ],
)
def test_a_stopped_and_resumed_run_equals_an_uninterrupted_one(pool: Path, flags: str) -> None:
    whole, parts = distil(pool, flags, "--tag", "whole"), distil(pool, flags, "--tag", "parts", stops=(2, 5))
    assert outcome(parts) == outcome(whole)
    card = json.loads((whole / "data.json").read_text())
    assert card["expert_seconds"] == 2 and card["learned"] == {}
    for folder in (whole, parts):
        shutil.rmtree(folder)


def test_a_run_of_a_version_without_the_newer_options_goes_on(results: Path) -> None:
    newer = {"networks", "keep", "frequencies", "frequency_count", "calibrate", "lr_img_end", "average", "seconds"}
    words = argv(results, "--method dm")
    with signals(2):
        assert condense.main(words) == STOPPED
    (folder,) = (results / "folder").iterdir()
    for name in (CHECKPOINT, "checkpoint_previous.pt"):
        saved = tensors.read_tensors(folder / name, "")
        record = json.loads(saved["record"])
        record["options"] = {k: v for k, v in record["options"].items() if k not in newer}
        tensors.write_tensors(folder / name, {**saved, "record": json.dumps(record)})
    atomic.write_json(folder / OPTIONS, record)
    refused(condense.main, [*words, "--average", "0.5"], "--average 0.0 there, 0.5 here", status=2, unchanged=folder)
    assert condense.main(words) == 0
    assert outcome(folder) == outcome(distilled(results, [*words, "--tag", "whole"]))


def test_a_run_begins_with_another_s_pixels_frequencies_and_average(pool: Path) -> None:
    flags = "--method ncfm --frequency_count 8 --average 0.5"
    first = distil(pool, flags, "--tag", "first")
    there = torch.load(first / CHECKPOINT, weights_only=True)
    assert not torch.equal(there["average"], there["pixels"])
    stored = torch.load(first / "data.pt", weights_only=True)[0]
    assert torch.equal(stored.view_as(there["average"]), there["average"].clamp(0, 1))
    again = ["--resume_from", str(first), "--niter", "3", "--tag", "again"]
    with signals(1):
        assert condense.main(argv(pool, flags, *again)) == STOPPED
    here = torch.load(first.with_name("convnet2_f1_ipc1_ncfm_again") / "checkpoint_previous.pt", weights_only=True)
    for name in ("pixels", "velocity"):
        assert torch.equal(here[name], there[name])
    assert torch.equal(here["average"], there["pixels"])
    assert torch.equal(here["learned"]["frequencies"], there["learned"]["frequencies"])
    other = f"--match cf --frequencies learned --width 4 --niter 3 --resume_from {first}"
    assert condense.main(argv(pool, other)) == 0  # with frequencies of another shape


# --- Budgets in seconds -----------------------------------------------------------------------------------------------


@pytest.fixture
def second_per_step(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A clock by which a step on the pixels takes a second, and all else no time."""
    now, step = [0.0], MatchingStep.__call__

    class Clock:
        @staticmethod
        def monotonic() -> float:
            return now[0]

    def timed(self: MatchingStep, *words: Any) -> Any:
        now[0] += 1
        return step(self, *words)

    monkeypatch.setattr(recorder, "time", Clock)
    monkeypatch.setattr(MatchingStep, "__call__", timed)
    yield


def evaluated(folder: Path) -> list[float]:
    """Seconds of distilling at every evaluation."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [event["seconds"] for event in lines if "accuracy_mean" in event]


def test_a_run_ends_when_its_seconds_are_spent_and_is_evaluated_whenever_they_double(
    results: Path, second_per_step: None, capsys: pytest.CaptureFixture[str]
) -> None:
    words = argv(results, "--method dm --niter 100 --seconds 10 --eval_seconds 1.5 --inner_loop 3")
    whole = distilled(results, words)
    assert "for the steps that are left" not in capsys.readouterr().out  # of which most are not taken
    assert evaluated(whole) == [2, 3, 6, 10]
    card = json.loads((whole / "data.json").read_text())
    assert (card["finished"], card["outer_iterations"], card["seconds"]) == (True, 3, 10)
    assert "expert_seconds" not in card
    parts = distilled(results, [*words, "--tag", "parts"], 5)
    assert evaluated(parts) == evaluated(whole) and outcome(parts) == outcome(whole)
    stopped = distilled(results, [*words, "--tag", "stopped"], 2, during="evaluation")
    assert evaluated(stopped) == [2, 4, 6, 10]  # the second one was stopped, and repeated after the next step
    capsys.readouterr()
    before = tree(whole)
    assert condense.main(words) == 0
    assert "is finished" in capsys.readouterr().out and tree(whole) == before


def test_a_run_whose_experts_took_its_seconds_says_so_and_distils_nothing(
    pool: Path, second_per_step: None, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = distil(pool, "--method dance --seconds 1e-6 --tag spent")
    assert "the experts alone have taken" in capsys.readouterr().out
    assert not [event for event in metrics(folder) if "loss" in event]
    later = distil(pool, "--method dance --niter 9 --eval_seconds 3.5 --seconds 8 --tag later")
    assert evaluated(later) == [2, 5, 6]  # of distilling alone


def test_doublings() -> None:
    assert [next_doubling(3.0, after) for after in (0.0, 2.9, 3.0, 6.0, 100.0)] == [3, 3, 6, 12, 192]


# --- Errors -----------------------------------------------------------------------------------------------------------


def test_a_pool_that_is_damaged_while_distilling_is_named_with_the_remedy(pool: Path, tmp_path: Path) -> None:
    missing, results = build.Experts.missing, tmp_path / "results"
    shutil.copytree(pool, results)

    def spoiling(self: build.Experts) -> list[int]:
        found = missing(self)
        self._at_hand.clear()
        for file in self.folder.glob("expert_*.pt"):
            file.write_bytes(b"PK\3\4")
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build.Experts, "missing", spoiling)
        words = argv(pool, "--networks early --tag damaged", "--results_dir", str(results))
        says = ("expert_00", "run the same command again")
        refused(condense.main, words, *says, status=1, unchanged=pool.parent / "photos")


# --- Images that matter -----------------------------------------------------------------------------------------------


def test_a_run_uses_the_images_of_lowest_loss_and_compares_with_random_ones_of_all(pool: Path) -> None:
    o = resolve.condense(argv(pool, "--keep 0.3 --networks middle"), "").options
    problem = build.problem(o)
    experts = experts_of(o, problem)
    assert experts is not None
    parts, everything = build.Parts(o, problem, experts=experts), problem.data.train
    losses = torch.stack([experts.losses(k) for k in range(2)]).mean(0).tolist()
    expected = []
    for start, count in zip(everything.starts, everything.counts, strict=True):
        ranked = sorted(range(start, start + count), key=lambda i: losses[i])
        expected += sorted(ranked[: math.ceil(0.3 * count)])
    assert parts.counts == [4, 3, 5] and parts.real.counts == parts.counts
    assert torch.equal(parts.real.images, everything.images[expected])
    state = parts.state(None)
    kept = {image.numpy().tobytes() for image in parts.real.images}
    assert {(255 * x).round().to(torch.uint8).numpy().tobytes() for x in state.pixels.flatten(0, 1)} <= kept
    assert len(state.trainer) == len(parts.real) and state.matching_step.real is parts.real
    random = {image.numpy().tobytes() for r in range(20) for image in parts.random_real(r).images}
    assert not random <= kept


def test_the_pixel_rate_falls_along_half_a_cosine(pool: Path) -> None:
    falling, constant = (
        [
            derived.pixel_rate(o, side=8, base_side=8, it=it)
            for o in [resolve.condense(argv(pool, f"--niter 10 --lr_img 0.5 {flags}"), "").options]
            for it in range(10)
        ]
        for flags in ("--lr_img_end 0.1", "")
    )
    first = constant[0]
    assert constant == [first] * 10
    assert falling == pytest.approx([first * (0.1 + 0.9 * (1 + math.cos(math.pi * it / 10)) / 2) for it in range(10)])
