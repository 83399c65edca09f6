"""A conversation in a file: loaded in a moment, it goes on as if it had never ended."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from laserkv_gguf.budget import Budget
from laserkv_gguf.conversation.conversation import Run
from laserkv_gguf.conversation.ledger import TURN, Ledger, Segment
from laserkv_gguf.conversation.talk import Talk
from laserkv_gguf.errors import UserError
from laserkv_gguf.files import archive as saved
from laserkv_gguf.llama import state
from laserkv_gguf.llama.sequence import MAIN
from laserkv_gguf.reading.reader import Reading
from laserkv_gguf.recall.recaller import Recaller
from laserkv_gguf.saving import parked as saved_rows
from laserkv_gguf.timings import Timings

if TYPE_CHECKING:
    from laserkv_gguf.engine.engine import LaserKV

log = logging.getLogger(__name__)

_PARKED = "parked "  # how the names of parked rows begin


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
            "state": state.save(talk._context.handle, MAIN),
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
            prefix = _prefix(number)
            tensors += saved_rows.tensors(recaller, prefix)
            tensors += [
                saved.whole(prefix + name, getattr(recaller, name))
                for name in ("tokens", "kept", "read", "where")
            ]
        return saved.write(path, saved.CONVERSATION, tensors, metadata)


def _prefix(number: int) -> str:
    """Of the names of what is parked of a document."""
    return f"{_PARKED}{number}."


def load(engine: LaserKV, path: str | Path, **options: Any) -> Talk:
    """The conversation of a file, in the engine's context.

    Args:
        options: `sampling` and `max_tokens`, where they are to differ.

    Raises:
        UserError: no such file, altered or cut short, of another model, build or cache type, or
            larger than --ctx-size: the conversation so far goes on then. Or neither memory nor
            disk hold its parked rows: the cache is empty then.
    """
    path = Path(path)
    found = saved.checked(path, saved.CONVERSATION, engine)
    with safe_open(path, framework="numpy") as file:
        names = [name for name in file.keys() if not name.startswith(_PARKED)]  # noqa: SIM118
        arrays = {name: file.get_tensor(name) for name in names}
    rows = arrays["rows"]
    cells = engine.ctx_size or found["cells"]
    if rows.shape[1] + 2 > cells:
        raise UserError(
            f"{path} holds {rows.shape[1]} cells, more than --ctx-size {cells} has; "
            f"use --ctx-size {found['cells']}"
        )
    parked = found.get("parked", [])
    if parked:
        engine.turn_recall_on(found["settings"])
    elif engine.settings.recall != "off":
        log.warning("%s holds no parked rows: nothing can be recalled", path)
    talk = Talk(engine, system=found["system"], **{"max_tokens": found["max_tokens"], **options})
    for number, name in enumerate(found["names"]):
        talk.texts[name] = arrays[f"text {number}"].tobytes().decode("utf-8")
    talk._sync()
    ledger = _ledger(found["segments"], arrays)
    with engine._alone():
        engine.access.hand_over(None)
        reader = engine._reader_for(cells, found["compact"])
        reader.forget()
        try:
            recallers = _parked(path, engine, cells, parked, found["settings"])
        except BaseException:
            reader.forget()
            raise
        state.restore(reader.context.handle, MAIN, arrays["state"])
        budget = Budget(**found["budget"])
        read = [s.tokens for s in ledger.segments.values() if s.kind != TURN]
        talk._run = Run(budget, cells, reader, found["compact"])
        for entry, recaller in recallers:
            if entry["first"]:
                talk._recaller = recaller
            else:
                talk._added[entry["number"]] = recaller
        talk.ledger, talk._pending = ledger, arrays["pending"].tolist()
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
        engine.access.hand_over(talk)
    return talk


def _parked(
    path: Path,
    engine: LaserKV,
    cells: int,
    entries: list[dict[str, Any]],
    settings: dict[str, Any],
) -> list[tuple[dict[str, Any], Recaller]]:
    """What parked the documents of a file; the context is empty."""
    made: list[tuple[dict[str, Any], Recaller]] = []
    try:
        with safe_open(path, framework="numpy") as file:
            for entry in entries:
                budget, compact = Budget(**entry["budget"]), entry["compact"]
                run = Run(budget, cells, engine._reader_for(cells, compact), compact)
                number = 0 if entry["first"] else entry["number"]
                recaller = engine.recaller(run, entry["offset"], number)
                if recaller is None:  # the rows' format is not known; that was said
                    break
                made.append((entry, recaller))
                prefix = _prefix(entry["number"])
                saved_rows.park(path, recaller, file, settings, prefix)
                for name in ("tokens", "kept", "read", "where"):
                    setattr(recaller, name, file.get_tensor(prefix + name))
                recaller.most = entry["most"]
    except BaseException:
        for _, recaller in made:
            recaller.close()
        raise
    return made


def _ledger(segments: list[Any], arrays: dict[str, NDArray[Any]]) -> Ledger:
    ledger, token, pool = Ledger(), 0, 0
    for number, kind, name, tokens, pools, whole in segments:
        ledger.segments[number] = Segment(
            kind,
            arrays["tokens"][token : token + tokens],
            name,
            arrays["pools"][pool : pool + pools],
            whole,
        )
        token, pool = token + tokens, pool + pools
    ledger.segment, ledger.index, ledger.position = arrays["rows"].astype(np.int64)
    return ledger
