"""The record script at a tiny size on a CPU: tables that grow, runs that go on from an archive, archives by others."""

from __future__ import annotations

import dataclasses
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

import train
from tests import bench, bench_parts, gpu_record, record, recorded_runs
from tests.distilling import signals
from utils.method import evaluation
from utils.method.matching import MatchingStep
from utils.system.errors import UserError

TINY = ["--device", "cpu", "--tiny"]
SHORT = ["--", "--repeat", "2", "--compile", "off"]
HEADLINE = "convnet2_f2_ipc10_kmeans"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "")  # which the script sets, for its process and what that starts
    monkeypatch.setattr(bench_parts, "compiler_error", lambda device: "not in a test")
    monkeypatch.setattr(record, "PACK_EVERY", 0)


def archive(folder: Path, *argv: str, goes_on_from: Path | None = None, status: int = 0) -> Path:
    """The archive that a command leaves in a new folder."""
    more = [] if goes_on_from is None else ["--continue_from", str(goes_on_from)]
    assert gpu_record.main([argv[0], *TINY, "--out", str(folder), *more, *argv[1:]]) == status
    assert [path.name for path in folder.iterdir()] == [record.ARCHIVE]
    return folder / record.ARCHIVE


def content(archive: Path) -> dict[str, bytes]:
    with tarfile.open(archive) as tar:
        return {m.name: file.read() for m in tar if (file := tar.extractfile(m)) is not None}


