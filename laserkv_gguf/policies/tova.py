"""`tova`: what the newest query looks at least goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from laserkv_gguf.budget import Budget
from laserkv_gguf.policies.base import Candidates, Needs, Policy


@dataclass(frozen=True)
class TOVA(Policy):
    """Attention of the last query alone, recursive (arXiv 2401.06104).

    The authors' code: schwartz-lab-NLP/TOVA, `src/tova_cache.py`. The query's softmax is over all
    that it sees. The paper drops one token for every one read, each layer by its own heads'
    average; here a block is read and then the surplus goes at once. In llama.cpp a token is kept
    for all layers or for none, so the average is over layers too.

    The last query is the very last token that asks: of the question (with the template after it,
    and drafts if any are asked for) where it is known, else of the block. Only the last token read
    is protected, for the next one must follow it. It has no options of its own.
    """

    name: ClassVar[str] = "tova"
    needs: ClassVar[Needs] = Needs(queries=True, attention=True, outside=True, probe_tokens=1)

    def budget(self, tokens: int, block_size: int, ratio: float, divisor: int) -> Budget:
        return Budget(tokens, block_size, ratio, divisor, shape="recursive")

    def select(self, candidates: Candidates, budget: int) -> NDArray[np.int64]:
        from laserkv_gguf import kernels

        scores = candidates.attention(last=1, softmax="all")
        return kernels.top_k(candidates.noted(scores), budget)
