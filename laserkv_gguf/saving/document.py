"""Saves a document that has been read, and loads it without reading it again.

It holds the tokens, which of them are kept, the rows of all parked tokens (or, without recall, of
the kept ones) with the positions their keys are turned for, signatures, and as metadata what it was
made with and its account.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np

from laserkv_gguf.budget import Budget
from laserkv_gguf.conversation.conversation import Conversation
from laserkv_gguf.conversation.ledger import DOCUMENT, SYSTEM
from laserkv_gguf.engine.engine import Engine
from laserkv_gguf.errors import UserError
from laserkv_gguf.files import archive
from laserkv_gguf.llama import rows
from laserkv_gguf.llama.context import Context
from laserkv_gguf.llama.sampler import Sampling
from laserkv_gguf.llama.sequence import SPARE, Sequence
from laserkv_gguf.reading.reader import Reading
from laserkv_gguf.saving import fields, schema
from laserkv_gguf.saving import parked as parked_rows
from laserkv_gguf.saving.file import Saved
from laserkv_gguf.saving.identity import made_with
from laserkv_gguf.timings import STEPS, Timings

log = logging.getLogger(__name__)


# ---- saving ------------------------------------------------------------------------------------


def save(conversation: Conversation, path: str | Path) -> int:
    """Writes a conversation's document as it lies in the cache; its turns are not written.

    Beside the target first, then renamed: an old file stays whole until the new one is.

    Returns:
        Bytes written.

    Raises:
        UserError: nothing has been read, or the target cannot be written to.
        LaserKVError: the disk is full; nothing is left behind.
    """
    archive.check_target(path)
    engine = conversation.engine
    with engine.access.inside(conversation):
        reading = conversation.reading
        if reading is None:
            raise UserError("there is no read document to save; read one first")
        engine.come_back(conversation)
        run, parked = conversation.run, conversation.sources.recallers
        about = {
            **made_with(engine),
            "budget": asdict(reading.budget),
            "compact": run.compact,
            "system": conversation.system,
            "parked": bool(parked),
            "next_position": reading.next_position,
            "kept_per_block": reading.kept_per_block,
            "timings": {step: getattr(reading.timings, step) for step in (*STEPS, "total")},
        }
        tensors = [archive.whole("tokens", reading.tokens), archive.whole("kept", reading.kept)]
        if parked:
            tensors.append(archive.whole("held", np.arange(parked[0].store.tokens)))
            tensors += parked_rows.tensors(parked[0])
        else:
            tensors += _cached(conversation, reading)
        fields.check_about(archive.DOCUMENT, about)
        return archive.write(path, archive.DOCUMENT, tensors, about)


def _cached(conversation: Conversation, reading: Reading) -> Iterator[archive.Tensor]:
    """The kept rows, taken out of the cache."""
    cells = conversation.cells
    cells.settle()
    form = rows.known(cells.context)
    positions = cells.ledger.position[cells.ledger.of_kind(SYSTEM, DOCUMENT)]
    count = len(positions)
    keys = np.empty((form.layers, count, form.key_bytes), np.uint8)
    values = np.empty((form.layers, count, form.value_bytes), np.uint8)
    for first in range(0, count, form.per_call):
        part = positions[first : first + form.per_call]
        into = slice(first, first + len(part))
        span = int(part[0]), int(part[-1]) + 1
        _, keys[:, into], found = rows.take_at(cells.main, form, [span])
        values[:, into] = found.reshape(form.layers, len(part), -1)
    yield archive.whole("held", reading.kept)
    yield archive.whole("positions", positions.astype(np.int32))
    yield archive.whole("keys", keys)
    yield archive.whole("values", values)


# ---- loading -----------------------------------------------------------------------------------


def load(
    engine: Engine,
    path: str | Path | Saved,
    *,
    max_tokens: int = 1024,
    sampling: Sampling | None = None,
) -> Conversation:
    """A conversation about a document that `save` has written, as it was read there.

    Its ratio, blocks and positions are the file's. Where rows were parked, recall is on as it was
    there, unless the engine says otherwise; the engine's policy chooses what is recalled.

    Raises:
        UserError: no such file, a damaged one, one of another model, build or cache type, or one
            that does not fit the context; the message says which.
    """
    with schema.read(path, engine, archive.DOCUMENT) as file:
        conversation = Conversation(
            engine, system=file.about["system"], max_tokens=max_tokens, sampling=sampling
        )
        if not file.about["parked"] and engine.settings.recall not in ("off", "auto"):
            log.warning("%s holds no parked rows: nothing can be recalled", file.path)
        with engine.room_for_a_file(conversation):
            _load(engine, conversation, file)
    return conversation


def _load(engine: Engine, conversation: Conversation, file: Saved) -> None:
    """Puts a document into the cache."""
    about = file.about
    if about["parked"]:
        engine.turn_recall_on(about["settings"])
    budget = Budget(**about["budget"])
    conversation.parks = engine.place_rows(budget.tokens) if about["parked"] else "off"
    reading = Reading(
        file.array("tokens"),
        budget,
        file.whole("kept"),
        about["next_position"],
        Timings(**about["timings"]),
        about["kept_per_block"],
    )
    run = engine.prepare(
        conversation,
        budget.tokens,
        0,
        conversation.room_after(budget),
        question_known=False,
        budget=budget,
        compact=about["compact"],
        recall=conversation.parks,
    )
    context, recaller = run.reader.context, None
    try:
        run.reader.forget()
        form = rows.known(context)
        context.doubtful = True
        recaller = engine.recaller(run, recall=conversation.parks)
        if recaller:
            parked_rows.park(recaller, file)
            recaller.tokens = reading.tokens
            recaller.restore(reading.kept)
        else:
            _put(context, run.reader.main, form, file)
    except BaseException:
        if recaller:
            recaller.close()
        engine.leave(conversation)
        raise
    conversation.adopt(run, reading, recaller)


def _put(context: Context, main: Sequence, form: rows.Format, file: Saved) -> None:
    """Puts kept rows where they stood."""
    spare = Sequence(context, SPARE)
    positions = file.array("positions")
    for first in range(0, len(positions), form.per_call):
        end = min(first + form.per_call, len(positions))
        built = rows.build(form, positions[first:end])
        built.keys[...] = file.rows("keys", first, end)
        built.values[...] = file.rows("values", first, end).reshape(built.values.shape)
        try:
            rows.put(context, built, SPARE)
            spare.share_with(main)
        finally:
            spare.remove()
