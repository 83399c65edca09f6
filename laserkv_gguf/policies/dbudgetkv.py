"""`dbudgetkv`: as few tokens as leave the norm of the attention what it was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from laserkv_gguf.errors import UserError
from laserkv_gguf.policies.base import Candidates, Needs, Policy

ORDERS = ("position", "attention")


@dataclass(frozen=True)
class DBudgetKV(Policy):
    """Evicts until the attention matrix has lost 1% of its norm (arXiv 2502.16886; ReFreeKV).

    Tokens are ranked, and the best are kept until (‖A‖ − ‖A kept‖) / ‖A‖ is within the threshold,
    where ‖A‖ is the Frobenius norm of a head's attention. The paper asks this of every layer; here
    a token is kept for all layers and heads or for none, so the norms are averaged over them. A is
    the probe's attention to the candidates, and the budget is a ceiling: where it comes first, the
    best that fit are kept.

    Attributes:
        threshold: share of the norm that may be lost (the paper's 1%).
        order: "position", as in the paper: the newest first (its first tokens are the anchors); or
            "attention": those the probe attends to most first.
    """

    name: ClassVar[str] = "dbudgetkv"
    needs: ClassVar[Needs] = Needs(queries=True, keys=True)
    flexible: ClassVar[bool] = True

    threshold: float = 0.01
    order: str = "position"

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < 1:
            raise UserError(
                f"threshold is {self.threshold:g}; give a share from 0 to below 1, such as 0.01"
            )
        if self.order not in ORDERS:
            raise UserError(f"order is {self.order!r}; give {' or '.join(ORDERS)}")

    def select(self, candidates: Candidates, budget: int) -> NDArray[np.int64]:
        ranked = self._ranked(candidates)
        norms = self._norms(candidates, ranked)
        if not norms[-1] > 0:  # attention says nothing
            return ranked[:budget]
        enough = int(np.searchsorted(norms, (1 - self.threshold) * norms[-1])) + 1
        return ranked[: min(enough, budget)]

    def _ranked(self, candidates: Candidates) -> NDArray[np.int64]:
        """All candidates, the one to be kept first first."""
        from laserkv_gguf import kernels

        if self.order == "position":
            return np.arange(candidates.count)[::-1]
        assert candidates.queries is not None
        assert candidates.keys is not None
        scores = kernels.attention_consensus(candidates.queries, candidates.keys)
        candidates.noted(scores)
        return np.argsort(-scores, kind="stable")  # NaN comes last

    def _norms(self, candidates: Candidates, ranked: NDArray[np.int64]) -> NDArray[np.float64]:
        """The norm of attention to the first 1, 2, … candidates, summed over layers and heads."""
        from laserkv_gguf.kernels import geometry

        assert candidates.queries is not None
        assert candidates.keys is not None
        layers, count, kv_heads, dim = candidates.keys.shape
        heads = candidates.queries.shape[2]
        norms = np.zeros(count)
        for layer in range(layers):
            for head in range(heads):
                keys = candidates.keys[layer, :, head // (heads // kv_heads)].astype(np.float32)
                queries = candidates.queries[layer, :, head]
                weights = geometry.attention(queries, keys, dim**-0.5)
                squares = np.square(weights).sum(axis=0, dtype=np.float64)
                norms += np.sqrt(np.cumsum(squares[ranked]))
        return norms
