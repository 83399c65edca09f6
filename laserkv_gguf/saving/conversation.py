"""A conversation in a file: loaded in a moment, it goes on as if it had never ended."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from laserkv_gguf.budget import Budget
from laserkv_gguf.conversation.ageing import Compressing
from laserkv_gguf.conversation.conversation import Conversation, State
from laserkv_gguf.conversation.documents import Parked
from laserkv_gguf.conversation.ledger import SYSTEM, Ledger, Segment
from laserkv_gguf.engine.engine import Engine, Run
from laserkv_gguf.errors import UserError
from laserkv_gguf.files import archive
from laserkv_gguf.llama import state as llama_state
from laserkv_gguf.planning.demand import TURNS
from laserkv_gguf.saving import fields, schema
from laserkv_gguf.saving import parked as parked_rows
from laserkv_gguf.saving.contents import prefix_of
from laserkv_gguf.saving.file import Saved
from laserkv_gguf.saving.identity import made_with

log = logging.getLogger(__name__)


def save(conversation: Conversation, path: str | Path) -> int:
    """Writes a conversation: what was read and said, what its cells hold, and parked rows.

    Returns:
        Bytes written.

    Raises:
        UserError: what was read is lost, or the place cannot be written to.
        LaserKVError: the disk is full.
    """
    with conversation.engine.access.inside(conversation):
        state = conversation.state()
        segments = list(state.ledger.segments.items())
        arrays: dict[str, Any] = {
            "state": state.saved,
            "rows": state.ledger.rows,
            "tokens": np.concatenate([s.tokens for _, s in segments]),
            "pools": np.concatenate([s.pools for _, s in segments]),
            "pending": np.array(state.pending, np.int32),
        }
        for number, text in enumerate(conversation.texts.values()):
            if not isinstance(text, str):
                text = conversation.engine.model.text(text)
            arrays[f"text {number}"] = np.frombuffer(text.encode("utf-8"), np.uint8)
        metadata = {
            **made_with(conversation.engine),
            "segments": [
                (n, s.kind, s.name, len(s.tokens), len(s.pools), not s.aged) for n, s in segments
            ],
            "names": list(conversation.texts),
            "system": conversation.system,
            "turns": state.turns,
            "thinnings": state.thinnings,
            "turn_open": state.open_turn,
            "compact": state.compact,
            "unread": state.without_document,
            "cells": conversation.cells.limit,
            "budget": asdict(state.budget),
            "max_tokens": conversation.max_tokens,
            "parked": [
                {
                    "number": one.numbers[-1],
                    "budget": asdict(one.recaller.budget),
                    "offset": one.recaller.offset,
                    "most": one.recaller.limit,
                    "compact": one.recaller.reader.compact,
                }
                for one in conversation.sources.parked
            ],
        }
        tensors = [archive.whole(name, array) for name, array in arrays.items()]
        for one in conversation.sources.parked:
            prefix, recaller = prefix_of(one.numbers[-1]), one.recaller
            tensors += parked_rows.tensors(recaller, prefix)
            tensors += [
                archive.whole(prefix + "tokens", recaller.tokens),
                archive.whole(prefix + "kept", recaller.kept),
                archive.whole(prefix + "read", recaller.kept_by_reading),
                archive.whole(prefix + "where", recaller.position_of),
            ]
        fields.check_about(archive.CONVERSATION, metadata)
        return archive.write(path, archive.CONVERSATION, tensors, metadata)


def load(engine: Engine, path: str | Path | Saved, **options: Any) -> Conversation:
    """The conversation of a file, in the engine's cache.

    Args:
        options: `sampling` and `max_tokens`, where they are to differ.

    Raises:
        UserError: no such file, altered or cut short, of another model, build or cache type, with
            something in it that is not allowed, or larger than --ctx-size.
        LaserKVError: neither memory nor disk hold its rows. Whoever had the cells goes on after
            either.
    """
    with schema.read(path, engine, archive.CONVERSATION) as file:
        found = file.about
        options = {"max_tokens": found["max_tokens"], **options}
        cells = _cells(engine, file, options["max_tokens"])
        if not found.get("parked") and engine.settings.recall not in ("off", "auto"):
            log.warning("%s holds no parked rows: nothing can be recalled", file.path)
        texts = {
            name: file.array(f"text {number}").tobytes().decode("utf-8")
            for number, name in enumerate(found["names"])
        }
        conversation = Conversation(
            engine, documents=texts, system=found["system"], ageing=Compressing(), **options
        )
        with engine.room_for_a_file(conversation):
            _load(engine, conversation, file, cells)
    return conversation


def _cells(engine: Engine, file: Saved, max_tokens: int) -> int:
    """Cells for a conversation: --ctx-size, or what it had, as far as what it read explains that.

    Raises:
        UserError: --ctx-size is too small.
    """
    found, held = file.about, file.tensors["rows"].shape[1]
    cells: int = engine.share or found["cells"]
    if held + 2 > cells:
        wanted = max(found["cells"], held + 2) * engine.residents.most
        raise UserError(
            f"{file.path} holds {held} cells, more than --ctx-size {cells} has; "
            f"use --ctx-size {wanted}"
        )
    if engine.share:
        return cells
    most = held + file.tensors["tokens"].shape[0]
    most += 2 * max(TURNS, min(2 * max_tokens, 1 << 14))
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


def _load(engine: Engine, conversation: Conversation, file: Saved, cells: int) -> None:
    """Puts a conversation into the cache."""
    found = file.about
    if found.get("parked"):
        engine.turn_recall_on(found["settings"])
    state = State(
        _ledger(file),
        file.array("state"),
        Budget(**found["budget"]),
        file.array("pending").tolist(),
        found["turns"],
        found["thinnings"],
        found["turn_open"],
        found["compact"],
        found["unread"],
    )
    run = engine.place(conversation, state.budget, cells, state.compact)
    try:
        run.reader.forget()
        engine.try_row_format(run.reader)
        run.reader.context.doubtful = True
        conversation.sources.parked = _parked(engine, run, file, state.ledger)
        conversation.parks = "off"
        if conversation.sources.parked:
            conversation.parks = conversation.sources.recallers[-1].store.kind
        llama_state.restore(run.reader.context.handle, run.reader.main.number, state.saved)
    except BaseException:
        conversation.sources.forget_parked()
        engine.leave(conversation)
        raise
    conversation.take_over(state, run)


def _parked(engine: Engine, run: Run, file: Saved, ledger: Ledger) -> list[Parked]:
    """What parked the documents of a file; the cells are empty."""
    made: list[Parked] = []
    try:
        for entry in file.about.get("parked", []):
            budget, compact = Budget(**entry["budget"]), entry["compact"]
            reader = engine.reader_at(run.reader, compact)
            number = entry["number"] if entry["offset"] else 0
            document = Run(budget, run.cells, reader, compact)
            place = engine.place_rows(budget.tokens)
            recaller = engine.recaller(document, entry["offset"], number, place)
            if recaller is None:  # the rows' format is not known; that was said
                break
            # what opens the conversation was read along with the document after it
            opening = [] if entry["offset"] else ledger.numbers(SYSTEM)
            made.append(Parked((*opening, entry["number"]), recaller))
            prefix = prefix_of(entry["number"])
            parked_rows.park(recaller, file, prefix)
            recaller.tokens = file.array(prefix + "tokens")
            recaller.kept_by_reading = file.whole(prefix + "read")
            recaller.limit = entry["most"]
            recaller.follow(ledger, list(made[-1].numbers))
    except BaseException:
        for one in made:
            one.recaller.close()
        raise
    return made


def _ledger(file: Saved) -> Ledger:
    found: dict[int, Segment] = {}
    token = pool = 0
    read, kept_by = file.array("tokens"), file.array("pools")
    for number, kind, name, tokens, pools, whole in file.about["segments"]:
        found[number] = Segment(
            kind, read[token : token + tokens], name, kept_by[pool : pool + pools], not whole
        )
        token, pool = token + tokens, pool + pools
    return Ledger.of_rows(found, file.whole("rows"))
