"""--store: sets of 8 and 4 bits a pixel, what is written, what is evaluated, and what others need to read them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import condense
import train
from tests.files import last_json, quick, refused
from utils.config.build import Parts
from utils.files.imagefiles import grid_png
from utils.method.images import FLOAT32, STORES, UINT4, UINT8, pack, quantise, stored_bytes, to_unit, unpack
from utils.runs.formats import read
from utils.runs.sets import load_distilled

Results = tuple[dict[str, Path], dict[str, list[Tensor]]]
FLAGS = ["-f", "2", "--eval_every", "1", "--snapshot_every", "1"]
FEW = ["--device", "cpu", "--baselines", "none", "--epochs", "1", "--repeat", "1"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """For every --store, the run folder of the same command, and the pixels of which it made training images.

    The run with uint8 is that with float32, finished, and then the same command with --store uint8.
    """
    root = tmp_path_factory.mktemp("results")
    seen: dict[str, list[Tensor]] = {store: [] for store in STORES}

    def spied(self: Parts, pixels: Tensor, synthetic: Any = Parts.synthetic) -> Any:
        seen[self.o.store].append(pixels.clone())
        return synthetic(self, pixels)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Parts, "synthetic", spied)
        for store in (FLOAT32, UINT4, UINT8):
            if store == UINT8:
                shutil.copytree(root / FLOAT32, root / UINT8)
            assert condense.main(quick(root / store, *FLAGS, "--store", store)) == 0
    return {store: root / store / "digits" / "convnet2_f2_ipc1" for store in STORES}, seen


@pytest.fixture
def runs(results: Results) -> dict[str, Path]:
    """The run folders."""
    return results[0]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes to the default --results_dir must not lie in the repository."""
    monkeypatch.chdir(tmp_path)


def content(file: Path) -> Any:
    return torch.load(file, weights_only=True)


def checkpoint(run: Path) -> Tensor:
    """The float pixels that a run goes on from, (10, 1, 1, 8, 8)."""
    pixels = content(run / "checkpoint.pt")["pixels"]
    assert pixels.dtype == torch.float32
    return pixels


# --- Pixels -----------------------------------------------------------------------------------------------------------


def test_pixels_are_rounded_to_the_nearest_level_and_bytes_keep_their_value() -> None:
    pixels = torch.tensor([-1.0, 0.0, 0.033, 0.034, 0.5, 0.99, 1.0, 2.0])
    assert quantise(pixels, UINT8).tolist() == [0, 0, 8, 9, 128, 252, 255, 255]
    assert quantise(pixels, UINT4).tolist() == [0, 0, 0, 17, 8 * 17, 255, 255, 255]
    assert torch.equal(quantise(pixels, FLOAT32), pixels.clamp(0, 1))
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(quantise(to_unit(levels), UINT8), levels)
    assert torch.equal(quantise(to_unit(levels[::17]), UINT4), levels[::17])
    assert torch.equal(to_unit(levels[::17]), torch.arange(16) / 15)


def test_two_pixels_of_4_bits_lie_in_a_byte_the_first_in_its_upper_half() -> None:
    image = torch.tensor([[1, 2, 3], [15, 0, 7], [4, 5, 6]], dtype=torch.uint8)[None, None] * 17
    assert pack(image).tolist() == [[0x12, 0x3F, 0x07, 0x45, 0x60]]  # nine pixels, and nothing in the last half
    assert torch.equal(unpack(pack(image), (1, 3, 3)), image)
    assert [stored_bytes(image, store) for store in (FLOAT32, UINT8, UINT4)] == [36, 9, 5]


# --- Runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("store", [UINT8, UINT4])
def test_a_file_holds_rounded_pixels_and_the_checkpoint_goes_on_with_floats(store: str, runs: dict[str, Path]) -> None:
    pixels = checkpoint(runs[store])
    assert torch.equal(pixels, checkpoint(runs[FLOAT32]))  # nothing is rounded on the way
    images, labels = content(runs[store] / "data.pt")
    wanted = quantise(pixels.flatten(0, 1), store)
    assert images.dtype == torch.uint8 and labels.tolist() == list(range(10))
    assert torch.equal(unpack(images, (1, 8, 8)) if store == UINT4 else images, wanted)
    assert (runs[store] / "data_000001.pt").read_bytes() == (runs[store] / "data.pt").read_bytes()
    assert torch.equal(load_distilled(runs[store])[0], to_unit(wanted))
    assert not torch.equal(to_unit(wanted), pixels.flatten(0, 1).clamp(0, 1))
    assert (runs[store] / "stored_final.png").read_bytes() == grid_png(to_unit(wanted)[:, None])
    if store == UINT4:
        assert images.shape == (10, 32)
        with Image.open(runs[store] / "stored_final.png") as picture:
            assert len(set(np.asarray(picture.convert("L")).flat)) <= 16  # white between the images is a level, too


