"""Arrays in NumPy's files: all numbers are read, all else is refused in one line before memory is spent."""

from __future__ import annotations

import io
import logging
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.faults.fuzz import little_memory
from tests.files import Payload
from utils.files import untrusted
from utils.files.npz import load_arrays
from utils.system.errors import UserError

REMEDY = "name another file"
X = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
BIG = 2**40


def npy(array: np.ndarray, **said: object) -> bytes:
    """A .npy file, whose header may say something else than what follows."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {**np.lib.format.header_data_from_array_1_0(array), **said})
    return buffer.getvalue() + array.tobytes("A")


def npz(path: Path, compression: int = zipfile.ZIP_STORED, **entries: bytes) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(f"{name}.npy", content)
    return path


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_of_all_numbers_are_read(save: Callable[..., None], tmp_path: Path) -> None:
    arrays = {
        "float": X,
        "big": X.astype(">f8"),
        "columns": np.asfortranarray(X),
        "half": X.astype(np.float16),
        "long": X.astype(np.longdouble),
        "bytes": X.astype(np.uint8),
        "u2": X.astype(np.uint16) + 65000,
        "u4": X.astype(">u4") + 2**31,
        "u8": X.astype(np.uint64),
        "bool": X > 3,
        "one": np.int64(7),
        "none": np.zeros((0, 3)),
    }
    save(tmp_path / "x.npz", **arrays)
    found = load_arrays(tmp_path / "x.npz", REMEDY)
    assert {name: tuple(x.shape) for name, x in found.items()} == {name: np.shape(x) for name, x in arrays.items()}
    for name, x in arrays.items():
        assert found[name].is_contiguous() and np.array_equal(found[name].numpy(), x), name
    types = {name: str(x.dtype).removeprefix("torch.") for name, x in found.items()}
    assert (types["big"], types["long"], types["u2"], types["u4"], types["u8"]) == (
        *["float64"] * 2,
        "int32",
        *["int64"] * 2,
    )


def test_one_array_goes_by_the_name_of_its_file(tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", X)
    ((name, x),) = load_arrays(tmp_path / "images.npy", REMEDY).items()
    assert name == "images" and torch.equal(x, torch.from_numpy(X))


def test_arrays_of_something_else_are_left_out_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    marker = tmp_path / "ran"
    names = np.array(["cat", "dog"])
    np.savez(tmp_path / "x.npz", images=X, names=names, meta=np.array(Payload(marker), dtype=object))
    with caplog.at_level(logging.WARNING, "dream"):
        assert list(load_arrays(tmp_path / "x.npz", REMEDY)) == ["images"]
    (record,) = caplog.records
    assert "names: <U3" in record.getMessage() and "meta: pickled" in record.getMessage()
    assert not marker.exists()


def test_objects_are_refused_and_never_unpickled(tmp_path: Path) -> None:
    payload = Payload(tmp_path / "ran")
    np.save(tmp_path / "x.npy", np.array([payload], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "x.npz", x=np.array([payload], dtype=object))
    (tmp_path / "p.npy").write_bytes(pickle.dumps(payload))
    for name, says in (("x.npy", "could run code: refused"), ("x.npz", "holds no numbers"), ("p.npy", "neither")):
        with pytest.raises(UserError, match=rf"{name}: .*{says}.*; .*{REMEDY}"):
            load_arrays(tmp_path / name, REMEDY)
    assert not payload.marker.exists()


WHOLE = npy(X)
FLAWED: dict[str, Callable[[Path], object]] = {
    "cut": lambda path: path.write_bytes(WHOLE[:-1]),
    "cut in the header": lambda path: path.write_bytes(WHOLE[:40]),
    "a shape beyond the file": lambda path: path.write_bytes(npy(X, shape=(BIG, BIG))),
    "a negative shape": lambda path: path.write_bytes(npy(X, shape=(-1, -24))),
    "an archive's too": lambda path: npz(path, x=npy(X, shape=(BIG,))),
    "an archive cut": lambda path: path.write_bytes(npz(path, x=WHOLE).read_bytes()[:-30]),
    "a wrong checksum": lambda path: path.write_bytes(npz(path, x=WHOLE).read_bytes().replace(X[1].tobytes(), X[0])),
    "another compression": lambda path: npz(path, zipfile.ZIP_BZIP2, x=WHOLE),
    "a header that nests": lambda path: path.write_bytes(b"\x93NUMPY\1\0" + b"\x20\x20" + b"(" * 0x2020),
    "nothing": lambda path: path.write_bytes(b""),
    "fields": lambda path: np.savez(path, x=np.zeros(3, "f4,i4")),
    "complex numbers": lambda path: np.savez(path, x=X * 1j),
    "beyond 2**63": lambda path: np.savez(path, x=np.full(3, 2**64 - 1, np.uint64)),
    "no array": lambda path: npz(path),
    "a pipe": os.mkfifo,
    "no file": lambda path: None,
}  # fmt: skip


@pytest.mark.parametrize("what", FLAWED)
def test_flawed_files_are_refused_in_one_line(what: str, tmp_path: Path) -> None:
    FLAWED[what](path := tmp_path / "x.npz")
    with little_memory(), pytest.raises(UserError) as caught:
        load_arrays(path, REMEDY)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and message.endswith(REMEDY) and message.isprintable(), message


def test_what_unpacks_to_much_is_refused_before_it_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez_compressed(tmp_path / "x.npz", a=np.zeros((4, 10**5)), b=np.zeros((4, 10**5)))
    assert (tmp_path / "x.npz").stat().st_size < 2e4
    monkeypatch.setattr(untrusted, "free_memory", lambda device: 10**7)
    with pytest.raises(UserError, match=r"x\.npz: needs 0\.0 GB of memory"):
        load_arrays(tmp_path / "x.npz", REMEDY)
