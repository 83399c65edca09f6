"""Every method as its authors have it: whole runs against a model of our own that reads in chunks.

The references know neither the package's kernels nor its budgets. They read a document chunk by
chunk with a NumPy model whose cache holds keys before RoPE, so tokens can be dropped and moved,
take the softmax that the model itself took, and choose by the papers' formulas. What is kept must
be what `Reader` keeps on llama.cpp, token by token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import tiny as model_of
from numpy.typing import NDArray
from tiny import Tiny, TinySpec, make, random_tokens

from laserkv_gguf import LaserKV, policies
from laserkv_gguf.budget import Budget
from laserkv_gguf.errors import UserError
from laserkv_gguf.llama.chat import Prompt
from laserkv_gguf.llama.context import Context, ContextOptions
from laserkv_gguf.llama.model import Model
from laserkv_gguf.llama.rope import Rotation
from laserkv_gguf.policies import Candidates, Held
from laserkv_gguf.reading.reader import Reader
from laserkv_gguf.reading.repeating import RepeatPrompt
from laserkv_gguf.recall.recaller import Recaller

Array = NDArray[Any]

SIZE, TOKENS = 48, 180  # three whole blocks and one of 36
QUESTION, ENDING = 44, 3
OPTIONS = ContextOptions(
    batch_size=64,
    ubatch_size=16,
    type_k="f32",
    type_v="f32",
    flash_attn="off",
    threads=1,
)

# ---- a model that reads in chunks --------------------------------------------------------------


@dataclass
class Chunk:
    """What reading some tokens showed; m is the cache with them behind it."""

    queries: Array  # (layers, n, heads, dim), after RoPE
    plain: Array  # (layers, n, kv_heads, dim): keys before RoPE
    values: Array
    attention: Array  # (layers, heads, n, m), what each token paid each that it saw


def turn(spec: TinySpec, plain: Array, positions: Array) -> Array:
    return np.stack(
        [model_of._rope(spec, x, model_of._angles(spec, positions, None)) for x in plain]
    )


def read(tiny: Tiny, ids: Array, positions: Array, plain: Array, values: Array, at: Array) -> Chunk:
    """Reads tokens on top of a cache: keys before RoPE, values, and where they stand now."""
    spec, n = tiny.spec, len(ids)
    wide = {name: weights.astype(float) for name, weights in tiny.weights.items()}
    stream = wide["token_embd.weight"][ids]
    angles = model_of._angles(spec, positions, None)
    found: list[tuple[Array, ...]] = []
    seen = np.concatenate((np.ones((n, len(at)), bool), np.tri(n, dtype=bool)), axis=1)
    for layer in range(spec.layers):
        block = f"blk.{layer}."
        normed = model_of._rms_norm(stream, wide[block + "attn_norm.weight"], spec.rms_eps)
        q, k, v = (
            model_of._linear(wide, f"{block}attn_{name}", normed).reshape(n, heads, spec.head_dim)
            for name, heads in (("q", spec.heads), ("k", spec.kv_heads), ("v", spec.kv_heads))
        )
        q = model_of._rope(spec, q, angles)
        keys = np.concatenate((plain[layer], k))
        keys = turn(spec, keys[None], np.concatenate((at, positions)))[0]
        group = spec.heads // spec.kv_heads
        shared = np.repeat(keys, group, axis=1)
        scores = np.einsum("nhd,mhd->hnm", q, shared) / np.sqrt(spec.head_dim)
        paid = softmax(np.where(seen, scores, -np.inf))
        held = np.repeat(np.concatenate((values[layer], v)), group, axis=1)
        mixed = np.einsum("hnm,mhd->nhd", paid, held).reshape(n, -1)
        stream = stream + model_of._linear(wide, block + "attn_output", mixed)
        normed = model_of._rms_norm(stream, wide[block + "ffn_norm.weight"], spec.rms_eps)
        gate, up = (model_of._linear(wide, f"{block}ffn_{name}", normed) for name in ("gate", "up"))
        stream = stream + model_of._linear(
            wide, block + "ffn_down", gate / (1 + np.exp(-gate)) * up
        )
        found.append((q, k, v, paid))
    return Chunk(*(np.stack(layers) for layers in zip(*found, strict=True)))


def softmax(scores: Array) -> Array:
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


@dataclass
class Moment:
    """A block has been read, and nothing of it is dropped yet."""

    spec: TinySpec
    ratio: float
    total: int  # tokens of the document
    start: int  # of the block
    end: int
    tokens: Array  # in the cache
    positions: Array
    plain: Array  # keys before RoPE of all of these
    values: Array
    block: Chunk
    asked: Chunk | None
    tiny: Tiny
    ids: Array  # of the whole document
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def last(self) -> bool:
        return self.end == self.total

    @property
    def kept(self) -> int:
        """floor(r L)"""
        return int(round(self.ratio * 1000) * self.total // 1000)

    @property
    def keys(self) -> Array:
        return turn(self.spec, self.plain, self.positions)

    def behind(self, ids: Array) -> Array:
        """What tokens read behind it pay what is in the cache: (layers, heads, n, cached)."""
        at = self.positions[-1] + 1 + np.arange(len(ids))
        read_on = read(self.tiny, ids, at, self.plain, self.values, self.positions)
        return read_on.attention[..., : len(self.tokens)]

    def question(self, count: int) -> Array:
        """What the last so many tokens of the question pay what is in the cache."""
        assert self.asked is not None
        return self.asked.attention[:, :, -count:, : len(self.tokens)]


Method = Callable[[Moment], Array]  # the tokens that stay


def run(
    tiny: Tiny, ids: Array, question: Array, method: Method, ratio: float, compact: bool = False
) -> list[list[int]]:
    """What is in the cache after each block."""
    spec = tiny.spec
    kept, history = np.empty(0, int), []
    plain = values = np.empty((spec.layers, 0, spec.kv_heads, spec.head_dim))
    notes: dict[str, Any] = {}
    at = np.empty(0, int)
    for start in range(0, len(ids), SIZE):
        end = min(start + SIZE, len(ids))
        first = len(kept) if compact else start
        block = read(tiny, ids[start:end], first + np.arange(end - start), plain, values, at)
        kept = np.concatenate((kept, np.arange(start, end)))
        plain = np.concatenate((plain, block.plain), axis=1)
        values = np.concatenate((values, block.values), axis=1)
        at = np.arange(len(kept)) if compact else kept
        asked = read(tiny, question, at[-1] + 1 + np.arange(len(question)), plain, values, at)
        moment = Moment(
            spec,
            ratio,
            len(ids),
            start,
            end,
            kept,
            at,
            plain,
            values,
            block,
            asked,
            tiny,
            ids,
            notes,
        )
        stays = np.isin(kept, method(moment))
        kept, plain, values = kept[stays], plain[:, stays], values[:, stays]
        at = np.arange(len(kept)) if compact else kept
        history.append(kept.tolist())
    return history


# ---- the papers' formulas ----------------------------------------------------------------------


def best(scores: Array, count: int) -> Array:
    return np.argsort(-scores, kind="stable")[:count]


def largest_near(scores: Array, width: int) -> Array:
    """The largest of the neighbours there are, along the last axis."""
    half = width // 2
    spans = [slice(max(0, i - half), i + half + 1) for i in range(scores.shape[-1])]
    return np.stack([scores[..., span].max(axis=-1) for span in spans], axis=-1)


def standard(scores: Array) -> Array:
    return (scores - scores.mean()) / scores.std()


def snapkv(m: Moment, window: int = 32, probe: int = 35) -> Array:
    """Listing 1, with max pooling over 7: once, over all that was read."""
    if not m.last:
        return m.tokens
    heads = m.question(probe).sum(axis=2)[..., :-window]
    chosen = best(largest_near(heads, 7).sum(axis=(0, 1)), m.kept - window)
    return np.concatenate((m.tokens[chosen], m.tokens[-window:]))


def pyramidkv(m: Moment, window: int = 8, beta: float = 20) -> Array:
    """All layers' budgets k_l times one factor, found by trying, until they name enough tokens."""
    if not m.last:
        return m.tokens
    layers = largest_near(m.question(11).sum(axis=2)[..., :-window], 7).sum(axis=1)
    budget, count, top = m.kept - window, layers.shape[1], len(layers) - 1
    high = budget / beta
    low = 2 * budget - high
    if low > count:
        low, high = count, 2 * budget - count
    shares = [round(low - (low - high) / top * layer) for layer in range(top + 1)]
    order = [best(scores, count) for scores in layers]
    named: set[int] = set()
    for factor in np.unique([(i + 1) / share for share in shares for i in range(count)]):
        new = {
            int(token)
            for ranked, share in zip(order, shares, strict=True)
            for token in ranked[: int(factor * share + 1e-9)]
        } - named
        by_sum = sorted(new, key=lambda token: -layers[:, token].sum())
        named |= {*by_sum[: budget - len(named)]}
        if len(named) == budget:
            break
    return np.concatenate((m.tokens[sorted(named)], m.tokens[-window:]))


