"""Command-line flags from the fields of a dataclass: values are checked, help is grouped, errors are one line."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import itertools
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from utils.config.presets import DATASET_SETTINGS, METHODS, TRAJECTORY
from utils.method import augment, objectives
from utils.method.selection import NOISES, STRATEGIES
from utils.runs.normalisation import OF_DATA, OF_IMAGENET, statistics
from utils.system.errors import UsageError


def integer(minimum: int, maximum: int = 2**63 - 1) -> Callable[[str], int]:
    """Parser of flags whose value is an integer from `minimum` to `maximum`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if not minimum <= value <= maximum:
            high = "or more" if value < minimum else f"to {maximum}"
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of {minimum} {high}")
        return value

    return parse


def number(
    minimum: float = 0.0, *, below: float = math.inf, most: float = math.inf, open_end: bool = False
) -> Callable[[str], float]:
    """Parser of flags whose value is a number, minimum <= value < below, and at most `most`; with open_end, minimum <
    value."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (minimum < value if open_end else minimum <= value) or not value < below or value > most:
            low = f"above {minimum:g}" if open_end else f"of {minimum:g} or more"
            high = f" and below {below:g}" if below < math.inf else f" and at most {most:g}" if most < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text!r} is not a number {low}{high}")
        return value

    return parse


def device(text: str) -> str:
    """Parser of --device: auto, cpu, cuda, or a GPU by its number, as in cuda:1."""
    if not re.fullmatch("auto|cpu|cuda(:[0-9]{1,2})?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is none of auto, cpu, cuda, and cuda:N with the number of a GPU")
    return text


def augmentation(text: str) -> str:
    """Parser of flags whose value is the name of an augmentation, e.g. color_crop_cutout."""
    try:
        augment.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def matching(text: str) -> str:
    """Parser of --match: objectives joined by +, or `trajectory`."""
    try:
        return text if text == TRAJECTORY else "+".join(objectives.parse(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error}, or {TRAJECTORY}") from None


def initialisation(text: str) -> str:
    """Parser of --init; `mix` is the published name of k-means initialisation with a factor above 1."""
    name = "kmeans" if text == "mix" else text
    if name not in (*STRATEGIES, *NOISES):
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join((*STRATEGIES, *NOISES))}")
    return name


def tag(text: str) -> str:
    """Parser of --tag, which becomes part of a folder's name."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} becomes part of a folder name: use up to 100 letters, digits, '.', '_', '+', '-'"
        )
    return text


def normalisation(text: str) -> str:
    """Parser of --normalized: the name of a normalisation, or its numbers."""
    if text not in (OF_DATA, OF_IMAGENET):
        try:
            statistics(text)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not {OF_DATA}, {OF_IMAGENET} or MEAN/STD, such as 0.5/0.5 or 0.49,0.48,0.45/0.2; a RUN "
                "goes before this flag"
            ) from None
    return text


def table_file(text: str) -> str:
    """Parser of --table: a file whose suffix names a format, in a folder that exists."""
    if Path(text).suffix not in (".md", ".csv", ".json"):
        raise argparse.ArgumentTypeError(f"{text!r} ends neither in .md nor in .csv nor in .json")
    if not os.path.isdir(Path(text).parent):
        raise argparse.ArgumentTypeError(f"{text!r}: there is no folder {Path(text).parent}")
    return text


