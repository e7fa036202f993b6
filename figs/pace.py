"""Accuracy per second: test accuracy over the seconds of distilling, those of training experts included.

    $ python3 -m figs.pace results/digits/*_seed? --save pace.json
    $ python3 -m figs.pace pace.json --baseline "dm, select=random" --table pace.md

Give runs condense.py's --seconds and --eval_seconds, so that they take equally long and are evaluated at S, 2S, 4S, ...
seconds. Runs that differ in nothing but their seed are repeats: a line is their mean, from one evaluation to the next,
the band +- their standard deviation; a triangle marks when the experts were trained, before which nothing is distilled.
A panel for every data set and number of images per class.

The table says how many times sooner runs reach the final accuracy of the baseline's run of the same seed, at an
evaluation, without interpolation. A method stops paying where from there on no doubling of its seconds raises the mean
accuracy by its standard deviation over seeds or more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from figs import common
from figs.curves import Curve, Track, by_seed, plot, spread
from utils.files import atomic
from utils.method.evaluation import Score
from utils.system.errors import UsageError, UserError, printable
from utils.system.process import run_main
from utils.system.report import drawable, messages

DOUBLING = 1.9  # evaluations lie near S, 2S, 4S, ..., not at them
RANDOM = "random"  # the strategy without representatives, whose lines are dashed
STYLES = ("-", ":", "-.")  # of the others


class Panel(NamedTuple):
    """What the lines of a panel share."""

    dataset: str
    ipc: int

    def __str__(self) -> str:
        return f"{self.dataset}, ipc {self.ipc}"


@dataclass(frozen=True)
class Timed:
    """A run's evaluations. Raises KeyError, TypeError or ValueError for content that is none."""

    dataset: str
    ipc: int
    parts: dict[str, Any]  # method, select, and the other options that distinguish runs but not repeats
    seed: int
    seconds: list[float]  # of distilling until each evaluation, in ascending order, experts included
    accuracies: list[float]  # in per cent
    expert_seconds: float
    random_real: float | None  # accuracy, in per cent, of as many random real images

    def __post_init__(self) -> None:
        numbers = [self.ipc, self.seed, self.expert_seconds, *self.seconds, *self.accuracies]
        numbers += [] if self.random_real is None else [self.random_real]
        if not all(isinstance(x, (int, float)) and 0 <= x < math.inf for x in numbers):
            raise ValueError("a value is no number of 0 or more")
        if not self.seconds or len(self.seconds) != len(self.accuracies) or sorted(self.seconds) != self.seconds:
            raise ValueError("seconds do not belong to accuracies")
        if not all(isinstance(x, str) for x in (self.dataset, self.parts["method"], self.parts["select"])):
            raise ValueError("a name is none")

    @property
    def name(self) -> str:
        """The method, and what distinguishes the run besides its selection, where that is not the default."""
        rest = {name: value for name, value in self.parts.items() if value != common.DEFAULTS.get(name)}
        words = common.in_words({name: value for name, value in rest.items() if name not in ("method", "select")})
        return printable(self.parts["method"]) + (f", {words}" if words else "")

    @property
    def label(self) -> str:
        """Name of the group of repeats: `dream, networks=early, select=kmeans`."""
        return f"{self.name}, {common.in_words({'select': self.parts['select']})}"

    @property
    def track(self) -> Track:
        """Seconds and accuracies."""
        return self.seconds, self.accuracies


@dataclass(frozen=True)
class Line:
    """Repeats."""

    runs: Sequence[Timed]

    @property
    def label(self) -> str:
        return self.runs[0].label

    @property
    def end(self) -> Score:
        """The accuracies at the end."""
        return Score(tuple(run.accuracies[-1] for run in self.runs))

    @property
    def is_standard(self) -> bool:
        """Whether the options that distinguish runs all have their defaults: `dream` with its representatives."""
        return all(value == common.DEFAULTS.get(name) for name, value in self.runs[0].parts.items())

    @cached_property
    def curve(self) -> Curve:
        """The mean over repeats, from the first evaluation after some seconds on: of the first evaluations, of the
        second ones, and so on; if some runs have more than others, of those nearest in time to the fewest."""
        fewest = min((run.seconds for run in self.runs), key=len)
        rows = [_aligned(run, fewest) for run in self.runs]
        seconds = np.array([[run.seconds[i] for i in row] for run, row in zip(self.runs, rows, strict=True)])
        values = np.array([[run.accuracies[i] for i in row] for run, row in zip(self.runs, rows, strict=True)])
        after = seconds.min(0) > 0  # a logarithmic axis has no zero
        seconds, values = seconds[:, after], values[:, after]
        std = values.std(0, ddof=1) if len(rows) > 1 else None
        return Curve(np.flatnonzero(after).astype(float), seconds.mean(0), values.mean(0), std)

    @property
    def stops_paying(self) -> str:
        """In words, after which accuracy and time more seconds do not pay."""
        curve = self.curve
        judged = np.flatnonzero(curve.seconds * DOUBLING <= curve.seconds[-1:])
        if curve.std is None or not len(judged):
            return "unknown: " + ("one seed" if curve.std is None else "too few evaluations")
        then, times = np.log(2 * curve.seconds[judged]), np.log(curve.seconds)
        gain = np.interp(then, times, curve.mean) - curve.mean[judged]
        paying = np.flatnonzero(gain >= np.interp(then, times, curve.std))
        first = paying[-1] + 1 if len(paying) else 0
        if first == len(judged):
            return "still rising"
        return f"at {curve.mean[judged[first]]:.1f} %, after {curve.seconds[judged[first]]:.3g} s"


