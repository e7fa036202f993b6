"""Files in data sets of the Hugging Face Hub, read and written through huggingface_hub where it is installed.

Names are hf://USER/NAME, with /PATH behind it for a folder or a file there, and @REVISION for a branch, tag or commit.
"""

from __future__ import annotations

import glob
import logging
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch

from utils.files.imagefiles import EXTENSIONS
from utils.system.device import free_memory
from utils.system.errors import UsageError, UserError, first_line
from utils.system.process import NO_ROOM

log = logging.getLogger("dream")

PREFIX = "hf://"
KIND = "dataset"  # of repository
SUFFIXES = (".pt", ".pth", ".npy", ".npz", ".safetensors")  # of files that may hold a set
FIRST = (".gitattributes",)  # files that every repository begins with
LOG_IN = "log in with `hf auth login`"
# What an exception of huggingface_hub means, by its class or a base class; the first that fits.
REASONS = {
    "GatedRepoError": f"its owner has to grant access; ask for it on its page, and {LOG_IN}",
    "RepositoryNotFoundError": f"is not there, or private; check the name, or {LOG_IN}",
    "RevisionNotFoundError": "has no such revision; check what follows the @",
    "LocalTokenNotFoundError": f"needs a token; {LOG_IN}",
    "HFValidationError": "is no name that the Hub allows; check it",
}


class Place(NamedTuple):
    """A folder or file in a data set of the Hub."""

    repo: str  # USER/NAME
    path: str  # in the repository, "" for its root
    revision: str | None  # None: the main branch


def is_on_hub(name: str) -> bool:
    """Whether a name is that of something on the Hub."""
    return name.startswith(PREFIX)


def parse(name: str) -> Place:
    """The place that a name means; the revision may stand behind the repository or the path. Raises UsageError."""
    form = r"hf://(?:datasets/)?(\w[\w.-]*/\w[\w.-]*)(?:@([^/@]+))?(?:/([^@]*))?(?:@([^@]+))?"
    match = re.fullmatch(form, name)
    parts = PurePosixPath(match[3] or "").parts if match else ("..",)
    if match is None or ".." in parts or (match[2] and match[4]):
        raise UsageError(f"{name}: expected hf://USER/NAME of a data set, and if need be /PATH and @REVISION")
    return Place(match[1], "/".join(parts), match[2] or match[4])


def local_copy(name: str, root: Path, *, main: str, beside: Sequence[str] = ()) -> Path:
    """Download a set of files, and return the path of its copy below a folder; a path as it is for other names.

    The name may be that of a file, of a folder with a file `main`, of a folder with files of one set, or of one with
    class folders of images. beside: names of files that belong to any file beside them. Nothing else is downloaded.
    Raises UsageError or UserError, naming the set: also when it would not fit into the memory.
    """
    if not is_on_hub(name):
        return Path(name)
    place = parse(name)
    with _asking(name) as hub:
        sizes, commit = _files(hub, place)
    wanted, path = _chosen(sizes, place.path, main, beside)
    if not wanted:
        there = ", ".join(list(sizes)[:5]) or "nothing"
        raise UserError(f"{name}: holds no set of a form that can be read ({there}); name a file or folder in it")
    size, free = sum(sizes[file] for file in wanted), free_memory(torch.device("cpu"))
    if size > free:
        raise UserError(f"{name}: takes {size / 1e9:.1f} GB, {free / 1e9:.1f} GB of memory are free; name a part of it")
    folder = root / "hub" / place.repo / commit[:12]  # another commit may have other files of the same names
    log.info("%s: %d files of %.3g MB, kept in %s", name, len(wanted), size / 1e6, folder)
    with _asking(name) as hub:
        patterns = [glob.escape(file) for file in wanted]
        hub.snapshot_download(place.repo, repo_type=KIND, revision=commit, local_dir=folder, allow_patterns=patterns)
    return folder / path


def upload(name: str, local: Path) -> None:
    """Upload a file or the content of a folder. A data set that is not there yet is created, and is private.

    Raises UsageError when there is something at that place already, UserError when it cannot be written.
    """
    place = parse(name)
    with _asking(name) as hub:
        hub.HfApi().create_repo(place.repo, repo_type=KIND, private=True, exist_ok=True)
        sizes, commit = _files(hub, place)
    inside = place.path + "/" if place.path else ""
    there = [file for file in sizes if file not in FIRST]
    if taken := [file for file in there if f"{file}/".startswith(inside) or inside.startswith(f"{file}/")]:
        raise UsageError(f"--export {name}: holds {taken[0]} already; name a new data set, or a new place in it")
    # The commit: whatever anybody changes meanwhile makes the Hub refuse.
    where = {"repo_id": place.repo, "repo_type": KIND, "revision": place.revision, "parent_commit": commit}
    message = "Add a distilled set"
    with _asking(name) as hub:
        if local.is_dir():
            folder = {"folder_path": local, "path_in_repo": place.path or None}
            hub.HfApi().upload_folder(**where, **folder, commit_message=message)
        else:
            file = {"path_or_fileobj": local, "path_in_repo": place.path}
            hub.HfApi().upload_file(**where, **file, commit_message=message)


@contextmanager
def _asking(name: str) -> Iterator[Any]:
    """The module huggingface_hub, whose exceptions become a UserError with the name."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError(f"{name}: needs huggingface_hub; pip install huggingface_hub") from error
    try:
        yield huggingface_hub
    except Exception as error:  # its own, and those of whichever HTTP library it uses
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            raise
        reasons = [REASONS[kind.__name__] for kind in type(error).__mro__ if kind.__name__ in REASONS]
        status = getattr(getattr(error, "response", None), "status_code", None)
        remedy = f"{LOG_IN}, with a token that may do this" if status in (401, 403) else "check name and network"
        raise UserError(f"{name}: {reasons[0] if reasons else f'failed ({first_line(error)}); {remedy}'}") from error


def _files(hub: Any, place: Place) -> tuple[dict[str, int], str]:
    """The bytes of every file of a repository, by path, and the commit that they are of."""
    info = hub.HfApi().repo_info(place.repo, repo_type=KIND, revision=place.revision, files_metadata=True)
    named = {file.rfilename: file.size or 0 for file in info.siblings or []}
    return {path: size for path, size in named.items() if ".." not in path.split("/")}, str(info.sha)


def _chosen(files: Collection[str], path: str, main: str, beside: Sequence[str]) -> tuple[list[str], str]:
    """The files of a repository that belong to the set at a path, and the path at which they are read."""
    folder = path + "/" if path else ""
    inside = {file.removeprefix(folder): file for file in files if file.startswith(folder)}
    sets = [name for name in inside if "/" not in name and name.lower().endswith(SUFFIXES)]
    if path not in files and (main in sets or len(sets) == 1):
        path = inside[main if main in sets else sets[0]]
    if path in files:
        around = [str(PurePosixPath(path).with_name(name)) for name in beside]
        return [path, *(file for file in around if file in files)], path
    if sets:
        return [inside[name] for name in (*sets, *beside) if name in inside], path
    return [x for name, x in inside.items() if name.count("/") == 1 and name.lower().endswith(EXTENSIONS)], path
