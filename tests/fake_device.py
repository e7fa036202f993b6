"""Fake CUDA tensors, and an audit of what functions do with them; a machine without a GPU or its driver suffices.

Under PyTorch's FakeTensorMode tensors have a shape, a type, a layout, a device and a storage, but no values: the code
runs as it would on a GPU, operator by operator, in next to no memory. `fake_cuda` also replaces the few parts of
PyTorch that ask the driver, so that this is for a process of its own.
"""

from __future__ import annotations

import importlib.util
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import models
from models import NetSpec, Network
from tests import fake_autograd
from utils.numerics import passes
from utils.numerics.compute import Captured

ROOT = Path(__file__).resolve().parent.parent
aten = torch.ops.aten
RANDOM = ("rand", "uniform", "normal", "bernoulli", "exponential", "native_dropout", "multinomial")
NEEDS_VALUES = (DataDependentOutputException, DynamicOutputShapeException)  # errors of what fake tensors cannot do
COPIES = (aten.copy_.default, aten._to_copy.default)
# Operators that launch nothing, beside those that return views.
FREE = ("empty", "new_empty", "detach", "alias", "lift_fresh", "_unsafe_view", "_reshape_alias")


@dataclass
class Audit:
    """What one call of a function does on the device."""

    name: str
    captured: bool = True  # the rules of a CUDA graph hold, and not only that the host never waits for the device
    operators: Counter[str] = field(default_factory=Counter)  # launches by operator
    bytes: int = 0  # read and written by launches
    live: int = 0  # bytes of the tensors made in the call that are still in use
    peak: int = 0  # the most of `live`
    problems: Counter[str] = field(default_factory=Counter)
    passed: set[tuple[int, ...]] = field(default_factory=set)  # shapes of the images that have passed through a network
    external: dict[int, tuple[Any, str]] = field(default_factory=dict)  # storages made before that are read or written
    made: dict[int, Any] = field(default_factory=dict)  # storages made in the call that are in use

    @property
    def launches(self) -> int:
        """Operators that run a kernel; one that runs several, such as a sort, counts once."""
        return self.operators.total()

    def launch(self, name: str, given: Sequence[Tensor], results: Sequence[Tensor]) -> None:
        """Count a kernel that reads and writes these tensors."""
        self.operators[name] += 1
        different = {(_key(x), x.storage_offset(), x.shape): x for x in (*given, *results)}
        # A broadcast dimension has no memory of its own.
        self.bytes += sum(min(x.nbytes, x.untyped_storage().nbytes()) for x in different.values())

    def use(self, x: Tensor, name: str) -> None:
        """Note an operand's storage."""
        if _key(x) not in self.made and _key(x) not in self.external:
            self.external[_key(x)] = (x.untyped_storage(), f"{tuple(x.shape)} of {name}")  # kept: no address is reused

    def make(self, x: Tensor) -> None:
        """Note a result's storage, until it is freed."""
        key = _key(x)
        if key in self.made or key in self.external:
            return
        storage = x.untyped_storage()
        size = storage.nbytes()

        def freed(_: Any) -> None:
            del self.made[key]
            self.live -= size

        self.made[key] = weakref.ref(storage, freed)
        self.live += size
        self.peak = max(self.peak, self.live)

    def moved(self, before: Audit) -> None:
        """Note the storages that an earlier call of the same function did not use, and those that it alone used."""
        for what, some, others in (("now", self, before), ("no longer", before, self)):
            for key in some.external.keys() - others.external.keys():
                self.problems[f"another address: {some.external[key][1]} is {what} used"] += 1


def _key(x: Tensor) -> int:
    return x.untyped_storage()._cdata


