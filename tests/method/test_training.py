from __future__ import annotations

import copy
import dataclasses
import gc
import math
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import models
from models import NetSpec, Network
from tests.oracle import naive_epoch, trained_networks
from utils.method.augment import GEOMETRY, Augment
from utils.method.evaluation import Score, evaluate_networks
from utils.method.formation import Formation, training_images
from utils.method.images import ImageSet, Normalize
from utils.method.training import (
    APPLY,
    SIZE,
    Recipe,
    Trainer,
    batches,
    confusion_matrix,
    cutmix,
    fresh_network,
    plan,
    train_networks,
    update_network,
)
from utils.numerics.compute import Compute
from utils.system.distributed import Group, balanced
from utils.system.draws import Draws

NORMALIZE = Normalize((0.0,), (1.0,))
SPEC = models.resolve("convnet", channels=1, classes=2, side=8, depth=2, width=8)
CPU = Compute(torch.device("cpu"))


def easy_set(n: int, seed: int) -> ImageSet:
    """Class 0 is dark, class 1 is bright on the left half."""
    labels = torch.arange(n) % 2
    images = 0.2 * torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    images[labels == 1, :, :, :4] += 0.7
    return ImageSet(images, labels, classes=2, normalize=NORMALIZE)


def recipe(**changed: object) -> Recipe:
    settings: dict[str, object] = {"batch_size": 8, "augment": Augment("none"), "mixup": "vanilla", "epochs": 5}
    return Recipe(**{**settings, **changed})  # type: ignore[arg-type]  # a mixed bag of test settings


def train(train: ImageSet, recipe: Recipe, key: int = 0) -> Network:
    """One network, trained alone."""
    return trained_networks(SPEC, [train], recipe, [Draws("cpu", key)], CPU)[0]


def exact(train: ImageSet) -> ImageSet:
    """The same in float64."""
    images, soft = train.images.double(), train.soft
    return ImageSet(images, train.labels, classes=train.classes, normalize=train.normalize, soft=soft)


def with_soft(train: ImageSet, soft: torch.Tensor) -> ImageSet:
    """The same images with probabilities in place of labels."""
    return ImageSet(train.images, train.labels, classes=train.classes, normalize=train.normalize, soft=soft)


def weights(net: Network) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


@pytest.mark.parametrize("norm", ["instance", "none"])
def test_the_confusion_matrix_counts_every_test_image_once(norm: str) -> None:
    test = easy_set(1100, 1)  # more than are tested at once
    net = fresh_network(dataclasses.replace(SPEC, norm=norm), Draws("cpu", 0))
    net.classifier.weight.data.zero_()
    net.classifier.bias.data.copy_(torch.tensor([1.0, 0.0]))  # always class 0
    for pixels in (0, 7 * 8**2):
        found = confusion_matrix(net, test, Compute(torch.device("cpu"), pixels=pixels))
        assert found.tolist() == [[count, 0] for count in test.counts]


