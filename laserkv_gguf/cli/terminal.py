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
from laserkv_gguf.shown import harmless, one_line

if TYPE_CHECKING:
    from rich.console import ConsoleOptions, RenderableType

    from laserkv_gguf.conversation.account import Account
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


class ReadingBar:
    """A progress bar for reading, and what was read when it stopped."""

    def __init__(self) -> None:
        self.read = self.total = 0
        self._bar: Progress | None = None

    def update(self, state: Read) -> None:
        """Takes a report of the engine."""
        self.read, self.total = state.read, state.total
        if self._bar is None:
            return
        speed = state.read / state.seconds if state.seconds else 0
        note = f"{state.read:,}/{state.total:,} tokens · {speed:,.0f} tok/s · kept {state.kept:,}"
        if not self._bar.tasks:
            self._bar.add_task("", total=state.total, note=note)
        task = self._bar.tasks[0].id
        self._bar.update(task, completed=state.read, total=state.total, note=note)

    @contextmanager
    def shown(self) -> Iterator[Callable[[Read], None]]:
        """Shows the bar, on a terminal, while the block runs."""
        if not console.is_terminal:
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

    @property
    def stopped(self) -> str:
        return f"stopped after reading {self.read:,} of {self.total:,} tokens"


def account_line(account: Account) -> str:
    """Kept of read, cells, first token, speed."""
    return (
        f"kept {account.kept_tokens:,} of {account.document_tokens:,} tokens "
        f"({account.kept_fraction:.1%}) · {account.ctx_cells:,} cells, "
        f"{size(account.kv_bytes)} (full {size(account.full_kv_bytes)}) · "
        f"first token {account.first_token_seconds:.2f} s · "
        f"{account.decode_tokens_per_second:.1f} tok/s"
    )


def printable(text: str) -> str:
    """An answer for standard output: filtered on a terminal, in a pipe or a file as it is."""
    return harmless(text, running=True) if sys.stdout.isatty() else text


def dim(text: str) -> None:
    """A line that may be overlooked."""
    _line(text, "dim")


def progress(text: str) -> None:
    """What is being done, for whoever sits at the terminal."""
    if console.is_terminal:
        dim(text)


def note(text: str) -> None:
    """A line that should not be."""
    _line(text, None)


def _line(text: str, style: str | None) -> None:
    # where stderr is gone nothing can be said; that is no reason to lose an answer
    with contextlib.suppress(OSError, ValueError):
        console.print(one_line(text), style=style, markup=False, soft_wrap=True)


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