class Recorder(TorchDispatchMode):
    """Audits of the calls under way, and those that have ended, in `audits`."""

    def __init__(self) -> None:
        super().__init__()
        self.audits: list[Audit] = []
        self.current: list[Audit] = []  # the innermost call last; it alone is charged
        self.static: dict[Any, tuple[Tensor, ...]] = {}  # inputs that a captured function reads at every call
        self.last: dict[Any, Audit] = {}

    @contextmanager
    def audit(self, name: str, *, captured: bool) -> Iterator[Audit]:
        """Audit what runs in this context. captured: whether it has to keep to the rules of CUDA graphs."""
        audit = Audit(name, captured)
        self.audits.append(audit)
        self.current.append(audit)
        try:
            yield audit
        finally:
            self.current.pop()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Audit nothing in this context."""
        current, self.current = self.current, []
        try:
            yield
        finally:
            self.current = current

    def call_captured(self, captured: Captured, *inputs: Tensor, **settings: Any) -> Any:
        """A call of `Captured`: what would be captured, audited and compared with the call before it."""
        if captured.off:
            return captured.function(*inputs, **settings)
        key = (captured, tuple((x.shape, x.dtype) for x in inputs), tuple(settings.items()))
        if key not in self.static:
            self.static[key] = tuple(x.clone() for x in inputs)
        shapes = " ".join("x".join(map(str, x.shape)) for x in inputs)
        with self.audit(f"{captured.function.__qualname__} {shapes}", captured=True) as audit:
            result = captured.function(*self.static[key], **settings)
        if key in self.last:
            audit.moved(self.last[key])
        self.last[key] = audit
        return result

    def kernel(self, name: str, *arguments: Any, **_: Any) -> None:
        """Audit a kernel that PyTorch's dispatcher does not see, such as one of Triton: one launch."""
        tensors = [x for x in tree_leaves(arguments) if isinstance(x, Tensor)]
        if self.current:
            self._check(self.current[-1], name, tensors)
            self.current[-1].launch(name, tensors, [])

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace != "aten":  # a tensor's device, which is looked at all the time
            return func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        if name == "_fused_sgd_":  # has no implementation without values
            self._fused_sgd(*args, **kwargs)
            return None
        try:
            result = func(*args, **kwargs)
        except NEEDS_VALUES:
            self._problem(f"the host waits for {name}")
            raise
        if self.current:
            given, results = ([x for x in tree_leaves(t) if isinstance(x, Tensor)] for t in ((args, kwargs), result))
            self._note(self.current[-1], name, func, args, kwargs, given, results)
        return result

    def _note(
        self, audit: Audit, name: str, func: Any, args: Any, kwargs: Any, given: list[Tensor], results: list[Tensor]
    ) -> None:
        """Note one operator."""
        if func in COPIES and len(devices := {x.device.type for x in (*given, *results)}) > 1:
            if audit.captured:
                self._problem(f"a copy from {' to '.join(sorted(devices))}, {tuple(given[-1].shape)}")
            elif results[0].device.type == "cpu" or not (kwargs.get("non_blocking") or True in args[2:]):
                self._problem(f"the host waits for a copy of {tuple(given[-1].shape)} to {results[0].device}")
        on_device = [x for x in results if x.device.type == "cuda"]
        if not on_device and not any(x.device.type == "cuda" for x in given):
            if audit.captured and any(x.dim() for x in results):
                self._problem(f"{name} on the CPU")
            return
        self._check(audit, name, given)
        for x in on_device:
            audit.make(x)
        if name not in FREE and not _is_view(func):
            audit.launch(name, [x for x in given if x.device.type == "cuda"], on_device)

    def _check(self, audit: Audit, name: str, given: Sequence[Tensor]) -> None:
        """Note an operator's operands, and what a CUDA graph forbids."""
        for x in given:
            if x.device.type == "cuda":
                audit.use(x, name)
            elif audit.captured:
                self._problem(f"{name} takes a CPU tensor, {tuple(x.shape)}")
        if audit.captured and name.startswith(RANDOM):
            self._problem(f"{name} draws random numbers")

    def _fused_sgd(
        self, parameters: Sequence[Tensor], gradients: Sequence[Tensor], buffers: Sequence[Tensor], *, lr: Any, **_: Any
    ) -> None:
        for together in zip(*filter(None, (parameters, gradients, buffers)), strict=True):  # no momentum, no buffers
            if len({(x.dtype, _layout(x)) for x in together}) > 1:
                self._problem("fused SGD of tensors that differ in type or layout")
        if not isinstance(lr, Tensor):
            self._problem("fused SGD with a rate that is a number, which a graph would repeat for ever")
        self.kernel("_fused_sgd_", parameters, gradients, buffers, lr)

    def _problem(self, text: str) -> None:
        """Note a problem in the call under way, with the line of the project where it arises."""
        if self.current:
            frame: Any = sys._getframe(1)
            while frame and not _is_ours(frame.f_code.co_filename):
                frame = frame.f_back
            where = f"{Path(frame.f_code.co_filename).relative_to(ROOT)}:{frame.f_lineno}" if frame else "?"
            self.current[-1].problems[f"{text} ({where})"] += 1


