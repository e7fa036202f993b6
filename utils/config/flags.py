"""Command-line flags from the fields of a dataclass: values that are checked, help by group, errors of one line."""

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
from utils.system.errors import UsageError


def integer(least: int, most: int = 2**63 - 1) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            high = "or more" if value < least else f"to {most}"
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of {least} {high}")
        return value

    return parse


def number(least: float = 0.0, *, below: float = math.inf, open_end: bool = False) -> Callable[[str], float]:
    """least <= value < below; with open_end, least < value."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (least < value if open_end else least <= value) or not value < below:
            low = f"above {least:g}" if open_end else f"of {least:g} or more"
            high = "" if below == math.inf else f" and below {below:g}"
            raise argparse.ArgumentTypeError(f"{text!r} is not a number {low}{high}")
        return value

    return parse


def augmentation(text: str) -> str:
    try:
        augment.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def matching(text: str) -> str:
    """What --match takes: objectives, or trajectories."""
    try:
        return text if text == TRAJECTORY else "+".join(objectives.parse(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error}, or {TRAJECTORY}") from None


def initialisation(text: str) -> str:
    """`mix` is the published name of k-means initialisation with a factor above 1."""
    name = "kmeans" if text == "mix" else text
    if name not in ("kmeans", "random", "noise"):
        raise argparse.ArgumentTypeError(f"{text!r} is not one of kmeans, random, noise")
    return name


def tag(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} becomes part of a folder name: use up to 100 letters, digits, '.', '_', '+', '-'"
        )
    return text


def table_file(text: str) -> str:
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
) -> Any:
    """A dataclass field that is also a command-line flag; a default of False makes a switch."""
    metadata = dict(names=names, help=help, group=group, parse=parse, choices=choices, metavar=metavar, nargs=nargs)
    return dataclasses.field(default=default, metadata=metadata)


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, `-` for `_` in flag names, and a guess at what a misspelt flag meant."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")

    def parse_given(self, argv: Sequence[str]) -> dict[str, Any]:
        """Only what the user gave."""
        flags = list(itertools.takewhile(lambda word: word != "--", argv))  # what follows is a name, as it stands
        words = [re.sub(r"^--[^=]*", lambda name: "--" + name[0][2:].replace("-", "_"), word) for word in flags]
        for word in words:
            name, _, value = word.partition("=")
            if name.startswith("-") and value == "--":  # which argparse takes for no value at all
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
    """The parser of an options class, whose --help begins with the flags named in its COMMON.

    Absent flags stay absent, so that defaults and settings can fill them.
    """
    parser = Parser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        usage=f"%(prog)s {'[RUN] ' if 'run' in kind.COMMON else ''}[flags]",  # all by name would fill a screen
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
    for name in ("choices", "metavar"):
        more[name] = meta[name]
    nargs = "?" if positional else meta["nargs"]
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
    """The default for --help, and the data sets and methods that have another one."""
    others: dict[str, list[str]] = {}
    rows = {**DATASET_SETTINGS, **{f"--method {name}": method.settings for name, method in METHODS.items()}}
    for name, settings in rows.items():
        value = settings.get(field.name, field.default)
        if value != field.default and not callable(value):
            text = f"{value:.4g}" if isinstance(value, float) else str(value)
            others.setdefault(text, []).append(name)
    return "; ".join([str(field.default), *(f"{value} for {', '.join(names)}" for value, names in others.items())])
