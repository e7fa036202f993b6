"""The frameworks: their settings are the published ones, and each of condense.py's runs is its naive loop."""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import condense
import models
import train
from data import Dataset
from models import Network
from tests.oracle import augment_one, augment_shared, class_distance
from utils.config.flags import make_parser
from utils.config.options import CondenseOptions, resolve
from utils.config.presets import METHODS
from utils.method.augment import Augment
from utils.method.images import Normalize
from utils.method.pixels import PixelSGD
from utils.method.selection import Context, batched_kmeans, initial_pixels, select
from utils.method.training import Recipe, Trainer, fresh_network, plan, update_network
from utils.numerics.compute import Compute
from utils.system.draws import Draws
from utils.system.errors import UsageError

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
ALL = "color_crop_cutout_flip_scale_rotate"


def parsed(*argv: str) -> CondenseOptions:
    return resolve(make_parser(CondenseOptions, "").parse_given(argv)).options


# --- Settings ---------------------------------------------------------------------------------------------------------

# The table of the papers, written out once more.
DC = dict(
    match="grad", metric="cos", fc=True, bias=False, batch_real=256, lr_img=0.1, mom_img=0.5, init="noise", niter=1000,
    train_on="syn", lr=0.01, mom_net=0, wd_net=0, pixel_step="joint", mixup_net="vanilla", select="random", interval=1,
)  # fmt: skip
PUBLISHED: dict[str, dict[str, Any]] = {
    "dream": dict(match="grad", metric="mse", fc=False, select="kmeans", init="kmeans", interval=10, batch_real=128,
        pixel_step="sweep", lr_img=5e-3, niter=2000, inner_loop=100, train_on="real", n_data=2000, pretrain=0),
    "idc": dict(match="grad", metric="mse", select="random", init="random", interval=1, batch_real=128,
        pixel_step="sweep", lr_img=5e-3, niter=2000, inner_loop=100, train_on="real", n_data=2000),
    "dc": dict(DC, aug_type="none"),
    "dsa": dict(DC, aug_type=ALL),
    "dm": dict(match="embed", metric="mse", batch_real=256, lr_img=1.0, mom_img=0.5, init="random", niter=20000,
        inner_loop=1, n_data=0, aug_type=ALL, pixel_step="joint", select="random", interval=1),
    "mtt": dict(match="trajectory", lr_img=1000, mom_img=0.5, init="random", niter=5000, inner_loop=1, n_data=0,
        step_size=0.01, lr_step=1e-5, student_steps=20, match_epochs=3, max_start=25, experts=100, expert_epochs=50,
        batch_real=256, lr=0.01, mom_net=0, aug_type=ALL, select="random", pixel_step="joint", whiten="none"),
    "dream+": dict(match="grad+embed", metric="mse", select="kmeans", init="kmeans", interval=10, batch_real=128,
        pixel_step="sweep", lr_img=5e-3, niter=2000, inner_loop=100, train_on="real", n_data=2000, pretrain=1,
        per_cluster=1),
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_reproduce_with_a_method_is_its_published_setting(method: str) -> None:
    shown = dataclasses.asdict(parsed("--reproduce", "-d", "cifar10", "--method", method, "--ipc", "10"))
    assert {name: shown[name] for name in PUBLISHED[method]} == PUBLISHED[method]


@pytest.mark.parametrize(("ipc", "outer", "inner"), [(1, 1, 1), (5, 1, 1), (10, 10, 50), (50, 50, 10), (99, 50, 10)])
@pytest.mark.parametrize("method", ["dc", "dsa"])
def test_the_loops_of_dc_follow_from_the_images_per_class(method: str, ipc: int, outer: int, inner: int) -> None:
    o = parsed("--reproduce", "-d", "cifar10", "-m", method, "--ipc", str(ipc))
    assert (o.inner_loop, o.net_epoch) == (outer, inner)


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("dream", "dream+")])
def test_representatives_are_selected_every_ten_steps_and_begin_the_images_that_begin_real(method: str) -> None:
    o, random = (parsed("-d", "cifar10", "-m", method, "--select", s) for s in ("kmeans", "random"))
    assert (o.select, o.interval, random.interval) == ("kmeans", 10, 1)
    assert o.init == ("noise" if random.init == "noise" else "kmeans") and random.init in ("noise", "random")


