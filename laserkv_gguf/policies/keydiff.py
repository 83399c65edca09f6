"""`keydiff`: the keys least like the others; no question needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from laserkv_gguf.policies.base import Candidates, Needs, Policy


@dataclass(frozen=True)
class KeyDiff(Policy):
    """Keys with the smallest cosine to the mean of the normalised keys (arXiv 2504.15364).

    The paper keeps other tokens in every head; here a token is kept for all layers and heads or
    for none, so the scores are summed over them. The mean is taken over the candidates of a block,
    and what earlier blocks kept is not looked at again.
    """

    name: ClassVar[str] = "keydiff"
    needs: ClassVar[Needs] = Needs(keys=True)

    def select(self, candidates: Candidates, budget: int) -> NDArray[np.int64]:
        from laserkv_gguf.kernels import geometry, top_k

        assert candidates.keys is not None
        return top_k(geometry.keydiff_scores(candidates.keys), budget)
