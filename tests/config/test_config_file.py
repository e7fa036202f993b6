"""--config: flags from a file, or the settings of another run; what it may not hold, and what flags beside it do."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import condense
import train
from tests.files import QUICK, last_json, quick, refused
from utils.config import configfile, resolve
from utils.config.options import CondenseOptions
from utils.files import atomic
from utils.runs.card import CARD
from utils.runs.folder import OPTIONS
from utils.system.errors import UsageError, UserError


@pytest.fixture(autouse=True)
def in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def written(content: str | dict[str, Any], name: str = "c.json") -> str:
    """The name of a file with this content."""
    Path(name).write_text(content if isinstance(content, str) else json.dumps(content))
    return name


def resolved(*argv: str) -> resolve.Resolved:
    return resolve.condense(argv, "")


def of_run(*argv: str) -> CondenseOptions:
    """The options of a command, which options.json holds afterwards."""
    o = resolved(*argv).options
    atomic.write_json(Path("options.json"), {"options": resolve.as_saved(o), "sessions": []})
    return o


# --- Flags in a file --------------------------------------------------------------------------------------------------


def test_a_file_counts_as_flags_and_the_command_line_wins() -> None:
    file = written({"method": "dm", "ipc": 10, "batch-real": 16, "lr_img": 1e-3, "tag": None, "tensorboard": True})
    found = resolved("--config", file, "--ipc", "5")
    o = found.options
    assert (o.method, o.ipc, o.batch_real, o.lr_img, o.tag, o.tensorboard) == ("dm", 5, 16, 1e-3, None, True)
    assert o.match == "embed", "the method's own settings apply below"
    assert [found.origin[name] for name in ("batch_real", "ipc", "match")] == ["--config", "flag", "method"]
    assert o.config == file and "config" not in resolve.saved_settings(o)


def test_false_is_a_value_where_a_method_switches_something_on() -> None:
    assert resolved("--method", "dc").options.fc
    o = resolved("--config", written({"method": "dc", "fc": False, "reproduce": False})).options
    assert not o.fc and o == dataclasses.replace(resolved("-m", "dc").options, fc=False, config="c.json")


def test_yaml_is_read_as_text_and_makes_nothing() -> None:
    pytest.importorskip("yaml")
    file = written("# a comment\ncompile: off\nlr-img: 1e-3\nreproduce: no\ntag: null\nseed: 010\n", "c.yaml")
    o = resolved("--config", file).options
    assert (o.compile, o.lr_img, o.reproduce, o.tag, o.seed) == ("off", 1e-3, False, None, 10)
    file = written("baselines: [random, kmeans]\nrun: my.pt\nreal: yes", "t.yml")
    given = resolve.train_flags(["--config", file], "")
    assert given == {"baselines": ["random", "kmeans"], "run": ["my.pt"], "real": True, "config": "t.yml"}
    bomb = "a0: &a0 [x]\n" + "".join(f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]\n" for i in range(9))
    for text, says in (
        (bomb + "ipc: *a9", "'a0' is no flag"),
        ("ipc: &a [1]\ntag: [*a, *a]", "tag is neither a text"),
        ("tag: !!python/object/apply:os.mkdir [harm]", "tag takes one value, not a list"),
        ("ipc: 1\nipc: 2", "'ipc' is there twice"),
        ("? [ipc]\n: 1", "holds no flags"),
        ("ipc: {of: 3}", "ipc is neither a text"),
        ("ipc: [1]\n  x", "neither JSON nor right YAML"),
        ("[" * 500, "neither JSON nor right YAML"),
        ("", "holds no flags"),
    ):
        with pytest.raises(UserError, match=f"^--config c.yaml: .*{says}"):
            resolved("--config", written(text, "c.yaml"))
    assert not Path("harm").exists()


def test_without_pyyaml_json_is_read_and_yaml_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    assert resolved("--config", written({"ipc": 3})).options.ipc == 3
    with pytest.raises(UserError, match=r"^--config c.yaml: .*pip install pyyaml, or write it as JSON"):
        resolved("--config", written("ipc: 3", "c.yaml"))


@pytest.mark.parametrize(
    ("content", "says", "status"),
    [
        ({"ipcs": 3}, "'ipcs' is no flag (did you mean ipc?)", 2),
        ({"baselines": ["random"]}, "'baselines' is no flag", 2),  # of train.py alone
        ({"config": "c.json"}, "'config' is no flag", 2),
        ({"batch_real": 1, "batch-real": 2}, "batch_real is there twice", 2),
        ('{"ipc": 1, "ipc": 2}', "'ipc' is there twice", 1),
        ({"ipc": 0}, "--ipc: '0' is not a whole number of 1 or more", 2),
        ({"ipc": 2.5}, "--ipc: '2.5' is not a whole number", 2),
        ({"ipc": [1, 10]}, "ipc takes one value, not a list", 2),
        ({"ipc": {}}, "ipc is neither a text", 2),
        ({"compile": True}, "--compile: invalid choice: 'true'", 2),
        ({"reproduce": 3}, "--reproduce", 2),
        ({"lr": float("nan")}, "--lr: 'nan' is not a number", 2),
        ({"image_folder": "a\0b"}, "image_folder is neither a text", 2),
        ({"image_folder": "\ud800"}, "image_folder is neither a text", 2),
        ({"tag": "x" * 10**5}, "--tag", 2),
        ({}, "names no flag", 1),
        ({"options": {}, "sessions": []}, "names no flag", 1),
        ({"options": {"niters": 3}}, "'niters' is no flag (did you mean niter?)", 2),
        ([1], "holds no flags", 1),
        ('{"ipc": ', "is no JSON", 1),
        ("\xff" * 3, "is no JSON", 1),
        (" " * (configfile.MAX_BYTES + 1), "more than 1048576 bytes", 1),
        ({"ipc": 3, "sha256": "0"}, "was changed since it was written", 1),
    ],
)
def test_what_a_file_may_not_hold_is_said_in_one_line(content: Any, says: str, status: int, tmp_path: Path) -> None:
    file = written(content if isinstance(content, str) else json.dumps(content))
    message = refused(condense.main, ["--config", file], "--config c.json: ", says, status=status, unchanged=tmp_path)
    assert len(message) < 450


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for name, says in (("none.yaml", "No such file"), (str(tmp_path), "no regular file"), ("/dev/zero", "no regular")):
        refused(condense.main, ["--config", name], f"--config {name}: ", says, status=1, unchanged=tmp_path)
        refused(train.main, ["--config", name], f"--config {name}: ", says, status=1, unchanged=tmp_path)


# --- The settings of another run --------------------------------------------------------------------------------------

RUNS = [
    ["-d", "digits", "--seed", "3", "--tag", "x", "--niter", "200", "--max_minutes", "5", "--deterministic"],
    ["--reproduce", "-d", "mnist", "-f", "2", "-n", "convnet4", "--ipc", "50"],
    ["-m", "dc", "--ipc", "10", "-d", "svhn", "--fc", "--width", "8", "--results_dir", "there"],
    ["-m", "dm", "--select", "kmeans", "--image_folder", "photos", "--size", "64", "--max_start", "7"],
]


@pytest.mark.parametrize("argv", RUNS, ids=" ".join)
def test_another_run_s_options_give_its_settings_but_not_its_place(argv: list[str]) -> None:
    before = of_run(*argv)
    after = resolved("--config", "options.json").options
    place = dict(config="options.json", tag=None, results_dir="results", max_minutes=None, deterministic=False)
    if before.image_folder is not None:
        place["image_folder"] = str(Path("photos").resolve())
    assert after == dataclasses.replace(before, **place)  # type: ignore[arg-type]


def test_presets_follow_when_a_flag_names_another_data_set_method_network_or_ipc() -> None:
    given = ("-m", "dc", "--ipc", "10", "--width", "8", "--niter", "77")
    of_run(*given)
    ours = ("--config", "options.json")
    for flags in (["-d", "cifar10"], ["-m", "dream"], ["--ipc", "1"], ["--factor", "2"], ["--select", "kmeans"]):
        expected = resolved(*given, *flags).options
        assert resolved(*ours, *flags).options == dataclasses.replace(expected, config="options.json")
    other = resolved(*ours, "-n", "resnet10").options
    assert (other.depth, other.width, other.niter) == (None, None, 77), "a ConvNet's width is not for a ResNet"
    of_run("--image_folder", "photos", "--size", "64")
    o = resolved(*ours, "-d", "digits").options
    assert (o.dataset, o.image_folder, o.size) == ("digits", None, None)


def test_settings_that_presets_no_longer_have_stay_those_of_the_run() -> None:
    """As after an update of this program, whose defaults are other ones."""
    run = {"niter": 12, "lr_img": 0.3, "depth": None, "lr": None, "device": "of another machine"}
    atomic.write_json(Path("options.json"), {"options": run})
    o = resolved("--config", "options.json").options
    assert (o.niter, o.lr_img, o.depth, o.lr) == (12, 0.3, None, 0.01)
    atomic.write_json(Path("options.json"), {"options": {"reproduce": True, "dataset": "digits"}})
    with pytest.raises(UsageError, match=r"^--config options.json: --reproduce: the paper has no settings for digits"):
        resolved("--config", "options.json")


def test_a_run_is_made_again_from_its_files_and_evaluated_by_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "results"
    first = condense.distil(config=written("\n".join(flag_lines()), "c.json"), results_dir=results)
    ours = ["--config", str(first / "options.json"), "--device", "cpu"]
    assert condense.main([*ours, "--results_dir", str(results), "--tag", "again"]) == 0
    again = first.with_name(f"{first.name}_again")
    for a, b in zip(*(torch.load(run / "data.pt", weights_only=True) for run in (first, again)), strict=True):
        assert torch.equal(a, b)
    options = [resolve.saved_settings(resolved("--config", str(first / name)).options) for name in (OPTIONS, CARD)]
    assert options[0] == options[1]
    assert atomic.read_json(first / CARD)["source_datasets"][0].startswith("UCI Optical")
    capsys.readouterr()
    assert condense.main(quick(results)) == 0, "the file counts as these flags: the run is known as finished"
    assert "this run is finished" in capsys.readouterr().out

    (tmp_path / "my.pt").write_bytes((first / "data.pt").read_bytes())
    argv = [
        *["my.pt", "-d", "digits", "-f", "1", "--baselines", "none", "--json", "--config"],
        str(first / "options.json"),
    ]
    assert train.main(argv) == 0
    row = last_json(capsys)
    assert (row["net"], row["n"], len(row["results"])) == ("convnet2", 1, 1)
    o = resolve.train_options(resolve.train_flags(argv, ""), None, Path())
    assert (o.width, o.epochs, o.repeat, o.factor) == (8, 1, 1, 1)
    many = resolve.train_flags([*argv, "-n", "convnet3", "resnet10"], "")
    assert "width" not in many and resolve.train_flags([*argv, "-n", "convnet3"], "")["width"] == 8


def flag_lines() -> list[str]:
    """QUICK as a JSON file, a line for every flag."""
    pairs = {name.removeprefix("--"): value for name, value in zip(QUICK[::2], QUICK[1::2], strict=True)}
    return json.dumps(pairs, indent=0).splitlines()


def test_a_run_may_be_several_files() -> None:
    file = written('{"run": ["a.pt", "-b.pt"], "real": true}', "several.json")
    assert resolve.train_flags(["--config", file], "")["run"] == ["a.pt", "-b.pt"]
