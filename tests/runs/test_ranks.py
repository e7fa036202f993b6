"""Runs that several processes share: the same result as one process has, whoever owns the classes, and one clear end
whatever happens to one of them.

Ranks are forks of one process (tests/killing.py), connected by gloo as torchrun's are; torchrun itself is at the end.
"""

from __future__ import annotations

import ast
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import models
from data import Dataset
from models import Network
from tests.files import image_folder
from tests.killing import FOLDER, ROOT, Ended, Server, run_group, start_group, tiny
from tests.outcome import Outcome, metrics, outcome
from tests.tally import injected
from utils.method.augment import Augment
from utils.method.images import ImageSet, Normalize, RealImages
from utils.method.training import Recipe, Together, Trainer, fresh_network, update_network
from utils.numerics.compute import Compute
from utils.numerics.derivatives import flattened
from utils.system import distributed
from utils.system.distributed import SINGLE, LostRank, Shard, balanced
from utils.system.draws import Draws

UNEVEN = {"a": 12, "b": 30, "c": 9, "d": 45, "e": 20}  # images of a folder's classes
WEIGHTS, PIXELS = 1e-4, 1e-2  # differences allowed: of weights, and of pixels as a part of how far they moved
REPEATED, SHARED = ("--share_update", "off"), ("--share_update", "on")
LINE = re.compile(r"condense\.py: rank (\d): error: (.*)\n")


def ended_well(ended: list[Ended]) -> None:
    assert [(e.status, e.err) for e in ended] == [(0, "")] * len(ended), ended
    assert not any(e.out for e in ended[1:])  # one rank speaks for all


def distilled_by(server: Server, count: int, results: Path, *flags: str, **plan: Any) -> Path:
    """The run folder of so many ranks, which have to end well."""
    ended_well(run_group(server, count, tiny(results, *flags), **plan))
    (folder,) = results.glob("*/convnet*") if "resnet10" not in flags else results.glob("*/resnet*")
    return folder


# --- Who owns what ----------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0.1, 100), min_size=1, max_size=60), st.integers(1, 12))
def test_work_is_shared_out_whole_once_and_evenly(work: list[float], count: int) -> None:
    found = balanced(work, count)
    assert sorted(piece for pieces in found for piece in pieces) == list(range(len(work)))
    assert all(pieces == sorted(pieces) for pieces in found)
    loads = [sum(work[piece] for piece in pieces) for pieces in found]
    assert max(loads) - min(loads) <= max(work) + 1e-9
    assert min(map(len, found)) > 0 or len(work) < count


def test_equal_classes_are_dealt_out_and_a_large_one_counts_for_what_it_is() -> None:
    assert balanced([1.0] * 10, 3) == [[0, 3, 6, 9], [1, 4, 7], [2, 5, 8]]
    assert balanced([5.0, 1.0, 1.0, 1.0, 1.0, 1.0], 2) == [[0], [1, 2, 3, 4, 5]]


def test_one_process_owns_everything_and_sends_nothing() -> None:
    shard, x = SINGLE.shard([1.0, 2.0, 3.0]), torch.randn(3, 2)
    assert shard.classes == [0, 1, 2] and shard.all_gather(x) is x and shard.local(x) is x
    assert (
        SINGLE.all_reduce_sum(x) is x
        and SINGLE.all_reduce_max(1, 2.5) == [1.0, 2.5]
        and SINGLE.broadcast(lambda: "x") == "x"
    )
    assert SINGLE.sent == 0 and SINGLE.assigned([1.0] * 3) == [0, 1, 2]


class Holders:
    """Several ranks in one process: each one's tensors are recorded, then their sum is what all of them have."""

    def __init__(self) -> None:
        self.given: list[Tensor] = []

    def merge(self, x: Tensor) -> Tensor:
        self.given.append(x.clone())
        return x


