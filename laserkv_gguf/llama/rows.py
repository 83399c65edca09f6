"""llama.cpp's saved state of a sequence: its format, and rows taken out of it and put back.

llama.cpp writes and reads the state of a sequence as one blob (`llama.state`). Its format is
internal, and this file is all that knows it:

    magic u32 | sequence i32 | streams u32 (1) | cells u32
    per cell    position i32 | sequences u32 (1) | sequence i32
    transposed u32 | layers u32
    per layer   key type i32 | row bytes u64 | cells × row
    per layer   value type i32 | row bytes u64 | cells × row            (flash attention on)
                value type i32 | element bytes u32 | width u32 | width × cells × element    (off)

`check` tries all of it in both directions before anything relies on it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import gguf
import llama_cpp as L
import numpy as np
from numpy.typing import NDArray

from laserkv_gguf.errors import LaserKVError
from laserkv_gguf.llama import hadamard, state
from laserkv_gguf.llama.context import SEQUENCES, Context, ContextOptions
from laserkv_gguf.llama.model import CACHE_TYPES, Model, row_bytes
from laserkv_gguf.llama.sequence import SPARE, Sequence, runs

log = logging.getLogger(__name__)

Bytes = NDArray[np.uint8]

_MAGIC = 0xAF143CD8
_HEADER = np.dtype([("magic", "<u4"), ("sequence", "<i4"), ("streams", "<u4"), ("cells", "<u4")])
_CELL = np.dtype([("position", "<i4"), ("sequences", "<u4"), ("sequence", "<i4")])
_DATA = np.dtype([("transposed", "<u4"), ("layers", "<u4")])
_LAYER = np.dtype([("type", "<i4"), ("row", "<u8")])  # packed: 12 bytes
_TRANSPOSED = np.dtype([("type", "<i4"), ("element", "<u4"), ("width", "<u4")])

_PLAIN_ROPE = (L.LLAMA_ROPE_TYPE_NORM, L.LLAMA_ROPE_TYPE_NEOX)
_EXTRA = (0, 8, 12)  # bytes that may follow a cell where a token has several positions

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
        value_dim: dimensions of a head's values.
        value_hadamard: as `hadamard`, of the values.
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
    value_dim: int = 0
    value_hadamard: int = 0

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

    def keys(self, rows: Bytes, wide: Any = np.float16) -> NDArray[Any]:
        """Key rows (layers, n, key_bytes) as (layers, n, kv_heads, head_dim).

        A view of float16 or float32 where the cache holds these, else a copy of type `wide`.
        """
        return self._numbers(rows, self.key_type, self.head_dim, self.hadamard, wide)

    def values(self, rows: Bytes, wide: Any = np.float16) -> NDArray[Any]:
        """Value rows (layers, n, width, element) as (layers, n, kv_heads, value_dim); as `keys`."""
        flat = rows.reshape(*rows.shape[:2], -1)
        return self._numbers(flat, self.value_type, self.value_dim, self.value_hadamard, wide)

    def _numbers(self, rows: Bytes, kind: int, dim: int, turned: int, wide: Any) -> NDArray[Any]:
        shape = (*rows.shape[:2], self.kv_heads, dim)
        plain = {CACHE_TYPES["f32"]: np.float32, CACHE_TYPES["f16"]: np.float16}
        if kind in plain:
            return rows.view(plain[kind]).reshape(shape)
        quantised = gguf.GGMLQuantizationType(kind)
        found = gguf.quants.dequantize(np.ascontiguousarray(rows), quantised).astype(np.float32)
        return hadamard.turned(found.reshape(shape), turned).astype(wide, copy=False)


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
    whole = len(blob) >= _HEADER.itemsize
    head = blob[: _HEADER.itemsize].view(_HEADER) if whole else np.empty(0, _HEADER)
    if not whole or head["magic"][0] != _MAGIC or head["streams"][0] != 1:
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


def checked(model: Model, options: ContextOptions, blob: NDArray[np.uint8]) -> NDArray[np.int32]:
    """The positions (cells,) of a state that is as llama.cpp writes them, down to the last byte.

    Nothing but the rows themselves is left to chance: llama.cpp's loader is given no number that
    it would have to doubt. The context need not exist yet.

    Args:
        model, options: of the context that it is for.
        blob: what may be a state.

    Raises:
        ValueError: what is wrong with it.
    """
    if len(blob) < _HEADER.itemsize:
        raise ValueError("ends early")
    head = blob[: _HEADER.itemsize].view(_HEADER)
    if head["magic"][0] != _MAGIC or head["streams"][0] != 1:
        raise ValueError("is no state of llama.cpp's cache")
    cells = int(head["cells"][0])
    if not cells:
        if len(blob) != _HEADER.itemsize:
            raise ValueError("has bytes without cells")
        return np.empty(0, np.int32)
    plain = model.rope_type in (L.LLAMA_ROPE_TYPE_NONE, *_PLAIN_ROPE)
    for extra in (0,) if plain else _EXTRA:
        found = _positions(model, options, blob, cells, extra)
        if found is not None:
            return found
    raise ValueError("is not laid out as this model's cache is")


def _positions(
    model: Model, options: ContextOptions, blob: NDArray[np.uint8], cells: int, extra: int
) -> NDArray[np.int32] | None:
    """The cells' positions, where all else is as it must be; `extra` bytes follow each cell."""
    at, size = _HEADER.itemsize, _CELL.itemsize + extra
    end = at + cells * size
    if end + _DATA.itemsize > len(blob):
        return None
    data = blob[end : end + _DATA.itemsize].view(_DATA)
    cut = np.ascontiguousarray(blob[at:end].reshape(cells, size)[:, : _CELL.itemsize])
    meta: Any = cut.reshape(-1).view(_CELL)
    transposed, layers = int(data["transposed"][0]), int(data["layers"][0])
    if layers != model.layers or transposed not in (0, 1) or (meta["sequences"] != 1).any():
        return None
    at = end + _DATA.itemsize
    widths = model.kv_heads * model.head_dim, model.kv_heads * model.value_dim
    kinds = options.type_k, options.type_v
    # heads may differ between layers; then llama.cpp compares what a row takes
    uniform = all(
        (model.metadata(f"{model.architecture}.attention.{name}") or "0").isdigit()
        for name in ("head_count", "head_count_kv")
    )
    for part, (kind, width) in enumerate(zip(kinds, widths, strict=True)):
        form = _TRANSPOSED if part and transposed else _LAYER
        wanted = row_bytes(kind, width)
        for _ in range(layers):
            if at + form.itemsize > len(blob):
                return None
            head = blob[at : at + form.itemsize].view(form)
            at += form.itemsize
            if head["type"][0] != CACHE_TYPES[kind]:
                return None
            if form is _LAYER:
                row = int(head["row"][0])
            else:
                row = int(head["element"][0]) * int(head["width"][0])
                if uniform and int(head["width"][0]) != width:
                    return None
            if row < 1 or (uniform and row != wanted):
                return None
            at += row * cells
            if at > len(blob):
                return None
    found: NDArray[np.int32] = meta["position"]
    return found if at == len(blob) else None


