"""Where parked rows lie: arrays in memory; see `disk` for one file.

A store holds, for every token of a document, its key and value rows in the cache's own type, the
position its keys are turned for, and a packed signature. It is written once, block by block, while
the document is read; rows never change afterwards, so a token can go in and out of the cache any
number of times.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from laserkv_gguf import machine
from laserkv_gguf.errors import UserError
from laserkv_gguf.machine import human

_in_memory: WeakSet[Store] = WeakSet()  # all that are alive and hold something

Bytes = NDArray[np.uint8]
Indices = NDArray[np.int64]


class Store:
    """Rows of a document's tokens, in memory.

    Args:
        tokens: of the document.
        layers, key_bytes, value_bytes: of a token's rows; see `llama.rows.Format`.
        quantised: whether the cache's types are already small, for the advice in errors.

    Attributes:
        parked: tokens written so far: the first so many of the document.
        positions: (tokens,) int32: where each stood when it was parked.

    Raises:
        UserError: the memory cannot hold them.
    """

    kind = "ram"

    def __init__(
        self,
        tokens: int,
        layers: int,
        key_bytes: int,
        value_bytes: int,
        *,
        quantised: bool = False,
    ) -> None:
        self.tokens, self.layers = tokens, layers
        self.key_bytes, self.value_bytes = key_bytes, value_bytes
        self.quantised = quantised
        self.parked = 0
        self.positions = np.zeros(tokens, np.int32)
        self._allocate()

    @property
    def bytes(self) -> int:
        """What the rows of all tokens take."""
        return self.tokens * self.layers * (self.key_bytes + self.value_bytes)

    def _allocate(self) -> None:
        free = machine.free_ram()
        if free is not None and self.bytes > free:
            raise self._too_large(f"there are {human(free)}")
        try:
            self._keys: Bytes = np.empty((self.layers, self.tokens, self.key_bytes), np.uint8)
            self._values: Bytes = np.empty((self.layers, self.tokens, self.value_bytes), np.uint8)
        except MemoryError:
            raise self._too_large("there is less") from None
        _in_memory.add(self)

    def _too_large(self, found: str) -> UserError:
        smaller = "" if self.quantised else ", or -ctk q8_0 -ctv q8_0 for half of it"
        return UserError(
            f"parking {self.tokens} tokens takes {human(self.bytes)} of memory, {found}; "
            f"use --recall disk{smaller}"
        )

    def write(self, keys: Bytes, values: Bytes, positions: NDArray[Any]) -> None:
        """Parks the next tokens.

        Args:
            keys: (layers, n, key_bytes).
            values: (layers, n, value_bytes) or (layers, n, width, element).
            positions: (n,).

        Raises:
            LaserKVError: the disk is full; nothing of these tokens is parked.
        """
        count = len(positions)
        end = self.parked + count
        if end > self.tokens:
            raise ValueError(f"{end} tokens parked in a store for {self.tokens}")
        self._write(keys, values.reshape(self.layers, count, self.value_bytes))
        self.positions[self.parked : end] = positions
        self.parked = end

    def _write(self, keys: Bytes, values: Bytes) -> None:
        end = self.parked + keys.shape[1]
        self._keys[:, self.parked : end] = keys
        self._values[:, self.parked : end] = values

    def keys(self, tokens: Indices) -> Bytes:
        """Key rows (layers, n, key_bytes); a view where the tokens follow each other."""
        found: Bytes = self._keys[:, _selection(tokens)]
        return found

    def values(self, tokens: Indices) -> Bytes:
        """Value rows (layers, n, value_bytes); a view where the tokens follow each other."""
        found: Bytes = self._values[:, _selection(tokens)]
        return found

    def copy(self, tokens: Indices, keys: Bytes, values: Bytes) -> None:
        """Copies rows into `keys` (layers, n, key_bytes) and `values` (layers, n, …)."""
        chosen = _selection(tokens)
        keys[...] = self._keys[:, chosen]
        values[...] = self._values[:, chosen].reshape(values.shape)

    def all(self, kind: str) -> Iterator[Bytes]:
        """All rows of "keys" or "values", layer by layer, in parts (n, bytes of a row)."""
        yield from self._keys if kind == "keys" else self._values

    def close(self) -> None:
        """Gives the memory, and the file, back."""
        self._keys = self._values = np.empty((self.layers, 0, 0), np.uint8)
        self.parked = 0
        _in_memory.discard(self)


def held() -> int:
    """Bytes of rows that this process holds in memory."""
    return sum(store.bytes for store in _in_memory)


def _selection(tokens: Indices) -> Any:
    """A slice where that says it: slices are views, and read a disk in order."""
    if len(tokens) and int(tokens[-1]) - int(tokens[0]) + 1 == len(tokens):
        return slice(int(tokens[0]), int(tokens[-1]) + 1)
    return tokens