@pytest.mark.parametrize("count", [2, 3])
def test_drawn_images_are_those_of_one_process_whoever_holds_them(count: int) -> None:
    sizes = list(UNEVEN.values())
    images = torch.randint(0, 256, (sum(sizes), 1, 4, 4), dtype=torch.uint8)
    labels = torch.arange(5).repeat_interleave(torch.tensor(sizes))
    whole = ImageSet(images, labels, classes=5, normalize=Normalize([0.5], [0.5]))
    index = torch.randperm(len(images))[:50]
    expected = RealImages(whole, sizes, None).take(index)
    assert torch.equal(expected[0], images[index]) and torch.equal(expected[1], labels[index])

    holders, picks = Holders(), torch.stack([torch.arange(8) + start for start in whole.starts])
    for classes in balanced([float(n) for n in sizes], count):
        part = whole.subset(torch.isin(labels, torch.tensor(classes)).nonzero().flatten())
        assert part.held == classes and part.classes == 5
        source = RealImages(part, sizes, holders.merge)
        found, its_labels = source.take(index)
        assert len(source) == len(whole) and torch.equal(its_labels, labels[index])
        ours = torch.isin(its_labels, torch.tensor(classes))
        assert torch.equal(found[ours], images[index][ours]) and not found[~ours].any()
        here = source.to_local(picks[classes])
        assert torch.equal(part.images[here], images[picks[classes]])
        assert torch.equal(source.to_global(here), picks[classes])
    assert torch.equal(torch.stack(holders.given).sum(0, dtype=torch.uint8), images[index])


# --- What they tell each other, in real processes ---------------------------------------------------------------------


def telling(argv: list[str]) -> int:
    """A program of several ranks: everything that they can tell each other; raises AssertionError."""
    with distributed.process_group("gloo", minutes=1) as group:
        assert group.count == 3
        odd = torch.tensor([-0.0, float("nan"), float("-inf"), 1e-42])
        rows = odd[None] if group.rank == 1 else torch.zeros(1, 4)
        shard = Shard(group, [[0, 3], [1], [2]][group.rank], 4)
        mine = odd.repeat(len(shard.classes), 1) * 1.0 if group.rank == 1 else torch.full((len(shard.classes), 4), 2.0)
        whole = shard.all_gather(mine)
        assert torch.equal(whole[1].view(torch.int32), odd.view(torch.int32)), whole  # bit for bit
        assert (whole[[0, 2, 3]] == 2).all() and torch.equal(
            shard.local(whole).view(torch.int32), mine.view(torch.int32)
        )
        for dtype in (torch.uint8, torch.bfloat16, torch.float32, torch.int64, torch.float64):
            x = torch.full((3, 2), 3, dtype=dtype) if group.rank == 2 else torch.zeros(3, 2, dtype=dtype)
            assert (group.all_reduce_disjoint(x) == 3).all(), dtype
        assert group.all_reduce_sum(torch.tensor([1.0, group.rank])).tolist() == [3.0, 3.0]
        assert group.all_reduce_max(group.rank, -group.rank, 0.5) == [2.0, 0.0, 0.5]
        content: dict[str, Any] = {"x": rows, "n": None, "t": ("a", 1.5, True), "d": {"y": torch.arange(3)}}
        found: dict[str, Any] = group.broadcast(lambda: content | {"rank": group.rank})
        assert found["rank"] == 0 and found["t"] == ("a", 1.5, True) and torch.equal(found["d"]["y"], torch.arange(3))
        assert distributed.rank_zero_only(lambda: 1)() == (1 if group.rank == 0 else None)
        assert group.assigned([1.0] * 7) == [[0, 3, 6], [1, 4], [2, 5]][group.rank]
        assert group.sent > 0
    return 0


def silent(argv: list[str]) -> int:
    """The last rank does not answer."""
    with distributed.process_group("gloo", minutes=1 / 60) as group:
        if group.rank == group.count - 1:
            time.sleep(30)
        group.all_reduce_max(1.0)
    return 0


