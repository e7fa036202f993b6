"""Evaluate a distilled set beside real images: networks trained from scratch, tested once, mean +- std.

    $ python3 train.py                                          # the newest set under results/
    $ python3 train.py results/cifar10/convnet3_f2_ipc10 -n all --table table.md
    $ python3 train.py my_data.pt -d cifar10 -f 2 --normalized  # somebody else's set
    $ python3 train.py RUN --real                               # beside all real images, the upper bound
    $ python3 train.py RUN --export DIR                         # as PNG files for everybody; trains nothing
    $ python3 train.py -d cifar10 --coreset random --ipc 10     # ten real images per class, and no set
    $ torchrun --nproc_per_node=8 train.py RUN -n all           # trainings spread over eight GPUs

The accuracy is that of the last epoch. A set's own settings apply unless a flag says otherwise.
"""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # So that Ctrl-C shows no traceback while PyTorch is loaded; run_main takes it back.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import dataclasses
import hashlib
import itertools
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data import Dataset
from models import NetSpec, forward_flop
from utils.config import checks, options
from utils.config import derived as recipes
from utils.config.flags import make_parser
from utils.config.options import TrainOptions
from utils.files import atomic
from utils.files.imagefiles import GRID_COLUMNS
from utils.method.evaluation import Score, evaluate, gathered
from utils.method.formation import decoded_count
from utils.method.images import ImageSet, digest, to_unit
from utils.method.selection import Context
from utils.method.synthetic import BASELINE, coreset, training_images
from utils.method.training import fresh_network
from utils.numerics.compilation import computing
from utils.numerics.compute import Compute
from utils.runs import confusion, export, results, sets
from utils.runs.board import Board, check_board
from utils.runs.card import CARD, card_of_set, newest_distilled
from utils.runs.layout import factor_warning
from utils.runs.results import ALL_REAL, EVALUATIONS, Record
from utils.runs.sets import DistilledSet, SetFile
from utils.system import distributed, process
from utils.system.device import backends, be_deterministic, device_name, peak_memory, pick_device, set_precision
from utils.system.draws import Draws
from utils.system.errors import UsageError, UserError
from utils.system.report import Progress, messages, span

log = logging.getLogger("dream")

DISTILLED = "distilled set"
CHOSEN = {"kmeans": "k-means representatives", "herding": "herded real images"}  # others go by their strategy's name
RANDOM = "random real images"


@dataclass(frozen=True)
class Subject:
    """What networks are trained on. training_set(spec, r) gives the images of the r-th training of a network."""

    what: str
    images_per_class: float
    decoded_per_class: float
    stored_bytes: int  # of the pixels as the set holds them, and of soft labels
    epochs: int
    training_set: Callable[[NetSpec, int], ImageSet]
    folder: Path  # takes eval.json
    identity: dict[str, Any]  # tells its results there from those of other sets

    @property
    def title(self) -> str:
        return f"{self.what}, {self.images_per_class:.4g} per class"