def results(archive: Path, part: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(content(archive)[record.RESULTS])[part]
    return found


# --- Headline, methods ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_headline_run_that_is_cut_goes_on_from_its_archive_to_the_same_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = archive(tmp_path / "whole", "headline", *SHORT)
    with signals(6):  # in the second of two outer iterations
        cut = archive(tmp_path / "cut", "headline", *SHORT)
    assert list(results(cut, "headline")) == ["ipc 10, kmeans, iteration 0"]
    assert any(name.endswith("checkpoint.pt") for name in content(cut))
    capsys.readouterr()
    last = archive(tmp_path / "last", "headline", *SHORT, goes_on_from=cut)
    rows = [line.split("  ") for line in capsys.readouterr().out.splitlines() if line.count("(n=2)") == 2]
    assert [row[0] for row in rows] == list(results(last, "headline"))
    assert "54.2" in " ".join(rows[0])

    assert content(last).keys() == content(whole).keys()
    for name in ("data.pt", "data_000000.pt"):
        path = f"results/digits/{HEADLINE}/{name}"
        assert content(last)[path] == content(whole)[path]
    for row, found in results(whole, "headline").items():
        assert results(last, "headline")[row]["accuracies"] == found["accuracies"]
    assert not [name for name in content(last) if name.endswith((".png", "checkpoint.pt"))]


@pytest.mark.slow
def test_a_row_holds_the_last_epoch_as_train_py_gives_it_and_the_best_of_four_tests(tmp_path: Path) -> None:
    made = archive(tmp_path / "out", "headline", *SHORT)
    record.unpack(made, tmp_path / "work")
    run = tmp_path / "work/results/digits" / HEADLINE
    (found,) = train.evaluate(run, baselines=["none"], repeat=2, device="cpu", compile="off")
    row = results(made, "headline")["ipc 10, kmeans, iteration 2"]
    assert row["accuracies"] == found["accuracies"]
    best = row["best_of_four"]["accuracies"]
    assert all(b >= a for a, b in zip(row["accuracies"], best, strict=True)) and best != row["accuracies"]


@pytest.mark.slow
def test_an_evaluation_that_would_not_end_in_time_is_left_for_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    none = archive(tmp_path / "none", "headline", "--minutes", "0.25", *SHORT)  # all of it reserved for the packing
    said = capsys.readouterr().out
    assert "stopped (no time for evaluating iteration 0)" in said and "headline: not complete" in said
    assert record.RESULTS not in content(none)
    with monkeypatch.context() as patch:
        patch.setattr(recorded_runs, "span", lambda seconds: "hours")
        patch.setattr(record.Record, "left", 1e-9)
        archive(tmp_path / "little", "headline", *SHORT)
    assert "stopped (evaluating iteration 0 needs hours, there are hours)" in capsys.readouterr().out
    done = archive(tmp_path / "done", "headline", *SHORT, goes_on_from=none)
    assert len(results(done, "headline")) == 3
    capsys.readouterr()
    archive(tmp_path / "again", "headline", "--minutes", "0.25", *SHORT, goes_on_from=done)
    assert "headline: complete" in capsys.readouterr().out


def test_a_run_is_in_its_precision_and_its_evaluations_are_in_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = set()

    def noting(owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def noted(*words: Any, **more: Any) -> Any:
            seen.add((name, torch.backends.cuda.matmul.fp32_precision))
            return function(*words, **more)

        monkeypatch.setattr(owner, name, noted)

    noting(MatchingStep, "__call__")
    noting(evaluation, "train_networks")
    noting(evaluation, "confusion_matrix")
    archive(tmp_path / "out", "headline", "--precision", "bf16", *SHORT)
    assert seen == {("__call__", "tf32"), ("train_networks", "ieee"), ("confusion_matrix", "ieee")}


@pytest.mark.slow
def test_one_method_that_fails_does_not_keep_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(recorded_runs, "PUBLISHED_METHODS", {"dx, ipc 1": 1.0, "dm, ipc 1": 26.0, "dc, ipc 1": 28.3})
    made = archive(tmp_path / "out", "methods", *SHORT)
    said = capsys.readouterr().out
    assert "dx, ipc 1, random, seed 0: failed: " in said and "methods: not complete" in said
    rows = results(made, "methods")
    of_runs = [
        f"{name}, ipc 1, {select}, seed 0, iteration 2" for name in ("dm", "dc") for select in ("random", "kmeans")
    ]
    assert list(rows) == [of_runs[0], "random real images, ipc 1", *of_runs[1:]]
    assert [row["published"] for row in rows.values()] == [None] * 5  # none of them has the published budget
    with signals(1):
        stopped = archive(tmp_path / "stopped", "methods", *SHORT)
    assert "dc, ipc 1" not in capsys.readouterr().out and record.RESULTS not in content(stopped)


def test_arms_are_picked_by_name_and_evaluated_on_the_way(tmp_path: Path) -> None:
    arm = "init random, select kmeans, seed 1"
    made = archive(tmp_path / "out", "arms", "--seeds", "2", "--runs", arm, *SHORT)
    assert list(results(made, "arms")) == [f"{arm}, iteration 0", f"{arm}, iteration 2", "random real images, ipc 10"]
    assert not [name for name in content(made) if "data_0" in name]


@pytest.mark.slow
def test_pools_are_trained_first_and_go_on_from_the_archive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["faster", "--runs", "dance, ipc 1, random", "dance, ipc 10, kmeans", *SHORT]
    with signals(1):
        cut = archive(tmp_path / "cut", *argv)
    assert record.RESULTS not in content(cut) and "faster: not complete" in capsys.readouterr().out
    whole = archive(tmp_path / "whole", *argv, goes_on_from=cut)
    assert capsys.readouterr().out.count("epochs of experts to train") == 0
    pools = [name for name in content(cut) if "/pool_convnet2_" in name and name.endswith(".pt")]
    assert len(pools) == 2 and all(content(whole)[name] == content(cut)[name] for name in pools)
    rows = results(whole, "faster")
    assert [name for name in rows if name.startswith("dance")] == [
        "dance, ipc 10, kmeans, seed 0, iteration 2", "dance, ipc 1, random, seed 0, iteration 2",
    ]  # fmt: skip


# --- Speed ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_variant_that_fails_has_its_line_and_is_measured_again_by_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = dataclasses.replace(bench_parts.WORKS["tiny"], per_class=bench_parts.BATCH, n_data=16, width=8)
    monkeypatch.setitem(bench_parts.WORKS, "tiny", small)

    def fails(*_: object) -> None:
        raise RuntimeError("CUDA error: no such luck\nand more")

    with monkeypatch.context() as patch:
        patch.setattr(bench_parts, "run_published", fails)
        cut = archive(tmp_path / "cut", "speed")
    said = capsys.readouterr().out
    assert "\npublished: failed: RuntimeError: CUDA error: no such luck\n" in said and "speed: not complete" in said
    assert said.count(": ms: ") == 5
    for measure in ("run_ours", "our_evaluation", "published_evaluation"):
        monkeypatch.setattr(bench_parts, measure, fails)  # if they were called
    done = archive(tmp_path / "done", "speed", goes_on_from=cut)
    said = capsys.readouterr().out
    assert said.count(": ms: ") == 6 and "speed: complete" in said and "failed" not in said
    found = results(done, "speed")["published"]
    assert set(bench_parts.PARTS) < found.keys() and found["peak memory"] > 0
    late = archive(tmp_path / "late", "speed", "--minutes", "0.25")
    assert capsys.readouterr().out.count(": no time left\n") == 6 and list(content(late)) == ["speed.txt"]


def test_the_benchmark_writes_what_it_has_and_goes_on_after_a_variant_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = {part: [1.0, 2.0, 4.0] for part in bench_parts.PARTS}
    written, file = [], tmp_path / "bench.json"

    def apart(variant: str, words: list[str], timeout: float | None = None) -> dict[str, Any]:
        written.append(json.loads(file.read_text()) if file.exists() else {})
        if variant == "peaks":
            return {"error": "exit status 1"}
        if variant == "published":
            return {"error": "exit status 1"}
        return {**parts, "operators": 3, "peak memory": 1e9}

    monkeypatch.setattr(bench, "apart", apart)
    argv = ["--device", "cpu", "--work", "tiny", "--precisions", "fp32", "--json", str(file)]
    assert bench.main(argv) == 0
    assert list(written[-1]["works"]["tiny"]) == ["published", "published, allocator kept"]
    lines = capsys.readouterr().out.splitlines()
    assert "tiny, published: failed: exit status 1" in lines and "published failed: exit status 1" in lines
    assert "| | published, allocator kept | ours fp32 |" in lines
    assert "| inner step | 4.4 s | 4.4 s, 1.00 x |" in lines


def test_the_benchmark_of_frameworks_goes_on_after_a_variant_that_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {"naive": {"error": "out of time"}}
    other = {"seconds": [0.5, 1.0, 3.0], "peak memory": 1e9}
    monkeypatch.setattr(bench, "apart", lambda variant, words: found.get(variant, other))
    assert bench.main(["--device", "cpu", "--methods", "dm", "--precisions", "fp32"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "headline dm, naive: failed: out of time" in lines
    assert "headline dm, ours fp32: ms: inner step 1,000.0 (500.0-3,000.0); 1.0 GB" in lines
    assert lines[-1] == "| dm | failed: out of time | 1 s, 1.0 GB | 1 s, 1.00 x, 1.0 GB |"


def test_a_variant_s_process_that_fails_is_told_from_one_without_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "script.py"
    script.write_text("import sys\nprint('and')\nprint('{}') if 'good' in sys.argv else sys.exit(2)\n")
    monkeypatch.setattr(bench, "__file__", str(script))
    words = ["--work", "tiny"]
    assert bench.apart("good", words) == {}
    assert bench.apart("bad", words) == {"error": "exit status 2"}
    assert bench.apart("good", words, timeout=1e-3) == {"error": "out of time"}


# --- Check ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_tests_are_told_one_by_one_so_that_a_crash_loses_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tests = tmp_path / "test_device.py"
    tests.write_text(
        "import os, pytest, warnings\n"
        "def test_warns(): warnings.warn('is no error')\n"
        "def test_fails(): assert 1 == 2, 'why'\n"
        "def test_is_skipped(): pytest.skip()\n"
        "def test_crashes(): os._exit(3)\n"
        "def test_is_lost(): pass\n"
    )
    monkeypatch.setattr(gpu_record, "GPU_TESTS", str(tests))
    made = archive(tmp_path / "out", "check", status=1)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] + line[3] for line in lines[1:3]] == ["passedtest_warns", "failedtest_fails"]
    assert lines[3] == ["E", "AssertionError:", "why"]
    assert " ".join(lines[-3]) == "1 passed, 1 failed, 1 skipped; 2 did not run (exit status 3)"
    assert len(results(made, "check")) == 3 and b"test_crashes" in content(made)["pytest.txt"]
    archive(tmp_path / "late", "check", "--minutes", "0.25", status=1)
    assert "0 passed" in capsys.readouterr().out


# --- Archives ---------------------------------------------------------------------------------------------------------


def member(name: str, kind: bytes = tarfile.REGTYPE, **more: Any) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, 1 if kind == tarfile.REGTYPE else 0
    for attribute, value in more.items():
        setattr(info, attribute, value)
    return info


def test_the_archive_holds_no_second_copy_and_no_lock(tmp_path: Path) -> None:
    names = {"checkpoint.pt", "checkpoint_previous.pt", "data.pt", "data_000040.pt", "data.json", "log.txt"}
    for name in {*names, ".lock", ".log.txt.part", "stored_latest.png"}:
        (tmp_path / name).write_text("{}")
    kept = {path.name for path in tmp_path.iterdir() if record.outlives(path)}
    assert kept == names - {"checkpoint_previous.pt", "data.pt"}
    (tmp_path / "data.json").write_text('{"finished": true}')
    kept = {path.name for path in tmp_path.iterdir() if record.outlives(path)}
    assert kept == names - {"checkpoint_previous.pt", "checkpoint.pt"}


@pytest.mark.parametrize(
    "bad",
    [
        member("../outside"),
        member("results/../../outside"),
        member("link", tarfile.SYMTYPE, linkname="/etc"),
        member("hard", tarfile.LNKTYPE, linkname="../outside"),
        member("pipe", tarfile.FIFOTYPE),
        member("large", size=record.LARGEST + 1),
    ],
    ids=lambda info: info.name,
)
def test_an_archive_of_other_things_than_our_files_is_refused(tmp_path: Path, bad: tarfile.TarInfo) -> None:
    with tarfile.open(tmp_path / "bad.tar.gz", "w:gz") as tar:
        tar.addfile(member("good"), io.BytesIO(b"1"))
        if bad.size == 1:
            tar.addfile(bad, io.BytesIO(b"1"))
        else:
            assert tar.fileobj is not None
            tar.fileobj.write(bad.tobuf())  # its content is missing
    inside = tmp_path / "inside/work"
    inside.mkdir(parents=True)
    with pytest.raises(UserError, match=r"bad\.tar\.gz"):
        record.unpack(tmp_path / "bad.tar.gz", inside)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["bad.tar.gz", "good"]


@pytest.mark.parametrize("bytes_kept", [0, 10, 100])
def test_a_damaged_archive_is_named(tmp_path: Path, bytes_kept: int) -> None:
    file = tmp_path / record.ARCHIVE
    with tarfile.open(file, "w:gz") as tar:
        tar.addfile(member("good", size=2000), io.BytesIO(bytes(range(250)) * 8))
    file.write_bytes(file.read_bytes()[:bytes_kept])
    with pytest.raises(UserError, match=r"gpu_record\.tar\.gz: cannot be unpacked"):
        gpu_record.main(["headline", *TINY, "--out", str(tmp_path), "--continue_from", str(file)])
    with pytest.raises(UserError, match="cannot be unpacked"):
        gpu_record.main(["headline", *TINY, "--out", str(tmp_path), "--continue_from", str(tmp_path / "none")])
