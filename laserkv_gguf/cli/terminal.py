"""What people see while they wait: a progress bar, and one dim line of account. All on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from laserkv_gguf.conversation.account import Account
    from laserkv_gguf.reading.reader import Progress as Read

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


_CONTROL = dict.fromkeys(c for c in (*range(32), *range(127, 160)) if c not in (9, 10))


def printable(text: str) -> str:
    """Text without control characters where it goes to a terminal, which would obey them."""
    return harmless(text) if sys.stdout.isatty() else text


def harmless(text: str) -> str:
    """Text without control characters, tabs and line breaks excepted."""
    return text.translate(_CONTROL)


def size(number: float) -> str:
    """Bytes as people write them."""
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.2f} GiB"


def dim(text: str) -> None:
    """A line that may be overlooked."""
    console.print(text, style="dim", markup=False, soft_wrap=True)


def progress(text: str) -> None:
    """What is being done, for whoever sits at the terminal."""
    if console.is_terminal:
        dim(text)


def note(text: str) -> None:
    """A line that should not be."""
    console.print(text, markup=False, soft_wrap=True)
