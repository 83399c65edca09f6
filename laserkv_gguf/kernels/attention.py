"""Attention consensus: how much attention the probe pays to each candidate.

The exact half of LASER-KV's selection (arXiv 2602.02199): softmax(Q K^T / sqrt(d)) over the
candidates' keys, summed over layers, heads and probe tokens. Each weight can be multiplied by the
length of the token's value, the softmax can count keys that are no candidates, and of the probe's
tokens the one that asks most can decide. No score matrix larger than one kv head's (a block of its
rows, in fact) exists per thread.
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
from laserkv_gguf.kernels._vector import LANES, gather, get, put, raise_to, soften, spread, weigh

# A block of rows' scores is written once and read once: it should stay in a core's L2.
_SCORE_BYTES = 1 << 20
# Scores a token of the probe: so many tokens at a time, in so many bytes, by so many sums at most.
# None of it depends on the number of threads, so the order of additions does not either.
_TOKENS_AT_ONCE, _BY_TOKEN_BYTES, _SUMS = 64, 1 << 27, 32
_NOTHING = np.float32(-3.0e38)  # the peak of a softmax that has seen no key

OVER = ("sum", "max")


def attention_consensus(
    queries: NDArray[np.float32],
    keys: NDArray[Any],
    *,
    weights: NDArray[np.float32] | None = None,
    outside: NDArray[np.float32] | None = None,
    over: str = "sum",
) -> NDArray[np.float32]:
    """Each candidate's attention weight, summed over layers, heads and probe tokens.

    With ``e = exp(q . k / sqrt(head_dim))``,
    ``p[l, t, h, c] = e / (exp(outside[l, t, h]) + sum_c e)`` and ``w[l, c, kv(h)]`` the weights, a
    probe token's score is ``sum_l sum_h p * w``; ``over`` says how the tokens' scores become one.
    Without weights and outside, summed, it is the exact score of LASER-KV's long-term pool (arXiv
    2602.02199). The result does not depend on the number of threads. NaN and infinite inputs give
    NaN.

    Args:
        queries: (layers, tokens, heads, head_dim) float32.
        keys: (layers, candidates, kv_heads, head_dim) float32 or float16. May be a slice of a
            larger array along the first two axes. Head ``h`` reads kv head
            ``h // (heads // kv_heads)``. float16 is widened tile by tile, never as a whole.
        weights: (layers, candidates, kv_heads) float32, not negative: what a weight counts, such
            as the length of the value behind it; None for 1.
        outside: (layers, tokens, heads) float32: log-sum-exp of ``q . k / sqrt(head_dim)`` over
            keys that are no candidates but seen all the same, -inf for none (see
            :func:`log_sums`); None for a softmax over the candidates alone.
        over: "sum" over the probe's tokens, or "max", the largest of their scores (KVzip, arXiv
            2505.23416).

    Returns:
        (candidates,) float32, in attention weights; without weights and outside they sum to
        layers * heads * tokens.

    Raises:
        ValueError: Shapes do not fit together, or ``over`` is unknown.
        TypeError: Another dtype.
    """
    tensors = check(queries, keys)
    if over not in OVER:
        raise ValueError(f"over must be {' or '.join(OVER)}, not {over!r}")
    factors = _factors(tensors, weights)
    beside = _beside(tensors, outside)
    if over == "max":
        return _largest(tensors, factors, beside)
    by_layer = _by_layer(tensors, factors, beside)
    # float64: thousands of additions of unlike size, and still one float32 a candidate.
    total: NDArray[np.float32] = by_layer.sum(axis=0, dtype=np.float64).astype(np.float32)
    return total


def attention_by_layer(
    queries: NDArray[np.float32],
    keys: NDArray[Any],
    *,
    weights: NDArray[np.float32] | None = None,
    outside: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """As :func:`attention_consensus`, but one row a layer: (layers, candidates) float32.

    PyramidKV (arXiv 2406.02069) lets layers vote with budgets of their own. Without weights and
    outside every row sums to heads * tokens.
    """
    tensors = check(queries, keys)
    return _by_layer(tensors, _factors(tensors, weights), _beside(tensors, outside))


def attention_peaks(
    queries: NDArray[np.float32],
    keys: NDArray[Any],
    out: NDArray[np.float32],
    *,
    outside: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """The largest attention weight that any query of a group pays each key.

    With ``p`` as in :func:`attention_consensus`, ``out[l, k, c]`` becomes the largest of itself and
    of ``p[l, t, h, c]`` over all tokens and the heads that read kv head ``k`` (KVzip, arXiv
    2505.23416). So the queries may come in parts. A softmax that is no number counts for nothing.

    Args:
        queries, keys, outside: as in attention_consensus.
        out: (layers, kv_heads, candidates) float32, not negative; changed, and returned.

    Raises:
        ValueError: Shapes do not fit together.
        TypeError: Another dtype.
    """
    tensors = check(queries, keys)
    shape = tensors.layers, tensors.kv_heads, tensors.candidates
    if out.shape != shape or out.dtype != np.float32 or not out.flags.c_contiguous:
        raise ValueError(f"out must be {shape} of float32, contiguous; got {out.shape}")
    if out.size == 0 or tensors.tokens == 0:
        return out
    beside = _beside(tensors, outside)
    workers = threads_in_use()
    rows = block_rows(tensors.rows, tensors.candidates, _SCORE_BYTES)
    per_worker = _scratch(tensors, rows)
    scratch = aligned(workers * per_worker)
    with native_lock:
        _attend_peaks(
            tensors.addresses,
            tensors.sizes,
            tensors.half,
            tensors.scale,
            rows,
            workers,
            scratch.ctypes.data,
            per_worker,
            0 if beside is None else beside.ctypes.data,
            out.ctypes.data,
        )
    return out


def log_sums(
    queries: NDArray[np.float32],
    keys: NDArray[Any],
    *,
    visible: NDArray[Any] | None = None,
) -> NDArray[np.float32]:
    """Log-sum-exp of q . k / sqrt(head_dim) over keys: what they add to each query's softmax.

    Sums of several sets of keys are joined by ``numpy.logaddexp``. NaN gives NaN.

    Args:
        queries: (layers, tokens, heads, head_dim) float32.
        keys: (layers, n, kv_heads, head_dim) float32 or float16, as in attention_consensus.
        visible: (tokens,) integers: token ``t`` sees the first ``visible[t]`` keys only; None
            where all see all.

    Returns:
        (layers, tokens, heads) float32; -inf where a query sees no key.

    Raises:
        ValueError: Shapes do not fit together.
        TypeError: Another dtype.
    """
    tensors = check(queries, keys)
    if visible is None:
        return _sums(tensors)
    if np.shape(visible) != (tensors.tokens,):
        raise ValueError(f"visible must be ({tensors.tokens},), got {np.shape(visible)}")
    whole = int(np.min(visible, initial=tensors.candidates))
    common = _sums(check(queries, keys[:, :whole]))
    late = np.asarray(keys[:, whole : int(np.max(visible, initial=0))], np.float32)
    if not late.size or not tensors.tokens:
        return common
    grouped = tensors.queries.reshape(*tensors.queries.shape[:2], tensors.kv_heads, -1, tensors.dim)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        logits = np.einsum("ltkgd,lckd->ltkgc", grouped, late, optimize=True)
        logits = logits.reshape(*common.shape, -1) * np.float32(tensors.scale)
        hidden = np.arange(whole, whole + late.shape[1]) >= np.asarray(visible)[:, None]
        logits = np.where(hidden[:, None], np.float32(-np.inf), logits)
        joined: NDArray[np.float32] = np.logaddexp(
            common, np.logaddexp.reduce(logits, axis=-1), dtype=np.float32
        )
    return joined


def _factors(tensors: Tensors, weights: NDArray[Any] | None) -> NDArray[np.float32] | None:
    """The weights as (layers, kv_heads, candidates), so that a task reads one run of them."""
    shape = tensors.layers, tensors.candidates, tensors.kv_heads
    if weights is None:
        return None
    if np.shape(weights) != shape:
        raise ValueError(f"weights must be {shape}, got {np.shape(weights)}")
    return np.ascontiguousarray(np.swapaxes(weights, 1, 2), np.float32)


def _beside(tensors: Tensors, outside: NDArray[Any] | None) -> NDArray[np.float32] | None:
    shape = tensors.layers, tensors.tokens, tensors.heads
    if outside is None:
        return None
    if np.shape(outside) != shape:
        raise ValueError(f"outside must be {shape}, got {np.shape(outside)}")
    return np.ascontiguousarray(outside, np.float32)


def _by_layer(
    tensors: Tensors,
    factors: NDArray[np.float32] | None,
    outside: NDArray[np.float32] | None,
) -> NDArray[np.float32]:
    by_layer = np.zeros((tensors.layers, tensors.candidates), dtype=np.float32)
    if by_layer.size == 0 or tensors.tokens == 0:
        return by_layer
    workers = threads_in_use()
    tasks = tensors.layers * tensors.kv_heads
    rows = block_rows(tensors.rows, tensors.candidates, _SCORE_BYTES)
    per_worker = _scratch(tensors, rows)
    scratch = aligned(workers * per_worker)
    partial = aligned(round_of_tasks(tasks, tensors.layers, workers) * tensors.candidates)
    partial = partial.reshape(-1, tensors.candidates)
    with native_lock:
        _attend(
            tensors.addresses,
            tensors.sizes,
            tensors.half,
            tensors.scale,
            rows,
            workers,
            scratch.ctypes.data,
            per_worker,
            0 if outside is None else outside.ctypes.data,
            0 if factors is None else factors.ctypes.data,
            partial,
            by_layer,
        )
    return by_layer


def _scratch(tensors: Tensors, rows: int) -> int:
    """float32 values that a worker needs beside its result, for blocks of so many rows."""
    tiles = -(-tensors.candidates // KEYS_PER_TILE)
    per_worker = (
        rows * tensors.dim  # packed rows
        + KEYS_PER_TILE * round_up(tensors.dim, 16)  # the tile of keys
        + tiles * KEYS_PER_TILE * rows  # scores
        + tiles * rows  # a peak a tile
        + 4 * rows  # running peak and sum, inverse, weights
    )
    return round_up(per_worker, 16)


def _largest(
    tensors: Tensors,
    factors: NDArray[np.float32] | None,
    outside: NDArray[np.float32] | None,
) -> NDArray[np.float32]:
    """The largest score over the probe's tokens: (candidates,)."""
    best = np.zeros(tensors.candidates, np.float32)
    if tensors.layers == 0:
        return best
    for first in range(0, tensors.tokens if best.size else 0, _TOKENS_AT_ONCE):
        part = slice(first, first + _TOKENS_AT_ONCE)
        asked = check(tensors.queries[:, part], tensors.keys)
        beside = None if outside is None else np.ascontiguousarray(outside[:, part])
        best = np.maximum(best, _by_token(asked, factors, beside).max(axis=1))
    return best


