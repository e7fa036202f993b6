"""condense.py that is killed, told to stop, left without terminal, pipe or clock, or started twice: the same command
goes on, and ends with the same bits as a run to which nothing happens."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import random
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.killing import (
    CHECKPOINT_WRITE,
    FOLDER,
    ROOT,
    Ended,
    Operation,
    Server,
    goes_on,
    must_be,
    one_of_each_kind,
    recorded,
    the,
    tiny,
    two_at_a_time,
)
from tests.outcome import Outcome, outcome
from tests.tally import injected
from utils.runs import card as cards

pytestmark = pytest.mark.faults

SIGNALS = {"SIGTERM": 143, "SIGINT": 130, "SIGHUP": 129}
LONGER = ["--niter", "8"]
KILLS = {"kill": "kill -9 between two file operations", "halfway": "kill -9 halfway through a write"}


# --- kill -9 ----------------------------------------------------------------------------------------------------------


def kill_at(server: Server, results: Path, operation: Operation, then: str, *flags: str) -> None:
    ended = server.run(tiny(results, *flags), root=str(results), at=operation.at, then=then)
    assert ended.status == -signal.SIGKILL, (operation, then, ended)


@pytest.mark.parametrize(
    ("what", "file", "then"),
    [
        (*CHECKPOINT_WRITE, "halfway"),
        ("rename", "checkpoint_previous.pt", "kill"),
        ("rename", "checkpoint.pt", "kill"),
        ("write", "metrics.jsonl", "halfway"),
        ("write", ".data.json.part", "halfway"),
    ],
)
def test_a_run_killed_while_it_writes_goes_on(
    server: Server,
    operations: list[Operation],
    undisturbed: Outcome,
    tmp_path: Path,
    what: str,
    file: str,
    then: str,
) -> None:
    with injected(
        f"kill -9 {'halfway through a write' if then == 'halfway' else 'between two file operations'}"
    ) as fault:
        kill_at(server, tmp_path / "results", the(operations, what, file), then)
        goes_on(server, tmp_path / "results", undisturbed, fault)


def nothing_yet(server: Server, operations: list[Operation], results: Path) -> None:
    pass


def killed_before(server: Server, operations: list[Operation], results: Path) -> None:
    """Where metrics.jsonl is ahead of the checkpoint."""
    losses = [o.at for o in operations if (o.what, o.file) == ("write", "metrics.jsonl")]
    after = next(o for o in operations if o.at > losses[-2])
    kill_at(server, results, after, "kill")


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
    (results / FOLDER / cards.DATA).write_bytes(b"PK")


Before = Callable[[Server, list[Operation], Path], None]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "flags"),
    [
        (nothing_yet, []),
        (killed_before, []),
        (damaged_before, []),
        (damaged_after, []),
        (finished_before, ["--restart"]),
    ],
    ids=["a new run", "going on", "going on after damage", "mending a finished run", "a restart"],
)
def test_a_run_killed_at_every_kind_of_file_operation_goes_on(
    server: Server,
    operations: list[Operation],
    undisturbed: Outcome,
    tmp_path: Path,
    before: Before,
    flags: list[str],
) -> None:
    ready, sample = tmp_path / "ready", tmp_path / "sample"
    before(server, operations, ready)

    def prepare(results: Path) -> None:
        if ready.exists():
            shutil.copytree(ready, results)

    prepare(sample)
    there = recorded(server, sample, tiny(sample, *flags))
    if before is not nothing_yet:  # from the first checkpoint on it is like any other
        there = there[: next(o.at for o in there if (o.what, o.file) == ("rename", "checkpoint.pt")) + 1]
    cases = [(o, "kill") for o in one_of_each_kind(there)]
    cases += [(o, "halfway") for o, _ in cases if o.what == "write"]

    def check(case: tuple[Operation, str]) -> None:
        operation, then = case
        with injected(KILLS[then]) as fault:
            results = tmp_path / f"{then}_{operation.at}"
            prepare(results)
            kill_at(server, results, operation, then, *flags)
            goes_on(server, results, undisturbed, fault, *flags)

    two_at_a_time(check, cases)


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
def test_sixty_kills_at_random_moments_lose_nothing(
    server: Server, longer: tuple[Outcome, float], tmp_path: Path
) -> None:
    expected, seconds = longer

    def thirty(seed: int) -> None:
        moments, kills = random.Random(seed), 0
        while kills < 30:
            kills += kill_until_it_ends(server, tmp_path / f"results_{seed}", moments, 0.8 * seconds, expected)

    two_at_a_time(thirty, [0, 1])


def program(results: Path, *flags: str, **environment: str) -> subprocess.Popen[str]:
    """The real command, with the output buffered as usual."""
    argv = [sys.executable, str(ROOT / "condense.py"), *tiny(results, *flags)]
    usual = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    return subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**usual, **environment}
    )


def ended(process: subprocess.Popen[str]) -> Ended:
    out, err = process.communicate(timeout=120)
    return Ended(process.returncode, out, err)


@pytest.mark.slow
def test_the_real_program_killed_at_random_moments_loses_nothing(undisturbed: Outcome, tmp_path: Path) -> None:
    began = time.monotonic()
    assert ended(program(tmp_path / "whole")).status == 0
    seconds = time.monotonic() - began
    moments = random.Random(1)
    with injected("kill -9 at a random moment, the program itself", times=4) as fault:
        for _ in range(4):
            process = program(tmp_path / "results")
            time.sleep(moments.uniform(0.5, 0.95) * seconds)
            process.kill()
            process.communicate()
        must_be(undisturbed, ended(program(tmp_path / "results")), tmp_path / "results" / FOLDER, fault)


# --- Signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_lets_the_step_end_and_saves_everything(
    server: Server, operations: list[Operation], undisturbed: Outcome, tmp_path: Path, name: str
) -> None:
    results = tmp_path / "results"
    with injected(f"{name} in the middle of a write") as fault:
        ended = server.run(tiny(results), root=str(results), at=the(operations, *CHECKPOINT_WRITE).at, then=name)
        assert ended.status == SIGNALS[name], ended
        again = "; again to stop at once" if name == "SIGINT" else ""
        said = f"{name}: finishing this step and saving{again}\n" if name != "SIGHUP" else ""
        assert ended.err == said and f"stopped ({name})" in ended.out and "same command again" in ended.out
        assert not list((results / FOLDER).glob(".*"))
        goes_on(server, results, undisturbed, fault)


def test_a_second_ctrl_c_stops_at_once_in_one_line(
    server: Server, operations: list[Operation], undisturbed: Outcome, tmp_path: Path
) -> None:
    results = tmp_path / "results"
    with injected("SIGINT twice in the middle of a write") as fault:
        at = the(operations, *CHECKPOINT_WRITE).at
        ended = server.run(tiny(results), root=str(results), at=at, then="SIGINT SIGINT")
        said = ended.err.splitlines()
        assert ended.status == 130 and len(said) == 2 and said[1].startswith("condense.py: stopped at once"), ended
        assert "saved in" not in ended.out and not list((results / FOLDER).glob(".*"))
        goes_on(server, results, undisturbed, fault)


@pytest.mark.slow
@pytest.mark.parametrize("names", ["SIGTERM", "SIGINT SIGINT"])
def test_a_signal_at_any_file_operation_loses_nothing(
    server: Server, operations: list[Operation], undisturbed: Outcome, tmp_path: Path, names: str
) -> None:
    number = signal.Signals[names.split()[0]]

    def check(operation: Operation) -> None:
        with injected(f"{names} at a file operation") as fault:
            results = tmp_path / str(operation.at)
            ended = server.run(tiny(results), root=str(results), at=operation.at, then=names)
            assert ended.status in (0, 128 + number, -number), (operation, ended)
            assert "Traceback" not in ended.err and ended.err.count("\n") <= len(names.split()), (operation, ended)
            goes_on(server, results, undisturbed, fault)

    two_at_a_time(check, one_of_each_kind(operations))


def test_under_nohup_a_closed_terminal_does_not_end_a_run(
    server: Server, operations: list[Operation], undisturbed: Outcome, tmp_path: Path
) -> None:
    results = tmp_path / "results"
    with injected("SIGHUP under nohup") as fault:
        at = the(operations, *CHECKPOINT_WRITE).at
        ended = server.run(tiny(results), root=str(results), at=at, then="SIGHUP", ignored=(signal.SIGHUP,))
        must_be(undisturbed, ended, results / FOLDER, fault)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_while_the_program_still_loads_shows_no_traceback(
    server: Server, undisturbed: Outcome, tmp_path: Path, name: str
) -> None:
    with injected(f"{name} while the program loads", times=3) as fault:
        for seconds in (0.3, 0.8, 1.6):
            process = program(tmp_path / "results")
            time.sleep(seconds)
            process.send_signal(signal.Signals[name])
            found = ended(process)
            assert found.status in (-signal.Signals[name], SIGNALS[name]) and "Traceback" not in found.err, found
        (tmp_path / "results").mkdir(exist_ok=True)
        goes_on(server, tmp_path / "results", undisturbed, fault)


# --- Streams and terminals --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("streams", ["", "2>&1"])
def test_a_pipe_whose_reader_leaves_ends_the_run_like_a_signal(
    server: Server, undisturbed: Outcome, tmp_path: Path, streams: str
) -> None:
    results = tmp_path / "results"
    command = shlex.join([sys.executable, str(ROOT / "condense.py"), *tiny(results, "--niter", "500", "--tag", "x")])
    with injected("reader of the output gone") as fault:
        script = f"{command} {streams} | head -1; exit ${{PIPESTATUS[0]}}"
        found = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=120)
        assert found.returncode == 128 + signal.SIGPIPE and found.stderr == "", found
        assert found.stdout.count("\n") == 1
        folder = results / FOLDER.with_name(f"{FOLDER.name}_x")
        assert json.loads((folder / "data.json").read_text())["finished"] is False and not list(folder.glob(".*"))
        assert "stopped (SIGPIPE)" in (folder / "log.txt").read_text()
        goes_on(server, results, undisturbed, fault)


@pytest.mark.parametrize("which", [("stdout",), ("stdout", "stderr")], ids=" and ".join)
def test_a_run_that_nobody_reads_stops_and_goes_on(
    server: Server, undisturbed: Outcome, tmp_path: Path, which: tuple[str, ...]
) -> None:
    results = tmp_path / "results"
    with injected("reader of the output gone") as fault:
        ended = server.run(tiny(results), **dict.fromkeys(which, "broken"))
        assert ended.status == 128 + signal.SIGPIPE and ended.err == "", ended
        goes_on(server, results, undisturbed, fault)


@pytest.mark.parametrize("which", [("stdout",), ("stderr",), ("stdout", "stderr")], ids=" and ".join)
@pytest.mark.parametrize("how", ["closed", "/dev/full"])
def test_a_run_whose_output_goes_nowhere_from_the_start_computes_the_same(
    server: Server, undisturbed: Outcome, tmp_path: Path, which: tuple[str, ...], how: str
) -> None:
    with injected("output closed" if how == "closed" else "output on a full disk") as fault:
        ended = server.run(tiny(tmp_path / "results"), **dict.fromkeys(which, how))
        must_be(undisturbed, ended, tmp_path / "results" / FOLDER, fault)


def pseudo_terminal() -> tuple[int, str]:
    """Our end, and the path of the other one, which nobody holds open yet."""
    ours, theirs = os.openpty()
    fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    path = os.ttyname(theirs)
    os.close(theirs)
    return ours, path


def read_until(handle: int, text: bytes) -> bytes:
    """From a terminal; what there was in half a minute at most."""
    shown, deadline = b"", time.monotonic() + 30
    while text not in shown and time.monotonic() < deadline:
        try:
            shown += os.read(handle, 4096)
        except OSError:  # EIO: nobody has the other end open yet, or any more
            time.sleep(0.01)
    return shown


def test_a_closed_terminal_ends_the_run_like_a_signal(server: Server, undisturbed: Outcome, tmp_path: Path) -> None:
    results = tmp_path / "results"
    with injected("terminal closed") as fault:
        ours, path = pseudo_terminal()
        child = server.start(tiny(results, "--niter", "500", "--tag", "x"), terminal=path)
        assert b"distilling:" in read_until(ours, b"step/s")
        os.close(ours)
        ended = child.wait()
        assert ended.status == 128 + signal.SIGHUP, ended
        log = (results / FOLDER.with_name(f"{FOLDER.name}_x") / "log.txt").read_text()
        assert "stopped (SIGHUP)" in log and "Error" not in log
        goes_on(server, results, undisturbed, fault)


@pytest.mark.slow
def test_a_terminal_closed_at_random_moments_loses_nothing(
    server: Server, longer: tuple[Outcome, float], tmp_path: Path
) -> None:
    expected, seconds = longer

    def check(seed: int) -> None:
        with injected("terminal closed") as fault:
            results = tmp_path / f"results_{seed}"
            ours, path = pseudo_terminal()
            child = server.start(tiny(results, *LONGER), terminal=path)
            time.sleep(random.Random(seed).uniform(0, seconds))
            os.close(ours)
            ended = child.wait()
            assert ended.status in (0, -signal.SIGHUP, 128 + signal.SIGHUP), ended
            goes_on(server, results, expected, fault, *LONGER)

    two_at_a_time(check, range(12))


@pytest.mark.slow
def test_a_terminal_that_knows_only_ascii_shows_any_path(undisturbed: Outcome, tmp_path: Path) -> None:
    with injected("terminal that lacks characters") as fault:
        results = tmp_path / "r\u00e9sultats \u96ea"
        found = ended(program(results, PYTHONIOENCODING="ascii", PYTHONUTF8="0", LC_ALL="C"))
        must_be(undisturbed, found, results / FOLDER, fault)
        assert found.out.isascii() and "\\udcc3\\udca9sultats" in found.out


# --- Several processes ------------------------------------------------------------------------------------------------


def test_of_processes_started_together_on_one_folder_exactly_one_runs(
    server: Server, operations: list[Operation], undisturbed: Outcome, tmp_path: Path
) -> None:
    results = tmp_path / "results"
    at = next(o.at for o in operations if (o.what, o.file) == CHECKPOINT_WRITE)
    with injected("another process on the same run folder", times=5) as fault:
        children = [server.start(tiny(results), root=str(results), at=at, then="SIGSTOP") for _ in range(6)]
        lock = results / FOLDER / ".lock"
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and not any(child.paused for child in children):
            time.sleep(0.01)
        (holder,) = [child for child in children if child.paused]
        assert json.loads(lock.read_text())["pid"] == holder.pid
        for child in children:
            if child is not holder:
                ended = child.wait()
                says = f"condense.py: error: {results / FOLDER}: in use by process {holder.pid} on {platform.node()} ("
                assert ended.status == 1 and ended.out == "" and ended.err.startswith(says), ended
                assert ended.err.count("\n") == 1 and "--tag" in ended.err
        holder.send(signal.SIGCONT)
        must_be(undisturbed, holder.wait(), results / FOLDER, fault)


def test_a_killed_process_does_not_keep_the_next_one_out(
    server: Server, operations: list[Operation], undisturbed: Outcome, tmp_path: Path
) -> None:
    results = tmp_path / "results"
    with injected("kill -9 of the process that holds the lock") as fault:
        kill_at(server, results, the(operations, *CHECKPOINT_WRITE), "kill")
        assert (results / FOLDER / ".lock").exists()
        goes_on(server, results, undisturbed, fault)


@pytest.mark.parametrize("content", [b"", b"\xff\x00", b'{"host": "elsewhere", "pid": 1, "doing": "x", "since": "y"}'])
def test_a_lock_file_that_nobody_holds_keeps_nobody_out(
    server: Server, undisturbed: Outcome, tmp_path: Path, content: bytes
) -> None:
    results = tmp_path / "results"
    (results / FOLDER).mkdir(parents=True)
    (results / FOLDER / ".lock").write_bytes(content)
    with injected("lock file of a process that is gone") as fault:
        goes_on(server, results, undisturbed, fault)


@pytest.mark.slow
def test_processes_that_race_for_one_folder_end_in_one_line_or_with_the_result(
    server: Server, undisturbed: Outcome, tmp_path: Path
) -> None:
    results = tmp_path / "results"
    for _ in range(4):
        with injected("another process on the same run folder", times=5) as fault:
            everybody = [child.wait() for child in [server.start(tiny(results)) for _ in range(6)]]
            assert 0 in [ended.status for ended in everybody]
            for ended in everybody:
                assert (ended.status, ended.err.count("\n")) in ((0, 0), (1, 1)), ended
                assert ended.status == 0 or "in use by" in ended.err, ended
            goes_on(server, results, undisturbed, fault)


# --- The clock and the folder -----------------------------------------------------------------------------------------


def test_a_clock_that_jumps_by_years_changes_nothing(server: Server, undisturbed: Outcome, tmp_path: Path) -> None:
    with injected("clock that jumps by years") as fault:
        ended = server.run(tiny(tmp_path), wild_clock=True)
        must_be(undisturbed, ended, tmp_path / FOLDER, fault)
        events = [json.loads(line) for line in (tmp_path / FOLDER / "metrics.jsonl").read_text().splitlines()]
        assert all(0 <= event.get("seconds", 0) < 60 for event in events)


@pytest.mark.parametrize(
    "name", ["with spaces", "\u00e9t\u00e9 \u96ea", "two\nlines", "-d", "%s {x}", "\x1b[31m"], ids=ascii
)
def test_a_results_folder_may_have_any_name_and_be_named_in_several_ways(
    server: Server, operations: list[Operation], undisturbed: Outcome, tmp_path: Path, name: str
) -> None:
    with injected("strange name of the results folder") as fault:
        at = the(operations, *CHECKPOINT_WRITE).at
        relative = [*tiny(""), f"--results_dir={name}"]
        ended = server.run(relative, cwd=str(tmp_path), root=str(tmp_path / name), at=at, then="SIGTERM")
        assert ended.status == 128 + signal.SIGTERM, ended
        assert all(character.isprintable() for character in ended.out.replace("\n", "")), ended
        goes_on(server, tmp_path / name, undisturbed, fault)


@pytest.mark.parametrize("depth", [0, 1, 2], ids=["results folder", "folder of the data set", "run folder"])
def test_a_folder_may_be_a_link_to_another_place(
    server: Server, operations: list[Operation], undisturbed: Outcome, tmp_path: Path, depth: int
) -> None:
    link, elsewhere = Path(tmp_path / "results", *FOLDER.parts[:depth]), tmp_path / "elsewhere"
    elsewhere.mkdir()
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(elsewhere)
    with injected("folder that is a link") as fault:
        at = the(operations, *CHECKPOINT_WRITE).at
        ended = server.run(tiny(tmp_path / "results"), root=str(tmp_path), at=at, then="SIGTERM")
        assert ended.status == 128 + signal.SIGTERM, ended
        must_be(undisturbed, server.run(tiny(tmp_path / "results")), tmp_path / "results" / FOLDER, fault)
        assert Path(elsewhere, *FOLDER.parts[depth:], cards.DATA).exists()
