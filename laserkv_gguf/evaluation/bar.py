"""The bar of a run: what is done, what is left, and how many answers were right so far."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from laserkv_gguf.evaluation.results import Row

SHOWN = 5


class Bar:
    """Counts rows, those of an earlier run included.

    Args:
        total: rows there will be.
        rows: that are there already.
    """

    def __init__(self, total: int, rows: Iterable[Row] = ()) -> None:
        self.total, self.done, self.failed = total, 0, 0
        self._scores: dict[str, list[float]] = defaultdict(list)
        self._bar: Progress | None = None
        for row in rows:
            self.update(row)

    def update(self, row: Row) -> None:
        """Takes a row."""
        self.done += 1
        if row["score"] is None:
            self.failed += 1
        else:
            self._scores[row["policy"]].append(row["score"])
        if self._bar:
            self._bar.update(self._bar.tasks[0].id, completed=self.done, note=self.note)

    @property
    def note(self) -> str:
        """Mean scores so far, the best policies first."""
        means = {name: sum(found) / len(found) for name, found in self._scores.items()}
        best = sorted(means, key=lambda name: -means[name])
        text = " ".join(f"{name} {means[name]:.2f}" for name in best[:SHOWN])
        more = f" (+{len(best) - SHOWN})" if len(best) > SHOWN else ""
        failed = f" · {self.failed} failed" if self.failed else ""
        return text + more + failed

    @contextmanager
    def shown(self, console: Console) -> Iterator[None]:
        """Shows the bar, on a terminal, while the block runs."""
        if not console.is_terminal:
            yield
            return
        columns = (
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=console, transient=True) as self._bar:
            self._bar.add_task("", total=self.total, completed=self.done, note=self.note)
            try:
                yield
            finally:
                self._bar = None
