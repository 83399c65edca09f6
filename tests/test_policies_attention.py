"""Policies that choose by attention, against their papers' formulas in plain NumPy.

The references take whole tensors in float64 and know neither kernels nor llama.cpp. The same ones
decide, on a NumPy forward pass that cannot see what was evicted, what a run must keep. Runs with a
question, against a model of our own, are in test_policies_originals.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny import Tiny, TinySpec, forward, make, random_tokens, visibility

from laserkv_gguf import policies
from laserkv_gguf.budget import Budget
from laserkv_gguf.errors import UserError
from laserkv_gguf.llama.chat import Prompt
from laserkv_gguf.llama.context import Context, ContextOptions
from laserkv_gguf.llama.model import Model
from laserkv_gguf.policies import Candidates, Held, checked, h2o
from laserkv_gguf.policies.chunkkv import ChunkKV
from laserkv_gguf.policies.pyramidkv import PyramidKV
from laserkv_gguf.reading.reader import Reader

# ---- the papers' formulas ----------------------------------------------------------------------

Array = NDArray[Any]
Reference = Callable[..., Array]


def softmax(scores: Array) -> Array:
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def logits(queries: Array, keys: Array) -> Array:
    """(layers, heads, tokens, candidates)"""
    keys = np.repeat(keys.astype(float), queries.shape[2] // keys.shape[2], axis=2)
    products = np.einsum("lthd,lchd->lhtc", queries.astype(float), keys)
    return products / np.sqrt(queries.shape[-1])


def attention(seen: Candidates, last: int = 0) -> Array:
    """A softmax over all that is seen, of which the candidates get this."""
    scores = logits(seen.queries[:, -last:], seen.keys)
    beside = seen.outside[:, -last:].astype(float).transpose(0, 2, 1)[..., None]
    return softmax(np.concatenate((beside, scores), axis=-1))[..., 1:]


def best(scores: Array, count: int) -> Array:
    return np.sort(np.argsort(-scores, kind="stable")[:count])


def largest(scores: Array, width: int) -> Array:
    """Of the neighbours there are, along the last axis."""
    half, count = width // 2, scores.shape[-1]
    spans = [slice(max(0, i - half), i + half + 1) for i in range(count)]
    return np.stack([scores[..., span].max(axis=-1) for span in spans], axis=-1)


def snapkv(seen: Candidates, budget: int, pool: int = 7) -> Array:
    heads = largest(attention(seen).sum(axis=2), pool)
    return best(heads.sum(axis=(0, 1)), budget)


def pyramidkv(seen: Candidates, budget: int, pool: int = 7, beta: float = 20.0) -> Array:
    layers = largest(attention(seen).sum(axis=2), pool).sum(axis=1)
    top = len(layers) - 1
    high = budget / beta
    low = 2 * budget - high
    if low > seen.count:
        low, high = seen.count, 2 * budget - seen.count
    shares = [round(low - (low - high) / top * layer) for layer in range(top + 1)]
    order = [np.argsort(-scores, kind="stable").tolist() for scores in layers]
    total = layers.sum(axis=0)
    rank = [
        (
            min(
                (ranked.index(i) + 1) / share if share else np.inf
                for ranked, share in zip(order, shares, strict=True)
            ),
            -total[i],
        )
        for i in range(seen.count)
    ]
    return np.sort(sorted(range(seen.count), key=rank.__getitem__)[:budget])


def heavy_hitters(seen: Candidates, budget: int) -> Array:
    held = seen.around
    scores = logits(seen.block_queries, held.keys)
    total = np.zeros(len(held.tokens))
    for row, token in enumerate(range(*seen.block)):
        past = held.tokens <= token
        if past.any():
            total[past] += softmax(scores[:, :, row][..., past]).sum(axis=(0, 1))
    return best(total[held.first :][: seen.count], budget)


def last_query(seen: Candidates, budget: int) -> Array:
    return best(attention(seen, last=1)[:, :, 0].mean(axis=(0, 1)), budget)


def finch(seen: Candidates, budget: int) -> Array:
    return best(attention(seen).mean(axis=(0, 1, 2)), budget)


def chunkkv(seen: Candidates, budget: int, chunk: int = 10) -> Array:
    scores = attention(seen).sum(axis=(0, 1, 2))
    chunks = [range(seen.count)[start : start + chunk] for start in range(0, seen.count, chunk)]
    chunks.sort(key=lambda tokens: -np.mean([scores[i] for i in tokens]))
    return np.sort([i for tokens in chunks for i in tokens][:budget])


REFERENCES: dict[str, Reference] = {
    "snapkv": snapkv,
    "pyramidkv": pyramidkv,
    "h2o": heavy_hitters,
    "tova": last_query,
    "finch": finch,
    "sage": last_query,
    "chunkkv": chunkkv,
}
every = pytest.mark.parametrize("name", REFERENCES)
# of those that pool, for tests where neighbours would be as good as the best
UNPOOLED: dict[str, dict[str, Any]] = {"snapkv": {"pool": 1}, "pyramidkv": {"pool": 1}}

# ---- on random tensors -------------------------------------------------------------------------

# layers, asking tokens, heads, kv heads, head_dim, previous window, block, new window
SHAPES = [
    (2, 5, 4, 2, 8, 0, 60, 7),
    (3, 12, 6, 2, 16, 11, 83, 11),
    (5, 1, 3, 3, 32, 4, 48, 1),
    (1, 33, 8, 1, 8, 20, 120, 20),
]


def random_candidates(
    seed: int, shape: tuple[int, ...] = SHAPES[1], dtype: Any = np.float32, scale: float = 1.5
) -> Candidates:
    layers, asking, heads, kv_heads, dim, before, block, window = shape
    rng = np.random.default_rng(seed)
    # before the candidates first tokens that are held as well, and after them the window
    tokens = np.concatenate((np.arange(5), np.arange(300 - before, 300 + block)))

    def normal(*sizes: int) -> Array:
        return (rng.normal(0, scale, (layers, *sizes, dim))).astype(np.float32)

    keys = normal(len(tokens), kv_heads).astype(dtype)
    inside = slice(5, len(tokens) - window)
    return Candidates(
        tokens[inside],
        (300, 300 + block),
        queries=normal(asking, heads),
        keys=keys[:, inside],
        block_queries=normal(block, heads).astype(dtype),
        outside=rng.normal(4, 2, (layers, asking, heads)).astype(np.float32),
        held=Held(tokens, tokens, 5, keys),
    )


def select(policy: policies.Policy, seen: Candidates, budget: int) -> Array:
    """As the engine asks: only what the policy needs is there, and its choice is checked."""
    needs = replace(policy.needs, keys=policy.needs.keys or policy.needs.attention)
    wanted = {
        kind: getattr(seen, kind) if getattr(needs, kind) else None
        for kind in ("queries", "keys", "values", "block_queries", "outside")
    }
    wanted["memory"] = {}
    return checked(policy, policy.select(replace(seen, **wanted), budget), seen, budget)


@every
@pytest.mark.parametrize("shape", SHAPES, ids=["two", "three", "multi-head", "multi-query"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16], ids=["float32", "float16"])
def test_chooses_what_the_paper_does(name: str, shape: tuple[int, ...], dtype: Any) -> None:
    # a pyramid of one layer is snapkv
    reference = snapkv if name == "pyramidkv" and shape[0] == 1 else REFERENCES[name]
    for seed in range(3):
        seen = random_candidates(seed, shape, dtype)
        for budget in (1, 2, seen.count // 4, seen.count // 2, seen.count - 1):
            chosen = select(policies.make(name), seen, budget)
            assert np.array_equal(chosen, reference(seen, budget)), (seed, budget)


@every
def test_keeps_the_most_looked_at(name: str) -> None:
    """By hand: every query is the same vector, and one run of keys lies along it."""
    seen = random_candidates(0)
    ask = np.ones((3, 1, 6, 16), np.float32)
    keys = np.zeros_like(seen.keys)
    keys[:, 20:40] = 0.5
    seen = replace(seen, queries=ask.repeat(9, 1), block_queries=ask.repeat(83, 1), keys=keys)
    seen = replace(seen, held=None, outside=np.zeros((3, 9, 6), np.float32))
    policy = policies.make(name, **UNPOOLED.get(name, {}))
    assert select(policy, seen, 20).tolist() == list(range(20, 40))


@pytest.mark.parametrize("pool", [1, 3, 5])
def test_pool_is_the_kernel(pool: int) -> None:
    differs = 0
    for seed in range(4):
        seen = random_candidates(seed)
        for name, reference in (("snapkv", snapkv), ("pyramidkv", pyramidkv)):
            chosen = select(policies.make(name, pool=pool), seen, 20)
            assert np.array_equal(chosen, reference(seen, 20, pool=pool))
            differs += not np.array_equal(chosen, reference(seen, 20))
    assert differs


@pytest.mark.parametrize("beta", [1, 2.5, 20, 1000])
def test_beta_is_the_pyramid(beta: float) -> None:
    for seed in range(4):
        seen = random_candidates(seed, (6, 4, 4, 2, 8, 5, 90, 8))
        for budget in (3, 20, 70):
            chosen = select(policies.make("pyramidkv", beta=beta), seen, budget)
            assert np.array_equal(chosen, pyramidkv(seen, budget, beta=beta))


def test_pyramid_by_hand() -> None:
    """Of 31 layers with 100 tokens on average: 195, 190, … 10, 5; flatter where 195 are not there.

    The mean is the budget, exactly, for any number of layers.
    """
    policy = PyramidKV()
    assert policy.shares(31, 100, 1000)[:2] == [195, 189]  # 195, 188⅔
    assert policy.shares(31, 100, 1000)[-1] == 5
    assert policy.shares(3, 100, 150) == [150, 100, 50]
    assert policy.shares(1, 100, 150) == [100]
    assert PyramidKV(beta=1).shares(4, 100, 150) == [100] * 4
    for layers in (1, 2, 5, 16, 30, 32, 80):
        for budget in (1, 2, 7, 100, 999):
            shares = policy.shares(layers, budget, 1000)
            assert sum(shares) == layers * budget
            assert shares == sorted(shares, reverse=True)
            assert min(shares) >= 0
            assert max(shares) <= 1000


@pytest.mark.parametrize("chunk", [1, 3, 7, 10, 1000])
def test_chunks_stay_whole(chunk: int) -> None:
    """All but one: that one gives its first tokens."""
    for seed in range(4):
        seen = random_candidates(seed)
        for budget in (1, 9, 30, 41, seen.count - 1):
            chosen = select(ChunkKV(chunk=chunk), seen, budget)
            assert np.array_equal(chosen, chunkkv(seen, budget, chunk))
            cut = 0
            for start in range(0, seen.count, chunk):
                whole = np.arange(start, min(start + chunk, seen.count))
                kept = whole[np.isin(whole, chosen)]
                assert kept.tolist() == whole[: len(kept)].tolist()
                cut += 0 < len(kept) < len(whole)
            assert cut <= 1


@pytest.mark.parametrize("chunk", [1, 7, 512])
def test_h2o_in_chunks_of_queries(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with gaps between candidates, and queries older than all of them."""
    monkeypatch.setattr(h2o, "CHUNK", chunk)
    seen = random_candidates(0)
    gaps = np.sort(np.random.default_rng(0).choice(np.arange(20, 83), 40, replace=False))
    seen = replace(seen, tokens=seen.tokens[gaps], keys=seen.keys[:, gaps], held=None)
    assert seen.tokens[0] > seen.block[0] + 2
    visible = np.searchsorted(seen.tokens, np.arange(*seen.block), side="right")
    scores = h2o.causal_attention(seen.block_queries, seen.keys, visible)
    # every query that sees anything gives all its attention away, once a head and layer
    assert scores.sum() == pytest.approx(3 * 6 * np.count_nonzero(visible))
    for budget in (1, 13, 39):
        assert np.array_equal(select(h2o.H2O(), seen, budget), heavy_hitters(seen, budget))


