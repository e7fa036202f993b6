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
POOL = "--experts 1 --expert_epochs 1"
CASES = {
    "dream": "",
    "idc": "--method idc",
    "dc": "--method dc",
    "dsa": "--method dsa",
    "dm": "--method dm --select kmeans",
    "mtt": f"--method mtt {TRAJECTORIES} --lr_img 30",
    "dream+": "--method dream+",
    "dance": f"{POOL} --method dance --networks middle --lr_img 0.1",
    "ncfm": "--method ncfm --networks fresh --frequency_count 16 --lr_img 1",
    "early": f"{POOL} --networks early --keep 0.5 --select members --average 0.9 --lr_img_end 0.1",
    "autograd": "--norm_type batch --metric cos --fc --bias",
    "features": "--match blocks --decode_type multi --init noise",
    "last features": "--match feat --metric l1_mean --pack nearest",
    "whitened": "--whiten zca --select herding",
}
DIGESTS = {
    "dream": "a08b7200d31627c3",
    "idc": "8e6267c3aa6ba9a9",
    "dc": "708b0ab9200ff933",
    "dsa": "aa88c60cb916c667",
    "dm": "a6ecd00253c93778",
    "mtt": "0b4b0fca51ca32e3",
    "dream+": "1295678d9ae12a20",
    "dance": "e02315b72a43d60b",
    "ncfm": "30ba86c754d4d914",
    "early": "2c6101412768a6c5",
    "autograd": "ba732ada86429e7b",
    "features": "c8eca81d099620bd",
    "last features": "7069b2c85bf02ac6",
    "whitened": "c04025ad8c77237d",
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
