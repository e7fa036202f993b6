from __future__ import annotations

import math

import pytest
import torch

import models
from models import Network
from tests.oracle import naive_epoch
from utils.augment import Augment
from utils.evaluation import Score, evaluate
from utils.images import ImageSet, Normalize
from utils.runtime import Draws
from utils.training import Recipe, accuracy, batches, cutmix, fresh_network, train_epoch, train_network, update_network

NORMALIZE = Normalize((0.0,), (1.0,))
SPEC = models.resolve("convnet", channels=1, classes=2, side=8, depth=2, width=8)


def easy_set(n: int, seed: int) -> ImageSet:
    """Class 0 is dark, class 1 is bright on the left half."""
    labels = torch.arange(n) % 2
    images = 0.2 * torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    images[labels == 1, :, :, :4] += 0.7
    return ImageSet(images, labels, classes=2, normalize=NORMALIZE)


def recipe(**changed: object) -> Recipe:
    settings: dict[str, object] = {"batch_size": 8, "augment": Augment("none"), "mixup": "vanilla", "epochs": 5}
    return Recipe(**{**settings, **changed})  # type: ignore[arg-type]  # a mixed bag of test settings


def test_a_network_learns_an_easy_task() -> None:
    net = train_network(SPEC, easy_set(32, 0), recipe(), Draws("cpu", 0))
    assert accuracy(net, easy_set(50, 1)) == 100


def test_accuracy_counts_every_test_image_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("utils.training.chunk_size", lambda device, side: 7)
    test = easy_set(50, 1)
    net = fresh_network(SPEC, Draws("cpu", 0))
    net.classifier.weight.data.zero_()
    net.classifier.bias.data.copy_(torch.tensor([1.0, 0.0]))  # always class 0
    assert accuracy(net, test) == 50


def test_the_rate_falls_to_a_fifth_at_two_thirds_and_five_sixths(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []

    def train_epoch(net: Network, sgd: torch.optim.Optimizer, *rest: object) -> None:
        rates.append(sgd.param_groups[0]["lr"])
        sgd.step()

    monkeypatch.setattr("utils.training.train_epoch", train_epoch)
    train_network(SPEC, easy_set(8, 0), recipe(epochs=12), Draws("cpu", 0))
    assert rates == pytest.approx([0.01] * 8 + [0.002] * 2 + [0.0004] * 2)
    rates.clear()
    train_network(SPEC, easy_set(8, 0), recipe(epochs=1), Draws("cpu", 0))
    assert rates == [0.01]


def test_the_same_draws_train_the_same_network_bit_for_bit() -> None:
    def weights(key: int) -> torch.Tensor:
        net = train_network(
            SPEC, easy_set(20, 0), recipe(augment=Augment("color_crop"), mixup="cut"), Draws("cpu", key)
        )
        return torch.cat([p.detach().flatten() for p in net.parameters()])

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


def test_a_fresh_network_does_not_disturb_the_global_generator() -> None:
    before = torch.random.get_rng_state()
    fresh_network(SPEC, Draws("cpu", 0))
    assert torch.equal(before, torch.random.get_rng_state())


def test_an_update_sees_n_data_images_and_all_when_there_are_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    monkeypatch.setattr("utils.training.train_epoch", lambda net, sgd, real, index, *rest: seen.append(index))
    net = fresh_network(SPEC, Draws("cpu", 0))
    for n_data in (5, 100, 0):
        update_network(
            net,
            torch.optim.SGD(net.parameters()),
            easy_set(20, 0),
            recipe(epochs=1),
            n_data=n_data,
            draws=Draws("cpu", 0),
        )
    assert [len(index.unique()) for index in seen] == [5, 20, 0]


def test_a_single_left_over_image_joins_the_batch_before_it() -> None:
    assert [len(b) for b in batches(torch.arange(9), 4)] == [4, 5]
    assert [len(b) for b in batches(torch.arange(10), 4)] == [4, 4, 2]
    assert [len(b) for b in batches(torch.arange(1), 4)] == [1]
    assert [len(b) for b in batches(torch.arange(3), 1)] == [1, 1, 1]
    assert batches(torch.arange(0), 4) == []


def test_cutmix_pastes_a_box_of_the_named_image_and_knows_its_area() -> None:
    x = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 2, 8, 8)
    shares = []
    for key in range(200):
        mixed, other, share = cutmix(x, torch.arange(6), Draws("cpu", key))
        for i in range(6):
            if other[i] == i:
                continue
            pasted = mixed[i] == other[i]
            assert pasted[0].float().mean().item() == pytest.approx(1 - share)
            assert (mixed[i][~pasted] == i).all()
            rows, columns = pasted[0].any(1).sum(), pasted[0].any(0).sum()
            assert rows * columns == pasted[0].sum()
        shares.append(share)
    assert min(shares) < 0.5 and max(shares) > 0.9


@pytest.mark.parametrize("mixup", ["cut", "vanilla"])
def test_an_epoch_equals_plain_sgd_image_by_image(mixup: str) -> None:
    """Augmentation per image, CutMix with its area-weighted loss, momentum, weight decay: against loops in float64."""
    augment = Augment("color_crop_flip")
    train = easy_set(20, 0)
    train.images = train.images.double()
    settings = recipe(augment=augment, mixup=mixup, batch_size=6, lr=0.1, momentum=0.8, weight_decay=0.05)
    net, naive = (fresh_network(SPEC, Draws("cpu", 1)).double() for _ in range(2))
    sgd = settings.optimizer(net)
    velocity: dict[str, torch.Tensor] = {}
    for epoch in range(3):
        train_epoch(net, sgd, train, torch.arange(20), settings, Draws("cpu", epoch))
        naive_epoch(naive, velocity, train, settings, Draws("cpu", epoch))
    for ours, theirs in zip(net.parameters(), naive.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("mixup", "low", "high"), [("cut", 80, 120), ("vanilla", 0, 0)])
def test_half_of_the_batches_are_mixed_or_none(
    monkeypatch: pytest.MonkeyPatch, mixup: str, low: int, high: int
) -> None:
    mixed: list[int] = []

    def count(x: torch.Tensor, y: torch.Tensor, draws: Draws) -> tuple[torch.Tensor, torch.Tensor, float]:
        mixed.append(len(x))
        return x, y, 1.0

    monkeypatch.setattr("utils.training.cutmix", count)
    train_network(SPEC, easy_set(8, 0), recipe(epochs=100, batch_size=4, mixup=mixup), Draws("cpu", 0))
    assert low <= len(mixed) <= high


def test_repeats_are_different_trainings_and_a_score_carries_n(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    nets: list[Network] = []

    def remember(net: Network, test: ImageSet) -> float:
        nets.append(net)
        return 0.0

    monkeypatch.setattr("utils.evaluation.accuracy", remember)

    def training_set(r: int) -> ImageSet:
        seen.append(r)
        return easy_set(4, r)

    score = evaluate(SPEC, training_set, easy_set(40, 9), recipe(epochs=1), repeat=3, seed=0)
    assert seen == [0, 1, 2] and score.n == 3
    assert len({net.classifier.weight[0, 0].item() for net in nets}) == 3


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
