"""Draw the distilled images of several runs: below each other, for every class one row per run, or side by side.

    $ python3 -m figs.compare results/digits/convnet2_f1_ipc1_kmeans results/digits/convnet2_f1_ipc1_random
    $ python3 -m figs.compare RUN RUN --classes cat dog --columns 8 --out cats_and_dogs.png --pdf
    $ python3 -m figs.compare RUN RUN --side_by_side --classes airplane automobile dog cat --titles DC "DC + DREAM"

Side by side, every run is a block of images under its title, with a row for every class. Without --titles, runs are
named by the options in which they differ.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from figs import common
from utils.config.flags import integer
from utils.system.errors import UsageError, UserError, short
from utils.system.process import run_main
from utils.system.report import drawable, messages

GAP = 14  # pixels between images and labels
BETWEEN = 40  # pixels between the blocks of two runs
LETTERS = 28  # at most in a line of a label


def main(argv: Sequence[str]) -> int:
    """The program. Raises UserError when the runs do not hold the same classes."""
    parser = common.figure_parser("compare", __doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders of condense.py, two or more")
    common.add_classes(parser)
    parser.add_argument(
        "--columns", type=integer(1), default=10, metavar="N", help="draw this many images of each (default: 10)"
    )
    parser.add_argument("--side_by_side", action="store_true", help="draw every run as a block, the first one left")
    parser.add_argument("--titles", nargs="+", metavar="TITLE", help="a title for every run, in their order")
    given = common.parse(parser, argv)
    if len(given.runs) < 2:
        raise UsageError("RUN: one run alone cannot be compared; name two, or use figs.distilled")
    if given.titles is not None and len(given.titles) != len(given.runs):
        raise UsageError(f"--titles: {len(given.titles)} for {len(given.runs)} runs; give one for each, in quotes")
    with messages(), common.style():
        runs = common.read_runs(given.runs)
        sets = [common.decoded(run.path) for run in runs]
        names = sets[0][0]
        for run, (others, _) in zip(runs, sets, strict=True):
            if others != names:
                raise UserError(f"{run}: holds other classes than {runs[0]}; compare runs of one data set")
        chosen = common.class_numbers(given.classes, names)
        rows = [[images[c][: given.columns] for _, images in sets] for c in chosen]
        labels = given.titles or common.run_labels(runs)
        figure = (draw_blocks if given.side_by_side else draw)(rows, [names[c] for c in chosen], labels)
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
    wrapped = ["\n".join(textwrap.wrap(drawable(label), LETTERS)) for label in labels]
    written = [axes.text(-GAP, y, wrapped[i % per_class], ha="right", va="center") for i, y in enumerate(centres)]
    # The widest label decides where the class names end.
    edge = min(text.get_window_extent().x0 for text in written)
    left = axes.transData.inverted().transform((edge, 0))[0] - GAP
    for number, name in enumerate(names):
        first = number * per_class
        y = (centres[first] + centres[first + per_class - 1]) / 2
        axes.text(left, y, drawable(short(name)), ha="right", va="center", fontsize=11, fontweight="bold")
    return figure


def draw_blocks(rows: Sequence[Sequence[Tensor]], names: Sequence[str], titles: Sequence[str]) -> Figure:
    """A block of images for every run beside the others, under its title, with class names on the left of the first.

    rows: for every class one (n, C, H, W) tensor in [0, 1] per run.
    """
    side = max(common.tile_side(images) for of_class in rows for images in of_class)
    blocks = [common.mosaic(of_run, side=side) for of_run in zip(*rows, strict=True)]
    parts, middles, x = [], [], 0
    for picture, _, _ in blocks:
        parts += [picture, np.full((len(picture), BETWEEN, 3), 255, np.uint8)]
        middles.append(x + picture.shape[1] / 2)
        x += picture.shape[1] + BETWEEN
    figure = common.picture_figure(np.concatenate(parts[:-1], axis=1))
    axes = figure.axes[0]
    for title, middle in zip(titles, middles, strict=True):
        axes.text(middle, -GAP, drawable(title), ha="center", va="bottom", fontsize=14, fontweight="bold")
    for name, y in zip(names, blocks[0][1], strict=True):
        axes.text(-GAP, y, drawable(short(name)), ha="right", va="center", fontsize=11, fontweight="bold")
    return figure


if __name__ == "__main__":
    run_main(main)
