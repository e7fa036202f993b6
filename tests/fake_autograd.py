"""Reverse-mode differentiation in Python, for tensors on a device that the machine does not have.

PyTorch's own engine asks the device's driver for a stream before it walks a graph of CUDA tensors, even of fake ones.
The nodes of the graph need no driver, so here the walk is made in Python, and they compute as always.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

Node = Any  # torch.autograd.graph.Node, without its private attributes


def grad(
    outputs: Tensor | Sequence[Tensor],
    inputs: Tensor | Sequence[Tensor],
    grad_outputs: Tensor | Sequence[Tensor] | None = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
) -> tuple[Tensor, ...]:
    """Gradients of outputs by inputs, as torch.autograd.grad gives them, for graphs without hooks.

    Every input has to be reached. retain_graph: not used; saved tensors live as long as their graph, so that more
    memory is in use than under PyTorch's engine.
    """
    outputs, inputs = _listed(outputs), _listed(inputs)
    starts = [torch.ones_like(y) for y in outputs] if grad_outputs is None else _listed(grad_outputs)
    ends = [get_gradient_edge(x) for x in inputs]
    wanted = {end.node for end in ends}
    roots = [get_gradient_edge(y) for y in outputs]
    order = _on_the_way([root.node for root in roots], wanted)
    sums: dict[Node, list[Tensor | None]] = {node: [None] * len(node._input_metadata) for node in order}
    with torch.set_grad_enabled(create_graph):
        for root, gradient in zip(roots, starts, strict=True):
            _add(sums[root.node], root.node, root.output_nr, gradient)
        for node in reversed(order):
            edges = [(i, *edge) for i, edge in enumerate(node.next_functions) if edge[0] in sums]
            if not edges or all(g is None for g in sums[node]):
                continue
            passed = node(*sums[node])
            passed = (passed,) if isinstance(passed, Tensor) else passed
            for i, following, number in edges:
                _add(sums[following], following, number, passed[i])
            if node not in wanted:
                sums[node] = []
    found = [sums[end.node][end.output_nr] for end in ends]
    assert all(g is not None for g in found), "an input is not reached"
    return tuple(g for g in found if g is not None)


def backward(output: Tensor, *, inputs: Sequence[Tensor]) -> None:
    """Add the gradients of an output by leaves to their `grad`, as Tensor.backward does."""
    for x, gradient in zip(inputs, grad(output, inputs), strict=True):
        x.grad = gradient if x.grad is None else x.grad + gradient


def _listed(tensors: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


def _on_the_way(roots: Iterable[Node], wanted: set[Node]) -> list[Node]:
    """The nodes from which a wanted one is reached, every node behind those that it leads to."""
    leads: dict[Node, bool] = {}
    order = []
    stack = [(node, False) for node in roots]  # a graph is deeper than Python's own stack
    while stack:
        node, expanded = stack.pop()
        following = [n for n, _ in node.next_functions if n is not None]
        if expanded:
            if leads.get(node) is None:
                leads[node] = node in wanted or any(leads[n] for n in following)
                order += [node] if leads[node] else []
        elif node not in leads:
            stack.append((node, True))
            stack += [(n, False) for n in following if n not in leads]
    return order


def _add(sums: list[Tensor | None], node: Node, number: int, gradient: Tensor | None) -> None:
    """Add to the gradient of a node's output, in that output's shape and type."""
    if gradient is None:
        return
    like, so_far = node._input_metadata[number], sums[number]
    assert gradient.device == like.device, f"a gradient on {gradient.device} of a tensor on {like.device}"
    gradient = gradient.sum_to_size(tuple(like.shape)).to(like.dtype)
    sums[number] = gradient if so_far is None else so_far + gradient
