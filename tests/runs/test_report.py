from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from utils.files.imagefiles import GRID_COLUMNS, grid_png
from utils.system import report
from utils.system.report import Progress, log, logged_to, messages, span


class Clock:
    """Stands in for the time module."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(report, "time", fake)
    return fake


def test_into_a_pipe_progress_is_a_line_a_minute(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(1000, "distilling", "step") as progress:
        for _ in range(200):
            clock.now += 1
            progress.say("loss 3")
            progress.advance()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["10/1000", "70/1000", "130/1000", "190/1000"]
    assert lines[0] == "distilling: 10/1000 steps, 16 min 30 s left, loss 3"


def test_the_pace_leaves_out_pauses_and_what_an_earlier_process_did(clock: Clock) -> None:
    with Progress(100, "distilling", "step", done=50) as progress:
        clock.now += 2
        progress.advance()
        with progress.paused():
            clock.now += 1000
        assert progress.seconds_left == pytest.approx(2 * 49)


def test_durations_read_as_people_say_them() -> None:
    assert [span(s) for s in (42, 190, 3 * 3600 + 1200, 12 * 86400)] == ["42 s", "3 min 10 s", "3 h 20 min", "12 days"]


def test_messages_reach_the_screen_and_the_log_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with messages(), logged_to(tmp_path / "log.txt"):
        log.info("hello")
        log.warning("careful")
    with pytest.raises(ValueError, match="broken"), logged_to(tmp_path / "log.txt"):
        raise ValueError("broken")
    log.info("after")
    assert capsys.readouterr().out == "hello\nwarning: careful\n"
    text = (tmp_path / "log.txt").read_text()
    assert "INFO    hello" in text and "WARNING careful" in text and "ERROR   ValueError: broken" in text
    assert "after" not in text


def test_a_grid_has_a_row_per_class_and_enlarges_small_images(tmp_path: Path) -> None:
    images = torch.zeros(3, 2, 1, 8, 8)
    images[1, 1] = 1
    file = tmp_path / "grid.png"
    file.write_bytes(grid_png(images))
    with Image.open(file) as grid:
        assert grid.size == (2 * 34 + 2, 3 * 34 + 2)
        shown = np.asarray(grid)[18::34, 18::34, 0]
    assert shown.tolist() == [[0, 0], [0, 255], [0, 0]]
    file.write_bytes(grid_png(torch.zeros(2, 50, 3, 32, 32)))  # of a large set only the first images
    with Image.open(file) as grid:
        assert grid.width == GRID_COLUMNS * 34 + 2