class Evaluation:
    """One command's fixed parts, and the results so far."""

    def __init__(
        self, o: TrainOptions, dataset: Dataset, specs: list[NetSpec], session: dict[str, Any], group: distributed.Group
    ) -> None:
        self.o, self.dataset, self.specs, self.session, self.group = o, dataset, specs, session, group
        self.device = dataset.device
        self.records: list[Record] = []
        self.board = Board(None)

    @cached_property
    def digests(self) -> tuple[str, str]:
        """What training and test images are, by their content."""
        return digest(self.dataset.train), digest(self.dataset.test)

    # --- What is evaluated --------------------------------------------------------------------------------------------

    def distilled(self, stored: SetFile, images: Tensor, labels: Tensor, soft: Tensor | None) -> Subject:
        """A set made by condense.py or somebody else, from what sets.interpret says of it."""
        o, dataset = self.o, self.dataset
        factor, decode_type = o.factor or 1, o.decode_type or "single"
        found = training_images(
            images.to(self.device),
            labels.to(self.device),
            soft=None if soft is None else soft.to(self.device),
            factor=factor,
            decode_type=decode_type,
            classes=dataset.classes,
            normalize=dataset.normalize,
        )
        classes = len(labels.unique())
        contents = [x.contiguous().numpy().tobytes() for x in (images, labels, soft) if x is not None]
        return Subject(
            what=DISTILLED,
            images_per_class=len(images) / classes,
            decoded_per_class=len(found) / classes,
            stored_bytes=stored.images.nbytes + (0 if stored.soft is None else stored.soft.nbytes),
            epochs=o.epochs,
            training_set=lambda spec, r: found,
            folder=self.results_of(stored),
            identity={
                **self.data_identity(),
                "factor": factor,
                "decode_type": decode_type,
                "sha256": hashlib.sha256(b"".join(contents)).hexdigest(),
            },
        )

    def results_of(self, stored: SetFile) -> Path:
        """Where its results go: a run folder, or for sets from elsewhere, which stay as they are, one of their own."""
        if stored.card is not None and stored.card_file.name == CARD:
            return stored.file.parent
        folder = Path(self.o.results_dir) / self.o.dataset / f"evaluated_{stored.file.stem}"
        atomic.make_folder(folder)
        return folder

    def baselines(self, ours: Subject) -> list[Subject]:
        """As many real images as a distilled set stores, and random ones as many as it decodes to."""
        if options.NO_BASELINES in self.o.baselines:
            return []
        stored, decoded = round(ours.images_per_class), round(ours.decoded_per_class)
        most = min(self.dataset.train.counts)
        found = [self.coreset(name, min(stored, most), ours.folder) for name in self.o.baselines]
        if stored < decoded <= most:
            found.insert(1, self.coreset("random", decoded, ours.folder))
        elif decoded > most:
            log.info("a class has %d real images: no row with as many as are decoded (%d)", most, decoded)
        return found

    def coreset(self, strategy: str, ipc: int, folder: Path) -> Subject:
        """Real images, chosen anew for every training in the embedding of a fresh network."""
        real, o = self.dataset.train, self.o
        checks.check_ipc(ipc, real.counts, self.dataset.class_names)

        def draw(spec: NetSpec, r: int) -> ImageSet:
            draws = Draws(self.device, o.seed, BASELINE, r)
            net = fresh_network(spec, draws)
            return coreset(Context(net, real, draws, Compute(self.device).cheapest()), strategy, ipc=ipc)

        return Subject(
            what=CHOSEN.get(strategy, f"{strategy} real images"),
            images_per_class=ipc,
            decoded_per_class=ipc,
            stored_bytes=ipc * self.dataset.classes * real.images[0].nbytes,
            epochs=o.epochs,
            training_set=draw,
            folder=folder,
            identity={**self.data_identity(), "strategy": strategy, "ipc": ipc},
        )

    def real(self, epochs: int) -> Subject:
        """The whole training set. Its results lie in a folder of their own, where every later command finds them."""
        real = self.dataset.train
        count = len(real) / self.dataset.classes
        folder = Path(self.o.results_dir) / self.o.dataset / "real"
        atomic.make_folder(folder)
        return Subject(
            ALL_REAL, count, count, real.images.nbytes, epochs, lambda spec, r: real, folder, self.data_identity()
        )

    def data_identity(self) -> dict[str, Any]:
        """What training and test images are, as far as results depend on it."""
        return {
            "training_images": self.digests[0],
            "test_images": self.digests[1],
            "normalization": [[round(value, 4) for value in values] for values in self.dataset.statistics],
            **({} if self.o.whiten == "none" else {"whiten": self.o.whiten}),
        }

    # --- Training and testing -----------------------------------------------------------------------------------------

    def run(self, subjects: Sequence[Subject]) -> None:
        """Every network on every subject; each is recorded as soon as it is done."""
        todo = [(spec, subject) for spec in self.specs for subject in subjects]
        work = [self.flop(spec, subject) for spec, subject in todo]
        for spec, subject in todo:  # before the first hour, not after it
            checks.check_batches(spec, self.o.batch_size, round(subject.decoded_per_class * self.dataset.classes))
        for subject in subjects:
            self.show_images(subject)
        began, trained = time.monotonic(), 0.0
        # One row at a time, or as many as keep all ranks at work, two trainings each.
        at_once = 1 if self.group.alone else -(-2 * self.group.count // self.o.repeat)
        for first in range(0, len(todo), at_once):
            rows = range(first, min(first + at_once, len(todo)))
            known = {i: self.group.broadcast(partial(self.known, *todo[i])) for i in rows}
            fresh = {i: work[i] for i in rows if known[i] is None}
            found = {i: record for i, record in known.items() if record is not None} | self.train(todo, fresh)
            trained += sum(fresh.values())
            left = (time.monotonic() - began) / trained * sum(work[first + at_once :]) if trained else 0
            for i in rows:
                self.records.append(record := found[i])
                more = f"; about {span(left)} for the other rows" if left > 60 and i == rows[-1] else ""
                score, (spec, subject) = Score(tuple(record["accuracies"])), todo[i]
                log.info("%s on %s: %s%s", spec.name, subject.title, score, more)

    def flop(self, spec: NetSpec, subject: Subject) -> float:
        """Floating-point operations of a row; a backward pass is two forward ones."""
        trained = 3 * subject.epochs * subject.decoded_per_class * self.dataset.classes
        return self.o.repeat * (trained + len(self.dataset.test)) * forward_flop(spec)

    def description(self, spec: NetSpec, subject: Subject) -> Record:
        """What a result belongs to: all of its record but the result."""
        o = self.o
        protocol = {
            "epochs": subject.epochs,
            "batch_size": o.batch_size,
            "lr": o.lr,
            "momentum": o.momentum,
            "weight_decay": o.weight_decay,
            "mixup": o.mixup,
            "eval_aug_type": recipes.evaluation_augmentation(o, flip=self.dataset.flip),
            "precision": o.precision,
            "seed": o.seed,
        }
        return {
            "net": spec.name,
            "trained_on": subject.what,
            "images_per_class": subject.images_per_class,
            "decoded_per_class": subject.decoded_per_class,
            "stored_bytes": subject.stored_bytes,
            "network": dataclasses.asdict(spec),
            "protocol": protocol,
            "set": subject.identity,
            **self.session,
        }

    def known(self, spec: NetSpec, subject: Subject) -> Record | None:
        """The result of an earlier command on all real images; other rows are always trained."""
        if self.o.retrain or subject.what != ALL_REAL:
            return None
        file = subject.folder / EVALUATIONS
        found = results.find(file, self.description(spec, subject), repeat=self.o.repeat)
        if found is None:
            return None
        if self.o.confusion and not found.get("confusion"):
            log.warning("%s: knows no confusion matrix of %s; --retrain makes one", file, subject.what)
        row = f"{spec.name} on {subject.what}"
        log.info("%s: known from %s (%s); --retrain trains again", row, file, results.made_by(found))
        return found

    def train(self, todo: Sequence[tuple[NetSpec, Subject]], work: Mapping[int, float]) -> dict[int, Record]:
        """Those rows that are named in `work`, by their floating-point operations: the trainings are shared out."""
        trainings = [(i, r) for i in work for r in range(self.o.repeat)]
        mine = [trainings[number] for number in self.group.assigned([work[i] for i, _ in trainings])]
        done = {i: self.score(*todo[i], work[i], [r for j, r in mine if j == i]) for i in work}
        found = {}
        for i, (own, numbers, own_seconds) in done.items():
            (spec, subject), score = todo[i], gathered(own, numbers, self.group, self.o.repeat)
            for r, accuracy in enumerate(score.accuracies):
                self.board.scalar(f"test accuracy %/{spec.name}, {subject.title}", accuracy, r)
            (seconds,) = self.group.all_reduce_max(own_seconds)
            matrix = score.confusion.tolist() if self.o.confusion and score.confusion is not None else None
            found[i] = {
                **self.description(spec, subject),
                **score.as_dict(),
                "seconds": round(seconds, 1),
                "confusion": matrix,
            }
            self.group.once(results.keep, subject.folder / EVALUATIONS, found[i])
        return found

    def score(
        self, spec: NetSpec, subject: Subject, flop: float, trainings: Sequence[int]
    ) -> tuple[Score, Sequence[int], float]:
        """Some trainings of a row, which are given back, and the seconds that they took."""
        o, title, started = self.o, f"{spec.name}, {subject.title}", time.monotonic()
        recipe = dataclasses.replace(recipes.evaluation_recipe(o, flip=self.dataset.flip), epochs=subject.epochs)
        with Progress(len(trainings) * subject.epochs, title, "epoch") as progress:

            def training_set(r: int) -> ImageSet:
                with progress.paused():  # choosing real images may take longer than training on them
                    return subject.training_set(spec, r)

            score = evaluate(
                spec,
                training_set,
                self.dataset.test,
                recipe,
                trainings=trainings,
                seed=o.seed,
                compute=computing(self.device, o.compile, o.precision, flop),
                on_epoch=progress.advance,
                on_loss=partial(self.show_loss, title) if self.board.on else None,
            )
        return score, trainings, time.monotonic() - started

    def show_images(self, subject: Subject) -> None:
        """The first training's first images of every class, on the board."""
        if self.board.on:
            train = subject.training_set(self.specs[0], 0)
            count = min(GRID_COLUMNS, *train.counts)
            shown = torch.stack([to_unit(train.of_class(c)[:count]) for c in range(train.classes)])
            if count:
                self.board.images(0, **{f"training images/{subject.title}": shown})

    def show_loss(self, title: str, r: int, epoch: int, loss: float) -> None:
        self.board.scalar(f"training loss/{title}, training {r}", loss, epoch)

    # --- Looking at the results ---------------------------------------------------------------------------------------

    def show_confusion(self, subjects: Sequence[Subject]) -> None:
        """Per-class accuracy and confusion matrix of every row as CSV and picture, those of the first subject printed
        as well."""
        names, folder = self.dataset.class_names, subjects[0].folder / "confusion"
        atomic.make_folder(folder)
        for record, (spec, subject) in zip(self.records, itertools.product(self.specs, subjects), strict=True):
            if record.get("confusion"):
                matrix, title = torch.tensor(record["confusion"]), f"{spec.name}, {subject.title}"
                file = folder / (title.replace(",", "").replace(" ", "_") + ".csv")
                atomic.write_atomically(file, confusion.as_csv(matrix, names).encode())
                atomic.write_atomically(file.with_suffix(".png"), confusion.as_png(matrix, names, title))
                if subject is subjects[0]:
                    log.info("\n%s\n%s", title, confusion.as_text(matrix, names))
        log.info("\nconfusion matrices of all rows: %s/*.csv and *.png", folder)


def newest(given: Mapping[str, Any]) -> Path:
    """The newest distilled set that the flags allow."""
    return newest_distilled(
        Path(given.get("results_dir", options.RESULTS_DIR)),
        dataset=given.get("dataset"),
        factor=given.get("factor"),
        ipc=given.get("ipc"),
    )


def resolve(given: dict[str, Any]) -> tuple[TrainOptions, SetFile | None]:
    """Complete options, and the set that they are about, unless it is real images alone."""
    if given.get("coreset") or (given.get("real") and "run" not in given):
        checks.check_alone(given)
        return options.resolve_training(given, None, Path()), None
    stored = sets.read(Path(given["run"]) if "run" in given else newest(given))
    card = stored.card
    if card is None and not ("factor" in given and ("dataset" in given or "image_folder" in given)):
        raise UsageError(
            f"{stored.file}: has no {CARD} beside it; say what it is with -d DATASET and -f FACTOR (1 for plain images)"
        )
    per_class = len(stored.images) // len(stored.labels.unique())
    o = options.resolve_training(given, card, stored.card_file, ipc=per_class)
    if card is not None and not card.get("finished", True):
        log.warning("%s is unfinished, after %s outer iterations", stored.file, card.get("outer_iterations"))
    return o, stored


def load(o: TrainOptions, card: Mapping[str, Any] | None) -> Dataset:
    """The data set. Raises UserError when its classes are not those of the set's card."""
    device = pick_device(o.device, distributed.local_rank())
    if o.deterministic:
        be_deterministic(device)
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
        threads=o.data_threads,
        whiten=o.whiten,
    )
    if card is not None and o.dataset == "folder" and card.get("class_names") != dataset.class_names:
        raise UserError(f"--image_folder {o.image_folder}: has other classes than the set, {card.get('class_names')}")
    return dataset


