"""Damaged files of a run folder: noticed by their checksums, made again from what is whole, and said. And states of
another run to begin from, which may be anything."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import condense
import train
from tests.files import Payload, image_folder, refused
from tests.killing import FOLDER, Operation, Server, must_be, tiny
from tests.outcome import Outcome, metrics
from tests.tally import injected
from utils.files import atomic, tensors
from utils.runs import folder as run
from utils.runs.folder import valid_checkpoint
from utils.system.errors import UserError

CHECKPOINTS = ("checkpoint.pt", "checkpoint_previous.pt")


def stopped(server: Server, results: Path, operations: list[Operation], what: str, file: str, nth: int) -> Path:
    """The folder of a run that got SIGTERM at the nth operation of this kind, with a state after each of its steps."""
    at = [o.at for o in operations if (o.what, o.file) == (what, file)][nth]
    assert server.run(tiny(results), root=str(results), at=at, then="SIGTERM").status == 143
    return results / FOLDER


@pytest.fixture(scope="module")
def finished(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    results = tmp_path_factory.mktemp("finished")
    assert server.run(tiny(results)).status == 0
    return results / FOLDER


@pytest.fixture(scope="module")
def halfway(server: Server, operations: list[Operation], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In the middle of the second outer iteration."""
    return stopped(server, tmp_path_factory.mktemp("halfway"), operations, "rename", "checkpoint.pt", 2)


@pytest.fixture
def folder(halfway: Path, tmp_path: Path) -> Path:
    """A copy of the run that was stopped."""
    return Path(shutil.copytree(halfway, tmp_path / FOLDER))


# --- Damage -----------------------------------------------------------------------------------------------------------


def flipped(content: bytes, position: int) -> bytes:
    return content[: position // 8] + bytes([content[position // 8] ^ 1 << position % 8]) + content[position // 8 + 1 :]


DAMAGE: dict[str, Callable[[bytes], bytes | None]] = {
    "truncated": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "a flipped bit": lambda content: flipped(content, 4 * len(content)),
    "zeros": lambda content: bytes(len(content)),
    "missing": lambda content: None,
}
FILES = (*CHECKPOINTS, "data.pt", "data.json", "options.json", "metrics.jsonl")
NOTICED = {  # what is read by the same command; other files are written anew in any case, or not needed any more
    "stopped": ("checkpoint.pt", "options.json", "metrics.jsonl"),
    "finished": ("data.pt", "options.json", "metrics.jsonl"),
}
USUAL = ("a flipped bit", "missing")  # the others are slow tests
CASES = [
    pytest.param(when, name, how, marks=[] if how in USUAL and name in (*NOTICED[when], unread) else pytest.mark.slow)
    for when, unread in (("stopped", "data.json"), ("finished", "checkpoint.pt"))
    for name in FILES
    for how in DAMAGE
]


def spoil(file: Path, how: str) -> None:
    content = DAMAGE[how](file.read_bytes())
    file.unlink()
    if content is not None:
        file.write_bytes(content)


@pytest.mark.faults
@pytest.mark.parametrize(("when", "name", "how"), CASES)
def test_the_same_command_makes_a_damaged_file_again(
    when: str, name: str, how: str, server: Server, undisturbed: Outcome, finished: Path, halfway: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(finished if when == "finished" else halfway, tmp_path / FOLDER)
    with injected(f"{name} damaged or missing") as fault:
        spoil(folder / name, how)
        ended = server.run(tiny(tmp_path))
        if (when, name) == ("finished", "checkpoint.pt"):  # which nobody needs any more
            shutil.copy(finished / name, folder / name)
        must_be(undisturbed, ended, folder, fault)
        one_before = "is missing; going on from the one before" in ended.out
        if name in NOTICED[when] and not ((name, how) == ("checkpoint.pt", "missing") and one_before):
            said = rf"warning: {folder / name}: .*(?:again from the checkpoint|the one before)"
            assert re.search(said, ended.out)


@pytest.mark.faults
@pytest.mark.parametrize("name", ["checkpoint.pt", "data.pt", "options.json"])
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


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("truncated", r"checkpoint_previous.pt: is truncated.*no other checkpoint; --restart"),
        ("missing", r"has a data.pt, but no checkpoint to go on from; --tag"),
    ],
)
def test_without_a_whole_checkpoint_nothing_is_overwritten_until_restart(how: str, says: str, folder: Path) -> None:
    for name in CHECKPOINTS:
        spoil(folder / name, how)
    before = (folder / "data.pt").read_bytes()
    argv = tiny(folder.parents[1])
    with pytest.raises(UserError, match=says):
        condense.main(argv)
    assert (folder / "data.pt").read_bytes() == before
    assert condense.main([*argv, "--restart"]) == 0


def test_a_damaged_checkpoint_never_takes_the_place_of_the_one_that_is_whole(folder: Path) -> None:
    """Otherwise the first save after the fallback, and a crash in it, would leave none."""
    before = (folder / "checkpoint_previous.pt").read_bytes()
    spoil(folder / "checkpoint.pt", "a flipped bit")
    found = run.RunFolder(folder)
    assert found.load_checkpoint() is not None
    assert (folder / "checkpoint_previous.pt").read_bytes() == before and not (folder / "checkpoint.pt").exists()
    found.save_checkpoint({"it": 1})
    assert (folder / "checkpoint_previous.pt").read_bytes() == before
    assert tensors.read_tensors(folder / "checkpoint.pt", "")["it"] == 1


