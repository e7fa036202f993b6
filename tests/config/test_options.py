from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from data import DATASETS, Dataset
from utils.config import checks, derived, resolve
from utils.config.derived import pixel_rate
from utils.config.flags import make_parser
from utils.config.options import CondenseOptions, TrainOptions
from utils.config.presets import DATASET_SETTINGS, PUBLISHED, REPRODUCE, exceptions
from utils.numerics import compilation
from utils.system.errors import UsageError

# dream.md's table, written out once more: what --reproduce has to show.
COMMON = dict(
    net_type="convnet", depth=3, norm_type="instance", niter=2000, inner_loop=100, interval=10, batch_real=128,
    batch_syn_max=128, mom_img=0.5, match="grad", epochs=1000, batch_size=64, lr=0.01, momentum=0.9, weight_decay=5e-4,
)  # fmt: skip
PAPER = {
    #          metric  lr_img  n_data
    "cifar10": ("mse", 5e-3, 2000),
    "cifar100": ("mse", 5e-3, 2000),
    "svhn": ("mse", 5e-3, 500),
    "mnist": ("l1", 1e-4, 500),
    "fashion": ("l1", 1e-4 * 28**2 / 32**2, 500),
}


def parsed(*argv: str) -> CondenseOptions:
    return resolve.condense(argv, "").options


@pytest.mark.parametrize("factor", ["1", "2"])
@pytest.mark.parametrize("ipc", ["1", "10", "50"])
@pytest.mark.parametrize("dataset", PUBLISHED)
def test_reproduce_is_the_published_table(dataset: str, ipc: str, factor: str) -> None:
    o = parsed("--reproduce", "-d", dataset, "-f", factor, "--ipc", ipc)
    shown = dataclasses.asdict(o)
    assert {k: shown[k] for k in COMMON} == COMMON
    assert (o.metric, o.lr_img, o.n_data) == pytest.approx(PAPER[dataset])
    assert (o.ipc, o.factor, o.select, o.init) == (int(ipc), int(factor), "kmeans", "kmeans")

    single_svhn = dataset == "svhn" and (ipc, factor) == ("1", "1")
    packed_mnist = dataset == "mnist" and factor == "2"
    assert o.mixup == ("vanilla" if single_svhn or packed_mnist else "cut")
    assert o.mixup_net == ("vanilla" if packed_mnist else "cut")
    assert o.aug_type == ("color_crop" if packed_mnist else "color_crop_cutout")
    assert derived.update_augmentation(o) == "color_crop"
    flip = dataset not in ("svhn", "mnist")
    expected = "color_crop" + ("_cutout" if single_svhn else "") + ("_flip" if flip else "") + "_scale_rotate"
    assert derived.evaluation_augmentation(o, flip=flip) == expected


def test_a_gpu_has_no_deterministic_derivative_of_resampling() -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    checks.check_deterministic(parsed("--deterministic", "--eval_aug_type", "scale_rotate"), cuda)
    for flags in (["--method", "dm"], ["--aug_type", "color_flip_scale_rotate"]):
        checks.check_deterministic(parsed(*flags), cuda)
        o = parsed("--deterministic", *flags)
        checks.check_deterministic(o, cpu)
        with pytest.raises(UsageError, match=r"--deterministic: .* of scale and rotate in --aug_type"):
            checks.check_deterministic(o, cuda)


def test_the_pixel_rate_scales_with_ipc_and_area() -> None:
    o = CondenseOptions(lr_img=5e-3, ipc=10)
    assert pixel_rate(o, side=32, base_side=32) == 5e-3
    assert pixel_rate(dataclasses.replace(o, ipc=1), side=32, base_side=32) == pytest.approx(5e-4)
    assert pixel_rate(dataclasses.replace(o, ipc=50), side=64, base_side=32) == pytest.approx(0.1)


# Another value than any preset has, for every option that a preset sets.
OTHER = {
    "niter": "7", "inner_loop": "7", "interval": "7", "batch_real": "7", "batch_syn_max": "7", "mom_img": "0.7",
    "match": "feat", "select": "random", "init": "noise", "net_type": "resnet", "depth": "7", "width": "7",
    "norm_type": "batch", "aug_type": "flip", "mixup_net": "vanilla", "net_epoch": "7", "epochs": "7",
    "batch_size": "7", "lr": "0.7", "momentum": "0.7", "weight_decay": "0.7", "mixup": "vanilla", "metric": "cos",
    "lr_img": "0.7", "factor": "7", "n_data": "7", "eval_aug_type": "flip", "repeat": "7",
}  # fmt: skip


@pytest.mark.parametrize("dataset", DATASET_SETTINGS)
def test_a_flag_beats_every_preset(dataset: str) -> None:
    argv = [word for name, value in OTHER.items() for word in (f"--{name}", value)]
    reproduce = ["--reproduce"] if dataset in PUBLISHED else []
    comes_with_images = dataset in DATASETS and DATASETS[dataset].load is not None
    place = [] if comes_with_images else ["--npz", "x"] if dataset == "npz" else ["--image_folder", "x"]
    o = parsed("-d", dataset, "-f", "2", *place, *reproduce, *argv)
    assert {name: str(getattr(o, name)) for name in OTHER} == OTHER


def test_every_preset_option_has_such_a_value_above() -> None:
    layers = [*DATASET_SETTINGS.values(), REPRODUCE, exceptions("mnist", 2, 1)]
    assert {name for layer in layers for name in layer} <= set(OTHER)


def test_a_flag_that_repeats_a_default_still_beats_the_preset() -> None:
    assert parsed("--reproduce", "-d", "cifar10", "--niter", "200").niter == 200
    assert parsed("--reproduce", "-d", "mnist", "-f", "2", "--mixup", "cut").mixup == "cut"


