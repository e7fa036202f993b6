"""The error of the gradient that selected images stand for, against one image at a time."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from figs import subject, targets
from figs.subject import Subject
from tests.files import refused
from utils.config.flags import Parser

WORDS = shlex.split("--device cpu --width 4 --class 3 --updates 0 2 --count 4 16")


def observed() -> Subject:
    parser = Parser()
    subject.add_flags(parser, count=16, several=True)
    return subject.prepare(parser.parse_args(WORDS), count=16, updates=2)


def test_the_mean_gradient_is_that_of_the_convolutions_image_by_image() -> None:
    found, index = observed(), torch.tensor([3, 7, 20])
    weights = [m.weight for m in found.net.modules() if isinstance(m, torch.nn.Conv2d)]
    rows = []
    for i in index:
        x, _ = found.images.batch(i[None])
        loss = F.cross_entropy(found.net(x), torch.tensor([3]))
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)]))
    torch.testing.assert_close(targets.mean_gradient(found, index), torch.stack(rows).mean(0))


def test_errors_are_of_every_state_and_of_what_was_selected_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*WORDS, "--draws", "2", "--out", str(tmp_path / "x.png"), "--save", str(tmp_path / "x.json")]
    assert targets.main(words) == 0
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert [(r["updates"], r["selected"], r["group"], r["count"]) for r in rows] == [
        *((0, 0, group, count) for count in (4, 16) for group in targets.GROUPS),
        *((2, 0, group, count) for count in (4, 16) for group in ("representatives", "members")),
        *((2, 2, group, count) for count in (4, 16) for group in targets.GROUPS),
    ]
    assert all(0.5 <= r["distinct"] <= 1 for r in rows)
    assert all(len(r["errors"]) == 2 and min(r["errors"]) > 0 for r in rows)
    said = capsys.readouterr().out
    assert targets.main([str(tmp_path / "x.json"), "--out", str(tmp_path / "again.png")]) == 0
    assert capsys.readouterr().out.splitlines()[:-1] == said.splitlines()[1:-1]
    (tmp_path / "other.json").write_text('{"rows": [1]}')
    refused(targets.main, [str(tmp_path / "other.json")], "no file of --save", status=1, unchanged=tmp_path)
    assert "class 3 of digits" in said and said.count("(2 draws)") == len(rows)


def test_all_images_of_a_class_have_no_error() -> None:
    found = observed()
    whole = torch.arange(len(found.images))
    shuffled = whole[torch.randperm(len(whole))]
    torch.testing.assert_close(targets.mean_gradient(found, whole), targets.mean_gradient(found, shuffled))
