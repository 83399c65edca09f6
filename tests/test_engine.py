"""The block loop on llama.cpp, against NumPy forward passes that cannot see what was evicted.

The strongest truth is `tiny.forward` with a mask: every evicted token is hidden from every later
one, and logits of all tokens must agree. Where positions move (compact), one forward pass cannot
say it; `Cache` holds unrotated keys and rotates them to where they stand when they are looked at.
"""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import llama_cpp as L
import numpy as np
import pytest
import tiny
from numpy.typing import NDArray
from tiny import TinySpec, forward, make, random_tokens, visibility

from laserkv_gguf import policies
from laserkv_gguf.budget import Budget
from laserkv_gguf.errors import Cancelled, LaserKVError
from laserkv_gguf.kernels._jit import set_threads, threads_in_use
from laserkv_gguf.llama import moving, rows
from laserkv_gguf.llama import scorer as device
from laserkv_gguf.llama.chat import Prompt
from laserkv_gguf.llama.context import SEQUENCES, Context, ContextOptions
from laserkv_gguf.llama.model import Model
from laserkv_gguf.llama.sequence import MAIN, PROBE, SPARE, Sequence
from laserkv_gguf.policies import Candidates, Needs, Policy, PolicyError
from laserkv_gguf.reading.asking import Drafts, ProbeSettings
from laserkv_gguf.reading.reader import Progress, Reader, Reading
from laserkv_gguf.timings import STEPS

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
TOLERANCE = 1e-4  # in standard deviations of the logits; about 3e-6 is seen
SIZE, TOKENS, RATIO = 48, 180, 0.4  # three whole blocks and one of 36
SPECS = {"llama": TinySpec(), "qwen2": TinySpec(arch="qwen2", seed=4)}
CROWD = SEQUENCES  # takes cells where a test wants few to be free
PLAIN: dict[str, Any] = {
    "values": "none",
    "softmax": "candidates",
    "over": "sum",
    "shares": "equal",
}
SHORT = ProbeSettings(tokens=8, lookahead=3, observation=6, rounds=99)


class Loaded:
    """A model with random tokens to read, to ask and to go on with."""

    def __init__(self, directory: Path, spec: TinySpec) -> None:
        path, self.spec, self.weights = make(directory, spec=spec)
        self.model = Model(path, gpu_layers=0, extra_buffers=False)
        everything = random_tokens(TOKENS + 60, spec).astype(np.int32)
        self.tokens, self.later = everything[:TOKENS], everything[TOKENS : TOKENS + 40]
        # 14 tokens, the last 4 of them the template's: with 8 of the text's that makes 12
        self.question = Prompt(everything[TOKENS + 40 : TOKENS + 54], ending=4)

    def context(self, **options: Any) -> Watched:
        return Watched(self.model, 512, replace(OPTIONS, **options))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Loaded]]:
    models = {name: Loaded(tmp_path_factory.mktemp(name), spec) for name, spec in SPECS.items()}
    yield models
    for one in models.values():
        one.model.close()


def standing(context: Context, sequence: int = MAIN) -> list[int]:
    """The positions llama.cpp's cache holds for a sequence, asked one by one."""
    one, memory = SEQUENCES - 1, context.memory
    found = []
    for position in range(int(L.llama_memory_seq_pos_max(memory, sequence)) + 1):
        L.llama_memory_seq_cp(memory, sequence, one, position, position + 1)
        if L.llama_memory_seq_pos_max(memory, one) == position:
            found.append(position)
        L.llama_memory_seq_rm(memory, one, -1, -1)
    return found


class Watched(Context):
    """A context that notes what is decoded, and all logits of the main sequence when asked to."""

    def __init__(self, *args: Any) -> None:
        self.decodes: list[tuple[int, int, int]] = []  # sequence, first position, tokens
        self.before: list[list[int]] = []  # what stood in the main sequence before its decodes
        self.rows: list[NDArray[np.float32]] = []
        self.collecting = False
        self.occupied = 0  # cells taken by another sequence
        self.on_decode: Callable[[int], None] = lambda number: None
        super().__init__(*args)

    def decode(
        self,
        tokens: Any,
        start: int,
        sequence: int,
        *,
        outputs: int = 0,
        on_chunk: Callable[[int], None] | None = None,
    ) -> None:
        if sequence in (SPARE, CROWD):
            return super().decode(tokens, start, sequence)
        self.decodes.append((sequence, start, len(tokens)))
        self.on_decode(len(self.decodes))
        if sequence != MAIN or not self.collecting:
            return super().decode(tokens, start, sequence, outputs=outputs, on_chunk=on_chunk)
        self.before.append(standing(self))
        for begin in range(0, len(tokens), self.options.ubatch_size):
            chunk = tokens[begin : begin + self.options.ubatch_size]
            count = len(chunk)
            super().decode(chunk, start + begin, sequence, outputs=count, on_chunk=on_chunk)
            self.rows += [self.logits(index - count) for index in range(count)]
        return None

    def clear(self) -> None:
        super().clear()
        if self.occupied:
            self.decode(np.full(self.occupied, 5, np.int32), 0, CROWD)


class Recorder(Policy):
    """Asks another policy and remembers what that saw and chose."""

    def __init__(self, inner: Policy) -> None:
        self.inner = inner
        self.name, self.needs = inner.name, inner.needs  # type: ignore[misc]
        self.seen: list[Candidates] = []
        self.chosen: dict[int, NDArray[np.int64]] = {}  # block -> indices in the sequence

    def budget(self, *args: Any) -> Budget:
        return self.inner.budget(*args)

    def select(self, candidates: Candidates, budget: int) -> NDArray[np.int64]:
        arrays = {
            kind: None if (array := getattr(candidates, kind)) is None else array.copy()
            for kind in ("queries", "keys", "values")
        }
        self.seen.append(replace(candidates, **arrays))
        chosen = self.inner.select(candidates, budget)
        self.chosen[candidates.index] = candidates.tokens[np.sort(chosen)]
        return chosen

    def kept(self, budget: Budget, blocks: int | None = None) -> list[int]:
        """What must be held after so many blocks: anchors, what was chosen, and the window."""
        last = budget.blocks[len(budget.blocks) - 1 if blocks is None else blocks - 1]
        if budget.keeps_all or not (budget.accumulates or last.evicts):
            return list(range(last.end))
        held = set(range(min(budget.anchors, last.end)))
        held |= set(range(max(last.end - budget.window, 0), last.end))
        for block in budget.blocks[: last.index + 1] if budget.accumulates else (last,):
            if not block.evicts:
                held |= set(range(*block.candidates))
            elif block.index in self.chosen:
                held |= set(self.chosen[block.index].tolist())
        return sorted(held)


