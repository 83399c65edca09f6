"""The rows of a sequence's cells, taken out of llama.cpp's cache and put back bit for bit.

llama.cpp writes and reads the state of a sequence as one blob (`llama_state_seq_get_data`). Its
format is internal, and this file is all that knows it:

    magic u32 | sequence i32 | streams u32 (1) | cells u32
    per cell    position i32 | sequences u32 (1) | sequence i32
    transposed u32 | layers u32
    per layer   key type i32 | row bytes u64 | cells × row
    per layer   value type i32 | row bytes u64 | cells × row            (flash attention on)
                value type i32 | element bytes u32 | width u32 | width × cells × element    (off)

`check` tries all of it in both directions before anything relies on it.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import gguf
import llama_cpp as L
import numpy as np
from numpy.typing import NDArray

from laserkv_gguf.errors import LaserKVError
from laserkv_gguf.llama.context import SEQUENCES, Context
from laserkv_gguf.llama.model import CACHE_TYPES, Model, row_bytes
from laserkv_gguf.llama.sequence import Sequence

Bytes = NDArray[np.uint8]

_MAGIC = 0xAF143CD8
_HEADER = np.dtype([("magic", "<u4"), ("sequence", "<i4"), ("streams", "<u4"), ("cells", "<u4")])
_CELL = np.dtype([("position", "<i4"), ("sequences", "<u4"), ("sequence", "<i4")])
_DATA = np.dtype([("transposed", "<u4"), ("layers", "<u4")])
_LAYER = np.dtype([("type", "<i4"), ("row", "<u8")])  # packed: 12 bytes
_TRANSPOSED = np.dtype([("type", "<i4"), ("element", "<u4"), ("width", "<u4")])

_BLOB_BYTES = 1 << 27  # one state call moves at most so many bytes
_PIECES = 1 << 22  # transposed values come one by one: so many at most in one call
_PROBED = 5  # tokens `check` tries with


class FormatError(LaserKVError):
    """llama.cpp's state is not what this file expects."""