def _aligned(run: Timed, times: Sequence[float]) -> list[int]:
    """Positions of the run's evaluations that go with those of another run at these times."""
    if len(run.seconds) == len(times):
        return list(range(len(times)))
    return [int(np.abs(np.array(run.seconds) - t).argmin()) for t in times[:-1]] + [len(run.seconds) - 1]


def main(argv: Sequence[str]) -> int:
    """The program. Raises UserError for files that hold no evaluations."""
    parser = common.figure_parser("pace", __doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders, or one file of --save")
    parser.add_argument(
        "--baseline", metavar="LABEL", help="whose final accuracy is to be reached, such as 'dream, select=kmeans', "
        "which is the default"
    )  # fmt: skip
    parser.add_argument("--save", type=common.ending(".json"), metavar="FILE", help="write the evaluations as JSON")
    parser.add_argument("--table", type=common.ending(".md"), metavar="FILE", help="write the table as Markdown")
    given = common.parse(parser, argv)
    with messages(), common.style():
        record = common.record_in(given.runs)
        rows = measured(given.runs) if record is None else read(record)
        common.save_rows(given.save, "pace", argv, rows)
        report(rows, given.out, baseline=given.baseline, table_file=given.table, pdf=given.pdf)
    return 0


def report(
    rows: Sequence[Timed], out: Path, *, baseline: str | None = None, table_file: Path | None = None, pdf: bool = False
) -> None:
    """Print the table and draw the figure. Raises UsageError for a baseline that is none of the lines."""
    panels = in_panels(rows, baseline)
    tables = [table(panel, lines, baseline) for panel, lines in panels.items()]
    print("\n\n".join(map(text, tables)))
    if table_file is not None:
        common.write(table_file, "\n".join(map(markdown, tables)).encode(), flag="--table")
    common.save(draw(panels), out, pdf=pdf)


def read(file: Path) -> list[Timed]:
    """The runs in a file of --save. Raises UserError when it is none."""
    content = atomic.read_json(file)
    try:
        rows = [Timed(**row) for row in content["rows"]]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file}: is no file of --save ({error}); name another") from error
    if not rows:
        raise UserError(f"{file}: holds no runs; name another")
    return rows


def measured(folders: Sequence[Path]) -> list[Timed]:
    """The evaluations in run folders. Raises UserError where there are none, or for two repeats of one seed."""
    runs = common.read_runs(folders)
    common.check_evaluated(runs)
    common.warn_of_unfinished(runs)
    panels: dict[Panel, list[common.Run]] = {}
    for run in runs:
        panels.setdefault(Panel(run.options["dataset"], run.options["ipc"]), []).append(run)
    names = dict.fromkeys(["method", "select"])
    for together in panels.values():
        common.group_runs(together)  # refuses two repeats of one seed
        names |= dict.fromkeys(common.differing(together))
    rows = []
    for panel, together in panels.items():
        for run in together:
            alike = [other for other in runs if other.options["method"] == run.options["method"]]
            distinct = [name for name in names if name in ("method", "select") or not common.same(alike, name)]
            parts, scores = {name: run.options.get(name) for name in distinct}, run.scores(every=True)
            times, seed = [round(s, 1) for s in scores.seconds], run.options["seed"]
            try:
                rows.append(Timed(*panel, parts, seed, times, scores.values, run.expert_seconds, run.random_real))
            except (TypeError, ValueError) as error:
                raise UserError(f"{run}: its options or accuracies are damaged ({error}); leave it out") from error
    return rows