def test_the_rate_falls_to_a_fifth_at_two_thirds_and_five_sixths(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [0.01] * 8 + [0.002] * 2 + [0.0004] * 2
    assert [recipe(epochs=12).lr_at(e) for e in range(12)] == pytest.approx(expected)
    assert recipe(epochs=1).lr_at(0) == 0.01
    rates: list[float] = []
    monkeypatch.setattr(Trainer, "epoch", lambda self, *rest: rates.append(float(self.sgd.param_groups[0]["lr"])))
    train(easy_set(8, 0), recipe(epochs=12))
    assert rates == pytest.approx(expected)


def test_the_same_draws_train_the_same_network_bit_for_bit() -> None:
    first, again, other = (
        weights(train(easy_set(20, 0), recipe(augment=Augment("color_crop"), mixup="cut"), key)) for key in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("norm", ["instance", "group", "batch", "none"])
@pytest.mark.parametrize("shared", [False, True])
def test_networks_side_by_side_are_each_trained_as_alone(shared: bool, norm: str) -> None:
    """Whatever the others are, with an image set of its own each or one for all, in pieces or at once."""
    spec = dataclasses.replace(SPEC, norm=norm)
    sets = [exact(easy_set(20, 0 if shared else k)) for k in range(3)]
    sets = sets[:1] * 3 if shared else sets
    settings = recipe(augment=Augment("color_crop_flip_rotate"), mixup="cut", batch_size=6, lr=0.1)

    def trained_networks(rows: list[int], compute: Compute) -> list[torch.Tensor]:
        nets = [fresh_network(spec, Draws("cpu", "net", k)).double() for k in rows]
        trainer = Trainer(nets, [sets[k] for k in rows], settings, compute)
        for epoch in range(3):
            trainer.epoch(torch.arange(20), [Draws("cpu", epoch, k) for k in rows])
        return [weights(net) for net in nets]

    alone = [trained_networks([k], CPU)[0] for k in range(3)]
    for compute in (CPU, Compute(torch.device("cpu"), pixels=5 * 8**2)):
        for ours, expected in zip(trained_networks([0, 1, 2], compute), alone, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)
    assert not torch.equal(alone[0], alone[1])


@pytest.mark.parametrize("shared", [False, True])
def test_certain_soft_labels_train_the_network_of_hard_ones_bit_for_bit(shared: bool) -> None:
    hard = [easy_set(20, 0)] * 2 if shared else [easy_set(20, k) for k in range(2)]
    soft = [with_soft(train, torch.eye(2)[train.labels]) for train in hard]
    soft = soft[:1] * 2 if shared else soft
    settings = recipe(augment=Augment("color_crop"), mixup="cut")
    first, second = (
        trained_networks(SPEC, sets, settings, [Draws("cpu", k) for k in range(2)], CPU) for sets in (hard, soft)
    )
    for ours, expected in zip(second, first, strict=True):
        assert torch.equal(weights(ours), weights(expected))


@pytest.mark.parametrize("norm", ["instance", "batch"])
@pytest.mark.parametrize("uniform", [True, False])
def test_a_step_follows_the_gradient_of_the_cross_entropy_with_soft_labels(uniform: bool, norm: str) -> None:
    soft = torch.full((6, 2), 0.5) if uniform else torch.rand(6, 2).double().softmax(1)
    train = exact(with_soft(easy_set(6, 0), soft))
    net, expected = (fresh_network(dataclasses.replace(SPEC, norm=norm), Draws("cpu", 0)).double() for _ in range(2))
    settings = recipe(lr=1.0, momentum=0.0, weight_decay=0.0)
    Trainer([net], [train], settings, CPU).epoch(torch.arange(6), [Draws("cpu", 1)])
    loss = F.cross_entropy(expected(train.images), soft.double())
    for p, g in zip(expected.parameters(), torch.autograd.grad(loss, list(expected.parameters())), strict=True):
        p.data.sub_(g)
    torch.testing.assert_close(weights(net), weights(expected), rtol=1e-9, atol=1e-12)


def test_soft_labels_stay_with_their_images() -> None:
    labels = torch.tensor([1, 0, 1, 0])
    soft = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]])
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 1, 8, 8)
    found = ImageSet(images, labels, classes=2, normalize=NORMALIZE, soft=soft)
    assert found.soft is not None and torch.equal(found.soft, soft[[1, 3, 0, 2]])
    part = found.subset(torch.tensor([3, 0]))
    assert part.soft is not None and torch.equal(part.soft, soft[[1, 2]]) and part.labels.tolist() == [0, 1]
    for factor, decode_type in ((2, "single"), (3, "multi")):
        decoded = training_images(
            images, labels, soft=soft, formation=Formation(factor, decode_type), classes=2, normalize=NORMALIZE
        )
        assert decoded.soft is not None and torch.equal(decoded.labels, decoded.soft.argmax(1))
        assert torch.equal(decoded.soft, soft[decoded.images.mean((1, 2, 3)).round().long()])


