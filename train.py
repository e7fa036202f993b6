"""Evaluate a distilled set beside real images: networks trained from scratch, tested once, mean +- std.

    $ python3 train.py                                          # the newest set under results/
    $ python3 train.py results/cifar10/convnet3_f2_ipc10 -n all --table table.md
    $ python3 train.py my_data.pt -d cifar10 -f 2 --normalized  # somebody else's set
    $ python3 train.py hf://user/name                           # from the Hugging Face Hub
    $ python3 train.py RUN --real                               # beside all real images, the upper bound
    $ python3 train.py RUN --scores --teacher all               # HLR, IOR, LRS and ARS; soft labels of a teacher
    $ python3 train.py RUN --export DIR                         # as PNG files for everybody; trains nothing
    $ python3 train.py -d cifar10 --coreset random --ipc 10     # ten real images per class, and no set
    $ torchrun --nproc_per_node=8 train.py RUN -n all           # trainings spread over eight GPUs

The accuracy is that of the last epoch. A set's own settings apply unless a flag says otherwise.
"""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Until run_main sets it back, so that Ctrl-C shows no traceback while PyTorch is imported.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import dataclasses
import itertools
import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from data import Dataset
from models import NetSpec, Network, forward_flop
from utils.config import build, checks, derived, resolve
from utils.config.flags import as_argv
from utils.config.options import ALL, RESULTS_DIR, TrainOptions
from utils.config.presets import REAL_EPOCHS
from utils.files import atomic, hub
from utils.files.imagefiles import GRID_COLUMNS
from utils.files.untrusted import must_fit
from utils.method.evaluation import OnEpoch, Score, evaluate_networks, tested_epochs
from utils.method.images import to_unit
from utils.method.training import Trainer
from utils.numerics.compilation import computing
from utils.runs import confusion, export, formats, results, sets
from utils.runs.board import Board, check_board
from utils.runs.card import CARD, DATA, newest_distilled
from utils.runs.formats import SetFile
from utils.runs.layout import factor_warning
from utils.runs.results import EVALUATIONS, Record
from utils.runs.scores import ALL_REAL, RANDOM, with_scores
from utils.runs.sets import DistilledSet
from utils.runs.teacher import Teacher
from utils.runs.training_data import TrainingData, TrainingDataOf
from utils.system import process
from utils.system.device import backends, device_name, peak_in_words, peak_memory
from utils.system.distributed import Group, is_first, process_group, rank_zero_only
from utils.system.errors import UsageError, UserError, printable
from utils.system.report import messages, span

log = logging.getLogger("dream")

LOSSES = 50  # points of a training's loss curve, about
TEACHER = -1  # number of a teacher's training, which no network that is evaluated has

Row = tuple[NetSpec, TrainingData]


