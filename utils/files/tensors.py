"""Files of torch.save, read without trust: torch.load with weights_only=True, after what it does not look at.

    content = load(Path("data.pt"))     # tensors, numbers, texts, and lists, tuples and dicts of them

torch.load compares none of the checksums that torch.save writes. And a pickle is a program: weights_only=True runs no
code of the file's, but some of PyTorch's and Python's with whatever arguments the file says, such as bytearray(2**40).
"""

from __future__ import annotations

import io
import pickletools
import stat
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils.files.atomic import write_atomically
from utils.system.errors import UserError, first_line

ORDERED = "collections OrderedDict"
STORAGES = ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
NAMES = {  # all that plain tensors need
    ORDERED,
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    *(f"torch {kind}Storage" for kind in STORAGES),
}
EXPANDED, SMALL = 4, 2**22  # so many times its file's bytes may a tensor have, as grey images that show as colour
PUT, GET = ("BINPUT", "LONG_BINPUT"), ("BINGET", "LONG_BINGET")
NEVER = ("STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "BUILD", "EXT1", "EXT2", "EXT4", "MEMOIZE", "PUT", "GET")


class Refused(ValueError):
    """The file has objects other than tensors, numbers, texts, lists, tuples and dicts; says which."""


def load(path: Path) -> Any:
    """Raises Refused, OSError, or what zipfile, pickletools and PyTorch say of damage: any Exception."""
    if not stat.S_ISREG(path.stat().st_mode):  # a pipe would have us wait
        raise ValueError("no regular file")
    with open(path, "rb") as file:
        if file.read(4) != b"PK\3\4":
            raise ValueError("no zip archive, as torch.save makes since PyTorch 1.6; bare pickles are refused")
    copy, program = verified(path)
    verify_program(program)
    return torch.load(copy, map_location="cpu", weights_only=True)


def verified(path: Path) -> tuple[io.BytesIO, bytes]:
    """A file of torch.save once more, and the pickle in it. Raises ValueError and zipfile's errors unless it is whole.

    The copy holds what has been looked at and nothing else: PyTorch's own reader may find other entries in the original
    file than Python's, which takes another of two directories and tells `data.pkl` from `DATA.PKL`.
    """
    copy = io.BytesIO()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(copy, "w") as whole:
        inside = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in inside):
            raise ValueError("its entries are compressed, which torch.save never does")
        if len({entry.filename.lower() for entry in inside}) < len(inside):
            raise ValueError("two of its entries have the same name")
        if sum(entry.file_size for entry in inside) > path.stat().st_size:
            raise ValueError("its entries overlap")
        programs = []
        for entry in inside:
            content = archive.read(entry)  # which compares the checksum
            whole.writestr(entry.filename, content)
            if entry.filename.endswith("data.pkl"):
                programs.append(content)
    if len(programs) != 1:
        raise ValueError("it has no data.pkl, or several")
    copy.seek(0)
    return copy, programs[0]


def verify_program(program: bytes) -> None:
    """Raises Refused when a pickle names anything else than plain tensors and empty ordered dictionaries."""
    named, kept = False, set()  # whether OrderedDict has just been named, and where else that name is kept
    for instruction, argument, _ in pickletools.genops(program):
        what = instruction.name
        if what in NEVER:
            raise Refused(f"instruction {what}")
        if what == "GLOBAL" and argument not in NAMES:
            raise Refused(str(argument).replace(" ", ".")[:100])
        if named and what in PUT:
            kept.add(argument)
        elif named and what != "EMPTY_TUPLE":  # of a tensor with a row for every second of the universe, say
            raise Refused("an ordered dictionary of something")
        else:
            kept -= {argument} if what in PUT else set()
            named = argument in kept if what in GET else (what, argument) == ("GLOBAL", ORDERED)


def is_plain(x: object) -> bool:
    """Whether it is a dense tensor of numbers that its file really holds, and not a few that stand for any number."""
    if type(x) not in (Tensor, nn.Parameter):
        return False
    assert isinstance(x, Tensor)
    dense = x.layout == torch.strided and x.device.type == "cpu" and not (x.is_nested or x.is_neg() or x.is_conj())
    return dense and x.nbytes <= max(EXPANDED * x.untyped_storage().nbytes(), SMALL)


def write_tensors(path: Path, content: Any, *, previous: Path | None = None) -> None:
    """torch.save, atomically and with the same bytes for the same content; `previous` as in write_atomically."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, buffer.getvalue(), previous=previous)


def read_tensors(path: Path, remedy: str) -> Any:
    """What write_tensors wrote; no code from the file is run, and its checksums are compared. Raises UserError with the
    remedy for anything unreadable."""
    try:
        return load(path)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; {remedy}") from error
    except Refused as error:
        raise UserError(
            f"{path}: holds pickled objects other than tensors, which could run code: refused ({error}); {remedy}"
        ) from error
    except Exception as error:  # zip, pickle and storage errors of any kind
        raise UserError(f"{path}: is truncated or damaged ({first_line(error)}); {remedy}") from error
