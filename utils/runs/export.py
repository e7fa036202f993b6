"""Distilled sets for other programs: decoded as a folder of PNG files, or as stored in a .safetensors file; also on
the Hugging Face Hub.

utils/runs/sets.py reads both back. Nothing is overwritten, and a killed export leaves nothing but a hidden folder.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from torchvision.transforms.functional import to_pil_image

from models import NetSpec
from utils.files import hub
from utils.files.atomic import write_atomically
from utils.method.evaluation import Score
from utils.method.images import FLOAT32, ImageSet
from utils.runs.card import (
    WHITENING,
    as_stored,
    check_card,
    how_to_use,
    is_whitened,
    source_datasets,
    storage,
    table_cell,
    title,
)
from utils.runs.formats import SAFETENSORS
from utils.runs.sets import DistilledSet, folder_names, safe_name
from utils.system.errors import UsageError, UserError

log = logging.getLogger("dream")


def check_target(path: Path) -> None:
    """Check that an export would replace nothing. Raises UsageError when something is there already."""
    is_folder = path.is_dir() and path.suffix.lower() != SAFETENSORS
    if any(path.iterdir()) if is_folder else path.exists():
        there = "is not empty" if is_folder else "is there already"
        raise UsageError(f"--export {path}: {there}; name a new folder, or a new file ending in {SAFETENSORS}")


def export_set(
    target: str,
    *,
    stored: DistilledSet,
    decoded: ImageSet,
    class_names: Sequence[str],
    card: Mapping[str, Any],
    store: str = FLOAT32,
) -> None:
    """Write a set in the form that the target's suffix asks for, and upload it if the target is an hf:// name.

    decoded: the images that networks train on; store: one of STORES, to which the pixels of a .safetensors file are
    rounded.
    """

    def write(path: Path) -> str:
        if path.suffix.lower() == SAFETENSORS:
            export_safetensors(path, stored, card=card, store=store)
            return f"{len(stored.images)} stored"
        export_folder(path, decoded, class_names=class_names, stored=len(stored.images), card=card)
        return f"{len(decoded)} decoded"

    if hub.is_on_hub(target):
        name = PurePosixPath(hub.parse(target).path).name or "set"
        with tempfile.TemporaryDirectory() as folder:
            what = write(Path(folder, name))
            hub.upload(target, Path(folder, name))
    else:
        what = write(Path(target))
    log.info("exported %s images to %s", what, target)


# --- As stored --------------------------------------------------------------------------------------------------------


def export_safetensors(file: Path, stored: DistilledSet, *, card: Mapping[str, Any], store: str = FLOAT32) -> None:
    """Write the stored set: `images`, `labels`, and the card in the header. Soft labels, (N, classes), are written in
    place of hard ones. store: one of STORES, to which pixels are rounded.

    Raises UsageError when the file is there already, UserError when it cannot be written.
    """
    check_target(file)
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise UserError(f"--export {file}: cannot be written without safetensors; pip install safetensors") from error
    known = {"normalized": False, "source_datasets": source_datasets(card), **storage(store, stored.images.shape[1:])}
    card = check_card({**card, **known}, file)
    card = {name: value for name, value in card.items() if name != "about"}  # of the file that the set comes from
    labels = stored.labels if stored.soft is None else stored.soft
    tensors = {"images": as_stored(stored.images, store), "labels": labels}
    header = {"format": "pt", "card": json.dumps(card), "about": how_to_use(card, stored.images.shape[-1])}
    content = save({name: x.detach().cpu().contiguous() for name, x in tensors.items()}, header)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, content)
    except OSError as error:
        raise _cannot(file, error) from error


def _cannot(path: Path, error: OSError) -> UserError:
    return UserError(f"--export {path}: cannot be written ({error.strerror or error}); name another place")


# --- Decoded ----------------------------------------------------------------------------------------------------------


def export_folder(
    directory: Path, train: ImageSet, *, class_names: Sequence[str], stored: int, card: Mapping[str, Any]
) -> None:
    """Write the training images that networks see as DIR/CLASS/0000.png, and a README.md that says what they are.

    train: decoded images in [0, 1]; stored: how many images they were decoded from. ImageFolder(DIR) of torchvision
    and load_dataset("imagefolder", data_dir=DIR) of Hugging Face number the classes as the labels do.
    Raises UsageError when the folder is not empty, UserError when it cannot be written or a class has no images.
    """
    check_target(directory)
    directory = directory.resolve()
    if 0 in train.counts:
        name = class_names[train.counts.index(0)]
        problem = f"class {name} has no images, so that readers of folders would number the others differently"
        raise UserError(f"--export {directory}: {problem}; export a {SAFETENSORS} file")
    if train.soft is not None:
        log.warning("--export %s: a folder cannot hold soft labels: only the most probable classes are kept", directory)
    folders = folder_names(class_names)
    part = directory.with_name(f".{directory.name}.part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        for c, folder in enumerate(folders):
            (part / folder).mkdir(parents=True)
            for i, image in enumerate(train.of_class(c).detach().mul(255).round().clamp(0, 255).byte().cpu()):
                to_pil_image(image).save(part / folder / f"{i:04}.png")
        text = readme(train, folders, class_names=class_names, stored=stored, card=card)
        (part / "README.md").write_text(text, encoding="utf-8")
        if hasattr(os, "sync"):  # Windows has none
            os.sync()  # the files before their name, in case of a power cut
        if directory.exists():
            directory.rmdir()
        part.rename(directory)
    except OSError as error:
        raise _cannot(directory, error) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


REDUCED = f"""
The set has soft labels, probabilities of every class for every image, which folders cannot hold: each image lies in \
the folder of its most probable class. A {SAFETENSORS} export keeps them.
"""
# The header of the README has no `license`: only the owner of the real images can name one, `unknown` would say that
# there is none to be found, and `other` asks for a name and a link.
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")  # of a data set on the Hugging Face Hub
SIZES = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M"}  # Hugging Face's words


def readme(
    train: ImageSet, folders: Sequence[str], *, class_names: Sequence[str], stored: int, card: Mapping[str, Any]
) -> str:
    """README.md of an exported folder: Hugging Face's header, what the set is, how it was made, how to train on it."""
    n, channels, side = len(train), train.images.shape[1], train.side
    # As a person wrote them: float32 turns 0.4914 into 0.4914000034332275.
    mean, std = ([float(f"{v:.7g}") for v in x.flatten().tolist()] for x in (train.normalize.mean, train.normalize.std))
    name = title(card)
    size = next((word for most, word in SIZES.items() if n < most), "n>1M")
    grey = "    transforms.Grayscale(),\n" if channels == 1 else ""
    whitened = f", and {WHITENING}, which the lines below leave out" if is_whitened(card) else ""
    sources = source_datasets(card)
    # With Hugging Face's prefix for a data set that is not on its Hub.
    listed = [name if HUB_ID.fullmatch(name) else f"extended|other-{safe_name(name)}" for name in sources]
    about = [
        ("data set", f"{name}, {train.classes} classes"),
        ("real images from", ", ".join(sources)),
        ("budget", f"{stored} stored images, {stored / train.classes:g} per class: compare with sets of this size"),
        ("images here", f"{n}, {n / train.classes:g} per class, {channels} x {side} x {side}, decoded"),
        ("multi-formation", f"factor {card['factor']}, decode type {card['decode_type']}: applied already, so that "
         "these images have factor 1"),
        *_making(card),
    ]  # fmt: skip
    rows = "\n".join(f"| {what} | {table_cell(value)} |" for what, value in about)
    labels = enumerate(zip(folders, class_names, strict=True))
    classes = "\n".join(f"| {c} | {folder} | {table_cell(known)} |" for c, (folder, known) in labels)
    settings = json.dumps({k: v for k, v in card.get("settings", {}).items() if v is not None}, indent=2)
    return f"""---
pretty_name: {json.dumps(f"{name}, distilled")}
task_categories:
- image-classification
tags:
- dataset-distillation
- synthetic
size_categories:
- {size}
source_datasets: {json.dumps(listed)}
---
# {name}, distilled

A small synthetic training set, distilled from {name}: networks train on it in place of {name} and are tested on real
images.

| | |
|---|---|
{rows}

PNG rounds pixels to 8 bits, so that accuracies may differ slightly from those of the stored set.

Under which licence the images may be used is up to the owner of the data set that they come from; none is set here.
{REDUCED if train.soft is not None else ""}
## Training on it

Networks were trained on images normalised with mean {mean} and standard deviation {std}, in units of [0, 1]{whitened}:

```python
from torchvision import datasets, transforms

prepare = transforms.Compose([
{grey}    transforms.ToTensor(),
    transforms.Normalize({mean}, {std}),
])
train = datasets.ImageFolder("PATH_OF_THIS_FOLDER", prepare)  # class numbers are the labels below
```

or `datasets.load_dataset("imagefolder", data_dir="PATH_OF_THIS_FOLDER")` with Hugging Face's `datasets`.

| label | folder | class |
|---|---|---|
{classes}

## Settings

```json
{settings}
```
"""


def _making(card: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Rows of the README's table: how the set was made and how good it is, as far as the card says."""
    if "outer_iterations" not in card:
        return [("made by", "unknown: the set came without a description")]
    settings = card.get("settings", {})
    rows = [
        ("made by", "condense.py, after DREAM: Efficient Dataset Distillation by Representative Matching (ICCV 2023)"),
        ("method", f"{settings.get('match')} matching, metric {settings.get('metric')}, real images by "
         f"{settings.get('select')}, initial pixels {settings.get('init')}"),
        ("outer iterations", f"{card['outer_iterations']}" + ("" if card.get("finished") else ", unfinished")),
    ]  # fmt: skip
    for what, key in (("test accuracy, %", "accuracy"), ("of as many random real images, %", "random_real")):
        # An unfinished run has no scores yet, and a card may say anything.
        with suppress(KeyError, TypeError, ValueError, ArithmeticError):
            score = Score.from_dict(card[key])
            rows.append((what, f"{score}, {NetSpec(**card['network']).name}"))
    return rows