@pytest.mark.parametrize("store", STORES)
def test_evaluations_are_of_what_the_file_holds(
    store: str, runs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    card = json.loads((runs[store] / "data.json").read_text())
    assert train.main([str(runs[store]), "--device", "cpu", "--baselines", "none", "--json"]) == 0
    assert last_json(capsys)["accuracies"] == card["accuracy"]["accuracies"]
    assert "store" not in card["settings"]  # which are of the run, not of this file


def test_every_evaluation_is_of_rounded_pixels(results: Results) -> None:
    for store, count in ((UINT8, 1), (UINT4, 2)):  # at the end, and at iteration 0
        pixels = results[1][store][-count:]
        assert all(torch.equal(to_unit(quantise(x, store)), x) for x in pixels)
        assert not torch.equal(pixels[-1], results[1][FLOAT32][-1])


def test_data_json_says_how_to_read_it(runs: dict[str, Path]) -> None:
    cards = {store: json.loads((run / "data.json").read_text()) for store, run in runs.items()}
    assert {store: card["store"] for store, card in cards.items()} == {store: store for store in STORES}
    assert [cards[store]["value_range"] for store in STORES] == [[0, 1], [0, 255], [0, 15]]
    assert "divided by 255" in cards[UINT8]["about"]
    images, _ = content(runs[UINT4] / "data.pt")
    unpacked = torch.stack([images >> 4, images & 15], 2).flatten(1)[:, :64].reshape(-1, 1, 8, 8) / 15
    assert torch.equal(unpacked, load_distilled(runs[UINT4])[0])
    line = "torch.stack([images >> 4, images & 15], 2).flatten(1)[:, :64].reshape(-1, 1, 8, 8) / 15"
    assert f"; {line} are images (N, 1, 8, 8) in [0, 1], not normalised; cut every image" in cards[UINT4]["about"]


def test_the_same_command_with_another_store_writes_a_finished_set_again(
    runs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "data.pt: holds pixels as float32; made again from the checkpoint, as uint8" in (
        (runs[UINT8] / "log.txt").read_text()
    )
    lines = [(runs[store] / "metrics.jsonl").read_text().count("accuracies") for store in STORES]
    assert len(set(lines)) == 1  # the evaluation of floats at the end is no longer there
    assert json.loads((runs[UINT8] / "data.json").read_text())["finished"]
    assert condense.main(quick(runs[UINT8].parents[1], *FLAGS, "--store", UINT8)) == 0
    assert "this run is finished" in capsys.readouterr().out


def test_a_run_begins_with_the_rounded_pixels_of_a_snapshot(runs: dict[str, Path], tmp_path: Path) -> None:
    source = runs[UINT4] / "data_000000.pt"
    flags = ["-f", "2", "--resume_from", str(source), "--lr_img", "1e-9", "--mom_img", "0"]
    assert condense.main(quick(tmp_path, *flags)) == 0
    (run,) = tmp_path.glob("digits/*")
    torch.testing.assert_close(checkpoint(run).flatten(0, 1), load_distilled(source)[0], atol=1e-6, rtol=0)


# --- train.py ---------------------------------------------------------------------------------------------------------


def test_any_set_is_evaluated_as_if_it_were_stored_so(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {}
    for store in STORES:
        assert train.main([*FEW, str(runs[FLOAT32]), "--store", store, "--json"]) == 0
        (rows[store],) = last_json(capsys)["results"]
    assert [(r["trained_on"], r["stored_bytes"]) for r in rows.values()] == [
        ("distilled set", 10 * 64 * 4), ("distilled set, 8 bits", 10 * 64), ("distilled set, 4 bits", 10 * 32)
    ]  # fmt: skip
    kept = json.loads((runs[FLOAT32] / "eval.json").read_text())["results"]
    assert {r["stored_bytes"] for r in kept} == {r["stored_bytes"] for r in rows.values()}
    for store in (UINT8, UINT4):  # the same pixels as those of a run with that --store
        assert train.main([*FEW, str(runs[store]), "--json"]) == 0
        (row,) = last_json(capsys)["results"]
        assert row["set"] == rows[store]["set"] and row["accuracies"] == rows[store]["accuracies"]
        assert (row["trained_on"], row["stored_bytes"]) == (rows[store]["trained_on"], rows[store]["stored_bytes"])


@pytest.mark.parametrize("store", STORES)
def test_an_export_is_smaller_and_read_back(store: str, runs: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    file = tmp_path / "set.safetensors"
    assert train.main([str(runs[FLOAT32]), "--device", "cpu", "--export", str(file), "--store", store]) == 0
    source = read(file)
    assert source.store == store and source.card is not None and source.card["store"] == store
    assert torch.equal(load_distilled(file)[0], load_distilled(runs[store])[0])
    again = tmp_path / "again.safetensors"  # by default, as the file holds them
    assert train.main([str(file), "--device", "cpu", "--export", str(again)]) == 0
    assert read(again).store == store and torch.equal(load_distilled(again)[0], load_distilled(file)[0])


def test_four_bits_are_not_read_without_a_card_that_fits(runs: dict[str, Path], tmp_path: Path) -> None:
    data, card = (runs[UINT4] / name for name in ("data.pt", "data.json"))
    file = tmp_path / "data.pt"
    file.write_bytes(data.read_bytes())
    command = [*FEW, str(file), "-d", "digits", "-f", "2"]
    refused(train.main, command, str(file), "(10, 32)", "no data.json says of what shape", status=1, unchanged=tmp_path)
    for shape in (None, [1, 8, 9], [1, -8, -8], [2**62, 4, 1], [4, 16], "1, 8, 8"):
        text = json.dumps({**json.loads(card.read_text()), "shape": shape})
        (tmp_path / "data.json").write_text(text)
        refused(train.main, [*FEW, str(file)], str(file), "data.json of its run", status=1, unchanged=tmp_path)
    other = {**json.loads(card.read_text()), "store": UINT8}  # as after the same command with --store uint8
    (tmp_path / "data.json").write_text(json.dumps(other))
    assert torch.equal(load_distilled(file)[0], load_distilled(runs[UINT4])[0])


def test_real_images_have_no_store(tmp_path: Path) -> None:
    command = [*FEW[:2], "-d", "digits", "--coreset", "random", "--ipc", "1", "--store", UINT8]
    refused(train.main, command, "--store", "only for a distilled set", status=2, unchanged=tmp_path)