def h2o(m: Moment) -> Array:
    """Algorithm 1: sums go on while a token stays; half heavy, half recent."""
    received = m.block.attention.sum(axis=(0, 1, 2))
    sums = {
        int(t): float(s) + m.notes.get(int(t), 0.0) for t, s in zip(m.tokens, received, strict=True)
    }
    m.notes.clear()
    m.notes.update(sums)
    recent = m.kept // 2
    if len(m.tokens) <= m.kept:
        return m.tokens
    older = m.tokens[:-recent]
    heavy = best(np.array([sums[int(t)] for t in older]), m.kept - recent)
    return np.concatenate((older[heavy], m.tokens[-recent:]))


def tova(m: Moment) -> Array:
    """The last query's attention, averaged over the heads; here the last token must stay."""
    if len(m.tokens) <= m.kept:
        return m.tokens
    scores = m.question(1)[:, :, 0].mean(axis=(0, 1))[:-1]
    return np.append(m.tokens[best(scores, m.kept - 1)], m.tokens[-1])


def finch(m: Moment) -> Array:
    """The whole question's attention; room for r of what was read."""
    room = int(round(m.ratio * 1000) * m.end // 1000)
    if len(m.tokens) <= room:
        return m.tokens
    scores = m.question(QUESTION).sum(axis=(0, 1, 2))[:-1]
    return np.append(m.tokens[best(scores, room - 1)], m.tokens[-1])


def sage(m: Moment, sinks: int = 4, recent: int = 20) -> Array:
    if not m.last:
        return m.tokens
    scores = m.question(1)[:, :, 0].sum(axis=(0, 1))[sinks:-recent]
    middle = sinks + best(scores, m.kept - sinks - recent)
    return np.concatenate((m.tokens[:sinks], m.tokens[middle], m.tokens[-recent:]))


def keydiff(m: Moment) -> Array:
    """-cos(key, mean of the normalised keys in the cache)."""
    if len(m.tokens) <= m.kept:
        return m.tokens
    unit = m.keys / np.linalg.norm(m.keys, axis=3, keepdims=True)
    mean = unit.mean(axis=1, keepdims=True)
    scores = -(unit * mean).sum(axis=3) / np.linalg.norm(mean, axis=3)
    return np.append(m.tokens[best(scores.sum(axis=(0, 2))[:-1], m.kept - 1)], m.tokens[-1])


def chunkkv(m: Moment, chunk: int = 10, window: int = 32) -> Array:
    if not m.last:
        return m.tokens
    scores = m.question(35).sum(axis=(0, 1, 2))[:-window]
    chunks = [np.arange(len(scores))[i : i + chunk] for i in range(0, len(scores), chunk)]
    chunks.sort(key=lambda part: -scores[part].mean())
    inside = np.concatenate(chunks)[: m.kept - window]
    return np.concatenate((m.tokens[inside], m.tokens[-window:]))


def compactor(
    m: Moment, chunk: int = 32, sketch: int = 8, sinks: int = 8, recent: int = 4
) -> Array:
    """kvpress: leverage before RoPE, weighed by the share that goes; chunks see both ways."""
    m.notes.setdefault("queries", []).append(m.block.queries)
    if not m.last:
        return m.tokens
    spec, inside = m.spec, slice(sinks, m.total - recent)
    queries = np.concatenate(m.notes["queries"], axis=1)[:, inside]
    keys, plain, values = m.keys[:, inside], m.plain[:, inside], m.values[:, inside]
    gaussian = np.random.Generator(np.random.PCG64(0)).standard_normal((spec.head_dim, sketch))
    total, group = np.zeros(keys.shape[1]), spec.heads // spec.kv_heads
    for layer in range(spec.layers):
        lever, looked = [], []
        for kv in range(spec.kv_heads):
            x = plain[layer, :, kv]
            x = (x - x.mean(axis=0)) @ gaussian / np.sqrt(sketch)
            lever.append(np.diag(x @ np.linalg.inv(x.T @ x + 0.01 * np.eye(sketch)) @ x.T))
            received = np.zeros((group, len(x)))
            for g in range(group):
                for start in range(0, len(x), chunk):
                    part = slice(start, start + chunk)
                    products = queries[layer, part, kv * group + g] @ keys[layer, part, kv].T
                    received[g, part] = softmax(products).sum(axis=0)
            score = received.mean(axis=0) * np.linalg.norm(values[layer, :, kv], axis=1)
            near = [score[max(i - 1, 0) : i + 2].mean() for i in range(len(x))]
            looked.append(np.array(near))
        blend = 1 - m.kept / m.total
        total += blend * standard(np.array(lever)).sum(axis=0)
        total += standard(np.array(looked)).sum(axis=0)
    chosen = sinks + best(total, m.kept - sinks - recent)
    return np.concatenate((m.tokens[:sinks], m.tokens[chosen], m.tokens[-recent:]))


def pooled(m: Moment, choose: Callable[[Moment, Array, int], Array]) -> Array:
    """LASER-KV's partition, which methods without one of their own use: `choose` fills the pool."""
    budget = Budget(m.total, SIZE, m.ratio)
    block = next(block for block in budget.blocks if block.end == m.end)
    inside = (m.tokens >= block.candidates[0]) & (m.tokens < block.candidates[1])
    numbers = np.flatnonzero(inside)
    if block.pool >= len(numbers):
        return m.tokens
    chosen = numbers[choose(m, numbers, block.pool)]
    return np.concatenate((m.tokens[~inside], m.tokens[chosen]))


def lagkv(m: Moment, lag: int = 8) -> Array:
    """Partitions, each by the range of the one after it; what is left counts with the last."""

    def choose(m: Moment, numbers: Array, budget: int) -> Array:
        starts = list(range(0, len(numbers) - lag + 1, lag)) or [0]
        ranked = []
        for start, end in zip(starts, [*starts[1:], len(numbers)], strict=True):
            own = numbers[start:end]
            after = np.arange(own[-1] + 1, min(own[-1] + 1 + lag, len(m.tokens)))
            score = np.zeros(len(own))
            for states in (m.keys, m.values):
                low = states[:, after].min(axis=1, keepdims=True)
                high = states[:, after].max(axis=1, keepdims=True)
                spread = ((states[:, own] - low) / (high - low)).std(axis=3, ddof=1)
                score += softmax(spread.swapaxes(1, 2)).sum(axis=(0, 1))
            for rank, i in enumerate(np.argsort(-score, kind="stable")):
                ranked.append((rank / len(own), -score[i] * len(own), start + int(i)))
        sinks = [i for i in range(len(numbers)) if m.tokens[numbers[i]] < 16]
        assert not sinks  # the anchors are more
        return np.array([i for *_, i in sorted(ranked)[:budget]])

    return pooled(m, choose)


def quest(m: Moment, page: int = 8, skip: int = 2) -> Array:
    """Each head's and query's own ranking of pages, but as shares; the first layers have no say."""

    def choose(m: Moment, numbers: Array, budget: int) -> Array:
        assert m.asked is not None
        group = m.spec.heads // m.spec.kv_heads
        pages = [numbers[i : i + page] for i in range(0, len(numbers), page)]
        scores = np.zeros(len(pages))
        for layer in range(skip, m.spec.layers):
            for head in range(m.spec.heads):
                queries = m.asked.queries[layer, -8 - ENDING :, head]
                upper = np.empty((len(queries), len(pages)))
                for i, part in enumerate(pages):
                    keys = m.keys[layer, part, head // group]
                    either = queries * keys.min(axis=0), queries * keys.max(axis=0)
                    upper[:, i] = np.maximum(*either).sum(axis=1) / np.sqrt(m.spec.head_dim)
                scores += softmax(upper).max(axis=0)
        order = np.argsort(-scores, kind="stable")
        return np.concatenate([pages[i] - numbers[0] for i in order])[:budget]

    return pooled(m, choose)


def streamingllm(m: Moment, sinks: int = 4) -> Array:
    return np.concatenate((m.tokens[:sinks], m.tokens[sinks:][-(m.kept - sinks) :]))


WHOLE, PART, ANSWER = np.array([270, 271, 272]), np.array([273, 274]), np.array([275])


def kvzip(m: Moment, chunk: int = 20, sinks: int = 4, recent: int = 6) -> Array:
    """Section 3: every chunk is repeated once, and its keys keep the most they got by that.

    In groups of heads that share a key, over prompt and repetition; summed over layers and groups.
    """
    if len(m.tokens) <= m.kept:
        return m.tokens
    scores = m.notes.setdefault("scores", {})
    first = max(sinks, m.notes.get("repeated", 0))
    for start in range(first, m.end - recent, chunk):
        part = np.arange(start, min(start + chunk, m.end - recent))
        quoting = np.concatenate((PART, m.ids[start - 8 : start], ANSWER))
        prompt = quoting if start > 8 else np.concatenate((WHOLE, ANSWER))
        paid = m.behind(np.concatenate((prompt, m.ids[part])))
        groups = paid.reshape(len(paid), m.spec.kv_heads, -1, *paid.shape[2:]).max(axis=(2, 3))
        own = groups[..., np.searchsorted(m.tokens, part)] * value_lengths(m, part)
        scores.update(zip(part.tolist(), own.sum(axis=(0, 1)), strict=True))
    m.notes["repeated"] = m.end - recent
    middle = m.tokens[sinks:-recent]
    heavy = best(np.array([scores[int(t)] for t in middle]), m.kept - sinks - recent)
    return np.concatenate((m.tokens[:sinks], middle[heavy], m.tokens[-recent:]))


def value_lengths(m: Moment, tokens: Array) -> Array:
    """(layers, kv_heads, tokens) of tokens in the cache."""
    values = m.values[:, np.searchsorted(m.tokens, tokens)]
    return np.linalg.norm(values, axis=-1).transpose(0, 2, 1)


def expected(m: Moment, sinks: int = 4, recent: int = 6) -> Array:
    """Equations 7 to 10, every position to come turned to on its own: last 30 queries, 40 ahead."""
    if len(m.tokens) <= m.kept:
        return m.tokens
    plain = turn(m.spec, m.block.queries[:, -30:], -m.positions[-30:])
    ahead = m.positions[-1] + 1 + np.arange(40)
    total = np.zeros(len(m.tokens) - sinks)
    root, axes = np.sqrt(m.spec.head_dim), np.eye(m.spec.head_dim)[None, :, None]
    turned = [turn(m.spec, axes, np.full(m.spec.head_dim, at))[0, :, 0] for at in ahead]
    mean_turn = np.mean(turned, axis=0).T  # its columns are the axes, turned
    for layer in range(m.spec.layers):
        for head in range(m.spec.heads):
            kv = head * m.spec.kv_heads // m.spec.heads
            asked = plain[layer, :, head]
            mean = mean_turn @ asked.mean(axis=0)
            spread = mean_turn @ np.cov(asked.T, bias=True) @ mean_turn.T
            logits = [
                k @ mean / root + k @ spread @ k / (2 * root**2) for k in m.keys[layer, sinks:, kv]
            ]
            paid = softmax(np.array(logits)) * m.spec.kv_heads / m.spec.heads
            lengths = np.linalg.norm(m.values[layer, sinks:, kv], axis=-1)
            # epsilon once a kv head, not once a head
            total += (paid + 0.01 * m.spec.kv_heads / m.spec.heads) * lengths
    middle = sinks + best(total[:-recent], m.kept - sinks - recent)
    return np.concatenate((m.tokens[:sinks], m.tokens[middle], m.tokens[-recent:]))


@dataclass(frozen=True)
class Case:
    method: Method
    options: dict[str, Any] = field(default_factory=dict)
    ratio: float = 0.5


CASES = {
    "snapkv": Case(snapkv),
    "pyramidkv": Case(pyramidkv),
    "h2o": Case(h2o),
    "tova": Case(tova),
    "finch": Case(finch, ratio=0.3),
    "sage": Case(sage, {"recent": 20}),
    "keydiff": Case(keydiff, ratio=0.3),
    "chunkkv": Case(chunkkv),
    "compactor": Case(compactor, {"chunk": 32, "sketch": 8}),
    "kvzip": Case(kvzip, {"chunk": 20, "recent": 6, "values": "norm"}, ratio=0.3),
    "expected": Case(
        expected, {"queries": 30, "future": 40, "epsilon": 0.01, "recent": 6}, ratio=0.3
    ),
    "lagkv": Case(lagkv, {"lag": 8}, ratio=0.7),
    "quest": Case(quest, {"page": 8}, ratio=0.3),
    "streamingllm": Case(streamingllm, ratio=0.3),
}
COMPACT = {"finch", "streamingllm"}
every = pytest.mark.parametrize("name", CASES)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Tiny, Model]]:
    tiny = make(tmp_path_factory.mktemp("originals"), spec=TinySpec(layers=4, heads=6, kv_heads=2))
    model = Model(tiny.path, gpu_layers=0, extra_buffers=False)
    yield tiny, model
    model.close()


