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
import hashlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from data import Dataset
from models import NetSpec, forward_flop
from utils import files, options, runtime
from utils.device import Compute, device_name, peak_memory, pick_device, set_precision
from utils.errors import UsageError, UserError
from utils.evaluation import evaluate
from utils.flags import make_parser
from utils.images import ImageSet
from utils.options import TrainOptions
from utils.report import Progress, messages, span
from utils.runtime import Draws
from utils.selection import Context
from utils.synthetic import coreset, training_images
from utils.training import fresh_network

log = logging.getLogger("dream")


@dataclass(frozen=True)
class Subject:
    """What is evaluated. training_set(spec, r) gives the images of the r-th training of a network."""

    what: str
    images_per_class: float
    decoded_per_class: float
    training_set: Callable[[NetSpec, int], ImageSet]
    folder: Path  # takes eval.json
    identity: dict[str, Any]  # tells its results there from those of other sets


def distilled(o: TrainOptions, path: Path, images: Tensor, labels: Tensor, dataset: Dataset) -> Subject:
    """A set made by condense.py or somebody else. Raises UserError when it does not fit the data set."""
    shape, expected = tuple(images.shape[1:]), (dataset.channels, dataset.side, dataset.side)
    if shape != expected:
        raise UserError(
            f"{path}: holds images of {shape}, {o.dataset} has {expected}; name the data set with -d, or --size"
        )
    if int(labels.max()) >= dataset.classes:
        raise UserError(f"{path}: has a label {int(labels.max())}, {o.dataset} has {dataset.classes} classes; check -d")
    factor, decode_type = o.factor or 1, o.decode_type or "single"
    options.check_factor(factor, dataset.side)
    found = training_images(
        images.to(dataset.device),
        labels.to(dataset.device),
        factor=factor,
        decode_type=decode_type,
        classes=dataset.classes,
        normalize=dataset.normalize,
    )
    classes = len(labels.unique())
    digest = hashlib.sha256(images.numpy().tobytes()).hexdigest()
    return Subject(
        what=f"{path}, factor {factor}",
        images_per_class=len(images) / classes,
        decoded_per_class=len(found) / classes,
        training_set=lambda spec, r: found,
        folder=beside(path),
        identity={"dataset": o.dataset, "factor": factor, "decode_type": decode_type, "images_sha256": digest},
    )


def real_images(o: TrainOptions, dataset: Dataset) -> Subject:
    """The whole training set, or a coreset that is drawn anew for every training."""
    real, folder = dataset.train, Path(o.results_dir) / o.dataset
    identity = {"dataset": o.dataset, "image_folder": o.image_folder}
    if o.coreset is None:
        count = len(real) / dataset.classes
        files.make_folder(folder / "real")
        return Subject("all real images", count, count, lambda spec, r: real, folder / "real", identity)
    strategy, ipc = o.coreset, o.ipc or 1
    options.check_ipc(ipc, real.counts, dataset.class_names)

    def draw(spec: NetSpec, r: int) -> ImageSet:
        draws = Draws(dataset.device, o.seed, "coreset", r)
        return coreset(
            Context(fresh_network(spec, draws), real, draws, Compute(dataset.device).cheapest()), strategy, ipc=ipc
        )

    folder = folder / f"coreset_{strategy}_ipc{ipc}"
    files.make_folder(folder)
    return Subject(f"{strategy} real images", ipc, ipc, draw, folder, identity)


def run_networks(
    o: TrainOptions, subject: Subject, dataset: Dataset, specs: list[NetSpec], session: dict[str, Any]
) -> list[dict[str, Any]]:
    """Train and test every network; a line and a record each as soon as it is done."""
    recipe = options.evaluation_recipe(o, flip=dataset.flip)
    protocol = {
        "epochs": o.epochs,
        "batch_size": o.batch_size,
        "lr": o.lr,
        "momentum": o.momentum,
        "weight_decay": o.weight_decay,
        "mixup": o.mixup,
        "eval_aug_type": options.evaluation_augmentation(o, flip=dataset.flip),
        "precision": o.precision,
        "seed": o.seed,
    }
    results = []
    log.info("%s", row("network", "images/class", "decoded", "test accuracy %", "time"))
    for spec in specs:
        started = time.monotonic()
        images = 3 * o.epochs * o.repeat * subject.decoded_per_class * dataset.classes
        compute = options.computing(dataset.device, o.compile, o.precision, images * forward_flop(spec))
        with Progress(o.repeat * o.epochs, spec.name, "epoch") as progress:
            score = evaluate(
                spec,
                partial(subject.training_set, spec),
                dataset.test,
                recipe,
                repeat=o.repeat,
                seed=o.seed,
                compute=compute,
                on_epoch=progress.advance,
            )
        seconds = time.monotonic() - started
        stored, decoded = f"{subject.images_per_class:g}", f"{subject.decoded_per_class:g}"
        log.info("%s", row(spec.name, stored, decoded, str(score), span(seconds)))
        results.append(
            {
                "net": spec.name,
                **score.as_dict(),
                "images_per_class": subject.images_per_class,
                "decoded_per_class": subject.decoded_per_class,
                "seconds": round(seconds, 1),
                "network": dataclasses.asdict(spec),
                "protocol": protocol,
                "set": subject.identity,
            }
        )
        record(subject.folder / "eval.json", {**results[-1], **session})
    return results


