"""Images and labels in what a file holds, however its author nested and named them.

    sets = find(content)      # of read_tensors, load_arrays and the like
    shown(content)            # one line that says what there is

Shapes decide, names only where several tensors have the right shape: images have 4 dimensions, or 3 without channels;
labels have 1 or 2, and as many rows as there are images.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

IMAGES, LABELS = "images", "labels"
WORDS = {
    IMAGES: {"images", "image", "imgs", "img", "data", "x", "inputs", "input", "pixels"},
    LABELS: {"labels", "label", "targets", "target", "y", "logits", "classes"},
}
RATES = {"lr", "rate"}  # a learning rate for networks, which some methods learn beside the images
HELD_OUT = {"test", "testing", "val", "valid", "validation", "eval"}
DEPTH = 3  # {"data": [[images, labels], ...]}


class Found(NamedTuple):
    """Tensors that look like a set, or like one half of it."""

    images: Tensor | None
    labels: Tensor | None
    rate: float | None = None

    @property
    def whole(self) -> bool:
        """Whether both halves are there."""
        return self.images is not None and self.labels is not None


def find(content: Any) -> list[Found]:
    """All sets in the content of a file, in its order; if there is none, one with images or labels alone, or with the
    learning rate that is all there is."""
    return _find(content, DEPTH, set())


def _find(content: Any, depth: int, seen: set[int]) -> list[Found]:
    if isinstance(content, Tensor) and content.dim():
        return [Found(content, None) if _like_images(content) else Found(None, content)]
    if (rate := number(content)) is not None:
        return [Found(None, None, rate)]
    if depth == 0 or id(content) in seen or not isinstance(content, (dict, list, tuple)):
        return []
    seen.add(id(content))  # a small file can hold one list many times
    if not isinstance(content, dict) and len(content) == 1:
        return _find(content[0], depth - 1, seen)
    own = _in_dict(content) if isinstance(content, dict) else _in_list(content)
    if own is not None and own.whole:
        return [own]
    inside = [item for name, item in _items(content) if not words(name) & HELD_OUT and not isinstance(item, Tensor)]
    nested = [found for item in inside for found in _find(item, depth - 1, seen)]
    if whole := [found for found in nested if found.whole]:
        return whole
    return [own] if own is not None else [found for found in nested if found.rate is None][:1]


def words(name: Any) -> set[str]:
    """The words and numbers in a name: `images_syn-10` -> images, syn, 10."""
    return set(re.findall(r"[a-z]+|[0-9]+", name.lower()[:200])) if isinstance(name, str) else set()


def _items(content: Mapping[Any, Any] | Sequence[Any]) -> list[tuple[Any, Any]]:
    return list(content.items()) if isinstance(content, Mapping) else [("", item) for item in content]


def _like_images(x: Tensor) -> bool:
    """Whether a tensor has the shape of images rather than of labels, which may be (N, 1, 1)."""
    return x.dim() == 4 or (x.dim() == 3 and tuple(x.shape[1:]) != (1, 1))


def _numbers(x: Any) -> Any:
    """Class numbers in a list as a tensor; anything else as it is."""
    numbers = isinstance(x, list) and len(x) > 1 and all(type(n) is int and abs(n) < 2**31 for n in x)
    return torch.tensor(x) if numbers else x


def _in_dict(content: Mapping[Any, Any]) -> Found | None:
    """The set among a dict's own tensors, or one half of it; None where several tensors could be the same half."""
    items = {name: _numbers(x) for name, x in content.items() if not words(name) & HELD_OUT}
    tensors = {name: x for name, x in items.items() if isinstance(x, Tensor) and x.dim()}
    like_images = {name: x for name, x in tensors.items() if _like_images(x)}
    others = {name: x for name, x in tensors.items() if not _like_images(x) and not words(name) & RATES}
    if not like_images and {IMAGES, LABELS} <= tensors.keys():
        return Found(tensors[IMAGES], tensors[LABELS])  # whatever they are: who reads them says what is wrong
    images = _chosen(like_images, IMAGES)
    fitting = {name: x for name, x in others.items() if images is not None and len(x) == len(images)}
    labels = _chosen(fitting or others, LABELS)
    if (images is None and (like_images or labels is None)) or (labels is None and fitting):
        return None
    rates = [rate for name, x in items.items() if words(name) & RATES and (rate := number(x)) is not None]
    return Found(images, labels, rates[0] if rates else None)


def _chosen(tensors: Mapping[Any, Tensor], role: str) -> Tensor | None:
    """The only tensor, the one of the plainest name, or the only one whose name says what it is."""
    named = [x for name, x in tensors.items() if words(name) & WORDS[role]]
    for choice in (list(tensors.values()), [tensors[role]] if role in tensors else [], named):
        if len(choice) == 1:
            return choice[0]
    return None


def _in_list(content: Sequence[Any]) -> Found | None:
    """The set in [images, labels] or [labels, images], perhaps with numbers after them."""
    first, second, *more = map(_numbers, content) if len(content) > 1 else (None, None)
    if not (isinstance(first, Tensor) and isinstance(second, Tensor) and first.dim() and second.dim()):
        return None
    if any(isinstance(x, Tensor) and x.numel() > 1 for x in more) or (_like_images(first) and _like_images(second)):
        return None
    rates = [rate for x in more if (rate := number(x)) is not None]
    images, labels = (second, first) if _like_images(second) else (first, second)
    return Found(images, labels, rates[0] if rates else None)


def number(x: Any) -> float | None:
    """A single number, however it is stored."""
    if isinstance(x, Tensor):
        return float(x) if x.numel() == 1 else None
    return x if isinstance(x, float) else None


def shown(content: Any, most: int = 6, depth: int = 2) -> str:
    """What there is, in one line: names, types and shapes, of containers the first few items."""
    if isinstance(content, Tensor):
        return f"{str(content.dtype).removeprefix('torch.')} {tuple(content.shape)}"
    if not isinstance(content, (dict, list, tuple)) or not content or not depth:
        return "nothing" if content is None else f"a {type(content).__name__}"
    texts = [
        (f"{name[:40]}: " if isinstance(name, str) and name else "") + shown(item, 3, depth - 1)
        for name, item in _items(content)[:most]
    ]
    more = f" ... {len(content)} in all" if len(content) > most else ""
    return f"a {type(content).__name__} of {', '.join(texts)}{more}"
