"""Ranks: the processes that share one run, the classes that each of them owns, and their collective operations.

    $ torchrun --nproc_per_node=8 condense.py ...

PyTorch's launcher starts them, and PyTorch's process groups connect them: NCCL between GPUs, gloo between processors. A
program that was started without torchrun is a group of one: all classes are its own, and nothing is sent.

Nothing else in the program asks for a rank. What must happen once only, such as writing a file, is a function under
`rank_zero_only`; what all have to agree on, such as when to stop, is a collective operation. Every collective operation
has a time-out, and raises LostRank when another rank has ended. Between GPUs, which are not waited for, the next
operation raises it: nothing that was computed in the meantime is saved, as every save begins with one.
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

INTEGERS = {1: torch.uint8, 2: torch.uint8, 4: torch.int32, 8: torch.int64}  # by bytes of an element
ERROR = "error"  # key of the store under which the first rank that fails says why
LAST_WORDS = 5.0  # seconds before a failed rank ends: torchrun then ends the others, which may have more to say
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
    """Number of times that torchrun has started this process again after a failure (--max-restarts)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) if launched() else 0


def local_rank() -> int | None:
    """Number of the GPU of this machine that belongs to this process; None without torchrun."""
    return int(os.environ["LOCAL_RANK"]) if launched() else None


def message_of_rank(message: str, *, lost: bool = False) -> str | None:
    """Error message with this process's rank before it, or None where another rank has reported the error.

    lost: whether the message is that another rank has ended, which may have said why. Waits before it returns None.
    """
    if not launched():
        return message
    if _group is None:  # a wrong command line is wrong on all ranks
        text = message if is_first() else None
    else:
        text = None if _group.reported(message, lost) else f"rank {_group.rank}: {message}"
    if text is None:
        time.sleep(LAST_WORDS)
    return text


# --- The group --------------------------------------------------------------------------------------------------------


@contextmanager
def process_group(backends: str, *, minutes: float) -> Iterator[Group]:
    """Connect all processes that torchrun started while the block runs, and yield their group; alone without torchrun.

    backends: those of torch.distributed, one for CPU tensors among them. minutes: time-out of every collective
    operation. Raises UserError when the ranks do not find each other.
    """
    global _group
    if not launched():
        yield SINGLE
        return
    timeout = timedelta(minutes=minutes)
    # NCCL's operations that fail or time out are given up, so that the next one raises an error that can be told in one
    # line. By default PyTorch aborts the process, with a page of C++.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "2")
    try:
        store, rank, count = next(dist.rendezvous("env://", timeout=timeout))
        # After a restart the old store may still be there, with addresses of dead ranks.
        store = dist.PrefixStore(f"attempt {restart_count()}", store)
        dist.init_process_group(backends, store=store, rank=rank, world_size=count, timeout=timeout)
    except RuntimeError as error:
        raise UserError(f"torchrun: the ranks do not find each other ({first_line(error)})") from error
    _group = Group(rank, count, store)
    yield _group
    # Not after an error: it would wait for ranks that are still at work. The end of the process closes the group then.
    dist.destroy_process_group()
    _group = None


class Group:
    """A rank's view of all ranks of a run: collective operations, and how work is shared.

    `sent` counts the bytes that this rank has given to collective operations.
    """

    def __init__(self, rank: int = 0, count: int = 1, store: Any = None) -> None:
        self.rank, self.count, self.sent = rank, count, 0
        self.shares: list[list[int]] = []  # the classes of every rank
        self._store = store

    @property
    def alone(self) -> bool:
        """Whether this is the only rank."""
        return self.count == 1

    # --- Collective operations ----------------------------------------------------------------------------------------

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        """Sum of a tensor over all ranks, in place."""
        return self._reduced(x, dist.ReduceOp.SUM)

    def all_reduce_disjoint(self, x: Tensor) -> Tensor:
        """Sum over all ranks of a tensor whose every element is zero on all ranks but one, in place and bit for bit."""
        if not self.alone:
            self.all_reduce_sum(x.view(INTEGERS[x.element_size()]))  # as floats, -0.0 + 0.0 would be 0.0
        return x

    def all_reduce_max(self, *values: float) -> list[float]:
        """Maximum of each value over all ranks."""
        return self._reduced(torch.tensor(values, dtype=torch.float64), dist.ReduceOp.MAX).tolist()

    def broadcast(self, function: Callable[[], T]) -> T:
        """Result of a function that rank 0 alone calls, on every rank.

        It consists of CPU tensors, plain values, lists and dicts. A UserError that the function raises on rank 0 is
        raised on every rank.
        """
        if self.alone:
            return function()
        outcome: Any = None  # [result or message, exit status of the error or 0]
        buffer = io.BytesIO()
        if self.rank == 0:
            try:
                outcome = [function(), 0]
            except UserError as error:
                outcome = [str(error), error.status]
            torch.save(outcome, buffer)
        size = torch.tensor([buffer.tell()])
        self._waiting(lambda: dist.broadcast(size, 0))
        given = bytearray(buffer.getvalue() or int(size))  # zeros elsewhere, filled through `content`
        content = torch.frombuffer(given, dtype=torch.uint8)
        self._waiting(lambda: dist.broadcast(content, 0))
        self.sent += len(content)
        if self.rank != 0:
            outcome = torch.load(io.BytesIO(given), map_location="cpu", weights_only=True)
        result, status = outcome
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
        """Run a collective operation. Raises LostRank when another rank has ended or does not answer in time."""
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
        """Classes of this rank, balanced by the cost of each; also notes those of all ranks in `shares`.

        Raises UsageError when there are fewer classes than ranks.
        """
        if len(work) < self.count:
            raise UsageError(
                f"torchrun: {self.count} ranks cannot share {len(work)} classes, which are not divided; start "
                f"{len(work)} processes or fewer (--nproc_per_node, --nnodes)"
            )
        self.shares = balanced(work, self.count)
        return Shard(self, self.shares[self.rank], len(work))


class Shard:
    """Classes that a rank owns, in ascending order, among `total` classes."""

    def __init__(self, group: Group, classes: list[int], total: int) -> None:
        self.group, self.classes, self.total = group, classes, total

    def all_gather(self, rows: Tensor) -> Tensor:
        """Rows of all classes (classes, ...) on every rank, from each rank's rows of its own classes (own, ...)."""
        if self.group.alone:
            return rows
        gathered = rows.new_zeros(self.total, *rows.shape[1:])
        gathered[self.classes] = rows
        return self.group.all_reduce_disjoint(gathered)

    def local(self, rows: Tensor) -> Tensor:
        """Rows of this rank's classes, from rows of all classes."""
        return rows if self.group.alone else rows[self.classes]


def balanced(work: Sequence[float], count: int) -> list[list[int]]:
    """Indices of work items for each of `count` ranks: the costliest first, always to the rank with the least work."""
    shares: list[list[int]] = [[] for _ in range(count)]
    load = [0.0] * count
    for item in sorted(range(len(work)), key=lambda i: (-work[i], i)):
        least = min(range(count), key=lambda r: (load[r], len(shares[r]), r))
        shares[least].append(item)
        load[least] += work[item]
    return [sorted(items) for items in shares]


SINGLE = Group()
