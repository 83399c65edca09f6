"""Packed signatures of a document's keys, and a question's votes by them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_AT_ONCE = 512  # tokens signed at a time, so that they stay in the processor's cache


class Signatures:
    """Packed signatures of all keys of a document, and votes of a question's queries by them."""

    def __init__(self, layers: int, kv_heads: int, head_dim: int, tokens: int, bits: int) -> None:
        from laserkv_gguf import kernels

        self.planes = kernels.planes(head_dim, 64, bits // 64, seed=0)
        self.centre: NDArray[np.float32] | None = None
        self.codes = np.zeros((layers, kv_heads, bits // 64, tokens), np.uint64)

    def add(self, start: int, keys: NDArray[Any]) -> None:
        """Signs keys (layers, n, kv_heads, head_dim), of the tokens from `start` on.

        They are centred (arXiv 2410.16179) on the mean key of what was signed first.
        """
        from laserkv_gguf import kernels

        if self.centre is None:
            self.centre = np.stack([layer.mean(axis=0, dtype=np.float32) for layer in keys])
        for layer, (one, centre) in enumerate(zip(keys, self.centre, strict=True)):
            for first in range(0, len(one), _AT_ONCE):
                part = np.subtract(one[first : first + _AT_ONCE], centre, dtype=np.float32)
                signed = kernels.signatures(part, self.planes, bits=64).transpose(1, 2, 0)
                at = start + first
                self.codes[layer, :, :, at : at + len(part)] = signed

    def votes(self, queries: NDArray[np.float32]) -> NDArray[np.float64]:
        """Scores (tokens,) for queries (layers, n, heads, head_dim)."""
        from laserkv_gguf import kernels
        from laserkv_gguf.kernels.hamming import hamming_votes

        layers, kv_heads = self.codes.shape[:2]
        count, heads, dim = queries.shape[1:]
        grouped = queries.reshape(layers, count, kv_heads, heads // kv_heads, dim)
        grouped = grouped.transpose(0, 2, 1, 3, 4).reshape(layers, kv_heads, -1, dim)
        return hamming_votes(kernels.signatures(grouped, self.planes, bits=64), self.codes)


def warm_up() -> None:
    """Compiles what recall needs beside a policy's own kernels."""
    signed = Signatures(1, 1, 8, 16, 64)
    signed.add(0, np.ones((1, 16, 1, 8), np.float32))
    signed.votes(np.ones((1, 2, 1, 8), np.float32))
