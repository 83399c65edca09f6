"""`lagkv`: tokens that stand out against the tokens after them; no attention, no question."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from laserkv_gguf.errors import UserError
from laserkv_gguf.policies.base import Candidates, Needs, Policy


@dataclass(frozen=True)
class LagKV(Policy):
    """Keys and values measured by the next partition's range (arXiv 2504.04704).

    The authors' code: AI-Lab-China-Merchants-Bank/LagKV, `lag_kv.py`. The sequence is cut into
    partitions of `lag` tokens. A token's score is the standard deviation of its channels, in units
    of their range in the next partition, as a softmax over its own partition; keys' and values'
    scores are added. What was chosen is never looked at again. The last tokens, which have no next
    partition yet, always stay: here the window, which is the last candidates' reference. Where it
    has fewer than two tokens, the partition before is.

    In llama.cpp a token is kept for all layers and heads or for none, so scores are summed over
    them, where the paper chooses in every head. A remainder too short for a partition counts with
    the one before it. Every partition gets its share of the budget and keeps its best; what does
    not divide evenly goes to those whose next best token scores highest.

    Attributes:
        lag: tokens of a partition (128, the paper's).
        sinks: first tokens of the sequence, kept whatever their score (16, the authors' default);
            the anchors are usually more than these.
    """

    name: ClassVar[str] = "lagkv"
    needs: ClassVar[Needs] = Needs(keys=True, values=True)

    lag: int = 128
    sinks: int = 16

    def __post_init__(self) -> None:
        if self.lag < 2:
            raise UserError(f"lag is {self.lag}; give partitions of at least 2 tokens, such as 128")
        if self.sinks < 0:
            raise UserError(f"sinks is {self.sinks}; give a number of tokens, 0 for none")

    def select(self, candidates: Candidates, budget: int) -> NDArray[np.int64]:
        first = int(np.searchsorted(candidates.tokens, self.sinks))
        scores = np.zeros(candidates.count)
        place = np.full(candidates.count, -1.0)  # within the partition, 0 for its best to 1
        held = candidates.around
        begin, count = held.first, len(held.tokens)
        for part in self._partitions(first, candidates.count):
            own = slice(begin + part.start, begin + part.stop)
            other = slice(own.stop, min(own.stop + self.lag, count))
            if other.stop - other.start < 2:
                before = max(own.start - self.lag, begin + first)
                other = slice(before, own.start) if before < own.start else own
            score = sum(
                _standing_out(layer[own], layer[other])
                for seen in (held.keys, held.values)
                if seen is not None
                for layer in seen
            )
            size = part.stop - part.start
            scores[part] = score * size
            place[part.start + np.argsort(-score, kind="stable")] = np.arange(size) / size
        return np.lexsort((-candidates.noted(scores), place))[:budget]

    def _partitions(self, first: int, end: int) -> list[slice]:
        starts = list(range(first, end - self.lag + 1, self.lag)) or [first]
        return [slice(*edges) for edges in pairwise([*starts, end])] if first < end else []


def _standing_out(states: NDArray[Any], others: NDArray[Any]) -> NDArray[np.float64]:
    """The paper's score of (tokens, kv_heads, head_dim), summed over heads: (tokens,).

    A channel whose range is empty is not divided by it; what is no number scores NaN.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        others = np.where(np.isfinite(others), others, np.nan).astype(np.float64)
        low, high = np.fmin.reduce(others), np.fmax.reduce(others)
        scaled = (states - low) / np.where(high > low, high - low, 1)
        spread = scaled.std(axis=2, ddof=1)
        spread[~np.isfinite(spread)] = np.nan
        weights = np.exp(spread - np.fmax.reduce(spread))
        share: NDArray[np.float64] = (weights / np.nansum(weights, axis=0)).sum(axis=1)
    return share