class Kernel(NamedTuple):
    """A kernel of Triton that is audited in place of being run: kernel[grid](*arguments, **constants)."""

    recorder: Recorder
    name: str

    def __getitem__(self, grid: Any) -> Callable[..., None]:  # type: ignore[override]
        return partial(self.recorder.kernel, self.name)


def _is_ours(file: str) -> bool:
    return file.startswith((f"{ROOT}/utils", f"{ROOT}/models"))


def _is_view(func: Any) -> bool:
    """Whether an operator returns views of its arguments and writes nothing."""
    infos = [x.alias_info for x in (*func._schema.returns, *func._schema.arguments) if x.alias_info is not None]
    return bool(infos) and not any(info.is_write for info in infos)


def _layout(x: Tensor) -> tuple[int, ...]:
    """Strides of the dimensions that have any."""
    return tuple(stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1)


# --- The parts of PyTorch and of the project that need a driver -------------------------------------------------------


def unsupported() -> str | None:
    """Why this PyTorch cannot compute with fake CUDA tensors; None where it can."""
    try:
        with FakeTensorMode():
            x = torch.zeros(1, device="cuda")
            x.copy_(x)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None


def stand_in_for_triton() -> ModuleType:
    """What utils/numerics/block_triton.py uses of Triton beside kernels, for machines without it."""
    triton = ModuleType("triton")
    triton.jit = lambda kernel: kernel  # type: ignore[attr-defined]
    triton.cdiv = lambda a, b: -(-a // b)  # type: ignore[attr-defined]
    triton.next_power_of_2 = lambda n: 1 << (n - 1).bit_length()  # type: ignore[attr-defined]
    triton.language = ModuleType("triton.language")  # type: ignore[attr-defined]
    for name in ("constexpr", "float32", "float64"):
        setattr(triton.language, name, name)
    return triton


@contextmanager
def fake_cuda() -> Iterator[Recorder]:
    """Fake CUDA tensors in place of real ones, and a recorder of what is done with them."""
    recorder, generator, build, features = Recorder(), torch.Generator, models.build, passes.features

    def build_on_device(spec: NetSpec) -> Network:
        with torch.device("cuda"):
            return build(spec)

    def noted_features(net: Any, x: Tensor) -> Tensor:
        for audit in recorder.current:
            audit.passed.add(tuple(x.shape))
        return features(net, x)

    replacements: list[tuple[Any, str, Any]] = [
        (torch, "Generator", lambda device: generator()),  # nothing is drawn from it
        (torch.autograd, "grad", fake_autograd.grad),
        (Tensor, "backward", fake_autograd.backward),
        (torch.cuda, "get_device_capability", lambda device=None: (9, 0)),
        # A module of fake tensors cannot move, so it is made where it will be.
        (models, "build", build_on_device),
        (nn.Module, "to", lambda module, *args, **kwargs: module),
        # Fake convolutions ask which library would compute them, for the layout of the result. It would be cuDNN.
        (torch._C, "_select_conv_backend", lambda *args, **kwargs: None),
        (torch._C, "_conv_determine_backend_memory_format", _cudnn_layout),
        (passes, "features", noted_features),
        (Captured, "__call__", lambda captured, *inputs, **how: recorder.call_captured(captured, *inputs, **how)),
    ]
    with FakeTensorMode(), ExitStack() as stack:  # the mode first: what it imports needs the real parts
        if importlib.util.find_spec("triton") is None:
            triton = stand_in_for_triton()
            stack.enter_context(patch.dict(sys.modules, {"triton": triton, "triton.language": triton.language}))
        block_triton = importlib.import_module("utils.numerics.block_triton")
        kernels = [name for name in vars(block_triton) if name.endswith("_kernel")]
        replacements += [(block_triton, name, Kernel(recorder, name)) for name in kernels]
        for owner, name, value in replacements:
            stack.enter_context(patch.object(owner, name, value))
        stack.enter_context(recorder)
        yield recorder


def _cudnn_layout(x: Tensor, weight: Tensor, backend: Any) -> torch.memory_format:
    """The layout in which cuDNN returns a convolution: channels last if an operand is that and nothing else."""
    suggested = [torch._prims_common.suggest_memory_format(t) for t in (x, weight)]
    last = torch.channels_last in suggested and x.dtype != torch.float64
    return torch.channels_last if last else torch.contiguous_format
