"""`quest`: whole pages whose keys could get the most attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from laserkv_gguf.errors import UserError
from laserkv_gguf.policies.base import Candidates, Needs, Policy


@dataclass(frozen=True)
class Quest(Policy):
    """Pages by an upper bound of q · k, from the range of their keys (arXiv 2406.10774).

    Quest drops nothing and chooses anew in every layer and head, for every query; that needs
    evicted tokens to come back, so here each block chooses once, with the probe's queries. A page
    is kept for all layers and heads or for none, by its bounds summed over layers, heads and
    queries; the last page kept is cut to the budget.

    Attributes:
        page: tokens of a page (the paper's 16).
    """

    name: ClassVar[str] = "quest"
    needs: ClassVar[Needs] = Needs(queries=True, keys=True, probe_tokens=8, lookahead=16)

    page: int = 16

    def __post_init__(self) -> None:
        if self.page < 1:
            raise UserError(f"page is {self.page}; give pages of at least 1 token, such as 16")

    def select(self, candidates: Candidates, budget: int) -> NDArray[np.int64]:
        pages = np.argsort(-self._bounds(candidates), kind="stable")  # NaN comes last
        tokens = (pages[:, None] * self.page + np.arange(self.page)).ravel()
        return tokens[tokens < candidates.count][:budget]

    def _bounds(self, candidates: Candidates) -> NDArray[np.float64]:
        """Σ max(q · low, q · high) over channels: q takes `high` where it is positive, else `low`.

        So the positive and the negative parts of all queries of a head can be summed first.
        """
        assert candidates.queries is not None
        assert candidates.keys is not None
        kv_heads, dim = candidates.keys.shape[2:]
        starts = np.arange(0, candidates.count, self.page)
        bounds = np.zeros(len(starts))
        for asked, keys in zip(candidates.queries, candidates.keys, strict=True):
            query = asked.reshape(len(asked), kv_heads, -1, dim).astype(np.float64)
            positive = np.maximum(query, 0).sum(axis=(0, 2))
            negative = np.minimum(query, 0).sum(axis=(0, 2))
            wide = keys.astype(np.float32)
            low, high = np.fmin.reduceat(wide, starts), np.fmax.reduceat(wide, starts)
            with np.errstate(invalid="ignore"):
                bounds += (high * positive + low * negative).sum(axis=(1, 2))
        return bounds
