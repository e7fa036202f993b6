"""Evaluate a distilled set, or its real counterparts: networks trained from scratch, tested once, mean +- std.

    $ python3 train.py                                          # the newest set under results/
    $ python3 train.py results/cifar10/convnet3_f2_ipc10 -n convnet resnet10 densenet
    $ python3 train.py my_data.pt -d cifar10 -f 2               # a set without data.json
    $ python3 train.py -d cifar10 --coreset random --ipc 10     # ten real images per class
    $ python3 train.py -d cifar10 --real                        # all of them, the upper bound

The accuracy is that of the last epoch. A set's own settings apply unless a flag says otherwise.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data import Dataset
from models import NetSpec
from utils import files, options, runtime
from utils.errors import UsageError, UserError
from utils.evaluation import evaluate
from utils.images import ImageSet
from utils.options import TrainOptions
from utils.report import Progress, messages, span
from utils.runtime import Draws
from utils.synthetic import coreset, training_images

log = logging.getLogger("dream")


@dataclass(frozen=True)
class Subject:
    """What is evaluated. training_set(spec, r) gives the images of the r-th training of a network."""

    what: str
    images_per_class: float
    decoded_per_class: float
    training_set: Callable[[NetSpec, int], ImageSet]
    folder: Path  # takes eval.json


def distilled(o: TrainOptions, path: Path, dataset: Dataset) -> Subject:
    """A set made by condense.py or somebody else. Raises UserError when it does not fit the data set."""
    images, labels, _ = files.load_distilled(path)
    shape, expected = tuple(images.shape[1:]), (dataset.channels, dataset.side, dataset.side)
    if shape != expected:
        raise UserError(
            f"{path}: holds images of {shape}, {o.dataset} has {expected}; name the right data set with -d, or --size"
        )
    if int(labels.max()) >= dataset.classes:
        raise UserError(f"{path}: has a label {int(labels.max())}, {o.dataset} has {dataset.classes} classes; check -d")
    factor = o.factor or 1
    options.check_factor(factor, dataset.side)
    found = training_images(
        images.to(dataset.device),
        labels.to(dataset.device),
        factor=factor,
        decode_type=o.decode_type or "single",
        classes=dataset.classes,
        normalize=dataset.normalize,
    )
    classes = len(labels.unique())
    return Subject(
        f"{path}, factor {factor}",
        len(images) / classes,
        len(found) / classes,
        lambda spec, r: found,
        folder=folder_of(path),
    )


def real_images(o: TrainOptions, dataset: Dataset) -> Subject:
    """The whole training set, or a coreset that is drawn anew for every training."""
    real, folder = dataset.train, Path(o.results_dir) / o.dataset
    if o.coreset is None:
        count = len(real) / dataset.classes
        return Subject("all real images", count, count, lambda spec, r: real, writable(folder / "real"))
    strategy, ipc = o.coreset, o.ipc or 1
    smallest = min(real.counts)
    if ipc > smallest:
        name = dataset.class_names[real.counts.index(smallest)]
        raise UsageError(f"--ipc {ipc}: class {name} has only {smallest} training images; use --ipc {smallest} or less")

    def draw(spec: NetSpec, r: int) -> ImageSet:
        return coreset(real, spec, strategy, ipc=ipc, draws=Draws(dataset.device, o.seed, "coreset", r))

    return Subject(f"{strategy} real images", ipc, ipc, draw, writable(folder / f"coreset_{strategy}_ipc{ipc}"))


def writable(folder: Path) -> Path:
    """Make the folder now: better than failing after the trainings."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); choose another --results_dir") from error
    return folder


