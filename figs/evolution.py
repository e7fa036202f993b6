"""Draw how a distilled set changes: its images at several outer iterations, side by side, and as an animation.

    $ python3 condense.py --snapshot_every 1
    $ python3 -m figs.evolution results/digits/convnet2_f1_ipc1 --classes 0 3 8
    $ python3 -m figs.evolution results/digits/convnet2_f1_ipc1 --gif evolution.gif

The strip has a row per class, with one image of it, and a column per snapshot; the animation shows all classes.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from figs import common
from utils.config.flags import integer
from utils.runs.card import SNAPSHOTS, snapshot_iteration, snapshot_name
from utils.system.errors import UsageError, UserError, short
from utils.system.process import run_main
from utils.system.report import drawable, messages

FRAME_COLUMNS = 10  # images in a row of the animation
HEAD, TEXT = 34, 20  # pixels above a frame's images, and size of the letters there
LAST_FRAME = 5  # times as long as the others is the last frame shown


def main(argv: Sequence[str]) -> int:
    """The program. Raises UserError when the run kept no snapshots."""
    parser = common.figure_parser("evolution", __doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder of condense.py --snapshot_every N")
    common.add_classes(parser)
    parser.add_argument(
        "--columns", type=integer(2), default=8, metavar="N",
        help="draw this many snapshots in the strip, evenly spaced in their order (default: 8)",
    )  # fmt: skip
    parser.add_argument(
        "--image", type=integer(0), default=0, metavar="N", help="which decoded image of a class (default: 0)"
    )
    parser.add_argument(
        "--gif", type=common.ending(".gif"), metavar="FILE", help="write an animation of all snapshots as well"
    )
    parser.add_argument(
        "--ms", type=integer(20), default=300, metavar="MS", help="milliseconds per frame (default: 300)"
    )
    given = common.parse(parser, argv)
    with messages(), common.style():
        files = snapshots(given.run)
        names, first = common.decoded(files[0][1])
        chosen = common.class_numbers(given.classes, names)
        have = min(len(first[c]) for c in chosen)
        if given.image >= have:
            raise UsageError(f"--image {given.image}: a class has {have} images; use a number up to {have - 1}")
        shown = spread(files, given.columns)
        sets = [common.decoded(file)[1] for _, file in shown]
        rows = [[images[c][given.image] for images in sets] for c in chosen]
        figure = draw(rows, [names[c] for c in chosen], [it for it, _ in shown])
        common.save(figure, given.out, pdf=given.pdf)
        if given.gif is not None:
            frames = [frame(common.decoded(file)[1], f"outer iteration {it}") for it, file in files]
            common.write(given.gif, animation(frames, given.ms), flag="--gif")
    return 0


def snapshots(folder: Path) -> list[tuple[int, Path]]:
    """Snapshots as (outer iteration, file), in their order. Raises UserError when there are none."""
    files = [(it, file) for file in folder.glob(SNAPSHOTS) if (it := snapshot_iteration(file)) is not None]
    if not files:
        raise UserError(f"{folder}: holds no snapshots such as {snapshot_name(0)}; run condense.py --snapshot_every N")
    return sorted(files)


def spread(files: Sequence[tuple[int, Path]], most: int) -> list[tuple[int, Path]]:
    """At most so many snapshots, evenly spaced, the first and the last included."""
    if len(files) <= most:
        return list(files)
    return [files[round(i * (len(files) - 1) / (most - 1))] for i in range(most)]


def draw(rows: Sequence[Sequence[Tensor]], names: Sequence[str], iterations: Sequence[int]) -> Figure:
    """A strip of images. rows: for every class one (C, H, W) image in [0, 1] per snapshot."""
    picture, centres, step = common.mosaic([torch.stack(list(row)) for row in rows])
    figure = common.picture_figure(picture)
    axes = figure.axes[0]
    for y, name in zip(centres, names, strict=True):
        axes.text(-10, y, drawable(short(name)), ha="right", va="center", fontsize=11)
    for i, it in enumerate(iterations):
        axes.text(i * step + step / 2 - 2, -8, str(it), ha="center", va="bottom")
    axes.text(-10, -8, "outer iteration", ha="right", va="bottom")
    return figure


def frame(classes: Sequence[Tensor], title: str) -> Image.Image:
    """A frame of the animation: all classes in a grid, those with few images side by side, below a title.

    classes: (S, C, H, W) in [0, 1] each.
    """
    per_line = max(1, FRAME_COLUMNS // max(map(len, classes)))
    shown = [images[:FRAME_COLUMNS] for images in classes]
    rows = [torch.cat(shown[i : i + per_line]) for i in range(0, len(shown), per_line)]
    picture, _, _ = common.mosaic(rows)
    height, width = picture.shape[:2]
    canvas = Image.fromarray(np.full((height + HEAD, max(width, 240), 3), 255, np.uint8))
    canvas.paste(Image.fromarray(picture), (0, HEAD))
    ImageDraw.Draw(canvas).text((4, 5), title, fill="black", font=ImageFont.load_default(TEXT))
    return canvas


def animation(frames: Sequence[Image.Image], ms: int) -> bytes:
    """A GIF's content, which repeats without end; the last frame stays longer."""
    # One palette for all frames keeps colours from flickering.
    both = Image.new("RGB", (frames[0].width, 2 * frames[0].height))
    both.paste(frames[0], (0, 0))
    both.paste(frames[-1], (0, frames[0].height))
    palette = both.quantize(256)
    drawn = [f.quantize(palette=palette, dither=Image.Dither.NONE) for f in frames]
    durations = [ms] * (len(drawn) - 1) + [LAST_FRAME * ms]
    buffer = io.BytesIO()
    drawn[0].save(buffer, "GIF", save_all=True, append_images=drawn[1:], duration=durations, loop=0)
    return buffer.getvalue()


if __name__ == "__main__":
    run_main(main)
