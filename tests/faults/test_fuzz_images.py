"""Folders of images as strangers hand them over: read as they are meant, or refused in one line; nothing else."""

from __future__ import annotations

import faulthandler
import os
import shutil
import socket
import struct
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

import condense
import train
from data import Dataset
from tests.faults import hostile
from tests.faults.encodings import KINDS, OTHERS, UNREADABLE, Size, checked, chunk, encoded, picture, png, tiff
from tests.faults.fuzz import Property, both, in_one_line, little_memory
from tests.files import image_folder, noise, quick, save
from utils.files import imagefiles
from utils.files.imagefiles import EXTENSIONS, MAX_PIXELS, mode_and_size, read_image
from utils.files.imagefolder import Folder
from utils.runs import formats
from utils.system.errors import UserError, printable

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]
FEW_PIXELS = 2**20  # allowed while fuzzing, so that a little too much memory shows
PLENTY = 200e6  # bytes that reading such images must never take


# --- What must hold ---------------------------------------------------------------------------------------------------


def images_or_refusal(root: Path, size: int | None, *, meanwhile: Callable[[], object] = bool) -> int | None:
    """How many training images a folder has; None if it is refused. Asserts everything else.

    meanwhile: what happens between the look at all headers and the reading.
    """
    began = time.monotonic()
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        try:
            dataset = Dataset("folder", device=CPU, image_folder=root, size=size, threads=2)
            meanwhile()
            found = dataset.train.images
        except UserError as error:
            in_one_line(error, printable(str(root)))
            return None
        finally:
            assert not shown, [str(warning.message) for warning in shown]
            assert time.monotonic() - began < 20
    assert found.dtype == torch.uint8
    assert tuple(found.shape[1:]) == (dataset.channels, dataset.side, dataset.side)
    assert size in (None, dataset.side) and dataset.channels in (1, 3) and len(found) == sum(dataset.train.counts)
    return len(found)


