"""condense.py that is killed, told to stop, short of room, left without terminal, pipe or clock, or started twice: the
same command goes on, and ends with the same bits as a run to which nothing happens."""

from __future__ import annotations

import itertools
import json
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.killing import (
    CHECKPOINT_WRITE,
    CHECKPOINTS,
    FOLDER,
    REASONS,
    Ended,
    Operation,
    Server,
    finished,
    goes_on,
    must_be,
    must_say,
    one_of_each_kind,
    program,
    recorded,
    the,
    tiny,
    two_at_a_time,
)
from tests.outcome import Outcome, outcome
from tests.tally import injected

pytestmark = pytest.mark.faults

SIGNALS = {"SIGTERM": 143, "SIGINT": 130, "SIGHUP": 129}
LONGER = ["--niter", "8"]
KILL, HALFWAY = "kill -9 between two file operations", "kill -9 halfway through a write"
TWICE = "SIGINT SIGINT"
DISK = "full or failing disk at a file operation"


# --- One fault each ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A fault under a run, and how the run must end: then the same command goes on."""

    fault: str  # in the tally
    at: tuple[str, str] | None = None  # the kind of file operation at which it happens
    then: str = ""  # see Plan
    status: int = 0
    err: str = ""  # all of standard error, as a pattern
    out: str = ""  # part of standard output
    plan: dict[str, Any] = field(default_factory=dict)  # other fields of Plan


def asked_to_stop(name: str, said: str) -> Case:
    fault, out = f"{name} in the middle of a write", f"stopped ({name})"
    return Case(fault, CHECKPOINT_WRITE, name, SIGNALS[name], said, out)


FINISHING = "finishing this step and saving"
BROKEN, GONE = "reader of the output gone", 128 + signal.SIGPIPE
BOTH = ("stdout", "stderr")
CASES = {
    "a kill halfway through a checkpoint": Case(HALFWAY, CHECKPOINT_WRITE, "halfway", -9),
    "a kill before the older checkpoint": Case(KILL, ("rename", "checkpoint_previous.pt"), "kill", -9),
    "a kill between the checkpoints": Case(KILL, ("rename", "checkpoint.pt"), "kill", -9),
    "a kill halfway through a line": Case(HALFWAY, ("write", "metrics.jsonl"), "halfway", -9),
    "a kill halfway through the card": Case(HALFWAY, ("write", ".data.json.part"), "halfway", -9),
    "SIGTERM": asked_to_stop("SIGTERM", f"SIGTERM: {FINISHING}\n"),
    "SIGINT": asked_to_stop("SIGINT", f"SIGINT: {FINISHING}; again to stop at once\n"),
    "SIGHUP": asked_to_stop("SIGHUP", ""),
    "a second Ctrl-C": Case(
        "SIGINT twice in the middle of a write", CHECKPOINT_WRITE, TWICE, 130,
        r"SIGINT: [^\n]*\ncondense.py: stopped at once[^\n]*\n",
    ),
    "SIGHUP under nohup": Case(
        "SIGHUP under nohup", CHECKPOINT_WRITE, "SIGHUP", plan={"ignored": (signal.SIGHUP,)}
    ),
    "no room for a checkpoint": Case(DISK, CHECKPOINT_WRITE, "ENOSPC", 1),
    "no room for a line": Case(DISK, ("write", "metrics.jsonl"), "EDQUOT", 1),
    "a disk that turns read-only": Case(DISK, ("open", ".data.pt.part"), "EROFS", 1),
    "a disk that fails": Case(DISK, ("fsync", ".data.json.part"), "EIO", 1),
    "no room for the log": Case(DISK, ("write", "log.txt"), "ENOSPC", 1),
    "a reader that leaves": Case(BROKEN, status=GONE, plan={"stdout": "broken"}),
    "readers that leave": Case(BROKEN, status=GONE, plan=dict.fromkeys(BOTH, "broken")),
    **{
        f"{' and '.join(which)} {name}": Case(fault, plan=dict.fromkeys(which, how))
        for fault, name, how in (("output closed", "closed", "closed"), ("output on a full disk", "full", "/dev/full"))
        for which in (BOTH[:1], BOTH[1:], BOTH)
    },
    "a clock that jumps": Case("clock that jumps by years", plan={"wild_clock": True}),
}  # fmt: skip


SLOW = (  # much like others, which are usual tests
    "stdout closed", "stdout full", "stderr closed", "stderr full", "SIGHUP", "readers that leave", "a disk that fails",
    "a kill before the older checkpoint", "a kill halfway through the card", "no room for a line",
    "no room for the log", "stdout and stderr closed",
)  # fmt: skip


