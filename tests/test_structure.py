"""The layout: imports go down by folder, docstrings and signatures keep to the rules, nothing is ever unpickled."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [*ROOT.glob("*.py"), *(p for d in ("models", "utils", "figs") for p in (ROOT / d).rglob("*.py"))]
# The layers, lowest first: a module imports from its own folder and from lower layers.
LAYERS = (
    {"models", "utils.system"},
    {"utils.files", "utils.numerics"},
    {"utils.method"},
    {"data"},
    {"utils.runs"},
    {"utils.config"},
    {"condense", "train", "figs"},
)


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def name(path: Path) -> str:
    """`utils.method.state` for its file."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name(path): path for path in SOURCES if name(path) != "utils"}


@cache
def imports(path: Path) -> set[str]:
    """Full names of what a file imports, wherever in the file it does."""
    modules = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            modules |= {f if f in MODULES else node.module for f in full}
    return modules


def ours(module: str) -> set[str]:
    """The modules of ours that one of them imports."""
    return imports(MODULES[module]) & MODULES.keys()


def functions(module: str) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(tree(MODULES[module])) if isinstance(node, ast.FunctionDef))


def folder(module: str) -> str:
    """`utils.method` of `utils.method.state`; `figs` of `figs.sweep`."""
    return ".".join(module.split(".")[: 2 if module.startswith("utils.") else 1])


def layer(module: str) -> int:
    (number,) = (i for i, folders in enumerate(LAYERS) if folder(module) in folders)
    return number


# --- Layers -----------------------------------------------------------------------------------------------------------


def test_imports_go_down_by_folder() -> None:
    up = [
        f"{here} imports {there}"
        for here in MODULES
        for there in ours(here)
        if folder(there) != folder(here) and layer(there) >= layer(here)
    ]
    assert not up


def test_dependencies_have_one_direction() -> None:
    graph = {module: ours(module) for module in MODULES}
    while graph:
        leaves = {module for module, uses in graph.items() if not uses - {module} & graph.keys()}
        assert leaves, f"a circle among {sorted(graph)}"
        graph = {module: uses - leaves for module, uses in graph.items() if module not in leaves}


def test_nothing_imports_a_script() -> None:
    assert not [module for module in MODULES if ours(module) & {"condense", "train"}]


BESIDES = {"models.zoo": {"torchvision"}, "utils.numerics.block_triton": {"triton"}}


def test_models_and_numerics_import_torch_and_nothing_large_besides() -> None:
    for module, path in MODULES.items():
        if folder(module) in ("models", "utils.numerics"):
            allowed = {"torch", "models", "utils"} | BESIDES.get(module, set())
            assert {used.split(".")[0] for used in imports(path)} <= allowed | sys.stdlib_module_names, module


def test_one_module_alone_puts_everything_together() -> None:
    below = [module for module in MODULES if layer(module) < layer("condense")]
    assert [module for module in below if len(ours(module)) > 12] == ["utils.config.build"]


def test_only_config_and_the_scripts_know_the_command_line() -> None:
    knowing = [module for module, path in MODULES.items() if "argparse" in imports(path)]
    assert {folder(module) for module in knowing} <= {"utils.config", "figs"}


@pytest.mark.parametrize(
    ("word", "owners"),
    [
        ("torch.cuda", {"utils.system.device", "utils.numerics.compute"}),
        ("os.environ", {f"utils.system.{name}" for name in ("device", "distributed", "process", "waiting")}),
        (".isatty", {"utils.system.process"}),
        ("torch.distributed", {"utils.system.distributed"}),
        (".rank ", {"utils.system.distributed"}),
    ],
)
def test_one_module_each_asks_about_the_machine_the_terminal_and_ranks(word: str, owners: set[str]) -> None:
    assert {module for module, path in MODULES.items() if word in path.read_text()} <= owners


@pytest.mark.parametrize(
    ("path", "library"),
    [
        ("utils/method/selection.py", "sklearn"),
        ("models/zoo.py", "torchvision"),
        ("utils/numerics/compilation.py", "triton"),
        ("utils/runs/formats.py", "safetensors"),
        ("utils/runs/export.py", "safetensors"),
        ("utils/config/configfile.py", "yaml"),
        ("utils/files/hub.py", "huggingface_hub"),
    ],
)
def test_a_large_library_is_imported_only_when_it_is_asked_for(path: str, library: str) -> None:
    top_level = [ast.unparse(n) for n in tree(ROOT / path).body if isinstance(n, (ast.Import, ast.ImportFrom))]
    assert not [line for line in top_level if library in line]


