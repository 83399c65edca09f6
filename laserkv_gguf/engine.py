"""The block loop of LASER-KV (arXiv 2602.02199) on llama.cpp.

`Reader.read` is the algorithm: decode a block, probe it with the question, look at the candidates,
score and choose (the policy), evict the rest. What is here beyond the paper: the lookahead probe,
and positions that are compacted where a document is longer than the model was trained for.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from laserkv_gguf.budget import Block, Budget
from laserkv_gguf.llama import rope
from laserkv_gguf.llama.chat import Prompt
from laserkv_gguf.llama.context import Context
from laserkv_gguf.llama.model import Tokens
from laserkv_gguf.llama.sequence import MAIN, PROBE, Sequence
from laserkv_gguf.policies import Candidates, Needs, Policy, checked

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ProbeSettings:
    """How a block is asked what the question needs of it; None for what the policy says.

    Attributes:
        tokens: of the question's own text, the last so many join the probe, and with them what the
            template puts after it; 0 for everything after the document.
        lookahead: tokens drafted after the question while the block is whole; they join too.
        observation: where no question is known, the block's own last tokens ask instead
            (SnapKV, arXiv 2404.14469).
    """

    tokens: int | None = None
    lookahead: int | None = None
    observation: int | None = None

    def completed(self, needs: Needs) -> tuple[int, int, int]:
        """(tokens, lookahead, observation), with the policy's own where none are given."""
        return (
            needs.probe_tokens if self.tokens is None else self.tokens,
            needs.lookahead if self.lookahead is None else self.lookahead,
            needs.observation if self.observation is None else self.observation,
        )


@dataclass
class Timings:
    """Seconds spent in the steps of the block loop."""

    decode: float = 0.0
    probe: float = 0.0
    score: float = 0.0
    evict: float = 0.0
    total: float = 0.0

    @contextmanager
    def spent(self, step: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, step, getattr(self, step) + time.perf_counter() - start)


@dataclass(frozen=True)
class Progress:
    """Reported while reading: tokens read, tokens in all, tokens kept so far, seconds."""

    read: int
    total: int
    kept: int
    seconds: float


@dataclass
class Reading:
    """A sequence that has been read and compressed.

    Attributes:
        tokens: all tokens of the sequence, int32.
        kept: (kept,) int64, ascending indices into `tokens` of those in the cache.
        next_position: where the next token goes.
        pools: for every kept token 0 (anchor), 1 (long-term pool) or 2 (window).
    """

    tokens: Tokens
    budget: Budget
    kept: NDArray[np.int64]
    next_position: int
    timings: Timings
    kept_per_block: list[int] = field(default_factory=list)

    @property
    def pools(self) -> NDArray[np.int8]:
        pools = np.ones(len(self.kept), np.int8)
        pools[self.kept < self.budget.anchors] = 0
        if not self.budget.keeps_all:
            pools[self.kept >= len(self.tokens) - self.budget.window] = 2
        return pools


@dataclass
class _State:
    """Where a read stands."""

    tokens: Tokens
    budget: Budget
    question: Prompt | None
    on_progress: Callable[[Progress], None] | None
    read: int = 0
    kept: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    # which tokens the rows of the captured keys and values belong to
    held: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    # how far compacting has just moved each kept token
    shifts: NDArray[np.int64] | None = None
    memory: dict[str, Any] = field(default_factory=dict)
    kept_per_block: list[int] = field(default_factory=list)
    timings: Timings = field(default_factory=Timings)
    started: float = field(default_factory=time.perf_counter)

    def last(self, block: Block) -> bool:
        return block.end == self.budget.tokens

    def report(self, tokens: int) -> None:
        self.read += tokens
        if self.on_progress:
            seconds = time.perf_counter() - self.started
            self.on_progress(Progress(self.read, len(self.tokens), len(self.kept), seconds))


