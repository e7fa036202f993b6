"""What every method computes, kept as digests: a change of layout or speed must not change a pixel.

In float64 and rounded to 1e-4, so that they hold on every machine. After a change that is meant to change results,
`python3 -m tests.test_golden` prints the new ones.
"""

from __future__ import annotations

import hashlib
import shlex
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import condense
from utils.numerics import compute

TINY = shlex.split(
    "--ipc 2 -f 2 --niter 2 --inner_loop 2 --interval 2 --batch_real 8 --n_data 16 --width 16 --epochs 1 --repeat 1 "
    "--device cpu --compile off --tag x"
)
TRAJECTORIES = "--inner_loop 1 --experts 1 --expert_epochs 3 --max_start 2 --match_epochs 2 --student_steps 3"
CASES = {
    "dream": "",
    "idc": "--method idc",
    "dc": "--method dc",
    "dsa": "--method dsa",
    "dm": "--method dm --select kmeans",
    "mtt": f"--method mtt {TRAJECTORIES} --lr_img 30",
    "dream+": "--method dream+",
    "autograd": "--norm_type batch --metric cos --fc --bias",
    "features": "--match blocks --decode_type multi --init noise",
    "last features": "--match feat --metric l1_mean --pack nearest",
    "whitened": "--whiten zca --select herding",
}
DIGESTS = {
    "dream": "1786d7a9d14d62ae",
    "idc": "f461b01303d5f929",
    "dc": "58e4596bf9c01dc7",
    "dsa": "69ca946820830a16",
    "dm": "33b7efeb5894517b",
    "mtt": "1d0bed0cdfe94792",
    "dream+": "d75a907fdeca5dd2",
    "autograd": "33189a19a7fc841f",
    "features": "c8eca81d099620bd",
    "whitened": "242f08c7f721506a",
}


@contextmanager
def float64() -> Iterator[None]:
    """Everything in double precision, selection included."""
    fast, compute.fast_bfloat16 = compute.fast_bfloat16, lambda device: False
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        compute.fast_bfloat16 = fast


def digest(results: Path, flags: str) -> str:
    """Of the rounded pixels of a run."""
    with float64():
        assert condense.main([*TINY, *shlex.split(flags), "--results_dir", str(results)]) == 0
    (file,) = results.glob("digits/*_x/data.pt")
    images, _ = torch.load(file, weights_only=True)
    rounded = (images.double() * 1e4).round().to(torch.int16)
    return hashlib.sha256(rounded.numpy().tobytes()).hexdigest()[:16]


@pytest.mark.parametrize("case", CASES)
def test_every_method_computes_what_it_did(case: str, tmp_path: Path) -> None:
    assert digest(tmp_path, CASES[case]) == DIGESTS[case]


if __name__ == "__main__":
    for case, flags in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            print(f'    "{case}": "{digest(Path(folder), flags)}",', file=sys.stderr)
