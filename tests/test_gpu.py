"""The CUDA path: `python3 -m pytest -m gpu` where there is a GPU. The same tests run on the CPU by default."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import condense
import models
from tests.distilling import TINY, distilled
from tests.oracle import trained_networks
from utils.method import evaluation
from utils.method.augment import COLUMNS, Augment
from utils.method.formation import Formation
from utils.method.frequencies import Frequencies
from utils.method.images import ImageSet, Normalize, RealImages, SyntheticImages
from utils.method.matching import Matcher, MatchingStep
from utils.method.objectives import Comparison
from utils.method.pixels import PixelSGD
from utils.method.selection import KMEANS, Context, embed, select
from utils.method.state import State
from utils.method.training import Recipe, Trainer, confusion_matrix, fresh_network, update_network
from utils.method.trajectory import TrajectoryStep
from utils.numerics.compilation import compiler_error
from utils.numerics.compute import Captured, Compute
from utils.numerics.derivatives import flattened
from utils.system.device import set_precision, with_precision
from utils.system.distributed import SINGLE
from utils.system.draws import Draws

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SPEC = models.resolve("convnet", channels=3, classes=3, side=16, depth=2, width=16)
UPDATE = Recipe(batch_size=16, augment=Augment("color_crop"), mixup="cut")
STEPS = 8  # the calls that warm up, the one that is captured, and replays


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """PyTorch begins with TF32 in a GPU's convolutions: what is compared would differ by a thousandth."""
    with with_precision(torch.device("cuda"), "fp32"):
        yield


def compute(device: str, precision: str = "fp32", compile: bool = False) -> Compute:
    if compile and (problem := compiler_error(torch.device(device))):
        pytest.skip(problem)
    return Compute(torch.device(device), precision, compile=compile)


