"""Recall: rows of evicted tokens stay on the host and come back bit for bit, for every question.

While a document is read, `Recaller` parks the rows of every block as it was decoded. A question
then chooses anew among all tokens of the document, in one of two ways, and only the tokens that
change sides are moved:

- replay: the block loop once more, over parked rows. A block goes in whole, the question is probed
  where it will stand, the policy fills the block's pool, the rest goes out. Nothing is decoded
  again but the question and its drafts.
- shortlist: the question is probed on the cache as it stands; packed signatures of all tokens give
  a shortlist, which the policy chooses from by its exact keys; a second round asks with the drafts.

Rows are parked for all tokens, also for those that stay in the cache: then a row is taken out of
llama.cpp once, evicting is no copy, every key can be scored where it lies, and what a question gets
does not depend on the questions before it.

Compacted positions: keys lie turned for the position at which they were parked. They are put back
from there every time, turned once (float16 and float32 keys only), so errors never add up; but they
are not bit for bit what moving them inside llama.cpp would give.

A document that was added to a conversation begins at a position above 0, its `offset`. What stands
before and after it is the conversation's, and every question sees it. Of a document after it replay
shows only anchors and window, as of the blocks after the one that is chosen from: what was chosen
there for another question leaves no trace.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from laserkv_gguf import policies
from laserkv_gguf.budget import Block, Budget
from laserkv_gguf.errors import UserError
from laserkv_gguf.llama import moving, output, rope, rows
from laserkv_gguf.llama.chat import Prompt
from laserkv_gguf.llama.sequence import SPARE, Sequence
from laserkv_gguf.planning.settings import BITS, RecallSettings
from laserkv_gguf.policies import Candidates, Held, checked
from laserkv_gguf.reading.asking import Asked, Drafts
from laserkv_gguf.reading.reader import Reader, Reading
from laserkv_gguf.recall.signatures import Signatures
from laserkv_gguf.recall.store import DiskStore, Store

Indices = NDArray[np.int64]


SHORTLIST = 2.0  # tokens looked at exactly, in multiples of what is chosen


class Rows(Protocol):
    """Where a conversation writes down which of its tokens stand where; see `Ledger`."""

    def where(self, numbers: Iterable[int]) -> Indices:
        """The positions of all tokens of some segments, -1 for those that are not there."""

    def put(self, numbers: Iterable[int], where: Indices) -> None:
        """Makes these their positions."""


@dataclass(frozen=True)
class Recalled:
    """What recalling for a question did.

    Attributes:
        kept: indices of the document's tokens that are in the cache now.
        moved_in, moved_out: tokens that the question before did not have, or had and lost.
        state_calls: calls into llama.cpp that put rows in.
        seconds: all of it, the probes included.
    """

    kept: Indices
    moved_in: int
    moved_out: int
    state_calls: int
    seconds: float


class Recaller:
    """Parks a document's rows and brings back what a question needs.

    Args:
        reader: whose policy chooses, in whose context.
        budget: of the document.
        form: the rows' format, from `rows.check`.
        settings: see RecallSettings; not off.
        offset: the position where the document begins.

    Attributes:
        limit: the most tokens of this document that stay in the cache; lowered when turns need
            the room.
        kept_by_reading: (kept,) which tokens the reading kept, before any question.

    Raises:
        UserError: memory or disk cannot hold the rows, or these keys cannot be compacted.
    """

    def __init__(
        self,
        reader: Reader,
        budget: Budget,
        form: rows.Format,
        settings: RecallSettings,
        offset: int = 0,
    ) -> None:
        if reader.compact and not form.exact:
            raise UserError(
                "rows of quantised keys cannot be parked with compacted positions; "
                "use -ctk f16, --positions original or --recall off"
            )
        self.budget, self.form, self.settings = budget, form, settings
        self.offset, self.limit = offset, budget.kept
        self.policy = reader.policy
        self.mode = settings.mode_for(self.policy)
        self._rotation = rope.measure(reader.context) if reader.compact else None
        unrotated = self.policy.needs.unrotated
        self._rope = rope.known(reader.context) if unrotated else None  # also if nothing moves
        self.use(reader)
        quantised = reader.context.options.quantised_v
        sizes = budget.tokens, form.layers, form.key_bytes, form.value_bytes
        self._factors: NDArray[np.float32] | None = None
        if self.policy.needs.value_norms == "output":
            if quantised:
                raise UserError(
                    "values=output cannot be recalled from a quantised V cache; use -ctv f16, "
                    "--policy-option values=norm or --recall off"
                )
            self._factors = output.factors(reader.context.model)
        self.store: Store = (
            Store(*sizes, quantised=quantised)
            if settings.where == "ram"
            else DiskStore(*sizes, quantised=quantised, path=settings.file)
        )
        self.signatures: Signatures | None = None
        if settings.votes_for(self.policy):
            self.signatures = Signatures(
                form.layers, form.kv_heads, form.head_dim, budget.tokens, BITS
            )
        # norms of parked values, NaN until they are asked for
        self.norms: NDArray[np.float32] | None = None
        self.index: dict[str, NDArray[Any]] = {}
        self.units = np.empty(0, np.int64)  # first tokens of the policy's units
        self.tokens = np.empty(0, np.int32)
        self.kept_by_reading: Indices = np.empty(0, np.int64)
        # until a ledger is followed
        self._position_of = np.full(budget.tokens, -1, np.int64)
        self._rows: Rows | None = None
        self._numbers: list[int] = []
        self.state_calls = 0

    def follow(self, rows: Rows, numbers: list[int]) -> None:
        """From now on the ledger says where tokens stand, and is told of changes.

        Args:
            numbers: of the segments that the reading covered, in order.
        """
        self._rows, self._numbers = rows, numbers

    @property
    def position_of(self) -> Indices:
        """(tokens,) the position in the cache of every token, -1 for those that are out; a copy."""
        if self._rows is not None:
            return self._rows.where(self._numbers)
        return self._position_of.copy()

    def _stand(self, position_of: Indices) -> None:
        if self._rows is not None:
            self._rows.put(self._numbers, position_of)
        else:
            self._position_of = position_of

    @property
    def kept(self) -> Indices:
        """(kept,) which tokens are in the cache now, ascending."""
        found: Indices = np.flatnonzero(self.position_of >= 0)
        return found

    def use(self, reader: Reader) -> None:
        """Goes on in a reader's context, which holds what the one before held."""
        self.reader, self.main = reader, reader.main
        self.spare = Sequence(reader.context, SPARE)

    def close(self) -> None:
        """Forgets the parked rows."""
        self.store.close()

    @property
    def bytes(self) -> int:
        """Parked rows, and what is held beside them to find them by."""
        beside = sum(array.nbytes for array in self.index.values())
        if self.signatures is not None:
            beside += self.signatures.codes.nbytes
        if self.norms is not None:
            beside += self.norms.nbytes
        return self.store.bytes + beside

    @property
    def extra_cells(self) -> int:
        """Extra cells needed while a question is recalled, on top of the `limit` that stay."""
        if self.mode != "replay":
            return 0
        before = whole = 0
        for block in self.budget.blocks:
            before = before if self.budget.accumulates else block.kept_before
            pool = self._pool(block)
            if pool < block.count:
                whole = max(whole, before + block.tokens)
                before -= block.count - pool
            before += block.tokens
        return max(0, whole + self.budget.window - self.limit)

    @property
    def protected(self) -> int:
        """Anchors and window: what every question leaves."""
        first, last = self._protected
        return self.budget.tokens - (last - first)

    def _pool(self, block: Block) -> int:
        """A block's pool; its share of what there is room for, where that is less."""
        inner = self.budget.kept - self.protected
        return block.pool if inner <= 0 else block.pool * (self.limit - self.protected) // inner

    # while the document is read

    def park(self, block: Block, position: int, reader: Reader | None = None) -> None:
        """Takes a block's rows out of the main sequence, where it begins at `position`.

        Args:
            reader: that has just decoded it, for its queries.

        Raises:
            LaserKVError: the disk is full.
        """
        for first, last in self._chunks(block.tokens):
            try:
                self.main.share_with(self.spare, position + first, position + last)
                taken = rows.take(self.reader.context, self.form, SPARE)
            finally:
                self.spare.remove()
            order = np.argsort(taken.positions)
            expected = np.arange(position + first, position + last)
            if not np.array_equal(taken.positions[order], expected):
                raise rows.FormatError("llama.cpp's state lacks tokens that were just decoded")
            self.store.write(taken.keys[:, order], taken.values[:, order], expected)
        self._remember(block, reader)

    def _remember(self, block: Block, reader: Reader | None) -> None:
        """Signs the block's keys, or lets the policy note what it wants of them."""
        if self.mode == "replay":
            return
        tokens = np.arange(block.start, block.end)
        keys = self.form.keys(self.store.keys(tokens))
        if self.signatures is not None:
            self.signatures.add(block.start, keys)
            return
        queries, around = None, None
        if self.policy.needs.block_queries:
            if reader and reader.policy.needs.block_queries and block.evicts:
                queries, around = reader.block_queries(block), reader.held_with(block)
            else:  # nobody asks, but with so many heads
                heads = self.reader.context.model.heads
                queries = np.empty((len(keys), 0, heads, keys.shape[3]), keys.dtype)
        seen = Candidates(
            tokens,
            (block.start, block.end),
            block.index,
            keys=keys,
            block_queries=queries,
            held=around or Held(tokens, self.store.positions[tokens].astype(np.int64), 0, keys),
            rotation=self._rope,
        )
        for name, array in self.policy.index(seen).items():
            held = self.index.get(name)
            self.index[name] = array if held is None else np.concatenate((held, array), axis=1)
        starts = np.arange(block.start, block.end, self.policy.unit)
        self.units = np.concatenate((self.units, starts))

    def remember(self) -> None:
        """Makes anew, from the parked rows, what finds them."""
        for block in self.budget.blocks:
            self._remember(block, None)

    def begin_again(self) -> None:
        """Puts back what the reading left, so that no question depends on the ones before it.

        Replay does not look at what is there.
        """
        if self.mode != "replay":
            self._arrange(self._final(self.kept_by_reading))

    def settle(self, reading: Reading) -> None:
        """Takes over what a reading has left in the cache.

        Compacted tokens are put anew, turned once from where they were parked, with room between
        them and the window for a block to stand in.
        """
        self.tokens, self.kept_by_reading = reading.tokens, reading.kept
        if self._rotation is None:
            self._stand(reading.where(compact=False, start=self.offset))
            return
        self.restore(reading.kept)
        reading.next_position = self.next_position

    def restore(self, kept: Indices) -> None:
        """Puts the given tokens into a main sequence that holds nothing from `offset` on."""
        self.main.remove(self.offset, -1)
        self._stand(np.full(self.budget.tokens, -1, np.int64))
        self._arrange(self._final(kept))
        self.kept_by_reading = kept

    @property
    def next_position(self) -> int:
        """Where the conversation about the document begins."""
        return int(self.position_of[self.budget.tokens - 1]) + 1

    @property
    def inner(self) -> tuple[int, int]:
        """Positions between anchors and window, half-open: where tokens come and go."""
        first, last = self._protected
        where = self.position_of
        start = int(where[first - 1]) + 1 if first else self.offset
        return start, int(where[last])

    # when a question comes

    def recall(
        self,
        question: Prompt,
        position: int,
        cells: int,
        hidden: Iterable[tuple[int, int]] = (),
    ) -> Recalled:
        """Brings the tokens into the cache that the question needs, and others out.

        Args:
            question: with whatever of the conversation is not decoded yet in front.
            position: where it will stand: right after the last token of the main sequence.
            cells: taken by the main sequence.
            hidden: positions, half-open, that replay hides: `inner` of documents after this one.

        Raises:
            Cancelled, LaserKVError, PolicyError, KeyboardInterrupt: the cache holds what it held.
        """
        started, before, calls = time.perf_counter(), self.kept, self.state_calls
        try:
            if self.mode == "replay":
                kept = self._replay(question, position, cells - len(before), tuple(hidden))
            else:
                kept = self._shortlist(question, position, self.reader.limit - cells)
        except BaseException:
            self.go_back(before)
            raise
        return Recalled(
            kept,
            len(np.setdiff1d(kept, before, assume_unique=True)),
            len(np.setdiff1d(before, kept, assume_unique=True)),
            self.state_calls - calls,
            time.perf_counter() - started,
        )

    def go_back(self, kept: Indices) -> None:
        """Makes the cache what it was, wherever the work was stopped."""
        self.reader.asker.scratch.remove()
        self.spare.remove()
        first, last = self._protected
        if last > first:
            self.main.remove(*self.inner)
            where = self.position_of
            where[first:last] = -1
            self._stand(where)
            self._arrange(self._final(kept))

    def shrink(self) -> None:
        """Leaves `limit` tokens for now: beside anchors and window keys least like the others."""
        kept = self.kept
        if len(kept) <= self.limit:
            return
        first, last = self._protected
        inside = (kept >= first) & (kept < last)
        tokens, room = kept[inside], self.limit - self.protected
        if room:
            policy = policies.make("keydiff")
            seen = Candidates(tokens, (first, last), keys=self._keys(tokens))
            tokens = tokens[checked(policy, policy.select(seen, room), seen, room)]
        self._arrange(self._final(np.sort(np.concatenate((kept[~inside], tokens[:room])))))

    @property
    def _protected(self) -> tuple[int, int]:
        """Indices between the anchors and the last window: those that move."""
        anchors, budget = self.budget.anchors, self.budget
        return anchors, max(anchors, budget.tokens - budget.window)

    # the block loop over parked rows

    def _replay(
        self, question: Prompt, position: int, others: int, hidden: tuple[tuple[int, int], ...]
    ) -> Indices:
        """The block loop of `Reader.read`, with rows that are parked in place of decoding."""
        budget, reader = self.budget, self.reader
        inside = np.zeros(budget.tokens, bool)  # what a reading for this question would hold
        memory: dict[str, Any] = {}
        drafts = Drafts()
        # room for all drafts, whatever stands there from the question before
        probing = len(question) + max(reader.asker.lookahead, reader.asker.reach) + others
        beside = self._beside(position, hidden)
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
                drafts.seen = self.tokens[inside[: len(self.tokens)]]
                taken = others + int(np.count_nonzero(self.position_of >= 0))
                room = reader.available - taken
                asked = reader.asker.ask(question, position, drafts, shared=True, room=room)
                tokens = first + np.flatnonzero(inside[first:last])
                others_seen = inside.copy()
                if not self.policy.needs.outside_kept:
                    others_seen[self.budget.anchors : first] = False
                others_seen[first:last] = False
                others_seen[self._protected[1] :] = True
                seen = self._candidates(
                    tokens, block, asked, np.flatnonzero(others_seen), beside, memory
                )
                chosen = self._select(seen, pool)
            inside[first:last] = False
            inside[chosen] = True
        kept = np.flatnonzero(inside)
        self._arrange(self._final(kept))
        return kept

    def _beside(self, position: int, hidden: tuple[tuple[int, int], ...]) -> list[NDArray[Any]]:
        """Keys of what a question at a position sees beside the document."""
        if not self.policy.needs.outside:
            return []
        spans, start = [(0, self.offset)], self.next_position
        for first, last in sorted(hidden):
            spans.append((start, first))
            start = last
        spans.append((start, position))
        if self._rotation is not None:
            moving.settle(self.reader.context)
        return list(rows.keys_between(self.main, spans))

    def _candidates(
        self,
        tokens: Indices,
        block: Block | tuple[int, int, int],
        asked: Asked,
        others: Indices,
        beside: list[NDArray[Any]],
        memory: dict[str, Any],
    ) -> Candidates:
        """What a policy chooses from, out of what is parked.

        Args:
            tokens: the candidates.
            block: they are of, or its start, end and index.
            asked: what looks at them.
            others: tokens of the document that are seen beside them.
            beside: keys of what is seen beside the document.
            memory: the policy's notes.
        """
        needs, outside, norms = self.policy.needs, None, None
        if isinstance(block, Block):
            block = block.start, block.end, block.index
        if needs.outside:
            outside = asked.with_more((self._keys(others), *beside))
        if needs.value_norms != "none":
            norms = self._norms(tokens)
        return Candidates(
            tokens,
            block[:2],
            block[2],
            asked.queries,
            keys=self._keys(tokens),
            memory=memory,
            value_norms=norms,
            outside=outside,
        )

    def _norms(self, tokens: Indices) -> NDArray[np.float32]:
        """`Candidates.value_norms` of parked tokens, computed once each."""
        from laserkv_gguf import kernels

        form = self.form
        if self.norms is None:
            shape = form.layers, self.budget.tokens, form.kv_heads
            self.norms = np.full(shape, np.nan, np.float32)
        missing = tokens[np.isnan(self.norms[0, tokens, 0])]
        for first, last in self._chunks(len(missing)):
            part = missing[first:last]
            values = form.values(self.store.values(part))
            self.norms[:, part] = kernels.value_norms(values, self._factors)
        return self.norms[:, tokens]

    def _bring(self, inside: NDArray[np.bool_], block: Block, others: int) -> None:
        """Puts a block and what a reading would hold beside it into the main sequence.

        What is there for the last question stays until its own block comes, if there is room: much
        of it will be chosen again. The block does not see it; see `_show`.
        """
        wanted = inside.copy()
        wanted[self._protected[1] :] = True
        where = self.position_of
        later = where >= 0
        later[: block.end] = False
        cells = int(np.count_nonzero(wanted | later)) + others
        if self._rotation is None and cells <= self.reader.available:
            wanted |= later
        tokens = np.flatnonzero(wanted)
        if self._rotation is None:
            self._arrange((tokens, self.offset + tokens))
        else:
            ranks = self.offset + np.arange(len(tokens))
            window = tokens >= self._protected[1]
            ranks[window] = where[tokens[window]]
            self._arrange((tokens, ranks))

    def _show(self, block: Block, hidden: tuple[tuple[int, int], ...]) -> None:
        """Makes the scratch sequence what the question sees with this block."""
        scratch = self.reader.asker.scratch
        if self._rotation is not None:
            self.main.share_with(scratch)
        else:
            window = self.offset + max(block.end, self._protected[1])
            self.main.share_with(scratch, 0, self.offset + block.end)
            self.main.share_with(scratch, window, -1)
        for start, end in hidden:
            scratch.remove(start, end)

    # shortlist

    def _shortlist(self, question: Prompt, position: int, room: int) -> Indices:
        """Chooses among all tokens at once: with the question, then with its drafts too.

        Args:
            room: cells that are free.
        """
        first, last = self._protected
        ends = np.arange(self.budget.tokens)
        ends = ends[(ends < first) | (ends >= last)]
        kept, beside = self.kept, self._beside(position, ())
        for lookahead in (0, self.reader.asker.lookahead) if self.reader.asker.lookahead else (0,):
            asked = self.reader.asker.ask(question, position, lookahead=lookahead, room=room)
            if self._rope is not None and asked.at is not None:
                self._rope.turn(asked.queries, -asked.at[:, None])
            kept = np.sort(np.concatenate((ends, self._choose(asked, ends, beside))))
            self._arrange(self._final(kept))
        return kept

    def _choose(self, asked: Asked, ends: Indices, beside: list[NDArray[Any]]) -> Indices:
        """As many tokens as a reading leaves between the anchors and the last window.

        A softmax over all counts the shortlist, the `ends` and what is `beside` the document.
        """
        first, last = self._protected
        room = self.limit - self.protected
        if room >= last - first:
            return np.arange(first, last)
        if room <= 0:
            return np.empty(0, np.int64)
        if self.policy.unit:
            return self._whole_units(asked.queries, room)
        from laserkv_gguf import kernels

        assert self.signatures is not None
        votes = kernels.pool(self.signatures.votes(asked.queries), getattr(self.policy, "pool", 1))
        chosen = []
        for index, (start, end, part) in enumerate(self._shares(room)):
            near = start + kernels.top_k(votes[start:end], round(SHORTLIST * part))
            if len(near) <= part:
                chosen.append(near)
                continue
            seen = self._candidates(near, (start, end, index), asked, ends, beside, {})
            chosen.append(self._select(seen, part))
        return np.concatenate(chosen)

    def _shares(self, room: int) -> Iterator[tuple[int, int, int]]:
        """(start, end, tokens to choose): one share for all, or one for every block."""
        first, last = self._protected
        if self.settings.share == "all" or not self.budget.accumulates:
            yield first, last, room
            return
        left = room
        for block in self.budget.blocks:
            start, end = max(first, block.start), min(last, block.end)
            if start < end:
                # what a short block cannot use, and rounding, goes to the blocks after it
                part = min(end - start, left * (end - start) // (last - start))
                left -= part
                if part:
                    yield start, end, part

    def _whole_units(self, queries: NDArray[np.float32], room: int) -> Indices:
        """The policy's best units, without what is protected; the last one is cut."""
        first, last = self._protected
        scores = self.policy.look_up(queries, self.index)
        ends = np.append(self.units[1:], self.budget.tokens)
        chosen: list[NDArray[np.int64]] = []
        for unit in np.argsort(-scores, kind="stable"):  # NaN comes last
            tokens = np.arange(max(self.units[unit], first), min(ends[unit], last))[:room]
            room -= len(tokens)
            chosen.append(tokens)
            if not room:
                break
        return np.concatenate(chosen)

    def _select(self, seen: Candidates, budget: int) -> Indices:
        return seen.tokens[checked(self.policy, self.policy.select(seen, budget), seen, budget)]

    # rows

    def _keys(self, tokens: Indices) -> NDArray[Any]:
        """Keys (layers, n, kv_heads, head_dim) as they stand in the cache, or were parked."""
        keys = self.form.keys(self.store.keys(tokens))
        if self._rotation is not None:
            here = self.position_of[tokens]
            shifts = np.where(here >= 0, here - self.store.positions[tokens], 0)
            keys = keys.copy()
            self._rotation.turn(keys, shifts[:, None])
        keys.flags.writeable = False
        return keys

    def _final(self, kept: Indices) -> tuple[Indices, Indices]:
        """Indices to keep and where they stand when nothing is being probed."""
        if self._rotation is None:
            return kept, self.offset + kept
        targets = np.arange(len(kept))
        window = kept >= self._protected[1]
        count = np.count_nonzero(window)
        targets[window] = self.budget.cells_to_recall(self.mode) - count + np.arange(count)
        return kept, self.offset + targets

    def _arrange(self, wanted: tuple[Indices, Indices]) -> None:
        """Makes the document's part of the main sequence just these tokens at these positions.

        Indices that are there already stay untouched.
        """
        tokens, targets = wanted
        there = np.full(self.budget.tokens, -1, np.int64)
        there[tokens] = targets
        where = self.position_of
        changed = there != where
        leaving = np.flatnonzero(changed & (where >= 0))
        self.main.remove_all(np.sort(where[leaving]))
        where[leaving] = -1
        self._stand(where)
        coming = np.flatnonzero(changed & (there >= 0))
        for first, last in self._chunks(len(coming)):
            self._put(coming[first:last], there[coming[first:last]])

    def _put(self, tokens: Indices, targets: Indices) -> None:
        """One state call: rows into a spare sequence, whose cells then become the main one's."""
        built = rows.build(self.form, targets)
        self.store.copy(tokens, built.keys, built.values)
        if self._rotation is not None:
            shifts = targets - self.store.positions[tokens]
            self._rotation.turn(self.form.keys(built.keys), shifts[:, None])
        try:
            rows.put(self.reader.context, built, SPARE)
            self.spare.share_with(self.main)
        finally:
            self.spare.remove()
        where = self.position_of
        where[tokens] = targets
        self._stand(where)
        self.state_calls += 1

    def _chunks(self, count: int) -> Iterator[tuple[int, int]]:
        """Even chunks of at most as many tokens as one state call should move."""
        calls = -(-count // self.form.per_call)
        for call in range(calls):
            yield count * call // calls, count * (call + 1) // calls
