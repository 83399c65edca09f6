"""Saves and loads a document's parked rows, so that recall works after loading as before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from laserkv_gguf.errors import UserError
from laserkv_gguf.files import archive
from laserkv_gguf.recall.recaller import Recaller

_CHUNK = 1 << 24
_INDEX = "index."


def tensors(recaller: Recaller, prefix: str = "") -> Iterator[archive.Tensor]:
    """The rows of a document's tokens, where their keys were turned for, and what finds them.

    Args:
        prefix: of the names, where a file holds several documents.
    """
    store = recaller.store
    yield archive.whole(f"{prefix}positions", store.positions)
    for name, row in (("keys", store.key_bytes), ("values", store.value_bytes)):
        shape = (store.layers, store.tokens, row)
        yield archive.Tensor(prefix + name, "uint8", shape, store.all(name))
    if recaller.signatures is not None and recaller.signatures.centre is not None:
        yield archive.whole(f"{prefix}centre", recaller.signatures.centre)
        codes = recaller.signatures.codes
        yield archive.Tensor(f"{prefix}signatures", "uint64", codes.shape, iter(codes))
    if recaller.index:
        yield archive.whole(f"{prefix}units", recaller.units)
        for name, array in recaller.index.items():
            yield archive.whole(prefix + _INDEX + name, array)


def park(
    path: Path, recaller: Recaller, file: Any, settings: Mapping[str, Any], prefix: str = ""
) -> None:
    """Fills a store from a file, and what finds rows in it.

    Args:
        file: the opened safetensors file at `path`.
        settings: it was made with.

    Raises:
        UserError: what the policy notes while it reads is not in the file.
        LaserKVError: the disk is full.
    """
    store, names = recaller.store, set(file.keys())
    keys, values, positions = (
        file.get_slice(prefix + name) for name in ("keys", "values", "positions")
    )
    step = max(1, _CHUNK // recaller.form.cell_bytes)
    for first in range(0, store.tokens, step):
        end = min(first + step, store.tokens)
        store.write(keys[:, first:end], values[:, first:end], positions[first:end])
    if recaller.mode == "replay":
        return
    same = settings["policy"] == recaller.policy.name
    index = prefix + _INDEX
    if recaller.policy.unit and f"{prefix}units" in names and same:
        recaller.units = file.get_tensor(f"{prefix}units")
        recaller.index = {
            name.removeprefix(index): np.asarray(file.get_tensor(name))
            for name in names
            if name.startswith(index)
        }
    elif recaller.signatures is not None and f"{prefix}signatures" in names:
        recaller.signatures.codes = file.get_tensor(f"{prefix}signatures")
        recaller.signatures.centre = file.get_tensor(f"{prefix}centre")
    elif recaller.policy.needs.recall:
        raise UserError(
            f"{path} was not read with --policy {recaller.policy.name}, which notes while it "
            "reads what it looks up; read the document again, or use another policy"
        )
    else:
        recaller.remember()
