"""Names of classes for people: ImageNet's folders are called n01443537, and a table beside them says `goldfish`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from utils.system.errors import printable

SUFFIXES = (".txt", ".csv", ".tsv", ".json")  # of tables: words.txt, LOC_synset_mapping.txt, map_clsloc.txt, ...
TABLE_BYTES, MOST_TABLES = 2**24, 50  # what is larger, or beyond that number, is not looked at
WORDS = 60  # characters of a class's words at most


def readable_names(folders: Sequence[str], places: Sequence[Path], known: Mapping[str, str]) -> list[str]:
    """Names of classes from those of their folders, in the same order: `n01443537 goldfish` for `n01443537`.

    places: where a table of words may lie. known: words that need no table. Folders without words keep their name.
    """
    words: Mapping[str, str] = known
    if any(wnid(name) == name and name not in known for name in folders):
        words = {**_from_tables(places), **known}
    return [f"{name} {words[name]}" if words.get(name) and wnid(name) == name else name for name in folders]


def _from_tables(places: Sequence[Path]) -> dict[str, str]:
    """Words for WordNet numbers from the first table that has any; what cannot be read is no table."""
    for place in places:
        with suppress(OSError):
            files = sorted(file for file in place.iterdir() if file.suffix in SUFFIXES)[:MOST_TABLES]
            for file in files:
                with suppress(OSError, ValueError, RecursionError):
                    if file.is_file() and file.stat().st_size <= TABLE_BYTES:
                        text = file.read_text(encoding="utf-8", errors="replace")
                        if words := _words(text, is_json=file.suffix == ".json"):
                            return words
    return {}


def _words(text: str, *, is_json: bool) -> dict[str, str]:
    """First synonym of every WordNet number in a table; empty for tables of other things. Raises ValueError."""
    pairs: list[tuple[str, str]] = []
    if is_json:
        table = json.loads(text)
        for key, value in table.items() if isinstance(table, dict) else ():
            # {"0": ["n01440764", "tench"]} of Keras, or {"n01440764": "tench, Tinca tinca"}
            pair = value if isinstance(value, list) and len(value) == 2 else [key, value]
            pairs.append((str(pair[0]), str(pair[1])))
    else:  # `n01440764 tench, Tinca tinca`, after a tab, a comma, or a class number in map_clsloc.txt
        pairs = re.findall(r"^(n\d{8})[ \t,;:]+(?:\d+ +)?(.*[^\W\d_].*)$", text, flags=re.M)
    words = {key: _first_synonym(value) for key, value in pairs if wnid(key) == key}
    return words if len(words) == len(set(pairs)) else {}  # else one row for every image


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
