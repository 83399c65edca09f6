"""The kernels against plain NumPy, and the identities they must keep."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

from laserkv_gguf.kernels import _vector as vector
from laserkv_gguf.kernels import (
    analytic_collisions,
    attention_by_layer,
    attention_consensus,
    attention_peaks,
    collision_scores,
    planes,
    pool,
    set_threads,
    signatures,
    threads,
    top_k,
)
from laserkv_gguf.kernels._jit import jit, threads_in_use

Array = NDArray[Any]

# layers, tokens, heads, kv heads, candidates, head_dim
SHAPES = {
    "grouped": (3, 5, 6, 2, 77, 64),
    "one kv head": (2, 7, 4, 1, 40, 32),
    "heads == kv heads": (2, 3, 4, 4, 33, 16),
    "one candidate": (2, 3, 4, 2, 1, 32),
    "one probe token": (3, 1, 6, 3, 65, 64),
    "one of everything": (1, 1, 1, 1, 1, 1),
    "odd head_dim": (2, 3, 2, 1, 50, 37),
    "many rows": (1, 70, 8, 2, 130, 48),
    "a tile exactly": (2, 4, 4, 2, 64, 80),
}
FACTS = settings(max_examples=40, deadline=None)


def make(shape: tuple[int, ...], seed: int = 0, size: float = 1.0) -> tuple[Array, Array]:
    layers, tokens, heads, kv_heads, candidates, dim = shape
    rng = np.random.default_rng(seed)
    queries = rng.standard_normal((layers, tokens, heads, dim), dtype=np.float32) * size
    keys = rng.standard_normal((layers, candidates, kv_heads, dim), dtype=np.float32)
    return queries.astype(np.float32), keys + np.float32(0.5)


def spread(keys: Array, heads: int) -> Array:
    return np.repeat(keys.astype(np.float64), heads // keys.shape[2], axis=2)


def plain_attention(queries: Array, keys: Array) -> Array:
    """(layers, candidates)"""
    logits = np.einsum(
        "lthd,lchd->lhtc", queries.astype(np.float64), spread(keys, queries.shape[2])
    )
    logits *= queries.shape[-1] ** -0.5
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return (weights / weights.sum(-1, keepdims=True)).sum((1, 2))


def centred(keys: Array) -> Array:
    wide = keys.astype(np.float64)
    return wide - wide.mean(axis=1, keepdims=True)


def plain_equal(queries: Array, keys: Array, bits: int, tables: int, seed: int) -> Array:
    """(layers, heads, tokens, candidates): how many tables collide."""
    directions = planes(queries.shape[-1], bits, tables, seed).astype(np.float64)
    mine = queries.astype(np.float64) @ directions.T >= 0
    theirs = spread(centred(keys), queries.shape[2]) @ directions.T >= 0
    mine = mine.reshape(*mine.shape[:3], tables, bits).transpose(0, 2, 1, 3, 4)
    theirs = theirs.reshape(*theirs.shape[:3], tables, bits).transpose(0, 2, 1, 3, 4)
    return (mine[:, :, :, None] == theirs[:, :, None]).all(-1).sum(-1)


def plain_analytic(queries: Array, keys: Array, bits: int) -> Array:
    wide = spread(centred(keys), queries.shape[2])
    dots = np.einsum("lthd,lchd->lhtc", queries.astype(np.float64), wide)
    norms = np.einsum("lth,lch->lhtc", *(np.linalg.norm(x, axis=-1) for x in (queries, wide)))
    cosine = np.divide(dots, norms, out=np.zeros_like(dots), where=norms > 1e-30)
    return ((1 - np.arccos(np.clip(cosine, -1, 1)) / np.pi) ** bits).mean((0, 1, 2))


def close(got: Array, want: Array, tolerance: float = 1e-4) -> None:
    assert got.dtype == np.float32
    assert got.shape == want.shape
    assert np.isfinite(got).all()
    error = np.abs(got - want).max() / np.abs(want).max()
    assert error < tolerance, f"relative to the largest: {error}"


# --- attention ---------------------------------------------------------------------------------


@pytest.mark.parametrize("half", [False, True], ids=["f32", "f16"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_attention_is_plain_attention(shape: tuple[int, ...], half: bool) -> None:
    queries, keys = make(shape, size=2.0)
    if half:
        keys = keys.astype(np.float16)
    want = plain_attention(queries, keys)
    close(attention_by_layer(queries, keys), want)
    close(attention_consensus(queries, keys), want.sum(0))


@pytest.mark.parametrize("half", [False, True], ids=["f32", "f16"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_peaks_are_the_largest_of_a_group(shape: tuple[int, ...], half: bool) -> None:
    """In parts, beside other keys; a softmax that is no number takes no part."""
    layers, tokens, heads, kv_heads, candidates, dim = shape
    queries, keys = make(shape)
    keys = keys.astype(np.float16 if half else np.float32)
    beside = np.random.default_rng(5).normal(size=queries.shape[:3]).astype(np.float32)
    logits = np.einsum("lthd,lchd->lthc", queries.astype(float), spread(keys, heads)) / dim**0.5
    weights = np.exp(logits) / (np.exp(beside)[..., None] + np.exp(logits).sum(-1, keepdims=True))
    want = weights.reshape(layers, tokens, kv_heads, -1, candidates).max(axis=(1, 3))
    got = np.zeros((layers, kv_heads, candidates), np.float32)
    cut = tokens // 2
    for part in (slice(cut), slice(cut, tokens)):
        assert attention_peaks(queries[:, part], keys, got, outside=beside[:, part]) is got
    close(got, want)
    bad = np.full((layers, 1, heads, dim), np.nan, np.float32)
    close(attention_peaks(bad, keys, got), want)
    with pytest.raises(ValueError, match="out must be"):
        attention_peaks(queries, keys, got[:, :, :-1])


def test_attention_over_many_blocks_of_rows() -> None:
    # 600 rows x 3,000 candidates is more than one block of scores.
    queries, keys = make((1, 150, 4, 1, 3000, 16), size=2.0)
    close(attention_consensus(queries, keys), plain_attention(queries, keys).sum(0))


@pytest.mark.parametrize("half", [False, True], ids=["f32", "f16"])
def test_keys_may_be_slices(half: bool) -> None:
    queries, keys = make((3, 4, 6, 2, 90, 64))
    if half:
        keys = keys.astype(np.float16)
    whole = np.full((9, 200, 2, 64), np.nan, dtype=keys.dtype)
    for view in (whole[1:7:2, 20:110], whole[::-3, 5:185:2], whole[2:5, 189:99:-1]):
        view[...] = keys
        for run in (
            lambda k: attention_consensus(queries, k),
            lambda k: collision_scores(queries, k, bits=4, tables=5, seed=1),
            lambda k: analytic_collisions(queries, k, bits=4),
        ):
            np.testing.assert_array_equal(run(view), run(keys))
        view[...] = np.nan
    # Last axes in another order: copied, not misread.
    swapped = np.ascontiguousarray(keys.transpose(0, 3, 2, 1)).transpose(0, 3, 2, 1)
    np.testing.assert_array_equal(
        attention_consensus(queries, swapped), attention_consensus(queries, keys)
    )


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_huge_logits(size: float) -> None:
    queries, keys = make((2, 3, 4, 2, 100, 32))
    logits = np.einsum("lthd,lchd->lhtc", queries, spread(keys, 4)) * 32**-0.5
    # At this size float32 knows logits to about 1e-3: give each a clear winner, far from the rest.
    queries *= np.float32(size / np.abs(logits).max())
    got, want = attention_consensus(queries, keys), plain_attention(queries, keys).sum(0)
    close(got, want, 5e-3)
    assert got.sum() == pytest.approx(2 * 4 * 3, rel=1e-5)
    assert got.max() >= 1.0


def test_equal_keys_share_equally() -> None:
    queries, keys = make((2, 3, 4, 2, 50, 32))
    keys[:] = keys[:, :1]
    np.testing.assert_allclose(attention_consensus(queries, keys), 24 / 50, rtol=1e-5)
    # Centred they are zero, on the positive side of every plane and at right angles to all.
    np.testing.assert_allclose(analytic_collisions(queries, keys, bits=3), 0.125, rtol=1e-5)
    np.testing.assert_allclose(
        collision_scores(queries, keys, bits=3, tables=4, seed=0),
        (plain_equal(queries, keys * 0, 3, 4, 0) / 4).mean(),
        rtol=1e-5,
    )


def test_one_answer_for_any_number_of_threads() -> None:
    queries, keys = make((5, 9, 6, 3, 200, 64))
    before = threads_in_use()

    def scores() -> list[Array]:
        return [
            attention_by_layer(queries, keys),
            attention_consensus(queries, keys),
            collision_scores(queries, keys, bits=6, tables=7, seed=3),
            analytic_collisions(queries, keys, bits=6),
        ]

    try:
        assert set_threads(10**6) >= 1
        many = scores()
        assert set_threads(0) == 1 == threads_in_use()
        for alone, together in zip(scores(), many, strict=True):
            np.testing.assert_array_equal(alone, together)
    finally:
        set_threads(before)


def test_threads_inside_and_after() -> None:
    """Of the calling thread's kernels, and of BLAS; both as before afterwards."""

    def blas() -> list[int]:
        info = ThreadpoolController().info()
        return [pool["num_threads"] for pool in info if pool["user_api"] == "blas"]

    before, outside = threads_in_use(), blas()
    assert outside
    with threads(1):
        assert threads_in_use() == 1
        assert set(blas()) == {1}
    assert (threads_in_use(), blas()) == (before, outside)


