"""What readers of strangers' files share: errors in one line, memory checked before it is spent, arrays as tensors."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from utils.system.device import free_memory
from utils.system.errors import UserError, first_line

SPARE_MEMORY = 0.5  # of the free memory: a set is copied once or twice on its way to a network
WIDER = {"u2": np.int32, "u4": np.int64, "u8": np.int64}  # types that PyTorch can hardly compute with


class Refused(ValueError):
    """A pickle names something else than tensors, arrays, numbers, text, lists, tuples and dicts: the message says
    what."""


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
        raise UserError(f"{path}: {problem}; save its tensors alone, or {remedy}") from error
    except Exception as error:  # zip, pickle and storage errors of any kind
        raise UserError(f"{path}: is truncated or damaged ({first_line(error)}); {remedy}") from error


def must_fit(path: Path, size: int, why: str = "") -> None:
    """Raise UserError when so many bytes do not fit into memory. why: a reason besides the file's own size."""
    free = free_memory(torch.device("cpu"))
    if size > SPARE_MEMORY * free:
        problem = f"needs {size / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free{why}"
        raise UserError(f"{path}: {problem}; it is damaged, not what it should be, or made for a larger machine")


def as_tensor(array: npt.NDArray[Any]) -> Tensor:
    """An array of numbers in any byte and memory order, copied where PyTorch needs another.

    uint16, uint32 and uint64 become the next wider signed type, longdouble float64. Raises ValueError for integers of
    2**63 and more.
    """
    dtype = array.dtype.newbyteorder("=")
    if dtype == np.uint64 and array.size and array.max() >= 2**63:
        raise ValueError("it holds integers beyond 2**63")
    wider = WIDER.get(dtype.str[1:], np.float64 if dtype.kind == "f" and dtype.itemsize > 8 else dtype)
    return torch.from_numpy(np.require(array, wider, ["C", "W"]).reshape(array.shape))
