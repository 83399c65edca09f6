"""The block loop of LASER-KV (arXiv 2602.02199) on llama.cpp.

`Reader.read` is the algorithm: decode a block, probe it with the question, look at the candidates,
score and choose (the policy), evict the rest. What is here beyond the paper: the lookahead probe,
and positions that are compacted where a document is longer than the model was trained for.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from laserkv_gguf.budget import Block, Budget
from laserkv_gguf.errors import UserError
from laserkv_gguf.llama import moving, output, rope, rows
from laserkv_gguf.llama import scorer as device
from laserkv_gguf.llama.capture import CaptureError
from laserkv_gguf.llama.chat import Prompt
from laserkv_gguf.llama.context import Context
from laserkv_gguf.llama.model import Tokens
from laserkv_gguf.llama.sequence import MAIN, SPARE, Sequence
from laserkv_gguf.policies import Candidates, Held, Needs, Policy, checked
from laserkv_gguf.reading.asking import Arrays, Asked, Asker, Drafts, ProbeSettings
from laserkv_gguf.reading.repeating import Repeater, RepeatPrompt
from laserkv_gguf.timings import Timings

log = logging.getLogger(__name__)

WORTH_GATHERING = 0.9  # of the cells are taken: above that there is little to gain


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
        scores: (tokens,) float32, what the policy last scored each token; NaN where it scored none.
        drafts: of the answer, as they were guessed with the last block.
    """

    tokens: Tokens
    budget: Budget
    kept: NDArray[np.int64]
    next_position: int
    timings: Timings
    kept_per_block: list[int] = field(default_factory=list)
    scores: NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))
    drafts: list[int] = field(default_factory=list)

    @property
    def pools(self) -> NDArray[np.int8]:
        return self.all_pools[self.kept]

    @property
    def all_pools(self) -> NDArray[np.int8]:
        """(tokens,) the part of the budget that every token would be kept by; as `pools`."""
        pools = np.ones(len(self.tokens), np.int8)
        pools[: self.budget.anchors] = 0
        if not self.budget.keeps_all:
            pools[len(self.tokens) - self.budget.window :] = 2
        return pools

    def where(self, compact: bool, start: int = 0) -> NDArray[np.int64]:
        """(tokens,) the position of every token in the cache, -1 for those that are not there.

        Args:
            compact: whether kept tokens were moved together.
            start: the position of the first token.
        """
        where = np.full(len(self.tokens), -1, np.int64)
        where[self.kept] = start + (np.arange(len(self.kept)) if compact else self.kept)
        return where