def program(function: Any) -> dict[str, Any]:
    return {"program": f"tests.runs.test_ranks:{function.__name__}"}


def test_all_that_ranks_tell_each_other_arrives_bit_for_bit(server: Server) -> None:
    ended_well(run_group(server, 3, [], **program(telling)))


def test_a_rank_that_does_not_answer_is_given_up(server: Server) -> None:
    children = start_group(server, 2, [], **program(silent))
    ended = children[0].wait(20)
    assert ended.status == 1 and "rank 0: error: another rank has ended or does not answer" in ended.err, ended
    children[1].send(signal.SIGKILL)
    children[1].wait()


def test_a_time_out_between_gpus_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without GPUs: what NCCL is asked to do, and what is made of the error that PyTorch then raises."""
    for name in ("TORCHELASTIC_RUN_ID", "RANK", "LOCAL_RANK", "TORCH_NCCL_ASYNC_ERROR_HANDLING"):
        monkeypatch.setenv(name, "0")
    monkeypatch.delenv("TORCH_NCCL_ASYNC_ERROR_HANDLING")
    handling: list[str | None] = []

    def begun(*words: Any, **settings: Any) -> None:
        handling.append(os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING"))

    def timed_out(*words: Any) -> None:
        raise dist.DistBackendError("NCCL communicator was aborted on rank 0.\nOriginal reason: ...")

    monkeypatch.setattr(dist, "rendezvous", lambda *words, **settings: iter([(None, 0, 2)]))
    monkeypatch.setattr(dist, "PrefixStore", lambda prefix, store: store)
    monkeypatch.setattr(dist, "init_process_group", begun)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(dist, "all_reduce", timed_out)
    says = r"does not answer \(NCCL communicator was aborted on rank 0\.\); what was saved last"
    with distributed.process_group("cpu:gloo,cuda:nccl", minutes=1) as group, pytest.raises(LostRank, match=says):
        group.all_reduce_sum(torch.ones(2))
    assert handling == ["2"]  # operations are given up, and the process goes on


# --- The same run, whatever the number of ranks -----------------------------------------------------------------------


@pytest.mark.parametrize("count", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_repeated_updates_give_the_same_bits(server: Server, tmp_path: Path, undisturbed: Outcome, count: int) -> None:
    assert outcome(distilled_by(server, count, tmp_path, *REPEATED)) == undisturbed


CASES = {
    "dc": "--method dc --batch_real 8 --niter 2 --inner_loop 3 --net_epoch 2",
    "few": "--batch_syn_max 3 --decode_type multi --batch_real 200",  # more than a class has: some twice
    "pretrained": "--method dream+ --niter 1 --match grad+embed --metric cos",
    "random": "--select random --init random --norm_type batch",
    "sklearn": "--select kmeans --kmeans sklearn --interval 1",
    "herding": "--select herding --init noise",
    "boundary": "--select boundary --n_data 0",
    "central": "--select central --match feat",
    "dm": "--method dm --select kmeans --batch_real 8 --niter 3 --interval 2",
    "dsa": "--method dsa --select kmeans --niter 1 --inner_loop 3",
    "resnet": "--net_type resnet10 --width 4 --niter 1",
}


@pytest.mark.parametrize(
    "flags",
    [pytest.param(x, id=name, marks=[] if name == "dc" else pytest.mark.slow) for name, x in CASES.items()],
)
def test_so_it_is_for_every_selection_objective_and_network(server: Server, tmp_path: Path, flags: str) -> None:
    argv, often = [*REPEATED, *shlex.split(flags)], 1000.0
    one, two = (
        outcome(distilled_by(server, count, tmp_path / str(count), *argv, checkpoint_seconds=often)) for count in (1, 2)
    )
    assert one == two


@pytest.mark.parametrize("whiten", [pytest.param("none", marks=pytest.mark.slow), "zca"])
def test_classes_of_a_folder_may_be_of_any_size(server: Server, tmp_path: Path, whiten: str) -> None:
    """Mean, standard deviation and covariance, too, are those of all images, of which no rank has more than its own."""
    folder = image_folder(tmp_path / "images", UNEVEN, dict.fromkeys(UNEVEN, 3))
    argv = [*REPEATED, "--image_folder", str(folder), "--depth", "2", "--whiten", whiten]
    one, three = (distilled_by(server, count, tmp_path / str(count), *argv) for count in (1, 3))
    assert outcome(one) == outcome(three)
    for file, entry in (("data.json", "normalization"), ("options.json", "images")):
        assert len({str(json.loads((run / file).read_text())[entry]) for run in (one, three)}) == 1
    assert "3 ranks own 1 or 2 classes each" in (three / "log.txt").read_text()  # the largest one is alone


class InTurn(Trainer):
    """Ranks that share out updates, one after the other in this process."""

    def __init__(self, net: Network, real: ImageSet, recipe: Recipe, compute: Compute, count: int) -> None:
        self.everybody = [torch.tensor([c in classes for c in range(10)]) for classes in balanced([1.0] * 10, count)]
        super().__init__([net], [real], recipe, compute, None, Together(self.everybody[0], lambda total: total))

    def _gradients_together(self, x: Tensor, target: Tensor, together: Together, labels: Tensor) -> list[Tensor]:
        of_one = super()._gradients_together
        each = [of_one(x, target, together._replace(is_own=own), labels) for own in self.everybody]
        return [sum(parts[1:], parts[0]) for parts in zip(*each, strict=True)]


@pytest.mark.parametrize(
    ("dtype", "width"),
    [
        (torch.float64, 8),
        pytest.param(torch.float64, 128, marks=pytest.mark.slow),
        pytest.param(torch.float32, 128, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_tolerance_of_shared_updates_after_many_inner_steps(dtype: torch.dtype, width: int) -> None:
    """In float64 they agree to the last digits. In float32 they differ as much as if the initial weights had been
    changed in their last digits: where an image is of one colour, rounding decides what a ReLU does."""
    real = Dataset("digits", device=torch.device("cpu")).train
    real.images = real.images.to(dtype) / 255
    spec = models.resolve("convnet", channels=1, classes=10, side=8, depth=2, width=width)
    nets = [fresh_network(spec, Draws("cpu", 0)).to(dtype) for _ in range(3)]
    chance = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in nets[2].parameters():
            p.mul_(1 + torch.finfo(dtype).eps * torch.randn(p.shape, generator=chance, dtype=dtype).sign())
    recipe, compute = Recipe(32, Augment("color_crop"), "cut"), Compute(torch.device("cpu"))
    whole_ones = [Trainer([net], [real], recipe, compute) for net in nets[::2]]
    trainers = [*whole_ones, InTurn(nets[1], real, recipe, compute, 3)]
    for step in range(100 if width > 8 else 25):
        for trainer in trainers:
            update_network(trainer, n_data=128, draws=Draws("cpu", step))
    whole, *others = (flattened(net.parameters()) for net in nets)
    off, changed = (float((other - whole).abs().max()) for other in others)
    print(f"{dtype}, weights up to {whole.abs().max():.2f}: shared out {off:.1e}, last digits changed {changed:.1e}")
    assert 0 < off < (1e-13 if dtype == torch.float64 else 3 * changed)


def test_shared_updates_add_up_to_those_of_one_process(server: Server, tmp_path: Path) -> None:
    """After 40 inner steps against one network, up to the order of summation in float32.

    k-means answers a difference in the last digit with another representative now and then, random sampling does not.
    """
    flags = shlex.split("--niter 1 --inner_loop 40 --interval 10 --n_data 16 --eval_every 0 --select random --depth 2")
    flags += ["--image_folder", str(image_folder(tmp_path / "images", {"a": 20, "b": 9, "c": 14})), *SHARED]
    folders = [distilled_by(server, n, tmp_path / str(n), *flags, checkpoint_seconds=1000.0) for n in (1, 3)]
    one, other = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in folders)
    start, _ = torch.load(folders[0] / "data_000000.pt", weights_only=True)
    moved = (one["pixels"].flatten(0, 1) - start).abs().max()
    assert any(not torch.equal(a, b) for a, b in zip(one["net"].values(), other["net"].values(), strict=True))
    for name, weight in one["net"].items():
        torch.testing.assert_close(other["net"][name], weight, rtol=0, atol=WEIGHTS)
    assert (other["pixels"] - one["pixels"]).abs().max() < PIXELS * moved


def test_going_on_with_another_kind_of_update_is_recorded(server: Server, tmp_path: Path) -> None:
    ended = run_group(server, 2, tiny(tmp_path, *SHARED), of={0: {"computing": 4, "then": "SIGTERM"}})
    assert [e.status for e in ended] == [128 + signal.SIGTERM] * 2, ended
    folder = distilled_by(server, 2, tmp_path, *REPEATED)
    kinds = [event["network_update"] for event in metrics(folder) if "session" in event]
    assert kinds == ["shared by 2 ranks", "whole"]


def test_a_network_that_looks_at_whole_batches_does_not_share_them(server: Server, tmp_path: Path) -> None:
    ended = run_group(server, 2, tiny(tmp_path, *SHARED, "--norm_type", "batch"))
    assert [e.status for e in ended] == [2, 2] and "".join(e.err for e in ended).count("--share_update on") == 1


def test_trajectories_are_matched_by_ranks_together(server: Server, tmp_path: Path) -> None:
    """Up to the order of summation; experts have to be there."""
    flags = shlex.split("--method mtt --experts 1 --expert_epochs 3 --match_epochs 1 --max_start 2 --student_steps 3")
    flags += ["--batch_real", "128"]
    argv = tiny(tmp_path, *flags, "--niter", "4", "--inner_loop", "1", "--snapshot_every", "0")
    ended = run_group(server, 2, argv)
    assert [e.status for e in ended] == [2, 2] and "--experts_only" in "".join(e.err for e in ended), ended
    assert server.run(argv).status == 0
    ended_well(run_group(server, 2, [*argv, "--tag", "two"]))
    one, two = (
        torch.load(next((tmp_path / "digits").glob(f"convnet*{end}")) / "checkpoint.pt", weights_only=True)
        for end in ("mtt", "mtt_two")
    )
    torch.testing.assert_close(two["pixels"], one["pixels"], rtol=0, atol=1e-5)
    torch.testing.assert_close(two["learned"]["step_size"], one["learned"]["step_size"])
    assert not torch.equal(one["velocity"], torch.zeros_like(one["velocity"]))


def test_ranks_use_a_pool_and_learn_frequencies_together(server: Server, tmp_path: Path) -> None:
    """Up to the order of summation; the pool has to be there, and the seconds are spent for all ranks at once."""
    flags = shlex.split(
        "--method dance --match embed+cf --frequencies learned --frequency_count 8 --keep 0.5 --select members "
        "--experts 2 --expert_epochs 1 --n_data 16 --niter 3 --inner_loop 2 --interval 2 --snapshot_every 0 "
        "--average 0.5 --eval_every 0 --eval_seconds 1e-4"
    )
    folder = image_folder(tmp_path / "images", UNEVEN, dict.fromkeys(UNEVEN, 1))
    argv = tiny(tmp_path / "results", *flags, *REPEATED, "--image_folder", str(folder), "--depth", "2")
    ended = run_group(server, 2, argv)
    assert [e.status for e in ended] == [2, 2], ended
    said = "".join(e.err for e in ended)
    assert said.count("--networks middle: 2 experts are missing") == 1 and "--experts_only" in said
    assert server.run(argv).status == 0
    ended_well(run_group(server, 2, [*argv, "--tag", "two"]))
    one, two = (
        torch.load(next((tmp_path / "results/folder").glob(f"convnet*{end}")) / "checkpoint.pt", weights_only=True)
        for end in ("dance", "dance_two")
    )
    assert torch.equal(two["picks"], one["picks"])
    for name in ("pixels", "average", "velocity"):
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-5)
    torch.testing.assert_close(two["learned"], one["learned"], rtol=0, atol=1e-5)
    assert one["learned"]["frequencies"][1].count_nonzero() > 0
    spent = [*argv, "--tag", "spent", "--niter", "1000", "--seconds", "0.5"]
    ended_well(run_group(server, 2, spent))  # by clocks that differ


def test_an_evaluation_is_spread_over_ranks_and_recorded_once(server: Server, tmp_path: Path) -> None:
    assert server.run(tiny(tmp_path)).status == 0
    run = tmp_path / FOLDER
    flags = shlex.split("-n convnet --epochs 1 --repeat 3 --width 4 --device cpu --confusion --teacher all")
    argv = [str(run), *flags, "--baselines", "random", "--results_dir", str(tmp_path), "--json"]
    one = server.run([*argv], program="train:main")
    assert one.status == 0, one
    (run / "eval.json").unlink()
    shutil.rmtree(tmp_path / "digits" / "teachers")
    many = run_group(server, 3, argv, program="train:main")
    ended_well(many)

    def results(ended: Ended) -> list[tuple[Any, ...]]:
        records = json.loads(ended.out.splitlines()[-1])["results"]
        return [(r["net"], r["trained_on"], r["accuracies"], r["best_of_four"], r["confusion"]) for r in records]

    assert results(many[0]) == results(one) and len(results(one)) == 6
    assert len(json.loads((run / "eval.json").read_text())["results"]) == 6


# --- Stops, and one rank that fails -----------------------------------------------------------------------------------


def test_a_run_goes_on_with_any_number_of_ranks(server: Server, tmp_path: Path, undisturbed: Outcome) -> None:
    """2 ranks, 1, 3, 2, each stopped by a signal that any of them gets."""
    argv = tiny(tmp_path, *REPEATED)
    for count, receiver in ((2, 1), (1, 0), (3, 2)):
        ended = run_group(server, count, argv, of={receiver: {"computing": 4, "then": "SIGTERM"}})
        assert [e.status for e in ended] == [128 + signal.SIGTERM] * count, ended
        assert "stopped (SIGTERM) and saved" in ended[0].out and not any(e.out for e in ended[1:])
    ended = run_group(server, 2, argv)
    ended_well(ended)
    assert "going on after outer iteration" in ended[0].out
    assert outcome(tmp_path / FOLDER) == undisturbed


@pytest.mark.parametrize(
    ("flags", "of", "status"),
    [
        pytest.param(["--max_minutes", "1e-4"], {}, 0, marks=pytest.mark.slow),
        ([], {0: {"computing": 1, "then": "SIGINT"}}, 130),  # in an evaluation, of which the other rank has no training
    ],
    ids=["a time limit", "a signal"],
)
def test_a_stop_ends_all_ranks_at_the_same_step(
    server: Server, tmp_path: Path, undisturbed: Outcome, flags: list[str], of: dict[int, Any], status: int
) -> None:
    ended = run_group(server, 2, tiny(tmp_path, *REPEATED, *flags), of=of)
    assert [e.status for e in ended] == [status, status], ended
    assert outcome(distilled_by(server, 3, tmp_path, *REPEATED)) == undisturbed


@pytest.mark.parametrize("victim", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_killed_rank_ends_the_others(server: Server, tmp_path: Path, undisturbed: Outcome, victim: int) -> None:
    argv = tiny(tmp_path, *REPEATED)
    with injected("a rank of several is killed") as fault:
        began = time.monotonic()
        ended = run_group(server, 3, argv, of={victim: {"computing": 9, "then": "kill"}})
        assert time.monotonic() - began < 20
        assert ended[victim].status == -signal.SIGKILL
        for rank in {0, 1, 2} - {victim}:
            assert ended[rank].status == 1 and ended[rank].err.count("\n") <= 1, ended
        said = LINE.findall("".join(e.err for e in ended))
        assert said and all("another rank has ended" in message for _, message in said), ended
        ended_well(run_group(server, 2, argv))
        fault.kept(outcome(tmp_path / FOLDER) == undisturbed)


def test_one_rank_without_memory_says_so_and_ends_all(server: Server, tmp_path: Path, undisturbed: Outcome) -> None:
    argv = tiny(tmp_path, *REPEATED)
    ended = run_group(server, 3, argv, of={1: {"computing": 9, "then": "full"}})
    assert [e.status for e in ended] == [1, 1, 1], ended
    assert ended[1].err.startswith("condense.py: rank 1: error: the memory is full (DefaultCPUAllocator")
    assert ended[0].err == ended[2].err == "", ended  # they know that it has been said
    ended_well(run_group(server, 3, argv))
    assert outcome(tmp_path / FOLDER) == undisturbed


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--facter", "2"], "condense.py: error: unknown option --facter"),
        (["--image_folder", "/nowhere"], "--image_folder /nowhere: cannot use"),
        (["--share_update", "on", "--norm_type", "batch"], "--share_update on: convnet"),
        (["--resume_from", "/nowhere"], "/nowhere: no such file"),
        (["--device", "cuda"], "--device cuda: PyTorch sees no CUDA device here"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_mistake_is_told_once(server: Server, tmp_path: Path, flags: list[str], says: str) -> None:
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("there is one")
    ended = run_group(server, 2, tiny(tmp_path, *flags))
    said = "".join(e.err for e in ended)
    assert {e.status for e in ended} <= {1, 2} and said.count("\n") == 1 and says in said, ended


def test_more_ranks_than_classes_are_told_how_many_may_be_started(server: Server, tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "images", {"a": 4, "b": 4})
    ended = run_group(server, 3, tiny(tmp_path, "--image_folder", str(folder), "--depth", "2"))
    assert [e.status for e in ended] == [2, 2, 2]
    said = "".join(e.err for e in ended)
    assert "3 ranks cannot share 2 classes" in said and "start 2 processes or fewer" in said and said.count("\n") == 1


def test_two_groups_do_not_share_a_run_folder(server: Server, tmp_path: Path) -> None:
    first = start_group(server, 2, tiny(tmp_path, "--niter", "400"))
    while not (tmp_path / FOLDER / ".lock").exists():
        time.sleep(0.01)
    time.sleep(0.2)
    second = run_group(server, 2, tiny(tmp_path, "--niter", "400"))
    for child in first:
        child.send(signal.SIGTERM)
    assert [child.wait().status for child in first] == [143, 143]
    said = "".join(e.err for e in second)
    assert [e.status for e in second] == [1, 1] and "in use by process" in said and said.count("\n") == 1


# --- The program ------------------------------------------------------------------------------------------------------


def test_the_main_loop_says_nothing_of_ranks() -> None:
    tree = ast.parse((ROOT / "condense.py").read_text())
    (loop,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "condense")
    text = ast.unparse(loop.body[1:])  # type: ignore[arg-type]
    assert not re.search(r"rank|group|shard|dist", text)


LOCAL = {"GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0", "OMP_NUM_THREADS": "1"}


class Torchrun:
    """condense.py under PyTorch's launcher, which starts it again after a failure, so many times."""

    def __init__(self, count: int, argv: list[str], *, restarts: int = 0, script: Path = ROOT / "condense.py") -> None:
        how = ["--standalone", f"--nproc_per_node={count}", f"--max-restarts={restarts}", "--monitor-interval=0.1"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *how, str(script), *argv],
            env={**os.environ, **LOCAL},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def workers(self) -> dict[int, int]:
        """Process numbers by rank, of those that are there at the moment."""
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            with suppress(OSError, StopIteration):
                if int((path / "stat").read_text().rpartition(")")[2].split()[1]) == self.process.pid:
                    words = (path / "environ").read_text().split("\0")
                    found[int(next(w for w in words if w.startswith("RANK="))[5:])] = int(path.name)
        return found

    def wait(self) -> Ended:
        out, err = self.process.communicate(timeout=300)
        return Ended(self.process.returncode, out, err)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_torchrun_starts_a_killed_run_again_and_ctrl_c_ends_it_once(server: Server, tmp_path: Path) -> None:
    """--restart is meant once. One process then goes on to the same bytes."""
    argv = [*REPEATED, "--niter", "25", "--snapshot_every", "0", "--eval_every", "0"]
    run = Torchrun(2, tiny(tmp_path, *argv, "--restart"), restarts=1)
    while not (tmp_path / FOLDER / "checkpoint.pt").exists():
        time.sleep(0.01)
    os.kill(run.workers()[1], signal.SIGKILL)
    while "going on after" not in (tmp_path / FOLDER / "log.txt").read_text():
        assert run.process.poll() is None
        time.sleep(0.01)
    run.process.send_signal(signal.SIGINT)
    ended = run.wait()
    assert ended.out.count("stopped (SIGINT) and saved in") == ended.out.count("going on after outer iteration") == 1
    assert ended.err.count("condense.py: ") == len(LINE.findall(ended.err)) <= 1, ended  # of the killed one's loss
    for results in (tmp_path, tmp_path / "alone"):
        last = server.run(tiny(results, *argv), checkpoint_seconds=1000.0)
        assert last.status == 0, last
    assert outcome(tmp_path / FOLDER).distilled == outcome(tmp_path / "alone" / FOLDER).distilled


