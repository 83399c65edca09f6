"""`infllm`: blocks kept off the device, and fetched for each question."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from laserkv_gguf.errors import UserError
from laserkv_gguf.policies.base import Candidates, Needs, Policy

CHUNK = 256  # queries looked at at a time


@dataclass(frozen=True)
class InfLLM(Policy):
    """Units of the document looked up by representative tokens, and fetched (arXiv 2402.04617).

    The authors' code: thunlp/InfLLM, `attention/context_manager.py`. In every head a unit's
    representatives are the tokens that get the most attention of the queries up to `local` tokens
    after them; the mean of their keys, before RoPE, stands for the unit. A unit is as relevant as
    the sum over heads of q · k with the mean query of the question, turned to one angle, that of
    `local` - 1 positions, however far the unit is away. All evicted rows are parked and, for every
    question, the most relevant units of the whole document come in beside the first and the last
    tokens.

    The paper fetches other units in every layer, and for every chunk while it reads; in llama.cpp
    all layers fetch the same ones, by the sum over layers, and while reading every block chooses
    among its own units and the window's before it, asked by its last tokens.

    Attributes:
        size: tokens of a unit (128, the paper's).
        representatives: of a unit (4, the paper's).
        local: queries of so many tokens after a token say how much it is looked at (4096, the
            authors' local window).
    """

    name: ClassVar[str] = "infllm"
    needs: ClassVar[Needs] = Needs(
        queries=True, keys=True, block_queries=True, visible=True, recall=True, unrotated=True
    )

    size: int = 128
    representatives: int = 4
    local: int = 4096

    def __post_init__(self) -> None:
        for name in ("size", "representatives", "local"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; give at least 1")

    @property
    def unit(self) -> int:
        return self.size

    def select(self, candidates: Candidates, budget: int) -> NDArray[np.int64]:
        """While reading: whole units among the candidates, the last one cut to the budget."""
        queries = candidates.queries
        assert queries is not None
        if candidates.asked_at is not None:
            queries = candidates.turned(queries, -candidates.asked_at[:, None])
        relevance = self.look_up(queries, self.index(candidates))
        candidates.noted(np.repeat(relevance, self.size)[: candidates.count])
        units = np.argsort(-relevance, kind="stable")  # NaN comes last
        tokens = (units[:, None] * self.size + np.arange(self.size)).ravel()
        return tokens[tokens < candidates.count][:budget]

    def index(self, block: Candidates) -> dict[str, NDArray[Any]]:
        """What stands for each unit: (layers, units, heads, head_dim) float16.

        Mean keys, turned the other way by the one angle, so that a query before RoPE meets them.
        """
        assert block.keys is not None
        layers, count, kv_heads, dim = block.keys.shape
        units = -(-count // self.size)
        heads = kv_heads if block.block_queries is None else block.block_queries.shape[2]
        means = np.empty((layers, units, heads, dim), np.float32)
        for layer, keys in enumerate(block.keys):
            mass = self._mass(block, layer)
            for unit in range(units):
                inside = slice(unit * self.size, (unit + 1) * self.size)
                turned = block.turned(keys[inside], -block.positions[inside, None])
                best = np.argsort(-mass[:, inside], axis=1, kind="stable")
                best = best[:, : self.representatives]
                for head in range(heads):
                    own = head // (heads // kv_heads)
                    means[layer, unit, head] = turned[best[head], own].mean(axis=0)
        return {"means": block.turned(means, 1 - self.local).astype(np.float16)}

    def _mass(self, block: Candidates, layer: int) -> NDArray[np.float32]:
        """What each head's queries of the block pay each candidate near enough: (heads, C).

        Tokens from before the block get the block's part; blocks read without queries get none.
        """
        held = block.around
        assert held.keys is not None
        kv_heads, dim = held.keys.shape[2:]
        if block.block_queries is None:
            return np.zeros((kv_heads, block.count), np.float32)
        queries = block.block_queries[layer]
        asking, heads = queries.shape[:2]
        group = heads // kv_heads
        mass = np.zeros((heads, len(held.tokens)), np.float32)
        keys = held.keys[layer].astype(np.float32).transpose(1, 0, 2) * np.float32(dim**-0.5)
        for start in range(0, asking, CHUNK):
            part = queries[start : start + CHUNK].astype(np.float32)
            apart = np.arange(len(part))[:, None] + block.block[0] + start - held.tokens
            hidden, near = apart < 0, (apart >= 0) & (apart < self.local)
            grouped = part.reshape(len(part), kv_heads, group, dim).transpose(1, 2, 0, 3)
            for head in range(kv_heads):
                with np.errstate(invalid="ignore", over="ignore"):
                    weights = grouped[head] @ keys[head].T  # (group, queries, keys)
                np.copyto(weights, np.float32(-np.inf), where=hidden | ~np.isfinite(weights))
                peak = weights.max(axis=2, keepdims=True)
                weights = np.exp(weights - np.where(np.isfinite(peak), peak, np.float32(0)))
                total = weights.sum(axis=2, keepdims=True)
                weights /= np.where(total > 0, total, np.float32(1))
                weights *= near
                mass[head * group : (head + 1) * group] += weights.sum(axis=1)
        return mass[:, held.first : held.first + block.count]

    def look_up(
        self, queries: NDArray[np.float32], index: Mapping[str, NDArray[Any]]
    ) -> NDArray[np.float64]:
        """Products of the mean query and what stands for a unit, summed over heads and layers."""
        relevance = np.zeros(index["means"].shape[1])
        for asked, means in zip(queries, index["means"], strict=True):
            query = asked.mean(axis=0, dtype=np.float64)
            query = query.reshape(means.shape[1], -1, query.shape[1]).sum(axis=1)
            relevance += (means.astype(np.float64) * query).sum(axis=(1, 2))
        return relevance
