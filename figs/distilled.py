"""Draw a distilled set as networks see it: decoded, one row per class, with the classes' names.

$ python3 -m figs.distilled results/digits/convnet2_f1_ipc1 --out digits.png
$ python3 -m figs.distilled results/cifar10/convnet3_f2_ipc10 --classes cat dog --columns 20
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from torch import Tensor

from figs import common
from utils.config.flags import integer
from utils.system.errors import short
from utils.system.process import run_main
from utils.system.report import drawable, messages


def main(argv: Sequence[str]) -> int:
    """The program. Raises UserError when the run folder holds no usable set."""
    parser = common.figure_parser("distilled", __doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder of condense.py, or a .pt file in one")
    common.add_classes(parser)
    parser.add_argument(
        "--columns", type=integer(1), default=10, metavar="N", help="draw this many images of each (default: 10)"
    )
    given = common.parse(parser, argv)
    with messages(), common.style():
        names, rows = common.decoded(given.run)
        chosen = common.class_numbers(given.classes, names)
        figure = draw([rows[c][: given.columns] for c in chosen], [names[c] for c in chosen])
        common.save(figure, given.out, pdf=given.pdf)
    return 0


def draw(rows: Sequence[Tensor], names: Sequence[str]) -> Figure:
    """Rows of images, with class names on their left. rows: one (n, C, H, W) tensor in [0, 1] per class."""
    picture, centres, _ = common.mosaic(rows)
    figure = common.picture_figure(picture)
    for y, name in zip(centres, names, strict=True):
        figure.axes[0].text(-10, y, drawable(short(name)), ha="right", va="center", fontsize=11)
    return figure


if __name__ == "__main__":
    run_main(main)