def row(*cells: str) -> str:
    """One line of the table."""
    return "  {:14}{:>14}{:>14}     {:24}{}".format(*cells)


def record(file: Path, result: dict[str, Any]) -> None:
    """Add to eval.json, in place of an earlier result of the same set, network and protocol."""

    def key(r: dict[str, Any]) -> list[object]:
        return [r["set"], r["network"], r["protocol"]]

    try:
        earlier = files.read_json(file)["results"] if file.exists() else []
        kept = [r for r in earlier if key(r) != key(result)]
    except (UserError, KeyError, TypeError):
        log.warning("%s: was damaged, and is begun again", file)
        kept = []
    try:
        files.write_json(file, {"results": [*kept, result]})
    except OSError as error:
        log.warning("%s: cannot be written (%s)", file, error.strerror)


def beside(path: Path) -> Path:
    """The folder of a set that was named by its folder or by its data.pt."""
    return path if path.is_dir() else path.parent


def newest(given: dict[str, Any]) -> Path:
    """The newest distilled set that the flags allow."""
    return files.newest_distilled(
        Path(given.get("results_dir", options.RESULTS_DIR)),
        dataset=given.get("dataset"),
        factor=given.get("factor"),
        ipc=given.get("ipc"),
    )


def main(argv: Sequence[str]) -> int:
    """The program. Returns the exit status; raises UserError for mistakes of the user or the surroundings."""
    given = make_parser(TrainOptions, __doc__ or "").parse_given(argv)
    with messages():
        if given.get("real") or given.get("coreset"):
            card, o = None, options.resolve_training(given, None, Path())
        else:
            path = Path(given["run"]) if "run" in given else newest(given)
            images, labels, card = files.load_distilled(path)
            card_file = beside(path) / files.CARD
            if card is None and not ("factor" in given and ("dataset" in given or "image_folder" in given)):
                raise UsageError(f"{path}: has no {files.CARD} beside it; say what it is with -d DATASET and -f FACTOR")
            o = options.resolve_training(given, card, card_file, ipc=len(images) // len(labels.unique()))
            if card is not None and not card.get("finished"):
                log.warning("%s is unfinished, after %s outer iterations", path, card.get("outer_iterations"))
        device = pick_device(o.device)
        set_precision(device, o.precision)
        known = card["normalization"] if card is not None else {}
        dataset = Dataset(
            o.dataset,
            device=device,
            data_dir=o.data_dir,
            image_folder=o.image_folder,
            size=o.size,
            mean=known.get("mean"),
            std=known.get("std"),
        )
        if card is not None and o.dataset == "folder" and card.get("class_names") != dataset.class_names:
            raise UserError(
                f"--image_folder {o.image_folder}: has other classes than the set, {card.get('class_names')}"
            )
        shape = {"channels": dataset.channels, "classes": dataset.classes, "side": dataset.side}
        specs = options.networks(o, given, card, **shape)
        real = o.real or o.coreset
        subject = real_images(o, dataset) if real else distilled(o, path, images, labels, dataset)
        for spec in specs:
            options.check_batches(spec, o.batch_size, round(subject.decoded_per_class * dataset.classes))

        log.info("%s: training on %s, %d epochs, on %s", o.dataset, subject.what, o.epochs, device_name(device))
        results = run_networks(o, subject, dataset, specs, runtime.session("train.py", argv, device))
        log.info("peak memory: %.2g GB", peak_memory(device) / 1e9)
        if o.json:
            print(json.dumps({**results[0], "results": results}))
    return 0


if __name__ == "__main__":
    runtime.run_main(main)
