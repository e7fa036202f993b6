from __future__ import annotations

import pytest
import torch
from sklearn.cluster import KMeans
from torch import Tensor

import models
from models import Network
from tests.oracle import lloyd
from utils.images import ImageSet, Normalize, to_unit
from utils.runtime import Draws
from utils.selection import STRATEGIES, Context, assign, embed, kmeans_representatives, select, update_centroids
from utils.synthetic import coreset, initial_pixels
from utils.training import fresh_network

NORMALIZE = Normalize((0.5,), (0.25,))
SPEC = models.resolve("convnet", channels=1, classes=3, side=8, depth=2, width=4)


def real_set(counts: tuple[int, ...] = (9, 5, 12)) -> ImageSet:
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    images = torch.randint(
        0, 256, (len(labels), 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    return ImageSet(images, labels, classes=len(counts), normalize=NORMALIZE)


def net() -> Network:
    return fresh_network(SPEC, Draws("cpu", 0))


def blobs(k: int, each: int) -> Tensor:
    """k far-apart clusters; the first point of each lies exactly in its centre, the others around it."""
    offset = torch.randn(k, each // 2, 2, dtype=torch.float64)
    around = torch.cat([torch.zeros(k, 1, 2, dtype=torch.float64), offset, -offset], 1)
    return (around + 100 * torch.arange(k).view(k, 1, 1)).flatten(0, 1)


def test_the_centre_of_every_separable_blob_is_its_representative() -> None:
    x = blobs(5, 10)
    starts = [Draws("cpu", s).permutation(55)[:5] // 11 for s in range(60)]
    lucky = [s for s, start in enumerate(starts) if len(start.unique()) == 5]  # one start in every blob
    assert len(lucky) > 1
    for s in lucky:
        assert set(kmeans_representatives(x, 5, Draws("cpu", s)).tolist()) == {0, 11, 22, 33, 44}


def test_lloyd_equals_the_naive_loops() -> None:
    x = torch.randn(60, 3, dtype=torch.float64)
    start = x[Draws("cpu", 1).permutation(60)[:6]]
    centroids = start
    for _ in range(4):
        nearest, distance = assign(x, centroids)
        centroids = update_centroids(x, nearest, distance, 6)
    expected_nearest, expected = lloyd(x, start, 4)
    torch.testing.assert_close(centroids, expected, rtol=1e-9, atol=1e-12)
    assert torch.equal(assign(x, centroids)[0], expected_nearest)
    picks = kmeans_representatives(x, 6, Draws("cpu", 1), iterations=4)
    for j, pick in enumerate(picks.tolist()):
        members = (expected_nearest == j).nonzero().flatten().tolist()
        assert pick == min(members, key=lambda i: float((x[i] - expected[j]).norm()))


def test_inertia_is_close_to_scikit_learn_s() -> None:
    """Our centroids of 2,000 embeddings in 20 clusters, on average over seeds, against KMeans with random starts."""
    x = embed(net(), torch.randint(0, 256, (2000, 1, 8, 8), dtype=torch.uint8), NORMALIZE).double()
    ours, theirs = [], []
    for seed in range(5):
        centroids = x[Draws("cpu", seed).permutation(len(x))[:20]]
        for _ in range(10):
            nearest, distance = assign(x, centroids)
            centroids = update_centroids(x, nearest, distance, 20)
        ours.append(assign(x, centroids)[1].sum().item())
        theirs.append(KMeans(20, init="random", n_init=1, random_state=seed).fit(x.numpy()).inertia_)
    assert sum(ours) <= 1.02 * sum(theirs)


def test_distances_are_squared_and_euclidean() -> None:
    x, centroids = torch.tensor([[0.0, 0.0], [3.0, 4.0]]), torch.tensor([[0.0, 1.0], [3.0, 0.0]])
    nearest, distance = assign(x, centroids)
    assert nearest.tolist() == [0, 1] and distance.tolist() == [1, 16]


def test_empty_clusters_move_to_the_farthest_points() -> None:
    x = torch.tensor([[0.0], [1.0], [2.0], [9.0]])
    nearest, distance = torch.tensor([1, 1, 1, 1]), torch.tensor([9.0, 4.0, 1.0, 36.0])
    assert update_centroids(x, nearest, distance, 3).tolist() == [[9.0], [3.0], [0.0]]


@pytest.mark.parametrize("copies", [1, 2, 25])
def test_representatives_are_different_images_even_among_duplicates(copies: int) -> None:
    x = torch.randn(50 // copies, 4).repeat(copies, 1)
    for k in (1, 7, 25, 49, 50):
        assert len(kmeans_representatives(x, k, Draws("cpu", k)).unique()) == k


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_class_gives_its_own_images_and_a_small_one_repeats_in_turn(strategy: str) -> None:
    real = real_set()
    picks = select(Context(net(), real, Draws("cpu", 0)), 7, strategy=strategy)
    assert picks.shape == (3, 7)
    assert torch.equal(real.labels[picks], torch.arange(3)[:, None].expand(3, 7))
    assert [len(row.unique()) for row in picks] == [7, 5, 7]
    assert picks[1].bincount(minlength=26)[9:14].tolist() in ([2, 2, 1, 1, 1], *permutations_of_two_twos())


def permutations_of_two_twos() -> list[list[int]]:
    return [[2 if i in (a, b) else 1 for i in range(5)] for a in range(5) for b in range(a)]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_same_draws_select_the_same_images_and_others_do_not(strategy: str) -> None:
    def once(key: int) -> Tensor:
        return select(Context(net(), real_set((40, 40, 40)), Draws("cpu", key)), 10, strategy=strategy)

    assert torch.equal(once(0), once(0))
    assert not torch.equal(once(0), once(1))


def test_random_draws_reach_every_image_of_a_class_not_just_the_first() -> None:
    real = real_set()
    seen = torch.cat([select(Context(net(), real, Draws("cpu", i)), 2, strategy="random").flatten() for i in range(60)])
    assert len(seen.unique()) == len(real)


def test_embedding_in_chunks_equals_embedding_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("utils.selection.chunk_size", lambda device, side: 5)
    for norm in ("instance", "batch"):
        spec = models.resolve("convnet", channels=1, classes=3, side=8, depth=2, width=4, norm=norm)
        made = fresh_network(spec, Draws("cpu", 0))
        found = embed(made, real_set().images, NORMALIZE)
        assert made.training
        torch.testing.assert_close(found, made.eval().embed(NORMALIZE(real_set().images)))


def test_clustering_sees_normalised_images_unless_the_published_raw_ones_are_asked_for() -> None:
    real, made = real_set((40, 40, 40)), net()
    expected = {
        raw: kmeans_representatives(embed(made, real.of_class(0), prepare), 10, Draws("cpu", 0))
        for raw, prepare in ((False, NORMALIZE), (True, to_unit))
    }
    for raw in (False, True):
        picks = select(Context(made, real, Draws("cpu", 0), raw=raw), 10, strategy="kmeans")
        assert torch.equal(picks[0], expected[raw])
    assert not torch.equal(expected[False], expected[True])


@pytest.mark.parametrize("init", ["kmeans", "random"])
def test_initial_pixels_without_a_factor_are_real_images(init: str) -> None:
    real = real_set()
    pixels = initial_pixels(real, SPEC, init, ipc=3, factor=1, draws=Draws("cpu", 0), raw=False)
    assert pixels.shape == (3, 3, 1, 8, 8)
    for c in range(3):
        originals = [to_unit(image) for image in real.of_class(c)]
        assert all(any(torch.equal(p, o) for o in originals) for p in pixels[c])
        assert len(pixels[c].unique(dim=0)) == 3


def test_initial_pixels_with_a_factor_hold_small_real_images_and_noise_is_noise() -> None:
    real = real_set()
    mixed = initial_pixels(real, SPEC, "kmeans", ipc=2, factor=2, draws=Draws("cpu", 0), raw=False)
    noise = initial_pixels(real, SPEC, "noise", ipc=200, factor=2, draws=Draws("cpu", 0), raw=False)
    assert mixed.shape == (3, 2, 1, 8, 8) and mixed.min() >= 0 and mixed.max() <= 1
    assert noise.shape == (3, 200, 1, 8, 8) and noise.min() >= 0 and noise.max() <= 1
    assert noise.mean().item() == pytest.approx(0.5, abs=0.01)
    assert noise.std().item() == pytest.approx(0.243, abs=0.01)  # 0.25 less what clamping takes


def test_a_coreset_has_ipc_images_of_every_class() -> None:
    for strategy in STRATEGIES:
        assert coreset(real_set(), SPEC, strategy, ipc=4, draws=Draws("cpu", 0)).counts == [4, 4, 4]
