"""One thread for every process of the tests: their tensors are tiny, and threads would only wait for each other."""

from __future__ import annotations

import os
import signal
import sys

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # in the background, where child processes would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before the first import of torch, and for child processes
if "gpu" not in sys.argv and "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # likewise: kernels for a GPU are tried on a CPU

import dataclasses
import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest

from tests import tally
from tests.killing import FOLDER, Operation, Server, recorded, tiny
from tests.outcome import Outcome, outcome


def interpreter_error() -> str | None:
    """Why kernels for a GPU cannot be tried on a CPU; None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "there is no Triton"
    return None if os.environ.get("TRITON_INTERPRET") == "1" else "Triton compiles for a GPU"


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker process (pytest -n) hands its tally of faults over."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["tally"] = [dataclasses.asdict(fault) for fault in tally.TALLY.values()]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Add up the tallies of the worker processes."""
    for counts in getattr(node, "workeroutput", {}).get("tally", []):
        tally.add(tally.Fault(**counts))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The tally of faults, for those who asked for faults."""
    if tally.TALLY and "faults" in terminalreporter.config.option.markexpr:
        terminalreporter.section("injected faults")
        for line in tally.table():
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """For runs of condense.py that do not pay for the import of PyTorch."""
    if not sys.platform.startswith("linux"):
        pytest.skip("needs Linux's /proc and pidfd")
    with Server() as server:
        yield server


@pytest.fixture(scope="session")
def undisturbed(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """What `tiny` computes when nothing happens to it."""
    results = tmp_path_factory.mktemp("undisturbed")
    ended = server.run(tiny(results))
    assert (ended.status, ended.err) == (0, ""), ended
    return outcome(results / FOLDER)


@pytest.fixture(scope="session")
def operations(server: Server, tmp_path_factory: pytest.TempPathFactory) -> list[Operation]:
    """Of such a run, on its files."""
    results = tmp_path_factory.mktemp("recorded") / "results"
    return recorded(server, results, tiny(results))