@dataclass(frozen=True)
class Format:
    """What a cell's rows look like.

    Attributes:
        layers: of the model.
        key_type, value_type: ggml's numbers.
        key_bytes, value_bytes: of one token's row in one layer.
        element: bytes of one value where llama.cpp stores values transposed, else 0.
        kv_heads, head_dim: what a key row holds.
        hadamard: size of the Hadamard matrix llama.cpp has turned quantised keys with, 0 for none.
    """

    layers: int
    key_type: int
    value_type: int
    key_bytes: int
    value_bytes: int
    element: int
    kv_heads: int
    head_dim: int
    hadamard: int = 0

    @property
    def cell_bytes(self) -> int:
        """Bytes of one token over all layers."""
        return self.layers * (self.key_bytes + self.value_bytes)

    @property
    def per_call(self) -> int:
        """Tokens that one state call moves at most, so that its blob stays small."""
        most = _BLOB_BYTES // self.cell_bytes
        if self.element:
            most = min(most, _PIECES // (self.layers * (self.value_bytes // self.element)))
        return max(most, 32)

    def blob_bytes(self, cells: int) -> int:
        """Bytes of a blob of so many cells."""
        heads = _HEADER.itemsize + cells * _CELL.itemsize + _DATA.itemsize
        return heads + 2 * self.layers * _LAYER.itemsize + cells * self.cell_bytes

    @property
    def exact(self) -> bool:
        """Whether keys can be read as they lie, and turned without quantising them again."""
        return self.key_type in (CACHE_TYPES["f32"], CACHE_TYPES["f16"])

    def keys(self, rows: Bytes) -> NDArray[Any]:
        """Key rows (layers, n, key_bytes) as (layers, n, kv_heads, head_dim).

        A view of float16 or float32 where the cache holds these, else a float16 copy.
        """
        shape = (*rows.shape[:2], self.kv_heads, self.head_dim)
        if self.exact:
            wide = np.float32 if self.key_type == CACHE_TYPES["f32"] else np.float16
            return rows.view(wide).reshape(shape)
        kind = gguf.GGMLQuantizationType(self.key_type)
        values = gguf.quants.dequantize(np.ascontiguousarray(rows), kind).astype(np.float32)
        if self.hadamard:
            values = values.reshape(-1, self.hadamard) @ _hadamard(self.hadamard)
        result: NDArray[np.float16] = values.reshape(shape).astype(np.float16)
        return result

    def values(self, rows: Bytes) -> NDArray[Any]:
        """Value rows (layers, n, value_bytes) as (layers, n, kv_heads, value_dim).

        Quantised ones are turned as llama.cpp has turned them, which changes no length.
        """
        if self.value_type in (CACHE_TYPES["f32"], CACHE_TYPES["f16"]):
            wide = np.float32 if self.value_type == CACHE_TYPES["f32"] else np.float16
            return rows.view(wide).reshape(*rows.shape[:2], self.kv_heads, -1)
        kind = gguf.GGMLQuantizationType(self.value_type)
        values = gguf.quants.dequantize(np.ascontiguousarray(rows), kind)
        wide_rows: NDArray[np.float32] = values.astype(np.float32)
        return wide_rows.reshape(*rows.shape[:2], self.kv_heads, -1)


def _hadamard(size: int) -> NDArray[np.float32]:
    """Sylvester's matrix, scaled to be its own inverse."""
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    scaled: NDArray[np.float32] = (matrix / np.sqrt(size)).astype(np.float32)
    return scaled


@dataclass(frozen=True)
class Rows:
    """A blob and the views into it; nothing is copied.

    Attributes:
        blob: (bytes,) uint8.
        positions: (n,) int32, in the order of the cells.
        keys: (layers, n, key_bytes) uint8.
        values: (layers, n, width, element) uint8: where values are not transposed, width is 1.
    """

    blob: Bytes
    format: Format
    positions: NDArray[np.int32]

    @cached_property
    def _start(self) -> int:
        return _HEADER.itemsize + len(self.positions) * _CELL.itemsize + _DATA.itemsize

    @cached_property
    def keys(self) -> Bytes:
        count, row = len(self.positions), self.format.key_bytes
        return _strided(
            self.blob,
            self._start + _LAYER.itemsize,
            (self.format.layers, count, row),
            (_LAYER.itemsize + count * row, row, 1),
        )

    @cached_property
    def values(self) -> Bytes:
        count, form = len(self.positions), self.format
        start = self._start + form.layers * (_LAYER.itemsize + count * form.key_bytes)
        layer = _LAYER.itemsize + count * form.value_bytes
        element = form.element or form.value_bytes
        return _strided(
            self.blob,
            start + _LAYER.itemsize,
            (form.layers, count, form.value_bytes // element, element),
            (layer, element, count * element, 1),
        )


def _strided(
    blob: Bytes, start: int, shape: tuple[int, ...], strides: tuple[int, ...]
) -> NDArray[np.uint8]:
    return np.ndarray(shape, np.uint8, blob.data, start, strides)


def build(form: Format, positions: NDArray[Any]) -> Rows:
    """A blob for cells at the given positions; its rows are the caller's to fill."""
    count = len(positions)
    blob = np.empty(form.blob_bytes(count), np.uint8)
    rows = Rows(blob, form, np.asarray(positions, np.int32))
    blob[: _HEADER.itemsize].view(_HEADER)[0] = (_MAGIC, 0, 1, count)
    end = rows._start - _DATA.itemsize
    cells = blob[_HEADER.itemsize : end].view(_CELL)
    cells["position"], cells["sequences"], cells["sequence"] = positions, 1, 0
    blob[end : rows._start].view(_DATA)[0] = (form.element > 0, form.layers)
    key = np.array((form.key_type, form.key_bytes), _LAYER)
    value = np.array((form.value_type, form.value_bytes), _LAYER)
    if form.element:
        width = form.value_bytes // form.element
        value = np.array((form.value_type, form.element, width), _TRANSPOSED)
    at = rows._start
    for head, row in ((key, form.key_bytes), (value, form.value_bytes)):
        for _ in range(form.layers):
            blob[at : at + _LAYER.itemsize] = head.reshape(1).view(np.uint8)
            at += _LAYER.itemsize + count * row
    return rows


def parse(blob: Bytes, form: Format) -> Rows:
    """The rows of a blob that llama.cpp wrote.

    Raises:
        FormatError: it is not one of this format.
    """
    head = blob[: _HEADER.itemsize].view(_HEADER)
    if len(head) != 1 or head["magic"][0] != _MAGIC or head["streams"][0] != 1:
        raise FormatError("llama.cpp's state of a sequence begins differently than expected")
    count = int(head["cells"][0])
    if not count:
        return Rows(blob, form, np.empty(0, np.int32))
    if len(blob) != form.blob_bytes(count):
        raise FormatError(
            f"llama.cpp's state of {count} cells has {len(blob)} bytes, not "
            f"{form.blob_bytes(count)}"
        )
    cells = blob[_HEADER.itemsize : _HEADER.itemsize + count * _CELL.itemsize].view(_CELL)
    rows = Rows(blob, form, cells["position"].copy())
    bare = build(form, rows.positions[:0])  # the heads of all layers, without rows
    if cells["sequences"].max() != 1 or not np.array_equal(_heads(rows), _heads(bare)):
        raise FormatError("llama.cpp's state of a sequence holds its layers in another form")
    return rows


def _heads(rows: Rows) -> NDArray[np.uint8]:
    """What stands between the rows: for every layer what its keys and values are."""
    form, count = rows.format, len(rows.positions)
    start = rows._start
    parts = [rows.blob[start - _DATA.itemsize : start]]
    for row in (form.key_bytes, form.value_bytes):
        for _ in range(form.layers):
            parts.append(rows.blob[start : start + _LAYER.itemsize])
            start += _LAYER.itemsize + count * row
    return np.concatenate(parts)


def take(context: Context, form: Format, sequence: int) -> Rows:
    """The rows of all cells of a sequence; they stay in the cache.

    Raises:
        FormatError: llama.cpp's format is another.
    """
    size = int(L.llama_state_seq_get_size(context.handle, sequence))
    blob = np.empty(size, np.uint8)
    pointer = blob.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
    written = int(L.llama_state_seq_get_data(context.handle, pointer, size, sequence))
    if written != size or size < _HEADER.itemsize:
        raise FormatError(f"llama.cpp wrote {written} of {size} bytes of a sequence's state")
    return parse(blob, form)


def put(context: Context, rows: Rows, sequence: int) -> None:
    """Makes the rows the sequence's; what the sequence had is dropped.

    Raises:
        LaserKVError: no cells are free, or llama.cpp refuses the rows; the sequence is empty.
    """
    pointer = rows.blob.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
    size = len(rows.blob)
    if int(L.llama_state_seq_set_data(context.handle, pointer, size, sequence)) != size:
        Sequence(context, sequence).remove()
        raise LaserKVError(
            f"the KV cache of {context.allocated_cells} cells has no room for "
            f"{len(rows.positions)} more; use a larger --ctx-size"
        )


def expected(model: Model, type_k: str, type_v: str, *, transposed: bool) -> Format:
    """The format for a model and types of the cache, as llama.cpp's sources have it."""
    values = model.kv_heads * model.value_dim
    value_bytes = row_bytes(type_v, values)
    return Format(
        layers=model.layers,
        key_type=CACHE_TYPES[type_k],
        value_type=CACHE_TYPES[type_v],
        key_bytes=row_bytes(type_k, model.kv_heads * model.head_dim),
        value_bytes=value_bytes,
        element=value_bytes // values if transposed else 0,
        kv_heads=model.kv_heads,
        head_dim=model.head_dim,
    )


def check(context: Context) -> Format:
    """Tries the format on a few cells of two spare sequences, in both directions.

    What was decoded must be read with its positions and with the keys the graph showed; a blob of
    our own must be what llama.cpp would have written; and put back it must come out the same.

    Returns:
        The format; rows may be moved with it.

    Raises:
        FormatError: they may not; the message says what differs.
        LaserKVError: no cells are free.
    """
    first, second = SEQUENCES - 1, SEQUENCES - 2
    tokens = np.arange(_PROBED, dtype=np.int32) + context.model.vocab_size // 2
    start = 3
    captured = context.probe.new("keys", _PROBED)
    try:
        with context.probe.armed(keys=(captured, 0)):
            context.decode(tokens, start, first)
        size = int(L.llama_state_seq_get_size(context.handle, first))
        form = _matching(context, size)
        rows = take(context, form, first)
        order = np.argsort(rows.positions)
        if not np.array_equal(rows.positions[order], start + np.arange(_PROBED)):
            raise FormatError("llama.cpp's state names other positions than were decoded")
        form = replace(form, hadamard=_turned_with(form, rows.keys[:, order], captured))
        own = build(form, rows.positions)
        own.keys[...], own.values[...] = rows.keys, rows.values
        theirs = rows.blob.copy()
        own.blob[4:8] = theirs[4:8]  # the sequence's number, which reading ignores
        cells = slice(_HEADER.itemsize, _HEADER.itemsize + _PROBED * _CELL.itemsize)
        own.blob[cells].view(_CELL)["sequence"] = first
        if not np.array_equal(own.blob, theirs):
            raise FormatError("a blob of our own differs from what llama.cpp writes")
        put(context, own, second)
        back = take(context, form, second)
        same = np.argsort(back.positions)
        for given, found in ((rows.keys, back.keys), (rows.values, back.values)):
            if not np.array_equal(given[:, order], found[:, same]):
                raise FormatError("rows that were put back came out changed")
    finally:
        Sequence(context, first).remove()
        Sequence(context, second).remove()
    return form


def _matching(context: Context, size: int) -> Format:
    """The layout of values that a state of that size can have, by trying both."""
    model, options = context.model, context.options
    blob = np.empty(size, np.uint8)
    pointer = blob.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
    L.llama_state_seq_get_data(context.handle, pointer, size, SEQUENCES - 1)
    reason: FormatError | None = None
    for transposed in (False, True):
        if transposed and options.quantised_v:
            continue
        form = expected(model, options.type_k, options.type_v, transposed=transposed)
        try:
            parse(blob, form)
        except FormatError as error:
            reason = error
        else:
            return form
    assert reason is not None
    raise reason


def _turned_with(form: Format, keys: Bytes, captured: NDArray[np.float32]) -> int:
    """The size of the Hadamard matrix with which stored keys equal those the graph showed."""
    sizes = [0]
    if not form.exact:
        sizes += [1 << n for n in range(6, 13) if form.head_dim % (1 << n) == 0][::-1]
    length = np.linalg.norm(captured)
    for size in sizes:
        found = replace(form, hadamard=size).keys(np.ascontiguousarray(keys)).astype(np.float32)
        # 4-bit keys are off by a tenth, keys turned with another matrix by more than their length
        if np.linalg.norm(found - captured) <= 0.25 * length:
            return size
    raise FormatError("the keys in llama.cpp's state are not those of its graph")
