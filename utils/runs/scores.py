"""Scores of a distilled set that the field compares methods by: HLR, IOR, LRS and ARS, as DD-Ranking defines them.

    HLR = acc(all real images) - acc(set)              hard-label recovery, in percentage points; small is good
    IOR = acc(set) - acc(random real images)           improvement over random, in percentage points
    LRS = scale(w IOR - (1 - w) HLR)                   label-robust score, 0 to 1, of accuracies as fractions
    ARS = scale(g IOR + (1 - g) IOR of plain images)   augmentation-robust score, 0 to 1; plain: without augmentation

They are computed here: the field's own package (ddranking 0.2.0) needs a NumPy below 2 and takes the exponential of
percentages, so LRS and ARS are compared with published ones through HLR and IOR. Everything is learned from hard
labels, and tested after the last epoch.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from operator import sub
from typing import Any, NamedTuple

from utils.method.evaluation import Score
from utils.system.report import size

WEIGHT = 0.5  # w and g above
DISTILLED, RANDOM, ALL_REAL = "distilled set", "random real images", "all real images"  # rows that are compared
HARD, PLAIN, TAUGHT = ", hard labels", ", plain", ", teacher's labels"  # what is added to the names of rows
SCORES = {"hlr": "HLR", "ior": "IOR", "lrs": "LRS", "ars": "ARS", "ior_taught": "IOR, teacher's labels"}
BUDGETS = ("stored", "decoded")  # whether there are as many random images as the set stores, or as it decodes to
Record = dict[str, Any]

NOTE = (
    "HLR: accuracy on all real images less that on the set; IOR: that on the set less that on random real images; in "
    "percentage points. LRS = (e^a - 1/e) / (e - 1/e) with a = (IOR - HLR) / 2 of fractions, ARS the same of the mean "
    "IOR with augmentation and without (plain: neither augmentation nor CutMix). All with hard labels, after the last "
    "epoch, by our protocol ({protocol}), which is not DD-Ranking's: beside published scores, compare HLR and IOR. "
    "+-: sample standard deviation of the score training by training, whose networks begin alike in all rows."
)
TAUGHT_NOTE = (
    "Teacher's labels: the probabilities (temperature 1) that a trained network gives to each decoded image, kept for "
    "all its augmented views; they are stored with the images, 4 bytes a class and image. Whether the set is better "
    "than random real images with the same teacher's labels decides whether distilling helped. Teachers' own test "
    "accuracies: {teachers}."
)


def scale(difference: float) -> float:
    """A difference of accuracies, -1 to 1, on DD-Ranking's scale from 0 to 1."""
    return (math.exp(difference) - math.exp(-1)) / (math.e - math.exp(-1))


def label_robust(hlr: float, ior: float) -> float:
    """LRS of HLR and IOR in percentage points."""
    return scale((WEIGHT * ior - (1 - WEIGHT) * hlr) / 100)


def augmentation_robust(ior: float, plain: float) -> float:
    """ARS of IOR with augmentation and without, in percentage points."""
    return scale((WEIGHT * ior + (1 - WEIGHT) * plain) / 100)


class Estimate(NamedTuple):
    """A value computed from mean accuracies, and its spread over the trainings."""

    value: float
    std: float | None  # None for a single training

    def as_dict(self, name: str) -> Record:
        """Both numbers, rounded, as entries of a JSON file."""
        return {name: round(self.value, 4), f"{name}_std": None if self.std is None else round(self.std, 4)}


def estimate(formula: Callable[..., float], *scores: Score) -> Estimate:
    """Value of a formula for the mean accuracies of some rows.

    Its spread is the sample standard deviation of the same formula, training by training. The r-th trainings of all
    rows begin with the same network, so they belong together.
    """
    single = [formula(*accuracies) for accuracies in zip(*(score.accuracies for score in scores), strict=True)]
    value = formula(*(score.mean for score in scores))
    return Estimate(value, statistics.stdev(single) if len(single) > 1 else None)


def notes(records: Sequence[Record]) -> list[str]:
    """What the table of comparisons means; none where there are none."""
    known = {name for record in records for comparison in record.get("scores", ()) for name in comparison}
    teachers = {r["net"]: r["teacher"] for r in records if "teacher" in r}
    told = "; ".join(f"{net} on {t['trained_on']} {t['accuracy']:.1f} %" for net, t in teachers.items())
    protocol = records[0]["protocol"]
    others = {r["protocol"]["epochs"]: r["trained_on"] for r in records} | {protocol["epochs"]: ""}
    words = [
        *(f"{count} epochs" + (f" for {name}" if name else "") for count, name in others.items()),
        f"batches of {protocol['batch_size']}",
        f"augmentation {protocol['eval_aug_type']}",
        "CutMix" if protocol["mixup"] == "cut" else "no CutMix",
    ]
    return [
        *([NOTE.format(protocol=", ".join(words))] if "lrs" in known else []),
        *([TAUGHT_NOTE.format(teachers=told)] if "ior_taught" in known else []),
    ]


