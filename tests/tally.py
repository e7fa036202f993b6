"""A tally of the faults that tests really inject, printed as a table at the end of `python3 -m pytest -m faults`.

    with injected("kill -9 in the middle of a write") as fault:
        ...                                     # the fault itself, and asserting that it is survived
        fault.kept(result == expected)          # a result that is gone or another one fails the test and is counted

A fault that does not apply (a package that is missing, say) is not counted: skip before the block.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Fault:
    """One kind of fault, in all tests of this process."""

    name: str
    injected: int = 0
    survived: int = 0
    lost: int = 0

    def kept(self, same: bool) -> bool:
        """Whether a result is there and the expected one: True, or an AssertionError after counting a lost result."""
        self.lost += not same
        assert same, f"after this fault a result is lost, or another one: {self.name}"
        return True


TALLY: dict[str, Fault] = {}  # in the order in which they are seen first


@contextmanager
def injected(name: str, times: int = 1) -> Iterator[Fault]:
    """Count a fault that the block injects `times` times; as survived, too, unless the block raises."""
    fault = TALLY.setdefault(name, Fault(name))
    fault.injected += times
    yield fault
    fault.survived += times


def add(counts: Fault) -> None:
    """Count what another process has counted."""
    fault = TALLY.setdefault(counts.name, Fault(counts.name))
    fault.injected += counts.injected
    fault.survived += counts.survived
    fault.lost += counts.lost


def table() -> list[str]:
    """The tally, and its totals in the last line."""
    faults = [*TALLY.values()]
    total = Fault(
        "all faults",
        sum(fault.injected for fault in faults),
        sum(fault.survived for fault in faults),
        sum(fault.lost for fault in faults),
    )
    width = max(len(fault.name) for fault in [*faults, total])
    head = f"{'fault':{width}}{'times injected':>16}{'survived':>10}{'results lost':>14}"
    rows = [f"{f.name:{width}}{f.injected:>16}{f.survived:>10}{f.lost:>14}" for f in [*faults, total]]
    return [head, *rows]
