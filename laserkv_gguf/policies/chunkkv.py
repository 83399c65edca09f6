"""`chunkkv`: neighbours are kept or dropped together, in chunks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from laserkv_gguf.budget import Budget
from laserkv_gguf.errors import UserError
from laserkv_gguf.policies.base import Candidates, Needs, Policy

SHARES = ("all", "block")


@dataclass(frozen=True)
class ChunkKV(Policy):
    """Chunks with the largest mean observation-window attention (arXiv 2502.00299, alg. 1).

    Also NVIDIA/kvpress, `chunkkv_press.py`, whose means are equal to the paper's sums but for a
    shorter last chunk, which sums would put last. One choice is made over all that was read, so
    the cache must hold the whole sequence first.

    In llama.cpp a token is kept for all layers and heads or for none, so a chunk's mean is over
    them too (the paper lets neighbouring layers share one choice to save time; here all do). The
    budget is spent to the token: the last chunk that fits only in part gives its first tokens.
    Where the question is known its last tokens are the observation window, else the last tokens
    read are.

    Attributes:
        chunk: tokens a chunk (10, the paper's).
        window: last tokens read that always stay (32).
        share: "all" for one choice over everything, as published; "block" for an equal share of
            every block by `--protection-divisor`, which needs less of a cache.
    """

    name: ClassVar[str] = "chunkkv"
    needs: ClassVar[Needs] = Needs(queries=True, attention=True, outside=True, probe_tokens=32)

    chunk: int = 10
    window: int = 32
    share: str = "all"

    def __post_init__(self) -> None:
        if self.chunk < 1:
            raise UserError(
                f"--policy-option chunk={self.chunk}: give at least 1 token, such as 10"
            )
        if self.window < 1:
            raise UserError(
                f"--policy-option window={self.window}: give at least 1 token, such as 32"
            )
        if self.share not in SHARES:
            raise UserError(f"--policy-option share={self.share}: give {' or '.join(SHARES)}")

    def budget(self, tokens: int, block_size: int, ratio: float, divisor: int) -> Budget:
        if self.share == "block":
            return Budget(tokens, block_size, ratio, divisor)
        return Budget(tokens, block_size, ratio, divisor, shape="one-shot", recent=self.window)

    def select(self, candidates: Candidates, budget: int) -> NDArray[np.int64]:
        scores = candidates.attention(softmax="all")
        starts = np.arange(0, candidates.count, self.chunk)
        sizes = np.diff(np.append(starts, candidates.count))
        means = np.add.reduceat(scores.astype(np.float64), starts) / sizes
        candidates.noted(means[np.arange(candidates.count) // self.chunk])
        order = np.argsort(-means, kind="stable")  # best first, equals by position, NaN last
        ranks = np.argsort(order)[np.arange(candidates.count) // self.chunk]
        return np.argsort(ranks, kind="stable")[:budget]
