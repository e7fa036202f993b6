"""Whatever a command line says: it is understood exactly, or refused in one line that names a flag."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import string
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

import condense
from tests.faults import hostile
from tests.faults.fuzz import CARD, Property, both, in_one_line
from tests.files import image_folder
from utils.config import resolve
from utils.config.flags import make_parser
from utils.config.options import CondenseOptions, TrainOptions
from utils.config.presets import DATASET_SETTINGS
from utils.system.errors import UserError, printable


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a folder of photos in it."""
    image_folder(tmp_path / "photos", {"cat": 1, "dog": 1})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging.getLogger("dream"), "disabled", True)
    return tmp_path


# --- Lines, and what they mean ----------------------------------------------------------------------------------------

FIELDS = {kind: {f.name: f for f in dataclasses.fields(kind)} for kind in (CondenseOptions, TrainOptions)}
RIGHT = {  # values that pass a flag's own parser, some of which are beyond all measure
    "net_type": ["convnet", "convnet2", "resnet10", "resnet_ap", "vgg11", "alexnet"],
    "init": ["noise", "mix", "random"],
    "aug_type": ["color_flip", "none"],
    "eval_aug_type": ["color_crop_rotate", ""],
    "tag": ["a", "b-1"],
    "image_folder": ["photos"],
    "table": ["x.md", "y.csv"],
    "width": ["8", "16", "1000000000", "65536"],
    "depth": ["1", "2", "1000000", "18"],
    "factor": ["1", "2", "1000000000"],
    "ipc": ["1", "10", "1000000000000"],
    "batch_syn_max": ["1", "64", "1000000000000"],
    "size": ["8", "32", "16384"],
}
NUMBERS = ["1", "2", "3", "10", "0.5", "1e-3", "32", "128"]
TEXTS = st.one_of(
    st.sampled_from(range(len(hostile.TEXTS))).map(lambda i: hostile.TEXTS[i]),  # which are too long to be shown
    st.text(st.characters(min_codepoint=1, exclude_categories=["Cs"]), max_size=12),
    st.text(string.digits + "+-._eE", max_size=6),
)
STRAY = ["--unknown", "--unknown=5", "--ip", "-z", "--ipc", "-h", "--help"]


@dataclass
class Line:
    """A command line, and what it says: flags with their texts in order; None where that cannot be known."""

    words: list[str] = field(default_factory=list)
    said: list[tuple[str, list[str]]] | None = field(default_factory=list)


@st.composite
def lines(draw: st.DrawFn, kind: type[Any], *often: str) -> Line:
    """Flags in every spelling with values of every kind, and now and then a word that belongs nowhere."""
    line, fields = Line(), FIELDS[kind]
    names = st.sampled_from([*often, *(name for name in fields if name != "run")])
    for name in draw(st.lists(names, max_size=7)):
        add(draw, line, fields[name])
    if draw(st.integers(0, 9)) == 9:
        line.words.insert(draw(st.integers(0, len(line.words))), draw(TEXTS | st.sampled_from(STRAY)))
        line.said = None
    return line


def add(draw: st.DrawFn, line: Line, f: dataclasses.Field[Any]) -> None:
    """One more flag."""
    right = st.sampled_from(RIGHT.get(f.name) or list(f.metadata["choices"] or NUMBERS))
    spelt = f"--{f.name.replace('_', '-') if draw(st.booleans()) else f.name}"
    texts: list[str] = []
    if f.default is False:
        line.words.append(spelt)
    else:
        texts.append(draw(TEXTS if draw(st.integers(0, 7)) == 7 else right))
        if draw(st.booleans()):
            line.words.append(f"{spelt}={texts[0]}")
        else:
            texts += draw(st.lists(right, max_size=2)) if f.metadata["nargs"] == "+" else []
            line.words += [*(f.metadata["names"][:1] or [spelt]), *texts]
            if any(text.startswith("-") for text in texts):  # argparse takes it for a flag, or for a number
                line.said = None
    if line.said is not None:
        line.said.append((f.name, texts))