class Evaluation:
    """Evaluation by one command: what all its rows share, and the results so far."""

    def __init__(
        self, o: TrainOptions, data: Dataset, specs: list[NetSpec], session: dict[str, Any], group: Group
    ) -> None:
        self.o, self.data, self.specs, self.session, self.group = o, data, specs, session, group
        self.device = data.device
        self.records: list[Record] = []
        self.confusions: dict[tuple[str, str], torch.Tensor] = {}  # by network and training data
        self.board = Board(None)

    def check(self, training_data: Sequence[TrainingData]) -> None:
        """Check all rows before the first training, which may take hours. Raises UsageError."""
        for spec, data in itertools.product(self.specs, training_data):
            checks.check_batches(spec, self.o.batch_size, data.count)

    # --- Training and testing -----------------------------------------------------------------------------------------

    def run(self, training_data: Sequence[TrainingData]) -> None:
        """Train every network on all training data; each row is recorded as soon as it is done."""
        rows = list(itertools.product(self.specs, training_data))
        work = [self._flop(*row) for row in rows]
        for data in training_data:
            self._show_images(data)
        began, trained = time.monotonic(), 0.0
        # One row at a time; with several ranks as many as give each two trainings, so that none waits.
        at_once = 1 if self.group.alone else -(-2 * self.group.count // self.o.repeat)
        for first in range(0, len(rows), at_once):
            numbers = range(first, min(first + at_once, len(rows)))
            known = {i: self.group.broadcast(partial(self._known, *rows[i])) for i in numbers}
            new = {i: work[i] for i in numbers if known[i] is None}
            records = {i: record for i, record in known.items() if record is not None} | self._train(rows, new)
            trained += sum(new.values())
            left = (time.monotonic() - began) / trained * sum(work[first + at_once :]) if trained else 0
            for i in numbers:
                self.records.append(record := records[i])
                more = f"; about {span(left)} for the other rows" if left > 60 and i == numbers[-1] else ""
                score, (spec, data) = Score.from_dict(record), rows[i]
                log.info("%s on %s: %s%s", spec.name, data.title, score, more)

    def _flop(self, spec: NetSpec, data: TrainingData) -> float:
        """Floating-point operations of a row; a backward pass costs two forward passes."""
        trained = 3 * data.epochs * data.count
        tested = len(tested_epochs(data.epochs)) * len(self.data.test)
        return self.o.repeat * (trained + tested) * forward_flop(spec)

    def _options(self, data: TrainingData) -> TrainOptions:
        """Options of the trainings on these images."""
        return self.o if data.augmented else dataclasses.replace(self.o, eval_aug_type="none", mixup="vanilla")

    def protocol(self, data: TrainingData) -> Record:
        """How networks are trained on these images, as eval.json says it."""
        o = self._options(data)
        return {
            "epochs": data.epochs,
            "batch_size": o.batch_size,
            "lr": o.lr,
            "momentum": o.momentum,
            "weight_decay": o.weight_decay,
            "mixup": o.mixup,
            "eval_aug_type": derived.evaluation_augmentation(o, flip=self.data.flip),
            "precision": o.precision,
            "seed": o.seed,
        }

    def _description(self, spec: NetSpec, data: TrainingData) -> Record:
        """Record of a row without its result."""
        return {
            "net": spec.name,
            "trained_on": data.name,
            "images_per_class": data.images_per_class,
            "decoded_per_class": data.decoded_per_class,
            "stored_bytes": data.stored_bytes,
            "network": dataclasses.asdict(spec),
            "protocol": self.protocol(data),
            "set": data.identity,
            **data.about(spec),
            **self.session,
        }

    def _known(self, spec: NetSpec, data: TrainingData) -> Record | None:
        """Result of an earlier command on all real images, which would take long to compute again; None for others."""
        if self.o.retrain or data.name != ALL_REAL:
            return None
        shown = {"confusion matrix": self.o.confusion, "best of four tests": self.o.show_best}
        return results.known(
            data.folder / EVALUATIONS,
            self._description(spec, data),
            repeat=self.o.repeat,
            title=f"{spec.name} on {data.title}",
            shown=[what for what, wanted in shown.items() if wanted],
        )

    def _train(self, rows: Sequence[Row], work: Mapping[int, float]) -> dict[int, Record]:
        """Train some rows, shared by the ranks, and return their records; work: operations, by number of the row."""
        trainings = [(i, r) for i in work for r in range(self.o.repeat)]
        assigned = [trainings[number] for number in self.group.assigned([work[i] for i, _ in trainings])]
        numbers = {i: [r for j, r in assigned if j == i] for i in work}
        scores = {i: self._score(rows[i], numbers[i], work[i]) for i in work}
        records = {}
        for i, (own, own_seconds) in scores.items():
            (spec, data), score = rows[i], own.all_reduce(numbers[i], self.group, repeat=self.o.repeat)
            for r, accuracy in enumerate(score.accuracies):
                self.board.scalar(f"test accuracy %/{spec.name}, {data.title}", accuracy, r)
            (seconds,) = self.group.all_reduce_max(own_seconds)
            matrix = score.confusion.tolist() if self.o.confusion and score.confusion is not None else None
            if score.confusion is not None:
                self.confusions[spec.name, data.name] = score.confusion
            result = {**score.as_dict(), "seconds": round(seconds, 1), "confusion": matrix}
            records[i] = {**self._description(spec, data), **result}
            rank_zero_only(results.keep)(data.folder / EVALUATIONS, records[i])
        return records

    def _score(
        self, row: Row, trainings: Sequence[int], flop: float, on_epoch: OnEpoch | None = None
    ) -> tuple[Score, float]:
        """Score of some trainings of a row, and the seconds that they took."""
        (spec, data), started = row, time.monotonic()
        o, title = self._options(data), f"{spec.name}, {data.title}"
        score = evaluate_networks(
            spec,
            partial(data.training_set, spec),
            self.data.test,
            derived.evaluation_recipe(o, flip=self.data.flip, epochs=data.epochs),
            trainings=trainings,
            seed=o.seed,
            compute=computing(self.device, o.compile, o.precision, flop),
            title=title,
            on_epoch=on_epoch or (partial(self._show_losses, title) if self.board.on else None),
        )
        return score, time.monotonic() - started

    def teach(self, teacher: Teacher) -> None:
        """Have a teacher of every network, trained like one that is evaluated, but not like any of those that are."""

        def train(spec: NetSpec) -> tuple[Network, float]:
            nets: list[Network] = []

            def keep(trainings: Sequence[int], epoch: int, trainer: Trainer) -> None:
                nets[:] = trainer.nets

            row = spec, teacher.trained_on
            score, _ = self._score(row, [TEACHER], self._flop(*row) / self.o.repeat, keep)
            return nets[0], score.mean

        for spec in self.specs:
            teacher.learn(spec, partial(train, spec), self.group, retrain=self.o.retrain)

    # --- Looking at it ------------------------------------------------------------------------------------------------

    def _show_images(self, data: TrainingData) -> None:
        """Write the first training's first images of every class to the TensorBoard log."""
        if self.board.on:
            train = data.training_set(self.specs[0], 0)
            if count := min(GRID_COLUMNS, *train.counts):
                shown = torch.stack([to_unit(train.of_class(c)[:count]) for c in range(train.classes)])
                self.board.images(0, **{f"training images/{data.title}": shown})

    def _show_losses(self, title: str, trainings: Sequence[int], epoch: int, trainer: Trainer) -> None:
        """Write networks' mean losses on their own images to the TensorBoard log, about LOSSES times in a training."""
        if epoch % math.ceil(trainer.recipe.epochs / LOSSES) == 0:
            for r, loss in zip(trainings, trainer.losses().tolist(), strict=True):
                self.board.scalar(f"training loss/{title}, training {r}", loss, epoch)

    @rank_zero_only
    def show_confusion(self, training_data: Sequence[TrainingData]) -> None:
        """Write per-class accuracy and confusion matrix of every row as CSV and picture, and print the first ones."""
        names, folder = self.data.class_names, training_data[0].folder / "confusion"
        atomic.make_folder(folder)
        for record, (spec, data) in zip(self.records, itertools.product(self.specs, training_data), strict=True):
            if record.get("confusion"):
                matrix, title = torch.tensor(record["confusion"]), f"{spec.name}, {data.title}"
                file = folder / (title.replace(",", "").replace(" ", "_") + ".csv")
                atomic.write_atomically(file, confusion.as_csv(matrix, names).encode())
                atomic.write_atomically(file.with_suffix(".png"), confusion.as_png(matrix, names, title))
                if data is training_data[0]:
                    log.info("\n%s\n%s", title, confusion.as_text(matrix, names))
        log.info("\nconfusion matrices of all rows: %s/*.csv and *.png", folder)


# --- Reading the set --------------------------------------------------------------------------------------------------


def read_set(given: Mapping[str, Any]) -> SetFile | None:
    """File of the distilled set that the flags name; None for real images alone. Raises UserError."""
    if given.get("coreset") or (given.get("real") and "run" not in given):
        checks.check_alone(given)
        return None
    if "run" in given:
        return read_named(given["run"], given.get("data_dir", TrainOptions.data_dir), given.get("experiment"))
    narrowed = {name: given.get(name) for name in ("dataset", "factor", "ipc")}
    return formats.read(newest_distilled(Path(given.get("results_dir", RESULTS_DIR)), **narrowed))


def read_named(names: Sequence[str], data_dir: str, experiment: int | None = None) -> SetFile:
    """Set in files at paths or on the Hugging Face Hub; those are downloaded to data_dir. Raises UserError."""
    root = Path(data_dir).expanduser()
    files = [hub.local_copy(name, root, main=DATA, beside=(CARD,)) for name in names]
    return formats.read(files, experiment=experiment)


def options(given: dict[str, Any], source: SetFile | None) -> TrainOptions:
    """Complete options for a set. Raises UsageError where neither flags nor a card say what the set is."""
    if source is None:
        return resolve.train_options(given, None, Path())
    card = source.card
    if card is None and not ("factor" in given and ("dataset" in given or "image_folder" in given or "npz" in given)):
        raise UsageError(
            f"{source.file}: has no {CARD} beside it; say what it is with -d DATASET and -f FACTOR (1 for plain images)"
        )
    if card is not None and not card.get("finished", True):
        log.warning("%s is unfinished, after %s outer iterations", source.file, card.get("outer_iterations"))
    per_class = len(source.images) // len(source.labels.unique())
    return resolve.train_options(given, card, source.card_file, ipc=per_class)


def interpret(o: TrainOptions, source: SetFile, data: Dataset) -> DistilledSet:
    """Content of a set's file. Raises UserError when it does not fit the data set.

    A factor that comes from a flag is compared with what the pixels look like, and a warning says so if it seems wrong.
    """
    content = sets.interpret(source, data, normalized=o.normalized, whitened=o.whitened, classes=o.classes)
    formation = derived.formation(o)
    checks.check_factor(formation.factor, data.side)
    numbers = formation.decoded_count(len(content.images)) * content.images[0].numel()
    must_fit(source.file, 4 * numbers, f" (decoded with -f {formation.factor})")
    if source.card is None:
        warning = factor_warning(source.file, content.images, data.train.images.cpu(), factor=formation.factor)
        if warning is not None:
            log.warning("%s", warning)
    return content


def teaching_set(o: TrainOptions, rows: TrainingDataOf) -> TrainingData:
    """Training data of a teacher: a set like the one that it labels, or by its own card. Raises UserError."""
    source = read_named([o.teacher or ""], o.data_dir)
    if (card := source.card) is not None:
        if card["dataset"] != o.dataset:
            raise UserError(f"--teacher {o.teacher}: is a set of {card['dataset']}; name one of {o.dataset}, or {ALL}")
        layout = {"factor": card["factor"], "decode_type": card["decode_type"]}
        o = dataclasses.replace(o, **layout, normalized=None, whitened=None, classes=None)
    content = interpret(o, source, rows.data)
    data = rows.distilled(source, content, derived.formation(o))
    return dataclasses.replace(data, name=printable(str(source.file)))


# --- The program ------------------------------------------------------------------------------------------------------


def records_of(argv: Sequence[str]) -> list[Record]:
    """Run a command line of train.py, and return the rows of its table, none after --export. Raises UserError."""
    given = resolve.train_flags(argv, __doc__ or "")
    minutes = given.get("wait_minutes", TrainOptions.wait_minutes)
    with messages(), process_group(backends(), minutes=minutes) as group:
        # --- What is asked for ---
        source = read_set(given)
        o = options(given, source)
        card = None if source is None else source.card
        data = build.dataset(o, card=card, precision=o.precision)
        if card is not None and card.get("skipped_files") != data.skipped:
            log.warning("--skip_broken: other files of %s are left out than when the set was made", o.image_folder)
        if o.tensorboard:
            check_board()
        specs = resolve.networks(o, given, card, data)
        conditions = {"precision": o.precision, "deterministic": o.deterministic}
        session = {"dataset": o.dataset, **process.session("train.py", argv, data.device, **conditions)}
        evaluation = Evaluation(o, data, specs, session, group)
        rows = TrainingDataOf(data, results_dir=o.results_dir, seed=o.seed, epochs=o.epochs)

        # --- What networks are trained on ---
        teacher = None
        if source is not None:
            content = interpret(o, source, data)
            formation, real = derived.formation(o), partial(rows.real, given.get("epochs", REAL_EPOCHS))
            if o.teacher:
                learned = real() if o.teacher == ALL else teaching_set(o, rows)
                teacher = Teacher(learned, evaluation.protocol(learned), rows.made("teachers"), data)
            distilled = rows.distilled(source, content, formation, store=o.store)
            if o.export is not None:
                settings = {} if o.whiten == "none" else {"whiten": o.whiten}
                card = card or derived.set_card(o, data, ipc=round(distilled.images_per_class), settings=settings)
                decoded, write = distilled.training_set(specs[0], 0), rank_zero_only(export.export_set)
                names, store = data.class_names, o.store or source.store
                write(o.export, stored=content, decoded=decoded, class_names=names, card=card, store=store)
                return []
            own_sets = [distilled]
            if content.soft is not None and (o.scores or o.teacher):
                log.info("%s: scored by its hard labels, not by its soft ones", source.file)
                own_sets.append(rows.distilled(source, content, formation, store=o.store, hard=True))
            training_data = rows.compared(
                own_sets,
                derived.baselines(o),
                labelled=None if teacher is None else teacher.labelled,
                real=real() if o.real or o.scores else None,
                plain=o.scores,
            )
        elif o.coreset:
            rows.warn_of_repeats(o.ipc or 1)
            training_data = [rows.coreset(o.coreset, o.ipc or 1)]
        else:
            training_data = [rows.real(o.epochs)]

        # --- Train and test ---
        name = training_data[0].name if source is None else f"{source.file}, factor {o.factor or 1}"
        log.info("%s: training on %s, on %s", o.dataset, name, device_name(data.device))
        if o.tensorboard and is_first():
            evaluation.board = Board(training_data[0].folder)
        evaluation.check([*training_data, *([] if teacher is None else [teacher.trained_on])])
        if teacher is not None:
            evaluation.teach(teacher)
        evaluation.run(training_data)
        evaluation.board.close()

        # --- Report ---
        records = evaluation.records
        if source is not None:
            if o.scores or o.teacher:
                records = with_scores(records, distilled.name)
            for text in results.low_accuracies(records, distilled.name, RANDOM, chance=100 / data.classes):
                log.warning("%s", text)
            if source.card is None and source.names is None:
                least = {r["net"]: r["accuracy_mean"] for r in reversed(records) if r["trained_on"] == RANDOM}
                matrices = {net: x for (net, name), x in evaluation.confusions.items() if name == distilled.name}
                for text in sets.order_warnings(matrices, least, data, o.classes):
                    log.warning("%s", text)
        if o.confusion:
            evaluation.show_confusion(training_data)
        table = results.as_text(records, best=o.show_best)
        log.info("\n%s\n%s", table, peak_in_words(peak_memory(data.device)))
        for file in map(Path, o.table or []):
            table = results.TABLES[file.suffix](records, session, best=o.show_best)
            rank_zero_only(atomic.write_atomically)(file, table.encode())
            log.info("wrote %s", file)
        if o.json:
            print(json.dumps({**records[0], "results": records}))
        return records


def main(argv: Sequence[str]) -> int:
    """Run a command line of train.py. Returns the exit status; raises UserError for what the user can mend."""
    records_of(argv)
    return 0


def evaluate(run: str | Path | Sequence[str | Path] | None = None, **flags: Any) -> list[Record]:
    """Evaluate from Python, with the flags of train.py as keywords: evaluate("results/digits/...", repeat=3).

    run: a run folder or anybody's set, or its files in order; the newest run by default. Returns the rows of the table,
    as --json does under `results`: net, trained_on, accuracy_mean, accuracy_std, n, accuracies, ..., and `scores` in
    the set's row with scores=True. Raises UserError with a message for the user.
    """
    files = [run] if isinstance(run, (str, Path)) else run or []
    return records_of([*map(str, files), *as_argv(flags)])


if __name__ == "__main__":
    process.run_main(main)
