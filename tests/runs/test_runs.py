"""condense.py as a user runs it, on tiny settings: what a run leaves, stopping, going on."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import condense
import train
from tests.distilling import STOPPED, TINY, distilled, signals
from tests.files import last_json, quick
from tests.outcome import metrics, outcome
from tests.tally import injected
from utils.files import atomic
from utils.method import evaluation
from utils.method.state import Losses, State
from utils.numerics import derivatives
from utils.numerics.compilation import compiler_error
from utils.runs import recorder
from utils.runs.folder import RunFolder
from utils.system import process
from utils.system.errors import UsageError
from utils.system.report import messages

OFTEN = [*TINY, "--eval_every", "2"]
ONCE = ["--niter", "1", "--inner_loop", "1", "--epochs", "1", "--repeat", "1"]


def run(results: Path, *more: str) -> Path:
    """condense.py on digits in this process; the run folder."""
    return distilled(results, [*TINY, *more])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return distilled(tmp_path_factory.mktemp("results"), OFTEN)


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
    events = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [e["iteration"] for e in events if "loss" in e] == [1, 2, 3]
    assert [e["iteration"] for e in events if "accuracy_mean" in e] == [0, 2, 3]
    assert all(isinstance(e["seconds"], float) for e in events)


def test_options_json_says_what_ran_where(finished: Path) -> None:
    found = json.loads((finished / "options.json").read_text())
    assert found["options"]["niter"] == 3 and found["options"]["seed"] == 0 and "data_dir" in found["options"]
    about = found["sessions"][0]
    assert about["versions"]["torch"] == torch.__version__ and "git_commit" in about["versions"] and about["started"]
    assert "CPU" in about["device"] and about["command"].startswith("condense.py")


def test_the_same_command_gives_the_same_bits_and_another_seed_does_not(finished: Path, tmp_path: Path) -> None:
    assert outcome(distilled(tmp_path / "again", OFTEN)) == outcome(finished)
    other = distilled(tmp_path / "other", [*OFTEN, "--seed", "1", "--eval_every", "0"])
    assert outcome(other).files != outcome(finished).files


@pytest.mark.parametrize(("during", "stops"), [("step", (4, 6, 11)), ("evaluation", (3, 5))])
def test_a_stopped_and_resumed_run_equals_an_uninterrupted_one(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], during: str, stops: tuple[int, ...]
) -> None:
    """The last two evaluations are those of random real images and of the finished set; a stopped one is repeated."""
    folder = distilled(tmp_path, OFTEN, *stops, during=during)
    out = capsys.readouterr().out
    assert out.count("run the same command again to go on") == len(stops)
    if during == "step":
        for stop in stops:
            assert f"going on after outer iteration {stop // 4}, inner step {stop % 4} of 4" in out
    assert outcome(folder) == outcome(finished)


def test_a_finished_run_is_over(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(condense, "condense", lambda *a: pytest.fail("it is finished"))
    distilled(finished.parent.parent, OFTEN)
    out = capsys.readouterr().out
    assert "is finished" in out and "random real images" in out and str(finished) in out


def test_the_best_of_four_tests_is_recorded_and_shown_on_request_only(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card = json.loads((finished / "data.json").read_text())
    events = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    for scores in (card["accuracy"], card["random_real"], *(event for event in events if "accuracy_mean" in event)):
        assert scores["best_of_four"]["n"] == 2 and scores["best_of_four"]["accuracy_mean"] >= scores["accuracy_mean"]
    name, results = "best of 4 tests %, as published: chosen on the test set", finished.parent.parent
    distilled(results, OFTEN)
    assert "best of 4" not in capsys.readouterr().out
    distilled(results, [*OFTEN, "--show_best"])  # the same run
    best, random = (f"{card[of]['best_of_four']['accuracy_mean']:.1f} +- " for of in ("accuracy", "random_real"))
    (line,) = (line for line in capsys.readouterr().out.splitlines() if name in line)
    assert f": distilled set {best}" in line and f", random real images {random}" in line
    older = run(tmp_path, *ONCE, "--show_best")
    assert capsys.readouterr().out.count(name) == 2  # in the evaluation's line, and below the table
    content = atomic.read_json(older / "data.json")
    for of in ("accuracy", "random_real"):
        del content[of]["best_of_four"]
    atomic.write_json(older / "data.json", content)
    with messages():
        RunFolder(older, {"show_best": True}).say_results()
    assert f"{name}: distilled set unknown, random real images unknown" in capsys.readouterr().out


def test_another_command_for_the_same_folder_is_refused_and_restart_begins_again(tmp_path: Path) -> None:
    folder = run(tmp_path, *ONCE)
    before = (folder / "data.pt").read_bytes()
    with pytest.raises(UsageError, match=r"--lr_img .* there, 0.5 here.*--tag.*--restart"):
        run(tmp_path, *ONCE, "--lr_img", "0.5")
    assert (folder / "data.pt").read_bytes() == before
    run(tmp_path, *ONCE, "--lr_img", "0.5", "--restart")
    assert (folder / "data.pt").read_bytes() != before
    assert run(tmp_path, *ONCE, "--tag", "mine", "--lr_img", "0.1") == folder.with_name("convnet2_f2_ipc2_mine")


def test_a_folder_that_is_no_run_is_left_alone(tmp_path: Path) -> None:
    precious = tmp_path / "digits" / "convnet2_f2_ipc2" / "thesis.tex"
    precious.parent.mkdir(parents=True)
    precious.write_text("done")
    with pytest.raises(UsageError, match="no run folder"):
        run(tmp_path)
    run(tmp_path, *ONCE, "--restart")
    assert precious.read_text() == "done"


def test_a_time_limit_stops_cleanly_and_the_same_command_goes_on(finished: Path, tmp_path: Path) -> None:
    for _ in range(200):
        folder = distilled(tmp_path, [*OFTEN, "--max_minutes", "0.0001"])
        if json.loads((folder / "data.json").read_text())["finished"]:
            break
    assert outcome(folder) == outcome(finished)


def test_a_dry_run_prints_options_and_touches_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
            ["-n", "densenet", "--depth", "121", "--aug_type", "none", "--mixup_net", "vanilla"], marks=pytest.mark.slow
        ),
        ["--kmeans", "sklearn", "--norm_type", "group"],
        ["--precision", "bf16", "--bias", "--norm_type", "batch"],
        ["--aug_type", "flip_crop_scale_rotate_translate", "--norm_type", "layer", "--net_epoch", "2"],
    ],
    ids=" ".join,
)
def test_every_choice_of_the_method_runs(tmp_path: Path, more: list[str]) -> None:
    run(tmp_path, *ONCE, "--inner_loop", "2", "--ipc", "1", "--width", "4", *more)


# --- Precision and compilation ----------------------------------------------------------------------------------------


def settings(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "data.json").read_text())["settings"]
    assert isinstance(found, dict)
    return found


@pytest.mark.slow
def test_a_run_in_bfloat16_repeats_and_its_evaluation_is_in_float32(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, again = (distilled(tmp_path / name, [*OFTEN, "--precision", "bf16"]) for name in ("first", "again"))
    assert outcome(first).files == outcome(again).files
    assert re.fullmatch(r"peak memory: [\d.]+ GB", capsys.readouterr().out.splitlines()[-1])
    assert outcome(first).files != outcome(finished).files
    assert settings(first)["precision"] == "bf16" and settings(finished)["precision"] == "fp32"
    card = json.loads((first / "data.json").read_text())
    results = []
    for more in ([], ["--precision", "bf16"]):
        assert train.main(["--device", "cpu", str(first), "--baselines", "none", "--json", *more]) == 0
        results.append(last_json(capsys))
    assert [found["results"][0]["protocol"]["precision"] for found in results] == ["fp32", "bf16"]
    assert results[0]["accuracies"] == card["accuracy"]["accuracies"]


def test_tf32_is_refused_on_a_cpu(tmp_path: Path) -> None:
    for main in (condense.main, train.main):
        argv = ["--device", "cpu", "--precision", "tf32", "--results_dir", str(tmp_path)]
        with pytest.raises(UsageError, match="--precision tf32: only NVIDIA GPUs"):
            main([*argv, "--real"] if main is train.main else argv)
    assert not list(tmp_path.iterdir())


def test_losses_are_all_recorded_however_rarely_the_device_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At --interval 1, where every step is an outer iteration."""

    class Reads(TorchDispatchMode):
        """Count the numbers that Python asks single tensors for: each would wait for a GPU."""

        count = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += function.overloadpacket is torch.ops.aten._local_scalar_dense
            return function(*args, **(kwargs or {}))

    looks: list[int] = []
    mean_losses = State.mean_losses

    def noted(self: State, earlier: list[Losses], inner_loop: int) -> list[float]:
        with Reads() as reads:
            found = mean_losses(self, earlier, inner_loop)
        assert reads.count == 0  # one list of all that is asked for
        looks.append(len(earlier))
        return found

    monkeypatch.setattr(State, "mean_losses", noted)
    events, flags = [], ("--method", "dm", "--niter", "20", "--eval_every", "8", "--repeat", "1", "--epochs", "1")
    for seconds, expected in ((1e9, [0, 0, 1, 7, 8, 4, 0]), (0.0, None)):
        looks.clear()
        monkeypatch.setitem(recorder.REPORT_SECONDS, "cpu", seconds)
        assert condense.main(quick(tmp_path / f"{seconds}", *flags)) == 0
        events.append(metrics(next(tmp_path.glob(f"{seconds}/digits/*"))))
        assert looks == expected or (expected is None and sum(looks) == 20 and len(looks) > 20)
    assert events[0] == events[1]
    assert [e["iteration"] for e in events[0] if "loss" in e] == list(range(1, 21))


