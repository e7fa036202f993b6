"""How long the gradients of single images are: all of a class, random ones, and representatives.

    $ python3 -m figs.gradient_norms --count 32
    $ python3 -m figs.gradient_norms -d cifar10 --image_folder data/cifar10_jpg --class airplane \\
          --updates 0 50 250 --count 16 1000 --save norms.jsonl
    $ python3 -m figs.gradient_norms norms.jsonl --at 250

The gradient is that of an image's cross-entropy, in evaluation mode and without augmentation; the norm is Euclidean,
over all parameters of the network or over the weights of its convolutions. The network is trained on real data, and
looked at after each number of --updates. Random images and representatives are drawn --draws times, the latter from
other starts of k-means.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor
from torch.func import functional_call, grad, vmap

from figs import common, subject
from figs.subject import Subject
from models import Network
from utils.config.flags import integer
from utils.method.images import ImageSet
from utils.method.selection import Clusters, select
from utils.method.training import confusion_matrix
from utils.system.errors import UsageError, UserError, short
from utils.system.process import run_main, session
from utils.system.report import Progress, drawable, messages

GRADIENT_BYTES = 2**28  # of the gradients that are computed at once
CHUNK_PIXELS = 2**14  # of the images of these gradients, so that their features stay in a cache
BINS = 60

ALL, CONVOLUTIONS = "all parameters", "convolutions"
STRATEGIES = {"random": "random", "representatives": "kmeans"}
# Liu et al. (ICCV 2023): mean and standard deviation. They do not say for how long their network was trained.
PUBLISHED = {("cifar10", "airplane"): {"random": (10.0, 8.8), "representatives": (6.4, 7.1)}}


@dataclass(frozen=True)
class Row:
    """Gradient norms of a group of `n` images, over all `draws` of it."""

    gradient: str  # by which parameters
    group: str
    n: int
    draws: int
    mean: float
    std: float  # sample standard deviation over the images of all draws
    spread: float | None  # sample standard deviation of the draws' means; None for a single draw
    top: float  # largest norm of any image of the class
    histogram: list[float]  # images in BINS equal bins from 0 to `top`, mean over the draws


@dataclass(frozen=True)
class State:
    """What is measured of a network after so many updates. accuracy: on the test images, in per cent."""

    updates: int
    accuracy: float
    rows: list[Row]


def main(argv: Sequence[str]) -> int:
    """The program. Raises UserError for flags and data that do not fit."""
    parser = common.figure_parser("gradient_norms", __doc__)
    subject.add_flags(parser, count=128, several=True)
    parser.add_argument("--draws", type=integer(1), default=10, metavar="N", help="draws of each (default: 10)")
    parser.add_argument(
        "--at", type=integer(0), metavar="N", help="draw the network after so many updates (default: the last)"
    )
    parser.add_argument(
        "--save", type=common.ending(".jsonl"), metavar="FILE", help="write a line per network, as soon as measured"
    )
    given = common.parse(parser, argv)
    if given.record is None and given.at not in (None, *given.updates):
        raise UsageError(f"--at {given.at}: is none of --updates; name one of them")
    with messages(), common.style():
        if given.record is None:
            observed = subject.prepare(given, count=max(given.count), updates=max(given.updates))
            about = {"dataset": observed.dataset, "class": observed.class_name, "network": observed.network}
            about |= session("figs.gradient_norms", argv, observed.images.device)
            states = []
            for state in measured(observed, sorted(set(given.updates)), given.count, given.draws):
                states.append(state)
                if given.save is not None:
                    common.write(given.save, recorded(about, states), flag="--save")
        else:
            about, states = read(given.record)
        shown = [state for state in states if given.at in (None, state.updates)]
        if not shown:
            there = ", ".join(str(state.updates) for state in states)
            raise UsageError(f"--at {given.at}: {given.record} holds {there} updates; name one of them")
        print(f"gradient norms, class {about['class']} of {about['dataset']}, {about['network']}")
        print(table(states, PUBLISHED.get((about["dataset"], about["class"]), {})))
        common.save(draw(shown[-1], about), given.out, pdf=given.pdf)
    return 0


# --- Measuring --------------------------------------------------------------------------------------------------------


def measured(observed: Subject, updates: Sequence[int], counts: Sequence[int], draws: int) -> Iterator[State]:
    """Train the network on, and measure it after each of these ascending numbers of updates."""
    for number in updates:
        observed.train(number)
        confusion = confusion_matrix(observed.net, observed.test, observed.trainer.compute)
        accuracy = 100 * confusion.diagonal().sum().item() / len(observed.test)
        norms = image_norms(observed.net, observed.images, observed.label)
        picks = {
            (group, count): torch.stack(indices)
            for count in counts
            for group, indices in picked(observed, count, draws).items()
        }
        rows = []
        for gradient, values in norms.items():
            rows.append(row(gradient, "all images", values[None], values.max().item()))
            rows += [row(gradient, group, values[index], values.max().item()) for (group, _), index in picks.items()]
        yield State(number, accuracy, rows)


def picked(
    observed: Subject, count: int, draws: int, strategies: Mapping[str, str] = STRATEGIES
) -> dict[str, list[Tensor]]:
    """Positions of the images that each strategy selects, (count,) each, in so many draws.

    Members of clusters are all of the same clusters.
    """
    picks: dict[str, list[Tensor]] = {group: [] for group in strategies}
    embedding, clusters = observed.embedding(), Clusters(observed.draws("clusters", count))
    with Progress(draws, f"selecting {count}", "draw") as progress:
        for d in range(draws):
            for group, strategy in strategies.items():
                context = observed.context(observed.draws(f"gradient norms of {group}", count, d))
                context = dataclasses.replace(context, clusters=clusters)
                context.embeddings[0] = embedding  # the same for all draws
                picks[group].append(select(context, count, strategy=strategy)[0].cpu())
            progress.advance()
    return picks


def row(gradient: str, group: str, norms: Tensor, top: float) -> Row:
    """The row of a group's norms, (draws, n)."""
    return Row(
        gradient=gradient,
        group=group,
        n=norms.shape[1],
        draws=len(norms),
        mean=norms.mean().item(),
        std=norms.std().item(),
        spread=statistics.stdev(norms.mean(1).tolist()) if len(norms) > 1 else None,
        top=top,
        histogram=[round(count / len(norms), 2) for count in norms.histc(BINS, 0, top).tolist()],
    )


