"""Accuracy over bytes: what figs.bytes takes from eval.json, on results written by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from figs import bytes as figure
from tests.files import refused

STORED = {"float32": 256, "uint8": 64, "uint4": 32}  # bytes of an image of 8 x 8


def result(accuracies: list[float], stored_bytes: int, ipc: int = 1, epochs: int = 3, **of_the_set: Any) -> Any:
    """A record as train.py leaves it in eval.json, as far as the figure reads it."""
    return {
        "net": "convnet2", "network": {"width": 8}, "protocol": {"epochs": epochs, "seed": 5}, "seconds": 1.0,
        "set": {"dataset": "digits", **of_the_set}, "images_per_class": ipc, "stored_bytes": stored_bytes,
        "accuracies": accuracies,
    }  # fmt: skip


def run(root: Path, seed: int, records: list[Any]) -> str:
    """A run folder with these results."""
    folder = root / f"seed{seed}"
    folder.mkdir(parents=True)
    options = {"dataset": "digits", "seed": seed, "ipc": 1}
    (folder / "options.json").write_text(json.dumps({"options": options, "sessions": []}))
    (folder / "eval.json").write_text(json.dumps({"results": records}))
    return str(folder)


def runs(root: Path) -> list[str]:
    """Two seeds at every store: 90 +- 2 as floats, 1 and 2 points less with 8 bits, 5 less with 4."""
    return [
        run(root, seed, [
            result([50, 60], 640, strategy="random"),
            result([70], 640, strategy="kmeans"),
            *(result([base - lost], 10 * STORED[store], factor=2, store=store, sha256=store)
              for store, lost in {"float32": 0, "uint8": 1 + seed, "uint4": 5}.items()),
        ])
        for seed, base in ((0, 88.0), (1, 92.0))
    ]  # fmt: skip


def test_points_are_means_over_seeds_and_costs_are_of_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save, out = tmp_path / "points.json", ["--out", str(tmp_path / "x.png")]
    assert figure.main([*runs(tmp_path), "--save", str(save), *out]) == 0
    said = capsys.readouterr().out.splitlines()[1:]
    assert [" ".join(line.split()) for line in said[:-1]] == [
        "digits 320 B f=2 ipc 1 4 bits 85.0 +- 2.8 (n=2)",
        "digits 640 B f=2 ipc 1 8 bits 88.5 +- 2.1 (n=2)",
        "digits 640 B random real images ipc 1 8 bits 55.0 +- 0.0 (n=2)",
        "digits 2.56 kB f=2 ipc 1 32 bits 90.0 +- 2.8 (n=2)",
        "digits: 4 bits change accuracy by -5.00 +- 0.00 points (standard error, n=2 pairs)",
        "digits: 8 bits change accuracy by -1.50 +- 0.50 points (standard error, n=2 pairs)",
    ]
    points = figure.read(save)
    assert [*figure.table(points).splitlines(), *figure.costs(points).splitlines()] == said[:-1]


def test_results_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "x.png")]
    first = run(tmp_path / "a", 0, [result([90], 640, factor=1, store="uint8", sha256="x")])
    other = run(tmp_path / "b", 1, [result([90], 640, epochs=4, factor=1, store="uint8", sha256="x")])
    says = f"{other}/eval.json: holds results of several networks or protocols"
    refused(figure.main, [first, other, *out], says, status=1, unchanged=tmp_path)
    empty = run(tmp_path / "c", 2, [])
    refused(figure.main, [empty, *out], f"{empty}/eval.json: holds no results", "--store", status=1, unchanged=tmp_path)
    (tmp_path / "other.json").write_text('{"rows": [1]}')
    refused(figure.main, [str(tmp_path / "other.json"), *out], "no file of --save", status=1, unchanged=tmp_path)


def test_the_readme_says_what_the_record_holds() -> None:
    root = Path(figure.__file__).parent
    points, text = figure.read(root / "data" / "bytes.json"), (root / "README.md").read_text().replace("\n", " ")
    changes = [re.findall(r"by (\S+ \+- \S+) points .*n=(\d+)", line)[0] for line in figure.costs(points).splitlines()]
    assert len(changes) == 4
    for change, count in changes:
        assert change in text and f"n={count} sets" in text
