"""Machines as people have them: Windows and macOS, notebooks, containers, several GPUs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import condense
from tests.files import quick, refused
from tests.killing import Server
from utils.system import distributed
from utils.system.device import pick_device


def test_a_set_is_distilled_and_evaluated_without_what_only_unix_has(server: Server, tmp_path: Path) -> None:
    argv = ["--niter=1", "--inner_loop=1", "--n_data=8", "--batch_real=8"]  # of condense.py alone
    argv += ["--epochs=1", "--repeat=1", "--width=8", "--device=cpu", f"--results_dir={tmp_path}"]
    ended = server.run(argv, program="tests.faults.other_systems:commands", environment={"OMP_NUM_THREADS": "1"})
    assert (ended.status, ended.err) == (0, ""), ended
    assert ended.out.count("status 0\n") == 3, ended
    assert ended.out.count("peak memory: not known on this system") == 2, ended
    (data,) = tmp_path.rglob("data.json")
    assert '"finished": true' in data.read_text() and data.with_name("eval.json").exists()
    assert not list(data.parent.glob(".*.part"))


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
