"""Tables that say the class of every image by its file name, as beside the test images of (Tiny-)ImageNet."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from utils.files.classnames import wnid
from utils.files.imagefiles import image_files
from utils.system.errors import UserError, printable

log = logging.getLogger("dream")

BYTES = 2**26  # a larger file is no such table: that of ImageNet's 50,000 validation images has 2 MB
# Where a table of the images in DIR/NAME may lie; LOC_NAME_solution.csv is Kaggle's of ImageNet.
TABLES = (
    "{0}/{0}_annotations.txt", "{0}/labels.txt", "{0}/labels.csv", "{0}_annotations.txt", "{0}_labels.txt",
    "{0}_labels.csv", "{0}.txt", "{0}.csv", "LOC_{0}_solution.csv",
)  # fmt: skip


def places_of_tables(root: Path) -> list[Path]:
    """Folders in which tables about a folder's images may lie: itself, and where Kaggle's ImageNet is unpacked."""
    return [root, *([root.absolute().parents[2]] if root.absolute().match("ILSVRC/Data/CLS-LOC") else [])]


def label_table(root: Path, name: str) -> Path | None:
    """The table of the classes of the images in root/name; None where there is none."""
    candidates = (place / table.format(name) for place in places_of_tables(root) for table in TABLES)
    return next((file for file in candidates if file.is_file()), None)


def labelled(table: Path, folder: Path, classes: Sequence[str]) -> list[tuple[str, str]]:
    """Path and class of the images in a folder, by class and path, as a table says.

    A label is a class's name or number. What is no image there or of another WordNet number is left out with a warning.
    Raises UserError, which names the line, for what cannot be understood, and OSError.
    """
    files: dict[str, str] = {}
    for image in image_files(str(folder))[0]:
        base = os.path.basename(image)
        files |= {base: image, os.path.splitext(base)[0]: image}  # Kaggle's table has names without endings
    known, found, missing = set(classes), dict[str, str](), list[str]()
    for number, name, field in _rows(table):
        path = files.get(os.path.basename(name))
        label = field if field in known else field.split()[0]  # boxes may follow: `n03995372 85 1 499 272`
        if label.isdecimal() and label not in known and int(label) < len(classes):
            label = classes[int(label)]
        if number == 1 and path is None and label not in known and wnid(label) is None and table.suffix == ".csv":
            continue  # names of columns
        if label not in known and wnid(label) != label:
            raise UserError(f"{table}, line {number}: {label[:60]!r} is no class of the training images; correct it")
        if path is None or label not in known:
            missing.append(name)
        elif found.setdefault(path, label) != label:
            raise UserError(f"{table}, line {number}: {name} has two classes, {found[path]} and {label}; correct it")
    if not found:
        raise UserError(f"{table}: names none of the images in {folder}; correct it or remove it")
    left = len(set(files.values())) - len(found)
    for count, what in ((len(missing), "images that are not there, or of other classes"), (left, "images left out")):
        if count:
            log.warning("%s: %d %s", printable(str(table)), count, what)
    return sorted(found.items(), key=lambda item: (item[1], item[0]))


def _rows(table: Path) -> Iterator[tuple[int, str, str]]:
    """Line number, file name, and what follows it, of every line that is not empty. Raises UserError and OSError."""
    if table.stat().st_size > BYTES:
        raise UserError(f"{table}: is too large for a table of labels; remove it")
    lines = table.read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines()
    for number, line in enumerate(lines, 1):
        separator = "\t" if "\t" in line else "," if table.suffix == ".csv" else None
        name, *more = (field.strip() for field in line.strip().split(separator)) if line.strip() else ("",)
        if more and name and more[0]:
            yield number, name, more[0]
        elif line.strip():
            raise UserError(f"{table}, line {number}: expected a file name and its class; correct the line")
