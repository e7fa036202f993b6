"""Mistakes of the user or the surroundings: shown as one line on standard error, without a traceback."""

from __future__ import annotations


def printable(text: str) -> str:
    """Text in which control characters and undecodable bytes are escapes (\\n, \\x1b), as for names of files."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def short(name: str, most: int = 40) -> str:
    """A name for a table or a figure: printable, and without its middle if it is longer than `most` characters."""
    text = printable(name)
    return text if len(text) <= most else f"{text[: most // 2]}...{text[3 - most // 2 :]}"


class UserError(Exception):
    """Something outside the program is wrong: a file, the network, the machine. The message names the remedy."""

    status = 1

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))

    @property
    def problem(self) -> str:
        """The message without its remedy, which follows the first semicolon."""
        return str(self).split(";")[0]


class UsageError(UserError):
    """The command line is wrong. The message names the flag."""

    status = 2


def first_line(error: BaseException, limit: int = 160) -> str:
    """First line of an exception's message, at most `limit` characters; the exception's name if there is none."""
    lines = str(error).strip().splitlines()
    return lines[0][:limit] if lines else type(error).__name__
