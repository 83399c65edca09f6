"""Saves and loads a document's parked rows, so that recall works after loading as before."""

from __future__ import annotations

from collections.abc import Iterator

from laserkv_gguf.errors import UserError
from laserkv_gguf.files import archive
from laserkv_gguf.planning.settings import BITS
from laserkv_gguf.recall.recaller import Recaller
from laserkv_gguf.recall.replay import Replay
from laserkv_gguf.saving.contents import INDEX
from laserkv_gguf.saving.file import Saved


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
    way = recaller.way
    if isinstance(way, Replay):
        return
    if way.signatures is not None and way.signatures.centre is not None:
        yield archive.whole(f"{prefix}centre", way.signatures.centre)
        codes = way.signatures.codes
        yield archive.Tensor(f"{prefix}signatures", "uint64", codes.shape, iter(codes))
    if way.index:
        yield archive.whole(f"{prefix}units", way.units)
        for name, array in way.index.items():
            yield archive.whole(prefix + INDEX + name, array)


def park(recaller: Recaller, file: Saved, prefix: str = "") -> None:
    """Fills a store from a file, and what finds rows in it.

    Args:
        file: that was read for this engine.
        prefix: of the names, where it holds several documents.

    Raises:
        UserError: what the policy notes while it reads is not in the file.
        LaserKVError: the disk is full.
    """
    store, settings = recaller.store, file.about["settings"]
    keys, values = prefix + "keys", prefix + "values"
    positions = file.array(prefix + "positions")
    step = max(1, archive.CHUNK // recaller.form.cell_bytes)
    for first in range(0, store.tokens, step):
        end = min(first + step, store.tokens)
        store.write(
            file.rows(keys, first, end), file.rows(values, first, end), positions[first:end]
        )
    way = recaller.way
    if isinstance(way, Replay):
        return
    same = settings["policy"] == recaller.policy.name
    index, signatures = prefix + INDEX, way.signatures
    if recaller.policy.unit and f"{prefix}units" in file.tensors and same:
        way.units = file.whole(f"{prefix}units")
        way.index = {
            name.removeprefix(index): file.array(name)
            for name in file.tensors
            if name.startswith(index)
        }
    elif (
        signatures is not None
        and f"{prefix}signatures" in file.tensors
        and settings.get("recall_bits", BITS) == BITS
    ):
        signatures.codes = file.array(f"{prefix}signatures")
        signatures.centre = file.array(f"{prefix}centre")
    elif recaller.policy.needs.recall:
        raise UserError(
            f"{file.path} was not read with --policy {recaller.policy.name}, which notes while it "
            "reads what it looks up; read the document again, or use another policy"
        )
    else:
        recaller.remember()
