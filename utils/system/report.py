"""What a person sees: messages, one progress bar, lines instead of a bar when nobody watches."""

from __future__ import annotations

import logging
import sys
import time
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
    """A line on standard output, above a bar if there is one. A reader that has gone away must not end a run."""
    try:
        if on_terminal():
            tqdm.write(text, file=sys.stdout)
        else:
            print(text, flush=True)
    except OSError as error:
        output_failed(error)


def message(record: logging.LogRecord) -> str:
    """A record's text without anything that would move a terminal's cursor; its own line breaks stay."""
    return "\n".join(map(printable, record.getMessage().split("\n")))


class _Console(logging.Handler):
    """Messages on standard output."""

    def emit(self, record: logging.LogRecord) -> None:
        show(f"warning: {message(record)}" if record.levelno >= logging.WARNING else message(record))


class _LogFile(logging.FileHandler):
    """Messages in a file. A full disk is told by what is written next, the log itself ends no run."""

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
    """Append the program's messages to a file as well, with the time, and the error that ends the block if one does."""
    handler = _LogFile(path, encoding="utf-8", errors="backslashreplace")
    log.addHandler(handler)
    try:
        yield
    except BaseException as error:  # the caller shows it on the screen
        what = f"{type(error).__name__}: {error}"
        handler.handle(logging.LogRecord(log.name, logging.ERROR, "", 0, what, None, None))
        raise
    finally:
        log.removeHandler(handler)
        handler.close()


class Progress:
    """A bar with the time left on a terminal; into a file or pipe, a line now and then with the same."""

    def __init__(self, total: int, what: str, unit: str, *, keep: bool = False) -> None:
        """keep: leave the finished bar on the screen."""
        self.what, self.unit, self.total, self.done = what, unit, total, 0
        self.note = ""
        self._started, self._from = time.monotonic(), 0
        self._next_line = self._started + FIRST_LINE
        self._bar = tqdm(total=total, desc=what, unit=unit, leave=keep, disable=not on_terminal(), dynamic_ncols=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._bar.close()

    def start_at(self, done: int) -> None:
        """Begin with units that an earlier process finished; they do not count for the pace."""
        self.done = self._from = done
        self._started = time.monotonic()
        if not self._bar.disable:
            self._bar.initial = self._bar.n = self._bar.last_print_n = done
            self._bar.start_t = self._bar.last_print_t = time.time()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Something else happens meanwhile, an evaluation say: its time does not count for the pace."""
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
        """At the average pace of this process so far."""
        fresh = self.done - self._from
        return (time.monotonic() - self._started) / max(fresh, 1) * (self.total - self.done)


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
