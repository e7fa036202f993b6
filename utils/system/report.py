"""Output for people: messages, and one progress bar, or lines in its place where there is no terminal."""

from __future__ import annotations

import logging
import re
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from tqdm import tqdm

from utils.system.errors import printable
from utils.system.process import on_terminal, output_failed

log = logging.getLogger("dream")

FIRST_LINE, LINE_EVERY = 10.0, 60.0  # seconds between progress lines into a file or pipe


def show(text: str) -> None:
    """Print a line on standard output, above the progress bar if there is one."""
    try:  # a reader that has gone away must not end a run
        if on_terminal():
            tqdm.write(text, file=sys.stdout)
        else:
            print(text, flush=True)
    except OSError as error:
        output_failed(error)


def message(record: logging.LogRecord) -> str:
    """Text of a log record, control characters other than line breaks escaped, so that no terminal obeys them."""
    return _lines(record.getMessage())


def _lines(text: str) -> str:
    """Text that is printable but for its line breaks."""
    return "\n".join(map(printable, text.split("\n")))


class _Console(logging.Handler):
    """Handler that prints messages on standard output."""

    def emit(self, record: logging.LogRecord) -> None:
        show(f"warning: {message(record)}" if record.levelno >= logging.WARNING else message(record))


class _LogFile(logging.FileHandler):
    """Handler that writes messages to a file, and ignores a full disk: the next checkpoint will report it."""

    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
        return f"{when} {record.levelname:7} {message(record)}"

    def handleError(self, record: logging.LogRecord) -> None:
        pass

    def close(self) -> None:
        with suppress(OSError):
            super().close()


@contextmanager
def messages() -> Iterator[None]:
    """Show the program's messages while the block runs."""
    handler = _Console()
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)


@contextmanager
def logged_to(path: Path) -> Iterator[None]:
    """Append the program's messages to a file as well, with the time; also an error that ends the block."""
    handler = _LogFile(path, encoding="utf-8", errors="backslashreplace")
    log.addHandler(handler)
    try:
        yield
    except BaseException as error:  # for the file alone: the caller shows it on the screen
        what = f"{type(error).__name__}: {error}"
        handler.handle(logging.LogRecord(log.name, logging.ERROR, "", 0, what, None, None))
        raise
    finally:
        log.removeHandler(handler)
        handler.close()


# --- Figures ----------------------------------------------------------------------------------------------------------

MISSING = "Glyph .* missing from|Matplotlib currently does not support"  # how matplotlib's warnings of characters begin


def drawable(text: str) -> str:
    """Text with names of classes, files or runs for matplotlib, which would take what two `$` enclose for a formula."""
    return _lines(text).replace("$", r"\$")


@contextmanager
def drawing() -> Iterator[None]:
    """A block that draws names with matplotlib: of all characters that its font lacks, one warning tells."""
    with warnings.catch_warnings(record=True) as shown:
        warnings.filterwarnings("always", MISSING)
        yield
    for warning in shown:
        if not re.match(MISSING, str(warning.message)):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    if any(re.match(MISSING, str(warning.message)) for warning in shown):
        log.warning("the font lacks characters of some names, which are boxes now; set font.family in a matplotlibrc")


# --- Progress ---------------------------------------------------------------------------------------------------------


class Progress:
    """Progress bar with the time left; into a file or pipe, a line now and then."""

    def __init__(self, total: int, what: str, unit: str, *, done: int = 0, keep: bool = False) -> None:
        """Begin at `done` of `total` units of the work called `what`; keep: leave the finished bar on the screen.

        Units that an earlier process has done do not count for the pace.
        """
        self.what, self.unit, self.total, self.done = what, unit, total, done
        self.note = ""
        self._started, self._from = time.monotonic(), done
        self._next_line = self._started + FIRST_LINE
        off = not on_terminal()
        self._bar = tqdm(total=total, desc=what, initial=done, unit=unit, leave=keep, disable=off, dynamic_ncols=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._bar.close()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock while the block runs, an evaluation say, so that it does not count for the pace."""
        began = time.monotonic()
        try:
            yield
        finally:
            elapsed = time.monotonic() - began
            self._started += elapsed
            if not self._bar.disable:
                self._bar.start_t += elapsed
                self._bar.last_print_t += elapsed

    def advance(self, count: int = 1) -> None:
        """Count units as done, and draw the bar or print a line when it is time for one."""
        self.done += count
        self._bar.update(count)
        now = time.monotonic()
        if self._bar.disable and now >= self._next_line and self.done < self.total:
            self._next_line = now + LINE_EVERY
            show(f"{self.what}: {self.done}/{self.total} {self.unit}s, {span(self.seconds_left)} left{self.note}")

    def say(self, note: str) -> None:
        """Show a few words beside the counts."""
        self.note = f", {note}" if note else ""
        self._bar.set_postfix_str(note, refresh=False)

    @property
    def seconds_left(self) -> float:
        """Seconds to go, at the average pace of this process so far."""
        fresh = self.done - self._from
        return (time.monotonic() - self._started) / max(fresh, 1) * (self.total - self.done)


def size(count: float) -> str:
    """A number of bytes in words: 960 B, 30.7 kB, 153.6 MB."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000
    return f"{count:.4g} GB"


def span(seconds: float) -> str:
    """A duration for people: 42 s, 3 min 10 s, 5 h 20 min, 12 days."""
    s = round(seconds)
    if s < 100:
        return f"{s} s"
    if s < 3600:
        return f"{s // 60} min {s % 60} s"
    if s < 72 * 3600:
        return f"{s // 3600} h {s % 3600 // 60} min"
    return f"{s / 86400:.0f} days"
