"""pyproject.toml: what an installation brings is what the repository has and requirements.txt names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

tomllib = pytest.importorskip("tomllib", reason="in Python's library since 3.11")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def settings() -> dict[str, Any]:
    with open(ROOT / "pyproject.toml", "rb") as file:
        return dict(tomllib.load(file))


def requirements() -> tuple[list[str], list[str]]:
    """The lines of requirements.txt for a run, and those for the tests."""
    for_a_run, for_tests = (ROOT / "requirements.txt").read_text().split("# For the tests")
    lines = [for_a_run.splitlines(), for_tests.splitlines()[1:]]
    runtime, testing = ([line for line in part if line and not line.startswith("#")] for part in lines)
    return runtime, testing


def test_dependencies_are_those_of_requirements_txt(settings: dict[str, Any]) -> None:
    runtime, testing = requirements()
    assert settings["project"]["dependencies"] == runtime
    assert settings["project"]["optional-dependencies"] == {"test": testing}


def test_every_module_and_package_is_installed(settings: dict[str, Any]) -> None:
    setuptools = pytest.importorskip("setuptools")
    tool = settings["tool"]["setuptools"]
    assert sorted(tool["py-modules"]) == sorted(p.stem for p in ROOT.glob("*.py"))
    found = setuptools.find_packages(str(ROOT), include=tool["packages"]["find"]["include"])
    folders = {p.parent for name in ("models", "utils", "figs") for p in (ROOT / name).rglob("*.py")}
    assert sorted(found) == sorted(".".join(folder.relative_to(ROOT).parts) for folder in folders)
    others = {p.relative_to(ROOT) for folder in folders for p in folder.glob("*.cpp")}
    assert tool["package-dir"] == {"": "."}  # otherwise a working folder's data/ would hide data.py
    named = tool["package-data"]
    assert {p for p in others if f"*{p.suffix}" in named.get(".".join(p.parent.parts), [])} == others


def test_python_is_the_version_that_the_checks_are_for(settings: dict[str, Any]) -> None:
    (oldest,) = re.findall(r">=(\d\.\d+)", str(settings["project"]["requires-python"]))
    assert settings["tool"]["mypy"]["python_version"] == oldest
    assert settings["tool"]["ruff"]["target-version"] == "py" + oldest.replace(".", "")
