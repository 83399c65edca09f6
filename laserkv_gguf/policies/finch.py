"""`finch`: a summary of fixed size, chosen anew with every chunk by the whole question."""

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

    Attention of all tokens of the question to the summary and the chunk just read, averaged over
    tokens and heads (a sum orders alike). In llama.cpp a token is kept for all layers and heads or
    for none, so layers do not choose each for itself: the average is over them too.

    The softmax is over the candidates, which all asking tokens see alike; the paper's division by
    how many keys each token sees is therefore needless. The chunk is the run's `--block-size`
    (the paper's: 1024). The paper also closes the gaps between the positions of what stays: that
    is `--positions compact`; `original` leaves every token where it was read, and `auto` closes
    gaps only where the sequence is longer than the model was trained for. It has no options of
    its own.
    """

    name: ClassVar[str] = "finch"
    needs: ClassVar[Needs] = Needs(queries=True, attention=True)

    def budget(self, tokens: int, block_size: int, ratio: float, divisor: int) -> Budget:
        return Budget(tokens, block_size, ratio, divisor, shape="recursive")

    def select(self, candidates: Candidates, budget: int) -> NDArray[np.int64]:
        from laserkv_gguf import kernels

        scores = candidates.attention()
        return kernels.top_k(scores, budget)
