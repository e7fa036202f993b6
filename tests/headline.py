"""The headline setting on a GPU for as long as there is one, beside the published curve. Not a test.

    $ python3 tests/headline.py --minutes 9 --image_folder data/cifar10_jpg

Run it again to go on: it is `condense.py --reproduce -d cifar10 -f 2 --ipc 10` with evaluations and a time limit.
What follows `--` goes to condense.py as it is.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import condense
from utils.config import resolve
from utils.runs.folder import METRICS
from utils.system.process import run_main

# Accuracy in per cent at outer iterations, CIFAR-10, ipc 10, f = 2, as published (read off a curve, +-0.5).
PUBLISHED_KMEANS = {0: 54.2, 40: 64.0, 200: 66.9, 1000: 68.9}
PUBLISHED_RANDOM = {0: 48.8, 40: 58.6, 200: 65.2, 1000: 66.5}


def main(argv: Sequence[str]) -> int:
    """Run condense.py, then print what its metrics say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", default="9", help="stop cleanly after this time (default: 9)")
    parser.add_argument("--image_folder", default="data/cifar10_jpg", help="the images (default: data/cifar10_jpg)")
    parser.add_argument("more", nargs="*", help="further flags of condense.py, after --")
    given = parser.parse_args(argv)

    words = ["--reproduce", "-d", "cifar10", "-f", "2", "--ipc", "10", "--eval_every", "40", "--tag", "headline"]
    words += ["--image_folder", given.image_folder, "--max_minutes", given.minutes, *given.more]
    status = condense.main(words)
    o = resolve.condense(words, "").options
    print(table(resolve.run_folder(o) / METRICS, o.select))
    return status


def table(metrics: Path, select: str) -> str:
    """Our accuracies and the published ones at the same outer iterations."""
    published = PUBLISHED_KMEANS if select == "kmeans" else PUBLISHED_RANDOM
    lines = [f"{'iteration':>10}{'accuracy %':>24}{'published':>12}{'minutes':>10}"]
    for line in metrics.read_text().splitlines():
        event = json.loads(line)
        if "accuracy_mean" in event:
            std = "" if event["accuracy_std"] is None else f" +- {event['accuracy_std']:.1f}"
            ours = f"{event['accuracy_mean']:.1f}{std} (n={event['n']})"
            known = published.get(event["iteration"], "")
            lines.append(f"{event['iteration']:>10}{ours:>24}{known:>12}{event['seconds'] / 60:>10.1f}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_main(main)
