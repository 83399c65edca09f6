"""`keydiff`: the keys least like the others; no question needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from laserkv_gguf.budget import Budget
from laserkv_gguf.policies.base import Candidates, Needs, Policy


@dataclass(frozen=True)
class KeyDiff(Policy):
    """Keys with the smallest cosine to the mean of the normalised keys (arXiv 2504.15364).

    Also NVIDIA/kvpress, `BlockPress(KeyDiffPress())`. What was kept and the block just read compete
    for one cache of r·L tokens; the mean is over all keys in it. The last token read is protected,
    for the next one must follow it.

    In llama.cpp a token is kept for all layers and heads or for none, so the scores are summed over
    them, where the paper keeps other tokens in every head. The block is the run's `--block-size`
    (the paper's: 128). It has no options of its own.
    """

    name: ClassVar[str] = "keydiff"
    needs: ClassVar[Needs] = Needs(keys=True)

    def budget(self, tokens: int, block_size: int, ratio: float, divisor: int) -> Budget:
        return Budget(tokens, block_size, ratio, divisor, shape="recursive")

    def select(self, candidates: Candidates, budget: int) -> NDArray[np.int64]:
        from laserkv_gguf.kernels import geometry, top_k

        held = candidates.around
        assert held.keys is not None
        scores = geometry.keydiff_scores(held.keys)
        own = scores[held.first : held.first + candidates.count]
        return top_k(candidates.noted(own), budget)
