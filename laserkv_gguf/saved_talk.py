"""A conversation in a file: loaded in a moment, it goes on as if it had never ended."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from laserkv_gguf import saved, saved_rows, saved_schema
from laserkv_gguf.budget import Budget
from laserkv_gguf.conversation import CONVERSATION_CELLS, Run
from laserkv_gguf.engine import Reading
from laserkv_gguf.errors import UserError
from laserkv_gguf.ledger import TURN, Ledger, Segment
from laserkv_gguf.llama import stored
from laserkv_gguf.llama.sequence import MAIN
from laserkv_gguf.recall import Recaller
from laserkv_gguf.saved_schema import Saved, prefix_of
from laserkv_gguf.saved_swap import swapped
from laserkv_gguf.talk import Talk
from laserkv_gguf.timings import Timings

if TYPE_CHECKING:
    from laserkv_gguf.session import LaserKV

log = logging.getLogger(__name__)


def save(talk: Talk, path: str | Path) -> int:
    """Writes a conversation: what was read and said, what its cells hold, and parked rows.

    Returns:
        Bytes written.

    Raises:
        UserError: nothing was read yet, or the place cannot be written to.
        LaserKVError: the disk is full.
    """
    with talk.engine._alone():
        if talk.reading is None:
            talk._read_unasked()
        talk._check_owner()
        assert talk.reading is not None
        talk._settle()
        ledger = talk.ledger
        segments = list(ledger.segments.items())
        arrays: dict[str, Any] = {
            "state": stored.save(talk._context, MAIN),
            "rows": np.stack((ledger.segment, ledger.index, ledger.position)),
            "tokens": np.concatenate([s.tokens for _, s in segments]),
            "pools": np.concatenate([s.pools for _, s in segments]),
            "pending": np.array(talk._pending, np.int32),
        }
        for number, text in enumerate(talk.texts.values()):
            arrays[f"text {number}"] = np.frombuffer(text.encode("utf-8"), np.uint8)
        metadata = {
            **saved.made_with(talk.engine),
            "segments": [
                (n, s.kind, s.name, len(s.tokens), len(s.pools), s.whole) for n, s in segments
            ],
            "names": list(talk.texts),
            "system": talk.system,
            "turns": talk.turns,
            "thinnings": talk.thinnings,
            "turn_open": talk._turn_open,
            "compact": talk._compact,
            "unread": talk._unread,
            "cells": talk._context.cells,
            "budget": asdict(talk.reading.budget),
            "max_tokens": talk.max_tokens,
            "parked": [
                {
                    "number": number,
                    "first": recaller is talk._recaller,
                    "budget": asdict(recaller.budget),
                    "offset": recaller.offset,
                    "most": recaller.most,
                    "compact": recaller.reader.compact,
                }
                for number, recaller in talk.parked_by.items()
            ],
        }
        tensors = [saved.whole(name, array) for name, array in arrays.items()]
        for number, recaller in talk.parked_by.items():
            prefix = prefix_of(number)
            tensors += saved_rows.tensors(recaller, prefix)
            tensors += [
                saved.whole(prefix + name, getattr(recaller, name))
                for name in ("tokens", "kept", "read", "where")
            ]
        saved_schema.check_about(saved.CONVERSATION, metadata)
        return saved.write(path, saved.CONVERSATION, tensors, metadata)


def load(engine: LaserKV, path: str | Path | Saved, **options: Any) -> Talk:
    """The conversation of a file, in the engine's context.

    Args:
        options: `sampling` and `max_tokens`, where they are to differ.

    Raises:
        UserError: no such file, altered or cut short, of another model, build or cache type, with
            something in it that is not allowed, or larger than --ctx-size.
        LaserKVError: neither memory nor disk hold its rows. The conversation so far goes on after
            either.
    """
    with saved_schema.read(path, engine, saved.CONVERSATION) as file:
        found = file.about
        options = {"max_tokens": found["max_tokens"], **options}
        cells = _cells(engine, file, options["max_tokens"])
        if not found.get("parked") and engine.settings.recall != "off":
            log.warning("%s holds no parked rows: nothing can be recalled", file.path)
        talk = Talk(engine, system=found["system"], **options)
        for number, name in enumerate(found["names"]):
            talk.texts[name] = file.array(f"text {number}").tobytes().decode("utf-8")
        talk._sync()
        with engine._alone(), swapped(engine):
            _load(engine, talk, file, cells)
    return talk


def _cells(engine: LaserKV, file: Saved, max_tokens: int) -> int:
    """Cells for a conversation: --ctx-size, or what it had, as far as what it read explains that.

    Raises:
        UserError: --ctx-size is too small.
    """
    found, rows = file.about, file.tensors["rows"].shape[1]
    cells: int = engine.ctx_size or found["cells"]
    if rows + 2 > cells:
        wanted = max(found["cells"], rows + 2)
        raise UserError(
            f"{file.path} holds {rows} cells, more than --ctx-size {cells} has; "
            f"use --ctx-size {wanted}"
        )
    if engine.ctx_size:
        return cells
    most = rows + file.tensors["tokens"].shape[0]
    most += 2 * max(CONVERSATION_CELLS, min(2 * max_tokens, 1 << 14))
    if cells > most:
        log.warning(
            "%s was saved with %d cells, of which it needs no more than %d; "
            "give --ctx-size %d for all of them",
            file.path,
            cells,
            most,
            cells,
        )
    return min(cells, most)


def _load(engine: LaserKV, talk: Talk, file: Saved, cells: int) -> None:
    """Puts a conversation into the context."""
    found, parked = file.about, file.about.get("parked", [])
    if parked:
        engine.turn_recall_on(found["settings"])
    ledger = _ledger(file)
    reader = engine._reader_for(cells, found["compact"])
    reader.forget()
    reader.context.doubtful = True
    recallers = _parked(file, engine, cells, parked)
    try:
        stored.restore(reader.context, MAIN, file.array("state"))
    except BaseException:
        for _, recaller in recallers:
            recaller.close()
        raise
    budget = Budget(**found["budget"])
    read = [s.tokens for s in ledger.segments.values() if s.kind != TURN]
    talk._run = Run(budget, cells, reader, found["compact"])
    for entry, recaller in recallers:
        if entry["first"]:
            talk._recaller = recaller
        else:
            talk._added[entry["number"]] = recaller
    talk.ledger, talk._pending = ledger, file.array("pending").tolist()
    talk.turns, talk.thinnings = found["turns"], found["thinnings"]
    talk._turn_open, talk._compact = found["turn_open"], found["compact"]
    talk._unread = found["unread"]
    talk._place()
    talk.reading = Reading(
        np.concatenate(read),
        budget,
        np.flatnonzero(~ledger.of_kind(TURN)),
        talk._position,
        Timings(),
    )
    engine._owner = talk


def _parked(
    file: Saved, engine: LaserKV, cells: int, entries: list[dict[str, Any]]
) -> list[tuple[dict[str, Any], Recaller]]:
    """What parked the documents of a file; the context is empty."""
    made: list[tuple[dict[str, Any], Recaller]] = []
    try:
        for entry in entries:
            budget, compact = Budget(**entry["budget"]), entry["compact"]
            run = Run(budget, cells, engine._reader_for(cells, compact), compact)
            number = 0 if entry["first"] else entry["number"]
            recaller = engine.recaller(run, entry["offset"], number)
            if recaller is None:  # the rows' format is not known; that was said
                break
            made.append((entry, recaller))
            prefix = prefix_of(entry["number"])
            saved_rows.park(recaller, file, prefix)
            recaller.tokens = file.array(prefix + "tokens")
            for name in ("kept", "read", "where"):
                setattr(recaller, name, file.whole(prefix + name))
            recaller.most = entry["most"]
    except BaseException:
        for _, recaller in made:
            recaller.close()
        raise
    return made


def _ledger(file: Saved) -> Ledger:
    ledger, token, pool = Ledger(), 0, 0
    read, kept_by = file.array("tokens"), file.array("pools")
    for number, kind, name, tokens, pools, whole in file.about["segments"]:
        ledger.segments[number] = Segment(
            kind, read[token : token + tokens], name, kept_by[pool : pool + pools], whole
        )
        token, pool = token + tokens, pool + pools
    ledger.segment, ledger.index, ledger.position = file.whole("rows")
    return ledger
