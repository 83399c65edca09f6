"""Keeps the tokens whose keys are shortest (arXiv 2406.11430)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from laserkv_gguf.policies import Candidates, Needs, Policy


@dataclass(frozen=True)
class KeyNorm(Policy):
    """Tokens with short keys are looked at more.

    Attributes:
        skip: layers whose keys say little, from the lowest on.
    """

    name: ClassVar[str] = "keynorm"
    needs: ClassVar[Needs] = Needs(keys=True)

    skip: int = 0

    def select(self, candidates: Candidates, budget: int) -> np.ndarray:
        """The `budget` candidates whose keys are shortest, over all layers and kv heads."""
        keys = candidates.keys[self.skip :] if self.skip < len(candidates.keys) else candidates.keys
        norms = np.linalg.norm(keys.astype(np.float32), axis=-1)  # (layers, C, kv_heads)
        scores = candidates.noted(-norms.sum(axis=(0, 2)))  # reports show them
        return np.argsort(-scores, kind="stable")[:budget]
