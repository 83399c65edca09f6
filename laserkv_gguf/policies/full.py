"""`full`: keep everything; the yardstick."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from laserkv_gguf.budget import Budget
from laserkv_gguf.policies.base import Candidates, Policy


@dataclass(frozen=True)
class Full(Policy):
    """The uncompressed cache."""

    name: ClassVar[str] = "full"

    def budget(self, tokens: int, block_size: int, ratio: float, divisor: int) -> Budget:
        return Budget(tokens, block_size, 1.0, divisor)

    def select(self, candidates: Candidates, budget: int) -> NDArray[np.int64]:
        return np.arange(candidates.count)
