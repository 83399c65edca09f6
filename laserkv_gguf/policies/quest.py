"""`quest`: whole pages whose keys could get the most attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from laserkv_gguf.errors import UserError
from laserkv_gguf.policies.base import Candidates, Needs, Policy


@dataclass(frozen=True)
class Quest(Policy):
    """Pages by an upper bound of q · k, from the range of their keys (arXiv 2406.10774).

    Quest drops nothing and chooses anew in every layer and head, for every query. With recall it
    chooses anew among all pages for every question (`--recall-mode shortlist`, or block by block
    with `replay`); without, each block chooses once, with the probe's queries. A page is kept for
    all layers and heads or for none, by its bounds summed over layers, heads and queries; the last
    page kept is cut to the budget.

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
        assert candidates.queries is not None
        bounds = self.look_up(candidates.queries, self.index(candidates))
        pages = np.argsort(-bounds, kind="stable")  # NaN comes last
        tokens = (pages[:, None] * self.page + np.arange(self.page)).ravel()
        return tokens[tokens < candidates.count][:budget]

    @property
    def unit(self) -> int:
        return self.page

    def index(self, block: Candidates) -> dict[str, NDArray[Any]]:
        """The lowest and the highest value of every channel in a page's keys."""
        assert block.keys is not None
        starts = np.arange(0, block.count, self.page)
        low = np.empty((len(block.keys), len(starts), *block.keys.shape[2:]), block.keys.dtype)
        high = np.empty_like(low)
        for layer, keys in enumerate(block.keys):
            wide = keys.astype(np.float32)  # NumPy is slow with halves
            low[layer] = np.fmin.reduceat(wide, starts)
            high[layer] = np.fmax.reduceat(wide, starts)
        return {"low": low, "high": high}

    def look_up(
        self, queries: NDArray[np.float32], index: Mapping[str, NDArray[Any]]
    ) -> NDArray[np.float64]:
        """Σ max(q · low, q · high) over channels: q takes `high` where it is positive, else `low`.

        So the positive and the negative parts of all queries of a head can be summed first.
        """
        kv_heads, dim = index["low"].shape[2:]
        bounds = np.zeros(index["low"].shape[1])
        for asked, low, high in zip(queries, index["low"], index["high"], strict=True):
            query = asked.reshape(len(asked), kv_heads, -1, dim).astype(np.float64)
            positive = np.maximum(query, 0).sum(axis=(0, 2))
            negative = np.minimum(query, 0).sum(axis=(0, 2))
            with np.errstate(invalid="ignore"):
                scored = high.astype(np.float32) * positive + low.astype(np.float32) * negative
                bounds += scored.sum(axis=(1, 2))
        return bounds