@dataclass
class _State:
    """Where a read stands."""

    tokens: Tokens
    budget: Budget
    question: Prompt | None
    on_progress: Callable[[Progress], None] | None
    start: int = 0  # the position of the first token
    asks: Callable[[], Prompt | None] | None = None  # whether there is a question by now
    unasked: Policy | None = None  # chooses until there is
    read: int = 0
    kept: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    # which tokens the rows of the captured keys and values belong to
    held: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    # how far compacting has just moved each kept token
    shifts: NDArray[np.int64] | None = None
    memory: dict[str, Any] = field(default_factory=dict)
    # what the model would have answered, had the document ended with the block before
    drafts: Drafts = field(default_factory=Drafts)
    asked: Asked | None = None  # the last probe
    # (tokens,) what the policy last scored each of them
    scores: NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))
    repeated: int = 0  # the first token that has not been repeated yet
    # keys (layers, n, kv_heads, head_dim) of what stands before the first token, in parts
    before: list[NDArray[Any]] = field(default_factory=list)
    kept_per_block: list[int] = field(default_factory=list)
    timings: Timings = field(default_factory=Timings)
    started: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        if len(self.scores) != len(self.tokens):
            self.scores = np.full(len(self.tokens), np.nan, np.float32)

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
        scoring: "host"; "device" to compute attention where the cache is (llama/scorer.py), or
            "auto" to do so if that is not the host's memory. A device that cannot is told once, and
            the host scores.
        sequence: number of the sequence that is read into.
        repeating: what asks for a repetition where the policy needs one; None for nothing.
    """

    def __init__(
        self,
        context: Context,
        policy: Policy,
        probe: ProbeSettings | None = None,
        *,
        compact: bool = False,
        scoring: str = "host",
        sequence: int = MAIN,
        repeating: RepeatPrompt | None = None,
    ) -> None:
        self.context, self.policy = context, policy
        self.limit = context.cells  # cells that the sequence may take; fewer where others have some
        self.compact = compact
        self.main = Sequence(context, sequence)
        self.asker = Asker(context, self.main, policy.needs, probe or ProbeSettings())
        self.repeater = Repeater(context, self.main, repeating)
        self.spare = Sequence(context, SPARE)
        self._all: tuple[_State, Asked | None] | None = None
        self._rotation: rope.Rotation | None = None
        there = scoring == "device" or (scoring == "auto" and context.cache_is_elsewhere)
        self._on_device = there and policy.needs.scores
        self._arrays = Arrays(context, precise=policy.needs.precise)
        self._reads: _State | None = None  # while a block is being looked at
        self.weighs = True  # until the model turns out to show no values
        self._needs = policy.needs  # of all that may choose in this reading

    def read(
        self,
        tokens: Tokens,
        budget: Budget,
        question: Prompt | None = None,
        *,
        on_progress: Callable[[Progress], None] | None = None,
        keep_all_cells: bool = False,
        start: int = 0,
        park: Callable[[Block, int], None] | None = None,
        asks: Callable[[], Prompt | None] | None = None,
        unasked: Policy | None = None,
    ) -> Reading:
        """Reads a sequence block by block, keeping what the budget allows.

        Args:
            tokens: int32 ids of everything before the question.
            budget: made for `len(tokens)`.
            question: the question with the template up to where the answer starts; None where it
                is not known yet.
            on_progress: called after every micro-batch.
            keep_all_cells: of a one-shot run, keeps all of them in the spare sequence, for
                `choose_again`;
                the context must hold `len(tokens)` cells beside whatever follows.
            start: the position of the first token. What stands before it in the main sequence
                stays and is seen; with 0 the sequence is emptied first.
            park: called with every block while it is whole, and the position it begins at. It may
                use the spare sequence, so `keep_all_cells` is not for it.
            asks: called when a block is whole, as long as there is no question: from the first one
                that it returns, that question asks this block and all that follow. One that the
                cells have no room for beside the block asks a later one, or none.
            unasked: chooses as long as there is no question; None for the reader's own policy,
                which the last tokens of each block then ask.

        Returns:
            What is in the cache. Whatever goes wrong instead (a policy's error, Ctrl-C, a full
            cache), nothing of it is left there: no half-evicted sequence is ever used.

        Raises:
            Cancelled, LaserKVError, PolicyError, KeyboardInterrupt.
        """
        self._forget_from(start)
        self._needs = self.policy.needs.with_those_of(unasked.needs if unasked else None)
        if not budget.keeps_all:
            self._learn_rotation()
        if self._on_device and not budget.keeps_all:
            self._on_device = device.prepare(self.context, collisions=self._needs.collisions)
        if not budget.keeps_all:
            self.use_factors()
        state = _State(tokens, budget, question, on_progress, start, asks, unasked)
        looks_past = self._needs.outside or self._needs.repeat
        if start and looks_past and not budget.keeps_all:
            if self.compact:
                moving.settle(self.context)
            state.before = list(rows.keys_between(self.main, [(0, start)]))
        try:
            for block in budget.blocks:
                self._decode(state, block)  # 1
                self._hear(state)
                if park:
                    self._reads = state
                    with state.timings.spent("park"):
                        park(block, self._position(state) - block.tokens)
                if block.evicts:
                    asked = self._probe(state, block)  # 2
                    self._repeat(state, block)
                    if keep_all_cells and budget.shape == "one-shot" and not self.compact:
                        self._keep_all(state, asked)
                    candidates = self._candidates(state, block, asked)  # 3
                    kept = self._select(state, candidates, block)  # 4 and 5
                    self._evict(state, block, kept)  # 6
                elif self._observes(state, block):
                    self._observe(state, block)
                if not state.last(block) and not budget.keeps_all:
                    with state.timings.spent("evict"):
                        self._hold(state, block)
                state.kept_per_block.append(len(state.kept))
                if state.last(block) and not self.holds_all:
                    self._gather(state)
                state.timings.end_block()
        except BaseException:
            self._forget_from(start)
            raise
        finally:
            self._reads = None
        return self._reading(state)

    def _learn_rotation(self) -> None:
        if self.compact and self._rotation is None:
            self._rotation = rope.measure(self.context)
        elif self._needs.unrotated and self._rotation is None:
            self._rotation = rope.known(self.context)

    def _reading(self, state: _State) -> Reading:
        state.timings.total = time.perf_counter() - state.started
        return Reading(
            state.tokens,
            state.budget,
            state.kept,
            self._position(state),
            state.timings,
            state.kept_per_block,
            state.scores,
            list(state.drafts.tokens),
        )

    def forget(self) -> None:
        """Empties the sequence, and those that reading needs beside it."""
        self._all = None
        for sequence in (self.main, self.asker.scratch, self.spare):
            sequence.remove()

    def _forget_from(self, start: int) -> None:
        if start:
            self.main.remove(start, -1)
        else:
            self.forget()

    # several ratios from one reading

    def _keep_all(self, state: _State, asked: Asked | None) -> None:
        """Notes the moment before a one-shot choice; the spare sequence shares all cells."""
        self.main.share_with(self.spare)
        before = replace(
            state, memory=dict(state.memory), kept_per_block=list(state.kept_per_block)
        )
        if asked is not None:
            asked = replace(asked, queries=asked.queries.copy())
        self._all = (before, asked)

    @property
    def holds_all(self) -> bool:
        """Whether `choose_again` can be used."""
        return self._all is not None

    def choose_again(self, budget: Budget) -> Reading:
        """Chooses anew from all that `read(keep_all_cells=True)` read, without decoding it again.

        Nothing a one-shot run does before its one choice depends on the ratio, so the result is
        that of reading with `budget`.

        Args:
            budget: one-shot, for the same tokens and block size.
        """
        assert self._all is not None
        before, asked = self._all
        state = replace(
            before,
            budget=budget,
            memory=dict(before.memory),
            kept_per_block=list(before.kept_per_block),
            scores=before.scores.copy(),
            timings=Timings(),
            started=time.perf_counter(),
        )
        self.main.remove()
        self.spare.share_with(self.main)
        block = budget.blocks[-1]
        if block.evicts:
            candidates = self._candidates(state, block, asked)
            self._evict(state, block, self._select(state, candidates, block))
        state.kept_per_block.append(len(state.kept))
        return self._reading(state)

    def _chooser(self, state: _State) -> Policy:
        """The policy that chooses now."""
        unasked = state.unasked
        return self.policy if unasked is None or state.question is not None else unasked

    def _hear(self, state: _State) -> None:
        """Takes a question that has come meanwhile, where there is room to ask it."""
        if state.question is not None or state.asks is None:
            return
        question = state.asks()
        if question is None:
            return
        if len(question) + self.asker.lookahead <= self.limit - state.start - len(state.kept):
            state.question = question
            if state.unasked is not None:  # its notes are no use to the other
                state.memory = {}

    # 1

    def _decode(self, state: _State, block: Block) -> None:
        """Decodes the block on top of what was kept; its tokens see that and each other."""
        needs, held = self._chooser(state).needs, len(state.held)
        wanted: dict[str, tuple[NDArray[Any], int] | None] = {}
        if self._scores_later(state, block):
            for kind in self._seen():
                array = self._arrays.of(kind, self._rows(state.budget))
                wanted[kind] = (array[:, held : held + block.tokens], 0)
            state.held = np.concatenate((state.held, np.arange(block.start, block.end)))
        if needs.block_queries and (block.evicts or self._observes(state, block)):
            queries = self.block_queries(block)
            wanted["queries"] = (queries, block.tokens - queries.shape[1])
        elif block.evicts and needs.queries and state.question is None:
            queries = self._observed(block)
            wanted["queries"] = (queries, block.tokens - queries.shape[1])
        if block.evicts and state.question is None and self._observes_own(needs, wanted):
            keys = self._arrays.of("own_keys", min(self.asker.observation, block.tokens))
            wanted["keys"] = (keys, block.tokens - keys.shape[1])
        try:
            with state.timings.spent("decode"), self.context.probe.armed(**wanted):
                self.context.decode(
                    state.tokens[block.start : block.end],
                    self._position(state),
                    self.main.number,
                    on_chunk=state.report,
                )
        except CaptureError as error:
            if not error.kind.endswith("_norms"):
                raise
            if self._needs.value_norms == "auto":
                self._do_not_weigh()
            else:
                raise self._cannot_weigh() from error
        state.kept = np.concatenate((state.kept, np.arange(block.start, block.end)))

    def _do_not_weigh(self) -> None:
        """Goes on without norms of values, which the model's graph does not show."""
        self.weighs = False
        log.warning(
            "this build of llama.cpp shows no values of a %s model: %s weighs none",
            self.context.model.architecture,
            self.policy.name,
        )

    def _cannot_weigh(self) -> UserError:
        return UserError(
            f"{self.policy.name} weighs values, and this build of llama.cpp shows none of a "
            f"{self.context.model.architecture} model; use --policy-option values=none, "
            f'or --read-policy "{self.policy.name} values=none" where no question is known'
        )

    def _scores_later(self, state: _State, block: Block) -> bool:
        """Whether the block's keys are looked at, now or when a later block looks back."""
        return not state.budget.keeps_all and (block.evicts or not state.last(block))

    @property
    def available(self) -> int:
        """Cells the sequence may take, those included that llama.cpp has rounded up to."""
        alone = self.limit >= self.context.cells
        return self.context.allocated_cells if alone else self.limit

    @property
    def scoring(self) -> str:
        """Where attention is computed: "device" or "host"."""
        return "device" if self._on_device else "host"

    def _seen(self) -> list[str]:
        """What is captured of every candidate; on a device, of its keys, where they are."""
        needs = self._needs
        norms = needs.value_norms if not needs.values else "none"  # else made of the values
        wanted = {
            "keys": needs.keys or needs.visible if self._on_device else needs.host_keys,
            "values": needs.values,
            "value_norms": norms == "norm" or (norms == "auto" and self.weighs),
            "output_norms": norms == "output",
            "cells": self._on_device,
        }
        return [kind for kind, is_wanted in wanted.items() if is_wanted]

    def _observes(self, state: _State, block: Block) -> bool:
        """Whether the policy looks at a block after which nothing is evicted."""
        wanted = self._chooser(state).needs.every_block and not block.evicts
        return wanted and self._scores_later(state, block)

    def _rows(self, budget: Budget) -> int:
        """Most tokens that are looked at, or looked past, at a time."""
        return self._needs.rows(budget)

    def block_queries(self, block: Block) -> NDArray[Any]:
        """Where queries of a block's last tokens are captured: (layers, tokens, heads, head_dim).

        As many as the policy wants; of most policies all.
        """
        wanted = self._needs.recent_queries or block.tokens
        return self._arrays.of("block_queries", min(wanted, block.tokens))

    def _observes_own(self, needs: Needs, wanted: Mapping[str, Any]) -> bool:
        """Whether keys of the block's last tokens are needed that are on the device only."""
        return self._on_device and needs.outside and "keys" not in wanted

    def _observed(self, block: Block) -> NDArray[Any]:
        return self._arrays.of("queries", min(self.asker.observation, block.tokens))

    # 2

    def _probe(self, state: _State, block: Block) -> Asked | None:
        """Asks the whole block: queries of the question's end and of the drafts after it.

        In a scratch sequence that shares the cells and is dropped. A last block that is shorter
        than a probe with drafts is not worth one: the queries of the block before look at it, too.
        """
        if not self._chooser(state).needs.queries:
            return None
        if state.question is None:
            if self._chooser(state).needs.block_queries:
                last = self.block_queries(block)[:, -self.asker.observation :]
                queries = last.astype(np.float32)
            else:
                queries = self._observed(block)
            return Asked(queries, at=self._positions(state)[-queries.shape[1] :])
        probe = len(state.question) + self.asker.lookahead
        short = self.asker.lookahead > 0 and state.last(block) and block.tokens <= probe
        if state.asked is None or self.compact or not short:
            state.drafts.seen = state.tokens[state.kept]
            with state.timings.spent("probe"):
                room = self.limit - state.start - len(state.kept)
                state.asked = self.asker.ask(
                    state.question, self._position(state), state.drafts, room=room
                )
        return state.asked

    def _repeat(self, state: _State, block: Block) -> None:
        """Repeats what has become a candidate, and notes the most attention that each of it gets.

        Tokens that were candidates before keep what they got then.
        """
        needs = self.policy.needs
        if not needs.repeat:
            return
        first, end = max(state.repeated, block.candidates[0]), block.candidates[1]
        keys = self._arrays.of("keys", self._rows(state.budget))[:, : len(state.held)]
        got = self._arrays.of("repeated", self._rows(state.budget))
        free, position = self.limit - state.start - len(state.kept), self._position(state)
        size = self.repeater.size(min(needs.repeat, state.budget.block_size), free, position)
        for start in range(first, end, size):
            span = start, min(start + size, end)
            with state.timings.spent("probe"):
                found = self.repeater.paid(state.tokens, span, position, keys, state.before)
            rows = slice(*np.searchsorted(state.held, span))
            got[:, rows] = np.swapaxes(found[:, :, rows], 1, 2)
        state.repeated = end

    def use_factors(self) -> None:
        """Makes the norms that the policy asks for possible.

        Raises:
            UserError: the model's file does not hold what they need.
        """
        if self._needs.value_norms == "output":
            self.context.probe.use_factors(output.factors(self.context.model))

    # 3

    def _candidates(self, state: _State, block: Block, asked: Asked | None) -> Candidates:
        """The block and what it looks back at, without anchors and without the new window."""
        first, last = np.searchsorted(state.held, block.candidates)
        return self._looked_at(state, block, int(first), int(last), asked)

    def _looked_at(
        self, state: _State, block: Block, first: int, last: int, asked: Asked | None
    ) -> Candidates:
        """The tokens first … last - 1 of those that are held, as a policy sees them."""
        needs = self._chooser(state).needs
        held = {
            kind: self._arrays.of(kind, self._rows(state.budget))[:, : len(state.held)]
            for kind in self._seen()
        }
        views: dict[str, Any] = {kind: array[:, first:last] for kind, array in held.items()}
        if needs.block_queries:
            views["block_queries"] = self.block_queries(block)[:]
        if needs.visible:
            views["visible_keys"] = held["keys"][:]
        if needs.repeat:
            rows = self._arrays.of("repeated", self._rows(state.budget))
            views["repeated"] = rows[:, first:last]
        for view in views.values():
            view.flags.writeable = False
        if "output_norms" in views:
            views["value_norms"] = views.pop("output_norms")
        elif needs.values and needs.value_norms != "none":
            views["value_norms"] = self._norms(views["values"])
        if needs.visible:
            views["visible"] = state.held
        cells = views.pop("cells", None)
        if cells is not None:
            others, beside = None, None
            if needs.outside and asked is not None:
                here = held["cells"][0]
                others, beside = self._others(state, block, asked, here, first, last)
            views["scorer"] = device.Attention(self.context.scorer, cells[0], others, beside)
        elif needs.outside and asked is not None:
            with state.timings.spent("score"):
                views["outside"] = self._outside(state, block, asked, held["keys"], first, last)
        return Candidates(
            state.held[first:last],
            (block.start, block.end),
            block.index,
            None if asked is None else asked.queries,
            memory=state.memory,
            held=self._held(state, first),
            asked_at=None if asked is None else asked.at,
            rotation=self._rotation if needs.unrotated else None,
            scores=state.scores,
            **views,
        )

    def held_with(self, block: Block) -> Held | None:
        """What is held with a block that is just being parked; None where nothing of it is."""
        state = self._reads
        if state is None or not len(state.held) or state.held[-1] != block.end - 1:
            return None
        return self._held(state, int(np.searchsorted(state.held, block.start)))

    def _held(self, state: _State, first: int) -> Held:
        """What the host holds, of which a policy's candidates begin with number `first`."""
        arrays = {
            kind: self._arrays.of(kind, self._rows(state.budget))[:, : len(state.held)]
            for kind in self._seen()
            if kind in ("keys", "values")
        }
        for array in arrays.values():
            array.flags.writeable = False
        where = self._positions(state)[np.searchsorted(state.kept, state.held)]
        return Held(state.held, where, first, **arrays)

    def _observe(self, state: _State, block: Block) -> None:
        """Shows the policy a block after which nothing is evicted."""
        from laserkv_gguf import kernels

        first, last = np.searchsorted(state.held, (block.start, block.end)).tolist()
        with state.timings.spent("score"), kernels.threads(self.context.threads):
            self._chooser(state).observe(self._looked_at(state, block, first, last, None))

    def _norms(self, values: NDArray[Any]) -> NDArray[np.float32]:
        """What the probe makes of values, of such as are held."""
        from laserkv_gguf import kernels

        factors = self.context.probe.factors if self._needs.value_norms == "output" else None
        return kernels.value_norms(values, factors)

    def _outside(
        self,
        state: _State,
        block: Block,
        asked: Asked,
        keys: NDArray[Any],
        first: int,
        last: int,
    ) -> NDArray[np.float32]:
        """`Candidates.outside`, of held keys whose rows first … last - 1 are the candidates'."""
        from laserkv_gguf import kernels

        queries, after = asked.queries, state.held[last:]
        visible = None
        if state.question is None:  # the block's own last tokens ask, each of what it saw
            asking = np.arange(block.end - queries.shape[1], block.end)
            visible = np.searchsorted(after, asking, side="right")
        with kernels.threads(self.context.threads):
            seen = asked.with_more((keys[:, :first], *state.before))
            late = kernels.log_sums(queries, keys[:, last:], visible=visible)
        return late if seen is None else np.logaddexp(seen, late)

    def _others(
        self,
        state: _State,
        block: Block,
        asked: Asked,
        cells: NDArray[np.int64],
        first: int,
        last: int,
    ) -> tuple[NDArray[np.int64], NDArray[np.float32] | None]:
        """The same where a device computes attention: cells that all tokens see, and the rest.

        Args:
            cells: of what is held.
        """
        from laserkv_gguf import kernels

        with kernels.threads(self.context.threads):
            beside = asked.with_more(state.before)
        whole = len(state.held)
        if state.question is None:
            asking = np.arange(block.end - asked.queries.shape[1], block.end)
            whole = max(last, int(np.searchsorted(state.held, asking[0], side="right")))
            late = state.held[whole:]
            own = self._arrays.of("own_keys", min(self.asker.observation, block.tokens))
            if "keys" in self._seen():
                own = self._arrays.of("keys", self._rows(state.budget))[:, : len(state.held)]
            with kernels.threads(self.context.threads):
                keys = own[:, own.shape[1] - len(late) :]
                visible = np.searchsorted(late, asking, side="right")
                seen = kernels.log_sums(asked.queries, keys, visible=visible)
            beside = seen if beside is None else np.logaddexp(seen, beside)
            beside = np.maximum(beside, np.float32(-1e30))  # the first of them sees none
        return np.concatenate((cells[:first], cells[last:whole])), beside

    # 4 and 5

    def _select(self, state: _State, candidates: Candidates, block: Block) -> NDArray[np.int64]:
        """The policy's choice, checked: indices of the tokens to keep, ascending."""
        if block.pool == 0:
            return np.empty(0, np.int64)
        from laserkv_gguf import kernels

        with state.timings.spent("score"), kernels.threads(self.context.threads):
            chosen = self._chooser(state).select(candidates, block.pool)
        with state.timings.spent("select"):
            return candidates.tokens[checked(self._chooser(state), chosen, candidates, block.pool)]

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
                self.main.compact(positions, state.start)
                state.shifts = state.start + np.arange(len(positions)) - positions

    def _hold(self, state: _State, block: Block) -> None:
        """Holds on to the keys and values that the next block looks back at.

        In an accumulating run these are the new window's, and the anchors' where the policy looks
        past them, unless it looks at all that the question sees; else those of all that was kept.
        """
        needs, budget = self._needs, state.budget
        held = state.kept
        if budget.accumulates and not needs.holds_all:
            stays_held = held >= block.end - budget.window
            if needs.outside:
                stays_held |= held < budget.anchors
            held = held[stays_held]
        taken = np.searchsorted(state.held, held)
        # what was kept before stays where it is
        stays = int(np.count_nonzero(taken == np.arange(len(taken))))
        for kind in (*self._seen(), *(["repeated"] if needs.repeat else [])):
            array = self._arrays.of(kind, self._rows(state.budget))
            if stays < len(taken):
                array[:, stays : len(taken)] = array[:, taken[stays:]]
            if kind == "keys" and self._rotation is not None and state.shifts is not None:
                shifts = state.shifts[np.searchsorted(state.kept, held)]
                first = int(np.count_nonzero(np.cumsum(shifts != 0) == 0))
                self._rotation.turn(array[:, first : len(taken)], shifts[first:, None])
        state.held, state.shifts = held, None

    def _gather(self, state: _State) -> None:
        """Closes the gaps that eviction left among the cells: generation is faster without."""
        taken = len(state.kept)
        if taken in (0, len(state.tokens)) or taken > WORTH_GATHERING * self.context.cells:
            return
        with state.timings.spent("evict"):
            if self.compact:
                moving.settle(self.context)
            moving.gather(self.context, self.main.number, self._positions(state))

    # where tokens stand

    def _positions(self, state: _State) -> NDArray[np.int64]:
        """The positions in the cache of `state.kept`."""
        return state.start + (np.arange(len(state.kept)) if self.compact else state.kept)

    def _position(self, state: _State) -> int:
        """Where the next token goes: right after the last one, which is always kept."""
        if self.compact:
            return state.start + len(state.kept)
        return state.start + (int(state.kept[-1]) + 1 if len(state.kept) else 0)
