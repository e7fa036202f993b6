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
MATCH, UNROLL, TRAIN = "MatchingStep._step", "TrajectoryStep._step", "Trainer._step"

# What a call may take: launches, and megabytes of tensors made in it that are in use at a time. Less than KEPT of it
# fails as well: then lower the number here. `python3 tests/fake_cuda.py` prints them.
KEPT, ROUNDING = 0.8, 0.005
Limits = dict[str, tuple[int, float]]
LIMITS: dict[str, Limits] = {
    #                              launches    MB
    "dream": {            MATCH:  (     517,  7.00), TRAIN: (211, 2.29)},
    "idc": {              MATCH:  (     517,  7.00), TRAIN: (211, 2.29)},
    "dc": {               MATCH:  (     489,  6.89), TRAIN: (135, 2.33)},
    "dsa": {              MATCH:  (     647,  6.97), TRAIN: (203, 2.33)},
    "dm": {               MATCH:  (     340,  3.04), TRAIN: (230, 2.29)},
    "dream+": {           MATCH:  (     536,  7.00), TRAIN: (211, 2.29)},
    "mtt": {              UNROLL: (    1092,  5.74), TRAIN: (205, 2.29)},
    "hard labels": {      TRAIN:  (     244,  2.36)},
    "soft labels": {      TRAIN:  (     242,  2.36)},
    "select kmeans": {    "select": (   634,  2.03)},
    "select random": {    "select": (     7,  0.00)},
    "select central": {   "select": (   163,  1.99)},
    "select boundary": {  "select": (   169,  1.99)},
    "select herding": {   "select": (   250,  1.99)},
    "embed cifar10": {    "select": (  2421, 99.99)},
    "embed mnist": {      "select": (  2361, 99.99)},
    "embed folder": {     "select": (  7281, 99.99)},
    "headline fp32": {    MATCH:  (     752,  5640), TRAIN: (266, 564)},
    "headline bf16": {    MATCH:  (     752,  5640), TRAIN: (266, 564)},
    "headline selection bf16": {"select": (2421, 4261)},
}  # fmt: skip
DATA_SETS = ("embed cifar10", "embed mnist", "embed folder")
MOST_SHAPES = 3  # of the images that an embedding computes together: whatever is made per shape, it is made at once


def audited(*works: str, precision: str = "fp32") -> dict[str, list[dict[str, Any]]]:
    """What tests/fake_cuda.py finds: work -> its functions."""
    command = ["tests/fake_cuda.py", "--json", "--precision", precision, "--work", *works]
    return json.loads(output(*command))


def output(*arguments: str) -> str:
    """What Python prints for these arguments; skips where this PyTorch has no fake CUDA tensors."""
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    if "cannot compute with fake CUDA tensors" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    return done.stdout


def faults(work: str, functions: list[dict[str, Any]]) -> list[str]:
    """Broken rules, and numbers that the table does not allow."""
    found = [f"{work}, {f['function']}: {problem}" for f in functions for problem in f["problems"]]
    taken: dict[str, list[float]] = {}
    for f in functions:
        name = f["function"].split()[0]  # without the inputs' shapes
        if name != "between":
            most = taken.setdefault(name, [0, 0])
            most[:] = max(most[0], f["launches"]), max(most[1], f["peak"] / 1e6)
    if taken.keys() != LIMITS[work].keys():
        found.append(f"{work}: captured are {', '.join(taken)}, and not {', '.join(LIMITS[work])}")
    for name, most in taken.items():
        for what, value, limit in zip(("launches", "MB"), most, LIMITS[work].get(name, ()), strict=False):
            if not KEPT * limit - ROUNDING <= value <= limit + ROUNDING:
                found.append(f"{work}, {name}: {value:.4g} {what}, the table says {limit:.4g}")
    return found


@pytest.mark.parametrize(
    "works",
    [("dream", "idc", "dc", "dsa"), ("dm", "mtt", "dream+"), ("hard labels", "soft labels")],
    ids=" ".join,
)
def test_captured_functions_keep_to_the_rules_and_to_the_table(works: tuple[str, ...]) -> None:
    assert not [fault for work, functions in audited(*works).items() for fault in faults(work, functions)]


def test_selections_never_wait_for_the_device() -> None:
    works = [work for work in LIMITS if work.startswith("select ")]
    assert not [fault for work, functions in audited(*works).items() for fault in faults(work, functions)]


def test_images_are_embedded_in_pieces_of_few_shapes() -> None:
    found = audited(*DATA_SETS)
    assert {work: f["shapes"] for work in found for f in found[work] if f["shapes"] > MOST_SHAPES} == {}
    assert not [fault for work in DATA_SETS for fault in faults(work, found[work])]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_headline_at_full_size_keeps_to_the_rules_and_to_the_table(precision: str) -> None:
    (functions,) = audited("headline", precision=precision).values()
    assert not faults(f"headline {precision}", functions)


@pytest.mark.slow
def test_the_headlines_selection_keeps_to_the_table() -> None:
    (functions,) = audited("headline selection", precision="bf16").values()
    assert not faults("headline selection bf16", functions)


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