def test_the_origin_of_every_option_is_known() -> None:
    given = make_parser(CondenseOptions, "").parse_given(["--reproduce", "-d", "svhn", "--seed", "0"])
    origin = resolve.condense_options(given).origin
    found = [origin[name] for name in ("seed", "niter", "n_data", "tag")]
    assert found == ["flag", "--reproduce", "data set", "default"]


def test_published_flag_names_and_short_forms_parse_with_either_dash() -> None:
    names = (
        "niter inner_loop interval batch_real batch_syn_max lr_img mom_img metric match init decode_type aug_type "
        "mixup mixup_net n_data net_epoch epochs batch_size lr momentum weight_decay seed repeat tag depth width "
        "norm_type net_type data_dir select image_folder results_dir device eval_every max_minutes dry_run factor ipc "
        "dataset precision compile kmeans"
    )
    known = make_parser(CondenseOptions, "").format_help()
    for name in names.split():
        assert f"--{name}" in known
    assert parsed("-d", "mnist", "-f", "2", "-i", "3", "-n", "resnet10").ipc == 3
    assert parsed("--inner-loop", "4", "--batch-real=5").batch_real == 5
    assert parsed("--tag", "a-b_c").tag == "a-b_c"


def test_compilation_follows_from_the_work_the_flag_and_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, worth = torch.device("cpu"), compilation.WORTH_COMPILING["cpu"]
    monkeypatch.setattr(compilation, "compiler_error", lambda device: None)
    found = [
        compilation.computing(cpu, choice, "fp32", f * worth).compile
        for choice in ("auto", "on", "off")
        for f in (0.5, 2)
    ]
    assert found == [False, True, True, True, False, False]
    monkeypatch.setattr(compilation, "compiler_error", lambda device: "no compiler")
    assert not compilation.computing(cpu, "auto", "bf16", 2 * worth).compile
    with pytest.raises(UsageError, match="--compile on: no compiler"):
        compilation.computing(cpu, "on", "fp32", 0)


def test_where_and_how_to_compute_is_no_part_of_a_set_but_its_precision_is() -> None:
    kept = resolve.saved_settings(parsed("--precision", "bf16", "--compile", "off", "--kmeans", "sklearn"))
    assert (kept["precision"], kept["kmeans"]) == ("bf16", "sklearn")
    assert not {"compile", "device", "data_dir", "results_dir"} & set(kept)


def test_seed_zero_is_a_seed_and_ipc_keeps_what_was_given() -> None:
    assert parsed("--seed", "0").seed == 0
    assert parsed("--init", "mix").init == "kmeans"


def test_a_folder_needs_no_data_set_name() -> None:
    assert parsed("--image_folder", "x").dataset == "folder"
    assert parsed("-d", "cifar10", "--image_folder", "x").n_data == 2000


def test_help_states_every_default_and_the_data_sets_that_differ() -> None:
    for kind in (CondenseOptions, TrainOptions):
        text = " ".join(make_parser(kind, "").format_help().split())
        for field in dataclasses.fields(kind):
            assert f"--{field.name}" in text or field.name == "run"
            if field.default not in (None, False):
                default = " ".join(field.default) if isinstance(field.default, tuple) else str(field.default)
                assert default in text
    text = " ".join(make_parser(CondenseOptions, "").format_help().split())
    assert "0.0001 for -d mnist" in text


def test_a_set_s_own_settings_apply_in_training_unless_a_flag_says_otherwise() -> None:
    settings = dataclasses.asdict(
        parsed("-d", "mnist", "-f", "2", "--depth", "2", "--epochs", "33", "--results_dir", "there")
    )
    card = {
        "dataset": "mnist",
        "factor": 2,
        "ipc": 10,
        "decode_type": "single",
        "image_folder": None,
        "settings": settings,
    }

    def training(*argv: str) -> TrainOptions:
        return resolve.train_options(make_parser(TrainOptions, "").parse_given(argv), card, Path("data.json"))

    o = training()
    assert (o.epochs, o.depth, o.net_type, o.eval_aug_type) == (33, 2, ["convnet"], "color_crop_scale_rotate")
    assert o.results_dir == "results"
    assert training("--epochs", "5").epochs == 5
    mnist = Dataset("mnist", device=torch.device("cpu"))

    def networks(*argv: str) -> list[tuple[str, int]]:
        given = make_parser(TrainOptions, "").parse_given(argv)
        found = resolve.networks(training(*argv), given, card, mnist)
        return [(spec.name, spec.width) for spec in found]

    assert networks() == [("convnet2", 128)]
    assert networks("-n", "convnet", "resnet10", "convnet3") == [("convnet2", 128), ("resnet10", 32), ("convnet3", 128)]
    assert networks("-n", "resnet", "--depth", "18", "--width", "8") == [("resnet18", 8)]
    with pytest.raises(UsageError, match=r"--factor 3: the set's data.json says 2"):
        training("-f", "3")


def test_a_preset_s_depth_and_width_concern_its_own_family_only() -> None:
    assert parsed("-n", "resnet10").depth is None
    published = parsed("--reproduce", "-d", "cifar10", "-n", "resnet_ap10")
    assert (published.depth, published.width, published.norm_type, published.niter) == (None, None, None, 2000)
    deeper = parsed("--reproduce", "-d", "cifar10", "-n", "convnet4")
    assert (deeper.depth, deeper.width) == (None, 128)
    assert parsed("-n", "convnet").depth == parsed().depth == 2
    with pytest.raises(UsageError, match="--net_type: unknown network 'lenet'"):
        parsed("-n", "lenet")
