"""What people see while they wait: a progress bar, and one dim line of account. All on stderr."""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import rich.console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.segment import Segment

from laserkv_gguf.cli import streams
from laserkv_gguf.errors import LaserKVError
from laserkv_gguf.machine import size as size
from laserkv_gguf.shown import counted, harmless, one_line

if TYPE_CHECKING:
    from rich.console import ConsoleOptions, RenderableType

    from laserkv_gguf.conversation.generation import Reply
    from laserkv_gguf.reading.reader import Progress as Read


class Console(rich.console.Console):
    """Rich's console, with `shown`'s filter behind everything that is printed on it.

    Attributes:
        running: whether a document is printed, which may be written from right to left.
    """

    running = False

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        # Rich makes its own escape sequences later, out of the segments' styles
        for segment in super().render(renderable, options):
            text = segment.text if segment.control else harmless(segment.text, running=self.running)
            yield segment if text == segment.text else Segment(text, segment.style)

    def print(self, *objects: Any, **options: Any) -> None:
        try:
            super().print(*objects, **options)
        except OSError as error:
            if self.stderr or isinstance(error, BrokenPipeError):
                raise
            raise streams.lost(error) from error


console = Console(stderr=True, highlight=False)


_EVERY = 60.0  # seconds between two lines about a reading where there is no terminal


class ReadingBar:
    """A progress bar for reading, and what was read when it stopped."""

    def __init__(self) -> None:
        self.read = self.total = self.kept = 0
        self.seconds = self._said = 0.0
        self._logs = False  # a line every so often, in place of the bar
        self._bar: Progress | None = None

    def update(self, state: Read) -> None:
        """Takes a report of the engine."""
        self.read, self.total, self.kept = state.read, state.total, state.kept
        self.seconds = state.seconds
        if self._logs and self.seconds - self._said >= _EVERY:
            self._said = self.seconds
            dim(self.line(0))
        if self._bar is None:
            return
        note = self._note
        if not self._bar.tasks:
            self._bar.add_task("", total=state.total, note=note)
        task = self._bar.tasks[0].id
        self._bar.update(task, completed=state.read, total=state.total, note=note)

    @property
    def _note(self) -> str:
        speed = self.read / self.seconds if self.seconds else 0
        return f"{self.read:,}/{self.total:,} tokens · {speed:,.0f} tok/s · kept {self.kept:,}"

    @contextmanager
    def shown(self) -> Iterator[Callable[[Read], None]]:
        """Shows the bar, on a terminal, while the block runs."""
        if not console.is_terminal:
            self._logs = True
            yield self.update
            return
        columns = (
            TextColumn("reading"),
            BarColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(compact=True),
        )
        with Progress(*columns, console=console, transient=True) as self._bar:
            try:
                yield self.update
            finally:
                self._bar = None

    def line(self, columns: int) -> str:
        """The bar as text, for where something else is drawn below it."""
        if not self.total:
            return "reading …"
        note, left = self._note, ""
        if self.read and self.seconds:
            seconds = round(self.seconds * (self.total - self.read) / self.read)
            left = f" · {seconds // 60}:{seconds % 60:02} left"
        width = max(0, min(40, columns - len("reading  ") - len(note) - len(left) - 1))
        done = width * self.read // self.total
        bar = f"{'━' * done}{'─' * (width - done)} " if width else ""
        return f"reading {bar}{note}{left}"

    @property
    def stopped(self) -> str:
        return f"stopped after reading {self.read:,} of {self.total:,} tokens"


def account_lines(reply: Reply) -> list[str]:
    """What an answer saw, how full the cache is, how fast it was; and whether it was cut."""
    account = reply.account
    parts = []
    if account.text_tokens:
        share = account.text_kept / account.text_tokens
        seen = f"{account.text_kept:,} of {account.text_tokens:,} tokens"
        parts.append(f"saw {seen} of the document ({share:.0%})")
    parts += [
        f"cache {account.used_cells:,} of {account.ctx_cells:,} used",
        f"first token {account.first_token_seconds:.2f} s",
        f"{account.decode_tokens_per_second:.1f} tok/s",
    ]
    lines = [" · ".join(parts)]
    if account.recall_seconds:
        lines.insert(
            0,
            f"looked again at {account.parked_tokens:,} tokens in {account.recall_seconds:.1f} s",
        )
    if reply.finish_reason == "length":
        limit = len(reply.tokens)
        lines.append(
            f"cut at {counted(limit, 'token')}; a larger -n (in chat /set predict) allows more"
        )
    return lines


def printable(text: str) -> str:
    """An answer for standard output: filtered on a terminal, in a pipe or a file as it is."""
    return harmless(text, running=True) if sys.stdout.isatty() else text


def dim(text: str) -> None:
    """A line that may be overlooked."""
    _line(text, "dim", words=console.is_terminal)


def progress(text: str) -> None:
    """What is being done, for whoever sits at the terminal."""
    if console.is_terminal:
        dim(text)


def note(text: str) -> None:
    """A line that should not be."""
    _line(text, None)


def _line(text: str, style: str | None, *, words: bool = False) -> None:
    # where stderr is gone nothing can be said; that is no reason to lose an answer
    with contextlib.suppress(OSError, ValueError):
        # a terminal breaks lines in the middle of words; what may be copied stays as it is
        console.print(one_line(text), style=style, markup=False, soft_wrap=not words)


def failed(error: Exception, debug: bool = False) -> None:
    """One line about an error that is not the end; with `debug` where it came from, too."""
    if debug:
        streams.complain(trace(error))
    note(f"error: {said(error)}")


def said(error: Exception) -> str:
    """An error in words."""
    if isinstance(error, LaserKVError):
        return str(error)
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    words = f"{type(error).__name__}: {error}".rstrip(": ")
    return f"{words} (--debug shows where)"


def trace(error: Exception) -> str:
    """An error's traceback, as it may be shown."""
    return harmless("".join(traceback.format_exception(error))).rstrip("\n")
