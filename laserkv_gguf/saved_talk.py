"""A conversation in a file: loaded in a moment, it goes on as if it had never ended."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from laserkv_gguf import saved
from laserkv_gguf.budget import Budget
from laserkv_gguf.engine import Reading
from laserkv_gguf.errors import UserError
from laserkv_gguf.ledger import TURN, Ledger, Segment
from laserkv_gguf.llama import stored
from laserkv_gguf.llama.sequence import MAIN
from laserkv_gguf.session import _Run
from laserkv_gguf.talk import Talk
from laserkv_gguf.timings import Timings

if TYPE_CHECKING:
    from laserkv_gguf.session import LaserKV


def save(talk: Talk, path: str | Path) -> None:
    """Writes a conversation: what was read and said, and what its cells hold.

    Parked rows are not written: a loaded conversation recalls nothing until `read` is called.

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
        }
    tensors = [saved.whole(name, array) for name, array in arrays.items()]
    saved.write(path, saved.CONVERSATION, tensors, metadata)


def load(engine: LaserKV, path: str | Path, **options: Any) -> Talk:
    """The conversation of a file, in the engine's context.

    Args:
        options: `sampling` and `max_tokens`, where they are to differ.

    Raises:
        UserError: no such file, altered or cut short, of another model, build or cache type, or
            larger than --ctx-size. The conversation so far goes on then.
    """
    arrays, found = saved.read(path, saved.CONVERSATION, engine)
    rows = arrays["rows"]
    cells = engine.ctx_size or found["cells"]
    if rows.shape[1] + 2 > cells:
        raise UserError(
            f"{path} holds {rows.shape[1]} cells, more than --ctx-size {cells} has; "
            f"use --ctx-size {found['cells']}"
        )
    talk = Talk(engine, system=found["system"], **{"max_tokens": found["max_tokens"], **options})
    for number, name in enumerate(found["names"]):
        talk.texts[name] = arrays[f"text {number}"].tobytes().decode("utf-8")
    talk._sync()
    ledger = _ledger(found["segments"], arrays)
    with engine._alone():
        if engine._owner:
            engine._owner.forget_parked()
        engine._owner = None
        reader = engine._reader_for(cells, found["compact"])
        reader.forget()
        stored.restore(reader.context, MAIN, arrays["state"])
        budget = Budget(**found["budget"])
        read = [s.tokens for s in ledger.segments.values() if s.kind != TURN]
        talk._run = _Run(budget, cells, reader, found["compact"])
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
        engine._owner = talk
    return talk


def _ledger(segments: list[Any], arrays: saved.Arrays) -> Ledger:
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
