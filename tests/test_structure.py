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
    "passes",
    "pixels",
    "selection",
    "sources",
    "stages",
    "state",
    "synthetic",
    "training",
    "trajectory",
    "vectors",
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
            assert rest[0] in NUMERIC | {"runtime", "device", "errors", "ranks"}, module
        else:
            allowed = {"torch", "models", "sklearn"} if path.stem == "selection" else {"torch", "models"}
            assert top in allowed or top in sys.stdlib_module_names, module


@pytest.mark.parametrize(
    ("path", "library"),
    [
        ("utils/method/selection.py", "sklearn"),
        ("models/zoo.py", "torchvision"),
        ("utils/runs/sets.py", "safetensors"),
        ("utils/runs/export.py", "safetensors"),
    ],
)
def test_a_large_library_is_imported_only_when_it_is_asked_for(path: str, library: str) -> None:
    tree = ast.parse((ROOT / path).read_text())
    top_level = [ast.unparse(node) for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert not [line for line in top_level if library in line]


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_only_the_scripts_and_what_interprets_options_know_the_command_line(path: Path) -> None:
    knows = {"argparse", "utils.config.options", "utils.config.flags"} & imports(path)
    interpreting = {f"utils.{stem}" for stem in ("options", "flags", "recipes", "overview", "expert_runs", "parts")}
    assert not knows or name(path) in SCRIPTS | interpreting or path.parent.name == "figs"


@pytest.mark.parametrize("path", SOURCES, ids=name)
@pytest.mark.parametrize(
    ("word", "owners"),
    [
        ("torch.cuda", {"utils.system.device"}),
        ("os.environ", {"utils.system.device", "utils.system.distributed"}),
        (".isatty", {"utils.system.process"}),
        ("torch.distributed", {"utils.system.distributed"}),
        (".rank ", {"utils.system.distributed"}),
    ],
)
def test_one_module_each_asks_about_the_machine_the_terminal_and_ranks(word: str, owners: set[str], path: Path) -> None:
    assert word not in path.read_text() or name(path) in owners


def test_dependencies_have_one_direction() -> None:
    graph = {name(p): imports(p) & MODULES for p in SOURCES}
    while graph:
        leaves = {module for module, uses in graph.items() if not uses - {module} & graph.keys()}
        assert leaves, f"a circle among {sorted(graph)}"
        graph = {module: uses - leaves for module, uses in graph.items() if module not in leaves}


# --- Nothing is unpickled ---------------------------------------------------------------------------------------------

UNPICKLERS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml"}
CONTROL = (
    "tests/faults/test_bad_input.py"  # where a test shows that its malicious file would do harm if it were unpickled
)


def unpickles(call: ast.Call, *, imported: set[str]) -> bool:
    """Whether a call loads objects in any other way than torch.load with weights_only=True, or runs text as code."""
    function = ast.unparse(call.func)
    module, _, member = function.rpartition(".")
    literal = {word.arg: ast.unparse(word.value) for word in call.keywords}
    if function == "torch.load":
        return literal.get("weights_only") != "True"
    if member in ("load", "loads", "Unpickler", "open") and module.split(".")[0] in UNPICKLERS:
        return True
    if module in ("np", "numpy") and member in ("load", "fromfile"):
        return literal.get("allow_pickle", "False") != "False"
    forbidden = ("torch.jit.load", "torch.hub.", "torch.package.", "torch.serialization.", "pd.read_pickle")
    return function in {"eval", "exec", "__import__"} | imported or function.startswith(forbidden)


def unpicklers_by_name(tree: ast.Module) -> set[str]:
    """What `from pickle import loads as x` and the like make callable under another name."""
    return {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in UNPICKLERS
        for alias in node.names
    }


EVERYTHING = [p for p in ROOT.rglob("*.py") if not {"data", "results"} & set(p.relative_to(ROOT).parts[:1])]
EVERYTHING = [p for p in EVERYTHING if not any(part.startswith(".") for part in p.relative_to(ROOT).parts)]


@pytest.mark.parametrize("path", EVERYTHING, ids=name)
def test_nothing_is_loaded_but_tensors(path: Path) -> None:
    tree = ast.parse(path.read_text())
    imported = unpicklers_by_name(tree)
    found = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and unpickles(n, imported=imported)]
    assert bool(found) == (str(path.relative_to(ROOT)) == CONTROL), [ast.unparse(call) for call in found]


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_files_of_tensors_are_read_in_one_place(path: Path) -> None:
    assert "torch.load(" not in path.read_text() or name(path) == "utils.files.tensors"
    assert not UNPICKLERS & {module.split(".")[0] for module in imports(path)}


@pytest.mark.parametrize(
    "call",
    ["torch.load(f)", "torch.load(f, weights_only=w)", "pickle.loads(b)", "np.load(f, allow_pickle=True)", "eval(t)"],
)
def test_the_scan_finds_what_it_looks_for(call: str) -> None:
    (node,) = (n for n in ast.walk(ast.parse(call)) if isinstance(n, ast.Call))
    assert unpickles(node, imported=set())


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
