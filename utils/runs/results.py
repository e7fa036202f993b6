"""Results of evaluations: records in eval.json, and their table as text, Markdown, CSV and JSON.

A record says which images, network and protocol an accuracy belongs to, and what computed it when. For all real images,
whose training takes long, an earlier record of the same is used again.
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
from utils.method.evaluation import BEST_OF_FOUR, Score
from utils.runs import scores
from utils.runs.scores import ALL_REAL
from utils.system.errors import UserError
from utils.system.report import size, span

log = logging.getLogger("dream")

EVALUATIONS = "eval.json"
SHOWN = {"confusion matrix": "confusion", "best of four tests": "best_of_four"}  # entries that older records lack
Record = dict[str, Any]


def of_the_same(record: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two records are about the same images, network and protocol."""
    return all(record.get(name) == other.get(name) for name in ("set", "network", "protocol"))


def read_records(file: Path) -> list[Record]:
    """The records in an eval.json; none if there is no such file, or a damaged one, about which a warning is given."""
    if not file.exists():
        return []
    try:
        records = atomic.read_json(file)["results"]
        for record in records:  # what the table needs
            Score.from_dict(record)
            float(record["seconds"])
            dict(record.get("versions", {}))
        return list(records)
    except (UserError, KeyError, OverflowError, TypeError, ValueError):
        log.warning("%s: was damaged, and is begun again", file)
        return []


def find(file: Path, wanted: Mapping[str, Any], *, repeat: int) -> Record | None:
    """A record of the same images, network and protocol with `repeat` trainings or more, cut down to the first ones.

    Any version of the code may have made it. For all real images only, whose training takes long.
    """
    for record in read_records(file):
        if of_the_same(record, wanted) and len(record["accuracies"]) >= repeat:
            score = Score.from_dict(record, repeat).as_dict()
            return {**record, **score, **({} if len(record["accuracies"]) == repeat else {"confusion": None})}
    return None


def known(file: Path, wanted: Mapping[str, Any], *, repeat: int, title: str, shown: Sequence[str]) -> Record | None:
    """Record that `find` finds, after a message about it.

    title: of the row. shown: names in SHOWN of what the user wants to see, too.
    """
    record = find(file, wanted, repeat=repeat)
    if record is not None:
        for what in shown:
            if not record.get(SHOWN[what]):
                log.warning("%s: knows no %s of %s; --retrain makes one", file, what, wanted["trained_on"])
        log.info("%s: known from %s (%s); --retrain trains again", title, file, made_by(record))
    return record


def made_by(record: Mapping[str, Any]) -> str:
    """Commit and time of a record: `commit 0123456789ab, 2025-01-31 12:00:00 +0000`."""
    commit = str(record.get("versions", {}).get("git_commit", "unknown"))
    return f"commit {commit[:12]}, {record.get('started', 'at an unknown time')}"


def keep(file: Path, record: Record) -> None:
    """Add to eval.json, in place of an earlier record of the same; other processes may do so at the same time."""
    with locked(file.with_name(".eval.lock"), doing="train.py", wait=True):
        kept = [other for other in read_records(file) if not of_the_same(other, record)]
        try:
            atomic.write_json(file, {"results": [*kept, record]})
        except OSError as error:
            log.warning("%s: cannot be written (%s)", file, error.strerror)


def low_accuracies(records: Sequence[Record], ours: str, random: str, *, chance: float) -> list[str]:
    """Warnings, a network each, that the set is no better than random images: most likely it was misread.

    ours, random: what the set and as many random real images are called in the records; chance: in per cent.
    """
    warnings = []
    for net in dict.fromkeys(r["net"] for r in records):
        mine = {r["trained_on"]: r["accuracy_mean"] for r in reversed(records) if r["net"] == net}
        least = mine.get(random, 1.5 * chance)
        if mine[ours] <= least:
            other = "as many random real images" if random in mine else "1.5 times chance"
            remedy = "if that is unexpected, check the data set (-d), the factor (-f) and --normalized"
            result = f"the distilled set gives {mine[ours]:.1f} %, no more than {other} ({least:.1f} %)"
            warnings.append(f"{net}: {result}; {remedy}")
    return warnings


# --- Tables -----------------------------------------------------------------------------------------------------------


