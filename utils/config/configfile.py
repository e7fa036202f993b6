"""Files of --config: flags written as YAML or JSON, or the options.json or data.json of a run.

The file may be anybody's. Nothing but names and texts is taken from it, and the command line's own parser reads these.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from utils.config.flags import make_parser
from utils.config.options import FREE, OF_THE_SET, CondenseOptions, Options
from utils.files.atomic import CHECKSUM, checksum
from utils.system.errors import UsageError, UserError, first_line

MAX_LIST = 100  # values of one flag; a YAML file could name a long list very often
MAX_BYTES = 2**20  # an options.json takes a kilobyte for each of its sessions
TRUE, FALSE, NULL = ("true", "yes", "on"), ("false", "no", "off"), ("", "~", "null", "Null", "NULL")
Texts = Mapping[str, "str | list[str] | None"]  # the values of flags as they would be typed; None: null


def read(path: Path, kind: type[Options]) -> tuple[dict[str, Any], bool]:
    """Values of the flags in a file, by name and checked as flags are, and whether the file is a run's.

    kind: the options of the script. A switch may be False; null is None. A run's file has all options of condense.py;
    those that the script lacks are left out, and so are places, the machine and the tag. Raises UserError for a file
    that cannot be read, UsageError for an entry that is no flag, both naming the file.
    """
    content = _load(path)
    of_a_run, entries = True, content
    if isinstance(options := content.get("options"), dict):  # options.json
        entries = options
    elif isinstance(settings := content.get("settings"), dict):  # data.json
        entries = {**settings, **{name: content[name] for name in OF_THE_SET if name in content}}
    else:
        of_a_run = False
    if not entries:
        raise UserError(f"--config {path}: names no flag; write lines such as `ipc: 10` into it")
    named, all_of_runs = _named(path, entries), {field.name for field in dataclasses.fields(CondenseOptions)}
    known = {field.name for field in dataclasses.fields(kind)} - {"config"}
    allowed = known | all_of_runs if of_a_run else known
    for name in named:
        if name not in allowed:
            close = difflib.get_close_matches(name, sorted(allowed), 1)
            _refuse(path, f"{name[:100]!r} is no flag" + (f" (did you mean {close[0]}?)" if close else ""))
    if of_a_run:
        known -= {*FREE, "tag"} - {"reproduce"}
    texts = {name: _text(path, name, value) for name, value in named.items() if name in known}
    return _parsed(path, kind, texts), of_a_run


def _refuse(path: Path, problem: str) -> NoReturn:
    raise UsageError(f"--config {path}: {problem[:300]}; correct the entry or leave it out")


def _parsed(path: Path, kind: type[Options], texts: Texts) -> dict[str, Any]:
    """Values by name, read by the parser of the command line. Raises UsageError, naming the file and the flag."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    values: dict[str, Any] = {}
    words: list[str] = []
    arguments: list[str] = []
    for name, text in texts.items():
        field = fields[name]
        alone = field.default is False or field.metadata.get("const") is not None  # may stand without a value
        if text is None:
            values[name] = None
        elif name == "run":  # the one argument that is no flag
            arguments = ["--", *(text if isinstance(text, list) else [text])]
        elif isinstance(text, list):
            if field.metadata["nargs"] != "+":
                _refuse(path, f"{name} takes one value, not a list")
            if dashed := [word for word in text if word.startswith("-")]:
                _refuse(path, f"{name}: {dashed[0]!r} begins with a dash")
            words += [f"--{name}", *text]
        elif alone and text.lower() in FALSE and text not in (field.metadata["choices"] or ()):
            values[name] = field.default
        elif alone and text.lower() in TRUE:
            words.append(f"--{name}")
        else:
            words.append(f"--{name}={text}")
    try:
        return {**values, **make_parser(kind, "").parse_given([*words, *arguments])}
    except UsageError as error:
        _refuse(path, str(error).rsplit("; see", 1)[0])


# --- Names and texts --------------------------------------------------------------------------------------------------


