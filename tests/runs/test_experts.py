"""Experts are trained once, survive any end of the process, and their files say what they are."""

from __future__ import annotations

import logging
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import models
from tests.outcome import flat
from utils.files import atomic, tensors
from utils.method.augment import Augment
from utils.method.images import ImageSet, Normalize
from utils.method.pool import image_losses
from utils.method.selection import Context
from utils.method.training import Recipe, Trainer, batches, fresh_network
from utils.numerics.compute import Compute
from utils.numerics.derivatives import flattened
from utils.runs import experts
from utils.runs.expert_training import portions, selected
from utils.runs.experts import Experts
from utils.system.draws import Draws
from utils.system.errors import UserError
from utils.system.process import Stopped, Stopper

CLASSES, PER_CLASS, SIDE, EPOCHS, COUNT = 3, 9, 8, 4, 2
CPU = Compute(torch.device("cpu"))
IDENTITY = {"dataset": "invented", "lr": 0.01, "sizes": (3, 9)}


def real_set() -> ImageSet:
    images = torch.rand(CLASSES * PER_CLASS, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(CLASSES).repeat(PER_CLASS)
    return ImageSet(images, labels, classes=CLASSES, normalize=Normalize((0.5,) * 3, (0.25,) * 3))


def make(k: int, *, batch_size: int = 8, lr: float = 0.01) -> Trainer:
    spec = models.resolve("convnet", channels=3, classes=CLASSES, side=SIDE, depth=2, width=8, norm="batch")
    recipe = Recipe(batch_size=batch_size, augment=Augment("color_crop"), mixup="cut", lr=lr)
    return Trainer([fresh_network(spec, Draws("cpu", "expert", k))], [real_set()], recipe, CPU)


def epoch(trainer: Trainer, k: int, e: int) -> None:
    trainer.all_images([Draws("cpu", "epoch", k, e)])


class StopAfter(Stopper):
    """Has a reason from the n-th time on that it is asked for one."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.left = n

    def reason(self, *, signals_only: bool = False) -> int:
        self.left -= 1
        if self.left == 0:
            self.signal = signal.SIGTERM
        return super().reason(signals_only=signals_only)

    def check(self, *, signals_only: bool = False) -> None:
        self.obey(super().reason(signals_only=signals_only))


def found_in(folder: Path, identity: dict[str, Any] = IDENTITY, *, pool: bool = False) -> Experts:
    return Experts(
        folder, identity, count=COUNT, epochs=EPOCHS, ends_only=pool, images=CLASSES * PER_CLASS if pool else None
    )


def train(
    found: Experts,
    stopper: Stopper | None = None,
    told: list[int] | None = None,
    *,
    make: Callable[[int], Trainer] = make,
    epoch: Callable[[Trainer, int, int], None] = epoch,
) -> None:
    """Train what is missing. told: gets a 1 for every epoch. Raises Stopped when the stopper says so."""
    stopper = Stopper() if stopper is None else stopper
    with found.held():
        for k in found.missing():
            trainer = make(k)
            judged = partial(image_losses, images=real_set(), compute=CPU) if found.ends_only else None
            for e in found.epochs_left(k, trainer, stopper.reason, judged):
                epoch(trainer, k, e)
                if told is not None:
                    told.append(1)
            stopper.check()


def trained(
    folder: Path, stopper: Stopper | None = None, told: list[int] | None = None, *, pool: bool = False
) -> Experts:
    found = found_in(folder, pool=pool)
    train(found, stopper, told)
    return found


def rows(of: Experts) -> Tensor:
    """All that the trajectories hold, (experts, epochs + 1, P)."""
    return torch.stack([torch.stack([of.pair(k, e, e)[0] for e in range(EPOCHS + 1)]) for k in range(COUNT)])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Experts:
    """What nothing has interrupted."""
    return trained(tmp_path_factory.mktemp("whole") / "experts")


def test_a_trajectory_is_what_a_plain_training_goes_through(whole: Experts) -> None:
    for k in range(COUNT):
        trainer = make(k)
        for e in range(EPOCHS + 1):
            assert torch.equal(whole.pair(k, e, 0)[0], flattened(trainer.nets[0].parameters()))
            trainer.epoch(torch.arange(CLASSES * PER_CLASS), [Draws("cpu", "epoch", k, e)])
    assert (whole.missing(), whole.done()) == ([], COUNT * EPOCHS)
    assert not torch.equal(*(whole.pair(k, 0, 0)[0] for k in range(COUNT)))


@pytest.mark.parametrize("asked", [1, 2, EPOCHS, EPOCHS + 1, COUNT * EPOCHS])
def test_experts_that_are_stopped_and_go_on_are_those_never_stopped(tmp_path: Path, whole: Experts, asked: int) -> None:
    told: list[int] = []
    with pytest.raises(Stopped):
        trained(tmp_path, StopAfter(asked), told)
    assert found_in(tmp_path).done() == sum(told) == asked
    assert len(found_in(tmp_path).missing()) == COUNT - asked // EPOCHS
    again = trained(tmp_path, told=told)
    assert sum(told) == COUNT * EPOCHS
    assert torch.equal(rows(again), rows(whole))
    assert again.seconds > 0


def test_a_process_that_dies_leaves_its_state(tmp_path: Path, whole: Experts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "CHECKPOINT_SECONDS", 0)
    found = found_in(tmp_path)

    def dying(trainer: Trainer, k: int, e: int) -> None:
        epoch(trainer, k, e)
        if (k, e) == (1, 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(found, epoch=dying)
    assert found_in(tmp_path).missing() == [1] and found_in(tmp_path).done() == EPOCHS + 2
    assert torch.equal(rows(trained(tmp_path)), rows(whole))


DAMAGE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "cut": lambda content: {**content, "trajectory": content["trajectory"][0]},
    "spoilt": lambda content: {**content, "trajectory": content["trajectory"] * torch.nan},
    "moved": lambda content: {**content, "trajectory": content["trajectory"][:2] + 1},
    "foreign": lambda content: {**content, "of": "another"},
    "without momentum": lambda content: {**content, "momentum": None},
    "no dictionary": lambda content: 5,
}


@pytest.mark.parametrize("stopped_after", [2, EPOCHS])
@pytest.mark.parametrize("damage", ["one bit", *DAMAGE])
def test_a_damaged_file_is_reported_once_and_its_expert_trained_again(
    tmp_path: Path, whole: Experts, caplog: pytest.LogCaptureFixture, damage: str, stopped_after: int
) -> None:
    with pytest.raises(Stopped):
        trained(tmp_path, StopAfter(stopped_after))
    file = tmp_path / "expert_000.pt"
    if damage == "one bit":
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    else:
        tensors.write_tensors(file, DAMAGE[damage](tensors.read_tensors(file, "")))
    with caplog.at_level(logging.WARNING, "dream"):
        assert torch.equal(rows(trained(tmp_path)), rows(whole))
    if damage != "without momentum" or stopped_after < EPOCHS:  # which a finished expert does not need
        (warning,) = [record.getMessage() for record in caplog.records]
        assert warning.startswith(f"{file}: ") and warning.endswith("; trained again")


def test_a_damaged_file_that_is_read_while_distilling_names_the_remedy(tmp_path: Path) -> None:
    trained(tmp_path)
    (tmp_path / "expert_001.pt").write_bytes(b"PK\3\4")
    with pytest.raises(UserError, match=r"expert_001.pt: .*; run the same command again"):
        found_in(tmp_path).pair(1, 0, 1)


# --- Of a pool, the two ends alone ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_pool(tmp_path_factory: pytest.TempPathFactory) -> Experts:
    """What nothing has interrupted."""
    return trained(tmp_path_factory.mktemp("whole") / "pool", pool=True)


def contents(of: Experts) -> list[dict[str, str]]:
    """Digests of all that the files hold but times."""
    files = (tensors.read_tensors(file, "") for file in sorted(of.folder.glob("*.pt")))
    return [flat("", {k: v for k, v in content.items() if k != "seconds"}) for content in files]


def test_a_pool_holds_the_ends_of_the_trajectories_and_the_losses_under_the_last_network(
    whole: Experts, whole_pool: Experts
) -> None:
    for k in range(COUNT):
        initial, final = whole_pool.pair(k, 0, EPOCHS)
        assert torch.equal(initial, whole.pair(k, 0, 0)[0]) and torch.equal(final, whole.pair(k, EPOCHS, EPOCHS)[0])
        assert tensors.read_tensors(whole_pool.folder / f"expert_{k:03}.pt", "")["trajectory"].shape[0] == 2
        trainer = make(k)
        for e in range(EPOCHS):
            epoch(trainer, k, e)
        assert torch.equal(whole_pool.losses(k), image_losses(trainer.nets[0], real_set(), CPU))
    assert whole_pool.missing() == [] and whole_pool.seconds > 0


@pytest.mark.parametrize("asked", [1, EPOCHS - 1, EPOCHS, EPOCHS + 2])
def test_a_pool_that_is_stopped_and_goes_on_is_that_never_stopped(
    tmp_path: Path, whole_pool: Experts, asked: int
) -> None:
    told: list[int] = []
    with pytest.raises(Stopped):
        trained(tmp_path, StopAfter(asked), told, pool=True)
    assert found_in(tmp_path, pool=True).done() == sum(told) == asked
    again = trained(tmp_path, told=told, pool=True)
    assert sum(told) == COUNT * EPOCHS and contents(again) == contents(whole_pool)


DAMAGE_OF_POOLS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no epochs": lambda content: {k: v for k, v in content.items() if k != "epochs"},
    "epochs in words": lambda content: {**content, "epochs": "4"},
    "too many epochs": lambda content: {**content, "epochs": EPOCHS + 1},
    "no epoch yet": lambda content: {**content, "epochs": 0},
    "one end": lambda content: {**content, "trajectory": content["trajectory"][:1].clone()},
    "a whole trajectory": lambda content: {**content, "trajectory": content["trajectory"].repeat(2, 1)},
    "cut losses": lambda content: {**content, "losses": torch.zeros(CLASSES)},
    "spoilt losses": lambda content: {**content, "losses": torch.full((CLASSES * PER_CLASS,), torch.nan)},
    "losses in words": lambda content: {**content, "losses": "low"},
    "no losses": lambda content: {k: v for k, v in content.items() if k != "losses"},
}


@pytest.mark.parametrize("damage", DAMAGE_OF_POOLS)
def test_a_damaged_file_of_a_pool_is_reported_once_and_trained_again(
    tmp_path: Path, whole_pool: Experts, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    shutil.copytree(whole_pool.folder, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "expert_000.pt"
    tensors.write_tensors(file, DAMAGE_OF_POOLS[damage](tensors.read_tensors(file, "")))
    with pytest.raises(UserError, match=r"expert_000.pt: .*; run the same command again"):
        found_in(tmp_path, pool=True).losses(0)
    with caplog.at_level(logging.WARNING, "dream"):
        assert contents(trained(tmp_path, pool=True)) == contents(whole_pool)
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning.startswith(f"{file}: ") and warning.endswith("; trained again")


# --- Whose they are ---------------------------------------------------------------------------------------------------


def test_other_experts_are_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trained(tmp_path, StopAfter(-1))
    with pytest.raises(UserError, match=r"other experts \(lr 0.01 there, 0.1 here\); use another folder") as refused:
        found_in(tmp_path, {**IDENTITY, "lr": 0.1})
    assert str(tmp_path) in str(refused.value)
    (tmp_path / "experts.json").unlink()
    with caplog.at_level(logging.WARNING, "dream"):  # every file says what it is of
        assert found_in(tmp_path, {**IDENTITY, "lr": 0.1}).missing() == [0, 1]
        assert found_in(tmp_path).missing() == []
    (tmp_path / "experts.json").write_text("{")
    with found_in(tmp_path).held():
        pass
    assert atomic.read_json(tmp_path / "experts.json")["lr"] == 0.01


def test_numbers_that_leave_their_range_end_the_training_and_are_not_saved(tmp_path: Path) -> None:
    found = found_in(tmp_path)
    with pytest.raises(UserError, match=r"expert 0: .* after epoch 1; use a lower --lr"):
        train(found, make=lambda k: make(k, lr=1e30))
    assert found_in(tmp_path).missing() == [0, 1] and not list(tmp_path.glob("*.pt"))


def test_trajectories_beyond_the_memory_are_read_again(whole: Experts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "MEMORY", 1)
    found = found_in(whole.folder)
    for _ in range(2):
        for k in range(COUNT):
            assert torch.equal(found.pair(k, 1, 3)[1], whole.pair(k, 3, 3)[0])
            assert list(found._at_hand) == [k]


# --- An epoch on representatives --------------------------------------------------------------------------------------


class Watched(Trainer):
    """Notes which images every mini-batch consists of."""

    def watch(self) -> list[list[int]]:
        seen: list[list[int]] = []

        def noted(index: Tensor, u: Tensor, partner: Tensor, mix: Tensor) -> None:
            seen.append(index[0].tolist())
            self._steps(index, u, partner, mix)

        self.steps = noted  # type: ignore[assignment]  # on a CPU, Captured is the function
        return seen


def watched(batch_size: int) -> tuple[Watched, list[list[int]]]:
    trainer = make(0)
    recipe = Recipe(batch_size=batch_size, augment=Augment("none"), mixup="vanilla")
    found = Watched(trainer.nets, [real_set()], recipe, CPU)
    return found, found.watch()


def seen(strategy: str, *, batch_size: int, interval: int) -> list[list[int]]:
    """The mini-batches of an epoch."""
    trainer, found = watched(batch_size)
    for number, count in enumerate(portions(CLASSES * PER_CLASS, batch_size, interval)):
        context = Context(trainer.nets[0], real_set(), Draws("cpu", "select", number), CPU)
        draws = Draws("cpu", "order", number)
        trainer.epoch(selected(context, count, strategy, draws), [draws])
    return found


@pytest.mark.parametrize(("batch_size", "interval"), [(8, 1), (8, 2), (8, 10), (13, 1), (2, 5), (100, 3), (1, 4)])
def test_an_epoch_on_representatives_has_the_mini_batches_of_one_on_all_images(batch_size: int, interval: int) -> None:
    n = CLASSES * PER_CLASS
    found = seen("herding", batch_size=batch_size, interval=interval)
    trainer, random = watched(batch_size)
    trainer.all_images([Draws("cpu", 0)])
    assert sorted(i for batch in random for i in batch) == list(range(n))
    assert [len(batch) for batch in found] == [len(batch) for batch in random]
    assert len(found) == len(batches(n, batch_size))
    assert len(portions(n, batch_size, interval)) == -(-len(found) // interval)


def test_an_epoch_on_representatives_sees_those_alone() -> None:
    labels = real_set().labels
    central = seen("central", batch_size=9, interval=1)
    for batch in central:  # three batches, three images of every class in each, by chance the same ones or others
        assert sorted(labels[batch].tolist()) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    together = {i for batch in central for i in batch}
    assert len(together) < CLASSES * PER_CLASS
    first = seen("kmeans", batch_size=9, interval=1)
    assert sorted(first[0]) != sorted(central[0])