class Reader:
    """Reads sequences into the main sequence of a context.

    Args:
        context: its cells must hold `budget.cells(...)` of whatever is read.
        policy: chooses what is kept.
        probe: see ProbeSettings.
        compact: move kept tokens together after each block, so that no position passes the number
            of cells; else every token keeps the position it was read at.
    """

    def __init__(
        self,
        context: Context,
        policy: Policy,
        probe: ProbeSettings | None = None,
        *,
        compact: bool = False,
    ) -> None:
        self.context, self.policy = context, policy
        settings = probe or ProbeSettings()
        self.asking, self.lookahead, self.observation = settings.completed(policy.needs)
        self.compact = compact
        self.main, self.scratch = Sequence(context, MAIN), Sequence(context, PROBE)
        self._rotation: rope.Rotation | None = None
        self._arrays: dict[str, NDArray[Any]] = {}

    def read(
        self,
        tokens: Tokens,
        budget: Budget,
        question: Prompt | None = None,
        *,
        on_progress: Callable[[Progress], None] | None = None,
        park: Callable[[Block, int], None] | None = None,
    ) -> Reading:
        """Reads a sequence block by block, keeping what the budget allows.

        Args:
            tokens: int32 ids of everything before the question.
            budget: made for `len(tokens)`.
            question: the question with the template up to where the answer starts; None where it
                is not known yet.
            on_progress: called after every micro-batch.
            park: called with every block while it is whole, and the position it begins at.

        Returns:
            What is in the cache. Whatever goes wrong instead (a policy's error, Ctrl-C, a full
            cache), the context is left empty: no half-evicted sequence is ever used.

        Raises:
            Cancelled, LaserKVError, PolicyError, KeyboardInterrupt.
        """
        self.forget()
        if self.compact and not budget.keeps_all and self._rotation is None:
            self._rotation = rope.measure(self.context)
        state = _State(tokens, budget, question, on_progress)
        try:
            for block in budget.blocks:
                self._decode(state, block)  # 1
                if park:
                    park(block, self._position(state) - block.tokens)
                if block.evicts:
                    queries = self._probe(state, block)  # 2
                    candidates = self._candidates(state, block, queries)  # 3
                    kept = self._select(state, candidates, block)  # 4 and 5
                    self._evict(state, block, kept)  # 6
                self._hold(state, block)
                state.kept_per_block.append(len(state.kept))
        except BaseException:
            self.forget()
            raise
        state.timings.total = time.perf_counter() - state.started
        return Reading(
            tokens,
            budget,
            state.kept,
            self._position(state),
            state.timings,
            state.kept_per_block,
        )

    def forget(self) -> None:
        """Empties the context."""
        self.context.clear()

    # 1

    def _decode(self, state: _State, block: Block) -> None:
        """Decodes the block on top of what was kept; its tokens see that and each other."""
        needs, rows = self.policy.needs, len(state.held)
        wanted: dict[str, tuple[NDArray[Any], int] | None] = {}
        if self._scores_later(state, block):
            for kind in self._seen():
                array = self._array(kind, state.budget.rows)
                wanted[kind] = (array[:, rows : rows + block.tokens], 0)
            state.held = np.concatenate((state.held, np.arange(block.start, block.end)))
        if block.evicts and needs.block_queries:
            wanted["queries"] = (self._block_queries(block), 0)
        elif block.evicts and needs.queries and state.question is None:
            queries = self._observed(block)
            wanted["queries"] = (queries, block.tokens - queries.shape[1])
        with state.timings.spent("decode"), self.context.probe.armed(**wanted):
            self.context.decode(
                state.tokens[block.start : block.end],
                self._position(state),
                MAIN,
                on_chunk=state.report,
            )
        state.kept = np.concatenate((state.kept, np.arange(block.start, block.end)))

    def _scores_later(self, state: _State, block: Block) -> bool:
        """Whether the block's keys are looked at, now or when a later block looks back."""
        return not state.budget.keeps_all and (block.evicts or not state.last(block))

    def _seen(self) -> list[str]:
        """What the policy sees of every candidate."""
        return [kind for kind in ("keys", "values") if getattr(self.policy.needs, kind)]

    def _block_queries(self, block: Block) -> NDArray[Any]:
        return self._array("block_queries", block.tokens)

    def _observed(self, block: Block) -> NDArray[Any]:
        return self._array("queries", min(self.observation, block.tokens))

    # 2

    def _probe(self, state: _State, block: Block) -> NDArray[np.float32] | None:
        """Asks the whole block: queries of the question's end and of the drafts after it.

        In a scratch sequence that shares the cells and is dropped.

        Returns:
            (layers, probe tokens, heads, head_dim) float32.
        """
        if not self.policy.needs.queries:
            return None
        if state.question is None:
            if self.policy.needs.block_queries:
                last = self._block_queries(block)[:, -self.observation :]
                return last.astype(np.float32)
            return self._observed(block)
        with state.timings.spent("probe"):
            self.main.share_with(self.scratch)
            return self.ask(state.question, self._position(state))

    def ask(
        self, question: Prompt, position: int, *, lookahead: int | None = None
    ) -> NDArray[np.float32]:
        """Queries of a question in the scratch sequence, which is dropped whatever happens.

        Args:
            question: its end asks, and the drafts after it.
            position: where it begins: right after the last token of the scratch sequence.
            lookahead: tokens drafted; None for as many as the reader was made with.

        Returns:
            (layers, probe tokens, heads, head_dim) float32.
        """
        lookahead = self.lookahead if lookahead is None else lookahead
        asking = len(question)
        if self.asking:
            asking = min(self.asking + question.ending, asking)
        queries = self._array("queries", asking + lookahead)
        try:
            drafted = self._draft(position, question, asking, queries)
        finally:
            self.scratch.remove()
        return np.ascontiguousarray(queries[:, : asking + drafted])

    def _draft(
        self, position: int, question: Prompt, asking: int, queries: NDArray[np.float32]
    ) -> int:
        """Decodes the question, then greedy drafts until the answer ends; returns their number."""
        context = self.context
        lookahead = int(queries.shape[1]) - asking
        with context.probe.armed(queries=(queries[:, :asking], len(question) - asking)):
            context.decode(question.tokens, position, PROBE, outputs=1 if lookahead else 0)
        position += len(question)
        for index in range(lookahead):
            token = int(context.logits().argmax())
            if context.model.ends_generation(token):
                return index
            row = asking + index
            with context.probe.armed(queries=(queries[:, row : row + 1], 0)):
                more = 1 if index + 1 < lookahead else 0
                context.decode(np.array([token], np.int32), position, PROBE, outputs=more)
            position += 1
        return lookahead

    # 3

    def _candidates(
        self, state: _State, block: Block, queries: NDArray[np.float32] | None
    ) -> Candidates:
        """The block and what it looks back at, without anchors and without the new window."""
        first, last = np.searchsorted(state.held, block.candidates)
        views = {kind: self._array(kind, state.budget.rows)[:, first:last] for kind in self._seen()}
        if self.policy.needs.block_queries:
            views["block_queries"] = self._block_queries(block)[:]
        for view in views.values():
            view.flags.writeable = False
        return Candidates(
            state.held[first:last],
            (block.start, block.end),
            block.index,
            queries,
            memory=state.memory,
            **views,
        )

    # 4 and 5

    def _select(self, state: _State, candidates: Candidates, block: Block) -> NDArray[np.int64]:
        """The policy's choice, checked: indices of the tokens to keep, ascending."""
        if block.pool == 0:
            return np.empty(0, np.int64)
        with state.timings.spent("score"):
            chosen = self.policy.select(candidates, block.pool)
        return candidates.tokens[checked(self.policy, chosen, candidates, block.pool)]

    # 6

    def _evict(self, state: _State, block: Block, chosen: NDArray[np.int64]) -> None:
        """Frees the cells of all other candidates."""
        first, end = block.candidates
        with state.timings.spent("evict"):
            inside = (state.kept >= first) & (state.kept < end)
            stays = ~inside | np.isin(state.kept, chosen, assume_unique=True)
            positions = self._positions(state)
            self.main.remove_all(positions[~stays])
            state.kept, positions = state.kept[stays], positions[stays]
            if self.compact:
                self.main.compact(positions, 0)
                state.shifts = np.arange(len(positions)) - positions

    def _hold(self, state: _State, block: Block) -> None:
        """Holds on to the keys and values that the next block looks back at.

        In an accumulating run these are the new window's, else those of all that was kept.
        """
        if state.last(block) or state.budget.keeps_all:
            return
        start = block.end - state.budget.window if state.budget.accumulates else 0
        held = state.kept[np.searchsorted(state.kept, start) :]
        rows = np.searchsorted(state.held, held)
        for kind in self._seen():
            array = self._array(kind, state.budget.rows)
            if rows[-1] != len(rows) - 1:
                array[:, : len(rows)] = array[:, rows]
            if kind == "keys" and self._rotation is not None and state.shifts is not None:
                shifts = state.shifts[np.searchsorted(state.kept, held)]
                self._rotation.turn(array[:, : len(rows)], shifts[:, None])
        state.held, state.shifts = held, None

    # where tokens stand

    def _positions(self, state: _State) -> NDArray[np.int64]:
        """The positions in the cache of `state.kept`."""
        if not self.compact:
            return state.kept
        return np.arange(len(state.kept))

    def _position(self, state: _State) -> int:
        """Where the next token goes: right after the last one, which is always kept."""
        if self.compact:
            return len(state.kept)
        return int(state.kept[-1]) + 1 if len(state.kept) else 0

    def _array(self, kind: str, tokens: int) -> NDArray[Any]:
        """A view of `tokens` rows of an array that is made once and grows only when it must."""
        array = self._arrays.get(kind)
        if array is None or array.shape[1] < tokens:
            precise = kind == "queries" or self.policy.needs.precise
            array = self._arrays[kind] = self.context.probe.new(
                "queries" if kind == "block_queries" else kind,
                tokens,
                np.float32 if precise else np.float16,
            )
        return array[:, :tokens]