def precise(policy: policies.Policy) -> policies.Policy:
    """So that float16 does not decide between near equals."""
    object.__setattr__(policy, "needs", replace(policy.needs, precise=True, lookahead=0))
    return policy


@pytest.mark.parametrize(
    ("name", "compact", "seed"),
    [
        *((name, name in COMPACT, seed) for name in CASES for seed in (0, 1)),
        ("kvzip", True, 0),
        ("expected", True, 0),
    ],
)
def test_a_run_keeps_what_the_authors_would(
    name: str, compact: bool, seed: int, loaded: tuple[Tiny, Model]
) -> None:
    tiny, model = loaded
    case = CASES[name]
    ids = random_tokens(TOKENS + QUESTION, tiny.spec, seed=seed).astype(np.int32)
    truth = run(tiny, ids[:TOKENS], ids[TOKENS:], case.method, case.ratio, compact)
    policy = precise(policies.make(name, **case.options))
    budget = policy.budget(TOKENS, SIZE, case.ratio, 4)
    with Context(model, 512, OPTIONS) as context:
        repeating = RepeatPrompt(*(part.astype(np.int32) for part in (WHOLE, PART, ANSWER)))
        reader = Reader(context, policy, compact=compact, repeating=repeating)
        reading = reader.read(ids[:TOKENS], budget, Prompt(ids[TOKENS:], ENDING))
    assert (policy.positions == "compact") == (name in COMPACT)
    assert reading.kept_per_block == [len(kept) for kept in truth]
    assert reading.kept.tolist() == truth[-1]
    assert any(len(kept) < TOKENS for kept in truth)
    assert reading.next_position == (len(truth[-1]) if compact else TOKENS)


