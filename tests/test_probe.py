"""The native probe and the measured RoPE, against the NumPy forward pass of tiny.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny import TinySpec, forward, make, random_tokens, rope_factors

from laserkv_gguf.llama import rope
from laserkv_gguf.llama.capture import CaptureError
from laserkv_gguf.llama.context import Context, ContextOptions
from laserkv_gguf.llama.model import Model
from laserkv_gguf.llama.sequence import MAIN, Sequence

N = 40
TOLERANCE = 1e-4  # float32 sums in another order; queries and keys are of size 1
KINDS = ("queries", "keys", "values")
OPTIONS = ContextOptions(
    batch_size=64, ubatch_size=64, type_k="f32", type_v="f32", flash_attn="off", threads=1
)
SPECS = {
    "grouped": TinySpec(),
    "one-kv-head": TinySpec(kv_heads=1, seed=1),
    "all-kv-heads": TinySpec(kv_heads=4, seed=2),
    "qwen2": TinySpec(arch="qwen2", seed=4),
    "rope-freqs": TinySpec(rope_freqs=True, seed=5),
}


class Loaded:
    """A model of `spec`, contexts over it, and the forward pass of N random tokens."""

    def __init__(self, directory: Path, spec: TinySpec) -> None:
        path, self.spec, self.weights = make(directory, spec=spec)
        self.model = Model(path, gpu_layers=0, extra_buffers=False)
        self.tokens = random_tokens(N, spec).astype(np.int32)
        self.truth = forward(self.weights, spec, self.tokens)

    def context(self, **options: Any) -> Context:
        changed = ContextOptions(**{**OPTIONS.__dict__, **options})
        return Context(self.model, 256, changed)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Loaded]]:
    models = {name: Loaded(tmp_path_factory.mktemp(name), spec) for name, spec in SPECS.items()}
    yield models
    for one in models.values():
        one.model.close()


def blank(context: Context, kind: str, tokens: int, dtype: Any = np.float32) -> NDArray[Any]:
    """An array to capture into, of NaN: what is not written shows."""
    array = context.probe.new(kind, tokens, dtype)
    array[...] = np.nan
    return array


def equal(captured: NDArray[Any], truth: NDArray[Any], tolerance: float = TOLERANCE) -> None:
    assert captured.shape == truth.shape
    assert np.abs(captured - truth).max() < tolerance  # NaN fails too


# ---- what is captured --------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPECS)
def test_all_rows_of_all_layers_equal_the_forward_pass(
    name: str, loaded: dict[str, Loaded]
) -> None:
    one = loaded[name]
    with one.context() as context:
        arrays = {kind: blank(context, kind, N) for kind in KINDS}
        with context.probe.armed(**{kind: (array, 0) for kind, array in arrays.items()}):
            context.decode(one.tokens, 0, MAIN)
    for kind, array in arrays.items():
        equal(array, getattr(one.truth, kind))


@pytest.mark.parametrize("name", ["grouped", "qwen2"])
@pytest.mark.parametrize("ubatch", [1, 7, 16, 64])
def test_micro_batches_and_offsets(name: str, ubatch: int, loaded: dict[str, Loaded]) -> None:
    """Every kind with an offset of its own; runs begin and end inside micro-batches."""
    one, firsts = loaded[name], {"queries": 33, "keys": 5, "values": 0}
    with one.context(ubatch_size=ubatch) as context:
        counts = {"queries": 7, "keys": 23, "values": 1}
        arrays = {kind: blank(context, kind, counts[kind]) for kind in KINDS}
        with context.probe.armed(**{kind: (arrays[kind], firsts[kind]) for kind in KINDS}):
            context.decode(one.tokens, 0, MAIN)
    for kind in KINDS:
        first = firsts[kind]
        equal(arrays[kind], getattr(one.truth, kind)[:, first : first + counts[kind]])


def test_batches_smaller_than_what_is_decoded(loaded: dict[str, Loaded]) -> None:
    """llama_decode takes 16 at most, so one armed block spans three of its calls."""
    one = loaded["grouped"]
    with one.context(batch_size=16, ubatch_size=8) as context:
        keys = blank(context, "keys", 30)
        with context.probe.armed(keys=(keys, 8)):
            context.decode(one.tokens, 0, MAIN)
    equal(keys, one.truth.keys[:, 8:38])


def test_rows_count_from_where_arming_began(loaded: dict[str, Loaded]) -> None:
    """What was decoded before is not counted, and a second arming begins anew."""
    one = loaded["grouped"]
    with one.context() as context:
        context.decode(one.tokens[:10], 0, MAIN)
        for begin, end in ((10, 20), (20, N)):
            queries = blank(context, "queries", 4)
            with context.probe.armed(queries=(queries, 3)):
                context.decode(one.tokens[begin:end], begin, MAIN)
            equal(queries, one.truth.queries[:, begin + 3 : begin + 7])


@pytest.mark.parametrize("name", ["grouped", "one-kv-head"])
@pytest.mark.parametrize("ubatch", [7, 64])
def test_float16_is_the_rounded_forward_pass(
    name: str, ubatch: int, loaded: dict[str, Loaded]
) -> None:
    """And exactly the float32 capture rounded by NumPy, which float16 arrays must equal."""
    one = loaded[name]
    with one.context(ubatch_size=ubatch) as context:
        halves = {kind: blank(context, kind, N - 3, np.float16) for kind in KINDS}
        with context.probe.armed(**{kind: (array, 3) for kind, array in halves.items()}):
            context.decode(one.tokens, 0, MAIN)
        context.clear()
        wholes = {kind: blank(context, kind, N - 3) for kind in KINDS}
        with context.probe.armed(**{kind: (array, 3) for kind, array in wholes.items()}):
            context.decode(one.tokens, 0, MAIN)
    for kind in KINDS:
        assert np.array_equal(halves[kind], wholes[kind].astype(np.float16))
        equal(halves[kind], getattr(one.truth, kind)[:, 3:], 1e-2)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_slices_of_a_larger_array(dtype: Any, loaded: dict[str, Loaded]) -> None:
    """Written are the rows of the slice and not one byte around them."""
    one = loaded["grouped"]
    with one.context(ubatch_size=16) as context:
        whole = blank(context, "keys", N + 20, dtype)
        with context.probe.armed(keys=(whole[:, 9 : 9 + 25], 10)):
            context.decode(one.tokens, 0, MAIN)
    equal(whole[:, 9:34], one.truth.keys[:, 10:35], 1e-4 if dtype is np.float32 else 1e-2)
    assert np.isnan(whole[:, :9]).all()
    assert np.isnan(whole[:, 34:]).all()


# ---- what is not captured ----------------------------------------------------------------------


def test_nothing_is_written_unarmed_or_afterwards(loaded: dict[str, Loaded]) -> None:
    """A record left from an earlier arming once wrote into memory that had been freed."""
    one = loaded["grouped"]
    with one.context() as context:
        arrays = {kind: blank(context, kind, N) for kind in KINDS}
        context.decode(one.tokens, 0, MAIN)
        with context.probe.armed(**{kind: (array, 0) for kind, array in arrays.items()}):
            context.decode(one.tokens, N, MAIN)
        for array in arrays.values():
            assert np.isfinite(array).all()
            array[...] = np.nan
        context.decode(one.tokens, 2 * N, MAIN)  # not armed
        with context.probe.armed():  # armed with nothing
            context.decode(one.tokens, 3 * N, MAIN)
        with context.probe.armed(keys=None, queries=(blank(context, "queries", 0), 0)):
            context.decode(one.tokens, 4 * N, MAIN)
        other = blank(context, "queries", 2)
        with context.probe.armed(queries=(other, 0)):  # another kind
            context.decode(one.tokens, 5 * N, MAIN)
        assert np.isfinite(other).all()
    for array in arrays.values():
        assert np.isnan(array).all()


def test_nothing_is_left_armed_by_an_interrupt(loaded: dict[str, Loaded]) -> None:
    one = loaded["grouped"]
    with one.context() as context:
        keys = blank(context, "keys", N)
        with pytest.raises(KeyboardInterrupt), context.probe.armed(keys=(keys, 0)):
            raise KeyboardInterrupt
        context.decode(one.tokens, 0, MAIN)
        with context.probe.armed(values=(blank(context, "values", 4), 0)):
            context.decode(one.tokens, N, MAIN)
    assert np.isnan(keys).all()


def test_nothing_is_left_armed_by_a_refused_array(loaded: dict[str, Loaded]) -> None:
    one = loaded["grouped"]
    with one.context() as context:
        good, bad = blank(context, "keys", 4), np.empty((1, 2, 3, 4), np.float32)
        with (
            pytest.raises(ValueError, match="queries go into"),
            context.probe.armed(keys=(good, 0), queries=(bad, 0)),
        ):
            pytest.fail("an array of another shape was armed")
        with context.probe.armed(values=(blank(context, "values", 4), 0)):
            context.decode(one.tokens, N, MAIN)
    assert np.isnan(good).all()


def test_rows_never_decoded_are_an_error(loaded: dict[str, Loaded]) -> None:
    """NaN or old rows must not pass for captured ones."""
    one = loaded["grouped"]
    with one.context() as context:
        keys = blank(context, "keys", 8)
        with pytest.raises(CaptureError, match="keys"), context.probe.armed(keys=(keys, 0)):
            context.decode(one.tokens[:7], 0, MAIN)
        with context.probe.armed(keys=(keys, 0)):
            context.decode(one.tokens[:8], 7, MAIN)


def test_arrays_that_do_not_fit_are_refused(loaded: dict[str, Loaded]) -> None:
    one = loaded["grouped"]
    with one.context() as context:
        probe, spec = context.probe, one.spec
        for array in (
            np.empty((spec.layers, 4, spec.heads, spec.head_dim), np.float32),  # heads of queries
            np.empty((spec.layers, 4, spec.kv_heads, spec.head_dim), np.float64),
            np.empty((spec.layers + 1, 4, spec.kv_heads, spec.head_dim), np.float32),
            probe.new("keys", 8)[:, ::2],
            probe.new("keys", 8)[..., ::-1],
        ):
            with pytest.raises(ValueError, match="keys"), probe.armed(keys=(array, 0)):
                pytest.fail("it was armed")


def test_capturing_does_not_change_the_logits(loaded: dict[str, Loaded]) -> None:
    """Against the same decode without: bit for bit."""
    one = loaded["qwen2"]
    with one.context() as context:
        context.decode(one.tokens, 0, MAIN, outputs=1)
        plain = context.logits()
        context.clear()
        arrays = {kind: (blank(context, kind, N), 0) for kind in KINDS}
        with context.probe.armed(**arrays):
            context.decode(one.tokens, 0, MAIN, outputs=1)
        assert np.array_equal(context.logits(), plain)


# ---- what the kernels make of it ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["grouped", "one-kv-head", "all-kv-heads", "qwen2"])
def test_consensus_of_what_was_captured(name: str, loaded: dict[str, Loaded]) -> None:
    """Against the softmax of the forward pass's own queries and keys, and its attention."""
    from laserkv_gguf.kernels import attention_consensus

    one, asking = loaded[name], 6
    with one.context() as context:
        queries, keys = blank(context, "queries", asking), blank(context, "keys", N)
        with context.probe.armed(queries=(queries, N - asking), keys=(keys, 0)):
            context.decode(one.tokens, 0, MAIN)
    scores = attention_consensus(queries, keys[:, 4 : N - asking])
    truth, group = one.truth, one.spec.heads // one.spec.kv_heads
    wide = np.repeat(truth.keys[:, 4 : N - asking], group, axis=2)
    logits = np.einsum("lqhd,lkhd->lhqk", truth.queries[:, N - asking :], wide)
    weights = np.exp(logits / np.sqrt(one.spec.head_dim))
    weights /= weights.sum(axis=-1, keepdims=True)
    equal(scores, weights.sum(axis=(0, 1, 2)), 1e-3)
    # the last token sees everything, so over all keys its weights are the attention itself
    equal(
        attention_consensus(queries[:, -1:], keys),
        truth.attention[:, :, -1].sum(axis=(0, 1)),
        1e-3,
    )