def test_float16_is_widened_exactly() -> None:
    @jit()
    def widen(source: int, count: int, out: int) -> None:
        vector.widen(source, count, out)

    every = np.arange(65536, dtype=np.uint16).view(np.float16)
    for count in (65536, 65533, 3):
        out = np.zeros(count, dtype=np.float32)
        widen(every.ctypes.data, count, out.ctypes.data)
        np.testing.assert_array_equal(out, every[:count].astype(np.float32))


small = st.tuples(
    st.integers(1, 3), st.integers(1, 6), st.integers(1, 3), st.integers(1, 2),
    st.integers(1, 80), st.sampled_from([1, 8, 20, 64]),
).map(lambda s: (s[0], s[1], s[2] * s[3], s[3], s[4], s[5]))  # fmt: skip
seeds = st.integers(0, 2**32)


@FACTS
@given(small, seeds, st.sampled_from([0.01, 1.0, 30.0]))
def test_attention_sums_to_one_a_row(shape: tuple[int, ...], seed: int, size: float) -> None:
    queries, keys = make(shape, seed, size)
    layers, tokens, heads = shape[:3]
    got = attention_by_layer(queries, keys)
    np.testing.assert_allclose(got.sum(1), heads * tokens, rtol=1e-4)
    assert (got >= 0).all()
    assert attention_consensus(queries, keys).sum() == pytest.approx(
        layers * heads * tokens, rel=1e-4
    )


