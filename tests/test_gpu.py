"""The CUDA path: `python3 -m pytest -m gpu` where there is a GPU. The same tests run on the CPU by default."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

import models
from tests.oracle import trained_networks
from utils.method.augment import COLUMNS, Augment
from utils.method.formation import Formation
from utils.method.images import ImageSet, Normalize, RealImages
from utils.method.matching import Matcher, MatchingStep
from utils.method.objectives import Comparison
from utils.method.pixels import PixelSGD
from utils.method.selection import KMEANS, Context, embed, select
from utils.method.state import State
from utils.method.training import Recipe, Trainer, confusion_matrix, fresh_network, update_network
from utils.numerics.compute import Captured, Compute
from utils.system.device import set_precision
from utils.system.distributed import SINGLE
from utils.system.draws import Draws

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SPEC = models.resolve("convnet", channels=3, classes=3, side=16, depth=2, width=16)
UPDATE = Recipe(batch_size=16, augment=Augment("color_crop"), mixup="cut")
STEPS = 8  # the calls that warm up, the one that is captured, and replays


def compute(device: str, precision: str = "fp32") -> Compute:
    return Compute(torch.device(device), precision)


def real_set(device: str) -> ImageSet:
    images = torch.randint(0, 256, (90, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    normalize = Normalize((0.5, 0.4, 0.3), (0.2, 0.2, 0.2), device)
    return ImageSet(images.to(device), (torch.arange(90) % 3).to(device), classes=3, normalize=normalize)


MATCHED = (Comparison(), Comparison("embed"), Comparison("grad+embed"), Comparison("grad", "cos", fc=True))


def new_state(
    device: str,
    *,
    names: str = "color_crop_cutout",
    norm: str = "instance",
    matched: Comparison = MATCHED[0],
    joint: bool = False,
) -> State:
    """The beginning of a run."""
    real, how = real_set(device), compute(device)
    spec = models.resolve("convnet", channels=3, classes=3, side=16, depth=2, width=16, norm=norm)
    net = fresh_network(spec, Draws(device, 0))
    start = torch.rand(3, 2, 3, 16, 16, generator=torch.Generator().manual_seed(1)).to(device)
    pixels = PixelSGD(start, lr=1e-3, momentum=0.5, joint=real.normalize if joint else None)
    return State(
        optimizer=pixels,
        trainer=Trainer([net], [real], UPDATE, how),
        matching_step=MatchingStep(Matcher(matched, Formation(2), 5, Augment(names), how), net, pixels, real),
        picks=torch.zeros(3, 8, dtype=torch.int64, device=device),
        losses=torch.zeros(3, device=device),
        shard=SINGLE.shard([1.0] * 3),
        real_images=RealImages(real, real.counts),
    )


def captured_step(state: State) -> Captured:
    assert isinstance(state.matching_step, MatchingStep)
    return state.matching_step._captured


def inner_step(state: State, device: str, step: int, strategy: str = "random") -> None:
    context = Context(state.net, real_set(device), Draws(device, "select", step), compute(device).cheapest())
    state.picks.copy_(select(context, 8, strategy=strategy))
    state.losses += state.matching_step(state.picks, Draws(device, "match", step))
    update_network(state.trainer, n_data=40, draws=Draws(device, "update", step))


def everything(state: State) -> list[Tensor]:
    return [state.optimizer.pixels, state.optimizer.velocity, state.losses, *state.net.state_dict().values()]


@contextmanager
def no_host_sync(device: str) -> Iterator[None]:
    """On CUDA, any wait for the device is an error meanwhile."""
    try:
        if device == "cuda":
            with warnings.catch_warnings():  # that the mode is a prototype
                warnings.simplefilter("ignore")
                torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("captured", [True, False])
@pytest.mark.parametrize("strategy", ["kmeans", "random"])
def test_an_inner_step_never_waits_for_the_device(strategy: str, captured: bool, device: str) -> None:
    real, state = real_set(device), new_state(device)
    if not captured:
        captured_step(state).off = state.trainer.steps.off = True
    start = state.optimizer.pixels.clone()
    for step in range(STEPS):  # the first steps may wait: libraries start and choose their kernels
        with no_host_sync(device if step == STEPS - 1 else "cpu"):
            context = Context(state.net, real, Draws(device, "select", step), compute(device).cheapest())
            state.picks.copy_(select(context, 8, strategy=strategy))
            state.losses += state.matching_step(state.picks, Draws(device, "match", step))
            update_network(state.trainer, n_data=40, draws=Draws(device, "update", step))
    assert torch.isfinite(state.optimizer.pixels).all() and not torch.equal(state.optimizer.pixels, start)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("names", "norm", "matched", "joint"),
    [
        *(
            (names, norm, MATCHED[0], False)
            for names in ("color_crop_cutout", "flip_scale_rotate")
            for norm in ("instance", "batch")
        ),
        *(("color_crop_cutout", "instance", matched, True) for matched in MATCHED[1:]),
    ],
)
def test_a_captured_step_gives_the_same(names: str, norm: str, matched: Comparison, joint: bool, device: str) -> None:
    captured, plain = (new_state(device, names=names, norm=norm, matched=matched, joint=joint) for _ in range(2))
    captured_step(plain).off = plain.trainer.steps.off = True
    for state in (captured, plain):
        for step in range(STEPS):
            if step == STEPS - 2:  # the replayed steps see the new network
                state.begin_iteration(fresh_network(SPEC, Draws(device, 1)) if norm == "instance" else state.net)
            inner_step(state, device, step)
    if device == "cuda":
        assert captured_step(captured).graphs and captured.trainer.steps.graphs
        assert not captured_step(captured).off and not captured.trainer.steps.off
    for ours, expected in zip(everything(captured), everything(plain), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_a_state_that_was_saved_and_restored_goes_on_as_before(device: str) -> None:
    state, restored = new_state(device), new_state(device)
    for step in range(3):
        inner_step(state, device, step)
    file = io.BytesIO()
    torch.save(state.state_dict(), file)
    file.seek(0)
    restored.load_state_dict(torch.load(file, weights_only=True, map_location="cpu"))
    for step in range(3, 3 + STEPS):
        for each in (state, restored):
            inner_step(each, device, step)
    for ours, expected in zip(everything(restored), everything(state), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3 if device == "cuda" else 0, atol=1e-5 * (device == "cuda"))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("tf32", 0.05), ("bf16", 0.2)])
def test_the_matching_gradient_is_that_of_float64_on_a_cpu(precision: str, tolerance: float, device: str) -> None:
    if (precision, device) == ("tf32", "cpu"):
        pytest.skip("a CPU has no TF32")
    cpu, real = real_set("cpu"), real_set(device)
    pixels = torch.rand(3, 2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    picks = torch.tensor(real.starts)[:, None] + torch.arange(8)
    exact_set = ImageSet(cpu.images.double() / 255, cpu.labels, classes=3, normalize=cpu.normalize)
    net = fresh_network(SPEC, Draws("cpu", 0))
    match, exactly = (
        Matcher(Comparison(), Formation(2), 128, Augment("none"), how)
        for how in (compute(device, precision), compute("cpu"))
    )
    shared = torch.zeros(3, COLUMNS)  # without augmentation it has no part in it
    set_precision(torch.device(device), precision)
    try:
        _, ours = match(net.to(device), pixels.to(device), real, picks.to(device), shared.to(device))
    finally:
        set_precision(torch.device("cpu"), "fp32")
    _, exact = exactly(net.cpu().double(), pixels.double(), exact_set, picks, shared)
    assert (ours.cpu().double() - exact).norm() < tolerance * exact.norm()


@pytest.mark.parametrize("device", DEVICES)
def test_embedding_and_evaluation_work_on_the_device(device: str) -> None:
    real = real_set(device)
    recipe = Recipe(batch_size=8, augment=Augment("color_crop_cutout_flip_scale_rotate"), mixup="cut", epochs=2)
    nets = trained_networks(SPEC, [real] * 2, recipe, [Draws(device, r) for r in range(2)], compute(device))
    assert all(confusion_matrix(net, real, compute(device)).sum() == len(real) for net in nets)
    assert embed(nets[0], real.images, real.normalize, compute(device)).device.type == device


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kmeans", KMEANS)
def test_both_kinds_of_k_means_select_on_the_device(kmeans: str, device: str) -> None:
    real = real_set(device)
    context = Context(fresh_network(SPEC, Draws(device, 0)), real, Draws(device, 0), compute(device), kmeans=kmeans)
    picks = select(context, 10, strategy="kmeans")
    assert picks.device.type == device and all(len(row.unique()) == 10 for row in picks)
    assert torch.equal(real.labels[picks].cpu(), torch.arange(3)[:, None].expand(3, 10))
