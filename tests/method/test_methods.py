"""The frameworks: their settings are the published ones, and each of condense.py's runs is its naive loop."""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import condense
import models
import train
from data import Dataset
from models import Network
from tests.distilling import distilled
from tests.files import image_folder, last_json
from tests.killing import Server
from tests.oracle import augment_shared, class_distance, decode_naively, naive_epoch
from tests.outcome import outcome
from utils.config import resolve
from utils.config.derived import caveat, expert_recipe, has_pool, update_recipe
from utils.config.options import CondenseOptions
from utils.config.presets import METHODS, Method
from utils.method.augment import Augment
from utils.method.frequencies import Frequencies
from utils.method.images import ImageSet
from utils.method.pool import perturb
from utils.method.selection import Context, initial_pixels, select
from utils.method.training import Trainer, fresh_network, update_network
from utils.numerics.compute import Compute
from utils.system.draws import Draws
from utils.system.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
ONE_OF_SIX = "one_color_crop_cutout_flip_scale_rotate"


def parsed(*argv: str) -> CondenseOptions:
    return resolve.condense(argv, "").options


# --- Settings ---------------------------------------------------------------------------------------------------------

# The table of the papers, written out once more.
DC = dict(
    match="grad", metric="cos", fc=True, bias=False, batch_real=256, lr_img=0.1, mom_img=0.5, init="normal", niter=1000,
    train_on="syn", lr=0.01, mom_net=0, wd_net=0, pixel_step="joint", mixup_net="vanilla", select="random", interval=1,
)  # fmt: skip
PUBLISHED: dict[str, dict[str, Any]] = {
    "dream": dict(match="grad", metric="mse", fc=False, select="kmeans", init="kmeans", interval=10, batch_real=128,
        pixel_step="sweep", lr_img=5e-3, niter=2000, inner_loop=100, train_on="real", n_data=2000, pretrain=0),
    "idc": dict(match="grad", metric="mse", select="random", init="random", interval=1, batch_real=64,
        pixel_step="sweep", lr_img=5e-3, niter=2000, inner_loop=100, train_on="real", n_data=2000),
    "dc": dict(DC, aug_type="none"),
    "dsa": dict(DC, aug_type=ONE_OF_SIX, init="random"),
    "dm": dict(match="embed", metric="mse", batch_real=256, lr_img=1.0, mom_img=0.5, init="random", niter=20000,
        inner_loop=1, n_data=0, aug_type=ONE_OF_SIX, pixel_step="joint", select="random", interval=1),
    "mtt": dict(match="trajectory", lr_img=1000, mom_img=0.5, init="random", niter=5000, inner_loop=1, n_data=0,
        step_size=0.01, lr_step=1e-5, student_steps=20, match_epochs=3, max_start=25, experts=100, expert_epochs=50,
        batch_real=256, lr=0.01, mom_net=0, aug_type=ONE_OF_SIX, select="random", pixel_step="joint", whiten="none"),
    "dream+": dict(match="grad+embed", metric="mse", select="kmeans", init="kmeans", interval=10, batch_real=128,
        pixel_step="sweep", lr_img=5e-3, niter=2000, inner_loop=100, train_on="real", n_data=2000, pretrain=1,
        per_cluster=1),
    "dance": dict(niter=10000, inner_loop=1, n_data=0, networks="middle", experts=20, expert_epochs=60, calibrate=True,
        match="embed", metric="mse", lr_img=0.1, mom_img=0.5, pixel_step="sweep", select="random", init="random"),
    "ncfm": dict(niter=20000, inner_loop=1, n_data=0, networks="middle", experts=20, expert_epochs=60, calibrate=False,
        match="cf", frequencies="learned", select="random", init="random"),
}  # fmt: skip


@pytest.mark.parametrize("method", PUBLISHED)
def test_reproduce_with_a_method_is_its_published_setting(method: str) -> None:
    shown = dataclasses.asdict(parsed("--reproduce", "-d", "cifar10", "--method", method, "--ipc", "10"))
    assert {name: shown[name] for name in PUBLISHED[method]} == PUBLISHED[method]