# ---- RoPE --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    [
        TinySpec(),
        TinySpec(arch="qwen2"),
        TinySpec(rope_freqs=True),
        TinySpec(rope_base=5e5, head_dim=64, heads=2, kv_heads=1, layers=1),
        TinySpec(arch="qwen2", rope_base=1e6, heads=2, kv_heads=2, layers=1),
    ],
    ids=["norm", "neox", "rope-freqs", "norm-5e5", "neox-1e6"],
)
def test_measured_angles(spec: TinySpec, tmp_path: Path) -> None:
    """Against base^(-2i/d), divided by the factors where the file has them."""
    path, *_ = make(tmp_path, spec=spec)
    expected = spec.rope_base ** -(np.arange(0, spec.head_dim, 2) / spec.head_dim)
    if spec.rope_freqs:
        factors = rope_factors(spec)
        assert factors.max() > 2  # else they would not be felt
        expected = expected / factors
    with (
        Model(path, gpu_layers=0, extra_buffers=False) as model,
        Context(model, 256, OPTIONS) as context,
    ):
        rotation = rope.measure(context)
        # 1e-7 of a radian is 1e-2 over 100,000 positions
        assert np.abs(rotation.angles - expected).max() < 1e-7
        assert rotation.halves == (spec.arch == "qwen2")
        for number in range(8):
            assert Sequence(context, number).last == -1  # nothing of it stays


