"""What figures share: flags, looks, output files, distilled sets, and run folders with their labels."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from utils.config.flags import Parser
from utils.config.options import FREE, CondenseOptions
from utils.files.atomic import read_json, write_atomically
from utils.files.classnames import spellings
from utils.method.formation import Formation
from utils.runs.card import CARD, Card, load_card
from utils.runs.folder import METRICS, OPTIONS, images_in
from utils.runs.sets import load_distilled
from utils.system.errors import UsageError, UserError, printable
from utils.system.process import session
from utils.system.report import drawing

log = logging.getLogger("dream")
Picture = npt.NDArray[np.uint8]  # (H, W, 3)

# --- Flags ------------------------------------------------------------------------------------------------------------


def figure_parser(name: str, description: str | None) -> Parser:
    """The parser of figs/<name>.py, with the flags that every figure has."""
    parser = Parser(
        prog=f"python3 -m figs.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--out",
        type=ending(".png", ".pdf"),
        default=Path(f"{name}.png"),
        metavar="FILE",
        help=f"PNG or PDF (default: {name}.png)",
    )
    parser.add_argument("--pdf", action="store_true", help="write a PDF beside it as well")
    return parser


def parse(parser: Parser, argv: Sequence[str]) -> argparse.Namespace:
    """The flags' values. Raises UsageError, naming the flag, in one line."""
    return argparse.Namespace(**parser.parse_given(argv))


def ending(*suffixes: str) -> Callable[[str], Path]:
    """A type for add_argument: a path with one of these suffixes."""

    def parse(text: str) -> Path:
        if Path(text).suffix.lower() not in suffixes:
            raise argparse.ArgumentTypeError(f"{text!r} does not end in {' or '.join(suffixes)}")
        return Path(text)

    return parse


def record_in(paths: Sequence[Path]) -> Path | None:
    """The file of --save that is given in place of run folders, if it is one."""
    return paths[0] if len(paths) == 1 and paths[0].suffix == ".json" else None


def save_rows(file: Path | None, name: str, argv: Sequence[str], rows: Sequence[Any]) -> None:
    """Write dataclasses, and how figs/<name>.py was called, as JSON to the file of --save, if there is one."""
    if file is not None:
        content = {**session(f"figs.{name}", argv, torch.device("cpu")), "rows": [*map(dataclasses.asdict, rows)]}
        write(file, (json.dumps(content, indent=1) + "\n").encode(), flag="--save")


def add_classes(parser: Parser) -> None:
    """Add --classes, for scripts that draw some of a set's classes."""
    parser.add_argument(
        "--classes", nargs="+", metavar="CLASS", help="names or numbers of the classes (default: the first ten)"
    )


def class_number(wanted: str, names: Sequence[str], flag: str) -> int:
    """Number of the class of that name, or else of that number. Raises UsageError, naming the flag."""
    if wanted in names:
        return names.index(wanted)
    if len(called := [c for c, name in enumerate(names) if wanted in spellings(name)]) == 1:
        return called[0]
    if wanted.isdecimal() and int(wanted) < len(names):
        return int(wanted)
    some = ", ".join(names[:20]) + (" ..." if len(names) > 20 else "")
    raise UsageError(f"{flag} {wanted}: no such class; use a name ({some}) or a number up to {len(names) - 1}")


def class_numbers(wanted: Sequence[str] | None, names: Sequence[str]) -> list[int]:
    """Numbers of the classes that --classes names; of the first ten without the flag."""
    if wanted is None:
        return list(range(min(10, len(names))))
    return [class_number(word, names, "--classes") for word in wanted]


# --- Looks ------------------------------------------------------------------------------------------------------------

# Okabe and Ito's colours, which the colour-blind can tell apart, the darkest first.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
GREY = "#999999"
WIDTH = 7.5  # inches, 900 pixels
DPI = 120

STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.labelsize": 10,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "lines.linewidth": 1.6,
    "pdf.fonttype": 42,  # text stays text
}


@contextmanager
def style() -> Iterator[None]:
    """A block in which all figures have the same style."""
    with matplotlib.rc_context(STYLE), drawing():
        yield


def colour(i: int) -> str:
    """The i-th colour; after the last, the first again."""
    return PALETTE[i % len(PALETTE)]