def take(context: Context, form: Format, sequence: int) -> Rows:
    """The rows of all cells of a sequence; they stay in the cache.

    Raises:
        FormatError: llama.cpp's format is another.
    """
    try:
        blob = state.save(context.handle, sequence)
    except LaserKVError as error:
        raise FormatError(str(error)) from error
    return parse(blob, form)


def take_at(
    source: Sequence, form: Format, spans: Iterable[tuple[int, int]]
) -> tuple[NDArray[np.int32], NDArray[np.uint8], NDArray[np.uint8]]:
    """The rows of a sequence at some positions, in their order; they stay in the cache.

    Args:
        spans: half-open runs of positions.

    Returns:
        Positions (n,), keys (layers, n, key_bytes) and values (layers, n, …); copies.

    Raises:
        FormatError: llama.cpp's format is another.
    """
    spare = Sequence(source.context, SPARE)
    spare.remove()
    try:
        for start, end in spans:
            source.share_with(spare, start, end)
        taken = take(source.context, form, SPARE)
    finally:
        spare.remove()
    order = np.argsort(taken.positions, kind="stable")
    return taken.positions[order], taken.keys[:, order], taken.values[:, order]


def put(context: Context, rows: Rows, sequence: int) -> None:
    """Makes the rows the sequence's; what the sequence had is dropped.

    Raises:
        LaserKVError: no cells are free, or llama.cpp refuses the rows; the sequence is empty.
    """
    try:
        state.restore(context.handle, sequence, rows.blob)
    except LaserKVError as error:
        Sequence(context, sequence).remove()
        raise LaserKVError(
            f"the KV cache of {context.allocated_cells} cells has no room for "
            f"{len(rows.positions)} more; use a larger --ctx-size"
        ) from error