def image_norms(net: Network, images: ImageSet, label: int) -> dict[str, Tensor]:
    """Gradient norms of every image of a set, each (N,) on the CPU. label: the class of all of them."""
    size = sum(p.numel() * p.element_size() for p in net.parameters())
    chunk = max(1, min(CHUNK_PIXELS // images.side**2, GRADIENT_BYTES // size))
    norms: dict[str, list[Tensor]] = {ALL: [], CONVOLUTIONS: []}
    with Progress(len(images), "gradients", "image") as progress:
        for index in torch.arange(len(images), device=images.device).split(chunk):
            x, y = images.batch(index)
            for gradient, values in gradient_norms(net, x, torch.full_like(y, label)).items():
                norms[gradient].append(values.cpu())
            progress.advance(len(index))
    return {gradient: torch.cat(values) for gradient, values in norms.items()}


def gradient_norms(net: Network, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Euclidean norms of every image's gradient in the network's mode, (B,): by all parameters, and by convolutions.

    x: (B, C, H, W) normalised images; y: (B,) labels.
    """
    parameters = {name: p.detach() for name, p in net.named_parameters()}
    buffers = dict(net.named_buffers())

    def loss(parameters: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        logits = functional_call(net, (parameters, buffers), (image[None],))
        return F.cross_entropy(logits, label[None])

    gradients = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, y)  # each (B, *shape)
    squares = {name: g.flatten(1).square().sum(1) for name, g in gradients.items()}
    of_convolutions = [squares[name] for name, p in parameters.items() if p.dim() == 4]
    return {
        ALL: torch.stack(list(squares.values())).sum(0).sqrt(),
        CONVOLUTIONS: torch.stack(of_convolutions).sum(0).sqrt(),
    }


# --- Showing ----------------------------------------------------------------------------------------------------------


def recorded(about: dict[str, Any], states: Sequence[State]) -> bytes:
    """Content of a file of --save: a line that says how it was measured, and a line per network."""
    lines = [about, *map(dataclasses.asdict, states)]
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def read(file: Path) -> tuple[dict[str, Any], list[State]]:
    """What `recorded` wrote. Raises UserError when the file is none of its."""
    try:
        about, *lines = map(json.loads, file.read_text(encoding="utf-8").splitlines())
        states = [State(s["updates"], s["accuracy"], [Row(**values) for values in s["rows"]]) for s in lines]
        return {name: about[name] for name in ("dataset", "class", "network")}, states
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); name a file of --save") from error
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{file}: is no file of --save ({error}); name another") from error


def table(states: Sequence[State], published: dict[str, tuple[float, float]]) -> str:
    """A line of text for each group of each network, and the published values where there are any."""
    head = f"{'updates':>7}{'test acc %':>12}  {'gradient by':16}{'group':28}{'n':>5}{'mean':>9}{'std':>9}"
    lines = [f"{head}   std of the mean over draws"]
    for state in states:
        for group in state.rows:
            spread = "" if group.spread is None else f"   {group.spread:.2f} ({group.draws} draws)"
            lines.append(
                f"{state.updates:>7}{state.accuracy:>12.1f}  {group.gradient:16}{group.group:28}{group.n:>5}"
                f"{group.mean:>9.2f}{group.std:>9.2f}{spread}"
            )
    for name, (mean, std) in published.items():
        lines.append(f"{'?':>7}{'?':>12}  {'?':16}{f'{name}, published':28}{'':>5}{mean:>9.1f}{std:>9.1f}")
    return "\n".join(lines)


def draw(state: State, about: dict[str, Any]) -> Figure:
    """Histograms of all images, random ones and representatives on one axis, of the largest of --count.

    Means are dashed lines; those of fewer representatives are dotted ones.
    """
    figure = Figure(figsize=(common.WIDTH, 4), layout="constrained")
    axes = figure.subplots()
    rows = [row for row in state.rows if row.gradient == ALL]
    most = max(row.n for row in rows[1:])
    drawn = [rows[0], *(row for row in rows[1:] if row.n == most)]
    for row, colour in zip(drawn, (common.GREY, common.PALETTE[1], common.PALETTE[0]), strict=True):
        edges = [row.top * i / len(row.histogram) for i in range(len(row.histogram) + 1)]
        axes.stairs(row.histogram, edges, fill=True, color=colour, alpha=0.4)
        axes.stairs(row.histogram, edges, color=colour, label=described(row))
        axes.axvline(row.mean, color=colour, ls="--")
    fewer = [row for row in rows[1:] if row.n < most and row.group == "representatives"]
    for number, row in enumerate(fewer, 2):
        axes.axvline(row.mean, color=common.colour(number), ls=":", label=f"{described(row)}, mean")
    updates = f"after {state.updates} updates" if state.updates else "as initialised"
    name = drawable(short(about["class"]))
    axes.set_xlabel(f"gradient norm of an image ({name}, {about['dataset']}, {about['network']} {updates})")
    axes.set_ylabel("images")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0)
    return figure


def described(row: Row) -> str:
    """A group for a legend: name, number, mean and standard deviation over images."""
    draws = f", {row.draws} draws" if row.draws > 1 else ""
    return f"{row.group}, n={row.n}{draws}: {row.mean:.1f} ± {row.std:.1f}"


if __name__ == "__main__":
    run_main(main)
