"""Subject of figs.gradient_norms and figs.selection, one class of a data set under one network, and its flags."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from figs.common import class_number
from models import Network, forward_flop
from utils.config import build, checks, derived, flags, resolve
from utils.config.options import CondenseOptions
from utils.method.images import ImageSet
from utils.method.selection import Context
from utils.method.training import Trainer, fresh_network, update_network
from utils.numerics.compilation import computing
from utils.system.draws import Draws
from utils.system.errors import UsageError, printable
from utils.system.report import Progress

# Flags of condense.py, with the same defaults and data sets' settings.
BORROWED = (
    "dataset", "image_folder", "npz", "split", "size", "skip_broken", "whiten", "data_dir", "net_type", "depth",
    "width", "norm_type",
    "aug_type", "mixup_net", "seed", "device", "compile",
)  # fmt: skip
UPDATES = 50  # by default: halfway through an outer iteration of the published run


@dataclass
class Subject:
    """Images of one class, and a network that `train` trains on all classes, in evaluation mode."""

    dataset: str
    class_name: str
    label: int
    images: ImageSet  # of this class alone, as its class 0
    test: ImageSet  # of all classes
    network: str
    trainer: Trainer
    n_data: int
    seed: int
    updates: int = 0  # that the network has been trained for

    @property
    def net(self) -> Network:
        """The network as it is now."""
        return self.trainer.nets[0]

    @property
    def about(self) -> str:
        """Description of the network as it is now."""
        return f"{self.network} after {self.updates} updates" if self.updates else f"{self.network} as initialised"

    def train(self, updates: int) -> None:
        """Go on training until the network has had so many updates: those of condense.py's first outer iteration."""
        with Progress(updates, "training the network", "update", done=self.updates) as progress:
            for step in range(self.updates, updates):
                update_network(self.trainer, n_data=self.n_data, draws=self.draws("update", 0, step))
                progress.advance()
        self.updates = updates
        self.net.eval()

    def draws(self, purpose: str, *position: int) -> Draws:
        """Random numbers for one purpose at one position."""
        return Draws(self.images.device, self.seed, purpose, *position)

    def context(self, draws: Draws) -> Context:
        """Context of a selection among these images, as condense.py makes it."""
        return Context(self.net, self.images, draws, self.trainer.compute.cheapest())

    def embedding(self) -> Tensor:
        """Embeddings of all images of the class, (N, D), as they are clustered."""
        return self.context(self.draws("embedding")).embedded(0)  # nothing is drawn


def add_flags(parser: flags.Parser, *, count: int, several: bool = False) -> None:
    """Add the flags of a subject to a parser. count: the default of --count.

    several: --updates and --count take lists, and a RECORD may stand in place of measuring. --updates is for the
    script, which calls `Subject.train`.
    """
    if several:
        parser.add_argument(
            "record", type=Path, nargs="?", metavar="RECORD", help="a file of --save: draw it, and measure nothing"
        )
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
        "--updates", type=flags.integer(0), default=[UPDATES] if several else UPDATES, metavar="N",
        nargs="+" if several else None,
        help="train the network on real data first, by this many of the updates that condense.py makes after every "
             f"inner step; 0: as initialised (default: {UPDATES}, halfway through a published outer iteration)",
    )  # fmt: skip
    parser.add_argument(
        "--count", type=flags.integer(2), default=[count] if several else count, metavar="IMAGES",
        nargs="+" if several else None, help=f"random images, and representatives (default: {count})",
    )  # fmt: skip


def prepare(given: argparse.Namespace, *, count: int, updates: int) -> Subject:
    """Read the data, and make the network of condense.py's first outer iteration, as initialised.

    count: the largest of --count. updates: that the network will be trained for, by which --compile decides.
    Raises UsageError or UserError for flags and data that do not fit.
    """
    o = resolve.condense_options({name: value for name, value in vars(given).items() if name in BORROWED}).options
    data = build.dataset(o)
    spec, device, real = resolve.network(o, o.net_type, data), data.device, data.train
    c = 0 if given.class_name is None else class_number(given.class_name, data.class_names, "--class")
    name = data.class_names[c]
    if count >= real.counts[c]:
        raise UsageError(
            f"--count {count}: class {name} has {real.counts[c]} training images, so that nothing would be "
            "selected; give a smaller number"
        )
    checks.check_batches(spec, o.batch_real, o.n_data or 2)
    net = fresh_network(spec, Draws(device, o.seed, "network", 0)).eval()
    compute = computing(device, o.compile, "fp32", 3 * updates * o.n_data * forward_flop(spec))
    one = ImageSet(
        real.of_class(c),
        torch.zeros(real.counts[c], dtype=torch.int64, device=device),
        classes=1,
        normalize=real.normalize,
    )
    return Subject(
        dataset=o.dataset,
        class_name=printable(name),
        label=c,
        images=one,
        test=data.test,
        network=spec.name,
        trainer=Trainer([net], [real], derived.update_recipe(o), compute),
        n_data=o.n_data,
        seed=o.seed,
    )
