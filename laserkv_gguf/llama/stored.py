"""What a sequence's cells hold, read from and put back with llama.cpp's own sequence state.

The layout of that state is internal to llama.cpp, so `Stored.of` refuses whatever is not what it
knows: a header, the cells' positions, then per layer the keys' rows, then the values'.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import gguf
import llama_cpp as L
import numpy as np
from numpy.typing import NDArray

from laserkv_gguf.errors import LaserKVError
from laserkv_gguf.llama.context import Context, ContextOptions
from laserkv_gguf.llama.model import CACHE_TYPES, Model, row_bytes
from laserkv_gguf.llama.rows import _CELL, _DATA, _HEADER, _LAYER, _MAGIC, _TRANSPOSED
from laserkv_gguf.llama.sequence import SPARE, Sequence, runs

_PLAIN_ROPE = (L.LLAMA_ROPE_TYPE_NORM, L.LLAMA_ROPE_TYPE_NEOX)
_EXTRA = (0, 8, 12)  # bytes that may follow a cell where a token has several positions
_HADAMARD = 64  # llama.cpp rotates quantised keys of head sizes that this divides
_BYTES_AT_ONCE = 1 << 26  # of a sequence that is moved


def save(context: Context, sequence: int) -> NDArray[np.uint8]:
    """The state of a sequence, as bytes: positions, keys and values of its cells."""
    size = int(L.llama_state_seq_get_size(context.handle, sequence))
    blob = np.empty(size, np.uint8)
    pointer = blob.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
    if not size or L.llama_state_seq_get_data(context.handle, pointer, size, sequence) != size:
        raise LaserKVError("llama.cpp does not hand out the state of its cache; see --debug")
    return blob


def restore(context: Context, sequence: int, blob: NDArray[np.uint8]) -> None:
    """Puts a saved state into a sequence, which loses what it held.

    Raises:
        LaserKVError: llama.cpp does not take it.
    """
    blob = np.ascontiguousarray(blob)
    pointer = blob.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
    if L.llama_state_seq_set_data(context.handle, pointer, len(blob), sequence) != len(blob):
        raise LaserKVError(
            "llama.cpp does not take the saved state; use the same -ctk, -ctv and -fa"
        )


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


def read(context: Context, sequence: int, positions: NDArray[np.int64]) -> Stored:
    """What stands at some ascending positions of a sequence.

    Shifts that llama.cpp has not applied yet are not in the keys: decode something first.
    """
    source, spare = Sequence(context, sequence), Sequence(context, SPARE)
    spare.remove()
    try:
        for start, end in runs(positions):
            source.share_with(spare, int(start), int(end))
        return Stored.of(context, save(context, SPARE))
    finally:
        spare.remove()


def settle(context: Context) -> None:
    """Lets llama.cpp turn moved keys to where they stand, which it does with its next batch."""
    spare = Sequence(context, SPARE)
    try:
        context.decode(np.zeros(1, np.int32), 0, SPARE)
    finally:
        spare.remove()


def _comes_back(context: Context, sequence: Sequence, position: int) -> bool:
    """Whether llama.cpp takes one token's saved state, and hands out the same again."""
    one, other = Sequence(context, SPARE), Sequence(context, SPARE + 1)
    try:
        sequence.share_with(one, position, position + 1)
        blob = save(context, SPARE)
        restore(context, other.number, blob)
        # a header of 16 bytes, position, number of sequences, and which one: that differs
        return np.array_equal(save(context, other.number)[28:], blob[28:])
    except LaserKVError:
        return False
    finally:
        one.remove()
        other.remove()


