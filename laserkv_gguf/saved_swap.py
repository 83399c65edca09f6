"""Loading in place of what the context holds, which comes back where that fails."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from laserkv_gguf.llama import stored
from laserkv_gguf.llama.sequence import MAIN

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from laserkv_gguf.conversation import Conversation
    from laserkv_gguf.session import LaserKV

log = logging.getLogger(__name__)


@contextmanager
def swapped(engine: LaserKV) -> Iterator[None]:
    """Lets something else have the context; what is in it goes for good when that has succeeded.

    Until then its cells are held in memory, and parked rows stay where they are: only those of a
    file that the user named go before, as there is no second one of that name.

    The engine must be the caller's alone.

    Raises:
        LaserKVError: the cells of the conversation so far cannot be held; nothing has changed.
    """
    owner, context, settings = engine._owner, engine._context, engine.settings
    held = None if owner is None or context is None else _held(owner)
    cells, doubtful = (0, False) if context is None else (context.cells, context.doubtful)
    gone = owner.parked_tokens if owner and settings.recall_file is not None else 0
    if owner and gone:
        owner.forget_parked()
    engine._owner = None
    try:
        yield
    except BaseException:
        engine.settings, engine._owner = settings, None
        if owner is not None and owner._run is not None and held is not None:
            _put_back(engine, owner, held, cells)
            owner._run.reader.context.doubtful = doubtful
            if gone:
                log.warning(
                    "what was parked in %s is gone, so nothing is recalled until the documents "
                    "are read again",
                    settings.recall_file,
                )
        elif engine._context is not None:
            engine._context.resume()
            engine._context.clear()
        raise
    if owner:
        owner.forget_parked()


def _held(owner: Conversation) -> NDArray[np.uint8]:
    """The cells of a conversation, keys that were moved turned to where they stand."""
    from laserkv_gguf.talk import Talk

    run = owner._run
    assert run is not None
    context = run.reader.context
    if isinstance(owner, Talk):
        owner._settle()
    elif run.compact:
        stored.settle(context)
    return stored.save(context, MAIN)


def _put_back(engine: LaserKV, owner: Conversation, held: NDArray[np.uint8], cells: int) -> None:
    """Makes the context again what the conversation left in it."""
    run = owner._run
    assert run is not None
    context = run.reader.context
    engine._cancelled.clear()
    if engine._context is not context:  # it was made anew, larger
        reader = engine._reader_for(cells, run.compact)
        owner._run = replace(run, reader=reader)
        for recaller in owner._parked:
            recaller.use(reader)
        context = reader.context
    context.resume()
    context.clear()
    stored.restore(context, MAIN, held)
    engine._owner = owner