def save(figure: Figure, out: Path, *, pdf: bool = False) -> None:
    """Write the figure, trimmed, and print the file's name. Raises UserError when it cannot be written."""
    for file in [out, out.with_suffix(".pdf")] if pdf and out.suffix.lower() != ".pdf" else [out]:
        kind, buffer = file.suffix[1:].lower(), io.BytesIO()
        # Without the date, the same content gives the same bytes.
        metadata = {"CreationDate": None} if kind == "pdf" else {}
        figure.savefig(buffer, format=kind, dpi=DPI, bbox_inches="tight", pad_inches=0.05, metadata=metadata)
        write(file, buffer.getvalue(), flag="--out")


def write(file: Path, content: bytes, *, flag: str) -> None:
    """Write a file, making its folder, and print its name. Raises UserError, naming the flag that it is from."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, content)
    except OSError as error:
        raise UserError(f"{flag} {file}: cannot be written ({error.strerror}); name another file") from error
    print(printable(f"wrote {file}"))


# --- Distilled images -------------------------------------------------------------------------------------------------

TILE = 72  # pixels of an image's side in a figure, about: the nearest whole multiple of its own


def load_set(path: Path) -> tuple[Tensor, Tensor, Card]:
    """Stored images (N, C, H, W) float32 in [0, 1], labels (N,) int64, and data.json's content.

    path: a run folder, or a .pt file in one. Raises UserError when there is no such set.
    """
    images, labels, card = load_distilled(path)
    if card is None:
        raise UserError(f"{path}: has no {CARD}; draw a run folder of condense.py")
    return images, labels, card


def decoded(path: Path) -> tuple[list[str], list[Tensor]]:
    """Class names, and the images of each class as networks see them, (S, C, H, W) in [0, 1]."""
    images, labels, card = load_set(path)
    names, factor = card.get("class_names"), card["factor"]
    if not isinstance(names, list) or int(labels.max()) >= len(names) or not 1 <= factor <= images.shape[-1]:
        raise UserError(f"{path}: its {CARD} does not describe it; draw a run folder of condense.py")
    rows = [images[labels == c] for c in range(len(names))]
    formation = Formation(factor, card["decode_type"])
    try:
        rows = [formation.decode(row) if len(row) else row for row in rows]
    except ValueError as error:
        raise UserError(f"{path}: its {CARD} is damaged ({error}); draw a run folder of condense.py") from error
    return [str(name) for name in names], rows


def tiles(images: Tensor, side: int) -> list[Picture]:
    """Images as pictures, each (side, side, 3). images: (n, C, H, W) in [0, 1]."""
    if not len(images):
        return []
    big = F.interpolate(images.float(), size=(side, side), mode="nearest-exact")
    rgb = big.mul(255).round().to(torch.uint8).permute(0, 2, 3, 1)  # (n, side, side, C)
    return list(rgb.expand(-1, -1, -1, 3).numpy())


def tile_side(images: Tensor) -> int:
    """Pixels of the side with which images (n, C, H, W) are drawn."""
    return images.shape[-1] * max(1, round(TILE / images.shape[-1]))


def mosaic(
    rows: Sequence[Tensor], *, gap: int = 4, apart: Sequence[int] = (), side: int = 0
) -> tuple[Picture, list[float], int]:
    """Rows of images on white: the picture, each row's centre, and the distance between columns, in pixels.

    rows: (n, C, H, W) in [0, 1] each, n may differ. apart: rows that keep a larger distance from the one above. side:
    of an image in pixels; 0: as `tile_side` says.
    """
    side = side or max(tile_side(row) for row in rows)
    step, columns = side + gap, max(1, max(len(row) for row in rows))
    tops, y = [], 0
    for number in range(len(rows)):
        y += 3 * gap if number in apart else 0
        tops.append(y)
        y += step
    canvas = np.full((y - gap, columns * step - gap, 3), 255, np.uint8)
    for top, row in zip(tops, rows, strict=True):
        for i, tile in enumerate(tiles(row, side)):
            canvas[top : top + side, i * step : i * step + side] = tile
    return canvas, [top + side / 2 for top in tops], step


def picture_figure(picture: Picture) -> Figure:
    """A figure that shows a picture pixel by pixel; its one set of axes counts in pixels."""
    height, width = picture.shape[:2]
    figure = Figure(figsize=(width / DPI, height / DPI))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(picture, interpolation="none")
    axes.axis("off")
    return figure


# --- Run folders ------------------------------------------------------------------------------------------------------

DEFAULTS = {field.name: field.default for field in dataclasses.fields(CondenseOptions)}
# Options that say which images a run is about.
OF_IMAGES = [
    field.name
    for field in dataclasses.fields(CondenseOptions)
    if field.metadata["group"] == "data" and field.name not in FREE
]
# Options that do not distinguish what is distilled: which repeat it is, where it lies, how it is watched.
UNLABELLED = {*FREE, "seed", "tag", "eval_every", "eval_seconds"} - {"store"}


class Series(NamedTuple):
    """What a run reported, in the order of time. seconds: of distilling until then, experts included."""

    iterations: list[int]
    seconds: list[float]
    values: list[float]


class Run:
    """A run folder of condense.py. Raises UserError when it is none, or when its metrics cannot be read."""

    def __init__(self, path: Path) -> None:
        if not (path / OPTIONS).is_file():
            raise UserError(
                f"{path}: is no run folder of condense.py, it holds no {OPTIONS}; name one such as "
                "results/digits/convnet2_f1_ipc1"
            )
        record = read_json(path / OPTIONS)
        options = record.get("options")
        if not isinstance(options, dict):
            raise UserError(f"{path / OPTIONS}: holds no options; name another run folder")
        self.path = path
        self.images = images_in(record)
        self.options: dict[str, Any] = {**DEFAULTS, **options}  # an older run lacks newer options

    @cached_property
    def events(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl. Raises UserError, naming the file."""
        file, events = self.path / METRICS, []
        try:
            lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        except (OSError, ValueError) as error:
            raise UserError(f"{file}: cannot be read ({error}); run the folder's condense.py command again") from error
        for number, line in enumerate(lines, 1):
            if not line.endswith("\n"):  # a running condense.py has not finished writing it
                break
            try:
                event = json.loads(line)
                complete = all(isinstance(event[name], (int, float)) for name in ("iteration", "seconds"))
            except (KeyError, TypeError, ValueError):
                complete = False
            if not complete:
                raise UserError(f"{file}: line {number} is damaged; the folder's condense.py command restores it")
            events.append(event)
        return events

    @cached_property
    def card(self) -> Card:
        """The content of data.json, empty before there is one. Raises UserError, naming the file."""
        file = self.path / CARD
        return load_card(file) if file.exists() else {}

    @property
    def expert_seconds(self) -> float:
        """Seconds that training the run's experts took, whichever run did it; 0 without experts."""
        return self._number(self.card.get("expert_seconds", 0.0), "expert_seconds")

    @property
    def random_real(self) -> float | None:
        """Accuracy, in per cent, of as many random real images; None in a run that is not finished."""
        score = self.card.get("random_real")
        found = score.get("accuracy_mean") if isinstance(score, dict) else None
        return None if found is None else self._number(found, "random_real")

    def _number(self, value: object, name: str) -> float:
        if isinstance(value, (int, float)) and 0 <= value < math.inf:
            return value
        raise UserError(f"{self.path / CARD}: its {name} is no number of 0 or more; name another run folder")

    def losses(self) -> Series:
        """The mean matching loss of every outer iteration."""
        return self._series("loss", "iteration")

    def scores(self, *, best: bool = False, every: bool = False) -> Series:
        """The mean test accuracy of evaluations, in per cent; best: of the best of four tests of each training.

        every: of several evaluations within one outer iteration all, as --eval_seconds makes them; else the last one.
        """
        return self._series("accuracy_mean", "seconds" if every else "iteration", "best_of_four" if best else None)

    def _series(self, name: str, at: str, within: str | None = None) -> Series:
        """The events that hold `name`, the last one at every `at`: iteration or seconds."""
        found = [(event, event.get(within, {}) if within else event) for event in self.events]
        last = {e[at]: (e["iteration"], e["seconds"], values[name]) for e, values in found if name in values}
        iterations, seconds, values = ([last[key][i] for key in sorted(last)] for i in range(3))
        return Series(iterations, [self.expert_seconds + s for s in seconds], values)

    def __str__(self) -> str:
        return str(self.path)


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs in these folders.

    Raises UserError for what is no run folder, or when images were changed between two runs; UsageError for one folder
    given twice.
    """
    seen: set[Path] = set()
    for path in paths:
        if path.resolve() in seen:
            raise UsageError(f"{path}: is given twice; leave one out")
        seen.add(path.resolve())
    runs = [Run(path) for path in paths]
    first: dict[str, Run] = {}  # of the runs that recorded their images, by where these are from
    for run in (run for run in runs if run.images):
        other = first.setdefault(str([run.options.get(name) for name in OF_IMAGES]), run)
        if any(run.images.get(split) != other.images.get(split) for split in ("training", "test")):
            raise UserError(f"{run}: the images were changed between it and {other}; leave one of the two out")
    return runs


def check_evaluated(runs: Sequence[Run]) -> None:
    """Raises UserError for a run without an evaluation."""
    for run in (run for run in runs if not run.scores().values):
        raise UserError(f"{run}: holds no evaluation yet; let condense.py finish it, or run it with --eval_every N")


def warn_of_unfinished(runs: Sequence[Run]) -> None:
    """Log a warning for every run that has reached neither its --niter nor its --seconds."""
    for run in runs:
        done, budget = max((e["iteration"] for e in run.events), default=0), run.options["niter"]
        if done < budget and not (run.options["seconds"] and run.card.get("finished") is True):
            log.warning("%s: is unfinished, after %d of %d outer iterations", run, done, budget)


def differing(runs: Sequence[Run]) -> list[str]:
    """Names of the options that distinguish runs, but not repeats; without those that follow from others of them."""
    names = dict.fromkeys(name for run in runs for name in run.options if name not in UNLABELLED)
    differ = [name for name in names if not same(runs, name)]
    # What may follow: a method's settings from the method, --select, --ipc, and --networks; the interval from --select.
    implying, following = (("method", "select", "ipc"), differ) if "method" in differ else (("select",), ["interval"])
    if "networks" in differ and not _implied(runs, implying, ["networks"]):
        implying, following = (*implying, "networks"), [*following, "experts", "expert_epochs"]
    follow = _implied(runs, implying, following)
    return [name for name in differ if name in implying or name not in follow]


def _implied(runs: Sequence[Run], implying: Sequence[str], names: Sequence[str]) -> set[str]:
    """Options, of these names, in which runs do not differ that share the `implying` ones."""
    kinds: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        kinds.setdefault(tuple(run.options.get(name) for name in implying), []).append(run)
    return {name for name in names if all(same(kind, name) for kind in kinds.values())}


def same(runs: Sequence[Run], name: str) -> bool:
    """Whether runs have the same value of an option."""
    return all(run.options.get(name) == runs[0].options.get(name) for run in runs)


@dataclasses.dataclass(frozen=True)
class Group:
    """Repeats: runs that differ in their seeds only."""

    label: str
    runs: list[Run]

    def __str__(self) -> str:
        return f"{self.label} (n={len(self.runs)})"


def label(run: Run, names: Sequence[str]) -> str:
    """The run's options of these names, as in `select=kmeans, interval=10`; without names, its data set and budget."""
    if not names:
        return "{dataset}, ipc={ipc}, factor={factor}".format_map(run.options)
    return in_words({name: run.options.get(name) for name in names})


