"""`compactor`: leverage of the keys blended with non-causal attention; no question needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from laserkv_gguf.errors import UserError
from laserkv_gguf.policies.base import Candidates, Needs, Policy

NEIGHBOURS = 3


@dataclass(frozen=True)
class Compactor(Policy):
    """Outlying keys, and keys that their neighbours attend to (arXiv 2507.08143).

    Attention is weighed by the norm of the value it brings and averaged over three neighbours.
    A token is kept for all layers and heads or for none, so its z-scores, taken over the heads and
    candidates of a layer, are summed; the paper chooses among all heads of a layer. Leverage is
    of keys as they are cached, after RoPE (the paper's are before it), and candidates before the
    block, whose queries are gone, are asked by the block's first ones.

    Attributes:
        blending: weight of the leverage scores beside the attention's.
        sketch: columns of the Gaussian sketch.
        chunk: tokens that attend to each other, whichever comes first.
        seed: of the sketch.
    """

    name: ClassVar[str] = "compactor"
    needs: ClassVar[Needs] = Needs(block_queries=True, keys=True, values=True)

    blending: float = 0.35
    sketch: int = 48
    chunk: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.blending < np.inf:
            raise UserError(f"blending is {self.blending:g}; give a weight of 0 or more, say 0.35")
        if self.sketch < 1:
            raise UserError(f"sketch is {self.sketch}; give at least 1 column, such as 48")
        if self.chunk < 1:
            raise UserError(f"chunk is {self.chunk}; give at least 1 token, such as 256")

    def select(self, candidates: Candidates, budget: int) -> NDArray[np.int64]:
        from laserkv_gguf.kernels import geometry, top_k

        assert candidates.keys is not None
        leverage = geometry.leverage_scores(candidates.keys, sketch=self.sketch, seed=self.seed)
        return top_k(self.blending * leverage + self._attention(candidates), budget)

    def _attention(self, candidates: Candidates) -> NDArray[np.float64]:
        """z-scores of what each candidate gives the queries of its chunk, unscaled as theirs.

        Chunks with fewer queries than keys count as if they had as many.
        """
        from laserkv_gguf.kernels import geometry, pool

        assert candidates.keys is not None
        assert candidates.values is not None
        assert candidates.block_queries is not None
        layers, count, kv_heads, dim = candidates.keys.shape
        own = candidates.tokens - candidates.block[0]
        total = np.zeros(count)
        for layer in range(layers):
            found = np.empty((kv_heads, count))
            queries = candidates.block_queries[layer]
            queries = queries.reshape(len(queries), kv_heads, -1, dim)
            for head in range(kv_heads):
                keys = candidates.keys[layer, :, head].astype(np.float32)
                for start in range(0, count, self.chunk):
                    part = slice(start, min(start + self.chunk, count))
                    rows = own[part][own[part] >= 0]
                    if not len(rows):
                        rows = np.arange(min(part.stop - start, len(queries)))
                    asked = queries[rows, head].astype(np.float32).reshape(-1, dim)
                    weights = geometry.attention(asked, keys[part], 1.0)
                    found[head, part] = weights.mean(axis=0) * (part.stop - start)
                norms = np.linalg.norm(candidates.values[layer, :, head].astype(np.float32), axis=1)
                norms[~np.isfinite(norms)] = 0
                found[head] = pool(found[head] * norms, NEIGHBOURS)
            total += geometry.z_scores(found).sum(axis=0)
        return total
