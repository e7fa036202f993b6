"""Which files of a folder are training and test images, and of which class, in the layouts that people have.

DIR/train/CLASS/*  DIR/test/CLASS/*     also val, validation, valid, dev, eval; training, testing; in any case
DIR/train/CLASS/*  DIR/val/*            with a table of file names and classes, such as val/val_annotations.txt
DIR/CLASS/*                             with the fraction of every class to test on, as with DIR/train/* alone
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from utils.files.imagefiles import EXTENSIONS, image_files, inside
from utils.files.labeltable import label_table, labelled
from utils.system.errors import UsageError, UserError, printable

log = logging.getLogger("dream")

TRAIN = ("train", "training")
TEST = ("test", "testing", "val", "validation", "valid", "dev", "eval", "evaluation")  # the first with labels is used
EXPECTED = "expected images in DIR/train/CLASS/* and DIR/test/CLASS/* (or val)"
SPLIT_IT = "--split 0.2 takes a fifth of every class to test on"
NO_CLASSES = ("__MACOSX",)  # left behind by a program that unpacks archives
QUIET = ("_boxes.txt", "_annotations.txt")  # endings of Tiny-ImageNet's files beside the images
DEPTH, BREADTH = 3, 20  # levels, and folders of each, in which a folder that would do is looked for

Sample = tuple[str, int]  # path and class number


class Listing(NamedTuple):
    """Images of a folder, by their paths."""

    classes: list[str]  # names of the class folders in alphabetical order, which is that of the class numbers
    samples: dict[bool, list[Sample]]  # of the training images (True) and of the test images (False), by class


def list_images(root: Path, *, split: float | None = None, only: Collection[str] | None = None) -> Listing:
    """Training and test images in a folder; where it is not plain, a line says which folders serve as what.

    split: the fraction of every class to test on, in (0, 1), where the folder has no test images of its own. only: the
    class folders to take; others are passed over. Raises UserError or UsageError, which name the remedy, and OSError.
    """
    folders = _folders(root)
    tests = _called(folders, TEST)
    train = [name for name in _called(folders, TRAIN) if _folders(root / name)]  # else it may be a class: bus, train
    if not train:
        _check_flat(root, folders, tests, split)
    top = root / train[0] if train else root
    every = _folders(top)
    classes = _taken(top, every, only)
    images = _by_class(top, classes)
    sources = {name: source for name in tests if (source := _labels(root, name, every)) is not None}
    unlabelled = [f"{name} has no labels and is not used" for name in tests if name not in sources]
    if not sources:
        if split is None:
            raise UserError(f"--image_folder {root}: {_why_no_test(root, tests, classes)}")
        samples = _split(images, top, classes, split)
        counts = f"{len(samples[True])} images to train and {len(samples[False])} to test on"
        how = f"--split {split:g} gives {counts}, the same ones for every --seed"
        _say(root, how, *unlabelled)
        return Listing(classes, samples)
    test, *others = sources
    if split is not None:
        raise UsageError(f"--split {split:g}: {root / test} has test images; leave --split out")
    source = sources[test]
    if source == root / test:
        _check_same(root, classes, _taken(source, _test_folders(source, every), only), f"{train[0]} and {test}")
        samples = {True: images, False: _by_class(source, classes)}
    else:
        tested = labelled(source, root / test, every)
        samples = {True: images, False: [(path, classes.index(name)) for path, name in tested if name in classes]}
        found = {c for _, c in samples[False]}
        _check_same(root, classes, [classes[c] for c in sorted(found)], f"{train[0]} and {source.name}")
    by = "" if source == root / test else f" with the labels of {source.name}"
    unused = [*unlabelled, *(f"{name} is not used" for name in others)]
    if (train[0], test) != ("train", "test") or by or unused:
        _say(root, f"{train[0]} is trained on, {test} is tested on{by}", *unused)
    return Listing(classes, samples)


def _say(root: Path, *parts: str) -> None:
    log.info("%s", printable(f"--image_folder {root}: {'; '.join(parts)}"))


# --- Folders ----------------------------------------------------------------------------------------------------------


def _folders(folder: Path) -> list[str]:
    return [name for name in inside(str(folder))[0] if name not in NO_CLASSES]


def _called(folders: Sequence[str], words: Sequence[str]) -> list[str]:
    """Names of the folders that are called so, in any case or as `test_set`, in the order of the words."""
    spelt = {name: re.sub(r"[ _-]?(set|images)$", "", name.lower()) for name in folders}
    return [name for word in words for name in sorted(folders, key=lambda name: name != word) if spelt[name] == word]


def _taken(folder: Path, names: list[str], only: Collection[str] | None) -> list[str]:
    """The class folders to take. Raises UserError where `only` leaves none."""
    taken = [name for name in names if only is None or name in only]
    if names and not taken:
        raise UserError(f"{folder}: has none of the class folders {_few(sorted(only or []))}; check --image_folder")
    return taken


def _by_class(folder: Path, classes: Sequence[str]) -> list[Sample]:
    """Path and class number of every image in the class folders of a split. Raises OSError where there are none."""
    ignored = [str(folder / name) for name in inside(str(folder))[1]]
    samples: list[Sample] = []
    for c, name in enumerate(classes):
        images, others = image_files(str(folder / name))
        if not images:
            raise FileNotFoundError(0, f"no file is a {', '.join(EXTENSIONS)}", str(folder / name))
        samples += [(path, c) for path in images]
        ignored += others
    if not classes:
        raise FileNotFoundError(0, "no class folder in it", str(folder))
    if ignored := [path for path in ignored if not path.endswith(QUIET)]:
        some = printable(ignored[0])
        log.warning("ignored, being no image file in a class folder: %s (%d such files)", some, len(ignored))
    return samples


def _has_images(folder: Path) -> bool:
    return bool(image_files(str(folder))[0])


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


# --- Test images ------------------------------------------------------------------------------------------------------


def _labels(root: Path, name: str, classes: list[str]) -> Path | None:
    """What says the classes of the images in DIR/name: that folder itself or a table; None where nothing does."""
    folder, known = root / name, set(classes)
    if any(_has_images(folder / own) for own in _folders(folder) if own in known):
        return folder
    return label_table(root, name)


def _test_folders(folder: Path, classes: list[str]) -> list[str]:
    """Class folders of a split; the `images` that is left when Tiny-ImageNet's have been sorted by class is none."""
    return [n for n in _folders(folder) if n != "images" or n in classes or _has_images(folder / n)]