def meant(line: Line, kind: type[Any]) -> dict[str, Any] | None:
    """The options that a line gives by its flags' own parsers, the last of a flag winning; None if one refuses."""
    found: dict[str, Any] = {}
    for name, texts in line.said or []:
        f = FIELDS[kind][name]
        try:
            values = [f.metadata["parse"](text) for text in texts]
        except Exception:
            return None
        if "--" in texts or (f.metadata["choices"] and not set(values) <= set(f.metadata["choices"])):
            return None
        found[name] = True if f.default is False else values if f.metadata["nargs"] == "+" else values[0]
    return found


# --- What must hold ---------------------------------------------------------------------------------------------------


def read_line(line: Line, kind: type[Any]) -> dict[str, Any] | None:
    """What the parser makes of a line: exactly what its flags' own parsers say, or a refusal, which gives None."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            given = make_parser(kind, "").parse_given(line.words)
    except UserError as error:
        assert "-" in in_one_line(error) and error.status == 2
        assert line.said is None or meant(line, kind) is None, error
        return None
    except SystemExit as stop:
        assert stop.code == 0 and line.said is None  # --help
        return None
    assert line.said is None or given == meant(line, kind)
    return given


def check_condense(place: Path, line: Line) -> None:
    given = read_line(line, CondenseOptions)
    if given is not None:
        try:
            resolved = dataclasses.asdict(resolve.condense_options(given).options)
        except UserError as error:
            assert "-" in in_one_line(error) and error.status == 2
        else:
            assert {name: resolved[name] for name in given} == given


def check_train(place: Path, example: tuple[Line, dict[str, Any] | None]) -> None:
    line, card = example
    given = read_line(line, TrainOptions)
    if given is not None:
        try:
            resolved = dataclasses.asdict(resolve.train_options(given, card, Path("data.json")))
        except UserError as error:
            assert "-" in in_one_line(error) and error.status == 2
        else:
            assert {name: resolved[name] for name in given} == given


def check_dry_run(place: Path, example: tuple[Line, str]) -> None:
    """A dry run shows what was said, or refuses, and leaves nothing behind."""
    line, dataset = example
    before, shown = set(place.rglob("*")), io.StringIO()
    last = {"dataset": dataset, "results_dir": "results", "device": "cpu"}
    if dataset == "folder":
        last["image_folder"] = "photos"
    try:
        with contextlib.redirect_stdout(shown):
            argv = [*line.words, "--dry_run", *(f"--{name}={value}" for name, value in last.items())]
            assert condense.main(argv) == 0
    except UserError as error:
        in_one_line(error, "-")
    except SystemExit as stop:
        assert stop.code == 0
    else:
        rows = shown.getvalue().splitlines()
        assert all(map(str.isprintable, rows))
        for name, value in {**(meant(line, CondenseOptions) or {}), **last}.items():
            assert f"{name:16}{printable(str(value)):41} flag" in rows
    assert set(place.rglob("*")) == before


SIZES = ["ipc", "factor", "width", "depth", "net_type", "norm_type", "match", "decode_type", "batch_syn_max"]
PROPERTIES = {
    "condense": Property(check_condense, lines(CondenseOptions), few=40, many=4000),
    "train": Property(check_train, st.tuples(lines(TrainOptions), st.sampled_from([None, CARD])), few=30, many=2500),
    "a dry run": Property(
        check_dry_run,
        st.tuples(lines(CondenseOptions, *SIZES * 4, "reproduce"), st.sampled_from(list(DATASET_SETTINGS))),
        few=25,
        many=1500,
    ),
}


test_a_few_lines_are_understood_exactly_or_refused, test_many_lines_are = both(PROPERTIES, "a hostile command line")


@pytest.mark.parametrize("kind", FIELDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("flag", ["--dataset=--", "--ipc=--", "-f=--", "--aug_type=--", "--eval-aug-type=--"])
def test_two_dashes_are_no_value(flag: str, kind: type[Any]) -> None:
    if flag.startswith("--aug") and kind is TrainOptions:
        flag = "--table=--"
    with pytest.raises(UserError, match="'--' is no value"):
        make_parser(kind, "").parse_given([flag])
    with pytest.raises(UserError, match="'--' is no value"):  # nor one that a later flag may hide
        make_parser(kind, "").parse_given(["--dataset=--", "-d", "mnist"])


def test_after_two_dashes_a_name_stays_as_it_is() -> None:
    given = make_parser(TrainOptions, "").parse_given(["--ipc=3", "--", "--my-set.pt"])
    assert given == {"ipc": 3, "run": ["--my-set.pt"]}
