"""hf:// names: sets read from and written to a stand-in for huggingface_hub, the functions of it that we call."""

from __future__ import annotations

import fnmatch
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import train
from tests.files import last_json, refused, tree
from utils.files import hub
from utils.files.atomic import write_json
from utils.runs.formats import read
from utils.system.errors import UsageError, UserError

IMAGES = torch.rand(10, 1, 8, 8, generator=torch.Generator().manual_seed(0))
CARD = {
    "dataset": "digits", "image_folder": None, "class_names": [str(c) for c in range(10)], "ipc": 1, "factor": 1,
    "decode_type": "single", "normalization": {"mean": [0.3053], "std": [0.3758]},
    "settings": {"epochs": 1, "repeat": 1, "width": 8, "depth": 2}, "finished": True,
}  # fmt: skip
SHA = "0123456789abcdef"


class RepositoryNotFoundError(Exception):
    """Stands for the exception of this name."""


class HfHubHTTPError(OSError):
    """Stands for the exception of this name."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.response = SimpleNamespace(status_code=status)


@dataclass
class StandIn:
    """The Hub in a dictionary: the files of every data set. fails: raised by the next call."""

    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    fails: Exception | None = None
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)

    def _called(self, function: str, **arguments: Any) -> dict[str, bytes]:
        self.calls.append((function, arguments))
        if self.fails is not None:
            raise self.fails
        assert arguments["repo_type"] == "dataset"
        if arguments["repo_id"] not in self.repos:
            raise RepositoryNotFoundError("404 Client Error. (Request ID: 1)\n\nRepository Not Found for url: ...")
        return self.repos[arguments["repo_id"]]

    def repo_info(self, repo_id: str, *, revision: str | None, repo_type: str, files_metadata: bool) -> Any:
        files = self._called("repo_info", repo_id=repo_id, revision=revision, repo_type=repo_type)
        assert files_metadata
        siblings = [SimpleNamespace(rfilename=k, size=self.sizes.get(k, len(v))) for k, v in files.items()]
        return SimpleNamespace(siblings=siblings, sha=SHA)

    def snapshot_download(
        self, repo_id: str, *, repo_type: str, revision: str, local_dir: Path, allow_patterns: list[str]
    ) -> str:
        files = self._called("snapshot_download", repo_id=repo_id, revision=revision, repo_type=repo_type)
        assert revision == SHA
        for name, content in files.items():
            if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                (local_dir / name).parent.mkdir(parents=True, exist_ok=True)
                (local_dir / name).write_bytes(content)
        return str(local_dir)

    def create_repo(self, repo_id: str, *, private: bool, repo_type: str, exist_ok: bool) -> None:
        if self.fails is None:
            self.repos.setdefault(repo_id, {".gitattributes": b""})
        self._called("create_repo", repo_id=repo_id, repo_type=repo_type, private=private)
        assert exist_ok

    def upload_folder(
        self, *, repo_id: str, folder_path: Path, path_in_repo: str | None, commit_message: str, repo_type: str,
        revision: str | None, parent_commit: str,
    ) -> None:  # fmt: skip
        files = self._called("upload_folder", repo_id=repo_id, repo_type=repo_type, revision=revision)
        assert parent_commit == SHA and commit_message
        for name, content in tree(folder_path).items():
            if content is not None:
                files["/".join(filter(None, [path_in_repo, name]))] = content

    def upload_file(
        self, *, path_or_fileobj: Path, path_in_repo: str, repo_id: str, repo_type: str, revision: str | None,
        commit_message: str, parent_commit: str,
    ) -> None:  # fmt: skip
        files = self._called("upload_file", repo_id=repo_id, repo_type=repo_type, revision=revision)
        assert parent_commit == SHA and commit_message
        files[path_in_repo] = path_or_fileobj.read_bytes()


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> StandIn:
    """The stand-in, in place of the package, with one data set of several forms."""
    stand_in, module = StandIn(), ModuleType("huggingface_hub")
    vars(module).update(HfApi=lambda: stand_in, snapshot_download=stand_in.snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    monkeypatch.chdir(tmp_path)
    torch.save([IMAGES, torch.arange(10)], tmp_path / "data.pt")
    write_json(tmp_path / "data.json", CARD)
    pt, card = ((tmp_path / name).read_bytes() for name in ("data.pt", "data.json"))
    for name in ("data.pt", "data.json"):
        (tmp_path / name).unlink()
    stand_in.repos["me/mine"] = {
        "README.md": b"", ".gitattributes": b"", "checkpoint.pt": b"large", "data.pt": pt, "data.json": card,
        "runs/a [1]/data.pt": pt, "runs/a [1]/data.json": card, "runs/a 1/data.pt": b"another",
        "other/my.pt": pt, "other/notes.txt": b"", "folders/0/a.png": b"", "folders/1/b.jpg": b"",
        "folders/1/x/c.png": b"", "pair/images.pt": b"", "pair/labels.pt": b"", "table/train.parquet": b"",
        "../../escaped.pt": pt,
    }  # fmt: skip
    return stand_in


@pytest.mark.parametrize(
    ("name", "files", "path"),
    [
        ("hf://me/mine", ["data.json", "data.pt"], "data.pt"),
        ("hf://datasets/me/mine@main", ["data.json", "data.pt"], "data.pt"),
        ("hf://me/mine/data.pt@v1", ["data.json", "data.pt"], "data.pt"),
        ("hf://me/mine@v1/runs/a [1]", ["runs/a [1]/data.json", "runs/a [1]/data.pt"], "runs/a [1]/data.pt"),
        ("hf://me/mine/other/", ["other/my.pt"], "other/my.pt"),
        ("hf://me/mine/folders", ["folders/0/a.png", "folders/1/b.jpg"], "folders"),
        ("hf://me/mine/pair", ["pair/images.pt", "pair/labels.pt"], "pair"),
    ],
)
def test_what_belongs_to_a_set_is_downloaded_and_nothing_else(
    name: str, files: list[str], path: str, there: StandIn, tmp_path: Path
) -> None:
    copy = hub.local_copy(name, tmp_path / "data", main="data.pt", beside=["data.json"])
    folder = tmp_path / "data" / "hub" / "me" / "mine" / SHA[:12]
    assert copy == folder / path
    assert [file for file, content in tree(folder).items() if content is not None] == sorted(files)
    asked = [arguments["revision"] for function, arguments in there.calls if function == "repo_info"]
    assert asked == ["v1" if "@v1" in name else "main" if "@" in name else None]


def test_a_set_of_the_hub_is_evaluated_as_untrusted_as_any(there: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["hf://me/mine", "--baselines", "none", "--device", "cpu", "--json"]
    assert train.main(argv) == 0
    assert last_json(capsys)["net"] == "convnet2"
    assert Path("data/hub/me/mine", SHA[:12], "eval.json").exists()
    with pytest.raises(UserError, match=r"runs/a 1/data.pt: "):
        train.main(["hf://me/mine/runs/a 1", "-d", "digits", "-f", "1"])


def test_an_export_is_uploaded_and_read_back(there: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    there.repos["me/full"] = {"README.md": b"precious"}
    for target in ("hf://me/new", "hf://me/full/sets/one", "hf://me/full/x.safetensors@branch"):
        assert train.main(["hf://me/mine", "--device", "cpu", "--export", target]) == 0
    assert capsys.readouterr().out.count("exported 10") == 3
    assert ("create_repo", {"repo_id": "me/new", "repo_type": "dataset", "private": True}) in there.calls
    assert [a["revision"] for f, a in there.calls if f == "upload_file"] == ["branch"]
    new, full = there.repos["me/new"], there.repos["me/full"]
    assert b"source_datasets: [" in new["README.md"] and len([name for name in new if name.endswith(".png")]) == 10
    assert {f"sets/one/{name}" for name in new if name != ".gitattributes"} < full.keys()
    assert full["README.md"] == b"precious"
    for name in ("hf://me/new", "hf://me/full/sets/one", "hf://me/full/x.safetensors"):
        found = read(hub.local_copy(name, Path("copy"), main="data.pt"))
        torch.testing.assert_close(
            found.images.double() / (1 if name.endswith("s") else 255), IMAGES.double(), atol=2e-3, rtol=0
        )


def both_ways(folder: Path) -> list[Callable[[], object]]:
    """A download and an upload."""
    return [
        lambda: hub.local_copy("hf://me/mine", folder, main="data.pt"),
        lambda: hub.upload("hf://me/mine", folder),
    ]


def test_an_upload_overwrites_nothing(there: StandIn, tmp_path: Path) -> None:
    before = dict(there.repos["me/mine"])
    (tmp_path / "x").write_text("new")
    for place in ("", "/other", "/other/my.pt", "/README.md/below"):
        with pytest.raises(UsageError, match=rf"^--export hf://me/mine{place}: holds .* already"):
            hub.upload(f"hf://me/mine{place}", tmp_path / "x")
    assert there.repos["me/mine"] == before


@pytest.mark.parametrize(
    ("fails", "says"),
    [
        (
            HfHubHTTPError("403 Forbidden: no write access\nmore", 403),
            "403 Forbidden: no write access.*`hf auth login`",
        ),
        (HfHubHTTPError("500 Server Error", 500), "500 Server Error.*check name and network"),
        (ConnectionError("Name or service not known"), "not known.*check name and network"),
        (type("GatedRepoError", (RepositoryNotFoundError,), {})(), "grant access.*`hf auth login`"),
        (type("LocalTokenNotFoundError", (OSError,), {})(), "needs a token; .*`hf auth login`"),
        (type("RevisionNotFoundError", (Exception,), {})(), "no such revision"),
    ],
)
def test_what_the_hub_refuses_is_said_in_one_line(fails: Exception, says: str, there: StandIn, tmp_path: Path) -> None:
    there.fails = fails
    for act in (
        lambda: hub.local_copy("hf://me/mine", tmp_path, main="data.pt"),
        lambda: hub.upload("hf://me/new", tmp_path),
    ):
        with pytest.raises(UserError, match=f"^hf://me/(mine|new): .*{says}") as caught:
            act()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["hf://", "hf://me", "hf://me/..", "hf://me/../x", "hf://me/mine/../x", "hf://a b/c", "hf://a/b@1/c@2"]
)
def test_a_name_of_another_form_is_refused(name: str, there: StandIn, tmp_path: Path) -> None:
    refused(train.main, [name], f"{name}: expected hf://USER/NAME", status=2, unchanged=tmp_path)
    assert not there.calls


def test_what_cannot_be_a_set_is_not_downloaded(there: StandIn, tmp_path: Path) -> None:
    there.sizes["other/my.pt"] = 2**50
    for name, says in (
        ("hf://me/none", "is not there, or private; check the name, or log in with `hf auth login`"),
        ("hf://me/mine/nowhere", "holds no set"),
        ("hf://me/mine/table", "holds no set"),
        ("hf://me/mine/other", "takes 1125899.9 GB"),
    ):
        refused(train.main, [name], f"{name}: {says}", status=1, unchanged=tmp_path)
    assert {function for function, _ in there.calls} == {"repo_info"}


def test_without_the_package_a_name_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for act in both_ways(tmp_path):
        with pytest.raises(UserError, match=r"^hf://me/mine: needs huggingface_hub; pip install huggingface_hub"):
            act()
    assert hub.local_copy("hf/b", tmp_path, main="data.pt") == Path("hf/b")


def test_the_stand_in_has_the_signatures_of_the_package() -> None:
    real = pytest.importorskip("huggingface_hub")
    for name in ("repo_info", "snapshot_download", "create_repo", "upload_folder", "upload_file"):
        function = getattr(real, name, None) or getattr(real.HfApi, name)
        ours = set(inspect.signature(getattr(StandIn, name)).parameters) - {"self"}
        assert ours <= set(inspect.signature(function).parameters), name
    errors = pytest.importorskip("huggingface_hub.errors")
    known = [name for name in hub.REASONS if hasattr(errors, name)]
    assert known == list(hub.REASONS)