def test_h2o_temporaries_are_one_chunk_of_one_kv_head(monkeypatch: pytest.MonkeyPatch) -> None:
    import tracemalloc

    seen = random_candidates(0, (4, 1, 12, 2, 8, 0, 1400, 10))
    visible = np.searchsorted(seen.tokens, np.arange(*seen.block), side="right")
    h2o.causal_attention(seen.block_queries, seen.keys, visible)
    tracemalloc.start()
    h2o.causal_attention(seen.block_queries, seen.keys, visible)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    scores = 512 * 6 * seen.count * 4
    assert scores / 2 < peak < 1.3 * scores  # with it a mask, and the queries and keys widened


# ---- edges -------------------------------------------------------------------------------------


@every
def test_equal_scores_break_by_position(name: str) -> None:
    """h2o's are equal only where no query is causal: its first tokens are seen more often."""
    seen = random_candidates(0)
    seen = replace(seen, keys=np.zeros_like(seen.keys), held=None)
    for budget in (1, 17, seen.count - 1):
        assert select(policies.make(name), seen, budget).tolist() == list(range(budget))


BAD = [np.nan, np.inf, -np.inf]


@every
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("where", ["key", "query", "layer", "all"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16], ids=["float32", "float16"])
@pytest.mark.filterwarnings("error")
def test_bad_numbers_still_give_a_choice(name: str, bad: float, where: str, dtype: Any) -> None:
    seen = random_candidates(1, dtype=dtype)
    keys, asking, block = seen.keys.copy(), seen.queries.copy(), seen.block_queries.copy()
    if where == "key":
        keys[1, 30, 0, 3] = bad
    elif where == "query":
        asking[0, -1, 2] = block[0, 40, 2] = bad
    elif where == "layer":
        keys[1] = bad
    else:
        keys[:] = bad
    seen = replace(seen, keys=keys, queries=asking, block_queries=block, held=None)
    for budget in (1, 30, seen.count - 1):
        assert len(select(policies.make(name), seen, budget)) == budget