def flag(
    default: Any,
    *names: str,
    help: str,
    group: str,
    parse: Callable[[str], Any] = str,
    choices: Sequence[str] | None = None,
    metavar: str | None = None,
    nargs: str | None = None,
    const: str | None = None,
) -> Any:
    """Dataclass field that is also a command-line flag; a default of False makes a switch. const: of a bare flag."""
    metadata = dict(names=names, help=help, group=group, parse=parse, choices=choices, metavar=metavar, nargs=nargs)
    metadata["const"] = const
    return dataclasses.field(default=default, metadata=metadata)


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, `-` for `_` in flag names, and a guess at what a misspelt flag meant."""

    def error(self, message: str) -> NoReturn:
        """Raise UsageError, where argparse would print its usage and exit."""
        raise UsageError(f"{message}; see {self.prog} --help")

    def parse_given(self, argv: Sequence[str]) -> dict[str, Any]:
        """Values of the flags that the user gave, by name, without defaults. Raises UsageError for wrong ones."""
        flags = list(itertools.takewhile(lambda word: word != "--", argv))  # what follows -- is taken literally
        words = [re.sub(r"^--[^=]*", lambda name: "--" + name[0][2:].replace("-", "_"), word) for word in flags]
        for word in words:
            name, _, value = word.partition("=")
            if name.startswith("-") and value == "--":  # argparse would drop such a value
                self.error(f"{name}: '--' is no value")
        given, unknown = self.parse_known_args([*words, *argv[len(flags) :]])
        for word in unknown:
            if not word.startswith("-"):
                self.error(f"{word[:100]!r} belongs to no flag; all begin with a dash")
            name = word.split("=")[0][:100]
            close = difflib.get_close_matches(name, self._option_string_actions, 1)
            self.error(f"unknown option {name}" + (f" (did you mean {close[0]}?)" if close else ""))
        return vars(given)


def make_parser(kind: type[Any], description: str) -> Parser:
    """Parser of an options class, whose --help begins with the flags named in its COMMON.

    Flags that are not given stay absent from the result, so that defaults and settings can fill them.
    """
    parser = Parser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        usage=f"%(prog)s {'[RUN ...] ' if 'run' in kind.COMMON else ''}[flags]",  # a list of all would fill a screen
    )
    fields = {field.name: field for field in dataclasses.fields(kind)}
    groups = {"most used": [fields.pop(name) for name in kind.COMMON]}
    for field in fields.values():
        groups.setdefault(field.metadata["group"], []).append(field)
    for title, members in groups.items():
        group = parser.add_argument_group(title)
        for field in members:
            add_flag(group, field)
    return parser


def add_flag(parser: argparse._ActionsContainer, field: dataclasses.Field[Any], **more: Any) -> None:
    """Add the flag of an options field to a parser or a group; more: keywords of add_argument."""
    meta, text = field.metadata, field.metadata["help"].replace("%", "%%")
    positional = field.name == "run"
    names = [field.name] if positional else [*meta["names"], f"--{field.name}"]
    if field.default is False:
        parser.add_argument(*names, action="store_true", help=text, **more)
        return
    if field.default is not None and "default" not in text:
        text += f" (default: {default_text(field)})"
    for name in ("choices", "metavar", "const"):
        more[name] = meta[name]
    nargs = "?" if meta["const"] else meta["nargs"]
    parser.add_argument(*names, type=meta["parse"], nargs=nargs, help=text, **more)


def as_argv(values: Mapping[str, Any]) -> list[str]:
    """A command line from keywords: ipc=10 -> --ipc=10, reproduce=True -> --reproduce, table=[a, b] -> --table a b.

    None and False leave a flag out.
    """
    argv = []
    for name, value in values.items():
        if isinstance(value, list | tuple):
            argv += [f"--{name}", *map(str, value)]
        elif value is True:
            argv.append(f"--{name}")
        elif value is not None and value is not False:
            argv.append(f"--{name}={value}")
    return argv


def default_text(field: dataclasses.Field[Any]) -> str:
    """Default of a flag for --help, and the data sets and methods that have another one."""
    texts = [str(field.default)]
    methods = {name: method.settings for name, method in METHODS.items()}
    for flag, rows in (("-d", DATASET_SETTINGS), ("--method", methods)):
        others: dict[str, list[str]] = {}
        for name, settings in rows.items():
            value = settings.get(field.name, field.default)
            if value != field.default:
                number = f"{value:.4g}" if isinstance(value, float) else str(value)
                others.setdefault("another (see --dry_run)" if callable(value) else number, []).append(name)
        texts += [f"{value} for {flag} {', '.join(names)}" for value, names in others.items()]
    return "; ".join(texts)
