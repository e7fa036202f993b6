"""Files of torch.save, read without trust: torch.load with weights_only=True, after checks that it does not make.

    content = load(Path("data.pt"))     # tensors, numbers, strings, and lists, tuples and dicts of them

torch.load ignores the checksums that torch.save writes. And a pickle is a program: with weights_only=True it runs no
code of its own, but some functions of PyTorch's and Python's with any arguments, such as bytearray(2**40).
"""

from __future__ import annotations

import io
import pickletools
import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from utils.files.atomic import write_atomically
from utils.system.device import free_memory
from utils.system.errors import UserError, first_line

ORDERED = "collections OrderedDict"
STORAGES = ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
NAMES = {  # all functions and classes that plain tensors need
    ORDERED,
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    *(f"torch {kind}Storage" for kind in STORAGES),
}
# A tensor may have 4 times the bytes that its file holds, as grey images expanded to colour do, or else up to SMALL.
EXPANDED, SMALL = 4, 2**22
PUT, GET = ("BINPUT", "LONG_BINPUT"), ("BINGET", "LONG_BINGET")
NEVER = ("STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "BUILD", "EXT1", "EXT2", "EXT4", "MEMOIZE", "PUT", "GET")


class Refused(ValueError):
    """The file has objects other than tensors, numbers, strings, lists, tuples and dicts. The message says which."""


def load(path: Path) -> Any:
    """The content of a regular file. Raises Refused, OSError, or for a damaged one any of zipfile's or PyTorch's."""
    with open(path, "rb") as file:
        if file.read(4) != b"PK\3\4":
            raise ValueError("no zip archive, as torch.save makes since PyTorch 1.6; bare pickles are refused")
    copy, program = verified(path)
    verify_program(program)
    return torch.load(copy, map_location="cpu", weights_only=True)


def verified(path: Path) -> tuple[io.BytesIO, bytes]:
    """A copy of a file of torch.save, and the pickle in it. Raises ValueError or zipfile's errors unless it is whole.

    The copy holds nothing but checked entries. PyTorch's own reader could find others in the original file: it takes
    another of two directories than Python's, and does not tell `data.pkl` from `DATA.PKL`.
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
            content = archive.read(entry)  # compares the checksum
            whole.writestr(entry.filename, content)
            if entry.filename.endswith("data.pkl"):
                programs.append(content)
    if len(programs) != 1:
        raise ValueError("it has no data.pkl, or several")
    copy.seek(0)
    return copy, programs[0]


def verify_program(program: bytes) -> None:
    """Raise Refused when a pickle names anything else than plain tensors and empty ordered dictionaries."""
    named, kept = False, set()  # whether OrderedDict was named just now, and the numbers of memos that hold it
    for instruction, argument, _ in pickletools.genops(program):
        what = instruction.name
        if what in NEVER:
            raise Refused(f"instruction {what}")
        if what == "GLOBAL" and argument not in NAMES:
            raise Refused(str(argument).replace(" ", ".")[:100])
        if named and what in PUT:
            kept.add(argument)
        elif named and what != "EMPTY_TUPLE":  # its argument could be an endless tensor, row by row
            raise Refused("an ordered dictionary of something")
        else:
            kept -= {argument} if what in PUT else set()
            named = argument in kept if what in GET else (what, argument) == ("GLOBAL", ORDERED)


def is_plain(x: object) -> TypeGuard[Tensor]:
    """Whether this is a dense tensor on the CPU whose file really holds its numbers, not a few expanded to many."""
    if not isinstance(x, Tensor) or type(x) not in (Tensor, nn.Parameter):
        return False
    dense = x.layout == torch.strided and x.device.type == "cpu" and not (x.is_nested or x.is_neg() or x.is_conj())
    return dense and x.nbytes <= max(EXPANDED * x.untyped_storage().nbytes(), SMALL)


def write_tensors(path: Path, content: Any, *, previous: Path | None = None) -> None:
    """Write like torch.save, atomically, with the same bytes for the same content. previous: see write_atomically."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, buffer.getvalue(), previous=previous)


def read_tensors(path: Path, remedy: str) -> Any:
    """What write_tensors wrote. Runs no code from the file, and compares its checksums. Raises UserError, ending with
    the remedy, for anything unreadable."""
    with readable(path, remedy):
        return load(path)


@contextmanager
def readable(path: Path, remedy: str) -> Iterator[None]:
    """Whatever goes wrong inside, while a file is read, becomes a UserError that ends with the remedy.

    The file must be a regular one: reading a pipe would wait for a writer.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise UserError(f"{path}: is no regular file; {remedy}")
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; {remedy}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or first_line(error)}); {remedy}") from error
    except Refused as error:
        problem = f"holds pickled objects other than tensors, which could run code: refused ({error})"
        raise UserError(f"{path}: {problem}; {remedy}") from error
    except Exception as error:  # zip, pickle and storage errors of any kind
        raise UserError(f"{path}: is truncated or damaged ({first_line(error)}); {remedy}") from error


SPARE_MEMORY = 0.5  # of the free memory: a set is copied once or twice on its way to a network


def must_fit(path: Path, size: int, why: str = "") -> None:
    """Raise UserError when so many bytes do not fit into memory. why: a reason besides the file's own size."""
    free = free_memory(torch.device("cpu"))
    if size > SPARE_MEMORY * free:
        problem = f"needs {size / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free{why}"
        raise UserError(f"{path}: {problem}; it is damaged, not what it should be, or made for a larger machine")
