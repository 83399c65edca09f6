"""Sequences of a context: which cells belong to which, and at which positions."""

from __future__ import annotations

import llama_cpp as L
import numpy as np
from numpy.typing import NDArray

from laserkv_gguf.errors import LaserKVError
from laserkv_gguf.llama.context import Context

MAIN, PROBE, SPARE = 0, 1, 2


def scratch_of(number: int) -> int:
    """The sequence in which the questions of a main sequence are asked: each has its own."""
    return PROBE if number == MAIN else number + 1


def runs(positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """Half-open runs (k, 2) of consecutive numbers in an ascending array."""
    if not len(positions):
        return np.empty((0, 2), np.int64)
    breaks = np.flatnonzero(np.diff(positions) != 1)
    starts = positions[np.concatenate(([0], breaks + 1))]
    ends = positions[np.concatenate((breaks, [len(positions) - 1]))] + 1
    return np.stack((starts, ends), axis=1)


class Sequence:
    """One sequence of a context."""

    def __init__(self, context: Context, number: int) -> None:
        self.context, self.number = context, number

    def share_with(self, other: Sequence, start: int = -1, end: int = -1) -> None:
        """Makes cells of this sequence belong to `other` too; copies nothing.

        Args:
            start, end: positions, half-open (-1: from the first, to the last).
        """
        L.llama_memory_seq_cp(self.context.memory, self.number, other.number, start, end)

    def remove(self, start: int = -1, end: int = -1) -> None:
        """Frees positions start … end - 1 (-1: from the first, to the last)."""
        if not L.llama_memory_seq_rm(self.context.memory, self.number, start, end):
            raise LaserKVError(f"llama.cpp did not remove positions {start} to {end}")

    def remove_all(self, positions: NDArray[np.int64]) -> None:
        """Frees the given ascending positions, one call a run."""
        for start, end in runs(positions):
            self.remove(int(start), int(end))

    def compact(self, kept: NDArray[np.int64], first: int) -> None:
        """Moves the given ascending positions to first, first + 1, …

        llama.cpp re-rotates the keys when it decodes the next batch. The target of every run lies
        at or below it, so that runs moved in ascending order never meet.
        """
        for start, end in runs(kept):
            shift = first - int(start)
            if shift:
                L.llama_memory_seq_add(
                    self.context.memory, self.number, int(start), int(end), shift
                )
            first += int(end - start)

    @property
    def last(self) -> int:
        """The highest position, -1 for an empty sequence."""
        return int(L.llama_memory_seq_pos_max(self.context.memory, self.number))
