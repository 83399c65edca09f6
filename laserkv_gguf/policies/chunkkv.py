"""`chunkkv`: neighbours are kept or dropped together, in chunks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from laserkv_gguf.errors import UserError
from laserkv_gguf.policies.base import Candidates, Needs, Policy


@dataclass(frozen=True)
class ChunkKV(Policy):
    """Chunks with the largest sums of observation-window attention (arXiv 2502.00299, alg. 1).

    In llama.cpp a token is kept for all layers and heads or for none, so a chunk's sum is over
    them too (the paper lets neighbouring layers share one choice to save time; here all do).
    Chunks are counted from the first candidate of each block, and what one block keeps is never
    looked at again.

    The budget is spent to the token: the last chunk that fits only in part gives its first tokens.
    Where the question is known its last tokens are the observation window, else the last tokens
    read are.

    Attributes:
        chunk: tokens a chunk (10, the paper's).
    """

    name: ClassVar[str] = "chunkkv"
    needs: ClassVar[Needs] = Needs(queries=True, attention=True, probe_tokens=32)

    chunk: int = 10

    def __post_init__(self) -> None:
        if self.chunk < 1:
            raise UserError(
                f"--policy-option chunk={self.chunk}: give at least 1 token, such as 10"
            )

    def select(self, candidates: Candidates, budget: int) -> NDArray[np.int64]:
        scores = candidates.attention()
        sums = np.add.reduceat(scores.astype(np.float64), range(0, candidates.count, self.chunk))
        order = np.argsort(-sums, kind="stable")  # best first, equals by position, NaN last
        ranks = np.argsort(order)[np.arange(candidates.count) // self.chunk]
        return np.argsort(ranks, kind="stable")[:budget]
