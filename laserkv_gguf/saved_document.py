"""Read documents that stay, in a file of `saved`.

It holds the tokens, which of them are kept, the rows of all parked tokens (or, without recall, of
the kept ones) with the positions their keys are turned for, signatures, and as metadata what it was
made with and its account.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from laserkv_gguf import saved, saved_rows, saved_schema
from laserkv_gguf.budget import Budget
from laserkv_gguf.engine import Reading
from laserkv_gguf.errors import UserError
from laserkv_gguf.llama import rows
from laserkv_gguf.llama.context import Context
from laserkv_gguf.llama.sequence import MAIN, PROBE, SPARE, Sequence
from laserkv_gguf.saved_schema import Saved
from laserkv_gguf.saved_swap import swapped
from laserkv_gguf.timings import STEPS, Timings

if TYPE_CHECKING:
    from laserkv_gguf.conversation import Conversation
    from laserkv_gguf.session import LaserKV, Sampling

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
    saved.check_target(path)
    with conversation.engine._alone():
        if conversation.reading is None:
            raise UserError("there is no read document to save; read one first")
        conversation._check_owner()
        about = _about(conversation)
        saved_schema.check_about(saved.DOCUMENT, about)
        return saved.write(path, saved.DOCUMENT, _tensors(conversation), about)


def _about(conversation: Conversation) -> dict[str, Any]:
    """What the file says of the document."""
    reading, run, engine = conversation.reading, conversation._run, conversation.engine
    assert reading is not None
    assert run is not None
    return {
        **saved.made_with(engine),
        "budget": asdict(reading.budget),
        "compact": run.compact,
        "system": conversation.system,
        "parked": conversation._recaller is not None,
        "next_position": reading.next_position,
        "kept_per_block": reading.kept_per_block,
        "timings": {step: getattr(reading.timings, step) for step in (*STEPS, "total")},
    }


def _form(conversation: Conversation) -> rows.Format:
    if conversation._recaller:
        return conversation._recaller.form
    assert conversation._run is not None
    return conversation.engine.row_format(conversation._run.reader.context)


def _tensors(conversation: Conversation) -> Iterator[saved.Tensor]:
    reading, recaller = conversation.reading, conversation._recaller
    assert reading is not None
    yield saved.whole("tokens", reading.tokens)
    yield saved.whole("kept", reading.kept)
    form = _form(conversation)
    if recaller is None:
        yield from _cached(conversation, form)
        return
    yield saved.whole("held", np.arange(recaller.store.tokens))
    yield from saved_rows.tensors(recaller)


def _cached(conversation: Conversation, form: rows.Format) -> Iterator[saved.Tensor]:
    """The kept rows, taken out of the cache."""
    reading, run = conversation.reading, conversation._run
    assert reading is not None
    assert run is not None
    context = run.reader.context
    main, spare = Sequence(context, MAIN), Sequence(context, SPARE)
    positions = np.arange(len(reading.kept)) if run.compact else reading.kept
    # keys that were moved are turned when something is decoded next
    try:
        context.decode(reading.tokens[:1], 0, PROBE)
    finally:
        Sequence(context, PROBE).remove()
    count = len(positions)
    keys = np.empty((form.layers, count, form.key_bytes), np.uint8)
    values = np.empty((form.layers, count, form.value_bytes), np.uint8)
    for first in range(0, count, form.per_call):
        part = positions[first : first + form.per_call]
        try:
            main.share_with(spare, int(part[0]), int(part[-1]) + 1)
            taken = rows.take(context, form, SPARE)
        finally:
            spare.remove()
        order = np.argsort(taken.positions)
        into = slice(first, first + len(part))
        keys[:, into] = taken.keys[:, order]
        values[:, into] = taken.values[:, order].reshape(form.layers, len(part), -1)
    yield saved.whole("held", reading.kept)
    yield saved.whole("positions", positions.astype(np.int32))
    yield saved.whole("keys", keys)
    yield saved.whole("values", values)


# ---- loading -----------------------------------------------------------------------------------


def load(
    engine: LaserKV,
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
    from laserkv_gguf.conversation import Conversation

    with saved_schema.read(path, engine, saved.DOCUMENT) as file:
        conversation = Conversation(
            engine, system=file.about["system"], max_tokens=max_tokens, sampling=sampling
        )
        if not file.about["parked"] and engine.settings.recall != "off":
            log.warning("%s holds no parked rows: nothing can be recalled", file.path)
        with engine._alone(), swapped(engine):
            _load(engine, conversation, file)
    return conversation


def _load(engine: LaserKV, conversation: Conversation, file: Saved) -> None:
    """Puts a document into the context."""
    about = file.about
    if about["parked"]:
        engine.turn_recall_on(about["settings"])
    budget = Budget(**about["budget"])
    reading = Reading(
        file.array("tokens"),
        budget,
        file.whole("kept"),
        about["next_position"],
        Timings(**about["timings"]),
        about["kept_per_block"],
    )
    room = conversation._room(budget.tokens, budget)
    run = engine.prepare(
        budget.tokens, 0, room, asked=False, budget=budget, compact=about["compact"]
    )
    context = run.reader.context
    run.reader.forget()
    context.doubtful = True
    form = engine.row_format(context)
    recaller = engine.recaller(run) if about["parked"] else None
    try:
        if recaller:
            saved_rows.park(recaller, file)
            recaller.tokens = reading.tokens
            recaller.restore(reading.kept)
            reading.next_position = recaller.next_position
        else:
            _put(context, form, file)
    except BaseException:
        if recaller:
            recaller.close()
        raise
    conversation._adopt(run, reading, recaller)


def _put(context: Context, form: rows.Format, file: Saved) -> None:
    """Puts kept rows where they stood."""
    main, spare = Sequence(context, MAIN), Sequence(context, SPARE)
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
