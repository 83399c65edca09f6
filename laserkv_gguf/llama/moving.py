"""Moves what a sequence holds: keys to where they stand now, rows to lower cells."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from laserkv_gguf.errors import LaserKVError
from laserkv_gguf.llama import state
from laserkv_gguf.llama.context import Context
from laserkv_gguf.llama.sequence import SPARE, Sequence

_BYTES_AT_ONCE = 1 << 26  # of a sequence that is moved


def settle(context: Context) -> None:
    """Lets llama.cpp turn moved keys to where they stand, which it does with its next batch."""
    spare = Sequence(context, SPARE)
    try:
        with context.at_once():
            context.decode(np.zeros(1, np.int32), 0, SPARE)
    finally:
        spare.remove()


def _comes_back(context: Context, sequence: Sequence, position: int) -> bool:
    """Whether llama.cpp takes one token's saved state, and hands out the same again."""
    one, other = Sequence(context, SPARE), Sequence(context, SPARE + 1)
    try:
        sequence.share_with(one, position, position + 1)
        blob = state.save(context.handle, SPARE)
        state.restore(context.handle, other.number, blob)
        # a header of 16 bytes, position, number of sequences, and which one: that differs
        return np.array_equal(state.save(context.handle, other.number)[28:], blob[28:])
    except LaserKVError:
        return False
    finally:
        one.remove()
        other.remove()


def gather(context: Context, sequence: int, positions: NDArray[np.int64]) -> None:
    """Moves a sequence into the lowest cells that are free or its own; bit for bit.

    llama.cpp's attention runs up to the highest cell in use, whatever has been freed below it.
    Every token moves once, a part at a time, and llama.cpp gives it the lowest cells there are: as
    many cells are free below the line as tokens are above it, so that none stays above. Where
    llama.cpp's state of one token does not come back as it was, everything stays where it is.

    Args:
        positions: of the sequence's tokens that are moved, ascending.
    """
    source, spare = Sequence(context, sequence), Sequence(context, SPARE)
    at_once = max(1, _BYTES_AT_ONCE * context.allocated_cells // context.kv_bytes)
    if not len(positions) or not _comes_back(context, source, int(positions[-1])):
        return
    # from the end: what was decoded last is up there, and makes room for the rest
    for end in range(len(positions), 0, -at_once):
        part = positions[max(0, end - at_once) : end]
        first, last = int(part[0]), int(part[-1]) + 1
        spare.remove()
        try:
            source.share_with(spare, first, last)
            blob = state.save(context.handle, SPARE)
            source.remove(first, last)
            state.restore(context.handle, SPARE, blob)
            spare.share_with(source)
        finally:
            spare.remove()
