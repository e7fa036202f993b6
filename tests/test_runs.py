"""Both commands as a user runs them, on tiny settings: results, resuming, stopping."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import condense
import models
import train
from data import Dataset
from models import Network
from tests.files import last_json
from tests.oracle import PublishedPixels
from tests.tally import injected
from utils.files import atomic
from utils.method.augment import Augment
from utils.method.selection import Context, initial_pixels, select
from utils.method.training import Recipe, Trainer, fresh_network, update_network
from utils.numerics.compilation import compiler_error
from utils.numerics.compute import Compute
from utils.system.draws import Draws
from utils.system.errors import UsageError

ROOT = Path(__file__).resolve().parent.parent
TINY = shlex.split(
    "--device cpu --ipc 2 -f 2 --niter 3 --inner_loop 4 --interval 2 --batch_real 8 --n_data 16 --batch_syn_max 6 "
    "--width 8 --epochs 2 --repeat 2"
)


def run(results: Path, *more: str) -> Path:
    """condense.py on digits in this process; the run folder."""
    assert condense.main([*TINY, "--results_dir", str(results), *more]) == 0
    return next((results / "digits").iterdir())


def command(results: Path, *more: str) -> list[str]:
    return [sys.executable, str(ROOT / "condense.py"), *TINY, "--results_dir", str(results), *more]


def events(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def metrics(folder: Path) -> list[dict[str, object]]:
    """All events but those that say that a session began."""
    return [event for event in events(folder) if "session" not in event]


def without_time(events: list[dict[str, object]]) -> list[dict[str, object]]:
    return [{k: v for k, v in event.items() if "seconds" not in k} for event in events]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("results"), "--eval_every", "2")


def test_a_run_leaves_what_the_readme_lists(finished: Path) -> None:
    assert finished.name == "convnet2_f2_ipc2"
    pictures = {f"{what}_{when}.png" for what in ("stored", "decoded") for when in ("initial", "latest", "final")}
    expected = {"options.json", "metrics.jsonl", "log.txt", "checkpoint.pt", "data.pt", "data.json", *pictures}
    expected |= {"checkpoint_previous.pt"}
    assert {p.name for p in finished.iterdir()} == expected
    for name in pictures:
        with Image.open(finished / name) as image:
            columns = 2 if name.startswith("stored") else 8
            assert image.size == (columns * 34 + 2, 10 * 34 + 2)
    assert "python3" not in (finished / "log.txt").read_text() and "condense.py" in (finished / "log.txt").read_text()


def test_data_pt_is_a_plain_list_of_images_and_labels(finished: Path) -> None:
    images, labels = torch.load(finished / "data.pt", weights_only=True)
    assert images.shape == (20, 1, 8, 8) and images.dtype == torch.float32
    assert images.min() >= 0 and images.max() <= 1
    assert labels.tolist() == [c for c in range(10) for _ in range(2)]


def test_data_json_says_how_to_use_the_set(finished: Path) -> None:
    card = json.loads((finished / "data.json").read_text())
    expected = {
        "dataset": "digits", "ipc": 2, "factor": 2, "decode_type": "single", "decoded_per_class": 8, "shape": [1, 8, 8],
        "value_range": [0.0, 1.0], "normalized": False, "finished": True, "outer_iterations": 3,
    }  # fmt: skip
    assert {k: card[k] for k in expected} == expected
    assert card["normalization"] == {"mean": [0.3053], "std": [0.3758]}
    assert card["class_names"] == [str(c) for c in range(10)]
    assert card["accuracy"]["n"] == card["random_real"]["n"] == 2
    assert card["settings"]["lr_img"] > 0


def test_metrics_are_one_json_object_per_event(finished: Path) -> None:
    events = metrics(finished)
    assert [e["iteration"] for e in events if "loss" in e] == [1, 2, 3]
    assert [e["iteration"] for e in events if "accuracy_mean" in e] == [0, 2, 3]
    assert all(isinstance(e["seconds"], float) for e in events)


def test_options_json_says_what_ran_where(finished: Path) -> None:
    found = json.loads((finished / "options.json").read_text())
    assert found["options"]["niter"] == 3 and found["options"]["seed"] == 0 and "data_dir" in found["options"]
    about = found["sessions"][0]
    assert about["versions"]["torch"] == torch.__version__ and "git_commit" in about["versions"] and about["started"]
    assert "CPU" in about["device"] and about["command"].startswith("condense.py")


def test_the_same_command_gives_the_same_file_bit_for_bit_and_another_seed_does_not(
    finished: Path, tmp_path: Path
) -> None:
    again = run(tmp_path / "again", "--eval_every", "2")
    assert (again / "data.pt").read_bytes() == (finished / "data.pt").read_bytes()
    assert without_time(metrics(again)) == without_time(metrics(finished))
    other = run(tmp_path / "other", "--eval_every", "2", "--seed", "1")
    assert (other / "data.pt").read_bytes() != (finished / "data.pt").read_bytes()


def test_the_main_loop_is_the_published_algorithm(tmp_path: Path) -> None:
    """Two outer iterations of condense.py against the naive loop: when it selects, clamps, renews and keeps what."""
    argv = [*TINY, "--niter", "2", "--lr_img", "0.2", "--batch_syn_max", "128"]
    data = run(tmp_path, *argv) / "data.pt"
    dataset = Dataset("digits", device=torch.device("cpu"))
    real, normalize = dataset.train, dataset.normalize
    spec = models.resolve("convnet", channels=1, classes=10, side=8, depth=2, width=8)

    def draws(purpose: str, *position: int) -> Draws:
        return Draws("cpu", 0, purpose, *position)

    compute = Compute(torch.device("cpu"))

    def chosen_by(net: Network, draws: Draws) -> Context:
        return Context(net, real, draws, compute.cheapest())

    first = draws("init")
    start = initial_pixels(chosen_by(fresh_network(spec, first), first), "kmeans", ipc=2, factor=2)
    published = PublishedPixels(start, lr=0.2 * 2 / 10, momentum=0.5)
    update = Recipe(batch_size=8, augment=Augment("color_crop"), mixup="cut")
    clamped = 0
    for it in range(2):
        net = fresh_network(spec, draws("network", it))
        trainer = Trainer([net], [real], update, compute)
        clamped += int(((published.pixels < 0) | (published.pixels > 1)).sum())
        published.pixels.data.clamp_(0, 1)
        for step in range(4):
            if step in (0, 2):
                picks = select(chosen_by(net, draws("select", it, step)), 8, strategy="kmeans")
            augment = Augment("color_crop_cutout")
            published.inner_step(
                net, real, picks, augment.draw_shared(10, draws("match", it, step)),
                factor=2, names=augment.names, geometries=augment.geometries, metric="mse", match="grad",
                normalize=normalize,
            )  # fmt: skip
            update_network(trainer, n_data=16, draws=draws("update", it, step))
    assert clamped > 50  # so that a clamp at another moment would show
    images, _ = torch.load(data, weights_only=True)
    expected = published.pixels.detach().clamp(0, 1).flatten(0, 1)
    assert (expected - start.flatten(0, 1)).abs().max() > 0.1
    torch.testing.assert_close(images, expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("stop_after", [1, 4, 6, 11])
def test_a_stopped_and_resumed_run_equals_an_uninterrupted_one(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stop_after: int
) -> None:
    steps = 0
    original = condense.Job.after_step

    def after_step(job: condense.Job, state: condense.State) -> None:
        nonlocal steps
        steps += 1
        if steps == stop_after:
            job.stopper.signal = signal.SIGTERM
        original(job, state)

    monkeypatch.setattr(condense.Job, "after_step", after_step)
    argv = [*TINY, "--results_dir", str(tmp_path), "--eval_every", "2"]
    assert condense.main(argv) == 128 + signal.SIGTERM
    assert "run the same command again to go on" in capsys.readouterr().out
    folder = tmp_path / "digits" / finished.name
    assert json.loads((folder / "data.json").read_text())["finished"] is False
    assert condense.main(argv) == 0
    position = f"going on after outer iteration {stop_after // 4}, inner step {stop_after % 4} of 4"
    assert position in capsys.readouterr().out
    assert (folder / "data.pt").read_bytes() == (finished / "data.pt").read_bytes()
    assert without_time(metrics(folder)) == without_time(metrics(finished))


def test_a_stop_during_an_evaluation_loses_nothing(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = [*TINY, "--results_dir", str(tmp_path), "--eval_every", "2"]
    with monkeypatch.context() as patch:
        original = condense.Job.evaluate_at

        def evaluate_at(job: condense.Job, it: int, state: condense.State) -> object:
            if it == 2:
                job.stopper.signal = signal.SIGINT
            return original(job, it, state)

        patch.setattr(condense.Job, "evaluate_at", evaluate_at)
        assert condense.main(argv) == 130
    assert condense.main(argv) == 0
    folder = tmp_path / "digits" / finished.name
    assert (folder / "data.pt").read_bytes() == (finished / "data.pt").read_bytes()
    assert without_time(metrics(folder)) == without_time(metrics(finished))


@pytest.mark.parametrize("evaluation", [3, 4])
def test_a_stop_during_the_last_two_evaluations_does_not_log_twice(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, evaluation: int
) -> None:
    argv = [*TINY, "--results_dir", str(tmp_path), "--eval_every", "2"]
    with monkeypatch.context() as patch:
        original, count = condense.Job.evaluate, itertools.count(1)

        def evaluate(job: condense.Job, *rest: Any) -> object:
            if next(count) == evaluation:
                job.stopper.signal = signal.SIGTERM
            return original(job, *rest)

        patch.setattr(condense.Job, "evaluate", evaluate)
        assert condense.main(argv) == 128 + signal.SIGTERM
    assert condense.main(argv) == 0
    assert without_time(metrics(tmp_path / "digits" / finished.name)) == without_time(metrics(finished))


def test_a_finished_run_says_so_and_computes_nothing(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(condense, "condense", lambda *a: pytest.fail("it is finished"))
    run(finished.parent.parent, "--eval_every", "2")
    out = capsys.readouterr().out
    assert "is finished" in out and "random real images" in out and str(finished) in out


def test_another_command_for_the_same_folder_is_refused_and_restart_begins_again(tmp_path: Path) -> None:
    folder = run(tmp_path)
    before = (folder / "data.pt").read_bytes()
    with pytest.raises(UsageError, match=r"--lr_img .* there, 0.5 here.*--tag.*--restart"):
        run(tmp_path, "--lr_img", "0.5")
    assert (folder / "data.pt").read_bytes() == before
    run(tmp_path, "--lr_img", "0.5", "--restart")
    assert (folder / "data.pt").read_bytes() != before
    assert run(tmp_path, "--tag", "mine", "--lr_img", "0.1").parent == folder.parent
    assert (tmp_path / "digits" / "convnet2_f2_ipc2_mine").is_dir()


def test_a_folder_that_is_no_run_is_left_alone(tmp_path: Path) -> None:
    precious = tmp_path / "digits" / "convnet2_f2_ipc2" / "thesis.tex"
    precious.parent.mkdir(parents=True)
    precious.write_text("done")
    with pytest.raises(UsageError, match="no run folder"):
        run(tmp_path)
    run(tmp_path, "--restart")
    assert precious.read_text() == "done"


def test_a_time_limit_stops_cleanly_and_the_same_command_goes_on(finished: Path, tmp_path: Path) -> None:
    for _ in range(200):
        assert (
            condense.main([*TINY, "--results_dir", str(tmp_path), "--eval_every", "2", "--max_minutes", "0.0001"]) == 0
        )
        folder = tmp_path / "digits" / finished.name
        if json.loads((folder / "data.json").read_text())["finished"]:
            break
    assert (folder / "data.pt").read_bytes() == (finished / "data.pt").read_bytes()


def test_a_write_that_dies_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "x.json"
    atomic.write_json(file, {"a": 1})

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        atomic.write_json(file, {"a": 2})
    assert atomic.read_json(file) == {"a": 1}
    assert list(tmp_path.iterdir()) == [file]


def test_what_a_process_killed_in_a_write_leaves_is_taken_over(tmp_path: Path) -> None:
    folder = tmp_path / "digits" / "convnet2_f2_ipc2"
    folder.mkdir(parents=True)
    for name in (".lock", ".options.json.part", ".checkpoint.pt.part"):
        (folder / name).write_bytes(b"half a")
    run(tmp_path, "--niter", "1")
    assert not list(folder.glob(".*"))


def test_a_dry_run_prints_every_option_with_its_origin_and_touches_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "results"
    argv = ["--reproduce", "-d", "cifar10", "-f", "2", "--ipc", "10", "--dry-run", "--results_dir", str(results)]
    assert condense.main([*argv, "--data_dir", str(tmp_path / "nowhere")]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["niter", "2000", "--reproduce"] in lines and ["lr_img", "0.005", "data", "set"] in lines
    assert ["ipc", "10", "flag"] in lines and ["run", "folder", str(results / "cifar10/convnet3_f2_ipc10")] in lines
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "more",
    [
        ["--select", "random", "--init", "random"],
        ["--match", "feat", "--init", "noise"],
        ["--metric", "cos", "--bias", "--fc", "--norm_type", "none"],
        ["--metric", "l1", "--decode_type", "multi", "--cluster_raw"],
        ["--decode_type", "bound", "-n", "resnet10", "--depth", "10", "--n_data", "0"],
        pytest.param(
            ["-n", "densenet", "--depth", "121", "--aug_type", "none", "--mixup_net", "vanilla"],
            marks=pytest.mark.slow,
        ),
        ["--kmeans", "sklearn", "--norm_type", "group"],
        ["--precision", "bf16", "--bias", "--norm_type", "batch"],
        ["--aug_type", "flip_crop_scale_rotate_translate", "--norm_type", "layer", "--net_epoch", "2"],
    ],
    ids=" ".join,
)
def test_every_choice_of_the_method_runs(tmp_path: Path, more: list[str]) -> None:
    argv = [*TINY, "--niter", "1", "--inner_loop", "2", "--ipc", "1", "--epochs", "1", "--repeat", "1", "--width", "4"]
    assert condense.main([*argv, "--results_dir", str(tmp_path), *more]) == 0


# --- Precision and compilation ----------------------------------------------------------------------------------------


def settings(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "data.json").read_text())["settings"]
    assert isinstance(found, dict)
    return found


def test_a_run_ends_with_the_peak_of_its_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, "--niter", "1")
    assert re.fullmatch(r"peak memory: [\d.]+ GB", capsys.readouterr().out.splitlines()[-1])


def test_a_run_in_bfloat16_repeats_bit_for_bit_and_is_evaluated_in_float32(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, again = (run(tmp_path / name, "--eval_every", "2", "--precision", "bf16") for name in ("first", "again"))
    assert (first / "data.pt").read_bytes() == (again / "data.pt").read_bytes()
    assert (first / "data.pt").read_bytes() != (finished / "data.pt").read_bytes()
    assert without_time(metrics(first)) == without_time(metrics(again))
    assert settings(first)["precision"] == "bf16" and settings(finished)["precision"] == "fp32"
    card = json.loads((first / "data.json").read_text())
    capsys.readouterr()
    results = []
    for more in ([], ["--precision", "bf16"]):
        assert train.main(["--device", "cpu", str(first), "--json", *more]) == 0
        results.append(last_json(capsys))
    protocols = [json.loads(json.dumps(r["results"]))[0]["protocol"] for r in results]
    assert [protocol["precision"] for protocol in protocols] == ["fp32", "bf16"]
    assert results[0]["accuracies"] == card["accuracy"]["accuracies"]


def test_scikit_learn_s_k_means_runs_and_selects_by_itself(finished: Path, tmp_path: Path) -> None:
    folder = run(tmp_path, "--eval_every", "2", "--kmeans", "sklearn")
    assert settings(folder)["kmeans"] == "sklearn"
    assert (folder / "data.pt").read_bytes() != (finished / "data.pt").read_bytes()


def test_tf32_is_refused_on_a_cpu(tmp_path: Path) -> None:
    for main in (condense.main, train.main):
        argv = ["--device", "cpu", "--precision", "tf32", "--results_dir", str(tmp_path)]
        with pytest.raises(UsageError, match="--precision tf32: only NVIDIA GPUs"):
            main([*argv, "--real"] if main is train.main else argv)
    assert not list(tmp_path.iterdir())


def test_compilation_without_a_compiler_is_refused_when_it_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("utils.numerics.compilation.compiler_error", lambda device: "no compiler")
    with pytest.raises(UsageError, match=r"--compile on: no compiler; install .* or use --compile auto"):
        run(tmp_path, "--compile", "on")


def test_compilation_without_a_compiler_is_left_out_when_it_is_up_to_the_program(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("utils.numerics.compilation.compiler_error", lambda device: "no compiler")
    monkeypatch.setattr("utils.numerics.compilation.WORTH_COMPILING", {"cpu": 0.0})
    folder = run(tmp_path, "--eval_every", "2", "--compile", "auto")
    assert "not compiled (no compiler): slower" in capsys.readouterr().out
    assert (folder / "data.pt").read_bytes() == (finished / "data.pt").read_bytes()


def test_the_compiler_is_not_asked_where_the_work_is_not_worth_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("utils.numerics.compilation.compiler_error", lambda device: pytest.fail("it takes seconds"))
    for choice in ("auto", "off"):
        run(tmp_path, "--niter", "1", "--tag", choice, "--compile", choice)
    assert "compiled" not in capsys.readouterr().out


def test_a_run_may_go_on_with_another_choice_of_compilation_but_not_of_the_method(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = [*TINY, "--results_dir", str(tmp_path), "--eval_every", "2"]
    with monkeypatch.context() as patch:
        patch.setattr(condense.Job, "after_step", stop_at_once)
        assert condense.main([*argv, "--compile", "off"]) == 128 + signal.SIGTERM
    with pytest.raises(UsageError, match=r"--kmeans batched there, sklearn here"):
        condense.main([*argv, "--kmeans", "sklearn"])
    assert condense.main([*argv, "--compile", "auto"]) == 0
    folder = tmp_path / "digits" / finished.name
    assert (folder / "data.pt").read_bytes() == (finished / "data.pt").read_bytes()


def test_a_run_may_go_on_in_another_precision_which_is_recorded_until_it_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*TINY, "--results_dir", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(condense.Job, "after_step", stop_at_once)
        assert condense.main(argv) == 128 + signal.SIGTERM
    assert condense.main([*argv, "--precision", "bf16"]) == 0
    assert "warning: going on with precision bf16 after fp32" in capsys.readouterr().out
    (folder,) = (tmp_path / "digits").iterdir()
    begun = [event for event in events(folder) if "session" in event]
    assert [(e["session"], e["iteration"], e["step"], e["precision"]) for e in begun] == [
        (1, 0, 0, "fp32"),
        (2, 0, 1, "bf16"),
    ]
    record = json.loads((folder / "options.json").read_text())
    assert [session["precision"] for session in record["sessions"]] == ["fp32", "bf16"]
    with pytest.raises(UsageError, match=r"--precision bf16 there, fp32 here"):
        condense.main(argv)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("name", "value"), [("torch", "2.0.0"), ("device", "another GPU"), ("threads", 77), ("deterministic", True)]
)
def test_going_on_under_other_conditions_is_allowed_and_recorded(
    name: str, value: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As if the first session had been one of another PyTorch, device or number of threads."""
    argv = [*TINY, "--results_dir", str(tmp_path)]
    with monkeypatch.context() as patch:
        original = condense.process.session

        def session(*words: Any, **more: Any) -> dict[str, Any]:
            about = original(*words, **more)
            (about["versions"] if name == "torch" else about)[name] = value
            return about

        patch.setattr(condense.process, "session", session)
        patch.setattr(condense.Job, "after_step", stop_at_once)
        assert condense.main(argv) == 128 + signal.SIGTERM
    with injected("resumed with another torch, device, threads or mode"):
        assert condense.main(argv) == 0
        assert f"after {value}: not bit for bit" in capsys.readouterr().out
        (folder,) = (tmp_path / "digits").iterdir()
        first, second = (event[name] for event in events(folder) if "session" in event)
        assert first == value and second != value


def stop_at_once(job: condense.Job, state: condense.State) -> None:
    job.stopper.signal = signal.SIGTERM
    job.stopper.check()


@pytest.mark.slow
def test_a_compiled_run_gives_the_same_images_up_to_rounding(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if problem := compiler_error(torch.device("cpu")):
        pytest.skip(problem)
    few = ["--niter", "1", "--batch_syn_max", "128", "--repeat", "1"]
    plain, compiled = (run(tmp_path / choice, *few, "--compile", choice) for choice in ("off", "on"))
    assert ", compiled" in capsys.readouterr().out
    ours, expected = (torch.load(folder / "data.pt", weights_only=True)[0] for folder in (compiled, plain))
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)
