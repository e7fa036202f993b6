"""Several runs on one data folder that is still being filled: one downloads, the others wait, halves are mended."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision

from data import Dataset
from tests.archives import write_cifar10_archive, write_mnist, write_svhn
from tests.killing import Child, Ended, Server
from tests.tally import injected
from utils.system.report import messages

pytestmark = [pytest.mark.faults, pytest.mark.slow]

SOURCES: dict[str, tuple[str, Callable[..., object], tuple[str, ...]]] = {  # class, writer, and what the writer changes
    "mnist": ("MNIST", write_mnist, ("resources", "mirrors")),
    "svhn": ("SVHN", write_svhn, ("split_list",)),
    "cifar10": ("CIFAR10", write_cifar10_archive, ("train_list", "test_list", "meta", "tgz_md5", "url")),
}
NOWHERE = "http://127.0.0.1:9"  # where nobody serves
PAUSE = 0.5  # seconds, so that the others are there in time


# --- Processes that read a data set -----------------------------------------------------------------------------------


def digest(dataset: Dataset) -> str:
    """Of all images and labels."""
    tensors = [x for half in (dataset.train, dataset.test) for x in (half.images, half.labels)]
    return hashlib.sha256(b"".join(x.numpy().tobytes() for x in tensors)).hexdigest()


def read(argv: Sequence[str]) -> int:
    """The program of a reader: both halves of a data set, with other attributes of torchvision's class."""
    name, place, attributes = argv
    for attribute, value in json.loads(attributes).items():
        setattr(getattr(torchvision.datasets, SOURCES[name][0]), attribute, value)
    with messages():
        print("got", digest(Dataset(name, device=torch.device("cpu"), data_dir=place)))
    return 0


def reader(server: Server, name: str, place: Path | str, url: str = NOWHERE, **plan: Any) -> Child:
    """Start one. plan: see Plan; operations in its folder count."""
    argv = [name, str(place), json.dumps(attributes_of(name, url))]
    plan = {"root": str(place), "environment": {"no_proxy": "127.0.0.1"}, **plan}
    return server.start(argv, program="tests.faults.test_downloads:read", **plan)


def has_read(ended: Ended, expected: str) -> bool:
    return ended.status == 0 and ended.out.splitlines()[-1:] == [expected]


# --- What they read ---------------------------------------------------------------------------------------------------


class Publisher:
    """Serves the files of a folder, each after a pause, and counts what is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[str] = []

    @contextmanager
    def open(self, *, pause: float) -> Iterator[str]:
        publisher = self

        class Handler(SimpleHTTPRequestHandler):
            def translate_path(self, path: str) -> str:
                publisher.asked.append(name := path.rpartition("/")[2])
                time.sleep(pause)
                return str(next(publisher.folder.rglob(name)))

            def copyfile(self, *files: Any) -> None:
                with suppress(OSError):  # of somebody who was killed
                    super().copyfile(*files)

            def log_message(self, *about: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()
            server.server_close()


def published(name: str, tmp_path: Path, patch: pytest.MonkeyPatch) -> tuple[Publisher, str]:
    """A small data set of that name, unpacked, and what a process says that reads it where nothing happens."""
    folder = tmp_path / "publisher"
    folder.mkdir()
    SOURCES[name][1](folder, patch)
    return Publisher(folder), f"got {digest(Dataset(name, device=torch.device('cpu'), data_dir=folder))}"


def attributes_of(name: str, url: str) -> dict[str, Any]:
    """Of torchvision's class: where it downloads from, and the checksums that it expects."""
    kind, _, changed = SOURCES[name]
    found = {attribute: getattr(getattr(torchvision.datasets, kind), attribute) for attribute in changed}
    if name == "mnist":
        found["mirrors"] = [f"{url}/"]
    elif name == "svhn":
        found["split_list"] = {split: [f"{url}/{v[1]}", *v[1:]] for split, v in found["split_list"].items()}
    else:
        found["url"] = f"{url}/cifar-10-python.tar.gz"
    return found


def visible(files: dict[str, str]) -> dict[str, str]:
    return {file: digest for file, digest in files.items() if not Path(file).name.startswith(".")}


def content(place: Path) -> dict[str, str]:
    return {str(p.relative_to(place)): hashlib.md5(p.read_bytes()).hexdigest() for p in place.rglob("*") if p.is_file()}