def in_words(options: Mapping[str, Any]) -> str:
    """Options as in `select=kmeans, interval=10`; of an image folder or file, its name alone."""
    shown = dict(options)
    for name in ("image_folder", "npz"):
        if shown.get(name):
            shown[name] = Path(str(shown[name])).name
    return printable(", ".join(f"{name}={value}" for name, value in shown.items()))


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Runs in groups of repeats, in the order of their first runs. Raises UserError for repeats of the same seed."""
    names = differing(runs)
    groups: dict[str, list[Run]] = {}
    for run in runs:
        together = groups.setdefault(label(run, names), [])
        for other in together:
            if other.options["seed"] == run.options["seed"]:
                raise UserError(f"{run}: has the options and the seed of {other}, it is no repeat; leave one out")
        together.append(run)
    return [Group(name, together) for name, together in groups.items()]


def run_labels(runs: Sequence[Run]) -> list[str]:
    """A label for every run; repeats show their seed, or their folder where seeds are the same."""
    names = differing(runs)
    if len({run.options["seed"] for run in runs}) > 1 and _ambiguous([label(run, names) for run in runs]):
        names = [*names, "seed"]
    labels = [label(run, names) for run in runs]
    return [printable(run.path.name) for run in runs] if _ambiguous(labels) else labels


def _ambiguous(labels: Sequence[str]) -> bool:
    return len(set(labels)) < len(labels)
