"""The whole matching update against the published per-class loop, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import models
from models import NetSpec, Network
from tests.oracle import PublishedPixels
from utils.method.augment import Augment
from utils.method.formation import Formation
from utils.method.images import ImageSet, Normalize
from utils.method.matching import Matcher, MatchingStep
from utils.method.objectives import METRICS, Comparison, distance, matched_parameters, parse
from utils.method.pixels import PixelSGD
from utils.method.training import Recipe, Trainer, fresh_network, update_network
from utils.numerics.compute import Compute
from utils.system.draws import Draws

CLASSES, PER_CLASS, SIDE = 3, 12, 8
NORMALIZE = Normalize((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
CPU = Compute(torch.device("cpu"))
AUGMENTATION = "color_crop_cutout_flip_scale_rotate"


def real_set(side: int = SIDE) -> ImageSet:
    images = torch.rand(CLASSES * PER_CLASS, 3, side, side, dtype=torch.float64, generator=generator(1))
    labels = torch.arange(CLASSES).repeat(PER_CLASS)
    return ImageSet(images, labels, classes=CLASSES, normalize=NORMALIZE)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(norm: str = "instance", *, side: int = SIDE, depth: int = 2, width: int = 8) -> Network:
    return fresh_network(spec(norm, side=side, depth=depth, width=width), Draws("cpu", 3)).double()


def spec(norm: str, *, side: int = SIDE, depth: int = 2, width: int = 8) -> NetSpec:
    return models.resolve("convnet", channels=3, classes=CLASSES, side=side, depth=depth, width=width, norm=norm)


def matcher(
    factor: int,
    how: Comparison = Comparison(),  # noqa: B008  # frozen
    *,
    decode_type: str = "single",
    syn_max: int = 128,
    names: str = AUGMENTATION,
    compute: Compute = CPU,
) -> Matcher:
    return Matcher(how, Formation(factor, decode_type), syn_max, Augment(names), compute)


def matched(match: Matcher, net: Network, pixels: Tensor, real: ImageSet, picks: Tensor, key: int = 0) -> list[Tensor]:
    """Distances and gradients under the draws of this key."""
    drawn = match.draw(pixels.shape[0], pixels.shape[1], Draws("cpu", key))
    return list(match(net, pixels, real, picks, *drawn))


def check_inner_steps(match: Matcher, net: Network, *, ipc: int = 2, side: int = SIDE, steps: int = 3) -> None:
    """Inner steps with network updates in between give the losses and the pixels of the published loop."""
    real, how = real_set(side), match.how
    pixels = torch.rand(CLASSES, ipc, 3, side, side, dtype=torch.float64, generator=generator(2))
    published = PublishedPixels(pixels, lr=1e-3, momentum=0.5)
    ours = PixelSGD(pixels.clone(), lr=1e-3, momentum=0.5)
    trainer = Trainer([net], [real], Recipe(batch_size=8, augment=Augment("color_crop"), mixup="cut"), match.compute)
    step = MatchingStep(match, net, ours, real)
    for it in range(steps):
        order = torch.rand(CLASSES, PER_CLASS, generator=generator(it)).argsort(1)
        picks = torch.tensor(real.starts)[:, None] + order[:, :6]
        losses = step(picks, Draws("cpu", "match", it))
        expected = published.inner_step(
            net,
            real,
            picks,
            *match.draw(CLASSES, ipc, Draws("cpu", "match", it)),
            factor=match.formation.factor,
            decode_type=match.formation.decode_type,
            augment=match.augment,
            metric=how.metric,
            match=how.objective,
            bias=how.bias,
            fc=how.fc,
            normalize=NORMALIZE,
        )
        assert losses.tolist() == pytest.approx(expected, rel=1e-9)
        update_network(trainer, n_data=20, draws=Draws("cpu", "update", it))
    moved = (published.pixels.detach() - pixels).norm()
    assert moved > 0
    assert (ours.pixels - published.pixels.detach()).norm() <= 1e-9 * moved


OTHERS = (Comparison("embed"), Comparison("grad+embed"), Comparison("grad", "cos", fc=True))
MATCHERS: list[tuple[Matcher, str]] = [
    *(
        (matcher(factor, Comparison(o, m)), "instance")
        for factor in (1, 3)
        for m in METRICS
        for o in ("grad", "blocks")
    ),
    *((matcher(2, Comparison(o)), norm) for norm in models.NORMS for o in ("grad", "feat")),
    *(
        (matcher(1, Comparison("grad", metric, bias, fc)), norm)
        for norm, metric in (("instance", "mse"), ("group", "cos"), ("batch", "l1"))
        for bias, fc in ((True, False), (False, True), (True, True))
    ),
    *((matcher(2, how), norm) for norm in ("instance", "group", "batch") for how in OTHERS),
    *(
        (matcher(2, names=names), "instance")
        for names in ("none", "one_color_crop_cutout_flip_scale_rotate", "color_crop_cutout", "flip_rotate")
    ),
]


@pytest.mark.parametrize(("match", "norm"), MATCHERS)
def test_inner_steps_with_network_updates_equal_the_published_loop(match: Matcher, norm: str) -> None:
    check_inner_steps(match, network(norm), steps=2)


@pytest.mark.parametrize(
    ("decode_type", "ipc", "syn_max"),
    [("multi", 2, 128), ("multi", 2, 5), ("single", 3, 4), ("bound", 42, 20)],
)
def test_steps_of_any_decode_type_or_count_equal_the_published_loop(decode_type: str, ipc: int, syn_max: int) -> None:
    assert Formation(3, "bound").decoded_count(42) == 10 * 9 + 2 * 4 + 30
    check_inner_steps(matcher(3, decode_type=decode_type, syn_max=syn_max, names="color_crop_flip"), network(), ipc=ipc)


@pytest.mark.parametrize(("side", "depth", "metric"), [(11, 2, "mse"), (11, 3, "cos"), (28, 2, "mse")])
def test_steps_on_padded_images_equal_the_published_loop(side: int, depth: int, metric: str) -> None:
    net = network(side=side, depth=depth, width=4)
    check_inner_steps(matcher(2, Comparison(metric=metric)), net, side=side, steps=2)


@pytest.mark.parametrize("pixels", [1, 5 * SIDE**2])
@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_steps_in_pieces_equal_the_published_loop(monkeypatch: pytest.MonkeyPatch, norm: str, pixels: int) -> None:
    monkeypatch.setattr(Compute, "classes_at_once", lambda *sizes: 2)
    check_inner_steps(matcher(2, compute=Compute(torch.device("cpu"), pixels=pixels)), network(norm))


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


def test_at_most_batch_syn_max_synthetic_images_take_part_whichever_are_drawn() -> None:
    real, net = real_set(), network()
    pixels = torch.rand(CLASSES, 9, 3, SIDE, SIDE, dtype=torch.float64)
    picks = torch.stack([real.starts[c] + torch.arange(4) for c in range(CLASSES)])

    def touched(key: int) -> Tensor:
        """Whether a stored image has a gradient, (classes, ipc)."""
        return matched(matcher(1, syn_max=3), net, pixels, real, picks, key)[1].flatten(2).abs().sum(2) > 0

    assert touched(0).sum(1).tolist() == [3, 3, 3]
    assert torch.equal(touched(0), touched(0)) and not torch.equal(touched(0), touched(1))


@pytest.mark.parametrize(
    ("bias", "fc", "expected"),
    [
        (False, False, {"0.0.weight", "1.0.weight"}),
        (False, True, {"0.0.weight", "1.0.weight", "fc.weight"}),
        (True, False, {f"{block}.{layer}.{kind}" for block in "01" for layer in "01" for kind in ("weight", "bias")}),
    ],
)
def test_biases_norms_and_the_classifier_take_part_only_when_asked(bias: bool, fc: bool, expected: set[str]) -> None:
    net = network()
    found = matched_parameters(net, bias=bias, fc=fc)
    assert {name.removeprefix("stages.").replace("classifier", "fc") for name in found} == expected
    everything = matched_parameters(net, bias=True, fc=True)
    assert list(everything) == [name for name, p in net.named_parameters()]
    assert all(torch.equal(everything[name], p) for name, p in net.named_parameters())


def test_matching_leaves_the_running_statistics_of_batch_norm_alone() -> None:
    real, net = real_set(), network("batch")
    picks = torch.stack([real.starts[c] + torch.arange(6) for c in range(CLASSES)])
    before = {k: v.clone() for k, v in net.state_dict().items() if "running" in k}
    matched(matcher(1), net, torch.rand(CLASSES, 2, 3, SIDE, SIDE, dtype=torch.float64), real, picks)
    assert before and all(torch.equal(v, net.state_dict()[k]) for k, v in before.items())
    assert all(m.track_running_stats for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d))


def test_objectives_are_joined_by_a_plus_and_each_is_named_once() -> None:
    assert parse("embed") == ("embed",) and Comparison("grad+embed").parts == ("grad", "embed")
    for text in ("", "gradient", "grad+", "grad+grad", "grad,embed", "grad + embed"):
        with pytest.raises(ValueError, match="not one of grad, feat, blocks, embed"):
            parse(text)


def test_the_distance_of_embeddings_is_that_of_their_means() -> None:
    """The squared Euclidean one (DM); joined to another objective, both are summed with equal weight (DREAM+)."""
    net, label = network(), torch.tensor(1)
    real, syn = (torch.rand(n, 3, SIDE, SIDE, dtype=torch.float64, generator=generator(n)) for n in (5, 3))
    wanted, given = (torch.stack([net.embed(image[None])[0] for image in images]).mean(0) for images in (real, syn))
    found = {text: distance(net, real, syn, label, Comparison(text)).item() for text in ("grad", "embed", "grad+embed")}
    assert found["embed"] == pytest.approx(torch.dist(wanted, given).item() ** 2, rel=1e-12)
    assert found["grad+embed"] == pytest.approx(found["grad"] + found["embed"], rel=1e-12)