# ---- what stands for infllm's units ------------------------------------------------------------


def infllm(spec: TinySpec, seen: Candidates, size: int, count: int, local: int) -> Array:
    """Mean keys before RoPE of each head's most looked at, which a query of one angle meets."""
    held, asking = seen.around, seen.block_queries
    assert held.keys is not None
    assert asking is not None
    layers, _, kv_heads, dim = held.keys.shape
    heads = asking.shape[2]
    plain = turn(spec, held.keys.astype(float), -held.positions)
    first = held.first
    units = [range(i, min(i + size, seen.count)) for i in range(0, seen.count, size)]
    means = np.zeros((layers, len(units), heads, dim))
    for layer in range(layers):
        for head in range(heads):
            own = head // (heads // kv_heads)
            mass = np.zeros(len(held.tokens))
            for i, query in enumerate(asking[layer, :, head].astype(float)):
                token = seen.block[0] + i
                sees = held.tokens <= token
                keys = held.keys[layer, sees, own].astype(float)
                paid = softmax(keys @ query / np.sqrt(dim))
                near = token - held.tokens[sees] < local
                mass[sees] += np.where(near, paid, 0)
            for number, unit in enumerate(units):
                top = [unit[i] for i in best(mass[first:][list(unit)], count)]
                means[layer, number, head] = plain[layer, first:, own][top].mean(axis=0)
    return turn(spec, means, np.array([1 - local]))


