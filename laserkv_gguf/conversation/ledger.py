"""Which token stands in which cell of a sequence: the one place where that is written down."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

SYSTEM, DOCUMENT, TURN = KINDS = "system", "document", "turn"

Indices = NDArray[np.int64]


@dataclass
class Segment:
    """A stretch of the conversation as it was read: the system prompt, a document or a turn.

    Attributes:
        kind: "system", "document" or "turn".
        tokens: (n,) int32 ids of all of it, also of what was evicted since.
        name: of a document.
        pools: for a document, (n,) int8: the part of the budget every token would be kept by, 0
            (anchor), 1 (long-term pool) or 2 (window); empty for others.
        aged: whether a turn has been thinned.
        scores: (n,) float32, what the policy last scored each token, NaN where it scored none;
            empty where nothing was scored, or it is not known any more (files do not hold it).
        blocks: (blocks,) int64, the first token of each block that it was read in; empty likewise.
    """

    kind: str
    tokens: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    name: str = ""
    pools: NDArray[np.int8] = field(default_factory=lambda: np.empty(0, np.int8))
    aged: bool = False
    scores: NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))
    blocks: Indices = field(default_factory=lambda: np.empty(0, np.int64))


class Ledger:
    """One row for every cell of a sequence, in the order of their positions.

    Attributes:
        segments: by number, in the order they were read.
    """

    def __init__(self) -> None:
        self.segments: dict[int, Segment] = {}
        # segment, index, position; room to grow, so that a token costs no copy of all rows
        self._rows = np.empty((3, 64), np.int64)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def segment(self) -> Indices:
        """(rows,) the number of the segment that a row's token belongs to; a view."""
        return self._rows[0, : self._count]

    @property
    def index(self) -> Indices:
        """(rows,) which of its segment's tokens it is; a view."""
        return self._rows[1, : self._count]

    @property
    def position(self) -> Indices:
        """(rows,) where it stands in the cache, ascending; a view."""
        return self._rows[2, : self._count]

    @property
    def rows(self) -> Indices:
        """(3, rows): segment, index and position; a copy, as `of_rows` takes it."""
        return self._rows[:, : self._count].copy()

    @classmethod
    def of_rows(cls, segments: dict[int, Segment], rows: Indices) -> Ledger:
        """A ledger of given segments and (3, rows) int64."""
        ledger = cls()
        ledger.segments = segments
        ledger._rows, ledger._count = np.array(rows, np.int64), rows.shape[1]
        return ledger

    @property
    def next_position(self) -> int:
        """Where the next token goes: right after the last one."""
        return int(self._rows[2, self._count - 1]) + 1 if self._count else 0

    @property
    def next_number(self) -> int:
        return max(self.segments, default=-1) + 1

    def new(self, segment: Segment) -> int:
        """Adds a segment without rows; returns its number."""
        number = self.next_number
        self.segments[number] = segment
        return number

    def append(self, number: int, index: Indices, position: Indices) -> None:
        """Adds rows of a segment at the end."""
        end = self._count + len(index)
        if end > self._rows.shape[1]:
            grown = np.empty((3, max(end, 2 * self._rows.shape[1])), np.int64)
            grown[:, : self._count] = self._rows[:, : self._count]
            self._rows = grown
        self._rows[0, self._count : end] = number
        self._rows[1, self._count : end] = index
        self._rows[2, self._count : end] = position
        self._count = end

    def extend(self, number: int, tokens: NDArray[np.int32], start: int) -> None:
        """Adds tokens to a segment, with their rows at start, start + 1, …"""
        segment = self.segments[number]
        first = len(segment.tokens)
        segment.tokens = np.concatenate((segment.tokens, tokens)).astype(np.int32)
        steps = np.arange(len(tokens))
        self.append(number, first + steps, start + steps)

    def keep(self, stays: NDArray[np.bool_]) -> None:
        """Drops the other rows; what they were is still in the segments."""
        left = self._rows[:, : self._count][:, stays]
        self._count = left.shape[1]
        self._rows[:, : self._count] = left

    def put(self, numbers: Iterable[int], where: Indices) -> None:
        """Makes these the rows of some segments that were read together.

        Args:
            where: of all their tokens, one segment after the other, the position in the cache; -1
                for those that are not there.
        """
        numbers = list(numbers)
        self.keep(~self.of(numbers))
        start = 0
        for number in numbers:
            end = start + len(self.segments[number].tokens)
            index = np.flatnonzero(where[start:end] >= 0)
            self.append(number, index, where[start:end][index])
            start = end
        order = np.argsort(self.position, kind="stable")
        self._rows[:, : self._count] = self._rows[:, : self._count][:, order]

    def where(self, numbers: Iterable[int]) -> Indices:
        """The positions of all tokens of some segments, -1 where not there; as `put` takes them."""
        numbers = list(numbers)
        lengths = [len(self.segments[number].tokens) for number in numbers]
        found = np.full(sum(lengths), -1, np.int64)
        start = 0
        for number, length in zip(numbers, lengths, strict=True):
            rows = self.segment == number
            found[start + self.index[rows]] = self.position[rows]
            start += length
        return found

    def forget(self, number: int) -> None:
        """Drops a segment with its rows."""
        self.keep(self.segment != number)
        del self.segments[number]

    def document(self, name: str) -> int | None:
        """The number of a document's segment; None where it has none."""
        return next((n for n in self.numbers(DOCUMENT) if self.segments[n].name == name), None)

    def numbers(self, *kinds: str) -> list[int]:
        """The segments of some kinds, in order."""
        return [n for n, segment in self.segments.items() if segment.kind in kinds]

    def of_kind(self, *kinds: str) -> NDArray[np.bool_]:
        """(rows,) whether a row is of such a segment."""
        return self.of(self.numbers(*kinds))

    def of(self, numbers: Iterable[int]) -> NDArray[np.bool_]:
        """(rows,) whether a row is of one of these segments."""
        return np.isin(self.segment, list(numbers))

    def count(self, number: int) -> int:
        """Rows of a segment."""
        return int((self.segment == number).sum())

    def kept(self, number: int) -> Indices:
        """Which tokens of a segment are in the cache, ascending."""
        found: Indices = self.index[self.segment == number]
        return found

    def tokens_of(self, *kinds: str) -> int:
        """Tokens of all segments of some kinds, evicted ones included."""
        return sum(len(self.segments[number].tokens) for number in self.numbers(*kinds))

    @property
    def tokens_read(self) -> int:
        """All tokens of the segments, evicted ones included."""
        return self.tokens_of(*KINDS)
