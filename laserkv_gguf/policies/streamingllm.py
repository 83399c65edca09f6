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

    The authors' code: mit-han-lab/streaming-llm, `kv_cache.py` and `pos_shift/`. All layers and
    heads keep the same tokens there, too. Positions are those within the cache, not those in the
    text: `--positions auto` closes the gaps after every block (they do it for every token).

    The window takes what the sinks leave of r·L, so that the cache ends at the size of every other
    policy's; the paper has windows of a fixed number of tokens.

    Attributes:
        sinks: first tokens that stay (4, the paper's).
    """

    name: ClassVar[str] = "streamingllm"
    positions: ClassVar[str] = "compact"

    sinks: int = 4

    def budget(self, tokens: int, block_size: int, ratio: float, divisor: int) -> Budget:
        return Budget(
            tokens, block_size, ratio, divisor, shape="recursive", sinks=self.sinks, recent=tokens
        )

    def select(self, candidates: Candidates, budget: int) -> NDArray[np.int64]:
        return np.arange(candidates.count - budget, candidates.count)
