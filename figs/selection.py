"""Where representatives lie among all images of a class, beside random ones, and how large their sub-clusters are.

    $ python3 -m figs.selection --class 3
    $ python3 -m figs.selection -d cifar10 --image_folder data/cifar10_jpg --class cat --method tsne --pdf

The plane is that of the first two principal components of the network's embedding, or t-SNE's. The network has been
trained on real data by --updates network updates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.figure import Figure
from torch import Tensor

from figs import common, subject
from figs.subject import Subject
from utils.method.selection import lloyd, padded, representatives
from utils.system.draws import Draws
from utils.system.errors import short
from utils.system.process import run_main
from utils.system.report import drawable, messages

RANDOM_STATE = 0  # seed of PCA and t-SNE
TSNE_DIMENSIONS = 50  # principal components that t-SNE begins with: the usual number, and much faster than all


@dataclass(frozen=True)
class Clusters:
    """Sub-clusters of one class. picks: (k,) positions of the representatives; nearest: (N,) every image's cluster."""

    picks: Tensor
    nearest: Tensor

    @property
    def sizes(self) -> Tensor:
        """Images in every cluster, (k,)."""
        return torch.bincount(self.nearest, minlength=len(self.picks))


def main(argv: Sequence[str]) -> int:
    """The program. Raises UserError for flags and data that do not fit."""
    parser = common.figure_parser("selection", __doc__)
    subject.add_flags(parser, count=32)
    parser.add_argument("--method", choices=tuple(METHODS), default="pca", help="how to draw a plane (default: pca)")
    given = common.parse(parser, argv)
    with messages(), common.style():
        observed = subject.prepare(given, count=given.count, updates=given.updates)
        observed.train(given.updates)
        draws = observed.draws("selection")
        x = observed.embedding()
        clusters = cluster(x, given.count, draws)
        random = observed.draws("selection, random").permutation(len(x))[: given.count]
        sizes, hit = clusters.sizes, clusters.nearest[random].unique()
        print(f"class {observed.class_name} of {observed.dataset}, {observed.about}: {len(x)} images")
        print(f"{given.count} sub-clusters of {sizes.min()} to {sizes.max()}; as many random images hit {len(hit)}")
        plane = METHODS[given.method](x.float().cpu().numpy())
        common.save(draw(plane, clusters, random, observed, given.method), given.out, pdf=given.pdf)
    return 0


def cluster(x: Tensor, k: int, draws: Draws) -> Clusters:
    """The clusters of the representatives that `select` would choose with the same draws. x: (N, D), k < N."""
    points, real = padded([x])
    _, nearest, distance = lloyd(points, real, k, draws.of_class(0).uniform(1, len(x)))
    return Clusters(representatives(real, nearest, distance, k)[0], nearest[0])


def pca(x: npt.NDArray[np.float32], dimensions: int = 2) -> npt.NDArray[np.float32]:
    """The first principal components, (N, D) -> (N, dimensions)."""
    from sklearn.decomposition import PCA

    return PCA(dimensions, svd_solver="full", random_state=RANDOM_STATE).fit_transform(x)


def tsne(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """t-SNE of the first principal components, (N, D) -> (N, 2)."""
    from sklearn.manifold import TSNE

    x = pca(x, min(TSNE_DIMENSIONS, *x.shape))
    perplexity = min(30.0, (len(x) - 1) / 3)
    return TSNE(2, perplexity=perplexity, init="pca", random_state=RANDOM_STATE).fit_transform(x)


METHODS = {"pca": pca, "tsne": tsne}
AXES = {"pca": "principal component {}", "tsne": "t-SNE {}"}


def draw(plane: npt.NDArray[np.float32], clusters: Clusters, random: Tensor, observed: Subject, method: str) -> Figure:
    """Left the images with both choices marked, right the sizes of the sub-clusters, largest first. plane: (N, 2)."""
    figure = Figure(figsize=(common.WIDTH, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    picks, others = clusters.picks.cpu().numpy(), random.cpu().numpy()
    small = 12 if len(plane) < 1000 else 4
    left.scatter(*plane.T, s=small, color=common.GREY, alpha=0.5, lw=0, label=f"all images (n={len(plane)})")
    left.scatter(
        *plane[others].T, s=46, marker="s", facecolor="none", edgecolor=common.PALETTE[1], lw=1.5, label="random"
    )
    left.scatter(*plane[picks].T, s=30, color=common.PALETTE[0], lw=0, label="representatives", zorder=3)
    left.set_xlabel(AXES[method].format(1))
    left.set_ylabel(AXES[method].format(2))
    left.set_xticks([])
    left.set_yticks([])

    sizes, order = clusters.sizes.sort(descending=True)
    hit = torch.isin(order, clusters.nearest[random])
    at = 1 + torch.arange(len(sizes))
    for inside, colour, name in ((True, common.PALETTE[1], "hit by a random image"), (False, common.GREY, "missed")):
        chosen = (hit == inside).cpu()
        count = int(chosen.sum())
        right.bar(at[chosen].numpy(), sizes.cpu()[chosen].numpy(), width=0.85, color=colour, label=f"{name} ({count})")
    right.axhline(len(plane) / len(sizes), color="black", ls=":", lw=1, label="mean size")
    right.set_xlabel("sub-cluster, largest first")
    right.set_ylabel("images")
    for axes in (left, right):
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), handletextpad=0.4)
    figure.supxlabel(f"class {drawable(short(observed.class_name))} ({observed.dataset}, {observed.about})", fontsize=9)
    return figure


if __name__ == "__main__":
    run_main(main)
