"""Scores computed by ggml over llama.cpp's own cache, against Numba, NumPy and GGUF's types.

Everything runs on the CPU backend, or with `--on-rpc` on a device whose memory is not the host's;
tests marked `gpu` do the same where there is a GPU.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import rpc_device
from numpy.typing import NDArray
from scipy.linalg import hadamard
from tiny import TinySpec, make, random_tokens

from laserkv_gguf import policies
from laserkv_gguf.api import LaserKV
from laserkv_gguf.budget import Budget
from laserkv_gguf.errors import UserError
from laserkv_gguf.kernels import attention_consensus, planes
from laserkv_gguf.llama import colliding, devices
from laserkv_gguf.llama import scorer as device
from laserkv_gguf.llama.chat import Prompt
from laserkv_gguf.llama.colliding import Collisions
from laserkv_gguf.llama.context import SEQUENCES, Context, ContextOptions
from laserkv_gguf.llama.model import Model
from laserkv_gguf.llama.scorer import open_scorer
from laserkv_gguf.llama.sequence import MAIN, Sequence
from laserkv_gguf.policies import Candidates, Policy
from laserkv_gguf.policies.laser import PAPER_OPTIONS
from laserkv_gguf.reading.asking import ProbeSettings
from laserkv_gguf.reading.reader import Reader

OPTIONS = ContextOptions(
    batch_size=64, ubatch_size=16, type_k="f32", type_v="f32", flash_attn="off", threads=1
)
TOLERANCE = 1e-3  # of the largest score
SIZE, TOKENS = 48, 180  # three whole blocks and one of 36
ASKING = ProbeSettings(tokens=8, lookahead=3, observation=6)
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
SPECS = {
    "grouped": TinySpec(ctx_train=2048, chat_template=TEMPLATE),
    "one-kv-head": TinySpec(kv_heads=1, seed=1),
    "all-kv-heads": TinySpec(kv_heads=4, seed=2),
    "qwen2": TinySpec(arch="qwen2", seed=4),
    "head-64": TinySpec(layers=2, heads=2, kv_heads=1, head_dim=64, seed=5),
    "head-96": TinySpec(layers=2, heads=2, kv_heads=1, head_dim=96, seed=6),
}


class Loaded:
    """A model with random tokens to read and to ask."""

    def __init__(self, directory: Path, spec: TinySpec, gpu_layers: int | None = None) -> None:
        self.path, self.spec, self.weights = make(directory, spec=spec)
        layers = rpc_device.layers() if gpu_layers is None else gpu_layers
        self.model = Model(self.path, gpu_layers=layers, extra_buffers=False)
        everything = random_tokens(TOKENS + 14, spec).astype(np.int32)
        self.tokens = everything[:TOKENS]
        self.question = Prompt(everything[TOKENS:], ending=4)

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


def difference(scores: NDArray[Any], truth: NDArray[Any]) -> float:
    """The largest, as a share of the largest score; NaN stays NaN."""
    assert scores.shape == truth.shape
    return float(np.abs(scores - truth).max() / truth.max())


class Read:
    """Tokens decoded with some evicted in between, so that later ones fill the holes."""

    def __init__(self, one: Loaded, context: Context, count: int = 90, asking: int = 12) -> None:
        probe = context.probe
        self.queries = probe.new("queries", asking)
        self.keys, self.cells = probe.new("keys", count), probe.new("cells", count)
        first = count // 2
        with probe.armed(keys=(self.keys[:, :first], 0), cells=(self.cells[:, :first], 0)):
            context.decode(one.tokens[:first], 0, MAIN)
        gone = np.r_[5:9, 20:21, 30:37]
        Sequence(context, MAIN).remove_all(gone)
        rest = count - first
        with probe.armed(
            queries=(self.queries, rest - asking),
            keys=(self.keys[:, first:], 0),
            cells=(self.cells[:, first:], 0),
        ):
            context.decode(one.tokens[first:count], first, MAIN)
        self.stays = np.setdiff1d(np.arange(count), gone)


# ---- the graph ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("type_k", ["f32", "f16"])
def test_scores_equal_numba(name: str, type_k: str, load: Callable[[str], Loaded]) -> None:
    one = load(name)
    with one.context(type_k=type_k) as context, open_scorer(context) as scorer:
        assert scorer.devices == list(one.model.devices or ["CPU"])
        read = Read(one, context)
        assert len(np.unique(read.cells[0, read.stays])) == len(read.stays)
        assert read.cells.max() < len(read.stays) + 3  # holes were filled
        for chosen in (read.stays, read.stays[::3], read.stays[-1:]):
            for asking in (12, 1):
                queries = read.queries[:, -asking:]
                truth = attention_consensus(queries, read.keys[:, chosen])
                scores = scorer.attention(queries, read.cells[0, chosen])
                assert scores.sum() == pytest.approx(
                    one.spec.layers * one.spec.heads * asking, rel=1e-5
                )
                assert difference(scores, truth) < (1e-5 if type_k == "f32" else TOLERANCE)


TURNED = {"head-64": 64, "head-96": 0}  # llama.cpp rotates heads of a multiple of 64


@pytest.mark.parametrize("name", ["head-64", "head-96"])
@pytest.mark.parametrize("type_k", ["q8_0", "q5_1", "q4_0", "iq4_nl", "bf16"])
def test_scores_of_quantised_keys(name: str, type_k: str, load: Callable[[str], Loaded]) -> None:
    """Numba's over keys that were rotated as llama.cpp does, quantised and widened by `gguf`."""
    one = load(name)
    with one.context(type_k=type_k) as context, open_scorer(context) as scorer:
        read = Read(one, context)
        queries, keys = read.queries, read.keys[:, read.stays]
        scores = scorer.attention(queries, read.cells[0, read.stays])
    plain = attention_consensus(queries, keys)
    if TURNED[name] and type_k != "bf16":
        turn = (hadamard(64) / 8).astype(np.float32)
        queries, keys = queries @ turn, keys @ turn
    if type_k == "iq4_nl":  # which gguf reads but does not write
        assert difference(scores, plain) < 0.2
        return
    kind = gguf.GGMLQuantizationType[type_k.upper()]
    flat = keys.reshape(*keys.shape[:2], -1)
    stored = gguf.quants.dequantize(gguf.quants.quantize(flat, kind), kind)
    truth = attention_consensus(queries, stored.reshape(keys.shape).astype(np.float32))
    assert difference(scores, truth) < TOLERANCE
    assert difference(scores, plain) < 0.1


