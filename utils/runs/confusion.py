"""Confusion matrices: accuracy by class, and which classes are taken for which, as text, CSV and picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from torch import Tensor

from utils.system.errors import printable, short
from utils.system.process import import_matplotlib
from utils.system.report import drawable, drawing

WIDEST = 20  # classes at most of a matrix that fits into a terminal


def per_class(matrix: Tensor) -> list[float]:
    """Accuracies of the classes in per cent; NaN for a class without test images. matrix: (classes, classes) counts."""
    return (100 * matrix.diagonal().double() / matrix.sum(1)).tolist()


def better_order(matrix: Tensor, *, least: float) -> tuple[list[int], float] | None:
    """What a network shows of labels in the wrong order: the class that every label seems to mean, and the accuracy in
    per cent if they mean that; None where that is no clear gain.

    matrix: (classes, classes) counts, true by predicted. least: the accuracy that another order has to exceed.
    """
    from scipy.optimize import linear_sum_assignment  # comes with scikit-learn

    total, right = max(int(matrix.sum()), 1), int(matrix.trace())
    true, predicted = linear_sum_assignment(matrix.numpy(), maximize=True)
    best = int(matrix[true, predicted].sum())
    if 100 * best <= least * total or best < 1.5 * right:
        return None
    return [int(c) for _, c in sorted(zip(predicted, true, strict=True))], 100 * best / total


def as_text(matrix: Tensor, names: Sequence[str]) -> str:
    """Accuracy by class, and the matrix if it has at most WIDEST classes: rows are classes, columns what they are taken
    for, in per cent of the row."""
    shares = 100 * matrix.double() / matrix.sum(1, keepdim=True).clamp(min=1)
    names = [short(name) for name in names]
    wide = max(map(len, names))
    show = len(names) <= WIDEST
    head = f"{'class':{wide}}  accuracy %  taken for % " + "".join(f"{c:5}" for c in range(len(names)))
    lines = [head] if show else []
    for c, (name, right) in enumerate(zip(names, per_class(matrix), strict=True)):
        row = "".join(f"{share:5.0f}" for share in shares[c].tolist()) if show else ""
        lines.append(f"{name:{wide}}  {right:10.1f}  {f'{c:11} ' + row if show else ''}".rstrip())
    return "\n".join(lines)


def as_csv(matrix: Tensor, names: Sequence[str]) -> str:
    """The matrix of counts as CSV, a row per class, with the class's accuracy in per cent in the last column."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = [printable(name) for name in names]
    writer.writerow(["class", *names, "accuracy %"])
    for name, row, right in zip(names, matrix.tolist(), per_class(matrix), strict=True):
        writer.writerow([name, *row, f"{right:.4f}"])
    return out.getvalue()


def as_png(matrix: Tensor, names: Sequence[str], title: str) -> bytes:
    """A PNG file's content: the matrix in per cent of its rows, with numbers if it has at most WIDEST classes."""
    import_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shares = (100 * matrix.double() / matrix.sum(1, keepdim=True).clamp(min=1)).numpy()
    count, names = len(names), [drawable(short(name)) for name in names]
    side = min(max(0.55 * count, 3.0), 14.0)
    figure = Figure(figsize=(side + 1.8, side + 1.2), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    picture = axis.imshow(shares, vmin=0, vmax=100, cmap="cividis")
    axis.set(xlabel="taken for", ylabel="class", title=title)
    if count <= WIDEST:
        axis.set_xticks(range(count), names, rotation=60, ha="right", rotation_mode="anchor")
        axis.set_yticks(range(count), names)
        for i in range(count):
            for j in range(count):
                colour = "black" if shares[i, j] > 55 else "white"  # against cividis, dark to bright
                axis.text(j, i, f"{shares[i, j]:.0f}", ha="center", va="center", color=colour, fontsize=9)
    figure.colorbar(picture, ax=axis, label="% of the class", shrink=0.8)
    buffer = io.BytesIO()
    with drawing():
        figure.savefig(buffer, dpi=110)
    return buffer.getvalue()
