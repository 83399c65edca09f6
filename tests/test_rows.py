"""Rows in and out of llama.cpp's cache, against the NumPy forward pass and bit for bit."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import llama_cpp as L
import numpy as np
import pytest
from tiny import Tiny, TinySpec, forward, make, random_tokens

from laserkv_gguf.errors import LaserKVError
from laserkv_gguf.llama import rows
from laserkv_gguf.llama.context import Context, ContextOptions
from laserkv_gguf.llama.model import CACHE_TYPES, Model
from laserkv_gguf.llama.sequence import MAIN, SPARE, Sequence

COUNT = 40
TYPES = [  # keys, values, flash attention: values are transposed where it is off
    ("f32", "f32", "off"),
    ("f16", "f16", "off"),
    ("f16", "f16", "on"),
    ("bf16", "bf16", "off"),
    ("q8_0", "f16", "off"),
    ("q8_0", "q8_0", "on"),
    ("q4_0", "q5_1", "on"),
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Heads of 64: llama.cpp turns quantised keys of these with a Hadamard matrix."""
    return make(tmp_path_factory.mktemp("rows"), spec=TinySpec(layers=2, head_dim=64))


@pytest.fixture(scope="module")
def model(tiny: Tiny) -> Iterator[Model]:
    with Model(tiny.path, gpu_layers=0, extra_buffers=False) as one:
        yield one


def opened(model: Model, types: tuple[str, str, str] = TYPES[0], cells: int = 256) -> Context:
    keys, values, flash = types
    options = ContextOptions(64, 32, keys, values, flash, threads=1)
    return Context(model, cells, options)


