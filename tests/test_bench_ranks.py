"""The benchmark of several processes: the forecast's model against numbers worked out by hand, and one run alone."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from tests import bench, bench_ranks, forecast
from tests.bench_ranks import PARTS, REPEATED, SHARED, WORKS, Work
from tests.forecast import Links, Load, fullest_share, inner_step
from utils.system.distributed import SINGLE

CPU = torch.device("cpu")
FREE = Links(within=1e30, between=1e30, latency_within=0, latency_between=0, latency_host=0)
LOAD = Load(  # 2.5 s per class; an update takes 4 s however few of its images a rank trains on
    classes=100, matching=[(1, 2.0)], selection=[(1, 0.5)], update=[(0.01, 4.0), (1.0, 4.0)],
    drawn=6e6, exchanges=2, batches=16, batch=128, parameters=500_000,
)  # fmt: skip
SHRINKING = LOAD._replace(update=[(0.0, 0.0), (1.0, 4.0)])


@pytest.mark.parametrize(("ranks", "most"), [(1, 100), (2, 50), (8, 13), (64, 2), (99, 2), (100, 1)])
def test_with_free_links_a_step_is_the_classes_of_the_rank_that_has_most_and_the_update(ranks: int, most: int) -> None:
    found = inner_step(LOAD, ranks, FREE)
    assert found.classes == most and not found.shared
    assert found.seconds == pytest.approx(most * (2.0 + 0.5) + 4.0)


def test_an_update_is_shared_out_where_its_gradients_cost_less_than_it_saves() -> None:
    links = Links(machine=8, within=1e9, latency_within=1e-3, latency_host=0.25)
    repeated, shared = inner_step(LOAD, 4, links), inner_step(SHRINKING, 4, links)
    assert repeated.communication == pytest.approx(2 * (1.5 * 3e6 / 1e9 + 2e-3) + 0.5)
    gradients = 16 * (1.5 * 4 * 500_000 / 1e9 + 2e-3)
    assert shared.shared and shared.communication == pytest.approx(repeated.communication + gradients)
    assert shared.update == pytest.approx(4 * fullest_share(4, 100, 128))
    assert not inner_step(SHRINKING, 4, links._replace(within=1e7)).shared  # 16 x 2 MB


# --- Measuring --------------------------------------------------------------------------------------------------------


def test_one_process_measures_all_parts() -> None:
    digits = Work("-d digits --ipc 1 --depth 1 --width 8 --batch_real 4 --n_data 8")
    parts = bench_ranks.parts_of(digits, SINGLE, CPU, "fp32", compile=False)
    found = json.loads(json.dumps(bench_ranks.report(parts, bench_ranks.measure(parts, 2))))
    assert found["classes"] == [10] and set(found["seconds"]) == set(PARTS)
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in found["seconds"].values())
    assert found["bytes"] == {REPEATED: 0, SHARED: 0}  # nobody else is there
    lines = bench_ranks.table({"digits": {1: found, 2: found}}, {"digits": digits.flags}, 2, "fp32").splitlines()
    assert "| | digits, 1 process | digits, 2 processes |" in lines
    assert any(line.startswith("| matching | ") and line.endswith(", 1.00 x |") for line in lines)


def test_images_that_are_not_there_are_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["--device", "cpu", "--scaling", "--works", "digits", "cifar10"])
    assert "--works cifar10: say where its images are with --image_folder DIR" in capsys.readouterr().err


def test_a_tiny_forecast(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Half as many images as the work has, so that everything measured counts twice."""
    monkeypatch.setattr(forecast, "compiler_error", lambda device: "not in a test")
    work = dataclasses.replace(WORKS["tiny"], smaller="--batch_real 4 --batch_syn_max 4 --n_data 16")
    seconds = {part: bench_ranks.Timed([1.0], 0) for part in PARTS}
    with monkeypatch.context() as patch:
        patch.setattr(forecast, "measure", lambda parts, repeats: seconds)
        found, _ = forecast.measured(work, CPU, 1, "fp32")
    assert (found.matching, found.selection) == ([(1, 2.0)], [(1, 0.2)])
    assert found.update == [(1 / 6, 2.0), (1.0, 2.0)]
    assert (found.drawn, found.exchanges, found.batches) == (32 * 3 * 8 * 8, 1, 4)
    assert found.parameters == 3 * 16 * 9 + 3 * 16 + 6 * (16 * 4 * 4) + 6
    monkeypatch.setitem(WORKS, "tiny", work)
    monkeypatch.setattr(forecast, "FORECAST", ("tiny",))
    argv = ["--device", "cpu", "--forecast", "--repeats", "1", "--gpus", "1", "2", "7", "--json", str(tmp_path / "x")]
    assert bench.main(argv) == 0
    rows = [line.split(" | ")[0] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert rows == ["| GPUs", "| 1", "| 2"]  # classes are not divided
    assert set(json.loads((tmp_path / "x").read_text())["ranks"]["tiny"]) == {*Load._fields, "links"}
