"""Images of one's own as people have them: other layouts of folders, tables of labels, and arrays of a .npz file."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import condense
import train
from data import DATASETS, Dataset
from figs.common import class_number
from tests.files import image_folder, last_json, noise, quick, refused, save
from utils.files.classnames import readable_names, same_classes
from utils.files.listing import held_out, list_images
from utils.runs.sets import class_numbers
from utils.system.errors import UsageError, UserError

CPU = torch.device("cpu")
WNIDS = ["n01443537", "n01629819", "n01641577"]
WORDS = ["goldfish, Carassius auratus", "European fire salamander", "bullfrog, Rana_catesbeiana"]
NAMES = ["n01443537 goldfish", "n01629819 European fire salamander", "n01641577 bullfrog"]


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], str]:
    """What has been said since the last call."""
    caplog.set_level(logging.INFO, "dream")

    def text() -> str:
        lines = "\n".join(record.getMessage() for record in caplog.records)
        caplog.clear()
        return lines

    return text


def relative(root: Path, samples: list[tuple[str, int]]) -> list[tuple[str, int]]:
    return [(Path(path).relative_to(root).as_posix(), c) for path, c in samples]


def tiny(root: Path) -> Path:
    """Three classes in the layout of Tiny-ImageNet as it is unpacked; val_i.JPEG is of class 2 i mod 3."""
    for name in WNIDS:
        for i in range(4):
            save(root / "train" / name / "images" / f"{name}_{i}.JPEG", noise(8, 8, 3, seed=i))
        (root / "train" / name / f"{name}_boxes.txt").write_text(f"{name}_0.JPEG\t0\t0\t1\t1\n")
    for split in ("val", "test"):
        for i in range(6):
            save(root / split / "images" / f"{split}_{i}.JPEG", noise(8, 8, 3, seed=i))
    lines = [f"val_{i}.JPEG\t{WNIDS[2 * i % 3]}\t0\t0\t7\t7\n" for i in range(6)]
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    (root / "wnids.txt").write_text("\n".join(reversed(WNIDS)))
    (root / "words.txt").write_text("\n".join(f"{n}\t{w}" for n, w in zip(WNIDS, WORDS, strict=True)))
    return root


# --- train, val and test ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train_as", "test_as", "says"),
    [
        ("train", "test", ""),
        ("train", "val", "train is trained on, val is tested on"),
        ("Training", "VALID", "Training is trained on, VALID is tested on"),
        ("train_set", "dev", "train_set is trained on, dev is tested on"),
        ("train", "evaluation", "evaluation is tested on"),
    ],
)
def test_a_split_may_have_any_of_its_usual_names(
    train_as: str, test_as: str, says: str, tmp_path: Path, said: Callable[[], str]
) -> None:
    root = image_folder(tmp_path, {"a": 1, "b": 2}, {"a": 2, "b": 1})
    (root / "train").rename(root / "x").rename(root / train_as)
    (root / "test").rename(root / "x").rename(root / test_as)
    found = list_images(root)
    assert found.classes == ["a", "b"]
    assert relative(root / train_as, found.samples[True]) == [("a/0.png", 0), ("b/0.png", 1), ("b/1.png", 1)]
    assert relative(root / test_as, found.samples[False]) == [("a/0.png", 0), ("a/1.png", 0), ("b/0.png", 1)]
    line = said()
    assert says in line and bool(line) == bool(says)


def test_test_is_preferred_to_val_where_it_has_labels(tmp_path: Path, said: Callable[[], str]) -> None:
    root = image_folder(tmp_path, {"a": 1, "b": 1})
    image_folder(tmp_path / "val", {"a": 1, "b": 1}, {})
    (root / "val" / "train").rename(root / "val2").rename(root / "validation")
    assert "test" in list_images(root).samples[False][0][0]
    assert "validation is not used" in said()
    for name in "ab":  # a test set that is kept secret
        (root / "test" / name / "0.png").rename(root / "test" / f"{name}.png")
        (root / "test" / name).rmdir()
    assert "validation" in list_images(root).samples[False][0][0]
    assert "validation is tested on; test has no labels and is not used" in said()


def test_a_folder_that_does_not_do_is_told_what_would(tmp_path: Path) -> None:
    flat = image_folder(tmp_path / "flat", {"a": 2, "b": 2}, {}) / "train"
    told = {
        flat: "class folders without a split into train and test; --split 0.2",
        flat.parent: "has neither test nor val; expected images in DIR/train/CLASS.*--split 0.2",
        tmp_path: f"give --image_folder {flat.parent}$",
    }
    for root, says in told.items():
        with pytest.raises(UserError, match=says):
            list_images(root)
    image_folder(tmp_path / "deep" / "ILSVRC" / "Data" / "CLS-LOC", {"a": 1, "b": 1})
    (tmp_path / "deep" / "ILSVRC" / "Annotations" / "train" / "a").mkdir(parents=True)
    with pytest.raises(UserError, match=r"deep has no train|--image_folder .*/ILSVRC/Data/CLS-LOC$"):
        list_images(tmp_path / "deep")
    (flat / "x.png").touch()
    image_folder(tmp_path / "caltech", {"a": 2, "b": 2}, {})
    (tmp_path / "caltech" / "train").rename(tmp_path / "caltech" / "ObjectCategories")
    with pytest.raises(UserError, match=r"2 class folders lie in .*Categories; give --image_folder .*Categories$"):
        list_images(tmp_path / "caltech", split=0.2)
    image_folder(tmp_path / "half", {}, {"a": 1, "b": 1})
    with pytest.raises(UserError, match="has test but no train"):
        list_images(tmp_path / "half")
    for name in "ab":
        (tmp_path / "half" / "train" / name).mkdir(parents=True)
        save(tmp_path / "half" / "train" / name / "0.png", noise(8, 8))
        (tmp_path / "half" / "test" / name / "0.png").unlink()
    with pytest.raises(UserError, match=r"class folders in test hold no images.*--split 0\.2"):
        list_images(tmp_path / "half")
    image_folder(tmp_path / "other", {"a": 1, "b": 1}, {"c": 1, "d": 1})
    with pytest.raises(UserError, match="train and test have different classes: only one has a, b, c, d"):
        list_images(tmp_path / "other")


# --- --split ----------------------------------------------------------------------------------------------------------


def test_a_split_takes_its_share_of_every_class_and_is_always_the_same(tmp_path: Path, said: Callable[[], str]) -> None:
    counts = {"a": 10, "b": 25, "train": 2}  # a class may be called train
    flat = image_folder(tmp_path / "x", counts, {}) / "train"
    found = list_images(flat, split=0.2)
    assert "--split 0.2 gives 29 images to train and 8 to test on, the same ones for every --seed" in said()
    labels = {part: [c for _, c in samples] for part, samples in found.samples.items()}
    assert labels == {True: [0] * 8 + [1] * 20 + [2], False: [0] * 2 + [1] * 5 + [2]}
    both = [path for samples in found.samples.values() for path, _ in samples]
    assert len(set(both)) == 37  # every image once
    # Nor does it depend on where the folder lies, or on whether it is called train.
    found_again = list_images(flat.rename(tmp_path / "moved"), split=0.2)
    assert relative(tmp_path / "moved", found_again.samples[False]) == relative(flat, found.samples[False])
    (tmp_path / "y").mkdir()
    (tmp_path / "moved").rename(tmp_path / "y" / "train")
    (tmp_path / "y" / "test").mkdir()
    assert relative(tmp_path / "y/train", list_images(tmp_path / "y", split=0.2).samples[False]) == relative(
        flat, found.samples[False]
    )
    assert "test has no labels" in said()
    (tmp_path / "y/train/b/25.png").write_bytes((tmp_path / "y/train/b/0.png").read_bytes())
    more = {path for path, _ in list_images(tmp_path / "y", split=0.2).samples[False]}
    assert len(more & {str(tmp_path / "y/train" / p) for p, _ in relative(flat, found.samples[False])}) >= 7
    # Not in the order of the names, and roughly by chance.
    tested = held_out([str(i) for i in range(1000)], [0] * 1000, ["a"], 0.3)
    assert sum(tested) == 300 and 120 < sum(tested[:500]) < 180


def test_a_split_that_makes_no_sense_is_refused(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "photos", {"a": 2, "b": 1, "c": 1})
    argv = quick(tmp_path / "results", "--image_folder", str(root))
    refused(condense.main, [*argv, "--split", "0.2"], "--split 0.2", "test images", status=2, unchanged=tmp_path)
    for value in ("0", "1", "nan"):
        refused(condense.main, [*argv, "--split", value], "--split", value, status=2, unchanged=tmp_path)
    refused(condense.main, ["--split", "0.2"], "--split: only for", "digits", status=2, unchanged=tmp_path)
    flat = [*quick(tmp_path / "results"), "--image_folder", str(root / "train"), "--split", "0.2"]
    refused(condense.main, flat, "needs two images", "only one is there of b, c", status=1, unchanged=tmp_path)


def test_a_split_is_kept_with_the_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flat = str(image_folder(tmp_path / "x", {"a": 9, "b": 6}, {}) / "train")
    assert condense.main(quick(tmp_path / "r", "--image_folder", flat, "--split", "0.3")) == 0
    (run,) = (tmp_path / "r" / "folder").iterdir()
    assert json.loads((run / "options.json").read_text())["options"]["split"] == 0.3
    card = json.loads((run / "data.json").read_text())
    assert card["settings"]["split"] == 0.3
    few = ["--device", "cpu", "--repeat", "1", "--baselines", "none"]
    assert train.main([str(run), *few, "--json"]) == 0
    assert last_json(capsys)["accuracy_mean"] == card["accuracy"]["accuracy_mean"]
    refused(train.main, [str(run), *few, "--split", "0.2"], "--split 0.2", "0.3", status=2, unchanged=tmp_path)


# --- Tables of labels, and names --------------------------------------------------------------------------------------


def test_tiny_imagenet_is_read_as_it_is_unpacked(tmp_path: Path, said: Callable[[], str]) -> None:
    root = tiny(tmp_path)
    dataset = Dataset("folder", device=CPU, image_folder=root)
    lines = said().splitlines()
    assert len(lines) == 1  # nor is anything said about boxes and annotations
    assert lines[0].endswith(
        "train is trained on, val is tested on with the labels of val_annotations.txt; test has no labels and is not "
        "used"
    )
    assert dataset.class_names == NAMES and dataset.counts == [4, 4, 4]
    found = list_images(root).samples[False]
    assert relative(root / "val/images", found) == [
        (f"val_{i}.JPEG", c) for c in range(3) for i in range(6) if 2 * i % 3 == c
    ]
    # As somebody's script sorts them.
    for path, c in found:
        (root / "val" / WNIDS[c]).mkdir(exist_ok=True)
        Path(path).rename(root / "val" / WNIDS[c] / Path(path).name)
    assert relative(root / "val", list_images(root).samples[False]) == [
        (f"{WNIDS[c]}/{Path(path).name}", c) for path, c in found
    ]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("val_0.JPEG", "line 7: expected a file name and its class"),
        ("\tn01443537", "line 7: expected a file name and its class"),
        ("val_0.JPEG\tgoldfish\t0", "line 7: 'goldfish' is no class"),
        ("val_0.JPEG\tn01629819\t0", "line 7: val_0.JPEG has two classes"),
        ("val_0.JPEG\t\ud800\t0", r"line 7: '\\udcff' is no class"),
    ],
)
def test_a_line_that_cannot_be_understood_is_named(line: str, says: str, tmp_path: Path) -> None:
    table = tiny(tmp_path) / "val" / "val_annotations.txt"
    text = line.replace("\ud800", "\udcff")
    with open(table, "a", encoding="utf-8", errors="surrogateescape") as file:
        file.write(f"{text}\n")
    with pytest.raises(UserError) as caught:
        list_images(tmp_path)
    assert f"{table}, " in str(caught.value) and says.replace("\\\\", "\\") in str(caught.value)


def test_a_part_of_the_classes_or_images_may_be_there(tmp_path: Path, said: Callable[[], str]) -> None:
    root = tiny(tmp_path)
    (root / "train" / WNIDS[1]).rename(root / "elsewhere")
    (root / "val" / "images" / "val_0.JPEG").unlink()
    found = list_images(root)
    assert found.classes == [WNIDS[0], WNIDS[2]]
    assert relative(root / "val/images", found.samples[False]) == [
        ("val_3.JPEG", 0),
        ("val_1.JPEG", 1),
        ("val_4.JPEG", 1),
    ]
    text = said()
    assert "3 images that are not there, or of other classes" in text and "2 images left out" in text
    (root / "val" / "images" / "val_3.JPEG").unlink()
    with pytest.raises(UserError, match=f"val_annotations.txt have different classes: only one has {WNIDS[0]}"):
        list_images(root)


@pytest.mark.parametrize("kind", ["kaggle", "caffe", "csv"])
def test_images_of_imagenet_get_their_labels_from_its_tables(kind: str, tmp_path: Path) -> None:
    root = tmp_path / "ILSVRC" / "Data" / "CLS-LOC"
    image_folder(root, dict.fromkeys(WNIDS, 1), {})
    for i in range(6):
        save(root / "val" / f"ILSVRC2012_val_0000000{i}.JPEG", noise(8, 8, 3, seed=i))
    if kind == "kaggle":
        rows = [f"ILSVRC2012_val_0000000{i},{WNIDS[i % 3]} 85 1 499 272 {WNIDS[i % 3]} 0 0 9 9 " for i in range(6)]
        (tmp_path / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *rows]))
        words = [f"{n} {w}" for n, w in zip(WNIDS, WORDS, strict=True)]
        (tmp_path / "LOC_synset_mapping.txt").write_text("\n".join(words))
    elif kind == "caffe":
        (root / "val.txt").write_text("".join(f"ILSVRC2012_val_0000000{i}.JPEG {i % 3}\n" for i in range(6)))
    else:
        rows = [f"val/ILSVRC2012_val_0000000{i}.JPEG,{WNIDS[i % 3]}" for i in range(6)]
        (root / "val" / "labels.csv").write_text("\r\n".join(["file,label", *rows]))
    dataset = Dataset("folder", device=CPU, image_folder=root)
    assert dataset.class_names == (NAMES if kind == "kaggle" else WNIDS)
    assert [path[-6] for path, _ in list_images(root).samples[False]] == list("031425")
    assert dataset.test.counts == [2, 2, 2]


def test_names_come_from_any_of_the_known_tables_and_never_change_the_order(tmp_path: Path) -> None:
    keras = {str(i): [n, w.split(",")[0].replace(" ", "_")] for i, (n, w) in enumerate(zip(WNIDS, WORDS, strict=True))}
    tables: Mapping[str, str] = {
        "words.txt": "\n".join(f"{n}\t{w}" for n, w in zip(WNIDS, WORDS, strict=True)),
        "synset_words.txt": "\n".join(f"{n} {w}" for n, w in zip(WNIDS, WORDS, strict=True)),
        "map_clsloc.txt": "\n".join(f"{n} 7 {w.replace(' ', '_')}" for n, w in zip(WNIDS, WORDS, strict=True)),
        "names.csv": "wnid,name\r\n" + "\r\n".join(f"{n},{w}" for n, w in zip(WNIDS, WORDS, strict=True)),
        "imagenet_class_index.json": json.dumps(keras),
        "Labels.json": json.dumps(dict(zip(WNIDS, WORDS, strict=True))),
    }
    for name, text in tables.items():
        (tmp_path / name).write_text(text)
        assert readable_names(WNIDS, [tmp_path], {}) == NAMES, name
        (tmp_path / name).unlink()
    for text in ("[1, 2", '{"a": 1}', "[" * 100000, "n01443537"):
        (tmp_path / "Labels.json").write_text(text)
        assert readable_names(WNIDS, [tmp_path, tmp_path / "nowhere"], {}) == WNIDS
    for text in ("n01443537 0", "n01443537_1.JPEG x", "n01443537,a.JPEG\nn01443537,b.JPEG"):  # tables of other things
        (tmp_path / "rows.txt").write_text(text)
        assert readable_names(WNIDS, [tmp_path], {}) == WNIDS
    (tmp_path / "rows.txt").unlink()
    (tmp_path / "words.txt").write_text("cat a cat\nn01443537 \x1b[31mred\n")
    assert readable_names(["cat", "n01443537"], [tmp_path], {}) == ["cat", "n01443537 \\x1b[31mred"]
    assert same_classes(WNIDS, NAMES) and same_classes(NAMES, WNIDS) and not same_classes(WNIDS[:2], NAMES)
    assert not same_classes(["cat"], ["cat big"]) and not same_classes(None, ["cat"])


def test_a_class_is_found_by_its_number_its_words_and_both(tmp_path: Path) -> None:
    dataset = Dataset("folder", device=CPU, image_folder=tiny(tmp_path))
    words = ["goldfish", "European_fire_salamander", "bullfrog"]
    for folders in (WNIDS, NAMES, words, ["n01443537_goldfish", *WNIDS[1:]]):
        assert class_numbers(folders, dataset, tmp_path) == [0, 1, 2]
    for word in ("n01641577", "bullfrog", "n01641577 bullfrog", "2"):
        assert class_number(word, dataset.class_names, "--class") == 2


# --- ImageNet's subsets -----------------------------------------------------------------------------------------------


def test_a_subset_of_imagenet_takes_its_classes_and_settings(tmp_path: Path, said: Callable[[], str]) -> None:
    only = DATASETS["imagenette"].only
    assert only is not None and len(only) == 10
    root = image_folder(tmp_path, dict.fromkeys([*only, *WNIDS], 1), shape=(12, 9, 3))
    (root / "test").rename(root / "val")
    dataset = Dataset("imagenette", device=CPU, image_folder=root)
    assert dataset.class_names == [f"{number} {words}" for number, words in sorted(only.items())]
    assert dataset.train.images.shape == (10, 3, 128, 128) and len(dataset.test) == 10
    assert dataset.statistics == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    said()
    (root / "train" / "n03888257").rename(root / "elsewhere")
    (root / "val" / "n03888257").rename(root / "elsewhere2")
    assert Dataset("imagenette", device=CPU, image_folder=root).classes == 9
    assert "has 9 of the 10 classes of imagenette" in said()
    with pytest.raises(UserError, match=r"has none of the class folders n02086240, .* and 5 more"):
        Dataset("imagewoof", device=CPU, image_folder=root)


def test_rows_that_need_a_folder_say_so_and_show_their_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("tinyimagenet", "imagenette", "imagewoof"):
        refused(condense.main, ["-d", name], name, "http", "--image_folder", status=2, unchanged=tmp_path)
        folders = ["a", "b"] if name == "tinyimagenet" else sorted(DATASETS[name].only or [])[:2]
        root = str(image_folder(tmp_path / name, dict.fromkeys(folders, 1)))
        assert condense.main(["-d", name, "--image_folder", root, "--dry_run", "--device", "cpu"]) == 0
        rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line.strip()}
        depth, factor = ("4", "1") if name == "tinyimagenet" else ("5", "3")
        assert rows["depth"] == ["depth", depth, "data", "set"] and rows["factor"][1] == factor
        reproduce = ["-d", name, "--image_folder", root, "--reproduce"]
        refused(condense.main, reproduce, "--reproduce", name, status=2, unchanged=tmp_path)
    many = image_folder(tmp_path / "many", {f"{c:03}": 1 for c in range(201)})
    with pytest.raises(UsageError, match="has 201 classes, but tinyimagenet has 200; use -d folder"):
        Dataset("tinyimagenet", device=CPU, image_folder=many)


def test_tiny_imagenet_goes_through_both_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = str(tiny(tmp_path / "tiny-imagenet-200"))
    argv = quick(tmp_path / "r", "-d", "tinyimagenet", "--image_folder", root, "--width", "4", "--batch_real", "2")
    assert condense.main(argv) == 0
    (run,) = (tmp_path / "r" / "tinyimagenet").iterdir()
    card = json.loads((run / "data.json").read_text())
    assert card["class_names"] == NAMES
    assert train.main([str(run), "--export", str(tmp_path / "exported"), "--device", "cpu"]) == 0
    folders = sorted(path.name for path in (tmp_path / "exported").iterdir() if path.is_dir())
    assert folders == [name.replace(" ", "_") for name in NAMES]
    (Path(root) / "words.txt").unlink()  # a set's names are those of its day
    few = ["--device", "cpu", "--repeat", "1", "--baselines", "none", "--json"]
    assert train.main([str(run), *few]) == 0
    assert last_json(capsys)["accuracy_mean"] == card["accuracy"]["accuracy_mean"]


# --- Arrays of a .npz file --------------------------------------------------------------------------------------------


def arrays(*, grey: bool = True, val: bool = True) -> dict[str, Any]:
    """In the layout of MedMNIST."""
    content: dict[str, Any] = {}
    for seed, (split, count) in enumerate((("train", 9), ("val", 3), ("test", 6))):
        if val or split != "val":
            content[f"{split}_images"] = noise(count, 8, 8, *([] if grey else [3]), seed=seed)
            content[f"{split}_labels"] = np.arange(count, dtype=np.uint8)[:, None] % 3
    return content


def arrays_set(path: Path, content: Mapping[str, Any], **more: Any) -> Dataset:
    np.savez(path / "x.npz", **content)
    return Dataset("npz", device=CPU, npz=path / "x.npz", **more)


@pytest.mark.parametrize("grey", [True, False])
def test_arrays_are_read_by_the_names_of_medmnist_and_keras(
    grey: bool, tmp_path: Path, said: Callable[[], str]
) -> None:
    content = arrays(grey=grey)
    dataset = arrays_set(tmp_path, content)
    assert "test is tested on; val is not used" in said()
    assert (dataset.classes, dataset.channels, dataset.side, dataset.counts) == (3, 1 if grey else 3, 8, [3, 3, 3])
    assert dataset.class_names == ["0", "1", "2"]
    images = torch.from_numpy(content["train_images"])
    expected = images[:, None] if grey else images.permute(0, 3, 1, 2)
    assert torch.equal(dataset.train.images, expected[[0, 3, 6, 1, 4, 7, 2, 5, 8]])  # by class
    mean = expected.double().div(255).mean((0, 2, 3)).tolist()
    assert dataset.statistics[0] == pytest.approx(mean)
    keras = {
        f"{kind}_{split}": content[f"{split}_{name}"]
        for split in ("train", "test")
        for kind, name in (("x", "images"), ("y", "labels"))
    }
    for same in (
        keras,
        {name: np.eye(3)[array[:, 0]] if name[0] == "y" else array for name, array in keras.items()},
        {name: array.astype(np.float32) / 255 if name[0] == "x" else array for name, array in keras.items()},
    ):
        again = arrays_set(tmp_path, same)
        assert torch.equal(again.train.images, dataset.train.images)
        assert torch.equal(again.test.images, dataset.test.images) and again.test.counts == [2, 2, 2]


def test_arrays_without_test_images_take_val_or_a_split(tmp_path: Path, said: Callable[[], str]) -> None:
    content = {name: array for name, array in arrays().items() if not name.startswith("test")}
    assert len(arrays_set(tmp_path, content).test) == 3
    assert "val is tested on" in said()
    alone = {"images": noise(9, 8, 8), "labels": np.arange(9) % 3 + 5}
    with pytest.raises(UserError, match=r"--npz .*has no test images; .*--split 0\.2"):
        arrays_set(tmp_path, alone)
    dataset = arrays_set(tmp_path, alone, split=0.3)
    assert (dataset.counts, dataset.test.counts, dataset.class_names) == ([2, 2, 2], [1, 1, 1], ["5", "6", "7"])
    assert sorted(torch.cat([dataset.train.images, dataset.test.images]).flatten(1).tolist()) == sorted(
        torch.from_numpy(alone["images"]).flatten(1).tolist()
    )
    with pytest.raises(UsageError, match=r"--split 0\.3: .* has test images; leave --split out"):
        arrays_set(tmp_path, arrays(), split=0.3)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"train_images": noise(9, 64)}, r"shape \(9, 64\); expected \(N, H, W\)"),
        ({"train_images": noise(9, 8, 8, 8)}, r"shape \(9, 8, 8, 8\)"),
        ({"train_labels": np.arange(8)}, "8 labels for 9 images"),
        ({"train_labels": np.ones((9, 2))}, r"labels of shape \(9, 2\)"),
        ({"train_labels": np.full(9, 0.5)}, "no whole numbers"),
        ({"train_labels": np.full(9, np.inf)}, "no whole numbers"),
        ({"train_labels": np.array(1)}, r"labels of shape \(\)"),
        ({"train_images": np.array(1)}, r"shape \(\)"),
        ({"train_labels": np.zeros(9)}, "two classes or more, has 1"),
        ({"test_labels": np.full(6, 7)}, "labels that no training image has"),
        ({"train_images": -noise(9, 8, 8).astype(float)}, "pixels range from -255"),
        ({"train_images": np.full((9, 8, 8), np.nan)}, "pixels range from nan"),
        ({"test_images": noise(0, 8, 8), "test_labels": np.arange(0)}, "none"),
    ],
)
def test_arrays_that_are_no_labelled_images_are_refused(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"--npz {tmp_path / 'x.npz'}: .*{says}"):
        arrays_set(tmp_path, {**arrays(), **change})


def test_arrays_are_resized_and_stretched(tmp_path: Path, said: Callable[[], str]) -> None:
    content = {**arrays(val=False), "train_images": noise(9, 12, 8), "test_images": noise(6, 12, 8)}
    with pytest.raises(UsageError, match=r"images are 8 x 12; give --size PIXELS"):
        arrays_set(tmp_path, content)
    square = torch.from_numpy(content["train_images"])[:, None, 2:10]
    assert torch.equal(arrays_set(tmp_path, content, size=8).train.images[0], square[0])
    assert arrays_set(tmp_path, content, size=16).test.images.shape == (6, 1, 16, 16)
    deep = {n: a.astype(np.uint16) * 16 if "images" in n else a for n, a in arrays(val=False).items()}
    deep["train_images"][0, 0, 0] = 4080
    said()
    found = arrays_set(tmp_path, deep)
    assert "pixels from 0 to 4080 are taken as 0 to 255" in said()
    assert torch.equal(found.test.images[0, 0], torch.from_numpy(arrays()["test_images"][0]))


def test_arrays_go_through_both_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "pneumonia.npz", **arrays())
    assert condense.main(quick(tmp_path / "r", "--npz", str(tmp_path / "pneumonia.npz"), "--batch_real", "2")) == 0
    (run,) = (tmp_path / "r" / "npz").iterdir()
    card = json.loads((run / "data.json").read_text())
    assert (card["npz"], card["image_folder"]) == (str(tmp_path / "pneumonia.npz"), None)
    assert "pneumonia, distilled" in card["about"]
    few = ["--device", "cpu", "--repeat", "1", "--baselines", "none"]
    assert train.main([str(run), *few, "--json"]) == 0
    assert last_json(capsys)["accuracy_mean"] == card["accuracy"]["accuracy_mean"]
    moved = (tmp_path / "pneumonia.npz").rename(tmp_path / "moved.npz")
    refused(train.main, [str(run), *few], str(tmp_path / "pneumonia.npz"), status=1, unchanged=tmp_path)
    assert train.main([str(run), *few, "--npz", str(moved)]) == 0
    both = ["--npz", str(moved), "--image_folder", "x"]
    refused(condense.main, both, "--npz", "--image_folder", status=2, unchanged=tmp_path)
    refused(condense.main, ["-d", "npz"], "-d npz", "--npz FILE", status=2, unchanged=tmp_path)


def test_arrays_read_as_mnist_take_its_normalisation(tmp_path: Path) -> None:
    test, labels = noise(10, 28, 28), np.arange(20) % 10
    np.savez(tmp_path / "mnist.npz", x_train=noise(20, 28, 28), y_train=labels, x_test=test, y_test=labels[:10])
    dataset = Dataset("mnist", device=CPU, npz=tmp_path / "mnist.npz")
    assert dataset.statistics == ((0.1307,), (0.3081,)) and not dataset.flip
    assert dataset.train.images.shape == (20, 1, 28, 28)
    assert Dataset("cifar10", device=CPU, npz=tmp_path / "mnist.npz").test.images.shape == (10, 3, 32, 32)
