"""How near the gradient of the images that are matched is to that of their whole class.

    $ python3 -m figs.targets --count 8 32
    $ python3 -m figs.targets -d cifar10 --image_folder data/cifar10_jpg --class airplane \\
          --updates 0 10 90 100 --count 16 64 256 --save targets.json
    $ python3 -m figs.targets targets.json

The error of a selection is |g - G| / |G|, with G the mean gradient of all images of the class and g that of the
selected ones, by the weights of the convolutions, in evaluation mode and without augmentation. Random images,
representatives, and random members of clusters that are found once are drawn --draws times; distinct are the different
images among those of all draws. The network is trained on real data and looked at after each number of --updates;
errors are those of images selected then, and of representatives and members selected at the earlier ones.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from figs import common, subject
from figs.gradient_norms import STRATEGIES, picked
from figs.subject import Subject
from utils.config.flags import integer
from utils.files import atomic
from utils.method.objectives import matched_parameters
from utils.method.training import confusion_matrix
from utils.numerics.derivatives import flattened
from utils.system.errors import UserError
from utils.system.process import run_main, session
from utils.system.report import Progress, messages

GROUPS = {**STRATEGIES, "members": "members"}
COLOURS = dict(zip(("representatives", "random", "members"), common.PALETTE, strict=False))
CHUNK = 256  # images of a backward pass


@dataclass(frozen=True)
class Error:
    """Relative errors of a selection's mean gradient, one per draw."""

    updates: int  # that the network has been trained for
    selected: int  # updates after which the images were selected
    accuracy: float  # of the network on the test images, in per cent
    group: str  # a key of GROUPS
    count: int
    errors: list[float]
    distinct: float | None = None  # different images among those of all draws, as a fraction

    @property
    def mean(self) -> float:
        """Mean over the draws."""
        return sum(self.errors) / len(self.errors)


def main(argv: Sequence[str]) -> int:
    """The program. Raises UserError for flags and data that do not fit."""
    parser = common.figure_parser("targets", __doc__)
    subject.add_flags(parser, count=128, several=True)
    parser.add_argument("--draws", type=integer(2), default=5, metavar="N", help="draws of each (default: 5)")
    parser.add_argument("--save", type=common.ending(".json"), metavar="FILE", help="write the errors as JSON")
    given = common.parse(parser, argv)
    with messages(), common.style():
        if given.record is None:
            updates = sorted(set(given.updates))
            observed = subject.prepare(given, count=max(given.count), updates=updates[-1])
            about = f"class {observed.class_name} of {observed.dataset}, {observed.network}"
            found = measured(observed, updates, given.count, given.draws)
            if given.save is not None:
                content = {"about": about, **session("figs.targets", argv, observed.images.device)}
                content["rows"] = [dataclasses.asdict(error) for error in found]
                common.write(given.save, (json.dumps(content, indent=1) + "\n").encode(), flag="--save")
        else:
            about, found = read(given.record)
        print(f"error of the mean gradient, {about}")
        print(table(found))
        common.save(draw(found), given.out, pdf=given.pdf)
    return 0


def read(file: Path) -> tuple[str, list[Error]]:
    """What a file of --save is about, and its errors. Raises UserError when it is none."""
    content = atomic.read_json(file)
    try:
        return str(content["about"]), [Error(**row) for row in content["rows"]]
    except (KeyError, TypeError) as error:
        raise UserError(f"{file}: is no file of --save ({error}); name another") from error


def measured(observed: Subject, updates: Sequence[int], counts: Sequence[int], draws: int) -> list[Error]:
    """Errors of every selection at these ascending numbers of updates, and of earlier ones but random ones."""
    kept: dict[tuple[int, str, int], list[Tensor]] = {}  # positions of selected images, (count,) for every draw
    found = []
    for number in updates:
        observed.train(number)
        confusion = confusion_matrix(observed.net, observed.test, observed.trainer.compute)
        accuracy = 100 * confusion.diagonal().sum().item() / len(observed.test)
        kept = {key: indices for key, indices in kept.items() if key[1] != "random"}
        for count in counts:
            kept |= {
                (number, group, count): indices for group, indices in picked(observed, count, draws, GROUPS).items()
            }
        everything = torch.arange(len(observed.images), device=observed.images.device)
        whole = mean_gradient(observed, everything)
        with Progress(len(kept) * draws, "gradients", "selection") as progress:
            for (selected, group, count), indices in kept.items():
                errors = []
                for index in indices:
                    errors.append(((mean_gradient(observed, index) - whole).norm() / whole.norm()).item())
                    progress.advance()
                distinct = len(torch.cat(indices).unique()) / (draws * count)
                found.append(Error(number, selected, accuracy, group, count, errors, round(distinct, 4)))
    return found


def mean_gradient(observed: Subject, index: Tensor) -> Tensor:
    """Mean gradient of the images at `index` by the weights of the convolutions, as one vector."""
    parameters = list(matched_parameters(observed.net, bias=False, fc=False))
    weights = [p for name, p in observed.net.named_parameters() if name in parameters]
    total = torch.zeros(sum(w.numel() for w in weights), device=index.device)
    for some in index.to(observed.images.device).split(CHUNK):
        x, _ = observed.images.batch(some)
        label = torch.full((len(some),), observed.label, device=x.device)
        loss = F.cross_entropy(observed.net(x), label, reduction="sum")
        total += flattened(torch.autograd.grad(loss, weights))
    return total / len(index)


def table(found: Sequence[Error]) -> str:
    """A line of text for each selection."""
    lines = [
        f"{'updates':>7}{'test acc %':>12}  {'selected at':>11}  {'group':16}{'images':>7}{'error':>8}   std   distinct"
    ]
    for e in found:
        std = torch.tensor(e.errors).std().item()
        lines.append(
            f"{e.updates:>7}{e.accuracy:>12.1f}  {e.selected:>11}  {e.group:16}{e.count:>7}{e.mean:>8.3f}   {std:.3f} "
            f"{'' if e.distinct is None else f'{100 * e.distinct:.0f} %':>6} ({len(e.errors)} draws)"
        )
    return "\n".join(lines)


def draw(found: Sequence[Error]) -> Figure:
    """Errors over the number of images, a panel for every state of the network; dashed: selected earlier."""
    states = sorted({e.updates for e in found})
    figure = Figure(figsize=(common.WIDTH, 3), layout="constrained")
    panels = figure.subplots(1, len(states), sharey=True, squeeze=False)[0]
    for updates, axes in zip(states, panels, strict=True):
        here = [e for e in found if e.updates == updates]
        for group, selected in dict.fromkeys((e.group, e.selected) for e in here):
            line = sorted((e.count, e.mean) for e in here if (e.group, e.selected) == (group, selected))
            label = group if selected == updates else f"{group} of earlier states"
            style = "-" if selected == updates else ":"
            colour = COLOURS[group]
            axes.loglog(*zip(*line, strict=True), color=colour, ls=style, marker="o", ms=3, label=label)
        axes.set_title(f"after {updates} updates", fontsize=10)
        counts = sorted({e.count for e in here})
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.set_yticks([0.1, 0.2, 0.5, 1], ["0.1", "0.2", "0.5", "1"])
        axes.minorticks_off()
        axes.set_xlabel("images")
    panels[0].set_ylabel("error of the mean gradient")
    panels[0].set_ylim(0.8 * min(e.mean for e in found), 1.2 * max(e.mean for e in found))
    handles, labels = panels[-1].get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    figure.legend(once.values(), once.keys(), loc="outside lower center", ncols=3)
    return figure


if __name__ == "__main__":
    run_main(main)