@pytest.mark.parametrize("halves", [False, True], ids=["neighbours", "halves"])
def test_what_stands_for_a_unit(halves: bool) -> None:
    """First tokens, tokens of before the block, and a last unit that is short."""
    spec = TinySpec(arch="qwen2" if halves else "llama", heads=6, kv_heads=2, head_dim=8)
    rng = np.random.default_rng(3)
    tokens = np.concatenate((np.arange(6), np.arange(90, 133)))
    keys = 2 * rng.normal(size=(2, len(tokens), 2, 8)).astype(np.float32)
    # compacted: tokens stand elsewhere than they were read
    held = Held(tokens, 50 + np.arange(len(tokens)), 6, keys)
    frequencies = spec.rope_base ** -(np.arange(0, 8, 2) / 8)
    seen = Candidates(
        tokens[6:],
        (100, 133),
        keys=keys[:, 6:],
        block_queries=rng.normal(size=(2, 33, 6, 8)).astype(np.float32),
        held=held,
        rotation=Rotation(frequencies, halves),
    )
    for local in (7, 20, 4096):
        policy = policies.make("infllm", size=8, representatives=2, local=local)
        truth = infllm(spec, seen, 8, 2, local)
        found = policy.index(seen)["means"]
        assert found.shape == truth.shape == (2, 6, 6, 8)
        assert np.abs(found - truth).max() < 2e-3  # float16
    # without the queries of the block a unit's first tokens stand for it, for every head alike
    nobody = np.empty((2, 0, 6, 8), np.float32)
    found = policy.index(replace(seen, block_queries=nobody))["means"]
    plain = turn(spec, keys[:, 6:8].astype(float), -held.positions[6:8])
    plain = turn(spec, plain.mean(axis=1, keepdims=True), np.array([1 - 4096]))
    assert np.abs(found[:, 0] - np.repeat(plain[:, 0], 3, axis=1)).max() < 2e-3


