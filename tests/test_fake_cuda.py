"""The CUDA path on fake tensors: no captured function breaks a rule of CUDA graphs, or takes more than it did.

The work is done by tests/fake_cuda.py in processes of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import models
from tests import fake_autograd

ROOT = Path(__file__).resolve().parent.parent
MATCH, UNROLL, TRAIN = "MatchingStep._step", "TrajectoryStep._step", "Trainer._steps"
CALIBRATE = "MatchingStep._calibrate"
CLUSTER, SELECT = "cluster", "select"

# What a call may take: launches, and megabytes of the tensors made in it that are in use at a time. Less than KEPT of
# it fails as well: then lower the number here. `python3 tests/fake_cuda.py` prints them.
KEPT, ROUNDING = 0.8, 0.005
Limits = dict[str, tuple[int, float]]
LIMITS: dict[str, Limits] = {
    #                           launches    MB
    "dream":                {MATCH:  (295, 4.58), TRAIN: (206, 1.59), CLUSTER: (472, 0.24)},
    "idc":                  {MATCH:  (295, 4.58), TRAIN: (206, 1.59)},
    "dc":                   {MATCH:  (261, 4.48), TRAIN: ( 84, 1.57)},
    "dsa":                  {MATCH:  (459, 4.56), TRAIN: (162, 1.57)},
    "dm":                   {MATCH:  (313, 3.19), TRAIN: (233, 1.59)},
    "dream+":               {MATCH:  (308, 4.58), TRAIN: (323, 1.78), CLUSTER: (472, 0.24)},
    "mtt":                  {UNROLL: (747, 3.67), TRAIN: (203, 1.59)},
    "dance":                {MATCH:  (229, 3.21), TRAIN: (206, 1.59), CALIBRATE: (242, 1.12)},
    "ncfm":                 {MATCH:  (310, 6.76), TRAIN: (206, 1.59)},
    "early":                {MATCH:  (296, 4.58), TRAIN: (206, 1.59), CLUSTER: (472, 0.24)},
    "dream without Triton": {MATCH:  (513, 8.42), TRAIN: (374, 2.87), CLUSTER: (472, 0.24)},
    "hard labels":          {TRAIN:  (295, 1.78)},
    "soft labels":          {TRAIN:  (294, 1.78)},
    "select kmeans":        {SELECT: (516, 2.93)},
    "select members":       {SELECT: (535, 2.93)},
    "select random":        {SELECT: (  7, 0.00)},
    "select central":       {SELECT: ( 44, 2.93)},
    "select boundary":      {SELECT: ( 50, 2.93)},
    "select herding":       {SELECT: (521, 2.93)},
    "embed cifar10":        {SELECT: (861,  306)},
    "embed mnist":          {SELECT: (834,  275)},
    "embed folder":         {SELECT: (1182, 313)},
}  # fmt: skip
HEADLINE: dict[str, Limits] = {
    "fp32":                 {MATCH:  (394, 2457), TRAIN: ( 905, 276), CLUSTER: (472, 825)},
    "bf16":                 {MATCH:  (412, 1261), TRAIN: (1081, 156), CLUSTER: (472, 825)},
    "selection":            {SELECT: (861, 1259)},
}  # fmt: skip
MOST_SHAPES = 3  # of the images that are embedded together; for each of them a GPU chooses its kernels anew


def audited(*works: str, precision: str = "fp32") -> dict[str, list[dict[str, Any]]]:
    """What tests/fake_cuda.py finds: work -> its functions."""
    return json.loads(output("tests/fake_cuda.py", "--json", "--precision", precision, "--work", *works))


def output(*arguments: str) -> str:
    """What Python prints for these arguments; skips where this PyTorch has no fake CUDA tensors."""
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    if "cannot compute with fake CUDA tensors" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    return done.stdout


def faults(functions: list[dict[str, Any]], limits: Limits) -> list[str]:
    """Broken rules, and numbers that the table does not allow."""
    found = [f"{f['function']}: {problem}" for f in functions for problem in f["problems"]]
    taken: dict[str, tuple[float, float]] = {}
    for f in functions:
        name = f["function"].split()[0]  # without the inputs' shapes
        if name != "between":
            launches, peak = taken.get(name, (0, 0))
            taken[name] = max(launches, f["launches"]), max(peak, f["peak"] / 1e6)
    if taken.keys() != limits.keys():
        found.append(f"captured are {', '.join(taken)}, and in the table {', '.join(limits)}")
    for name in taken.keys() & limits.keys():
        for what, value, limit in zip(("launches", "MB"), taken[name], limits[name], strict=True):
            if not KEPT * limit - ROUNDING <= value <= limit + ROUNDING:
                found.append(f"{name}: {value:.4g} {what}, in the table {limit:.4g}")
    return found


def check(found: dict[str, list[dict[str, Any]]], table: dict[str, Limits]) -> None:
    """No work has a fault."""
    wrong = {work: faults(functions, table[work]) for work, functions in found.items()}
    assert not {work: each for work, each in wrong.items() if each}


@pytest.mark.parametrize(
    "works",
    [
        ("dream", "hard labels"),
        ("dance", "ncfm"),
        pytest.param(("dm", "mtt", "early", "soft labels"), marks=pytest.mark.slow),
        pytest.param(("idc", "dc", "dsa", "dream+", "dream without Triton"), marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_captured_functions_keep_to_the_rules_and_to_the_table(works: tuple[str, ...]) -> None:
    check(audited(*works), LIMITS)


@pytest.mark.slow
def test_selections_never_wait_for_the_device_and_embed_pieces_of_few_shapes() -> None:
    found = audited(*(work for work in LIMITS if work.startswith(("select ", "embed "))))
    shapes = {work: max(f["shapes"] for f in found[work]) for work in found if work.startswith("embed ")}
    assert all(1 <= number <= MOST_SHAPES for number in shapes.values()), shapes
    check(found, LIMITS)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_headline_at_full_size_keeps_to_the_rules_and_to_the_table(precision: str) -> None:
    check(audited("headline", precision=precision), {"headline": HEADLINE[precision]})


@pytest.mark.slow
def test_the_selection_of_the_headline_at_full_size_keeps_to_the_table() -> None:
    check(audited("headline selection"), {"headline selection": HEADLINE["selection"]})


# --- The audit itself -------------------------------------------------------------------------------------------------

BROKEN = """
import json, torch
from tests.fake_device import NEEDS_VALUES, fake_cuda, unsupported
from utils.numerics.compute import Captured