def in_panels(rows: Sequence[Timed], baseline: str | None) -> dict[Panel, list[Line]]:
    """Runs as lines of panels, in the order of their first runs. Raises UsageError for a baseline that is in none."""
    groups: dict[Panel, dict[str, list[Timed]]] = {}
    for run in rows:
        groups.setdefault(Panel(run.dataset, run.ipc), {}).setdefault(run.label, []).append(run)
    labels = dict.fromkeys(run.label for run in rows)
    if baseline is not None and baseline not in labels:
        raise UsageError(f"--baseline {baseline}: no such group; choose one of {'; '.join(labels)}")
    return {panel: [Line(runs) for runs in of_panel.values()] for panel, of_panel in groups.items()}


# --- The table --------------------------------------------------------------------------------------------------------


def table(panel: Panel, lines: Sequence[Line], baseline: str | None) -> list[list[str]]:
    """Cells of a panel's table, row by row, the headings first.

    baseline: a label; None for `dream` with its representatives. Without such a line, times are not compared.
    """
    wanted = (line for line in lines if (line.is_standard if baseline is None else line.label == baseline))
    goal = next(wanted, None)
    headings = [str(panel), "accuracy % at the end", "seconds", "of them experts"]
    if goal is not None:
        headings.append(f"times sooner at the {goal.end.mean:.1f} % of {goal.label}")
    rows = [[*headings, "stops paying"]]
    for line in lines:
        cells = [line.label, str(line.end)]
        for seconds in ([run.seconds[-1] for run in line.runs], [run.expert_seconds for run in line.runs]):
            cells.append(f"{np.mean(seconds):.0f}")
        if goal is not None:
            cells.append(sooner(line, goal))
        rows.append([*cells, line.stops_paying])
    return rows


def sooner(line: Line, goal: Line) -> str:
    """How many times sooner runs reach the final accuracy of another line's of their seeds: the mean where all do."""
    factors = by_seed({run.seed: run.track for run in line.runs}, {run.seed: run.track for run in goal.runs})
    if not factors:
        return "no seed in common"
    if not any(factors):
        return f"never (n={len(factors)})"
    words = [{0: "never", np.inf: "at once"}.get(factor, f"{factor:.1f}") for factor in factors]
    return "".join(spread(factors)) or ", ".join(words)


def text(rows: Sequence[Sequence[str]]) -> str:
    """A table in lines of equally wide cells."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["   ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]) + "\n"


# --- The figure -------------------------------------------------------------------------------------------------------


def draw(panels: dict[Panel, list[Line]]) -> Figure:
    """Accuracy over seconds. A colour for every method, solid and dashed with and without representatives."""
    runs = [run for lines in panels.values() for line in lines for run in line.runs]
    colours = {name: common.colour(i) for i, name in enumerate(dict.fromkeys(run.name for run in runs))}
    strategies = dict.fromkeys(run.parts["select"] for run in runs)
    choosing = [name for name in strategies if name != RANDOM]
    styles = {name: STYLES[i % len(STYLES)] for i, name in enumerate(choosing)} | {RANDOM: "--"}
    columns = min(2, len(panels))
    deep = -(-len(panels) // columns)
    figure = Figure(figsize=(common.WIDTH, 0.8 + 3.0 * deep), layout="constrained")
    places = list(figure.subplots(deep, columns, squeeze=False).flat)
    for axes, (panel, lines) in zip(places, panels.items(), strict=False):
        for line in lines:
            first = line.runs[0]
            draw_line(axes, line, colours[first.name], styles[first.parts["select"]])
        random = [run.random_real for line in lines for run in line.runs if run.random_real is not None]
        if random:
            axes.axhline(float(np.mean(random)), color=common.GREY, ls=":", lw=1)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda seconds, _: f"{seconds:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_title(drawable(str(panel)))
        axes.set_xlabel("seconds of distilling, experts included")
        axes.set_ylabel("test accuracy, %")
    for axes in places[len(panels) :]:
        axes.axis("off")
    handles = {drawable(name): Line2D([], [], color=colour, marker="o", ms=4) for name, colour in colours.items()}
    if len(strategies) > 1:
        handles |= {drawable(f"select={name}"): Line2D([], [], color="black", ls=styles[name]) for name in strategies}
    if any(run.random_real is not None for run in runs):
        handles["random real images"] = Line2D([], [], color=common.GREY, ls=":", lw=1)
    if any(run.expert_seconds for run in runs):
        handles["experts are trained"] = Line2D([], [], color="black", marker="^", ls="", ms=6)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3)
    return figure


def draw_line(axes: Axes, line: Line, colour: str, style: str) -> None:
    """Draw a line, and at the bottom a triangle where its experts were trained."""
    plot(axes, line.curve.seconds, line.curve, colour, style)
    if experts := np.mean([run.expert_seconds for run in line.runs]):
        place = axes.get_xaxis_transform()
        axes.plot(experts, 0, marker="^", ms=6, color=colour, transform=place, clip_on=False, zorder=4)


if __name__ == "__main__":
    run_main(main)
