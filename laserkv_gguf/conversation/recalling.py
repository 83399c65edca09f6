"""Recalls what a question needs of all documents of a conversation, one after the other."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from laserkv_gguf.conversation.ageing import Growing
from laserkv_gguf.conversation.cells import Cells
from laserkv_gguf.conversation.documents import Documents
from laserkv_gguf.conversation.space import Space, Thinning
from laserkv_gguf.errors import UserError
from laserkv_gguf.llama.chat import Prompt
from laserkv_gguf.recall.recaller import Recalled


def recall(sources: Documents, cells: Cells, pending: list[int], asked: Prompt) -> Recalled:
    """Brings the tokens into the cache that a question needs, and takes others out.

    Whatever goes wrong, all documents' tokens in the cache are those of the question before.

    Args:
        sources: the documents; some of them are parked.
        pending: tokens that are decoded before the question.
        asked: the question with the template around it.

    Returns:
        What was moved of all documents together; `kept` counts from the first document's first
        token.
    """
    recallers = sources.recallers
    cells.settle()
    probe = asked.probing
    tokens = np.concatenate((np.array(pending, np.int32), probe.tokens))
    prompt = replace(probe, tokens=tokens)
    before = [recaller.kept for recaller in recallers]
    done: list[Recalled] = []
    try:
        for number, recaller in enumerate(recallers):
            hidden = [other.inner for other in recallers[number + 1 :]]
            done.append(recaller.recall(prompt, cells.position, cells.used, hidden))
    except BaseException:
        for recaller, kept in zip(recallers[: len(done)], before, strict=False):
            recaller.go_back(kept)
        raise
    for parked in sources.parked:
        segments = [cells.ledger.segments[number] for number in parked.numbers]
        ends = np.cumsum([len(segment.tokens) for segment in segments])
        parts = np.split(parked.recaller.scores, ends[:-1])
        for segment, scores in zip(segments, parts, strict=True):
            segment.scores = scores
    starts = np.cumsum([0, *(recaller.budget.tokens for recaller in recallers)])
    return Recalled(
        np.concatenate([one.kept + start for one, start in zip(done, starts, strict=False)]),
        sum(one.moved_in for one in done),
        sum(one.moved_out for one in done),
        sum(one.state_calls for one in done),
        sum(one.seconds for one in done),
    )


def share_room(conversation: Growing, space: Space) -> Thinning | None:
    """What must be thinned; how much every parked document may recall is set along the way.

    Args:
        space: the cells as they are taken, with the question.

    Raises:
        UserError: the question does not fit beside anchors and windows.
    """
    sources, drafts = conversation.sources, conversation.drafts
    for recaller in sources.recallers:
        recaller.limit = recaller.budget.kept
    while True:
        extra = sources.extra_cells(drafts)
        thinning = replace(space, capacity=conversation.capacity).thinning()
        if thinning is None or thinning.documents is None:
            return thinning
        for recaller in sources.recallers:
            fewer = (space.documents - thinning.documents) * recaller.budget.kept
            recaller.limit = recaller.budget.kept - -(-fewer // max(space.documents, 1))
            if recaller.limit < recaller.protected:
                raise UserError(
                    f"a question of {space.prompt} tokens does not fit beside what is always "
                    f"kept of the documents into {conversation.cells.limit} cells; shorten it, "
                    "/drop a document, or use a larger --ctx-size"
                )
        if sources.extra_cells(drafts) <= extra:
            return thinning