def interpret(o: TrainOptions, stored: SetFile, dataset: Dataset) -> DistilledSet:
    """Images, labels and soft labels of a set, as sets.interpret gives them. Raises UserError when set and data set
    do not fit; a factor that a person said is compared with what the pixels look like."""
    found = sets.interpret(stored, dataset, normalized=o.normalized)
    checks.check_factor(factor := o.factor or 1, dataset.side)
    decoded = decoded_count(len(found[0]), factor=factor, decode_type=o.decode_type or "single")
    sets.must_fit(stored.file, decoded * found[0][0].numel(), f" (decoded with -f {factor})")
    if stored.card is None:
        warning = factor_warning(stored.file, found[0], dataset.train.images.cpu(), factor=factor)
        if warning is not None:
            log.warning("%s", warning)
    return found


def card_of_stranger(o: TrainOptions, dataset: Dataset, ipc: int) -> dict[str, Any]:
    """What data.json would say of a set that has none, as far as flags say it."""
    mean, std = dataset.statistics
    return card_of_set(
        dataset=o.dataset,
        image_folder=o.image_folder,
        class_names=dataset.class_names,
        ipc=ipc,
        factor=o.factor or 1,
        decode_type=o.decode_type or "single",
        mean=mean,
        std=std,
        settings={} if o.whiten == "none" else {"whiten": o.whiten},
    )


