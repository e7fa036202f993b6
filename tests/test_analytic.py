"""The derivatives that are written out, against autograd."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import models
from models import Network
from tests.conftest import interpreter_error
from tests.oracle import class_distance
from utils.method.objectives import METRICS, Comparison
from utils.method.training import fresh_network
from utils.numerics import analytic, derivatives, passes
from utils.numerics.compilation import compiler_error, gpu_functions
from utils.numerics.compute import Compute
from utils.system.draws import Draws

CPU = torch.device("cpu")
CLASSES, REAL, SYN = 3, 7, 4
NORMS = ("instance", "group", "layer")
MATCHED = {
    "gradients": ("grad", False),
    "with the classifier's": ("grad", True),
    "embeddings": ("embed", False),
    "both": ("grad+embed", False),
    "all": ("embed+grad", True),
}
Sizes = tuple[int, int, int]  # side, depth, width
SIZES: list[tuple[Sizes, int]] = [((8, 2, 8), 1), ((8, 2, 8), 0), ((11, 3, 4), 5), ((28, 2, 4), 0)]  # images of a piece


def network(norm: str, side: int = 8, depth: int = 2, width: int = 8, key: int = 0) -> Network:
    """In float64; its norm's parameters are random, so that they cannot be mistaken for one and zero."""
    spec = models.resolve("convnet", channels=3, classes=5, side=side, depth=depth, width=width, norm=norm)
    net = fresh_network(spec, Draws("cpu", key)).double()
    for module in net.modules():
        if isinstance(module, nn.GroupNorm):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(key)
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return net


def noise(*shape: int, key: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(key))


def classes(side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Real images, synthetic images, labels."""
    real, syn = noise(CLASSES, REAL, 3, side, side), noise(CLASSES, SYN, 3, side, side, key=1)
    return real, syn, torch.tensor([2, 0, 4])


def compute(pixels: int = 0, *, precision: str = "fp32", compile: bool = False) -> Compute:
    return Compute(CPU, precision, compile, pixels)


def comparison(matched: str, metric: str = "mse") -> Comparison:
    objective, fc = MATCHED[matched]
    return Comparison(objective, metric, fc=fc)


def close(ours: Tensor, exact: Tensor, tolerance: float) -> bool:
    """Relative to the whole tensor's norm."""
    return ours.shape == exact.shape and bool((ours.double() - exact).norm() <= tolerance * exact.norm())


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("sizes", "piece", "norm", "matched"),
    [(*sizes, norm, "gradients") for sizes in SIZES for norm in NORMS]
    + [(*SIZES[i], norm, matched) for i, norm in ((2, "instance"), (0, "group")) for matched in [*MATCHED][1:]],
)
def test_distances_and_their_gradients_are_those_of_autograd(
    sizes: Sizes, piece: int, norm: str, matched: str, metric: str
) -> None:
    net, (real, syn, labels) = network(norm, *sizes), classes(sizes[0])
    how = comparison(matched, metric)
    losses, gradients = derivatives.distances(net, real, syn, labels, how.distance, compute(piece * sizes[0] ** 2))
    expected, exact = derivatives.distances_by_autograd(net, real, syn, labels, how.distance, compute())
    assert close(losses, expected, 1e-10) and close(gradients, exact, 1e-10)


@pytest.mark.parametrize(
    ("norm", "how", "way"),
    [
        *(("group", comparison(matched), "written out") for matched in MATCHED),
        ("instance", Comparison("embed", bias=True), "written out"),  # which is about gradients
        ("instance", Comparison("grad", bias=True), "autograd"),
        ("instance", Comparison("grad+embed", bias=True), "autograd"),
        ("instance", Comparison("feat"), "autograd"),
        ("instance", Comparison("grad+feat"), "autograd"),
        *(("batch", comparison(matched), "autograd") for matched in MATCHED),
    ],
)
def test_the_way_is_chosen_by_the_network_and_by_what_is_matched(
    monkeypatch: pytest.MonkeyPatch, norm: str, how: Comparison, way: str
) -> None:
    taken: list[str] = []
    monkeypatch.setattr(analytic.Analytic, "distances", lambda *rest: taken.append("written out"))
    monkeypatch.setattr(derivatives, "distances_by_autograd", lambda *rest: taken.append("autograd"))
    derivatives.distances(network(norm), *classes(8), how.distance, compute())
    assert taken == [way]