@dataclass(frozen=True)
class Held:
    """What stands at some positions of a sequence, in ascending order of these.

    Attributes:
        positions: (n,) int32.
        keys: (layers, n, kv_heads, head_dim) after RoPE, float16 or float32.
        values: (layers, n, kv_heads, value_dim), likewise.
    """

    positions: NDArray[np.int32]
    keys: NDArray[Any]
    values: NDArray[Any]


def read(context: Context, form: Format, sequence: int, positions: NDArray[np.int64]) -> Held:
    """Copies what stands at some ascending positions of a sequence.

    Shifts that llama.cpp has not applied yet are not in the keys: `moving.settle` first.

    Raises:
        FormatError: llama.cpp's format is another.
    """
    spans = ((int(start), int(end)) for start, end in runs(positions))
    found, keys, values = take_at(Sequence(context, sequence), form, spans)
    return Held(
        found,
        form.keys(np.ascontiguousarray(keys), np.float32),
        form.values(np.ascontiguousarray(values), np.float32),
    )


def keys_between(source: Sequence, spans: Iterable[tuple[int, int]]) -> Iterator[NDArray[Any]]:
    """Keys of whatever a sequence has at some positions.

    Args:
        spans: half-open runs of positions.

    Yields:
        (layers, n, kv_heads, head_dim) float16 or float32, a part at a time; nothing where
        llama.cpp's state is not what this file knows (which is logged).
    """
    context = source.context
    spare = Sequence(context, SPARE)
    at_once = max(1, _BLOB_BYTES * context.allocated_cells // context.kv_bytes)
    for start, end in spans:
        for first in range(start, end, at_once):
            spare.remove()
            try:
                source.share_with(spare, first, min(first + at_once, end))
                if spare.last < 0:
                    continue
                taken = take(context, known(context), SPARE)
            except LaserKVError as error:
                log.warning("attention to what stands beside the text is not counted: %s", error)
                return
            finally:
                spare.remove()
            yield taken.format.keys(np.ascontiguousarray(taken.keys), np.float32)


def known(context: Context) -> Format:
    """The form of a context's rows, tried once.

    Raises:
        FormatError: llama.cpp's state is not what this file knows.
        LaserKVError: no cells are free to try it in.
    """
    if context.row_format is None:
        context.row_format = check(context)
    found: Format = context.row_format
    return found


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
        value_dim=model.value_dim,
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
    quantised_v = context.options.quantised_v
    captured = context.probe.new("keys", _PROBED)
    shown = context.probe.new("values", _PROBED if quantised_v else 0)
    try:
        with context.at_once(), context.probe.armed(keys=(captured, 0), values=(shown, 0)):
            context.decode(tokens, start, first)
        form = _matching(context, first)
        rows = take(context, form, first)
        order = np.argsort(rows.positions)
        if not np.array_equal(rows.positions[order], start + np.arange(_PROBED)):
            raise FormatError("llama.cpp's state names other positions than were decoded")
        form = _measured(form, rows.keys[:, order], rows.values[:, order], captured, shown)
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


def _matching(context: Context, sequence: int) -> Format:
    """The layout of values that a sequence's state has, by trying both."""
    model, options = context.model, context.options
    reason: FormatError | None = None
    for transposed in (False, True):
        if transposed and options.quantised_v:
            continue
        form = expected(model, options.type_k, options.type_v, transposed=transposed)
        try:
            take(context, form, sequence)
        except FormatError as error:
            reason = error
        else:
            return form
    assert reason is not None
    raise reason


def _measured(
    form: Format,
    keys: Bytes,
    values: Bytes,
    captured: NDArray[np.float32],
    shown: NDArray[np.float32],
) -> Format:
    """The format with the rotations under which stored rows equal those the graph showed."""
    keys, values = np.ascontiguousarray(keys), np.ascontiguousarray(values)
    for size in hadamard.sizes(form.head_dim) if not form.exact else [0]:
        found = replace(form, hadamard=size)
        if _are_close(found.keys(keys), captured):
            break
    else:
        raise FormatError("the keys in llama.cpp's state are not those of its graph")
    if not shown.size:  # llama.cpp turns quantised values only
        return found
    for size in hadamard.sizes(form.value_dim):
        whole = replace(found, value_hadamard=size)
        if _are_close(whole.values(values), shown):
            return whole
    raise FormatError("the values in llama.cpp's state are not those of its graph")


def _are_close(found: NDArray[Any], wanted: NDArray[np.float32]) -> bool:
    """4-bit rows are off by a tenth, rows turned with another matrix by more than their length."""
    difference = np.linalg.norm(found.astype(np.float32) - wanted)
    return bool(difference <= 0.25 * np.linalg.norm(wanted))
