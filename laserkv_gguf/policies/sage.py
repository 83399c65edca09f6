"""`sage`: one choice after reading, by what the last token looks at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from laserkv_gguf.budget import Budget
from laserkv_gguf.errors import UserError
from laserkv_gguf.policies.base import Candidates, Needs, Policy


@dataclass(frozen=True)
class Sage(Policy):
    """SAGE-KV: self-attention guided eviction (arXiv 2503.08879).

    Sinks, the top k of the middle by the last token's attention (a softmax over all that it sees),
    and recent tokens. In llama.cpp a token is kept for all layers and heads or for none, so the
    heads' own choices become one choice by the sum of their attention; recent tokens do not leave
    as the answer grows.

    The last token is the question's (with the template after it) where it is known, else the last
    token read. Nothing is evicted before the end: the cache must hold the whole sequence first.

    Attributes:
        sinks: first tokens that always stay (4, StreamingLLM's, arXiv 2309.17453).
        recent: last tokens that always stay (our choice: 64).
    """

    name: ClassVar[str] = "sage"
    needs: ClassVar[Needs] = Needs(queries=True, attention=True, outside=True, probe_tokens=1)

    sinks: int = 4
    recent: int = 64

    def __post_init__(self) -> None:
        if self.sinks < 0:
            raise UserError(f"--policy-option sinks={self.sinks}: give 0 or more tokens, such as 4")
        if self.recent < 1:
            raise UserError(
                f"--policy-option recent={self.recent}: give at least 1 token, such as 64"
            )

    def budget(self, tokens: int, block_size: int, ratio: float, divisor: int) -> Budget:
        return Budget(
            tokens,
            block_size,
            ratio,
            divisor,
            shape="one-shot",
            sinks=self.sinks,
            recent=self.recent,
        )

    def select(self, candidates: Candidates, budget: int) -> NDArray[np.int64]:
        from laserkv_gguf import kernels

        scores = candidates.attention(last=1, softmax="all")
        return kernels.top_k(candidates.noted(scores), budget)
