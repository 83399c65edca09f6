"""On a CUDA GPU the same must come out as on the CPU, and as NumPy says. Run with `-m gpu`.

These tests fail where llama.cpp has no GPU: that it is used is asserted, not assumed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny import Tiny, TinySpec, forward, make, random_tokens

from laserkv_gguf import LaserKV, policies
from laserkv_gguf.budget import Budget
from laserkv_gguf.llama import devices
from laserkv_gguf.llama.bare import Bare, BareSettings
from laserkv_gguf.llama.chat import Prompt
from laserkv_gguf.llama.context import Context, ContextOptions
from laserkv_gguf.llama.model import Model
from laserkv_gguf.llama.sequence import MAIN
from laserkv_gguf.reading.asking import ProbeSettings
from laserkv_gguf.reading.reader import Reader

pytestmark = pytest.mark.gpu

# CUDA's flash attention wants heads of 64
SPEC = TinySpec(layers=3, heads=4, kv_heads=2, head_dim=64, ctx_train=4096)
TOKENS, SIZE = 500, 128
# Matrix products on a GPU may round their inputs to 10 bits (TF32), as the cache's f16 does.
# Queries, keys and values are of size 1, logits of size 2.
TOLERANCE = 0.05
FLASH = ("on", "off")


class Loaded(NamedTuple):
    tiny: Tiny
    gpu: Model
    cpu: Model


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    one = make(tmp_path_factory.mktemp("gpu"), spec=SPEC)
    with Model(one.path) as gpu, Model(one.path, gpu_layers=0) as cpu:
        yield Loaded(one, gpu, cpu)


def context(model: Model, flash: str, cells: int = 1024) -> Context:
    options = ContextOptions(batch_size=256, ubatch_size=64, flash_attn=flash)
    return Context(model, cells, options)


def test_all_layers_and_the_cache_are_on_the_gpu(loaded: Loaded) -> None:
    """As llama.cpp's log says, and as the memory of the device shows."""
    assert devices.can_offload()
    assert loaded.gpu.offloaded_layers == SPEC.layers + 1
    assert loaded.cpu.offloaded_layers == 0
    assert any(not name.startswith("CPU") for name in loaded.gpu.buffers)

    def free() -> int:
        return sum(device.free for device in devices.listed() if device.kind == "gpu")

    before = free()
    reports = before < sum(device.total for device in devices.listed() if device.kind == "gpu")
    with context(loaded.gpu, "on", 1 << 17) as large:
        cache = {n: size for n, size in large.buffers.items() if n.endswith(" KV")}
        assert not any(name.startswith("CPU") for name in cache)
        assert sum(cache.values()) == pytest.approx(large.kv_bytes, abs=1 << 14)
        # a device of software, and one of another machine, always say the same
        assert not reports or before - free() >= large.kv_bytes


@pytest.mark.parametrize("flash", FLASH)
def test_greedy_tokens_are_the_likeliest(flash: str, loaded: Loaded) -> None:
    """By NumPy, within what rounding may turn around; and the engine says what llama.cpp says."""
    settings = BareSettings(flash_attn=flash == "on", batch_size=256, ubatch_size=64)
    tokens = random_tokens(100, SPEC).tolist()
    with Bare(loaded.gpu, 256, settings) as bare:
        bare.read(np.array(tokens))
        made = bare.generate(16).tokens
    for token in made:
        logits = forward(loaded.tiny.weights, SPEC, tokens).logits[-1]
        assert logits[token] > logits.max() - TOLERANCE
        tokens.append(token)


def test_an_answer_is_the_same_on_both(loaded: Loaded) -> None:
    """Through the whole engine, with a cache that keeps everything."""
    answers = []
    for model in (loaded.gpu, loaded.cpu):
        with LaserKV(model, policy="full", block_size=SIZE) as engine:
            engine.ignore_end = True
            answers.append(engine.ask("why?", document="The quick brown fox. " * 10, max_tokens=8))
    gpu, cpu = answers
    same = np.argmin([*(a == b for a, b in zip(gpu.tokens, cpu.tokens, strict=True)), False])
    # random weights make near ties, after which two answers go their own ways
    assert same >= 4, (gpu.tokens, cpu.tokens)


@pytest.mark.parametrize("flash", FLASH)
@pytest.mark.parametrize("kind", ["queries", "keys", "values"])
def test_what_is_captured(kind: str, flash: str, loaded: Loaded) -> None:
    """Of every layer and token, equal to the CPU's and to NumPy's."""
    tokens = random_tokens(150, SPEC).astype(np.int32)
    seen: list[NDArray[Any]] = []
    for model in (loaded.gpu, loaded.cpu):
        with context(model, flash) as made:
            array = made.probe.new(kind, len(tokens))
            array[...] = np.nan
            with made.probe.armed(**{kind: (array, 0)}):
                made.decode(tokens, 0, MAIN)
            seen.append(array)
    truth = getattr(forward(loaded.tiny.weights, SPEC, tokens), kind)
    gpu, cpu = seen
    assert np.abs(gpu - truth).max() < TOLERANCE  # NaN fails too
    assert np.abs(gpu - cpu).max() < TOLERANCE


def read(
    model: Model, flash: str, policy: str, tokens: NDArray[np.int32], *, compact: bool
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """What was kept, and the logits of the token after it."""
    chosen = policies.make(policy, seed=3)
    question = Prompt(random_tokens(12, SPEC, seed=5).astype(np.int32))
    with context(model, flash) as made:
        reader = Reader(made, chosen, ProbeSettings(lookahead=4), compact=compact)
        reading = reader.read(tokens, Budget(len(tokens), SIZE, 0.25), question)
        made.decode(np.array([77], np.int32), reading.next_position, MAIN, outputs=1)
        return reading.kept, made.logits()


@pytest.mark.parametrize("flash", FLASH)
@pytest.mark.parametrize("compact", [False, True], ids=["original", "compact"])
def test_logits_after_eviction(compact: bool, flash: str, loaded: Loaded) -> None:
    """A choice that does not depend on what was computed: kept and logits equal the CPU's."""
    tokens = random_tokens(TOKENS, SPEC).astype(np.int32)
    kept, logits = read(loaded.gpu, flash, "random", tokens, compact=compact)
    truth_kept, truth = read(loaded.cpu, "off", "random", tokens, compact=compact)
    assert kept.tolist() == truth_kept.tolist()
    assert len(kept) < TOKENS // 3
    assert np.abs(logits - truth).max() < 3 * TOLERANCE  # of a context four blocks long
    # and it is eviction that is seen: the whole cache says something else
    with context(loaded.cpu, "off") as made:
        made.decode(np.append(tokens, 77).astype(np.int32), 0, MAIN, outputs=1)
        assert np.abs(made.logits() - truth).max() > 6 * TOLERANCE


def test_laser_chooses_as_on_the_cpu(loaded: Loaded) -> None:
    """But for tokens whose scores lie within rounding of the last one kept."""
    tokens = random_tokens(TOKENS, SPEC).astype(np.int32)
    kept, _ = read(loaded.gpu, "off", "exact", tokens, compact=False)
    truth, _ = read(loaded.cpu, "off", "exact", tokens, compact=False)
    assert len(kept) == len(truth)
    assert len(np.intersect1d(kept, truth)) >= 0.9 * len(truth)
