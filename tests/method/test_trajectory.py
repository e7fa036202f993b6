"""Matching trajectories against one autograd graph over all steps of the student, in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

import models
from models import Network
from tests.oracle import augment_one, decode_naively
from utils.method.augment import COLUMNS, Augment
from utils.method.formation import Formation
from utils.method.images import ImageSet, Normalize
from utils.method.matching import Matcher
from utils.method.objectives import Comparison
from utils.method.pixels import PixelSGD
from utils.method.training import fresh_network
from utils.method.trajectory import LEAST_STEP, TrajectoryStep, unrolled
from utils.numerics.compute import Compute
from utils.numerics.derivatives import flattened, load, separated
from utils.system.draws import Draws

CLASSES, SIDE, STEPS = 3, 8, 4
NORMALIZE = Normalize((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
CPU = Compute(torch.device("cpu"))
AUGMENTATION = "color_crop_cutout_flip_scale_rotate"


def network(norm: str = "instance", *, name: str = "convnet", key: int = 3, width: int = 8) -> Network:
    depth = 2 if name == "convnet" else None
    spec = models.resolve(name, channels=3, classes=CLASSES, side=SIDE, depth=depth, width=width, norm=norm)
    return fresh_network(spec, Draws("cpu", key)).double()


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batches(n: int = 6, steps: int = STEPS) -> tuple[list[Tensor], list[Tensor]]:
    x = torch.randn(steps, n, 3, SIDE, SIDE, dtype=torch.float64, generator=generator(1))
    return list(x), [torch.randint(CLASSES, (n,), generator=generator(2 + t)) for t in range(steps)]


def ends(net: Network, distance: float = 0.1) -> tuple[Tensor, Tensor]:
    start = flattened(net.parameters())
    return start, start + distance * torch.randn(start.shape, dtype=torch.float64, generator=generator(5))


def student(net: Network, start: Tensor, x: list[Tensor], y: list[Tensor], size: Tensor) -> Tensor:
    """Where it ends, with the graph of all steps."""
    names = [name for name, _ in net.named_parameters()]
    buffers = {name: b.clone() for name, b in net.named_buffers()}
    weights = [part.clone().requires_grad_() for part in separated(net, start)]
    for images, labels in zip(x, y, strict=True):
        logits = functional_call(net, {**dict(zip(names, weights, strict=True)), **buffers}, (images,))
        gradients = torch.autograd.grad(F.cross_entropy(logits, labels), weights, create_graph=True)
        weights = [w - size * g for w, g in zip(weights, gradients, strict=True)]
    return torch.cat([w.flatten() for w in weights])


def distance(reached: Tensor, start: Tensor, target: Tensor) -> Tensor:
    return (reached - target).square().sum() / (start - target).square().sum()


def naively(
    net: Network, start: Tensor, target: Tensor, x: list[Tensor], y: list[Tensor], size: Tensor
) -> tuple[Tensor, list[Tensor], Tensor]:
    x, size = [images.clone().requires_grad_() for images in x], size.clone().requires_grad_()
    found = distance(student(net, start, x, y, size), start, target)
    *by_images, by_size = torch.autograd.grad(found, [*x, size])
    return found.detach(), by_images, by_size


@pytest.mark.parametrize("pixels", [2**16, 4 * SIDE**2], ids=["graphs kept", "made again, in pieces of four images"])
@pytest.mark.parametrize(("name", "norm"), [("convnet", n) for n in models.NORMS] + [("resnet_ap10", "batch")])
def test_derivatives_through_all_steps_equal_those_of_one_graph(name: str, norm: str, pixels: int) -> None:
    net = network(norm, name=name)
    before = {key: b.clone() for key, b in net.named_buffers()}
    (start, target), (x, y), size = ends(net), batches(), torch.tensor(0.05, dtype=torch.float64)
    expected = naively(net.train(), start, target, x, y, size)
    found = unrolled(net, start, target, x, y, size, replace(CPU, pixels=pixels))
    torch.testing.assert_close(found.distance, expected[0], rtol=1e-9, atol=0)
    torch.testing.assert_close(found.step_size, expected[2], rtol=1e-9, atol=0)
    for ours, wanted in zip(found.images, expected[1], strict=True):
        assert wanted.abs().max() > 0
        torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-9 * wanted.abs().max().item())
    for key, b in net.named_buffers():
        assert torch.equal(b, before[key]), key


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_derivatives_equal_finite_differences(norm: str) -> None:
    net = network(norm, width=4)
    (start, target), (x, y), size = ends(net), batches(2, steps=3), torch.tensor(0.05, dtype=torch.float64)

    def at(change: Tensor, size: Tensor) -> float:
        return unrolled(net, start, target, [x[0], x[1] + change, x[2]], y, size, CPU).distance.item()

    found, nothing, h = unrolled(net, start, target, x, y, size, CPU), torch.zeros_like(x[1]), 1e-5
    slope = (at(nothing, size + h) - at(nothing, size - h)) / (2 * h)
    assert found.step_size.item() == pytest.approx(slope, rel=1e-6)
    for place in ((0, 0, 3, 3), (1, 2, 4, 1), (0, 1, 7, 7)):
        change = nothing.clone()
        change[place] = h
        slope = (at(change, size) - at(-change, size)) / (2 * h)
        assert found.images[1][place].item() == pytest.approx(slope, rel=1e-4, abs=1e-11)


def test_the_distance_is_one_without_a_step_and_none_where_the_student_arrives() -> None:
    net = network()
    (start, target), (x, y) = ends(net), batches()
    size = torch.tensor(0.05, dtype=torch.float64)
    assert unrolled(net, start, target, x, y, size * 1e-12, CPU).distance.item() == pytest.approx(1, abs=1e-9)
    reached = student(net.train(), start, x, y, size).detach()
    found = unrolled(net, start, reached, x, y, size, CPU)
    assert found.distance.item() < 1e-20
    assert max(images.abs().max().item() for images in found.images) < 1e-9


def test_parameters_go_into_a_vector_and_back() -> None:
    net, other = network(key=3), network(key=4)
    places = [p.data_ptr() for p in other.parameters()]
    load(other, flattened(net.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))
    assert places == [p.data_ptr() for p in other.parameters()]
    copy = flattened(net.parameters())
    copy.zero_()
    assert flattened(net.parameters()).abs().sum() > 0


# --- The step of the pixels -------------------------------------------------------------------------------------------


class Invented:
    """Trajectories of a random walk."""

    def __init__(self, net: Network, *, count: int = 2, epochs: int = 5) -> None:
        self.count = count
        walk = 0.05 * torch.randn(
            count, epochs + 1, len(flattened(net.parameters())), dtype=torch.float64, generator=generator(7)
        )
        self.rows = flattened(net.parameters()) + walk.cumsum(1)

    def pair(self, expert: int, start: int, end: int) -> tuple[Tensor, Tensor]:
        return self.rows[expert, start], self.rows[expert, end]


def real_set() -> ImageSet:
    images = torch.rand(2 * CLASSES, 3, SIDE, SIDE, dtype=torch.float64, generator=generator(1))
    return ImageSet(images, torch.arange(CLASSES).repeat(2), classes=CLASSES, normalize=NORMALIZE)


def stored(ipc: int) -> Tensor:
    return torch.rand(CLASSES, ipc, 3, SIDE, SIDE, dtype=torch.float64, generator=generator(2))


def trajectory_step(
    pixels: PixelSGD, *, factor: int = 1, syn_max: int = 128, names: str = AUGMENTATION, lr_step: float = 1e-3
) -> TrajectoryStep:
    net = network()
    matcher = Matcher(Comparison(), Formation(factor, "single"), syn_max, Augment(names), CPU)
    return TrajectoryStep(
        matcher, net, pixels, real_set(), Invented(net), steps=3, epochs=2, max_start=3, step_size=0.05, lr_step=lr_step
    )


def naive_batch(step: TrajectoryStep, z: Tensor, u: Tensor, chosen: Tensor | None) -> Tensor:
    """Of normalised stored images (classes, ipc, C, H, W), image by image."""
    found = []
    for c, images in enumerate(z):
        decoded = decode_naively(images, step.matcher.formation.factor, "single")
        found += [decoded[i] for i in (range(len(decoded)) if chosen is None else chosen[c].tolist())]
    augment = step.matcher.augment
    return torch.stack([augment_one(x, n, augment) for x, n in zip(found, u, strict=True)])


@pytest.mark.parametrize(("factor", "ipc", "syn_max"), [(1, 2, 128), (2, 1, 128), (2, 2, 3), (1, 3, 2)])
def test_pixels_and_step_size_move_as_torch_moves_them(factor: int, ipc: int, syn_max: int) -> None:
    pixels = PixelSGD(stored(ipc), lr=2.0, momentum=0.5, joint=NORMALIZE)
    step = trajectory_step(pixels, factor=factor, syn_max=syn_max)
    z = NORMALIZE(stored(ipc).flatten(0, 1)).unflatten(0, (CLASSES, ipc)).requires_grad_()
    size = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)
    sgd = torch.optim.SGD([{"params": [z], "lr": 2.0}, {"params": [size], "lr": 1e-3}], lr=1.0, momentum=0.5)
    net = network().train()
    for it in range(3):
        found = step(torch.zeros(0), Draws("cpu", "match", it))
        draws = Draws("cpu", "match", it)
        expert, start = draws.host.randrange(2), draws.host.randrange(3)
        first, last = step.trajectories.pair(expert, start, start + 2)
        u, *chosen = step.draw(draws)
        each = min(ipc * factor**2, syn_max)
        assert u.shape == (3, CLASSES * each, COLUMNS) and bool(chosen) == (each < ipc * factor**2)
        x = [naive_batch(step, z, u[t], chosen[0][t] if chosen else None) for t in range(3)]
        y = torch.arange(CLASSES).repeat_interleave(each)
        loss = distance(student(net, first, x, [y] * 3, size), first, last)
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        assert found.shape == (CLASSES,)
        torch.testing.assert_close(found, loss.detach().expand(CLASSES), rtol=1e-9, atol=0)
    moved = NORMALIZE(pixels.pixels.flatten(0, 1)).unflatten(0, (CLASSES, ipc))
    assert (z.detach() - NORMALIZE(stored(ipc).flatten(0, 1)).unflatten(0, (CLASSES, ipc))).abs().max() > 1e-4
    torch.testing.assert_close(moved, z.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(step.learned["step_size"][0], size.detach(), rtol=1e-9, atol=0)
    assert step.learned["step_size"][0] != 0.05


def test_the_step_size_stays_above_nothing() -> None:
    step = trajectory_step(PixelSGD(stored(2), lr=0.0, momentum=0.5))
    step.learned["step_size"].copy_(torch.tensor([0.05, 1e9]))
    step(torch.zeros(0), Draws("cpu", 2))
    assert step.learned["step_size"][0].item() == pytest.approx(LEAST_STEP)
