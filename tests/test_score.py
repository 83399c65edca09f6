"""What laser's score is made of: the formulas written out, and the model's own attention.

The kernels against NumPy in float64; norms against values that were captured, and against the
weights the tiny model was made from; a softmax over all against the attention that a forward pass
pays, its mask made of what was evicted.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray
from test_engine import SHORT, SIZE, TOKENS, Cache, Recorder
from tiny import TinySpec, forward, make, random_tokens, visibility

from laserkv_gguf import kernels, policies
from laserkv_gguf.api import LaserKV
from laserkv_gguf.budget import Budget
from laserkv_gguf.errors import UserError
from laserkv_gguf.llama import output
from laserkv_gguf.llama.capture import Probe
from laserkv_gguf.llama.chat import Prompt
from laserkv_gguf.llama.context import SEQUENCES, Context, ContextOptions
from laserkv_gguf.llama.model import Model
from laserkv_gguf.llama.sequence import MAIN, PROBE, Sequence
from laserkv_gguf.policies import Candidates, Needs, Policy
from laserkv_gguf.policies.laser import PAPER, PAPER_OPTIONS, Laser
from laserkv_gguf.reading.asking import Drafts, ProbeSettings
from laserkv_gguf.reading.reader import Reader

OPTIONS = ContextOptions(
    batch_size=64,
    ubatch_size=16,
    type_k="f32",
    type_v="f32",
    flash_attn="off",
    threads=1,
    outputs=64,
    sequences=SEQUENCES + 1,
)
SPECS = {
    "grouped": TinySpec(),
    "one-kv-head": TinySpec(kv_heads=1, seed=1),
    "qwen2": TinySpec(arch="qwen2", seed=4),
    "q8_0": TinySpec(layers=2, ftype="Q8_0", seed=7),
    "head-64": TinySpec(layers=2, heads=2, kv_heads=1, head_dim=64, seed=5),
}


# ---- the kernels -------------------------------------------------------------------------------


def written_out(
    queries: NDArray[Any],
    keys: NDArray[Any],
    weights: NDArray[Any] | None = None,
    outside: NDArray[Any] | None = None,
) -> NDArray[np.float64]:
    """Every probe token's score of every candidate, loop by loop: (tokens, candidates)."""
    layers, tokens, heads, dim = queries.shape
    group = heads // keys.shape[2]
    scores = np.zeros((tokens, keys.shape[1]))
    for layer in range(layers):
        for head in range(heads):
            key = keys[layer, :, head // group].astype(np.float64)
            for token in range(tokens):
                mass = np.exp(key @ queries[layer, token, head].astype(np.float64) / dim**0.5)
                total = mass.sum()
                if outside is not None:
                    total += np.exp(np.float64(outside[layer, token, head]))
                share = mass / total
                if weights is not None:
                    share = share * weights[layer, :, head // group]
                scores[token] += share
    return scores


def made(shape: tuple[int, ...], seed: int = 0, dtype: Any = np.float32) -> dict[str, NDArray[Any]]:
    """Queries, keys, weights and outside for (layers, tokens, heads, kv_heads, dim, candidates)."""
    layers, tokens, heads, kv_heads, dim, count = shape
    rng = np.random.default_rng(seed)
    outside = rng.normal(0, 3, (layers, tokens, heads)).astype(np.float32)
    outside[0, 0, 0] = -np.inf
    return {
        "queries": rng.normal(size=(layers, tokens, heads, dim)).astype(np.float32),
        "keys": rng.normal(size=(layers, count, kv_heads, dim)).astype(dtype),
        "weights": rng.uniform(0.1, 4, (layers, count, kv_heads)).astype(np.float32),
        "outside": outside,
    }


SHAPES = [
    (2, 5, 6, 2, 16, 77),
    (1, 1, 1, 1, 8, 1),
    (2, 24, 9, 3, 64, 130),
    (3, 7, 4, 4, 32, 33),
    (1, 9, 8, 1, 128, 500),
    (1, 70, 2, 1, 16, 40),  # more tokens than are summed at a time
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("over", ["sum", "max"])
def test_scores_are_the_formula(shape: tuple[int, ...], dtype: Any, over: str) -> None:
    given = made(shape, dtype=dtype)
    asked = given["queries"], given["keys"]
    for names in ((), ("weights",), ("outside",), ("weights", "outside")):
        added = {name: given[name] for name in names}
        truth = written_out(*asked, **added)
        truth = truth.max(axis=0) if over == "max" else truth.sum(axis=0)
        found = kernels.attention_consensus(*asked, over=over, **added)
        np.testing.assert_allclose(found, truth, rtol=5e-5)
        if over == "sum":
            rows = kernels.attention_by_layer(*asked, **added)
            np.testing.assert_allclose(rows.sum(axis=0), truth, rtol=5e-5)


@pytest.mark.parametrize("seed", range(5))
def test_what_must_hold_of_any_scores(seed: int) -> None:
    """The largest is at most the sum; of one token both are one; weights of 1 change nothing."""
    given = made((2, 6, 6, 3, 32, 90), seed)
    queries, keys = given["queries"], given["keys"]
    plain = kernels.attention_consensus(queries, keys)
    ones = np.ones_like(given["weights"])
    nothing = np.full_like(given["outside"], -np.inf)
    same = kernels.attention_consensus(queries, keys, weights=ones, outside=nothing)
    np.testing.assert_array_equal(same, plain)
    added = {"weights": given["weights"], "outside": given["outside"]}
    largest = kernels.attention_consensus(queries, keys, over="max", **added)
    summed = kernels.attention_consensus(queries, keys, **added)
    assert (largest <= summed * (1 + 1e-5)).all()
    assert (largest * 6 >= summed * (1 - 1e-5)).all()
    one = {"weights": given["weights"], "outside": given["outside"][:, :1]}
    np.testing.assert_allclose(
        kernels.attention_consensus(queries[:, :1], keys, over="max", **one),
        kernels.attention_consensus(queries[:, :1], keys, **one),
        rtol=1e-5,
    )
    doubled = {**added, "weights": 2 * given["weights"]}
    np.testing.assert_allclose(
        kernels.attention_consensus(queries, keys, **doubled), 2 * summed, rtol=1e-5
    )
    more = {**added, "outside": given["outside"] + 1}  # more is seen elsewhere: less is left
    assert (kernels.attention_consensus(queries, keys, **more) <= summed).all()


@pytest.mark.parametrize("over", ["sum", "max"])
def test_threads_change_no_bit(over: str) -> None:
    given = made((5, 20, 6, 2, 32, 300))
    with kernels.threads(1):
        one = kernels.attention_consensus(**given, over=over)
        sums = kernels.log_sums(given["queries"], given["keys"])
    with kernels.threads(2):
        np.testing.assert_array_equal(kernels.attention_consensus(**given, over=over), one)
        np.testing.assert_array_equal(kernels.log_sums(given["queries"], given["keys"]), sums)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_log_sums(shape: tuple[int, ...]) -> None:
    """Of all keys; of as many first ones as each token sees; and what a softmax lacks them for."""
    given = made(shape)
    queries, keys = given["queries"], given["keys"]
    group, dim = queries.shape[2] // keys.shape[2], queries.shape[3]
    wide = np.repeat(keys.astype(np.float64), group, axis=2)
    logits = np.einsum("lthd,lchd->lthc", queries, wide) / dim**0.5
    truth = np.log(np.exp(logits).sum(axis=-1))
    np.testing.assert_allclose(kernels.log_sums(queries, keys), truth, atol=2e-5)
    visible = np.minimum(np.arange(queries.shape[1]) * 3, keys.shape[1])
    found = kernels.log_sums(queries, keys, visible=visible)
    for token, count in enumerate(visible):
        with np.errstate(divide="ignore"):
            expected = np.log(np.exp(logits[:, token, :, :count]).sum(axis=-1))
        np.testing.assert_allclose(found[:, token], expected, atol=2e-5)
    half = keys.shape[1] // 2
    outside = kernels.log_sums(queries, keys[:, half:])
    np.testing.assert_allclose(
        kernels.attention_consensus(queries, keys[:, :half], outside=outside),
        kernels.attention_consensus(queries, keys)[:half],
        rtol=1e-4,
    )


@pytest.mark.parametrize("over", ["sum", "max"])
def test_large_scores_and_nonsense(over: str) -> None:
    """Softmax over logits of thousands, all that is outside, and NaN."""
    given = made((2, 4, 4, 2, 16, 50))
    queries, keys = given["queries"] * 100, given["keys"] * 100
    found = kernels.attention_consensus(queries, keys, weights=given["weights"], over=over)
    assert np.isfinite(found).all()
    assert found.max() > 0
    heavy = np.full_like(given["outside"], 1e6)
    assert not kernels.attention_consensus(queries, keys, outside=heavy, over=over).any()
    keys[1, 7] = np.nan
    assert np.isnan(kernels.attention_consensus(queries, keys, over=over)).all()
    for empty in (keys[:, :0], keys):
        none = kernels.attention_consensus(queries[:, :0], empty, over=over)
        assert none.shape == (empty.shape[1],)
        assert not none.any()


def test_arrays_that_do_not_fit() -> None:
    given = made(SHAPES[0])
    queries, keys = given["queries"], given["keys"]
    for wrong in (
        {"weights": given["weights"][:, 1:]},
        {"outside": given["outside"][:, 1:]},
        {"over": "mean"},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            kernels.attention_consensus(queries, keys, **wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="visible"):
        kernels.log_sums(queries, keys, visible=np.arange(3))


# ---- norms -------------------------------------------------------------------------------------


class Loaded:
    """A model with random tokens to read, to ask and to go on with, as test_engine's."""

    def __init__(self, directory: Path, spec: TinySpec) -> None:
        self.path, self.spec, self.weights = make(directory, spec=spec)
        self.model = Model(self.path, gpu_layers=0, extra_buffers=False)
        everything = random_tokens(TOKENS + 60, spec).astype(np.int32)
        self.tokens = everything[:TOKENS]
        self.question = Prompt(everything[TOKENS + 40 : TOKENS + 54], ending=4)

    def context(self, **options: Any) -> Context:
        return Context(self.model, 512, replace(OPTIONS, **options))


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Loaded]]:
    models: dict[str, Loaded] = {}

    def get(name: str) -> Loaded:
        if name not in models:
            models[name] = Loaded(tmp_path_factory.mktemp(name), SPECS[name])
        return models[name]

    yield get
    for one in models.values():
        one.model.close()


CACHES: list[dict[str, Any]] = [
    {"type_k": "f16", "type_v": "f16", "flash_attn": "off"},
    {"type_k": "f16", "type_v": "f16", "flash_attn": "on"},
    {"type_k": "q8_0", "type_v": "q8_0", "flash_attn": "on"},
    {"ubatch_size": 7},
    {"ubatch_size": 64},
]


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("cache", CACHES, ids=str)
def test_norms_are_those_of_captured_values(
    name: str, cache: dict[str, Any], load: Callable[[str], Loaded]
) -> None:
    """Of the same decode; and of what they add to the stream, head by head."""
    one, count = load(name), 40
    spec = one.spec
    with one.context(**cache) as context:
        probe = context.probe
        probe.use_factors(output.factors(one.model))
        captured: dict[str, NDArray[Any]] = {}
        for kind in ("values", "value_norms", "output_norms"):
            captured[kind] = probe.new(kind, count - 3)
            captured[kind][...] = np.nan
            with probe.armed(**{kind: (captured[kind], 3)}):
                context.decode(one.tokens[:count], 0, MAIN)
            context.clear()
    values = captured["values"].astype(np.float16).astype(np.float64)
    norms = np.linalg.norm(values, axis=-1)
    np.testing.assert_allclose(captured["value_norms"], norms, rtol=1e-5)
    np.testing.assert_allclose(kernels.value_norms(captured["values"]), norms, rtol=1e-5)
    group, added = spec.heads // spec.kv_heads, np.zeros(norms.shape)
    for layer in range(spec.layers):
        matrix = one.weights[f"blk.{layer}.attn_output.weight"].astype(np.float64)
        if spec.ftype == "Q8_0":
            kind = gguf.GGMLQuantizationType.Q8_0
            rows = gguf.quants.quantize(matrix.astype(np.float32), kind)
            matrix = gguf.quants.dequantize(rows, kind).astype(np.float64)
        for head in range(spec.heads):
            columns = matrix[:, head * spec.head_dim : (head + 1) * spec.head_dim]
            stream = values[layer, :, head // group] @ columns.T
            added[layer, :, head // group] += np.linalg.norm(stream, axis=-1) ** 2 / group
    np.testing.assert_allclose(captured["output_norms"], np.sqrt(added), rtol=1e-4)
    np.testing.assert_allclose(
        kernels.value_norms(captured["values"], output.factors(one.model)),
        captured["output_norms"],
        rtol=1e-5,
    )


def test_norms_go_where_they_fit_only(load: Callable[[str], Loaded]) -> None:
    with load("grouped").context() as context:
        probe = context.probe
        norms, values = probe.new("value_norms", 4), probe.new("values", 4)
        for wrong in (norms[..., :1], norms[:, ::2], norms.astype(np.float64)):
            with (
                pytest.raises(ValueError, match="value_norms"),
                probe.armed(value_norms=(wrong, 0)),
            ):
                pytest.fail("it was armed")
        with (
            pytest.raises(ValueError, match="one way"),
            probe.armed(value_norms=(norms, 0), values=(values, 0)),
        ):
            pytest.fail("both were armed")
        with pytest.raises(ValueError, match="use_factors"), probe.armed(output_norms=(norms, 0)):
            pytest.fail("factors were not given")
        with pytest.raises(ValueError, match="factors"):
            probe.use_factors(np.zeros((1, 2, 3, 3), np.float32))


def read(one: Loaded, policy: Policy, **options: Any) -> None:
    with one.context() as context:
        Reader(context, policy, SHORT, **options).read(
            one.tokens, Budget(TOKENS, SIZE, 0.3), one.question
        )


@pytest.mark.parametrize(
    ("broken", "said"),
    [("type", "of type F32, which cannot be read"), ("name", "has no blk.0.attn_output.weight")],
)
def test_output_matrices_that_cannot_be_read(
    broken: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line with the remedy, before anything is read."""
    one = Loaded(tmp_path, TinySpec(layers=1, seed=9))

    def refuse(*_: Any) -> Any:
        raise NotImplementedError

    if broken == "type":
        monkeypatch.setattr(gguf.quants, "dequantize", refuse)
    else:
        monkeypatch.setattr(gguf, "GGUFReader", lambda path: SimpleNamespace(tensors=[]))
    with pytest.raises(UserError, match=said) as error:
        read(one, policies.make("laser", values="output"))
    assert "--policy-option values=norm" in error.value.with_flags
    assert "\n" not in str(error.value)
    one.model.close()


def test_a_model_that_shows_no_values(
    load: Callable[[str], Loaded], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an architecture under other names is like: nothing is captured, and that is said."""
    monkeypatch.setattr(Probe, "_want_norms", lambda *_: None)
    with pytest.raises(UserError, match="shows none of a llama model") as error:
        read(load("grouped"), policies.make("laser", values="norm"))
    assert "values=none" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("scoring", ["host", "device"])
@pytest.mark.parametrize("recall", [True, False])
def test_laser_as_it_comes_weighs_none_where_none_are_shown(
    scoring: str,
    recall: bool,
    load: Callable[[str], Loaded],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It reads on, says so once, and keeps what it would by attention alone."""
    one = load("grouped")

    def kept(values: str) -> list[NDArray[np.int64]]:
        settings = {"recall": "ram"} if recall else {}
        with LaserKV(
            one.model,
            context=ContextOptions(SIZE, 64, threads=1),
            policy_options={"values": values},
            ratio=0.3,
            block_size=SIZE,
            lookahead=2,
            scoring=scoring,
            **settings,  # type: ignore[arg-type]
        ) as engine:
            talk = engine.conversation(document="Of all the ways to go " * 9, max_tokens=4)
            found = [talk.read(question="which way?").kept]
            for asked in ("which way?", "how far?"):
                list(talk.ask(asked))
                found.append(talk.reading.kept)  # type: ignore[union-attr]
            return found

    weighed = kept("norm")
    monkeypatch.setattr(Probe, "_want_norms", lambda *_: None)
    with caplog.at_level(logging.WARNING):
        by_itself = kept("auto")
    assert [record.getMessage() for record in caplog.records if "values" in record.msg] == [
        "this build of llama.cpp shows no values of a llama model: laser weighs none"
    ]
    plain = kept("none")
    for found, truth in zip(by_itself, plain, strict=True):
        np.testing.assert_array_equal(found, truth)
    assert any(not np.array_equal(a, b) for a, b in zip(weighed, plain, strict=True))


# ---- a softmax over all, against the attention of a forward pass -----------------------------


@dataclass(frozen=True)
class Everything(Policy):
    """Keeps at random, and looks at attention in every way."""

    name: ClassVar[str] = "everything"
    needs: ClassVar[Needs] = Needs(
        queries=True, attention=True, value_norms="norm", outside=True, precise=True
    )

    def select(self, candidates: Candidates, budget: int) -> NDArray[np.int64]:
        scores = {
            (values, over, last): candidates.attention(
                last, values=values, softmax="all", over=over
            )
            for values in (False, True)
            for over in ("sum", "max")
            for last in (None, 2)
        }
        candidates.memory.setdefault("scores", []).append((candidates.tokens, scores))
        rng = np.random.default_rng(candidates.index)
        return rng.permutation(candidates.count)[:budget]


class Watching(Recorder):
    """Of a policy that looks at scores; it remembers those."""

    def select(self, candidates: Candidates, budget: int) -> NDArray[np.int64]:
        chosen = super().select(candidates, budget)
        self.scores = candidates.memory["scores"]
        return chosen


def expected(
    attention: NDArray[Any], values: NDArray[Any], rows: slice, tokens: NDArray[np.int64]
) -> dict[tuple[bool, str, int | None], NDArray[np.float64]]:
    """Scores by a forward pass: attention (layers, heads, n, n), values (layers, n, kv_heads, d).

    Args:
        rows: of the tokens that ask.
    """
    heads = attention.shape[1]
    norms = np.linalg.norm(values[:, tokens], axis=-1)
    norms = np.repeat(norms, heads // norms.shape[2], axis=2).transpose(0, 2, 1)
    found = {}
    for last in (None, 2):
        asked = attention[:, :, rows][:, :, 0 if last is None else -last :, tokens]
        for weighs in (False, True):
            by_token = (asked * norms[:, :, None] if weighs else asked).sum(axis=(0, 1))
            found[weighs, "sum", last] = by_token.sum(axis=0)
            found[weighs, "max", last] = by_token.max(axis=0)
    return found


def compare(found: dict[Any, NDArray[Any]], truth: dict[Any, NDArray[Any]]) -> None:
    assert found.keys() == truth.keys()
    for name, scores in truth.items():
        assert np.abs(found[name] - scores).max() < 2e-3 * scores.max(), name


@pytest.mark.parametrize("name", ["grouped", "qwen2"])
@pytest.mark.parametrize("scoring", ["host", "device"])
@pytest.mark.parametrize("asked", [True, False], ids=["question", "no-question"])
@pytest.mark.parametrize("start", [0, 15])
def test_the_whole_softmax_is_the_models_own(
    name: str, scoring: str, asked: bool, start: int, load: Callable[[str], Loaded]
) -> None:
    """Against the attention of forward passes from which what was evicted is hidden.

    With something before the document, too. Few tokens ask where there is no question: fewer than
    the window has, so that none of them is a candidate that another does not see.
    """
    one, policy = load(name), Watching(Everything())
    budget = Budget(TOKENS - start, SIZE, 0.4)
    before, tokens = one.tokens[:start], one.tokens[start:]
    settings = replace(SHORT, observation=5)
    assert budget.window >= 5
    with one.context() as context:
        reader = Reader(context, policy, settings, scoring=scoring)
        if start:
            reader.forget()
            context.decode(before, 0, MAIN)
        reader.read(tokens, budget, one.question if asked else None, start=start)
        assert reader.scoring == scoring
        for number in range(1, SEQUENCES):
            assert Sequence(context, number).last == -1
    evicted: dict[int, int] = {}
    for block, seen, (candidates, scores) in zip(
        budget.blocks, policy.seen, policy.scores, strict=True
    ):
        end = start + block.end
        sequence = one.tokens[:end]
        if asked:
            sequence = np.concatenate((sequence, one.question.tokens))
            drafts = seen.queries.shape[1] - 12
            for _ in range(drafts):
                mask = visibility(len(sequence), evicted)
                logits = forward(one.weights, one.spec, sequence, visible=mask).logits[-1]
                sequence = np.append(sequence, logits.argmax())
        mask = visibility(len(sequence), evicted)
        truth = forward(one.weights, one.spec, sequence, visible=mask)
        rows = slice(len(sequence) - seen.queries.shape[1], len(sequence))
        compare(scores, expected(truth.attention, truth.values, rows, start + candidates))
        kept = {start + token for token in policy.kept(budget, block.index + 1)}
        for token in {*range(start, end)} - kept - {*evicted}:
            evicted[token] = end
    assert evicted


@pytest.mark.parametrize("scoring", ["host", "device"])
def test_the_whole_softmax_where_positions_move(
    scoring: str, load: Callable[[str], Loaded]
) -> None:
    """Against `Cache`, whose keys are turned to where they stand when they are looked at."""
    one, policy = load("grouped"), Watching(Everything())
    budget = Budget(TOKENS, SIZE, 0.3)
    with one.context() as context:
        reader = Reader(context, policy, SHORT, compact=True, scoring=scoring)
        reader.read(one.tokens, budget, one.question)
    cache = Cache(one)  # type: ignore[arg-type]
    for block, seen, (candidates, scores) in zip(
        budget.blocks, policy.seen, policy.scores, strict=True
    ):
        cache.decode(one.tokens[block.start : block.end], len(cache.positions), block.start)
        scratch, at = copy.deepcopy(cache), int(cache.positions[-1]) + 1
        _, drafts = cache.asked(one.question, SHORT)
        asked = np.array([*one.question.tokens, *drafts], np.int32)
        _, queries = scratch.decode(asked, at, first=10_000)
        keys = np.stack([scratch.turned(layer, scratch.positions) for layer in scratch.raw])
        wide = np.repeat(keys, one.spec.heads // one.spec.kv_heads, axis=2)
        logits = np.einsum("lqhd,lkhd->lhqk", queries, wide) / one.spec.head_dim**0.5
        old = len(cache.positions)
        unseen = np.arange(len(asked))[None] > np.arange(len(asked))[:, None]
        logits[..., old:][..., unseen] = -np.inf
        attention = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
        rows = slice(len(asked) - seen.queries.shape[1], len(asked))
        where = np.searchsorted(cache.tokens, candidates)
        compare(scores, expected(attention, scratch.values, rows, where))
        cache.keep(policy.kept(budget, block.index + 1), compact=True)


@pytest.mark.parametrize("scoring", ["host", "device"])
def test_a_softmax_over_the_ends(scoring: str, load: Callable[[str], Loaded]) -> None:
    """What was kept of earlier blocks does not count: the model's own attention without it."""

    @dataclass(frozen=True)
    class Ends(Everything):
        needs: ClassVar[Needs] = replace(Everything.needs, outside_kept=False)

    one, policy = load("grouped"), Watching(Ends())
    budget = Budget(TOKENS, SIZE, 0.4)
    with one.context() as context:
        reader = Reader(context, policy, SHORT, scoring=scoring)
        reader.read(one.tokens, budget, one.question)
    evicted: dict[int, int] = {}
    for block, seen, (candidates, scores) in zip(
        budget.blocks, policy.seen, policy.scores, strict=True
    ):
        sequence = np.concatenate((one.tokens[: block.end], one.question.tokens))
        for _ in range(seen.queries.shape[1] - 12):
            mask = visibility(len(sequence), evicted)
            logits = forward(one.weights, one.spec, sequence, visible=mask).logits[-1]
            sequence = np.append(sequence, logits.argmax())
        mask = visibility(len(sequence), evicted)
        truth = forward(one.weights, one.spec, sequence, visible=mask)
        attention = truth.attention.copy()
        attention[..., budget.anchors : candidates[0]] = 0
        attention /= attention.sum(axis=-1, keepdims=True)
        rows = slice(len(sequence) - seen.queries.shape[1], len(sequence))
        compare(scores, expected(attention, truth.values, rows, candidates))
        for token in {*range(block.end)} - {*policy.kept(budget, block.index + 1)} - {*evicted}:
            evicted[token] = block.end


@pytest.mark.parametrize("shape", ["accumulating", "recursive", "one-shot"])
def test_keys_of_all_that_is_visible(shape: str, load: Callable[[str], Loaded]) -> None:
    """`Needs.visible`: the keys of the forward pass, of what is in the cache and nothing else."""

    @dataclass(frozen=True)
    class Looks(Policy):
        name: ClassVar[str] = "looks"
        needs: ClassVar[Needs] = Needs(visible=True, precise=True)

        def select(self, candidates: Candidates, budget: int) -> NDArray[np.int64]:
            assert candidates.visible is not None
            assert candidates.visible_keys is not None
            keys = candidates.visible_keys.copy()
            candidates.memory.setdefault("seen", []).append((candidates.visible, keys))
            found.append(candidates.memory["seen"])
            return np.arange(0, candidates.count)[:budget]

    one, found = load("grouped"), []
    policy = Recorder(Looks())
    budget = Budget(TOKENS, SIZE, 0.3, shape=shape, sinks=3, recent=9)
    with one.context() as context:
        Reader(context, policy, SHORT).read(one.tokens, budget, one.question)
    evicted: dict[int, int] = {}
    inside: list[int] = []
    seen = iter(found[-1])
    for block in budget.blocks:
        inside += range(block.start, block.end)
        if block.evicts:
            tokens, keys = next(seen)
            assert tokens.tolist() == inside
            mask = visibility(block.end, evicted)
            truth = forward(one.weights, one.spec, one.tokens[: block.end], visible=mask).keys
            assert np.abs(keys - truth[:, tokens]).max() < 1e-3
            first, last = block.candidates
            chosen = set(policy.chosen[block.index].tolist())
            stays = [t for t in inside if not first <= t < last or t in chosen]
            evicted |= dict.fromkeys(set(inside) - set(stays), block.end)
            inside = stays
    assert next(seen, None) is None


# ---- laser -------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", ["none", "norm"])
@pytest.mark.parametrize("softmax", ["candidates", "ends", "all"])
@pytest.mark.parametrize("over", ["sum", "max"])
def test_laser_keeps_the_best_by_the_formula(values: str, softmax: str, over: str) -> None:
    given = made((2, 6, 4, 2, 16, 60), seed=3)
    candidates = Candidates(
        np.arange(60),
        (0, 60),
        queries=given["queries"],
        keys=given["keys"],
        value_norms=given["weights"],
        outside=given["outside"],
    )
    policy = Laser(pool=1, values=values, softmax=softmax, over=over, shares="equal")
    added = {"weights": given["weights"]} if values == "norm" else {}
    if softmax != "candidates":
        added["outside"] = given["outside"]
    truth = written_out(given["queries"], given["keys"], **added)
    truth = truth.max(axis=0) if over == "max" else truth.sum(axis=0)
    chosen = policy.select(candidates, 17)
    assert sorted(chosen.tolist()) == sorted(np.argsort(-truth)[:17].tolist())


def test_laser_asks_for_what_its_options_need() -> None:
    assert Laser().needs == replace(Laser.needs, collisions=False)
    assert (Laser().values, Laser().softmax, Laser().over) == ("auto", "all", "max")
    plain = Laser(values="none", softmax="candidates", over="sum").needs
    assert (plain.value_norms, plain.outside, plain.holds_all) == ("none", False, False)
    ends = Laser(softmax="ends").needs
    assert (ends.outside, ends.holds_all) == (True, False)
    weighing = Laser(values="output", softmax="all").needs
    assert (weighing.value_norms, weighing.outside, weighing.values) == ("output", True, False)
    hashing = Laser(alpha=0, values="norm", softmax="all").needs
    assert (hashing.value_norms, hashing.outside) == ("none", False)


@pytest.mark.parametrize(
    ("option", "known"),
    [
        ("values", "auto, none, norm, output"),
        ("softmax", "candidates, ends, all"),
        ("over", "sum, max"),
        ("shares", "equal, one, best"),
    ],
)
def test_options_that_cannot_be(option: str, known: str) -> None:
    with pytest.raises(UserError, match=f"{option} is 'mean'; give {known}"):
        policies.make("laser", **policies.parse("laser", [f"{option}=mean"]))


def test_the_paper_is_as_it_was_published() -> None:
    """Arxiv 2602.02199: softmax over the candidates, summed; alpha 0.75; no pooling over tokens.

    The last quarter by the theoretical probability that a table's bits collide.
    """
    policy = Laser(alpha=PAPER["alpha"], **PAPER_OPTIONS)
    given = made((2, 6, 4, 2, 16, 60), seed=4)
    candidates = Candidates(np.arange(60), (0, 60), queries=given["queries"], keys=given["keys"])
    truth = written_out(given["queries"], given["keys"]).sum(axis=0)
    chosen = set(policy.select(candidates, 20).tolist())
    exact = np.argsort(-truth)[:15].tolist()
    assert set(exact) <= chosen
    queries, keys = given["queries"].astype(float), given["keys"].astype(float)
    centred = keys - keys.mean(axis=1, keepdims=True)
    worth = np.zeros(60)
    for layer in range(2):
        for head in range(4):
            rows = centred[layer, :, head // 2]
            for query in queries[layer, :, head]:
                cosine = rows @ query / np.linalg.norm(rows, axis=1) / np.linalg.norm(query)
                worth += (1 - np.arccos(cosine) / np.pi) ** policy.hash_bits
    rest = [token for token in np.argsort(-worth).tolist() if token not in exact]
    assert chosen == {*exact, *rest[:5]}
    assert policy.budget(TOKENS, SIZE, 0.3, 4) == Budget(TOKENS, SIZE, 0.3, 4)


@pytest.mark.parametrize(("tokens", "ratio"), [(2048, 0.1), (2048, 0.05), (180, 0.1), (60, 0.05)])
@pytest.mark.parametrize("shares", ["one", "best"])
def test_one_pool_is_all_that_is_kept(tokens: int, ratio: float, shares: str) -> None:
    """floor(r L) tokens, a few at both ends among them, after the first block as after the last."""
    policy = policies.make("laser", shares=shares)
    budget = policy.budget(tokens, 48, ratio, 4)
    total = int(ratio * tokens + 1e-9)
    assert budget.kept == total
    assert all(block.kept_after <= total for block in budget.blocks)
    assert budget.anchors <= 4
    assert 1 <= budget.window <= 32
    assert budget.long_term >= total - 2 * max(total // 4, 1)


def test_one_pool_chosen_anew(load: Callable[[str], Loaded]) -> None:
    """Tokens that an earlier block kept can go; nothing is lost of what is counted."""
    one, policy = load("grouped"), Recorder(policies.make("laser", shares="one", values="norm"))
    budget = policy.budget(TOKENS, SIZE, 0.3, 4)
    with one.context() as context:
        reading = Reader(context, policy, SHORT).read(one.tokens, budget, one.question)
    assert len(reading.kept) == budget.kept == int(0.3 * TOKENS)
    assert reading.kept_per_block == [block.kept_after for block in budget.blocks]
    first, last = policy.seen[0], policy.seen[-1]
    assert set(last.tokens.tolist()) & set(first.tokens.tolist())  # they compete again
    norms = last.value_norms
    assert norms is not None
    assert norms.shape == (one.spec.layers, last.count, one.spec.kv_heads)
    truth = forward(one.weights, one.spec, one.tokens).values  # of the first layer nothing hides
    lengths = np.linalg.norm(truth[0, last.tokens], axis=-1)
    np.testing.assert_allclose(norms[0], lengths, rtol=2e-3)


@pytest.mark.parametrize("pool", [1, 5])
@pytest.mark.parametrize("even", [0.0, 0.5, 1.0])
def test_what_was_found_once_keeps_its_best_score(pool: int, even: float) -> None:
    """Every block by the formula: the best of each block's share, then the best of all.

    A token's score is the largest that it was given so far.
    """
    policy = Laser(pool=pool, shares="best", even=even)
    tokens, memory, starts = np.arange(40), dict[str, Any](), [0]
    best: dict[int, float] = {}
    for index in range(4):
        given = made((2, 5, 4, 2, 16, len(tokens)), seed=index)
        if index:
            given["outside"] += 3  # more is seen: what was found before would lose anew
            starts.append(40 + 30 * (index - 1))
        candidates = Candidates(
            tokens,
            (starts[-1], int(tokens[-1]) + 1),
            index,
            queries=given["queries"],
            keys=given["keys"],
            value_norms=given["weights"],
            outside=given["outside"],
            memory=memory,
        )
        scores = written_out(
            given["queries"], given["keys"], given["weights"], given["outside"]
        ).max(axis=0)
        near = np.abs(tokens[:, None] - tokens) <= pool // 2
        for token, score in zip(tokens.tolist(), (near @ scores) / near.sum(axis=1), strict=True):
            best[token] = max(score, best.get(token, 0))
        order = sorted(tokens.tolist(), key=lambda token: -best[token])
        truth: list[int] = []
        for start, end in zip(starts, [*starts[1:], 1000], strict=True):
            own = [token for token in order if start <= token < end]
            truth += own[: int(even * 15) // len(starts)]
        truth += [token for token in order if token not in truth][: 15 - len(truth)]
        chosen = tokens[policy.select(candidates, 15)]
        assert chosen.tolist() == sorted(truth)
        tokens = np.concatenate((chosen, 40 + 30 * index + np.arange(30)))
    kept = tokens[:15]
    assert (kept < 40).sum() >= 3  # of the first block, though others came
    if even == 1:
        assert all(((kept >= start) & (kept < start + 30)).any() for start in starts)


# ---- drafts that reach ----------------------------------------------------------------------


class Scripted(Context):
    """A context whose next tokens are scripted: an answer, wherever the question ends."""

    said: list[int]
    asked: NDArray[np.int32]

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.probes: list[list[int]] = []  # tokens of every batch that asks
        self._positions = range(0)

    def decode(self, tokens: Any, start: int, sequence: int, **options: Any) -> None:
        if sequence == PROBE:
            self.probes.append([int(token) for token in tokens])
            if len(tokens) >= len(self.asked) and np.array_equal(
                tokens[: len(self.asked)], self.asked
            ):
                self.answers_at = start + len(self.asked)
            self._positions = range(start, start + len(tokens))
        super().decode(tokens, start, sequence, **options)

    def logits(self, index: int = -1) -> NDArray[np.float32]:
        place = self._positions[index] + 1 - self.answers_at
        scores = np.zeros(self.model.vocab_size, np.float32)
        scores[self.said[min(place, len(self.said) - 1)]] = 1
        return scores


def answers(one: Loaded, said: list[int], tokens: NDArray[np.int32], **settings: Any) -> Scripted:
    """Reads with a probe that answers so, and compares what asked with `Cache`."""
    recorder = Recorder(policies.make("laser", shares="equal"))
    budget = Budget(len(tokens), SIZE, 0.4)
    asking = ProbeSettings(tokens=8, **settings)
    with Scripted(one.model, 640, OPTIONS) as context:
        context.said, context.asked = said, one.question.tokens
        Reader(context, recorder, asking).read(tokens, budget, one.question)
        context.recorder = recorder  # type: ignore[attr-defined]
    cache = Cache(one)  # type: ignore[arg-type]
    context.drafted = []  # type: ignore[attr-defined]
    for block, seen in zip(budget.blocks, recorder.seen, strict=True):
        cache.decode(tokens[block.start : block.end], block.start, block.start)
        count = seen.queries.shape[1] - 12
        truth = cache.told(one.question, asking, said[:count])
        assert np.abs(seen.queries - truth).max() < 1e-3
        context.drafted.append(count)  # type: ignore[attr-defined]
        cache.keep(recorder.kept(budget, block.index + 1), compact=False)
    return context


def test_a_copied_answer_is_drafted_to_its_end(load: Callable[[str], Loaded]) -> None:
    """30 tokens of a block, behind two of its own and before others: all that is copied asks.

    In the blocks before, what is said stands nowhere, and `lookahead` is the end.
    """
    one = load("grouped")
    copied = one.tokens[60:90].tolist()  # in the second block
    said = [300, 301, *copied, *range(305, 330)]
    context = answers(one, said, one.tokens, lookahead=6, reach=50, rounds=3)
    first, *others = context.drafted  # type: ignore[attr-defined]
    assert first == 6
    assert others[0] == len(said) - 25
    assert all(count >= 6 for count in others)
    second = [batch for batch in context.probes if set(batch) & set(copied)]
    assert 2 < len(second) < 24  # batches, not tokens one by one


def test_a_copied_answer_goes_on_while_it_is_kept(load: Callable[[str], Loaded]) -> None:
    """The policy keeps what was copied, and later blocks draft it again in a batch or two."""
    one = load("grouped")
    said = [*one.tokens[10:28].tolist(), *range(305, 330)]
    budget, recorder = Budget(TOKENS, SIZE, 0.5), Recorder(Copies(tuple(range(10, 28))))
    with Scripted(one.model, 640, OPTIONS) as context:
        context.said, context.asked = said, one.question.tokens
        asking = ProbeSettings(tokens=8, lookahead=6, reach=50)
        Reader(context, recorder, asking).read(one.tokens, budget, one.question)
    asked = one.question.tokens.tolist()
    starts = [n for n, batch in enumerate(context.probes) if batch[: len(asked)] == asked]
    batches = np.diff([*starts, len(context.probes)])
    assert len(batches) == len(budget.blocks)
    assert (batches[1:] <= 5).all()
    assert [seen.queries.shape[1] - 12 for seen in recorder.seen] == [18] * len(budget.blocks)


@dataclass(frozen=True)
class Copies(Policy):
    """Keeps some tokens first."""

    first: tuple[int, ...] = ()
    name: ClassVar[str] = "copies"
    needs: ClassVar[Needs] = Needs(queries=True, keys=True)

    def select(self, candidates: Candidates, budget: int) -> NDArray[np.int64]:
        wanted = np.isin(candidates.tokens, self.first)
        return np.argsort(~wanted, kind="stable")[:budget]


@pytest.mark.parametrize(
    ("settings", "most"), [({"reach": 20}, 20), ({"reach": 0}, 6), ({}, 6), ({"reach": 3}, 6)]
)
def test_copying_is_bounded(
    settings: dict[str, int], most: int, load: Callable[[str], Loaded]
) -> None:
    one = load("grouped")
    said = one.tokens[60:100].tolist()
    context = answers(one, [*said, 400], one.tokens, lookahead=6, **settings)
    assert context.drafted[1] == most  # type: ignore[attr-defined]
    assert max(context.drafted) == most  # type: ignore[attr-defined]


def test_what_is_said_over_and_over_is_not_copied() -> None:
    """Four tokens in a row, at most three times; the last time counts."""
    text = np.array([1, 2, 3, 4, 5, 9, 1, 2, 3, 4, 6, 7, 8], np.int32)
    drafts = Drafts(seen=text)
    assert drafts.copied([1, 2, 3]) is None
    assert drafts.copied([1, 2, 3, 4]) == [6, 7, 8]
    assert drafts.copied([0, 0, 2, 3, 4, 5]) == [9, 1, 2, 3, 4, 6, 7, 8]
    drafts.trust = 2
    assert drafts.copied([0, 0, 2, 3, 4, 5]) == [9, 1]
    assert drafts.copied([1, 2, 3, 7]) is None
    assert drafts.copied([4, 6, 7, 8]) is None  # nothing follows
    assert Drafts(seen=np.tile(text, 2)).copied([1, 2, 3, 4]) is None


def test_cells_are_planned_for_what_is_copied() -> None:
    """Unless the user says how many tokens are drafted."""
    needs = policies.make("laser").needs
    assert needs.most_drafts() == needs.reach > needs.lookahead
    assert needs.most_drafts(5) == 5
    assert needs.most_drafts(0) == 0
    assert policies.make("snapkv").needs.most_drafts() == 0
    assert ProbeSettings().most_drafts(needs) == needs.reach
    assert ProbeSettings(lookahead=7).most_drafts(needs) == 7
    assert ProbeSettings(lookahead=7, reach=9).most_drafts(needs) == 9
    assert ProbeSettings(lookahead=0, reach=9).most_drafts(needs) == 0
