"""Mistakes of the user and the surroundings: one line with the culprit and the remedy, and nothing half-written."""

from __future__ import annotations

import itertools
import json
import logging
import os
import pickle
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import condense
import train
from models import FAMILIES
from tests.faults.encodings import encoded
from tests.files import Payload, image_folder, last_json, quick, refused, tree
from tests.killing import ROOT
from tests.tally import injected
from utils.config.options import DATASET_SETTINGS
from utils.files.tensors import read_tensors
from utils.method.objectives import METRICS
from utils.method.state import State
from utils.runs import folder as run_module
from utils.system.errors import UserError

FLAGS = ["--inner_loop", "4", "--interval", "2"]
TRAIN = ["--epochs", "1", "--repeat", "1", "--device", "cpu"]
SMALLEST = {"cat": 3, "dog": 5}
RUN = Path("results", "digits", "convnet2_f1_ipc1")  # below the working directory
DATA, CARD = f"{RUN / 'data.pt'}", f"{RUN / 'data.json'}"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on digits."""
    results = tmp_path_factory.mktemp("finished")
    assert condense.main(quick(results, *FLAGS)) == 0
    return results / "digits" / RUN.name


@pytest.fixture
def here(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a copy of the run to spoil at RUN."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, RUN)
    return tmp_path


# --- The table --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mistake:
    """A command that must be refused: with this status, these words (separated by |), and no trace on disk."""

    command: str  # `condense` or `train`, and flags; photos are looked for in photos/, runs in results/
    says: str
    status: int = 2
    prepare: Callable[[], object] = lambda: None  # what there is besides the finished run


def photos(train: dict[str, int] = SMALLEST, test: dict[str, int] | None = None) -> Callable[[], object]:
    return lambda: image_folder(Path("photos"), train, test)


def file(path: str, content: bytes = b"a file") -> Callable[[], object]:
    def write() -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(content)

    return write


def spoilt_image(path: str, kind: str) -> Callable[[], object]:
    def spoil() -> None:
        image_folder(Path("photos"), {str(c): 1 for c in range(10)}, shape=(28, 28))
        if kind == "dangling":
            Path(path).symlink_to("nowhere")
        else:
            Path(path).write_bytes(NO_IMAGES[kind])

    return spoil


NO_IMAGES = {"textual": b"no image", "empty": b"", "truncated": encoded("JPEG RGB", (64, 64))[:3000], "dangling": b""}
NETWORKS, NUMBER = "|".join(FAMILIES), "whole number of 1 or more"
NO_CLASSES = "--image_folder photos|DIR/train/CLASS"
NO_GPU = "--device cuda|--device cpu"
MISTAKES = {
    # Names and numbers
    "an unknown data set": Mistake("condense -d cifar11", "|".join(["-d", "cifar11", *DATASET_SETTINGS])),
    "an unknown metric": Mistake("condense --metric l3", "|".join(["--metric", "l3", *METRICS])),
    "an unknown network": Mistake("condense -n lenet", f"-n|lenet|{NETWORKS}"),
    "a network of an unknown depth": Mistake("condense -n resnet_xy", f"-n|resnet_xy|{NETWORKS}"),
    "an unknown network among others": Mistake(f"train {RUN} -n convnet lenet", f"--net_type|lenet|{NETWORKS}"),
    "a misspelt flag": Mistake("condense --facter 2", "--factor"),
    "a misspelt flag with dashes": Mistake("condense --batch-reel=2", "--batch_real"),
    "a misspelt flag of train.py": Mistake("train --core-set random --ipc 1", "--coreset"),
    **{
        f"{command} {flag} {value}": Mistake(f"{command} {flag} '{value}'", f"{flag}|{NUMBER}")
        for command, flag in (("condense", "--ipc"), ("train", "--factor"))
        for value in ("0", "1.5", "ten", "")
    },
    "a factor larger than the image": Mistake("condense -f 9", "-f 9|8 pixels"),
    "a depth that the image does not allow": Mistake("condense --depth 4", "--depth|8 x 8|1 to 3"),
    **{
        f"a tag {name!r}": Mistake(f"condense --tag '{name}'", "--tag|folder name")
        for name in ("a/b", "../up", "..", "", "a b")
    },
    # Flags that do not go together
    "nothing published": Mistake("condense --reproduce -d digits", "--reproduce|digits|cifar10"),
    "a size that is fixed": Mistake("condense -d cifar10 --size 16", "--size|cifar10"),
    "no image folder": Mistake("condense -d folder", "-d folder|--image_folder"),
    "an image folder for digits": Mistake("condense -d digits --image_folder .", "--image_folder|-d"),
    "classes of another data set": Mistake(
        "condense -d cifar10 --image_folder photos", "--image_folder photos|2 classes|10|-d folder", prepare=photos()
    ),
    "experts that no run needs": Mistake("condense --experts_only", "--experts_only|--networks|mtt"),
    **{
        f"mtt with {flag}": Mistake(f"condense --method mtt {flag}", f"{flag}|trajectory|leave it out")
        for flag in ("--networks early", "--keep 0.5", "--calibrate")
    },
    "nothing kept": Mistake("condense --keep 0", "--keep|number above 0|at most 1"),
    "more than all kept": Mistake("condense --keep 1.5", "--keep|number above 0|at most 1"),
    "frequencies without cf": Mistake("condense --frequencies learned", "--frequencies learned|--match cf|grad"),
    **{
        f"batch norm and {flag}": Mistake(
            f"condense {flag} --norm_type batch --experts_only", f"{flag}|batch norm|--norm_type instance"
        )
        for flag in ("--networks middle", "--keep 0.5", "--calibrate")
    },
    "a coreset without ipc": Mistake("train --coreset random", "--coreset|--ipc"),
    "real images and a coreset": Mistake("train --real --coreset random --ipc 1", "--real|--coreset"),
    "a coreset and a run": Mistake(f"train {RUN} --coreset random --ipc 1", f"--coreset|{RUN}|--baselines"),
    **{
        f"data.json and {flag}": Mistake(f"train {RUN} {flag} {value}", f"{flag} {value}|data.json|{stored}")
        for flag, value, stored in (
            ("--factor", "2", "1"), ("--dataset", "mnist", "digits"), ("--ipc", "3", "1"),
            ("--decode_type", "multi", "single"),
        )
    },
    "a set of unknown origin": Mistake(
        f"train {DATA}", f"{DATA}|data.json|-d|-f", prepare=lambda: os.remove(CARD)
    ),
    "a set of unknown factor": Mistake(
        f"train {DATA} -d digits", f"{DATA}|data.json|-d|-f", prepare=lambda: os.remove(CARD)
    ),
    # Image folders
    "broken files of no folder": Mistake("condense --skip_broken", "--skip_broken|--image_folder"),
    "no such folder": Mistake("condense --image_folder photos", NO_CLASSES, 1),
    "an empty folder": Mistake("condense --image_folder photos", NO_CLASSES, 1, file("photos/.hidden")),
    "no classes": Mistake("condense --image_folder photos", NO_CLASSES, 1, file("photos/train/.hidden")),
    "no images": Mistake("condense --image_folder photos", NO_CLASSES, 1, file("photos/train/cat/.hidden")),
    "no test images": Mistake("condense --image_folder photos", NO_CLASSES, 1, photos(SMALLEST, {})),
    "a file in place of classes": Mistake("condense --image_folder photos", NO_CLASSES, 1, file("photos/train")),
    "a single class": Mistake(
        "condense --image_folder photos", "--image_folder photos|two classes", 1, photos({"cat": 3})
    ),
    "other classes to test": Mistake(
        "condense --image_folder photos", "photos|cow|dog", 1, photos(SMALLEST, {"cat": 1, "cow": 1})
    ),
    **{
        f"{kind} image to {split}, of {dataset}": Mistake(
            f"condense -d {dataset} --image_folder photos", f"{path}|image|remove it", 1, spoilt_image(path, kind)
        )
        for dataset, kind, split in itertools.product(("mnist", "folder --size 28"), NO_IMAGES, ("train", "test"))
        for path in (f"photos/{split}/3/x.jpg",)
    },
    # Folders of runs
    "no distilled set": Mistake("train --results_dir nowhere", "nowhere|condense.py", 1),
    "no such run": Mistake("train typo", "typo|no such", 1),
    "a run without its set": Mistake(f"train {RUN}", f"{DATA}|no such file", 1, lambda: os.remove(DATA)),
    "a file in place of the results": Mistake("condense --results_dir x/y", "x/y|--results_dir", 1, file("x")),
    "another command's folder": Mistake("condense --lr_img 0.1", f"{RUN}|--lr_img|0.1|--tag|--restart"),
    "another command's folder, twice so": Mistake(
        "condense --seed 1 --metric cos", f"{RUN}|--seed|--metric|cos|--tag|--restart"
    ),
    "somebody's folder": Mistake(
        "condense --results_dir a", "a/digits/convnet2_f1_ipc1|--tag",
        prepare=file("a/digits/convnet2_f1_ipc1/thesis.tex"),
    ),
    "CUDA without a GPU": Mistake("condense --device cuda", NO_GPU),
    "CUDA without a GPU, to train": Mistake("train --real --device cuda", NO_GPU),
}  # fmt: skip


def must_refuse(mistake: Mistake, here: Path) -> str:
    command, *words = shlex.split(mistake.command)
    mistake.prepare()
    program = condense.main if command == "condense" else train.main
    argv = quick(Path("results"), *FLAGS, *words) if command == "condense" else [*TRAIN, *words]
    return refused(program, argv, *mistake.says.split("|"), status=mistake.status, unchanged=here)


@pytest.mark.parametrize("what", MISTAKES)
def test_one_line_names_the_culprit_and_the_remedy_and_nothing_is_left_behind_after(what: str, here: Path) -> None:
    if what.startswith("CUDA") and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    message = must_refuse(MISTAKES[what], here)
    assert "folder" not in what or "--batch_real" not in message  # which does not differ


def test_the_program_ends_with_one_line_and_its_status(here: Path) -> None:
    marker = here / "ran"
    torch.save([Payload(marker)], DATA)
    command = [sys.executable, str(ROOT / "train.py"), str(RUN), *TRAIN]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and line.startswith("train.py: error: ") and DATA in line, done
    assert "Traceback" not in done.stdout and not marker.exists()


def test_without_network_nothing_is_left_but_a_hint(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    for main, flags in ((condense.main, quick(Path("new"))), (train.main, ["--real"])):
        with pytest.raises(UserError) as caught:
            main([*flags, "-d", "svhn", "--data_dir", "data"])
        message = str(caught.value)
        assert caught.value.status == 1 and "\n" not in message
        for word in ("train_32x32.mat", "test_32x32.mat", "data", "--data_dir"):
            assert word in message
        assert not Path("new").exists() and not [path for path in Path("data").rglob("*") if path.is_file()]


# --- Small classes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("flags", "word"), [("--batch_real 4", "--batch_real"), ("--batch_real 3 -f 2", "--ipc")])
def test_a_small_class_is_warned_about(flags: str, word: str, here: Path, caplog: pytest.LogCaptureFixture) -> None:
    image_folder(Path("photos"), SMALLEST)
    with caplog.at_level(logging.WARNING, "dream"):
        assert condense.main(quick(Path("results"), "--image_folder", "photos", *flags.split())) == 0
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and "n_data" not in r.msg]
    assert word in warning and "cat" in warning and "3" in warning
    (card,) = Path("results", "folder").rglob("data.json")
    assert json.loads(card.read_text())["finished"] is True
    assert train.main([*TRAIN, str(card.parent)]) == 0


# --- Distilled sets ---------------------------------------------------------------------------------------------------

IMAGES, LABELS = torch.full((10, 1, 8, 8), 0.5), torch.arange(10)
WRONG_SETS: dict[str, Any] = {  # tests/runs/test_exchange.py has more
    "a dictionary": {"images": IMAGES, "accuracy": 0.5},
    "a tensor": IMAGES,
    "three items": [IMAGES, LABELS, LABELS],
    "items that are no tensors": [IMAGES, str(LABELS.tolist())],
    "NaN": [IMAGES * torch.nan, LABELS],
}


def must_refuse_set(here: Path, says: str = "") -> None:
    """With and without data.json beside it."""
    must_refuse(Mistake(f"train {RUN}", f"{DATA}|{says}", 1), here)
    os.remove(CARD)
    must_refuse(Mistake(f"train {DATA} -d digits -f 1", f"{DATA}|{says}", 1), here)


@pytest.mark.parametrize("what", [*WRONG_SETS, 0, 0.5, 0.99])
def test_a_data_file_with_wrong_content_or_cut_short_is_refused(what: str | float, here: Path) -> None:
    if isinstance(what, str):
        torch.save(WRONG_SETS[what], DATA)
    else:
        os.truncate(DATA, int(what * os.path.getsize(DATA)))
    must_refuse_set(here)


@pytest.mark.parametrize("protocol", [None, 2, 5])
def test_code_in_a_data_file_never_runs(protocol: int | None, here: Path) -> None:
    content, marker = Path(DATA), here / "ran"
    if protocol is None:
        torch.save([IMAGES, LABELS, Payload(marker)], content)
    else:
        content.write_bytes(pickle.dumps([IMAGES, LABELS, Payload(marker)], protocol))
    must_refuse_set(here, "refused")
    assert not marker.exists()
    if protocol is None:  # the file would do harm
        torch.load(content, weights_only=False)
    else:
        pickle.loads(content.read_bytes())
    assert marker.exists()


def test_a_file_without_data_json_is_evaluated_by_its_flags(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.remove(CARD)
    assert train.main([*TRAIN, DATA, *shlex.split("-d digits -f 2 --depth 2 --width 8 --json")]) == 0
    assert last_json(capsys)["decoded_per_class"] == 4
    assert Path("results", "digits", "evaluated_data", "eval.json").exists()


# --- data.json --------------------------------------------------------------------------------------------------------

WRONG_TEXTS = [b"", b"{", b"[]", b"null", b"\x00", b'{"dataset": "digits"}', b"\xff\xfe\x00\x80"]
WRONG_ENTRIES: list[dict[str, Any]] = [
    *({name: None} for name in ("dataset", "ipc", "factor", "decode_type", "normalization", "settings")),
    *({"dataset": name} for name in ("imagenet", 5)),
    {"factor": 0},
    {"ipc": "1"},
    {"decode_type": "double"},
    {"normalization": {"mean": [0.5]}},
    {"normalization": {"mean": ["a"], "std": [1]}},
    {"normalization": {"mean": [0], "std": [0]}},
]
WRONG_SETTINGS: list[dict[str, Any]] = [{"epochs": "many"}, {"epochs": 0}, {"lr": "high"}, {"mixup": "maybe"}]


@pytest.mark.parametrize("text", WRONG_TEXTS)
def test_a_damaged_data_json_is_named(text: bytes, here: Path) -> None:
    must_refuse(Mistake(f"train {RUN}", CARD, 1, file(CARD, text)), here)


@pytest.mark.parametrize("wrong", [*WRONG_ENTRIES, *({"settings": s} for s in WRONG_SETTINGS)], ids=str)
def test_a_data_json_with_an_impossible_entry_is_named(wrong: dict[str, Any], here: Path) -> None:
    card = json.loads(Path(CARD).read_text())
    del card["sha256"]
    settings = wrong.get("settings") or {}
    changed = {**wrong, "settings": {**card["settings"], **settings}} if settings else wrong
    Path(CARD).write_text(json.dumps({**card, **changed}))
    (name,) = settings or wrong
    refused(train.main, ["--repeat", "1", "--device", "cpu", str(RUN)], CARD, name, status=1, unchanged=here)


# --- Checkpoints ------------------------------------------------------------------------------------------------------


SPOILT_STATES: dict[str, Callable[[dict[str, Any]], object]] = {
    "has other pixels": lambda state: {**state, "pixels": torch.zeros(3)},
    "has another network": lambda state: {**state, "net": {"other.weight": torch.zeros(3)}},
    "lacks the position": lambda state: {k: v for k, v in state.items() if k != "it"},
}


@pytest.mark.parametrize("what", SPOILT_STATES)
def test_a_checkpoint_with_wrong_content_is_named_in_one_line(what: str, tmp_path: Path) -> None:
    argv = quick(tmp_path, "--inner_loop", "2")
    assert condense.main([*argv, "--max_minutes", "1e-9"]) == 0
    (checkpoint,) = tmp_path.rglob("checkpoint.pt")
    torch.save(SPOILT_STATES[what](read_tensors(checkpoint, "")), checkpoint)
    with pytest.raises(UserError, match=f"{checkpoint.parent}.*--restart") as caught:
        condense.main(argv)
    assert caught.value.status == 1 and "\n" not in str(caught.value)


# --- Numbers that run away --------------------------------------------------------------------------------------------


def test_a_loss_that_is_nan_names_iteration_class_and_settings_and_the_state_to_go_on_from(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"outer iteration \d.*class \d.*--lr_img.*1e\+38.*--resume_from") as caught:
        condense.main(quick(tmp_path, "--lr_img", "1e38", "--inner_loop", "4"))
    assert caught.value.status == 1 and "\n" not in str(caught.value)
    assert json.loads(next(tmp_path.rglob("data.json")).read_text())["outer_iterations"] == 0


POISON: dict[str, Callable[[State], Tensor]] = {
    "loss": lambda state: state.losses[3:5],
    "pixel": lambda state: state.optimizer.pixels[3:5, 0, 0, 0, :1],
    "weight": lambda state: state.net.classifier.weight[:1],
}


@pytest.mark.faults
@pytest.mark.parametrize(("what", "value"), [("loss", torch.nan), ("pixel", torch.inf), ("weight", torch.nan)])
def test_nan_and_infinity_stop_the_run_before_anything_is_overwritten(
    what: str, value: float, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "CHECKPOINT_SECONDS", 0.0)
    argv = quick(tmp_path, *FLAGS)
    folder, before, steps = tmp_path / RUN.relative_to("results"), {}, 0
    original = State.advance

    def advance(state: State, inner_loop: int) -> None:
        nonlocal steps
        if (steps := steps + 1) == 3:
            before.update({name: (folder / name).read_bytes() for name in ("checkpoint.pt", "data.pt", "data.json")})
            with torch.no_grad():
                POISON[what](state).fill_(value)
        original(state, inner_loop)

    where = "in the network" if what == "weight" else "class 3, 4,"
    with injected("NaN or infinity in loss, pixels or network") as fault:
        with monkeypatch.context() as patch:
            patch.setattr(State, "advance", advance)
            says = rf"iteration 1, by inner step 3, {where}.*--lr_img 0.005 .*--lr 0.01 .*--resume_from {folder}"
            with pytest.raises(UserError, match=says) as caught:
                condense.main(argv)
        assert caught.value.status == 1 and "\n" not in str(caught.value)
        assert before == {name: (folder / name).read_bytes() for name in before}
        assert condense.main(argv) == 0
        fault.kept((folder / "data.pt").read_bytes() == (finished / "data.pt").read_bytes())


def test_one_image_per_class_under_batch_norm_is_no_crash(here: Path) -> None:
    before = tree(here)
    try:
        assert condense.main(quick(Path("results"), "-n", "resnet10", "--depth", "10", "--width", "4")) == 0
    except UserError as error:
        assert "norm" in str(error) and tree(here) == before
