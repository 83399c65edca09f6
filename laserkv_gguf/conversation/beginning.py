"""A conversation about what another one's document begins with, without reading it again.

A block's rows depend on nothing behind it. So where a document was changed, what stands before the
change is copied from the parked rows of the one that was read, up to the last whole block.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from laserkv_gguf.budget import Budget
from laserkv_gguf.conversation.conversation import Conversation
from laserkv_gguf.errors import UserError
from laserkv_gguf.reading.reader import Reading
from laserkv_gguf.timings import Timings

_AT_ONCE = 1024  # tokens whose rows are copied at a time


def whole_blocks(source: Conversation, tokens: int) -> int:
    """How many of the first so many tokens are in whole blocks that can be copied; 0 for none.

    None can where nothing is parked, and where a policy looks up what it noted while it read.
    """
    recallers = source.sources.recallers
    if not recallers or recallers[0].offset or recallers[0].policy.needs.recall:
        return 0
    budget = recallers[0].budget
    ends = [block.end for block in budget.blocks if block.end <= min(tokens, budget.tokens)]
    last = max(ends, default=0)
    # of so few everything would stay, and nothing be parked
    return 0 if not last or replace(budget, tokens=last).keeps_all else last


def begin_as(made: Conversation, source: Conversation, tokens: int, head: int) -> None:
    """Has a new conversation stand where another one stood after its first tokens.

    Args:
        source: nobody may ask it meanwhile; it stays as it is, wherever its cells are.
        tokens: of `whole_blocks`.
        head: how many of the first tokens are the opening.

    Raises:
        UserError: it does not fit, or memory and disk do not hold another copy of the rows.
        Cancelled: the engine was told to stop.
    """
    engine, old = made.engine, source.sources.recallers[0]
    budget = replace(old.budget, tokens=tokens)
    with engine.access.inside(made):
        made.parks = old.store.kind
        run = engine.prepare(
            made,
            tokens,
            0,
            made.room_after(budget),
            question_known=False,
            budget=budget,
            compact=old.compact,
            recall=made.parks,
        )
        recaller = None
        try:
            run.reader.forget()
            recaller = engine.recaller(run, recall=made.parks)
            if recaller is None:
                raise UserError("nothing can be parked")
            for first in range(0, tokens, _AT_ONCE):
                some = np.arange(first, min(first + _AT_ONCE, tokens))
                recaller.store.write(
                    old.store.keys(some), old.store.values(some), old.store.positions[some]
                )
            if recaller.mode != "replay":
                recaller.remember()
            kept = _kept(budget, old.kept_by_reading)
            recaller.tokens = old.tokens[:tokens]
            recaller.restore(kept)
        except BaseException:
            if recaller is not None:
                recaller.close()
            engine.leave(made)
            raise
        reading = Reading(recaller.tokens, budget, kept, recaller.next_position, Timings())
        made.adopt(run, reading, recaller, head)


def _kept(budget: Budget, before: NDArray[np.int64]) -> NDArray[np.int64]:
    """What stays until a question recalls its own: (kept,) tokens, ascending.

    Args:
        before: what the longer document's reading kept.
    """
    first, last = budget.anchors, budget.tokens - budget.window
    inner = before[(before >= first) & (before < last)]
    room = max(budget.kept - first - budget.window, 0)
    if len(inner) > room:
        inner = inner[np.linspace(0, len(inner) - 1, room).astype(np.int64)]
    return np.concatenate((np.arange(first), inner, np.arange(max(first, last), budget.tokens)))
