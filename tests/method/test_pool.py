"""Pools of networks, and frequencies of characteristic functions: against loops in float64."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import models
from models import Network
from tests.oracle import class_distance
from utils.method.frequencies import Frequencies
from utils.method.objectives import Comparison
from utils.method.pixels import PixelSGD
from utils.method.pool import Pool, lowest, perturb
from utils.method.training import fresh_network
from utils.numerics.compute import Compute
from utils.numerics.derivatives import distances, flattened, load
from utils.system.draws import Draws

CPU = torch.device("cpu")
SPEC = models.resolve("convnet", channels=1, classes=3, side=8, depth=2, width=4)
OTHERS = {
    "resnet": models.resolve("resnet10", channels=1, classes=3, side=8, norm="batch", width=4),
    "alexnet": models.resolve("alexnet", channels=1, classes=3, side=8, width=4),
}


# --- Distances of embeddings ------------------------------------------------------------------------------------------


def double(spec: models.NetSpec) -> Network:
    return fresh_network(spec, Draws("cpu", 0)).double()


def images(k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Real and synthetic images of k classes, and their labels."""
    generator = torch.Generator().manual_seed(1)
    real, syn = (torch.randn(k, n, 1, 8, 8, dtype=torch.float64, generator=generator) for n in (5, 3))
    return real + 0.5, syn, torch.arange(k)


@pytest.mark.parametrize(
    ("name", "match", "k", "pixels"),
    [
        ("convnet", "cf", 3, None),
        ("convnet", "cf", 1, None),
        ("convnet", "ce", 3, None),
        ("convnet", "embed+cf", 3, 2 * 64),
        ("convnet", "grad+cf", 2, None),
        ("resnet", "cf", 2, None),
        ("alexnet", "embed+cf", 2, None),
        ("alexnet", "ce", 2, None),
    ],
)
def test_distances_of_embeddings_equal_loops_with_complex_numbers(
    name: str, match: str, k: int, pixels: int | None
) -> None:
    """Values, and gradients by the pixels and by the frequencies."""
    net = double(SPEC if name == "convnet" else OTHERS[name])
    real, syn, labels = images(k)
    t = torch.randn(6, net.classifier.in_features, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    t, naive_t, naive_syn = (x.clone().requires_grad_() for x in (t, t, syn))
    expected = torch.stack(
        [class_distance(net, real[c], naive_syn[c], c, "mse", match, frequencies=naive_t) for c in range(k)]
    )
    expected.sum().backward(inputs=[naive_syn, *([naive_t] if "cf" in match else [])])
    compute = Compute(CPU) if pixels is None else Compute(CPU, pixels=pixels)
    how = Comparison(match, frequencies=t) if "cf" in match else Comparison(match)
    found, gradients = distances(net, real, syn, labels, how.distance, compute)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradients, naive_syn.grad, rtol=1e-7, atol=1e-9)
    if "cf" in match:
        torch.testing.assert_close(t.grad, naive_t.grad, rtol=1e-7, atol=1e-9)


# --- Frequencies ------------------------------------------------------------------------------------------------------


def test_random_frequencies_are_their_random_numbers_and_learn_nothing() -> None:
    frequencies = Frequencies(5, 4, how="random", draws=Draws("cpu", 0))
    z = frequencies.draw(Draws("cpu", 1))
    made = frequencies(z)
    frequencies.ascend(made)
    assert z.shape == (5, 4) and made.leaf is z and not z.requires_grad and not frequencies.learned


def learned_distance(sign: float) -> float:
    """Distance of fixed embeddings at frequencies that learned for 200 steps; sign: 1 up the distance, -1 down."""
    frequencies = Frequencies(64, 8, how="learned", draws=Draws("cpu", 0))
    state = frequencies.learned["frequencies"]
    own = state[0].clone()
    generator = torch.Generator().manual_seed(3)
    real, syn = (torch.randn(40, 8, generator=generator) for _ in range(2))
    syn[:, 0] += 1.5  # they differ in one direction
    net, how = fresh_network(SPEC, Draws("cpu", 0)), Comparison("cf")
    for step in itertools.count():
        made = frequencies(frequencies.draw(Draws("cpu", 1, step)))
        of_embeddings = replace(how, frequencies=made.leaf).distance.of_embeddings
        assert of_embeddings is not None
        distance = of_embeddings(net, real, syn, torch.tensor(0))
        if step == 200:
            break
        distance.backward(inputs=[made.leaf])
        assert made.leaf.grad is not None
        made.leaf.grad *= sign
        frequencies.ascend(made)
    assert frequencies.learned["frequencies"] is state  # changed in place
    assert torch.equal(state[0], own) == (sign == 0)
    return float(distance.detach())


def test_learned_frequencies_find_where_images_differ() -> None:
    up, unlearned, down = learned_distance(1), learned_distance(0), learned_distance(-1)
    assert up > 1.05 * unlearned > 1.1 * down


def test_learned_frequencies_are_as_long_as_their_random_numbers_and_follow_from_their_state() -> None:
    first, second = (Frequencies(7, 5, how="learned", draws=Draws("cpu", seed)) for seed in (0, 1))
    z = first.draw(Draws("cpu", 2))
    torch.testing.assert_close(first(z).leaf, z)  # they begin as random ones
    for frequencies in (first, second):
        frequencies.learned["frequencies"][0, 1].normal_(generator=torch.Generator().manual_seed(4))
    made = first(z)
    torch.testing.assert_close(made.leaf.norm(dim=1), z.norm(dim=1))
    assert not torch.allclose(made.leaf, z, atol=0.1) and not torch.equal(second(z).leaf, made.leaf)
    second.learned["frequencies"].copy_(first.learned["frequencies"])
    assert torch.equal(second(z).leaf, made.leaf)


