"""Arrays of NumPy's files, read without trust: nothing is unpickled, and no size is believed before it is checked.

    arrays = load_arrays(Path("theirs.npz"), "name a file with images and labels")     # {"images": ..., "labels": ...}

A .npz is a zip archive of .npy files, perhaps compressed, which may claim any size and unpack to a thousand times its
own; a .npy is one array after a header of text.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
import zipfile
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from numpy.lib import format as npy
from torch import Tensor

from utils.files.untrusted import as_tensor, must_fit, readable
from utils.system.errors import UserError, printable

log = logging.getLogger("dream")

NPY = b"\x93NUMPY"
NUMBERS = "biuf"  # NumPy's kinds: bool, integers, floats
HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


class Header(NamedTuple):
    """What a .npy file says of its array."""

    shape: tuple[int, ...]
    dtype: np.dtype
    start: int  # of the numbers, in bytes from the file's start

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return self.start + math.prod(self.shape) * self.dtype.itemsize

    @property
    def flaw(self) -> str | None:
        """Why the array is no plain numbers; None if it is."""
        if self.dtype.hasobject:
            return "pickled Python objects, which could run code"
        return None if self.dtype.kind in NUMBERS else f"{self.dtype} in place of numbers"


def load_arrays(path: Path, remedy: str) -> dict[str, Tensor]:
    """The arrays of numbers in a .npz file, by name, or the one in a .npy file, by the file's own name.

    Shapes are the file's; uint16, uint32 and uint64 become the next wider signed type, all other types stay as they
    are, in the machine's byte order. Other arrays of a .npz (text, Python objects) are left out with a warning.
    Raises UserError, ending with the remedy, for a file that cannot be read, holds no numbers, or is too large.
    """
    with readable(path, remedy), open(path, "rb") as file:
        magic = file.read(len(NPY))
        file.seek(0)
        if magic == NPY:
            return {path.stem: _array(path, file, os.fstat(file.fileno()).st_size, remedy)}
        if magic[:2] != b"PK":
            raise ValueError("neither a .npz nor a .npy file")
        return _archive(path, file, remedy)


def _array(path: Path, file: IO[bytes], size: int, remedy: str) -> Tensor:
    header = _header(file, size)
    if header.flaw is not None:
        code = f"np.savez('new.npz', **np.load({printable(str(path))!r}, allow_pickle=True).item())"
        how = f'if you trust its maker and it is a dict, python3 -c "import numpy as np; {code}"'
        raise UserError(f"{path}: holds {header.flaw}: refused; {how}, or {remedy}")
    must_fit(path, header.size)
    return _tensor(file)


def _archive(path: Path, file: IO[bytes], remedy: str) -> dict[str, Tensor]:
    with zipfile.ZipFile(file) as archive:
        entries = [entry for entry in archive.infolist() if entry.filename.endswith(".npy")]
        if len({entry.filename for entry in entries}) < len(entries):
            raise ValueError("two of its entries have the same name")
        # Other compressions have no bound on what one step unpacks; NumPy never writes them.
        if any(entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for entry in entries):
            raise ValueError("its entries are compressed in another way than NumPy does")
        sound, left_out = [], {}
        for entry in entries:
            name = entry.filename.removesuffix(".npy")
            with archive.open(entry) as content:
                header = _header(content, entry.file_size)
            if header.flaw is None:
                sound.append((name, entry, header))
            else:
                left_out[name] = header.flaw
        flaws = "; ".join(f"{printable(name)}: {flaw}" for name, flaw in left_out.items())
        if not sound:
            raise UserError(f"{path}: holds no numbers ({flaws or 'no array'}): refused; {remedy}")
        if left_out:
            log.warning("%s: left out, holding no numbers: %s", path, flaws)
        must_fit(path, sum(header.size for _, _, header in sound))
        arrays = {}
        for name, entry, _ in sound:
            with archive.open(entry) as content:
                arrays[name] = _tensor(content)
        return arrays


def _header(file: IO[bytes], size: int) -> Header:
    """The header at a file's start. Raises ValueError unless the file is as long as it says."""
    if (version := npy.read_magic(file)) not in HEADERS:
        raise ValueError(f"version {version} of the .npy format")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that Python 2 wrote it
        shape, _, dtype = HEADERS[version](file)
    header = Header(shape, dtype, file.tell())
    if min(shape, default=0) < 0 or (not dtype.hasobject and header.size != size):
        raise ValueError(f"{dtype} of shape {shape} do not fill its {size} bytes")
    return header


def _tensor(file: IO[bytes]) -> Tensor:
    """The array in a .npy file whose header was checked."""
    file.seek(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return as_tensor(npy.read_array(file, allow_pickle=False))
