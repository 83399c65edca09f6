"""The native probe: queries, keys and values after RoPE, read while llama.cpp computes.

llama.cpp asks a `cb_eval` callback about every node of every graph, about a thousand times per
decode, so no Python may run in it. This one is compiled by Numba, reads a control block of 64-bit
integers and copies the wanted rows of `Qcur-<layer>`, `Kcur-<layer>` and `Vcur-<layer>` out with
libggml's own `ggml_backend_tensor_get`, which also works for tensors on a GPU. Several nodes bear
such a name: queries and keys are the one whose operation is ROPE, values the one that is reshaped
to heads. Where only the lengths of values are wanted they are computed on the way, so that one
float32 a layer, token and kv head is left of them.

Where keys are scored on the device they are not read at all: the SET_ROWS node that stores a
layer's keys in `cache_k_l<layer>` tells where that tensor is and which cells it writes (device.py).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import llvmlite.binding as llvm
import numba
import numpy as np
from llvmlite import ir
from numba.extending import intrinsic
from numpy.typing import NDArray

from laserkv_gguf.llama.library import ggml_base

types: Any = numba.types  # Numba's annotations do not cover what is done here
carray: Any = getattr(numba, "carray")  # noqa: B009

# Addresses are passed as integers, which Numba can calculate with and C cannot tell apart.
_ggml_get_name = types.ExternalFunction("ggml_get_name", types.voidptr(types.uint64))
_ggml_op_desc = types.ExternalFunction("ggml_op_desc", types.voidptr(types.uint64))
_ggml_nbytes = types.ExternalFunction("ggml_nbytes", types.uint64(types.uint64))
_ggml_nelements = types.ExternalFunction("ggml_nelements", types.int64(types.uint64))
_ggml_tensor_get = types.ExternalFunction(
    "ggml_backend_tensor_get",
    types.void(types.uint64, types.uint64, types.uint64, types.uint64),
)
_SYMBOLS = (
    "ggml_get_name",
    "ggml_op_desc",
    "ggml_nbytes",
    "ggml_nelements",
    "ggml_backend_tensor_get",
)

# The control block: a header, then one record for each of queries, keys, values, cells and norms.
_ARMED, _LAYERS, _SCRATCH, _SCRATCH_ROWS, _CACHE, _ROWS_AT, _BASE_AT, _FACTORS, _RECORDS = range(9)
_WANTED, _ADDRESS, _LAYER_STRIDE, _ROW_STRIDE, _ROW, _FIRST, _END, _FORM, _HEADS, _SEEN = range(10)
_KINDS = {"queries": 0, "keys": 1, "values": 2, "cells": 3, "value_norms": 4, "output_norms": 4}
_COUNT = 5
_WHOLE, _HALF, _NORM, _OUTPUT = range(4)  # what is made of a row


@intrinsic
def _half_bits(_context: Any, value: Any) -> Any:
    """float32 to the bits of a float16, in one instruction where the processor has it."""

    def code(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        half = builder.fptrunc(arguments[0], ir.HalfType())
        return builder.bitcast(half, ir.IntType(16))

    return types.uint16(types.float32), code


_to_half: Any = _half_bits


@numba.njit
def _layer_of(name: Any, start: int, end: int) -> int:
    """The number between `start` and the character `end`, or -1."""
    layer = -1
    for at in range(start, start + 7):
        digit = int(name[at])
        if digit == end:
            break
        if digit < 48 or digit > 57:
            return -1
        layer = max(layer, 0) * 10 + digit - 48
    return layer


@intrinsic
def _as_pointer(_context: Any, address: Any, to: Any) -> Any:
    """An integer as a pointer to values of the type that `to` has."""
    target = types.CPointer(to)

    def code(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(target))

    return target(address, to), code


_pointer: Any = _as_pointer


@intrinsic
def _half_rounded(_context: Any, value: Any) -> Any:
    """float32 as float16 holds it."""

    def code(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        half = builder.fptrunc(arguments[0], ir.HalfType())
        return builder.fpext(half, ir.FloatType())

    return types.float32(types.float32), code


_rounded: Any = _half_rounded


@numba.njit
def _norms_of(
    source: Any, rows: Any, heads: Any, dim: Any, factors: Any, room: Any, out: Any
) -> None:
    """Lengths of `rows` × `heads` values of `dim` numbers; of their products with factors if given.

    Args:
        source: (rows * heads * dim,) float32.
        factors: address of (heads, dim, dim) float32, symmetric, or 0.
        room: (dim,) float32 to work in.
        out: address of (rows, heads) float32.
    """
    result = carray(_pointer(out, np.float32(0)), (rows * heads,))
    for at in range(rows * heads):
        if factors == 0:
            total = np.float32(0)
            for i in range(dim):
                value = _rounded(source[at * dim + i])
                total += value * value
        else:
            head = factors + at % heads * dim * dim * 4
            matrix = carray(_pointer(head, np.float32(0)), (dim * dim,))
            for i in range(dim):
                room[i] = np.float32(0)
            for j in range(dim):
                value = _rounded(source[at * dim + j])
                for i in range(dim):
                    room[i] += value * matrix[j * dim + i]
            total = np.float32(0)
            for i in range(dim):
                total += room[i] * room[i]
        result[at] = np.sqrt(total)


@numba.njit
def _on_store(tensor: Any, ask: Any, control: Any, name: Any) -> Any:
    """A layer's keys go into the cache: notes its tensor, and the cells at the first layer."""
    record = _RECORDS + 3 * _SEEN
    if control[record + _WANTED] == 0:
        return 0
    operation = carray(_ggml_op_desc(tensor), (5,), np.uint8)
    if operation[0] != 83 or operation[4] != 82:  # SET_ROWS
        return 0
    layer = _layer_of(name, 9, 32)  # the name goes on: "cache_k_l0 (view)"
    if layer < 0 or layer >= control[_LAYERS]:
        return 0
    tensor = np.int64(tensor)
    if ask == 1:
        found = carray(_pointer(control[_CACHE], np.int64(0)), (control[_LAYERS],))
        found[layer] = carray(_pointer(tensor + control[_BASE_AT], np.int64(0)), (1,))[0]
    if layer != 0:
        return 0
    rows = carray(_pointer(tensor + control[_ROWS_AT], np.uint64(0)), (1,))[0]
    tokens = _ggml_nelements(rows)
    if np.int64(_ggml_nbytes(rows)) != tokens * 8:  # int64
        return 0
    seen = carray(_pointer(control[record + _WANTED], np.int64(0)), (1,))
    begin = max(seen[0], control[record + _FIRST])
    end = min(seen[0] + tokens, control[record + _END])
    if ask == 1 and begin < end:
        return 1
    if begin < end:
        target = control[record + _ADDRESS] + (begin - control[record + _FIRST]) * 8
        _ggml_tensor_get(rows, target, (begin - seen[0]) * 8, (end - begin) * 8)
    seen[0] += tokens
    return 0 if ask == 1 else 1