def mixed(k: int, n: int) -> Tensor:
    """Targets that are probabilities, as CutMix makes them."""
    return noise(k, n, 5, key=2).softmax(2)


@pytest.mark.parametrize("nets", [1, 3])
@pytest.mark.parametrize("norm", models.NORMS)
@pytest.mark.parametrize(("sizes", "piece"), SIZES)
def test_parameter_gradients_are_those_of_autograd(sizes: Sizes, piece: int, norm: str, nets: int) -> None:
    """Networks side by side, each with images of its own."""
    group = [network(norm, *sizes, key=k) for k in range(nets)]
    x, target = noise(nets, REAL, 3, sizes[0], sizes[0]), mixed(nets, REAL)
    found = derivatives.gradients(group, x, target, compute(piece * sizes[0] ** 2))
    for net, images, wanted, ours in zip(group, x, target, found, strict=True):
        exact = torch.autograd.grad(F.cross_entropy(net(images), wanted), list(net.parameters()))
        for g, e in zip(ours, exact, strict=True):
            torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-14)  # a bias before instance norm: zero up to rounding


def batch_and_direction(net: Network, side: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Images, targets, a direction of all parameters; in the network's precision."""
    direction = [noise(*p.shape, key=10 + i) for i, p in enumerate(net.parameters())]
    x, target, *direction = (
        v.to(net.classifier.weight.dtype) for v in (noise(7, 3, side, side), mixed(1, 7)[0], *direction)
    )
    return x, target, direction


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("sizes", "piece"), SIZES)
def test_slopes_and_their_derivatives_are_those_of_autograd(sizes: Sizes, piece: int, norm: str) -> None:
    net = network(norm, *sizes)
    x, target, direction = batch_and_direction(net, sizes[0])
    c, parameters = compute(piece * sizes[0] ** 2), list(net.parameters())
    batch = list(derivatives.pieces(net, parameters, x, target, c, gradients=True))
    assert all(isinstance(piece, analytic.Traced) for piece in batch)
    slope, by_parameters, by_x = derivatives.slope(batch, direction)
    gradients = torch.autograd.grad(F.cross_entropy(net(x.requires_grad_()), target), parameters, create_graph=True)
    expected = torch.stack([(g * d).sum() for g, d in zip(gradients, direction, strict=True)]).sum()
    *exact, exact_x = torch.autograd.grad(expected, [*parameters, x])
    torch.testing.assert_close(slope, expected.detach(), rtol=1e-9, atol=0)
    assert close(by_x, exact_x, 1e-9)
    sums = [torch.stack(parts).sum(0) for parts in zip(*(piece.gradients for piece in batch), strict=True)]
    for ours, wanted in zip([*by_parameters, *sums], [*exact, *gradients], strict=True):
        torch.testing.assert_close(ours, wanted.detach(), rtol=1e-9, atol=1e-12)  # zeros up to rounding, as above

    lazily = derivatives.slope(derivatives.pieces(net, parameters, x.detach(), target, c, gradients=False), direction)
    assert torch.equal(lazily[0], slope) and torch.equal(lazily[2], by_x)
    assert all(torch.equal(*pair) for pair in zip(lazily[1], by_parameters, strict=True))


def slopes(net: analytic.Analytic, x: Tensor, target: Tensor, direction: list[Tensor]) -> list[Tensor]:
    """The slope, its derivatives by parameters and by images, and the gradient."""
    batch = list(net.traced(x, target, gradients=True))
    slope, by_parameters, by_x = derivatives.slope(batch, direction)
    gradients = torch.stack([torch.cat([g.flatten() for g in piece.gradients]) for piece in batch]).sum(0)
    return [slope, torch.cat([g.flatten() for g in by_parameters]), by_x, gradients]


