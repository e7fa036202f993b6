"""Whatever a stranger's file holds: it is a set with everything in its range, or refused in one line that names it."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import reject
from hypothesis import strategies as st
from torch import Tensor, nn

import train
from data import Dataset
from tests.faults import hostile
from tests.faults.fuzz import CARD, Property, both, in_one_line, little_memory
from tests.files import Payload, noise
from utils.config import resolve
from utils.config.options import CondenseOptions, TrainOptions
from utils.files import atomic, untrusted
from utils.runs import card as cards
from utils.runs import formats
from utils.runs import sets as exchange
from utils.runs.checkpoint import read_earlier
from utils.runs.layout import factor_warning
from utils.system.errors import UserError, printable

FAULT = "a hostile or damaged file of a stranger"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, beside which nothing may appear."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setattr(logging.getLogger("dream"), "disabled", True)
    return tmp_path / "cwd"


DIGITS = Dataset("digits", device=torch.device("cpu"))
IMAGES = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([2, 0, 1, 1, 9, 2])
REAL_IMAGES = torch.from_numpy(noise(20, 1, 8, 8))
SOUND = hostile.saved([IMAGES, LABELS])
PLAIN_LABELS = hostile.tensor("LongStorage", "1", 6, 0, (6,), (1,))


def written(place: Path, name: str, content: bytes) -> Path:
    (place / name).write_bytes(content)
    return place / name


def read_set(file: Path, *, normalized: bool = False) -> tuple[Tensor, Tensor] | None:
    """The images and labels in a file, which must be in their range; None if it is refused, naming the file."""
    try:
        images, labels, soft = exchange.interpret(formats.read(file), DIGITS, normalized="data" if normalized else None)
    except UserError as error:
        in_one_line(error, printable(str(file)))
        return None
    assert images.shape[1:] == (1, 8, 8) and images.dtype == torch.float32
    assert images.isfinite().all() and images.min() >= 0 and images.max() <= 1
    assert labels.shape == images.shape[:1] and labels.dtype == torch.int64
    assert labels.min() >= 0 and labels.max() < 10
    if soft is not None:
        assert soft.shape == (len(labels), 10) and soft.isfinite().all() and soft.min() >= 0
        assert (soft.sum(1) - 1).abs().max() < 1e-3
    factor_warning(file, images, REAL_IMAGES, factor=1)
    assert images.numpy().nbytes + labels.numpy().nbytes
    return images, labels


def as_saved_or_refused(file: Path) -> None:
    """What checksums protect is what was saved."""
    found = read_set(file)
    assert found is None or (torch.equal(found[0], IMAGES) and torch.equal(found[1], LABELS))


# --- Damage -----------------------------------------------------------------------------------------------------------

TENSORS = {
    "images": hostile.described("F32", IMAGES.shape, 0, IMAGES.nbytes),
    "labels": hostile.described("I64", LABELS.shape, IMAGES.nbytes, IMAGES.nbytes + LABELS.nbytes),
}
BODY = IMAGES.numpy().tobytes() + LABELS.numpy().tobytes()
SAFE = hostile.safe(TENSORS, BODY)
HEADS = [b"", b"PK\3\4", SOUND[:80], SOUND[-400:], SAFE[:8], SAFE[:100], b"\x80\x02", b"(lp0\n"]
NOISE = st.tuples(st.sampled_from(HEADS), st.binary(max_size=200), st.sampled_from([b"", SOUND[-22:], SOUND[-400:]]))
WOUNDS = st.lists(
    st.tuples(
        st.sampled_from(hostile.WOUNDS), st.floats(0, 1, exclude_max=True), st.integers(0, 7) | st.integers(0, 600)
    ),
    max_size=3,
)
PT_NAMES, SAFE_NAMES = ["x.pt", "x", "x.ckpt"], ["x.safetensors", "x.SafeTensors"]


def check_noise(place: Path, example: tuple[tuple[bytes, ...], str]) -> None:
    read_set(written(place, example[1], b"".join(example[0])))


def check_damage(place: Path, wounds: list[tuple[str, float, int]]) -> None:
    as_saved_or_refused(written(place, "x.pt", hostile.damaged(SOUND, wounds)))


# --- Zip archives and the pickles in them -----------------------------------------------------------------------------

ENTRIES = hostile.entries(SOUND)
PLACE = st.integers(0, len(ENTRIES) - 1)
NAMES = ["x/data/0", "data.pkl", "archive/data.pkl", "archive/DATA.PKL", "ARCHIVE/data/0", "../x", "/", "a/b"]
PACKED = st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
ENTRY = st.one_of(
    st.tuples(
        st.sampled_from([*(name for name, _, _ in ENTRIES), *NAMES]),
        st.sampled_from([*(content for _, content, _ in ENTRIES), bytes(2**22)]) | st.binary(max_size=30),
        PACKED,
    ),
    st.tuples(st.sampled_from(ENTRIES), PACKED).map(lambda drawn: (*drawn[0][:2], drawn[1])),
)
SIZES = st.sampled_from([0, 1, 8, 9, 12, 64, 1536, 2**31, 2**32 - 1]) | st.integers(0, 4000)
ZIPS = st.tuples(
    st.lists(st.tuples(PLACE, st.booleans(), st.lists(ENTRY, max_size=1)), max_size=3),
    st.lists(st.tuples(PLACE, st.sampled_from(sorted(hostile.PLACES)), SIZES), max_size=2),
)


def check_zip(place: Path, example: tuple[list[tuple[int, bool, hostile.Entries]], list[tuple[int, str, int]]]) -> None:
    """An archive with entries removed and others put in their place, and with a directory that lies."""
    inside = list(ENTRIES)
    for at, removed, added in example[0]:
        inside[at : at + removed] = added
    archive = hostile.zipped(inside or ENTRIES)
    for which, what, value in example[1]:
        archive = hostile.directory_says(archive, which, what, value)
    read_set(written(place, "x.pt", archive))


PROGRAM = next(content for name, content, _ in ENTRIES if name.endswith("data.pkl"))
INSTRUCTIONS = [*(bytes([code]) for code in range(256)), *hostile.FORBIDDEN.values()]
ARRAYS = {"images": IMAGES[:, :, :2, :2].numpy(), "labels": LABELS.numpy(), "accuracies": [np.float64(0.5)]}
PROGRAMS = [PROGRAM, *(pickle.dumps(ARRAYS, protocol) for protocol in (2, 4))]
EDITS = st.tuples(
    st.sampled_from(PROGRAMS),
    st.lists(
        st.tuples(st.floats(0, 1), st.integers(0, 4), st.sampled_from(INSTRUCTIONS) | st.binary(max_size=6)),
        min_size=1,
        max_size=3,
    ),
)


def check_pickle(place: Path, example: tuple[bytes, list[tuple[float, int, bytes]]]) -> None:
    """A pickle with instructions removed and others put in their place."""
    program, edits = example
    for where, dropped, inserted in edits:
        at = int(where * len(program))
        program = program[:at] + inserted + program[at + dropped :]
    read_set(written(place, "x.pt", hostile.with_program(SOUND, program)))


SPOTS: list[Callable[[Payload], Any]] = [
    lambda payload: [payload, IMAGES, LABELS],
    lambda payload: [IMAGES, LABELS, payload],
    lambda payload: [IMAGES, [LABELS, {"x": payload}]],
    lambda payload: {payload: [IMAGES, LABELS]},
    lambda payload: payload,
]
FORMS: list[Callable[[Any, int], bytes]] = [
    lambda content, protocol: hostile.saved(content, pickle_protocol=protocol),
    lambda content, protocol: hostile.saved(content, pickle_protocol=protocol, _use_new_zipfile_serialization=False),
    lambda content, protocol: hostile.with_program(SOUND, pickle.dumps(content, protocol)),
    lambda content, protocol: hostile.tarred(pickle.dumps(content, protocol)),
    pickle.dumps,
]
CODE = st.tuples(st.integers(0, 5), st.sampled_from(FORMS), st.sampled_from(SPOTS), st.sampled_from(PT_NAMES))


def check_code(place: Path, example: tuple[int, Callable[..., bytes], Callable[..., Any], str]) -> None:
    """Code in a pickle never runs."""
    protocol, form, spot, name = example
    payload = Payload(place.parent / "ran")
    assert read_set(written(place, name, form(spot(payload), protocol))) is None
    assert not payload.marker.exists()


EXTENTS = st.lists(st.sampled_from([0, 1, 2, 6, 8, 64, 10**6, 2**31, 2**62, 2**63 - 1, 2**64, -1]), max_size=6)
LIES = st.fixed_dictionaries(
    {},
    optional={
        "kind": st.sampled_from([f"{k}Storage" for k in ("Long", "Bool", "Half", "Byte", "QInt8", "X")]),
        "key": st.sampled_from(["1", "2", "../0"]),
        "count": st.sampled_from([6, 0, 1, 192, 768, 1536, 10**9, 2**62, -1]),
        "offset": st.sampled_from([1, -1, 383, 2**40]),
        "shape": st.sampled_from([(3, 1, 8, 8), (10**4, 1, 8, 8), (10**7, 1, 8, 8), (6, 1, 8), (12, 1, 8, 4)])
        | EXTENTS,
        "stride": st.sampled_from([(0, 0, 0, 0), (1, 1, 1, 1), (0, 64, 8, 1), (32, 64, 4, 1)]) | EXTENTS,
    },
)


def check_lies(place: Path, lies: dict[str, Any]) -> None:
    """A tensor that says something else of itself than what its file holds."""
    program = hostile.program(hostile.tensor(**lies), PLAIN_LABELS)
    read_set(written(place, "x.pt", hostile.with_program(SOUND, program)))


# --- Tensors of any kind ----------------------------------------------------------------------------------------------

FLOATS = [torch.float32, torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.uint8]
WHOLE = [torch.int8, torch.int16, torch.int32, torch.int64]
OTHERS = [torch.bool, torch.complex64, torch.float8_e4m3fn, torch.uint16, torch.quint8]
SHAPES = [(6, 1, 8, 8), (6, 3, 8, 8), (6, 1, 28, 28), (0, 1, 8, 8), (6, 64), (), (6,), (6, 10), (6, 3), (6, 1)]
DRESSES: dict[str, Callable[[Tensor], Any]] = {
    "plain": lambda x: x,
    "sparse": lambda x: x.to_sparse(),
    "meta": lambda x: x.to("meta"),
    "nested": lambda x: torch.nested.nested_tensor([x, x]),
    "a parameter": lambda x: nn.Parameter(x, requires_grad=x.is_floating_point()),
    "turned": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "negated when read": torch._neg_view,
    "NumPy's": lambda x: x.numpy(),
    "a list": lambda x: x.tolist(),
}


@dataclass(frozen=True)
class Odd:
    """A tensor, or what passes for one."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    span: tuple[float, float]
    first: float | None
    dress: str

    def made(self) -> Any:
        low, high = self.span
        x = torch.rand(self.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * (high - low) + low
        if self.first is not None:
            x.view(-1)[:1] = self.first
        if self.dtype == torch.quint8:
            return torch.quantize_per_tensor(x.float(), 0.1, 10, self.dtype)
        return DRESSES[self.dress](x.to(self.dtype))


def odd(shapes: Sequence[tuple[int, ...]], dtypes: Sequence[torch.dtype]) -> st.SearchStrategy[Odd]:
    spans = [(0, 1), (0, 1), (0, 9), (-0.1, 1.1), (-3, 3), (0, 255), (0, 1e30), (1e300, 1e308)]
    firsts = [*[None] * 6, torch.nan, torch.inf, -torch.inf, 1.2, -0.1, -1.0, 10.0]
    return st.builds(
        Odd,
        st.sampled_from(shapes),
        st.sampled_from(dtypes),
        st.sampled_from(spans),
        st.sampled_from(firsts),
        st.sampled_from(["plain"] * 9 + ["negated when read"] * 2 + list(DRESSES)),
    )


ANY = odd(SHAPES, [*FLOATS, *WHOLE, *OTHERS])
LIKE_IMAGES, LIKE_LABELS = odd([(6, 1, 8, 8)], FLOATS), odd([(6,), (6,), (6, 10), (6, 3)], [*FLOATS, *WHOLE])
LEAVES = ANY | st.sampled_from([None, 0, "images", b"bytes", True, 2.5, IMAGES, LABELS])
CONTENTS = st.one_of(
    st.tuples(LIKE_IMAGES, LIKE_LABELS),
    st.tuples(LIKE_IMAGES, st.just(LABELS)),
    st.tuples(ANY, ANY),
    LEAVES,
    st.lists(LEAVES | st.lists(LEAVES, max_size=2), max_size=3),
    st.dictionaries(st.sampled_from(["images", "labels"]), LEAVES),
)


def made(content: Any) -> Any:
    if isinstance(content, Odd):
        return content.made()
    if isinstance(content, (list, tuple)):
        return type(content)(map(made, content))
    return {name: made(value) for name, value in content.items()} if isinstance(content, dict) else content


def as_saved(content: Any) -> bytes:
    """What torch.save writes; content that PyTorch can neither make nor save is no example, and does not count."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about nested tensors
            return hostile.saved(made(content))
    except (RuntimeError, TypeError, NotImplementedError):
        reject()


def check_content(place: Path, example: tuple[Any, bool]) -> None:
    read_set(written(place, "x.pt", as_saved(example[0])), normalized=example[1])


# --- What a set says of itself ----------------------------------------------------------------------------------------

ENTRIES_OF_A_CARD = [*CARD, atomic.CHECKSUM, "sessions"]
SETTINGS = [f.name for f in dataclasses.fields(TrainOptions)]
OF_THE_COMMAND = {f.name: f.default for f in dataclasses.fields(TrainOptions)}
for _shared in dataclasses.fields(CondenseOptions):
    OF_THE_COMMAND.pop(_shared.name, None)
SAID: list[dict[str, Any]] = [{}, {"net_type": ["convnet"]}, {"dataset": "digits"}, {"epochs": 7, "normalized": True}]

VALUES = st.one_of(
    st.sampled_from(range(len(hostile.VALUES))).map(lambda i: hostile.VALUES[i]),  # which are too long to be shown
    st.integers() | st.floats() | st.text(max_size=5),
)
JSON = VALUES | st.lists(VALUES, max_size=3) | st.dictionaries(st.text(max_size=3), VALUES, max_size=3)
STATISTICS = st.sampled_from([0.5, 0.25, 0, 1, -1e5, 1e6, 1e7, 1e-7, 5e-324, 1e308, 10**400, True, "1"])
CARDS = st.one_of(
    JSON,
    st.dictionaries(st.sampled_from(ENTRIES_OF_A_CARD), JSON, min_size=1, max_size=2).map(lambda new: {**CARD, **new}),
    st.dictionaries(st.sampled_from(SETTINGS), JSON, min_size=1, max_size=3).map(
        lambda new: {**CARD, "settings": {**CARD["settings"], **new}}
    ),
    st.tuples(STATISTICS, STATISTICS, st.booleans()).map(
        lambda new: {**CARD, "normalization": {"mean": [new[0]], "std": [new[1]]}, "normalized": new[2]}
    ),
).map(hostile.as_json) | st.integers(1, 3000).map(
    lambda n: hostile.as_json({**CARD, atomic.CHECKSUM: ""})[:-1] + b', "x": ' + b"[" * n + b"]" * n + b"}"
)


def resolve_set(file: Path, said: dict[str, Any]) -> None:
    """What a set says of itself is understood, or refused naming the file or a flag; and it says nothing about what
    else the command does."""
    given = {"run": [str(file)], **said}
    try:
        source = train.read_set(given)
        assert source is not None
        o = train.options(given, source)
        resolve.networks(o, given, source.card, Dataset("digits", device=torch.device("cpu")))
    except UserError as error:
        assert printable(str(file)) in in_one_line(error) or error.status == 2
        return
    for name, default in OF_THE_COMMAND.items():
        assert getattr(o, name) == given.get(name, default), name


def check_card(place: Path, example: tuple[bytes, dict[str, Any], bool]) -> None:
    content, said, cut = example
    folder = place / "run"
    folder.mkdir(exist_ok=True)
    written(folder, cards.DATA, SOUND)
    written(folder, cards.CARD, content[: -1 if cut else None])
    read_set(folder)
    resolve_set(folder, said)


ODD_TENSORS = st.fixed_dictionaries({
    "dtype": st.sampled_from(["F32", "I64", "F8_E4M3", "F4", "BOOL", "C64", "U64", "F64", "", "\x1b"]) | JSON,
    "shape": st.lists(st.sampled_from([0, 1, 2, 6, 8, 2**31, 2**63, 2**64, -1, 1.5]), max_size=5) | JSON,
    "data_offsets": st.lists(st.sampled_from([0, 1536, 1584, 1, 2**63, 2**64, -1]), max_size=3) | JSON,
})  # fmt: skip
TWICE = hostile.as_json(TENSORS)[:-1] + b"," + hostile.as_json(TENSORS)[1:]
HEADERS = st.one_of(
    st.dictionaries(st.sampled_from(["images", "labels", "__metadata__", "x"]), JSON, max_size=3),
    st.dictionaries(st.sampled_from(["images", "labels", "x"]), ODD_TENSORS, max_size=3),
    st.sampled_from([b"\xff" * 8, b"", b"[" * 10**5, b'{"images":' * 2000, b"{\xff}", b"{}" + b" " * 999, TWICE]),
)
LENGTHS = st.none() | st.sampled_from([0, 1, 8, 10**6, 10**8, 2**40, 2**63, 2**64 - 1]) | st.integers(0, 400)
METADATA = st.dictionaries(
    st.sampled_from(["card", "card", "format"]), CARDS.map(bytes.decode) | st.text(max_size=9), min_size=1, max_size=2
).map(lambda said: {"__metadata__": said, **TENSORS})
SAFES = st.one_of(
    st.tuples(METADATA, st.none(), st.just([])),
    st.tuples(HEADERS, LENGTHS, st.just([])),
    st.tuples(st.just(TENSORS), st.none(), WOUNDS),
    st.tuples(st.just(TENSORS), LENGTHS, WOUNDS),
)


def check_safetensors(place: Path, example: tuple[tuple[Any, int | None, Any], str, dict[str, Any]]) -> None:
    (header, length, wounds), name, said = example
    file = written(place, name, hostile.damaged(hostile.safe(header, BODY, length), wounds))
    read_set(file)
    resolve_set(file, {**said, "dataset": "digits", "factor": 1})


# --- A state to begin from, with --resume_from ------------------------------------------------------------------------

PIXELS = IMAGES[:, None]  # (classes, ipc, C, H, W)
OPTIONS = {"dataset": "digits", "ipc": 1, "factor": 1, "decode_type": "single"}
STATE: dict[str, Any] = {
    "pixels": PIXELS, "velocity": torch.zeros_like(PIXELS), "it": 3, "seconds": 1.5, "metrics": "",
    "record": json.dumps({"options": OPTIONS, "sessions": []}),
}  # fmt: skip
NUMBERED = [torch.arange(6), torch.tensor([0, 0, 1, 1, 2, 2]), *(torch.full((6,), x) for x in (-1, 10**12, 2**62))]
NUMBERED += [torch.arange(6.0), torch.full((6,), torch.nan), torch.tensor(5), torch.arange(6)[:, None], torch.arange(0)]
LIKE_PIXELS = LIKE_IMAGES | odd([(6, 1, 1, 8, 8), (3, 2, 1, 8, 8), ()], [*FLOATS, *WHOLE])
RECORDS = JSON.map(json.dumps) | st.sampled_from([500, 10**5]).map(lambda n: "[" * n + "]" * n) | JSON
STATES = st.one_of(
    st.tuples(LIKE_PIXELS | st.just(IMAGES), st.sampled_from(NUMBERED) | LIKE_LABELS).map(list),
    CONTENTS,
    st.fixed_dictionaries(
        {},
        optional={
            "pixels": LIKE_PIXELS,
            "velocity": LIKE_PIXELS,
            "it": VALUES,
            "seconds": VALUES,
            "metrics": JSON,
            "record": RECORDS,
        },
    ).map(lambda new: {**STATE, **new}),
)


def check_state(place: Path, example: tuple[Any, str]) -> None:
    content, name = example
    file = written(place, name, as_saved(content))
    try:
        found = read_earlier(file, OPTIONS, DIGITS)
    except UserError as error:
        in_one_line(error, printable(str(file)))
        return
    assert found.pixels.shape == found.velocity.shape and found.pixels.dim() == 5
    assert found.pixels.dtype == found.velocity.dtype == torch.float32
    assert found.pixels.isfinite().all() and found.velocity.isfinite().all()
    assert found.it >= 0 and 0 <= found.seconds < math.inf


# --- All of them ------------------------------------------------------------------------------------------------------

PROPERTIES = {
    "noise": Property(check_noise, st.tuples(NOISE, st.sampled_from(PT_NAMES + SAFE_NAMES)), few=15, many=800),
    "damage": Property(check_damage, WOUNDS, few=20, many=1500),
    "zip entries": Property(check_zip, ZIPS, few=20, many=1200),
    "a pickle's instructions": Property(check_pickle, EDITS, few=20, many=2000),
    "code in a pickle": Property(check_code, CODE, few=15, many=300),
    "tensors that lie": Property(check_lies, LIES, few=15, many=1000),
    "tensors of any kind": Property(check_content, st.tuples(CONTENTS, st.booleans()), few=25, many=2000),
    "data.json": Property(check_card, st.tuples(CARDS, st.sampled_from(SAID), st.booleans()), few=20, many=1500),
    "state": Property(
        check_state, st.tuples(STATES, st.sampled_from(["data_000003.pt", "checkpoint.pt"])), few=25, many=2000
    ),
    "safetensors": Property(
        check_safetensors, st.tuples(SAFES, st.sampled_from(SAFE_NAMES), st.sampled_from(SAID)), few=20, many=1500
    ),
}


test_a_few_files_are_sets_or_refused, test_many_files_are_sets_or_refused = both(PROPERTIES, FAULT)


def test_pickles_are_made_here_like_those_of_torch_save(place: Path) -> None:
    program = hostile.program(hostile.tensor(), PLAIN_LABELS)
    found = read_set(written(place, "x.pt", hostile.with_program(SOUND, program)))
    assert found is not None and torch.equal(found[0], IMAGES) and torch.equal(found[1], LABELS)


@pytest.mark.parametrize("what", hostile.FORBIDDEN)
def test_a_call_that_tensors_do_not_need_is_refused(what: str, place: Path) -> None:
    program = hostile.program(hostile.FORBIDDEN[what], PLAIN_LABELS)
    file = written(place, "x.pt", hostile.with_program(SOUND, program))
    with little_memory(), pytest.raises(UserError, match="which could run code: refused"):
        formats.read(file)


@pytest.mark.parametrize("name", ["archive/DATA.PKL", "Archive/data.pkl"])
def test_a_second_pickle_under_nearly_the_same_name_is_refused(name: str, place: Path) -> None:
    second = hostile.program(hostile.FORBIDDEN["much memory"], PLAIN_LABELS)
    for at in range(len(ENTRIES) + 1):
        file = written(place, "x.pt", hostile.zipped([*ENTRIES[:at], (name, second, 0), *ENTRIES[at:]]))
        with pytest.raises(UserError, match="the same name"):
            formats.read(file)


def test_pytorch_sees_no_other_entries_than_those_that_were_looked_at(place: Path) -> None:
    other = hostile.program(hostile.FORBIDDEN["a tensor's attribute"], PLAIN_LABELS)
    both = hostile.with_two_directories(SOUND, hostile.with_program(SOUND, other))
    file = written(place, "x.pt", both)
    assert torch._C.PyTorchFileReader(str(file)).get_record("data.pkl") == other
    as_saved_or_refused(file)


SPECIAL: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "an endless device": lambda path: path.symlink_to("/dev/zero"),
    "an empty device": lambda path: path.symlink_to("/dev/null"),
    "a circle of links": lambda path: path.symlink_to(path),
    "a folder": os.mkdir,
}


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors", "run/data.pt", "run/data.json"])
@pytest.mark.parametrize("what", SPECIAL)
def test_what_is_no_regular_file_is_refused(what: str, name: str, place: Path) -> None:
    (place / "run").mkdir()
    written(place / "run", cards.DATA, SOUND)
    (place / name).unlink(missing_ok=True)
    SPECIAL[what](place / name)
    found = read_set(place / name.split("/")[0])
    assert found is None or (what, name) == ("a circle of links", "run/data.json")  # which is as good as none


@pytest.mark.parametrize(
    "name", ["x" * 300, "x" * 300 + ".safetensors", "x/" * 3000, "run/data.pt/x", "\x1b[2J\n\udcff.pt"]
)
def test_a_name_that_no_file_has_is_refused(name: str, place: Path) -> None:
    (place / "run").mkdir()
    written(place / "run", cards.DATA, SOUND)
    assert read_set(place / name) is None


def test_a_set_beyond_the_memory_is_refused_before_it_is_read(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = written(place, "x.pt", SOUND)
    monkeypatch.setattr(untrusted, "free_memory", lambda device: IMAGES.nbytes)
    monkeypatch.setattr(formats, "read_tensors", None)
    with pytest.raises(UserError, match=r"x\.pt: needs .* GB of memory"):
        formats.read(file)


@pytest.mark.parametrize("decode_type", ["single", "multi"])
def test_a_set_that_decodes_to_much_is_refused(decode_type: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = [str(written(place, "x.pt", SOUND)), "-d", "digits", "-f", "8", "--decode_type", decode_type]
    monkeypatch.setattr(untrusted, "free_memory", lambda device: 40 * IMAGES.nbytes)
    with pytest.raises(UserError, match=r"x\.pt: needs .* GB of memory.*-f 8"):
        train.main([*argv, "--device", "cpu"])