# --- Tests ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOURCES)
def test_one_downloads_others_wait(name: str, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publisher, expected = published(name, tmp_path, monkeypatch)
    place = tmp_path / "daten sätze"
    with injected("data folder that is still downloading", times=4), publisher.open(pause=PAUSE) as url:
        ended = [child.wait() for child in [reader(server, name, place, url) for _ in range(4)]]
        assert all(has_read(one, expected) for one in ended), ended
        assert sum("waiting for process" in one.out for one in ended) >= 1
        downloads = sum(one.out.count("is not ready") for one in ended)
        assert downloads == (2 if name == "svhn" else 1)  # of those who waited nobody unpacks or looks again
        # torchvision asks twice for a file: where it is, and for its content.
        assert {publisher.asked.count(file) for file in publisher.asked} == {2}, publisher.asked
        assert content(place) == content(publisher.folder)


def survive_kills(
    name: str, server: Server, folder: Path, prepare: Callable[[Path], object], url: str, whole: dict[str, str]
) -> set[str]:
    """Kill a reader at each file operation there is; a later one must end with these files. Returns the halves seen."""
    record, halves = folder / "operations", set()
    prepare(folder / "first")
    first = reader(server, name, folder / "first", url, record=str(record)).wait()
    assert first.status == 0, first
    for at, operation in enumerate(record.read_text().splitlines()):
        place = folder / str(at)
        prepare(place)
        then = "halfway" if operation.startswith("write") else "kill"
        with injected(f"kill -9 while {name} is downloaded or unpacked") as fault:
            killed = reader(server, name, place, url, at=at, then=then).wait()
            assert killed.status == -signal.SIGKILL, (operation, killed)
            found = visible(content(place))
            halves |= {file for file in found if found[file] != whole[file]}
            fault.kept(has_read(reader(server, name, place, url).wait(), first.out.splitlines()[-1]))
            left = content(place)  # where nothing is missing nothing is written, nor is a hidden file removed
            assert (visible(left) if found == whole else left) == whole, operation
    return halves


@pytest.mark.parametrize("name", SOURCES)
def test_a_killed_download_is_redone(
    name: str, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher, _ = published(name, tmp_path, monkeypatch)
    whole = content(publisher.folder)
    with publisher.open(pause=0) as url:
        halves = survive_kills(name, server, tmp_path, lambda place: None, url, whole)
    assert halves >= {file for file in whole if file.endswith((".gz", ".mat", "ubyte"))}


def test_a_killed_unpacking_is_made_again(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of archives that are there, over what an earlier unpacking left."""
    publisher, _ = published("mnist", tmp_path, monkeypatch)

    def prepare(place: Path) -> None:
        shutil.copytree(publisher.folder, place)
        os.truncate(place / "MNIST" / "raw" / "train-images-idx3-ubyte", 1000)

    survive_kills("mnist", server, tmp_path, prepare, NOWHERE, content(publisher.folder))


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("mnist", "MNIST/raw/train-images-idx3-ubyte.gz"),
        ("mnist", "MNIST/raw/train-images-idx3-ubyte"),
        ("svhn", "train_32x32.mat"),
        ("cifar10", "cifar-10-python.tar.gz"),
    ],
)
def test_those_who_wait_for_a_run_that_is_killed_go_on_and_finish(
    name: str, file: str, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher, expected = published(name, tmp_path, monkeypatch)
    record, place = tmp_path / "operations", tmp_path / "data"
    with publisher.open(pause=PAUSE) as url, injected("kill -9 of a download that others wait for") as fault:
        reader(server, name, tmp_path / "first", url, record=str(record)).wait()
        at = record.read_text().splitlines().index(f"write {file}")
        killed = reader(server, name, place, url, at=at, then="SIGSTOP")
        killed.until_paused()
        others = [reader(server, name, place, url) for _ in range(2)]
        time.sleep(5)  # they look, and wait
        killed.send(signal.SIGKILL)
        assert killed.wait().status == -signal.SIGKILL
        for other in [child.wait() for child in others]:
            assert "waiting for process" in other.out, other
            fault.kept(has_read(other, expected))
        assert content(place) == content(publisher.folder)


def test_unpacked_files_cut_short_are_mended(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision asks no more of MNIST's unpacked files than that they exist."""
    publisher, expected = published("mnist", tmp_path, monkeypatch)
    place, before = publisher.folder, content(publisher.folder)
    for name, keep in (("train-images-idx3-ubyte", 0.5), ("train-labels-idx1-ubyte", 0)):
        with injected("unpacked file cut short") as fault:
            file = place / "MNIST" / "raw" / name
            os.truncate(file, int(keep * file.stat().st_size))
            for child in [reader(server, "mnist", place) for _ in range(2)]:
                fault.kept(has_read(child.wait(), expected))
            assert content(place) == before


@pytest.mark.parametrize("name", SOURCES)
def test_read_only_data_folder_is_read(
    name: str, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher, expected = published(name, tmp_path, monkeypatch)
    place, link = publisher.folder, tmp_path / "link"
    link.symlink_to(place)
    before = content(place)
    names = [str(place), str(link), place.name]
    folders = [place, *(p for p in place.rglob("*") if p.is_dir())]
    with injected("read-only data folder", times=len(names)):
        for folder in folders:
            folder.chmod(0o555)
        try:
            children = [reader(server, name, where, cwd=str(tmp_path), plain_user=True) for where in names]
            assert [child.wait() for child in children] == [Ended(0, f"{expected}\n", "")] * len(names)
            assert content(place) == before
        finally:
            for folder in folders:
                folder.chmod(0o755)