@pytest.mark.parametrize("method", METHODS)
def test_without_reproduce_the_budget_is_a_tenth(method: str) -> None:
    whole, tenth = (parsed("-d", "cifar10", "-m", method, *more) for more in (["--reproduce"], []))
    assert tenth.niter * 10 == whole.niter


@pytest.mark.parametrize("method", METHODS)
def test_a_flag_beats_every_method(method: str) -> None:
    row = METHODS[method]
    other: dict[str, str] = {
        "match": "feat", "metric": "l1", "lr_img": "0.7", "mom_img": "0.7", "batch_real": "7", "init": "kmeans",
        "interval": "7", "aug_type": "flip", "select": "central", "niter": "7", "inner_loop": "7", "n_data": "7",
        "net_epoch": "7", "train_on": "real", "mom_net": "0.7", "wd_net": "0.7", "mixup_net": "cut", "experts": "7",
        "pretrain": "7", "pixel_step": "sweep",
    }  # fmt: skip
    if method in ("idc", "dream", "dream+"):
        other["pixel_step"] = "joint"
    assert {*row.settings, *row.published, *row.digits} <= {*other, "fc", "bias"}
    words = [word for name, value in other.items() for word in (f"--{name}", value)]
    for dataset in ("digits", "mnist", "cifar10"):
        more = [] if dataset == "digits" else ["--reproduce"]
        o = parsed("-d", dataset, "-f", "2", "-m", method, *more, *words)
        assert {name: str(getattr(o, name)) for name in other} == other


def test_mirror_images_are_left_out_where_they_are_other_classes() -> None:
    for method in ("dsa", "dm", "mtt"):
        assert "flip" in parsed("-d", "fashion", "-m", method).aug_type
        assert not any("flip" in parsed("-d", d, "-m", method).aug_type for d in ("mnist", "svhn", "digits"))


def test_the_origin_of_a_method_s_settings_is_said() -> None:
    origin = resolve(make_parser(CondenseOptions, "").parse_given(["-m", "dm", "-d", "mnist", "--niter", "3"])).origin
    assert [origin[name] for name in ("match", "metric", "niter", "n_data", "factor")] == [
        "method", "method", "flag", "method", "default",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--method", "dcc"], "--method"),
        (["--match", "grad+grad"], "--match"),
        (["--match", "grad+color"], "--match"),
        (["--per_cluster", "5"], "--per_cluster 5"),
        (["--per_cluster", "2", "--select", "random"], "--per_cluster 2"),
        (["--pretrain", "1", "-m", "dc"], "--pretrain"),
        (["-m", "mtt", "--expert_epochs", "26"], "--expert_epochs 26"),
        (["--experts_only"], "--experts_only"),
    ],
)
def test_settings_that_exclude_each_other_are_named(argv: list[str], says: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=says):
        condense.main([*argv, "--results_dir", str(tmp_path), "--device", "cpu"])
    assert not list(tmp_path.iterdir())


# --- The joint pixel step ---------------------------------------------------------------------------------------------


