"""What a run computed, so that two runs can be compared: everything but times, and what only describes the command."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Event = dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """Of a run folder. Digests stand for bytes, so that a difference is told by the name of what differs."""

    files: dict[str, str]  # the set, its snapshots and pictures
    state: dict[str, str]  # the checkpoint's tensors and position
    losses: list[Event]  # of metrics.jsonl
    accuracies: list[Event]  # of metrics.jsonl, and last the one of data.json

    @property
    def distilled(self) -> tuple[dict[str, str], dict[str, str], list[Event]]:
        """All but how good it is."""
        return self.files, self.state, self.losses


def outcome(folder: Path) -> Outcome:
    events, card = metrics(folder), json.loads((folder / "data.json").read_text())
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    names = ("pixels", "velocity", "net", "momentum", "picks", "losses", "it", "step", "learned", "average")
    state = {name: saved.get(name) for name in names}
    final = {name: card.get(name) for name in ("accuracy", "random_real")}
    return Outcome(
        {p.name: digest(p.read_bytes()) for pattern in ("data*.pt", "*.png") for p in folder.glob(pattern)},
        flat("", state),
        [event for event in events if "loss" in event],
        [*(event for event in events if "accuracy_mean" in event), final],
    )


def metrics(folder: Path) -> list[Event]:
    """The events of metrics.jsonl without times."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if "seconds" not in k} for line in lines]


def flat(name: str, content: Any) -> dict[str, str]:
    """Nested dictionaries and lists as one, with a digest of every tensor."""
    if isinstance(content, Tensor):
        about = f"{tuple(content.shape)} {content.dtype} "
        return {name: about + digest(content.contiguous().numpy().tobytes())}
    if isinstance(content, dict | list | tuple):
        inside = content.items() if isinstance(content, dict) else enumerate(content)
        return {k: v for key, value in inside for k, v in flat(f"{name}/{key}", value).items()}
    return {name: repr(content)}


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
