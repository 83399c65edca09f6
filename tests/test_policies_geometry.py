"""Policies that look at keys, values and norms, against a few lines of NumPy from their papers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny import TinySpec, make, random_tokens

from laserkv_gguf import kernels, policies
from laserkv_gguf.errors import UserError
from laserkv_gguf.kernels import geometry
from laserkv_gguf.llama.chat import Prompt
from laserkv_gguf.llama.context import Context, ContextOptions
from laserkv_gguf.llama.model import Model
from laserkv_gguf.policies import Candidates, Held, checked
from laserkv_gguf.policies.lagkv import _standing_out as standing_out
from laserkv_gguf.policies.laser import PAPER_OPTIONS
from laserkv_gguf.policies.quest import bounds
from laserkv_gguf.reading.asking import ProbeSettings
from laserkv_gguf.reading.reader import Reader

FIRST = 40  # the sequence's number of the first candidate
BACK = 20  # candidates before the block
WINDOW = 10  # tokens after the candidates
SHAPES = [(1, 90, 2, 1, 16), (2, 70, 4, 4, 8), (3, 200, 6, 2, 32)]  # layers, C, heads, kv, dim
SEEDS = range(3)
NAMES = ["lagkv", "keydiff", "quest", "compactor", "dbudgetkv", "laser", "kvzip", "expected"]
SMALL: dict[str, dict[str, Any]] = {  # options that make partitions of few candidates
    "lagkv": {"lag": 16},
    "quest": {"page": 8},
    "compactor": {"chunk": 32, "sketch": 8},
    "dbudgetkv": {"threshold": 0.1},
    "kvzip": {"values": "norm", "chunk": 20},
    "expected": {"future": 10, "queries": 20},
}

Array = NDArray[Any]


def seen(
    seed: int, shape: tuple[int, int, int, int, int], first: int = FIRST, dtype: Any = np.float32
) -> Candidates:
    """Random candidates: some of before the block, the block's, and a window after them."""
    layers, count, heads, kv_heads, dim = shape
    rng = np.random.default_rng([seed, *shape])
    # keys lie in a cone, as real ones do
    keys = rng.normal(size=(layers, count + WINDOW, kv_heads, dim)) + 1.5 * rng.normal(size=dim)
    values = rng.normal(size=(layers, count + WINDOW, kv_heads, dim)).astype(dtype)
    keys, tokens = keys.astype(dtype), np.arange(first, first + count + WINDOW)
    block = first + BACK, first + max(count, BACK) + WINDOW
    return Candidates(
        tokens[:count],
        block,
        queries=rng.normal(size=(layers, 5, heads, dim)).astype(np.float32),
        keys=keys[:, :count],
        values=values[:, :count],
        block_queries=rng.normal(size=(layers, block[1] - block[0], heads, dim)).astype(dtype),
        held=Held(tokens, tokens, 0, keys, values),
        value_norms=np.linalg.norm(values[:, :count].astype(np.float32), axis=3),
        repeated=rng.random((layers, count, kv_heads)).astype(np.float32),
        outside=rng.normal(4, 2, (layers, 5, heads)).astype(np.float32),
    )


def changed(candidates: Candidates, **arrays: Array) -> Candidates:
    """With other arrays; of changed keys and values nothing is held but the candidates."""
    held: dict[str, Any] = {"held": None} if arrays.keys() & {"keys", "values"} else {}
    return Candidates(**{**vars(candidates), **held, **arrays})


def chosen(name: str, candidates: Candidates, budget: int, **options: Any) -> list[int]:
    policy = policies.make(name, **options)
    candidates = changed(candidates, memory={})
    kept = checked(policy, policy.select(candidates, budget), candidates, budget)
    assert len(kept) >= 1
    return kept.tolist()


def best(scores: Array, budget: int) -> list[int]:
    return sorted(np.argsort(-scores, kind="stable")[:budget].tolist())


def softmax(logits: Array) -> Array:
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def standard(scores: Array) -> Array:
    return (scores - scores.mean()) / scores.std()


