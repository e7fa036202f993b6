"""Rules between flags, data and networks that no single flag knows. Each raises UsageError naming the flags."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

import models
from utils.config.presets import TRAJECTORY
from utils.system.device import free_memory
from utils.system.errors import UsageError

COPIES = 4  # of a network's weights, at least: themselves, their gradients, their momentum, and one under way


def check_data(dataset: str, image_folder: str | None, size: int | None) -> None:
    """Rules between the flags that name the data. Raises UsageError."""
    if dataset == "folder" and image_folder is None:
        raise UsageError("-d folder: say where the images are with --image_folder DIR")
    if dataset == "digits" and image_folder is not None:
        raise UsageError("--image_folder: digits comes with scikit-learn; leave -d out to use the folder")
    if size is not None and dataset != "folder":
        raise UsageError(f"--size: only for folders of one's own; {dataset} has a fixed image size")


def check_alone(given: Mapping[str, Any]) -> None:
    """Rules for train.py without a distilled set. Raises UsageError for flags that have no meaning then."""
    if given.get("real") and given.get("coreset"):
        raise UsageError("--real and --coreset exclude each other")
    if given.get("coreset") and "run" in given:
        raise UsageError(f"{given['run']}: --coreset trains on real images; leave the set out, or use --baselines")
    if given.get("coreset") and "ipc" not in given:
        raise UsageError("--coreset: say how many images per class with --ipc N")
    for name in ("factor", "decode_type", "normalized", "export", "baselines"):
        if name in given:
            raise UsageError(f"--{name}: only for a distilled set; name one, or leave it out")


def check_ipc(ipc: int, counts: list[int], names: list[str]) -> None:
    """Raises UsageError when a class has fewer images than are asked for."""
    smallest = min(counts)
    if ipc > smallest:
        name = names[counts.index(smallest)]
        raise UsageError(f"--ipc {ipc}: class {name} has only {smallest} training images; use --ipc {smallest} or less")


def check_sizes(
    counts: list[int], names: list[str], *, ipc: int, factor: int, init: str, batch_real: int, n_data: int
) -> list[str]:
    """Compare condense.py's flags with the training images per class. Raises UsageError where they are impossible;
    returns warnings where they do not mean what they say."""
    check_ipc(ipc, counts, names)
    warnings, have = [], min(counts)
    name = names[counts.index(have)]
    if init != "noise" and ipc * factor**2 > have:
        warnings.append(
            f"--ipc times -f squared is {ipc * factor**2}, class {name} has {have} images: some begin twice"
        )
    if batch_real > have:
        warnings.append(f"--batch_real is {batch_real}, class {name} has {have} images: all are matched, some twice")
    if n_data > sum(counts):
        warnings.append(f"--n_data is {n_data}, there are {sum(counts)} training images: all are used")
    return warnings


def check_factor(factor: int, side: int) -> None:
    """Raises UsageError when cells would be smaller than a pixel."""
    if factor > side:
        raise UsageError(f"-f {factor}: a cell would be smaller than a pixel, images are {side} pixels wide")


def check_batches(spec: models.NetSpec, *sizes: int) -> None:
    """Raises UsageError when a network with batch norm would have to train on a single image that it cannot."""
    if min(sizes) < models.smallest_batch(spec):
        raise UsageError(
            f"{spec.name}, which has batch norm, cannot train on a batch of one image of this size; use more images "
            "(--ipc, -f, --batch_real, --batch_size, --batch_syn_max, --n_data)"
            + (" or --norm_type instance" if spec.norm else "")
        )


def check_weights(net: models.Network, name: str) -> None:
    """Raises UsageError when the weights of a network, of which there are several copies at work, are beyond memory."""
    need, free = 4 * sum(p.numel() for p in net.parameters()), free_memory(torch.device("cpu"))
    if COPIES * need > free:
        raise UsageError(
            f"--net_type {name} (--depth, --width, --size): its weights take {need / 1e9:.1f} GB, {COPIES} times, and "
            f"{free / 1e9:.1f} GB of memory are free"
        )


def check_matching(match: str, spec: models.NetSpec) -> None:
    """Raises UsageError when gradients are to be matched that PyTorch cannot differentiate, as with hardsigmoid."""
    if ("grad" in match or match == TRAJECTORY) and (problem := models.second_derivative_error(spec)):
        raise UsageError(
            f"--net_type {spec.name}: PyTorch has no second derivative of it ({problem}), which --match {match} needs; "
            "use another network, or --match feat or embed"
        )


def check_method(o: Mapping[str, Any]) -> None:
    """Raises UsageError for options of condense.py that exclude each other, whatever the method's name."""
    each, batch_real, match = o["per_cluster"], o["batch_real"], o["match"]
    if each > 1 and (batch_real % each or o["select"] != "kmeans"):
        raise UsageError(
            f"--per_cluster {each}: takes so many images of every k-means cluster, so --select kmeans and a "
            f"--batch_real that it divides, not {o['select']} and {batch_real}"
        )
    if o["pretrain"] and o["train_on"] != "real":
        raise UsageError("--pretrain: is on real images, so use --train_on real, or --pretrain 0")
    last = o["max_start"] - 1 + o["match_epochs"]
    if match == TRAJECTORY and last > o["expert_epochs"]:
        raise UsageError(
            f"--expert_epochs {o['expert_epochs']}: students that start before epoch --max_start {o['max_start']} "
            f"match --match_epochs {o['match_epochs']} later, so experts need {last} epochs"
        )
    if o["experts_only"] and match != TRAJECTORY:
        raise UsageError(f"--experts_only: --match {match} has no experts; use --method mtt")
