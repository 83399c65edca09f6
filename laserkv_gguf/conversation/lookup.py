"""Prompt lookup: drafts of an answer, copied from the documents it is about.

Where the last few tokens of an answer stand in a document, what follows there is likely to be said
next. It is decoded along with the token that is due, in the same batch, and stays as far as the
sampler chooses the same: the answer is what it would have been, but for the rounding of llama.cpp's
kernels, which differ for one token and for several. Evicted tokens can be copied, too: what they
were is known. (The idea is prompt lookup decoding, Saxena 2023.)
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_WIDTHS = (4, 3)  # tokens that must stand in the text; the more, the surer
_COST = 0.3  # what a draft costs, in tokens decoded alone; see `judge`
_SPENT, _REST = -3.0, 16  # tokens lost before it rests, and for how many


class Lookup:
    """What an answer may go on with.

    Args:
        text: (n,) int32 ids of the documents, one after the other.
        most: drafts at a time.
    """

    def __init__(self, text: NDArray[np.int32], most: int) -> None:
        self._text, self._most = text, most
        self._trust = min(4, most)
        self._won = 0.0
        self._rests = 0

    def drafts(self, said: list[int], room: int) -> list[int]:
        """Tokens that may follow; none where it has not paid of late.

        Args:
            said: the answer so far.
            room: most of them.
        """
        if self._rests:
            self._rests -= 1
            return []
        limit = min(self._trust, room)
        if limit < 1:
            return []
        for width in _WIDTHS:
            if len(said) >= width:
                at = _last(self._text, said[-width:])
                if at >= 0:
                    return [int(token) for token in self._text[at : at + limit]]
        return []

    def judge(self, drafted: int, agreed: int) -> None:
        """Takes in how many drafts were right: as long as all are, there are more of them.

        Where they cost more than they save it rests.
        """
        if agreed == drafted:
            self._trust = min(2 * self._trust, self._most)
        else:
            self._trust = max(1, agreed)
        self._won = min(self._won + agreed - _COST * drafted, -_SPENT)
        if self._won < _SPENT:
            self._won, self._rests, self._trust = _SPENT + 1.0, _REST, 1


def _last(text: NDArray[np.int32], words: list[int]) -> int:
    """Where the text goes on after the last place where words stand in it; -1 for nowhere."""
    width = len(words)
    if len(text) <= width:
        return -1
    ends = np.flatnonzero(text[width - 1 : -1] == words[-1]) + width
    for back in range(2, width + 1):
        ends = ends[text[ends - back] == words[-back]]
    return int(ends[-1]) if len(ends) else -1