@pytest.mark.parametrize("positions", ["original", "compact"])
def test_units_are_noted_as_they_were_read(
    positions: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The softmax counts all that the block saw, and the last block notes what it parks."""
    spec = TinySpec(layers=2)
    path = make(tmp_path_factory.mktemp("units"), spec=spec).path
    given: list[Candidates] = []
    kind = policies.find("infllm")
    index = kind.index

    def noting(self: Any, block: Candidates) -> Any:
        if block.held is not None and np.array_equal(block.tokens, np.arange(*block.block)):
            copied = replace(
                block.around, keys=np.array(block.around.keys), tokens=block.around.tokens.copy()
            )
            asked = np.array(block.block_queries)
            given.append(replace(block, held=copied, block_queries=asked))
        return index(self, block)

    monkeypatch.setattr(kind, "index", noting)
    settings: dict[str, Any] = {"policy": "infllm", "recall": "ram", "positions": positions}
    settings |= {"block_size": 64, "ratio": 0.3, "policy_options": {"size": 8, "local": 30}}
    with LaserKV(path, context=replace(OPTIONS, batch_size=128), **settings) as engine:
        talk = engine.conversation(document="tin copper ore " * 20, max_tokens=4)
        reading = talk.read()
        recaller = talk.sources.recallers[0]
        assert isinstance(recaller, Recaller)
        truth = [infllm(spec, block, 8, 4, 30) for block in given]
        assert len(truth) == len(reading.budget.blocks)
        assert np.abs(recaller.way.index["means"] - np.concatenate(truth, axis=1)).max() < 5e-3
        for block, then in zip(reading.budget.blocks, given, strict=True):
            # all that was in the cache, anchors and earlier units too
            assert len(then.around.tokens) == block.kept_before + block.tokens


# ---- positions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(set(policies.available()) - {"full", "infllm"}))
def test_positions_are_the_method_s_unless_told(name: str, tmp_path: Any) -> None:
    path = make(tmp_path).path
    options = ContextOptions(128, 64, threads=1)
    settings = {"policy": name, "block_size": 64, "ratio": 0.4, "context": options}
    document = "A story that is long enough for a few blocks, told by nobody. " * 6
    for positions in ("auto", "original"):
        with LaserKV(path, **settings, positions=positions) as engine:
            stream = engine.stream("why?", document=document, max_tokens=2)
            assert "".join(stream) == stream.reply.text
            moved = positions == "auto" and name in COMPACT
            assert stream.reply.account.positions == ("compact" if moved else "original")


@pytest.mark.parametrize(
    ("context", "more"),
    [
        ({"type_k": "bf16"}, {}),  # llama.cpp cannot turn these
        ({"type_k": "q8_0"}, {}),  # nor these, of head size 32
        ({"type_k": "q8_0"}, {"recall": "ram"}),
    ],
)
def test_where_keys_cannot_be_moved_they_stay(
    context: dict[str, Any], more: dict[str, Any], tmp_path: Any
) -> None:
    path = make(tmp_path).path
    options = ContextOptions(128, 64, threads=1, **context)
    document = "A story that is long enough for a few blocks, told by nobody. " * 6
    settings: dict[str, Any] = {"policy": "finch", "block_size": 64, "ratio": 0.4, **more}
    with LaserKV(path, context=options, **settings) as engine:
        reply = engine.ask("why?", document=document, max_tokens=2)
        assert reply.account.positions == "original"
    with (
        LaserKV(path, context=options, **settings, positions="compact") as engine,
        pytest.raises(UserError, match=r'use ContextOptions\(type_k="f16"\)'),
    ):
        engine.ask("why?", document=document, max_tokens=2)


# ---- finch's summary ---------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.01, 0.1, 0.3, 0.75])
@pytest.mark.parametrize("protected", [0, 30])
def test_the_summary_grows(ratio: float, protected: int) -> None:
    """Against floor(r · read): never more than that, or than what is protected and a token."""
    budget = replace(policies.make("finch").budget(1000, 64, ratio, 4), protected=protected)
    held = 0
    for block in budget.blocks:
        held += block.tokens
        room = max(int(round(ratio * 1000) * block.end // 1000), budget.anchors + budget.window)
        held = min(held, room)
        assert block.kept_after == held
        assert block.evicts == (block.kept_before + block.tokens > room)
        if block.evicts:
            assert block.pool == room - budget.anchors - budget.window
            assert block.count == block.kept_before + block.tokens - budget.anchors - budget.window
    assert budget.kept == max(round(ratio * 1000), protected + 1)
    assert max(b.kept_before + b.tokens for b in budget.blocks) <= budget.rows


# ---- several ratios from one reading -----------------------------------------------------------


@pytest.mark.parametrize("name", ["compactor", "chunkkv", "snapkv"])
def test_choosing_again_is_reading_again(name: str, loaded: tuple[Tiny, Model]) -> None:
    """What a policy notes while it reads is not spoiled by the first choice."""
    tiny, model = loaded
    ids = random_tokens(TOKENS + QUESTION, tiny.spec, seed=2).astype(np.int32)
    policy = precise(policies.make(name, **CASES[name].options))
    question = Prompt(ids[TOKENS:], ENDING)
    kept = {}
    for ratio in (0.5, 0.3, 0.25):
        with Context(model, 512, OPTIONS) as context:
            reading = Reader(context, policy).read(
                ids[:TOKENS], policy.budget(TOKENS, SIZE, ratio, 4), question
            )
        kept[ratio] = reading.kept.tolist()
    with Context(model, 512, OPTIONS) as context:
        reader = Reader(context, policy)
        first = reader.read(
            ids[:TOKENS], policy.budget(TOKENS, SIZE, 0.5, 4), question, keep_all_cells=True
        )
        assert first.kept.tolist() == kept[0.5]
        for ratio in (0.3, 0.5, 0.25):
            again = reader.choose_again(policy.budget(TOKENS, SIZE, ratio, 4))
            assert again.kept.tolist() == kept[ratio]


def test_finch_recalls_with_its_gaps_closed(tmp_path: Any) -> None:
    """Parked rows are put back where the summary of every block stands."""
    path = make(tmp_path).path
    settings: dict[str, Any] = {"policy": "finch", "recall": "ram", "block_size": 64, "ratio": 0.3}
    with LaserKV(path, context=ContextOptions(128, 64, threads=1), **settings) as engine:
        talk = engine.conversation(document="tin copper ore " * 20, max_tokens=2)
        reading = talk.read()
        for question in ("why?", "where?"):
            recalled = talk.recall(question)
            assert recalled is not None
            assert len(recalled.kept) == reading.budget.kept
            stream = talk.ask(question)
            assert "".join(stream) == stream.reply.text
            assert stream.reply.account.positions == "compact"