@FACTS
@given(small, seeds)
def test_order_of_candidates_is_only_an_order(shape: tuple[int, ...], seed: int) -> None:
    queries, keys = make(shape, seed)
    order = np.random.default_rng(seed).permutation(shape[4])
    for run in (
        lambda k: attention_consensus(queries, k),
        lambda k: analytic_collisions(queries, k, bits=5),
    ):
        np.testing.assert_allclose(run(keys[:, order]), run(keys)[order], rtol=2e-3, atol=1e-5)


@FACTS
@given(small, seeds)
def test_rotating_everything_changes_nothing(shape: tuple[int, ...], seed: int) -> None:
    queries, keys = make(shape, seed)
    dim = shape[-1]
    turn, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((dim, dim)))
    turned_q, turned_k = ((x.astype(np.float64) @ turn).astype(np.float32) for x in (queries, keys))
    close(attention_consensus(turned_q, turned_k), attention_consensus(queries, keys))
    # Near 0 and pi the angle is the square root of a rounding error.
    close(
        analytic_collisions(turned_q, turned_k, bits=4),
        analytic_collisions(queries, keys, bits=4),
        2e-3 if dim > 1 and shape[4] > 2 else 1.0,
    )


# --- SimHash -----------------------------------------------------------------------------------


def test_planes_are_fixed_by_the_seed() -> None:
    first = planes(64, 8, 4, 7)
    assert first.shape == (32, 64)
    assert first.dtype == np.float32
    np.testing.assert_array_equal(first, planes(64, 8, 4, 7))
    np.testing.assert_array_equal(first, planes(64, 8, 9, 7)[:32])
    assert not np.array_equal(first, planes(64, 8, 4, 8))
    # Pinned: a change of generator would silently change every user's answers.
    np.testing.assert_allclose(
        planes(2, 1, 2, 0), [[0.12573022, -0.13210486], [0.64042264, 0.10490012]], rtol=1e-6
    )


