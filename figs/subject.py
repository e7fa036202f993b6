"""Subject of figs.gradient_norms and figs.selection, one class of a data set under one network, and its flags."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from figs.common import class_number
from models import Network
from utils.config import build, checks, derived, flags, resolve
from utils.config.options import CondenseOptions
from utils.method.images import ImageSet
from utils.method.selection import Context
from utils.method.training import Trainer, fresh_network, update_network
from utils.numerics.compute import Compute
from utils.system.draws import Draws
from utils.system.errors import UsageError
from utils.system.report import Progress

# Flags of condense.py, with the same defaults and data sets' settings.
BORROWED = (
    "dataset", "image_folder", "size", "whiten", "data_dir", "net_type", "depth", "width", "norm_type", "seed",
    "device",
)  # fmt: skip
UPDATES = 50  # by default: halfway through an outer iteration of the published run


@dataclass(frozen=True)
class Subject:
    """Images of one class, and a network in evaluation mode that has been trained on all classes for a while."""

    dataset: str
    class_name: str
    label: int
    images: ImageSet  # of this class alone, as its class 0
    net: Network
    about: str  # description of the network
    seed: int
    compute: Compute

    def draws(self, purpose: str, *position: int) -> Draws:
        """Random numbers for one purpose at one position."""
        return Draws(self.images.device, self.seed, purpose, *position)

    def context(self, draws: Draws) -> Context:
        """Context of a selection among these images, as condense.py makes it."""
        return Context(self.net, self.images, draws, self.compute.cheapest())


def add_flags(parser: flags.Parser, *, count: int) -> None:
    """Add the flags that `prepare` reads to a parser; count: the default of --count."""
    fields = {field.name: field for field in dataclasses.fields(CondenseOptions)}
    for name in BORROWED:
        flags.add_flag(parser, fields[name], default=argparse.SUPPRESS)
    parser.add_argument(
        "--class",
        dest="class_name",
        metavar="CLASS",
        help="name or number of the class to look at (default: the first)",
    )
    parser.add_argument(
        "--updates", type=flags.integer(0), default=UPDATES, metavar="N",
        help="train the network on real data first, by this many of the updates that condense.py makes after every "
             f"inner step; 0: as initialised (default: {UPDATES}, halfway through a published outer iteration)",
    )  # fmt: skip
    parser.add_argument(
        "--count", type=flags.integer(2), default=count, metavar="IMAGES",
        help=f"random images, and representatives (default: {count})",
    )  # fmt: skip


def prepare(given: argparse.Namespace) -> Subject:
    """Read the data, and train the network of condense.py's first outer iteration for --updates updates.

    Raises UsageError or UserError for flags and data that do not fit.
    """
    o = resolve.condense_options({name: value for name, value in vars(given).items() if name in BORROWED}).options
    dataset = build.dataset(o)
    spec, device = resolve.network(o, o.net_type, dataset), dataset.device
    c = 0 if given.class_name is None else class_number(given.class_name, dataset.class_names, "--class")
    name, real = dataset.class_names[c], dataset.train
    if given.count >= real.counts[c]:
        raise UsageError(
            f"--count {given.count}: class {name} has {real.counts[c]} training images, so that nothing would be "
            "selected; give a smaller number"
        )
    checks.check_batches(spec, o.batch_real, o.n_data or 2)
    net, compute = fresh_network(spec, Draws(device, o.seed, "network", 0)), Compute(device)
    train(net, real, o, given.updates, compute)
    one = ImageSet(
        real.of_class(c),
        torch.zeros(real.counts[c], dtype=torch.int64, device=device),
        classes=1,
        normalize=real.normalize,
    )
    about = f"{spec.name} after {given.updates} updates" if given.updates else f"{spec.name} as initialised"
    return Subject(o.dataset, name, c, one, net.eval(), about, o.seed, compute)


def train(net: Network, real: ImageSet, o: CondenseOptions, updates: int, compute: Compute) -> None:
    """Train a network for so many updates, with the random numbers of condense.py's first outer iteration."""
    trainer = Trainer([net], [real], derived.update_recipe(o), compute)
    with Progress(updates, "training the network", "update") as progress:
        for step in range(updates):
            update_network(trainer, n_data=o.n_data, draws=Draws(real.device, o.seed, "update", 0, step))
            progress.advance()


def embedding(subject: Subject, draws: Draws) -> Tensor:
    """Embeddings of all images of the class, (N, D), as they are clustered."""
    return subject.context(draws).embedded(0)
