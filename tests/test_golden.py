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
from torch import Tensor

import condense
from utils.method import selection
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
    "dream": "a6641e30e431d153",
    "idc": "8e6267c3aa6ba9a9",
    "dc": "708b0ab9200ff933",
    "dsa": "aa88c60cb916c667",
    "dm": "86241cd4495a8365",
    "mtt": "0b4b0fca51ca32e3",
    "dream+": "1295678d9ae12a20",
    "dance": "e02315b72a43d60b",
    "ncfm": "30ba86c754d4d914",
    "early": "4e74d58c0783a930",
    "autograd": "ba732ada86429e7b",
    "features": "c8eca81d099620bd",
    "last features": "e921857ce6974c3d",
    "whitened": "c04025ad8c77237d",
}


@contextmanager
def float64() -> Iterator[None]:
    """Everything in double precision, selection included.

    Distances to centroids are rounded: the two members of a cluster of two are equally far from it, and which of them
    stands for it would otherwise be up to the rounding of a processor's matrix product.
    """

    def rounded(*arguments: Tensor) -> tuple[Tensor, Tensor]:
        nearest, distance = assign(*arguments)
        return nearest, distance.round(decimals=6)

    assign = selection.assign
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compute, "fast_bfloat16", lambda device: False)
        patch.setattr(selection, "assign", rounded)
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


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