if reason := unsupported():
    raise SystemExit(f"cannot compute with fake CUDA tensors: {reason}")

def rate_of_a_number(x):
    x.grad = torch.ones_like(x)
    torch.optim.SGD([x], lr=0.1, fused=True).step()

def other_layout(x):
    x.grad = torch.ones_like(x).mT
    sgd = torch.optim.SGD([x], lr=0.1, fused=True)
    sgd.param_groups[0]["lr"] = torch.full((), 0.1, device="cuda")
    sgd.step()

functions = {
    "nothing wrong": lambda x: (x * 2).sum(),
    "a CPU index": lambda x: x[torch.arange(2)],
    "a CPU number": lambda x: x * torch.tensor(2.0),
    "to the CPU": lambda x: x.cpu(),
    "from the CPU": lambda x: x + torch.ones(3).to("cuda"),
    "random": lambda x: x + torch.rand(3, device="cuda"),
    "a value": lambda x: x.sum().item(),
    "values": lambda x: x[x > 0],
    "another address": lambda x: x + torch.empty_like(x).set_(kept.pop()),
    "a number": rate_of_a_number,
    "a layout": other_layout,
}
found = {}
with fake_cuda() as recorder:
    kept = [torch.ones(3, device="cuda") for _ in range(2)]
    for name, function in functions.items():
        captured = Captured(function, torch.device("cuda"))
        first = len(recorder.audits)
        for _ in range(2):
            try:
                captured(torch.ones(3, 3, device="cuda"))
            except NEEDS_VALUES:
                pass
        found[name] = [problem for audit in recorder.audits[first:] for problem in audit.problems]
print(json.dumps(found))
"""


@pytest.mark.slow
def test_the_audit_notices_every_broken_rule() -> None:
    found = {name: " ".join(problems) for name, problems in json.loads(output("-c", BROKEN)).items()}
    expected = {
        "a CPU index": "index takes a CPU tensor",
        "a CPU number": "mul takes a CPU tensor",
        "to the CPU": "copy from cpu to cuda",
        "from the CPU": "copy from cpu to cuda",
        "random": "rand draws random numbers",
        "a value": "the host waits for _local_scalar_dense",
        "values": "the host waits for index",
        "another address": "another address",
        "a number": "a rate that is a number",
        "a layout": "differ in type or layout",
    }
    assert found.pop("nothing wrong") == ""
    assert {name for name in found if expected[name] not in found[name]} == set(), found


def test_gradients_made_in_python_are_those_of_autograd() -> None:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    net = models.build(models.resolve("convnet", channels=3, classes=3, side=16, depth=2, width=16)).double()
    x = torch.rand(4, 3, 16, 16, dtype=torch.float64, generator=generator, requires_grad=True)
    parameters = list(net.parameters())

    def second(grad: Any) -> tuple[Tensor, ...]:
        first = grad(net(x).logsumexp(1).sum(), parameters, create_graph=True)
        return grad(torch.stack([g.square().sum() for g in first]).sum(), [x, *parameters])

    for ours, expected in zip(second(fake_autograd.grad), second(torch.autograd.grad), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
