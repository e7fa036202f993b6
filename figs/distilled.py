"""Draw a distilled set as networks see it: decoded, one row per class, with the classes' names.

$ python3 -m figs.distilled results/digits/convnet2_f1_ipc1 --out digits.png
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from utils import files
from utils.errors import UserError
from utils.formation import decode
from utils.runtime import run_main


def main(argv: Sequence[str]) -> int:
    """The program. Raises UserError when the run folder holds no usable set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder of condense.py")
    parser.add_argument("--out", type=Path, default=Path("distilled.png"), help="PNG or PDF (default: distilled.png)")
    parser.add_argument("--classes", type=int, default=10, help="draw this many classes (default: 10)")
    parser.add_argument("--columns", type=int, default=10, help="and this many images of each (default: 10)")
    given = parser.parse_args(argv)

    images, labels, card = files.load_distilled(given.run)
    if card is None:
        raise UserError(f"{given.run}: has no {files.CARD}; draw a run folder of condense.py")
    names = card["class_names"][: given.classes]
    rows = [
        decode(images[labels == c], factor=card["factor"], decode_type=card["decode_type"])[: given.columns]
        for c in range(len(names))
    ]
    draw(rows, names, given.out)
    print(f"wrote {given.out}")
    return 0


def draw(rows: list[torch.Tensor], names: list[str], out: Path) -> None:
    """rows: one (n, C, H, W) tensor in [0, 1] per class."""
    columns = max(len(row) for row in rows)
    margin = 0.3 + 0.09 * max(map(len, names))  # inches, for the names
    width, height = margin + 0.8 * columns, 0.8 * len(rows)
    figure, axes = plt.subplots(len(rows), columns, figsize=(width, height), squeeze=False)
    for row, name, line in zip(rows, names, axes, strict=True):
        for i, axis in enumerate(line):
            axis.set_xticks([])
            axis.set_yticks([])
            if i < len(row):
                picture = row[i].permute(1, 2, 0).numpy()  # (H, W, C)
                axis.imshow(picture.squeeze(2) if picture.shape[2] == 1 else picture, cmap="gray", vmin=0, vmax=1)
            else:
                axis.axis("off")
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=11)
    figure.subplots_adjust(left=margin / width, right=0.99, top=0.99, bottom=0.01, wspace=0.06, hspace=0.06)
    figure.savefig(out, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    run_main(main)