@pytest.mark.parametrize("pixels", [1, 320, 0])
@pytest.mark.parametrize("norm", models.NORMS)
@pytest.mark.parametrize("side", [8, 11, 28])
def test_embeddings_are_those_of_the_network(side: int, norm: str, pixels: int) -> None:
    net = network(norm, side=side, width=4).eval()
    x = noise(9, 3, side, side)
    torch.testing.assert_close(derivatives.embed(net, x, compute(pixels)), net.embed(x), rtol=1e-10, atol=1e-12)
    assert torch.equal(derivatives.logits(net, x, compute(pixels)).argmax(1), net(x).argmax(1))


@pytest.mark.parametrize(
    ("name", "norm", "expected"),
    [
        *(("convnet", norm, True) for norm in NORMS),
        *(("convnet", norm, False) for norm in ("batch", "none")),
        ("resnet10", "instance", False),
        ("densenet", "instance", False),
    ],
)
def test_a_convnet_whose_norm_sees_one_image_is_written_out(name: str, norm: str, expected: bool) -> None:
    net = models.build(models.resolve(name, channels=3, classes=5, side=32, width=8, norm=norm))
    assert analytic.is_supported(net) is expected


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 12, 100])
@pytest.mark.parametrize("n", [0, 1, 2, 5, 7, 12])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_pieces_cover_every_image_once_and_stay_within_the_limit(k: int, n: int, limit: int) -> None:
    seen = torch.zeros(k, n, dtype=torch.int64)
    for span in analytic.spans(k, n, limit):
        assert seen[span].numel() <= limit
        seen[span] += 1
    assert (seen == 1).all()


@pytest.mark.parametrize(("n", "limit", "expected"), [(10, 4, [3, 3, 4]), (8, 4, [4, 4]), (3, 9, [3]), (2, 1, [1, 1])])
def test_parts_are_as_few_and_as_even_as_can_be(n: int, limit: int, expected: list[int]) -> None:
    parts = analytic.even(n, limit)
    assert [part.stop - part.start for part in parts] == expected
    assert parts[0].start == 0 and parts[-1].stop == n
    assert all(a.stop == b.start for a, b in itertools.pairwise(parts))


# --- Precision and compilation ----------------------------------------------------------------------------------------


def per_class(net: Network, real: Tensor, syn: Tensor, labels: Tensor, metric: str) -> Tensor:
    """The oracle's gradients."""
    found = []
    for wanted, given, label in zip(real, syn, labels.tolist(), strict=True):
        images = given.clone().requires_grad_()
        found.append(torch.autograd.grad(class_distance(net, wanted, images, label, metric, "grad"), images)[0])
    return torch.stack(found)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("norm", NORMS)
def test_the_error_in_float32_is_of_autograd_s_size(norm: str, metric: str) -> None:
    net, (real, syn, labels) = network(norm, side=16, depth=3, width=32), classes(16)
    exact = per_class(net, real, syn, labels, metric)
    net, real, syn = net.float(), real.float(), syn.float()
    theirs = per_class(net, real, syn, labels, metric)
    for pixels in (0, 3 * 16**2):
        _, ours = derivatives.distances(net, real, syn, labels, Comparison(metric=metric).distance, compute(pixels))
        assert ours.dtype == torch.float32
        assert (ours - exact).norm() <= 10 * (theirs - exact).norm()


@pytest.mark.parametrize(
    ("by", "norm", "how"),
    [(derivatives.distances, norm, comparison(matched)) for norm in NORMS for matched in MATCHED]
    + [
        (derivatives.distances_by_autograd, norm, Comparison(objective, fc=True))
        for norm in ("instance", "batch", "none")
        for objective in ("grad", "feat", "embed")
    ],
)
def test_bfloat16_is_float32_up_to_its_own_rounding(by: Callable[..., Any], norm: str, how: Comparison) -> None:
    net, (real, syn, labels) = network(norm, side=16, depth=2, width=32).float(), classes(16)
    match = partial(by, net, real.float(), syn.float(), labels, how.distance)
    expected, exact = match(compute())
    losses, gradients = match(compute(precision="bf16"))
    assert losses.dtype == gradients.dtype == torch.float32
    assert close(losses, expected, 0.2) and close(gradients, exact, 0.2)
    assert not torch.equal(gradients, exact)


