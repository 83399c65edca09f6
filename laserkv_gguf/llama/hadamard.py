"""The rotation that llama.cpp gives quantised keys and values before it stores them.

Whether a cache is rotated, and over how many dimensions, is measured (`rows.check`), not assumed:
it depends on the version of llama.cpp, the cache's type and the size of a head.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray


def matrix(size: int) -> NDArray[np.float32]:
    """Sylvester's Hadamard matrix (size, size), scaled to be its own inverse; a power of 2."""
    rows = np.ones((1, 1))
    while len(rows) < size:
        rows = np.block([[rows, rows], [rows, -rows]])
    scaled: NDArray[np.float32] = (rows / np.sqrt(size)).astype(np.float32)
    return scaled


@cache
def whole(dim: int) -> NDArray[np.float32]:
    """The rotation of a head: `matrix`, as large as divides `dim`, on the diagonal: (dim, dim)."""
    size = dim & -dim  # the largest power of 2 that divides it
    turn: NDArray[np.float32] = np.kron(np.eye(dim // size, dtype=np.float32), matrix(size))
    return turn


def sizes(dim: int) -> list[int]:
    """Sizes that may have been used for heads of `dim`, the largest first; 0 for no rotation."""
    return [1 << n for n in range(12, 5, -1) if dim % (1 << n) == 0] + [0]


def turned(vectors: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    """Vectors (…, dim) rotated over every run of `size` dimensions; as they are where it is 0."""
    if not size:
        return vectors
    found: NDArray[np.float32] = (vectors.reshape(-1, size) @ matrix(size)).reshape(vectors.shape)
    return found