def set_or_refusal(folder: Path) -> None:
    """The same for class folders that are a distilled set."""
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        try:
            stored = formats.read(folder)
        except UserError as error:
            in_one_line(error, str(folder))
            return
    assert not shown
    assert stored.images.dtype == torch.uint8 and stored.images.shape[2] == stored.images.shape[3]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder; images of few pixels are large, and a thread that hangs ends everything, as it cannot be ended."""
    monkeypatch.setattr(imagefiles, "MAX_PIXELS", FEW_PIXELS)
    faulthandler.dump_traceback_later(300, exit=True)
    with little_memory(PLENTY):
        yield tmp_path
    faulthandler.cancel_dump_traceback_later()


# --- Files ------------------------------------------------------------------------------------------------------------

SIZES: list[Size] = [(8, 8), (8, 8), (16, 16), (8, 12), (12, 8), (3, 3), (1, 1), (1, 600), (600, 1)]
# Most of them in the header.
WOUNDS = st.tuples(st.sampled_from(hostile.WOUNDS), st.floats(0, 1).map(lambda x: 0.99 * x**2), st.integers(0, 2**16))


BYTES = st.one_of(
    st.builds(
        lambda kind, size, orientation, wounds, mended: (checked if mended else bytes)(
            hostile.damaged(encoded(kind, size, orientation), wounds)
        ),
        st.sampled_from([*KINDS]),
        st.sampled_from(SIZES),
        st.none() | st.integers(1, 8),
        st.lists(WOUNDS, max_size=3),
        st.booleans(),
    ),
    st.builds(encoded, st.sampled_from([*OTHERS])),
    st.sampled_from([b"", b"text in place of an image\n", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF89a", b"BM"]),
    st.binary(max_size=200),
)
STEMS = st.one_of(
    st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=20),
    st.binary(min_size=1, max_size=12).map(lambda raw: os.fsdecode(raw.translate(None, b"/\0") or b"\xff")),
    st.sampled_from(
        ["x", "a b", "line\nbreak", "tab\there", "\x1b[31mred", "\r", "\u202e", "é", "画像", "-", "x" * 240]
    ),
)
NAMES = st.builds(
    lambda stem, ending: os.fsdecode(os.fsencode(stem)[:240]) + ending,
    STEMS,
    st.sampled_from([*EXTENSIONS, ".PNG", ".JpG", "", ".gif", ".txt"]),
).filter(lambda name: name not in (".", ".."))


@dataclass(frozen=True)
class Odd:
    """A file among sound ones."""

    content: bytes
    name: str
    size: int | None
    grey: bool  # whether the sound ones are


def check_file(folder: Path, odd: Odd) -> None:
    root = folder / ("grey" if odd.grey else "colour")
    if not root.exists():
        image_folder(root, {"a": 1, "b": 1}, shape=(8, 8) if odd.grey else (8, 8, 3))
    file = root / "train" / "a" / odd.name
    existed = file.exists()
    file.write_bytes(odd.content)
    try:
        counts = not odd.name.startswith(".") and odd.name.lower().endswith(EXTENSIONS)
        assert images_or_refusal(root, odd.size) in (None, 2 + (counts and not existed))
        set_or_refusal(root / "train")
    finally:
        file.unlink()
        if existed:
            shutil.rmtree(root)


# --- Trees ------------------------------------------------------------------------------------------------------------

IMAGE = encoded("PNG RGB")


def make_socket(path: Path) -> None:
    here = os.open(path.parent, os.O_RDONLY)  # the names of sockets are short
    try:
        with socket.socket(socket.AF_UNIX) as found:
            found.bind(f"/proc/self/fd/{here}/{path.name[:20]}")
        os.rename(path.with_name(path.name[:20]), path)
    finally:
        os.close(here)


NODES: dict[str, Callable[[Path], object]] = {
    "an image": lambda path: path.write_bytes(IMAGE),
    "an empty file": lambda path: path.touch(),
    "an unreadable file": lambda path: path.touch(mode=0),
    "a folder": lambda path: path.mkdir(),
    "a folder with an image": lambda path: save(path / "0.png", noise(8, 8)),
    "a pipe": os.mkfifo,
    "a socket": make_socket,
    "a link to an image": lambda path: path.symlink_to(path.parents[1] / "b" / "0.png"),
    "a link to nowhere": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to its folder": lambda path: path.symlink_to("."),
    "a link to the folder above": lambda path: path.symlink_to(".."),
    "a link to everything": lambda path: path.symlink_to(path.parents[2]),
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
}
PLACES = [
    "", "train", "test", "train/a", "train/a", "train/b", "test/a", "test/b", "train/a/deeper", "train/new", "test/new",
]  # fmt: skip


@dataclass(frozen=True)
class Tree:
    """Things below a folder of two classes, and what becomes of an image between looking and reading."""

    nodes: list[tuple[str, str, str]]  # place, name, what
    size: int | None
    meanwhile: str | None


def check_tree(folder: Path, tree: Tree) -> None:
    root = folder / "tree"
    for split in ("train", "test"):
        for name in ("a", "b"):
            (root / split / name).mkdir(parents=True)
            (root / split / name / "0.png").write_bytes(IMAGE)
    try:
        for place, name, what in tree.nodes:
            (root / place).mkdir(parents=True, exist_ok=True)
            if not os.path.lexists(root / place / name):
                NODES[what](root / place / name)

        def meanwhile() -> None:
            if tree.meanwhile is not None:
                victim = root / "train" / "a" / "0.png"
                if not victim.is_symlink() and victim.is_file():
                    victim.unlink()
                    NODES[tree.meanwhile](victim)

        images_or_refusal(root, tree.size, meanwhile=meanwhile)
        set_or_refusal(root / "train")
    finally:
        shutil.rmtree(root)


SIDES = st.sampled_from([None, 8, 9, 32])
PROPERTIES = {
    "a file": Property(check_file, st.builds(Odd, BYTES, NAMES, SIDES, st.booleans()), few=70, many=2500),
    "a tree": Property(
        check_tree,
        st.builds(
            Tree,
            st.lists(st.tuples(st.sampled_from(PLACES), NAMES, st.sampled_from([*NODES])), max_size=4),
            SIDES,
            st.none() | st.sampled_from([*NODES]),
        ),
        few=40,
        many=1000,
    ),
}


test_whatever_an_image_folder_holds_it_is_read_or_refused, test_whatever_many_image_folders_hold = both(
    PROPERTIES, "images or folders of images by a stranger"
)


# --- What is read -----------------------------------------------------------------------------------------------------

LOSSY = ("JPEG", "MPO", "WEBP")


def as_rgb(image: Image.Image) -> Tensor:
    """(3, H, W), without transparency."""
    return torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in UNREADABLE])
def test_the_first_picture_of_every_kind_of_file_is_read_as_it_is_meant(kind: str, tmp_path: Path) -> None:
    format, mode, settings = KINDS[kind]
    file = tmp_path / "x.png"
    file.write_bytes(encoded(kind, (24, 16)))
    meant = as_rgb(picture("L" if mode in ("I;16", "I") else mode, (24, 16)))
    found = read_image(str(file), channels=3)
    assert found.dtype == torch.uint8 and found.shape == (3, 16, 24)
    if format in LOSSY or "jpeg" in settings.values():
        assert (found.float().mean((1, 2)) - meant.float().mean((1, 2))).abs().max() < 20
    else:
        assert torch.equal(found, meant)
    assert read_image(str(file), channels=1).shape == (1, 16, 24)


@pytest.mark.parametrize("kind", [*sorted(UNREADABLE), *OTHERS])
def test_files_of_other_kinds_and_without_a_known_range_are_refused(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "x.png"
    file.write_bytes(encoded(kind))
    for read in (mode_and_size, lambda path: read_image(path, channels=1)):
        with pytest.raises(UserError, match=r"x\.png: cannot be read as an image"):
            read(str(file))


@pytest.mark.parametrize("kind", ["PNG L", "PNG RGB", "PNG I;16", "TIFF RGB", "TIFF deflated", "WEBP RGBA"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_as_its_exif_data_say(orientation: int, kind: str, tmp_path: Path) -> None:
    file, straight = tmp_path / "x.png", tmp_path / "straight.png"
    file.write_bytes(encoded(kind, (24, 16), orientation))
    straight.write_bytes(encoded(kind, (24, 16)))
    stored = read_image(str(straight), channels=1)
    rows_and_columns = {
        1: stored, 2: stored.flip(2), 3: stored.flip(1, 2), 4: stored.flip(1),
        5: stored.mT, 6: stored.flip(1).mT, 7: stored.flip(1, 2).mT, 8: stored.flip(2).mT,
    }  # fmt: skip
    assert torch.equal(read_image(str(file), channels=1), rows_and_columns[orientation])


@pytest.mark.parametrize("size", [None, 8, 20])
def test_an_image_that_exif_turns_is_cropped_after_it_is_turned(size: int | None, tmp_path: Path) -> None:
    root = image_folder(tmp_path / "photos", {"a": 1, "b": 1}, shape=(24, 16, 3))
    file = root / "train" / "a" / "0.png"
    file.write_bytes(encoded("PNG RGB", (16, 24), 6))
    if size is None:  # 16 x 24 like the others, as it is stored
        assert images_or_refusal(root, None) is None
        return
    found = Dataset("folder", device=CPU, image_folder=root, size=size).train.images[0]
    file.write_bytes(encoded("PNG RGB", (16, 24)))
    straight = Dataset("folder", device=CPU, image_folder=root, size=size).train.images[0]
    assert (found.int() - straight.flip(1).mT.int()).abs().max() <= 1  # rounded along one side first


def test_broken_exif_data_are_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "x.jpg"
    broken = b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01\x03\0\xff\xff\xff\xff\x06\0\0\0"
    Image.fromarray(noise(8, 8, 3)).save(file, exif=broken)
    image_folder(tmp_path / "photos", {"a": 1, "b": 1})
    shutil.copy(file, tmp_path / "photos" / "train" / "a" / "x.jpg")
    assert images_or_refusal(tmp_path / "photos", None) == 3


# --- What would take all memory or all time ---------------------------------------------------------------------------


def sound(tmp_path: Path, **more: bytes) -> Path:
    """A folder of two classes, and these files among the first class's images."""
    root = image_folder(tmp_path / "photos", {"a": 1, "b": 1})
    for name, content in more.items():
        (root / "train" / "a" / f"{name}.png").write_bytes(content)
    return root


