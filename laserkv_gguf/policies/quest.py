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

    The authors' code: mit-han-lab/Quest, `evaluation/quest_attention.py`. Quest drops nothing and
    chooses anew in every layer and head, for every query; its first two layers see everything.
    With recall it chooses anew among all pages for every question (`--recall-mode shortlist`, or
    block by block with `replay`); without, each block chooses once, with the probe's queries.

    In llama.cpp a page is kept for all layers and heads or for none. So that no head decides by
    the length of its queries and keys, each query's bounds, divided by √d as in attention, become
    a softmax over the pages, which ranks as they do; a page counts the largest a head's queries
    give it, summed over the heads of all layers but the first ones. The last page kept is cut to
    the budget.

    Attributes:
        page: tokens of a page (16, the paper's).
        skip: first layers that have no say, as they never prune (2, the paper's); where a model
            has no more than these, all have.
    """

    name: ClassVar[str] = "quest"
    needs: ClassVar[Needs] = Needs(queries=True, keys=True, probe_tokens=8, lookahead=16)

    page: int = 16
    skip: int = 2

    def __post_init__(self) -> None:
        if self.page < 1:
            raise UserError(f"page is {self.page}; give pages of at least 1 token, such as 16")
        if self.skip < 0:
            raise UserError(f"skip is {self.skip}; give a number of layers, 0 for none")

    def select(self, candidates: Candidates, budget: int) -> NDArray[np.int64]:
        assert candidates.queries is not None
        scores = self.look_up(candidates.queries, self.index(candidates))
        candidates.noted(np.repeat(scores, self.page)[: candidates.count])
        pages = np.argsort(-scores, kind="stable")
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
        """The largest share of the softmax that a head's queries give a page, summed over heads."""
        low, high = index["low"], index["high"]
        first = self.skip if self.skip < len(low) else 0
        scores = np.zeros(low.shape[1])
        for layer in range(first, len(low)):
            found = bounds(queries[layer], low[layer], high[layer])
            found[~np.isfinite(found)] = -np.inf
            peak = found.max(axis=2, keepdims=True, initial=-np.inf)
            shares = np.exp(found - np.where(np.isfinite(peak), peak, 0))
            total = shares.sum(axis=2, keepdims=True)
            scores += (shares / np.where(total > 0, total, 1)).max(axis=1).sum(axis=0)
        return scores


def bounds(
    queries: NDArray[np.float32], low: NDArray[Any], high: NDArray[Any]
) -> NDArray[np.float64]:
    """Σ max(q · low, q · high) over channels, / √d: `high` where q is positive, else `low`.

    Args:
        queries: (tokens, heads, head_dim) of a layer.
        low, high: (pages, kv_heads, head_dim): the range of the pages' keys.

    Returns:
        (heads, tokens, pages)
    """
    tokens, heads, dim = queries.shape
    kv_heads = low.shape[1]
    asked = queries.reshape(tokens, kv_heads, -1, dim).transpose(1, 2, 0, 3).astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        found = np.maximum(asked, 0).reshape(kv_heads, -1, dim) @ high.transpose(1, 2, 0)
        found += np.minimum(asked, 0).reshape(kv_heads, -1, dim) @ low.transpose(1, 2, 0)
    scaled: NDArray[np.float64] = found.reshape(heads, tokens, len(low)) / np.sqrt(dim)
    return scaled
