"""Files that look like distilled sets and are not, made byte by byte, and values that nobody expects."""

from __future__ import annotations

import io
import json
import pickle
import struct
import tarfile
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

TEXTS = [
    "", " ", "-", "--", "---", "--help", "-h", "-1", "-0.0", "0", "1", "8", "nan", "inf", "-inf", "1e999", "1e308",
    "5e-324", "0.999999", str(2**31), str(2**63 - 1), str(2**63), "1" + "0" * 9, "1" + "0" * 12, "9" * 4300, "9" * 5000,
    "-" + "9" * 30, "\u0663", "\uff11\uff12", "1_0", " 7 ", "0x10", "1,5", "True", "None", "\x1b[31mred", "a\nb", "\r",
    "\t", "\x7f", "\u202eabc", "\u2028", "\udcff\udc80", "..", ".", "/", "/dev/null", "/dev/zero", "~", "%s%n", "{}",
    "%(prog)s", "a" * 300, "a" * 100_000, "\u00e4" * 300, "convnet3", "convnet" + "9" * 30, "convnet" + "9" * 5000,
    "resnet18", "resnet34", "vgg11", "alexnet5", "densenet", "mnasnet0_5", "all", "none", "mix", "photos", "=", "a=b",
    "@file", "color_crop", "_".join(["flip"] * 3000), "x.md", "x" * 5000 + ".md", "x" * 5000 + "/y.md", "\x01.csv",
    "no/x.json", "folder",
]  # fmt: skip
VALUES: list[Any] = [  # of JSON
    None, True, False, 0, 1, 3, -1, 2**31, 2**63, 10**400, 0.5, 1e308, torch.nan, torch.inf, "", " ", "1", "--",
    "--help", "convnet", "resnet18", "all", "digits", "folder", "single", "/etc", "\x1b[2J", "a\nb", "\ud800",
    "9" * 4400, [], {}, [1], ["convnet"], [[["x"]]], {"a": 1}, {"mean": [0.5], "std": [0]}, {"mean": [], "std": []},
    {"net_type": ["x"]},
]  # fmt: skip

# --- Zip archives -----------------------------------------------------------------------------------------------------

Entries = list[tuple[str, bytes, int]]  # name, content, compression, in order
# Where the archive's directory says what of an entry, and in how many bytes.
PLACES = {"flags": (8, 2), "method": (10, 2), "crc": (16, 4), "packed": (20, 4), "size": (24, 4), "start": (42, 4)}