@pytest.mark.faults
def test_a_checkpoint_that_would_run_code_never_does(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    with injected("checkpoint.pt is somebody's program"):
        tensors.write_tensors(folder / "checkpoint.pt", {"pixels": Payload(marker)})
        assert condense.main(tiny(tmp_path)) == 0
        assert not marker.exists()


def test_incomplete_options_do_not_block_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / FOLDER).mkdir(parents=True)
    (tmp_path / FOLDER / "options.json").write_text("")
    assert condense.main(tiny(tmp_path)) == 0
    assert "nothing had been saved yet, so the run begins again" in capsys.readouterr().out


def test_an_edited_data_json_is_used_with_a_warning(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = folder / "data.json"
    file.write_text(file.read_text().replace('"factor": 2', '"factor": 4'))
    argv = [str(folder), "--device", "cpu", "--epochs", "1", "--repeat", "1", "--baselines", "none"]
    assert train.main([*argv, "--json"]) == 0
    printed = capsys.readouterr()
    assert f"{file}: " in printed.out + printed.err
    assert json.loads(printed.out.splitlines()[-1])["decoded_per_class"] == 2 * 4**2


def test_train_refuses_a_damaged_set_and_says_how_to_make_it_again(folder: Path, tmp_path: Path) -> None:
    spoil(folder / "data.pt", "a flipped bit")
    argv = [str(folder), "--device", "cpu"]
    refused(train.main, argv, "data.pt: is truncated or damaged", status=1, unchanged=tmp_path)


# --- Going on from an earlier state -----------------------------------------------------------------------------------


def condensed_from(source: Path, results: Path, tag: str, *more: str) -> Path:
    assert condense.main(tiny(results, "--tag", tag, "--resume_from", str(source), *more)) == 0
    return (results / FOLDER).with_name(f"{FOLDER.name}_{tag}")


def test_a_run_begun_from_another(server: Server, operations: list[Operation], finished: Path, tmp_path: Path) -> None:
    source = stopped(server, tmp_path / "source", operations, "write", "metrics.jsonl", 2)
    for name in ("", "checkpoint.pt"):
        found = condensed_from(source / name, tmp_path, f"from{len(name)}")
        assert (found / "data.pt").read_bytes() == (finished / "data.pt").read_bytes()
        first = metrics(found)[0]
        assert (first["session"], first["iteration"], first["step"]) == (1, 1, 0)


def test_another_run_s_state_goes_on_with_other_settings(halfway: Path, tmp_path: Path) -> None:
    others = ["--lr_img", "0.5", "--width", "16", "--inner_loop", "3", "--select", "random", "--niter", "4"]
    found = condensed_from(halfway, tmp_path, "other", *others)
    card = atomic.read_json(found / "data.json")
    assert card["outer_iterations"] == 4 and card["settings"]["lr_img"] == 0.5
    assert json.loads((found / "options.json").read_text())["options"]["resume_from"] == str(halfway)
    before = tensors.read_tensors(halfway / "data.pt", "")[0]
    assert (tensors.read_tensors(found / "data.pt", "")[0] != before).any()


def test_a_snapshot_is_a_state_to_begin(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = condensed_from(finished / "data_000002.pt", tmp_path, "snapshot")
    assert "after its outer iteration 2" in capsys.readouterr().out
    assert [event["iteration"] for event in metrics(found) if "loss" in event] == [3]


def test_a_resumed_run_has_its_own_checkpoint(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = tiny(tmp_path, "--tag", "own", "--resume_from", str(folder))
    assert condense.main([*argv, "--max_minutes", "1e-9"]) == 0
    shutil.rmtree(folder)
    assert condense.main(argv) == 0
    assert "going on after outer iteration 1, inner step 1" in capsys.readouterr().out


NO_STATES: dict[str, tuple[list[str], str, int]] = {  # flags, what is said, and the status
    "of another ipc": (["--resume_from", "{halfway}", "--ipc", "1"], "--ipc 2 there, 1 here", 2),
    "of another factor": (["--resume_from", "{halfway}", "-f", "1"], "--factor 2 there, 1 here", 2),
    "beyond the end": (["--resume_from", "{halfway}", "--niter", "1"], "--niter 2 or more", 2),
    "of another data set": (
        ["--resume_from", "{halfway}", "-d", "folder", "--image_folder", "photos"], "--dataset digits there, folder", 2
    ),
    "that do not exist": (["--resume_from", "no"], "--resume_from takes", 1),
    "in an empty folder": (["--resume_from", "photos"], "--resume_from takes", 1),
    "in a set that is described": (["--resume_from", "{halfway}/data.pt", "--normalized"], "leave --normalized out", 2),
    "in a text": (["--resume_from", "data_000001.pt"], "--resume_from takes", 1),
}  # fmt: skip


@pytest.mark.parametrize("what", NO_STATES)
def test_states_are_refused(what: str, halfway: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    image_folder(Path("photos"), {"a": 8, "b": 8})
    Path("data_000001.pt").write_text("no tensors")
    flags, says, status = NO_STATES[what]
    argv = tiny("results", "--tag", "x", *(flag.format(halfway=halfway) for flag in flags))
    refused(condense.main, argv, argv[argv.index("--resume_from") + 1], says, status=status, unchanged=tmp_path)


def test_the_folder_that_restart_would_delete_is_no_state_to_begin_from(folder: Path, tmp_path: Path) -> None:
    for source in (folder, folder / "checkpoint.pt"):
        argv = tiny(tmp_path, "--resume_from", str(source), "--restart")
        refused(condense.main, argv, "own folder", "--tag", status=2, unchanged=tmp_path)
    with pytest.raises(UserError, match=r"belongs to another command \(--resume_from None there"):
        condense.main(tiny(tmp_path, "--resume_from", str(folder)))
