"""Training data of train.py's networks: a distilled set, coresets for comparison, or all real images."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from data import Dataset
from models import NetSpec
from utils.files.atomic import make_folder
from utils.method.formation import Formation, training_images
from utils.method.images import BITS, FLOAT32, ImageSet, quantise, stored_bytes, to_unit
from utils.method.selection import BASELINE, Context, coreset, repeats
from utils.method.training import fresh_network
from utils.numerics.compute import Compute
from utils.runs.formats import SetFile
from utils.runs.scores import ALL_REAL, DISTILLED, HARD, PLAIN, RANDOM
from utils.runs.sets import DistilledSet
from utils.system.draws import Draws

log = logging.getLogger("dream")

NAMES = {"kmeans": "k-means representatives", "herding": "herded real images"}  # other strategies go by their own name


@dataclass(frozen=True)
class TrainingData:
    """Images that networks are trained on: one row of the table for every network."""

    name: str
    images_per_class: float
    decoded_per_class: float
    stored_bytes: int  # size of the pixels as the set holds them, and of its soft labels
    count: int  # images that a network trains on, all classes together
    epochs: int
    training_set: Callable[[NetSpec, int], ImageSet]  # the images of a network's r-th training
    folder: Path  # where eval.json lies
    identity: dict[str, Any]  # tells the results of these images in eval.json from those of others
    augmented: bool = True  # whether trainings use the evaluation's augmentation and CutMix
    about: Callable[[NetSpec], dict[str, Any]] = lambda spec: {}  # more of the images, for the record of a network

    @property
    def title(self) -> str:
        """Name and size, for people."""
        return f"{self.name}, {self.images_per_class:.4g} per class"

    def plain(self) -> TrainingData:
        """Training data of the same images for trainings without augmentation and CutMix."""
        return dataclasses.replace(self, name=self.name + PLAIN, augmented=False)


class TrainingDataOf:
    """Maker of all TrainingData of a data set: distilled sets, coresets, all real images."""

    def __init__(self, data: Dataset, *, results_dir: str, seed: int, epochs: int) -> None:
        """results_dir: for results that belong to no run folder. epochs: of a training on a small set."""
        self.data, self.device = data, data.device
        self.results_dir, self.seed, self.epochs = results_dir, seed, epochs

    def distilled(
        self,
        source: SetFile,
        content: DistilledSet,
        formation: Formation,
        *,
        store: str | None = None,
        hard: bool = False,
    ) -> TrainingData:
        """Training data of a distilled set, by condense.py or somebody else.

        store: one of STORES, to which pixels are rounded; None: as the file holds them. hard: without its soft labels.
        """
        store = store or source.store
        content = content._replace(images=to_unit(quantise(content.images, store)))
        if hard:
            source, content = dataclasses.replace(source, soft=None), content._replace(soft=None)
        device, classes = self.device, len(content.labels.unique())
        images, labels, soft = content.images.to(device), content.labels.to(device), content.soft
        soft = None if soft is None else soft.to(device)
        decoded = training_images(
            images, labels, formation, soft=soft, classes=self.data.classes, normalize=self.data.normalize
        )
        sha256 = hashlib.sha256(b"".join(x.contiguous().numpy().tobytes() for x in content if x is not None))
        return TrainingData(
            name=DISTILLED + ("" if store == FLOAT32 else f", {BITS[store]} bits") + (HARD if hard else ""),
            images_per_class=len(images) / classes,
            decoded_per_class=len(decoded) / classes,
            stored_bytes=stored_bytes(source.images, store) + (0 if source.soft is None else source.soft.nbytes),
            count=len(decoded),
            epochs=self.epochs,
            training_set=lambda spec, r: decoded,
            folder=source.file.parent if source.in_run_folder else self.made(f"evaluated_{source.file.stem}"),
            identity={
                **self.data_identity,
                **dataclasses.asdict(formation),
                "sha256": sha256.hexdigest(),
                "store": store,
            },
        )

    def made(self, name: str) -> Path:
        """Create a folder for results under results_dir, and return it."""
        return make_folder(Path(self.results_dir) / self.data.name / name)

    def compared(
        self,
        sets: Sequence[TrainingData],
        strategies: Sequence[str],
        *,
        labelled: Callable[[TrainingData], TrainingData] | None = None,
        real: TrainingData | None = None,
        plain: bool = False,
    ) -> list[TrainingData]:
        """All that networks are trained on for one table, in its order.

        sets: the distilled set; if it has soft labels and a teacher or plain rows are asked for, also by its hard ones.
        strategies: of the baselines. labelled: gives the labels of a teacher. real: all real images.
        plain: adds the set and random real images without augmentation.
        """
        baselines = self.baselines(sets[0], strategies) if strategies else []
        hard = [sets[-1], *(data for data in baselines if data.name == RANDOM)]
        return [
            *sets,
            *baselines,
            *(map(labelled, hard) if labelled is not None else []),
            *([real] if real is not None else []),
            *([data.plain() for data in hard] if plain else []),
        ]

    def baselines(self, distilled: TrainingData, strategies: Sequence[str]) -> list[TrainingData]:
        """Coresets for comparison with a distilled set: of its stored size by every strategy.

        The second is random, of the decoded size, where that is larger.
        """
        stored, decoded = round(distilled.images_per_class), round(distilled.decoded_per_class)
        rows = [self.coreset(name, stored, distilled.folder) for name in strategies]
        if stored < decoded:
            rows.insert(1, self.coreset("random", decoded, distilled.folder))
        self.warn_of_repeats(max(stored, decoded))
        return rows

    def warn_of_repeats(self, ipc: int) -> None:
        """Say it if a class has fewer than `ipc` real images, which a coreset then repeats."""
        what = "rows of real images repeat them, and count each once"
        counts, names = self.data.train.counts, self.data.class_names
        for text in repeats("the number of images per class", ipc, counts, names, what):
            log.warning("%s", text)

    def coreset(self, strategy: str, ipc: int, folder: Path | None = None) -> TrainingData:
        """Training data of `ipc` real images per class, selected anew for every training under a fresh network.

        A class with fewer gives each of its images several times, so that all classes weigh the same; the row's
        images_per_class counts each image once.
        """
        real = self.data.train
        different = sum(min(ipc, count) for count in real.counts)

        def draw(spec: NetSpec, r: int) -> ImageSet:
            draws = Draws(self.device, self.seed, BASELINE, r)
            net = fresh_network(spec, draws)
            return coreset(Context(net, real, draws, Compute(self.device).cheapest()), strategy, ipc=ipc)

        return TrainingData(
            name=NAMES.get(strategy, f"{strategy} real images"),
            images_per_class=different / self.data.classes,
            decoded_per_class=ipc,
            stored_bytes=different * real.images[0].nbytes,
            count=ipc * self.data.classes,
            epochs=self.epochs,
            training_set=draw,
            folder=folder or self.made(f"coreset_{strategy}_ipc{ipc}"),
            identity={**self.data_identity, "strategy": strategy, "ipc": ipc},
        )

    def real(self, epochs: int) -> TrainingData:
        """Training data of all real images, whose results lie in a folder that every later command looks into."""
        real = self.data.train
        count = len(real) / self.data.classes
        return TrainingData(
            name=ALL_REAL,
            images_per_class=count,
            decoded_per_class=count,
            stored_bytes=real.images.nbytes,
            count=len(real),
            epochs=epochs,
            training_set=lambda spec, r: real,
            folder=self.made("real"),
            identity=self.data_identity,
        )

    @cached_property
    def data_identity(self) -> dict[str, Any]:
        """Identity of the training and test images: all that results depend on."""
        return {
            "dataset": self.data.name,
            "side": self.data.side,
            "training_images": self.data.digests["training"],
            "test_images": self.data.digests["test"],
            "normalization": [[round(value, 4) for value in values] for values in self.data.statistics],
            **({} if self.data.whiten == "none" else {"whiten": self.data.whiten}),
        }