def saved(content: object, **settings: Any) -> bytes:
    """What torch.save writes."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about storages of quantised tensors and the like
        torch.save(content, buffer, **settings)
    return buffer.getvalue()


def entries(content: bytes) -> Entries:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return [(entry.filename, archive.read(entry), zipfile.ZIP_STORED) for entry in archive.infolist()]


def zipped(inside: Entries) -> bytes:
    """An archive of these entries, whatever they are called and however often."""
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w") as archive:
        warnings.simplefilter("ignore")  # about two of the same name
        for name, content, compression in inside:
            archive.writestr(name, content, compression)
    return buffer.getvalue()


def with_program(content: bytes, program: bytes) -> bytes:
    """A file of torch.save with another pickle in it, and the right checksums."""
    return zipped([(n, program if n.endswith("data.pkl") else c, z) for n, c, z in entries(content)])


def directory_says(content: bytes, which: int, what: str, value: int) -> bytes:
    """The archive with one number of one entry of its directory replaced."""
    starts = [at for at in range(len(content)) if content.startswith(b"PK\1\2", at)]
    offset, size = PLACES[what]
    at = starts[which % len(starts)] + offset
    return content[:at] + (value % 2 ** (8 * size)).to_bytes(size, "little") + content[at + size :]


def with_two_directories(shown: bytes, hidden: bytes) -> bytes:
    """Both files of torch.save in one: Python's reader of zip archives finds the first, PyTorch's the second.

    The record of a directory for archives beyond 4 GB stands before the end, and once more wherever the end says; one
    reader looks here, the other there.
    """
    record, locator, end = (shown.rfind(mark) for mark in (b"PK\6\6", b"PK\6\7", b"PK\5\6"))
    size, start = struct.unpack("<QQ", shown[record + 40 : record + 56])
    other = zipped(entries(hidden))
    count, other_size, other_start = struct.unpack("<HII", other[-12:-2])
    directory, at = bytearray(other[other_start : other_start + other_size]), 0
    while at < other_size:  # entries lie further back than they did
        lengths, (offset,) = (
            struct.unpack("<HHH", directory[at + 28 : at + 34]),
            struct.unpack_from("<I", directory, at + 42),
        )
        struct.pack_into("<I", directory, at + 42, offset + record)
        at += 46 + sum(lengths)
    both = shown[:record] + other[:other_start] + directory
    place = len(both)
    both += struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, count, count, other_size, record + other_start)
    first = len(both)
    both += shown[start : start + size] + shown[record : record + 48] + struct.pack("<Q", first)
    return both + shown[locator : locator + 8] + struct.pack("<Q", place) + shown[locator + 16 : end] + shown[end:]


# --- Pickles ----------------------------------------------------------------------------------------------------------


def number(value: int) -> bytes:
    """The instruction that puts a whole number on the stack."""
    content = pickle.encode_long(value)
    return b"\x8a" + bytes([len(content)]) + content


def text(value: str) -> bytes:
    content = value.encode()
    return b"X" + struct.pack("<I", len(content)) + content


def named(name: str) -> bytes:
    """Something of a module, such as `builtins.bytearray`."""
    module, _, member = name.rpartition(".")
    return f"c{module}\n{member}\n".encode()


def called(name: str, *arguments: bytes) -> bytes:
    return named(name) + (b"(" + b"".join(arguments) + b"t" if arguments else b")") + b"R"


def tensor(
    kind: str = "FloatStorage",
    key: str = "0",
    count: int = 384,
    offset: int = 0,
    shape: Sequence[int] = (6, 1, 8, 8),
    stride: Sequence[int] = (64, 64, 8, 1),
) -> bytes:
    """A tensor as torch.save writes it, of whatever it is told."""
    storage = b"(" + text("storage") + named(f"torch.{kind}") + text(key) + text("cpu") + number(count) + b"tQ"
    sizes = [b"(" + b"".join(map(number, numbers)) + b"t" for numbers in (shape, stride)]
    return called(
        "torch._utils._rebuild_tensor_v2", storage, number(offset), *sizes, b"\x89", called("collections.OrderedDict")
    )


def program(*items: bytes) -> bytes:
    """A pickle of a list."""
    return b"\x80\x02](" + b"".join(items) + b"e."


_HIDING = b"}" + text("detach") + number(5) + b"s"  # a tensor's state, with an attribute in place of a method
# In place of a tensor; torch.load with weights_only=True follows the first six.
FORBIDDEN = {
    "all memory": called("builtins.bytearray", number(2**40)),
    "much memory": called("builtins.bytearray", number(2**31)),
    "a large tensor": called("torch.FloatTensor", number(2**34)),
    "a tensor's attribute": called("torch._utils._rebuild_parameter_with_state", tensor(), b"\x89N", _HIDING),
    "a tensor of another type": called(
        "torch._tensor._rebuild_from_type_v2",
        named("torch._utils._rebuild_tensor_v2"), named("torch.Tensor"), b")", _HIDING,
    ),
    "a tensor's many rows": called("collections.OrderedDict", tensor(shape=(2**19, 2), stride=(0, 0))),
    "NumPy's objects": called("numpy.dtype", text("O8"), b"\x89", b"\x88"),
    "another encoding": called("_codecs.encode", text("x"), text("rot13")),
    "a shell": called("os.system", text("true")),
    "Python": called("builtins.eval", text("1")),
    "a wrapper": called("torch._utils._rebuild_wrapper_subclass", named("torch.Tensor")),
}  # fmt: skip


def tarred(pickled: bytes) -> bytes:
    """The format of PyTorch's first months."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:", format=tarfile.PAX_FORMAT) as archive:
        for name in ("storages", "tensors", "pickle"):
            member = tarfile.TarInfo(name)
            member.size = len(pickled)
            archive.addfile(member, io.BytesIO(pickled))
    return buffer.getvalue()


# --- JSON and safetensors ---------------------------------------------------------------------------------------------


def as_json(content: object) -> bytes:
    return json.dumps(content).encode()


def safe(header: object, body: bytes, length: int | None = None) -> bytes:
    """A .safetensors file with a header that may be bytes or anything that JSON can say, and a length that may lie."""
    raw = header if isinstance(header, bytes) else as_json(header)
    return struct.pack("<Q", len(raw) if length is None else length) + raw + body


def described(dtype: str, shape: Sequence[int], start: int, end: int) -> Mapping[str, object]:
    """A tensor in such a header."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


# --- Damage -----------------------------------------------------------------------------------------------------------

WOUNDS = ("flip", "cut", "drop", "insert", "zero", "turn", "number")
NUMBERS = [0, 1, 2, 255, 256, 2**15, 2**16 - 1, 2**16, 2**24, 2**31 - 1, 2**31, 2**32 - 1]


def damaged(content: bytes, wounds: Sequence[tuple[str, float, int]]) -> bytes:
    """The content after wounds, each at a place (a share of the length) and of a size."""
    for kind, where, amount in wounds:
        at, data = int(where * len(content)), bytearray(content)
        if kind == "flip" and data:
            data[at] ^= 1 << amount % 8
        elif kind == "cut":
            del data[at:]
        elif kind == "drop":
            del data[at : at + amount]
        elif kind == "insert":
            data[at:at] = bytes(amount % 1000)
        elif kind == "zero":
            data[at : at + amount] = bytes(len(data[at : at + amount]))
        elif kind == "turn":
            data = data[at:] + data[:at]
        elif kind == "number":  # of two or four bytes, in either order
            value, width = NUMBERS[amount % len(NUMBERS)], 2 + 2 * (amount % 3 > 0)
            order: Literal["little", "big"] = "little" if amount % 2 else "big"
            data[at : at + width] = (value % 2 ** (8 * width)).to_bytes(width, order)
        content = bytes(data)
    return content