def test_a_restarted_trainer_equals_a_new_one_at_the_same_addresses() -> None:
    train, settings = easy_set(20, 0), recipe(augment=Augment("color_crop"), mixup="cut")
    index = torch.arange(20)
    used = Trainer([fresh_network(SPEC, Draws("cpu", 0))], [train], settings, CPU)
    tensors = [*used.parameters, *(used.sgd.state[p]["momentum_buffer"] for p in used.parameters)]
    addresses = [x.data_ptr() for x in tensors]
    used.epoch(index, [Draws("cpu", 1)])
    used.restart(fresh_network(SPEC, Draws("cpu", 2)))
    assert all(not used.sgd.state[p]["momentum_buffer"].any() for p in used.parameters)
    fresh = Trainer([fresh_network(SPEC, Draws("cpu", 2))], [train], settings, CPU)
    for trainer in (used, fresh):
        trainer.epoch(index, [Draws("cpu", 3)])
    assert torch.equal(weights(used.nets[0]), weights(fresh.nets[0]))
    assert [x.data_ptr() for x in tensors] == addresses
    assert all(
        used.sgd.state[p]["momentum_buffer"] is m
        for p, m in zip(used.parameters, tensors[len(tensors) // 2 :], strict=True)
    )


def test_a_plan_visits_every_image_once_and_keeps_to_its_batches() -> None:
    index, edges = torch.arange(100, 123), batches(23, 8)
    geometries: set[float] = set()
    for key in range(20):
        drawn = plan(index, edges, Draws("cpu", key))
        assert sorted(drawn.order.tolist()) == index.tolist()
        assert len(drawn.u[:, :GEOMETRY].unique()) == 23 * GEOMETRY and drawn.mix.shape == (3, 4)
        for start, end in edges:
            assert sorted(drawn.partner[start:end].tolist()) == list(range(end - start))
            assert len(drawn.u[start:end, GEOMETRY].unique()) == 1
            geometries.add(drawn.u[start, GEOMETRY].item())
    assert len(geometries) == 60
    assert len(plan(index[:0], [], Draws("cpu", 0)).order) == 0


def test_a_cutmix_partner_is_of_the_same_batch_whatever_the_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    n, size = 2**12, 4
    edges = batches(n, size)

    class Extreme(Draws):
        def uniform(self, *shape: int) -> torch.Tensor:
            """The largest and the smallest numbers that there are, in turn."""
            u = torch.zeros(shape)
            u.view(-1)[1::2] = 1 - 2**-24
            return u

    def argsort(x: torch.Tensor, *_: Any) -> torch.Tensor:
        """torch.Tensor.argsort, which promises no order of equal numbers: the last first."""
        return x.shape[-1] - 1 - x.flip(-1).sort(stable=True).indices

    monkeypatch.setattr(torch.Tensor, "argsort", argsort)
    partner = plan(torch.arange(n), edges, Extreme("cpu", 0)).partner
    assert partner.min() >= 0 and partner.max() < size


def test_an_update_sees_n_data_images_and_all_when_there_are_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(Trainer, "epoch", lambda self, index, draws: seen.append(index))
    for n_data, epochs in ((5, 1), (100, 1), (0, 1), (6, 3)):
        trainer = Trainer([fresh_network(SPEC, Draws("cpu", 0))], [easy_set(20, 0)], recipe(epochs=epochs), CPU)
        update_network(trainer, n_data=n_data, draws=Draws("cpu", 0))
    assert [len(index.unique()) for index in seen] == [5, 20, 0, 6, 6, 6]


def test_a_single_left_over_image_joins_the_batch_before_it() -> None:
    assert batches(9, 4) == [(0, 4), (4, 9)]
    assert batches(10, 4) == [(0, 4), (4, 8), (8, 10)]
    assert batches(1, 4) == [(0, 1)]
    assert batches(3, 1) == [(0, 1), (1, 2), (2, 3)]
    assert batches(0, 4) == []


def test_batches_that_are_mixed_together_are_mixed_as_each_by_itself() -> None:
    n, size = 13, 4  # the last batch has five images
    x, target = (Draws("cpu", "images", k).uniform(2, n, *shape) for k, shape in enumerate(((3, 8, 8), (5,))))
    edges = batches(n, size)
    partner = torch.cat([torch.stack([Draws("cpu", k, a).permutation(b - a) for k in range(2)]) for a, b in edges], 1)
    for key in range(10):
        mix = Draws("cpu", "mix", key).uniform(2, len(edges), 4)
        together = cutmix(x, target, partner, mix, size)
        each = [
            cutmix(x[:, a:b], target[:, a:b], partner[:, a:b], mix[:, i : i + 1], b - a)
            for i, (a, b) in enumerate(edges)
        ]
        for found, parts in zip(together, zip(*each, strict=True), strict=True):
            assert torch.equal(found, torch.cat(parts, 1))


def test_steps_of_batches_that_are_prepared_together_are_those_of_each_by_itself() -> None:
    found = []
    for together in (False, True):
        trainer = Trainer([fresh_network(SPEC, Draws("cpu", 0))], [easy_set(30, 0)], recipe(batch_size=8), CPU)
        draws, n = Draws("cpu", "epoch"), 30
        edges = batches(n, 8)
        order, u, partner, mix = (x[None] for x in plan(torch.arange(n), edges, draws))
        for a, b in [(0, n)] if together else edges:
            numbers = slice(a // 8, -(-b // 8))
            trainer._steps(order[:, a:b], u[:, a:b], partner[:, a:b], mix[:, numbers])
        found.append(list(trainer.nets[0].parameters()))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_a_partner_is_of_the_same_batch_whatever_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Draws, "uniform", lambda self, *shape: torch.full(shape, 1 - 2.0**-24))  # the largest number
    edges = batches(40 * 4, 4)
    partner = plan(torch.arange(160), edges, Draws("cpu", 0)).partner
    assert all(partner[a:b].sort().values.tolist() == [0, 1, 2, 3] for a, b in edges)


def test_cutmix_pastes_a_box_of_the_named_image_and_knows_its_area() -> None:
    k, n = 200, 6
    x = torch.arange(float(n)).view(1, n, 1, 1, 1).expand(k, n, 2, 8, 8)
    target = torch.eye(n).expand(k, n, n)
    partner = torch.stack([Draws("cpu", key).permutation(n) for key in range(k)])
    mix = Draws("cpu", "mix").uniform(k, 4)
    mixed, weighted = cutmix(x, target, partner, mix[:, None], n)
    shares = []
    for row in range(k):
        other = partner[row]
        for i in range(n):
            if other[i] == i:
                assert torch.equal(mixed[row, i], x[row, i]) and weighted[row, i, i].item() == pytest.approx(1)
                continue
            pasted = mixed[row, i] == other[i]
            share = pasted[0].float().mean().item()
            assert weighted[row, i, other[i]].item() == pytest.approx(share)
            assert weighted[row, i, i].item() == pytest.approx(1 - share)
            assert (mixed[row, i][~pasted] == i).all() and torch.equal(pasted[0], pasted[1])
            rows, columns = pasted[0].any(1).sum(), pasted[0].any(0).sum()
            assert rows * columns == pasted[0].sum()
        if mix[row, APPLY] < 0.5:
            shares.append(share)
            assert share <= 1 - mix[row, SIZE].item()  # before clipping and rounding
        else:
            assert torch.equal(mixed[row], x[row])
    assert 80 <= len(shares) <= 120 and min(shares) < 0.1 and max(shares) > 0.5


@pytest.mark.parametrize("mixup", ["cut", "vanilla"])
@pytest.mark.parametrize("names", ["color_crop_flip", "crop_scale_rotate_cutout"])
def test_an_epoch_equals_plain_sgd_image_by_image(names: str, mixup: str) -> None:
    """Augmentation per image, CutMix with its area-weighted loss, momentum, weight decay: against loops in float64."""
    train = exact(easy_set(24, 0))
    index = torch.arange(1, 20)  # three batches of six, and one image that joins the last
    how: dict[str, Any] = dict(batch_size=6, lr=0.125, momentum=0.8, weight_decay=0.05)  # a rate that float32 holds
    settings = recipe(augment=Augment(names), mixup=mixup, **how)
    net, naive = (fresh_network(SPEC, Draws("cpu", 1)).double() for _ in range(2))
    trainer = Trainer([net], [train], settings, CPU)
    velocity: dict[str, torch.Tensor] = {}
    for epoch in range(3):
        trainer.epoch(index, [Draws("cpu", epoch)])
        naive_epoch(naive, velocity, train, index, settings, Draws("cpu", epoch))
    for ours, theirs in zip(net.parameters(), naive.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("pixels", [1, 0])
def test_repeats_are_different_trainings_and_a_score_carries_n(monkeypatch: pytest.MonkeyPatch, pixels: int) -> None:
    seen: list[int] = []
    nets: list[Network] = []
    together: list[int] = []

    def remember(net: Network, test: ImageSet, compute: Compute) -> torch.Tensor:
        nets.append(net)
        return torch.zeros(2, 2, dtype=torch.int64)

    def train_some(spec: NetSpec, sets: Sequence[ImageSet], *rest: Any) -> Iterator[tuple[int, Trainer]]:
        together.append(len(sets))
        return train_networks(spec, sets, *rest)

    monkeypatch.setattr("utils.method.evaluation.confusion_matrix", remember)
    monkeypatch.setattr("utils.method.evaluation.train_networks", train_some)

    def training_set(r: int) -> ImageSet:
        seen.append(r)
        return easy_set(4, r)

    compute = Compute(torch.device("cpu"), pixels=pixels)
    score = evaluate_networks(
        SPEC, training_set, easy_set(40, 9), recipe(epochs=2), trainings=range(3), seed=0, compute=compute
    )  # fmt: skip
    assert seen == [0, 1, 2] and score.n == 3
    assert together == ([1] * 3 if pixels else [3])  # one after the other, or side by side
    assert len({net.classifier.weight[0, 0].item() for net in nets}) == 3


def test_a_training_and_its_graphs_are_gone_when_the_next_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    trainings: list[weakref.ref[object]] = []
    init = Trainer.__init__

    def noted(self: Trainer, *words: Any) -> None:
        assert all(training() is None for training in trainings)
        init(self, *words)
        trainings.extend([weakref.ref(self), weakref.ref(self.steps)])

    monkeypatch.setattr(Trainer, "__init__", noted)
    sets = [easy_set(20 + 2 * r, r) for r in range(3)]  # of different sizes: not side by side
    gc.collect()
    gc.disable()
    try:
        evaluate_networks(
            SPEC, sets.__getitem__, easy_set(9, 3), recipe(epochs=1), trainings=range(3), seed=0, compute=CPU
        )
        assert len(trainings) == 6 and all(training() is None for training in trainings)
    finally:
        gc.enable()


def test_losses_after_an_epoch_are_the_mean_cross_entropy_of_every_training_on_its_own_images() -> None:
    told: list[tuple[int, int, float]] = []

    def note(trainings: Sequence[int], epoch: int, trainer: Trainer) -> None:
        told.extend((r, epoch, loss) for r, loss in zip(trainings, trainer.losses().tolist(), strict=True))

    sets = [easy_set(12, r) for r in range(2)]
    score = evaluate_networks(
        SPEC, lambda r: sets[r], easy_set(40, 9), recipe(epochs=2), trainings=range(2), seed=0, compute=CPU,
        on_epoch=note,
    )  # fmt: skip
    assert [(r, epoch) for r, epoch, _ in told] == [(0, 1), (1, 1), (0, 2), (1, 2)]
    for r, expected in enumerate(loss for _, epoch, loss in told if epoch == 2):
        (net,) = trained_networks(SPEC, [sets[r]], recipe(epochs=2), [Draws("cpu", 0, "evaluate", r)], CPU)
        x, y = sets[r].batch(torch.arange(12))
        assert F.cross_entropy(net(x), y).item() == pytest.approx(expected, rel=1e-4)
    assert score.confusion is not None and score.confusion.sum() == 2 * 40
    assert score.mean == pytest.approx(100 * score.confusion.trace().item() / 80)


@pytest.mark.parametrize("norm", ["instance", pytest.param("batch", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("epochs", "tested"), [(8, (2, 4, 6, 8)), (7, (2, 4, 6, 7)), (5, (2, 3, 4, 5)), (3, (1, 2, 3))]
)
def test_the_best_of_four_is_that_of_the_tests_after_each_quarter_and_they_change_nothing(
    epochs: int, tested: tuple[int, ...], norm: str
) -> None:
    """Against one training after the other without a test on the way, and plain accuracies of copies of its network."""
    spec, settings = dataclasses.replace(SPEC, norm=norm), recipe(epochs=epochs, lr=0.1, batch_size=2)
    *sets, test = (easy_set(n, r) for r, n in enumerate((40, 40, 40, 90)))
    for seed, noise in enumerate((*sets, test)):  # luck decides
        noise.images.copy_(torch.rand(noise.images.shape, generator=torch.Generator().manual_seed(seed)))
    score = evaluate_networks(spec, sets.__getitem__, test, settings, trainings=range(3), seed=0, compute=CPU)
    x, y = test.batch(torch.arange(90))
    last, best = [], []
    for r in range(3):
        draws, accuracies = Draws("cpu", 0, "evaluate", r), []
        for epoch, trainer in train_networks(spec, [sets[r]], settings, [draws], CPU):
            net = copy.deepcopy(trainer.nets[0]).eval()
            if epoch in tested:
                accuracies.append(100 * (net(x).argmax(1) == y).sum().item() / 90)
        last.append(accuracies[-1])
        best.append(max(accuracies))
    assert score.accuracies == tuple(last) and score.best_of_four == Score(tuple(best))
    assert last != best or epochs == 3


@pytest.mark.parametrize("count", [1, 2, 4])
def test_every_rank_has_the_scores_of_all_trainings(count: int) -> None:
    """Whoever has which of three trainings; of four ranks one has none."""
    last, best = (50.0, 40.0, 61.5), (55.0, 40.0, 90.0)
    totals: list[torch.Tensor] = []

    class Rank(Group):
        """One that sums what it is given with what the ranks before gave."""

        given = 0

        def all_reduce_sum(self, x: torch.Tensor) -> torch.Tensor:
            if self.given == len(totals):
                totals.append(torch.zeros_like(x))
            totals[self.given] += x
            self.given += 1
            return x.copy_(totals[self.given - 1])

    for rank, own in enumerate(balanced([1.0] * 3, count)):
        confusion = torch.full((2, 2), len(own))
        score = Score(tuple(last[r] for r in own), Score(tuple(best[r] for r in own)), confusion)
        whole = score.all_reduce(own, Rank(rank, count), repeat=3)
    assert whole == Score(last, Score(best)) and whole.confusion is not None and whole.confusion.sum() == 3 * 4


def test_a_score_is_read_as_it_was_written_and_one_of_an_older_version_without_four_tests() -> None:
    score = Score((50.0, 41.25, 61.5), Score((55.0, 41.25, 90.0)))
    entries = score.as_dict()
    assert Score.from_dict(entries) == score
    assert Score.from_dict(entries, 2) == Score((50.0, 41.25), Score((55.0, 41.25)))
    assert entries["accuracy_mean"] == 50.9167 and entries["best_of_four"] == score.best_of_four.as_dict()  # type: ignore[union-attr]
    del entries["best_of_four"]
    assert Score.from_dict(entries) == Score((50.0, 41.25, 61.5)) and Score((50.0,)).as_dict().keys() == entries.keys()


def test_a_score_s_spread_is_the_sample_deviation_and_unknown_for_one() -> None:
    score = Score((1.0, 2.0, 6.0))
    assert score.mean == 3 and score.std == pytest.approx(math.sqrt(7))
    assert str(score) == "3.0 +- 2.6 (n=3)"
    assert str(Score((50.0,))) == "50.0 (n=1)" and Score((50.0,)).as_dict()["accuracy_std"] is None


def test_draws_depend_on_every_part_of_their_key_and_on_nothing_else() -> None:
    keys: list[tuple[int | str, ...]] = [(0, "a", 0, 0), (1, "a", 0, 0), (0, "b", 0, 0), (0, "a", 1, 0), (0, "a", 0, 1)]
    values = {key: Draws("cpu", *key).uniform(3) for key in keys}
    torch.manual_seed(5)
    for key in keys:
        assert torch.equal(values[key], Draws("cpu", *key).uniform(3))
    assert len({tuple(v.tolist()) for v in values.values()}) == len(keys)
