"""How many threads decode a token: waiting for each other can cost more than they save.

llama.cpp's threads meet after each of a graph's nodes, hundreds of times for one token. On a small
model, or where cores are shared, one thread can be faster than two, while a block is faster on all.
"""

from __future__ import annotations

_TRIALS = 4  # tokens decoded with each number; the first one after a change does not count
_WORTH = 0.95  # fewer threads must take this much of the time or less


class TokenThreads:
    """Halves the number while that is faster, as tokens are decoded anyway; then keeps to it.

    Args:
        most: the number to begin with.
        fixed: stay with it.

    Attributes:
        count: threads for the next token.
    """

    def __init__(self, most: int, *, fixed: bool = False) -> None:
        self.count = self._best = most
        self._fastest = float("inf")
        self._times: list[float] = []
        self.settled = fixed or most < 2

    def took(self, seconds: float) -> None:
        """A token was decoded with `count` threads in so many seconds."""
        if self.settled:
            return
        self._times.append(seconds)
        if len(self._times) < _TRIALS:
            return
        seconds, self._times = min(self._times[1:]), []
        faster = seconds < self._fastest * _WORTH
        if faster:
            self._fastest, self._best = seconds, self.count
        self.settled = not faster or self.count == 1
        self.count = self._best if self.settled else self.count // 2