def _named(path: Path, entries: Mapping[str, Any]) -> dict[str, Any]:
    """Entries by the names of options, with `_` where the file has `-`. Raises UsageError for one that comes twice."""
    named: dict[str, Any] = {}
    for key, value in entries.items():
        name = key.replace("-", "_")
        if name in named:
            _refuse(path, f"{name} is there twice")
        named[name] = value
    return named


def _text(path: Path, name: str, value: Any) -> str | list[str] | None:
    """A value as it would be typed behind its flag. Raises UsageError for what nobody could type."""
    if isinstance(value, list):
        texts = [_text(path, name, item) for item in value if not isinstance(item, list)]
        if len(texts) == len(value) and None not in texts:
            return [str(text) for text in texts]
    elif isinstance(value, bool):
        return str(value).lower()
    elif value is None or (isinstance(value, str) and _can_be_typed(value)):
        return value
    elif isinstance(value, int | float):
        return repr(value)
    _refuse(path, f"{name[:100]} is neither a text, a number, true, false or null, nor a list of texts and numbers")


def _can_be_typed(text: str) -> bool:
    """Whether a text could be an argument of a process: nothing is asked of the system with any other."""
    try:
        return b"\0" not in text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False


def _load(path: Path) -> dict[str, Any]:
    """The entries of a JSON or YAML file. Raises UserError, naming the file, when it is neither or has no entries."""
    try:
        if path.exists() and not stat.S_ISREG(path.stat().st_mode):  # reading a pipe would wait for a writer
            raise OSError("no regular file")
        with open(path, "rb") as file:
            raw = file.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES} bytes")
        text = raw.decode("utf-8-sig")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"--config {path}: cannot be read ({reason}); name a YAML or JSON file of flags") from error
    try:
        content = json.loads(text, object_pairs_hook=_without_doubles)
    except (ValueError, RecursionError) as error:
        if path.suffix.lower() == ".json" or isinstance(error, KeyTwice):
            raise UserError(f"--config {path}: is no JSON ({first_line(error)}); correct it") from error
        content = _load_yaml(path, text)
    if not isinstance(content, dict):
        raise UserError(f"--config {path}: holds no flags; write lines such as `ipc: 10` into it")
    claimed = content.pop(CHECKSUM, None)
    if claimed is not None and claimed != checksum(content):
        problem = f"is damaged, or was changed since it was written (its {CHECKSUM} differs)"
        raise UserError(f"--config {path}: {problem}; restore it, or delete that entry if the change is meant")
    return content


class KeyTwice(ValueError):
    """An object of JSON that has two entries of one name, of which json.loads would hide one."""


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise KeyTwice(f"{next(name for name in content if names.count(name) > 1)[:100]!r} is there twice")
    return content


def _load_yaml(path: Path, text: str) -> dict[str, Any] | None:
    """The entries of a YAML file, all texts as they stand; None if it holds no mapping.

    Only the tree of nodes is made, in which an alias costs nothing and a tag means nothing. YAML's own idea of a value
    would turn `compile: off` into False.
    """
    try:
        import yaml
    except ImportError as error:
        remedy = "pip install pyyaml, or write it as JSON"
        raise UserError(f"--config {path}: is no JSON, and YAML cannot be read without PyYAML; {remedy}") from error
    try:
        root = yaml.compose(text, Loader=yaml.BaseLoader)
        if not isinstance(root, yaml.MappingNode) or not all(isinstance(key, yaml.ScalarNode) for key, _ in root.value):
            return None
        return _without_doubles([(key.value, _plain(value)) for key, value in root.value])
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        problem = " ".join(str(error).split())[:200]
        raise UserError(f"--config {path}: is neither JSON nor right YAML ({problem}); correct it") from error


def _plain(node: Any) -> Any:
    """The text of a YAML node, or a list of texts; an empty mapping, which no flag takes, for others."""
    if isinstance(node.value, str):
        return None if node.style is None and node.value in NULL else node.value
    if len(node.value) <= MAX_LIST and all(isinstance(getattr(item, "value", None), str) for item in node.value):
        return [_plain(item) for item in node.value]
    return {}
