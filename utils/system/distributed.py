"""Several processes that share one run: who they are, which classes each of them owns, what they tell each other.

    $ torchrun --nproc_per_node=8 condense.py ...

PyTorch's launcher starts them, and PyTorch's process groups connect them: NCCL between GPUs, gloo between processors. A
program that was started without torchrun is a group of one: all classes are its own, and nothing is sent.

Nothing else in the program asks for a rank. What may happen once only, such as writing a file, is given to the first
rank; what all have to agree on, such as when to stop, they ask each other. Everything that waits for other ranks has a
time-out, and raises LostRank when one of them has ended.
"""

from __future__ import annotations

import io
import logging
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from utils.system.errors import UsageError, UserError, first_line

log = logging.getLogger("dream")
T = TypeVar("T")

WHOLE_NUMBERS = {1: torch.uint8, 2: torch.uint8, 4: torch.int32, 8: torch.int64}  # that hold an element's bits
ERROR = "error"  # where the first rank that fails says why
TIMED = 3  # calls of which the median counts
LAST_WORDS = 5.0  # seconds that torchrun lets another rank speak, which it ends when the first one has ended
_group: Group | None = None


class LostRank(UserError):
    """Another rank has ended, or does not answer any more."""


# --- Before there is a group ------------------------------------------------------------------------------------------


def launched() -> bool:
    """Whether torchrun has started this process."""
    return dist.is_available() and dist.is_torchelastic_launched()


def is_first() -> bool:
    """Whether this is the process that writes files and that people hear."""
    return not launched() or os.environ["RANK"] == "0"


def restarts() -> int:
    """How often torchrun has started it again, after a failure (--max-restarts)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) if launched() else 0


def local_rank() -> int | None:
    """Which of this machine's GPUs is this process's own; None without torchrun, where any may be."""
    return int(os.environ["LOCAL_RANK"]) if launched() else None


def in_the_name_of(message: str, *, lost: bool = False) -> str | None:
    """An error message as this process says it, its rank before it; None where others say the same, after which
    torchrun ends this process.

    lost: the message is that another rank has ended, which may have said why.
    """
    if not launched():
        return message
    if _group is None:  # a command line that is wrong is wrong for all
        said = message if is_first() else None
    else:
        said = None if _group.told(message, lost) else f"rank {_group.rank}: {message}"
    if said is None:
        time.sleep(LAST_WORDS)
    return said


# --- The group --------------------------------------------------------------------------------------------------------


@contextmanager
def joined(backends: str, *, minutes: float) -> Iterator[Group]:
    """All processes that torchrun has started, while the block runs; a group of one without it.

    backends: of torch.distributed, for tensors on a CPU in any case. minutes: that any of them waits for others.
    """
    global _group
    if not launched():
        yield ALONE
        return
    timeout = timedelta(minutes=minutes)
    try:
        store, rank, count = next(dist.rendezvous("env://", timeout=timeout))
        store = dist.PrefixStore(f"attempt {restarts()}", store)  # one store may serve all, with addresses of the dead
        dist.init_process_group(backends, store=store, rank=rank, world_size=count, timeout=timeout)
    except RuntimeError as error:
        raise UserError(f"torchrun: the ranks do not find each other ({first_line(error)})") from error
    _group = Group(rank, count, store)
    yield _group
    # Not after an error: those that are still at work would be waited for. The end of the process does it.
    dist.destroy_process_group()
    _group = None


class Group:
    """This process among all of a run. `sent` counts the bytes that it has given to others' use."""

    def __init__(self, rank: int = 0, count: int = 1, store: Any = None) -> None:
        self.rank, self.count, self.sent = rank, count, 0
        self.shares: list[list[int]] = []  # the classes of every rank
        self._store = store

    @property
    def alone(self) -> bool:
        return self.count == 1

    # --- What they tell each other ------------------------------------------------------------------------------------

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        return self._reduced(x, dist.ReduceOp.SUM)

    def all_reduce_disjoint(self, x: Tensor) -> Tensor:
        """Tensors of which every element is zero on all ranks but one, together, in place and bit for bit."""
        if not self.alone:
            self.all_reduce_sum(x.view(WHOLE_NUMBERS[x.element_size()]))  # as numbers -0.0 + 0.0 would be 0.0
        return x

    def all_reduce_max(self, *values: float) -> list[float]:
        """The largest of each value on all ranks."""
        return self._reduced(torch.tensor(values, dtype=torch.float64), dist.ReduceOp.MAX).tolist()

    def broadcast(self, find: Callable[[], T]) -> T:
        """What the first rank finds, for all of them: tensors (on the CPU), plain values, and lists and dicts of these.

        Raises on all of them the UserError that it raises.
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

    def either(self, first: T, others: T) -> T:
        """The one on the first rank, the other one elsewhere."""
        return first if self.rank == 0 else others

    def once(self, function: Callable[..., object], *arguments: Any) -> None:
        """Call it on the first rank. The others don't wait for it."""
        if self.rank == 0:
            function(*arguments)

    def told(self, message: str, lost: bool) -> bool:
        """Whether another rank has reported this very error, or any if this one is about losing it."""
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

    # --- Work that is shared out --------------------------------------------------------------------------------------

    def assigned(self, work: Sequence[float]) -> list[int]:
        """Which of several independent pieces of work, of such sizes, this rank does."""
        return shares(work, self.count)[self.rank]

    def shard(self, work: Sequence[float]) -> Shard:
        """Classes that take so much work each, shared out. Raises UsageError when there are fewer than ranks."""
        if len(work) < self.count:
            raise UsageError(
                f"torchrun: {self.count} ranks cannot share {len(work)} classes, which are not divided; start "
                f"{len(work)} processes or fewer (--nproc_per_node, --nnodes)"
            )
        self.shares = shares(work, self.count)
        return Shard(self, self.shares[self.rank], len(work))

    def seconds(self, *ways: Callable[[], object], wait: Callable[[], object], warm: int) -> list[float]:
        """Seconds that each of several ways to do the same takes the slowest rank: the median of some calls, after
        `warm` others.

        wait: for the device to be done.
        """
        found = []
        for way in ways:
            for _ in range(warm):
                way()
            seconds = []
            for _ in range(TIMED):
                wait()
                self.all_reduce_max(0)  # all start together
                began = time.perf_counter()
                way()
                wait()
                seconds.append(time.perf_counter() - began)
            found.append(statistics.median(self.all_reduce_max(*seconds)))
        return found


