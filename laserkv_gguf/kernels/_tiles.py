"""What every kernel shares: checked inputs, aligned scratch, and tiles of keys against rows.

A "row" is one query of a group: with grouped queries, the ``heads // kv_heads`` heads that read
one kv head, times the probe tokens. Rows are packed (vector, dim, LANES), so that products run
along rows with one broadcast key value at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from laserkv_gguf.kernels._jit import jit
from laserkv_gguf.kernels._vector import (
    LANES,
    TILE_KEYS,
    TILE_VECTORS,
    accumulate,
    copy,
    get,
    get64,
    products_1,
    products_2,
    products_3,
    put,
    put64,
    subtract,
    widen,
)

KEYS_PER_TILE = 32  # with one panel of rows (24 KiB at head_dim 128) this stays in L1
FLOAT = 4


@dataclass(frozen=True)
class Tensors:
    """Queries and keys as the compiled code wants them: addresses, strides in bytes, sizes."""

    queries: NDArray[np.float32]
    keys: NDArray[Any]
    layers: int
    tokens: int
    heads: int
    kv_heads: int
    candidates: int
    dim: int
    half: bool

    @property
    def rows(self) -> int:
        """Rows (queries of one group) a kv head is asked by."""
        return self.tokens * (self.heads // self.kv_heads)

    @property
    def scale(self) -> float:
        """Factor on q . k: 1 / sqrt(head_dim)."""
        return float(self.dim**-0.5)

    @property
    def asked(self) -> int:
        """How many (layer, head, token) look at each candidate."""
        return self.layers * self.heads * self.tokens

    @property
    def addresses(self) -> tuple[int, int, int, int, int]:
        """(queries, keys, layer stride, candidate stride, kv head stride)."""
        layer, candidate, head, _ = self.keys.strides
        return self.queries.ctypes.data, self.keys.ctypes.data, layer, candidate, head

    @property
    def sizes(self) -> tuple[int, int, int, int, int, int]:
        """(layers, tokens, heads, kv_heads, candidates, dim)."""
        return (
            self.layers,
            self.tokens,
            self.heads,
            self.kv_heads,
            self.candidates,
            self.dim,
        )


def check(queries: NDArray[Any], keys: NDArray[Any]) -> Tensors:
    """Check shapes and dtypes; copy only what the compiled code cannot read where it lies.

    ``queries`` (layers, tokens, heads, head_dim), ``keys`` (layers, candidates, kv_heads,
    head_dim). Raises ValueError for shapes that do not fit together, TypeError for a dtype other
    than float32 (queries) or float32 and float16 (keys).
    """
    queries, keys = np.asarray(queries), np.asarray(keys)
    if queries.ndim != 4 or keys.ndim != 4:
        raise ValueError(
            "queries must be (layers, tokens, heads, head_dim) and keys (layers, candidates, "
            f"kv_heads, head_dim); got {queries.shape} and {keys.shape}"
        )
    if queries.dtype != np.float32:
        raise TypeError(f"queries must be float32, got {queries.dtype}")
    if keys.dtype != np.float32 and keys.dtype != np.float16:
        raise TypeError(f"keys must be float32 or float16, got {keys.dtype}")
    layers, tokens, heads, dim = queries.shape
    key_layers, candidates, kv_heads, key_dim = keys.shape
    if layers != key_layers or dim != key_dim:
        raise ValueError(
            f"layers and head_dim of queries {queries.shape} and keys {keys.shape} differ"
        )
    if kv_heads < 1 or heads < 1 or heads % kv_heads:
        raise ValueError(f"{heads} heads cannot share {kv_heads} kv heads evenly")
    if dim < 1:
        raise ValueError("head_dim must be at least 1")
    queries = np.ascontiguousarray(queries)
    size = keys.itemsize
    readable = keys.flags.aligned and (dim == 1 or keys.strides[3] == size)
    if not readable:
        keys = np.ascontiguousarray(keys)
    return Tensors(queries, keys, layers, tokens, heads, kv_heads, candidates, dim, bool(size == 2))


def round_up(n: int, step: int) -> int:
    """``n`` rounded up to a multiple of ``step``."""
    return -(-n // step) * step


def aligned(count: int) -> NDArray[np.float32]:
    """``count`` uninitialised float32, the first on a cache line (vector loads never straddle)."""
    raw = np.empty(count + 16, dtype=np.float32)
    skip = (-raw.ctypes.data % 64) // FLOAT
    return raw[skip : skip + count]


def block_rows(rows: int, candidates: int, budget: int) -> int:
    """Rows (a multiple of LANES) worked on at once so that rows x candidates fit ``budget`` bytes.

    At least one full panel, and evenly split, so that the last block is not a sliver.
    """
    panel = TILE_VECTORS * LANES
    padded = round_up(max(rows, 1), LANES)
    most = max(panel, budget // (FLOAT * max(candidates, 1)) // panel * panel)
    blocks = -(-padded // most)
    return round_up(-(-padded // blocks), LANES)


def round_of_tasks(tasks: int, layers: int, workers: int) -> int:
    """Tasks between two reductions: enough to keep every worker busy, not all partials at once."""
    return min(tasks, round_up(max(layers, 4 * workers), workers))


@jit(inline=True)
def load_keys(source: int, stride: int, n: int, dim: int, half: bool, mean: int, tile: int) -> None:
    """``n`` keys into a dense float32 tile, centred by ``mean`` unless it is 0, zero padded."""
    for i in range(n):
        to = tile + i * dim * FLOAT
        if half:
            widen(source + i * stride, dim, to)
        else:
            copy(source + i * stride, dim, to)
        if mean != 0:
            subtract(to, mean, dim)
    padded = (n + TILE_KEYS - 1) // TILE_KEYS * TILE_KEYS
    for j in range(n * dim, padded * dim):
        put(tile + j * FLOAT, np.float32(0.0))


@jit(inline=True)
def mean_key(
    source: int, stride: int, n: int, dim: int, half: bool, tile: int, sums: int, mean: int
) -> None:
    """The mean of ``n`` keys; in float64 (``sums``), so that equal keys have themselves as mean."""
    for j in range(dim):
        put64(sums + j * 8, 0.0)
    for c in range(0, n, KEYS_PER_TILE):
        width = min(KEYS_PER_TILE, n - c)
        load_keys(source + c * stride, stride, width, dim, half, 0, tile)
        for i in range(width):
            accumulate(tile + i * dim * FLOAT, dim, sums)
    for j in range(dim):
        put(mean + j * FLOAT, np.float32(get64(sums + j * 8) / n))


@jit(inline=True)
def multiply(rows: int, vectors: int, tile: int, n: int, dim: int, out: int, pitch: int) -> None:
    """out[key, row] = key . row for the tile's first ``n`` keys (rounded up to TILE_KEYS)."""
    v = 0
    while v < vectors:
        take = min(TILE_VECTORS, vectors - v)
        panel = rows + v * dim * LANES * FLOAT
        for i in range(0, n, TILE_KEYS):
            keys = tile + i * dim * FLOAT
            to = out + (i * pitch + v * LANES) * FLOAT
            if take == 3:
                products_3(panel, keys, to, dim, pitch)
            elif take == 2:
                products_2(panel, keys, to, dim, pitch)
            else:
                products_1(panel, keys, to, dim, pitch)
        v += take


@jit(inline=True)
def pack_rows(
    queries: int,
    first: int,
    n: int,
    vectors: int,
    tokens: int,
    heads: int,
    dim: int,
    scale: float,
    out: int,
) -> None:
    """Rows first .. first + n of the group whose first head of token 0 is at ``queries``."""
    for r in range(vectors * LANES):
        to = out + (r // LANES * dim * LANES + r % LANES) * FLOAT
        if r < n:
            head, token = divmod(first + r, tokens)
            source = queries + (token * heads + head) * dim * FLOAT
            for j in range(dim):
                put(to + j * LANES * FLOAT, np.float32(get(source + j * FLOAT) * scale))
        else:
            for j in range(dim):
                put(to + j * LANES * FLOAT, np.float32(0.0))
