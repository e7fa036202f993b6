"""Damaged files of a run folder: noticed by their checksums, made again from what is whole, and said."""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

import condense
import train
from tests.files import Payload, image_folder, quick, refused
from tests.outcome import metrics
from tests.tally import injected
from utils.files import atomic, tensors
from utils.runs import card as cards
from utils.runs import folder as run
from utils.runs.folder import valid_checkpoint
from utils.system.errors import UsageError, UserError

FLAGS = ("--niter", "2", "--inner_loop", "2", "--eval_every", "1", "--repeat", "2", "--ipc", "2")
NAME = "convnet2_f1_ipc2"


def condensed(results: Path, *more: str) -> Path:
    assert condense.main(quick(results, *FLAGS, *more)) == 0
    return results / "digits" / NAME


def stopped(results: Path, steps: int = 3) -> Path:
    """A run folder with a state after each of its first steps, and one checkpoint before the last."""
    seen = 0
    original = condense.Job.after_step

    def after_step(job: condense.Job, state: condense.State) -> None:
        nonlocal seen
        seen += 1
        if seen == steps:
            job.stopper.signal = signal.SIGTERM
        original(job, state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(condense.Job, "after_step", after_step)
        patch.setattr(run, "CHECKPOINT_SECONDS", 0.0)
        assert condense.main(quick(results, *FLAGS)) == 128 + signal.SIGTERM
    return results / "digits" / NAME


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return condensed(tmp_path_factory.mktemp("finished"))


@pytest.fixture(scope="module")
def halfway(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stopped(tmp_path_factory.mktemp("halfway"))


def flipped(content: bytes, position: int) -> bytes:
    return content[: position // 8] + bytes([content[position // 8] ^ 1 << position % 8]) + content[position // 8 + 1 :]


DAMAGE: dict[str, Callable[[bytes], bytes | None]] = {
    "truncated": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "a flipped bit": lambda content: flipped(content, 4 * len(content)),
    "zeros": lambda content: bytes(len(content)),
    "missing": lambda content: None,
}
FILES = ("checkpoint.pt", "checkpoint_previous.pt", "data.pt", "data.json", "options.json", "metrics.jsonl")
NOTICED = {  # what is read by the same command; other files are written anew in any case, or not needed any more
    "stopped": ("checkpoint.pt", "options.json", "metrics.jsonl"),
    "finished": ("data.pt", "options.json", "metrics.jsonl"),
}


def without_sessions(folder: Path) -> list[dict[str, object]]:
    return [event for event in metrics(folder) if "session" not in event]


def spoil(file: Path, how: str) -> None:
    content = DAMAGE[how](file.read_bytes())
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)


@pytest.mark.faults
@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("when", ["stopped", "finished"])
def test_the_same_command_makes_a_damaged_file_again(
    when: str, name: str, how: str, finished: Path, halfway: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "digits" / NAME
    shutil.copytree(finished if when == "finished" else halfway, folder)
    with injected(f"{name} damaged or missing") as fault:
        spoil(folder / name, how)
        condensed(tmp_path)
        said = capsys.readouterr().out
        fault.kept((folder / "data.pt").read_bytes() == (finished / "data.pt").read_bytes())
        fault.kept(without_sessions(folder) == without_sessions(finished))
        accuracies = [atomic.read_json(of / "data.json")["accuracy"] for of in (folder, finished)]
        fault.kept(accuracies[0] == accuracies[1])
        assert atomic.read_json(folder / "options.json")["options"]["niter"] == 2
        if name in NOTICED[when]:
            assert re.search(rf"warning: {folder / name}: .*(?:again from the checkpoint|the one before)", said) or (
                (name, how) == ("checkpoint.pt", "missing") and "is missing; going on from the one before" in said
            )


@pytest.mark.faults
@pytest.mark.parametrize("name", ["checkpoint.pt", "data.pt", "options.json", "data.json"])
def test_a_flipped_bit_anywhere_is_noticed_or_changes_nothing(name: str, finished: Path, tmp_path: Path) -> None:
    draw, times = random.Random(name), 150
    original, file = (finished / name).read_bytes(), tmp_path / name

    def read() -> object:
        if name.endswith(".json"):
            return atomic.read_json(file)
        return repr(valid_checkpoint(file) if name == "checkpoint.pt" else tensors.read_tensors(file, ""))

    file.write_bytes(original)
    expected, noticed = read(), 0
    with injected(f"a random bit of {name} flipped", times=times):
        for _ in range(times):
            file.write_bytes(flipped(original, draw.randrange(8 * len(original))))
            try:
                found = read()
            except UserError as error:
                noticed += 1
                assert str(file) in str(error)
            else:
                if isinstance(found, dict):  # of a JSON file whose checksum has lost its name
                    found = {k: v for k, v in found.items() if k in expected}  # type: ignore[operator]
                assert found == expected
    assert noticed > times // 3


def test_two_damaged_checkpoints_are_refused_with_the_way_out(halfway: Path, tmp_path: Path) -> None:
    folder = tmp_path / "digits" / NAME
    shutil.copytree(halfway, folder)
    for name in FILES[:2]:
        spoil(folder / name, "truncated")
    before = (folder / "data.pt").read_bytes()
    with pytest.raises(UserError, match=r"checkpoint_previous.pt: is truncated.*no other checkpoint; --restart"):
        condense.main(quick(tmp_path, *FLAGS))
    assert (folder / "data.pt").read_bytes() == before


def test_a_set_without_a_checkpoint_is_not_overwritten(halfway: Path, tmp_path: Path) -> None:
    folder = tmp_path / "digits" / NAME
    shutil.copytree(halfway, folder)
    for name in FILES[:2]:
        (folder / name).unlink()
    with pytest.raises(UserError, match=r"has a data.pt, but no checkpoint to go on from; --tag"):
        condense.main(quick(tmp_path, *FLAGS))
    assert (folder / "data.pt").read_bytes() == (halfway / "data.pt").read_bytes()


def test_a_damaged_checkpoint_never_takes_the_place_of_the_one_that_is_whole(halfway: Path, tmp_path: Path) -> None:
    """Otherwise the first save after the fallback, and a crash in it, would leave none."""
    folder = tmp_path / "digits" / NAME
    shutil.copytree(halfway, folder)
    before = (folder / "checkpoint_previous.pt").read_bytes()
    spoil(folder / "checkpoint.pt", "a flipped bit")
    found = run.RunFolder(folder)
    assert found.load_checkpoint() is not None
    assert (folder / "checkpoint_previous.pt").read_bytes() == before and not (folder / "checkpoint.pt").exists()
    found.save_checkpoint({"it": 1})
    assert (folder / "checkpoint_previous.pt").read_bytes() == before
    assert tensors.read_tensors(folder / "checkpoint.pt", "")["it"] == 1


@pytest.mark.faults
def test_a_checkpoint_that_would_run_code_never_does(halfway: Path, tmp_path: Path) -> None:
    folder, marker = tmp_path / "digits" / NAME, tmp_path / "ran"
    shutil.copytree(halfway, folder)
    with injected("checkpoint.pt is somebody's program"):
        tensors.write_tensors(folder / "checkpoint.pt", {"pixels": Payload(marker)})
        condensed(tmp_path)
        assert not marker.exists()


def test_options_that_were_never_complete_do_not_block_the_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "digits" / NAME
    folder.mkdir(parents=True)
    (folder / "options.json").write_text("")
    condensed(tmp_path)
    assert "nothing had been saved yet, so the run begins again" in capsys.readouterr().out


def test_a_changed_json_file_is_refused_until_its_checksum_is_taken_out(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    file = tmp_path / "run" / "data.json"
    file.write_text(file.read_text().replace('"factor": 1', '"factor": 2'))
    refused(train.main, [str(file.parent)], str(file), "sha256", status=1, unchanged=tmp_path)
    content = json.loads(file.read_text())
    del content["sha256"]
    file.write_text(json.dumps(content))
    assert cards.read_card(file)["factor"] == 2


def test_train_refuses_a_damaged_set_and_says_how_to_make_it_again(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    spoil(tmp_path / "run" / "data.pt", "a flipped bit")
    argv = [str(tmp_path / "run"), "--device", "cpu"]
    refused(train.main, argv, "data.pt: is truncated or damaged", status=1, unchanged=tmp_path)


# --- Going on from an earlier state -----------------------------------------------------------------------------------


def test_a_run_begun_from_the_start_of_another_one_s_iteration_gives_the_same(finished: Path, tmp_path: Path) -> None:
    source = stopped(tmp_path / "source", steps=2)  # exactly after the first outer iteration
    for name in ("", "checkpoint.pt"):
        folder = condensed_from(source / name, tmp_path, f"from{len(name)}")
        assert (folder / "data.pt").read_bytes() == (finished / "data.pt").read_bytes()
    first = metrics(folder)[0]
    assert (first["session"], first["iteration"], first["step"]) == (1, 1, 0)


def condensed_from(source: Path, results: Path, tag: str, *more: str) -> Path:
    condensed_flags = [*FLAGS, "--tag", tag, "--resume_from", str(source), *more]
    assert condense.main(quick(results, *condensed_flags)) == 0
    return results / "digits" / f"{NAME}_{tag}"


def test_another_run_s_state_goes_on_with_other_settings(halfway: Path, tmp_path: Path) -> None:
    others = ["--lr_img", "0.5", "--width", "16", "--inner_loop", "3", "--select", "random", "--niter", "4"]
    folder = condensed_from(halfway, tmp_path, "other", *others)
    card = atomic.read_json(folder / "data.json")
    assert card["outer_iterations"] == 4 and card["settings"]["lr_img"] == 0.5
    assert json.loads((folder / "options.json").read_text())["options"]["resume_from"] == str(halfway)
    before = tensors.read_tensors(halfway / "data.pt", "")[0]
    assert (tensors.read_tensors(folder / "data.pt", "")[0] != before).any()


def test_a_snapshot_is_a_state_to_begin_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = condensed(tmp_path, "--snapshot_every", "1")
    folder = condensed_from(source / "data_000001.pt", tmp_path, "snapshot")
    assert "after its outer iteration 1" in capsys.readouterr().out
    assert [event["iteration"] for event in metrics(folder) if "loss" in event] == [2]


def test_a_run_that_begins_elsewhere_goes_on_from_its_own_checkpoint(
    halfway: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    shutil.copytree(halfway, source)
    argv = quick(tmp_path, *FLAGS, "--niter", "4", "--tag", "own", "--resume_from", str(source))
    assert condense.main([*argv, "--max_minutes", "1e-9"]) == 0
    shutil.rmtree(source)
    assert condense.main(argv) == 0
    assert "going on after outer iteration 1, inner step 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--ipc", "1"], "--ipc 2 there, 1 here"),
        (["-f", "2"], "--factor 1 there, 2 here"),
        (["--niter", "1"], "--niter 2 or more"),
        (["-d", "folder", "--image_folder", "photos"], "--dataset digits there, folder here"),
    ],
    ids=str,
)
def test_a_state_of_another_kind_is_refused(
    more: list[str], says: str, halfway: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    image_folder(tmp_path / "photos", {"a": 8, "b": 8})
    argv = quick(tmp_path / "results", *FLAGS, "--tag", "x", "--resume_from", str(halfway), *more)
    refused(condense.main, argv, f"--resume_from {halfway}", says, status=2, unchanged=tmp_path)


@pytest.mark.parametrize("what", ["nothing", "empty folder", "set of another name", "text"])
def test_what_holds_no_state_is_refused(what: str, halfway: Path, tmp_path: Path) -> None:
    source = {"nothing": tmp_path / "no", "empty folder": tmp_path, "text": tmp_path / "data_000001.pt"}.get(
        what, halfway / "data.pt"
    )
    (tmp_path / "data_000001.pt").write_text("no tensors")
    argv = quick(tmp_path / "results", "--resume_from", str(source))
    refused(condense.main, argv, str(source), "--resume_from takes", status=1, unchanged=tmp_path)


def test_the_folder_that_restart_would_delete_is_no_state_to_begin_from(halfway: Path, tmp_path: Path) -> None:
    folder = tmp_path / "digits" / NAME
    shutil.copytree(halfway, folder)
    for source in (folder, folder / "checkpoint.pt"):
        argv = quick(tmp_path, *FLAGS, "--resume_from", str(source), "--restart")
        refused(condense.main, argv, "own folder", "--tag", status=2, unchanged=tmp_path)
    with pytest.raises(UsageError, match=r"belongs to another command \(--resume_from None there"):
        condense.main(quick(tmp_path, *FLAGS, "--resume_from", str(folder)))
