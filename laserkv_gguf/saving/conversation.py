"""A conversation in a file: loaded in a moment, it goes on as if it had never ended."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from laserkv_gguf.budget import Budget
from laserkv_gguf.conversation.ageing import Compressing
from laserkv_gguf.conversation.conversation import Conversation, State
from laserkv_gguf.conversation.documents import Parked
from laserkv_gguf.conversation.ledger import Ledger, Segment
from laserkv_gguf.engine.engine import Engine, Run
from laserkv_gguf.errors import UserError
from laserkv_gguf.files import archive
from laserkv_gguf.llama import state as llama_state
from laserkv_gguf.saving import parked as parked_rows

log = logging.getLogger(__name__)

_PARKED = "parked "  # how the names of parked rows begin


def save(conversation: Conversation, path: str | Path) -> int:
    """Writes a conversation: what was read and said, what its cells hold, and parked rows.

    Returns:
        Bytes written.

    Raises:
        UserError: what was read is lost, or the place cannot be written to.
        LaserKVError: the disk is full.
    """
    with conversation.engine.access.alone():
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
            assert isinstance(text, str)
            arrays[f"text {number}"] = np.frombuffer(text.encode("utf-8"), np.uint8)
        metadata = {
            **archive.made_with(conversation.engine),
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
                    "first": len(one.numbers) > 1,
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
            prefix, recaller = _prefix(one.numbers[-1]), one.recaller
            tensors += parked_rows.tensors(recaller, prefix)
            tensors += [
                archive.whole(prefix + "tokens", recaller.tokens),
                archive.whole(prefix + "kept", recaller.kept),
                archive.whole(prefix + "read", recaller.kept_by_reading),
                archive.whole(prefix + "where", recaller.position_of),
            ]
        return archive.write(path, archive.CONVERSATION, tensors, metadata)


def _prefix(number: int) -> str:
    """Of the names of what is parked of a document."""
    return f"{_PARKED}{number}."


def load(engine: Engine, path: str | Path, **options: Any) -> Conversation:
    """The conversation of a file, in the engine's context.

    Args:
        options: `sampling` and `max_tokens`, where they are to differ.

    Raises:
        UserError: no such file, altered or cut short, of another model, build or cache type, or
            larger than --ctx-size: the conversation so far goes on then. Or neither memory nor
            disk hold its parked rows: the cache is empty then.
    """
    path = Path(path)
    found = archive.checked(path, archive.CONVERSATION, engine)
    with safe_open(path, framework="numpy") as file:
        names = [name for name in file.keys() if not name.startswith(_PARKED)]  # noqa: SIM118
        arrays = {name: file.get_tensor(name) for name in names}
    rows = arrays["rows"]
    cells = engine.share or found["cells"]
    if rows.shape[1] + 2 > cells:
        raise UserError(
            f"{path} holds {rows.shape[1]} cells, more than --ctx-size {cells} has; "
            f"use --ctx-size {found['cells']}"
        )
    entries = found.get("parked", [])
    if entries:
        engine.turn_recall_on(found["settings"])
    elif engine.settings.recall != "off":
        log.warning("%s holds no parked rows: nothing can be recalled", path)
    texts = {
        name: arrays[f"text {number}"].tobytes().decode("utf-8")
        for number, name in enumerate(found["names"])
    }
    conversation = Conversation(
        engine,
        documents=texts,
        system=found["system"],
        ageing=Compressing(),
        **{"max_tokens": found["max_tokens"], **options},
    )
    state = State(
        _ledger(found["segments"], arrays),
        arrays["state"],
        Budget(**found["budget"]),
        arrays["pending"].tolist(),
        found["turns"],
        found["thinnings"],
        found["turn_open"],
        found["compact"],
        found["unread"],
    )
    with engine.access.alone():
        run = engine.place(conversation, state.budget, cells, state.compact)
        run.reader.forget()
        try:
            engine.try_row_format(run.reader)
            parked = _parked(path, engine, run, entries, found["settings"], state.ledger)
            llama_state.restore(run.reader.context.handle, run.reader.main.number, state.saved)
        except BaseException:
            engine.leave(conversation)
            raise
        conversation.sources.parked = parked
        conversation.take_over(state, run)
    return conversation


def _parked(
    path: Path,
    engine: Engine,
    run: Run,
    entries: list[dict[str, Any]],
    settings: dict[str, Any],
    ledger: Ledger,
) -> list[Parked]:
    """What parked the documents of a file; the cells are empty."""
    made: list[Parked] = []
    try:
        with safe_open(path, framework="numpy") as file:
            for entry in entries:
                budget, compact = Budget(**entry["budget"]), entry["compact"]
                reader = engine.reader_at(run.reader, compact)
                document = Run(budget, run.cells, reader, compact)
                number = 0 if entry["first"] else entry["number"]
                recaller = engine.recaller(document, entry["offset"], number)
                if recaller is None:  # the rows' format is not known; that was said
                    break
                opening = ledger.numbers("system") if entry["first"] else []
                numbers = (*opening, entry["number"])
                made.append(Parked(numbers, recaller))
                prefix = _prefix(entry["number"])
                parked_rows.park(path, recaller, file, settings, prefix)
                recaller.tokens = file.get_tensor(prefix + "tokens")
                recaller.kept_by_reading = file.get_tensor(prefix + "read")
                recaller.limit = entry["most"]
                recaller.follow(ledger, list(numbers))
    except BaseException:
        for one in made:
            one.recaller.close()
        raise
    return made


def _ledger(segments: list[Any], arrays: dict[str, NDArray[Any]]) -> Ledger:
    found: dict[int, Segment] = {}
    token = pool = 0
    for number, kind, name, tokens, pools, whole in segments:
        found[number] = Segment(
            kind,
            arrays["tokens"][token : token + tokens],
            name,
            arrays["pools"][pool : pool + pools],
            not whole,
        )
        token, pool = token + tokens, pool + pools
    return Ledger.of_rows(found, arrays["rows"].astype(np.int64))