ZEROS = zlib.compress(bytes(50 * 2**20))
BOMBS: dict[str, tuple[bytes, str]] = {
    "60,000 x 60,000": (png((60000, 60000)), "89 million pixels"),
    "more than Pillow warns of": (png((12000, 12000)), "89 million pixels"),
    "a side of 2 billion": (png((2**31 - 1, 1)), "89 million pixels"),
    "a tile of 2 GB": (tiff((8, 8), (30000, 60000), zlib.compress(bytes(10**6))), "89 million pixels"),
    "a compressed text": (png((8, 8), rows=bytes(72), between=[chunk(b"zTXt", b"x\0\0" + ZEROS)]), "too large"),
    "a compressed international text": (
        png((8, 8), rows=bytes(72), between=[chunk(b"iTXt", b"x\0\1\0\0\0" + ZEROS)]), "too large",
    ),
    "a compressed colour profile": (
        png((8, 8), rows=bytes(72), between=[chunk(b"iCCP", b"x\0\0" + ZEROS)]), "too large",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BOMBS)
def test_a_small_file_that_claims_much_costs_little_and_is_named(what: str, tmp_path: Path) -> None:
    content, reason = BOMBS[what]
    root = sound(tmp_path, bomb=content)
    with little_memory(200e6), warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserError, match=rf"bomb\.png: cannot be read as an image \(.*{reason}"):
            _ = Dataset("folder", device=CPU, image_folder=root, size=8).train