def pairs(candidates: Candidates) -> Iterator[tuple[Array, Array, Array]]:
    """Probe queries (tokens, dim), keys and the block's queries of every head of every layer."""
    assert candidates.queries is not None
    assert candidates.keys is not None
    assert candidates.block_queries is not None
    group = candidates.queries.shape[2] // candidates.keys.shape[2]
    for layer in range(len(candidates.keys)):
        for head in range(candidates.queries.shape[2]):
            yield (
                candidates.queries[layer, :, head].astype(float),
                candidates.keys[layer, :, head // group].astype(float),
                candidates.block_queries[layer, :, head].astype(float),
            )


def each(array: Array | None) -> Iterator[Array]:
    """(tokens, dim) of every kv head of every layer."""
    assert array is not None
    for layer in array.astype(float):
        yield from layer.transpose(1, 0, 2)


# ---- references ----------------------------------------------------------------------------------


def keydiff_reference(keys_of_all: Array, count: int) -> Array:
    """Of the first `count` keys, against the mean of all."""
    total = np.zeros(keys_of_all.shape[1])
    for keys in each(keys_of_all):
        unit = keys / np.linalg.norm(keys, axis=1, keepdims=True)
        mean = unit.mean(axis=0)
        total -= keys @ mean / np.linalg.norm(keys, axis=1) / np.linalg.norm(mean)
    return total[:count]


def leverage_reference(candidates: Candidates, sketch: int, seed: int) -> Array:
    """Of the sketched keys: squared row norms of an orthonormal basis, by a ridge kept small."""
    assert candidates.keys is not None
    layers, count, kv_heads, dim = candidates.keys.shape
    gaussian = np.random.Generator(np.random.PCG64(seed)).standard_normal((dim, sketch))
    scores = []
    for keys in each(candidates.keys):
        x = (keys - keys.mean(axis=0)) @ gaussian / np.sqrt(sketch)
        left, values, _ = np.linalg.svd(x, full_matrices=False)
        scores.append((left**2 * (values**2 / (values**2 + 0.01))).sum(axis=1))
    by_layer = np.reshape(scores, (layers, kv_heads, count))
    return sum((standard(layer).sum(axis=0) for layer in by_layer), np.zeros(count))


def compactor_attention_reference(candidates: Candidates, chunk: int) -> Array:
    assert candidates.queries is not None
    assert candidates.keys is not None
    assert candidates.values is not None
    layers, count, kv_heads, _ = candidates.keys.shape
    group = candidates.queries.shape[2] // kv_heads
    values = [value for value in each(candidates.values) for _ in range(group)]
    found = []
    for (_, keys, queries), value in zip(pairs(candidates), values, strict=True):
        score = np.zeros(count)
        for start in range(0, count, chunk):
            part = np.arange(start, min(start + chunk, count))
            rows = part[part >= BACK] - BACK  # where in the block those candidates are
            if len(rows) == 0:
                rows = np.arange(len(part))
            score[part] = softmax(queries[rows] @ keys[part].T).sum(0) * len(part) / len(rows)
        score *= np.sqrt((value**2).sum(axis=1))
        near = [range(max(i - 1, 0), min(i + 2, count)) for i in range(count)]
        found.append(np.array([score[list(i)].mean() for i in near]))
    by_layer = np.reshape(found, (layers, kv_heads, -1, count)).mean(axis=2)
    return sum((standard(layer).sum(axis=0) for layer in by_layer), np.zeros(count))


def lagkv_reference(candidates: Candidates, budget: int, lag: int) -> list[int]:
    """Partitions one by one; top-k pro rata, what is left to the best among the next in rank."""
    count, held = candidates.count, candidates.around
    edges = [lag * i for i in range(max(count // lag, 1))] + [count]
    ranked = []
    for p in range(len(edges) - 1):
        other = slice(edges[p + 1], edges[p + 1] + lag)  # into the window after the last one
        score = np.zeros(edges[p + 1] - edges[p])
        for array in (held.keys, held.values):
            for state in each(array):
                reference = state[other]
                low, high = reference.min(axis=0), reference.max(axis=0)
                normal = (state[edges[p] : edges[p + 1]] - low) / (high - low)
                score += softmax(normal.std(axis=1, ddof=1))
        order = np.argsort(-score, kind="stable")
        size = len(score)
        ranked += [
            (rank / size, -score[i] * size, edges[p] + int(i)) for rank, i in enumerate(order)
        ]
    return sorted(token for *_, token in sorted(ranked)[:budget])


def quest_reference(candidates: Candidates, page: int, skip: int = 2) -> Array:
    pages = np.arange(0, candidates.count, page)
    scores = np.zeros(len(pages))
    assert candidates.queries is not None
    layers, _, heads, dim = candidates.queries.shape
    for number, (queries, keys, _) in enumerate(pairs(candidates)):
        if layers > skip and number < skip * heads:
            continue
        upper = np.empty((len(queries), len(pages)))
        for i, start in enumerate(pages):
            rows = keys[start : start + page]
            low, high = rows.min(axis=0), rows.max(axis=0)
            upper[:, i] = np.maximum(queries * low, queries * high).sum(axis=1) / np.sqrt(dim)
        scores += softmax(upper).max(axis=0)
    return scores


def dbudgetkv_reference(candidates: Candidates, threshold: float, order: str) -> list[int]:
    """One token after another is dropped, from the least important on, until the norm shows it."""
    heads = [softmax(q @ k.T / np.sqrt(k.shape[1])) for q, k, _ in pairs(candidates)]
    ranked = list(range(candidates.count))
    if order == "attention":
        ranked = np.argsort(sum(a.sum(axis=0) for a in heads)).tolist()

    def norm(tokens: list[int]) -> float:
        return float(np.mean([np.linalg.norm(a[:, tokens]) for a in heads]))

    full = norm(ranked)
    while len(ranked) > 1 and (full - norm(ranked[1:])) / full <= threshold:
        ranked = ranked[1:]
    return ranked


def magicpig_reference(candidates: Candidates, bits: int, tables: int, seed: int) -> Array:
    total = np.zeros(candidates.count)
    for queries, keys, _ in pairs(candidates):
        planes = kernels.planes(keys.shape[1], bits, tables, seed).astype(float)
        asked, held = (
            (x @ planes.T >= 0).reshape(-1, tables, bits)
            for x in (queries, keys - keys.mean(axis=0))
        )
        hits = (asked[:, None] == held[None]).all(axis=3).sum(axis=2)
        total += (hits >= 2).sum(axis=0)
    return total


def analytic_reference(candidates: Candidates, bits: int) -> Array:
    total = np.zeros(candidates.count)
    for queries, keys, _ in pairs(candidates):
        unit = [
            x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, keys - keys.mean(0))
        ]
        total += ((1 - np.arccos(np.clip(unit[0] @ unit[1].T, -1, 1)) / np.pi) ** bits).sum(axis=0)
    return total


# ---- the papers' formulas ------------------------------------------------------------------------

every = pytest.mark.parametrize("shape", SHAPES, ids=str)
seeds = pytest.mark.parametrize("seed", SEEDS)


@every
@seeds
def test_keydiff(seed: int, shape: Any) -> None:
    one = seen(seed, shape)
    for budget in (1, one.count // 4, one.count - 1):
        scores = keydiff_reference(one.around.keys, one.count)
        assert chosen("keydiff", one, budget) == best(scores, budget)


@every
@seeds
@pytest.mark.parametrize("lag", [16, 32, 128])
def test_lagkv(seed: int, shape: Any, lag: int) -> None:
    """Remainders after the last partition, and fewer candidates than one partition, included."""
    one = seen(seed, shape)
    for budget in (1, one.count // 4, one.count - 1):
        assert chosen("lagkv", one, budget, lag=lag) == lagkv_reference(one, budget, lag)


def test_lagkv_without_a_window() -> None:
    """The last partition is held against the one before; a lone one against itself."""
    one = changed(seen(0, (2, 80, 2, 2, 8)), held=None)
    assert one.keys is not None
    assert one.values is not None
    # as if the next partition were what in fact stands before
    more = Held(
        np.arange(FIRST, FIRST + 96),
        np.arange(FIRST, FIRST + 96),
        0,
        *(np.concatenate((a, a[:, 48:64]), axis=1) for a in (one.keys, one.values)),
    )
    assert chosen("lagkv", one, 20, lag=16) == chosen("lagkv", changed(one, held=more), 20, lag=16)
    short = seen(0, (2, 10, 2, 2, 8))
    alone = changed(short, held=None)
    twice = Held(
        np.arange(FIRST, FIRST + 20),
        np.arange(FIRST, FIRST + 20),
        0,
        *(np.concatenate((a, a), axis=1) for a in (alone.keys, alone.values)),
    )
    assert chosen("lagkv", alone, 4) == chosen("lagkv", changed(alone, held=twice), 4)


def test_lagkv_gives_every_partition_its_share() -> None:
    kept = np.array(chosen("lagkv", seen(0, (2, 80, 2, 2, 8)), 22, lag=16))
    shares = np.bincount(kept // 16, minlength=5)
    assert set(shares.tolist()) == {4, 5}


def test_lagkv_keeps_the_sinks() -> None:
    one = seen(0, (2, 80, 2, 2, 8), first=3)
    assert chosen("lagkv", one, 30)[:13] == list(range(13))
    assert chosen("lagkv", one, 5) == list(range(5))
    later = seen(0, (2, 80, 2, 2, 8), first=16)
    assert chosen("lagkv", later, 30) == lagkv_reference(later, 30, 128)
    only = seen(0, (1, 4, 1, 1, 8), first=0)
    assert chosen("lagkv", only, 3) == [0, 1, 2]


def test_lagkv_and_a_channel_that_is_always_the_same() -> None:
    """It has no range to be divided by, and stands at 0: as if it had one and stood at its foot."""
    one = seen(0, (2, 80, 2, 2, 8))
    assert one.keys is not None
    same = one.keys[0].copy()
    same[..., 3] = 7
    ranged = same.copy()
    ranged[31, :, 3] = 8
    scores = standing_out(same[:16], same[16:32])
    assert np.ptp(scores) > 0.01
    assert np.array_equal(scores, standing_out(same[:16], ranged[16:32]))


@every
@seeds
@pytest.mark.parametrize("page", [16, 7, 128])
def test_quest(seed: int, shape: Any, page: int) -> None:
    one = seen(seed, shape)
    for skip in (2, 0, 1):
        ranked = np.argsort(-quest_reference(one, page, skip), kind="stable").tolist()
        tokens = [t for p in ranked for t in range(p * page, min((p + 1) * page, one.count))]
        for budget in (1, min(page, one.count - 1), one.count // 4, one.count - 1):
            assert chosen("quest", one, budget, page=page, skip=skip) == sorted(tokens[:budget])


def test_quest_bounds_are_bounds() -> None:
    one = seen(1, SHAPES[2])
    index = policies.make("quest").index(one)
    assert one.queries is not None
    found = [bounds(*layer) for layer in zip(one.queries, index["low"], index["high"], strict=True)]
    for (queries, keys, _), upper in zip(pairs(one), np.concatenate(found), strict=True):
        products = queries @ keys.T / np.sqrt(keys.shape[1])
        assert (np.repeat(upper, 16, axis=1)[:, : one.count] >= products - 1e-6).all()


@every
@seeds
@pytest.mark.parametrize("options", [{}, {"blending": 2.0, "sketch": 6, "chunk": 32, "seed": 5}])
def test_compactor(seed: int, shape: Any, options: dict[str, Any]) -> None:
    one, used = (
        seen(seed, shape),
        {"blending": None, "sketch": 48, "chunk": 256, "seed": 0} | options,
    )
    leverage = leverage_reference(one, used["sketch"], used["seed"])
    attention = compactor_attention_reference(one, used["chunk"])
    for budget in (1, one.count // 4, one.count - 1):
        blending = used["blending"]
        if blending is None:  # the share that goes
            blending = (one.count - budget) / (one.count + WINDOW)
        scores = blending * leverage + attention
        assert chosen("compactor", one, budget, **options) == best(scores, budget)


@every
@seeds
@pytest.mark.parametrize("order", ["position", "attention"])
@pytest.mark.parametrize("threshold", [0.01, 0.2, 0.7])
def test_dbudgetkv(seed: int, shape: Any, order: str, threshold: float) -> None:
    """Unbounded, one token after another; then with the ceiling, which keeps the best of those."""
    one, options = seen(seed, shape), {"threshold": threshold, "order": order}
    ranked = dbudgetkv_reference(one, threshold, order)
    assert chosen("dbudgetkv", one, one.count, **options) == sorted(ranked)
    for budget in (1, len(ranked) // 2 or 1, len(ranked), min(len(ranked) + 1, one.count - 1)):
        assert chosen("dbudgetkv", one, budget, **options) == sorted(ranked[-budget:])


def test_dbudgetkv_keeps_little_where_little_matters() -> None:
    """All queries look at one key: with that in front, 1% of the norm is in all others."""
    one = seen(0, (2, 60, 2, 1, 16))
    assert one.queries is not None
    assert one.keys is not None
    queries, keys = np.zeros_like(one.queries), np.zeros_like(one.keys)
    queries[..., 0], keys[:, 37, :, 0] = 1.2, 20
    one = changed(one, queries=queries, keys=keys)
    assert chosen("dbudgetkv", one, 30, order="attention") == [37]
    assert chosen("dbudgetkv", one, 30) == list(range(37, 60))
    assert chosen("dbudgetkv", one, 30, threshold=0.0, order="attention") != [37]


def test_dbudgetkv_keeps_what_it_may_where_attention_says_nothing() -> None:
    one = seen(0, SHAPES[0])
    nothing = changed(one, keys=np.full_like(one.keys, np.nan))
    assert chosen("dbudgetkv", nothing, 30) == list(range(60, 90))


def laser_reference(one: Candidates, budget: int, scores: Array) -> list[int]:
    mass = sum(softmax(q @ k.T / np.sqrt(k.shape[1])).sum(axis=0) for q, k, _ in pairs(one))
    exact = best(mass, budget // 2)
    rest = [i for i in range(one.count) if i not in exact]
    return sorted(exact + [rest[i] for i in best(scores[rest], budget - budget // 2)])


@every
@seeds
def test_laser_rules_and_residuals(seed: int, shape: Any) -> None:
    one = seen(seed, shape)
    cases = [
        ({"rule": "magicpig", "hash_bits": 3, "hash_tables": 9}, magicpig_reference(one, 3, 9, 4)),
        ({"rule": "analytic", "hash_bits": 5}, analytic_reference(one, 5)),
        ({"residual": "keydiff"}, keydiff_reference(one.keys, one.count)),
        ({"residual": "leverage"}, leverage_reference(one, 48, 4)),
        ({"residual": "leverage", "rule": "analytic"}, leverage_reference(one, 48, 4)),
    ]
    for options, scores in cases:
        options = {**PAPER_OPTIONS, "rule": "fraction", "alpha": 0.5, "seed": 4, **options}
        assert chosen("laser", one, 30, **options) == laser_reference(one, 30, scores)
    pooled = chosen("magicpig", one, 30, pool=7, residual="keydiff")
    assert pooled == best(kernels.pool(keydiff_reference(one.keys, one.count), 7), 30)


def test_laser_unchanged_by_default() -> None:
    one = seen(0, SHAPES[0])
    assert one.queries is not None
    assert one.keys is not None
    scores = kernels.collision_scores(one.queries, one.keys, bits=8, tables=32, seed=0)
    assert chosen("magicpig", one, 20, pool=1) == best(scores, 20)


# ---- what no paper speaks of ---------------------------------------------------------------------


def assert_fits(name: str, candidates: Candidates, budget: int, **options: Any) -> list[int]:
    kept = chosen(name, candidates, budget, **options)  # distinct, in range, not too many
    assert len(kept) == budget or policies.find(name).flexible
    return kept


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [0.0, 1.0, 60000.0, np.nan, np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_keys_without_differences(name: str, value: float, dtype: Any) -> None:
    one = seen(0, SHAPES[1], dtype=dtype)
    same = np.full_like(one.keys, value)
    for arrays in ({"keys": same}, {"keys": same, "values": same}):
        for budget in (1, 30, one.count - 1):
            assert_fits(name, changed(one, **arrays), budget)
            assert_fits(name, changed(one, **arrays), budget, **SMALL.get(name, {}))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["keys", "values", "queries", "block_queries"])
def test_numbers_that_are_none(name: str, bad: float, where: str) -> None:
    one = seen(1, SHAPES[1])
    array = getattr(one, where).copy()
    array[1, 3, 0, 2] = bad
    array[0, -2, -1] = bad
    for budget in (1, 30, one.count - 1):
        assert_fits(name, changed(one, **{where: array}), budget, **SMALL.get(name, {}))


@pytest.mark.parametrize("name", ["lagkv", "keydiff", "compactor", "expected"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_one_bad_key_loses_and_spoils_no_other(name: str, bad: float) -> None:
    """The others are chosen nearly as if it were not there; here: all of them, before it."""
    one = seen(2, SHAPES[1])
    assert one.keys is not None
    keys = one.keys.copy()
    keys[0, 33, 0, 1] = bad
    kept = chosen(name, changed(one, keys=keys), one.count - 5, **SMALL.get(name, {}))
    assert 33 not in kept or name == "lagkv"
    without = set(chosen(name, one, 20, **SMALL.get(name, {}))) - {33}
    spoiled = set(chosen(name, changed(one, keys=keys), 20, **SMALL.get(name, {})))
    assert 33 not in spoiled
    assert len(without & spoiled) >= 16


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("count", [2, 3, 15, 16, 17, 33])
def test_few_candidates(name: str, count: int) -> None:
    """Fewer than a page, a partition, a chunk and a sketch; budget 1 and all but one."""
    one = seen(0, (2, count, 4, 2, 8))
    for budget in {1, count // 2, count - 1}:
        assert_fits(name, one, budget)
        assert_fits(name, one, budget, **SMALL.get(name, {}))


@pytest.mark.parametrize("name", NAMES)
def test_float16(name: str) -> None:
    """Half-precision keys, values and queries choose as the same numbers in float32."""
    half = changed(seen(3, SHAPES[2], dtype=np.float16), held=None)
    wide = changed(
        half,
        **{k: getattr(half, k).astype(np.float32) for k in ("keys", "values", "block_queries")},
    )
    for budget in (1, 50, half.count - 1):
        options = SMALL.get(name, {})
        assert chosen(name, half, budget, **options) == chosen(name, wide, budget, **options)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_written_to(name: str) -> None:
    """Captured arrays are read-only views of larger ones."""
    one = seen(0, SHAPES[1], dtype=np.float16)
    for kind in ("keys", "values", "queries", "block_queries"):
        whole = np.repeat(getattr(one, kind), 2, axis=1)
        view = whole[:, : getattr(one, kind).shape[1]]
        view.flags.writeable = False
        one = changed(one, **{kind: view})
    assert_fits(name, one, 20, **SMALL.get(name, {}))


@pytest.mark.parametrize("name", NAMES)
def test_only_what_is_needed_is_looked_at(name: str) -> None:
    one, needs = seen(0, SHAPES[1]), policies.find(name).needs
    kinds = ("keys", "values", "queries", "block_queries")
    wanted = {kind for kind in kinds if getattr(needs, kind)}
    if needs.collisions:  # without a device to count them they are counted here
        wanted.add("keys")
    asked = {kind: getattr(one, kind) if kind in wanted else None for kind in kinds}
    given = {kind: getattr(one.held, kind) if kind in wanted else None for kind in kinds[:2]}
    asked["held"] = replace(one.held, **given)
    assert chosen(name, changed(one, **asked), 20) == chosen(name, one, 20)
    policies.make(name).warm_up()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("lagkv", {"lag": 1}),
        ("lagkv", {"sinks": -1}),
        ("quest", {"page": 0}),
        ("quest", {"skip": -1}),
        ("compactor", {"blending": -0.1}),
        ("compactor", {"blending": np.nan}),
        ("compactor", {"sketch": 0}),
        ("compactor", {"chunk": 0}),
        ("compactor", {"sinks": -1}),
        ("compactor", {"recent": 0}),
        ("compactor", {"share": "some"}),
        ("dbudgetkv", {"threshold": 1.0}),
        ("dbudgetkv", {"threshold": -0.01}),
        ("dbudgetkv", {"threshold": np.nan}),
        ("dbudgetkv", {"order": "newest"}),
        ("kvzip", {"values": "length"}),
        ("kvzip", {"shares": "some"}),
        ("kvzip", {"chunk": 0}),
        ("kvzip", {"sinks": -1}),
        ("kvzip", {"recent": 0}),
        ("expected", {"values": "length"}),
        ("expected", {"shares": "some"}),
        ("expected", {"epsilon": -0.1}),
        ("expected", {"epsilon": np.nan}),
        ("expected", {"future": 0}),
        ("expected", {"queries": -1}),
        ("expected", {"sinks": -1}),
        ("expected", {"recent": 0}),
        ("laser", {"rule": "simhash"}),
        ("laser", {"residual": "hash"}),
    ],
)
def test_options_out_of_range(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(options))} is .*; give") as raised:
        policies.make(name, **options)
    assert "\n" not in str(raised.value)


def test_attention_of_nothing() -> None:
    nothing = np.full((2, 4), np.nan, np.float32)
    assert not geometry.attention(nothing, np.ones((3, 4), np.float32), 1.0).any()


# ---- the engine ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    path, _, _ = make(tmp_path_factory.mktemp("tiny"), spec=TinySpec())
    with Model(path, gpu_layers=0, extra_buffers=False) as model:
        yield model


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, SMALL.get(name, {})) for name in NAMES if name != "laser"),
        ("dbudgetkv", {"threshold": 0.6, "order": "attention"}),
        ("kvzip", {"shares": "equal", "chunk": 20}),
        ("kvzip", {"shares": "whole", "values": "output", "pool": 3}),
        ("expected", {"shares": "equal", "values": "output"}),
        ("expected", {"shares": "whole", "values": "none", "covariance": False}),
        ("laser", {"rule": "analytic", "alpha": 0.5}),
        ("laser", {"rule": "magicpig", "alpha": 0.5}),
        ("laser", {"residual": "keydiff", "alpha": 0.5}),
        ("laser", {"residual": "leverage", "alpha": 0.5}),
    ],
    ids=str,
)
@pytest.mark.parametrize("asked", [True, False], ids=["question", "none"])
def test_in_the_engine(name: str, options: dict[str, Any], asked: bool, model: Model) -> None:
    """Four blocks on llama.cpp: what is kept is what the partition says."""
    tokens = random_tokens(194, TinySpec()).astype(np.int32)
    document, question = tokens[:180], Prompt(tokens[180:], ending=4) if asked else None
    policy = policies.make(name, **options)
    budget = policy.budget(180, 48, 0.4, 4)
    assert len(budget.blocks) == 4
    cache = ContextOptions(batch_size=64, ubatch_size=16, threads=1, outputs=64, flash_attn="off")
    kept: list[list[int]] = []
    for _ in range(2):
        with Context(model, 512, cache) as context:
            reader = Reader(context, policy, ProbeSettings(lookahead=3, observation=6))
            reading = reader.read(document, budget, question)
        kept.append(reading.kept.tolist())
    assert kept[0] == kept[1]  # one seed, one choice
    protected = [*range(budget.anchors), *range(180 - budget.window, 180)]
    assert set(protected) < set(kept[0])
    if policy.flexible:
        assert len(kept[0]) <= budget.kept
        assert (len(kept[0]) < budget.kept) == (options.get("threshold") == 0.6)
    else:
        assert len(kept[0]) == budget.kept