def with_scores(records: Sequence[Record], ours: str = DISTILLED) -> list[Record]:
    """The rows of a table, and in those of the set, under `scores`, its comparisons with random real images.

    ours: name of the set's rows.
    """
    found = []
    for record in records:
        rows = [other for other in records if other["net"] == record["net"]]
        is_set = record["trained_on"] == ours
        found.append({**record, "scores": comparisons(rows, ours)} if is_set else record)
    return found


def comparisons(records: Sequence[Record], ours: str = DISTILLED) -> list[Record]:
    """One network's comparisons of the set with random real images, of the stored budget and of the decoded one.

    Each has IOR; all scores, where networks were trained on all real and on plain images; and IOR with a teacher's
    labels, where both have them. Soft labels of the set's own are left out: its row of hard labels is compared.
    """
    rows = {(r["trained_on"], r["images_per_class"]): r for r in reversed(records)}
    per_class = next(r["images_per_class"] for r in records if r["trained_on"] == ours)
    hard = rows.get((ours + HARD, per_class)) or rows[ours, per_class]
    whole = next((Score.from_dict(r) for r in records if r["trained_on"] == ALL_REAL), None)

    def pair(mine: str, its: str, count: float) -> list[Score]:
        """Scores of both rows; none unless both are there."""
        found = [rows.get((mine, per_class)), rows.get((its, count))]
        return [Score.from_dict(r) for r in found if r is not None] if None not in found else []

    found = []
    for budget, other in zip(BUDGETS, (r for r in records if r["trained_on"] == RANDOM), strict=False):
        count = other["images_per_class"]
        both = pair(hard["trained_on"], RANDOM, count)
        plain = pair(hard["trained_on"] + PLAIN, RANDOM + PLAIN, count)
        taught = pair(ours + TAUGHT, RANDOM + TAUGHT, count)
        values = {"ior": estimate(sub, *both)}
        if whole and plain:
            values["hlr"] = estimate(sub, whole, both[0])
            values["lrs"] = estimate(lambda all, m, i: label_robust(all - m, m - i), whole, *both)
            values["ars"] = estimate(lambda m, i, p, q: augmentation_robust(m - i, p - q), *both, *plain)
        if taught:
            values["ior_taught"] = estimate(sub, *taught)
        sizes = {"random_per_class": count, "random_bytes": other["stored_bytes"], "set_bytes": hard["stored_bytes"]}
        comparison = {"budget": budget, **sizes, "n": both[0].n}
        for name, value in values.items():
            comparison |= value.as_dict(name)
        found.append(comparison)
    return found


def cells(records: Sequence[Record]) -> list[list[str]]:
    """Head and rows of the table of all comparisons in some rows; none where there are none."""
    found = [(record, comparison) for record in records for comparison in record.get("scores", ())]
    known = {name: heading for name, heading in SCORES.items() if any(name in c for _, c in found)}
    rows = [
        [
            record["net"],
            f"as many as {comparison['budget']}"
            + (", or all" if comparison["random_per_class"] < round(record["images_per_class"]) else ""),
            f"{comparison['random_per_class']:.4g}",
            size(comparison["random_bytes"]),
            size(comparison["set_bytes"]),
            *(_cell(comparison, name) for name in known),
            str(comparison["n"]),
        ]
        for record, comparison in found
    ]
    head = ["network", "random images", "random/class", "random stored", "set stored", *known.values(), "n"]
    return [head, *rows] if rows else []


def _cell(comparison: Record, name: str) -> str:
    """A score and its spread: percentage points with one digit, LRS and ARS with three."""
    digits = 3 if name in ("lrs", "ars") else 1
    std = comparison[f"{name}_std"]
    return f"{comparison[name]:.{digits}f}" + ("" if std is None else f" +- {std:.{digits}f}")


def csv_entries(record: Record) -> Record:
    """The comparisons of a row as columns of a CSV file: `ior_stored`, `ior_stored_std`, `ior_decoded`, ..."""
    return {
        f"{name}_{comparison['budget']}{ending}": comparison[name + ending]
        for comparison in record.get("scores", ())
        for name in SCORES
        for ending in ("", "_std")
        if name in comparison
    }