@pytest.mark.parametrize("what", [pytest.param(w, marks=[pytest.mark.slow] if w in SLOW else []) for w in CASES])
def test_the_same_command_ends_with_the_same_bits_after(
    what: str, server: Server, operations: list[Operation], undisturbed: Outcome, tmp_path: Path
) -> None:
    case, results = CASES[what], tmp_path / "results"
    plan = {"root": str(results), "at": the(operations, *case.at).at, "then": case.then} if case.at else {}
    with injected(case.fault) as fault:
        ended = server.run(tiny(results), **plan, **case.plan)
        assert ended.status == case.status, ended
        if case.then in REASONS:
            must_say(ended, case.then, results)
        else:
            assert re.fullmatch(case.err, ended.err) and case.out in ended.out, ended
            assert ended.status <= 0 or not list((results / FOLDER).glob(".*"))
        if ended.status:
            goes_on(server, results, undisturbed, fault)
        else:
            must_be(undisturbed, ended, results / FOLDER, fault)
            events = [json.loads(line) for line in (results / FOLDER / "metrics.jsonl").read_text().splitlines()]
            assert all(0 <= event.get("seconds", 0) < 60 for event in events)


# --- The same fault at every kind of file operation -------------------------------------------------------------------


def kill_at(server: Server, results: Path, operation: Operation, then: str, *flags: str) -> None:
    ended = server.run(tiny(results, *flags), root=str(results), at=operation.at, then=then)
    assert ended.status == -signal.SIGKILL, (operation, then, ended)


def nothing_yet(server: Server, operations: list[Operation], results: Path) -> None:
    pass


def killed_before(server: Server, operations: list[Operation], results: Path) -> None:
    """Where metrics.jsonl is ahead of the checkpoint."""
    losses = [o.at for o in operations if (o.what, o.file) == ("write", "metrics.jsonl")]
    kill_at(server, results, next(o for o in operations if o.at > losses[-2]), "kill")


def damaged_before(server: Server, operations: list[Operation], results: Path) -> None:
    """Killed, and the newest checkpoint and options.json are damaged."""
    killed_before(server, operations, results)
    for name in ("checkpoint.pt", "options.json"):
        file = results / FOLDER / name
        file.write_bytes(file.read_bytes()[:-100])


def finished_before(server: Server, operations: list[Operation], results: Path) -> None:
    assert server.run(tiny(results)).status == 0


def damaged_after(server: Server, operations: list[Operation], results: Path) -> None:
    """Finished, and the set is damaged."""
    finished_before(server, operations, results)
    (results / FOLDER / "data.pt").write_bytes(b"PK")


Before = Callable[[Server, list[Operation], Path], None]
SWEEPS: dict[str, tuple[Before, str, list[str]]] = {  # what was before, what happens, flags
    "killed": (nothing_yet, "kill", []),
    "killed again": (killed_before, "kill", []),
    "killed after damage": (damaged_before, "kill", []),
    "killed while it mends a finished run": (damaged_after, "kill", []),
    "killed while it begins again": (finished_before, "kill", ["--restart"]),
    "told to stop": (nothing_yet, "SIGTERM", []),
    "told to stop at once": (nothing_yet, TWICE, []),
    "out of room": (nothing_yet, "disk", []),
    "out of room for TensorBoard": (nothing_yet, "disk", ["--tensorboard"]),
}
FAULTS = {"kill": KILL, "halfway": HALFWAY, **{names: f"{names} at a file operation" for names in ("SIGTERM", TWICE)}}


