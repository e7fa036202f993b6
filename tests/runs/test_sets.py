"""What others' sets mean: layouts, normalisations, whitening, the order of classes; and runs that begin from them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import condense
import train
from data import IMAGENET, Dataset
from tests.files import image_folder, last_json, quick, refused, tree
from utils.config.flags import as_argv, make_parser
from utils.config.options import TrainOptions
from utils.files.tensors import read_tensors
from utils.method.formation import pack
from utils.method.images import Normalize, Whiten
from utils.runs.formats import SetFile
from utils.runs.normalisation import CIFAR_PIXELS, better, looks_whitened, named, statistics
from utils.runs.sets import DistilledSet, as_words, class_order, interpret, named_classes, order_warnings
from utils.system.errors import UsageError, UserError

Said = Callable[[int], list[str]]
CPU = torch.device("cpu")
THEIRS = Path("theirs.pt")
LABELS = torch.arange(10).repeat_interleave(5)
SEEDS = range(5)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return Dataset("digits", device=CPU)


@pytest.fixture(scope="module")
def whitened_digits() -> Dataset:
    return Dataset("digits", device=CPU, whiten="zca")


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Said:
    """What was logged at a level so far."""
    caplog.set_level(logging.INFO, "dream")
    return lambda level: [record.getMessage() for record in caplog.records if record.levelno == level]


def real(dataset: Dataset, first: int = 0) -> Tensor:
    """Five real images of every class, in [0, 1]."""
    return torch.cat([dataset.train.of_class(c)[first : first + 5] for c in range(dataset.classes)]).float() / 255


def read(images: Tensor, dataset: Dataset, labels: Tensor = LABELS, **how: Any) -> DistilledSet:
    soft = how.pop("soft", None)
    return interpret(SetFile(THEIRS, images, labels, soft=soft, card=how.pop("card", None)), dataset, **how)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- Layouts and ranges -----------------------------------------------------------------------------------------------

GREY = Normalize([0.5], [0.25])
CONVERTED: dict[str, tuple[Callable[[Tensor], Tensor], str | None, str]] = {  # from [0, 1], --normalized, what is said
    "channels last": (lambda x: x.permute(0, 2, 3, 1), None, "channels last"),
    "three equal channels": (lambda x: x.expand(-1, 3, -1, -1), None, "3 equal channels"),
    "both, normalised": (lambda x: GREY(x.expand(-1, 3, -1, -1)).permute(0, 2, 3, 1), "0.5/0.25", "3 equal channels"),
    "normalised as if in colour": (
        lambda x: Normalize(*IMAGENET)(x.expand(-1, 3, -1, -1)), "imagenet", "3 equal channels"
    ),
    "0 to 255": (lambda x: 255 * x, None, "divided by 255"),
    "-1 to 1": (lambda x: 2 * x - 1, "0.5/0.5", "un-normalised by 0.5/0.5"),
    "normalised, in units of 0 to 255": (lambda x: 2 * x - 1, "127.5/127.5", "un-normalised by 127.5/127.5"),
    "normalised by the data set's": (lambda x: (x - 0.3053) / 0.3758, "data", "un-normalised by data"),
}  # fmt: skip


@pytest.mark.parametrize("what", CONVERTED)
def test_other_layouts_and_ranges_are_converted_and_told_in_one_line(what: str, digits: Dataset, said: Said) -> None:
    change, normalized, says = CONVERTED[what]
    images = real(digits)
    found = read(change(images).contiguous(), digits, normalized=normalized)
    torch.testing.assert_close(found.images, images, rtol=0, atol=1e-5)
    (line,) = said(logging.INFO)
    assert line.startswith("theirs.pt: ") and says in line and not said(logging.WARNING)


ODD: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "another size": (
        lambda x: torch.nn.functional.pad(x, (2, 2, 2, 2)), "(1, 12, 12)|(1, 8, 8)|crop|8 x 8|--size 12|-d"
    ),
    "channels last, of another size": (lambda x: x.new_zeros(50, 12, 12, 1), "(12, 12, 1)|last|8 x 8"),
    "no squares": (lambda x: x[:, :, :6], "(1, 6, 8)|8 x 8"),
    "in colour": (lambda x: torch.stack([x[:, 0], x[:, 0] / 2, x[:, 0]], 1), "coloured|-d"),
    "with an alpha channel": (lambda x: x.expand(-1, 4, -1, -1), "(4, 8, 8)|1 channels|(N, C, H, W)"),
    "-1 to 1": (lambda x: 2 * x - 1, "from -1 to 1|--normalized 0.5/0.5 fits"),
    "by the data set's": (lambda x: (x - 0.3053) / 0.3758, "in place of 0 to 1|--normalized fits"),
}  # fmt: skip


@pytest.mark.parametrize("what", ODD)
def test_what_cannot_be_converted_is_named_with_the_remedy(what: str, digits: Dataset) -> None:
    change, says = ODD[what]
    with pytest.raises(UserError) as caught:
        read(change(real(digits)), digits)
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in says.split("|")), caught.value


def test_bytes_are_not_normalised(digits: Dataset) -> None:
    with pytest.raises(UserError, match=r"0 to 255.*leave --normalized out"):
        read(255 * real(digits), digits, normalized="data")


def test_others_pixels_may_leave_their_range_a_little(digits: Dataset, said: Said) -> None:
    images = real(digits) * 1.2 - 0.1
    for scale in (1, 255):
        torch.testing.assert_close(read(scale * images, digits).images, images.clamp(0, 1))
    assert [text.split("; ")[1] for text in said(logging.WARNING)] == ["clamped to [0, 1]"] * 2


# --- --normalized -----------------------------------------------------------------------------------------------------


def test_a_bare_flag_means_the_data_set_s_own(tmp_path: Path) -> None:
    parse = make_parser(TrainOptions, "").parse_given
    assert parse(["x.pt", "--normalized", "--epochs", "2"]) == {"run": ["x.pt"], "normalized": "data", "epochs": 2}
    assert parse(as_argv({"normalized": True, "whitened": True})) == {"normalized": "data", "whitened": "yes"}
    assert parse(["--normalized", "0.5/0.5", "--whitened=no"]) == {"normalized": "0.5/0.5", "whitened": "no"}
    assert parse(as_argv({"classes": ["a b", "c"]})) == {"classes": ["a b", "c"]}
    with pytest.raises(UsageError, match=r"--normalized: 'x.pt' is not data, imagenet or MEAN/STD.*RUN goes before"):
        parse(["--normalized", "x.pt"])


def test_numbers_are_per_channel_or_for_all_and_in_either_unit() -> None:
    assert statistics("0.5/0.25") == ([0.5], [0.25])
    assert statistics("0.1,0.2,0.3/1") == ([0.1, 0.2, 0.3], [1.0, 1.0, 1.0])
    assert statistics("0/255") == ([0.0], [1.0])
    for wrong in ("0.5", "0.5/0", "0.5,0.5/0.5", "a/b", "0.5/nan", "-1/2", "0.1/0.2/0.3", "0.1,0.2/0.1,0.2,0.3", "/"):
        with pytest.raises(ValueError):
            statistics(wrong)


@pytest.mark.parametrize(
    ("true", "assumed", "says"),
    [
        ("0.5/0.5", "data", "fit --normalized 0.5/0.5 better than data"),
        ("data", "0.5/0.5", "fit --normalized better than 0.5/0.5"),
        ("0.1307/0.3081", "data", "fit --normalized 0.1307/0.3081 better than data"),
    ],
)
def test_a_better_normalisation_is_named(true: str, assumed: str, says: str, digits: Dataset, said: Said) -> None:
    images = named(true, digits)(real(digits))
    read(images, digits, normalized=true)
    assert not said(logging.WARNING)
    read(images, digits, normalized=assumed)
    assert says in said(logging.WARNING)[0]


class Natural(Dataset):
    """Images in colour whose neighbouring pixels are alike, as those of photographs are."""

    def __init__(self) -> None:
        self.name, self.source, self.classes, self.channels, self.side, self.whiten = "natural", None, 10, 3, 32, "none"
        self.normalize = Normalize([0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010])
        coarse = 0.48 + 0.35 * noise(50, 3, 6, 6) + 0.2 * noise(50, 1, 6, 6, seed=1)
        self.images = torch.nn.functional.interpolate(coarse, size=32, mode="bicubic").clamp(0, 1)


@pytest.mark.parametrize("true", ["imagenet", "0.5/0.5", "/".join(",".join(map(str, x)) for x in CIFAR_PIXELS)])
def test_normalisations_in_colour_are_told_apart(true: str) -> None:
    dataset = Natural()
    images = named(true, dataset)(dataset.images)
    assert better(images, dataset, "data") == true.replace("0.2470", "0.247") and better(images, dataset, true) is None


def test_sets_that_are_no_real_images_get_no_false_warning(digits: Dataset) -> None:
    for dataset, plain in ((digits, real(digits)), (Natural(), Natural().images)):
        for seed in SEEDS:
            for spread in (0.1, 0.25, 0.5, 1.0):
                assert better(spread * noise(*plain.shape, seed=seed), dataset, "data") is None
            blurred = plain.roll(seed).unflatten(0, (10, 5)).mean(1)
            loud = plain + 0.05 * noise(*plain.shape, seed=seed)
            for images in (blurred, loud, loud.clamp(0, 1), 0.5 + 0.3 * (plain - 0.5)):
                assert better(dataset.normalize(images), dataset, "data") is None


# --- --whitened -------------------------------------------------------------------------------------------------------


def test_whitening_is_undone(digits: Dataset) -> None:
    whiten = Whiten(digits.train.images, *digits.statistics, dtype=torch.float64)
    images = real(digits).double()
    torch.testing.assert_close(whiten.inverse(whiten(images)), images, rtol=0, atol=1e-9)
    plain = Normalize(*digits.statistics)
    torch.testing.assert_close(plain.inverse(plain(images)), images, rtol=0, atol=1e-9)


@pytest.mark.parametrize("normalized", [None, "data", "0/1", "0.5/0.5"])
def test_whitened_pixels_are_those_of_the_set_again(
    normalized: str | None, digits: Dataset, whitened_digits: Dataset, said: Said
) -> None:
    for dataset in (digits, whitened_digits):
        before = named(normalized or "data", digits)
        whiten = Whiten(digits.train.images, before.mean.flatten().tolist(), before.std.flatten().tolist())
        found = read(whiten(real(digits)), dataset, normalized=normalized, whitened="yes")
        torch.testing.assert_close(found.images, real(digits), rtol=0, atol=1e-3)
    assert sum("un-whitened by the covariance of digits" in text for text in said(logging.INFO)) == 2
    assert not said(logging.WARNING)


def test_pixels_that_were_not_whitened_cannot_be_un_whitened(digits: Dataset) -> None:
    with pytest.raises(UserError, match=r"from .* when un-whitened in place of 0 to 1.*--normalized \(0/1"):
        read(named("data", digits)(real(digits)), digits, whitened="yes")


def test_nothing_is_whitened_twice(digits: Dataset, whitened_digits: Dataset, said: Said) -> None:
    images = whitened_digits.normalize(real(digits))
    for normalized in (None, "data"):
        with pytest.raises(UserError, match=r"look ZCA-whitened; say --whitened if they are, --whitened no if"):
            read(images, whitened_digits, normalized=normalized)
    with pytest.raises(UserError, match="--whitened"):
        read(images, digits)
    read(images, digits, normalized="data")
    assert any("look ZCA-whitened" in text for text in said(logging.WARNING))
    read(images, whitened_digits, normalized="data", whitened="no")


def test_only_whitened_images_look_whitened(digits: Dataset) -> None:
    plain, whiten = Normalize(*digits.statistics), Whiten(digits.train.images, *digits.statistics)
    for seed in SEEDS:
        images = real(digits, seed)
        loud = images + 0.1 * noise(*images.shape, seed=seed)
        packed = pack(torch.cat([real(digits, 4 * seed + i) for i in range(4)]), factor=2)
        for kind in (images, loud, loud.clamp(0, 1), packed, torch.rand_like(images)):
            assert looks_whitened(plain(kind), digits, plain) == "no"
        for scale in (0.1, 0.5, 1.0):
            assert looks_whitened(scale * noise(*images.shape, seed=seed), digits, plain) != "yes"
        for spread in (0.0, 0.03):
            unclear = whiten(images + spread * noise(*images.shape, seed=seed))
            assert looks_whitened(unclear, digits, plain) == "yes"


ALONE = ["-d", "digits", "-f", "1", "--device", "cpu", "--repeat", "1", "--width", "8", "--baselines", "none", "--json"]


def test_a_whitened_set_is_as_good_as_the_plain_one(
    digits: Dataset, whitened_digits: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, theirs = tmp_path / "plain.pt", tmp_path / "theirs.pt"
    torch.save([real(digits), LABELS], plain)
    torch.save([whitened_digits.normalize(real(digits)), LABELS], theirs)
    argv = [*ALONE, "--whiten", "zca", "--epochs", "60", "--lr", "0.05", "--results_dir", str(tmp_path / "r")]
    accuracies = []
    for more in ([str(plain)], [str(theirs), "--whitened"]):
        assert train.main([*more, *argv]) == 0
        accuracies.append(last_json(capsys)["accuracy_mean"])
    assert accuracies[0] > 30 and accuracies[1] == pytest.approx(accuracies[0], abs=1)
    refused(train.main, [str(theirs), *argv, "--normalized"], "ZCA-whitened", status=1, unchanged=tmp_path)


# --- --classes --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def animals(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    root = image_folder(tmp_path_factory.mktemp("animals"), {"cat": 4, "cow": 4, "dog": 4}, shape=(8, 8))
    return Dataset("folder", device=CPU, image_folder=root)


THREE = torch.tensor([0, 0, 1, 1, 2, 2])
FEW = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_the_order_of_a_folder_s_classes_is_told_and_can_be_said(animals: Dataset, said: Said) -> None:
    assert torch.equal(read(FEW, animals, THREE).labels, THREE)
    assert (
        "label 0 is taken for 'cat', 1 for 'cow', 2 for 'dog' (class order: alphabetical; --classes"
        in said(logging.INFO)[0]
    )
    for classes in (["dog,cat,cow"], ["dog", "cat", "cow"]):
        assert read(FEW, animals, THREE, classes=classes).labels.tolist() == [2, 2, 0, 0, 1, 1]
    logits = torch.eye(3)[THREE] * 5 - 1
    found = read(FEW, animals, THREE, soft=logits, classes=["dog,cat,cow"])
    assert found.soft is not None and torch.equal(found.soft.argmax(1), found.labels)
    torch.testing.assert_close(found.soft[0], logits[0].softmax(0)[[1, 2, 0]])
    two = read(FEW, animals, THREE.clamp(max=1), soft=torch.eye(2)[THREE.clamp(max=1)], classes=["dog,cat"])
    assert set(two.labels.tolist()) == {0, 2} and two.soft is not None and two.soft.shape == (6, 3)
    with pytest.raises(UserError, match="a label 2, but 2 classes are named"):
        read(FEW, animals, THREE, classes=["dog,cat"])
    for wrong in (["dog,cat,bat"], ["dog,dog,cat"]):
        with pytest.raises(UsageError, match=r"--classes: .*; its classes are cat, cow, dog, to be given in the order"):
            read(FEW, animals, THREE, classes=wrong)


def test_a_card_s_classes_are_matched_by_name(animals: Dataset) -> None:
    def order(*names: object) -> list[int] | None:
        return class_order(SetFile(THEIRS, FEW, THREE, card={"class_names": list(names)}), animals)

    assert order("cat", "cow", "dog") in (None, [0, 1, 2]) and order("dog", "cat", "cow") == [2, 0, 1]
    for other in (("cat", "cow"), ("cat", "cow", "bat"), ("cat", "cat", "dog"), ("cat", "cow", 3)):
        with pytest.raises(UserError, match=r"--image_folder .*has other classes than the set"):
            order(*other)


def test_names_are_ready_to_paste(animals: Dataset) -> None:
    assert as_words(["dog", "T-shirt"]) == "dog,T-shirt"
    assert as_words(["tench, Tinca tinca", "it's"]) == "'tench, Tinca tinca' 'it'\"'\"'s'"
    assert named_classes(["cow, cat"], animals) == [1, 0]


def test_a_confusion_matrix_shows_the_order_of_the_classes(animals: Dataset) -> None:
    good = torch.tensor([[8, 1, 1], [2, 7, 1], [0, 2, 8]])
    rolled = good[[2, 0, 1]]  # true by predicted: label 0 is right for class 1
    (warning,) = order_warnings({"convnet2": rolled}, {"convnet2": 70.0}, animals, None)
    assert "class order" in warning and "76.7 %" in warning and warning.endswith("--classes cow,dog,cat")
    (again,) = order_warnings({"convnet2": rolled}, {}, animals, ["dog,cat,cow"])
    assert again.endswith("--classes cat,cow,dog") and "that of --classes" in again
    for matrix, random in ((good, 20.0), (rolled, 97.0), (torch.tensor([[4, 3, 3], [3, 3, 4], [3, 4, 3]]), 50.0)):
        assert order_warnings({"convnet2": matrix}, {"convnet2": random}, animals, None) == []


def test_a_set_in_another_order_is_recognised(digits: Dataset, tmp_path: Path, said: Said) -> None:
    order = torch.tensor([3, 1, 4, 0, 5, 9, 2, 6, 8, 7])  # the label of every class
    torch.save([real(digits), order[LABELS]], tmp_path / "x.pt")
    argv = [*ALONE, "--epochs", "80", "--lr", "0.05", "--results_dir", str(tmp_path / "r")]
    assert train.main([str(tmp_path / "x.pt"), *argv]) == 0
    (warning,) = [text for text in said(logging.WARNING) if "class order" in text]
    assert warning.endswith("--classes 3,1,6,0,2,4,7,9,8,5")


# --- --resume_from ----------------------------------------------------------------------------------------------------


def resumed(results: Path, file: Path, *more: str) -> list[str]:
    return quick(results, "--ipc", "5", "--niter", "41", "--tag", "x", "--resume_from", str(file), *more)


def test_a_run_begins_from_anybody_s_set(digits: Dataset, tmp_path: Path, said: Said) -> None:
    shuffle = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    file = tmp_path / "data40.pt"  # as IDC calls it
    torch.save([named("data", digits)(real(digits))[shuffle].permute(0, 2, 3, 1), LABELS[shuffle]], file)
    refused(condense.main, resumed(tmp_path, file), "--normalized fits", status=1, unchanged=tmp_path)
    argv = resumed(tmp_path, file, "--normalized", "--lr_img", "1e-9")
    assert condense.main(argv) == 0
    assert any("after its outer iteration 40" in text for text in said(logging.INFO))
    images, labels = read_tensors(tmp_path / "digits" / "convnet2_f1_ipc5_x" / "data.pt", "")
    assert torch.equal(labels, LABELS)
    for c in range(10):
        own = real(digits)[c == LABELS].flatten(1)
        assert torch.cdist(images[labels == c].flatten(1), own).min(1).values.max() < 1e-3
    before = tree(tmp_path)
    assert condense.main(argv) == 0 and tree(tmp_path) == before


def test_sets_without_a_number_begin_at_iteration_0(digits: Dataset, tmp_path: Path, said: Said) -> None:
    torch.save([real(digits) * 1.1, LABELS], tmp_path / "theirs.pt")
    assert condense.main(resumed(tmp_path, tmp_path / "theirs.pt", "--niter", "1")) == 0
    assert any("range from 0 to 1.1; clamped to [0, 1]" in text for text in said(logging.WARNING))
    assert any("after its outer iteration 0" in text for text in said(logging.INFO))


def test_what_no_run_can_begin_from_is_refused(digits: Dataset, tmp_path: Path) -> None:
    torch.save([real(digits)[:-1], LABELS[:-1]], tmp_path / "theirs.pt")
    argv = resumed(tmp_path, tmp_path / "theirs.pt")
    refused(condense.main, argv, "its classes have 4 to 5 images", status=1, unchanged=tmp_path)
    for flag in ("--normalized", "--whitened", "--classes=a,b"):
        refused(condense.main, quick(tmp_path, flag), "--resume_from", status=2, unchanged=tmp_path)
    assert condense.main(quick(tmp_path)) == 0
    own = quick(tmp_path, "--tag", "x", "--normalized", "--resume_from", str(tmp_path / "digits" / "convnet2_f1_ipc1"))
    refused(condense.main, own, "leave --normalized out", status=2, unchanged=tmp_path)
