"""How long the gradients of single images are: all of a class, random ones, and representatives.

    $ python3 -m figs.gradient_norms --count 32
    $ python3 -m figs.gradient_norms -d cifar10 --image_folder data/cifar10_jpg --class airplane
    $ python3 -m figs.gradient_norms -d cifar10 --updates 0 -n resnet18 --out untrained.png

The gradient is that of an image's cross-entropy with respect to all parameters of the network, in evaluation mode and
without augmentation; the norm is Euclidean. The network has been trained on real data by --updates network updates.
Random images and representatives are drawn --draws times, the latter from other starts of k-means.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

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
from utils.method.selection import select
from utils.system.process import run_main
from utils.system.report import Progress, messages

GRADIENT_BYTES = 2**28  # of the gradients that are computed at once
CHUNK_PIXELS = 2**16  # of the images of these gradients, since their features take memory, too
BINS = 40

# Liu et al. (ICCV 2023): mean and standard deviation. They do not say for how long their network was trained.
PUBLISHED = {("cifar10", "airplane"): {"random": (10.0, 8.8), "representatives": (6.4, 7.1)}}


@dataclass(frozen=True)
class Norms:
    """Gradient norms of a group of images in D draws of n images each. draws: (D, n)."""

    group: str
    draws: Tensor

    @property
    def mean(self) -> float:
        return self.draws.mean().item()

    @property
    def std(self) -> float:
        """Sample standard deviation over the images of all draws."""
        return self.draws.std().item()

    @property
    def spread(self) -> float | None:
        """Sample standard deviation of the draws' means; None for a single draw."""
        return statistics.stdev(self.draws.mean(1).tolist()) if len(self.draws) > 1 else None


def main(argv: Sequence[str]) -> int:
    """The program. Raises UserError for flags and data that do not fit."""
    parser = common.figure_parser("gradient_norms", __doc__)
    subject.add_flags(parser, count=128)
    parser.add_argument("--draws", type=integer(1), default=10, metavar="N", help="draws of each (default: 10)")
    given = common.parse(parser, argv)
    with messages(), common.style():
        observed = subject.prepare(given)
        norms = groups(observed, given.count, given.draws)
        print(f"gradient norm, class {observed.class_name} of {observed.dataset}, {observed.about}")
        print(table(norms, PUBLISHED.get((observed.dataset, observed.class_name), {})))
        common.save(draw(norms, observed), given.out, pdf=given.pdf)
    return 0


def groups(observed: Subject, count: int, draws: int) -> list[Norms]:
    """Norms of all images of the class, of random images, and of representatives."""
    norms = image_norms(observed.net, observed.images, observed.label)
    picks: dict[str, list[Tensor]] = {"random": [], "representatives": []}
    with Progress(draws, "selecting", "draw") as progress:
        for d in range(draws):
            for group, strategy in (("random", "random"), ("representatives", "kmeans")):
                context = observed.context(observed.draws(f"gradient norms of {group}", d))
                picks[group].append(select(context, count, strategy=strategy)[0])
            progress.advance()
    drawn = [Norms(group, norms[torch.stack(indices)]) for group, indices in picks.items()]
    return [Norms("all images", norms[None]), *drawn]


def image_norms(net: Network, images: ImageSet, label: int) -> Tensor:
    """The gradient norm of every image of a set, (N,) on the CPU. label: the class of all of them."""
    size = sum(p.numel() * p.element_size() for p in net.parameters())
    chunk = max(1, min(CHUNK_PIXELS // images.side**2, GRADIENT_BYTES // size))
    norms = []
    with Progress(len(images), "gradients", "image") as progress:
        for index in torch.arange(len(images), device=images.device).split(chunk):
            x, y = images.batch(index)
            norms.append(gradient_norms(net, x, torch.full_like(y, label)).cpu())
            progress.advance(len(index))
    return torch.cat(norms)


def gradient_norms(net: Network, x: Tensor, y: Tensor) -> Tensor:
    """Euclidean norm of every image's gradient with respect to all parameters, in the network's mode, (B,).

    x: (B, C, H, W) normalised images; y: (B,) labels.
    """
    parameters = {name: p.detach() for name, p in net.named_parameters()}
    buffers = dict(net.named_buffers())

    def loss(parameters: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        logits = functional_call(net, (parameters, buffers), (image[None],))
        return F.cross_entropy(logits, label[None])

    gradients = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, y)  # each (B, *shape)
    return torch.stack([g.flatten(1).square().sum(1) for g in gradients.values()]).sum(0).sqrt()


def table(norms: Sequence[Norms], published: dict[str, tuple[float, float]]) -> str:
    """A line of text for each group, and the published values where there are any."""
    lines = [f"{'group':24}{'n':>6}{'mean':>9}{'std':>9}   std of the mean over draws"]
    for group in norms:
        spread = "" if group.spread is None else f"{group.spread:.2f} ({len(group.draws)} draws)"
        lines.append(
            f"{group.group:24}{group.draws.shape[1]:>6}{group.mean:>9.2f}{group.std:>9.2f}   {spread}".rstrip()
        )
    for group_name, (mean, std) in published.items():
        name = f"{group_name}, published"
        lines.append(f"{name:24}{'':>6}{mean:>9.1f}{std:>9.1f}   at the paper's own network state")
    return "\n".join(lines)


def draw(norms: Sequence[Norms], observed: Subject) -> Figure:
    """Histograms of the groups above each other, on one scale, with the means as lines."""
    figure = Figure(figsize=(common.WIDTH, 1.2 + 1.35 * len(norms)), layout="constrained")
    panels = figure.subplots(len(norms), 1, sharex=True, sharey=True)
    top = max(group.draws.max().item() for group in norms)
    for number, (group, axes) in enumerate(zip(norms, panels, strict=True)):
        values = group.draws.flatten()
        share = torch.full_like(values, 100 / len(values)).numpy()
        axes.hist(values.numpy(), bins=BINS, range=(0, top), weights=share, color=common.colour(number), alpha=0.75)
        count, draws = group.draws.shape[1], len(group.draws)
        name = f"{group.group}, n={count}" + (f", {draws} draws" if draws > 1 else "")
        axes.axvline(group.mean, color="black", lw=1.4, label=f"{name}: {group.mean:.2f} ± {group.std:.2f}")
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0)
    panels[-1].set_xlabel(
        f"gradient norm of an image of class {observed.class_name} ({observed.dataset}, {observed.about})"
    )
    figure.supylabel("images, %", fontsize=10)
    return figure


if __name__ == "__main__":
    run_main(main)
