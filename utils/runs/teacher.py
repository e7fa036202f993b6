"""Teachers: networks trained on real images, or on a set, whose predictions are the soft labels of other images.

Every network that is evaluated has a teacher of its own kind. Its weights are kept in a file, and used again for the
same training images, network and protocol.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from data import Dataset
from models import NetSpec, Network
from utils.files import tensors
from utils.files.atomic import checksum
from utils.files.tensors import is_plain
from utils.method.images import ImageSet
from utils.method.training import fresh_network, predict
from utils.numerics.compute import Compute
from utils.runs.scores import HARD, TAUGHT
from utils.runs.training_data import TrainingData
from utils.system.distributed import Group, rank_zero_only
from utils.system.draws import Draws
from utils.system.errors import UserError

log = logging.getLogger("dream")

AGAIN = "it is trained again"


class Teacher:
    """Trained networks, one of each kind, that label images by their predictions."""

    def __init__(self, trained_on: TrainingData, protocol: dict[str, Any], folder: Path, data: Dataset) -> None:
        """protocol: of their training. folder: where their files lie. data: the data set."""
        self.trained_on, self.folder, self.device, self.classes = trained_on, folder, data.device, data.classes
        self.identity = {"set": trained_on.identity, "protocol": protocol}
        self._networks: dict[NetSpec, Network] = {}
        self._accuracies: dict[NetSpec, float] = {}

    def learn(
        self, spec: NetSpec, train: Callable[[], tuple[Network, float]], group: Group, *, retrain: bool = False
    ) -> None:
        """Take a network from its file, or else train it; all ranks call this together.

        train: returns the network and its accuracy on the test images, in per cent.
        """
        file = self._file(spec)
        content = None if retrain else group.broadcast(partial(self._read, spec))
        known = content is not None
        if content is None:
            # By every rank, since the others may not wait for the first one for hours; then its network counts.
            net, accuracy = train()
            weights = {name: x.cpu().contiguous() for name, x in net.state_dict().items()}
            own: dict[str, Any] = {"of": self._owner(spec), "accuracy": accuracy, "weights": weights}
            content = group.broadcast(lambda: own)
            rank_zero_only(self._write)(file, content)
        net = self._fresh(spec)
        net.load_state_dict(content["weights"])
        self._networks[spec], self._accuracies[spec] = net, content["accuracy"]
        origin = f", known from {file}; --retrain trains again" if known else ""
        title, accuracy = self.trained_on.title, content["accuracy"]
        log.info("teacher %s, trained on %s: %.1f %% of the test images%s", spec.name, title, accuracy, origin)

    def labelled(self, images: TrainingData) -> TrainingData:
        """Training data of the same images with soft labels, float32 numbers that are stored with them."""
        return dataclasses.replace(
            images,
            name=images.name.removesuffix(HARD) + TAUGHT,
            stored_bytes=images.stored_bytes + 4 * images.count * self.classes,
            training_set=lambda spec, r: self.label(spec, images.training_set(spec, r)),
            identity={**images.identity, "teacher": checksum(self.identity)},
            about=self._about,
        )

    def _about(self, spec: NetSpec) -> dict[str, Any]:
        """What a network was trained on, and its accuracy on the test images in per cent, for a record."""
        return {"teacher": {"trained_on": self.trained_on.title, "accuracy": round(self._accuracies[spec], 4)}}

    def label(self, spec: NetSpec, images: ImageSet) -> ImageSet:
        """Images, each with the probabilities that the teacher gives to it as it is, at temperature 1."""
        compute = Compute(self.device)
        with compute.rounding():
            return images.with_soft(predict(self._networks[spec], images, compute).softmax(1))

    def _fresh(self, spec: NetSpec) -> Network:
        return fresh_network(spec, Draws(self.device, "teacher"))

    def _owner(self, spec: NetSpec) -> str:
        """Checksum, in a network's file, of everything that the network depends on."""
        return checksum([self.identity, dataclasses.asdict(spec)])

    def _file(self, spec: NetSpec) -> Path:
        return self.folder / f"{spec.name}_{self._owner(spec)[:8]}.pt"

    def _read(self, spec: NetSpec) -> dict[str, Any] | None:
        """Content of a network's file; None where there is none or, after a warning, where it is damaged."""
        file = self._file(spec)
        if not file.exists():
            return None
        try:
            content = tensors.read_tensors(file, AGAIN)
        except UserError as error:
            log.warning("%s; %s", error.problem, AGAIN)
            return None
        if not self._fits(content, spec):
            log.warning("%s: holds no %s of these images and protocol; %s", file, spec.name, AGAIN)
            return None
        return content

    def _fits(self, content: Any, spec: NetSpec) -> bool:
        """Whether a file's content is this network: names, shapes and types of its weights, which are finite."""
        if not isinstance(content, dict) or content.get("of") != self._owner(spec):
            return False
        weights, expected = content.get("weights"), self._fresh(spec).state_dict()
        if not isinstance(content.get("accuracy"), float) or not isinstance(weights, dict):
            return False
        return weights.keys() == expected.keys() and all(
            is_plain(x) and (x.shape, x.dtype) == (expected[name].shape, expected[name].dtype) and x.isfinite().all()
            for name, x in weights.items()
        )

    def _write(self, file: Path, content: dict[str, Any]) -> None:
        try:
            tensors.write_tensors(file, content)
        except OSError as error:
            log.warning("%s: cannot be written (%s)", file, error.strerror)
