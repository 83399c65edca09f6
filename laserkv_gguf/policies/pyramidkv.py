"""`pyramidkv`: as `snapkv`, but the low layers keep more tokens than the high ones."""

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
    """Budgets that shrink linearly from low to high layers (arXiv 2406.02069).

    The authors' code: Zefan-Cai/KVCache-Factory, `pyramidkv_utils.py`. With a mean budget of b
    tokens the highest layer keeps b / β, the lowest 2b - b / β, and those between lie on a line
    (the paper's equations for the budget allocation). Where the lowest layer's budget passes the
    number of candidates, it is all of them and the line turns flatter; the mean stays b. Scores
    are `snapkv`'s.

    In llama.cpp a token is kept for all layers or for none, so layers cannot keep each its own k
    best. Instead all budgets shrink by one factor until together they name b tokens: the tokens
    stay whose rank / k is smallest in the layer where it is smallest, and among equals the scores
    summed over layers decide.

    Attributes:
        window: last tokens read that always stay (8, the paper's α).
        pool: a score is the largest of this many neighbours (7, the authors' code); 1: none.
        beta: how steep the pyramid is (20, the paper's β); 1 gives every layer the same.
    """

    name: ClassVar[str] = "pyramidkv"
    needs: ClassVar[Needs] = Needs(
        queries=True, keys=True, outside=True, probe_tokens=8, observation=8
    )

    window: int = 8
    beta: float = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.beta >= 1:
            raise UserError(
                f"--policy-option beta={self.beta}: give at least 1 (all layers alike), such as 20"
            )

    def select(self, candidates: Candidates, budget: int) -> NDArray[np.int64]:
        scores = np.stack(list(self.by_layer(candidates)))
        candidates.noted(scores.sum(axis=0))
        scores = np.where(np.isnan(scores), -np.inf, scores)
        places = np.full(candidates.count, np.inf)
        for layer, share in zip(scores, self.shares(len(scores), budget, places.size), strict=True):
            if share and layer.max() > 0:  # a layer that looks at nothing has no say
                ranks = np.empty(places.size)
                ranks[np.argsort(-layer, kind="stable")] = np.arange(1, places.size + 1)
                places = np.minimum(places, ranks / share)
        return np.lexsort((-scores.sum(axis=0), places))[:budget]

    def shares(self, layers: int, budget: int, count: int) -> list[int]:
        """How many of `count` candidates each layer would keep, from the lowest layer on."""
        if layers == 1:
            return [budget]
        lowest = min(2 * budget - budget / self.beta, count)
        line = np.linspace(lowest, 2 * budget - lowest, layers)
        return [int(share) for share in np.rint(line)]