def share_of_real(record: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> float | None:
    """A record's accuracy, in per cent of the same network's on all real images; None where that is unknown."""
    for other in records:
        if other["trained_on"] == ALL_REAL and other["network"] == record["network"] and other["accuracy_mean"]:
            return 100 * float(record["accuracy_mean"]) / float(other["accuracy_mean"])
    return None


# A column's heading, and its cell for one record among all of the table.
COLUMNS: dict[str, Callable[[Record, Sequence[Record]], str]] = {
    "network": lambda r, all: r["net"],
    "trained on": lambda r, all: r["trained_on"],
    "stored/class": lambda r, all: f"{r['images_per_class']:.4g}",
    "stored": lambda r, all: size(r["stored_bytes"]),
    "decoded/class": lambda r, all: f"{r['decoded_per_class']:.4g}",
    "test accuracy %": lambda r, all: str(Score.from_dict(r)),
    BEST_OF_FOUR: lambda r, all: str(Score.from_dict(r).best_of_four or "unknown"),
    "of all real": lambda r, all: "" if (share := share_of_real(r, all)) is None else f"{share:.1f} %",
    "time": lambda r, all: span(r["seconds"]),
}


def cells(records: Sequence[Record], *, best: bool) -> list[list[str]]:
    """Head and rows; best: with the best of four tests.

    The column `of all real` is left out where no network was trained on them.
    """
    known = any(r["trained_on"] == ALL_REAL for r in records)
    names = [name for name in COLUMNS if {"of all real": known, BEST_OF_FOUR: best}.get(name, True)]
    return [names, *([COLUMNS[name](r, records) for name in names] for r in records)]


def as_text(records: Sequence[Record], *, best: bool = False) -> str:
    """The table in aligned columns, for a terminal, and below it that of scores; best: with the best of four tests."""
    tables = [_aligned(cells(records, best=best))]
    if compared := scores.cells(records):
        tables.append("\n".join([_aligned(compared), *scores.notes(records)]))
    return "\n\n".join(tables)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(f"{cell:{w}}" for cell, w in zip(row, wide, strict=True)).rstrip() for row in rows)


def as_markdown(records: Sequence[Record], about: Mapping[str, Any], *, best: bool = False) -> str:
    """The table in Markdown, and below it how it was measured; best: with the best of four tests."""
    lines = _piped(cells(records, best=best))
    if compared := scores.cells(records):
        lines += ["", *_piped(compared)]
    versions = about["versions"]
    notes = [
        f"Test accuracy on {about['dataset']}: mean +- sample standard deviation of n trainings of fresh networks, "
        "each tested after its last epoch. Stored: the pixels as the set holds them, and soft labels.",
        *([BEST_NOTE] if best else []),
        *scores.notes(records),
        f"`python3 {about['command']}`, {about['started']}, on {about['device']}, torch {versions['torch']}, commit "
        f"{versions['git_commit'][:12]}.",
    ]
    return "\n".join([*lines, "", *notes, ""])


def _piped(rows: Sequence[Sequence[str]]) -> list[str]:
    head, *others = rows
    return ["| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *others]]


BEST_NOTE = (
    "Best of 4 tests: of each training the best test after a quarter, half, three quarters and all of its epochs, "
    "chosen on the test set as in published figures. Only for a comparison with these: it is biased upwards."
)
CSV_FIELDS = (
    "net", "trained_on", "images_per_class", "stored_bytes", "decoded_per_class", "accuracy_mean", "accuracy_std", "n",
    "share_of_real", "seconds",
)  # fmt: skip


def as_csv(records: Sequence[Record], about: Mapping[str, Any], *, best: bool = False) -> str:
    """The table as CSV: a line per record, unrounded; accuracies in per cent, sizes in bytes, times in seconds.

    best: with mean and standard deviation of the best of four tests. Scores stand in the row of the set.
    """
    out = io.StringIO()
    compared = {name: None for r in records for name in scores.csv_entries(r)}
    fields = [*CSV_FIELDS, *((BEST_OF_FOUR, f"std of {BEST_OF_FOUR}") if best else ()), *compared]
    writer = csv.DictWriter(out, fields, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for r in records:
        of_best = r.get("best_of_four") or {}
        chosen = {BEST_OF_FOUR: of_best.get("accuracy_mean"), f"std of {BEST_OF_FOUR}": of_best.get("accuracy_std")}
        writer.writerow({**r, "share_of_real": share_of_real(r, records), **chosen, **scores.csv_entries(r)})
    return out.getvalue()


def as_json(records: Sequence[Record], about: Mapping[str, Any], *, best: bool = False) -> str:
    """The records themselves as JSON, always with the best of four tests."""
    return json.dumps({**about, "results": list(records)}, indent=2) + "\n"


TABLES = {".md": as_markdown, ".csv": as_csv, ".json": as_json}
