"""Several runs on one data folder that is still being filled: one downloads, the others wait, halves are mended."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import torchvision

from data import Dataset
from tests import sabotage
from tests.archives import write_cifar10_archive, write_mnist, write_svhn
from tests.killing import drop_override
from tests.tally import injected
from utils.system.report import messages

pytestmark = [pytest.mark.faults, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
SOURCES: dict[str, tuple[str, Callable[..., object], tuple[str, ...]]] = {  # class, writer, and what the writer changes
    "mnist": ("MNIST", write_mnist, ("resources", "mirrors")),
    "svhn": ("SVHN", write_svhn, ("split_list",)),
    "cifar10": ("CIFAR10", write_cifar10_archive, ("train_list", "test_list", "meta", "tgz_md5", "url")),
}
NOWHERE = "http://127.0.0.1:9"  # where nobody serves
PAUSE = 0.2  # seconds
HANGS = 60  # seconds after which a process is given up


# --- Processes that read a data set -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reader:
    """A process that reads both halves of a data set.

    at, then: the file operation in the data folder at which it is killed, and how, as in tests/sabotage.py. record: a
    file for the names of these operations. plain_user: without root's right to write where permissions forbid it.
    """

    place: str
    at: int | None = None
    then: str = "halfway"
    record: str = ""
    plain_user: bool = False


@dataclass(frozen=True)
class Ended:
    status: int  # as in subprocess
    output: list[str]  # lines, of standard output and error


def digest(dataset: Dataset) -> str:
    """Of all images and labels."""
    tensors = [x for half in (dataset.train, dataset.test) for x in (half.images, half.labels)]
    return hashlib.sha256(b"".join(x.numpy().tobytes() for x in tensors)).hexdigest()


def read(name: str, reader: Reader, attributes: dict[str, Any], output: str) -> NoReturn:
    """In a process of its own, which this ends."""
    signal.alarm(HANGS)
    for stream in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    status = 1
    try:
        for attribute, value in attributes.items():
            setattr(getattr(torchvision.datasets, SOURCES[name][0]), attribute, value)
        if reader.plain_user:
            drop_override()
        if reader.at is not None or reader.record:
            sabotage.watch(reader.place, at=reader.at, then=reader.then, record=reader.record)
        with messages():
            print("got", digest(Dataset(name, device=torch.device("cpu"), data_dir=reader.place)))
        status = 0
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
    sys.stdout.flush()
    os._exit(status)


def serve() -> None:
    """Fork the readers of every line, together; one that is to be killed gets the lock before the others begin."""
    for line in sys.stdin:
        name, readers, attributes, folder, cwd = json.loads(line)
        os.chdir(cwd)
        children = []
        for i, reader in enumerate(Reader(**words) for words in readers):
            child = os.fork() or read(name, reader, attributes, f"{folder}/{i}")
            children.append(child)
            while reader.at is not None and not any(Path(reader.place).glob(".*.lock")):
                if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                    break
                time.sleep(0.005)
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]), flush=True)


class Readers:
    """Starts them, from a process that has imported everything."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "no_proxy": "127.0.0.1", "PYTHONPATH": str(ROOT)}
        self.server = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.test_downloads"], cwd=ROOT, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def read(self, name: str, readers: list[Reader], url: str = NOWHERE, *, cwd: Path = ROOT) -> list[Ended]:
        """Start all of them at once, and wait for them."""
        assert self.server.stdin is not None and self.server.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            words = [name, [asdict(reader) for reader in readers], attributes_of(name, url), folder, str(cwd)]
            self.server.stdin.write(json.dumps(words) + "\n")
            self.server.stdin.flush()
            statuses = json.loads(self.server.stdout.readline())
            outputs = [(Path(folder) / str(i)).read_text().splitlines() for i in range(len(readers))]
        return [Ended(status, output) for status, output in zip(statuses, outputs, strict=True)]


@pytest.fixture(scope="module")
def readers() -> Iterator[Readers]:
    found = Readers()
    with found.server:
        yield found
        found.server.stdin.close()  # type: ignore[union-attr]


# --- What they read ---------------------------------------------------------------------------------------------------


