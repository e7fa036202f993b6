"""Whether a precision harms: pairs of runs that differ in --precision alone, over several seeds. Not a test.

    $ python3 tests/precision.py --seeds 5 -- --ipc 1
    $ python3 tests/precision.py --seeds 5 -- -d cifar10 --image_folder data/cifar10_jpg --ipc 1 -f 2 --niter 3

What follows `--` goes to condense.py as it is. Runs that are finished are read, not repeated. Prints the accuracy of
every run, and the mean difference with its standard error.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import condense
from utils.config import resolve
from utils.files import atomic
from utils.runs.card import CARD
from utils.system.process import run_main


def accuracy(words: Sequence[str]) -> float:
    """Mean test accuracy of the set that this command distils."""
    condense.main(words)
    o = resolve.condense(words, "").options
    card = atomic.read_json(resolve.run_folder(o) / CARD)
    return float(card["accuracy"]["accuracy_mean"])


def main(argv: Sequence[str]) -> int:
    """Run the pairs and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="pairs (default: 5)")
    parser.add_argument("--precisions", nargs=2, default=["fp32", "bf16"], help="(default: fp32 bf16)")
    parser.add_argument("more", nargs="*", help="flags of condense.py, after --")
    given = parser.parse_args(argv)
    pairs = []
    for seed in range(given.seeds):
        fixed = [*given.more, "--seed", str(seed)]
        pairs.append([accuracy([*fixed, "--precision", p, "--tag", f"{p}_seed{seed}"]) for p in given.precisions])
    first, second = given.precisions
    differences = [b - a for a, b in pairs]
    spread = statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else float("nan")
    print("\n".join(f"seed {seed}: {first} {a:.2f} %, {second} {b:.2f} %" for seed, (a, b) in enumerate(pairs)))
    print(f"{second} - {first}: {statistics.fmean(differences):+.2f} +- {spread:.2f} (standard error, n={len(pairs)})")
    return 0


if __name__ == "__main__":
    run_main(main)