@pytest.mark.parametrize("name", ["grouped", "all-kv-heads", "one-kv-head"])
def test_kv_heads_in_pieces(
    name: str, load: Callable[[str], Loaded], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = load(name)
    with one.context() as context, open_scorer(context) as scorer:
        read = Read(one, context)
        whole = scorer.attention(read.queries, read.cells[0])
        for heads in (1, 3):
            per_head = 4 * 90 * (2 * 12 * one.spec.heads // one.spec.kv_heads + 32)
            monkeypatch.setattr(device, "WORK_BYTES", heads * per_head)
            scorer._parts[0]._shape = None
            assert difference(scorer.attention(read.queries, read.cells[0]), whole) < 1e-5


HASHES = {
    "fraction": Collisions("fraction", 3, 16, 5),
    "odd": Collisions("fraction", 1, 7, 5),
    "magicpig": Collisions("magicpig", 4, 10, 5),
    "analytic": Collisions("analytic", 1, 1, 5),
    "power": Collisions("analytic", 11, 1, 5),
}


def counted(queries: NDArray[Any], keys: NDArray[Any], how: Collisions) -> NDArray[np.float64]:
    """Collisions by the definition, in float64."""
    layers, tokens, heads, dim = queries.shape
    wide = keys.astype(np.float64)
    wide = np.repeat(wide - wide.mean(axis=1, keepdims=True), heads // keys.shape[2], axis=2)
    if how.rule == "analytic":
        products = np.einsum("lthd,lchd->lthc", queries, wide)
        lengths = np.linalg.norm(queries, axis=3)[..., None]
        lengths = lengths * np.linalg.norm(wide, axis=3).transpose(0, 2, 1)[:, None]
        found = (1 - np.arccos(np.clip(products / lengths, -1, 1)) / np.pi) ** how.bits
    else:
        drawn = planes(dim, how.bits, how.tables, how.seed).astype(np.float64)
        tables = (how.tables, how.bits)
        asked = (queries @ drawn.T >= 0).reshape(layers, tokens, heads, *tables)
        seen = (wide @ drawn.T >= 0).reshape(layers, -1, heads, *tables)
        agree = (asked[:, :, None] == seen[:, None]).all(axis=-1)
        found = agree.mean(axis=-1) if how.rule == "fraction" else agree.sum(axis=-1) >= 2
        found = found.transpose(0, 1, 3, 2)
    return np.asarray(found.mean(axis=(0, 1, 2)), np.float64)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("hashing", HASHES)
def test_collisions_by_their_definition(
    name: str, hashing: str, load: Callable[[str], Loaded]
) -> None:
    one, how = load(name), HASHES[hashing]
    with one.context() as context, open_scorer(context) as scorer:
        read = Read(one, context)
        for chosen in (read.stays, read.stays[::3], read.stays[:2]):
            for asking in (12, 1):
                queries = read.queries[:, -asking:]
                truth = counted(queries, read.keys[:, chosen], how)
                scores = scorer.collisions(queries, read.cells[0, chosen], how)
                # a projection of next to nothing may have either sign
                assert np.abs(scores - truth).max() < (1e-5 if how.rule == "analytic" else 2e-3)
        assert not scorer.collisions(read.queries[:, :0], read.cells[0], how).any()
        assert scorer.collisions(read.queries, read.cells[0, :0], how).shape == (0,)


@pytest.mark.parametrize("name", ["head-64", "head-96"])
@pytest.mark.parametrize("hashing", ["fraction", "power"])
def test_collisions_of_quantised_keys(
    name: str, hashing: str, load: Callable[[str], Loaded]
) -> None:
    one, how = load(name), HASHES[hashing]
    with one.context(type_k="q8_0") as context, open_scorer(context) as scorer:
        assert scorer.turned == bool(TURNED[name])
        read = Read(one, context)
        scores = scorer.collisions(read.queries, read.cells[0, read.stays], how)
    # quantising changes the sign of some projections
    assert difference(scores, counted(read.queries, read.keys[:, read.stays], how)) < 0.1


@pytest.mark.parametrize("hashing", ["fraction", "magicpig", "power"])
def test_collisions_in_pieces(
    hashing: str, load: Callable[[str], Loaded], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few queries at a time, and a kv head at a time, give the same."""
    one, how = load("grouped"), HASHES[hashing]
    with one.context() as context, open_scorer(context) as scorer:
        read = Read(one, context)
        whole = scorer.collisions(read.queries, read.cells[0], how)
        for rows in (1, 5):
            monkeypatch.setattr(device, "WORK_BYTES", rows * how.copies * 4 * 90)
            scorer._parts[0]._shape = None
            found = scorer.collisions(read.queries, read.cells[0], how)
            assert np.abs(found - whole).max() < 1e-6


def test_buffers_are_made_once(load: Callable[[str], Loaded]) -> None:
    one = load("grouped")
    with one.context() as context, open_scorer(context) as scorer:
        read = Read(one, context)
        scorer.attention(read.queries, read.cells[0])
        size = scorer.bytes
        assert size > 0
        for count in (90, 40, 1, 90):
            scorer.attention(read.queries[:, :7], read.cells[0, :count])
            assert scorer.bytes == size


def test_nothing_to_score(load: Callable[[str], Loaded]) -> None:
    one = load("grouped")
    with one.context() as context, open_scorer(context) as scorer:
        read = Read(one, context)
        assert scorer.attention(read.queries, read.cells[0, :0]).shape == (0,)
        assert not scorer.attention(read.queries[:, :0], read.cells[0]).any()


def test_the_check_leaves_the_context_empty(load: Callable[[str], Loaded]) -> None:
    with load("grouped").context() as context, open_scorer(context):
        assert all(Sequence(context, number).last == -1 for number in range(SEQUENCES))


# ---- cells -------------------------------------------------------------------------------------


@pytest.mark.parametrize("ubatch", [1, 7, 64])
def test_cells_across_micro_batches(ubatch: int, load: Callable[[str], Loaded]) -> None:
    """Of an empty cache the first cells are filled one after another."""
    one = load("grouped")
    with one.context(ubatch_size=ubatch) as context, open_scorer(context):
        cells = context.probe.new("cells", 20)
        with context.probe.armed(cells=(cells, 13)):
            context.decode(one.tokens[:50], 0, MAIN)
        assert cells.tolist() == [list(range(13, 33))]


def test_cells_need_to_be_watched_and_int64(load: Callable[[str], Loaded]) -> None:
    with load("grouped").context() as context:
        cells = context.probe.new("cells", 4)
        with pytest.raises(ValueError, match="watch_cache"), context.probe.armed(cells=(cells, 0)):
            pass
        narrow = cells.astype(np.int32)
        open_scorer(context).close()
        with pytest.raises(ValueError, match="int64"), context.probe.armed(cells=(narrow, 0)):
            pass


# ---- the block loop ----------------------------------------------------------------------------


class Both(Policy):
    """Another policy's choice, its scores computed on the device and by Numba over host keys."""

    def __init__(self, inner: Policy) -> None:
        self.inner, self.name = inner, inner.name  # type: ignore[misc]
        self.needs = replace(inner.needs, keys=True, precise=True)  # type: ignore[misc]
        self.differences: list[float] = []

    def budget(self, *args: Any) -> Budget:
        return self.inner.budget(*args)

    def select(self, candidates: Candidates, budget: int) -> NDArray[np.int64]:
        assert candidates.scorer is not None
        truth = attention_consensus(candidates.queries, candidates.keys)
        self.differences.append(difference(candidates.attention(), truth))
        return self.inner.select(candidates, budget)


def block_differences(
    one: Loaded, *, compact: bool = False, asked: bool = True, documents: int = 1, **options: Any
) -> list[float]:
    """How far each block's scores are from the host's."""
    both = Both(policies.make("laser", alpha=0.75))
    budget = both.budget(TOKENS, SIZE, 0.4, 4)
    with one.context(**options) as context:
        reader = Reader(context, both, ASKING, compact=compact, scoring="device")
        for _ in range(documents):
            reading = reader.read(one.tokens, budget, one.question if asked else None)
        assert reader.scoring == "device"
        assert len(reading.kept) == budget.kept
    assert len(both.differences) == documents * sum(block.evicts for block in budget.blocks)
    assert len(both.differences) >= documents * 3
    return both.differences


@pytest.mark.parametrize("name", ["grouped", "one-kv-head", "qwen2"])
@pytest.mark.parametrize("compact", [False, True], ids=["original", "compact"])
@pytest.mark.parametrize(("type_k", "tolerance"), [("f32", 1e-4), ("f16", 1e-3)])
@pytest.mark.parametrize("asked", [True, False], ids=["question", "no-question"])
def test_every_block_is_scored_as_on_the_host(
    name: str,
    compact: bool,
    type_k: str,
    tolerance: float,
    asked: bool,
    load: Callable[[str], Loaded],
) -> None:
    """Blocks that look back at a window which eviction, and compacting, have gone over.

    A second document uses the same scorer.
    """
    found = block_differences(load(name), compact=compact, asked=asked, documents=2, type_k=type_k)
    assert max(found) < tolerance


@pytest.mark.parametrize("compact", [False, True], ids=["original", "compact"])
def test_blocks_of_quantised_keys(compact: bool, load: Callable[[str], Loaded]) -> None:
    """Host keys were never quantised: the scores are as far apart as quantising makes them."""
    assert 1e-5 < max(block_differences(load("head-64"), compact=compact, type_k="q8_0")) < 0.02


def test_with_flash_attention(load: Callable[[str], Loaded]) -> None:
    assert max(block_differences(load("head-64"), flash_attn="on", type_v="f16")) < 1e-4


@pytest.mark.parametrize(
    "policy",
    [
        "exact",
        "laser",
        "hashing",
        "paper",
        "magicpig",
        "leverage",
        "sage",
        "tova",
        "chunkkv",
        "finch",
    ],
)
def test_same_tokens_are_kept(policy: str, load: Callable[[str], Loaded]) -> None:
    """And where attention and collisions are all that a policy wants, no key comes to the host."""
    one, kept = load("grouped"), {}
    parts: dict[str, dict[str, Any]] = {
        "hashing": {},
        "paper": {**PAPER_OPTIONS},
        "leverage": {"residual": "leverage"},
    }
    if policy in parts:
        made = policies.make("laser", alpha=0.75, **parts[policy])
    else:
        made = policies.make(policy)
    # of a key that was rounded a projection of next to nothing may have another sign
    object.__setattr__(made, "needs", replace(made.needs, precise=made.needs.collisions))
    for scoring in ("host", "device"):
        with one.context() as context:
            reader = Reader(context, made, ASKING, compact=policy == "finch", scoring=scoring)
            budget = made.budget(TOKENS, SIZE, 0.4, 4)
            kept[scoring] = reader.read(one.tokens, budget, one.question).kept.tolist()
            assert reader.scoring == scoring
            on_host = scoring == "host" or policy == "leverage"
            assert ("keys" in reader._arrays.held) == on_host
            assert ("cells" in reader._arrays.held) == (scoring == "device")
    assert kept["device"] == kept["host"]


def test_from_another_thread(load: Callable[[str], Loaded]) -> None:
    one, both = load("grouped"), Both(policies.make("exact"))
    budget = both.budget(TOKENS, SIZE, 0.4, 4)
    with one.context(threads=2) as context, ThreadPoolExecutor(1) as pool:
        reader = Reader(context, both, ASKING, scoring="device")
        reader.read(one.tokens, budget, one.question)
        pool.submit(reader.read, one.tokens, budget, one.question).result()
    assert len(both.differences) == 2 * 3  # of the first block all is kept
    assert max(both.differences) < 1e-4


def test_a_policy_without_attention_is_left_alone(load: Callable[[str], Loaded]) -> None:
    one, made = load("grouped"), policies.make("keydiff")
    with one.context() as context:
        reader = Reader(context, made, ASKING, scoring="device")
        reader.read(one.tokens, made.budget(TOKENS, SIZE, 0.4, 4), one.question)
        assert (reader.scoring, context.scorer) == ("host", None)


# ---- what cannot be trusted --------------------------------------------------------------------


def other_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """The node's first source is taken for its second: keys for cells."""
    known = device._layout()
    monkeypatch.setattr(device, "_layout", lambda: replace(known, rows=known.rows - 8))


def other_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The node's first source is taken for what it is a view of: new keys for the cache."""
    known = device._layout()
    monkeypatch.setattr(device, "_layout", lambda: replace(known, base=known.rows - 8))


def other_rotation(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is stored is not what the model computed, nor that rotated."""
    stored = device.stored_keys
    monkeypatch.setattr(device, "stored_keys", lambda *given: stored(*given)[..., ::-1])


def other_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device computes a little wrong."""
    attention = device.Scorer.attention

    def wrong(*given: Any, **named: Any) -> NDArray[np.float32]:
        return attention(*given, **named) * np.float32(1.01)

    monkeypatch.setattr(device.Scorer, "attention", wrong)


def no_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device._ggml(), "backend_dev_supports_op", lambda *_: False)


def no_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(device._FUNCTIONS, "ggml_of_another_time", (None, []))
    device._ggml.cache_clear()


BROKEN = {
    other_layout: "layer 0 showed 0 rows of cells",
    other_tensor: "layer 0 does not show where its keys are",
    other_rotation: "other keys than the model computed",
    other_result: r"scores that are off by 0\.01",
    no_operation: "CPU cannot compute GET_ROWS",
    no_function: "has no ggml_of_another_time",
}


@pytest.mark.parametrize("broken", BROKEN, ids=lambda one: one.__name__)
def test_falls_back_to_the_host(
    broken: Callable[[pytest.MonkeyPatch], None],
    load: Callable[[str], Loaded],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """With one line that says why, once for a context, and the host's own choice."""
    one, made = load("grouped"), policies.make("exact")
    budget = made.budget(TOKENS, SIZE, 0.4, 4)
    with one.context() as context:
        expected = Reader(context, made, ASKING).read(one.tokens, budget, one.question).kept
    broken(monkeypatch)
    try:
        with one.context() as context:
            for _ in range(2):
                reader = Reader(context, made, ASKING, scoring="device")
                kept = reader.read(one.tokens, budget, one.question).kept
                assert reader.scoring == "host"
                assert kept.tolist() == expected.tolist()
    finally:
        monkeypatch.undo()
        device._ggml.cache_clear()
    (record,) = [record for record in caplog.records if record.name == device.__name__]
    assert record.levelname == "WARNING"
    assert re.search(BROKEN[broken], record.getMessage())


@pytest.mark.parametrize("broken", ["ARC", "STEP"])
def test_collisions_that_a_device_cannot_count_are_the_hosts(
    broken: str,
    load: Callable[[str], Loaded],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """With one line; attention stays where it was."""
    one = load("grouped")
    if broken == "ARC":
        monkeypatch.setattr(colliding, "_ARC", (1.2, *colliding._ARC[1:]))
    else:
        ggml, able = device._ggml(), device._ggml().backend_dev_supports_op
        monkeypatch.setattr(
            ggml,
            "backend_dev_supports_op",
            lambda of, node: ggml.op_desc(node) != b"STEP" and able(of, node),
        )
    with one.context() as context:
        for policy, scoring in (("magicpig", "host"), ("exact", "device"), ("magicpig", "host")):
            made = policies.make(policy)
            reader = Reader(context, made, ASKING, scoring="device")
            reader.read(one.tokens, made.budget(TOKENS, SIZE, 0.4, 4), one.question)
            assert reader.scoring == scoring
    (record,) = [record for record in caplog.records if record.name == device.__name__]
    said = {"ARC": "counts collisions that are off by", "STEP": "cannot compute STEP"}
    assert said[broken] in record.getMessage()


# ---- settings ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scoring", ["host", "device"])
def test_engine_setting(scoring: str, load: Callable[[str], Loaded]) -> None:
    """The account says where it was."""
    one = load("grouped")
    with LaserKV(
        one.model, context=OPTIONS, block_size=64, ratio=0.4, lookahead=2, scoring=scoring
    ) as engine:
        reply = engine.ask("Which ore?", document="tin copper ore " * 20, max_tokens=4)
        assert reply.account.scoring == scoring
        assert reply.account.kept_tokens < reply.account.document_tokens


def test_unknown_setting(load: Callable[[str], Loaded]) -> None:
    with pytest.raises(UserError, match="scoring gpu is unknown; use auto, host, device"):
        LaserKV(load("grouped").model, scoring="gpu")


# ---- on a GPU ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def offloaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    """All layers on the GPU."""
    one = Loaded(tmp_path_factory.mktemp("gpu"), SPECS["head-64"], gpu_layers=99)
    yield one
    one.model.close()


GPU_OPTIONS = {"flash_attn": "auto", "type_v": "f16"}


@pytest.mark.gpu
@pytest.mark.parametrize("compact", [False, True], ids=["original", "compact"])
@pytest.mark.parametrize(("type_k", "tolerance"), [("f16", TOLERANCE), ("q8_0", 0.02)])
def test_gpu_scores_as_the_host(
    compact: bool, type_k: str, tolerance: float, offloaded: Loaded
) -> None:
    with offloaded.context(type_k=type_k, **GPU_OPTIONS) as context, open_scorer(context) as scorer:
        kinds = {one.name: one.kind for one in devices.listed()}
        assert [kinds[name] for name in scorer.devices] == ["gpu"]
    found = block_differences(offloaded, compact=compact, type_k=type_k, **GPU_OPTIONS)
    assert max(found) < tolerance


@pytest.mark.gpu
def test_gpu_and_cpu_each_score_their_layers(tmp_path: Path) -> None:
    one = Loaded(tmp_path, replace(SPECS["head-64"], layers=4), gpu_layers=2)
    try:
        with one.context(type_k="f16", **GPU_OPTIONS) as context, open_scorer(context) as scorer:
            assert len(scorer.devices) == 2
            assert "CPU" in scorer.devices
        assert max(block_differences(one, type_k="f16", **GPU_OPTIONS)) < TOLERANCE
    finally:
        one.model.close()


@pytest.mark.gpu
def test_gpu_scores_by_itself(tmp_path: Path) -> None:
    """Without a flag; and with `exact` no key comes to the host."""
    one = Loaded(tmp_path, replace(SPECS["head-64"], chat_template=TEMPLATE), gpu_layers=99)
    try:
        with LaserKV(
            one.model, context=replace(OPTIONS, **GPU_OPTIONS), policy="exact", block_size=64
        ) as engine:
            reply = engine.ask("Which ore?", document="tin copper ore " * 20, max_tokens=4)
            assert reply.account.scoring == "device"
            assert engine._readers is not None
            assert "keys" not in next(iter(engine._readers.values()))._arrays.held
    finally:
        one.model.close()