def test_importing_does_nothing(tmp_path: Path) -> None:
    importable = sorted(
        MODULES if importlib.util.find_spec("triton") else MODULES.keys() - {"utils.numerics.block_triton"}
    )
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch
before, threads = torch.random.get_rng_state(), torch.get_num_threads()
for module in {importable!r}:
    __import__(module)
assert torch.equal(before, torch.random.get_rng_state()) and threads == torch.get_num_threads()
assert not torch.cuda.is_initialized()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


# --- Form -------------------------------------------------------------------------------------------------------------


def test_functions_take_at_most_seven_positional_parameters() -> None:
    for module in MODULES:
        for f in functions(module):
            if "triton.jit" in map(ast.unparse, f.decorator_list):
                continue  # a kernel is given every tensor and every constant by itself
            parameters = [a.arg for a in (*f.args.posonlyargs, *f.args.args) if a.arg not in ("self", "cls")]
            assert len(parameters) <= 7, f"{module}.{f.name}({', '.join(parameters)})"


def test_a_docstring_s_first_line_stands_alone() -> None:
    """It says what it is about: no `Of ...`, no `The same ...`, no `Them`."""
    for module, path in MODULES.items():
        for node in ast.walk(tree(path)):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (text := ast.get_docstring(node)):
                leaning = re.match(r"(Of|And|The same|As above|Those|These|It|Them|Likewise|Ditto)\b", text)
                assert not leaning, f"{module}: {text.splitlines()[0]}"


def test_the_main_loop_fits_on_one_screen() -> None:
    (loop,) = (f for f in functions("condense") if f.name == "condense")
    assert loop.end_lineno is not None and loop.end_lineno - loop.lineno < 32
    assert len((ROOT / "condense.py").read_text().splitlines()) <= 225


# --- Nothing is unpickled ---------------------------------------------------------------------------------------------

UNPICKLERS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml"}
CONTROL = "test_bad_input.py"  # where a test shows that its malicious file would do harm if it were unpickled


def unpickles(call: ast.Call, *, imported: set[str]) -> bool:
    """Whether a call loads objects in any other way than torch.load with weights_only=True, or runs text as code."""
    function = ast.unparse(call.func)
    module, _, member = function.rpartition(".")
    literal = {word.arg: ast.unparse(word.value) for word in call.keywords}
    if function == "torch.load":
        return literal.get("weights_only") != "True"
    if module == "yaml":
        return member != "compose"  # which makes a tree of texts; all else could make objects
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


def test_nothing_is_loaded_but_tensors() -> None:
    everything = [p for p in ROOT.rglob("*.py") if not {"data", "results"} & set(p.relative_to(ROOT).parts[:1])]
    unpickling = set()
    for path in everything:
        if not any(part.startswith(".") for part in path.relative_to(ROOT).parts):
            imported = unpicklers_by_name(tree(path))
            calls = [n for n in ast.walk(tree(path)) if isinstance(n, ast.Call) and unpickles(n, imported=imported)]
            unpickling |= {path.name} if calls else set()
    assert unpickling == {CONTROL}


def test_files_of_tensors_are_read_in_one_place() -> None:
    ranks = "utils.system.distributed"  # which send each other tensors that they have made themselves
    loading = {module for module, path in MODULES.items() if "torch.load(" in path.read_text()}
    assert loading == {ranks}
    for path in SOURCES:
        assert not (UNPICKLERS - {"yaml"}) & {module.split(".")[0] for module in imports(path)}


@pytest.mark.parametrize(
    "call",
    [
        "torch.load(f)",
        "torch.load(f, weights_only=w)",
        "pickle.loads(b)",
        "np.load(f, allow_pickle=True)",
        "eval(t)",
        "yaml.safe_load(t)",
    ],
)
def test_the_scan_finds_what_it_looks_for(call: str) -> None:
    (node,) = (n for n in ast.walk(ast.parse(call)) if isinstance(n, ast.Call))
    assert unpickles(node, imported=set())