@every
def test_one_candidate_more_than_the_budget(name: str) -> None:
    shape = (2, 2, 2, 1, 8, 0, 3, 1)
    for seed in range(5):
        seen = random_candidates(seed, shape)
        assert seen.count == 2
        chosen = select(policies.make(name), seen, 1)
        assert np.array_equal(chosen, REFERENCES[name](seen, 1))


def test_a_layer_of_nan_has_no_say() -> None:
    """The other layers' ranks and scores decide."""
    seen = random_candidates(2)
    keys = seen.keys.copy()
    keys[0] = np.nan
    chosen = select(policies.make("pyramidkv"), replace(seen, keys=keys), 20)
    layers = largest(attention(seen).sum(axis=2), 7).sum(axis=1)[1:]
    places = [
        (np.argsort(np.argsort(-scores, kind="stable")) + 1) / share
        for scores, share in zip(layers, (20, 1), strict=True)  # the first layer's would be 39
    ]
    order = np.lexsort((-layers.sum(axis=0), np.min(places, axis=0)))
    assert np.array_equal(chosen, np.sort(order[:20]))


@every
def test_large_logits_do_not_overflow(name: str) -> None:
    """Of hundreds: their exponentials are beyond float32."""
    seen = random_candidates(3, scale=10)
    assert logits(seen.queries, seen.keys).max() > 300
    options = UNPOOLED.get(name, {})
    for budget in (1, 4):
        chosen = select(policies.make(name, **options), seen, budget)
        assert np.array_equal(chosen, REFERENCES[name](seen, budget, **options))


