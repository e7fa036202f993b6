"""Properties that must hold for whatever strangers hand over: few examples at every change, many with `-m faults`.

    PROPERTIES = {"noise": Property(check, strategies.binary(), few=20, many=1000)}  # check(place, example)
    test_few_examples, test_many_examples = both(PROPERTIES, "what strangers hand over")

Examples are the same in every run, and nothing is stored but hypothesis's tables, beside pytest's. A module that uses
`both` has a fixture `place`, the folder that all examples share.
"""

from __future__ import annotations

import string
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.configuration import set_hypothesis_home_dir
from hypothesis.strategies import SearchStrategy

from tests.tally import injected
from utils.system.errors import UserError

set_hypothesis_home_dir(Path(__file__).resolve().parents[2] / ".pytest_cache" / "hypothesis")

SECONDS = 10.0  # of the processor for one example
BYTES = 6e8  # of memory for all of them, beyond what the process had before
CARD: dict[str, Any] = {  # of a set that somebody has sent: what data.json must say
    "dataset": "digits", "image_folder": None, "class_names": list(string.digits), "ipc": 1, "factor": 1,
    "decode_type": "single", "normalization": {"mean": [0.5], "std": [0.25]},
    "settings": {"net_type": "convnet", "depth": 2, "epochs": 300, "lr": 0.01, "mixup": "cut"},
}  # fmt: skip


@dataclass(frozen=True)
class Property:
    """What `check(folder, example)` asserts of every example; all examples share the folder."""

    check: Callable[[Path, Any], None]
    examples: SearchStrategy[Any]
    few: int = 30
    many: int = 1000

    def hold(self, folder: Path, *, many: bool = False) -> None:
        """Raises what `check` raises, for the simplest example that hypothesis finds."""
        tried = 0

        def counted(example: Any) -> None:
            nonlocal tried
            began = time.process_time()
            self.check(folder, example)
            assert time.process_time() - began < SECONDS
            tried += 1

        wanted = self.many if many else self.few
        rules = settings(
            max_examples=wanted,
            deadline=None,
            database=None,
            derandomize=True,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        )
        with little_memory():
            rules(given(self.examples)(counted))()
        assert tried >= wanted, f"there are only {tried} such examples"


Test = Callable[[str, Path], None]


def both(properties: Mapping[str, Property], fault: str) -> tuple[Test, Test]:
    """The tests of a few examples, and of many."""

    @pytest.mark.parametrize("name", properties)
    def few(name: str, place: Path) -> None:
        properties[name].hold(place)

    @pytest.mark.slow
    @pytest.mark.faults
    @pytest.mark.parametrize("name", properties)
    def many(name: str, place: Path) -> None:
        with injected(fault, times=properties[name].many):
            properties[name].hold(place, many=True)

    return few, many


def in_one_line(error: UserError, *names: str) -> str:
    """The message, if it can be shown and holds these words."""
    message = str(error)
    assert message.isprintable() and error.status in (1, 2), repr(message)
    assert all(name in message for name in names), message
    return message


@contextmanager
def little_memory(most: float = BYTES) -> Iterator[None]:
    """The block's peak must stay within so many bytes of what the process has."""

    def peak() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

    with suppress(OSError):  # where it is allowed, the peak begins anew; otherwise it can only be higher by less
        Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    yield
    assert peak() - before < most, f"{(peak() - before) / 1e6:.0f} MB"
