"""`streamingllm`: attention sinks and the recent tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from laserkv_gguf.budget import Budget
from laserkv_gguf.policies.base import Candidates, Policy


@dataclass(frozen=True)
class StreamingLLM(Policy):
    """The first tokens and the last ones, whatever the question (arXiv 2309.17453).

    With cells shared by all layers and heads nothing needs adapting. The window takes what the
    sinks leave of r·L, so that the cache ends at the size of every other policy's.

    Attributes:
        sinks: first tokens that stay (the paper's 4).
    """

    name: ClassVar[str] = "streamingllm"

    sinks: int = 4

    def budget(self, tokens: int, block_size: int, ratio: float, divisor: int) -> Budget:
        return Budget(
            tokens, block_size, ratio, divisor, shape="recursive", sinks=self.sinks, recent=tokens
        )

    def select(self, candidates: Candidates, budget: int) -> NDArray[np.int64]:
        return np.arange(candidates.count - budget, candidates.count)
