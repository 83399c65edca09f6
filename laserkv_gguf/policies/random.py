"""`random`: the floor every method must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from laserkv_gguf.policies.base import Candidates, Policy


@dataclass(frozen=True)
class Random(Policy):
    """Anchors and window as `laser`, and any candidates for the pool.

    Attributes:
        seed: one seed, one choice.
    """

    name: ClassVar[str] = "random"

    seed: int = 0

    def select(self, candidates: Candidates, budget: int) -> NDArray[np.int64]:
        generator = np.random.Generator(np.random.PCG64([self.seed, candidates.index]))
        return generator.permutation(candidates.count)[:budget]