def _on_node(tensor: Any, ask: Any, user: Any) -> Any:
    control = carray(user, (_RECORDS + _COUNT * _SEEN,), np.int64)
    if control[_ARMED] == 0:
        return 0
    name = carray(_ggml_get_name(tensor), (64,), np.uint8)
    # "cache_k_l?"
    if name[0] == 99 and name[4] == 101 and name[6] == 107 and name[8] == 108:
        return _on_store(tensor, ask, control, name)
    if name[1] != 99 or name[2] != 117 or name[3] != 114 or name[4] != 45:  # "?cur-"
        return 0
    if name[0] == 81:  # Q
        kind = 0
    elif name[0] == 75:  # K
        kind = 1
    elif name[0] == 86:  # V
        kind = 2 if control[_RECORDS + 2 * _SEEN + _WANTED] != 0 else 4
    else:
        return 0
    record = _RECORDS + kind * _SEEN
    if control[record + _WANTED] == 0:
        return 0
    operation = carray(_ggml_op_desc(tensor), (4,), np.uint8)
    if kind < 2:
        if operation[0] != 82 or operation[1] != 79:  # ROPE, not RESHAPE
            return 0
    elif not (operation[0] == 86 or (operation[0] == 82 and operation[1] == 69)):  # VIEW, RESHAPE
        return 0
    layers = control[_LAYERS]
    layer = _layer_of(name, 5, 0)
    if layer < 0 or layer >= layers:
        return 0

    row = control[record + _ROW]  # float32 values a token
    tokens = _ggml_nelements(tensor) // row
    if _ggml_nelements(tensor) != tokens * row:
        return 0
    # tokens of this run that earlier micro-batches brought; the counters follow the records
    seen = carray(_pointer(control[record + _WANTED], np.int64(0)), (layers,))
    begin = max(seen[layer], control[record + _FIRST])
    end = min(seen[layer] + tokens, control[record + _END])
    if ask == 1:
        if begin < end:
            return 1
        seen[layer] += tokens
        return 0

    stride = row * 4
    if tokens > 1:  # a view into fused QKV has gaps between its rows
        stride = (np.int64(_ggml_nbytes(tensor)) - row * 4) // (tokens - 1)
    target = (
        control[record + _ADDRESS]
        + layer * control[record + _LAYER_STRIDE]
        + (begin - control[record + _FIRST]) * control[record + _ROW_STRIDE]
    )
    whole = stride == row * 4 and control[record + _ROW_STRIDE] == stride
    form = control[record + _FORM]
    scratch = control[_SCRATCH]
    at = begin - seen[layer]
    last = end - seen[layer]
    while at < last:
        if form != _WHOLE:
            rows = min(last - at, control[_SCRATCH_ROWS] // row)
            if stride != row * 4:
                rows = np.int64(1)
            _ggml_tensor_get(tensor, scratch, at * stride, rows * row * 4)
            source = carray(_pointer(scratch, np.float32(0)), (rows * row,))
        if form >= _NORM:
            heads = control[record + _HEADS]
            dim = row // heads
            factors = np.int64(0)
            if form == _OUTPUT:
                factors = control[_FACTORS] + layer * heads * dim * dim * 4
            room = carray(_pointer(scratch + control[_SCRATCH_ROWS] * 4, np.float32(0)), (dim,))
            _norms_of(source, rows, heads, dim, factors, room, target)
        elif form == _HALF:
            result = carray(_pointer(target, np.uint16(0)), (rows * row,))
            for i in range(rows * row):
                result[i] = _to_half(source[i])
        else:
            rows = last - at if whole else np.int64(1)
            _ggml_tensor_get(tensor, target, at * stride, rows * row * 4)
        target += rows * control[record + _ROW_STRIDE]
        at += rows
    seen[layer] += tokens
    return 1


def _should_abort(user: Any) -> int:
    return 1 if carray(user, (1,), np.int64)[0] != 0 else 0


@cache
def _native() -> tuple[int, int]:
    """Addresses of the compiled `cb_eval` and abort callbacks (seconds once, then from cache)."""
    library = ggml_base()
    for symbol in _SYMBOLS:
        address = ctypes.cast(getattr(library, symbol), ctypes.c_void_p).value
        llvm.add_symbol(symbol, address)
    cfunc: Any = numba.cfunc
    node = cfunc(types.uint8(types.uint64, types.uint8, types.voidptr), cache=True)(_on_node)
    abort = cfunc(types.uint8(types.voidptr), cache=True)(_should_abort)
    _keep_alive.extend((node, abort))
    return int(node.address), int(abort.address)


_keep_alive: list[Any] = []


class AbortFlag:
    """A flag that llama.cpp's CPU backend looks at before every node; settable from any thread."""

    def __init__(self) -> None:
        self._value = np.zeros(1, np.int64)

    def __bool__(self) -> bool:
        return bool(self._value[0])

    def set(self) -> None:
        self._value[0] = 1

    def clear(self) -> None:
        self._value[0] = 0

    @property
    def address(self) -> int:
        return int(self._value.ctypes.data)

    @property
    def callback(self) -> int:
        return _native()[1]


class Armed(NamedTuple):
    """What a probe is capturing, and how much of it each layer has shown."""

    records: NDArray[np.int64]
    seen: NDArray[np.int64]


class Probe:
    """Captures what chosen tensors hold, into arrays made beforehand.

    One probe belongs to one context (llama.cpp takes the callback when the context is made and
    keeps it). Unarmed it answers every node with "no" and costs nothing measurable.

    Args:
        layers: number of layers of the model.
        heads, kv_heads, head_dim: shape of queries (heads) and of keys and values (kv_heads).
        value_dim: of values where it is another than head_dim.
    """

    def __init__(
        self, layers: int, heads: int, kv_heads: int, head_dim: int, value_dim: int | None = None
    ) -> None:
        self.layers, self.heads, self.kv_heads, self.head_dim = layers, heads, kv_heads, head_dim
        self.value_dim = value_dim or head_dim
        self._control = np.zeros(_RECORDS + _COUNT * _SEEN, np.int64)
        self._seen = np.zeros((_COUNT, layers), np.int64)
        self.cache = np.zeros(layers, np.int64)
        self.factors: NDArray[np.float32] | None = None
        room = max(1 << 16, heads * head_dim, kv_heads * self.value_dim)
        self._scratch = np.empty(room + self.value_dim, np.float32)
        self._control[_LAYERS] = layers
        self._control[_SCRATCH] = self._scratch.ctypes.data
        self._control[_SCRATCH_ROWS] = room
        self._control[_CACHE] = self.cache.ctypes.data

    def watch_cache(self, rows_at: int, base_at: int) -> None:
        """Makes `cells` possible; from then on `cache` gets every layer's tensor of cached keys.

        Args:
            rows_at, base_at: where a ggml tensor has its second source, and what it is a view of.
        """
        self._control[_ROWS_AT], self._control[_BASE_AT] = rows_at, base_at

    @property
    def callback(self) -> int:
        """Address for `cb_eval`."""
        return _native()[0]

    @property
    def user_data(self) -> int:
        """Address for `cb_eval_user_data`."""
        return int(self._control.ctypes.data)

    def row(self, kind: str) -> int:
        """Values a token has: heads * head_dim."""
        if _KINDS[kind] == _KINDS["value_norms"]:
            return self.kv_heads * self.value_dim
        return (self.heads if kind == "queries" else self.kv_heads) * self.head_dim

    def use_factors(self, factors: NDArray[np.float32]) -> None:
        """Makes `output_norms` possible.

        Args:
            factors: (layers, kv_heads, value_dim, value_dim) float32, symmetric: the length of
                their product with a value is its norm.
        """
        shape = (self.layers, self.kv_heads, self.value_dim, self.value_dim)
        if factors.shape != shape:
            raise ValueError(f"factors must be {shape}, not {factors.shape}")
        self.factors = np.ascontiguousarray(factors, np.float32)
        self._control[_FACTORS] = self.factors.ctypes.data

    def new(self, kind: str, tokens: int, dtype: Any = np.float32) -> NDArray[Any]:
        """An array (layers, tokens, heads or kv_heads, head_dim) to capture into.

        For cells it is (1, tokens) int64: all layers use the same. For norms of values it is
        (layers, tokens, kv_heads) float32.
        """
        if kind == "cells":
            return np.empty((1, tokens), np.int64)
        if _KINDS[kind] == _KINDS["value_norms"]:
            return np.empty((self.layers, tokens, self.kv_heads), np.float32)
        heads = self.heads if kind == "queries" else self.kv_heads
        return np.empty((self.layers, tokens, heads, self.head_dim), dtype)

    def disarm(self) -> Armed | None:
        """Captures nothing until `arm` gets what this returns; None where nothing is captured."""
        if not self._control[_ARMED]:
            return None
        armed = Armed(self._control[_RECORDS:].copy(), self._seen.copy())
        self.arm(None)
        return armed

    def arm(self, armed: Armed | None) -> None:
        """Goes on capturing where `disarm` stopped."""
        self._control[_ARMED] = 0
        self._control[_RECORDS:] = 0  # or what is captured next could go there, too
        if armed is not None:
            self._control[_RECORDS:], self._seen[:] = armed.records, armed.seen
            self._control[_ARMED] = 1

    @contextmanager
    def armed(self, **wanted: tuple[NDArray[Any], int] | None) -> Iterator[None]:
        """Captures while the block runs.

        Args:
            queries, keys, values: (array, first): the array (layers, n, heads, head_dim), float32
                or float16, gets tokens first … first + n - 1 of those decoded in the block; None
                for a kind that is not wanted.
            cells: the same with (1, n) int64: where in the cache the tokens' keys went.
            value_norms: the same with (layers, n, kv_heads) float32: the length of each value, as
                float16 holds it. Not together with values.
            output_norms: the same, of the value's product with what `use_factors` was given.

        Raises:
            ValueError: an array of another shape, type or layout.
            CaptureError: the graph did not show all rows (only when the block ended well); of norms
                only where it showed all the others.
        """
        of_values = ("values", "value_norms", "output_norms")
        if sum(wanted.get(kind) is not None for kind in of_values) > 1:
            raise ValueError("values can be captured in one way at a time only")
        try:
            for kind, target in wanted.items():
                self._want(kind, target)
            self._seen[:] = 0
            self._control[_ARMED] = 1
            yield
        finally:
            # nothing may be left that points into arrays which may go
            self._control[_ARMED] = 0
            self._control[_RECORDS:] = 0
        # norms last: where only they are missing, the rest is there
        for kind, target in sorted(wanted.items(), key=lambda item: item[0].endswith("_norms")):
            if target is None or target[0].shape[1] == 0:
                continue
            end = target[1] + target[0].shape[1]
            seen = self._seen[_KINDS[kind], : 1 if kind == "cells" else None]
            short = np.flatnonzero(seen < end)
            if short.size:
                raise CaptureError(
                    f"layer {short[0]} showed {self._seen[_KINDS[kind], short[0]]} rows of "
                    f"{kind} where {end} were decoded",
                    kind,
                )

    def _want(self, kind: str, target: tuple[NDArray[Any], int] | None) -> None:
        at = _RECORDS + _KINDS[kind] * _SEEN
        if target is None or target[0].shape[1] == 0:
            return
        array, first = target
        if kind == "cells":
            self._want_cells(at, array, first)
            return
        if _KINDS[kind] == _KINDS["value_norms"]:
            self._want_norms(kind, array, first)
            return
        row = self.row(kind)
        shape = (self.layers, array.shape[1], row // self.head_dim, self.head_dim)
        if array.shape != shape or array.dtype not in (np.float32, np.float16):
            raise ValueError(f"{kind} go into {shape} of float32 or float16, not {array.shape}")
        if array.strides[1:] != (
            row * array.itemsize,
            self.head_dim * array.itemsize,
            array.itemsize,
        ):
            raise ValueError(f"the rows of the array for {kind} must be contiguous")
        form = _HALF if array.dtype == np.float16 else _WHOLE
        self._record(kind, array, first, form)

    def _record(self, kind: str, array: NDArray[Any], first: int, form: int) -> None:
        at = _RECORDS + _KINDS[kind] * _SEEN
        self._control[at + _WANTED] = self._seen[_KINDS[kind]].ctypes.data
        self._control[at + _ADDRESS] = array.ctypes.data
        self._control[at + _LAYER_STRIDE] = array.strides[0]
        self._control[at + _ROW_STRIDE] = array.strides[1]
        self._control[at + _ROW] = self.row(kind)
        self._control[at + _FIRST] = first
        self._control[at + _END] = first + array.shape[1]
        self._control[at + _FORM] = form
        self._control[at + _HEADS] = self.kv_heads

    def _want_norms(self, kind: str, array: NDArray[Any], first: int) -> None:
        shape = (self.layers, array.shape[1], self.kv_heads)
        if array.shape != shape or array.dtype != np.float32:
            raise ValueError(f"{kind} go into {shape} of float32, not {array.shape}")
        if array.strides[1:] != (self.kv_heads * 4, 4):
            raise ValueError(f"the rows of the array for {kind} must be contiguous")
        if kind == "output_norms" and self.factors is None:
            raise ValueError("output_norms can be captured after use_factors only")
        self._record(kind, array, first, _OUTPUT if kind == "output_norms" else _NORM)

    def _want_cells(self, at: int, array: NDArray[Any], first: int) -> None:
        if array.shape[0] != 1 or array.dtype != np.int64 or array.strides[1] != 8:
            raise ValueError(f"cells go into (1, n) of int64, not {array.shape} of {array.dtype}")
        if not self._control[_BASE_AT]:
            raise ValueError("cells can be read after watch_cache only")
        self._control[at + _WANTED] = self._seen[_KINDS["cells"]].ctypes.data
        self._control[at + _ADDRESS] = array.ctypes.data
        self._control[at + _FIRST], self._control[at + _END] = first, first + array.shape[1]


class CaptureError(RuntimeError):
    """The model's graph does not name its queries, keys or values as expected.

    Attributes:
        kind: what is missing.
    """

    def __init__(self, message: str, kind: str) -> None:
        super().__init__(message)
        self.kind = kind