def main(argv: Sequence[str]) -> int:
    """The program. Returns the exit status; raises UserError for mistakes of the user or the surroundings."""
    given = make_parser(TrainOptions, __doc__ or "").parse_given(argv)
    minutes = given.get("wait_minutes", TrainOptions.wait_minutes)
    with messages(), distributed.joined(backends(), minutes=minutes) as group:
        o, stored = resolve(given)
        card = None if stored is None else stored.card
        dataset = load(o, card)
        if o.tensorboard:
            check_board()
        shape = {"channels": dataset.channels, "classes": dataset.classes, "side": dataset.side}
        specs = options.networks(o, given, card, **shape)
        session = {
            "dataset": o.dataset,
            **process.session("train.py", argv, dataset.device, precision=o.precision, deterministic=o.deterministic),
        }
        evaluation = Evaluation(o, dataset, specs, session, group)
        if stored is not None:
            interpreted = interpret(o, stored, dataset)
            ours = evaluation.distilled(stored, *interpreted)
            if o.export is not None:
                decoded = ours.training_set(specs[0], 0)
                card = card or card_of_stranger(o, dataset, round(ours.images_per_class))
                names = dataset.class_names
                write = partial(export.export_set, stored=interpreted, decoded=decoded, class_names=names, card=card)
                group.once(write, Path(o.export))
                return 0
            subjects = [ours, *evaluation.baselines(ours)]
            if o.real:
                subjects.append(evaluation.real(options.real_epochs(given)))
        elif o.coreset:
            folder = Path(o.results_dir) / o.dataset / f"coreset_{o.coreset}_ipc{o.ipc}"
            subjects = [evaluation.coreset(o.coreset, o.ipc or 1, folder)]
            atomic.make_folder(folder)
        else:
            subjects = [evaluation.real(o.epochs)]
        folder = subjects[0].folder

        what = subjects[0].what if stored is None else f"{stored.file}, factor {o.factor or 1}"
        log.info("%s: training on %s, on %s", o.dataset, what, device_name(dataset.device))
        if o.tensorboard:
            evaluation.board = Board(group.either(folder, None))
        evaluation.run(subjects)
        records = evaluation.records
        if stored is not None:
            for text in results.low_accuracies(records, DISTILLED, RANDOM, chance=100 / dataset.classes):
                log.warning("%s", text)
        evaluation.board.close()
        if o.confusion:
            group.once(evaluation.show_confusion, subjects)
        log.info("\n%s\npeak memory: %.2g GB", results.as_text(records), peak_memory(dataset.device) / 1e9)
        for name in o.table or []:
            table = results.TABLES[Path(name).suffix](records, session).encode()
            group.once(atomic.write_atomically, Path(name), table)
            log.info("wrote %s", name)
        if o.json:
            print(json.dumps({**records[0], "results": records}))
    return 0


if __name__ == "__main__":
    process.run_main(main)
