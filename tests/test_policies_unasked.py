"""`kvzip` and `expected` on made-up candidates: their formulas, and what must not matter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from laserkv_gguf import kernels, policies
from laserkv_gguf.llama.rope import Rotation
from laserkv_gguf.policies import Candidates, Held

Array = NDArray[Any]
LAYERS, HEADS, KV, DIM, COUNT, BEFORE, AFTER = 2, 4, 2, 8, 40, 3, 5
ANGLES = 100.0 ** -(np.arange(DIM // 2) / (DIM // 2))
FACTS = settings(max_examples=20, deadline=None, derandomize=True)
SEEDS = st.integers(0, 10_000)


def made(seed: int, shift: int = 0) -> Candidates:
    """Anchors, candidates with gaps among their positions, and a window; as if `shift` further."""
    rng = np.random.default_rng(seed)
    total = BEFORE + COUNT + AFTER
    tokens = np.sort(rng.choice(4 * total, total, replace=False))
    plain = rng.normal(size=(LAYERS, total, KV, DIM))
    asked = rng.normal(size=(LAYERS, 12, HEADS, DIM)) + 0.5
    keys = turned(plain, tokens + shift).astype(np.float32)
    mine = slice(BEFORE, BEFORE + COUNT)
    return Candidates(
        tokens[mine],
        (int(tokens[-12]), int(tokens[-1]) + 1),
        keys=keys[:, mine],
        block_queries=turned(asked, tokens[-12:] + shift).astype(np.float32),
        value_norms=rng.uniform(0.1, 2, size=(LAYERS, COUNT, KV)).astype(np.float32),
        repeated=rng.random((LAYERS, COUNT, KV)).astype(np.float32),
        held=Held(tokens, tokens + shift, BEFORE, keys),
        rotation=Rotation(ANGLES, halves=True),
    )


def turned(vectors: Array, positions: Array) -> Array:
    """(layers, n, heads, dim) turned by RoPE in halves, as complex numbers."""
    half = DIM // 2
    numbers = vectors[..., :half] + 1j * vectors[..., half:]
    numbers = numbers * np.exp(1j * positions[:, None] * ANGLES)[:, None]
    return np.concatenate((numbers.real, numbers.imag), axis=-1)


def best(scores: Array, count: int) -> Array:
    return np.sort(np.argsort(-scores, kind="stable")[:count])


def expected_scores(seen: Candidates, epsilon: float, future: int, covariance: bool) -> Array:
    """Equations 7 to 10 of arXiv 2510.00636, with every position to come on its own."""
    held = seen.around
    at = held.positions[-seen.block_queries.shape[1] :]
    plain = turned(seen.block_queries.astype(float), -at)
    ahead = held.positions[-1] + 1 + np.arange(future)
    axes = np.broadcast_to(np.eye(DIM)[:, None], (DIM, 1, DIM))[None]  # (1, axis, 1, dim)
    turn = np.mean([turned(axes, np.full(DIM, where))[0, :, 0].T for where in ahead], axis=0)
    scores = np.zeros(COUNT)
    for layer in range(LAYERS):
        for kv in range(KV):
            keys, heads = held.keys[layer, BEFORE:, kv].astype(float), range(2 * kv, 2 * kv + 2)
            paid = np.zeros(len(keys))
            for head in heads:
                queries = plain[layer, :, head]
                logits = keys @ (turn @ queries.mean(axis=0)) / np.sqrt(DIM)
                if covariance:
                    spread = turn @ np.cov(queries.T, bias=True) @ turn.T
                    logits += np.array([k @ spread @ k for k in keys]) / (2 * DIM)
                weights = np.exp(logits - logits.max())
                paid += weights / weights.sum() / len(heads)
            scores += (paid[:COUNT] + epsilon) * seen.value_norms[layer, :, kv]
    return scores


@FACTS
@given(SEEDS, st.integers(1, COUNT - 1), st.sampled_from([1, 3, 7]))
def test_kvzip_ranks_what_repeating_paid(seed: int, budget: int, pool: int) -> None:
    seen = made(seed)
    plain = seen.repeated.astype(float).sum(axis=(0, 2))
    weighed = (seen.repeated.astype(float) * seen.value_norms).sum(axis=(0, 2))
    for values, scores in (("none", plain), ("norm", weighed)):
        pooled = kernels.pool(scores, pool, seen.tokens)
        chosen = policies.make("kvzip", values=values, pool=pool).select(seen, budget)
        assert np.array_equal(chosen, best(pooled, budget))


@FACTS
@given(SEEDS, st.integers(1, COUNT - 1))
def test_kvzip_knows_no_order_of_layers_and_no_scale(seed: int, budget: int) -> None:
    seen, policy = made(seed), policies.make("kvzip")
    chosen = policy.select(seen, budget)
    other = replace(seen, repeated=np.ascontiguousarray(seen.repeated[::-1, :, ::-1]) * 4)
    assert np.array_equal(policy.select(other, budget), chosen)
    # what nothing looks at is never kept before what something looks at
    paid = seen.repeated.copy()
    paid[:, 7] = 0
    assert 7 not in policy.select(replace(seen, repeated=paid), COUNT - 1)


@pytest.mark.parametrize("covariance", [True, False])
@pytest.mark.parametrize("epsilon", [0.0, 0.02])
@pytest.mark.parametrize("seed", range(4))
def test_expected_is_the_formula(seed: int, epsilon: float, covariance: bool) -> None:
    seen = made(seed)
    scores = expected_scores(seen, epsilon, 70, covariance)
    policy = policies.make("expected", epsilon=epsilon, future=70, covariance=covariance)
    for budget in (1, 10, COUNT - 1):
        assert np.array_equal(policy.select(seen, budget), best(scores, budget))


@FACTS
@given(SEEDS, st.integers(1, 1000))
def test_expected_sees_distances_alone(seed: int, shift: int) -> None:
    """Where a text begins does not matter to what is chosen of it."""
    policy = policies.make("expected", future=20)
    assert np.array_equal(policy.select(made(seed), 12), policy.select(made(seed, shift), 12))


@FACTS
@given(SEEDS)
def test_expected_of_one_query_is_its_attention(seed: int) -> None:
    """No spread and one position: the softmax that the query pays, standing there."""
    seen = made(seed)
    one = replace(seen, block_queries=seen.block_queries[:, -1:])
    policy = policies.make("expected", values="none", future=1)
    asked = turned(one.block_queries.astype(float), np.array([1]))  # one position further on
    logits = np.einsum("lhd,lchd->lch", asked[:, 0], np.repeat(seen.around.keys[:, BEFORE:], 2, 2))
    weights = np.exp(logits / np.sqrt(DIM))
    paid = (weights / weights.sum(axis=1, keepdims=True)).sum(axis=(0, 2))[:COUNT]
    assert np.array_equal(policy.select(one, 9), best(paid, 9))


@FACTS
@given(SEEDS, st.integers(1, COUNT - 1))
def test_a_large_epsilon_leaves_the_lengths(seed: int, budget: int) -> None:
    seen = made(seed)
    chosen = policies.make("expected", epsilon=1e6).select(seen, budget)
    assert np.array_equal(chosen, best(seen.value_norms.astype(float).sum(axis=(0, 2)), budget))
