"""Shortlist: chooses among all tokens of a document at once.

The question is probed on the cache as it stands; packed signatures of all tokens give a shortlist,
which the policy chooses from by its exact keys; a second round asks with the drafts. A policy that
looks up units (pages, blocks) notes what it wants of them while the document is read.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from laserkv_gguf.budget import Block
from laserkv_gguf.llama import rope
from laserkv_gguf.llama.chat import Prompt
from laserkv_gguf.planning.settings import BITS
from laserkv_gguf.policies import Candidates, Held
from laserkv_gguf.reading.asking import Asked, Drafts
from laserkv_gguf.reading.reader import Reader
from laserkv_gguf.recall.choosing import Choosing
from laserkv_gguf.recall.parked import Parked
from laserkv_gguf.recall.signatures import Signatures
from laserkv_gguf.recall.store import Indices

SHORTLIST = 2.0  # tokens looked at exactly, in multiples of what is chosen


class Shortlist:
    """Chooses among all tokens, by signatures or by what the policy noted.

    Attributes:
        signatures: of all keys; None for a policy that looks up its own units.
        index: what the policy noted of its units, by name.
        units: int64, the first tokens of these units.
    """

    fresh = False  # the question is probed on what is in the cache
    extra_cells = 0

    def __init__(self, parked: Parked) -> None:
        self.parked, self.choosing, self.policy = parked, Choosing(parked), parked.policy
        form, budget, context = parked.form, parked.budget, parked.reader.context
        # also if nothing moves
        self._rope = rope.known(context) if self.policy.needs.unrotated else None
        self.signatures: Signatures | None = None
        if parked.settings.votes_for(self.policy):
            self.signatures = Signatures(
                form.layers, form.kv_heads, form.head_dim, budget.tokens, BITS
            )
        self.index: dict[str, NDArray[Any]] = {}
        self.units = np.empty(0, np.int64)

    @property
    def bytes(self) -> int:
        """What is held beside the parked rows."""
        held = sum(array.nbytes for array in self.index.values()) + self.choosing.bytes
        return held if self.signatures is None else held + self.signatures.codes.nbytes

    def remember(self, block: Block, reader: Reader | None) -> None:
        """Signs the block's keys, or lets the policy note what it wants of them."""
        parked = self.parked
        tokens = np.arange(block.start, block.end)
        keys = parked.form.keys(parked.store.keys(tokens))
        if self.signatures is not None:
            self.signatures.add(block.start, keys)
            return
        queries, around = None, None
        if self.policy.needs.block_queries:
            if reader and reader.policy.needs.block_queries and block.evicts:
                queries, around = reader.block_queries(block), reader.held_with(block)
            else:  # nobody asks, but with so many heads
                heads = parked.reader.context.model.heads
                queries = np.empty((len(keys), 0, heads, keys.shape[3]), keys.dtype)
        seen = Candidates(
            tokens,
            (block.start, block.end),
            block.index,
            keys=keys,
            block_queries=queries,
            held=around or Held(tokens, parked.store.positions[tokens].astype(np.int64), 0, keys),
            rotation=self._rope,
        )
        for name, array in self.policy.index(seen).items():
            held = self.index.get(name)
            self.index[name] = array if held is None else np.concatenate((held, array), axis=1)
        starts = np.arange(block.start, block.end, self.policy.unit)
        self.units = np.concatenate((self.units, starts))

    def choose(
        self, question: Prompt, position: int, cells: int, hidden: tuple[tuple[int, int], ...]
    ) -> Indices:
        """Chooses with the question, then with its drafts too; `hidden` is seen all the same."""
        parked, asker = self.parked, self.parked.reader.asker
        room = parked.reader.limit - cells
        first, last = parked.movable
        ends = np.arange(parked.budget.tokens)
        ends = ends[(ends < first) | (ends >= last)]
        kept, beside = parked.kept, self.choosing.beside(position, ())
        for lookahead in (0, asker.lookahead) if asker.lookahead else (0,):
            drafts = Drafts()
            asked = asker.ask(question, position, drafts, lookahead=lookahead, room=room)
            parked.drafts = list(drafts.tokens)
            if self._rope is not None and asked.at is not None:
                self._rope.turn(asked.queries, -asked.at[:, None])
            kept = np.sort(np.concatenate((ends, self._choose(asked, ends, beside))))
            parked.arrange(parked.final(kept))
        return kept

    def _choose(self, asked: Asked, ends: Indices, beside: list[NDArray[Any]]) -> Indices:
        """As many tokens as a reading leaves between the anchors and the last window.

        A softmax over all counts the shortlist, the `ends` and what is `beside` the document.
        """
        first, last = self.parked.movable
        room = self.parked.limit - self.parked.protected
        if room >= last - first:
            return np.arange(first, last)
        if room <= 0:
            return np.empty(0, np.int64)
        if self.policy.unit:
            return self._whole_units(asked.queries, room)
        from laserkv_gguf import kernels

        assert self.signatures is not None
        votes = kernels.pool(self.signatures.votes(asked.queries), getattr(self.policy, "pool", 1))
        near = first + kernels.top_k(votes[first:last], round(SHORTLIST * room))
        if len(near) <= room:
            return near
        seen = self.choosing.candidates(near, (first, last, 0), asked, ends, beside, {})
        return self.choosing.select(seen, room)

    def _whole_units(self, queries: NDArray[np.float32], room: int) -> Indices:
        """The policy's best units, without what is protected; the last one is cut."""
        first, last = self.parked.movable
        scores = self.policy.look_up(queries, self.index)
        ends = np.append(self.units[1:], self.parked.budget.tokens)
        self.parked.scores[self.units[0] :] = np.repeat(scores, ends - self.units)
        chosen: list[NDArray[np.int64]] = []
        for unit in np.argsort(-scores, kind="stable"):  # NaN comes last
            tokens = np.arange(max(self.units[unit], first), min(ends[unit], last))[:room]
            room -= len(tokens)
            chosen.append(tokens)
            if not room:
                break
        return np.concatenate(chosen)