@pytest.mark.parametrize(("ipc", "outer", "inner"), [(1, 1, 1), (5, 1, 1), (10, 10, 50), (50, 50, 10), (99, 50, 10)])
@pytest.mark.parametrize("method", ["dc", "dsa"])
def test_the_loops_of_dc_follow_from_the_images_per_class(method: str, ipc: int, outer: int, inner: int) -> None:
    o = parsed("--reproduce", "-d", "cifar10", "-m", method, "--ipc", str(ipc))
    assert (o.inner_loop, o.net_epoch) == (outer, inner)


@pytest.mark.parametrize("reproduce", [[], ["--reproduce"]])
@pytest.mark.parametrize("method", PUBLISHED)
def test_representatives_are_selected_every_ten_steps_and_random_images_at_every_step(
    method: str, reproduce: list[str]
) -> None:
    argv = ["-d", "cifar10", "-m", method, *reproduce]
    o, random = (parsed(*argv, "--select", strategy) for strategy in ("kmeans", "random"))
    assert (o.select, o.interval, o.init) == ("kmeans", 10, "kmeans")
    assert random.interval == 1
    assert parsed(*argv, "--select", "random", "--interval", "10").interval == 10


@pytest.mark.parametrize(
    ("method", "init"), [("dream", "kmeans"), ("idc", "random"), ("dc", "normal"), ("dsa", "random"), ("dm", "random")]
)
def test_without_representatives_each_method_begins_as_its_own_command_does(method: str, init: str) -> None:
    assert parsed("-d", "cifar10", "-m", method, "--select", "random").init == init


def test_what_reproduce_does_not_reproduce_is_said(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    argv = ["-d", "cifar10", "-m", "mtt"]
    assert "one set of settings for every --ipc" in caveat(parsed(*argv, "--reproduce"))
    assert not caveat(parsed(*argv)) and not caveat(parsed("-d", "cifar10", "-m", "dm", "--reproduce"))
    folder = image_folder(tmp_path / "images", dict.fromkeys("0123456789", 2), shape=(28, 28))
    words = ["--reproduce", "-m", "mtt", "-d", "mnist", "--image_folder", str(folder), "--results_dir", str(tmp_path)]
    assert condense.main([*words, "--device", "cpu", "--dry_run"]) == 0
    assert "one set of settings for every --ipc" in capsys.readouterr().out


@pytest.mark.parametrize("method", PUBLISHED)
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
        "pretrain": "7", "pixel_step": "sweep", "networks": "early",
    }  # fmt: skip
    if method in ("dance", "ncfm"):
        other["expert_epochs"] = "7"
    if method == "ncfm":
        other |= {"match": "embed+cf", "frequencies": "random"}
    if method in ("idc", "dream", "dream+"):
        other["pixel_step"] = "joint"
    assert {*row.settings, *row.published, *row.digits} <= {*other, "fc", "bias", "calibrate"}
    words = [word for name, value in other.items() for word in (f"--{name}", value)]
    for dataset in ("digits", "mnist", "cifar10"):
        more = [] if dataset == "digits" else ["--reproduce"]
        o = parsed("-d", dataset, "-f", "2", "-m", method, *more, *words)
        assert {name: str(getattr(o, name)) for name in other} == other


def test_an_unknown_setting_of_a_method_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "dm", Method("misspelt", {"lr_imgg": 1.0}))
    with pytest.raises(UsageError, match=r"presets.py: unknown settings of the method: lr_imgg"):
        parsed("-m", "dm")


def test_mirror_images_are_left_out_where_they_are_other_classes() -> None:
    for method in ("dsa", "dm", "mtt"):
        assert "flip" in parsed("-d", "fashion", "-m", method).aug_type
        assert not any("flip" in parsed("-d", d, "-m", method).aug_type for d in ("mnist", "svhn", "digits"))


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


# --- Each framework against its naive loop ----------------------------------------------------------------------------

TINY = shlex.split("--device cpu -d digits --ipc 2 --batch_real 8 --width 8 --epochs 2 --repeat 1 --seed 4")
SPEC = models.resolve("convnet", channels=1, classes=10, side=8, depth=2, width=8)
POOL = "--experts 2 --expert_epochs 1"


def draws(purpose: str, *position: int) -> Draws:
    return Draws("cpu", 4, purpose, *position)


