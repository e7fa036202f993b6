from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from sklearn.cluster import KMeans
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import models
from models import Network
from tests import oracle
from utils.method import selection
from utils.method.images import ImageSet, Normalize, to_unit
from utils.method.selection import (
    KMEANS,
    STRATEGIES,
    Clusters,
    Context,
    assign,
    batched_kmeans,
    coreset,
    embed,
    initial_pixels,
    lloyd,
    padded,
    representatives,
    select,
    update_centroids,
)
from utils.method.training import fresh_network
from utils.numerics.compute import Captured, Compute
from utils.system.draws import Draws

CPU = Compute(torch.device("cpu"))
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


def context(real: ImageSet, key: int = 0, *, raw: bool = False, kmeans: str = "batched") -> Context:
    return Context(net(), real, Draws("cpu", key), CPU, raw=raw, kmeans=kmeans)


def points(*sizes: int) -> list[Tensor]:
    """Classes of these sizes, (N, 3) each."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, 3, dtype=torch.float64, generator=generator) for n in sizes]


def each_class(key: int, classes: int) -> list[Draws]:
    """As a context with these draws has them."""
    return [Draws("cpu", key).of_class(c) for c in range(classes)]


def blobs(k: int, each: int) -> Tensor:
    """k far-apart clusters; the first point of each lies exactly in its centre, the others around it."""
    offset = torch.randn(k, each // 2, 2, dtype=torch.float64)
    around = torch.cat([torch.zeros(k, 1, 2, dtype=torch.float64), offset, -offset], 1)
    return (around + 100 * torch.arange(k).view(k, 1, 1)).flatten(0, 1)


@pytest.mark.parametrize("kmeans", KMEANS)
def test_the_centre_of_every_separable_blob_is_its_representative(kmeans: str) -> None:
    x = [blobs(5, 10), 2 * blobs(5, 10), blobs(5, 12)]
    centres = [{step * i for i in range(5)} for step in (11, 11, 13)]
    found = [KMEANS[kmeans](x, 5, each_class(s, len(x)), 1) for s in range(60)]
    lucky = [[set(rows.tolist()) == c for rows, c in zip(picks, centres, strict=True)] for picks in found]
    # From k random points Lloyd's algorithm finds all blobs when there is one start in each, 5! / 5^5 = 4 % of times.
    assert all(sum(column) >= 1 for column in zip(*lucky, strict=True))


def test_lloyd_equals_the_naive_loops_whatever_the_sizes_of_the_other_classes() -> None:
    x = points(60, 25, 7, 41)
    together, real = padded(x)
    start = torch.stack([p[Draws("cpu", c).permutation(len(p))[:6]] for c, p in enumerate(x)])
    squares, centroids = together.square().sum(2), start
    for _ in range(4):
        nearest, distance = assign(together, squares, real, centroids)
        centroids = update_centroids(together, real, nearest, distance, 6)
    nearest, distance = assign(together, squares, real, centroids)
    picks = representatives(real, nearest, distance, 6)
    for c, p in enumerate(x):
        expected_nearest, expected = oracle.lloyd(p, start[c], 4)
        torch.testing.assert_close(centroids[c], expected, rtol=1e-9, atol=1e-12)
        assert torch.equal(nearest[c, : len(p)], expected_nearest)
        for j, pick in enumerate(picks[c].tolist()):
            members = (expected_nearest == j).nonzero().flatten().tolist()
            nearest_one = min(float((p[i] - expected[j]).norm()) for i in members)
            assert pick in members and float((p[pick] - expected[j]).norm()) == pytest.approx(nearest_one, rel=1e-9)


def test_the_representatives_are_those_of_lloyd_s_algorithm_from_different_random_points() -> None:
    x = points(30, 12)
    together, real = padded(x)
    chance, _ = padded([d.uniform(len(p)) for d, p in zip(each_class(0, 2), x, strict=True)])
    start, _, _ = lloyd(together, real, 5, chance, iterations=0)
    for c, p in enumerate(x):
        at = [int((p == row).all(1).nonzero()) for row in start[c]]
        assert len(set(at)) == 5
    _, nearest, distance = lloyd(together, real, 5, chance)
    expected = representatives(real, nearest, distance, 5)
    assert torch.equal(torch.stack(batched_kmeans(x, 5, each_class(0, len(x)))), expected)


def test_padding_is_no_point() -> None:
    x = [p + 100 for p in points(9, 40, 6)]  # zeros, which padding consists of, would be far from all points
    together, real = padded(x)
    assert together.shape == (3, 40, 3) and real.sum(1).tolist() == [9, 40, 6]
    for key in range(20):
        for k in (1, 2, 5):
            for rows, p in zip(batched_kmeans(x, k, each_class(key, len(x))), x, strict=True):
                assert len(rows.unique()) == k and rows.min() >= 0 and rows.max() < len(p)
        centroids, _, _ = lloyd(together, real, 5, Draws("cpu", key).uniform(*real.shape))
        assert centroids.min() > 50


def embeddings(n: int, key: int) -> Tensor:
    """Of random images by a random network."""
    images = torch.randint(0, 256, (n, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(key))
    return embed(net(), images, NORMALIZE, CPU).double()


def test_inertia_is_close_to_scikit_learn_s() -> None:
    """20 clusters of embeddings of two classes, on average over seeds, against KMeans with random starts."""
    x = [embeddings(2000, 0), embeddings(1500, 1)]
    together, real = padded(x)
    ours = theirs = 0.0
    for seed in range(5):
        _, _, distance = lloyd(together, real, 20, Draws("cpu", seed).uniform(*real.shape))
        ours += distance[real].sum().item()
        theirs += sum(KMeans(20, init="random", n_init=1, random_state=seed).fit(p.numpy()).inertia_ for p in x)
    assert ours <= 1.02 * theirs


def test_empty_clusters_move_to_the_farthest_points() -> None:
    x = torch.tensor([[[0.0], [1.0], [2.0], [9.0], [0.0]], [[4.0], [5.0], [6.0], [7.0], [8.0]]])
    real = torch.tensor([[True, True, True, True, False], [True] * 5])
    nearest = torch.tensor([[1, 1, 1, 1, 2], [0, 0, 1, 1, 1]])
    distance = torch.tensor([[9.0, 4.0, 1.0, 36.0, -torch.inf], [1.0, 2.0, 3.0, 4.0, 5.0]])
    assert update_centroids(x, real, nearest, distance, 3).tolist() == [[[9.0], [3.0], [0.0]], [[4.5], [7.0], [8.0]]]


@pytest.mark.parametrize("kmeans", KMEANS)
@pytest.mark.parametrize("copies", [1, 2, 25, 50])
@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_representatives_are_different_images_even_among_duplicates(copies: int, kmeans: str) -> None:
    x = [torch.randn(50 // copies, 4).repeat(copies, 1), torch.randn(100 // copies, 4).repeat(copies, 1)]
    for k in (1, 7, 25, 49):
        for rows, p in zip(KMEANS[kmeans](x, k, each_class(k, len(x)), 1), x, strict=True):
            assert len(rows.unique()) == k and rows.min() >= 0 and rows.max() < len(p)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_class_gives_its_own_images_and_a_small_one_repeats_in_turn(strategy: str) -> None:
    real = real_set()
    picks = select(context(real), 7, strategy=strategy)
    assert picks.shape == (3, 7)
    assert torch.equal(real.labels[picks], torch.arange(3)[:, None].expand(3, 7))
    assert [len(row.unique()) for row in picks] == [7, 5, 7]
    assert sorted(picks[1].bincount(minlength=26)[9:14].tolist()) == [1, 1, 1, 2, 2]
    assert coreset(context(real), strategy, ipc=4).counts == [4, 4, 4]


def test_a_strategy_that_selects_too_few_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STRATEGIES, "lazy", lambda context, counts: [torch.arange(k - 1) for k in counts])
    with pytest.raises(ValueError, match=r"--select lazy: 7 positions in class 0 wanted, got \(6,\)"):
        select(context(real_set()), 7, strategy="lazy")


@pytest.mark.parametrize(("strategy", "kmeans"), [*((s, "batched") for s in STRATEGIES), ("kmeans", "sklearn")])
def test_the_same_draws_select_the_same_images_and_others_do_not(strategy: str, kmeans: str) -> None:
    def once(key: int) -> Tensor:
        return select(context(real_set((40, 40, 40)), key, kmeans=kmeans), 10, strategy=strategy)

    assert torch.equal(once(0), once(0))
    if strategy in ("kmeans", "members", "random"):  # others leave nothing to chance
        assert not torch.equal(once(0), once(1))


def test_a_member_of_every_cluster_is_drawn_and_images_are_embedded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    real, clusters = real_set((30, 3, 25)), Clusters(Draws("cpu", "clusters"))
    embedded: list[int] = []
    plain = selection.embed

    def counting(net: Network, images: Tensor, *more: Any) -> Tensor:
        embedded.append(len(images))
        return plain(net, images, *more)

    monkeypatch.setattr(selection, "embed", counting)
    found = []
    for draw in range(5):
        drawing = dataclasses.replace(context(real, draw), clusters=clusters)
        picks = select(drawing, 6, strategy="members")
        for c in (0, 2):
            numbers = clusters.of_class[c][picks[c] - real.starts[c]]
            assert sorted(numbers.tolist()) == list(range(6))
        assert set(picks[1].tolist()) == {30, 31, 32}  # a small class gives all its images
        found.append(frozenset(picks[0].tolist()))
    assert embedded == [30, 25] and len(set(found)) == 5


def test_empty_clusters_leave_their_members_places_to_other_images() -> None:
    real = real_set((12, 12, 12))
    clusters = Clusters(Draws("cpu", 0), {c: torch.tensor([0, 0, 0, 3] * 3) for c in range(3)})  # 1 and 2 are empty
    picks = select(dataclasses.replace(context(real), clusters=clusters), 4, strategy="members")
    for c in range(3):
        numbers = clusters.of_class[c][picks[c] - real.starts[c]].tolist()
        assert len(picks[c].unique()) == 4 and {0, 3} <= set(numbers)


@pytest.mark.parametrize("raw", [False, True])
@torch.no_grad()
def test_central_boundary_and_herded_images_are_those_of_naive_loops(raw: bool) -> None:
    real = real_set((9, 5, 12))
    where = context(real, raw=raw)
    prepare = to_unit if raw else NORMALIZE
    for c, start in enumerate(real.starts):
        images = prepare(real.of_class(c)).double()
        network = net().double()
        x = network.embed(images)
        mean = x.sum(0) / len(x)
        central = sorted(range(len(x)), key=lambda i: float((x[i] - mean).norm()))[:4]
        margins = []
        for logits in network.classifier(x).tolist():
            margins.append(abs(logits[c] - max(value for other, value in enumerate(logits) if other != c)))
        boundary = sorted(range(len(x)), key=lambda i: margins[i])[:4]
        herded: list[int] = []
        for _ in range(4):
            left = [i for i in range(len(x)) if i not in herded]
            herded.append(min(left, key=lambda i: float((x[[*herded, i]].sum(0) / (len(herded) + 1) - mean).norm())))
        for strategy, expected in (("central", central), ("boundary", boundary), ("herding", herded)):
            found = select(where, 4, strategy=strategy)[c]
            assert (found - start).tolist() == expected, strategy


def test_classes_are_clustered_group_by_group_where_their_embeddings_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    real, groups = real_set((40, 10, 30, 20, 25)), []

    def recorded(x: list[Tensor], k: int, draws: list[Draws], each: int) -> list[Tensor]:
        groups.append([len(p) for p in x])
        return batched_kmeans(x, k, draws, each)

    monkeypatch.setitem(KMEANS, "batched", recorded)
    monkeypatch.setattr(Compute, "classes_together", True)  # as on a GPU
    select(context(real), 10, strategy="kmeans")
    monkeypatch.setattr(selection, "EMBEDDING_BYTES", 45 * embed(net(), real.images[:1], NORMALIZE, CPU).nbytes)
    picks = select(context(real), 10, strategy="kmeans")
    assert groups == [[40, 30, 20, 25], [40], [30], [20, 25]]  # a class of ten images needs no clustering
    assert torch.equal(real.labels[picks], torch.arange(5)[:, None].expand(5, 10))


def test_k_means_is_captured_where_one_graph_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []

    def noted(points: Tensor, real: Tensor, chance: Tensor, *, k: int, each: int) -> Tensor:
        calls.append((len(points), k, each))
        return selection.cluster(points, real, chance, k=k, each=each)

    def selected(real: ImageSet, captured: Captured | None) -> Tensor:
        return select(dataclasses.replace(context(real), captured=captured), 10, strategy="kmeans")

    real, captured = real_set((40, 30, 20)), Captured(noted, CPU.device)
    monkeypatch.setattr(Compute, "classes_together", True)  # as on a GPU
    assert torch.equal(selected(real, captured), selected(real, None)) and calls == [(3, 10, 1)]
    monkeypatch.setattr(selection, "EMBEDDING_BYTES", 0)  # class by class
    assert torch.equal(selected(real, captured), selected(real, None)) and len(calls) == 1


@pytest.mark.parametrize("strategy", ["kmeans", "central", "boundary", "herding"])
@pytest.mark.parametrize(("norm", "most"), [("instance", 1), ("batch", 3)])
def test_a_gpu_embeds_uneven_classes_in_pieces_of_one_shape(
    norm: str, most: int, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twelve classes, whose embeddings fit the memory in two groups. Through autograd, each has a remainder."""
    real = real_set(tuple(range(20, 44, 2)))
    made = fresh_network(dataclasses.replace(SPEC, classes=12, norm=norm), Draws("cpu", 0))
    compute = Compute(torch.device("cpu"), pixels=64 * 8**2)

    def selected(together: bool) -> tuple[Tensor, set[torch.Size]]:
        monkeypatch.setattr(Compute, "classes_together", together)
        with Convolved(channels=1) as convolved:
            picks = select(Context(made, real, Draws("cpu", 0), compute), 7, strategy=strategy)
        return picks, convolved.shapes

    monkeypatch.setattr(selection, "EMBEDDING_BYTES", 200 * made.classifier.in_features * 4)
    one_by_one, shapes = selected(False)
    assert len(shapes) == 12
    together, shapes = selected(True)
    assert torch.equal(together, one_by_one)
    assert len(shapes) == most


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_selection_never_asks_for_a_number(strategy: str) -> None:
    """Each would wait for a GPU."""

    class Numbers(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert function.overloadpacket is not torch.ops.aten._local_scalar_dense
            return function(*args, **(kwargs or {}))

    where = context(real_set((40, 30, 20)))
    with Numbers():
        select(where, 7, strategy=strategy)


class Convolved(TorchDispatchMode):
    """The shapes of images that are convolved meanwhile, those of so many channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels, self.shapes = channels, set[torch.Size]()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function.overloadpacket is torch.ops.aten.convolution and args[0].shape[1] == self.channels:
            self.shapes.add(args[0].shape)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("norm", models.NORMS)
def test_embedding_in_pieces_equals_embedding_at_once(norm: str) -> None:
    made = fresh_network(dataclasses.replace(SPEC, norm=norm), Draws("cpu", 0))
    images = real_set((600, 3)).images  # more than pass through at once
    found = embed(made, images, NORMALIZE, Compute(torch.device("cpu"), pixels=5 * 8**2))
    assert made.training
    torch.testing.assert_close(found, made.eval().embed(NORMALIZE(images)))
    assert not found.requires_grad


def test_clustering_sees_normalised_images_unless_the_published_raw_ones_are_asked_for() -> None:
    real, made = real_set((40, 40, 40)), net()
    expected = {
        raw: batched_kmeans([embed(made, real.of_class(c), prepare, CPU) for c in range(3)], 10, each_class(0, 3))
        for raw, prepare in ((False, NORMALIZE), (True, to_unit))
    }
    for raw in (False, True):
        picks = select(context(real, raw=raw), 10, strategy="kmeans")
        assert all(torch.equal(picks[c] - real.starts[c], expected[raw][c]) for c in range(3))
    assert not torch.equal(expected[False][0], expected[True][0])


@pytest.mark.parametrize("init", STRATEGIES)
def test_initial_pixels_without_a_factor_are_real_images(init: str) -> None:
    real = real_set()
    pixels = initial_pixels(context(real), init, ipc=3, factor=1)
    assert pixels.shape == (3, 3, 1, 8, 8)
    for c in range(3):
        originals = [to_unit(image) for image in real.of_class(c)]
        assert all(any(torch.equal(p, o) for o in originals) for p in pixels[c])
        assert len(pixels[c].unique(dim=0)) == 3


def test_initial_pixels_with_a_factor_hold_small_real_images_and_noise_is_noise() -> None:
    real = real_set()
    mixed = initial_pixels(context(real), "kmeans", ipc=2, factor=2)
    noise, normal = (initial_pixels(context(real), init, ipc=200, factor=2) for init in ("noise", "normal"))
    assert mixed.shape == (3, 2, 1, 8, 8) and mixed.min() >= 0 and mixed.max() <= 1
    assert noise.shape == (3, 200, 1, 8, 8) and noise.min() >= 0 and noise.max() <= 1
    assert noise.mean().item() == pytest.approx(0.5, abs=0.01)
    assert noise.std().item() == pytest.approx(0.243, abs=0.01)  # 0.25 less what clamping takes
    # Standard normal after normalisation, where clamping takes nothing.
    whole = NORMALIZE(normal.flatten(0, 1))[(normal.flatten(0, 1) > 0) & (normal.flatten(0, 1) < 1)]
    low, high = NORMALIZE(torch.tensor([0.0, 1.0]).view(2, 1, 1, 1)).flatten().tolist()
    expected = torch.randn(10**6, generator=torch.Generator().manual_seed(0))
    expected = expected[(expected > low) & (expected < high)]
    assert whole.mean().item() == pytest.approx(expected.mean().item(), abs=0.02)
    assert whole.std().item() == pytest.approx(expected.std().item(), abs=0.02)


# --- Sub-clusters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("each", [1, 2, 4])
def test_the_images_nearest_each_centroid_are_taken(each: int) -> None:
    """Far-apart clusters, of which each gives its nearest members."""
    x = torch.randn(3, 10, 2, dtype=torch.float64) + 1000 * torch.arange(3).view(3, 1, 1)
    away = (x - x.mean(1, keepdim=True)).norm(dim=2)
    expected = {10 * c + int(i) for c in range(3) for i in away[c].argsort()[:each]}
    found = [set(batched_kmeans([x.flatten(0, 1)], 3 * each, [Draws("cpu", s)], each)[0].tolist()) for s in range(30)]
    assert expected in found  # unless two clusters had no random start


def test_clusters_that_are_too_small_leave_their_places_to_other_images() -> None:
    x = torch.cat([torch.zeros(1, 2), 100 + torch.randn(19, 2)])
    for seed in range(5):
        (rows,) = batched_kmeans([x], 12, [Draws("cpu", seed)], 6)
        assert len(rows.unique()) == 12 and rows.max() < 20