def in_order(found: rows.Rows) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions, keys and values sorted by position."""
    order = np.argsort(found.positions)
    return found.positions[order], found.keys[:, order], found.values[:, order]


@pytest.mark.parametrize("types", TYPES, ids="-".join)
def test_rows_are_what_the_model_computed(
    types: tuple[str, str, str], tiny: Tiny, model: Model
) -> None:
    tokens = random_tokens(COUNT, tiny.spec)
    truth = forward(tiny.weights, tiny.spec, tokens)
    with opened(model, types) as context:
        form = rows.check(context)
        assert (form.element > 0) == (types[2] == "off")
        assert form.hadamard == (0 if types[0] in ("f32", "f16", "bf16") else 64)
        context.decode(tokens.astype(np.int32), 0, MAIN)
        found = rows.take(context, form, MAIN)
        positions, keys, values = in_order(found)
    assert np.shares_memory(found.keys, found.blob)
    assert np.shares_memory(found.values, found.blob)
    assert positions.tolist() == list(range(COUNT))
    worst = {"f32": 1e-4, "f16": 2e-3, "bf16": 1e-2, "q8_0": 1e-2, "q4_0": 0.1}[types[0]]
    off = np.linalg.norm(form.keys(keys).astype(np.float64) - truth.keys)
    assert off <= worst * np.linalg.norm(truth.keys)
    if types[1] in ("f32", "f16"):
        wide = np.float32 if types[1] == "f32" else np.float16
        plain = np.ascontiguousarray(values).reshape(2, COUNT, -1).view(wide)
        shaped = plain.reshape(truth.values.shape).astype(np.float64)
        off = np.linalg.norm(shaped - truth.values)
        assert off <= max(worst, 2e-3) * np.linalg.norm(truth.values)


@pytest.mark.parametrize("types", [TYPES[1], TYPES[2], TYPES[5]], ids="-".join)
def test_a_thousand_moves_change_no_bit(
    types: tuple[str, str, str], tiny: Tiny, model: Model
) -> None:
    """Out and in again at random; at the end the logits are those of never having evicted."""
    tokens = random_tokens(COUNT + 5, tiny.spec).astype(np.int32)
    random = np.random.default_rng(1)
    with opened(model, types) as untouched:
        untouched.decode(tokens[:COUNT], 0, MAIN)
        untouched.decode(tokens[COUNT:], COUNT, MAIN, outputs=5)
        expected = [untouched.logits(index - 5) for index in range(5)]
    with opened(model, types) as context:
        form = rows.check(context)
        main, spare = Sequence(context, MAIN), Sequence(context, SPARE)
        context.decode(tokens[:COUNT], 0, MAIN)
        _, keys, values = (part.copy() for part in in_order(rows.take(context, form, MAIN)))

        def bring(wanted: np.ndarray) -> None:
            built = rows.build(form, wanted)
            built.keys[...], built.values[...] = keys[:, wanted], values[:, wanted]
            rows.put(context, built, SPARE)
            spare.share_with(main)
            spare.remove()

        inside = np.ones(COUNT, bool)
        for move in range(1000):
            flipped = random.random(COUNT) < random.choice([0.1, 0.5])
            flipped[-1] = False
            main.remove_all(np.flatnonzero(inside & flipped))
            coming = np.flatnonzero(~inside & flipped)
            if len(coming):
                bring(random.permutation(coming))
            inside ^= flipped
            if move % 100 == 0 or move == 999:
                positions, now, then = in_order(rows.take(context, form, MAIN))
                assert positions.tolist() == np.flatnonzero(inside).tolist()
                assert np.array_equal(now, keys[:, inside])
                assert np.array_equal(then, values[:, inside])
        bring(np.flatnonzero(~inside))
        main.share_with(spare)
        context.decode(tokens[COUNT:], COUNT, SPARE, outputs=5)
        spare.remove()
        for index, logits in enumerate(expected):  # sums in another order
            assert np.allclose(context.logits(index - 5), logits, atol=2e-2 * logits.std())
        # all in the cells that they were decoded into, so that sums run in the same order
        main.remove()
        context.clear()
        bring(np.arange(COUNT))
        context.decode(tokens[COUNT:], COUNT, MAIN, outputs=5)
        for index, logits in enumerate(expected):
            assert np.array_equal(context.logits(index - 5), logits)


def test_a_blob_of_one_s_own_is_llama_cpp_s(tiny: Tiny, model: Model) -> None:
    """For one, and for many cells that do not lie together; nothing of the sequence changes."""
    with opened(model, TYPES[1]) as context:
        form = rows.check(context)
        context.decode(random_tokens(COUNT, tiny.spec).astype(np.int32), 0, MAIN)
        Sequence(context, MAIN).remove_all(np.array([3, 4, 9, 20]))
        for start, end in ((7, 8), (0, COUNT)):
            Sequence(context, MAIN).share_with(Sequence(context, SPARE), start, end)
            found = rows.take(context, form, SPARE)
            Sequence(context, SPARE).remove()
            own = rows.build(form, found.positions)
            own.keys[...], own.values[...] = found.keys, found.values
            numbers = (
                slice(4, 8),
                *(slice(16 + 12 * i + 8, 28 + 12 * i) for i in range(len(found.positions))),
            )
            for number in numbers:
                own.blob[number] = found.blob[number]
            assert np.array_equal(own.blob, found.blob)
        assert len(rows.take(context, form, MAIN).positions) == COUNT - 4
        assert len(rows.take(context, form, SPARE).positions) == 0


def test_no_room(tiny: Tiny, model: Model) -> None:
    with opened(model, TYPES[1]) as context:
        form = rows.check(context)
        cells = context.allocated_cells
        context.decode(random_tokens(cells - 3, tiny.spec).astype(np.int32), 0, MAIN)
        with pytest.raises(LaserKVError, match=r"no room for 4 more.*ctx_size"):
            rows.put(context, rows.build(form, np.arange(4)), SPARE)
        assert len(rows.take(context, form, SPARE).positions) == 0
        rows.put(context, rows.build(form, np.arange(3)), SPARE)


def test_calls_stay_small() -> None:
    """An 8B model's block is moved in several calls, a small one's in one."""
    shape: dict[str, Any] = {"kv_heads": 8, "head_dim": 128, "key_type": 1, "value_type": 1}
    large = rows.Format(layers=32, key_bytes=2048, value_bytes=2048, element=0, **shape)
    assert large.per_call * large.cell_bytes <= 1 << 27
    transposed = rows.Format(layers=32, key_bytes=2048, value_bytes=2048, element=2, **shape)
    assert transposed.per_call * 32 * 1024 <= 1 << 22
    assert large.cell_bytes == 32 * 4096


# ---- a llama.cpp that does otherwise -------------------------------------------------------------


def changed(blob: np.ndarray, at: int, to: int) -> None:
    blob[at : at + 4] = np.array([to], "<u4").view(np.uint8)


def after_cells(blob: np.ndarray) -> int:
    return 16 + 12 * int(blob[12:16].view("<u4")[0])


WRONG: dict[str, Callable[[np.ndarray], None]] = {
    "magic": lambda blob: changed(blob, 0, 1),
    "streams": lambda blob: changed(blob, 8, 2),
    "cells": lambda blob: changed(blob, 12, 6),
    "a position": lambda blob: changed(blob, 16, 99),
    "sequences of a cell": lambda blob: changed(blob, 20, 2),
    "transposed": lambda blob: changed(blob, after_cells(blob), 0),
    "layers": lambda blob: changed(blob, after_cells(blob) + 4, 3),
    "type of keys": lambda blob: changed(blob, after_cells(blob) + 8, CACHE_TYPES["bf16"]),
    "bytes of a row": lambda blob: changed(blob, after_cells(blob) + 12, 512),
    "keys": lambda blob: blob[after_cells(blob) + 20 :][:600].fill(0),
}


@pytest.mark.parametrize("what", WRONG)
def test_another_format_is_refused(
    what: str, tiny: Tiny, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = L.llama_state_seq_get_data

    def other(handle: Any, pointer: Any, size: int, sequence: int) -> int:
        written = original(handle, pointer, size, sequence)
        WRONG[what](np.ctypeslib.as_array(pointer, (size,)))
        return int(written)

    with opened(model, TYPES[1]) as context:
        rows.check(context)
        monkeypatch.setattr(L, "llama_state_seq_get_data", other)
        with pytest.raises(rows.FormatError, match=r"llama\.cpp|graph"):
            rows.check(context)
        monkeypatch.undo()
        assert rows.check(context)  # nothing was left behind
        context.decode(random_tokens(context.allocated_cells, tiny.spec).astype(np.int32), 0, MAIN)


def test_rows_that_do_not_come_back_are_noticed(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = L.llama_state_seq_set_data

    def other(handle: Any, pointer: Any, size: int, sequence: int) -> int:
        blob = np.ctypeslib.as_array(pointer, (size,)).copy()
        blob[-1] ^= 1
        return int(
            original(handle, blob.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8)), size, sequence)
        )

    monkeypatch.setattr(L, "llama_state_seq_set_data", other)
    with opened(model, TYPES[1]) as context, pytest.raises(rows.FormatError, match="came out"):
        rows.check(context)


def test_a_shorter_state_is_refused(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(L, "llama_state_seq_get_size", lambda handle, sequence: 100)
    with opened(model, TYPES[1]) as context, pytest.raises(rows.FormatError):
        rows.check(context)
