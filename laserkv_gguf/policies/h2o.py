"""`h2o`: the heavy hitters, tokens that all queries of a block look at most, and the recent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from laserkv_gguf.policies.base import Candidates, Needs, Policy

CHUNK = 512  # queries looked at at a time


@dataclass(frozen=True)
class H2O(Policy):
    """Attention accumulated over every query of the block (arXiv 2306.14048).

    A query sees the candidates up to its own token, and its softmax is over those; sums over
    queries are the score of the paper's algorithm 1. In llama.cpp a token is kept for all layers
    and heads or for none, so the score is summed over them as well, and it is spent block by
    block instead of token by token.

    The question is not asked. The recent tokens are the window of `--protection-divisor`, which
    protects as many first tokens too (the paper has none of these and halves its budget between
    heavy hitters and recent). It has no options of its own.
    """

    name: ClassVar[str] = "h2o"
    needs: ClassVar[Needs] = Needs(block_queries=True, keys=True)

    def select(self, candidates: Candidates, budget: int) -> NDArray[np.int64]:
        from laserkv_gguf import kernels

        assert candidates.block_queries is not None
        assert candidates.keys is not None
        visible = np.searchsorted(candidates.tokens, np.arange(*candidates.block), side="right")
        scores = causal_attention(candidates.block_queries, candidates.keys, visible)
        return kernels.top_k(scores, budget)


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