@every
def test_needs_no_draft_and_warms_up(name: str) -> None:
    policy = policies.make(name)
    assert policy.needs.lookahead == 0
    assert policy.needs.keys or policy.needs.attention
    assert not policy.needs.values
    assert policy.needs.queries != policy.needs.block_queries
    if asking := ASKING[name]:
        assert asking == (policy.needs.probe_tokens or QUESTION - ENDING) + ENDING
    policy.warm_up()


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("snapkv", {"window": 0}, "window=0.*at least 1"),
        ("snapkv", {"pool": 4}, "pool is 4.*odd"),
        ("snapkv", {"pool": 0}, "pool is 0.*odd"),
        ("snapkv", {"pool": -1}, "pool is -1.*odd"),
        ("pyramidkv", {"window": -3}, "window=-3.*at least 1"),
        ("pyramidkv", {"pool": 2}, "pool is 2.*odd"),
        ("pyramidkv", {"beta": 0.5}, "beta=0.5.*at least 1"),
        ("pyramidkv", {"beta": float("nan")}, "beta=nan.*at least 1"),
        ("sage", {"sinks": -1}, "sinks=-1.*0 or more"),
        ("sage", {"recent": 0}, "recent=0.*at least 1"),
        ("chunkkv", {"chunk": 0}, "chunk=0.*at least 1"),
        ("chunkkv", {"window": 0}, "window=0.*at least 1"),
        ("chunkkv", {"share": "some"}, "share=some.*all or block"),
    ],
)
def test_bad_options_name_the_remedy(name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        policies.make(name, **options)
    assert re.search(said, error.value.with_flags)


# ---- budgets -----------------------------------------------------------------------------------

SHAPE_OF = {
    "snapkv": "one-shot",
    "pyramidkv": "one-shot",
    "sage": "one-shot",
    "tova": "recursive",
    "finch": "recursive",
    "h2o": "recursive",
    "chunkkv": "one-shot",
}


def test_chunks_of_equal_shares() -> None:
    """The option that needs less of a cache: as before, block by block."""
    budget = policies.make("chunkkv", share="block").budget(1000, 100, 0.2, 4)
    assert budget == Budget(1000, 100, 0.2)


@every
@pytest.mark.parametrize("size", [16, 100, 1024])
@pytest.mark.parametrize("ratio", [0.001, 0.03, 0.1, 0.25, 0.5, 0.97, 1.0])
def test_kept_and_peak(name: str, size: int, ratio: float) -> None:
    for tokens in (1, size, size + 1, 3 * size, 5 * size + 7, 8 * size - 1):
        budget = policies.make(name).budget(tokens, size, ratio, 4)
        assert budget.shape == SHAPE_OF[name]
        if tokens <= size or ratio == 1:
            assert budget.kept == tokens
            continue
        share = max(1, int(round(ratio * 1000) * tokens // 1000))
        if budget.accumulates:  # equation (1) rounds by blocks
            assert budget.kept <= max(ratio * tokens, 1) + len(budget.blocks) + 2
        else:
            assert budget.kept == share
        peak = max(block.kept_before + block.tokens for block in budget.blocks)
        assert budget.cells(20, 0, 30) >= peak + 20
        if budget.shape == "one-shot":
            assert peak == tokens
            assert budget.rows == tokens
            assert [block.evicts for block in budget.blocks] == [False] * (
                len(budget.blocks) - 1
            ) + [True]
        elif budget.shape == "recursive":
            assert peak <= share + size
            assert all(block.kept_after <= max(share, size) for block in budget.blocks)
        assert budget.window >= 1


@pytest.mark.parametrize(
    ("name", "options", "sinks", "recent"),
    [
        ("snapkv", {}, 0, 32),
        ("snapkv", {"window": 5}, 0, 5),
        ("pyramidkv", {}, 0, 8),
        ("sage", {}, 4, 64),
        ("sage", {"sinks": 0, "recent": 1}, 0, 1),
        ("tova", {}, 0, 1),
        ("finch", {}, 0, 1),
        ("h2o", {}, 0, 100),
        ("chunkkv", {}, 0, 32),
    ],
)
def test_what_is_protected(name: str, options: dict[str, int], sinks: int, recent: int) -> None:
    budget = policies.make(name, **options).budget(1000, 100, 0.2, 4)
    assert (budget.anchors, budget.window) == (sinks, recent)
    assert budget.long_term == 200 - sinks - recent
    if name == "h2o":
        return
    tight = policies.make(name, **options).budget(1000, 100, 0.003, 4)
    assert tight.anchors + tight.window + tight.long_term == tight.kept == 3


# ---- reading -----------------------------------------------------------------------------------

SIZE, TOKENS, RATIO = 48, 180, 0.5  # three whole blocks and one of 36
OPTIONS = ContextOptions(
    batch_size=64,
    ubatch_size=16,
    type_k="f32",
    type_v="f32",
    flash_attn="off",
    threads=1,
)
QUESTION, ENDING = 44, 3
# of a question of 41 tokens and 3 of the template's
ASKING = {"snapkv": 35, "pyramidkv": 11, "tova": 4, "sage": 4, "finch": 44, "chunkkv": 35, "h2o": 0}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Tiny, Model]]:
    tiny = make(tmp_path_factory.mktemp("policies"), spec=TinySpec(heads=6, kv_heads=2))
    model = Model(tiny.path, gpu_layers=0, extra_buffers=False)
    yield tiny, model
    model.close()


def must_keep(
    tiny: Tiny, name: str, budget: Budget, ids: Array, question: Array | None
) -> list[list[int]]:
    """What is held after each block, by forward passes with every evicted token hidden."""
    held: list[int] = []
    evicted: dict[int, int] = {}
    kept = []
    for block in budget.blocks:
        held += range(block.start, block.end)
        if block.evicts:
            asked = np.concatenate((ids[: block.end], ids[:0] if question is None else question))
            seen = visibility(len(asked), evicted)
            passed = forward(tiny.weights, tiny.spec, asked, visible=seen)
            watching = policies.find(name).needs.observation
            count = min(watching, block.tokens) if question is None else ASKING[name]
            tokens = np.array([t for t in held if block.candidates[0] <= t < block.candidates[1]])
            assert len(tokens) == block.count
            scores = logits(passed.queries[:, -count:], passed.keys.astype(np.float16))
            beside = seen[-count:] & ~np.isin(np.arange(len(asked)), tokens)
            scores = np.where(beside, scores, -np.inf)
            candidates = Candidates(
                tokens,
                (block.start, block.end),
                queries=passed.queries[:, -count:],
                keys=passed.keys[:, tokens].astype(np.float16),
                outside=np.logaddexp.reduce(scores, axis=-1).swapaxes(1, 2),
            )
            chosen = {*tokens[REFERENCES[name](candidates, block.pool)].tolist()}
            for token in {*tokens.tolist()} - chosen:
                evicted[token] = block.end
                held.remove(token)
        kept.append(list(held))
    return kept


@pytest.mark.parametrize("name", [name for name in REFERENCES if name != "h2o"])  # never asks
@pytest.mark.parametrize("asked", [True, False], ids=["question", "no-question"])
def test_a_run_keeps_what_the_paper_would(
    name: str, asked: bool, loaded: tuple[Tiny, Model]
) -> None:
    tiny, model = loaded
    options = {"sage": {"recent": 20}}.get(name, {})
    policy = policies.make(name, **options)
    ids = random_tokens(TOKENS + QUESTION, tiny.spec).astype(np.int32)
    ids, question = ids[:TOKENS], ids[TOKENS:]
    budget = policy.budget(TOKENS, SIZE, RATIO, 4)
    with Context(model, 512, OPTIONS) as context:
        reading = Reader(context, policy).read(
            ids, budget, Prompt(question, ENDING) if asked else None
        )
    truth = must_keep(tiny, name, budget, ids, question if asked else None)
    assert reading.kept.tolist() == truth[-1]
    assert reading.kept_per_block == [len(kept) for kept in truth]
    assert len(reading.kept) == budget.kept
    assert any(block.evicts for block in budget.blocks)
    assert {*range(budget.anchors), *range(TOKENS - budget.window, TOKENS)} <= {*truth[-1]}


@every
def test_a_run_with_positions_compacted(name: str, loaded: tuple[Tiny, Model]) -> None:
    """What evicts only once sees the same queries and keys either way, and keeps the same."""
    tiny, model = loaded
    policy = policies.make(name)
    ids = random_tokens(TOKENS + QUESTION, tiny.spec, seed=1).astype(np.int32)
    budget = policy.budget(TOKENS, SIZE, 0.3, 4)
    kept = []
    for compact in (False, True):
        with Context(model, 512, OPTIONS) as context:
            reading = Reader(context, policy, compact=compact).read(
                ids[:TOKENS], budget, Prompt(ids[TOKENS:], ENDING)
            )
        assert len(reading.kept) == budget.kept
        assert reading.next_position == (budget.kept if compact else TOKENS)
        kept.append(reading.kept.tolist())
    if budget.shape == "one-shot":
        assert kept[0] == kept[1]
