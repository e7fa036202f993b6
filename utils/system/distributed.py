"""Ranks: the processes that share one run, the classes that each of them owns, and their collective operations.

    $ torchrun --nproc_per_node=8 condense.py ...

PyTorch's launcher starts them, and PyTorch's process groups connect them: NCCL between GPUs, gloo between processors. A
program that was started without torchrun is a group of one: all classes are its own, and nothing is sent.

Nothing else in the program asks for a rank. What must happen once only, such as writing a file, is a function under
`rank_zero_only`; what all have to agree on, such as when to stop, is a collective operation. Every collective operation
has a time-out, and raises LostRank when another rank has ended.
"""

from __future__ import annotations

import io
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from utils.system.errors import UsageError, UserError, first_line

log = logging.getLogger("dream")
T = TypeVar("T")
P = ParamSpec("P")

WHOLE_NUMBERS = {1: torch.uint8, 2: torch.uint8, 4: torch.int32, 8: torch.int64}  # that hold an element's bits
ERROR = "error"  # where the first rank that fails says why
LAST_WORDS = 5.0  # seconds that torchrun lets another rank speak, which it ends when the first one has ended
_group: Group | None = None


class LostRank(UserError):
    """Another rank has ended, or does not answer any more."""


# --- Before there is a group ------------------------------------------------------------------------------------------


def launched() -> bool:
    """Whether torchrun started this process."""
    return dist.is_available() and dist.is_torchelastic_launched()


def is_first() -> bool:
    """Whether this is rank 0, which alone writes files and messages; true without torchrun."""
    return not launched() or os.environ["RANK"] == "0"


def rank_zero_only(function: Callable[P, T]) -> Callable[P, T | None]:
    """Decorator for a function that rank 0 alone calls; the other ranks get None and don't wait for it."""

    @wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T | None:
        return function(*args, **kwargs) if is_first() else None

    return wrapper


