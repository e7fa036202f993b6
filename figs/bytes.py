"""Accuracy over bytes: how many stored images, how many cells in each, and how many bits a pixel.

    $ python3 train.py RUN --store uint8     # and uint4, and float32; for every run
    $ python3 -m figs.bytes results/digits/*_seed? --save bytes.json
    $ python3 -m figs.bytes bytes.json

Reads what train.py left in eval.json: distilled sets as stored in each way, and random real images, which are bytes,
from a row of --baselines random. Runs that differ in nothing but their seed are repeats: a point is the mean over them
of a run's mean accuracy, its bar +- their standard deviation. The size is that of the pixels. A panel for every data
set; what rounding costs is the difference from floats in pairs of the same run.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from figs import common
from utils.files import atomic
from utils.method.evaluation import Score
from utils.method.images import BITS, FLOAT32
from utils.runs.results import EVALUATIONS, read_records, size
from utils.system.errors import UserError
from utils.system.process import run_main
from utils.system.report import messages

RANDOM = "random real images"
LOOKS = {FLOAT32: ("-", "o"), "uint8": ("--", "s"), "uint4": (":", "^")}  # line and marker of every store


@dataclass(frozen=True)
class Point:
    """The accuracies, in per cent, of the runs of one kind of set: the mean of each, by its seed."""

    dataset: str
    about: str  # network and epochs
    what: str  # RANDOM, or the factor: f=2
    store: str  # a key of BITS; real images are bytes
    ipc: int
    bytes: int
    accuracies: dict[str, float]

    @property
    def score(self) -> Score:
        """Mean and standard deviation over the runs."""
        return Score(tuple(self.accuracies.values()))

    @property
    def line(self) -> tuple[str, str]:
        """What points of the same line share."""
        return self.what, self.store


def main(argv: Sequence[str]) -> int:
    """The program. Raises UserError for files that hold no such results."""
    parser = common.figure_parser("bytes", __doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders, or one file of --save")
    parser.add_argument("--save", type=common.ending(".json"), metavar="FILE", help="write the points as JSON")
    given = common.parse(parser, argv)
    with messages(), common.style():
        record = common.record_in(given.runs)
        points = measured(given.runs) if record is None else read(record)
        common.save_rows(given.save, "bytes", argv, points)
        print(table(points))
        print(costs(points))
        common.save(draw(points), given.out, pdf=given.pdf)
    return 0


def read(file: Path) -> list[Point]:
    """The points in a file of --save. Raises UserError when it is none."""
    content = atomic.read_json(file)
    try:
        return [Point(**row) for row in content["rows"]]
    except (KeyError, TypeError) as error:
        raise UserError(f"{file}: is no file of --save ({error}); name another") from error


def measured(folders: Sequence[Path]) -> list[Point]:
    """The points of all results in run folders, in the order of their sizes.

    Raises UserError where there are none, or where one data set's are of several networks or protocols.
    """
    found: dict[tuple[str, str, str, str, int, int], dict[str, float]] = {}
    protocols: dict[str, Any] = {}
    for run in common.read_runs(folders):
        file = run.path / EVALUATIONS
        records = [r for r in read_records(file) if {"sha256", "strategy"} & r["set"].keys()]
        if not records:
            raise UserError(f"{file}: holds no results; evaluate the set with train.py {run} --store uint8")
        for r in records:
            dataset, protocol = r["set"]["dataset"], {k: v for k, v in r["protocol"].items() if k != "seed"}
            if protocols.setdefault(dataset, [r["network"], protocol]) != [r["network"], protocol]:
                raise UserError(f"{file}: holds results of several networks or protocols; evaluate all runs alike")
            what = f"f={r['set']['factor']}" if "factor" in r["set"] else RANDOM
            if r["set"].get("strategy", "random") == "random":
                about = f"{r['net']}, width {r['network']['width']}, {protocol['epochs']} epochs"
                key = (dataset, about, what, r["set"].get("store", "uint8"), round(r["images_per_class"]))
                found.setdefault((*key, r["stored_bytes"]), {})[str(run.options["seed"])] = Score.from_dict(r).mean
    return sorted((Point(*key, seeds) for key, seeds in found.items()), key=lambda p: (p.dataset, *p.line, p.bytes))


def table(points: Sequence[Point]) -> str:
    """A line of text for each point, by size."""
    rows = sorted(points, key=lambda p: (p.dataset, p.bytes, p.line))
    return "\n".join(
        f"{p.dataset:8}  {size(p.bytes):>8}  {p.what:18}  ipc {p.ipc:<3}  {BITS[p.store]:>2} bits  {p.score}"
        for p in rows
    )


def costs(points: Sequence[Point]) -> str:
    """A line for each data set and store: by how much accuracy falls from that of floats, in pairs of runs."""
    floats = {
        (p.dataset, p.what, p.ipc, seed): x for p in points if p.store == FLOAT32 for seed, x in p.accuracies.items()
    }
    lines = []
    for dataset, store in dict.fromkeys((p.dataset, p.store) for p in points if p.store != FLOAT32):
        pairs = [
            x - floats[key]
            for p in points
            if (p.dataset, p.store) == (dataset, store)
            for seed, x in p.accuracies.items()
            if (key := (dataset, p.what, p.ipc, seed)) in floats
        ]
        if len(pairs) > 1:
            error = statistics.stdev(pairs) / len(pairs) ** 0.5
            change = f"{statistics.fmean(pairs):+.2f} +- {error:.2f} points"
            lines.append(
                f"{dataset}: {BITS[store]} bits change accuracy by {change} (standard error, n={len(pairs)} pairs)"
            )
    return "\n".join(lines)


def draw(points: Sequence[Point]) -> Figure:
    """Accuracy over bytes, a panel for every data set; a line for every factor and number of bits."""
    datasets = list(dict.fromkeys(p.dataset for p in points))
    figure = Figure(figsize=(common.WIDTH, 3.6), layout="constrained")
    panels = figure.subplots(1, len(datasets), squeeze=False)[0]
    handles: dict[str, Any] = {}
    for dataset, axes in zip(datasets, panels, strict=True):
        here = [p for p in points if p.dataset == dataset]
        for line in dict.fromkeys(p.line for p in here):
            handles |= draw_line(axes, [p for p in here if p.line == line])
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda count, _: size(count)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_title(f"{dataset} ({here[0].about})")
        axes.set_xlabel("size of the pixels")
    panels[0].set_ylabel("test accuracy, %")
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
    return figure


def draw_line(axes: Axes, line: Sequence[Point]) -> dict[str, Any]:
    """Draw points from few images per class to many; returns the handle of the legend, by its text."""
    what, store = line[0].line
    looks, marker = LOOKS[store]
    if what == RANDOM:
        name, colour, looks = f"{RANDOM}, 8 bits", common.GREY, "-"
    else:
        name, colour = f"{what}, {BITS[store]} bits", common.colour(int(what.removeprefix("f=")) - 1)
    spread = [p.score.std or 0 for p in line]
    sizes, means = [p.bytes for p in line], [p.score.mean for p in line]
    return {
        name: axes.errorbar(
            sizes, means, spread, color=colour, ls=looks, marker=marker, ms=4, capsize=2, elinewidth=0.8
        )
    }


if __name__ == "__main__":
    run_main(main)
