"""Results of images that have been changed since are not shown as known: runs, experts, sweeps and figures."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import condense
from data import Dataset
from figs import common, sweep
from tests.files import image_folder, noise, quick, refused, save
from utils.method.images import ImageSet, Normalize, digest
from utils.runs.folder import OPTIONS
from utils.runs.training_data import TrainingDataOf
from utils.system.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return image_folder(tmp_path / "photos", {"a": 3, "b": 3})


def argv_of(photos: Path, *flags: str) -> list[str]:
    return quick(photos.with_name("results"), "--image_folder", str(photos), *flags)


def swap(one: Path, other: Path) -> None:
    """Each takes the other's name, and keeps its time of change."""
    one.rename(kept := one.with_name("kept"))
    other.rename(one)
    kept.rename(other)


def touch(photos: Path) -> None:
    for file in photos.rglob("*.png"):
        os.utime(file, ns=(1, 1))


def keep_size_and_time(photos: Path) -> None:
    """Another picture in a file that looks as before."""
    file = photos / "test" / "a" / "0.png"
    about, pixels = file.stat(), noise(8, 8, 3, seed=7)
    save(file, pixels)
    assert file.stat().st_size == about.st_size
    os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns))


CHANGES: dict[str, tuple[Callable[[Path], object], str | None]] = {
    "test folders swapped": (lambda p: swap(p / "test" / "a", p / "test" / "b"), "other test images"),
    "training images in another order": (
        lambda p: swap(p / "train" / "a" / "0.png", p / "train" / "a" / "2.png"), "other training images",
    ),
    "an image more": (lambda p: save(p / "train" / "b" / "9.png", noise(8, 8, 3)), "other training images"),
    "both": (
        lambda p: [save(p / s / "a" / "0.png", np.zeros((8, 8, 3), np.uint8)) for s in ("train", "test")],
        "other training and test images",
    ),
    "the same images, copied": (touch, None),
    "size and time of change as before": (keep_size_and_time, None),  # this is not seen, as utils/README.md says
}  # fmt: skip


def test_a_finished_run_is_not_shown_for_changed_images(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = photos.with_name("results")
    (planned,) = sweep.plan(["select=kmeans"], 1, argv_of(photos))
    assert condense.main(planned.words) == 0 and planned.up_to_date
    shutil.copytree(photos, before := photos.with_name("before"))
    for what, (change, says) in CHANGES.items():
        capsys.readouterr()
        change(photos)
        if says is None:
            assert condense.main(planned.words) == 0, what
            assert "this run is finished" in capsys.readouterr().out, what
        else:
            words = (says, str(photos), "--tag", "--restart")
            refused(condense.main, planned.words, *words, status=1, unchanged=results)
        sweep.dataset.cache_clear()
        assert planned.up_to_date == (
            change is keep_size_and_time
        )  # otherwise the sweep runs condense.py, which says so
        shutil.rmtree(photos)
        shutil.copytree(before, photos)
    save(photos / "train" / "a" / "0.png", noise(8, 8, 3, seed=8))
    assert condense.main([*planned.words, "--restart"]) == 0
    assert condense.main(planned.words) == 0 and "this run is finished" in capsys.readouterr().out


def test_an_unfinished_run_goes_on_with_its_own_images_only(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = argv_of(photos, "--niter", "2", "--max_minutes", "1e-9")
    assert condense.main(argv) == 0 and "stopped" in capsys.readouterr().out
    (options,) = photos.with_name("results").rglob(OPTIONS)
    touch(photos)
    assert condense.main(argv) == 0  # the same images
    shutil.copy(photos / "train" / "a" / "0.png", photos / "train" / "b" / "1.png")
    refused(condense.main, argv, "training images", status=1, unchanged=options.parent)
    record = json.loads(options.read_text())
    assert record["images"].keys() == {"files", "training", "test"}
    del record["images"], record["sha256"]  # as older versions wrote it
    options.write_text(json.dumps(record))
    assert condense.main(argv) == 0
    assert json.loads(options.read_text())["images"].keys() == {"files", "training", "test"}


def test_experts_are_trained_anew_for_other_training_images(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trajectories = ["--experts=1", "--expert_epochs=3", "--max_start=2", "--match_epochs=2"]
    argv = argv_of(photos, "--method", "mtt", "--experts_only", *trajectories)

    def folders() -> list[Path]:
        assert condense.main(argv) == 0
        return sorted(photos.with_name("results").glob("folder/experts_*"))

    (first,) = folders()
    save(photos / "test" / "a" / "0.png", noise(8, 8, 3, seed=7))  # on which they do not depend
    touch(photos)
    assert folders() == [first]
    save(photos / "train" / "a" / "0.png", noise(8, 8, 3, seed=7))
    assert "trained on other images" not in capsys.readouterr().out
    both = folders()
    assert len(both) == 2 and both[1].name.startswith(f"{first.name}_")
    assert f"{first}: its experts were trained on other images" in capsys.readouterr().out
    trained = both[1] / "expert_000.pt"
    about = trained.stat().st_mtime_ns
    assert folders() == both and trained.stat().st_mtime_ns == about


def test_a_figure_refuses_runs_between_which_the_images_were_changed(photos: Path) -> None:
    for tag in ("before", "again", "after"):
        if tag == "after":
            save(photos / "test" / "a" / "0.png", noise(8, 8, 3, seed=7))
        assert condense.main(argv_of(photos, "--tag", tag, "--seed", str(len(tag)))) == 0
    before, again, after = (
        photos.parent / f"results/folder/convnet2_f1_ipc1_{t}" for t in ("before", "again", "after")
    )
    assert len(common.read_runs([before, again])) == 2
    with pytest.raises(UserError, match=f"{after}: the images were changed between it and {before}"):
        common.read_runs([before, again, after])


def test_the_digest_of_images_is_the_same_on_any_number_of_ranks_and_in_both_scripts(photos: Path) -> None:
    images = torch.from_numpy(noise(7, 3, 4, 4))
    labels = torch.tensor([0, 0, 1, 1, 1, 2, 2])

    def held(*classes: int) -> ImageSet:
        keep = torch.isin(labels, torch.tensor(classes))
        return ImageSet(images[keep], labels[keep], classes=3, normalize=Normalize([0] * 3, [1] * 3))

    sent: list[Tensor] = []
    digest(held(0, 2), lambda rows: sent.append(rows) or rows)  # type: ignore[func-returns-value]
    whole = digest(held(0, 1, 2))
    assert digest(held(1), lambda rows: rows + sent[0]) == whole != digest(held(0, 1))
    images[[2, 3]] = images[[3, 2]]
    assert digest(held(0, 1, 2)) != whole

    data = Dataset("folder", device=CPU, image_folder=photos)
    known = TrainingDataOf(data, results_dir="", seed=0, epochs=1).data_identity
    assert data.digests == {"training": known["training_images"], "test": known["test_images"]}
    assert data.training_digest() == data.digests["training"]
