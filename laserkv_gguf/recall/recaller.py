"""Recall: rows of evicted tokens stay on the host and come back bit for bit, for every question.

While a document is read, `Recaller` parks the rows of every block as it was decoded (`Parked`). A
question then chooses anew among all tokens of the document, in one of two ways (`Replay`,
`Shortlist`), and only the tokens that change sides are moved.

A document that was added to a conversation begins at a position above 0, its `offset`. What stands
before and after it is the conversation's, and every question sees it. Of a document after it replay
shows only anchors and window, as of the blocks after the one that is chosen from: what was chosen
there for another question leaves no trace.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from laserkv_gguf.budget import Block, Budget
from laserkv_gguf.llama import rows
from laserkv_gguf.llama.chat import Prompt
from laserkv_gguf.planning.settings import RecallSettings
from laserkv_gguf.reading.reader import Reader
from laserkv_gguf.recall.parked import Parked
from laserkv_gguf.recall.replay import Replay
from laserkv_gguf.recall.shortlist import Shortlist
from laserkv_gguf.recall.store import Indices


@dataclass(frozen=True)
class Recalled:
    """What recalling for a question did.

    Attributes:
        kept: indices of the document's tokens that are in the cache now.
        moved_in, moved_out: tokens that the question before did not have, or had and lost.
        state_calls: calls into llama.cpp that put rows in.
        seconds: all of it, the probes included.
    """

    kept: Indices
    moved_in: int
    moved_out: int
    state_calls: int
    seconds: float


class Recaller(Parked):
    """Parks a document's rows and brings back what a question needs; see `Parked`.

    Attributes:
        way: how a question chooses.
    """

    def __init__(
        self,
        reader: Reader,
        budget: Budget,
        form: rows.Format,
        settings: RecallSettings,
        offset: int = 0,
    ) -> None:
        super().__init__(reader, budget, form, settings, offset)
        try:
            self.way = Replay(self) if self.mode == "replay" else Shortlist(self)
        except BaseException:
            self.close()
            raise

    @property
    def bytes(self) -> int:
        """Parked rows, and what is held beside them to find them by."""
        return self.store.bytes + self.way.bytes

    @property
    def extra_cells(self) -> int:
        """Extra cells needed while a question is recalled, on top of the `limit` that stay."""
        return self.way.extra_cells

    def park(self, block: Block, position: int, reader: Reader | None = None) -> None:
        """Takes a block's rows out of the main sequence, where it begins at `position`.

        Args:
            reader: that has just decoded it, for its queries.

        Raises:
            LaserKVError: the disk is full.
        """
        self.take(block, position)
        self.way.remember(block, reader)

    def remember(self) -> None:
        """Makes anew, from the parked rows, what finds them."""
        for block in self.budget.blocks:
            self.way.remember(block, None)

    def begin_again(self) -> None:
        """Puts back what the reading left, so that no question depends on the ones before it."""
        if not self.way.fresh:
            self.arrange(self.final(self.kept_by_reading))

    def recall(
        self,
        question: Prompt,
        position: int,
        cells: int,
        hidden: Iterable[tuple[int, int]] = (),
    ) -> Recalled:
        """Brings the tokens into the cache that the question needs, and others out.

        Args:
            question: with whatever of the conversation is not decoded yet in front.
            position: where it will stand: right after the last token of the main sequence.
            cells: taken by the main sequence.
            hidden: positions, half-open, that replay hides: `inner` of documents after this one.

        Raises:
            Cancelled, LaserKVError, PolicyError, KeyboardInterrupt: the cache holds what it held.
        """
        started, before, calls = time.perf_counter(), self.kept, self.state_calls
        self.scores, self.drafts = np.full_like(self.scores, np.nan), []
        try:
            kept = self.way.choose(question, position, cells, tuple(hidden))
        except BaseException:
            self.go_back(before)
            raise
        return Recalled(
            kept,
            len(np.setdiff1d(kept, before, assume_unique=True)),
            len(np.setdiff1d(before, kept, assume_unique=True)),
            self.state_calls - calls,
            time.perf_counter() - started,
        )
