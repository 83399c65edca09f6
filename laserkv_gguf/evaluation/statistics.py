"""Intervals and tests for small samples of right and wrong answers."""

from __future__ import annotations

import math


def wilson(right: int, count: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson's score interval of a proportion; z as it stands is 95 %."""
    if count == 0:
        return 0.0, 1.0
    share, square = right / count, z * z
    middle = (share + square / (2 * count)) / (1 + square / count)
    half = z * math.sqrt(share * (1 - share) / count + square / (4 * count**2))
    half /= 1 + square / count
    return max(0.0, middle - half), min(1.0, middle + half)


def mcnemar(only_first: int, only_second: int) -> float:
    """McNemar's exact test, two-sided, of paired right and wrong answers.

    Args:
        only_first, only_second: samples that only one of the two got right.

    Returns:
        The probability of a split at least as uneven if both were equally good: twice the tail of
        a fair coin, at most 1.
    """
    count = only_first + only_second
    tail = sum(math.comb(count, k) for k in range(min(only_first, only_second) + 1))
    return min(1.0, float(2 * tail / 2**count))