def test_a_joint_step_is_sgd_on_normalised_images() -> None:
    normalize = Normalize((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
    target = torch.randn(4, 2, 3, 5, 5, dtype=torch.float64)
    start = torch.rand_like(target)
    images = normalize(start.flatten(0, 1)).requires_grad_()
    sgd = torch.optim.SGD([images], lr=0.3, momentum=0.5)
    ours = PixelSGD(start.clone(), lr=0.3, momentum=0.5, joint=normalize)
    for _ in range(4):
        sgd.zero_grad()
        (images.unflatten(0, (4, 2)) - target).square().sum().backward()
        sgd.step()
        pixels = ours.lookahead().requires_grad_()
        loss = (normalize(pixels.flatten(0, 1)).unflatten(0, (4, 2)) - target).square().sum()
        ours.step(torch.autograd.grad(loss, pixels)[0])
    torch.testing.assert_close(normalize(ours.pixels.flatten(0, 1)), images.detach(), rtol=1e-12, atol=1e-12)


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


# --- Each framework against its naive loop ----------------------------------------------------------------------------

TINY = shlex.split("--device cpu -d digits --ipc 2 --batch_real 8 --width 8 --epochs 2 --repeat 1 --seed 4")
SPEC = models.resolve("convnet", channels=1, classes=10, side=8, depth=2, width=8)


def draws(purpose: str, *position: int) -> Draws:
    return Draws("cpu", 4, purpose, *position)


def distilled(tmp_path: Path, *argv: str) -> Tensor:
    """What condense.py makes of it, (classes, ipc, C, H, W)."""
    assert condense.main([*TINY, *argv, "--results_dir", str(tmp_path)]) == 0
    images, _ = torch.load(next(tmp_path.glob("digits/conv*/data.pt")), weights_only=True)
    return images.unflatten(0, (10, -1))


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return Dataset("digits", device=CPU)


def start(dataset: Dataset, init: str) -> Tensor:
    first = draws("init")
    context = Context(fresh_network(SPEC, first), dataset.train, first, Compute(CPU).cheapest())
    return initial_pixels(context, init, ipc=2, factor=1)


def picked(dataset: Dataset, net: Network, strategy: str, it: int, step: int, each: int = 1) -> Tensor:
    context = Context(net, dataset.train, draws("select", it, step), Compute(CPU).cheapest(), per_cluster=each)
    return select(context, 8, strategy=strategy)


@pytest.mark.parametrize(("method", "names"), [("dc", "none"), ("dsa", "color_crop_cutout_scale_rotate")])
@pytest.mark.parametrize("strategy", ["random", "kmeans"])
def test_dc_and_dsa_match_cosines_and_train_the_network_on_the_synthetic_images(
    tmp_path: Path, digits: Dataset, method: str, names: str, strategy: str
) -> None:
    argv = f"-m {method} --select {strategy} --interval 2 --niter 2 --inner_loop 3 --net_epoch 2 --lr_img 0.5"
    ours = distilled(tmp_path, *argv.split())
    real, normalize, augment = digits.train, digits.normalize, Augment(names)
    begun = start(digits, "noise")
    x = normalize(begun.flatten(0, 1)).unflatten(0, (10, 2)).requires_grad_()  # learned where it is normalised
    sgd = torch.optim.SGD([x], lr=0.5, momentum=0.5)
    labels = torch.arange(10).repeat_interleave(2)
    recipe = Recipe(8, augment, "vanilla", momentum=0.0, weight_decay=0.0, epochs=2)
    low, high = normalize(torch.zeros(1, 1, 8, 8)), normalize(torch.ones(1, 1, 8, 8))
    for it in range(2):
        net = fresh_network(SPEC, draws("network", it))
        x.data = torch.minimum(torch.maximum(x.data, low), high)
        for step in range(3):
            if step in (0, 2):
                picks = picked(digits, net, strategy, it, step)
            u = augment.draw_shared(10, draws("match", it, step))
            loss = torch.zeros(())
            for c in range(10):
                syn = augment_shared(x[c], u[c], augment.names, augment.geometries)
                wanted = augment_shared(normalize(real.images[picks[c]]), u[c], augment.names, augment.geometries)
                loss = loss + class_distance(net, wanted, syn, c, "cos", "grad", fc=True)
            sgd.zero_grad()
            loss.backward()
            sgd.step()
            if step == 2:
                continue
            drawn, weights = draws("update", it, step), torch.optim.SGD(net.parameters(), lr=0.01)
            order = drawn.permutation(20)
            for _ in range(2):
                epoch = plan(order, [(0, 8), (8, 16), (16, 20)], drawn)
                for first, last in ((0, 8), (8, 16), (16, 20)):
                    batch = epoch.order[first:last]
                    images = torch.stack([
                        augment_one(x.detach().flatten(0, 1)[i], epoch.u[first + n], augment.names, augment.geometries)
                        for n, i in enumerate(batch.tolist())
                    ])  # fmt: skip
                    weights.zero_grad()
                    F.cross_entropy(net(images), labels[batch]).backward()
                    weights.step()
    assert recipe.lr == 0.01
    expected = x.detach() * normalize.std + normalize.mean
    assert (expected - begun).abs().max() > 0.05
    torch.testing.assert_close(ours, expected.clamp(0, 1), rtol=0, atol=2e-4)


@pytest.mark.parametrize("strategy", ["random", "kmeans"])
def test_dm_matches_mean_embeddings_of_untrained_networks(tmp_path: Path, digits: Dataset, strategy: str) -> None:
    ours = distilled(tmp_path, *f"-m dm --select {strategy} --interval 2 --niter 5".split())
    real, normalize, augment = digits.train, digits.normalize, Augment("color_crop_cutout_scale_rotate")
    begun = start(digits, strategy)
    x = normalize(begun.flatten(0, 1)).unflatten(0, (10, 2)).requires_grad_()
    sgd = torch.optim.SGD([x], lr=1.0, momentum=0.5)
    low, high = normalize(torch.zeros(1, 1, 8, 8)), normalize(torch.ones(1, 1, 8, 8))
    for it in range(5):
        net = fresh_network(SPEC, draws("network", it))
        x.data = torch.minimum(torch.maximum(x.data, low), high)
        if it % 2 == 0:  # one selection serves two networks
            picks = picked(digits, net, strategy, it, 0)
        u = augment.draw_shared(10, draws("match", it, 0))
        loss = torch.zeros(())
        for c in range(10):
            syn = augment_shared(x[c], u[c], augment.names, augment.geometries)
            wanted = augment_shared(normalize(real.images[picks[c]]), u[c], augment.names, augment.geometries)
            means = [torch.stack([net.embed(image[None])[0] for image in images]).mean(0) for images in (wanted, syn)]
            loss = loss + (means[0].detach() - means[1]).square().sum()
        sgd.zero_grad()
        loss.backward()
        sgd.step()
    expected = x.detach() * normalize.std + normalize.mean
    assert (expected - begun).abs().max() > 0.05
    torch.testing.assert_close(ours, expected.clamp(0, 1), rtol=0, atol=2e-4)


def test_dream_plus_matches_both_under_networks_that_have_seen_all_real_images(tmp_path: Path, digits: Dataset) -> None:
    argv = "-m dream+ --niter 2 --inner_loop 2 --interval 2 --per_cluster 2 --n_data 16 --lr_img 0.02"
    ours = distilled(tmp_path, *argv.split())
    real, normalize, augment = digits.train, digits.normalize, Augment("color_crop_cutout")
    begun = start(digits, "kmeans")
    pixels = begun.clone().requires_grad_()
    sgd = torch.optim.SGD([pixels], lr=0.02 * 2 / 10, momentum=0.5)
    update = Recipe(batch_size=8, augment=Augment("color_crop"), mixup="cut")
    for it in range(2):
        net = fresh_network(SPEC, draws("network", it))
        trainer = Trainer([net], [real], update, Compute(CPU))
        pixels.data.clamp_(0, 1)
        trainer.epoch(torch.arange(len(real)), [draws("pretrain", it, 0)])
        for step in range(2):
            if step == 0:
                picks = picked(digits, net, "kmeans", it, 0, each=2)
            u = augment.draw_shared(10, draws("match", it, step))
            for c in range(10):
                syn = augment_shared(normalize(pixels[c]), u[c], augment.names, augment.geometries)
                wanted = augment_shared(normalize(real.images[picks[c]]), u[c], augment.names, augment.geometries)
                loss = class_distance(net, wanted, syn, c, "mse", "grad")
                loss = loss + (net.embed(wanted).mean(0).detach() - net.embed(syn).mean(0)).square().sum()
                pixels.grad = torch.autograd.grad(loss, pixels)[0]
                sgd.step()
            update_network(trainer, n_data=16, draws=draws("update", it, step))
    assert (pixels.detach() - begun).abs().max() > 0.05
    torch.testing.assert_close(ours, pixels.detach().clamp(0, 1), rtol=0, atol=2e-4)


# --- What the project promises of every run ---------------------------------------------------------------------------

BUDGET = {
    "dream": "--niter 2 --inner_loop 3 --n_data 16", "idc": "--niter 2 --inner_loop 3 --n_data 16",
    "dc": "--niter 2 --inner_loop 3 --net_epoch 2", "dsa": "--niter 2 --inner_loop 3 --net_epoch 2",
    "dm": "--niter 6",
    "mtt": "--niter 6 --experts 2 --expert_epochs 4 --max_start 2 --match_epochs 2 --student_steps 3 --batch_real 128",
    "dream+": "--niter 2 --inner_loop 3 --n_data 16",
}  # fmt: skip


@pytest.mark.parametrize("strategy", [pytest.param("random", marks=pytest.mark.slow), "kmeans"])
@pytest.mark.parametrize("method", METHODS)
def test_a_run_of_every_method_that_is_stopped_goes_on_to_the_same_bytes_and_is_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], method: str, strategy: str
) -> None:
    argv = [*TINY, "-m", method, "--select", strategy, "-f", "2", *BUDGET[method].split(), "--interval", "2"]
    assert condense.main([*argv, "--results_dir", str(tmp_path / "whole")]) == 0
    name = "convnet2_f2_ipc2" + ("" if method == "dream" else f"_{method}")
    whole = tmp_path / "whole" / "digits" / name
    original, steps = condense.Job.after_step, 0

    def after_step(job: condense.Job, state: condense.State) -> None:
        nonlocal steps
        steps += 1
        if steps in (1, 4):
            job.stopper.signal = signal.SIGTERM
        original(job, state)

    monkeypatch.setattr(condense.Job, "after_step", after_step)
    parts = [*argv, "--results_dir", str(tmp_path / "parts")]
    assert [condense.main(parts) for _ in range(3)] == [128 + signal.SIGTERM] * 2 + [0]
    there = tmp_path / "parts" / "digits" / name
    assert (there / "data.pt").read_bytes() == (whole / "data.pt").read_bytes()
    card = json.loads((there / "data.json").read_text())
    assert card["settings"]["method"] == method and card["finished"]
    assert list(card["learned"]) == (["step_size"] if method == "mtt" else [])
    assert ("expert_seconds" in card) == (method == "mtt")
    capsys.readouterr()
    assert train.main([str(there), "--device", "cpu", "--baselines", "none", "--epochs", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["n"] == 1


def test_experts_are_trained_by_a_command_of_their_own_and_shared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*TINY, "-m", "mtt", *BUDGET["mtt"].split(), "--results_dir", str(tmp_path)]
    assert condense.main([*argv, "--experts_only"]) == 0
    (folder,) = (tmp_path / "digits").iterdir()
    assert folder.name.startswith("experts_convnet2_random_") and "are ready" in capsys.readouterr().out
    written = {file.name: file.stat().st_mtime_ns for file in folder.glob("expert_*.pt")}
    assert len(written) == 2
    for more in ([], ["--seed", "5", "--tag", "other", "--lr_img", "10"]):
        assert condense.main([*argv, *more]) == 0
    assert {file.name: file.stat().st_mtime_ns for file in folder.glob("expert_*.pt")} == written
    assert condense.main([*argv, "--tag", "more", "--experts", "3"]) == 0
    assert len(list(folder.glob("expert_*.pt"))) == 3
    assert condense.main([*argv, "--tag", "representatives", "--select", "kmeans"]) == 0
    assert len(list(tmp_path.glob("digits/experts_*"))) == 2


def test_another_run_s_step_size_is_taken_over_with_its_pixels(tmp_path: Path) -> None:
    argv = [*TINY, "-m", "mtt", *BUDGET["mtt"].split(), "--lr_step", "1e-2", "--results_dir", str(tmp_path)]
    assert condense.main(argv) == 0
    folder = tmp_path / "digits" / "convnet2_f1_ipc2_mtt"
    there = json.loads((folder / "data.json").read_text())["learned"]["step_size"]
    more = ["--resume_from", str(folder), "--niter", "7", "--lr_step", "0", "--tag", "longer"]
    assert condense.main([*argv, *more]) == 0
    here = json.loads((tmp_path / "digits/convnet2_f1_ipc2_mtt_longer/data.json").read_text())["learned"]["step_size"]
    assert here == there != pytest.approx(0.01, rel=1e-3)


def test_experts_survive_a_kill_at_any_moment(tmp_path: Path) -> None:
    """Killed between two saves, the same command ends with the same bytes."""
    argv = [*TINY, "-m", "mtt", *BUDGET["mtt"].split(), "--expert_epochs", "16", "--experts_only"]
    assert condense.main([*argv, "--results_dir", str(tmp_path / "whole")]) == 0
    words = [sys.executable, str(ROOT / "condense.py"), *argv, "--results_dir", str(tmp_path / "parts")]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("parts/digits/*/expert_000.pt")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL and len(list(tmp_path.glob("parts/digits/*/expert_*.pt"))) < 2
    assert condense.main([*argv, "--results_dir", str(tmp_path / "parts")]) == 0
    whole, parts = (sorted(tmp_path.glob(f"{name}/digits/*/expert_*.pt")) for name in ("whole", "parts"))
    assert [file.name for file in whole] == [file.name for file in parts] == ["expert_000.pt", "expert_001.pt"]
    for one, other in zip(whole, parts, strict=True):
        assert torch.equal(*(torch.load(file, weights_only=True)["trajectory"] for file in (one, other)))


def test_the_worked_example_of_the_readme_is_a_seventh_framework(tmp_path: Path) -> None:
    block = (ROOT / "README.md").read_text().split("```python\n# utils/method/objectives.py")[1].split("```")[0]
    parts = ("utils/method/objectives.py" + block).split("# utils/")
    assert block.count("\n") < 30 and len(parts) == 2
    for name in ("models", "utils"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("condense.py", "data.py"):
        shutil.copy(ROOT / name, tmp_path)
    for part in (parts[0].removeprefix("utils/"), parts[1]):
        file, lines = part.split(".py", 1)
        with open(tmp_path / "utils" / f"{file}.py", "a") as source:
            source.write("\n#" + lines)
    words = ["condense.py", *TINY, "-m", "dm2", "--select", "kmeans", "--niter", "3"]
    done = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    card = json.loads((tmp_path / "results/digits/convnet2_f1_ipc2_dm2/data.json").read_text())
    assert card["settings"]["match"] == "embed+variance" and card["settings"]["init"] == "kmeans" and card["finished"]


@pytest.mark.parametrize("method", ["dm", "mtt"])
def test_whitened_images_are_distilled_and_evaluated_as_such(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    argv = [*TINY, "-m", method, *BUDGET[method].split(), "--results_dir", str(tmp_path)]
    assert condense.main([*argv, "--whiten", "zca", "--tag", "zca"]) == condense.main(argv) == 0
    whitened, plain = (tmp_path / "digits" / f"convnet2_f1_ipc2_{method}{tag}" for tag in ("_zca", ""))
    assert (whitened / "data.pt").read_bytes() != (plain / "data.pt").read_bytes()
    assert "ZCA" in json.loads((whitened / "data.json").read_text())["about"]
    found = []
    for folder in (whitened, plain):
        capsys.readouterr()
        argv = [str(folder), "--device", "cpu", "--baselines", "none", "--real", "--epochs", "1", "--json"]
        assert train.main([*argv, "--results_dir", str(tmp_path)]) == 0
        assert ("whitening" in capsys.readouterr().out) == (folder == whitened)
        found.append(json.loads((folder / "eval.json").read_text())["results"][0]["set"].get("whiten"))
    assert found == ["zca", None]
    assert len(json.loads((tmp_path / "digits/real/eval.json").read_text())["results"]) == 2  # not taken for another


def test_idc_with_representatives_is_dream() -> None:
    for dataset, *more in (["digits"], ["cifar10", "--reproduce", "-f", "2"], ["mnist", "--reproduce", "-f", "2"]):
        dream, idc = (
            dataclasses.asdict(parsed("-d", dataset, *more, "-m", *words))
            for words in (["dream"], ["idc", "--select", "kmeans"])
        )
        assert {name for name in dream if dream[name] != idc[name]} == {"method"}


def test_a_network_with_batch_norm_can_be_distilled_with_by_every_method(tmp_path: Path) -> None:
    for method in METHODS:
        argv = [*TINY[:-6], "--norm_type", "batch", "--epochs", "1", "--repeat", "1", "-m", method]
        assert condense.main([*argv, *BUDGET[method].split(), "--results_dir", str(tmp_path)]) == 0