@pytest.mark.parametrize("name", ["grouped", "qwen2", "rope-freqs"])
@pytest.mark.parametrize("delta", [-13, 1, 200])
def test_turned_keys_stand_at_shifted_positions(
    name: str, delta: int, loaded: dict[str, Loaded]
) -> None:
    """Against the forward pass's keys of the same tokens, all read `delta` positions further on.

    Attention sees distances alone, so keys before RoPE are the same there.
    """
    one = loaded[name]
    positions = np.arange(20, 20 + N)
    with one.context() as context:
        rotation = rope.measure(context)
        keys = blank(context, "keys", N)
        with context.probe.armed(keys=(keys, 0)):
            context.decode(one.tokens, 20, MAIN)
    equal(keys, forward(one.weights, one.spec, one.tokens, positions).keys)
    rotation.turn(keys, delta)
    shifted = forward(one.weights, one.spec, one.tokens, positions + delta).keys
    equal(keys, shifted, 5e-4)
    assert np.abs(one.truth.keys - shifted).max() > 0.1


def test_turning_by_nothing_changes_nothing() -> None:
    vectors = np.random.default_rng(0).normal(size=(3, 2, 8)).astype(np.float32)
    before = vectors.copy()
    rope.Rotation(np.array([1.0, 0.1, 0.01, 0.001]), halves=False).turn(vectors, 0)
    assert np.array_equal(vectors, before)


def test_dimensions_that_are_not_rotated_stay() -> None:
    """Only the first half of a head turns (rope.dimension_count below head_dim), both layouts."""
    for halves in (False, True):
        vectors = np.ones((2, 8), np.float32)
        rope.Rotation(np.array([0.5, 0.25]), halves).turn(vectors, 3)
        assert (vectors[:, 4:] == 1).all()
        x, y = ((0, 1), (2, 3)) if halves else ((0, 2), (1, 3))
        for pair, angle in enumerate((1.5, 0.75)):
            assert vectors[0, x[pair]] == pytest.approx(np.cos(angle) - np.sin(angle))
            assert vectors[0, y[pair]] == pytest.approx(np.cos(angle) + np.sin(angle))
