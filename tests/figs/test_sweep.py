"""The sweep: planned from the words of a command line, run as condense.py's own commands, done once."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from figs import sweep
from tests.files import QUICK
from utils.system.errors import UsageError, UserError


def test_every_combination_and_seed_is_a_command_of_its_own_with_the_first_seed_first() -> None:
    more = ["-d", "digits", "--ipc", "1"]
    runs = sweep.plan(["select=random,kmeans", "--batch-real=8,16"], 2, more)
    assert [run.title for run in runs[:4]] == [
        "select=random, batch_real=8", "select=random, batch_real=16", "select=kmeans, batch_real=8",
        "select=kmeans, batch_real=16",
    ]  # fmt: skip
    assert [run.options.seed for run in runs] == [0] * 4 + [1] * 4
    assert (runs[1].options.select, runs[1].options.batch_real, runs[1].options.ipc) == ("random", 16, 1)
    assert runs[1].folder.path.name == "convnet2_f1_ipc1_select-random_batch_real-16_seed0"
    assert len({run.folder.path for run in runs}) == 8


@pytest.mark.parametrize(
    ("vary", "more", "says"),
    [
        ("select", [], "--vary select"),
        ("select=", [], "--vary select="),
        ("select=random,,kmeans", [], "--vary select=random,,kmeans"),
        ("seed=0,1", [], "--seeds N"),
        ("select=randon,kmeans", [], "randon"),
        ("colour=red", [], "--colour"),
        ("select=random", ["--seed", "3"], "--seed"),
        ("select=random", ["--tag=x"], "--tag"),
        ("select=random", ["--dry-run"], "--dry_run"),
    ],
)
def test_words_that_make_no_sense_are_refused_first(vary: str, more: list[str], says: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=says):
        sweep.main(["--vary", vary, "--", *more, "--results_dir", str(tmp_path / "results")])
    assert not list(tmp_path.iterdir())


def test_a_sweep_runs_once_and_tabulates(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    more = [*QUICK, "--niter", "1000000", "--seconds", "0.1", "--results_dir", str(tmp_path)]
    figure = tmp_path / "pace.png"
    argv = ["--vary", "select=central", "--seeds", "1", "--figure", str(figure), "--", *more]
    assert sweep.main(argv) == 0
    out = capfd.readouterr().out
    commands = [line for line in out.splitlines() if line.startswith("python3 condense.py ")]
    assert len(commands) == 1 and shlex.split(commands[0])[2:] == [
        *more, "--select", "central", "--seed", "0", "--tag", "select-central_seed0",
    ]  # fmt: skip
    folders = sorted((tmp_path / "digits").iterdir())
    assert len(folders) == 1
    written = [(folder / "data.pt").stat().st_mtime_ns for folder in folders]
    assert sweep.main(argv) == 0
    out = capfd.readouterr().out
    assert "1 of 1 runs are finished already" in out and "python3 condense.py" not in out
    assert "unfinished" not in out and "dream, select=central" in out and f"wrote {figure}" in out
    assert [(folder / "data.pt").stat().st_mtime_ns for folder in folders] == written
    accuracy = json.loads((folders[0] / "data.json").read_text())["accuracy"]["accuracy_mean"]
    assert f"select=central   {accuracy:.1f} (n=1)" in out
    assert all(str(folder) in out for folder in folders)


@pytest.mark.slow
def test_a_run_that_fails_ends_the_sweep(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    argv = ["--vary", "factor=9", "--seeds", "1", "--", *QUICK[:-4], "--results_dir", str(tmp_path)]
    with pytest.raises(UserError, match="ended with status 2"):
        sweep.main(argv)
    assert "-f 9" in capfd.readouterr().err


@pytest.mark.slow
def test_runs_go_side_by_side_and_the_first_failure_ends_the_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both, begun = threading.Barrier(2), []

    def run(planned: sweep.Planned, *, beside_others: bool) -> None:
        begun.append(planned.title)
        assert beside_others
        both.wait(10)  # for the other one
        raise UserError("this run ended")

    monkeypatch.setattr(sweep, "run", run)
    argv = ["--vary", "interval=1,2,3,4,5,6", "--jobs", "2", "--", *QUICK, "--results_dir", str(tmp_path)]
    with pytest.raises(UserError, match="this run ended"):
        sweep.main(argv)
    assert 2 <= len(begun) < 18
    with pytest.raises(UsageError, match="--jobs 0"):
        sweep.main(["--jobs=0", "--vary", "interval=1"])


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
def test_ctrl_c_lets_the_runs_save_and_the_same_command_goes_on(jobs: int, tmp_path: Path) -> None:
    more = [*QUICK, "--niter", "100000", "--results_dir", str(tmp_path)]
    words = ["-m", "figs.sweep", "--vary", "select=random", "--seeds", "3", "--jobs", str(jobs), "--", *more]
    process = subprocess.Popen(
        [sys.executable, *words], cwd=sweep.SCRIPT.parent, start_new_session=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    folders = [tmp_path / "digits" / f"convnet2_f1_ipc1_select-random_seed{seed}" for seed in range(3)]
    deadline = time.monotonic() + 60
    while not all((folder / "metrics.jsonl").exists() for folder in folders[:jobs]) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the sweep and its runs
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "stopped; the same command goes on" in err, err
    assert all("stopped (SIGINT) and saved" in (folder / "log.txt").read_text() for folder in folders[:jobs]), out
    assert [folder.exists() for folder in folders] == [number < jobs for number in range(3)]
    for folder in folders[:jobs]:
        assert (folder / "checkpoint.pt").exists()
        (session,) = json.loads((folder / "options.json").read_text())["sessions"]
        assert jobs == 1 or session["threads"] == 1


def test_flags_behind_a_value_are_set_together_with_it() -> None:
    runs = sweep.plan(["method=dream+,dm:niter=7:lr-img=2", "ipc=1,2"], 1, [])
    assert [(r.options.method, r.options.niter, r.options.ipc) for r in runs] == [
        ("dream+", 10, 1), ("dream+", 10, 2), ("dm", 7, 1), ("dm", 7, 2),
    ]  # fmt: skip
    assert (runs[2].options.lr_img, runs[2].title) == (2.0, "method=dm, niter=7, lr_img=2, ipc=1")
    assert [r.folder.path.name for r in runs[1:3]] == [
        "convnet2_f1_ipc2_dream+_ipc-2_seed0",
        "convnet2_f1_ipc1_dm_niter-7_lr_img-2_ipc-1_seed0",
    ]
    early = sweep.plan(["method=dream,dream:networks=early"], 1, [])
    assert [r.folder.path.name for r in early] == ["convnet2_f1_ipc1_seed0", "convnet2_f1_ipc1_networks-early_seed0"]
    assert [r.setting[0].label for r in early] == ["dream", "dream, networks=early"]
    with pytest.raises(UsageError, match="dm:niter"):
        sweep.plan(["method=dm:niter"], 1, [])


def test_the_table_has_the_first_flag_downwards_and_the_others_across(tmp_path: Path) -> None:
    runs = sweep.plan(["method=dc,mtt", "select=random,kmeans"], 2, ["--results_dir", str(tmp_path)])
    for i, one in enumerate(runs):
        one.folder.path.mkdir(parents=True)
        card = {"accuracy": {"accuracy_mean": 50.0 + i}, "seconds": 10.2 + i}
        more = {"expert_seconds": 60.4} if one.options.method == "mtt" else {}
        (one.folder.path / "data.json").write_text(json.dumps({**card, **more}))
    assert sweep.markdown(runs).splitlines() == [
        "| method | select=random | select=kmeans |",
        "|---|---|---|",
        "| dc | 52.0 +- 2.8 (n=2), 12 s | 53.0 +- 2.8 (n=2), 13 s |",
        "| mtt | 54.0 +- 2.8 (n=2), 14 s (experts: 60 s) | 55.0 +- 2.8 (n=2), 15 s (experts: 60 s) |",
    ]
