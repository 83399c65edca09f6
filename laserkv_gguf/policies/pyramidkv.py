"""`pyramidkv`: as `snapkv`, but layers vote, the low ones for more tokens than the high ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from laserkv_gguf.errors import UserError
from laserkv_gguf.policies.base import Candidates, Needs
from laserkv_gguf.policies.snapkv import SnapKV


@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """Budgets that shrink linearly from low to high layers, as votes (arXiv 2406.02069).

    With a mean budget of b tokens the highest layer has b / β, the lowest 2b - b / β, and those
    between lie on a line (the paper's equations for the budget allocation). In llama.cpp a token
    is kept for all layers or for none: each layer votes for its own best by pooled attention, the
    tokens with most votes stay, and among equals the scores summed over layers decide.

    Where the lowest layer's budget passes the number of candidates, it is all of them and the
    line turns flatter; the mean stays b.

    Attributes:
        window: last tokens read that always stay (8, the paper's α).
        pool: scores are averaged over this many neighbours (7, the authors' code); 1: none.
        beta: how steep the pyramid is (20, the paper's β); 1 gives every layer the same.
    """

    name: ClassVar[str] = "pyramidkv"
    needs: ClassVar[Needs] = Needs(queries=True, keys=True, probe_tokens=8, observation=8)

    window: int = 8
    beta: float = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.beta >= 1:
            raise UserError(
                f"--policy-option beta={self.beta}: give at least 1 (all layers alike), such as 20"
            )

    def select(self, candidates: Candidates, budget: int) -> NDArray[np.int64]:
        from laserkv_gguf import kernels

        assert candidates.queries is not None
        assert candidates.keys is not None
        scores = kernels.attention_by_layer(candidates.queries, candidates.keys)
        scores = np.stack([kernels.pool(layer, self.pool) for layer in scores])
        votes = np.zeros(candidates.count, np.int64)
        for layer, share in zip(scores, self.shares(len(scores), budget, votes.size), strict=True):
            chosen = kernels.top_k(layer, share)
            votes[chosen[~np.isnan(layer[chosen])]] += 1
        return np.lexsort((-np.nansum(scores, axis=0), -votes))[:budget]

    def shares(self, layers: int, budget: int, count: int) -> list[int]:
        """How many of `count` candidates each layer votes for, from the lowest layer on."""
        if layers == 1:
            return [budget]
        lowest = min(2 * budget - budget / self.beta, count)
        line = np.linspace(lowest, 2 * budget - lowest, layers)
        return [int(share) for share in np.rint(line)]
