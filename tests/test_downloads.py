"""Several runs on one data folder that is still being filled: one downloads, the others wait, halves are mended."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torchvision

from tests.archives import write_cifar10_archive, write_mnist, write_svhn
from tests.faults import injected

pytestmark = pytest.mark.faults

ROOT = Path(__file__).resolve().parent.parent
SOURCES: dict[str, tuple[str, Callable[..., object], tuple[str, ...]]] = {  # class, writer, and what the writer changes
    "mnist": ("MNIST", write_mnist, ("resources", "mirrors")),
    "svhn": ("SVHN", write_svhn, ("split_list",)),
    "cifar10": ("CIFAR10", write_cifar10_archive, ("train_list", "test_list", "meta", "tgz_md5", "url")),
}
# Imports once, and forks the processes that are to start together; prints how each ended.
CHILDREN = """
import hashlib, json, os, sys
import torch, torchvision
from data import Dataset
from utils.report import messages
name, kind, attributes, places = json.loads(sys.argv[1])
for attribute, value in attributes.items():
    setattr(getattr(torchvision.datasets, kind), attribute, value)

def load(place):
    try:
        with messages():
            train = Dataset(name, device=torch.device("cpu"), data_dir=place).train
        print("got", hashlib.sha256(train.images.numpy().tobytes()).hexdigest(), flush=True)
        os._exit(0)
    except Exception as error:
        print(type(error).__name__, error, flush=True)
        os._exit(1)

children = [os.fork() or load(place) for place in places]
print("ended", json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]))
"""


class Publisher:
    """Serves the files of a folder, each in two halves with a pause between them, and counts what is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[str] = []
        self.pause = 0.3  # seconds
        self.half_sent = threading.Event()

    @contextmanager
    def open(self) -> Iterator[str]:
        publisher = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                content = publisher.find(self.path)
                publisher.asked.append(self.path.rpartition("/")[2])
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                try:
                    for half in (content[: len(content) // 2], content[len(content) // 2 :]):
                        self.wfile.write(half)
                        self.wfile.flush()
                        publisher.half_sent.set()
                        time.sleep(publisher.pause)
                except OSError:  # of somebody who was killed
                    pass

            def log_message(self, *about: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()
            server.server_close()

    def find(self, path: str) -> bytes:
        (file,) = self.folder.rglob(path.rpartition("/")[2])
        return file.read_bytes()


def published(name: str, tmp_path: Path, patch: pytest.MonkeyPatch) -> tuple[Publisher, str]:
    """A small data set of that name, and the digest of its training images as they are read where nothing happens."""
    _, write, _ = SOURCES[name]
    (tmp_path / "publisher").mkdir()
    write(tmp_path / "publisher", patch)
    whole = start(name, attributes_of(name, "http://nowhere"), [tmp_path / "publisher"])
    out = ended(whole)
    assert out[-1] == "ended [0]", out
    return Publisher(tmp_path / "publisher"), out[-2]


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


def start(name: str, attributes: dict[str, Any], places: list[Path], **options: Any) -> subprocess.Popen[str]:
    words = json.dumps([name, SOURCES[name][0], attributes, [str(place) for place in places]])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "no_proxy": "127.0.0.1"}
    return subprocess.Popen(
        [sys.executable, "-c", CHILDREN, words], env={**environment, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options,
    )  # fmt: skip


def ended(process: subprocess.Popen[str]) -> list[str]:
    """The lines that the processes printed, without progress bars of torchvision's."""
    out, err = process.communicate(timeout=120)
    assert "Traceback" not in err, err
    return out.splitlines()


def content(place: Path) -> dict[str, str]:
    return {str(p.relative_to(place)): hashlib.md5(p.read_bytes()).hexdigest() for p in place.rglob("*") if p.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("name", SOURCES)
def test_of_several_runs_one_downloads_and_the_others_wait(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher, expected = published(name, tmp_path, monkeypatch)
    place = tmp_path / "daten sätze"
    with injected("data folder that is still downloading", times=4), publisher.open() as url:
        out = ended(start(name, attributes_of(name, url), [place] * 4))
        assert out[-1] == "ended [0, 0, 0, 0]" and out.count(expected) == 4, out
        assert sum("waiting for process" in line for line in out) >= 1
        # torchvision asks twice for a file: where it is, and for its content.
        assert max(map(publisher.asked.count, publisher.asked)) <= 2, "something was downloaded twice"
        assert not list(place.rglob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize("name", SOURCES)
def test_a_download_that_is_killed_is_made_again_by_those_who_wait(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher, expected = published(name, tmp_path, monkeypatch)
    publisher.pause = 1.0
    place = tmp_path / "data"
    with injected("download killed halfway", times=1), publisher.open() as url:
        process = start(name, attributes_of(name, url), [place] * 3)
        assert publisher.half_sent.wait(60)
        (lock,) = place.glob(".*.lock")
        os.kill(json.loads(lock.read_text())["pid"], signal.SIGKILL)
        publisher.pause = 0.0
        out = ended(process)
        assert sorted(json.loads(out[-1].removeprefix("ended "))) == [-signal.SIGKILL, 0, 0], out
        assert out.count(expected) == 2 and not list(place.rglob(".*"))


@pytest.mark.slow
def test_an_unpacking_that_was_cut_short_is_mended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision asks no more of MNIST's unpacked files than that they exist."""
    publisher, expected = published("mnist", tmp_path, monkeypatch)
    place, raw = publisher.folder, publisher.folder / "MNIST" / "raw"
    before = content(place)
    for name, keep in (("train-images-idx3-ubyte", 0.5), ("train-labels-idx1-ubyte", 0)):
        with injected("unpacking killed halfway"):
            file = raw / name
            file.write_bytes(file.read_bytes()[: int(keep * file.stat().st_size)])
            out = ended(start("mnist", attributes_of("mnist", "http://nowhere"), [place] * 2))
            assert out[-1] == "ended [0, 0]" and out.count(expected) == 2, out
            assert content(place) == before


@pytest.mark.slow
@pytest.mark.parametrize("name", SOURCES)
def test_a_read_only_data_folder_is_read_under_any_of_its_names(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher, expected = published(name, tmp_path, monkeypatch)
    place, link = publisher.folder, tmp_path / "link"
    link.symlink_to(place)
    before = content(place)
    folders = [place, *(p for p in place.rglob("*") if p.is_dir())]

    def as_plain_user() -> None:
        ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE: root is bound by modes, too

    with injected("read-only data folder", times=3):
        for folder in folders:
            folder.chmod(0o555)
        try:
            relative = Path(os.path.relpath(place, tmp_path))
            attributes = attributes_of(name, "http://nowhere")
            process = start(name, attributes, [place, link, relative], cwd=tmp_path, preexec_fn=as_plain_user)
            assert ended(process) == [expected] * 3 + ["ended [0, 0, 0]"]
            assert content(place) == before
        finally:
            for folder in folders:
                folder.chmod(0o755)
