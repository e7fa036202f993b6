"""Bars of the final accuracy over the values of one flag, from several run folders: mean +- std over seeds.

    $ python3 -m figs.ablation results/digits/convnet2_f1_ipc1_interval*
    $ python3 -m figs.ablation RUN RUN RUN --flag lr_img --random_real --ymin 60 --out rates.png

Every run is a point on its bar. Runs must differ in that flag and in their seeds only.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from figs import common
from figs.common import Group, Run
from utils.config.flags import number
from utils.system.errors import UsageError
from utils.system.process import run_main
from utils.system.report import messages


@dataclass(frozen=True)
class Bar:
    """The runs of one value. accuracies: final, in per cent; random: those of random real images, where measured."""

    value: Any
    accuracies: list[float]
    random: list[float]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.accuracies)

    @property
    def std(self) -> float | None:
        """Sample standard deviation over the runs; None for a single one."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else None

    def __str__(self) -> str:
        spread = "" if self.std is None else f" +- {self.std:.1f}"
        return f"{self.mean:.1f}{spread}"


def main(argv: Sequence[str]) -> int:
    """The program. Raises UserError when the runs differ in more than one flag, or lack an evaluation."""
    parser = common.figure_parser("ablation", __doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders of condense.py")
    parser.add_argument("--flag", metavar="NAME", help="flag of condense.py (default: the one that differs)")
    parser.add_argument("--random_real", action="store_true", help="dashed lines at the accuracy of random real images")
    parser.add_argument(
        "--ymin", type=number(below=100), default=0.0, metavar="PERCENT", help="where the bars begin (default: 0)"
    )
    given = common.parse(parser, argv)
    with messages(), common.style():
        runs = common.read_runs(given.runs)
        flag = the_flag(runs, given.flag)
        common.warn_of_unfinished(runs)
        drawn = bars(common.group_runs(runs), flag)
        for bar in drawn:
            print(f"{flag}={bar.value}: {bar} (n={len(bar.accuracies)})")
        if given.random_real and not any(bar.random for bar in drawn):
            raise UsageError("--random_real: no run measured random real images yet; leave it out, or finish the runs")
        common.save(draw(drawn, flag, random_real=given.random_real, ymin=given.ymin), given.out, pdf=given.pdf)
    return 0


def the_flag(runs: Sequence[Run], wanted: str | None) -> str:
    """The option whose values are compared. Raises UsageError when it is not the only one that differs."""
    names = common.differing(runs)
    flag = wanted.lstrip("-").replace("-", "_") if wanted else None
    if flag and any(flag not in run.options for run in runs):
        raise UsageError(
            f"--flag {wanted}: condense.py has no such flag; runs differ in {', '.join(names) or 'nothing'}"
        )
    others = [name for name in names if name != flag]
    if flag is None and len(others) == 1:
        return others[0]
    if flag is None or others:
        what = ", ".join(others) or "no flag but their seeds"
        raise UsageError(f"--flag{f' {wanted}' if wanted else ''}: runs differ in {what}; give runs that differ in one")
    return flag


def bars(groups: Sequence[Group], flag: str) -> list[Bar]:
    """A bar for every value: numbers in their order, others as given. Raises UserError for a run without evaluation."""
    drawn = []
    for group in groups:
        random = [value for run in group.runs if (value := run.random_real) is not None]
        drawn.append(Bar(group.runs[0].options[flag], [final_accuracy(run) for run in group.runs], random))
    if all(type(bar.value) in (int, float) for bar in drawn):
        drawn.sort(key=lambda bar: float(bar.value))
    return drawn


def final_accuracy(run: Run) -> float:
    """Test accuracy of a run's last evaluation, in per cent."""
    common.check_evaluated([run])
    return run.scores().values[-1]


def draw(drawn: Sequence[Bar], flag: str, *, random_real: bool, ymin: float) -> Figure:
    """Bars with points and numbers; a bar says how many runs it is the mean of."""
    figure = Figure(figsize=(min(common.WIDTH, 1.6 + 1.1 * len(drawn)), 3.6), layout="constrained")
    axes = figure.subplots()
    at = range(len(drawn))
    axes.bar(at, [bar.mean for bar in drawn], width=0.64, color=common.PALETTE[5])
    top = 0.0
    for x, bar in zip(at, drawn, strict=True):
        if bar.std is not None:
            axes.errorbar(x, bar.mean, bar.std, color="black", capsize=5, lw=1.2)
        # Side by side, so that equal ones stay visible, and beside the error bar.
        spots = [x + 0.5 * ((i + 1) / (len(bar.accuracies) + 1) - 0.5) for i in range(len(bar.accuracies))]
        axes.plot(spots, bar.accuracies, "o", ms=5, color=common.PALETTE[0], mec="white", mew=0.6, zorder=3)
        highest = max([*bar.accuracies, bar.mean + (bar.std or 0)])
        said = str(bar).replace(" +- ", "\n± " if len(drawn) > 7 else " ± ")
        axes.annotate(said, (x, highest), (0, 5), textcoords="offset points", ha="center", va="bottom")
        if random_real and bar.random:
            level = statistics.fmean(bar.random)
            axes.hlines(level, x - 0.45, x + 0.45, color=common.PALETTE[1], ls="--", lw=1.6)
            highest = max(highest, level)
        top = max(top, highest)
    axes.set_ylim(ymin, max(top, ymin + 1e-3) + 0.12 * (top - ymin))
    axes.set_xticks(list(at), [f"{bar.value}\nn={len(bar.accuracies)}" for bar in drawn])
    axes.set_xlabel(flag)
    axes.set_ylabel("final test accuracy, %")
    handles = [Line2D([], [], color=common.PALETTE[0], marker="o", ls="", ms=5)]
    names = ["one run each"]
    if random_real:
        handles.append(Line2D([], [], color=common.PALETTE[1], ls="--"))
        names.append("random real images")
    figure.legend(handles, names, loc="outside lower center", ncols=2)
    return figure


if __name__ == "__main__":
    run_main(main)
