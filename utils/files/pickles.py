"""Pickles as data: the programs in which torch.save and NumPy write plain values, followed without running anything.

    content = interpret(program, storage)

A pickle is a program for a small machine with a stack, which may call any function by its name. This machine knows the
instructions that make plain values, and a dozen names, each of which stands for a small function here; whatever else a
pickle names is refused. Memory stays within a multiple of the pickle's length.
"""

from __future__ import annotations

import math
import pickletools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from utils.files.untrusted import Refused, as_tensor

MOST = 10**6  # instructions: each may make an object of a hundred bytes
DTYPES = {
    "torch DoubleStorage": torch.float64,
    "torch FloatStorage": torch.float32,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch LongStorage": torch.int64,
    "torch IntStorage": torch.int32,
    "torch ShortStorage": torch.int16,
    "torch CharStorage": torch.int8,
    "torch ByteStorage": torch.uint8,
    "torch BoolStorage": torch.bool,
}
Storage = Callable[[str, torch.dtype, int], Tensor]  # key, type and number of elements -> a tensor of one dimension


@dataclass(frozen=True)
class Name:
    """What a pickle names, as text: `module member`."""

    name: str


@dataclass(frozen=True)
class Stored:
    """The memory that tensors lie in."""

    numbers: Tensor  # one dimension


@dataclass
class Unbuilt:
    """A value whose content follows in a second instruction."""

    build: Callable[[Any], Any]
    built: list[Any] = field(default_factory=list)


# --- What the names stand for -----------------------------------------------------------------------------------------


def _tensor(stored: Any, offset: Any, shape: Any, stride: Any, *more: Any) -> Tensor:
    """A view of a storage's numbers, without a gradient. Raises ValueError where it would reach beyond them."""
    if not (isinstance(stored, Stored) and _are_sizes(shape) and _are_sizes(stride) and _are_sizes((offset,))):
        raise ValueError("a tensor of no storage, shape or stride")
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    if math.prod(shape) and last >= len(stored.numbers):
        raise ValueError("a tensor reaches beyond its storage")
    if any(more[2:]):
        raise Refused("a tensor with flags, such as negation")
    return torch.empty(0, dtype=stored.numbers.dtype).set_(stored.numbers.untyped_storage(), offset, shape, stride)


def _are_sizes(x: Any) -> bool:
    return isinstance(x, tuple) and all(type(n) is int and 0 <= n < 2**63 for n in x) and math.prod(x) < 2**63


def _parameter(data: Any, *_: Any) -> Tensor:
    if not isinstance(data, Tensor):
        raise ValueError("a parameter of no tensor")
    return data


def _ordered(*arguments: Any) -> dict[Any, Any]:
    if arguments:  # which could be an endless tensor, row by row
        raise Refused("an ordered dictionary of something")
    return {}


def _size(dimensions: Any) -> tuple[int, ...]:
    if not _are_sizes(dimensions):
        raise ValueError("a shape of no numbers")
    return tuple(dimensions)


def _device(*arguments: Any) -> str:
    return ":".join(str(a) for a in arguments if isinstance(a, (str, int)))[:100]


def _bytes(*arguments: Any) -> bytes:
    """What older protocols write in place of bytes: nothing, or text with a character per byte."""
    if not arguments:
        return b""
    text, encoding = arguments
    if not isinstance(text, str) or encoding != "latin1":
        raise Refused("text in another encoding than latin1")
    return text.encode("latin1")


def _dtype(name: Any, *_: Any) -> Unbuilt:
    if not isinstance(name, str) or not re.fullmatch(r"[biuf][1248]", name):
        raise Refused(f"numpy.dtype {name[:20]!r}" if isinstance(name, str) else "numpy.dtype")

    def build(state: Any) -> np.dtype:
        if not isinstance(state, tuple) or state[1] not in ("<", ">", "=", "|"):
            raise ValueError("a type of no byte order")
        return np.dtype(name).newbyteorder(state[1])

    return Unbuilt(build)


def _array(shape: Any, dtype: Any, columns: Any, raw: Any) -> Tensor:
    if not isinstance(dtype, np.dtype) or not isinstance(raw, (bytes, bytearray)) or not _are_sizes(shape):
        raise ValueError("an array of no numbers")
    if len(raw) != math.prod(shape) * dtype.itemsize:
        raise ValueError("an array of another size than its numbers")
    return as_tensor(np.frombuffer(raw, dtype).reshape(shape, order="F" if columns else "C"))


def _scalar(dtype: Any, raw: Any) -> Any:
    return _array((1,), dtype, False, raw).item()


def _reconstructed(*_: Any) -> Unbuilt:
    return Unbuilt(lambda state: _array(*state[1:]))


def _from_buffer(raw: Any, dtype: Any, shape: Any, order: Any) -> Tensor:
    return _array(shape, dtype, order == "F", raw)


