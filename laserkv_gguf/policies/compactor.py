"""`compactor`: leverage of the keys blended with non-causal attention; no question needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from laserkv_gguf.budget import Budget
from laserkv_gguf.errors import UserError
from laserkv_gguf.policies.base import Candidates, Held, Needs, Policy

NEIGHBOURS = 3
SHARES = ("all", "block")


@dataclass(frozen=True)
class Noted:
    """Attention within the chunks so far, weighed by values.

    Attributes:
        tokens: (n,) int64, ascending: those that are scored.
        found: (layers, kv_heads, n) float32, their scores.
        queries: (layers, q, heads, head_dim), of the tokens `start` to start + q - 1, whose chunk
            is not complete.
        start: their first token; all before it are scored, or have none to ask them.
    """

    tokens: NDArray[np.int64]
    found: NDArray[np.float32]
    queries: NDArray[Any]
    start: int


@dataclass(frozen=True)
class Compactor(Policy):
    """Outlying keys, and keys that their neighbours attend to (arXiv 2507.08143).

    Also NVIDIA/kvpress, `compactor_press.py`, whose blend and protected tokens these are. Leverage
    is of keys before RoPE: their positions' rotation is taken back. Attention is among the tokens
    of a chunk, whichever comes first, not divided by √d, weighed by the norm of the value it
    brings, averaged over three neighbours. Both are z-scores over the heads and tokens of a layer,
    and one choice is made over all that was read: the cache must hold the whole sequence first.
    Attention is noted while it is read, since no token's queries are kept longer than its chunk.

    In llama.cpp a token is kept for all layers and heads or for none, so its z-scores are summed
    over them; the paper chooses among all heads of a layer.

    Attributes:
        blending: weight of leverage beside attention; None for the share that is evicted, 1 - r
            (kvpress; the paper: 0.35).
        sketch: columns of leverage's Gaussian sketch (48).
        chunk: tokens that attend to each other (256).
        sinks, recent: first and last tokens that always stay (8 and 4).
        share: "all" for one choice over everything, as published; "block" for an equal share of
            every block by `--protection-divisor`, which needs less of a cache.
        seed: of the sketch.
    """

    name: ClassVar[str] = "compactor"
    needs: ClassVar[Needs] = Needs(
        block_queries=True, keys=True, values=True, every_block=True, unrotated=True
    )

    blending: float | None = None
    sketch: int = 48
    chunk: int = 256
    sinks: int = 8
    recent: int = 4
    share: str = "all"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.blending is not None and not 0 <= self.blending < np.inf:
            raise UserError(f"blending is {self.blending:g}; give a weight of 0 or more, say 0.35")
        if self.sketch < 1:
            raise UserError(f"sketch is {self.sketch}; give at least 1 column, such as 48")
        if self.chunk < 1:
            raise UserError(f"chunk is {self.chunk}; give at least 1 token, such as 256")
        if self.sinks < 0:
            raise UserError(f"sinks is {self.sinks}; give a number of tokens, 0 for none")
        if self.recent < 1:
            raise UserError(f"recent is {self.recent}; give at least 1 token, such as 4")
        if self.share not in SHARES:
            raise UserError(f"share is {self.share!r}; give {' or '.join(SHARES)}")

    def budget(self, tokens: int, block_size: int, ratio: float, divisor: int) -> Budget:
        if self.share == "block":
            return Budget(tokens, block_size, ratio, divisor)
        return Budget(
            tokens,
            block_size,
            ratio,
            divisor,
            shape="one-shot",
            sinks=self.sinks,
            recent=self.recent,
        )

    def observe(self, block: Candidates) -> None:
        """Notes the attention within the chunks that are complete but for the last tokens read."""
        first = max(int(block.tokens[0]), self.sinks)
        self._note(block, first, block.block[1] - self.recent, whole=True)

    def select(self, candidates: Candidates, budget: int) -> NDArray[np.int64]:
        from laserkv_gguf.kernels import geometry, pool, top_k

        assert candidates.keys is not None
        first, last = candidates.tokens[[0, -1]].tolist()
        noted = self._note(candidates, first, last + 1, whole=False)
        mine = np.searchsorted(noted.tokens, candidates.tokens)
        blending = self.blending
        if blending is None:
            blending = (candidates.count - budget) / len(candidates.around.tokens)
        total = np.zeros(candidates.count)
        for keys, found in zip(candidates.keys, noted.found, strict=True):
            near = np.stack([pool(head[mine], NEIGHBOURS) for head in found])
            total += geometry.z_scores(near.astype(np.float64)).sum(axis=0)
            if blending:
                plain = candidates.turned(keys, -candidates.positions[:, None])
                scores = geometry.leverage_scores(plain[None], sketch=self.sketch, seed=self.seed)
                total += blending * scores
        return top_k(candidates.noted(total), budget)

    def _note(self, block: Candidates, first: int, end: int, *, whole: bool) -> Noted:
        """Scores the tokens up to `end` that are not yet; the first one ever scored is `first`.

        Args:
            whole: only chunks that are complete.
        """
        held, asked = block.around, block.block_queries
        assert asked is not None
        before = block.memory.get("compactor")
        if before is None or first < (before.tokens[0] if len(before.tokens) else before.start):
            before = _nothing(held, asked, first)
        queries, start = asked, block.block[0]
        if before.queries.shape[1]:
            queries, start = np.concatenate((before.queries, asked), axis=1), before.start
        scored = int(before.tokens[-1]) + 1 if len(before.tokens) else first
        rows = np.arange(*np.searchsorted(held.tokens, (scored, end)))
        if whole:
            rows = rows[: len(rows) // self.chunk * self.chunk]
        found = [before.found]
        for at in range(0, len(rows), self.chunk):
            part = rows[at : at + self.chunk]
            found.append(_attention(held, part, queries, held.tokens[part] - start))
        tokens = np.concatenate((before.tokens, held.tokens[rows]))
        rest = max((int(tokens[-1]) + 1 if len(tokens) else first) - start, 0)
        noted = Noted(tokens, np.concatenate(found, axis=2), queries[:, rest:].copy(), start + rest)
        block.memory["compactor"] = noted
        return noted


def _nothing(held: Held, queries: NDArray[Any], first: int) -> Noted:
    assert held.keys is not None
    layers, _, kv_heads, _ = held.keys.shape
    found = np.empty((layers, kv_heads, 0), np.float32)
    return Noted(np.empty(0, np.int64), found, queries[:, :0], first)


def _attention(
    held: Held, part: NDArray[np.int64], queries: NDArray[Any], own: NDArray[np.int64]
) -> NDArray[np.float32]:
    """What each token of a chunk gets from the chunk's queries, times the norm of its value.

    A chunk with fewer queries than keys counts as if it had as many; one with none, of tokens that
    were read before there was anything to note, is asked by the first ones there are.

    Args:
        part: the chunk's tokens, by number among those held.
        own: number of each one's own query; those that are out of range have none.
    """
    from laserkv_gguf.kernels import geometry

    assert held.keys is not None
    assert held.values is not None
    layers, _, kv_heads, dim = held.keys.shape
    rows = own[(own >= 0) & (own < queries.shape[1])]
    if not len(rows):
        rows = np.arange(min(len(part), queries.shape[1]))
    found = np.empty((layers, kv_heads, len(part)), np.float32)
    for layer in range(layers):
        asked = queries[layer, rows].astype(np.float32)
        asked = asked.reshape(len(rows), kv_heads, -1, dim)
        keys = held.keys[layer, part].astype(np.float32)
        norms = np.linalg.norm(held.values[layer, part].astype(np.float32), axis=2)
        norms[~np.isfinite(norms)] = 0
        for head in range(kv_heads):
            weights = geometry.attention(asked[:, head].reshape(-1, dim), keys[:, head], 1.0)
            found[layer, head] = weights.mean(axis=0) * len(part) * norms[:, head]
    return found