OFTEN = """import sys
sys.path.insert(0, {root!r})
import condense
from utils.runs import folder as run
from utils.system import process
run.CHECKPOINT_SECONDS = 0.3
process.run_main(condense.main)
"""
KILLS = 20


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_twenty_kills_at_random_moments_change_nothing(server: Server, tmp_path: Path) -> None:
    """One rank or the other, while they load, find each other, distil, or save, which they do three times a second."""
    script, chance = tmp_path / "often.py", random.Random(0)
    script.write_text(OFTEN.format(root=str(ROOT)))
    argv = shlex.split("--ipc 1 -f 1 --niter 700 --snapshot_every 0 --eval_every 0 --share_update off")
    alone = server.start(tiny(tmp_path / "alone", *argv), checkpoint_seconds=1000.0).wait(300)
    assert alone.status == 0, alone
    there, began = tmp_path / "digits" / "convnet2_f1_ipc1", time.monotonic()
    run = Torchrun(2, tiny(tmp_path, *argv), restarts=KILLS, script=script)
    while not (there / "metrics.jsonl").exists():
        assert run.process.poll() is None, run.wait()
        time.sleep(0.01)
    loading = time.monotonic() - began
    workers: dict[int, int] = {}
    for _ in range(KILLS):
        old = set(workers.values())
        while len(workers := run.workers()) < 2 or set(workers.values()) & old:
            assert run.process.poll() is None, run.wait()
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 1.75 * loading))
        os.kill(workers[chance.randrange(2)], signal.SIGKILL)
    ended = run.wait()
    assert ended.status == 0, ended
    sessions = [event for event in metrics(there) if "session" in event]
    assert len(sessions) > KILLS // 4 and len({event["iteration"] for event in sessions}) > KILLS // 5
    results = [outcome(folder) for folder in (there, tmp_path / "alone" / "digits" / "convnet2_f1_ipc1")]
    for _ in range(KILLS):
        with injected("a rank under torchrun is killed") as fault:
            fault.kept(results[0].distilled == results[1].distilled)
