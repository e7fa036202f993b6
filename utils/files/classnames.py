"""Names of classes for people: ImageNet's folders are called n01443537, and a table beside them says `goldfish`."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from utils.system.errors import printable

log = logging.getLogger("dream")

# Files that say what ImageNet's folders show, as ImageNet, Tiny-ImageNet, Caffe, Keras and Kaggle call them.
TABLES = (
    "words.txt", "LOC_synset_mapping.txt", "synset_words.txt", "imagenet_class_index.json", "Labels.json",
    "classes.txt",
)  # fmt: skip
TABLE_BYTES = 2**24  # WordNet's own words.txt has 2.7 MB; what is larger is no such table
WORDS = 60  # characters of a class's words at most


def readable_names(folders: Sequence[str], places: Sequence[Path], known: Mapping[str, str]) -> list[str]:
    """Names of classes from those of their folders, in the same order: `n01443537 goldfish` for `n01443537`.

    places: where a table may lie. known: words that need no table. Folders without words keep their name.
    """
    words: dict[str, str] = {}
    if any(wnid(name) == name for name in folders):
        for file in (place / table for place in places for table in TABLES):
            with suppress(OSError, ValueError, RecursionError):  # a table that cannot be read is none
                if file.is_file() and file.stat().st_size <= TABLE_BYTES:
                    words = _words(file.read_text(encoding="utf-8", errors="replace"), is_json=file.suffix == ".json")
            if words:
                break
    words = {**words, **known}
    return [f"{name} {words[name]}" if words.get(name) and wnid(name) == name else name for name in folders]


def _words(text: str, *, is_json: bool) -> dict[str, str]:
    """First synonym of every WordNet number in a table. Raises ValueError for broken JSON."""
    pairs: list[tuple[str, str]] = []
    if is_json:
        table = json.loads(text)
        for key, value in table.items() if isinstance(table, dict) else ():
            # {"0": ["n01440764", "tench"]} of Keras, or {"n01440764": "tench, Tinca tinca"}
            pair = value if isinstance(value, list) and len(value) == 2 else [key, value]
            pairs.append((str(pair[0]), str(pair[1])))
    else:
        fields = [line.split(None, 1) for line in text.splitlines()]
        pairs = [(line[0], line[1]) for line in fields if len(line) == 2]
    return {key: _first_synonym(words) for key, words in pairs if wnid(key) == key}


def _first_synonym(words: str) -> str:
    """`tench, Tinca tinca` -> `tench`, in one printable line."""
    return printable(" ".join(words.split(",")[0].replace("_", " ").split()))[:WORDS]


def wnid(name: str) -> str | None:
    """The WordNet number that a class name begins with, as in `n01443537 goldfish`; None without one."""
    match = re.match(r"n\d{8}(?= |$)", name)
    return None if match is None else match[0]


def spellings(name: str) -> set[str]:
    """All names that a class may be called by: `n01443537 goldfish`, `n01443537` and `goldfish`."""
    number = wnid(name)
    return {name} if number in (None, name) else {name, str(number), name[len(str(number)) + 1 :]}


def same_classes(names: object, others: Sequence[str]) -> bool:
    """Whether two lists name the same classes in the same order; words after WordNet numbers do not count."""
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return False
    return [wnid(name) or name for name in names] == [wnid(name) or name for name in others]