def naively(digits: Dataset, *argv: str) -> tuple[Tensor, Tensor, int]:
    """Algorithm 1 in plain loops, with the settings and random numbers of condense.py's run with these flags.

    Returns the initial and the final pixels, (classes, ipc, C, H, W), and how many values were ever clamped.
    """
    o, real, normalize, compute = parsed(*TINY, *argv), digits.train, digits.normalize, Compute(CPU)
    augment, recipe = Augment(o.aug_type), update_recipe(o)
    joint = o.pixel_step == "joint"  # pixels are learned where they are normalised, in one step of all classes

    def representatives(net: Network, purpose: Draws) -> Context:
        return Context(net, real, purpose, compute.cheapest(), per_cluster=o.per_cluster)

    # Those of the pool, if there is one, each at the beginning and at the end of its training.
    pool = []
    for k in range(o.experts if has_pool(o) else 0):
        initial, final = (fresh_network(SPEC, Draws("cpu", o.expert_seed, "expert", "network", k)) for _ in range(2))
        expert = Trainer([final], [real], expert_recipe(o, flip=digits.flip), compute)
        for epoch in range(o.expert_epochs):
            expert.all_images([Draws("cpu", o.expert_seed, "expert", k, epoch)])
        pool.append((initial, final))
    frequencies = None
    if "cf" in o.match:
        frequencies = Frequencies(o.frequency_count, 32, how=o.frequencies, draws=draws("frequencies"))

    def learned(images: Tensor) -> Tensor:
        return normalize(images.flatten(0, 1)).unflatten(0, images.shape[:2]) if joint else images.clone()

    first = draws("init")
    trainer = Trainer([fresh_network(SPEC, first)], [real], recipe, compute)
    for epoch in range(o.pretrain):
        trainer.epoch(torch.arange(len(real)), [draws("pretrain init", epoch)])
    context = Context(trainer.nets[0], real, first, compute.cheapest())
    start, clamped = initial_pixels(context, o.init, ipc=2, factor=o.factor), 0
    x = learned(start).requires_grad_()
    sgd = torch.optim.SGD([x], lr=o.lr_img * (1 if joint else 2 / 10), momentum=o.mom_img)
    low, high = (learned(torch.full((1, 1, 1, 8, 8), value)) for value in (0.0, 1.0))
    for it in range(o.niter):
        velocity: dict[str, Tensor] = {}
        drawn = draws("network", it)
        net, judge = fresh_network(SPEC, draws("any") if pool else drawn), None
        if pool:
            initial, judge = pool[draws("pool", it).host.randrange(len(pool))]
            share = drawn.host.random() if o.networks == "middle" else 0.0
            for p, a, b in zip(net.parameters(), initial.parameters(), judge.parameters(), strict=True):
                p.data = share * a.data + (1 - share) * b.data
            if o.networks == "early":
                perturb(net, drawn)
        trainer = Trainer([net], [real], recipe, compute)
        clamped += int(((x < low) | (x > high)).sum())
        x.data = torch.minimum(torch.maximum(x.data, low), high)
        for epoch in range(o.pretrain):
            trainer.epoch(torch.arange(len(real)), [draws("pretrain", it, epoch)])
        for step in range(o.inner_loop):
            if (
                step if o.interval <= o.inner_loop else it
            ) % o.interval == 0:  # one selection may serve several networks
                picks = select(representatives(net, draws("select", it, step)), 8, strategy=o.select)
            matching = draws("match", it, step)
            u, loss, made = augment.draw_shared(10, matching), torch.zeros(()), None
            if frequencies is not None:
                made = frequencies(frequencies.draw(matching))
                made.leaf.grad = torch.zeros_like(made.leaf)
            t = None if made is None else made.leaf.requires_grad_()
            for c in range(10):
                decoded = decode_naively(x[c], o.factor, o.decode_type)
                syn = augment_shared(decoded if joint else normalize(decoded), u[c], augment)
                wanted = augment_shared(normalize(real.images[picks[c]]), u[c], augment)
                loss = loss + class_distance(net, wanted, syn, c, o.metric, o.match, fc=o.fc, frequencies=t)
                if not joint or c == 9:
                    x.grad = None
                    loss.backward(inputs=[x] if t is None else [x, t])
                    loss = torch.zeros(())
                    sgd.step()
            if frequencies is not None and made is not None:
                frequencies.ascend(made)
            if o.calibrate and judge is not None:
                u = augment.draw_shared(10, matching)
                for c in range(10):
                    syn = augment_shared(normalize(decode_naively(x[c], o.factor, o.decode_type)), u[c], augment)
                    x.grad = torch.autograd.grad(class_distance(judge, syn, syn, c, o.metric, "ce"), x)[0]
                    sgd.step()
            if step + 1 == o.inner_loop:
                continue
            drawn = draws("update", it, step)
            if o.train_on == "real":
                update_network(trainer, n_data=o.n_data, draws=drawn)
                continue
            images = (x.detach() * normalize.std + normalize.mean if joint else x.detach()).flatten(0, 1)
            synthetic = ImageSet(images, torch.arange(10).repeat_interleave(2), classes=10, normalize=normalize)
            order = drawn.permutation(20)
            for _ in range(o.net_epoch):
                naive_epoch(net, velocity, synthetic, order, recipe, drawn)
    end = x.detach() * normalize.std + normalize.mean if joint else x.detach()
    return start, end.clamp(0, 1), clamped


