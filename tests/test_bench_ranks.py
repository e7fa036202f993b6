"""The benchmark of several processes: the forecast's model against numbers worked out by hand, and one run alone."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics

import pytest
import torch

from tests import bench_ranks, forecast
from tests.bench_ranks import PARTS, REPEATED, SELECTION, SHARED, WORKS, Work
from tests.scaling_model import Curve, Links, Load, fullest_part, inner_step, limit
from utils.system.distributed import SINGLE

CPU = torch.device("cpu")
FREE = Links(within=1e30, between=1e30, latency_within=0, latency_between=0, latency_host=0)


def load(classes: int = 100, *, matching: float = 2.0, selection: float = 0.5, update: Curve | None = None) -> Load:
    """Of one second or two per class. update: unless given, 4 s however few images of it a rank trains on."""
    return Load(
        class_work=(1.0,) * classes,
        matching=Curve(((1, matching),)),
        selection=Curve(((1, selection),)),
        update=update or Curve(((0.01, 4.0), (1.0, 4.0))),
        drawn=6e6,
        exchanges=2,
        batches=16,
        batch=128,
        parameters=500_000,
    )


# --- What is sent -----------------------------------------------------------------------------------------------------


def test_an_all_reduce_costs_its_traffic_and_its_steps() -> None:
    links = Links(machine=8, within=100, between=10, latency_within=0.5, latency_between=3)
    assert links.all_reduce(100, 1) == 0
    assert links.all_reduce(100, 2) == pytest.approx(2 * (1 / 2) * 100 / 100 + 0.5)
    assert links.all_reduce(100, 8) == pytest.approx(2 * (7 / 8) * 100 / 100 + 3 * 0.5)
    assert links.all_reduce(100, 16) == pytest.approx(2 * (15 / 16) * 100 / 10 + 4 * 3)  # between machines
    assert links.all_reduce(0, 100) == pytest.approx(7 * 3)


def test_communication_is_the_exchanges_the_gradients_and_the_agreement() -> None:
    links = Links(machine=8, within=1e9, latency_within=1e-3, latency_host=0.25)
    repeated = inner_step(load(), 4, links)
    assert not repeated.shared
    assert repeated.images == pytest.approx(2 * (1.5 * 3e6 / 1e9 + 2e-3))
    assert (repeated.gradients, repeated.agreement) == (0, 0.5)
    shared = inner_step(load(update=Curve(((1, 4.0),))), 4, links)
    assert shared.shared
    assert shared.gradients == pytest.approx(16 * (1.5 * 4 * 500_000 / 1e9 + 2e-3))
    assert shared.seconds == pytest.approx(
        25 * 2.5 + 4 * fullest_part([25] * 4, 128) + shared.images + shared.gradients + 0.5
    )


def test_gradients_that_cost_more_than_they_save_are_not_exchanged() -> None:
    cheap, dear = (dataclasses.replace(FREE, within=rate) for rate in (1e12, 1e7))  # 16 x 2 MB, to save 2 s
    work = load(update=Curve(((1, 4.0),)))
    assert inner_step(work, 2, cheap).shared
    assert not inner_step(work, 2, dear).shared


# --- Who does what ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ranks", "most"), [(1, 100), (2, 50), (8, 13), (64, 2), (99, 2), (100, 1)])
def test_with_free_links_a_step_is_the_classes_of_the_rank_that_has_most_and_the_update(ranks: int, most: int) -> None:
    found = inner_step(load(), ranks, FREE)
    assert found.classes == most
    assert found.seconds == pytest.approx(most * (2.0 + 0.5) + 4.0)


def test_shared_out_two_equal_ranks_halve_an_update() -> None:
    work = dataclasses.replace(load(update=Curve(((1, 4.0),))), batch=2**15)  # chance hardly matters among so many
    found = inner_step(work, 2, FREE)
    assert found.shared
    assert found.update == pytest.approx(2.0, rel=0.01)


def test_chance_gives_one_rank_more_of_a_mini_batch() -> None:
    assert fullest_part([100], 128) == 1
    # The larger of two binomials: n / 2 + sqrt(n / (2 pi)).
    assert fullest_part([50, 50], 128) == pytest.approx(0.5 + (1 / (2 * torch.pi * 128)) ** 0.5, abs=0.01)
    assert 4 / 128 < fullest_part([2] * 36 + [1] * 28, 128) < 9 / 128
    assert fullest_part([3, 1], 128) == pytest.approx(0.75, abs=0.02)


def test_a_curve_is_proportional_where_nothing_else_is_known() -> None:
    assert Curve(((4, 2.0),)).at(1) == 0.5
    curve = Curve(((1, 1.0), (5, 3.0)))
    assert [curve.at(amount) for amount in (0.5, 1, 3, 5, 10)] == [1.0, 1.0, 2.0, 3.0, 6.0]


def test_more_gpus_never_take_longer_for_classes_and_slower_links_never_less_for_all() -> None:
    found = [inner_step(load(), n, FREE) for n in range(1, 101)]
    assert all(a.of_classes >= b.of_classes for a, b in itertools.pairwise(found))
    for n in (2, 8, 9, 64, 100):
        times = [inner_step(load(), n, Links(within=rate, between=rate / 9)).seconds for rate in (1e7, 1e9, 1e12)]
        assert times == sorted(times, reverse=True)
        assert times[-1] > inner_step(load(), n, FREE).seconds


# --- Where it stops ---------------------------------------------------------------------------------------------------


def test_classes_alone_scale_up_to_their_count() -> None:
    found = limit(load(update=Curve(((1, 0.0),))), FREE)
    assert found.startswith("It scales up to 64 GPUs: doubling 32 GPUs still gains 2.00 x")
    assert "no use for more than 100" in found


def test_an_update_that_all_repeat_stops_it() -> None:
    """With 1 s per class and 25 s of update, 4, 8 and 16 GPUs take 50, 38 and 32 s."""
    work = load(matching=1.0, selection=0.0, update=Curve(((0.01, 25.0), (1, 25.0))))
    assert [inner_step(work, n, FREE).seconds for n in (4, 8, 16)] == pytest.approx([50, 38, 32])
    found = limit(work, FREE)
    assert found.startswith("It stops scaling at 8 GPUs, which gain 1.19 x from being doubled")
    assert "network update, repeated does not shrink along: 25 s of 32 s on 16" in found


def test_whole_classes_stop_it() -> None:
    """5 classes: 1, 2 and 4 GPUs have 5, 3 and 2 of them, and 2.2 s beside."""
    work = load(5, matching=1.0, selection=0.0, update=Curve(((0.01, 2.2), (1, 2.2))))
    found = limit(work, FREE)
    assert found.startswith("It stops scaling at 2 GPUs, which gain 1.24 x")
    assert "from 3 to 2 of 5" in found


def test_slow_links_stop_it_and_are_named() -> None:
    work = load(update=Curve(((0.01, 0.0), (1, 0.0))))
    assert "exchange of drawn images does not shrink" in limit(work, dataclasses.replace(FREE, between=2e5))
    assert "agreement about stopping does not shrink" in limit(work, dataclasses.replace(FREE, latency_host=10))


# --- Measuring --------------------------------------------------------------------------------------------------------

DIGITS = Work("-d digits --ipc 1 --depth 1 --width 8 --batch_real 4 --n_data 8")


def test_one_process_measures_all_parts() -> None:
    parts = bench_ranks.parts_of(DIGITS, SINGLE, CPU, None, "fp32", compile=False)
    found = json.loads(json.dumps(bench_ranks.report(parts, bench_ranks.measure(parts, 2))))
    assert found["classes"] == [10]
    assert set(found["seconds"]) == set(PARTS)
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in found["seconds"].values())
    assert found["bytes"] == {REPEATED: 0, SHARED: 0}  # nobody else is there
    assert min(found["seconds"]["inner step"]) > statistics.median(found["seconds"][SELECTION]) / 10
    lines = bench_ranks.table({"digits": {1: found, 2: found}}, {"digits": DIGITS.flags}, 2, "fp32").splitlines()
    assert "| | digits, 1 process | digits, 2 processes |" in lines
    assert any(line.startswith("| matching | ") and line.endswith(", 1.00 x |") for line in lines)


def test_images_that_are_not_there_are_asked_for() -> None:
    given = argparse.Namespace(works=["digits", "cifar10"], image_folder=None)
    assert "--works cifar10" in (said := str(bench_ranks.problem(given)))
    assert "--image_folder DIR" in said
    given.image_folder = "somewhere"
    assert bench_ranks.problem(given) is None


def test_where_there_are_several_gpus_they_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[argparse.Namespace] = []

    def run(given: argparse.Namespace, device: torch.device) -> tuple[str, dict[str, object]]:
        ran.append(given)
        return "", {}

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 6)
    monkeypatch.setattr(bench_ranks, "run", run)
    forecast.run(argparse.Namespace(), torch.device("cuda"))
    assert ran == [argparse.Namespace(works=["cifar100_ipc50", "imagenet100"], processes=[1, 2, 4, 6])]


def test_a_tiny_work_is_measured_and_forecast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half as many images as the work has, so that twice as many are counted."""
    work = dataclasses.replace(WORKS["tiny"], smaller="--batch_real 4 --batch_syn_max 4 --n_data 16")
    monkeypatch.setitem(WORKS, "tiny", work)
    parts = forecast.measured(work, CPU, 1, "fp32", compile=False)
    assert [part.name for part in parts] == ["matching", "embedding", "k-means", forecast.UPDATE, forecast.SHARED]
    assert [part.whole for part in parts] == [2, 2, 1, 2, 2]
    found = forecast.load_of(work, parts, 0.5)
    assert found.matching.at(3) == pytest.approx(0.5 * 2 * 3 * parts[0].median)
    assert found.selection.at(1) == pytest.approx(0.5 * (2 * parts[1].median + parts[2].median) / 10)
    assert (found.drawn, found.exchanges, found.batches) == (32 * 3 * 8 * 8, 1, 4)
    assert found.parameters == 3 * 16 * 9 + 3 * 16 + 6 * (16 * 4 * 4) + 6
    text = forecast.forecast("tiny", parts, found, FREE, [1, 2, 7])
    assert "| 7 | classes are not divided |" in text
    assert text.splitlines()[-1].startswith("It ")
