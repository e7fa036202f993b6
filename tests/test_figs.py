"""Figures and the headline script at a tiny size."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image

import condense
from figs import distilled
from tests import headline
from utils.errors import UserError

TINY = shlex.split(
    "--device cpu --niter 1 --inner_loop 2 --interval 2 --batch_real 4 --n_data 4 --width 4 --epochs 1 --repeat 2"
)


def test_the_picture_of_a_set_has_a_row_per_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert condense.main([*TINY, "-f", "2", "--ipc", "1", "--results_dir", str(tmp_path)]) == 0
    out = tmp_path / "picture.png"
    assert distilled.main([str(next(tmp_path.glob("digits/*"))), "--out", str(out), "--classes", "3"]) == 0
    assert str(out) in capsys.readouterr().out
    with Image.open(out) as image:
        assert image.width > image.height > 100
    with pytest.raises(UserError, match="no such file"):
        distilled.main([str(tmp_path), "--out", str(out)])


def test_the_headline_script_runs_resumes_and_tabulates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "test"):
        for c in range(10):
            folder = tmp_path / "images" / split / f"class{c}"
            folder.mkdir(parents=True)
            for i in range(5):
                pixels = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    argv = ["--image_folder", str(tmp_path / "images"), "--"]
    argv += [*TINY, "--ipc", "1", "--results_dir", str(tmp_path / "results")]
    assert headline.main(["--minutes", "0.00001", *argv]) == 0
    assert "run the same command again" in capsys.readouterr().out
    assert headline.main(argv) == 0
    table = capsys.readouterr().out.splitlines()[-3:]
    assert table[0].split() == ["iteration", "accuracy", "%", "published", "minutes"]
    assert table[1].split()[0] == "0" and "54.2" in table[1]
    assert table[2].split()[0] == "1" and "(n=2)" in table[2]
