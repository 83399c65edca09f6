"""`h2o`: the heavy hitters, tokens that all queries looked at most so far, and the recent."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from laserkv_gguf.budget import Budget
from laserkv_gguf.policies.base import Candidates, Needs, Policy

CHUNK = 512  # queries looked at at a time


@dataclass(frozen=True)
class H2O(Policy):
    """Attention accumulated over every query, and a recent half (arXiv 2306.14048, algorithm 1).

    The authors' code: FMInference/H2O, `h2o_hf/utils_hh/modify_llama.py`. A query's softmax is over
    all keys it sees in the cache, first tokens and recent ones included; what a key receives is
    added up over all queries since it was read, and goes on being added up while it stays. Half of
    the budget are the tokens with the largest sums, half the most recent ones (their ratios for
    both are equal). The question is not asked.

    In llama.cpp a token is kept for all layers and heads or for none, so the sums are over them
    too, where the paper chooses in each head. A block is read and then the surplus goes at once,
    where the paper drops one token for each one read. It has no options of its own.
    """

    name: ClassVar[str] = "h2o"
    needs: ClassVar[Needs] = Needs(block_queries=True, keys=True, every_block=True)

    def budget(self, tokens: int, block_size: int, ratio: float, divisor: int) -> Budget:
        whole = Budget(tokens, block_size, ratio, divisor, shape="recursive")
        return replace(whole, recent=whole.total // 2)

    def observe(self, block: Candidates) -> None:
        """Adds what the block's queries give to the sums of all tokens in the cache."""
        held = block.around
        assert block.block_queries is not None
        assert held.keys is not None
        visible = np.searchsorted(held.tokens, np.arange(*block.block), side="right")
        sums = causal_attention(block.block_queries, held.keys, visible)
        tokens, before = block.memory.get("h2o", (held.tokens[:0], sums[:0]))
        _, here, there = np.intersect1d(held.tokens, tokens, return_indices=True)
        sums[here] += before[there]
        block.memory["h2o"] = held.tokens, sums

    def select(self, candidates: Candidates, budget: int) -> NDArray[np.int64]:
        from laserkv_gguf import kernels

        self.observe(candidates)
        first = candidates.around.first
        sums = candidates.memory["h2o"][1][first : first + candidates.count]
        return kernels.top_k(candidates.noted(sums), budget)


def causal_attention(
    queries: NDArray[Any], keys: NDArray[Any], visible: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Attention each key receives, summed over layers, heads and queries.

    Nothing larger is made than one kv head's scores of `CHUNK` queries. NaN gives NaN.

    Args:
        queries: (layers, tokens, heads, head_dim) float16 or float32.
        keys: (layers, candidates, kv_heads, head_dim) float16 or float32.
        visible: (tokens,) ascending: each query sees so many of the first keys.
    """
    layers, tokens, heads, dim = queries.shape
    kv_heads = keys.shape[2]
    group = heads // kv_heads
    total = np.zeros(keys.shape[1])
    first = int(np.searchsorted(visible, 1))  # those before see nothing
    for layer, head in np.ndindex(layers, kv_heads):
        key = keys[layer, :, head].astype(np.float32) * np.float32(dim**-0.5)
        for start in range(first, tokens, CHUNK):
            seen = visible[start : start + CHUNK]
            asked = queries[layer, start : start + CHUNK, head * group : (head + 1) * group]
            with np.errstate(invalid="ignore", over="ignore"):
                total[: seen[-1]] += _attend(asked, key[: seen[-1]], seen)
    return total


def _attend(
    queries: NDArray[Any], keys: NDArray[np.float32], visible: NDArray[np.int64]
) -> NDArray[np.float32]:
    """The same for one kv head: queries (tokens, group, head_dim), keys (keys, head_dim)."""
    tokens, group, dim = queries.shape
    scores = queries.astype(np.float32).reshape(-1, dim) @ keys.T
    whole = int(visible[0])  # columns that every query sees
    late = scores.reshape(tokens, group, -1)[:, :, whole:]
    hidden = np.arange(whole, len(keys)) >= visible[:, None]
    np.copyto(late, np.float32(-np.inf), where=hidden[:, None])
    scores -= scores.max(axis=1, keepdims=True)
    np.exp(scores, out=scores)
    received: NDArray[np.float32] = (1 / scores.sum(axis=1)) @ scores
    return received