def test_bfloat16_gradients_and_embeddings_are_float32_up_to_their_own_rounding() -> None:
    nets = [network("instance", side=16, width=32, key=k).float() for k in range(2)]
    x, target = noise(2, REAL, 3, 16, 16).float(), mixed(2, REAL).float()
    ours, exact = (derivatives.gradients(nets, x, target, compute(precision=p)) for p in ("bf16", "fp32"))
    for mine, theirs in zip(ours, exact, strict=True):
        flat, flat_exact = (torch.cat([g.flatten() for g in found]) for found in (mine, theirs))
        assert flat.dtype == torch.float32 and close(flat, flat_exact, 0.2)
    assert close(derivatives.embed(nets[0], x[0], compute(precision="bf16")), nets[0].embed(x[0]), 0.05)


@pytest.mark.parametrize("norm", NORMS)
def test_bfloat16_slopes_are_float32_up_to_their_own_rounding(norm: str) -> None:
    net = network(norm, side=16, width=32).float()
    assert analytic.is_supported(net)
    x, target, direction = batch_and_direction(net, 16)

    written_out = [analytic.Analytic([net], compute(precision=p), torch.float32) for p in ("bf16", "fp32")]
    for ours, exact in zip(*(slopes(net, x, target, direction) for net in written_out), strict=True):
        assert ours.dtype == torch.float32 and close(ours, exact, 0.2)


@pytest.mark.parametrize(
    ("norm", "how"),
    [("instance", "CPU"), ("group", "CPU"), pytest.param("instance", "GPU", marks=pytest.mark.slow), ("group", "GPU")],
)
def test_compiled_functions_give_the_same_derivatives(norm: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = (norm, how) == ("instance", "GPU")
    if (how == "CPU" and (problem := compiler_error(CPU))) or (kernels and (problem := interpreter_error())):
        pytest.skip(problem)
    side = 11 if how == "CPU" else 5
    made = [network(norm, side=side, width=16, key=k).float() for k in range(2)]
    nets = [net for net in made if analytic.is_supported(net)]
    real, syn, labels = (x.float() if x.is_floating_point() else x for x in classes(side))
    count = REAL if how == "CPU" else 2  # the interpreter is slow
    x, target = noise(2, count, 3, side, side).float(), mixed(2, count).float()
    real, syn = real[:, : 2 * count], syn[:, :count]
    _, _, direction = batch_and_direction(made[0], side)

    def every_result(pixels: int, quick: bool) -> list[Tensor]:
        one, both = (
            analytic.Analytic(group, compute(pixels, compile=quick and how == "CPU"), torch.float32)
            for group in (nets[:1], nets)
        )
        if quick and kernels:
            one.net, both.net = (each.net._replace(functions=gpu_functions()) for each in (one, both))
        found: list[Tensor] = []
        for matched, metric in (("all", "mse"), ("gradients", "cos"), ("embeddings", "mse"))[
            : 3 if how == "CPU" else 1
        ]:
            distance = comparison(matched, metric).distance
            assert distance.compared is not None
            found += one.distances(real, syn, labels, distance.compared, distance.metric)
        found += [torch.cat([g.flatten() for g in gradients]) for gradients in both.gradients(x, target)]
        return [*found, one.embed(x[0]), *slopes(one, x[0], target[0], direction)]

    for pixels in (0, 5 * side**2)[: 2 if how == "CPU" else 1]:
        exact = every_result(pixels, quick=False)
        with monkeypatch.context() as patch:
            if how == "GPU":  # what is made for one works on a CPU too: products of patches, kernels by an interpreter
                patch.setattr(passes, "on_gpu", lambda x: True)
            quick = every_result(pixels, quick=True)
        assert all(close(*pair, 1e-5) for pair in zip(quick, exact, strict=True))


def test_what_cpu_functions_do_not_support_is_computed_without_them() -> None:
    if problem := compiler_error(CPU):
        pytest.skip(problem)
    real, syn, labels = classes(8)
    for width, dtype, precision in ((12, torch.float64, "fp32"), (16, torch.float64, "bf16")):
        net = network("instance", width=width)
        plain, quick = (
            derivatives.distances(
                net, real, syn, labels, Comparison().distance, compute(precision=precision, compile=c)
            )
            for c in (False, True)
        )
        assert plain[1].dtype == dtype and all(torch.equal(*pair) for pair in zip(plain, quick, strict=True))