# --- Networks of a pool -----------------------------------------------------------------------------------------------


class Trained:
    """Ends of trajectories, in place of files."""

    count = 2

    def pair(self, k: int, start: int, end: int) -> tuple[Tensor, Tensor]:
        assert (start, end) == (0, 9)
        initial, final = (fresh_network(SPEC, Draws("cpu", k, e)) for e in (start, end))
        return theta(initial), theta(final)


def pool(how: str) -> Pool:
    trained: Any = Trained()
    return Pool(trained, SPEC, 9, how, "cpu")


def theta(net: Network) -> Tensor:
    return flattened(net.parameters())


def test_a_network_in_the_middle_lies_uniformly_between_both_ends() -> None:
    initial, final = Trained().pair(1, 0, 9)
    shares = []
    for key in range(60):
        found = theta(pool("middle").network(1, Draws("cpu", key)))
        share = float((found - final) @ (initial - final) / (initial - final).square().sum())
        torch.testing.assert_close(found, share * initial + (1 - share) * final, rtol=0, atol=1e-6)
        shares.append(share)
    assert min(shares) >= 0 and max(shares) < 1
    assert max(abs(x - (i + 0.5) / 60) for i, x in enumerate(sorted(shares))) < 0.2  # Kolmogorov: 0.21 at 1 %


@pytest.mark.parametrize("how", ["fresh", "early", "middle"])
def test_networks_of_a_pool_follow_from_their_draws(how: str) -> None:
    same, again, other = (theta(pool(how).network(0, Draws("cpu", key))) for key in (1, 1, 2))
    assert torch.equal(same, again) and not torch.equal(same, other)
    final = Trained().pair(1, 0, 9)[1]
    assert torch.equal(pool(how).ends(1)[1], final)
    assert torch.equal(theta(pool(how).trained_network(1)), final) and len(pool(how)) == 2


def test_a_network_early_in_its_training_is_moved_along_two_filter_normalised_directions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Filter by filter, with the coefficients as they are drawn."""
    final, signs, sizes = Trained().pair(0, 0, 9)[1], set(), []
    drawn: list[Tensor] = []
    normal = Draws.normal

    def recorded(draws: Draws, *shape: int) -> Tensor:
        drawn.append(normal(draws, *shape))
        return drawn[-1]

    monkeypatch.setattr(Draws, "normal", recorded)
    for key in range(12):
        before, after = (fresh_network(SPEC, Draws("cpu", 0)) for _ in range(2))
        load(before, final), load(after, final)
        drawn.clear()
        draws = Draws("cpu", key)
        perturb(after, draws)
        weights = [(p, q) for p, q in zip(before.parameters(), after.parameters(), strict=True) if p.dim() > 1]
        rest = [(p, q) for p, q in zip(before.parameters(), after.parameters(), strict=True) if p.dim() == 1]
        assert rest and all(torch.equal(p, q) for p, q in rest)  # biases and norms
        assert len(drawn) == 2 * len(weights)
        # The two coefficients by least squares over all weights, whose directions are written out filter by filter.
        columns: list[list[Tensor]] = [[], []]
        moved = []
        for i, (p, q) in enumerate(weights):
            for direction, column in zip((drawn[i], drawn[len(weights) + i]), columns, strict=True):
                for own, along in zip(p.detach().double(), direction.double(), strict=True):
                    column.append((along / along.norm() * own.norm()).flatten())
            moved.append((q - p).detach().double().flatten())
        a, b = torch.stack([torch.cat(column) for column in columns], 1), torch.cat(moved)
        coefficients = torch.linalg.lstsq(a, b[:, None]).solution[:, 0]
        torch.testing.assert_close(a @ coefficients, b, rtol=0, atol=1e-6)
        signs |= {math.copysign(1, float(x)) for x in coefficients}
        sizes += [abs(float(x)) for x in coefficients]
    assert signs == {-1, 1} and min(sizes) > 0.0099 and max(sizes) < 0.0901
    assert min(sizes) < 0.03 and max(sizes) > 0.07


def test_the_lowest_losses_are_those_of_a_plain_sort() -> None:
    losses = torch.tensor([0.3, 0.1, 0.5, 0.1, 0.2, 0.1])
    for count in range(1, 7):
        expected = sorted(sorted(range(6), key=lambda i: float(losses[i]))[:count])
        assert lowest(losses, count).tolist() == expected


@pytest.mark.parametrize("average", [0.0, 0.9])
def test_the_average_follows_the_pixels_of_every_step_and_leaves_them_alone(average: float) -> None:
    pixels = torch.rand(3, 2, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    plain, sgd = (PixelSGD(pixels.clone(), lr=0.3, momentum=0.5, average=a) for a in (0.0, average))
    expected = pixels.clone()
    for step in range(4):
        gradients = Draws("cpu", step).normal(*pixels.shape).double()
        plain.step(gradients), sgd.step(gradients)
        expected = average * expected + (1 - average) * plain.pixels
    assert torch.equal(plain.pixels, sgd.pixels) and plain.average is None
    torch.testing.assert_close(sgd.pixels if sgd.average is None else sgd.average, expected, rtol=0, atol=1e-12)