def restart_count() -> int:
    """How often torchrun has started this process again after a failure (--max-restarts)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) if launched() else 0


def local_rank() -> int | None:
    """Number of the GPU of this machine that belongs to this process; None without torchrun."""
    return int(os.environ["LOCAL_RANK"]) if launched() else None


def message_of_rank(message: str, *, lost: bool = False) -> str | None:
    """An error message with this process's rank before it, or None where another rank has reported it.

    lost: whether the message is that another rank has ended, which may have said why.
    """
    if not launched():
        return message
    if _group is None:  # a command line that is wrong is wrong for all
        said = message if is_first() else None
    else:
        said = None if _group.reported(message, lost) else f"rank {_group.rank}: {message}"
    if said is None:
        time.sleep(LAST_WORDS)
    return said


# --- The group --------------------------------------------------------------------------------------------------------


@contextmanager
def process_group(backends: str, *, minutes: float) -> Iterator[Group]:
    """The group of all processes that torchrun started, while the block runs; a group of one without torchrun.

    backends: torch.distributed's, including one for CPU tensors. minutes: the longest that a rank waits for the others.
    Raises UserError when the ranks do not find each other.
    """
    global _group
    if not launched():
        yield SINGLE
        return
    timeout = timedelta(minutes=minutes)
    try:
        store, rank, count = next(dist.rendezvous("env://", timeout=timeout))
        store = dist.PrefixStore(
            f"attempt {restart_count()}", store
        )  # a restart may meet the old store, with addresses of dead ranks
        dist.init_process_group(backends, store=store, rank=rank, world_size=count, timeout=timeout)
    except RuntimeError as error:
        raise UserError(f"torchrun: the ranks do not find each other ({first_line(error)})") from error
    _group = Group(rank, count, store)
    yield _group
    # Not after an error: those that are still at work would be waited for. The end of the process does it.
    dist.destroy_process_group()
    _group = None


class Group:
    """This rank among all of a run, and its collective operations. `sent` counts the bytes given to other ranks."""

    def __init__(self, rank: int = 0, count: int = 1, store: Any = None) -> None:
        self.rank, self.count, self.sent = rank, count, 0
        self.shares: list[list[int]] = []  # the classes of every rank
        self._store = store

    @property
    def alone(self) -> bool:
        return self.count == 1

    # --- Collective operations ----------------------------------------------------------------------------------------

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        """Sum over all ranks, in place."""
        return self._reduced(x, dist.ReduceOp.SUM)

    def all_reduce_disjoint(self, x: Tensor) -> Tensor:
        """Sum of tensors of which every element is zero on all ranks but one, in place and bit for bit."""
        if not self.alone:
            self.all_reduce_sum(x.view(WHOLE_NUMBERS[x.element_size()]))  # as numbers -0.0 + 0.0 would be 0.0
        return x

    def all_reduce_max(self, *values: float) -> list[float]:
        """Maximum of each value over all ranks."""
        return self._reduced(torch.tensor(values, dtype=torch.float64), dist.ReduceOp.MAX).tolist()

    def broadcast(self, find: Callable[[], T]) -> T:
        """The result of a function that rank 0 calls, on every rank: CPU tensors, plain values, lists and dicts of them.

        A UserError that the function raises on rank 0 is raised on every rank.
        """
        if self.alone:
            return find()
        found: Any = None
        if self.rank == 0:
            try:
                found = [find(), 0]
            except UserError as error:
                found = [str(error), error.status]
        content = _packed(found) if self.rank == 0 else torch.empty(0, dtype=torch.uint8)
        size = torch.tensor([len(content)])
        self._waiting(lambda: dist.broadcast(size, 0))
        if self.rank != 0:
            content = torch.empty(int(size), dtype=torch.uint8)
        self._waiting(lambda: dist.broadcast(content, 0))
        self.sent += len(content)
        if self.rank != 0:
            found = _unpacked(content)
        result, status = found
        if status:
            raise (UsageError if status == UsageError.status else UserError)(result)
        return result

    def reported(self, message: str, lost: bool) -> bool:
        """Whether another rank has reported this error already, or any error if this one is about a lost rank."""
        with suppress(RuntimeError):  # the store is gone with the rank that had it
            rank, _, first = self._store.compare_set(ERROR, "", f"{self.rank} {message}").decode().partition(" ")
            return int(rank) != self.rank and (lost or first == message)
        return False

    def _reduced(self, x: Tensor, operation: Any) -> Tensor:
        if not self.alone:
            self.sent += x.nbytes
            self._waiting(lambda: dist.all_reduce(x, operation))
        return x

    def _waiting(self, collective: Callable[[], object]) -> None:
        try:
            collective()
        except RuntimeError as error:
            raise LostRank(
                f"another rank has ended or does not answer ({first_line(error)}); what was saved last is as it was, "
                "and the same command goes on from there"
            ) from error

    # --- Sharing work -------------------------------------------------------------------------------------------------

    def assigned(self, work: Sequence[float]) -> list[int]:
        """Indices of the work items assigned to this rank, balanced by cost."""
        return balanced(work, self.count)[self.rank]

    def shard(self, work: Sequence[float]) -> Shard:
        """This rank's classes, balanced by the cost of each. Raises UsageError when there are fewer classes than ranks."""
        if len(work) < self.count:
            raise UsageError(
                f"torchrun: {self.count} ranks cannot share {len(work)} classes, which are not divided; start "
                f"{len(work)} processes or fewer (--nproc_per_node, --nnodes)"
            )
        self.shares = balanced(work, self.count)
        return Shard(self, self.shares[self.rank], len(work))


class Shard:
    """The classes that one rank owns, in ascending order, among all classes."""

    def __init__(self, group: Group, classes: list[int], total: int) -> None:
        self.group, self.classes, self.total = group, classes, total

    def all_gather(self, rows: Tensor) -> Tensor:
        """Rows of all classes (classes, ...) on every rank, from each rank's rows of its own classes (own, ...)."""
        if self.group.alone:
            return rows
        found = rows.new_zeros(self.total, *rows.shape[1:])
        found[self.classes] = rows
        return self.group.all_reduce_disjoint(found)

    def local(self, rows: Tensor) -> Tensor:
        """Rows of this rank's classes, from rows of all classes."""
        return rows if self.group.alone else rows[self.classes]


def balanced(work: Sequence[float], count: int) -> list[list[int]]:
    """Work items dealt out to `count` ranks: the most expensive first, always to the rank with the least work."""
    found: list[list[int]] = [[] for _ in range(count)]
    load = [0.0] * count
    for piece in sorted(range(len(work)), key=lambda i: (-work[i], i)):
        least = min(range(count), key=lambda r: (load[r], len(found[r]), r))
        found[least].append(piece)
        load[least] += work[piece]
    return [sorted(pieces) for pieces in found]


SINGLE = Group()


def _packed(content: Any) -> Tensor:
    """Tensors and plain values as bytes, (n,) uint8, for another rank."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)


def _unpacked(content: Tensor) -> Any:
    """What `_packed` made bytes of, on the CPU."""
    return torch.load(io.BytesIO(content.numpy().tobytes()), map_location="cpu", weights_only=True)