def real_set(device: str) -> ImageSet:
    images = torch.randint(0, 256, (90, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    normalize = Normalize((0.5, 0.4, 0.3), (0.2, 0.2, 0.2), device)
    return ImageSet(images.to(device), (torch.arange(90) % 3).to(device), classes=3, normalize=normalize)


MATCHED = (Comparison(), Comparison("embed"), Comparison("grad+embed"), Comparison("grad", "cos", fc=True))
LEARNED = Comparison("cf")  # at learned frequencies, and with a calibration after every step


def new_state(
    device: str,
    *,
    names: str = "color_crop_cutout",
    norm: str = "instance",
    matched: Comparison = MATCHED[0],
    joint: bool = False,
    compile: bool = False,
) -> State:
    """The beginning of a run."""
    real, how = real_set(device), compute(device, compile=compile)
    spec = models.resolve("convnet", channels=3, classes=3, side=16, depth=2, width=16, norm=norm)
    net = fresh_network(spec, Draws(device, 0))
    pixels = PixelSGD(start_of_pixels(device), lr=1e-3, momentum=0.5, joint=real.normalize if joint else None)
    more: dict[str, Any] = {}
    if matched is LEARNED:
        more["frequencies"] = Frequencies(16, net.classifier.in_features, how="learned", draws=Draws(device, "z"))
        more["judge"] = fresh_network(spec, Draws(device, 2))
    matcher = Matcher(matched, Formation(2), 5, Augment(names), how)
    return State(
        optimizer=pixels,
        trainer=Trainer([net], [real], UPDATE, how),
        matching_step=MatchingStep(matcher, net, pixels, real, **more),
        picks=torch.zeros(3, 8, dtype=torch.int64, device=device),
        losses=torch.zeros(3, device=device),
        shard=SINGLE.shard([1.0] * 3),
        real_images=RealImages(real, real.counts),
    )


def start_of_pixels(device: str) -> Tensor:
    return torch.rand(3, 2, 3, 16, 16, generator=torch.Generator().manual_seed(1)).to(device)


def captured_step(state: State) -> Captured:
    assert isinstance(state.matching_step, MatchingStep)
    return state.matching_step._captured


def captured_calibration(state: State) -> Captured:
    assert isinstance(state.matching_step, MatchingStep)
    return state.matching_step._captured_calibration


def inner_step(state: State, device: str, step: int, strategy: str = "random") -> None:
    context = Context(state.net, real_set(device), Draws(device, "select", step), compute(device).cheapest())
    state.picks.copy_(select(context, 8, strategy=strategy))
    state.losses += state.matching_step(state.picks, Draws(device, "match", step))
    update_network(state.trainer, n_data=40, draws=Draws(device, "update", step))


def everything(state: State) -> list[Tensor]:
    learned = state.matching_step.learned.values()
    return [state.optimizer.pixels, state.optimizer.velocity, state.losses, *learned, *state.net.state_dict().values()]


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
        *(("color_crop_cutout", "instance", matched, True) for matched in (*MATCHED[1:], LEARNED)),
    ],
)
def test_a_captured_step_gives_the_same(names: str, norm: str, matched: Comparison, joint: bool, device: str) -> None:
    captured, plain = (new_state(device, names=names, norm=norm, matched=matched, joint=joint) for _ in range(2))
    captured_step(plain).off = captured_calibration(plain).off = plain.trainer.steps.off = True
    for state in (captured, plain):
        for step in range(STEPS):
            if step == STEPS - 2:  # the replayed steps see the new networks and the new rate
                net = fresh_network(SPEC, Draws(device, 1)) if norm == "instance" else state.net
                judge = flattened(fresh_network(SPEC, Draws(device, 3)).parameters())
                state.begin_iteration(net, 5e-4, judge if matched is LEARNED else None)
            inner_step(state, device, step)
    if device == "cuda":
        assert captured_step(captured).graphs and captured.trainer.steps.graphs
        assert not captured_step(captured).off and not captured.trainer.steps.off
        assert bool(captured_calibration(captured).graphs) == (matched is LEARNED)
    for ours, expected in zip(everything(captured), everything(plain), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=5e-5)  # grid_sample adds in any order


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("matched", MATCHED[:3], ids=lambda matched: matched.objective)
def test_compiled_and_captured_steps_give_what_plain_ones_do(matched: Comparison, device: str) -> None:
    both, plain = (new_state(device, matched=matched, compile=compile) for compile in (True, False))
    captured_step(plain).off = plain.trainer.steps.off = True
    for state in (both, plain):
        for step in range(STEPS):
            inner_step(state, device, step)
    if device == "cuda":
        assert captured_step(both).graphs and both.trainer.steps.graphs
    for ours, expected in zip(everything(both), everything(plain), strict=True):
        torch.testing.assert_close(ours, expected, rtol=5e-3, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_a_captured_student_learns_the_same(device: str) -> None:
    """Matching trajectories; the expert is made up."""
    start = flattened(fresh_network(SPEC, Draws("cpu", 0)).parameters()).detach()
    experts: Any = SimpleNamespace(count=1, pair=lambda expert, a, b: (start, start + 0.01 * torch.sign(start)))
    found = []
    for captured in (True, False):
        pixels, real, net = PixelSGD(start_of_pixels(device), lr=10.0, momentum=0.5), real_set(device), SPEC
        matcher = Matcher(MATCHED[0], Formation(2), 5, Augment("color_crop_cutout"), compute(device))
        step = TrajectoryStep(
            matcher, fresh_network(net, Draws(device, 0)), pixels, real, experts,
            steps=3, epochs=1, max_start=1, step_size=0.01, lr_step=1e-4,
        )  # fmt: skip
        step._captured.off |= not captured
        losses = [step(torch.empty(0), Draws(device, "match", i)).clone() for i in range(STEPS)]
        assert device == "cpu" or bool(step._captured.graphs) == captured
        found.append([pixels.pixels, step.learned["step_size"], *losses])
    assert not torch.equal(found[0][0], start_of_pixels(device))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("trained_on", ["synthetic images", "soft labels"])
def test_captured_trainings_give_the_same(trained_on: str, device: str) -> None:
    """Of the network on synthetic images that move meanwhile (dc, dsa), and of an evaluation on soft labels."""
    found = []
    for captured in (True, False):
        pixels, normalize = start_of_pixels(device), real_set(device).normalize
        labels = torch.arange(3, device=device).repeat_interleave(2)
        soft = (labels[:, None] == torch.arange(3, device=device)) * 0.7 + 0.1 if trained_on == "soft labels" else None
        train = ImageSet(pixels.flatten(0, 1), labels, classes=3, normalize=normalize, soft=soft)
        source = SyntheticImages(lambda x=pixels: x, 3, 2) if soft is None else None  # type: ignore[misc]
        nets = [fresh_network(SPEC, Draws(device, k)) for k in range(1 if soft is None else 2)]
        recipe = Recipe(batch_size=4, augment=Augment("color_crop"), mixup="cut", lr=0.1)
        trainer = Trainer(nets, [train] * len(nets), recipe, compute(device), source)
        trainer.steps.off |= not captured
        for step in range(STEPS):
            trainer.set_lr(0.1 if step < STEPS // 2 else 0.01)
            trainer.all_images([Draws(device, k, step) for k in range(len(nets))])
            pixels.mul_(0.9)
        assert device == "cpu" or bool(trainer.steps.graphs) == captured
        found.append([*trainer.parameters, *trainer.momentum])
    for ours, expected in zip(*found, strict=True):
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
@pytest.mark.parametrize("compile", [False, True], ids=["plain", "compiled"])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("tf32", 0.05), ("bf16", 0.2)])
def test_the_matching_gradient_is_that_of_float64_on_a_cpu(
    precision: str, tolerance: float, compile: bool, device: str
) -> None:
    if (precision, device) == ("tf32", "cpu"):
        pytest.skip("a CPU has no TF32")
    cpu, real = real_set("cpu"), real_set(device)
    pixels = start_of_pixels("cpu")
    picks = torch.tensor(real.starts)[:, None] + torch.arange(8)
    exact_set = ImageSet(cpu.images.double() / 255, cpu.labels, classes=3, normalize=cpu.normalize)
    net = fresh_network(SPEC, Draws("cpu", 0))
    match, exactly = (
        Matcher(Comparison(), Formation(2), 128, Augment("none"), how)
        for how in (compute(device, precision, compile), compute("cpu"))
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


# --- What goes wrong --------------------------------------------------------------------------------------------------


def capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def waits(x: Tensor) -> Tensor:
    """What a capture forbids: the host looks at a value."""
    return x * 2 if x.sum().item() > 0 else x


def allocates(x: Tensor) -> Tensor:
    """More memory than there is, under capture alone."""
    kept = x * 2
    return kept + torch.empty(2**46, device=x.device)[0] if capturing() else kept


def gives_none(x: Tensor) -> Tensor:
    """An error of the function's own, in the middle of its kernels."""
    kept = x * 2
    if capturing():
        raise RuntimeError("of its own")
    return kept


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("function", [waits, allocates, gives_none])
def test_after_a_capture_that_fails_everything_goes_on(
    function: Callable[[Tensor], Tensor], device: str, caplog: pytest.LogCaptureFixture
) -> None:
    x = torch.ones(1000, device=device)
    caplog.set_level(logging.WARNING, "dream")
    captured = Captured(function, torch.device(device))
    for step in range(STEPS):
        assert torch.equal(captured(x * (step + 1)), x * 2 * (step + 1))
    assert captured.off and not captured.graphs
    assert len(caplog.messages) == (device == "cuda")

    if device == "cuda":
        assert not capturing() and torch.cuda.current_stream() == torch.cuda.default_stream()
        before = torch.cuda.memory_reserved()
        kept = torch.ones(2**24, device=device)
        assert kept.sum().item() == 2**24
        del kept
        torch.cuda.empty_cache()  # is refused while the allocator believes in a capture
        assert torch.cuda.memory_reserved() <= before
    other = Captured(lambda x: x.square() + 1, torch.device(device))
    for step in range(STEPS):
        assert torch.equal(other(x * step), x * step**2 + 1)
    assert device == "cpu" or (other.graphs and not other.off)
    state = new_state(device)
    for step in range(STEPS):
        inner_step(state, device, step)
    assert device == "cpu" or captured_step(state).graphs
    assert torch.isfinite(state.optimizer.pixels).all()


# --- condense.py ------------------------------------------------------------------------------------------------------

RUN = [*TINY, "--niter", "2", "--width", "16"]
LONGER = ["--inner_loop", "8", "--snapshot_every", "2"]  # so that the fourth step of every kind is captured


@pytest.mark.parametrize(
    ("device", "flags"),
    [
        pytest.param("cpu", "--compile off", marks=pytest.mark.slow),
        *(
            pytest.param("cuda", flags, marks=pytest.mark.gpu)
            for flags in ("--compile on", "--method dm --interval 2", "--method dc --interval 2 --net_epoch 1")
        ),
    ],
)
def test_a_run_that_is_interrupted_ends_as_one_that_is_not(device: str, flags: str, tmp_path: Path) -> None:
    words = [*RUN, *LONGER, *flags.split(), "--device", device]
    whole = distilled(tmp_path / "whole", words)
    resumed = distilled(tmp_path / "resumed", words, 2, 13)  # once in each outer iteration
    start, ours, expected = (
        torch.load(file, weights_only=True)[0]
        for file in (whole / "data_000000.pt", resumed / "data.pt", whole / "data.pt")
    )
    # A GPU adds up in any order. Other random numbers in half of an outer iteration change 4 % of the way or more.
    assert (ours - expected).norm() <= (0.02 if device == "cuda" else 0) * (expected - start).norm()
    assert not torch.equal(expected, start)


@pytest.mark.parametrize(
    ("device", "precision"),
    [("cpu", "bf16"), *(pytest.param("cuda", p, marks=pytest.mark.gpu) for p in ("tf32", "bf16"))],
)
def test_evaluations_are_in_float32_whatever_the_precision_of_the_run(
    precision: str, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def noting(owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def noted(*words: Any, **more: Any) -> Any:
            short = {torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision}  # type: ignore[attr-defined]
            seen.append((name, *short))
            return function(*words, **more)

        monkeypatch.setattr(owner, name, noted)

    noting(MatchingStep, "__call__")
    noting(evaluation, "train_networks")
    noting(evaluation, "confusion_matrix")
    words = [*RUN, "--compile", "off", "--device", device, "--precision", precision, "--results_dir", str(tmp_path)]
    try:
        assert condense.main(words) == 0
    finally:
        set_precision(torch.device("cpu"), "fp32")
    assert set(seen) == {("__call__", "tf32"), ("train_networks", "ieee"), ("confusion_matrix", "ieee")}
