"""The CUDA path: `python3 -m pytest -m gpu` where there is a GPU. The same tests run on the CPU by default."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

import models
from utils.augment import Augment
from utils.images import ImageSet, Normalize
from utils.matching import Comparison, Matcher
from utils.pixels import PixelSGD
from utils.runtime import Draws
from utils.selection import STRATEGIES, Context, embed, select
from utils.training import Recipe, accuracy, fresh_network, train_network, update_network

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SPEC = models.resolve("convnet", channels=3, classes=3, side=16, depth=2, width=16)


def real_set(device: str) -> ImageSet:
    images = torch.randint(0, 256, (90, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    normalize = Normalize((0.5, 0.4, 0.3), (0.2, 0.2, 0.2), device)
    return ImageSet(images.to(device), (torch.arange(90) % 3).to(device), classes=3, normalize=normalize)


@contextmanager
def no_host_sync(device: str) -> Iterator[None]:
    """On CUDA, any wait for the device is an error meanwhile."""
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_inner_step_never_waits_for_the_device(strategy: str, device: str) -> None:
    real = real_set(device)
    net = fresh_network(SPEC, Draws(device, 0))
    recipe = Recipe(batch_size=16, augment=Augment("color_crop"), mixup="cut")
    sgd = recipe.optimizer(net)
    match = Matcher("grad", Comparison(), 2, "single", 5, Augment("color_crop_cutout"))
    pixels = PixelSGD(torch.rand(3, 2, 3, 16, 16, device=device), lr=1e-3, momentum=0.5)
    start = pixels.pixels.clone()
    for step in range(3):  # the first steps may wait: libraries start and choose their kernels
        with no_host_sync(device if step == 2 else "cpu"):
            picks = select(Context(net, real, Draws(device, "select", step)), 8, strategy=strategy)
            _, gradients = match(net, pixels.lookahead(), real, picks, Draws(device, "match", step))
            pixels.step(gradients)
            update_network(net, sgd, real, recipe, n_data=40, draws=Draws(device, "update", step))
    assert torch.isfinite(pixels.pixels).all() and not torch.equal(pixels.pixels, start)


@pytest.mark.parametrize("device", DEVICES)
def test_the_matching_gradient_is_that_of_float64_on_a_cpu(device: str) -> None:
    cpu, real = real_set("cpu"), real_set(device)
    match = Matcher("grad", Comparison(), 2, "single", 128, Augment("none"))
    pixels = torch.rand(3, 2, 3, 16, 16)
    picks = torch.stack([real.starts[c] + torch.arange(8) for c in range(3)])
    exact_set = ImageSet(cpu.images.double() / 255, cpu.labels, classes=3, normalize=cpu.normalize)
    net = fresh_network(SPEC, Draws("cpu", 0))
    _, ours = match(net.to(device), pixels.to(device), real, picks.to(device), Draws(device, 0))
    _, exact = match(net.cpu().double(), pixels.double(), exact_set, picks, Draws("cpu", 0))
    assert (ours.cpu().double() - exact).norm() < 0.05 * exact.norm()  # TF32 convolutions on a GPU


@pytest.mark.parametrize("device", DEVICES)
def test_embedding_and_evaluation_work_on_the_device(device: str) -> None:
    real = real_set(device)
    recipe = Recipe(batch_size=8, augment=Augment("color_crop_cutout_flip_scale_rotate"), mixup="cut", epochs=2)
    net = train_network(SPEC, real, recipe, Draws(device, 0))
    assert 0 <= accuracy(net, real) <= 100
    assert embed(net, real.images, real.normalize).device.type == device