def test_a_file_larger_than_any_image_is_not_read(tmp_path: Path) -> None:
    root = sound(tmp_path, large=png((8, 8))[:33] + struct.pack(">I", 2**31 - 1) + b"tEXt")
    os.truncate(root / "train" / "a" / "large.png", 2**31)
    with little_memory(200e6), pytest.raises(UserError, match=r"large\.png.*2\.1 GB in one file"):
        Dataset("folder", device=CPU, image_folder=root)


@pytest.mark.parametrize("size", [(1, 60000), (60000, 1)])
def test_a_strip_is_cropped_before_it_is_resized(size: Size, tmp_path: Path) -> None:
    root = sound(tmp_path, strip=encoded("PNG RGB", size))
    with little_memory(400e6):
        dataset = Dataset("folder", device=CPU, image_folder=root, size=512)
        assert dataset.train.images.shape == (3, 3, 512, 512)
    middle = as_rgb(picture("RGB", size)).flatten(1)[:, 29999:30001].float().mean(1)
    assert (dataset.train.images[1].float().mean((1, 2)) - middle).abs().max() <= 1


def test_large_images_are_decoded_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = sound(tmp_path, **{f"large{i}": png((64, 64), rows=bytes(64 * 65)) for i in range(6)})
    original, under_way, most = imagefiles._tensor, 0, 0

    def tensor(*words: Any) -> torch.Tensor:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        time.sleep(0.02)
        under_way -= 1
        return original(*words)

    monkeypatch.setattr(imagefiles, "_tensor", tensor)
    monkeypatch.setattr(imagefiles, "LARGE", 1)
    assert len(Dataset("folder", device=CPU, image_folder=root, size=8, threads=8).train) == 8
    assert most == 1


