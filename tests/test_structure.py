"""The dependency directions, read from the imports, and that importing does nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = list(ROOT.glob("*.py")) + [p for d in ("models", "utils", "figs") for p in (ROOT / d).glob("*.py")]
SCRIPTS = {"condense", "train"}
NUMERIC = {
    "analytic",
    "augment",
    "compilation",
    "evaluation",
    "formation",
    "forms",
    "images",
    "layout",
    "matching",
    "objectives",
    "pixels",
    "selection",
    "stages",
    "state",
    "synthetic",
    "training",
}
MODULES = {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for p in SOURCES}


def name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> set[str]:
    """Full names of what a file imports, wherever in the file it does."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module
            found |= {
                f"{node.module}.{a.name}" if f"{node.module}.{a.name}" in MODULES else node.module for a in node.names
            }
    return found


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_nothing_imports_a_script(path: Path) -> None:
    assert not imports(path) & SCRIPTS


@pytest.mark.parametrize("path", [p for p in SOURCES if p.parent.name == "models"], ids=name)
def test_models_import_torch_and_each_other_only(path: Path) -> None:
    for module in imports(path):
        top = module.split(".")[0]
        allowed = {"torch", "models", "torchvision"} if path.stem == "zoo" else {"torch", "models"}
        assert top in allowed or top in sys.stdlib_module_names, module


@pytest.mark.parametrize("path", [p for p in SOURCES if p.parent.name == "utils" and p.stem in NUMERIC], ids=name)
def test_numeric_parts_import_torch_models_and_each_other_only(path: Path) -> None:
    for module in imports(path):
        top, *rest = module.split(".")
        if top == "utils":
            assert rest[0] in NUMERIC | {"runtime", "device", "errors"}, module
        else:
            allowed = {"torch", "models", "sklearn"} if path.stem == "selection" else {"torch", "models"}
            assert top in allowed or top in sys.stdlib_module_names, module


@pytest.mark.parametrize(
    ("path", "library"),
    [
        ("utils/selection.py", "sklearn"),
        ("models/zoo.py", "torchvision"),
        ("utils/exchange.py", "safetensors"),
        ("utils/export.py", "safetensors"),
    ],
)
def test_a_large_library_is_imported_only_when_it_is_asked_for(path: str, library: str) -> None:
    tree = ast.parse((ROOT / path).read_text())
    top_level = [ast.unparse(node) for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert not [line for line in top_level if library in line]


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_only_the_scripts_and_the_options_know_the_command_line(path: Path) -> None:
    knows = {"argparse", "utils.options", "utils.flags"} & imports(path)
    assert not knows or name(path) in SCRIPTS | {"utils.options", "utils.flags"} or path.parent.name == "figs"


@pytest.mark.parametrize("path", SOURCES, ids=name)
@pytest.mark.parametrize(
    ("word", "owner"),
    [("torch.cuda", "utils.device"), ("os.environ", "utils.device"), (".isatty", "utils.runtime")],
)
def test_one_module_asks_about_the_machine_and_one_about_the_terminal(word: str, owner: str, path: Path) -> None:
    assert word not in path.read_text() or name(path) == owner


def test_dependencies_have_one_direction() -> None:
    graph = {name(p): imports(p) & MODULES for p in SOURCES}
    while graph:
        leaves = {module for module, uses in graph.items() if not uses - {module} & graph.keys()}
        assert leaves, f"a circle among {sorted(graph)}"
        graph = {module: uses - leaves for module, uses in graph.items() if module not in leaves}


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_torch_load_is_called_with_weights_only_and_nothing_else_unpickles(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            assert "weights_only=True" in ast.unparse(node)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("load", "loads"):
            assert ast.unparse(node.func.value) not in ("pickle", "dill", "joblib", "np", "numpy")


def test_importing_does_nothing(tmp_path: Path) -> None:
    code = f"""
import random, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
before, threads = torch.random.get_rng_state(), torch.get_num_threads()
for module in {sorted(MODULES)!r}:
    __import__(module)
assert torch.equal(before, torch.random.get_rng_state()) and threads == torch.get_num_threads()
assert not torch.cuda.is_initialized()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())
