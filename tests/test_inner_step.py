"""The whole matching update against the published per-class loop, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import models
from models import NetSpec, Network
from tests.oracle import PublishedPixels, class_distance
from utils.augment import Augment
from utils.images import ImageSet, Normalize
from utils.matching import METRICS, Comparison, Matcher, gradient_distance, matched_parameters
from utils.pixels import PixelSGD
from utils.runtime import Draws
from utils.training import Recipe, fresh_network, update_network

CLASSES, PER_CLASS, SIDE = 3, 12, 8
NORMALIZE = Normalize((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))


def real_set() -> ImageSet:
    images = torch.rand(CLASSES * PER_CLASS, 3, SIDE, SIDE, dtype=torch.float64, generator=generator(1))
    labels = torch.arange(CLASSES).repeat(PER_CLASS)
    return ImageSet(images, labels, classes=CLASSES, normalize=NORMALIZE)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(norm: str = "instance") -> Network:
    return fresh_network(spec(norm), Draws("cpu", 3)).double()


def spec(norm: str) -> NetSpec:
    return models.resolve("convnet", channels=3, classes=CLASSES, side=SIDE, depth=2, width=8, norm=norm)


def matcher(factor: int, *, match: str = "grad", metric: str = "mse", syn_max: int = 128) -> Matcher:
    return Matcher(
        objective=match,
        comparison=Comparison(metric=metric),
        factor=factor,
        decode_type="single",
        batch_syn_max=syn_max,
        augment=Augment("color_crop_cutout_flip_scale_rotate"),
    )


@pytest.mark.parametrize("match", ["grad", "feat"])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("factor", [1, 2, 3])
def test_inner_steps_with_network_updates_equal_the_published_loop(factor: int, metric: str, match: str) -> None:
    real, net = real_set(), network()
    match_step = matcher(factor, match=match, metric=metric)
    pixels = torch.rand(CLASSES, 2, 3, SIDE, SIDE, dtype=torch.float64, generator=generator(2))
    published = PublishedPixels(pixels, lr=1e-3, momentum=0.5)
    ours = PixelSGD(pixels.clone(), lr=1e-3, momentum=0.5)
    update = Recipe(batch_size=8, augment=Augment("color_crop"), mixup="cut")
    sgd = update.optimizer(net)
    for step in range(3):
        picks = torch.stack([real.starts[c] + torch.randperm(PER_CLASS)[:6] for c in range(CLASSES)])
        losses, gradients = match_step(net, ours.lookahead(), real, picks, Draws("cpu", "match", step))
        ours.step(gradients)
        expected = published.inner_step(
            net,
            real,
            picks,
            match_step.augment.draw_shared(CLASSES, Draws("cpu", "match", step)),
            factor=factor,
            names=match_step.augment.names,
            metric=metric,
            match=match,
            normalize=NORMALIZE,
        )
        assert losses.tolist() == pytest.approx(expected, rel=1e-9)
        update_network(net, sgd, real, update, n_data=20, draws=Draws("cpu", "update", step))
    moved = (published.pixels.detach() - pixels).norm()
    assert moved > 0
    assert (ours.pixels - published.pixels.detach()).norm() <= 1e-9 * moved


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("classes", [1, 2, 7])
def test_the_closed_form_of_the_shared_momentum_equals_sgd_stepped_per_class(classes: int, momentum: float) -> None:
    target = torch.rand(classes, 1, 1, 4, 4, dtype=torch.float64)
    start = torch.rand_like(target)
    sgd_pixels = start.clone().requires_grad_()
    sgd = torch.optim.SGD([sgd_pixels], lr=0.1, momentum=momentum)
    ours = PixelSGD(start.clone(), lr=0.1, momentum=momentum)
    for _ in range(5):
        ours.step(2 * (ours.lookahead() - target))  # the gradient of the squared distance to the target
        for c in range(classes):
            sgd.zero_grad(set_to_none=False)
            (sgd_pixels[c] - target[c]).square().sum().backward()
            sgd.step()
    torch.testing.assert_close(ours.pixels, sgd_pixels.detach(), rtol=1e-12, atol=1e-14)


def test_clamping_leaves_the_velocity_alone() -> None:
    sgd = PixelSGD(torch.full((2, 1, 1, 2, 2), 0.9), lr=1.0, momentum=0.5)
    sgd.step(torch.full((2, 1, 1, 2, 2), -1.0))
    velocity = sgd.velocity.clone()
    sgd.clamp()
    assert sgd.pixels.max() == 1 and torch.equal(sgd.velocity, velocity)


def test_float32_gradients_are_close_to_float64_ones() -> None:
    real, net = real_set(), network()
    pixels = torch.rand(CLASSES, 2, 3, SIDE, SIDE, dtype=torch.float64, generator=generator(2))
    picks = torch.stack([real.starts[c] + torch.arange(6) for c in range(CLASSES)])
    _, exact = matcher(2)(net, pixels, real, picks, Draws("cpu", 0))
    single = ImageSet(real.images.float(), real.labels, classes=CLASSES, normalize=NORMALIZE)
    _, ours = matcher(2)(net.float(), pixels.float(), single, picks, Draws("cpu", 0))
    assert (ours.double() - exact).norm() < 1e-4 * exact.norm()


def test_at_most_batch_syn_max_synthetic_images_take_part() -> None:
    real, net = real_set(), network()
    pixels = torch.rand(CLASSES, 5, 3, SIDE, SIDE, dtype=torch.float64)
    picks = torch.stack([real.starts[c] + torch.arange(4) for c in range(CLASSES)])
    _, gradients = matcher(1, syn_max=2)(net, pixels, real, picks, Draws("cpu", 0))
    touched = gradients.flatten(2).abs().sum(2) > 0  # (classes, ipc)
    assert touched.sum(1).tolist() == [2, 2, 2]


def test_other_draws_thin_out_to_other_synthetic_images() -> None:
    real, net = real_set(), network()
    pixels = torch.rand(CLASSES, 9, 3, SIDE, SIDE, dtype=torch.float64)
    picks = torch.stack([real.starts[c] + torch.arange(4) for c in range(CLASSES)])

    def touched(key: int) -> Tensor:
        return matcher(1, syn_max=3)(net, pixels, real, picks, Draws("cpu", key))[1].flatten(2).abs().sum(2) > 0

    assert not torch.equal(touched(0), touched(1))
    assert torch.equal(touched(0), touched(0))


@pytest.mark.parametrize(
    ("bias", "fc", "expected"),
    [
        (False, False, {"0.0.weight", "1.0.weight"}),
        (False, True, {"0.0.weight", "1.0.weight", "fc.weight"}),
        (True, False, {f"{block}.{layer}.{kind}" for block in "01" for layer in "01" for kind in ("weight", "bias")}),
    ],
)
def test_biases_norm_layers_and_the_classifier_take_part_only_when_asked(
    bias: bool, fc: bool, expected: set[str]
) -> None:
    net = network()
    names = {id(p): n.removeprefix("stages.").replace("classifier", "fc") for n, p in net.named_parameters()}
    assert {names[id(p)] for p in matched_parameters(net, bias=bias, fc=fc)} == expected
    everything = matched_parameters(net, bias=True, fc=True)
    assert {id(p) for p in everything} == {id(p) for p in net.parameters()} and len(everything) == len(names)


def test_matching_leaves_the_running_statistics_of_batch_norm_alone() -> None:
    real, net = real_set(), network("batch")
    picks = torch.stack([real.starts[c] + torch.arange(6) for c in range(CLASSES)])
    before = {k: v.clone() for k, v in net.state_dict().items() if "running" in k}
    matcher(1)(net, torch.rand(CLASSES, 2, 3, SIDE, SIDE, dtype=torch.float64), real, picks, Draws("cpu", 0))
    assert before and all(torch.equal(v, net.state_dict()[k]) for k, v in before.items())
    assert all(m.momentum == 0.1 for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d))


def test_distances_are_those_of_hand_made_gradients() -> None:
    real, syn = torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 4.0], [0.0, 2.0]])
    assert METRICS["mse"](real, syn).item() == 9 + 16 + 1
    assert METRICS["l1"](real, syn).item() == 3 + 4 + 1
    assert METRICS["l1_mean"](real, syn).item() == 2
    assert METRICS["cos"](real, syn).item() == pytest.approx(1)  # orthogonal in the first row, parallel in the second


def test_identical_sets_have_no_distance() -> None:
    net = network()
    x = torch.rand(4, 3, SIDE, SIDE, dtype=torch.float64)
    for metric in METRICS:  # biases before a norm have no gradient, and so no direction for a cosine
        how = Comparison(metric=metric, bias=metric != "cos", fc=True)
        assert gradient_distance(net, x, x.clone().requires_grad_(), 1, how).item() == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("norm", models.NORMS)
def test_every_norm_can_be_matched_through(norm: str) -> None:
    net = network(norm)
    real, syn = torch.rand(2, 4, 3, SIDE, SIDE, dtype=torch.float64)
    syn = syn.requires_grad_()
    ours = gradient_distance(net, real, syn, 0, Comparison())
    torch.testing.assert_close(ours, class_distance(net, real, syn, 0, "mse", "grad"), rtol=1e-9, atol=0)
    assert torch.autograd.grad(ours, syn)[0].abs().sum() > 0