@pytest.mark.parametrize(("bits", "tables"), [(1, 70), (3, 5), (10, 13), (16, 4), (33, 3), (64, 2)])
def test_signatures_are_signs(bits: int, tables: int) -> None:
    rng = np.random.default_rng(bits)
    vectors = rng.standard_normal((3, 41, 24), dtype=np.float32)
    vectors[0, 0] = 0
    directions = planes(24, bits, tables, 5)
    got = signatures(vectors, directions, bits=bits)
    signs = vectors.astype(np.float64) @ directions.astype(np.float64).T >= 0
    fields = 64 // bits
    want = np.zeros((3, 41, -(-tables // fields)), dtype=np.uint64)
    for table in range(tables):
        for bit in range(bits):
            place = np.uint64(table % fields * bits + bit)
            want[..., table // fields] |= signs[..., table * bits + bit].astype(np.uint64) << place
    assert got.dtype == np.uint64
    np.testing.assert_array_equal(got, want)
    assert signatures(vectors[:0], directions, bits=bits).shape == (0, *want.shape[1:])


@FACTS
@given(seeds, st.integers(1, 64), st.integers(1, 20), st.sampled_from([1e-6, 0.25, 2.0, 3e7]))
def test_signatures_know_only_directions(seed: int, bits: int, tables: int, size: float) -> None:
    vectors = np.random.default_rng(seed).standard_normal((9, 20), dtype=np.float32)
    directions = planes(20, bits, tables, seed)
    mine = signatures(vectors, directions, bits=bits)
    np.testing.assert_array_equal(mine, signatures(vectors.copy(), directions, bits=bits))
    # Powers of two scale without rounding; others may flip a projection that is 0 to rounding.
    exact = np.float32(2.0 ** np.round(np.log2(size)))
    np.testing.assert_array_equal(mine, signatures(vectors * exact, directions, bits=bits))
    # The opposite vector differs in every bit (no projection is exactly 0 here).
    used = np.zeros_like(mine[:1])
    for table in range(tables):
        shift = table % (64 // bits) * bits
        used[0, table // (64 // bits)] |= np.uint64(((1 << bits) - 1) << shift)
    np.testing.assert_array_equal(
        mine ^ signatures(-vectors, directions, bits=bits), used + 0 * mine
    )


@pytest.mark.parametrize("half", [False, True], ids=["f32", "f16"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_collisions_are_counted(shape: tuple[int, ...], half: bool) -> None:
    queries, keys = make(shape, 3)
    if half:
        keys = keys.astype(np.float16)
    for bits, tables in ((4, 10), (1, 67), (11, 7)):
        equal = plain_equal(queries, keys, bits, tables, 9)
        # A projection that is 0 to rounding may fall on either side: allow one such in all.
        slack = 1.5 / equal[..., 0].size
        hashed: dict[str, Any] = {"bits": bits, "tables": tables, "seed": 9}

        def compare(got: Array, want: Array, slack: float = slack) -> None:
            assert got.dtype == np.float32
            error = np.abs(got - want.mean((0, 1, 2)))
            assert (error > 1e-6).sum() <= 1
            assert error.max() < slack

        compare(collision_scores(queries, keys, **hashed), equal / tables)
        compare(collision_scores(queries, keys, rule="magicpig", **hashed), equal >= 2)


@pytest.mark.parametrize("half", [False, True], ids=["f32", "f16"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("bits", [1, 8, 13, 64])
def test_analytic_collisions(shape: tuple[int, ...], half: bool, bits: int) -> None:
    queries, keys = make(shape, 4)
    queries[0, 0, 0] = 0
    if half:
        keys = keys.astype(np.float16)
    close(analytic_collisions(queries, keys, bits=bits), plain_analytic(queries, keys, bits))


def test_collisions_know_the_angle() -> None:
    # Two candidates: centred, they are opposite. A query along one meets it always.
    keys = np.zeros((1, 2, 1, 4), dtype=np.float32)
    keys[0, 0, 0] = [3, 5, 5, 5]
    keys[0, 1, 0] = [1, 5, 5, 5]
    queries = np.array([2, 0, 0, 0], dtype=np.float32).reshape(1, 1, 1, 4)
    np.testing.assert_array_equal(analytic_collisions(queries, keys, bits=7), [1, 0])
    np.testing.assert_array_equal(
        collision_scores(queries, keys, bits=7, tables=20, seed=0), [1, 0]
    )


def test_sampled_collisions_tend_to_the_analytic() -> None:
    queries, keys = make((1, 2, 2, 1, 40, 32), 8)
    want = analytic_collisions(queries, keys, bits=2)

    def error(tables: int) -> float:
        runs = [
            collision_scores(queries, keys, bits=2, tables=tables, seed=s) - want for s in range(12)
        ]
        return float(np.sqrt(np.mean(np.square(runs))))

    few, more, many = error(16), error(256), error(4096)
    # 1 / sqrt(tables): a factor of 4 each time, within what 12 seeds allow.
    assert 2.8 < few / more < 5.6
    assert 2.8 < more / many < 5.6
    assert many < 0.01 < few


def test_seeds() -> None:
    queries, keys = make(SHAPES["grouped"])
    once, again, other = (
        collision_scores(queries, keys, bits=6, tables=8, seed=s) for s in (1, 1, 2)
    )
    np.testing.assert_array_equal(once, again)
    assert not np.array_equal(once, other)


# --- no candidates, no tokens, wrong arguments ---------------------------------------------------

SCORERS = {
    "attention": attention_consensus,
    "collisions": lambda q, k: collision_scores(q, k, bits=4, tables=3, seed=0),
    "analytic": lambda q, k: analytic_collisions(q, k, bits=4),
}


@pytest.mark.parametrize("score", SCORERS.values(), ids=SCORERS.keys())
def test_edges(score: Any) -> None:
    queries, keys = make((2, 3, 4, 2, 5, 8))
    assert score(queries, keys[:, :0]).shape == (0,)
    np.testing.assert_array_equal(score(queries[:, :0], keys), np.zeros(5))
    np.testing.assert_array_equal(score(queries[:0], keys[:0]), np.zeros(5))
    for q, k in (
        (queries[0], keys),
        (queries, keys[:1]),
        (queries[..., :4], keys),
        (queries[:, :, :3], keys),
        (queries[:, :, :0], keys),
        (queries, keys[:, :, :0]),
        (queries[..., :0], keys[..., :0]),
    ):
        with pytest.raises(ValueError, match=r"must|differ|share"):
            score(q, k)
    for q, k in ((queries.astype(np.float64), keys), (queries, keys.astype(np.float64))):
        with pytest.raises(TypeError, match="float"):
            score(q, k)


@pytest.mark.parametrize("half", [False, True])
def test_bad_keys_never_crash(half: bool) -> None:
    queries, keys = make((2, 3, 4, 2, 70, 16))
    for bad in (np.nan, np.inf, -np.inf, 6e4):
        spoilt = keys.copy()
        spoilt[1, 40, 1, 3] = bad
        spoilt = spoilt.astype(np.float16) if half else spoilt
        for score in SCORERS.values():
            assert score(queries, spoilt).shape == (70,)


def test_wrong_sizes_are_refused() -> None:
    queries, keys = make(SHAPES["one candidate"])
    for bits, tables in ((0, 1), (65, 1), (4, 0)):
        with pytest.raises(ValueError, match=r"bits|tables"):
            collision_scores(queries, keys, bits=bits, tables=tables, seed=0)
    with pytest.raises(ValueError, match="bits"):
        analytic_collisions(queries, keys, bits=0)
    with pytest.raises(ValueError, match="rule"):
        collision_scores(queries, keys, bits=4, tables=2, seed=0, rule="any")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="head_dim"):
        planes(0, 1, 1, 0)
    with pytest.raises(ValueError, match="planes"):
        signatures(queries, planes(32, 4, 2, 0), bits=3)
    with pytest.raises(ValueError, match="head_dim"):
        signatures(queries, planes(31, 4, 2, 0), bits=4)


# --- top_k and pool ------------------------------------------------------------------------------

values = st.sampled_from([0.0, -0.0, 1.0, 1.0, 2.5, -3.0, np.nan, np.inf, -np.inf, 1e-40])


@settings(max_examples=300, deadline=None)
@given(st.lists(values, max_size=30), st.integers(-2, 35))
@example([], 3)
@example([np.nan, np.nan, 1.0], 2)
@example([-np.inf, np.nan, -np.inf], 2)
def test_top_k_is_a_stable_sort(scores: list[float], k: int) -> None:
    def key(i: int) -> tuple[float, int]:
        return (np.inf if np.isnan(scores[i]) else -scores[i], i)

    want = sorted(sorted(range(len(scores)), key=key)[: max(k, 0)])
    for dtype in (np.float32, np.float64):
        got = top_k(np.array(scores, dtype=dtype), k)
        assert got.dtype == np.int64
        assert got.tolist() == want


def test_top_k_details() -> None:
    assert top_k(np.array([3, 1, 3, 2]), 2).tolist() == [0, 2]
    assert top_k(np.zeros(6, dtype=np.float16), 3).tolist() == [0, 1, 2]
    scores = np.array([np.nan, 1.0])
    top_k(scores, 1)
    assert np.isnan(scores[0])  # not changed
    with pytest.raises(ValueError, match="axis"):
        top_k(np.zeros((2, 2)), 1)


@settings(max_examples=200, deadline=None)
@given(st.lists(values, max_size=25), st.integers(0, 15).map(lambda n: 2 * n + 1))
def test_pool_averages_the_neighbours_that_exist(scores: list[float], width: int) -> None:
    got = pool(np.array(scores, dtype=np.float32), width)
    half = width // 2
    with np.errstate(invalid="ignore"):
        want = [
            np.mean(np.float64(np.float32(scores[max(0, i - half) : i + half + 1])))
            for i in range(len(scores))
        ]
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, np.array(want, dtype=np.float32), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("width", [1, 3, 7, 15])
@pytest.mark.parametrize("seed", range(4))
def test_pool_does_not_average_over_gaps(width: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    at = np.sort(rng.choice(60, 25, replace=False))
    scores = rng.normal(size=25).astype(np.float32)
    truth = [scores[np.abs(at - place) <= width // 2].mean() for place in at]
    np.testing.assert_allclose(pool(scores, width, at), truth, rtol=1e-4, atol=1e-6)
    whole = np.arange(25) + 100
    np.testing.assert_array_equal(pool(scores, width, whole), pool(scores, width))


def test_pool_details() -> None:
    scores = np.array([6.0, 0.0, 3.0], dtype=np.float32)
    for width in (1, 0, -4):
        same = pool(scores, width)
        np.testing.assert_array_equal(same, scores)
        assert not np.shares_memory(same, scores)
    assert pool(scores, 3).tolist() == [3.0, 3.0, 1.5]  # zero padding would give 2, 3, 1
    with pytest.raises(ValueError, match="odd"):
        pool(scores, 4)
    with pytest.raises(ValueError, match="axis"):
        pool(np.zeros((2, 2)), 3)
    with pytest.raises(ValueError, match="3 scores cannot be at"):
        pool(np.zeros(3), 3, np.arange(2))