def run_networks(o: TrainOptions, subject: Subject, dataset: Dataset, specs: list[NetSpec]) -> list[dict[str, Any]]:
    """Train and test every network; one result each, for the table and for eval.json."""
    results = []
    recipe = options.evaluation_recipe(o, flip=dataset.flip)
    for spec in specs:
        started = time.monotonic()
        with Progress(o.repeat * o.epochs, spec.name, "epoch") as progress:

            def training_set(r: int, spec: NetSpec = spec) -> ImageSet:
                return subject.training_set(spec, r)

            score = evaluate(
                spec, training_set, dataset.test, recipe, repeat=o.repeat, seed=o.seed, on_epoch=progress.advance
            )
        seconds = time.monotonic() - started
        log.info(
            "%s",
            row(
                spec.name, f"{subject.images_per_class:g}", f"{subject.decoded_per_class:g}", str(score), span(seconds)
            ),
        )
        results.append(
            {
                "net": spec.name,
                **score.as_dict(),
                "images_per_class": subject.images_per_class,
                "decoded_per_class": subject.decoded_per_class,
                "seconds": round(seconds, 1),
                "network": dataclasses.asdict(spec),
                "protocol": {
                    **{
                        k: getattr(o, k)
                        for k in ("epochs", "batch_size", "lr", "momentum", "weight_decay", "mixup", "seed")
                    },
                    "eval_aug_type": options.evaluation_augmentation(o, flip=dataset.flip),
                },
            }
        )
    return results


def row(*cells: str) -> str:
    """One line of the table."""
    return "  {:14}{:>14}{:>14}     {:24}{}".format(*cells)


def record(folder: Path, results: list[dict[str, Any]], about: dict[str, Any]) -> None:
    """Add to eval.json; a result of the same network and protocol is replaced."""
    file = folder / "eval.json"
    try:
        earlier = files.read_json(file)["results"] if file.exists() else []
        same = [(r["network"], r["protocol"]) for r in results]
        kept = [r for r in earlier if (r["network"], r["protocol"]) not in same]
        files.write_json(file, {"results": kept + [{**r, **about} for r in results]})
    except (OSError, KeyError, TypeError) as error:
        log.warning("%s: cannot be written (%s)", file, error)


def folder_of(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def main(argv: Sequence[str]) -> int:
    """The program. Returns the exit status; raises UserError for mistakes of the user or the surroundings."""
    given = options.make_parser(TrainOptions, __doc__ or "").parse_given(argv)
    path, card, card_file = None, None, Path(files.CARD)
    with messages():
        if not given.get("real") and not given.get("coreset"):
            path = Path(given["run"]) if "run" in given else newest(given)
            if not path.exists():
                raise UserError(f"{path}: no such file or folder; name a run folder or a data.pt made by condense.py")
            card_file = folder_of(path) / files.CARD
            card = files.read_card(card_file) if card_file.exists() else None
            if card is None and not ("factor" in given and ("dataset" in given or "image_folder" in given)):
                raise UsageError(f"{path}: has no {files.CARD} beside it; say what it is with -d DATASET and -f FACTOR")
        o = options.resolve_training(given, card, card_file)
        device = runtime.pick_device(o.device)
        known = card["normalization"] if card is not None else {"mean": None, "std": None}
        dataset = Dataset(
            o.dataset, device=device, data_dir=o.data_dir, image_folder=o.image_folder, size=o.size, **known
        )
        shape = {"channels": dataset.channels, "classes": dataset.classes, "side": dataset.side}
        specs = [options.network(o, name, **shape) for name in o.net_type or ["convnet"]]
        subject = distilled(o, path, dataset) if path is not None else real_images(o, dataset)
        for spec in specs:
            options.check_batches(spec, o.batch_size, len(subject.training_set(spec, 0)))

        log.info("%s: training on %s, %d epochs, on %s", o.dataset, subject.what, o.epochs, runtime.device_name(device))
        log.info("%s", row("network", "images/class", "decoded", "test accuracy %", "time"))
        results = run_networks(o, subject, dataset, specs)
        about = {"command": shlex.join(["train.py", *argv]), "device": runtime.device_name(device)}
        record(subject.folder, results, {**about, "versions": runtime.versions()})
        if o.json:
            print(json.dumps({**results[0], "results": results}))
    return 0


def newest(given: dict[str, Any]) -> Path:
    """The newest distilled set that the flags allow."""
    return files.newest_distilled(
        Path(given.get("results_dir", options.RESULTS_DIR)),
        dataset=given.get("dataset"),
        factor=given.get("factor"),
        ipc=given.get("ipc"),
    )


if __name__ == "__main__":
    runtime.run_main(main)
