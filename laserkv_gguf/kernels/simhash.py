"""SimHash collisions between queries and keys: the LSH half of LASER-KV (arXiv 2602.02199).

A signature is the signs of ``bits`` random projections (Charikar 2002): two vectors at angle
theta share one with probability (1 - theta / pi) ** bits. As in MagicPIG (arXiv 2410.16179) the
keys are centred first, since raw keys sit in a narrow cone.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numba import prange
from numpy.typing import NDArray

from laserkv_gguf.kernels._jit import jit, native_lock, threads_in_use
from laserkv_gguf.kernels._tiles import (
    FLOAT,
    KEYS_PER_TILE,
    aligned,
    block_rows,
    check,
    load_keys,
    mean_key,
    multiply,
    pack_rows,
    round_of_tasks,
    round_up,
)
from laserkv_gguf.kernels._vector import LANES, agree, collide, get, normalise, put, signs

_SCORE_BYTES = 1 << 20


def planes(head_dim: int, bits: int, tables: int, seed: int) -> NDArray[np.float32]:
    """Random hyperplanes, (tables * bits, head_dim) float32, standard Gaussian.

    Table ``t`` owns rows ``t * bits .. (t + 1) * bits``. Drawn from PCG64(seed): one seed, the
    same planes on every machine, and more tables only append rows. Raises ValueError for sizes
    below 1 or more than 64 bits.
    """
    _check_sizes(bits, tables)
    if head_dim < 1:
        raise ValueError(f"head_dim must be at least 1, got {head_dim}")
    generator = np.random.Generator(np.random.PCG64(seed))
    drawn: NDArray[np.float64] = generator.standard_normal((tables * bits, head_dim))
    return drawn.astype(np.float32)


def signatures(
    vectors: NDArray[Any], planes: NDArray[np.float32], *, bits: int
) -> NDArray[np.uint64]:
    """Sign patterns of ``vectors`` (..., head_dim): (..., words) uint64.

    ``planes`` as :func:`planes` makes them. A word holds ``64 // bits`` tables side by side, each
    in a field of ``bits`` bits, lowest first; a bit is set where the projection is >= 0, unused
    bits are 0. Raises ValueError for shapes that do not fit.
    """
    directions = np.ascontiguousarray(planes, dtype=np.float32)
    points = np.ascontiguousarray(vectors, dtype=np.float32)
    if directions.ndim != 2 or bits < 1 or directions.shape[0] % bits:
        raise ValueError(f"planes must be (tables * {bits}, head_dim), got {directions.shape}")
    if points.ndim < 1 or points.shape[-1] != directions.shape[1]:
        raise ValueError(f"vectors {points.shape} do not match head_dim {directions.shape[1]}")
    layout = _Layout(bits, directions.shape[0] // bits)
    head_dim = directions.shape[1]
    flat = points.reshape(-1, head_dim)
    codes = np.zeros((flat.shape[0], layout.words), dtype=np.uint64)
    if codes.size:
        packed = layout.pack(directions)
        scratch = aligned(KEYS_PER_TILE * (head_dim + layout.lanes) + LANES)
        with native_lock:
            _sign(
                flat.ctypes.data,
                flat.shape[0],
                head_dim,
                packed.ctypes.data,
                layout.words,
                layout.lanes_per_word,
                scratch.ctypes.data,
                codes.ctypes.data,
            )
        codes &= layout.used
    return codes.reshape(*points.shape[:-1], layout.words)


def collision_scores(
    queries: NDArray[np.float32],
    keys: NDArray[Any],
    *,
    bits: int,
    tables: int,
    seed: int,
    rule: Literal["fraction", "magicpig"] = "fraction",
) -> NDArray[np.float32]:
    """How often each candidate's key shares the queries' signatures: (candidates,) in 0 .. 1.

    Averaged over layers, heads and tokens. Counted in integers: the result depends on neither the
    number of threads nor their order.

    Args:
        queries: (layers, tokens, heads, head_dim) float32, not centred.
        keys: (layers, candidates, kv_heads, head_dim) float32 or float16, centred here per
            (layer, kv head) by their mean over the candidates.
        bits: Bits a table, 1 .. 64.
        tables: Hash tables (R); one set of planes for all layers and heads, see :func:`planes`.
        seed: Seed of the planes.
        rule: What a (layer, head, token) gives a candidate. ``fraction``: the share of tables
            that collide. ``magicpig``: 1 if at least two collide, else 0 (arXiv 2410.16179,
            section 4).

    Raises:
        ValueError: Shapes or sizes do not fit.
        TypeError: Another dtype.
    """
    tensors = check(queries, keys)
    _check_sizes(bits, tables)
    if rule not in ("fraction", "magicpig"):
        raise ValueError(f"rule must be 'fraction' or 'magicpig', got {rule!r}")
    binary = rule == "magicpig"
    least = 2 if binary else 1
    if tensors.candidates == 0 or tensors.asked == 0:
        return np.zeros(tensors.candidates, dtype=np.float32)
    layout = _Layout(bits, tables)
    packed = layout.pack(planes(tensors.dim, bits, tables, seed))
    workers = threads_in_use()
    pitch = round_up(tensors.candidates, 8)
    counts = np.zeros((workers, pitch), dtype=np.int64)
    per_worker = (
        round_up(
            KEYS_PER_TILE * (tensors.dim + layout.lanes)
            + 3 * tensors.dim  # mean, and its float64 sums
            + 2 * layout.words * (pitch + KEYS_PER_TILE),  # codes of keys and of queries
            16,
        )
        + 64
    )
    scratch = aligned(workers * per_worker)
    with native_lock:
        _count(
            tensors.addresses,
            tensors.sizes,
            tensors.half,
            (packed.ctypes.data, layout.words, layout.lanes_per_word),
            (layout.low, layout.high.ctypes.data, tables, least, int(binary)),
            workers,
            scratch.ctypes.data,
            per_worker,
            pitch,
            counts,
        )
    whole = tensors.asked * (1 if binary else tables)
    share: NDArray[np.float64] = counts.sum(axis=0)[: tensors.candidates] / whole
    return share.astype(np.float32)


def analytic_collisions(
    queries: NDArray[np.float32], keys: NDArray[Any], *, bits: int
) -> NDArray[np.float32]:
    """What :func:`collision_scores` (rule ``fraction``) tends to with ever more tables.

    The mean over layers, heads and tokens of (1 - theta / pi) ** bits, theta the angle between
    the query and the centred key; a vector of norm 0 is at pi / 2. Shapes, dtypes and errors as
    there; (candidates,) float32 in 0 .. 1. ``bits`` is 1 .. 64.
    """
    tensors = check(queries, keys)
    _check_sizes(bits, 1)
    if tensors.candidates == 0 or tensors.asked == 0:
        return np.zeros(tensors.candidates, dtype=np.float32)
    workers = threads_in_use()
    tasks = tensors.layers * tensors.kv_heads
    # One tile of scores is all that is ever needed; the rows' block only bounds their packing.
    rows = block_rows(tensors.rows, KEYS_PER_TILE, _SCORE_BYTES // 8)
    per_worker = round_up(
        rows * (tensors.dim + 1)
        + KEYS_PER_TILE * (round_up(tensors.dim, 16) + rows)
        + 3 * round_up(tensors.dim, 16),
        16,
    )
    scratch = aligned(workers * per_worker)
    total = np.zeros(tensors.candidates, dtype=np.float64)
    at_once = round_of_tasks(tasks, tensors.layers, workers)
    partial = np.empty((at_once, tensors.candidates), dtype=np.float32)
    with native_lock:
        _expect(
            tensors.addresses,
            tensors.sizes,
            tensors.half,
            bits,
            rows,
            workers,
            scratch.ctypes.data,
            per_worker,
            partial,
            total,
        )
    return (total / tensors.asked).astype(np.float32)


def _check_sizes(bits: int, tables: int) -> None:
    if not 1 <= bits <= 64:
        raise ValueError(f"bits must be 1 .. 64, got {bits}")
    if tables < 1:
        raise ValueError(f"tables must be at least 1, got {tables}")


class _Layout:
    """Where the tables' fields lie in 64-bit words, and the masks that compare them."""

    def __init__(self, bits: int, tables: int) -> None:
        _check_sizes(bits, tables)
        self.bits = bits
        self.fields = 64 // bits
        self.words = -(-tables // self.fields)
        self.lanes_per_word = round_up(min(self.fields, tables) * bits, LANES)
        self.lanes = self.words * self.lanes_per_word
        ones = (1 << bits) - 1
        low = sum((ones >> 1) << (f * bits) for f in range(self.fields))
        self.low = low - (1 << 64) if low >> 63 else low  # as int64
        self.high = np.zeros(self.words, dtype=np.uint64)
        self.used = np.zeros(self.words, dtype=np.uint64)
        for word in range(self.words):
            held = min(self.fields, tables - word * self.fields)
            self.high[word] = sum(1 << (f * bits + bits - 1) for f in range(held))
            self.used[word] = (1 << (held * bits)) - 1

    def pack(self, directions: NDArray[np.float32]) -> NDArray[np.float32]:
        """Planes as rows of :func:`multiply`: every word's planes start a vector of their own."""
        dim = directions.shape[1]
        slots = np.zeros((self.words, self.lanes_per_word, dim), dtype=np.float32)
        step = self.fields * self.bits
        for word in range(self.words):
            part = directions[word * step : (word + 1) * step]
            slots[word, : len(part)] = part
        packed = aligned(slots.size).reshape(-1, dim, LANES)
        packed[...] = slots.reshape(-1, LANES, dim).transpose(0, 2, 1)
        return packed


@jit(inline=True)
def _sign_rows(
    source: int,
    stride: int,
    n: int,
    dim: int,
    half: bool,
    mean: int,
    planes: int,
    words: int,
    lanes_per_word: int,
    tile: int,
    products: int,
    out: int,
    row_step: int,
    word_step: int,
) -> None:
    """Codes of up to one tile of vectors; word w of vector i goes to i, w steps past ``out``."""
    lanes = words * lanes_per_word
    load_keys(source, stride, n, dim, half, mean, tile)
    multiply(planes, lanes // LANES, tile, n, dim, products, lanes)
    for i in range(n):
        for w in range(words):
            signs(
                products + (i * lanes + w * lanes_per_word) * FLOAT,
                lanes_per_word // LANES,
                out + i * row_step + w * word_step,
            )


@jit()
def _sign(
    vectors: int,
    count: int,
    dim: int,
    planes: int,
    words: int,
    lanes_per_word: int,
    scratch: int,
    codes: int,
) -> None:
    tile = scratch + KEYS_PER_TILE * words * lanes_per_word * FLOAT
    for i in range(0, count, KEYS_PER_TILE):
        _sign_rows(
            vectors + i * dim * FLOAT,
            dim * FLOAT,
            min(KEYS_PER_TILE, count - i),
            dim,
            False,
            0,
            planes,
            words,
            lanes_per_word,
            tile,
            scratch,
            codes + i * words * 8,
            words * 8,
            8,
        )


@jit(parallel=True)
def _count(
    addresses: tuple[int, int, int, int, int],
    sizes: tuple[int, int, int, int, int, int],
    half: bool,
    hashing: tuple[int, int, int],
    rule: tuple[int, int, int, int, int],
    workers: int,
    scratch: int,
    per_worker: int,
    pitch: int,
    counts: NDArray[np.int64],
) -> None:
    for worker in prange(workers):
        _count_share(
            addresses,
            sizes,
            half,
            hashing,
            rule,
            worker,
            workers,
            scratch + worker * per_worker * FLOAT,
            pitch,
            counts.ctypes.data + worker * pitch * 8,
        )


@jit(inline=True)
def _count_share(
    addresses: tuple[int, int, int, int, int],
    sizes: tuple[int, int, int, int, int, int],
    half: bool,
    hashing: tuple[int, int, int],
    rule: tuple[int, int, int, int, int],
    worker: int,
    workers: int,
    scratch: int,
    pitch: int,
    counts: int,
) -> None:
    """One worker's kv heads: sign the keys, then the queries tile by tile, and compare."""
    queries, keys, layer_stride, key_stride, head_stride = addresses
    layers, tokens, heads, kv_heads, candidates, dim = sizes
    planes, words, lanes_per_word = hashing
    low, high, tables, least, binary = rule
    group = heads // kv_heads
    products = scratch
    tile = products + KEYS_PER_TILE * words * lanes_per_word * FLOAT
    sums = (tile + KEYS_PER_TILE * dim * FLOAT + 7) // 8 * 8
    mean = sums + dim * 8
    key_codes = (mean + dim * FLOAT + 63) // 64 * 64
    query_codes = key_codes + words * pitch * 8
    for task in range(worker, layers * kv_heads, workers):
        layer, kv_head = divmod(task, kv_heads)
        source = keys + layer * layer_stride + kv_head * head_stride
        mean_key(source, key_stride, candidates, dim, half, tile, sums, mean)
        for c in range(0, candidates, KEYS_PER_TILE):
            _sign_rows(
                source + c * key_stride,
                key_stride,
                min(KEYS_PER_TILE, candidates - c),
                dim,
                half,
                mean,
                planes,
                words,
                lanes_per_word,
                tile,
                products,
                key_codes + c * 8,
                8,
                pitch * 8,
            )
        for h in range(group):
            first = queries + (layer * tokens * heads + kv_head * group + h) * dim * FLOAT
            for t in range(0, tokens, KEYS_PER_TILE):
                n = min(KEYS_PER_TILE, tokens - t)
                stride = heads * dim * FLOAT
                _sign_rows(
                    first + t * stride,
                    stride,
                    n,
                    dim,
                    False,
                    0,
                    planes,
                    words,
                    lanes_per_word,
                    tile,
                    products,
                    query_codes,
                    words * 8,
                    8,
                )
                for i in range(n):
                    query = query_codes + i * words * 8
                    collide(
                        key_codes, pitch, words, query, low, high, tables, least, binary, counts
                    )


@jit(parallel=True)
def _expect(
    addresses: tuple[int, int, int, int, int],
    sizes: tuple[int, int, int, int, int, int],
    half: bool,
    bits: int,
    block: int,
    workers: int,
    scratch: int,
    per_worker: int,
    partial: NDArray[np.float32],
    total: NDArray[np.float64],
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
                _expect_head(
                    queries + (layer * tokens * heads + kv_head * group) * dim * FLOAT,
                    keys + layer * layer_stride + kv_head * head_stride,
                    key_stride,
                    tokens,
                    heads,
                    group * tokens,
                    candidates,
                    dim,
                    half,
                    bits,
                    block,
                    scratch + worker * per_worker * FLOAT,
                    partial.ctypes.data + i * candidates * FLOAT,
                )
        for i in range(count):  # in the tasks' order, for one result with any number of threads
            for c in range(candidates):
                total[c] += partial[i, c]


@jit(inline=True)
def _expect_head(
    queries: int,
    keys: int,
    stride: int,
    tokens: int,
    heads: int,
    rows: int,
    candidates: int,
    dim: int,
    half: bool,
    bits: int,
    block: int,
    scratch: int,
    out: int,
) -> None:
    """One kv head of one layer: (1 - theta / pi) ** bits, its rows summed into ``out``."""
    packed = scratch
    weight = packed + block * dim * FLOAT
    tile = weight + block * FLOAT
    table = tile + KEYS_PER_TILE * ((dim + 15) // 16 * 16) * FLOAT
    sums = table + KEYS_PER_TILE * block * FLOAT
    mean = sums + dim * 8
    mean_key(keys, stride, candidates, dim, half, tile, sums, mean)
    for c in range(candidates):
        put(out + c * FLOAT, np.float32(0.0))
    for first in range(0, rows, block):
        n = min(block, rows - first)
        vectors = (n + LANES - 1) // LANES
        pitch = vectors * LANES
        pack_rows(queries, first, n, vectors, tokens, heads, dim, 1.0, packed)
        for r in range(pitch):
            at = packed + (r // LANES * dim * LANES + r % LANES) * FLOAT
            square = 0.0
            for j in range(dim):
                value = np.float64(get(at + j * LANES * FLOAT))
                square += value * value
            factor = 1.0 / np.sqrt(square) if square > 0.0 else 0.0
            for j in range(dim):
                to = at + j * LANES * FLOAT
                put(to, np.float32(get(to) * factor))
            put(weight + r * FLOAT, np.float32(1.0 if r < n else 0.0))
        for c in range(0, candidates, KEYS_PER_TILE):
            width = min(KEYS_PER_TILE, candidates - c)
            load_keys(keys + c * stride, stride, width, dim, half, mean, tile)
            for i in range(width):
                normalise(tile + i * dim * FLOAT, dim)
            multiply(packed, vectors, tile, width, dim, table, pitch)
            agree(table, pitch, width, vectors, bits, weight, out + c * FLOAT)


COMPILED = _count  # what `cache` looks for on disk
