"""condense.py in this process: runs from beginning to end, and runs that a signal stops at exact moments."""

from __future__ import annotations

import itertools
import os
import shlex
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import condense
from utils.method import evaluation
from utils.method.matching import MatchingStep
from utils.method.trajectory import TrajectoryStep

TINY = shlex.split(
    "--device cpu --ipc 2 -f 2 --niter 3 --inner_loop 4 --interval 2 --batch_real 8 --n_data 16 --batch_syn_max 6 "
    "--width 8 --epochs 2 --repeat 2"
)
MOMENTS: dict[str, list[tuple[Any, str]]] = {
    "step": [(MatchingStep, "__call__"), (TrajectoryStep, "__call__")],
    "evaluation": [(evaluation, "train_networks")],
}
STOPPED = 128 + signal.SIGTERM


@contextmanager
def signals(*at: int, during: str = "step") -> Iterator[None]:
    """SIGTERM arrives in these inner steps or evaluations, which are counted from one over all runs of the block."""
    count = itertools.count(1)

    def interrupted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*words: Any, **more: Any) -> Any:
            if next(count) in at:
                os.kill(os.getpid(), signal.SIGTERM)
            return function(*words, **more)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in MOMENTS[during]:
            patch.setattr(owner, name, interrupted(getattr(owner, name)))
        yield


def distilled(results: Path, argv: Sequence[str], *stops: int, during: str = "step") -> Path:
    """The run folder of a command that is stopped at these moments, and given again until it has ended well."""
    words = [*argv, "--results_dir", str(results)]
    with signals(*stops, during=during):
        statuses = [condense.main(words) for _ in range(len(stops) + 1)]
    assert statuses == [STOPPED] * len(stops) + [0]
    return max(results.glob("*/*/data.pt"), key=lambda file: file.stat().st_mtime_ns).parent
