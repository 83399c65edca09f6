"""Decodes a question and, token by token, its answer; guessed tokens are checked along the way."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import nullcontext

import numpy as np
from numpy.typing import NDArray

from laserkv_gguf.conversation.cells import Cells
from laserkv_gguf.conversation.generation import Generation
from laserkv_gguf.conversation.looks import Watch
from laserkv_gguf.conversation.lookup import Lookup


def generate(
    cells: Cells,
    generation: Generation,
    prompt: NDArray[np.int32],
    number: int,
    *,
    lookup: Lookup | None,
    watch: Watch | None,
    check: Callable[[], None],
) -> Generator[str, None, float]:
    """Yields an answer's text, as it becomes certain.

    Args:
        prompt: (n,) int32, decoded before the answer.
        number: of the segment that prompt and answer go to; not the answer's last token.
        lookup: guesses tokens that follow, which are decoded along; None for none.
        watch: records what the prompt's last token and the answer's look at; None for nothing.
        check: called before every token; raises where the answer is to end.

    Returns:
        When the first token's logits were there (`time.perf_counter`).

    Raises:
        Cancelled, KeyboardInterrupt, LaserKVError: as `Cells.decode`; `Cells.revert` then.
    """
    reply, drafts = generation.reply, list[int]()
    with watch.last_of(len(prompt)) if watch else nullcontext():
        cells.decode(prompt, number, outputs=1)
    first = time.perf_counter()
    while True:
        check()
        text = _sampled(cells, generation, number, drafts, lookup)
        if text:
            yield text
        if generation.ended:
            return first
        left = generation.limit - len(reply.tokens) - 1
        drafts = lookup.drafts(reply.tokens, left) if lookup else []
        fed = np.array([generation.last, *drafts], np.int32)
        with watch.last_of(1) if watch else nullcontext():
            cells.decode(fed, number, outputs=len(fed))


def _sampled(
    cells: Cells, generation: Generation, number: int, drafts: list[int], lookup: Lookup | None
) -> str:
    """The next token, and those after it as far as drafts that were decoded along are right.

    Drafts that were wrong are taken out of the segment.
    """
    text, sampled = "", 0
    outputs = 1 + len(drafts)
    while sampled < outputs and not generation.ended:
        before = len(generation.reply.tokens)
        row = cells.context.row(sampled - outputs)
        text += generation.sample(cells.context.handle, row)
        sampled += 1
        said = generation.reply.tokens[before:]
        if sampled < outputs and said != [drafts[sampled - 1]]:
            break
    if drafts:
        cells.take_back(outputs - sampled, number)
        if lookup:
            lookup.judge(len(drafts), sampled - 1)
    return text