@pytest.mark.parametrize(
    "flags",
    [
        "-f 2 --niter 2 --inner_loop 3 --interval 2 --n_data 16 --lr_img 0.3",
        "-m idc --niter 1 --inner_loop 3 --n_data 16 --lr_img 0.3",
        "-m dc --niter 2 --inner_loop 3 --net_epoch 2 --lr_img 0.5",
        "-m dsa --select kmeans --interval 2 --niter 1 --inner_loop 3 --net_epoch 2 --lr_img 0.5",
        "-m dm --select kmeans --interval 2 --niter 4",
        "-m dream+ --niter 2 --inner_loop 2 --interval 2 --per_cluster 2 --n_data 16 --lr_img 0.02",
        f"{POOL} -m dance --niter 4 --lr_img 1",
        pytest.param(
            f"{POOL} -m ncfm --niter 4 --lr_img 3 --frequencies random --frequency_count 8", marks=pytest.mark.slow
        ),
        pytest.param(
            f"{POOL} -m ncfm --niter 4 --lr_img 1 --frequency_count 8 --select kmeans --interval 2",
            marks=pytest.mark.slow,
        ),
        f"{POOL} --networks early --niter 2 --inner_loop 2 --interval 2 --n_data 16 --lr_img 0.3",
    ],
)
def test_a_run_is_the_published_algorithm(tmp_path: Path, flags: str) -> None:
    """When it selects, clamps, renews and keeps what, and what it matches; trajectories: test_trajectory.py."""
    argv = flags.split()
    images, _ = torch.load(distilled(tmp_path, [*TINY, *argv]) / "data.pt", weights_only=True)
    start, expected, clamped = naively(Dataset("digits", device=CPU), *argv)
    assert (expected - start).abs().max() > 0.05
    assert clamped > 50 or "--niter 1" in flags  # so that a clamp at another moment would show
    torch.testing.assert_close(images, expected.flatten(0, 1), rtol=0, atol=2e-4)


# --- What the project promises of every run ---------------------------------------------------------------------------

BUDGET = {
    "dream": "--niter 2 --inner_loop 3 --n_data 16", "idc": "--niter 2 --inner_loop 3 --n_data 16",
    "dc": "--niter 2 --inner_loop 3 --net_epoch 2", "dsa": "--niter 2 --inner_loop 3 --net_epoch 2",
    "dm": "--niter 6",
    "mtt": "--niter 5 --experts 2 --expert_epochs 3 --max_start 1 --match_epochs 2 --student_steps 2 --batch_real 128 "
    "--interval 11",
    "dream+": "--niter 2 --inner_loop 3 --n_data 16",
    "dance": f"--niter 6 {POOL}", "ncfm": f"--niter 6 {POOL} --frequency_count 8",
}  # fmt: skip


def budget(method: str) -> list[str]:
    return BUDGET.get(method, "--niter 6").split()


