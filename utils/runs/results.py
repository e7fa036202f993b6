"""Results of evaluations: records in eval.json, found again, and their table as text, Markdown, CSV and JSON.

A record says which set, network and protocol an accuracy belongs to, and what computed it when. What is the same in all
of these is not trained a second time.
"""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.files import atomic
from utils.files.lock import locked
from utils.method.evaluation import Score
from utils.system.errors import UserError
from utils.system.report import span

log = logging.getLogger("dream")

EVALUATIONS = "eval.json"
Record = dict[str, Any]


def same(record: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two records are about the same set, network and protocol."""
    return all(record.get(name) == other.get(name) for name in ("set", "network", "protocol"))


def earlier(file: Path) -> list[Record]:
    """The records in an eval.json; none if there is no such file, or a damaged one, which is said."""
    if not file.exists():
        return []
    try:
        found = atomic.read_json(file)["results"]
        for record in found:  # what the table needs
            Score(tuple(map(float, record["accuracies"])))
            float(record["seconds"])
            dict(record.get("versions", {}))
        return list(found)
    except (UserError, KeyError, OverflowError, TypeError, ValueError):
        log.warning("%s: was damaged, and is begun again", file)
        return []


def find(file: Path, wanted: Mapping[str, Any], *, repeat: int, any_version: bool) -> Record | None:
    """An earlier record of the same thing with as many trainings, cut down to them.

    any_version: also of other versions of the code, of which the user is told; for what takes long to compute.
    """
    for record in earlier(file):
        if not same(record, wanted) or len(record["accuracies"]) < repeat:
            continue
        commit = str(record.get("versions", {}).get("git_commit", "unknown"))
        exact = record.get("versions") == wanted["versions"] and commit != "unknown" and "dirty" not in commit
        if exact or any_version:
            if not exact:
                log.info("%s is of commit %s, %s", file, commit[:12], record.get("started", "at an unknown time"))
            whole = len(record["accuracies"]) == repeat
            score = Score(tuple(record["accuracies"][:repeat]))
            return {**record, **score.as_dict(), **({} if whole else {"confusion": None})}
    return None


def keep(file: Path, record: Record) -> None:
    """Add to eval.json, in place of an earlier record of the same thing; other processes may do the same meanwhile."""
    with locked(file.with_name(".eval.lock"), doing="train.py", wait=True):
        kept = [other for other in earlier(file) if not same(other, record)]
        try:
            atomic.write_json(file, {"results": [*kept, record]})
        except OSError as error:
            log.warning("%s: cannot be written (%s)", file, error.strerror)


def low_accuracies(records: Sequence[Record], ours: str, random: str, *, chance: float) -> list[str]:
    """Warnings about a set that is worse than it should be at all: most likely it was not read as it was meant.

    ours, random: what the set and as many random real images are called in the records; chance: in per cent.
    """
    found = []
    for net in dict.fromkeys(r["net"] for r in records):
        mine = {r["trained_on"]: r["accuracy_mean"] for r in reversed(records) if r["net"] == net}
        least = mine.get(random, 1.5 * chance)
        if mine[ours] <= least:
            other = "as many random real images" if random in mine else "1.5 times chance"
            found.append(
                f"{net}: the distilled set gives {mine[ours]:.1f} %, no more than {other} ({least:.1f} %); if that is "
                "unexpected, check the data set (-d), the factor (-f) and --normalized"
            )
    return found


# --- Tables -----------------------------------------------------------------------------------------------------------


def share_of_real(record: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> float | None:
    """Accuracy in per cent of that of the same network on all real images, where that is known."""
    for other in records:
        if other["trained_on"] == ALL_REAL and other["network"] == record["network"] and other["accuracy_mean"]:
            return 100 * float(record["accuracy_mean"]) / float(other["accuracy_mean"])
    return None


ALL_REAL = "all real images"


def size(count: float) -> str:
    """Bytes for people: 960 B, 30.7 kB, 153.6 MB."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000
    return f"{count:.4g} GB"


# Heading, and the cell of a record among all.
COLUMNS: dict[str, Callable[[Record, Sequence[Record]], str]] = {
    "network": lambda r, all: r["net"],
    "trained on": lambda r, all: r["trained_on"],
    "stored/class": lambda r, all: f"{r['images_per_class']:.4g}",
    "stored": lambda r, all: size(r["stored_bytes"]),
    "decoded/class": lambda r, all: f"{r['decoded_per_class']:.4g}",
    "test accuracy %": lambda r, all: str(Score(tuple(r["accuracies"]))),
    "of all real": lambda r, all: "" if (share := share_of_real(r, all)) is None else f"{share:.1f} %",
    "time": lambda r, all: span(r["seconds"]),
}


def cells(records: Sequence[Record]) -> list[list[str]]:
    """Head and rows; without the share of the upper bound where no network's is known."""
    names = [n for n in COLUMNS if n != "of all real" or any(r["trained_on"] == ALL_REAL for r in records)]
    return [names, *([COLUMNS[name](r, records) for name in names] for r in records)]


def as_text(records: Sequence[Record]) -> str:
    """For a terminal: aligned columns."""
    rows = cells(records)
    wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(f"{cell:{w}}" for cell, w in zip(row, wide, strict=True)).rstrip() for row in rows)


def as_markdown(records: Sequence[Record], about: Mapping[str, Any]) -> str:
    """A table, and below it what it was measured with."""
    head, *rows = cells(records)
    lines = ["| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]]
    versions = about["versions"]
    notes = [
        f"Test accuracy on {about['dataset']}: mean +- sample standard deviation of n trainings of fresh networks, "
        "each tested once, after its last epoch. Stored: the pixels as the set holds them, and soft labels.",
        f"`python3 {about['command']}`, {about['started']}, on {about['device']}, torch {versions['torch']}, commit "
        f"{versions['git_commit'][:12]}.",
    ]
    return "\n".join([*lines, "", *notes, ""])


CSV_FIELDS = (
    "net", "trained_on", "images_per_class", "stored_bytes", "decoded_per_class", "accuracy_mean", "accuracy_std", "n",
    "share_of_real", "seconds",
)  # fmt: skip


def as_csv(records: Sequence[Record], about: Mapping[str, Any]) -> str:
    """One line per row, numbers as they are; per cent, bytes, seconds."""
    out = io.StringIO()
    writer = csv.DictWriter(out, CSV_FIELDS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({**r, "share_of_real": share_of_real(r, records)} for r in records)
    return out.getvalue()


def as_json(records: Sequence[Record], about: Mapping[str, Any]) -> str:
    return json.dumps({**about, "results": list(records)}, indent=2) + "\n"


TABLES: dict[str, Callable[[Sequence[Record], Mapping[str, Any]], str]] = {
    ".md": as_markdown,
    ".csv": as_csv,
    ".json": as_json,
}