def _check_same(root: Path, classes: Sequence[str], tested: Sequence[str], splits: str) -> None:
    if odd := sorted(set(classes) ^ set(tested)):
        raise UserError(f"--image_folder {root}: {splits} have different classes: only one has {_few(odd)}")


def _why_no_test(root: Path, tests: Sequence[str], classes: Sequence[str]) -> str:
    for name in tests:
        folders = _folders(root / name)
        if {*folders} & {*classes}:
            return f"the class folders in {name} hold no images; without {name}, {SPLIT_IT}"
        if folders and folders != ["images"]:
            odd = _few(sorted({*folders} ^ {*classes}))
            return f"train and {name} have different classes: only one has {odd}; without {name}, {SPLIT_IT}"
    if tests:
        return f"the images in {' and '.join(tests)} have no labels; sort them into class folders, or {SPLIT_IT}"
    return f"has neither test nor val; {EXPECTED}, or {SPLIT_IT}"


def _split(images: list[Sample], top: Path, classes: Sequence[str], fraction: float) -> dict[bool, list[Sample]]:
    """Training and test images of a split of every class; their order stays."""
    below = [path[len(str(top)) :].replace(os.sep, "/").strip("/") for path, _ in images]
    tested = held_out(below, [c for _, c in images], classes, fraction)
    both = list(zip(images, tested, strict=True))
    return {train: [image for image, is_tested in both if is_tested != train] for train in (True, False)}


def held_out(keys: Sequence[str], labels: Sequence[int], classes: Sequence[str], fraction: float) -> list[bool]:
    """Whether each image is tested on: that fraction of every class, at least one image, and never all.

    keys: of the images, all different. Their hashes decide, so that the split is the same on every machine, with every
    version and seed, and an image that is added moves hardly any other. Raises UserError for classes of one image.
    """
    groups: list[list[int]] = [[] for _ in classes]
    for i, c in enumerate(labels):
        groups[c].append(i)
    if single := [classes[c] for c, group in enumerate(groups) if len(group) < 2]:
        raise UserError(f"--split {fraction:g}: needs two images of every class; only one is there of {_few(single)}")
    hashes = [hashlib.sha256(os.fsencode(key)).digest() for key in keys]
    tested = [False] * len(keys)
    for group in groups:
        count = min(max(round(fraction * len(group)), 1), len(group) - 1)
        for i in sorted(group, key=hashes.__getitem__)[:count]:
            tested[i] = True
    return tested


# --- No split ---------------------------------------------------------------------------------------------------------


def _check_flat(root: Path, folders: list[str], tests: list[str], split: float | None) -> None:
    """Check that a folder without `train` can be split. Raises UserError, which names what would do, otherwise."""
    place = f"--image_folder {root}"
    if split is None and (named := [name for name in tests if _folders(root / name)]):
        raise UserError(f"{place}: has {named[0]} but no train with class folders; {EXPECTED}")
    if split is None or len(folders) == 1:
        if (better := _with_train(root)) is not None:
            raise UserError(f"{place}: has no train, but {better} has; give --image_folder {better}")
        if len(folders) == 1 and len(below := _folders(root / folders[0])) > 1 and _has_images(root / folders[0]):
            better = root / folders[0]
            raise UserError(f"{place}: {len(below)} class folders lie in {better}; give --image_folder {better}")
    if split is None:
        if any(_has_images(root / name) for name in folders[:BREADTH]):
            raise UserError(f"{place}: has class folders without a split into train and test; {SPLIT_IT}")
        raise FileNotFoundError(0, "no folder train in it", str(root))


def _with_train(root: Path) -> Path | None:
    """A folder some levels down that has a `train` with images."""
    level = [root]
    for _ in range(DEPTH):
        below: list[Path] = []
        for folder in level:
            with suppress(OSError):  # a folder that may not be read is none that would do
                below += [folder / name for name in _folders(folder)[:BREADTH]]
        for folder in (level := below[:BREADTH]):
            with suppress(OSError):
                train = [folder / name for name in _called(_folders(folder), TRAIN)]
                if any(_has_images(path / own) for path in train for own in _folders(path)[:1]):
                    return folder
    return None
