"""What a policy is: a few settings, what it needs to see, and a choice among candidates.

A policy never touches the engine. It is a frozen dataclass; its fields are its options.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from laserkv_gguf.budget import Budget


@dataclass(frozen=True)
class Needs:
    """What the engine captures for a policy.

    Attributes:
        queries: of the probe: the question's last tokens and the drafts after it, or the block's
            own last tokens where no question is known.
        keys, values: of every candidate.
    """

    queries: bool = False
    keys: bool = False
    values: bool = False


@dataclass(frozen=True)
class Candidates:
    """A read-only view of what can be kept of a block: everything after RoPE, float32.

    Attributes:
        first: index in the sequence of candidate 0; candidates are consecutive tokens.
        count: number of candidates, C.
        block: number of the block, from 0.
        queries: (layers, probe tokens, heads, head_dim), or None if not asked for.
        keys, values: (layers, C, kv_heads, head_dim), or None if not asked for.
    """

    first: int
    count: int
    block: int
    queries: NDArray[np.float32] | None = None
    keys: NDArray[np.float32] | None = None
    values: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Policy(ABC):
    """Base of all policies. Subclass it as a frozen dataclass and set `name` and `needs`."""

    name: ClassVar[str] = ""
    needs: ClassVar[Needs] = Needs()

    @abstractmethod
    def select(self, candidates: Candidates, budget: int) -> NDArray[np.int64]:
        """Which candidates to keep.

        Args:
            candidates: what was captured.
            budget: how many to keep; at least 1 and less than `candidates.count`.

        Returns:
            `budget` distinct numbers in 0 … count - 1, in any order.
        """

    def warm_up(self) -> None:
        """Chooses once among next to nothing, so that what Numba must compile is compiled.

        The first use after an installation takes seconds; they pass while a block is decoded.
        """
        count = 16  # enough for every part of a budget to get some
        vectors = np.ones((1, count, 1, 8), np.float32)
        needs = self.needs
        self.select(
            Candidates(
                0,
                count,
                0,
                vectors if needs.queries else None,
                vectors if needs.keys else None,
                vectors if needs.values else None,
            ),
            count // 2,
        )

    def budget(self, tokens: int, block_size: int, ratio: float, divisor: int) -> Budget:
        """The partition for a sequence of `tokens`; equation (1) unless a method has its own."""
        return Budget(tokens, block_size, ratio, divisor)


def checked(
    policy: Policy, chosen: NDArray[Any], candidates: Candidates, budget: int
) -> NDArray[np.int64]:
    """The choice in ascending order, or an error that names the policy.

    Raises:
        PolicyError: too many or too few, repeated or foreign candidates.
    """
    kept = np.unique(np.asarray(chosen, np.int64))
    if len(kept) != np.size(chosen):
        raise PolicyError(f"policy {policy.name!r} chose candidates more than once")
    if len(kept) != budget:
        raise PolicyError(f"policy {policy.name!r} chose {len(kept)} candidates, not {budget}")
    if len(kept) and (kept[0] < 0 or kept[-1] >= candidates.count):
        raise PolicyError(f"policy {policy.name!r} chose a token that is no candidate")
    return kept


class PolicyError(RuntimeError):
    """A policy broke its contract; nothing was evicted."""
