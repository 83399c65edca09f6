"""Replay: the block loop once more, over parked rows.

A block goes in whole, the question is probed where it will stand, the policy fills the block's
pool, the rest goes out. Nothing is decoded again but the question and its drafts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from laserkv_gguf.budget import Block
from laserkv_gguf.llama.chat import Prompt
from laserkv_gguf.reading.asking import Drafts
from laserkv_gguf.reading.reader import Reader
from laserkv_gguf.recall.choosing import Choosing
from laserkv_gguf.recall.parked import Parked
from laserkv_gguf.recall.store import Indices


class Replay:
    """Chooses block by block, as `Reader.read` does, with rows that are parked."""

    fresh = True  # what is in the cache when a question comes does not matter

    def __init__(self, parked: Parked) -> None:
        self.parked, self.choosing = parked, Choosing(parked)

    @property
    def bytes(self) -> int:
        """What is held beside the parked rows."""
        return self.choosing.bytes

    def remember(self, block: Block, reader: Reader | None) -> None:
        """Nothing: blocks are looked at whole."""

    @property
    def extra_cells(self) -> int:
        """Extra cells needed while a question is recalled, on top of the `limit` that stay."""
        parked = self.parked
        before = whole = 0
        for block in parked.budget.blocks:
            before = before if parked.budget.accumulates else block.kept_before
            pool = self._pool(block)
            if pool < block.count:
                whole = max(whole, before + block.tokens)
                before -= block.count - pool
            before += block.tokens
        return max(0, whole + parked.budget.window - parked.limit)

    def _pool(self, block: Block) -> int:
        """A block's pool; its share of what there is room for, where that is less."""
        parked = self.parked
        inner = parked.budget.kept - parked.protected
        return block.pool if inner <= 0 else block.pool * (parked.limit - parked.protected) // inner

    def choose(
        self, question: Prompt, position: int, cells: int, hidden: tuple[tuple[int, int], ...]
    ) -> Indices:
        """The block loop of `Reader.read`, with rows that are parked in place of decoding."""
        parked, choosing = self.parked, self.choosing
        budget, reader = parked.budget, parked.reader
        others = cells - len(parked.kept)
        inside = np.zeros(budget.tokens, bool)  # what a reading for this question would hold
        memory: dict[str, Any] = {}
        drafts = Drafts()
        # room for all drafts, whatever stands there from the question before
        probing = len(question) + max(reader.asker.lookahead, reader.asker.reach) + others
        beside = choosing.beside(position, hidden)
        for block in budget.blocks:
            inside[block.start : block.end] = True
            pool = self._pool(block)
            if pool >= block.count:
                continue
            first, last = block.candidates
            chosen = np.empty(0, np.int64)
            if pool:
                self._bring(inside, block, probing)
                self._show(block, hidden)
                drafts.seen = parked.tokens[inside[: len(parked.tokens)]]
                taken = others + int(np.count_nonzero(parked.position_of >= 0))
                room = reader.available - taken
                asked = reader.asker.ask(question, position, drafts, shared=True, room=room)
                parked.drafts = list(drafts.tokens)
                tokens = first + np.flatnonzero(inside[first:last])
                others_seen = inside.copy()
                if not parked.policy.needs.outside_kept:
                    others_seen[budget.anchors : first] = False
                others_seen[first:last] = False
                others_seen[parked.movable[1] :] = True
                seen = choosing.candidates(
                    tokens, block, asked, np.flatnonzero(others_seen), beside, memory
                )
                chosen = choosing.select(seen, pool)
            inside[first:last] = False
            inside[chosen] = True
        kept = np.flatnonzero(inside)
        parked.arrange(parked.final(kept))
        return kept

    def _bring(self, inside: NDArray[np.bool_], block: Block, others: int) -> None:
        """Puts a block and what a reading would hold beside it into the main sequence.

        What is there for the last question stays until its own block comes, if there is room: much
        of it will be chosen again. The block does not see it; see `_show`.
        """
        parked = self.parked
        wanted = inside.copy()
        wanted[parked.movable[1] :] = True
        where = parked.position_of
        later = where >= 0
        later[: block.end] = False
        cells = int(np.count_nonzero(wanted | later)) + others
        if not parked.compact and cells <= parked.reader.available:
            wanted |= later
        tokens = np.flatnonzero(wanted)
        if not parked.compact:
            parked.arrange((tokens, parked.offset + tokens))
        else:
            ranks = parked.offset + np.arange(len(tokens))
            window = tokens >= parked.movable[1]
            ranks[window] = where[tokens[window]]
            parked.arrange((tokens, ranks))

    def _show(self, block: Block, hidden: tuple[tuple[int, int], ...]) -> None:
        """Makes the scratch sequence what the question sees with this block."""
        parked = self.parked
        scratch = parked.reader.asker.scratch
        if parked.compact:
            parked.main.share_with(scratch)
        else:
            window = parked.offset + max(block.end, parked.movable[1])
            parked.main.share_with(scratch, 0, parked.offset + block.end)
            parked.main.share_with(scratch, window, -1)
        for start, end in hidden:
            scratch.remove(start, end)
