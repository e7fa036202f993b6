"""Files of torch.save, and plain pickles, read without trust: no code of theirs runs, whatever they hold.

    content = read_tensors(Path("data.pt"), remedy)     # tensors, numbers, text, and lists, tuples and dicts of them

utils/files/pickles.py follows the pickle; this module finds it and the tensors' numbers in the file, and compares the
checksums, which torch.load ignores.
"""

from __future__ import annotations

import io
import sys
import zipfile
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from utils.files.atomic import write_atomically
from utils.files.pickles import interpret
from utils.files.untrusted import Refused, readable
from utils.system.errors import UserError, printable

ZIP = b"PK\3\4"
OLD = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # the pickled number with which torch.save began before 1.6
PICKLE = b"\x80"  # how every pickle since Python 2.3 begins, unless it is written as text
CHUNK = 2**20
# A tensor may have 4 times the bytes that its file holds, as grey images expanded to colour do, or else up to SMALL.
EXPANDED, SMALL = 4, 2**22


def read_tensors(path: Path, remedy: str) -> Any:
    """What torch.save wrote, or a pickle of plain values. Raises UserError, ending with the remedy, for all else."""
    with readable(path, remedy), open(path, "rb") as file:
        head = file.read(len(OLD))
        file.seek(0)
        if head.startswith(ZIP):
            return _of_zip(file)
        if head == OLD:
            return _of_old_format(file.read())
        if not head.startswith(PICKLE):
            raise ValueError("neither a zip archive, as torch.save makes since PyTorch 1.6, nor one of its older files")
        try:
            return interpret(file.read())
        except Refused as error:
            problem = f"is a pickle with more than plain values ({error}), and opening it could run code: refused"
            name = repr(printable(str(path)))
            code = f"import pickle, torch; torch.save(pickle.load(open({name}, 'rb')), 'new.pt')"
            raise UserError(f'{path}: {problem}; if you trust its maker, python3 -c "{code}", or {remedy}') from error


def _of_zip(file: io.BufferedIOBase | Any) -> Any:
    """The content of an archive. Raises ValueError or zipfile's errors unless it is whole."""
    with zipfile.ZipFile(file) as archive:
        inside = {entry.filename: entry for entry in archive.infolist()}
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in inside.values()):
            raise ValueError("its entries are compressed, which torch.save never does")
        if len({name.lower() for name in inside}) < len(archive.infolist()):
            raise ValueError("two of its entries have the same name")
        if sum(entry.file_size for entry in inside.values()) > file.seek(0, io.SEEK_END):
            raise ValueError("its entries overlap")
        programs = [name for name in inside if f"/{name}".endswith("/data.pkl")]
        if len(programs) != 1:
            raise ValueError("it has no data.pkl, as files of torch.save have, or several")
        root = programs[0].removesuffix("data.pkl")
        if f"{root}byteorder" in inside and archive.read(f"{root}byteorder") != sys.byteorder.encode():
            raise ValueError("its numbers are in the byte order of another kind of machine")
        known: dict[str, Tensor] = {}

        def storage(key: str, dtype: torch.dtype, count: int) -> Tensor:
            if key not in known:
                known[key] = _read(archive, inside[f"{root}data/{key}"])
            if count * dtype.itemsize != len(known[key]):
                raise ValueError("a storage of another size than its numbers")
            return known[key].view(dtype)

        return interpret(archive.read(programs[0]), storage)


def _read(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Tensor:
    """The bytes of an entry, in memory of PyTorch's own; zipfile compares the checksum at the end."""
    numbers = torch.empty(entry.file_size, dtype=torch.uint8)
    into, at = numbers.numpy().data, 0
    with archive.open(entry) as content:
        while chunk := content.read(CHUNK):
            into[at : at + len(chunk)] = chunk
            at += len(chunk)
    if at != entry.file_size:
        raise ValueError("an entry is shorter than it should be")
    return numbers


def _of_old_format(content: bytes) -> Any:
    """The content of a file of torch.save before PyTorch 1.6: pickles, then the numbers of every storage."""
    file = io.BytesIO(content)
    known: dict[str, Tensor] = {}

    def storage(key: str, dtype: torch.dtype, count: int) -> Tensor:
        """Memory whose numbers are read once the program has ended."""
        if key not in known:
            if count * dtype.itemsize + sum(x.nbytes for x in known.values()) > len(content):
                raise ValueError("a storage is larger than the file")
            known[key] = torch.empty(count, dtype=dtype)
        if known[key].dtype != dtype or len(known[key]) != count:
            raise ValueError("a storage of two sizes")
        return known[key]

    _, version, system = (interpret(file) for _ in range(3))
    if version != 1001 or not isinstance(system, dict) or system.get("little_endian") != (sys.byteorder == "little"):
        raise ValueError("its numbers are in the byte order of another kind of machine")
    found = interpret(file, storage)
    for key in interpret(file):
        numbers = known[key]
        if int.from_bytes(file.read(8), sys.byteorder) != len(numbers):
            raise ValueError("a storage of another size than its numbers")
        if file.readinto(numbers.view(torch.uint8).numpy().data) != numbers.nbytes:
            raise ValueError("its numbers end too early")
    return found


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
