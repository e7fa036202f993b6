"""Draw the distilled images of several runs below each other: for every class one row per run, the first run on top.

    $ python3 -m figs.compare results/digits/convnet2_f1_ipc1_kmeans results/digits/convnet2_f1_ipc1_random
    $ python3 -m figs.compare RUN RUN --classes cat dog --columns 8 --out cats_and_dogs.png --pdf

Runs are labelled with the options in which they differ.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from torch import Tensor

from figs import common
from utils.config.flags import integer
from utils.system.errors import UsageError, UserError
from utils.system.process import run_main
from utils.system.report import messages

GAP = 14  # pixels between images and labels
LETTERS = 28  # at most in a line of a label


def main(argv: Sequence[str]) -> int:
    """The program. Raises UserError when the runs do not hold the same classes."""
    parser = common.figure_parser("compare", __doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders of condense.py, two or more")
    common.add_classes(parser)
    parser.add_argument(
        "--columns", type=integer(1), default=10, metavar="N", help="draw this many images of each (default: 10)"
    )
    given = common.parse(parser, argv)
    if len(given.runs) < 2:
        raise UsageError("RUN: one run alone cannot be compared; name two, or use figs.distilled")
    with messages(), common.style():
        runs = common.read_runs(given.runs)
        sets = [common.decoded(run.path) for run in runs]
        names = sets[0][0]
        for run, (others, _) in zip(runs, sets, strict=True):
            if others != names:
                raise UserError(f"{run}: holds other classes than {runs[0]}; compare runs of one data set")
        chosen = common.class_numbers(given.classes, names)
        rows = [[images[c][: given.columns] for _, images in sets] for c in chosen]
        figure = draw(rows, [names[c] for c in chosen], common.run_labels(runs))
        common.save(figure, given.out, pdf=given.pdf)
    return 0


def draw(rows: Sequence[Sequence[Tensor]], names: Sequence[str], labels: Sequence[str]) -> Figure:
    """Rows of images, with the labels of the runs on their left and class names left of these.

    rows: for every class one (n, C, H, W) tensor in [0, 1] per run.
    """
    per_class = len(labels)
    flat = [row for of_class in rows for row in of_class]
    picture, centres, _ = common.mosaic(flat, apart=range(per_class, len(flat), per_class))
    figure = common.picture_figure(picture)
    axes = figure.axes[0]
    wrapped = ["\n".join(textwrap.wrap(label, LETTERS)) for label in labels]
    written = [axes.text(-GAP, y, wrapped[i % per_class], ha="right", va="center") for i, y in enumerate(centres)]
    # The widest label decides where the class names end.
    edge = min(text.get_window_extent().x0 for text in written)
    left = axes.transData.inverted().transform((edge, 0))[0] - GAP
    for number, name in enumerate(names):
        first = number * per_class
        y = (centres[first] + centres[first + per_class - 1]) / 2
        axes.text(left, y, name, ha="right", va="center", fontsize=11, fontweight="bold")
    return figure


if __name__ == "__main__":
    run_main(main)
