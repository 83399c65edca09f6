"""Attention consensus: how much attention the probe pays to each candidate.

The exact half of LASER-KV's selection (arXiv 2602.02199): softmax(Q K^T / sqrt(d)) over the
candidates' keys, summed over layers, heads and probe tokens. No score matrix larger than one kv
head's (a block of its rows, in fact) exists per thread.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange
from numpy.typing import NDArray

from laserkv_gguf.kernels._jit import jit, native_lock, threads_in_use
from laserkv_gguf.kernels._tiles import (
    FLOAT,
    KEYS_PER_TILE,
    Tensors,
    aligned,
    block_rows,
    check,
    load_keys,
    multiply,
    pack_rows,
    round_of_tasks,
    round_up,
)
from laserkv_gguf.kernels._vector import LANES, gather, get, put, soften, weigh

# A block of rows' scores is written once and read once: it should stay in a core's L2.
_SCORE_BYTES = 1 << 20


def attention_consensus(
    queries: NDArray[np.float32],
    keys: NDArray[Any],
    *,
    scale: float | None = None,
    out: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """Sum over layers, heads and probe tokens of each candidate's attention weight.

    The exact score of LASER-KV's long-term pool (arXiv 2602.02199). The result does not depend on
    the number of threads. NaN and infinite inputs give NaN.

    Args:
        queries: (layers, tokens, heads, head_dim) float32.
        keys: (layers, candidates, kv_heads, head_dim) float32 or float16. May be a slice of a
            larger array along the first two axes. Head ``h`` reads kv head
            ``h // (heads // kv_heads)``. float16 is widened tile by tile, never as a whole.
        scale: Factor on q . k, default ``1 / sqrt(head_dim)``.
        out: (candidates,) float32, overwritten and returned.

    Returns:
        (candidates,) float32, in attention weights; they sum to layers * heads * tokens.

    Raises:
        ValueError: Shapes do not fit together, or ``out`` does not fit.
        TypeError: Another dtype.
    """
    tensors = check(queries, keys)
    if out is None:
        out = np.empty(tensors.candidates, dtype=np.float32)
    elif out.shape != (tensors.candidates,) or out.dtype != np.float32:
        raise ValueError(f"out must be ({tensors.candidates},) float32, got {out.shape}")
    by_layer = _by_layer(tensors, scale)
    # float64: thousands of additions of unlike size, and still one float32 a candidate.
    out[...] = by_layer.sum(axis=0, dtype=np.float64)
    return out


def attention_by_layer(
    queries: NDArray[np.float32], keys: NDArray[Any], *, scale: float | None = None
) -> NDArray[np.float32]:
    """As :func:`attention_consensus`, but one row a layer: (layers, candidates) float32.

    PyramidKV (arXiv 2406.02069) lets layers vote with budgets of their own. Every row sums to
    heads * tokens.
    """
    return _by_layer(check(queries, keys), scale)


def _by_layer(tensors: Tensors, scale: float | None) -> NDArray[np.float32]:
    by_layer = np.zeros((tensors.layers, tensors.candidates), dtype=np.float32)
    if by_layer.size == 0 or tensors.tokens == 0:
        return by_layer
    factor = tensors.dim**-0.5 if scale is None else float(scale)
    workers = threads_in_use()
    tasks = tensors.layers * tensors.kv_heads
    rows = block_rows(tensors.rows, tensors.candidates, _SCORE_BYTES)
    tiles = -(-tensors.candidates // KEYS_PER_TILE)
    per_worker = (
        rows * tensors.dim  # packed rows
        + KEYS_PER_TILE * round_up(tensors.dim, 16)  # the tile of keys
        + tiles * KEYS_PER_TILE * rows  # scores
        + tiles * rows  # a peak a tile
        + 4 * rows  # running peak and sum, inverse, weights
    )
    per_worker = round_up(per_worker, 16)
    scratch = aligned(workers * per_worker)
    partial = aligned(round_of_tasks(tasks, tensors.layers, workers) * tensors.candidates)
    partial = partial.reshape(-1, tensors.candidates)
    with native_lock:
        _attend(
            tensors.addresses,
            tensors.sizes,
            tensors.half,
            factor,
            rows,
            workers,
            scratch.ctypes.data,
            per_worker,
            partial,
            by_layer,
        )
    return by_layer


@jit(parallel=True)
def _attend(
    addresses: tuple[int, int, int, int, int],
    sizes: tuple[int, int, int, int, int, int],
    half: bool,
    scale: float,
    block: int,
    workers: int,
    scratch: int,
    per_worker: int,
    partial: NDArray[np.float32],
    by_layer: NDArray[np.float32],
) -> None:
    queries, keys, layer_stride, key_stride, head_stride = addresses
    layers, tokens, heads, kv_heads, candidates, dim = sizes
    group = heads // kv_heads
    tasks = layers * kv_heads
    at_once = partial.shape[0]
    for start in range(0, tasks, at_once):
        count = min(at_once, tasks - start)
        for worker in prange(workers):
            for i in range(worker, count, workers):
                layer, kv_head = divmod(start + i, kv_heads)
                _attend_head(
                    queries + (layer * tokens * heads + kv_head * group) * dim * FLOAT,
                    keys + layer * layer_stride + kv_head * head_stride,
                    key_stride,
                    tokens,
                    heads,
                    group * tokens,
                    candidates,
                    dim,
                    half,
                    scale,
                    block,
                    scratch + worker * per_worker * FLOAT,
                    partial.ctypes.data + i * candidates * FLOAT,
                )
        # In the tasks' order, whoever did them: the same sum for every number of threads.
        for i in range(count):
            # Loops, not slices: Numba would compile each of those as a parallel region.
            layer = (start + i) // kv_heads
            for c in range(candidates):
                by_layer[layer, c] += partial[i, c]


@jit(inline=True)
def _attend_head(
    queries: int,
    keys: int,
    stride: int,
    tokens: int,
    heads: int,
    rows: int,
    candidates: int,
    dim: int,
    half: bool,
    scale: float,
    block: int,
    scratch: int,
    out: int,
) -> None:
    """One kv head of one layer: its rows' softmax over the candidates, summed into ``out``."""
    tiles = (candidates + KEYS_PER_TILE - 1) // KEYS_PER_TILE
    packed = scratch
    tile = packed + block * dim * FLOAT
    scores = tile + KEYS_PER_TILE * ((dim + 15) // 16 * 16) * FLOAT
    peaks = scores + tiles * KEYS_PER_TILE * block * FLOAT
    peak = peaks + tiles * block * FLOAT
    total = peak + block * FLOAT
    inverse = total + block * FLOAT
    weight = inverse + block * FLOAT
    for c in range(candidates):
        put(out + c * FLOAT, np.float32(0.0))
    for first in range(0, rows, block):
        n = min(block, rows - first)
        vectors = (n + LANES - 1) // LANES
        pitch = vectors * LANES
        pack_rows(queries, first, n, vectors, tokens, heads, dim, scale, packed)
        for r in range(pitch):
            put(peak + r * FLOAT, np.float32(-3.0e38))
            put(total + r * FLOAT, np.float32(0.0))
        for t in range(tiles):
            c = t * KEYS_PER_TILE
            width = min(KEYS_PER_TILE, candidates - c)
            load_keys(keys + c * stride, stride, width, dim, half, 0, tile)
            column = scores + c * pitch * FLOAT
            multiply(packed, vectors, tile, width, dim, column, pitch)
            for v in range(0, pitch * FLOAT, LANES * FLOAT):
                soften(
                    column + v,
                    pitch,
                    width,
                    peaks + t * pitch * FLOAT + v,
                    peak + v,
                    total + v,
                )
        for r in range(pitch):
            share = np.float32(0.0)  # padding rows count for nothing
            if r < n:
                share = np.float32(1.0) / get(total + r * FLOAT)
            put(inverse + r * FLOAT, share)
        for t in range(tiles):
            c = t * KEYS_PER_TILE
            width = min(KEYS_PER_TILE, candidates - c)
            for v in range(0, pitch * FLOAT, LANES * FLOAT):
                weigh(peaks + t * pitch * FLOAT + v, peak + v, inverse + v, weight + v)
            gather(scores + c * pitch * FLOAT, pitch, width, vectors, weight, out + c * FLOAT)