class Publisher:
    """Serves the files of a folder, each after a pause, and counts what is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[str] = []

    @contextmanager
    def open(self, *, pause: float) -> Iterator[str]:
        publisher = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name = self.path.rpartition("/")[2]
                publisher.asked.append(name)
                content = next(publisher.folder.rglob(name)).read_bytes()
                time.sleep(pause)
                with suppress(OSError):  # of somebody who was killed
                    self.send_response(200)
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)

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


def published(name: str, tmp_path: Path, patch: pytest.MonkeyPatch) -> tuple[Publisher, list[str]]:
    """A small data set of that name, unpacked, and what a process says that reads it where nothing happens."""
    folder = tmp_path / "publisher"
    folder.mkdir()
    SOURCES[name][1](folder, patch)
    return Publisher(folder), [f"got {digest(Dataset(name, device=torch.device('cpu'), data_dir=folder))}"]


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


def waited(reader: Ended) -> bool:
    return any("waiting for process" in line for line in reader.output)


def visible(files: dict[str, str]) -> dict[str, str]:
    return {file: digest for file, digest in files.items() if not Path(file).name.startswith(".")}


def content(place: Path) -> dict[str, str]:
    return {str(p.relative_to(place)): hashlib.md5(p.read_bytes()).hexdigest() for p in place.rglob("*") if p.is_file()}


# --- Tests ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOURCES)
def test_of_several_runs_one_downloads_and_the_others_wait(
    name: str, readers: Readers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher, expected = published(name, tmp_path, monkeypatch)
    place = tmp_path / "daten sätze"
    with injected("data folder that is still downloading", times=4), publisher.open(pause=PAUSE) as url:
        ended = readers.read(name, [Reader(str(place))] * 4, url)
        assert [(one.status, one.output[-1:]) for one in ended] == [(0, expected)] * 4, ended
        assert sum(waited(one) for one in ended) >= 3
        downloads = sum("is not ready" in line for one in ended for line in one.output)
        assert downloads == (2 if name == "svhn" else 1)  # of those who waited nobody unpacks or looks again
        # torchvision asks twice for a file: where it is, and for its content.
        assert {publisher.asked.count(file) for file in publisher.asked} == {2}, publisher.asked
        assert content(place) == content(publisher.folder)


def survive_kills(
    name: str, readers: Readers, folder: Path, prepare: Callable[[Path], object], url: str, whole: dict[str, str]
) -> set[str]:
    """Kill a reader at each file operation there is; a later one must end with these files. Returns the halves seen."""
    record, halves = folder / "operations", set()
    prepare(folder / "first")
    (first,) = readers.read(name, [Reader(str(folder / "first"), record=str(record))], url)
    assert first.status == 0, first
    for at, operation in enumerate(record.read_text().splitlines()):
        place = folder / str(at)
        prepare(place)
        then = "halfway" if operation.startswith("write") else "kill"
        with injected(f"kill -9 while {name} is downloaded or unpacked") as fault:
            (killed,) = readers.read(name, [Reader(str(place), at=at, then=then)], url)
            assert killed.status == -signal.SIGKILL, (operation, killed)
            found = visible(content(place))
            halves |= {file for file in found if found[file] != whole[file]}
            (later,) = readers.read(name, [Reader(str(place))], url)
            fault.kept((later.status, later.output[-1:]) == (0, first.output[-1:]))
            left = content(place)  # where nothing is missing nothing is written, nor is a hidden file removed
            assert (visible(left) if found == whole else left) == whole, operation
    return halves


@pytest.mark.parametrize("name", SOURCES)
def test_a_download_that_is_killed_anywhere_is_made_again(
    name: str, readers: Readers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher, _ = published(name, tmp_path, monkeypatch)
    whole = content(publisher.folder)
    with publisher.open(pause=0) as url:
        halves = survive_kills(name, readers, tmp_path, lambda place: None, url, whole)
    assert halves >= {file for file in whole if file.endswith((".gz", ".mat", "ubyte"))}


def test_an_unpacking_that_is_killed_anywhere_is_made_again(
    readers: Readers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of archives that are there, over what an earlier unpacking left."""
    publisher, _ = published("mnist", tmp_path, monkeypatch)

    def prepare(place: Path) -> None:
        shutil.copytree(publisher.folder, place)
        os.truncate(place / "MNIST" / "raw" / "train-images-idx3-ubyte", 1000)

    survive_kills("mnist", readers, tmp_path, prepare, NOWHERE, content(publisher.folder))


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
    name: str, file: str, readers: Readers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher, expected = published(name, tmp_path, monkeypatch)
    record, place = tmp_path / "operations", tmp_path / "data"
    with publisher.open(pause=PAUSE) as url, injected("kill -9 of a download that others wait for") as fault:
        readers.read(name, [Reader(str(tmp_path / "first"), record=str(record))], url)
        at = record.read_text().splitlines().index(f"write {file}")
        killed, *others = readers.read(name, [Reader(str(place), at=at), *[Reader(str(place))] * 2], url)
        assert killed.status == -signal.SIGKILL
        for other in others:
            assert waited(other), other
            fault.kept((other.status, other.output[-1:]) == (0, expected))
        assert content(place) == content(publisher.folder)


def test_unpacked_files_that_were_cut_short_are_mended(
    readers: Readers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchvision asks no more of MNIST's unpacked files than that they exist."""
    publisher, expected = published("mnist", tmp_path, monkeypatch)
    place, before = publisher.folder, content(publisher.folder)
    for name, keep in (("train-images-idx3-ubyte", 0.5), ("train-labels-idx1-ubyte", 0)):
        with injected("unpacked file cut short") as fault:
            file = place / "MNIST" / "raw" / name
            os.truncate(file, int(keep * file.stat().st_size))
            for one in readers.read("mnist", [Reader(str(place))] * 2):
                fault.kept((one.status, one.output[-1:]) == (0, expected))
            assert content(place) == before


@pytest.mark.parametrize("name", SOURCES)
def test_a_read_only_data_folder_is_read_under_any_of_its_names(
    name: str, readers: Readers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
            ended = readers.read(name, [Reader(where, plain_user=True) for where in names], cwd=tmp_path)
            assert ended == [Ended(0, expected)] * len(names)  # and not a word more
            assert content(place) == before
        finally:
            for folder in folders:
                folder.chmod(0o755)


if __name__ == "__main__":
    serve()
