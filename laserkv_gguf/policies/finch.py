"""`finch`: a summary that grows with every chunk, chosen anew by the whole question."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from laserkv_gguf.budget import Budget
from laserkv_gguf.policies.base import Candidates, Needs, Policy


@dataclass(frozen=True)
class Finch(Policy):
    """Question-guided and recursive (arXiv 2408.00167).

    The authors' code: giulio98/context-compression, `models/modeling_llama.py`. Attention of all
    tokens of the question to the summary and the chunk just read, summed over tokens and heads.
    After each chunk the summary has room for its share of what was read, r · read tokens (theirs:
    chunk // factor more than before, the factor being 1/r rounded up), and the old summary and the
    chunk compete for it. The gaps between the positions of what stays are closed after every
    chunk: that is what `--positions auto` does here.

    In llama.cpp a token is kept for all layers and heads or for none, so layers do not choose each
    for itself: the sum is over them too. The chunk is the run's `--block-size` (the paper's: 1024
    at 16k tokens). The last token read is protected, for the next one must follow it. It has no
    options of its own.
    """

    name: ClassVar[str] = "finch"
    needs: ClassVar[Needs] = Needs(queries=True, attention=True, outside=True)
    positions: ClassVar[str] = "compact"

    def budget(self, tokens: int, block_size: int, ratio: float, divisor: int) -> Budget:
        return Budget(tokens, block_size, ratio, divisor, shape="recursive", grows=True)

    def select(self, candidates: Candidates, budget: int) -> NDArray[np.int64]:
        from laserkv_gguf import kernels

        scores = candidates.attention(softmax="all")
        return kernels.top_k(candidates.noted(scores), budget)
