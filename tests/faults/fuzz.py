"""Properties that must hold for whatever strangers hand over: few examples at every change, many with `-m faults`.

    PROPERTIES = {"noise is refused": Property(check, strategies.binary(), few=20, many=1000)}  # check(folder, example)

    @pytest.mark.parametrize("name", PROPERTIES)
    def test_a_few_...(name, tmp_path):
        PROPERTIES[name].hold(tmp_path)

    @pytest.mark.slow
    @pytest.mark.faults
    @pytest.mark.parametrize("name", PROPERTIES)
    def test_many_...(name, tmp_path):
        with injected("what strangers hand over", times=PROPERTIES[name].many):
            PROPERTIES[name].hold(tmp_path, many=True)

Examples are the same in every run, and nothing is stored but hypothesis's tables, beside pytest's.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis.configuration import set_hypothesis_home_dir
from hypothesis.strategies import SearchStrategy

set_hypothesis_home_dir(Path(__file__).resolve().parents[2] / ".pytest_cache" / "hypothesis")

SECONDS = 10.0  # of the processor for one example
BYTES = 6 * 10**8  # of memory for all of them, beyond what the process had before


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


@contextmanager
def little_memory() -> Iterator[None]:
    """Fails if the block takes more than BYTES."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) < BYTES