class Shard:
    """The classes of one rank, in ascending order, among all."""

    def __init__(self, group: Group, classes: list[int], total: int) -> None:
        self.group, self.classes, self.total = group, classes, total

    def all_gather(self, rows: Tensor) -> Tensor:
        """Rows of this rank's classes, (own, ...) -> those of all classes, (classes, ...), on all ranks."""
        if self.group.alone:
            return rows
        found = rows.new_zeros(self.total, *rows.shape[1:])
        found[self.classes] = rows
        return self.group.all_reduce_disjoint(found)

    def local(self, rows: Tensor) -> Tensor:
        """Rows of all classes -> those of this rank's."""
        return rows if self.group.alone else rows[self.classes]


def shares(work: Sequence[float], count: int) -> list[list[int]]:
    """Pieces of so much work each for `count` ranks: the largest first, always to the rank that has least."""
    found: list[list[int]] = [[] for _ in range(count)]
    load = [0.0] * count
    for piece in sorted(range(len(work)), key=lambda i: (-work[i], i)):
        least = min(range(count), key=lambda r: (load[r], len(found[r]), r))
        found[least].append(piece)
        load[least] += work[piece]
    return [sorted(pieces) for pieces in found]


ALONE = Group()


def _packed(content: Any) -> Tensor:
    """Tensors and plain values as bytes, (n,) uint8, for another rank."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)


def _unpacked(content: Tensor) -> Any:
    """What `_packed` made bytes of, on the CPU."""
    return torch.load(io.BytesIO(content.numpy().tobytes()), map_location="cpu", weights_only=True)
