"""Machines as people have them: Windows and macOS, notebooks, containers, several GPUs."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import condense
from tests.files import quick, refused
from tests.killing import Server
from utils.files import lock
from utils.system import distributed, memory
from utils.system.device import pick_device
from utils.system.errors import UserError


def test_all_works_without_what_only_unix_has_and_in_a_notebook(server: Server, tmp_path: Path) -> None:
    """A notebook's MPLBACKEND names what is not installed; importing matplotlib would fail."""
    argv = ["--niter=1", "--inner_loop=1", "--n_data=8", "--batch_real=8"]  # of condense.py alone
    argv += ["--epochs=1", "--repeat=1", "--width=8", "--device=cpu", f"--results_dir={tmp_path}"]
    environment = {"OMP_NUM_THREADS": "1", "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    ended = server.run(argv, program="tests.faults.other_systems:commands", environment=environment)
    assert (ended.status, ended.err) == (0, ""), ended
    assert ended.out.count("status 0\n") == 4, ended
    assert ended.out.count("peak memory: not known on this system") == 2, ended
    run = tmp_path / "digits" / "convnet2_f1_ipc1"
    assert '"finished": true' in (run / "data.json").read_text() and (run / "eval.json").exists()
    assert (run / "confusion" / "convnet2_distilled_set_1_per_class.png").exists() and (run / "curves.png").exists()
    assert not list(run.glob(".*.part"))


def test_windows_locks_a_byte_that_nobody_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for msvcrt, which knows no more than who has locked which file."""
    holders: dict[int, int] = {}  # by the file's inode, the descriptor that has locked it

    def locking(handle: int, mode: int, count: int) -> None:
        assert (mode, count) == (2, 1) and os.lseek(handle, 0, os.SEEK_CUR) > 10**6
        if holders.setdefault(os.fstat(handle).st_ino, handle) != handle:
            raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(lock, "fcntl", None)
    monkeypatch.setattr(lock, "msvcrt", SimpleNamespace(LK_NBLCK=2, locking=locking), raising=False)
    with lock.locked(tmp_path / ".lock", doing="x", wait=False):
        says = rf"in use by process {os.getpid()} on .*\(x, since"
        with pytest.raises(UserError, match=says), lock.locked(tmp_path / ".lock", doing="y", wait=False):
            pass
        assert (tmp_path / ".lock").read_text().startswith('{"host"')


# --- Memory -----------------------------------------------------------------------------------------------------------


def written(root: Path, files: Mapping[str, object]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{content}\n")
    return root


SYSTEM = {"meminfo": "MemTotal: 100 kB\nMemAvailable: 50 kB", "stat": "anon 5\ninactive_file 300\nactive_file 7"}
VERSION_2 = {"job/memory.max": 8000, "job/memory.current": 5000, "job/memory.stat": SYSTEM["stat"]}
UNLIMITED = {"job/step/memory.max": "max", "job/step/memory.current": 1}
VERSION_1 = {"memory/job/memory.limit_in_bytes": 9000, "memory/job/memory.usage_in_bytes": 8000}


@pytest.mark.parametrize(
    ("groups", "files", "free"),
    [
        ("0::/job", VERSION_2, 8000 - 5000 + 300),
        ("0::/job/step", {**VERSION_2, **UNLIMITED}, 8000 - 5000 + 300),  # the limit is that of the group around
        ("0::/outside/abc", {"memory.max": 7000, "memory.current": 9000}, 0),  # a container's own name is not in it
        ("4:cpu:/job\n3:memory:/job\n0::/", VERSION_1, 1000),
        ("3:cpu:/job\n0::/job", {"job/memory.max": "max", "job/memory.current": 1}, 50 * 1024),
        ("damaged", VERSION_2, 50 * 1024),
    ],
)
def test_the_limits_of_a_container_count_as_the_memory_there_is(
    groups: str, files: dict[str, object], free: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path, {"meminfo": SYSTEM["meminfo"], "cgroup": groups})
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "MEMBERSHIP", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "CGROUPS", written(tmp_path / "groups", files))
    assert memory.free() == free


def test_memory_elsewhere_is_what_psutil_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "missing")
    monkeypatch.setattr(memory, "MEMBERSHIP", tmp_path / "missing")
    monkeypatch.setattr(memory, "resource", None)
    monkeypatch.delattr(os, "sysconf")
    monkeypatch.setitem(sys.modules, "psutil", None)  # not installed
    assert (memory.free(), memory.peak()) == (memory.UNKNOWN, 0)
    psutil = ModuleType("psutil")
    vars(psutil).update(
        virtual_memory=lambda: SimpleNamespace(available=123),
        Process=lambda: SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=45)),
    )
    monkeypatch.setitem(sys.modules, "psutil", psutil)
    assert (memory.free(), memory.peak()) == (123, 45)


# --- Several GPUs -----------------------------------------------------------------------------------------------------


def test_one_of_several_gpus_is_named_by_its_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(condense.main, quick(tmp_path, "--device", "mps"), "--device", "cuda:N", status=2, unchanged=tmp_path)
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(condense.main, quick(tmp_path, "--device", "cuda:0"), "no CUDA device", status=2, unchanged=tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert pick_device("cuda:1") == torch.device("cuda", 1) and pick_device("cuda:0") == torch.device("cuda", 0)
    assert pick_device("cuda", 1) == torch.device("cuda", 1) and chosen == [1, 0, 1]
    assert pick_device("cuda") == pick_device("auto") == torch.device("cuda") and pick_device("cpu", 1).type == "cpu"
    refused(condense.main, quick(tmp_path, "--device", "cuda:2"), "sees 2", "cuda:1", status=2, unchanged=tmp_path)
    monkeypatch.setattr(distributed, "local_rank", lambda: 0)
    refused(condense.main, quick(tmp_path, "--device", "cuda:1"), "torchrun", status=2, unchanged=tmp_path)


# --- Threads ----------------------------------------------------------------------------------------------------------


def test_a_run_in_a_thread_of_another_program_goes_without_signals(tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(condense.main, quick(tmp_path)).result() == 0
