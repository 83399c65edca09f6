"""Which tokens of a conversation stand in which cells of the main sequence."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

SYSTEM, DOCUMENT, TURN = "system", "document", "turn"


@dataclass
class Segment:
    """A stretch of the conversation as it was read: the system prompt, a document or a turn.

    Attributes:
        kind: "system", "document" or "turn".
        tokens: int32 ids of all of it, also of what was evicted since.
        name: of a document.
        pools: for a document, the part of the budget every token would be kept by: 0 (anchor),
            1 (long-term pool) or 2 (window).
        whole: whether a turn has not been thinned yet.
    """

    kind: str
    tokens: NDArray[np.int32]
    name: str = ""
    pools: NDArray[np.int8] = field(default_factory=lambda: np.empty(0, np.int8))
    whole: bool = True


class Ledger:
    """One row for every cell of the main sequence, in the order of their positions.

    Attributes:
        segments: by number, in the order they were read.
        segment, index, position: (rows,) int64: the number of the segment a row's token belongs
            to, which of its tokens it is, and where it stands in the cache.
    """

    def __init__(self) -> None:
        self.segments: dict[int, Segment] = {}
        self.segment = np.empty(0, np.int64)
        self.index = np.empty(0, np.int64)
        self.position = np.empty(0, np.int64)

    def __len__(self) -> int:
        return len(self.position)

    @property
    def next_position(self) -> int:
        return int(self.position[-1]) + 1 if len(self) else 0

    @property
    def next_number(self) -> int:
        return max(self.segments, default=-1) + 1

    def new(self, segment: Segment) -> int:
        """Adds a segment without rows; returns its number."""
        number = self.next_number
        self.segments[number] = segment
        return number

    def append(self, number: int, index: NDArray[np.int64], position: NDArray[np.int64]) -> None:
        """Adds rows of a segment at the end."""
        self.segment = np.concatenate((self.segment, np.full(len(index), number, np.int64)))
        self.index = np.concatenate((self.index, np.asarray(index, np.int64)))
        self.position = np.concatenate((self.position, np.asarray(position, np.int64)))

    def extend(self, number: int, tokens: NDArray[np.int32], start: int) -> None:
        """Adds tokens to a segment, with their rows at start, start + 1, …"""
        segment = self.segments[number]
        first = len(segment.tokens)
        segment.tokens = np.concatenate((segment.tokens, tokens)).astype(np.int32)
        steps = np.arange(len(tokens))
        self.append(number, first + steps, start + steps)

    def keep(self, stays: NDArray[np.bool_]) -> None:
        """Drops the other rows; what they were is still in the segments."""
        self.segment, self.index = self.segment[stays], self.index[stays]
        self.position = self.position[stays]

    def put(self, number: int, index: NDArray[np.int64], position: NDArray[np.int64]) -> None:
        """Makes these the rows of a segment, wherever they stand."""
        self.keep(self.segment != number)
        self.append(number, index, position)
        order = np.argsort(self.position, kind="stable")
        self.segment, self.index = self.segment[order], self.index[order]
        self.position = self.position[order]

    def forget(self, number: int) -> None:
        """Drops a segment with its rows."""
        self.keep(self.segment != number)
        del self.segments[number]

    def numbers(self, kind: str) -> list[int]:
        """The segments of a kind, in order."""
        return [n for n, segment in self.segments.items() if segment.kind == kind]

    def of_kind(self, kind: str) -> NDArray[np.bool_]:
        """(rows,) whether a row is of such a segment."""
        return self.of(self.numbers(kind))

    def of(self, numbers: list[int]) -> NDArray[np.bool_]:
        """(rows,) whether a row is of one of these segments."""
        return np.isin(self.segment, numbers)

    def count(self, number: int) -> int:
        """Rows of a segment."""
        return int((self.segment == number).sum())

    def kept(self, number: int) -> NDArray[np.int64]:
        """Which tokens of a segment are in the cache, ascending."""
        rows: NDArray[np.int64] = self.index[self.segment == number]
        return rows

    @property
    def tokens_read(self) -> int:
        """All tokens of the segments, evicted ones included."""
        return sum(len(segment.tokens) for segment in self.segments.values())