def gather(
    context: Context, sequence: int, positions: NDArray[np.int64], at_once: int | None = None
) -> None:
    """Moves a sequence into the lowest cells that are free or its own; bit for bit.

    llama.cpp's attention runs up to the highest cell in use, whatever has been freed below it.
    Every token moves once, a part at a time, and llama.cpp gives it the lowest cells there are: as
    many cells are free below the line as tokens are above it, so that none stays above. Where
    llama.cpp's state of one token does not come back as it was, everything stays where it is.

    Args:
        positions: of the sequence's tokens that are moved, ascending.
        at_once: tokens moved at a time; None for as many as 64 MiB hold.
    """
    source, spare = Sequence(context, sequence), Sequence(context, SPARE)
    at_once = at_once or max(1, _BYTES_AT_ONCE * context.allocated_cells // context.kv_bytes)
    if not len(positions) or not _comes_back(context, source, int(positions[-1])):
        return
    # from the end: what was decoded last is up there, and makes room for the rest
    for end in range(len(positions), 0, -at_once):
        part = positions[max(0, end - at_once) : end]
        first, last = int(part[0]), int(part[-1]) + 1
        spare.remove()
        try:
            source.share_with(spare, first, last)
            blob = save(context, SPARE)
            source.remove(first, last)
            restore(context, SPARE, blob)
            spare.share_with(source)
        finally:
            spare.remove()


@dataclass(frozen=True)
class Stored:
    """A parsed state.

    Attributes:
        positions: (cells,) ascending.
    """

    positions: NDArray[np.int64]
    _context: Context
    _order: NDArray[np.int64]
    _blob: NDArray[np.uint8]
    _keys: tuple[tuple[int, int, int], ...]  # per layer: type, offset, bytes a row
    _values: tuple[tuple[int, int, int], ...]  # likewise; 0 bytes a row where it is transposed

    @staticmethod
    def of(context: Context, blob: NDArray[np.uint8]) -> Stored:
        """Reads the layout.

        Raises:
            LaserKVError: it is not the one this version knows.
        """
        try:
            stored = Stored._parsed(context, blob)
        except (ValueError, IndexError, KeyError) as error:
            raise LaserKVError(
                f"this llama.cpp lays out its cache's state differently ({error}); "
                "install the llama-cpp-python that this version was made for"
            ) from error
        return stored

    @staticmethod
    def _parsed(context: Context, blob: NDArray[np.uint8]) -> Stored:
        model, at = context.model, 0

        def take(kind: Any, count: int = 1) -> Any:
            nonlocal at
            size = np.dtype(kind).itemsize * count
            if at + size > len(blob):
                raise ValueError("it ends early")
            values = blob[at : at + size].view(kind)
            at += size
            return values

        def expect(what: str, found: Any, wanted: Any) -> None:
            if found != wanted:
                raise ValueError(f"{what} {found}, not {wanted}")

        expect("magic number", int(take(np.uint32)[0]), _MAGIC)
        take(np.int32)
        expect("streams", int(take(np.uint32)[0]), 1)
        cells = int(take(np.uint32)[0])
        if not cells:
            raise ValueError("no cells")
        meta = take(np.int32, 3 * cells).reshape(cells, 3)
        expect("sequences a cell", bool((meta[:, 1] == 1).all()), True)
        transposed, layers = (int(take(np.uint32)[0]) for _ in range(2))
        expect("layers", layers, model.layers)
        keys, values = [], []
        for _ in range(layers):
            kind, row = int(take(np.int32)[0]), int(take(np.uint64)[0])
            expect("bytes a key", row, _row_bytes(kind, model.kv_heads * model.head_dim))
            keys.append((kind, at, row))
            take(np.uint8, row * cells)
        width = model.kv_heads * model.value_dim
        for _ in range(layers):
            kind = int(take(np.int32)[0])
            if transposed:
                size, rows = (int(take(np.uint32)[0]) for _ in range(2))
                expect("values a token", rows, width)
                values.append((kind, at, 0))
                take(np.uint8, size * rows * cells)
            else:
                row = int(take(np.uint64)[0])
                expect("bytes a value", row, _row_bytes(kind, width))
                values.append((kind, at, row))
                take(np.uint8, row * cells)
        expect("bytes", at, len(blob))
        order = np.argsort(meta[:, 0], kind="stable")
        positions = meta[order, 0].astype(np.int64)
        return Stored(positions, context, order, blob, tuple(keys), tuple(values))

    @cached_property
    def keys(self) -> NDArray[Any]:
        """(layers, cells, kv_heads, head_dim) after RoPE, float16 where that is enough."""
        model = self._context.model
        found = self._rows(self._keys, model.head_dim)
        quantised = self._keys[0][0] not in (0, 1, 30)
        if quantised and model.head_dim % _HADAMARD == 0:
            _hadamard(found)
        return found

    @cached_property
    def values(self) -> NDArray[Any]:
        """(layers, cells, kv_heads, value_dim)."""
        model = self._context.model
        found = self._rows(self._values, model.value_dim)
        quantised = self._values[0][0] not in (0, 1, 30)
        if quantised and model.value_dim % _HADAMARD == 0:
            _hadamard(found, _HADAMARD)
        return found

    def _rows(self, layers: tuple[tuple[int, int, int], ...], dim: int) -> NDArray[Any]:
        shape = (len(layers), len(self.positions), self._context.model.kv_heads, dim)
        half = all(kind == 1 for kind, *_ in layers)
        found = np.empty(shape, np.float16 if half else np.float32)
        for layer, rows in enumerate(self._layers(layers, shape[2] * dim)):
            found[layer] = rows.reshape(shape[1:])[self._order]
        return found

    def _layers(
        self, layers: tuple[tuple[int, int, int], ...], width: int
    ) -> Iterator[NDArray[Any]]:
        cells = len(self.positions)
        for kind, at, row in layers:
            if row:
                raw = self._blob[at : at + row * cells].reshape(cells, row)
                yield _numbers(raw, kind).reshape(cells, width)
            else:
                size = np.dtype(np.float32 if kind == 0 else np.float16).itemsize
                raw = self._blob[at : at + size * width * cells].reshape(width, cells * size)
                yield _numbers(raw, kind).reshape(width, cells).T


def _row_bytes(kind: int, values: int) -> int:
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
    return values // block * size


def _numbers(raw: NDArray[np.uint8], kind: int) -> NDArray[Any]:
    if kind == 0:
        return np.ascontiguousarray(raw).view(np.float32)
    if kind == 1:
        return np.ascontiguousarray(raw).view(np.float16)
    return gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(kind))


def _hadamard(vectors: NDArray[np.float32], most: int | None = None) -> None:
    """llama.cpp's orthonormal Walsh-Hadamard rotation, its own inverse, in place.

    Over runs of the largest power of two that divides the last axis, or of `most`.
    """
    dim = vectors.shape[-1]
    size = most or dim & -dim
    step = 1
    blocks = vectors.reshape(*vectors.shape[:-1], dim // size, size)
    while step < size:
        pairs = blocks.reshape(*blocks.shape[:-1], size // (2 * step), 2, step)
        first = pairs[..., 0, :] + pairs[..., 1, :]
        pairs[..., 1, :] = pairs[..., 0, :] - pairs[..., 1, :]
        pairs[..., 0, :] = first
        step *= 2
    blocks /= np.float32(np.sqrt(size))
