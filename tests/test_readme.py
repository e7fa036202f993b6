"""The READMEs: their length, their links, and every command in them.

A command is either run here at tiny settings (RUN_HERE, RUN_ELSEWHERE), or marked with its time: `time: ...` in its
comment, in a comment line above it, or in brackets behind it, or a cell in a table's column of that name.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import condense
from figs import sweep

ROOT = Path(__file__).resolve().parent.parent
READMES = [ROOT / "README.md", *(ROOT / name / "README.md" for name in ("figs", "tests", "utils"))]
RUN = "results/digits/convnet2_f1_ipc1"  # where the first command of the README leaves its result
ARMS = "--vary init=random,kmeans --vary select=random,kmeans"
SWEEP = f"python3 -m figs.sweep {ARMS} --seeds 3 -- -d digits --ipc 10 --width 32 --niter 10 --inner_loop 50"
SWEEP += " --eval_every 1 --epochs 100 --repeat 2"
SWEPT = "results/digits/*init-{random,kmeans}_select-{random,kmeans}_seed*"

BRIEF = "--niter 1 --inner_loop 1 --n_data 8 --width 4 --batch_real 8 --epochs 1 --repeat 1 --device cpu --compile off"
ONCE = "--epochs 1 --repeat 1 --device cpu"

# Commands that the tests below run, and the flags that make them brief.
RUN_HERE = {
    "python3 condense.py": f"{BRIEF} --snapshot_every 1",
    "python3 condense.py --ipc 10": BRIEF,
    "python3 condense.py --ipc 1 --eval_every 10": f"{BRIEF} --tag again",
    "python3 condense.py --ipc 10 --eval_every 10": f"{BRIEF} --tag again",
    "python3 condense.py --method dm --ipc 10": BRIEF,
    "python3 condense.py --method dream+ --per_cluster 4": BRIEF,
    "torchrun --nproc_per_node=2 condense.py --device cpu": f"{BRIEF} --tag ranks",
    "python3 train.py": ONCE,
    "python3 train.py RUN --export DIR": "",
    SWEEP: BRIEF,
    "python3 -m figs.sweep --vary select=random,kmeans --seeds 3 -- -d digits --ipc 1 --eval_every 1 "
    "--snapshot_every 1": f"{BRIEF} --results_dir of_seeds",
    "python3 -m figs.sweep --vary select=kmeans --seeds 1 -- -d digits --ipc 1 --init random --eval_every 1 "
    "--snapshot_every 1 --repeat 3": f"{BRIEF} --results_dir of_networks",
    "python3 -m figs.curves RUN": "--out curves.png",
    f'python3 -m figs.curves {SWEPT} --baseline "init=random, select=random" --no_time': "",
    "python3 -m figs.ablation RUN1 RUN2": "--out ablation.png",
    "python3 -m figs.compare RUN1 RUN2": "",
    "python3 -m figs.evolution RUN": "",
    "python3 -m figs.evolution RUN --gif FILE.gif": "--out strip.png",
    "python3 -m figs.distilled RUN": "",
    "python3 -m figs.distilled RUN --out figs/cifar10_ipc1.png": "",
    "python3 -m figs.gradient_norms -d digits --class 3": "--updates 1 --count 8 --draws 1 --width 4 --device cpu",
    "python3 -m figs.targets -d digits --class 3": "--updates 1 --count 8 --draws 2 --width 4 --device cpu",
    "python3 -m figs.selection -d digits --class 3": "--updates 1 --count 8 --width 4 --device cpu",
}
RUN_ELSEWHERE = {
    "python3 condense.py --method dm2 --select kmeans": (
        "tests/method/test_methods.py", "test_the_worked_example_of_the_readme_is_a_seventh_framework",
    ),
}  # fmt: skip
FIRST = ("python3 condense.py", SWEEP)  # what the others need


class Command(NamedTuple):
    """A command of a README. time: whether it is marked with the time that it takes."""

    text: str  # on one line, without its comment
    time: bool
    words: list[str]  # as a shell would split it; patterns that match nothing stay as they are
    readme: str


def shell(text: str, *, folder: Path = ROOT) -> list[str]:
    """The words of the last command, after the assignments before it."""
    *before, command = text.split("\n")
    script = "\n".join([*before, f"printf '%s\\0' {command}"])
    done = subprocess.run(["bash", "-c", script], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.split("\0")[:-1]


def of_block(block: str, readme: str) -> Iterator[Command]:
    """The commands of a fenced block."""
    marked, assignments = False, ""
    for line in re.sub(r"\\\n\s*", "", block).split("\n"):
        code, _, comment = re.sub(r"^#", " #", line).partition(" #")
        if not code.strip():
            marked = "time:" in comment
        elif re.match(r"[A-Z]+=", code):
            assignments += code + "\n"
        for part in code.split("&&"):
            text = " ".join(part.split()).removeprefix("srun ")
            if re.match(r"(python3|torchrun) ", text):
                yield Command(text, marked or "time:" in comment, shell(assignments + text), readme)


def in_text(text: str, readme: str) -> Iterator[Command]:
    """The commands in the inline code of a paragraph, or of a table."""
    rows = text.split("\n") if text.startswith("|") else [" ".join(text.split())]
    time_column = [cell.strip() for cell in rows[0].split("|")].index("time") if "| time |" in rows[0] else None
    for row in rows:
        in_column = time_column is not None and bool(re.split(r"(?<!\\)\|", row)[time_column].strip())
        for code in re.finditer(r"`([^`]+)`", row):
            time = in_column or row[code.end() :].startswith(" (time: ")
            for part in code[1].split("&&"):
                command = part.strip()
                if re.match(r"(python3|torchrun) ", command):
                    yield Command(command, time, shell(command), readme)


def commands() -> Iterator[Command]:
    for path in READMES:
        readme = str(path.relative_to(ROOT))
        pieces = re.split(r"^```(\w*)\n(.*?)^```$", path.read_text(), flags=re.M | re.S)
        for text in pieces[::3]:
            for paragraph in text.split("\n\n"):
                yield from in_text(paragraph.strip(), readme)
        for language, block in zip(pieces[1::3], pieces[2::3], strict=True):
            if language == "bash":
                yield from of_block(block, readme)


COMMANDS = list(commands())


def id_of(command: Command) -> str:
    return f"{command.readme}: {command.text[:90]}"


def program(words: list[str]) -> tuple[str, list[str]]:
    """The module that a command runs, and its arguments."""
    if words[1] == "-m":
        return words[2], words[3:]
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    return words[script].removesuffix(".py").replace("/", "."), words[script + 1 :]


# --- Text -------------------------------------------------------------------------------------------------------------


def test_the_readme_has_at_most_200_lines_of_at_most_120_characters() -> None:
    lines = READMES[0].read_text().splitlines()
    assert len(lines) <= 200
    assert not [line for line in lines if len(line) > 120 and not line.startswith("|")]


def anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", path.read_text(), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(path: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.M | re.S)
    links = [link for link in re.findall(r"\]\(([^)]+)\)|src=\"([^\"]+)\"", text) for link in link if link]
    for link in links:
        if not link.startswith("https://"):
            name, _, anchor = link.partition("#")
            target = (path.parent / name).resolve() if name else path
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link
    assert path != READMES[0] or {f"{p.parent.name}/README.md" for p in READMES[1:]} <= set(links)


def test_the_table_of_files_names_every_module_once() -> None:
    text = READMES[3].read_text().split("| file | job |")[1].split("\n\n")[0]
    named, folder = [], ""
    for cell in re.findall(r"^\| ([^|]*) \|", text, flags=re.M):
        if heading := re.fullmatch(r"\*\*(\w+)/\*\*", cell):
            folder = heading[1]
        elif not cell.startswith("**"):
            named += [f"{folder}/{name}" for name in cell.split(", ")]
    there = [p for p in (ROOT / "utils").rglob("*.*") if p.suffix in (".py", ".cpp") and p.name != "__init__.py"]
    assert sorted(named) == sorted(str(p.relative_to(ROOT / "utils")) for p in there)


# --- Commands ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS, ids=id_of)
def test_every_command_is_run_by_a_test_or_marked_with_its_time(command: Command) -> None:
    assert command.time or command.text in RUN_HERE or command.text in RUN_ELSEWHERE, command.text


def test_the_lists_of_commands_that_are_run_hold_no_others() -> None:
    assert {*RUN_HERE, *RUN_ELSEWHERE} <= {command.text for command in COMMANDS}
    for file, test in RUN_ELSEWHERE.values():
        assert f"def {test}(" in (ROOT / file).read_text()


class Parsed(Exception):
    """What a program's arguments were read as."""

    def __init__(self, given: argparse.Namespace) -> None:
        super().__init__()
        self.given = given