CALLS: Mapping[str, Callable[..., Any]] = {
    "torch._utils _rebuild_tensor": _tensor,
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_parameter": _parameter,
    "torch Size": _size,
    "torch device": _device,
    "collections OrderedDict": _ordered,
    "argparse Namespace": lambda: Unbuilt(lambda state: state),
    "_codecs encode": _bytes,
    "__builtin__ bytes": _bytes,
    "builtins bytes": _bytes,
    "numpy dtype": _dtype,
    **{f"numpy.{core}.multiarray scalar": _scalar for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray _reconstruct": _reconstructed for core in ("core", "_core")},
    **{f"numpy.{core}.numeric _frombuffer": _from_buffer for core in ("core", "_core")},
}
NAMES = {*CALLS, *DTYPES, "numpy ndarray"}


# --- The machine ------------------------------------------------------------------------------------------------------


def interpret(program: bytes | IO[bytes], storage: Storage | None = None) -> Any:
    """What a pickle makes: tensors, numbers, text, None, and lists, tuples and dicts of them.

    NumPy's numbers become Python's, its arrays tensors, and argparse's Namespace a dict. storage: gives the memory of
    torch.save's tensors. Raises Refused for anything else, and any Exception for a damaged pickle. A file is left at
    the pickle's end.
    """
    machine = _Machine(storage)
    for count, (instruction, argument, _) in enumerate(pickletools.genops(program)):
        if count > MOST:
            raise Refused(f"more than {MOST} instructions")
        if instruction.name == "STOP":
            (content,) = machine.stack
            return content
        machine.step(instruction.name, argument)
    raise ValueError("a pickle without an end")


CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
NUMBERS_AND_TEXT = {
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "INT", "LONG", "FLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE", "BINSTRING", "SHORT_BINSTRING", "STRING"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Machine:
    """The stack, the values that it comes back to, and what each instruction does to them."""

    def __init__(self, storage: Storage | None) -> None:
        self.storage = storage
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # stacks under the marks
        self.memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        """Follow one instruction. Raises Refused for one that plain values do not need."""
        if name in ("PROTO", "FRAME"):
            return
        if name in NUMBERS_AND_TEXT:
            self._push(argument)
        elif name in CONSTANTS:
            self._push(CONSTANTS[name])
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            self.memo[argument] = self.stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = self.stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            value = self.memo[argument]
            self._push(value.built[0] if isinstance(value, Unbuilt) and value.built else value)
        elif name == "MARK":
            self.below.append(self.stack)
            self.stack = []
        elif name in TUPLES:
            self._push(tuple(self._popped(TUPLES[name])))
        elif name == "TUPLE":
            self._push(tuple(self._since_mark()))
        elif name in ("EMPTY_LIST", "LIST"):
            self._push(self._since_mark() if name == "LIST" else [])
        elif name in ("EMPTY_DICT", "DICT"):
            self._push(_pairs(self._since_mark()) if name == "DICT" else {})
        elif name in ("APPEND", "APPENDS"):
            items = self._popped(1) if name == "APPEND" else self._since_mark()
            self._top(list).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = self._popped(2) if name == "SETITEM" else self._since_mark()
            self._top(dict).update(_pairs(items))
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            full = argument if name == "GLOBAL" else " ".join(map(str, self._popped(2)))
            if full not in NAMES:
                raise Refused(full.replace(" ", ".")[:100])
            self._push(Name(full))
        elif name in ("REDUCE", "NEWOBJ"):
            called, arguments = self._popped(2)
            self._push(self._called(called, arguments))
        elif name == "BUILD":
            unbuilt, state = self._popped(2)
            if not isinstance(unbuilt, Unbuilt):
                raise Refused("instruction BUILD")
            unbuilt.built = [unbuilt.build(state)]
            self._push(unbuilt.built[0])
        elif name == "BINPERSID":
            self._push(self._stored(*self._popped(1)))
        else:
            raise Refused(f"instruction {name}")

    def _push(self, value: Any) -> None:
        self.stack.append(value)  # to the stack that there is once the value is made

    def _popped(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise ValueError("a pickle that takes what it does not have")
        at = len(self.stack) - count
        popped = self.stack[at:]
        del self.stack[at:]
        return popped

    def _since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.below.pop()
        return items

    def _top(self, kind: type[Any]) -> Any:
        if not isinstance(self.stack[-1], kind):
            raise ValueError(f"a pickle that adds to something else than a {kind.__name__}")
        return self.stack[-1]

    def _called(self, called: Any, arguments: Any) -> Any:
        if not isinstance(called, Name) or called.name not in CALLS or not isinstance(arguments, tuple):
            raise Refused("a call of something else than a function")
        return CALLS[called.name](*arguments)

    def _stored(self, identity: Any) -> Stored:
        """The memory that torch.save names by ("storage", type, key, device, number of elements)."""
        if self.storage is None or not isinstance(identity, tuple) or identity[0] != "storage":
            raise Refused("a reference to something outside")
        kind, key, _, count = identity[1:5]
        if not isinstance(kind, Name) or kind.name not in DTYPES or not isinstance(key, str):
            raise Refused("a reference to something else than a storage")
        if not _are_sizes((count,)) or identity[5:] not in ((), (None,)):
            raise ValueError("a storage of no size")
        return Stored(self.storage(key, DTYPES[kind.name], count))


def _pairs(items: list[Any]) -> dict[Any, Any]:
    """A dict of keys and values in turn."""
    return dict(zip(items[::2], items[1::2], strict=True))