@pytest.mark.parametrize("strategy", [pytest.param("random", marks=pytest.mark.slow), "kmeans"])
@pytest.mark.parametrize(
    "method",
    [pytest.param(m, marks=[] if m in ("dream", "mtt", "dream+") else pytest.mark.slow) for m in METHODS],
)
def test_a_run_of_every_method_that_is_stopped_goes_on_to_the_same_bytes_and_is_evaluated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str, strategy: str
) -> None:
    argv = [
        *TINY,
        "-m",
        method,
        "--select",
        strategy,
        "-f",
        "2",
        "--interval",
        "2",
        *budget(method),
    ]
    whole, there = distilled(tmp_path / "whole", argv), distilled(tmp_path / "parts", argv, 1, 4)
    assert there.name == "convnet2_f2_ipc2" + ("" if method == "dream" else f"_{method}")
    assert outcome(there) == outcome(whole)
    card = json.loads((there / "data.json").read_text())
    assert card["settings"]["method"] == method and card["finished"]
    assert list(card["learned"]) == (["step_size"] if method == "mtt" else [])
    assert ("expert_seconds" in card) == (method in ("mtt", "dance", "ncfm"))
    capsys.readouterr()
    assert train.main([str(there), "--device", "cpu", "--baselines", "none", "--epochs", "1", "--json"]) == 0
    assert last_json(capsys)["n"] == 1


MTT = [*TINY, "-m", "mtt", *budget("mtt")]


def test_experts_are_trained_by_a_command_and_shared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*MTT, "--results_dir", str(tmp_path)]
    assert condense.main([*argv, "--experts_only"]) == 0
    (folder,) = (tmp_path / "digits").iterdir()
    assert folder.name.startswith("experts_convnet2_random_") and "are ready" in capsys.readouterr().out
    written = {file.name: file.stat().st_mtime_ns for file in folder.glob("expert_*.pt")}
    assert len(written) == 2
    for more in ([], ["--seed", "5", "--tag", "other", "--lr_img", "10"]):
        assert condense.main([*argv, *more]) == 0
    assert {file.name: file.stat().st_mtime_ns for file in folder.glob("expert_*.pt")} == written
    assert condense.main([*argv, "--tag", "more", "--experts", "3", "--experts_only"]) == 0
    assert len(list(folder.glob("expert_*.pt"))) == 3
    assert condense.main([*argv, "--tag", "representatives", "--select", "kmeans", "--experts_only"]) == 0
    assert len(list(tmp_path.glob("digits/experts_*"))) == 2


def test_another_run_s_step_size_is_taken_over_with_its_pixels(tmp_path: Path) -> None:
    folder = distilled(tmp_path, [*MTT, "--lr_step", "1e-2"])
    more = ["--resume_from", str(folder), "--niter", "6", "--lr_step", "0", "--tag", "longer"]
    there, here = (
        json.loads((run / "data.json").read_text())["learned"]["step_size"]
        for run in (folder, distilled(tmp_path, [*MTT, *more]))
    )
    assert here == there != pytest.approx(0.01, rel=1e-3)


def test_experts_survive_a_kill_at_any_moment(server: Server, tmp_path: Path) -> None:
    """Killed between two saves, the same command ends with the same bytes."""
    argv = [*MTT, "--expert_epochs", "8", "--experts_only"]
    parts, whole = ([*argv, "--results_dir", str(tmp_path / name)] for name in ("parts", "whole"))
    assert server.run(parts, computing=150, then="kill").status == -signal.SIGKILL  # in the second expert's training
    assert len(list(tmp_path.glob("parts/digits/*/expert_000.pt"))) == 1
    assert [server.run(words).status for words in (parts, whole)] == [0, 0]
    files = [sorted(tmp_path.glob(f"{name}/digits/*/expert_*.pt")) for name in ("parts", "whole")]
    assert [[file.name for file in found] for found in files] == [["expert_000.pt", "expert_001.pt"]] * 2
    for one, other in zip(*files, strict=True):
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
def test_whitened_images_are_evaluated_as_such(tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str) -> None:
    argv = [*TINY, "-m", method, *budget(method)]
    whitened, plain = distilled(tmp_path, [*argv, "--whiten", "zca", "--tag", "zca"]), distilled(tmp_path, argv)
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


def test_a_network_with_batch_norm_can_be_distilled_with(tmp_path: Path) -> None:
    for method in ("dream+", "mtt"):
        argv = [*TINY, "--norm_type", "batch", "--epochs", "1", "-m", method, *budget(method)]
        distilled(tmp_path, [*argv, "--niter", "1"])
