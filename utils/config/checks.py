"""Checks of rules between flags, data and networks. Each raises UsageError, which names the flags."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

import models
from data import DATASETS
from utils.config.options import OF_ANOTHERS, CondenseOptions, Options
from utils.config.presets import TRAJECTORY
from utils.method.augment import GEOMETRIC, parse, without
from utils.method.selection import NOISES, repeats
from utils.system.errors import UsageError


def check_data(o: Options) -> None:
    """Check the flags that name the data against each other. Raises UsageError."""
    own = [f"--{name}" for name in ("image_folder", "npz") if getattr(o, name) is not None]
    if len(own) > 1:
        raise UsageError("--image_folder and --npz exclude each other: leave one of them out")
    for name, flag, value in (("folder", "--image_folder", "DIR"), ("npz", "--npz", "FILE")):
        if o.dataset == name and own != [flag]:
            raise UsageError(f"-d {name}: say where the images are with {flag} {value}")
    if o.dataset in DATASETS and (where := DATASETS[o.dataset].where) and own != ["--image_folder"]:
        raise UsageError(
            f"-d {o.dataset}: nothing is downloaded; get the images from {where}, and say where they are with "
            "--image_folder DIR"
        )
    if o.dataset == "digits" and own:
        raise UsageError(f"{own[0]}: digits comes with scikit-learn; leave -d out to use the images")
    if o.size is not None and o.dataset in DATASETS:
        raise UsageError(f"--size: only for images of one's own; {o.dataset} has a fixed image size")
    if o.split is not None and not own:
        raise UsageError(f"--split: only for images of --image_folder or --npz; {o.dataset} has test images")
    if o.skip_broken and "--image_folder" not in own:
        raise UsageError(f"--skip_broken: only for --image_folder DIR; {o.dataset} is no folder of images")


def check_alone(given: Mapping[str, Any]) -> None:
    """Check the flags of train.py without a distilled set. Raises UsageError for those that need one."""
    if given.get("real") and given.get("coreset"):
        raise UsageError("--real and --coreset exclude each other")
    if given.get("coreset") and "run" in given:
        raise UsageError(f"{given['run'][0]}: --coreset trains on real images; leave the set out, or use --baselines")
    if given.get("coreset") and "ipc" not in given:
        raise UsageError("--coreset: say how many images per class with --ipc N")
    of_a_set = (
        "experiment",
        "factor",
        "decode_type",
        *OF_ANOTHERS,
        "store",
        "export",
        "baselines",
        "scores",
        "teacher",
    )
    for name in of_a_set:
        if name in given:
            raise UsageError(f"--{name}: only for a distilled set; name one, or leave it out")


def check_described(given: Mapping[str, Any], card: Mapping[str, Any] | None) -> None:
    """Check what the flags say of a set against its data.json, if it has one. Raises UsageError."""
    if card is None:
        return
    if given.get("normalized") and not card.get("normalized", False):
        raise UsageError("--normalized: the set's data.json says that it is not; leave the flag out")
    for name, known in (("whitened", True), ("classes", "class_names" in card)):
        if known and given.get(name) not in (None, "no"):
            raise UsageError(f"--{name}: the set's data.json says what the set is; leave the flag out")


def check_sizes(o: CondenseOptions, counts: list[int], names: list[str], *, matches_images: bool) -> list[str]:
    """Warnings where condense.py uses real images twice, or fewer than asked for.

    counts, names: training images and name of every class. matches_images: whether --batch_real of each are matched.
    """
    if o.init in NOISES:
        warnings = repeats("--ipc", o.ipc, counts, names, "of the real images beside the set some are the same")
    else:
        warnings = repeats("--ipc times -f squared", o.ipc * o.factor**2, counts, names, "some begin twice")
    if matches_images:
        warnings += repeats("--batch_real", o.batch_real, counts, names, "all are matched, some twice")
    if o.n_data > sum(counts):
        warnings.append(f"--n_data is {o.n_data}, there are {sum(counts)} training images: all are used")
    return warnings


def check_factor(factor: int, side: int) -> None:
    """Check that cells are not smaller than a pixel. Raises UsageError."""
    if factor > side:
        raise UsageError(f"-f {factor}: a cell would be smaller than a pixel, images are {side} pixels wide")


def check_batches(spec: models.NetSpec, *sizes: int) -> None:
    """Check that a network can train on batches of these sizes, since batch norm may need two images.

    Raises UsageError.
    """
    if min(sizes) < models.smallest_batch(spec):
        raise UsageError(
            f"{spec.name}, which has batch norm, cannot train on a batch of one image of this size; use more images "
            "(--ipc, -f, --batch_real, --batch_size, --batch_syn_max, --n_data)"
            + (" or --norm_type instance" if spec.norm else "")
        )


def check_method(o: CondenseOptions, spec: models.NetSpec) -> None:
    """Check options of condense.py that exclude each other or the network, for any method. Raises UsageError."""
    if o.per_cluster > 1 and (o.batch_real % o.per_cluster or o.select != "kmeans"):
        raise UsageError(
            f"--per_cluster {o.per_cluster}: takes so many images of every k-means cluster, so --select kmeans and a "
            f"--batch_real that it divides, not {o.select} and {o.batch_real}"
        )
    if o.pretrain and o.train_on != "real":
        raise UsageError("--pretrain: is on real images, so use --train_on real, or --pretrain 0")
    of_pool = [f"--networks {o.networks}"] * (o.networks != "fresh") + [f"--keep {o.keep:g}"] * (o.keep < 1)
    of_pool += ["--calibrate"] * o.calibrate
    if o.match == TRAJECTORY and of_pool:
        raise UsageError(f"{of_pool[0]}: --match {TRAJECTORY} follows experts; use another method, or leave it out")
    last = o.max_start - 1 + o.match_epochs
    if o.match == TRAJECTORY and last > o.expert_epochs:
        raise UsageError(
            f"--expert_epochs {o.expert_epochs}: students that start before epoch --max_start {o.max_start} "
            f"match --match_epochs {o.match_epochs} later, so experts need {last} epochs"
        )
    if o.experts_only and o.match != TRAJECTORY and not of_pool:
        raise UsageError("--experts_only: this run has no experts; use --networks early or middle, or --method mtt")
    if of_pool and models.has_batch_norm(spec):
        raise UsageError(
            f"{of_pool[0]}: {spec.name} has batch norm, whose statistics a pool does not keep"
            + ("; use --norm_type instance" if spec.norm else "; use another network")
        )
    if "cf" not in o.match.split("+") and o.frequencies != "random":
        raise UsageError(f"--frequencies {o.frequencies}: only for --match cf, not {o.match}")
    # Some layers, such as hardsigmoid, have no second derivative in PyTorch.
    if ("grad" in o.match.split("+") or o.match == TRAJECTORY) and (problem := models.second_derivative_error(spec)):
        raise UsageError(
            f"--net_type {spec.name}: PyTorch has no second derivative of it ({problem}), which --match {o.match} "
            "needs; use another network, or --match feat or embed"
        )


def check_deterministic(o: CondenseOptions, device: torch.device) -> None:
    """Check that all derivatives by pixels have a deterministic implementation on the device. Raises UsageError.

    Network updates and evaluations may resample images: they take no derivative through an augmentation.
    """
    resampling = [name for name in parse(o.aug_type) if name in GEOMETRIC and name != "crop"]
    if o.deterministic and device.type == "cuda" and resampling:
        raise UsageError(
            f"--deterministic: on a GPU, PyTorch has no deterministic derivative of {' and '.join(resampling)} in "
            f"--aug_type {o.aug_type}; use --aug_type {without(o.aug_type, *resampling)}, or leave --deterministic out"
        )
