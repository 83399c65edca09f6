"""`expected`: the attention that tokens to come are likely to pay; no question needed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from laserkv_gguf.budget import Budget
from laserkv_gguf.errors import UserError
from laserkv_gguf.policies.base import SHARES, Candidates, Needs, Policy, check_pool, shared_budget

VALUES = ("none", "norm", "output")
_AT_ONCE = 64  # positions that vectors are turned to at a time


@dataclass(frozen=True)
class Expected(Policy):
    """Keys by the attention that queries to come would pay them (arXiv 2510.00636, eqs. 7 to 10).

    Also NVIDIA/kvpress, `expected_attention_press.py`. Queries to come are taken for Gaussian, with
    the mean μ and the covariance Σ of the last queries before RoPE, and for standing anywhere among
    the next positions: R is the mean of these positions' rotations. The logarithm of the attention
    a key k gets is then μᵀRᵀk / √d + kᵀRΣRᵀk / 2d; a softmax over all keys but the first ones makes
    it p, averaged over the heads that read a kv head, and the score is (p + ε) · ‖v‖.

    In llama.cpp a token is kept for all layers and heads or for none, so the scores are summed over
    layers and kv heads, where the authors keep others in every head (with AdaKV, as many as a head
    needs). Their queries are those of the whole prompt; here they are the block's last ones, since
    none are held longer.

    Attributes:
        values: "norm" as above, ‖v‖ being the length of the value in its layer and kv head;
            "output": with ‖W_o v‖ (the paper's equation; CriticalKV, arXiv 2502.03805); "none":
            p alone.
        epsilon: ε (0.02; kvpress: 0, and 0.01 in its leaderboard). The larger, the more lengths
            alone decide; 0 for the product of both.
        future: next positions that queries may stand at (512).
        queries: last tokens of the block whose queries are taken (512); 0 for all of them.
        covariance: whether Σ counts, or μ alone.
        pool: scores are averaged over this many neighbours, though not over gaps; 1 for none, as in
            the paper.
        shares: "one": one pool for the whole document, chosen anew from itself and every block;
            "equal": every block keeps its own pool, by `--protection-divisor`; "whole": one choice
            after all was read, as published, for which the cache must hold all of it.
        sinks, recent: first and last tokens that always stay, unless shares are equal, as far as
            they are no more than 1/n of what is kept by `--protection-divisor` (4; the paper has no
            last ones).
    """

    name: ClassVar[str] = "expected"
    needs: ClassVar[Needs] = Needs(block_queries=True, keys=True, unrotated=True)

    values: str = "norm"
    epsilon: float = 0.02
    future: int = 512
    queries: int = 512
    covariance: bool = True
    pool: int = 1
    shares: str = "one"
    sinks: int = 4
    recent: int = 32

    def __post_init__(self) -> None:
        for name, known in (("values", VALUES), ("shares", SHARES)):
            if getattr(self, name) not in known:
                raise UserError(f"{name} is {getattr(self, name)!r}; give {', '.join(known)}")
        if not 0 <= self.epsilon < np.inf:
            raise UserError(f"epsilon is {self.epsilon:g}; give 0 or more, such as 0.02")
        if self.future < 1:
            raise UserError(f"future is {self.future}; give at least 1 position, such as 512")
        if self.queries < 0:
            raise UserError(f"queries is {self.queries}; give a number of tokens, 0 for all")
        check_pool(self.pool)
        if self.sinks < 0:
            raise UserError(f"sinks is {self.sinks}; give a number of tokens, 0 for none")
        if self.recent < 1:
            raise UserError(f"recent is {self.recent}; give at least 1 token, such as 32")
        needs = replace(
            self.needs,
            recent_queries=self.queries,
            value_norms=self.values,
            visible=self.shares == "equal",  # else all that is visible is a candidate
        )
        object.__setattr__(self, "needs", needs)

    def budget(self, tokens: int, block_size: int, ratio: float, divisor: int) -> Budget:
        own = Budget(tokens, block_size, ratio, divisor)
        return shared_budget(own, self.shares, self.sinks, self.recent)

    def select(self, candidates: Candidates, budget: int) -> NDArray[np.int64]:
        from laserkv_gguf import kernels

        first = candidates.around.first
        mine = slice(first, first + candidates.count)
        scores = np.zeros(candidates.count)
        for layer, paid in enumerate(self._paid(candidates)):
            own = paid[mine]
            if self.values != "none":
                assert candidates.value_norms is not None
                own = (own + self.epsilon) * candidates.value_norms[layer]
            scores += own.sum(axis=1)
        pooled = kernels.pool(scores, self.pool, candidates.tokens)
        return kernels.top_k(candidates.noted(pooled), budget)

    def _paid(self, candidates: Candidates) -> Iterator[NDArray[np.float64]]:
        """The p of every layer: (held keys, kv_heads); 0 before the candidates, NaN if unsound."""
        held, asked = candidates.around, candidates.block_queries
        assert asked is not None
        assert held.keys is not None
        layers, count, heads, dim = asked.shape
        kv_heads = held.keys.shape[2]
        group = heads // kv_heads
        at = held.positions[-count:]
        turn = self._mean_turn(candidates, int(held.positions[-1]) + 1, dim)
        skipped = held.first  # what stands before all candidates looks like nothing else
        for layer in range(layers):
            plain = candidates.turned(asked[layer], -at[:, None])
            paid = np.zeros((len(held.tokens), kv_heads))
            for head in range(heads):
                keys = held.keys[layer, skipped:, head // group].astype(np.float32)
                sound = plain[np.isfinite(plain[:, head]).all(axis=1), head]
                paid[skipped:, head // group] += self._softmax(sound @ turn, keys) / group
            yield paid

    def _softmax(
        self, queries: NDArray[np.float32], keys: NDArray[np.float32]
    ) -> NDArray[np.float64]:
        """The p of one head, of its queries (n, head_dim) and of keys (m, head_dim): (m,)."""
        if not len(queries):
            return np.zeros(len(keys))
        dim = keys.shape[1]
        mean = queries.mean(axis=0)
        with np.errstate(invalid="ignore", over="ignore"):
            logits = keys @ mean / np.float32(np.sqrt(dim))
            if self.covariance:
                apart = queries - mean
                spread = apart.T @ apart / np.float32(len(apart))
                logits += ((keys @ spread) * keys).sum(axis=1) / np.float32(2 * dim)
        sound = np.isfinite(logits)
        weights = np.full(len(keys), np.nan)
        if sound.any():
            weights[sound] = np.exp(logits[sound].astype(np.float64) - logits[sound].max())
            weights[sound] /= weights[sound].sum()
        return weights

    def _mean_turn(self, candidates: Candidates, first: int, dim: int) -> NDArray[np.float32]:
        """Rᵀ: rows times it are the mean of what they are at the next positions.

        Args:
            first: of these positions.
        """
        total = np.zeros((dim, dim))
        for start in range(0, self.future, _AT_ONCE):
            at = first + np.arange(start, min(start + _AT_ONCE, self.future))
            axes = np.broadcast_to(np.eye(dim, dtype=np.float32), (len(at), dim, dim))
            total += candidates.turned(axes, at[:, None]).sum(axis=0, dtype=np.float64)
        return (total / self.future).astype(np.float32)
