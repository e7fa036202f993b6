"""Labelled images in a .npz file, as MedMNIST and Keras distribute them, read as uint8."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import InterpolationMode, center_crop, resize, rgb_to_grayscale

from utils.files.imagefolder import Split, must_fit_beside_networks
from utils.files.listing import TEST, TRAIN, held_out
from utils.files.npz import load_arrays
from utils.system.errors import UsageError, UserError

log = logging.getLogger("dream")