def _by_token(
    tensors: Tensors,
    factors: NDArray[np.float32] | None,
    outside: NDArray[np.float32] | None,
) -> NDArray[np.float32]:
    """Every probe token's score of every candidate, summed over layers and heads."""
    padded = round_up(tensors.tokens, LANES)
    group = tensors.heads // tensors.kv_heads
    most = _SCORE_BYTES // (FLOAT * max(tensors.candidates, 1)) // padded
    heads = min(group, max(most, 1))
    heads = -(-group // -(-group // heads))  # evenly split
    per_worker = _scratch(tensors, heads * padded)
    workers = threads_in_use()
    scratch = aligned(workers * per_worker)
    tasks = tensors.layers * tensors.kv_heads
    room = _BY_TOKEN_BYTES // (FLOAT * tensors.candidates * padded)
    sums = min(tasks, max(4, min(_SUMS, room)))
    partial = np.zeros((sums, tensors.candidates, padded), np.float32)
    with native_lock:
        _attend_tokens(
            tensors.addresses,
            tensors.sizes,
            tensors.half,
            tensors.scale,
            heads,
            workers,
            scratch.ctypes.data,
            per_worker,
            0 if outside is None else outside.ctypes.data,
            0 if factors is None else factors.ctypes.data,
            partial,
        )
    total: NDArray[np.float32] = partial.sum(axis=0)[:, : tensors.tokens]
    return total


def _sums(tensors: Tensors) -> NDArray[np.float32]:
    out = np.full((tensors.layers, tensors.tokens, tensors.heads), -np.inf, np.float32)
    if out.size == 0 or tensors.candidates == 0:
        return out
    workers = threads_in_use()
    rows = block_rows(tensors.rows, KEYS_PER_TILE, _SCORE_BYTES // 8)
    per_worker = rows * (tensors.dim + KEYS_PER_TILE + 3)
    per_worker = round_up(per_worker + KEYS_PER_TILE * round_up(tensors.dim, 16), 16)
    scratch = aligned(workers * per_worker)
    with native_lock:
        _sum_all(
            tensors.addresses,
            tensors.sizes,
            tensors.half,
            tensors.scale,
            rows,
            workers,
            scratch.ctypes.data,
            per_worker,
            out,
        )
    return out


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
    outside: int,
    factors: int,
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
                first = layer * tokens * heads + kv_head * group
                _attend_head(
                    queries + first * dim * FLOAT,
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
                    0 if outside == 0 else outside + first * FLOAT,
                    partial.ctypes.data + i * candidates * FLOAT,
                    False,
                )
        # In the tasks' order, whoever did them: the same sum for every number of threads.
        for i in range(count):
            # Loops, not slices: Numba would compile each of those as a parallel region.
            layer = (start + i) // kv_heads
            if factors == 0:
                for c in range(candidates):
                    by_layer[layer, c] += partial[i, c]
            else:
                row = factors + (start + i) * candidates * FLOAT
                for c in range(candidates):
                    by_layer[layer, c] += partial[i, c] * get(row + c * FLOAT)


@jit(inline=True)
def begin(outside: int, peak: int, total: int) -> None:
    """A row's running peak and sum, before any candidate: what is outside, or nothing."""
    top = _NOTHING
    share = np.float32(0.0)
    if outside != 0:
        top = get(outside)
        share = np.float32(1.0)
        if top <= _NOTHING:
            top = _NOTHING
            share = np.float32(0.0)
    put(peak, top)
    put(total, share)


@jit(inline=True)
def _score(
    keys: int,
    stride: int,
    candidates: int,
    dim: int,
    half: bool,
    tile: int,
    packed: int,
    vectors: int,
    scores: int,
    peaks: int,
    peak: int,
    total: int,
) -> None:
    """Packed rows against all candidates, tile by tile: scores, and the rows' peaks and sums."""
    tiles = (candidates + KEYS_PER_TILE - 1) // KEYS_PER_TILE
    pitch = vectors * LANES
    for t in range(tiles):
        c = t * KEYS_PER_TILE
        width = min(KEYS_PER_TILE, candidates - c)
        load_keys(keys + c * stride, stride, width, dim, half, 0, tile)
        column = scores + c * pitch * FLOAT
        multiply(packed, vectors, tile, width, dim, column, pitch)
        for v in range(0, pitch * FLOAT, LANES * FLOAT):
            soften(column + v, pitch, width, peaks + t * pitch * FLOAT + v, peak + v, total + v)


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
    outside: int,
    out: int,
    peaks_only: bool,
) -> None:
    """One kv head of one layer: its rows' softmax over the candidates, summed into ``out``.

    With ``peaks_only`` ``out`` holds the largest weights so far, and may be raised.
    """
    tiles = (candidates + KEYS_PER_TILE - 1) // KEYS_PER_TILE
    packed = scratch
    tile = packed + block * dim * FLOAT
    scores = tile + KEYS_PER_TILE * ((dim + 15) // 16 * 16) * FLOAT
    peaks = scores + tiles * KEYS_PER_TILE * block * FLOAT
    peak = peaks + tiles * block * FLOAT
    total = peak + block * FLOAT
    inverse = total + block * FLOAT
    weight = inverse + block * FLOAT
    if not peaks_only:
        for c in range(candidates):
            put(out + c * FLOAT, np.float32(0.0))
    for first in range(0, rows, block):
        n = min(block, rows - first)
        vectors = (n + LANES - 1) // LANES
        pitch = vectors * LANES
        pack_rows(queries, first, n, vectors, tokens, heads, dim, scale, packed)
        for r in range(pitch):
            at = 0
            if outside != 0 and r < n:
                head, token = divmod(first + r, tokens)
                at = outside + (token * heads + head) * FLOAT
            begin(at, peak + r * FLOAT, total + r * FLOAT)
        _score(
            keys,
            stride,
            candidates,
            dim,
            half,
            tile,
            packed,
            vectors,
            scores,
            peaks,
            peak,
            total,
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
            if peaks_only:
                raise_to(scores + c * pitch * FLOAT, pitch, width, vectors, weight, out + c * FLOAT)
            else:
                gather(scores + c * pitch * FLOAT, pitch, width, vectors, weight, out + c * FLOAT)


@jit(parallel=True)
def _attend_peaks(
    addresses: tuple[int, int, int, int, int],
    sizes: tuple[int, int, int, int, int, int],
    half: bool,
    scale: float,
    block: int,
    workers: int,
    scratch: int,
    per_worker: int,
    outside: int,
    out: int,
) -> None:
    queries, keys, layer_stride, key_stride, head_stride = addresses
    layers, tokens, heads, kv_heads, candidates, dim = sizes
    group = heads // kv_heads
    for worker in prange(workers):
        for i in range(worker, layers * kv_heads, workers):
            layer, kv_head = divmod(i, kv_heads)
            first = layer * tokens * heads + kv_head * group
            _attend_head(
                queries + first * dim * FLOAT,
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
                0 if outside == 0 else outside + first * FLOAT,
                out + i * candidates * FLOAT,
                True,
            )


@jit(parallel=True)
def _attend_tokens(
    addresses: tuple[int, int, int, int, int],
    sizes: tuple[int, int, int, int, int, int],
    half: bool,
    scale: float,
    heads_at_once: int,
    workers: int,
    scratch: int,
    per_worker: int,
    outside: int,
    factors: int,
    partial: NDArray[np.float32],
) -> None:
    """``partial`` (sums, candidates, padded tokens) += each sum's share of the tasks."""
    queries, keys, layer_stride, key_stride, head_stride = addresses
    layers, tokens, heads, kv_heads, candidates, dim = sizes
    group = heads // kv_heads
    tasks = layers * kv_heads
    sums = partial.shape[0]
    size = partial.shape[1] * partial.shape[2]
    for worker in prange(workers):
        for one in range(worker, sums, workers):
            for i in range(tasks * one // sums, tasks * (one + 1) // sums):
                layer, kv_head = divmod(i, kv_heads)
                first = layer * tokens * heads + kv_head * group
                _attend_tokens_head(
                    queries + first * dim * FLOAT,
                    keys + layer * layer_stride + kv_head * head_stride,
                    key_stride,
                    tokens,
                    heads,
                    group,
                    candidates,
                    dim,
                    half,
                    scale,
                    heads_at_once,
                    scratch + worker * per_worker * FLOAT,
                    0 if outside == 0 else outside + first * FLOAT,
                    0 if factors == 0 else factors + i * candidates * FLOAT,
                    partial.ctypes.data + one * size * FLOAT,
                )


@jit(inline=True)
def _attend_tokens_head(
    queries: int,
    keys: int,
    stride: int,
    tokens: int,
    heads: int,
    group: int,
    candidates: int,
    dim: int,
    half: bool,
    scale: float,
    heads_at_once: int,
    scratch: int,
    outside: int,
    factors: int,
    out: int,
) -> None:
    """One kv head of one layer, as `_attend_head`, but summed over its heads alone.

    A head's tokens fill whole vectors (the last padded), so that heads add up vector by vector.
    """
    tiles = (candidates + KEYS_PER_TILE - 1) // KEYS_PER_TILE
    wide = (tokens + LANES - 1) // LANES  # vectors a head
    padded = wide * LANES
    block = heads_at_once * padded
    packed = scratch
    tile = packed + block * dim * FLOAT
    scores = tile + KEYS_PER_TILE * ((dim + 15) // 16 * 16) * FLOAT
    peaks = scores + tiles * KEYS_PER_TILE * block * FLOAT
    peak = peaks + tiles * block * FLOAT
    total = peak + block * FLOAT
    inverse = total + block * FLOAT
    weight = inverse + block * FLOAT
    for first in range(0, group, heads_at_once):
        together = min(heads_at_once, group - first)
        vectors = together * wide
        pitch = vectors * LANES
        for r in range(pitch):
            head, token = divmod(r, padded)
            source = (token * heads + first + head) * FLOAT
            to = packed + (r // LANES * dim * LANES + r % LANES) * FLOAT
            if token < tokens:
                for j in range(dim):
                    value = get(queries + source * dim + j * FLOAT)
                    put(to + j * LANES * FLOAT, np.float32(value * scale))
            else:
                for j in range(dim):
                    put(to + j * LANES * FLOAT, np.float32(0.0))
            at = 0
            if outside != 0 and token < tokens:
                at = outside + source
            begin(at, peak + r * FLOAT, total + r * FLOAT)
        _score(
            keys,
            stride,
            candidates,
            dim,
            half,
            tile,
            packed,
            vectors,
            scores,
            peaks,
            peak,
            total,
        )
        for r in range(pitch):
            share = np.float32(0.0)
            if r % padded < tokens:
                share = np.float32(1.0) / get(total + r * FLOAT)
            put(inverse + r * FLOAT, share)
        for t in range(tiles):
            c = t * KEYS_PER_TILE
            width = min(KEYS_PER_TILE, candidates - c)
            for v in range(0, pitch * FLOAT, LANES * FLOAT):
                weigh(peaks + t * pitch * FLOAT + v, peak + v, inverse + v, weight + v)
            spread(
                scores + c * pitch * FLOAT,
                pitch,
                width,
                wide,
                together,
                weight,
                0 if factors == 0 else factors + c * FLOAT,
                out + c * padded * FLOAT,
            )


@jit(parallel=True)
def _sum_all(
    addresses: tuple[int, int, int, int, int],
    sizes: tuple[int, int, int, int, int, int],
    half: bool,
    scale: float,
    block: int,
    workers: int,
    scratch: int,
    per_worker: int,
    out: NDArray[np.float32],
) -> None:
    queries, keys, layer_stride, key_stride, head_stride = addresses
    layers, tokens, heads, kv_heads, candidates, dim = sizes
    group = heads // kv_heads
    tasks = layers * kv_heads
    rows = group * tokens
    for worker in prange(workers):
        packed = scratch + worker * per_worker * FLOAT
        tile = packed + block * dim * FLOAT
        scores = tile + KEYS_PER_TILE * ((dim + 15) // 16 * 16) * FLOAT
        peaks = scores + KEYS_PER_TILE * block * FLOAT
        peak = peaks + block * FLOAT
        total = peak + block * FLOAT
        for i in range(worker, tasks, workers):
            layer, kv_head = divmod(i, kv_heads)
            asked = queries + (layer * tokens * heads + kv_head * group) * dim * FLOAT
            seen = keys + layer * layer_stride + kv_head * head_stride
            for first in range(0, rows, block):
                n = min(block, rows - first)
                vectors = (n + LANES - 1) // LANES
                pitch = vectors * LANES
                pack_rows(asked, first, n, vectors, tokens, heads, dim, scale, packed)
                for r in range(pitch):
                    begin(0, peak + r * FLOAT, total + r * FLOAT)
                for c in range(0, candidates, KEYS_PER_TILE):
                    width = min(KEYS_PER_TILE, candidates - c)
                    load_keys(seen + c * key_stride, key_stride, width, dim, half, 0, tile)
                    multiply(packed, vectors, tile, width, dim, scores, pitch)
                    for v in range(0, pitch * FLOAT, LANES * FLOAT):
                        soften(scores + v, pitch, width, peaks + v, peak + v, total + v)
                for r in range(n):
                    head, token = divmod(first + r, tokens)
                    value = get(peak + r * FLOAT) + np.log(get(total + r * FLOAT))
                    out[layer, token, kv_head * group + head] = value


COMPILED = _attend  # what `cache` looks for on disk
