"""How long the parts of an inner step take: the published form and ours, side by side in one run. Not a test.

    $ python3 tests/bench.py                             # the headline work on this machine's processor
    $ python3 tests/bench.py --device cuda --json bench.json
    $ python3 tests/bench.py --work mnist cifar100 --image_folder data/cifar10_jpg
    $ python3 tests/bench.py --methods --repeats 3       # the inner step of every framework against its naive form
    $ python3 tests/bench.py --scaling --works digits    # the same parts in one process and in two, by torchrun
    $ python3 tests/bench.py --forecast                  # published budgets on many GPUs, forecast from this device

Every variant runs in a process of its own, one after the other, so that its peak memory is its own: the published form
as it comes; the same with the C allocator kept from returning memory, so that no ratio is one of page faults alone;
ours in every precision of the machine, on a GPU also with --deterministic, so that its cost can be read off. A line is
printed and the JSON file written whenever a variant ends; one that fails says so, and the next begins. Medians after a
warm-up. Images are random unless a folder is given: their content matters for the inertia only. Keep the machine
otherwise idle. Where a GPU is there for minutes only, tests/gpu_record.py measures the same parts in one process.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from tests import bench_methods, bench_ranks, forecast
from tests.bench_parts import (
    BATCH,
    EVALUATION,
    PARTS,
    SELECTION,
    STEP,
    WORKS,
    Timer,
    Work,
    our_evaluation,
    published_evaluation,
    real_images,
    row,
    run_ours,
    run_published,
    seconds,
)  # fmt: skip
from utils.config.presets import METHODS
from utils.method.augment import Augment
from utils.method.images import ImageSet
from utils.method.selection import embed
from utils.method.training import Recipe, Trainer, fresh_network, update_network
from utils.numerics.compute import Compute
from utils.system import device as machine
from utils.system.draws import Draws

DETERMINISTIC = ", deterministic"  # at the end of a variant's name
STEPS = 2000 * 100


def peaks(timer: Timer, precision: str) -> dict[str, float]:
    """GFLOP/s of a matrix product and of 3x3 convolutions with 128 channels, the best of several sizes."""
    device = timer.device
    machine.set_precision(device, precision)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product = 2e-9 * size**3 / min(timer(lambda: a @ b, 7))
    best = 0.0
    for side in (8, 16):
        for n in (32, 128, 1280) if device.type == "cuda" else (20, 32, 64, 128):
            x = torch.randn(n, 128, side, side, device=device, dtype=dtype).to(memory_format=torch.channels_last)
            w = torch.randn(128, 128, 3, 3, device=device, dtype=dtype).to(memory_format=torch.channels_last)
            seconds = min(timer(lambda: torch.nn.functional.conv2d(x, w, padding=1), 9))  # noqa: B023 - called here
            best = max(best, 2e-9 * n * side**2 * w.numel() / seconds)
    return {"matrix product": product, "convolution": best}


def inertia(work: Work, real: ImageSet, timer: Timer) -> dict[str, float]:
    """Sum of squared distances to the centroids after our k-means of one class, by scikit-learn's: all in float32
    embeddings, the centroids of ours found in the precision in which selection embeds."""
    from sklearn.cluster import KMeans

    from utils.method.selection import lloyd, padded

    compute = Compute(timer.device)
    net = fresh_network(work.spec, Draws(timer.device, 0))
    trainer = Trainer([net], [real], Recipe(BATCH, Augment("color_crop"), "cut"), compute)
    ratios: dict[str, list[float]] = {"untrained": [], "after 20 updates": []}
    for state, kept in ratios.items():
        if state != "untrained":
            for i in range(20):
                update_network(trainer, n_data=work.n_data, draws=Draws(timer.device, "update", i))
        for c in range(3):
            exact = embed(net, real.of_class(c), real.normalize, compute)
            cheap = embed(net, real.of_class(c), real.normalize, compute.cheapest())
            points, rows = padded([cheap])
            _, nearest, _ = lloyd(points, rows, BATCH, Draws(timer.device, c).uniform(*rows.shape))
            member = torch.nn.functional.one_hot(nearest[0], BATCH).to(exact.dtype)
            means = (member.T @ exact) / member.sum(0).clamp(min=1)[:, None]
            ours = torch.cdist(exact, means).square().min(1).values.sum().item()
            theirs = KMeans(BATCH, n_init=1, random_state=c).fit(exact.cpu().numpy()).inertia_
            kept.append(ours / theirs)
    return {state: statistics.fmean(kept) for state, kept in ratios.items()}


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """One variant of one work, in this process."""
    device = machine.pick_device(given.device)
    work, timer = WORKS[given.work[0]], Timer(device, given.repeats)
    if given.variant == "peaks":
        machine.keep_freed_memory()
        return {p: peaks(timer, p) for p in given.precisions}
    if given.variant not in ("published", bench_methods.NAIVE[0]):
        machine.keep_freed_memory()
    if given.variant.endswith(DETERMINISTIC):
        machine.be_deterministic(device)
    if given.methods:
        found = bench_methods.measure(given.methods[0], given.variant, given.flags, timer, device)
        return {**found, "peak memory": machine.peak_memory(device)}
    real = real_images(work, device, given.image_folder if given.work[0] == "headline" else None)
    if given.variant == "inertia":
        return dict(inertia(work, real, timer))
    if given.variant.startswith("published"):
        found = run_published(work, real, timer) | published_evaluation(work, real, timer)
    else:
        precision = precision_of(given.variant)
        found = run_ours(work, real, timer, precision) | our_evaluation(work, real, timer, precision)
    return {**found, "peak memory": machine.peak_memory(device)}


def apart(variant: str, words: Sequence[str], timeout: float | None = None) -> dict[str, Any]:
    """What a variant measures in a process of its own, with these flags of this script; `error` where that failed."""
    print("...", *words[words.index("--work") + 1 :][:1], variant, file=sys.stderr, flush=True)
    command = [sys.executable, __file__, *words, "--variant", variant]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=timeout)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:  # what it said is on standard error
        how = f"exit status {error.returncode}" if isinstance(error, subprocess.CalledProcessError) else "out of time"
        return {"error": how}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def precision_of(variant: str) -> str:
    """`ours bf16, deterministic` -> bf16."""
    return variant.removeprefix("ours ").removesuffix(DETERMINISTIC)


def table(name: str, measured: dict[str, dict[str, Any]], top: dict[str, Any]) -> str:
    """What a person reads: all variants that did not fail."""
    gflop, results = WORKS[name].gflop(), {v: found for v, found in measured.items() if "error" not in found}
    lines = [
        f"{name}: seconds (median), x over the published form / over it with the allocator kept, GFLOP/s, % of peak",
        "",
        "| | " + " | ".join(results) + " |",
        "|---" * (len(results) + 1) + "|",
    ]
    for part in (*PARTS, EVALUATION, SELECTION, STEP):
        if part == EVALUATION and not any(part in found for found in results.values()):
            continue
        cells = []
        for variant, found in results.items():
            value = seconds(found, part)
            cell = f"{value:.3g} s"
            if variant.startswith("ours"):
                naive = [results[v] for v in ("published", "published, allocator kept") if v in results]
                if naive:
                    cell += ", " + " / ".join(f"{seconds(form, part) / value:.2f} x" for form in naive)
                peak = top.get(precision_of(variant), {}).get("convolution")
                if part in gflop and part in PARTS[:2] and peak:
                    cell += f", {gflop[part] / value:.0f}, {100 * gflop[part] / value / peak:.0f} %"
            cells.append(cell)
        lines.append(f"| {part} | " + " | ".join(cells) + " |")
    for what in ("operators", "kernels"):
        if all(what in found for found in results.values()):
            lines.append(f"| {what} | " + " | ".join(str(found[what]) for found in results.values()) + " |")
    lines.append("| peak memory, GB | " + " | ".join(f"{r['peak memory'] / 1e9:.1f}" for r in results.values()) + " |")
    hours = (f"{STEPS * seconds(found, STEP) / 3600:.3g} h" for found in results.values())
    lines.append("| 2,000 outer iterations | " + " | ".join(hours) + " |")
    return "\n".join([*lines, *(f"{v} failed: {f['error']}" for v, f in measured.items() if "error" in f)])


def main(argv: Sequence[str]) -> int:
    """Run the variants, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--work", nargs="+", default=["headline"], choices=tuple(WORKS))
    parser.add_argument("--image_folder", help="CIFAR-10 as image files, for the headline's inertia")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", help="write everything that was measured to this file")
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    parser.add_argument("--precisions", nargs="+", help="of fp32, tf32, bf16 (default: those that the device has)")
    for more in (bench_methods, bench_ranks, forecast):
        more.add_flags(parser)
    given = parser.parse_args(argv)
    device = machine.pick_device(given.device)
    if given.precisions is None:
        given.precisions = ["fp32", *(["tf32"] if device.type == "cuda" else [])]
        given.precisions += ["bf16"] if machine.fast_bfloat16(device) else []
    if given.variant:
        print(json.dumps(measure(given)))
        return 0

    words = ["--device", device.type, "--repeats", str(given.repeats), "--precisions", *given.precisions]
    words += ["--image_folder", given.image_folder] if given.image_folder else []
    report: dict[str, Any] = {}

    def keep() -> None:
        if given.json:
            Path(given.json).write_text(json.dumps(report, indent=1) + "\n")

    def measured(results: dict[str, Any], variant: str, work: str, *more: str) -> None:
        """Add a variant to the results, which are a part of the report."""
        results[variant] = apart(variant, [*words, "--work", work, *more])
        # A framework's step is measured as a whole.
        found = {STEP if name == "seconds" else name: value for name, value in results[variant].items()}
        print(f"{' '.join([work, *more[1:2]])}, {variant}: {row(found)}", flush=True)
        keep()

    about = {
        "device": machine.device_name(device),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "repeats": given.repeats,
    }
    report["machine"] = about
    if given.scaling or given.forecast:
        if given.scaling and (problem := bench_ranks.problem(given)):
            parser.error(problem)
        text, report["ranks"] = (bench_ranks if given.scaling else forecast).run(given, device)
        print(json.dumps(about) + "\n\n" + text)
    elif given.methods is not None:
        print(json.dumps(about))
        report["methods"] = {method: {} for method in given.methods or METHODS}
        for method, results in report["methods"].items():
            for variant in [*bench_methods.NAIVE, *(f"ours {p}" for p in given.precisions)]:
                measured(results, variant, "headline", "--methods", method, f"--flags={given.flags}")
        print("\n" + bench_methods.table(report["methods"], given.flags))
    else:
        report["peaks"], report["works"] = apart("peaks", [*words, "--work", "headline"]), {}
        print(json.dumps({**about, "peaks in GFLOP/s": report["peaks"]}), flush=True)
        for work in given.work:
            report["works"][work] = results = {}
            variants = ["published", "published, allocator kept", *(f"ours {p}" for p in given.precisions)]
            variants += [f"ours {p}{DETERMINISTIC}" for p in given.precisions if device.type == "cuda"]
            for variant in variants:
                measured(results, variant, work)
            print("\n" + table(work, results, report["peaks"]))
            if given.image_folder and work == "headline":
                report["inertia"] = apart("inertia", [*words, "--work", work])
                print("\ninertia over scikit-learn's:", report["inertia"])
    keep()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
