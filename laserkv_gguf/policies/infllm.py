"""`infllm`: blocks kept off the device, and fetched for each question."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from laserkv_gguf.errors import UserError
from laserkv_gguf.policies.base import Candidates, Needs, Policy


@dataclass(frozen=True)
class InfLLM(Policy):
    """Units of the document looked up by representative tokens, and fetched (arXiv 2402.04617).

    A unit's representatives are the tokens that the tokens after them look at most; a unit is as
    relevant as the sum of their q · k. All evicted rows are parked and, for every question, the
    most relevant units of the whole document come in beside the first and the last tokens. The
    paper fetches other units in every layer, and for every chunk while it reads; with shared cells
    all layers and heads fetch the same ones, and while reading every block chooses among its own,
    asked by its last tokens.

    Attributes:
        size: tokens of a unit (the paper's 128).
        representatives: of a unit (the paper's 4).
        local: so many tokens after a token say how much it is looked at.
    """

    name: ClassVar[str] = "infllm"
    needs: ClassVar[Needs] = Needs(queries=True, keys=True, block_queries=True, recall=True)

    size: int = 128
    representatives: int = 4
    local: int = 512

    def __post_init__(self) -> None:
        for name in ("size", "representatives", "local"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; give at least 1")

    @property
    def unit(self) -> int:
        return self.size

    def select(self, candidates: Candidates, budget: int) -> NDArray[np.int64]:
        """While reading: whole units among the candidates, the last one cut to the budget."""
        assert candidates.queries is not None
        relevance = self.look_up(candidates.queries, self.index(candidates))
        units = np.argsort(-relevance, kind="stable")
        tokens = (units[:, None] * self.size + np.arange(self.size)).ravel()
        return tokens[tokens < candidates.count][:budget]

    def index(self, block: Candidates) -> dict[str, NDArray[Any]]:
        """Keys of the representatives, (layers, units, representatives, kv_heads, head_dim)."""
        assert block.keys is not None
        looked_at = self._looked_at(block)
        units = -(-block.count // self.size)
        chosen = np.empty((units, self.representatives), np.int64)
        for unit in range(units):
            first = unit * self.size
            inside = looked_at[first : first + self.size]
            best = first + np.argsort(-inside, kind="stable")[: self.representatives]
            chosen[unit] = np.resize(best, self.representatives)  # a short unit repeats some
        return {"representatives": block.keys[:, chosen]}

    def _looked_at(self, block: Candidates) -> NDArray[np.float64]:
        """Mean q · k of every token's key with the queries of up to `local` tokens after it.

        Tokens from before the block, whose own successors are gone, are asked by the block's first;
        the last token, with nothing after it, and blocks read without queries, count 0.
        """
        assert block.keys is not None
        score = np.zeros(block.count)
        if block.block_queries is None:
            return score
        kv_heads, dim = block.keys.shape[2:]
        asking = block.block_queries.shape[1]
        first = np.clip(block.tokens - block.block[0] + 1, 0, asking)
        last = np.clip(first + self.local, 0, asking)
        for queries, keys in zip(block.block_queries, block.keys, strict=True):
            grouped = queries.reshape(asking, kv_heads, -1, dim).sum(axis=2, dtype=np.float64)
            running = np.concatenate((np.zeros((1, kv_heads, dim)), np.cumsum(grouped, axis=0)))
            total = running[last] - running[first]
            score += (total * keys).sum(axis=(1, 2))
        mean: NDArray[np.float64] = score / np.maximum(last - first, 1)
        return mean

    def look_up(
        self, queries: NDArray[np.float32], index: Mapping[str, NDArray[Any]]
    ) -> NDArray[np.float64]:
        """Σ q · k over a unit's representatives, all queries, heads and layers."""
        kv_heads, dim = index["representatives"].shape[3:]
        relevance = np.zeros(index["representatives"].shape[1])
        for asked, keys in zip(queries, index["representatives"], strict=True):
            query = asked.reshape(len(asked), kv_heads, -1, dim).sum(axis=(0, 2), dtype=np.float64)
            relevance += (keys.sum(axis=1, dtype=np.float64) * query).sum(axis=(1, 2))
        return relevance