@pytest.mark.parametrize("command", COMMANDS, ids=id_of)
def test_every_command_has_flags_that_exist(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of sweeps, those of every run; the worked example's dm2 stands for dm."""
    name, argv = program([word.replace("dm2", "dm") for word in command.words])
    if name == "pytest":
        check_pytest(argv)
        return
    parse = argparse.ArgumentParser.parse_known_args

    def parse_and_stop(self: argparse.ArgumentParser, *args: Any, **more: Any) -> None:
        given, unknown = parse(self, *args, **more)
        assert not unknown
        raise Parsed(given)

    with monkeypatch.context() as patch, pytest.raises(Parsed) as parsed:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", parse_and_stop)
        importlib.import_module(name).main(argv)
    if name == "condense":
        assert sweep.plan([], 1, argv)  # a sweep of one run, which resolves its options
    elif name == "figs.sweep":
        given = parsed.value.given
        assert sweep.plan(given.vary, given.seeds, given.more)


def check_pytest(argv: list[str]) -> None:
    """Raises AssertionError for a marker, a name or a file that is not there."""
    parser = argparse.ArgumentParser()
    parser.add_argument("-m")
    parser.add_argument("-k")
    parser.add_argument("-s", action="store_true")
    parser.add_argument("files", nargs="*")
    given = parser.parse_args(argv)
    assert given.m is None or f'"{given.m}: ' in (ROOT / "pyproject.toml").read_text()
    tests = [ROOT / name for name in given.files] or list((ROOT / "tests").rglob("test_*.py"))
    assert given.k is None or any(given.k in test.read_text() for test in tests)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in which the first commands have been run."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "figs").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sweep, "run", lambda planned: condense.main(planned.words))  # in a process of its own otherwise
        for text in FIRST:
            run_here(text.replace("--seeds 3", "--seeds 2"), RUN_HERE[text])
        yield folder


def run_here(text: str, flags: str) -> None:
    """Run a command in this process and folder, with more flags at its end."""
    of_arm = "results/digits/convnet2_f1_ipc10_init-random_select-{}_seed0"
    runs = {"RUN1": of_arm.format("kmeans"), "RUN2": of_arm.format("random"), "RUN": RUN}
    words = [runs.get(word, word) for word in shell(text, folder=Path.cwd())]
    name, argv = program(words)
    assert importlib.import_module(name).main([*argv, *shlex.split(flags)]) == 0


@pytest.mark.parametrize("text", [text for text in RUN_HERE if text not in FIRST and "torchrun" not in text])
def test_commands_run(place: Path, text: str) -> None:
    run_here(text, RUN_HERE[text])


@pytest.mark.slow
@pytest.mark.parametrize("text", [text for text in RUN_HERE if "torchrun" in text])
def test_commands_of_torchrun_run(tmp_path: Path, text: str) -> None:
    script = text.replace("condense.py", str(ROOT / "condense.py")).removeprefix("torchrun ")
    words = [sys.executable, "-m", "torch.distributed.run", *shlex.split(script), *shlex.split(RUN_HERE[text])]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_lines_of_python_run(tmp_path: Path) -> None:
    lines = READMES[0].read_text().split("```python\n")[1].split("```")[0]
    assert lines.count("ipc=1)") == lines.count("repeat=5)") == 1
    brief = 'ipc=1, niter=1, inner_loop=1, n_data=8, width=4, batch_real=8, epochs=1, repeat=1, device="cpu")'
    lines = lines.replace("ipc=1)", brief).replace("repeat=5)", 'repeat=2, epochs=1, device="cpu")')
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", lines]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if re.fullmatch(r"convnet2 [a-z ]+ [\d.]+ [\d.]+ 2", line)]
    assert len(rows) >= 2 and "distilled set" in rows[0]