class Cache:
    """A NumPy cache: keys before RoPE, each with a position that can be changed."""

    def __init__(self, one: Loaded) -> None:
        self.spec = one.spec
        self.weights = {name: w.astype(np.float64) for name, w in one.weights.items()}
        shape = (one.spec.layers, 0, one.spec.kv_heads, one.spec.head_dim)
        self.raw, self.values = np.zeros(shape), np.zeros(shape)
        self.positions = np.zeros(0, np.int64)
        self.tokens = np.zeros(0, np.int64)  # indices in the sequence

    def turned(self, raw: NDArray[Any], positions: NDArray[np.int64]) -> NDArray[Any]:
        factors = self.weights.get("rope_freqs.weight")
        return tiny._rope(self.spec, raw, tiny._angles(self.spec, positions, factors))

    def decode(
        self, ids: NDArray[Any], start: int, first: int = 0
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Logits and queries of tokens at positions start, …; `first` is their index."""
        spec, weights, count = self.spec, self.weights, len(ids)
        new = np.arange(start, start + count)
        old = len(self.positions)
        self.positions = np.concatenate((self.positions, new))
        self.tokens = np.concatenate((self.tokens, np.arange(first, first + count)))
        seen = np.concatenate((np.ones((count, old), bool), np.tri(count, dtype=bool)), axis=1)
        group = spec.heads // spec.kv_heads
        raw, values, queries = [], [], []
        stream = weights["token_embd.weight"][np.asarray(ids)]
        for layer in range(spec.layers):
            block = f"blk.{layer}."
            normed = tiny._rms_norm(stream, weights[block + "attn_norm.weight"], spec.rms_eps)
            q, k, v = (
                tiny._linear(weights, f"{block}attn_{name}", normed).reshape(count, heads, -1)
                for name, heads in (("q", spec.heads), ("k", spec.kv_heads), ("v", spec.kv_heads))
            )
            raw.append(np.concatenate((self.raw[layer], k)))
            values.append(np.concatenate((self.values[layer], v)))
            queries.append(self.turned(q, new))
            keys = np.repeat(self.turned(raw[-1], self.positions), group, axis=1)
            scores = np.einsum("qhd,khd->hqk", queries[-1], keys) / math.sqrt(spec.head_dim)
            attention = tiny._softmax(np.where(seen, scores, -np.inf))
            mixed = np.einsum("hqk,khd->qhd", attention, np.repeat(values[-1], group, axis=1))
            stream = stream + tiny._linear(weights, block + "attn_output", mixed.reshape(count, -1))
            normed = tiny._rms_norm(stream, weights[block + "ffn_norm.weight"], spec.rms_eps)
            gate = tiny._linear(weights, block + "ffn_gate", normed)
            up = tiny._linear(weights, block + "ffn_up", normed)
            stream = stream + tiny._linear(
                weights, block + "ffn_down", gate / (1 + np.exp(-gate)) * up
            )
        self.raw, self.values = np.stack(raw), np.stack(values)
        normed = tiny._rms_norm(stream, weights["output_norm.weight"], spec.rms_eps)
        return normed @ weights["output.weight"].T, np.stack(queries)

    def keep(self, tokens: list[int], *, compact: bool) -> None:
        rows = np.flatnonzero(np.isin(self.tokens, tokens))
        self.raw, self.values = self.raw[:, rows], self.values[:, rows]
        self.positions, self.tokens = self.positions[rows], self.tokens[rows]
        if compact:
            self.positions = np.arange(len(rows))

    def keys(self, tokens: range) -> NDArray[np.float64]:
        """(layers, tokens, kv_heads, head_dim) of tokens where they stand now."""
        rows = np.flatnonzero(np.isin(self.tokens, tokens))
        assert len(rows) == len(tokens)
        where = self.positions[rows]
        return np.stack([self.turned(layer[rows], where) for layer in self.raw])

    def asked(
        self, question: Prompt, settings: ProbeSettings
    ) -> tuple[NDArray[np.float64], list[int]]:
        """What the lookahead probe must see: queries of the question's end and greedy drafts."""
        scratch, at = copy.deepcopy(self), int(self.positions[-1]) + 1
        logits, queries = scratch.decode(question.tokens, at)
        asking = settings.tokens + question.ending if settings.tokens else len(question)
        found, drafts = [queries[:, -asking:]], []
        for index in range(settings.lookahead):
            drafts.append(int(logits[-1].argmax()))
            logits, queries = scratch.decode(np.array(drafts[-1:]), at + len(question) + index)
            found.append(queries)
        return np.concatenate(found, axis=1), drafts

    def told(
        self, question: Prompt, settings: ProbeSettings, said: list[int]
    ) -> NDArray[np.float64]:
        """The queries of the question's end and of an answer, whatever that is."""
        scratch, at = copy.deepcopy(self), int(self.positions[-1]) + 1
        tokens = np.array([*question.tokens, *said], np.int32)
        asking = settings.tokens + question.ending + len(said)
        return scratch.decode(tokens, at)[1][:, -asking:]


def error(computed: NDArray[Any], expected: NDArray[Any]) -> float:
    """The largest difference, in standard deviations of what is expected; NaN stays NaN."""
    assert computed.shape == expected.shape
    return float(np.abs(computed - expected).max() / expected.std())


def continued(context: Context, reading: Reading, later: NDArray[np.int32]) -> NDArray[Any]:
    """All logits of tokens decoded right after a reading."""
    context.decode(later, reading.next_position, MAIN, outputs=len(later))
    return np.stack([context.logits(index - len(later)) for index in range(len(later))])


def assert_empty(context: Context) -> None:
    for number in range(SEQUENCES):
        if number != SPARE or not getattr(context, "occupied", 0):
            assert Sequence(context, number).last == -1


# ---- logits ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("policy", ["laser", "exact", "magicpig", "random", "streamingllm"])
@pytest.mark.parametrize("asked", [True, False], ids=["question", "no-question"])
def test_all_logits_with_evicted_tokens_hidden(
    name: str, policy: str, asked: bool, loaded: dict[str, Loaded]
) -> None:
    """The forward pass, its mask made of what llama.cpp's cache held before each block.

    And what it held is what the policy chose, by the rules of section 2 of DESIGN.md.
    """
    one, recorder = (
        loaded[name],
        Recorder(policies.make(policy, **({"alpha": 0.75} if policy == "laser" else {}))),
    )
    budget = recorder.budget(TOKENS, SIZE, RATIO, 4)
    with one.context() as context:
        context.collecting = True
        reader = Reader(context, recorder, SHORT)
        reading = reader.read(one.tokens, budget, one.question if asked else None)
        assert standing(context) == reading.kept.tolist() == recorder.kept(budget)
        context.decode(one.later, reading.next_position, MAIN)
        logits = np.stack(context.rows)
    held = [*context.before, []]
    assert held[0] == []
    evicted: dict[int, int] = {}
    for index, block in enumerate(budget.blocks):
        after = held[index + 1]
        assert after == recorder.kept(budget, index + 1)
        assert len(after) == block.kept_after == reading.kept_per_block[index]
        for token in {*held[index], *range(block.start, block.end)} - {*after}:
            evicted[token] = block.end
    assert len(evicted) == TOKENS - budget.kept > 90
    assert reading.next_position == TOKENS

    everything = np.concatenate((one.tokens, one.later))
    seen = visibility(len(everything), evicted)
    truth = forward(one.weights, one.spec, everything, visible=seen).logits
    assert error(logits, truth) < TOLERANCE
    whole = forward(one.weights, one.spec, everything).logits
    assert error(logits, whole) > 0.1  # the mask is felt


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize(("policy", "ratio"), [("full", 0.4), ("laser", 1.0), ("random", 1.0)])
def test_whole_cache_equals_plain_llama_cpp(
    name: str, policy: str, ratio: float, loaded: dict[str, Loaded]
) -> None:
    """Bit for bit, with the same micro-batches, through llama.cpp's C API alone."""
    one, made = loaded[name], policies.make(policy)
    budget = made.budget(TOKENS, SIZE, ratio, 4)
    with one.context() as context:
        context.collecting = True
        reading = Reader(context, made, SHORT).read(one.tokens, budget, one.question)
        context.decode(one.later, reading.next_position, MAIN)
    assert reading.kept.tolist() == list(range(TOKENS))
    assert all(sequence == MAIN for sequence, *_ in context.decodes)  # nothing was probed
    assert np.array_equal(np.stack(context.rows), plain(one, context))


def plain(one: Loaded, like: Watched) -> NDArray[np.float32]:
    params = L.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = 512, 64, 16
    params.n_seq_max, params.kv_unified = SEQUENCES, True
    params.n_threads = params.n_threads_batch = 1
    params.type_k = params.type_v = L.GGML_TYPE_F32
    params.flash_attn_type = L.LLAMA_FLASH_ATTN_TYPE_DISABLED
    handle = L.llama_init_from_model(one.model.handle, params)
    tokens, rows, at = np.concatenate((one.tokens, one.later)), [], 0
    batch = L.llama_batch_init(16, 0, 1)
    try:
        for _, _, count in like.decodes:
            for begin in range(0, count, 16):
                batch.n_tokens = min(16, count - begin)
                for i in range(batch.n_tokens):
                    batch.token[i], batch.pos[i] = int(tokens[at]), at
                    batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, 1
                    at += 1
                assert L.llama_decode(handle, batch) == 0
                shape = (batch.n_tokens, one.spec.vocab)
                rows.append(np.ctypeslib.as_array(L.llama_get_logits(handle), shape).copy())
    finally:
        L.llama_batch_free(batch)
        L.llama_free(handle)
    return np.concatenate(rows)


@pytest.mark.parametrize("compact", [False, True], ids=["original", "compact"])
def test_the_moving_cache_is_the_forward_pass(compact: bool, loaded: dict[str, Loaded]) -> None:
    """`Cache` itself: without evictions, and with one (where positions per token suffice)."""
    one, kept = loaded["qwen2"], [*range(0, 30, 3), *range(30, 48)]
    cache = Cache(one)
    rows = [cache.decode(one.tokens[:48], 0)[0]]
    cache.keep(kept, compact=compact)
    start = len(kept) if compact else 48
    rows.append(cache.decode(one.tokens[48:80], start)[0])
    seen = visibility(80, dict.fromkeys(set(range(48)) - set(kept), 48))
    truth = forward(one.weights, one.spec, one.tokens[:80], visible=seen)
    if not compact:
        assert error(np.concatenate(rows), truth.logits) < 1e-9
        return
    # attention sees distances: what was read before the shift is as it was at any position
    assert error(rows[0], truth.logits[:48]) < 1e-9
    assert error(rows[1], truth.logits[48:]) > 0.1
    assert np.array_equal(cache.positions, np.arange(len(kept) + 32))


# ---- compact positions -------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "tolerance"), [("f32", TOLERANCE), ("f16", 0.02)])
def test_one_compaction_in_one_forward_pass(kind: str, tolerance: float, tmp_path: Path) -> None:
    """One layer's keys do not depend on what it saw: its tokens' new positions say it all."""
    one = Loaded(tmp_path, TinySpec(layers=1))
    tokens, budget, policy = one.tokens[:60], Budget(60, 48, 0.5), policies.make("random")
    with one.model, one.context(type_k=kind, type_v=kind) as context:
        reading = Reader(context, policy, SHORT, compact=True).read(tokens, budget)
        logits = continued(context, reading, one.later)
    count, everything = len(reading.kept), np.concatenate((tokens, one.later))
    positions = np.arange(len(everything))
    positions[60:] = count + np.arange(len(one.later))
    positions[reading.kept] = np.arange(count)
    hidden = visibility(len(everything), dict.fromkeys({*range(60)} - {*reading.kept.tolist()}, 60))
    truth = forward(one.weights, one.spec, everything, positions, hidden).logits[60:]
    assert error(logits, truth) < tolerance
    stay = forward(one.weights, one.spec, everything, None, hidden).logits[60:]
    assert error(logits, stay) > 0.1  # that positions moved is felt


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("policy", ["laser", "random", "streamingllm"])
def test_all_logits_with_compacted_positions(
    name: str, policy: str, loaded: dict[str, Loaded]
) -> None:
    """Against `Cache`: after every block, positions 0 … kept - 1; never one beyond the cells."""
    one, recorder = loaded[name], Recorder(policies.make(policy))
    budget = recorder.budget(TOKENS, SIZE, RATIO, 4)
    planned = budget.cells(len(one.question), SHORT.lookahead, len(one.later))
    assert planned < TOKENS
    with one.context() as context:
        context.collecting = True
        reader = Reader(context, recorder, SHORT, compact=True)
        reading = reader.read(one.tokens, budget, one.question)
        count = len(reading.kept)
        assert reading.kept.tolist() == recorder.kept(budget)
        assert reading.next_position == count == budget.kept
        assert int(L.llama_memory_seq_pos_max(context.memory, MAIN)) == count - 1
        context.decode(one.later, reading.next_position, MAIN)
        logits = np.stack(context.rows)
    for index, held in enumerate(context.before):
        expected = budget.blocks[index - 1].kept_after if index else 0
        assert held == list(range(expected))
    assert max(start + tokens for _, start, tokens in context.decodes) <= planned

    cache, rows = Cache(one), []
    for index, block in enumerate(budget.blocks):
        ids = one.tokens[block.start : block.end]
        rows.append(cache.decode(ids, len(cache.positions), block.start)[0])
        cache.keep(recorder.kept(budget, index + 1), compact=True)
    rows.append(cache.decode(one.later, len(cache.positions), TOKENS)[0])
    assert error(logits, np.concatenate(rows)) < TOLERANCE


@pytest.mark.parametrize("count", [1, 16, 17, 33, 40, 60])
@pytest.mark.parametrize("outputs", [1, 3, 16, 17, 40])
def test_logits_of_the_last_tokens(count: int, outputs: int, loaded: dict[str, Loaded]) -> None:
    """Against the forward pass, however the outputs lie to the micro-batches of 16."""
    one, outputs = loaded["llama"], min(outputs, count)
    truth = forward(one.weights, one.spec, one.tokens[:count]).logits
    with one.context() as context:
        context.decode(one.tokens[:count], 0, MAIN, outputs=outputs)
        rows = np.stack([context.logits(index - outputs) for index in range(outputs)])
    assert error(rows, truth[-outputs:]) < TOLERANCE


# ---- what policies see -------------------------------------------------------------------------


class Everything(policies.make("random").__class__):  # type: ignore[misc]
    """`random`, but it wants to see all there is."""

    name = "everything"
    needs = Needs(queries=True, keys=True, values=True, precise=True)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("compact", [False, True], ids=["original", "compact"])
@pytest.mark.parametrize("divisor", [3, 4, 8])
def test_candidates_keys_and_values(
    name: str, compact: bool, divisor: int, loaded: dict[str, Loaded]
) -> None:
    """The block's and the look-back window's, where they stand in the cache now.

    The window's keys were captured a block ago; compacting has turned them since.
    """
    one, recorder = loaded[name], Recorder(Everything())
    budget = Budget(TOKENS, SIZE, 0.3, divisor)
    with one.context() as context:
        Reader(context, recorder, SHORT, compact=compact).read(one.tokens, budget, one.question)
    cache = Cache(one)
    assert len(recorder.seen) == len(budget.blocks)
    for block, seen in zip(budget.blocks, recorder.seen, strict=True):
        start = len(cache.positions) if compact else block.start
        cache.decode(one.tokens[block.start : block.end], start, block.start)
        assert seen.tokens.tolist() == list(range(*block.candidates))
        assert (seen.index, seen.block) == (block.index, (block.start, block.end))
        if block.index:
            assert seen.tokens[0] < block.start  # it does look back
        tokens = range(*block.candidates)
        assert np.abs(seen.keys - cache.keys(tokens)).max() < 1e-3
        rows = np.flatnonzero(np.isin(cache.tokens, tokens))
        assert np.abs(seen.values - cache.values[:, rows]).max() < 1e-3
        cache.keep(recorder.kept(budget, block.index + 1), compact=compact)


@pytest.mark.parametrize("compact", [False, True], ids=["original", "compact"])
@pytest.mark.parametrize(
    "settings",
    [
        SHORT,
        ProbeSettings(tokens=8, lookahead=0),
        ProbeSettings(tokens=0, lookahead=2),
        ProbeSettings(tokens=1, lookahead=1),
        ProbeSettings(tokens=99, lookahead=5, rounds=99),
    ],
    ids=str,
)
def test_lookahead_probe_sees_question_and_drafts(
    settings: ProbeSettings, compact: bool, loaded: dict[str, Loaded]
) -> None:
    """Against `Cache`: the question right after the block, and its own argmax as drafts."""
    one, recorder = loaded["llama"], Recorder(policies.make("laser", alpha=0.75))
    budget = Budget(TOKENS, SIZE, RATIO)
    after_probe: list[list[int]] = []
    with one.context() as context:
        reader = Reader(context, recorder, settings, compact=compact)

        def look(progress: Progress) -> None:
            after_probe.append(standing(context, PROBE))

        reader.read(one.tokens, budget, one.question, on_progress=look)
        assert_only_main(context)
    assert not any(after_probe)
    cache = Cache(one)
    for block, seen in zip(budget.blocks, recorder.seen, strict=True):
        start = len(cache.positions) if compact else block.start
        cache.decode(one.tokens[block.start : block.end], start, block.start)
        truth, _ = cache.asked(one.question, settings)
        assert truth.shape[1] == settings.lookahead + {8: 12, 1: 5, 0: 14, 99: 14}[settings.tokens]
        assert seen.queries.shape == truth.shape
        assert np.abs(seen.queries - truth).max() < 1e-3
        cache.keep(recorder.kept(budget, block.index + 1), compact=compact)


@pytest.mark.parametrize("compact", [False, True], ids=["original", "compact"])
def test_drafts_of_the_block_before_are_verified(compact: bool, loaded: dict[str, Loaded]) -> None:
    """Of a text that says the same again, some stay and some change; `Cache` drafts all anew."""
    one, recorder = (
        loaded["llama"],
        Recorder(policies.make("laser", alpha=0.75, **{**PLAIN, "pool": 7})),
    )
    tokens = np.tile(one.tokens[:12], TOKENS // 12)
    budget = Budget(TOKENS, SIZE, RATIO)
    settings = ProbeSettings(tokens=8, lookahead=16, rounds=99)
    with one.context() as context:
        Reader(context, recorder, settings, compact=compact).read(tokens, budget, one.question)
        probes = [count for sequence, _, count in context.decodes if sequence == PROBE]
        assert_only_main(context)
    cache = Cache(one)
    for block, seen in zip(budget.blocks, recorder.seen, strict=True):
        start = len(cache.positions) if compact else block.start
        cache.decode(tokens[block.start : block.end], start, block.start)
        truth, _ = cache.asked(one.question, settings)
        assert np.abs(seen.queries - truth).max() < 1e-3
        cache.keep(recorder.kept(budget, block.index + 1), compact=compact)
    asked = len(one.question)
    assert [count for count in probes if count >= asked][:2] == [asked, asked + 16]
    assert 16 + 4 < len(probes) < 4 * (16 + 1) - 8  # some guesses were wrong, some right


@pytest.mark.parametrize(
    ("tail", "lookahead", "compact", "probed"),
    [(5, 4, False, False), (5, 0, False, True), (5, 4, True, True), (40, 4, False, True)],
)
def test_a_short_last_block_is_not_asked_again(
    tail: int, lookahead: int, compact: bool, probed: bool, loaded: dict[str, Loaded]
) -> None:
    """Unless its cells have moved; and without drafts every method asks as its paper says."""
    one, recorder = loaded["llama"], Recorder(policies.make("laser"))
    tokens = one.tokens[: 2 * SIZE + tail]
    budget = Budget(len(tokens), SIZE, RATIO)
    settings = ProbeSettings(tokens=8, lookahead=lookahead)
    with one.context() as context:
        reader = Reader(context, recorder, settings, compact=compact)
        reading = reader.read(tokens, budget, one.question)
        starts = [start for sequence, start, _ in context.decodes if sequence == PROBE]
    before, last = (seen.queries for seen in recorder.seen[-2:])
    assert np.array_equal(before, last) != probed
    assert (len(tokens) in starts) == (probed and not compact)
    assert len(reading.kept) == budget.kept
    assert recorder.seen[-1].tokens[-1] < len(tokens)


def test_drafts_are_checked_in_a_few_batches(loaded: dict[str, Loaded]) -> None:
    """First what the model says now, then what it said a block ago; `Cache` drafts all anew."""
    one, recorder = loaded["llama"], Recorder(policies.make("laser"))
    budget = Budget(TOKENS, SIZE, RATIO)
    settings = ProbeSettings(tokens=8, lookahead=12, rounds=3)
    with one.context() as context:
        Reader(context, recorder, settings).read(one.tokens, budget, one.question)
        probes = [start for sequence, start, _ in context.decodes if sequence == PROBE]
    cache, before, unchecked = Cache(one), [], 0
    for block, seen in zip(budget.blocks, recorder.seen, strict=True):
        end = budget.blocks[block.index + 1].end if block.index + 1 < len(budget.blocks) else 9999
        batches = sum(block.end <= start < end for start in probes)
        cache.decode(one.tokens[block.start : block.end], block.start, block.start)
        _, drafts = cache.asked(one.question, settings)
        fits = []
        for checked in range(2, 13):
            said = drafts[:checked] + before[checked:]
            told = cache.told(one.question, settings, said)
            if len(said) == 12 and np.abs(seen.queries - told).max() < 1e-3:
                fits.append(said)
        assert fits
        unchecked += fits[-1] != drafts
        assert batches <= (3 if block.index else 13)
        before = fits[-1]
        cache.keep(recorder.kept(budget, block.index + 1), compact=False)
    assert unchecked  # in some block not all could be


def test_what_drafts_are_guessed_from() -> None:
    """Two tokens of the last drafts, then three and two of the block (the last time), then one."""
    drafts = Drafts([1, 2, 3, 4, 2, 5], trust=3, seen=np.array([9, 2, 3, 7, 8, 2, 3, 6], np.int32))
    assert drafts.following([]) == [1, 2, 3]
    assert drafts.following([1]) == [2, 3, 4]
    assert drafts.following([0, 2, 3]) == [4, 2, 5]
    assert drafts.following([8, 2]) == [3, 6]
    assert drafts.following([9, 2]) == [3, 7, 8]
    assert drafts.following([3, 7, 8]) == [2, 3, 6]
    assert drafts.following([0, 2]) == [5]
    assert drafts.following([0, 0]) == drafts.following([9, 5]) == []
    drafts.trust = 1
    assert drafts.following([9, 2]) == [3]


def assert_only_main(context: Context) -> None:
    for number in range(1, SEQUENCES):
        assert Sequence(context, number).last == -1


def test_lookahead_probe_in_one_forward_pass(loaded: dict[str, Loaded]) -> None:
    """The same against `tiny.forward` with a mask, block by block, draft by draft."""
    one, recorder = loaded["qwen2"], Recorder(policies.make("laser", alpha=0.75))
    budget, evicted = Budget(TOKENS, SIZE, RATIO), {}
    with one.context() as context:
        Reader(context, recorder, SHORT).read(one.tokens, budget, one.question)
    for block, seen in zip(budget.blocks, recorder.seen, strict=True):
        tokens = np.concatenate((one.tokens[: block.end], one.question.tokens))
        for _ in range(SHORT.lookahead):
            mask = visibility(len(tokens), evicted)
            logits = forward(one.weights, one.spec, tokens, visible=mask).logits[-1]
            tokens = np.append(tokens, logits.argmax())
        mask = visibility(len(tokens), evicted)
        queries = forward(one.weights, one.spec, tokens, visible=mask).queries
        rows = queries[:, block.end + len(one.question) - 12 :]
        assert np.abs(seen.queries - rows).max() < 1e-3
        kept = {*recorder.kept(budget, block.index + 1)}
        for token in {*range(block.end)} - kept - {*evicted}:
            evicted[token] = block.end


def test_drafts_end_where_the_answer_does(
    loaded: dict[str, Loaded], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token that ends the answer is not asked with, nor anything after it."""
    one, recorder = loaded["llama"], Recorder(policies.make("laser", alpha=0.75))
    ended: list[int] = []

    def ends(token: int) -> bool:
        ended.append(token)
        return len(ended) % 3 == 0  # the third draft of every block

    monkeypatch.setattr(one.model, "ends_generation", ends)
    settings = replace(SHORT, lookahead=6)
    with one.context() as context:
        Reader(context, recorder, settings).read(
            one.tokens, Budget(TOKENS, SIZE, RATIO), one.question
        )
        assert_only_main(context)
    assert [seen.queries.shape[1] for seen in recorder.seen] == [12 + 2] * 4
    assert all(np.isfinite(seen.queries).all() for seen in recorder.seen)
    cache = Cache(one)
    cache.decode(one.tokens[:SIZE], 0)
    truth, drafts = cache.asked(one.question, replace(SHORT, lookahead=3))
    assert ended[:3] == drafts
    assert np.abs(recorder.seen[0].queries - truth[:, :-1]).max() < 1e-3


@pytest.mark.parametrize("compact", [False, True], ids=["original", "compact"])
@pytest.mark.parametrize("observation", [1, 6, 32, 40, 100])
def test_without_a_question_the_block_asks(
    observation: int, compact: bool, loaded: dict[str, Loaded]
) -> None:
    """Against `Cache`: queries of the block's own last tokens; the last block has 36."""
    one, recorder = loaded["llama"], Recorder(policies.make("laser", alpha=0.75))
    budget, settings = Budget(TOKENS, SIZE, RATIO), ProbeSettings(observation=observation)
    with one.context() as context:
        Reader(context, recorder, settings, compact=compact).read(one.tokens, budget)
        assert all(sequence == MAIN for sequence, *_ in context.decodes)
    cache = Cache(one)
    for block, seen in zip(budget.blocks, recorder.seen, strict=True):
        start = len(cache.positions) if compact else block.start
        ids = one.tokens[block.start : block.end]
        _, queries = cache.decode(ids, start, block.start)
        assert seen.queries.shape[1] == min(observation, block.tokens)
        assert np.abs(seen.queries - queries[:, -observation:]).max() < 1e-3
        cache.keep(recorder.kept(budget, block.index + 1), compact=compact)


class Replay(Policy):
    """Chooses what another policy chose, and needs to see nothing."""

    name = "replay"

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def select(self, candidates: Candidates, budget: int) -> NDArray[np.int64]:
        chosen = self.recorder.chosen[candidates.index]
        return np.searchsorted(candidates.tokens, chosen)


@pytest.mark.parametrize("compact", [False, True], ids=["original", "compact"])
def test_probing_leaves_the_sequence_as_it_was(compact: bool, loaded: dict[str, Loaded]) -> None:
    """Against the same choices made without any probe."""
    one, recorder = loaded["llama"], Recorder(policies.make("laser", alpha=0.75))
    budget, logits = Budget(TOKENS, SIZE, RATIO), []
    for policy in (recorder, Replay(recorder)):
        with one.context() as context:
            reading = Reader(context, policy, SHORT, compact=compact).read(
                one.tokens, budget, one.question
            )
            assert_only_main(context)
            logits.append(continued(context, reading, one.later))
    assert error(logits[0], logits[1]) < 1e-5


# ---- cells -------------------------------------------------------------------------------------


def crowded(one: Loaded, cells: int) -> Watched:
    """A context of which exactly so many cells are free: llama.cpp makes multiples of 256."""
    context = one.context()
    context.occupied = context.allocated_cells - cells
    context.clear()
    return context


@pytest.mark.parametrize("policy", ["laser", "streamingllm"])
@pytest.mark.parametrize("compact", [False, True], ids=["original", "compact"])
@pytest.mark.parametrize("reply", [30, 110], ids=["reading-is-most", "reply-is-most"])
def test_planned_cells_are_enough_and_needed(
    policy: str, compact: bool, reply: int, loaded: dict[str, Loaded]
) -> None:
    """With exactly `Budget.cells` free the run succeeds, with one cell fewer it fails cleanly."""
    one, made = loaded["llama"], policies.make(policy)
    budget = made.budget(TOKENS, SIZE, RATIO, 4)
    prompt = len(one.question) if made.needs.queries else 0
    drafts = SHORT.lookahead if prompt else 0
    cells = budget.cells(prompt, drafts, reply)
    reading_is_most = reply == 30
    assert (budget.kept + reply < cells) == reading_is_most
    later = np.tile(one.later, 3)[:reply]

    def run(context: Watched) -> tuple[list[int], NDArray[Any]]:
        reading = Reader(context, made, SHORT, compact=compact).read(
            one.tokens, budget, one.question
        )
        context.decode(later, reading.next_position, MAIN, outputs=1)
        return reading.kept.tolist(), context.logits()

    with crowded(one, cells) as context:
        kept, logits = run(context)
    assert len(kept) == budget.kept
    with one.context() as context:  # holes and a crowd change nothing
        roomy, expected = run(context)
    assert roomy == kept
    assert error(logits, expected) < 1e-5
    with crowded(one, cells - 1) as context:
        with pytest.raises(LaserKVError, match=r"cache .* is full"):
            run(context)
        if reading_is_most:
            assert_empty(context)


@pytest.mark.parametrize("start", [0, 30], ids=["alone", "after-others"])
@pytest.mark.parametrize("compact", [False, True], ids=["original", "compact"])
def test_what_is_kept_ends_in_the_lowest_cells(
    compact: bool, start: int, loaded: dict[str, Loaded]
) -> None:
    """llama.cpp tells into which cells it puts the next tokens: right behind what was kept."""
    one, budget = loaded["llama"], Budget(TOKENS, SIZE, RATIO)
    beside = random_tokens(30, one.spec).astype(np.int32)
    with one.context() as context:
        device.prepare(context)  # watches the cells
        reader = Reader(context, policies.make("laser"), SHORT, compact=compact)
        if start:
            context.decode(beside[:start], 0, MAIN)
        reading = reader.read(one.tokens, budget, one.question, start=start)
        cells = context.probe.new("cells", 40)
        with context.probe.armed(cells=(cells, 0)):
            context.decode(one.later, reading.next_position, MAIN)
        assert_only_main(context)
    kept = start + budget.kept
    assert cells[0].tolist() == list(range(kept, kept + 40))


def test_a_sequence_is_gathered_bit_for_bit(loaded: dict[str, Loaded]) -> None:
    """In parts of any size: its state says the same as before, and cells between it are free."""
    one = loaded["llama"]
    with one.context() as context:
        device.prepare(context)
        for sequence, tokens in ((MAIN, one.tokens[:90]), (CROWD, one.later)):
            context.decode(tokens, 0, sequence)
        context.decode(one.tokens[90:], 90, MAIN)
        main, kept = Sequence(context, MAIN), np.arange(TOKENS % 3 + 8, TOKENS, 3)
        main.remove_all(np.setdiff1d(np.arange(TOKENS), kept))
        form = rows.check(context)
        before = rows.read(context, form, MAIN, kept)
        for at_once in (1, 7, 1000):
            cell = context.kv_bytes // context.allocated_cells
            with pytest.MonkeyPatch.context() as patched:
                patched.setattr(moving, "_BYTES_AT_ONCE", at_once * cell)
                moving.gather(context, MAIN, kept)
            after = rows.read(context, form, MAIN, kept)
            assert np.array_equal(before.keys, after.keys)
            assert np.array_equal(before.values, after.values)
            cells = context.probe.new("cells", 1)
            with context.probe.armed(cells=(cells, 0)):
                context.decode(one.later[:1], TOKENS, MAIN)
            main.remove(TOKENS, -1)
            assert cells[0, 0] == len(kept)  # below the crowd's, which stand from 90 on


# ---- when something goes wrong -----------------------------------------------------------------


class Faulty(Policy):
    """Does something wrong in block 1 while `fault` is set, else what `laser` does."""

    name = "faulty"
    needs = Needs(queries=True, keys=True, precise=True)

    def __init__(self, fault: Callable[[Candidates, int], Any] | None) -> None:
        self.fault, self.inner = fault, policies.make("laser", alpha=0.75, **PLAIN)

    def select(self, candidates: Candidates, budget: int) -> NDArray[np.int64]:
        if self.fault and candidates.index == 1:
            return self.fault(candidates, budget)
        return self.inner.select(candidates, budget)


def explode(candidates: Candidates, budget: int) -> NDArray[np.int64]:
    raise ZeroDivisionError("a policy's own fault")


def write_keys(candidates: Candidates, budget: int) -> NDArray[np.int64]:
    candidates.keys[:] = 0  # type: ignore[index]
    return np.arange(budget)


FAULTS: dict[str, tuple[Callable[[Candidates, int], Any], type[Exception], str]] = {
    "raises": (explode, ZeroDivisionError, "own fault"),
    "too-many": (lambda c, b: np.arange(b + 1), PolicyError, "faulty"),
    "too-few": (lambda c, b: np.arange(b - 1), PolicyError, "faulty"),
    "none": (lambda c, b: np.empty(0, np.int64), PolicyError, "faulty"),
    "repeated": (lambda c, b: np.r_[0, np.arange(b - 1)], PolicyError, "more than once"),
    "beyond": (lambda c, b: np.arange(c.count - b, c.count) + 1, PolicyError, "no candidate"),
    "before": (lambda c, b: np.arange(b) - 1, PolicyError, "no candidate"),
    "writes": (write_keys, ValueError, "read-only"),
}


def test_policies_choose_with_the_threads_of_the_context(loaded: dict[str, Loaded]) -> None:
    """In whatever thread of Python reads, also where Numba was told otherwise."""
    one, seen = loaded["llama"], []

    def look(candidates: Candidates, budget: int) -> NDArray[np.int64]:
        seen.append(threads_in_use())
        return np.arange(budget)

    def run() -> None:
        reader.read(one.tokens, Budget(TOKENS, SIZE, RATIO), one.question)
        seen.append(threads_in_use())

    with (
        one.context(threads=1) as context,
        ThreadPoolExecutor(1, initializer=set_threads, initargs=(2,)) as pool,
    ):
        reader = Reader(context, Faulty(look), SHORT)
        pool.submit(run).result()
    assert seen == [1, set_threads(2)]


@pytest.mark.parametrize("compact", [False, True], ids=["original", "compact"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_policy_leaves_nothing(
    fault: str, compact: bool, loaded: dict[str, Loaded]
) -> None:
    """And a later read is like a fresh engine's."""
    one, (does, kind, said) = loaded["llama"], FAULTS[fault]
    policy, budget = Faulty(does), Budget(TOKENS, SIZE, RATIO)
    with one.context() as context:
        reader = Reader(context, policy, SHORT, compact=compact)
        with pytest.raises(kind, match=said):
            reader.read(one.tokens, budget, one.question)
        assert_empty(context)
        policy.fault = None
        again = reader.read(one.tokens, budget, one.question)
        logits = continued(context, again, one.later)
    assert_like_fresh(one, policy, again, logits, compact)


def assert_like_fresh(
    one: Loaded, policy: Policy, reading: Reading, logits: NDArray[Any], compact: bool = False
) -> None:
    with one.context() as context:
        fresh = Reader(context, policy, SHORT, compact=compact).read(
            one.tokens, reading.budget, one.question
        )
        assert np.array_equal(reading.kept, fresh.kept)
        assert np.array_equal(logits, continued(context, fresh, one.later))


@pytest.mark.parametrize("at", [1, 16, 50, 96, 97, 150, 180])
def test_cancelled_from_another_thread(at: int, loaded: dict[str, Loaded]) -> None:
    """While tokens are decoded; until `resume`, nothing else is decoded either."""
    one, policy = loaded["llama"], policies.make("laser", alpha=0.75)
    budget = Budget(TOKENS, SIZE, RATIO)
    with one.context() as context:
        reader = Reader(context, policy, SHORT)

        def cancel(progress: Progress) -> None:
            if progress.read >= at:
                thread = threading.Thread(target=context.cancel)
                thread.start()
                thread.join()

        with pytest.raises(Cancelled):
            reader.read(one.tokens, budget, one.question, on_progress=cancel)
        assert_empty(context)
        with pytest.raises(Cancelled):
            reader.read(one.tokens, budget, one.question)
        assert_empty(context)
        context.resume()
        again = reader.read(one.tokens, budget, one.question)
        logits = continued(context, again, one.later)
    assert_like_fresh(one, policy, again, logits)


@pytest.mark.parametrize("number", [1, 2, 3, 5, 6, 7, 12, 20])
@pytest.mark.parametrize("kind", [KeyboardInterrupt, LaserKVError])
def test_interrupted_in_any_decode(
    number: int, kind: type[BaseException], loaded: dict[str, Loaded]
) -> None:
    """Blocks, questions and drafts: 1 is a block, 2 its question, 3 a draft, 6 a block …"""
    one, policy = loaded["llama"], policies.make("laser", alpha=0.75)
    budget = Budget(TOKENS, SIZE, RATIO)
    with one.context() as context:
        reader = Reader(context, policy, SHORT)

        def interrupt(count: int) -> None:
            if count == number:
                raise kind("now")

        context.on_decode = interrupt
        with pytest.raises(kind, match="now"):
            reader.read(one.tokens, budget, one.question)
        assert_empty(context)
        again = reader.read(one.tokens, budget, one.question)
        logits = continued(context, again, one.later)
    assert_like_fresh(one, policy, again, logits)


@pytest.mark.parametrize("at", [1, 49, 180])
def test_interrupted_in_progress(at: int, loaded: dict[str, Loaded]) -> None:
    one, policy = loaded["qwen2"], policies.make("laser", alpha=0.75)
    budget = Budget(TOKENS, SIZE, RATIO)

    def interrupt(progress: Progress) -> None:
        if progress.read >= at:
            raise KeyboardInterrupt

    with one.context() as context:
        reader = Reader(context, policy, SHORT)
        with pytest.raises(KeyboardInterrupt):
            reader.read(one.tokens, budget, one.question, on_progress=interrupt)
        assert_empty(context)
        again = reader.read(one.tokens, budget, one.question)
        logits = continued(context, again, one.later)
    assert_like_fresh(one, policy, again, logits)


# ---- the rest of the contract ------------------------------------------------------------------


def test_one_seed_one_answer(loaded: dict[str, Loaded]) -> None:
    """The same context again, a fresh one, and other sequences in between."""
    one, budget = loaded["llama"], Budget(TOKENS, SIZE, RATIO)
    for name in ("random", "laser", "magicpig"):
        kept = []
        for seed in (1, 1, 2):
            policy = policies.make(name, seed=seed)
            with one.context() as context:
                reader = Reader(context, policy, SHORT)
                if kept:
                    reader.read(one.tokens[::-1].copy(), budget, one.question)
                kept.append(reader.read(one.tokens, budget, one.question).kept.tolist())
        assert kept[0] == kept[1]
        if name == "random":
            assert kept[0] != kept[2]


def test_reading_tells_what_happened(loaded: dict[str, Loaded]) -> None:
    """Pools and progress, against the partition."""
    one, budget, seen = loaded["llama"], Budget(TOKENS, SIZE, RATIO), []
    with one.context() as context:
        reading = Reader(context, policies.make("laser", alpha=0.75), SHORT).read(
            one.tokens, budget, one.question, on_progress=seen.append
        )
        full = Reader(context, policies.make("full")).read(
            one.tokens, Budget(TOKENS, SIZE, 1.0), one.question
        )
    assert [progress.read for progress in seen] == [
        16, 32, 48, 64, 80, 96, 112, 128, 144, 160, 176, 180
    ]  # fmt: skip
    assert {progress.total for progress in seen} == {TOKENS}
    assert [progress.kept for progress in seen[::3]] == [b.kept_before for b in budget.blocks]
    pools = reading.pools.tolist()
    middle = budget.kept - budget.anchors - budget.window
    assert pools == [0] * budget.anchors + [1] * middle + [2] * budget.window
    assert reading.kept[: budget.anchors].tolist() == list(range(budget.anchors))
    assert reading.kept_per_block == [block.kept_after for block in budget.blocks]
    assert full.kept_per_block == [48, 96, 144, 180]
    times = reading.timings
    steps = {step: getattr(times, step) for step in STEPS}
    assert steps.pop("park") == 0
    assert min(steps.values()) > 0
    assert sum(steps.values()) <= times.total
    assert len(times.blocks) == len(budget.blocks)
    for step, spent in steps.items():
        assert sum(block[step] for block in times.blocks) == pytest.approx(spent)
    # what evicts is probed, and nothing else
    assert [block["probe"] > 0 for block in times.blocks] == [b.evicts for b in budget.blocks]
    assert [block["lookahead"] > 0 for block in times.blocks] == [b.evicts for b in budget.blocks]


@pytest.mark.parametrize("tokens", [1, 2, 47, 48, 49, 96, 97])
@pytest.mark.parametrize("compact", [False, True], ids=["original", "compact"])
def test_lengths_around_a_block(tokens: int, compact: bool, loaded: dict[str, Loaded]) -> None:
    """Logits after it, against `Cache`."""
    one, recorder = loaded["llama"], Recorder(policies.make("laser", alpha=0.75))
    budget = Budget(tokens, SIZE, 0.2)
    with one.context() as context:
        reading = Reader(context, recorder, SHORT, compact=compact).read(
            one.tokens[:tokens], budget, one.question
        )
        assert reading.kept.tolist() == recorder.kept(budget)
        logits = continued(context, reading, one.later)
    cache = Cache(one)
    for block in budget.blocks:
        start = len(cache.positions) if compact else block.start
        cache.decode(one.tokens[block.start : block.end], start, block.start)
        cache.keep(recorder.kept(budget, block.index + 1), compact=compact)
    truth, _ = cache.decode(one.later, int(cache.positions[-1]) + 1)
    assert error(logits, truth) < TOLERANCE


@pytest.mark.parametrize("ratio", [0.001, 0.01, 0.05, 0.8, 0.97, 0.999])
@pytest.mark.parametrize("divisor", [3, 4, 16])
def test_ratios_near_none_and_all(ratio: float, divisor: int, loaded: dict[str, Loaded]) -> None:
    """Against the partition: no anchors, a window of one, pools of none or of all but one."""
    one, recorder = loaded["llama"], Recorder(policies.make("laser", alpha=0.75))
    budget = Budget(TOKENS, SIZE, ratio, divisor)
    with one.context() as context:
        reading = Reader(context, recorder, SHORT).read(one.tokens, budget, one.question)
        assert standing(context) == reading.kept.tolist() == recorder.kept(budget)
    assert len(reading.kept) == budget.kept


def test_another_document_with_the_same_reader(loaded: dict[str, Loaded]) -> None:
    """Arrays kept from a longer read must not show in a shorter one, nor the other way round."""
    one, policy = loaded["llama"], policies.make("laser", alpha=0.75)
    shapes = [(180, 0.4), (70, 0.3), (180, 0.9), (120, 0.1)]
    with one.context() as context:
        reader = Reader(context, policy, SHORT, compact=True)
        for tokens, ratio in shapes:
            budget = Budget(tokens, SIZE, ratio)
            reading = reader.read(one.tokens[:tokens], budget, one.question)
            with one.context() as other:
                fresh = Reader(other, policy, SHORT, compact=True).read(
                    one.tokens[:tokens], budget, one.question
                )
                assert np.array_equal(reading.kept, fresh.kept)


@pytest.mark.parametrize("compact", [False, True], ids=["original", "compact"])
@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({"type_k": "f16", "type_v": "f16"}, 0.02),
        ({"type_k": "f16", "type_v": "f16", "flash_attn": "on"}, 0.02),
        ({"type_k": "q8_0", "type_v": "q8_0", "flash_attn": "auto"}, 0.2),
    ],
    ids=["f16", "flash", "q8_0"],
)
def test_rounded_caches(
    options: dict[str, str], tolerance: float, compact: bool, tmp_path: Path
) -> None:
    """Captured keys are not the cache's rounded ones; logits are near the exact ones."""
    one = Loaded(tmp_path, TinySpec(heads=2, kv_heads=1, head_dim=64))
    recorder, budget = Recorder(Everything()), Budget(TOKENS, SIZE, RATIO)
    with one.model, one.context(**options) as context:
        reader = Reader(context, recorder, SHORT, compact=compact)
        reading = reader.read(one.tokens, budget, one.question)
        logits = continued(context, reading, one.later)
    cache = Cache(one)
    for block, seen in zip(budget.blocks, recorder.seen, strict=True):
        start = len(cache.positions) if compact else block.start
        cache.decode(one.tokens[block.start : block.end], start, block.start)
        if block.index == 0:
            # deeper layers feel the rounding of what they saw; the first layer's keys do not
            assert error(seen.keys[0], cache.keys(range(*block.candidates))[0]) < TOLERANCE
        cache.keep(recorder.kept(budget, block.index + 1), compact=compact)
    truth, _ = cache.decode(one.later, int(cache.positions[-1]) + 1)
    assert error(logits, truth) < tolerance


@pytest.mark.parametrize("kind", ["bf16", "q8_0"])
def test_types_that_cannot_be_compacted_are_refused(kind: str, tmp_path: Path) -> None:
    """In a process of its own, for today it takes that process along."""
    path = make(tmp_path, head_dim=32).path
    code = f"""
import numpy as np
from laserkv_gguf.budget import Budget
from laserkv_gguf.reading.reader import Reader
from laserkv_gguf.errors import UserError
from laserkv_gguf.llama.context import Context, ContextOptions
from laserkv_gguf.llama.model import Model
from laserkv_gguf.policies import make

model = Model({str(path)!r}, gpu_layers=0, extra_buffers=False)
try:
    context = Context(model, 256, ContextOptions(64, 64, type_k={kind!r}, threads=1))
    reader = Reader(context, make("random"), compact=True)
    reading = reader.read(np.full(120, 9, np.int32), Budget(120, 48, 0.3))
    context.decode(np.full(3, 9, np.int32), reading.next_position, 0)
except UserError as error:
    assert "-ctk" in error.with_flags
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, check=False)
    assert ended.returncode == 0
