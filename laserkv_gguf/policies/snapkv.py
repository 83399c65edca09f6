"""`snapkv`: what the prompt's last tokens look at, with the neighbours of it; chosen once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from laserkv_gguf.budget import Budget
from laserkv_gguf.errors import UserError
from laserkv_gguf.policies.base import Candidates, Needs, Policy, check_pool


@dataclass(frozen=True)
class SnapKV(Policy):
    """Observation-window attention, pooled, one choice after reading (arXiv 2404.14469).

    Also Zefan-Cai/KVCache-Factory, `pyramidkv_utils.py`, with the settings of `run_longbench.py`.
    Each head's attention, a softmax over all that is seen, is summed over the asking tokens and
    becomes the largest among neighbours (the paper's listing 1; max pooling over 7 in the published
    LongBench runs).

    In llama.cpp a token is kept for all layers and heads or for none, so heads do not choose each
    for itself: their pooled scores are summed, and the sum chooses. Where the question is known its
    last tokens are the observation window, else the last tokens read are. Nothing is evicted before
    the end, so the cache must hold the whole sequence first.

    Attributes:
        window: last tokens read that always stay (32, the paper's observation window).
        pool: a score is the largest of this many neighbours (7); 1: none.
    """

    name: ClassVar[str] = "snapkv"
    needs: ClassVar[Needs] = Needs(queries=True, keys=True, outside=True, probe_tokens=32)

    window: int = 32
    pool: int = 7

    def __post_init__(self) -> None:
        if self.window < 1:
            raise UserError(
                f"--policy-option window={self.window}: give at least 1 token, such as 32"
            )
        check_pool(self.pool)

    def budget(self, tokens: int, block_size: int, ratio: float, divisor: int) -> Budget:
        return Budget(tokens, block_size, ratio, divisor, shape="one-shot", recent=self.window)

    def select(self, candidates: Candidates, budget: int) -> NDArray[np.int64]:
        from laserkv_gguf import kernels

        scores = np.zeros(candidates.count)
        for layer in self.by_layer(candidates):
            scores += layer
        return kernels.top_k(candidates.noted(scores), budget)

    def by_layer(self, candidates: Candidates) -> Iterator[NDArray[Any]]:
        """Pooled scores (C,) of every layer, summed over its heads."""
        from laserkv_gguf import kernels
        from laserkv_gguf.kernels import geometry

        assert candidates.queries is not None
        assert candidates.keys is not None
        queries, keys, outside = candidates.queries, candidates.keys, candidates.outside
        for heads in geometry.attention_by_head(queries, keys, outside):
            yield kernels.max_pool(heads, self.pool).sum(axis=0, dtype=np.float64)