def cases(what: str, there: list[Operation], flags: list[str]) -> list[tuple[Operation, str]]:
    """At which operations what happens."""
    kinds = one_of_each_kind(there)
    if what == "kill":
        return [*((o, "kill") for o in kinds), *((o, "halfway") for o in kinds if o.what == "write")]
    if what != "disk":
        return [(o, what) for o in kinds]
    if flags:
        events = [o for o in there if o.file.startswith("events")]
        some = [the(there, "mkdir", "tensorboard"), events[0], events[1], events[len(events) // 2], events[-1]]
        return [*((o, "ENOSPC") for o in some), (some[1], "EROFS"), (some[3], "EIO")]
    return [*((o, "ENOSPC") for o in kinds), *zip(kinds[::3], itertools.cycle(["EROFS", "EDQUOT", "EIO"]))]


def must_have_ended(ended: Ended, then: str, results: Path) -> None:
    """As it should, after such a fault anywhere."""
    if then in ("kill", "halfway"):
        assert ended.status == -signal.SIGKILL
    elif then in REASONS:
        if ended.status:  # after the last result, neither the log nor the lock is worth an error
            must_say(ended, then, results)
    else:
        number = signal.Signals[then.split()[0]]
        assert ended.status in (0, 128 + number, -number)
        assert "Traceback" not in ended.err and ended.err.count("\n") <= len(then.split())


@pytest.mark.slow
@pytest.mark.parametrize("name", SWEEPS)
def test_at_every_kind_of_file_operation_the_same_command_goes_on_after_it_was(
    name: str, server: Server, operations: list[Operation], undisturbed: Outcome, tmp_path: Path
) -> None:
    before, what, flags = SWEEPS[name]
    if "--tensorboard" in flags and find_spec("tensorboard") is None:
        pytest.skip("TensorBoard is not installed")
    ready, sample = tmp_path / "ready", tmp_path / "sample"
    before(server, operations, ready)

    def prepare(results: Path) -> None:
        if ready.exists():
            shutil.copytree(ready, results)

    prepare(sample)
    there = recorded(server, sample, tiny(sample, *flags))
    saved = next(o.at for o in there if (o.what, o.file) == ("rename", "checkpoint.pt"))
    if before is not nothing_yet:  # from the first checkpoint on it is like any other
        there = there[: saved + 1]

    def check(case: tuple[Operation, str]) -> None:
        operation, then = case
        board = " at a file of TensorBoard" if "--tensorboard" in flags else ""
        with injected(FAULTS.get(then, f"full or failing disk{board}" if board else DISK)) as fault:
            results = tmp_path / f"{then}_{operation.at}"
            prepare(results)
            ended = server.run(tiny(results, *flags), root=str(results), at=operation.at, then=then)
            must_have_ended(ended, then, results)
            assert not board or f" {results / FOLDER / 'tensorboard'}" in ended.err, (operation, ended)
            assert operation.at <= saved or any((results / FOLDER / name).exists() for name in CHECKPOINTS)
            results.mkdir(exist_ok=True)
            goes_on(server, results, undisturbed, fault, *flags)

    two_at_a_time(check, cases(what, there, flags))


# --- At random moments ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def longer(server: Server, tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, float]:
    """What a run that LONGER makes longer computes when nothing happens to it, and the seconds that it takes."""
    results, began = tmp_path_factory.mktemp("longer"), time.monotonic()
    assert server.run(tiny(results, *LONGER)).status == 0
    return outcome(results / FOLDER), time.monotonic() - began


def kill_until_it_ends(server: Server, results: Path, moments: random.Random, seconds: float, expected: Outcome) -> int:
    """Run the same command until it has ended before its kill came; how many were needed."""
    kills, ended = 0, Ended(-signal.SIGKILL, "", "")
    while ended.status == -signal.SIGKILL:
        child = server.start(tiny(results, *LONGER))
        time.sleep(moments.uniform(0, seconds))
        child.send(signal.SIGKILL)
        ended = child.wait()
        kills += ended.status == -signal.SIGKILL
        assert kills < 100, "it makes no progress"
    with injected("kill -9 at a random moment", times=kills) as fault:
        must_be(expected, ended, results / FOLDER, fault)
    shutil.rmtree(results)
    return kills


@pytest.mark.slow
def test_sixty_kills_at_random_lose_nothing(server: Server, longer: tuple[Outcome, float], tmp_path: Path) -> None:
    expected, seconds = longer

    def thirty(seed: int) -> None:
        moments, kills = random.Random(seed), 0
        while kills < 30:
            kills += kill_until_it_ends(server, tmp_path / f"results_{seed}", moments, 0.8 * seconds, expected)

    two_at_a_time(thirty, [0, 1])


@pytest.mark.slow
def test_the_real_program_killed_at_random_moments_loses_nothing(undisturbed: Outcome, tmp_path: Path) -> None:
    began = time.monotonic()
    assert finished(program(tmp_path / "whole")).status == 0
    seconds = time.monotonic() - began
    moments = random.Random(1)
    with injected("kill -9 at a random moment, the program itself", times=4) as fault:
        for _ in range(4):
            process = program(tmp_path / "results")
            time.sleep(moments.uniform(0.5, 0.95) * seconds)
            process.kill()
            process.communicate()
        must_be(undisturbed, finished(program(tmp_path / "results")), tmp_path / "results" / FOLDER, fault)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_while_loading_ends_clearly(server: Server, undisturbed: Outcome, tmp_path: Path, name: str) -> None:
    with injected(f"{name} while the program loads", times=3) as fault:
        for seconds in (0.3, 0.8, 1.6):
            process = program(tmp_path / "results")
            time.sleep(seconds)
            process.send_signal(signal.Signals[name])
            found = finished(process)
            assert found.status in (-signal.Signals[name], SIGNALS[name]) and "Traceback" not in found.err, found
        (tmp_path / "results").mkdir(exist_ok=True)
        goes_on(server, tmp_path / "results", undisturbed, fault)