def test_evaluations_are_in_fp32_whatever_the_precision_of_distilling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU may round to TF32, which PyTorch keeps in global settings that a CPU takes no notice of."""
    seen: dict[str, set[tuple[str, str]]] = {"distances": set(), "confusion_matrix": set()}

    def noted(module: Any, name: str) -> None:
        function = getattr(module, name)

        def noting(*words: Any) -> Any:
            backends: Any = torch.backends
            seen[name].add((backends.cuda.matmul.fp32_precision, backends.cudnn.conv.fp32_precision))
            return function(*words)

        monkeypatch.setattr(module, name, noting)

    noted(derivatives, "distances")
    noted(evaluation, "confusion_matrix")
    assert condense.main(quick(tmp_path, "--precision", "bf16", "--eval_every", "1", "--niter", "2")) == 0
    assert seen == {"distances": {("tf32", "tf32")}, "confusion_matrix": {("ieee", "ieee")}}


def test_compilation_without_a_compiler_is_left_out_when_it_is_up_to_the_program(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("utils.numerics.compilation.compiler_error", lambda device: "no compiler")
    monkeypatch.setattr("utils.numerics.compilation.WORTH_COMPILING", {"cpu": 0.0})
    folder = distilled(tmp_path, [*OFTEN, "--compile", "auto"])
    assert "not compiled (no compiler): slower" in capsys.readouterr().out
    assert outcome(folder) == outcome(finished)


def test_the_compiler_is_not_asked_where_the_work_is_not_worth_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("utils.numerics.compilation.compiler_error", lambda device: pytest.fail("it takes seconds"))
    for choice in ("auto", "off"):
        run(tmp_path, *ONCE, "--tag", choice, "--compile", choice)
    assert "compiled" not in capsys.readouterr().out


def stopped(results: Path, *argv: str) -> Path:
    """The folder of a run that is stopped in its first step."""
    with signals(1):
        assert condense.main([*argv, "--results_dir", str(results)]) == STOPPED
    (folder,) = (results / "digits").iterdir()
    return folder


def test_a_run_may_go_on_with_another_choice_of_compilation_alone(finished: Path, tmp_path: Path) -> None:
    stopped(tmp_path, *OFTEN, "--compile", "off")
    with pytest.raises(UsageError, match=r"--kmeans batched there, sklearn here"):
        distilled(tmp_path, [*OFTEN, "--kmeans", "sklearn"])
    assert outcome(distilled(tmp_path, [*OFTEN, "--compile", "auto"])) == outcome(finished)


def test_a_run_may_go_on_in_another_recorded_precision(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stopped(tmp_path, *TINY)
    folder = run(tmp_path, "--precision", "bf16")
    assert "warning: going on with precision bf16 after fp32" in capsys.readouterr().out
    begun = [event for event in metrics(folder) if "session" in event]
    assert [(e["session"], e["iteration"], e["step"], e["precision"]) for e in begun] == [
        (1, 0, 0, "fp32"),
        (2, 0, 1, "bf16"),
    ]
    record = json.loads((folder / "options.json").read_text())
    assert [session["precision"] for session in record["sessions"]] == ["fp32", "bf16"]
    with pytest.raises(UsageError, match=r"--precision bf16 there, fp32 here"):
        run(tmp_path)


@pytest.mark.faults
def test_going_on_under_other_conditions_is_allowed_and_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As if the first session had been one of another PyTorch, device, number of threads and mode."""
    conditions = {"device": "another GPU", "threads": 77, "deterministic": True}
    original = process.session

    def session(*words: Any, **more: Any) -> dict[str, Any]:
        about = original(*words, **more)
        return {**about, **conditions, "versions": {**about["versions"], "torch": "2.0.0"}}

    with monkeypatch.context() as patch:
        patch.setattr(process, "session", session)
        stopped(tmp_path, *TINY)
    with injected("resumed with another torch, device, threads or mode"):
        folder = run(tmp_path)
        out = capsys.readouterr().out
        assert all(f"after {value}" in out for value in ("2.0.0", *conditions.values())) and "not bit for bit" in out
        first, second = (event for event in metrics(folder) if "session" in event)
        for name, value in {**conditions, "torch": "2.0.0"}.items():
            assert first[name] == value and second[name] != value


@pytest.mark.slow
def test_a_compiled_run_gives_these_images_up_to_rounding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if problem := compiler_error(torch.device("cpu")):
        pytest.skip(problem)
    few = ["--niter", "1", "--batch_syn_max", "128", "--repeat", "1"]
    plain, compiled = (run(tmp_path / choice, *few, "--compile", choice) for choice in ("off", "on"))
    assert ", compiled" in capsys.readouterr().out
    ours, expected = (torch.load(folder / "data.pt", weights_only=True)[0] for folder in (compiled, plain))
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)
