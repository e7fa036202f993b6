"""Accuracy and matching loss of several runs over the outer iterations and over time, repeats averaged.

    $ python3 -m figs.curves results/digits/convnet2_f1_ipc1_*
    $ python3 -m figs.curves RUN RUN RUN --baseline select=random --no_time --out convergence.png --pdf

Runs that differ in nothing but their seed are repeats: a line is their mean, the band +- their standard deviation. For
every pair of groups, or those with --baseline, a star marks where one first reaches the other's final accuracy: at an
evaluation, without interpolation, so run condense.py with a small --eval_every. Time is that spent distilling, experts
included, without evaluations; figs.pace compares runs by time alone. Losses are comparable within one strategy only:
other real images are other targets, and a lower distance to easier ones says nothing. --show_best draws the statistic
of published curves, which is chosen on the test set.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from figs import common
from figs.common import Group, Run, Series
from utils.method.evaluation import BEST_OF_FOUR, Score
from utils.system.errors import UsageError, UserError
from utils.system.process import run_main
from utils.system.report import drawable, messages

Values = npt.NDArray[np.float64]
Track = tuple[Sequence[float], Sequence[float]]  # iterations or seconds of a run's evaluations, and its accuracies


@dataclass(frozen=True)
class Curve:
    """The mean over repeats at T iterations, all arrays (T,). std: over the repeats, None for a single run."""

    iterations: Values
    seconds: Values
    mean: Values
    std: Values | None

    @property
    def minutes(self) -> Values:
        return self.seconds / 60


@dataclass(frozen=True)
class Reached:
    """Where one group's accuracy first reaches another's final one. at: position in `curve`, None for never.

    by_seed: for every seed that both have, how many times fewer iterations one run needs to reach the final accuracy of
    the other; infinite at iteration 0, zero for never.
    """

    group: Group
    target: Group
    curve: Curve
    goal: Curve
    at: int | None
    by_seed: Sequence[float] = ()

    def __str__(self) -> str:
        accuracy = f"the final accuracy of {self.target.label} ({self.goal.mean[-1]:.1f} %)"
        if self.at is None:
            return f"{self.group.label} never reaches {accuracy}; its best is {self.curve.mean.max():.1f} %"
        here, there = self.curve.iterations[self.at], self.goal.iterations[-1]
        line = f"{self.group.label} reaches {accuracy} at iteration {here:.0f} of {there:.0f}"
        if not here or not there:  # nothing was distilled: no ratio has a meaning
            return line
        spent, allowed = self.curve.seconds[self.at], self.goal.seconds[-1]
        line += ": " + times(here, there, "fewer iterations", "more iterations", "as many iterations")
        timed = times(spent, allowed, "less time", "more time", "as much time") if spent and allowed else ""
        return (f"{line}, {timed}" if timed else line) + self._seeds()

    def _seeds(self) -> str:
        """The factors of single seeds in words: `; by seed: 2.0, 1.7, never`; empty for a single seed."""
        if len(self.by_seed) < 2:
            return ""
        words = [{0: "never", np.inf: "at once"}.get(factor, f"{factor:.1f}") for factor in self.by_seed]
        return f"; by seed: {', '.join([*words, *spread(self.by_seed)])}"


def spread(factors: Sequence[float]) -> list[str]:
    """Mean and standard deviation of factors in words, `1.8 +- 0.2 (n=3)`; nothing where one is never or at once."""
    return [str(Score(tuple(factors)))] if factors and all(0 < factor < np.inf for factor in factors) else []


def times(here: float, there: float, less: str, more: str, same: str) -> str:
    """A comparison in words: `2.5 times less`, `2.5 times more`, or `same` for a factor that rounds to one."""
    factor = f"{max(here, there) / min(here, there):.1f}"
    return same if factor == "1.0" else f"{factor} times {less if here < there else more}"


def main(argv: Sequence[str]) -> int:
    """The program. Raises UserError when a run holds no evaluations."""
    parser = common.figure_parser("curves", __doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders of condense.py")
    parser.add_argument(
        "--baseline", metavar="LABEL", help="compare with this group only, such as select=random (default: each other)"
    )
    parser.add_argument("--no_time", action="store_true", help="leave out the panels over time")
    parser.add_argument(
        "--show_best",
        action="store_true",
        help="show the best of four tests of each training, chosen on the test set, in place of the last test: to be "
        "laid over published curves",
    )
    given = common.parse(parser, argv)
    with messages(), common.style():
        runs = common.read_runs(given.runs)
        common.check_evaluated(runs)
        for run in runs:
            if given.show_best and not run.scores(best=True).values:
                raise UserError(f"{run}: is of a version that did not record four tests; leave out --show_best")
        common.warn_of_unfinished(runs)
        groups = common.group_runs(runs)
        comparisons = reaching(groups, given.baseline, best=given.show_best)
        if given.show_best:
            print(f"accuracies: {BEST_OF_FOUR}")
        for reached in comparisons:
            print(reached)
        figure = draw(groups, comparisons, time=not given.no_time, best=given.show_best)
        common.save(figure, given.out, pdf=given.pdf)
    return 0


def average(runs: Sequence[Run], series: Sequence[Series], what: str) -> Curve:
    """The mean over repeats at the iterations that all report, of times and values. Raises UserError for none."""
    at = sorted(set.intersection(*(set(s.iterations) for s in series)))
    if not at:
        raise UserError(f"{runs[0]}: shares no iteration with a {what} with its repeats; give runs of one --eval_every")
    rows = [[s.iterations.index(it) for it in at] for s in series]
    seconds = np.array([[s.seconds[i] for i in row] for s, row in zip(series, rows, strict=True)], float)
    values = np.array([[s.values[i] for i in row] for s, row in zip(series, rows, strict=True)], float)  # (runs, T)
    std = values.std(0, ddof=1) if len(runs) > 1 else None
    return Curve(np.array(at, float), seconds.mean(0), values.mean(0), std)


def accuracy(group: Group, *, best: bool = False) -> Curve:
    """Test accuracy in per cent over the evaluations; best: of the best of four tests of each training."""
    return average(group.runs, [run.scores(best=best) for run in group.runs], "evaluation")


def loss(group: Group) -> Curve:
    """Matching loss over the outer iterations."""
    return average(group.runs, [run.losses() for run in group.runs], "loss")


def reaching(groups: Sequence[Group], baseline: str | None = None, *, best: bool = False) -> list[Reached]:
    """Comparisons of every ordered pair of groups, or of those with the baseline second. Raises UsageError.

    best: of the best of four tests of each training.
    """
    labels = [group.label for group in groups]
    if baseline is not None and baseline not in labels:
        raise UsageError(f"--baseline {baseline}: no such group; choose one of {'; '.join(labels)}")
    curves = [accuracy(group, best=best) for group in groups]
    tracks = {}
    for group in groups:
        scores = {run.options["seed"]: run.scores(best=best) for run in group.runs}
        tracks[group.label] = {seed: (series.iterations, series.values) for seed, series in scores.items()}
    comparisons = []
    for group, curve in zip(groups, curves, strict=True):
        for target, goal in zip(groups, curves, strict=True):
            if group is not target and baseline in (None, target.label):
                # Means of equal numbers may differ in their last bit.
                enough = np.flatnonzero(curve.mean >= goal.mean[-1] - 1e-9)
                at = int(enough[0]) if len(enough) else None
                factors = by_seed(tracks[group.label], tracks[target.label])
                comparisons.append(Reached(group, target, curve, goal, at, factors))
    return comparisons


def by_seed(tracks: Mapping[int, Track], targets: Mapping[int, Track]) -> list[float]:
    """How many times less runs need than those of the same seed among the targets need in all, to reach their final
    accuracy; see `Reached`."""
    factors = []
    for seed, (at, values) in tracks.items():
        if seed in targets:
            there, goals = targets[seed]
            here = next((x for x, value in zip(at, values, strict=True) if value >= goals[-1]), None)
            factors.append(0.0 if here is None else there[-1] / here if here else np.inf)
    return factors


def draw(groups: Sequence[Group], comparisons: Sequence[Reached], *, time: bool, best: bool = False) -> Figure:
    """Panels of accuracy and loss over iterations, and with `time` a second column over minutes.

    best: the accuracy is the best of four tests of each training, and the axis says so.
    """
    figure = Figure(figsize=(common.WIDTH, 5.4 if time else 3.2), layout="constrained")
    panels = (
        figure.subplots(2, 2, sharex="col", sharey="row", squeeze=False)
        if time
        else figure.subplots(1, 2, squeeze=False).T
    )
    label = BEST_OF_FOUR.replace(", ", ",\n").replace(": ", ":\n") if best else "test accuracy, %"
    curves: tuple[Callable[[Group], Curve], ...] = (partial(accuracy, best=best), loss)
    for line, what, of_group in zip(panels, (label, "matching loss"), curves, strict=True):
        for number, group in enumerate(groups):
            curve = of_group(group)
            for axes, x in zip(line, (curve.iterations, curve.minutes), strict=False):
                plot(axes, x, curve, common.colour(number))
        line[0].set_ylabel(what)
    for line in panels:
        line[0].xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    for line in panels[1:] if time else panels:  # columns share an axis
        for axes, what in zip(line, ("outer iteration", "minutes of distilling, experts included"), strict=False):
            axes.set_xlabel(what)
    mark(panels[0], groups, comparisons)
    handles = [Line2D([], [], color=common.colour(i), marker="o", ms=4) for i in range(len(groups))]
    names = [drawable(str(group)) for group in groups]
    if any(reached.at is not None for reached in comparisons):
        handles.append(Line2D([], [], color="black", marker="*", ms=10, ls=":", lw=1))
        names.append("first reaches another's final accuracy")
    figure.legend(handles, names, loc="outside lower center", ncols=2 if max(map(len, names)) < 50 else 1)
    return figure


def plot(axes: Axes, x: Values, curve: Curve, colour: str, dashes: str = "-") -> None:
    """Draw a mean line with its band; few points are marked, many would hide the line."""
    marker, width = "o" if len(x) <= 30 else None, 1.6 if len(x) < 300 else 0.8
    axes.plot(x, curve.mean, dashes, color=colour, marker=marker, ms=4, lw=width)
    if curve.std is not None:
        axes.fill_between(x, curve.mean - curve.std, curve.mean + curve.std, color=colour, alpha=0.2, lw=0)


def mark(panels: Sequence[Axes], groups: Sequence[Group], comparisons: Sequence[Reached]) -> None:
    """Draw a star where a group reaches another's final accuracy, and a dotted line at that accuracy."""
    for reached in comparisons:
        if reached.at is None:
            continue
        own, other = (common.colour(groups.index(group)) for group in (reached.group, reached.target))
        at, curve, goal = reached.at, reached.curve, reached.goal
        for axes, x, end in zip(
            panels, (curve.iterations, curve.minutes), (goal.iterations[-1], goal.minutes[-1]), strict=False
        ):
            axes.plot([x[at], end], [goal.mean[-1]] * 2, color=other, ls=":", lw=1)
            axes.plot(x[at], curve.mean[at], marker="*", ms=13, color=own, mec="black", mew=0.8, zorder=4)


if __name__ == "__main__":
    run_main(main)