def test_an_image_of_as_many_pixels_as_are_allowed_is_read(tmp_path: Path) -> None:
    side = int(MAX_PIXELS**0.5)
    file = tmp_path / "x.png"
    row = bytes((side + 7) // 8 + 1)
    file.write_bytes(png((side, side), depth=1, rows=row * side))
    with little_memory(6 * side**2):
        assert read_image(str(file), channels=1, side=8).shape == (1, 8, 8)


def test_a_data_set_is_not_held_twice_while_it_is_read(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "photos", {"a": 1, "b": 1}, shape=(512, 512, 3))
    for i in range(1, 200):
        (root / "train" / "a" / f"{i}.png").symlink_to("0.png")
    with little_memory(1.7 * 201 * 3 * 512**2):
        assert len(Dataset("folder", device=CPU, image_folder=root, mean=[0.5] * 3, std=[0.5] * 3).train) == 201


# --- Links, pipes, names ----------------------------------------------------------------------------------------------


def test_links_are_followed_and_links_in_circles_add_no_image(tmp_path: Path) -> None:
    root = sound(tmp_path)
    for name, target in (("here", "."), ("up", ".."), ("top", "../.."), ("again", "here/up/a")):
        (root / "train" / "a" / name).symlink_to(target)
    assert images_or_refusal(root, None) == 2
    elsewhere = save(tmp_path / "elsewhere" / "0.png", noise(8, 8, 3)).parent
    (root / "train" / "a" / "more").symlink_to(elsewhere)
    (root / "train" / "a" / "x.png").symlink_to(elsewhere / "0.png")
    for split in ("train", "test"):
        (root / split / "c").symlink_to(elsewhere)
    dataset = Dataset("folder", device=CPU, image_folder=root)
    assert dataset.train.counts == [3, 1, 1] and dataset.class_names == ["a", "b", "c"]


def test_images_come_in_the_order_of_imagefolder(tmp_path: Path) -> None:
    from torchvision.datasets import ImageFolder

    root = tmp_path / "photos"
    names = ["b.png", "a/z.png", "a.png", "a-b/1.png", "a/b/2.PNG", "a/b.png", "A.png", "é.png", "a b/x.png"]
    for split in ("train", "test"):
        for c in ("1", "10", "2"):
            for i, name in enumerate(names):
                save(root / split / c / name, noise(8, 8, seed=i + int(c)))
    dataset = Dataset("folder", device=CPU, image_folder=root)
    theirs = ImageFolder(str(root / "train"))
    assert isinstance(dataset.source, Folder) and dataset.source.samples[True] == theirs.samples
    assert dataset.class_names == theirs.classes


@pytest.mark.parametrize("kind", ["a pipe", "a socket", "a link to a device", "a link to itself", "a link to nowhere"])
def test_what_is_no_file_is_named_and_not_waited_for(kind: str, place: Path) -> None:
    root = sound(place)
    NODES[kind](root / "test" / "b" / "x.png")
    with pytest.raises(UserError, match=r"x\.png: cannot be read as an image"):
        Dataset("folder", device=CPU, image_folder=root)


def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = sound(tmp_path)
    locked = root / "train" / "a" / "locked"
    locked.mkdir()
    scandir = os.scandir

    def forbidden(path: str) -> object:
        if Path(path) == locked:
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbidden)
    with pytest.raises(UserError, match=rf"{locked} \(Permission denied\)"):
        Dataset("folder", device=CPU, image_folder=root)


ODD_NAMES = ["line\nbreak", "tab\there", "\x1b[31mred", os.fsdecode(b"\xff\xfe"), " ", "画像", "-", "n" * 250]


def test_classes_may_have_any_name(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "\x1b[31m\nphotos", dict.fromkeys(ODD_NAMES, 1))
    dataset = Dataset("folder", device=CPU, image_folder=root)
    assert dataset.class_names == sorted(ODD_NAMES) and len(dataset.train) == len(ODD_NAMES)


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "n" * 300, "a/" * 3000])
def test_a_name_that_no_folder_can_have_is_refused(name: str, tmp_path: Path) -> None:
    assert images_or_refusal(tmp_path / name, None) is None


# --- Threads ----------------------------------------------------------------------------------------------------------


def test_the_number_of_threads_changes_nothing(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "photos", {"a": 30, "b": 20}, shape=(9, 12, 3))
    first, *others = [Dataset("folder", device=CPU, image_folder=root, size=8, threads=n) for n in (None, 1, 2, 16)]
    for other in others:
        assert torch.equal(first.train.images, other.train.images) and first.statistics == other.statistics
        assert torch.equal(first.test.images, other.test.images) and first.train.counts == other.train.counts
    for name in ("b/7.png", "a/12.png", "a/9.png"):
        (root / "train" / name).write_bytes(b"damaged")
    for threads in (None, 1, 2, 16):
        with pytest.raises(UserError, match=r"a/12\.png"):
            Dataset("folder", device=CPU, image_folder=root, size=8, threads=threads)


def test_the_number_of_threads_is_that_of_the_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int | None] = []
    pool = imagefiles.ThreadPoolExecutor

    def counted(threads: int | None) -> object:
        used.append(threads)
        return pool(threads)

    monkeypatch.setattr(imagefiles, "ThreadPoolExecutor", counted)
    root = image_folder(tmp_path / "photos", {"a": 4, "b": 4})
    flags = ["--image_folder", str(root), "--batch_real", "4"]
    assert condense.main(quick(tmp_path / "results", *flags, "--data_threads", "3")) == 0
    assert {*used} == {3}
    run = tmp_path / "results" / "folder" / "convnet2_f1_ipc1"
    assert train.main([str(run), "--baselines", "none", "--data_threads", "2"]) == 0
    assert {*used} == {3, 2}


def test_a_machine_without_threads_is_told_of_the_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    root = sound(tmp_path)
    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(UserError, match=r"can't start new thread.*--data_threads"):
        Dataset("folder", device=CPU, image_folder=root)
