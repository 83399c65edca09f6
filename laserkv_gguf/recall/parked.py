"""A document's rows: parked on the host when a block is decoded, put back, taken out.

Rows are parked for all tokens, also for those that stay in the cache: then a row is taken out of
llama.cpp once, evicting is no copy, every key can be scored where it lies, and what a question gets
does not depend on the questions before it.

Compacted positions: keys lie turned for the position at which they were parked. They are put back
from there every time, turned once (float16 and float32 keys only), so errors never add up; but they
are not bit for bit what moving them inside llama.cpp would give.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from laserkv_gguf import policies
from laserkv_gguf.budget import Block, Budget
from laserkv_gguf.errors import UserError
from laserkv_gguf.llama import rope, rows
from laserkv_gguf.llama.sequence import SPARE, Sequence
from laserkv_gguf.planning.settings import RecallSettings
from laserkv_gguf.policies import Candidates, checked
from laserkv_gguf.reading.reader import Reader, Reading
from laserkv_gguf.recall.disk import DiskStore
from laserkv_gguf.recall.store import Indices, Store


class Rows(Protocol):
    """Where a conversation writes down which of its tokens stand where; see `Ledger`."""

    def where(self, numbers: Iterable[int]) -> Indices:
        """The positions of all tokens of some segments, -1 for those that are not there."""

    def put(self, numbers: Iterable[int], where: Indices) -> None:
        """Makes these their positions."""


class Parked:
    """A document's rows in a store, and which of them stand in the cache.

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
        state_calls: calls into llama.cpp that put rows in, so far.
        scores: (tokens,) float32, what the policy scored each token for the last question, NaN
            where it scored none.
        drafts: of the answer, as they were guessed for the last question.

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
        self.compact = reader.compact
        if self.compact and not form.exact:
            raise UserError(
                "rows of quantised keys cannot be parked with compacted positions; "
                "use -ctk f16, --positions original or --recall off"
            )
        self.budget, self.form, self.settings = budget, form, settings
        self.offset, self.limit = offset, budget.kept
        self.policy = reader.policy
        self.mode = settings.mode_for(self.policy)
        self._rotation = rope.measure(reader.context) if self.compact else None
        self.use(reader)
        quantised = reader.context.options.quantised_v
        sizes = budget.tokens, form.layers, form.key_bytes, form.value_bytes
        self.store: Store = (
            Store(*sizes, quantised=quantised)
            if settings.where == "ram"
            else DiskStore(*sizes, quantised=quantised, path=settings.file)
        )
        self.tokens = np.empty(0, np.int32)
        self.kept_by_reading: Indices = np.empty(0, np.int64)
        # until a ledger is followed
        self._position_of = np.full(budget.tokens, -1, np.int64)
        self._rows: Rows | None = None
        self._numbers: list[int] = []
        self.state_calls = 0
        self.scores = np.full(budget.tokens, np.nan, np.float32)
        self.drafts: list[int] = []

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
    def protected(self) -> int:
        """Anchors and window: what every question leaves."""
        first, last = self.movable
        return self.budget.tokens - (last - first)

    @property
    def movable(self) -> tuple[int, int]:
        """(first, last): indices between the anchors and the last window: those that move."""
        anchors, budget = self.budget.anchors, self.budget
        return anchors, max(anchors, budget.tokens - budget.window)

    # while the document is read

    def take(self, block: Block, position: int) -> None:
        """Takes a block's rows out of the main sequence, where it begins at `position`.

        Raises:
            LaserKVError: the disk is full.
        """
        for first, last in self.chunks(block.tokens):
            start, end = position + first, position + last
            positions, keys, values = rows.take_at(self.main, self.form, [(start, end)])
            if not np.array_equal(positions, np.arange(start, end)):
                raise rows.FormatError("llama.cpp's state lacks tokens that were just decoded")
            self.store.write(keys, values, positions)

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
        self.arrange(self.final(kept))
        self.kept_by_reading = kept

    @property
    def next_position(self) -> int:
        """Where the conversation about the document begins."""
        return int(self.position_of[self.budget.tokens - 1]) + 1

    @property
    def inner(self) -> tuple[int, int]:
        """Positions between anchors and window, half-open: where tokens come and go."""
        first, last = self.movable
        where = self.position_of
        start = int(where[first - 1]) + 1 if first else self.offset
        return start, int(where[last])

    # when a question comes

    def go_back(self, kept: Indices) -> None:
        """Makes the cache what it was, wherever the work was stopped."""
        self.reader.asker.scratch.remove()
        self.spare.remove()
        first, last = self.movable
        if last > first:
            self.main.remove(*self.inner)
            where = self.position_of
            where[first:last] = -1
            self._stand(where)
            self.arrange(self.final(kept))

    def shrink(self) -> None:
        """Leaves `limit` tokens for now: beside anchors and window keys least like the others."""
        kept = self.kept
        if len(kept) <= self.limit:
            return
        first, last = self.movable
        inside = (kept >= first) & (kept < last)
        tokens, room = kept[inside], self.limit - self.protected
        if room:
            policy = policies.make("keydiff")
            seen = Candidates(tokens, (first, last), keys=self.keys(tokens))
            tokens = tokens[checked(policy, policy.select(seen, room), seen, room)]
        self.arrange(self.final(np.sort(np.concatenate((kept[~inside], tokens[:room])))))

    # rows

    def keys(self, tokens: Indices) -> NDArray[Any]:
        """Keys (layers, n, kv_heads, head_dim) as they stand in the cache, or were parked."""
        keys = self.form.keys(self.store.keys(tokens))
        if self._rotation is not None:
            here = self.position_of[tokens]
            shifts = np.where(here >= 0, here - self.store.positions[tokens], 0)
            keys = keys.copy()
            self._rotation.turn(keys, shifts[:, None])
        keys.flags.writeable = False
        return keys

    def final(self, kept: Indices) -> tuple[Indices, Indices]:
        """Indices to keep and where they stand when nothing is being probed."""
        if self._rotation is None:
            return kept, self.offset + kept
        targets = np.arange(len(kept))
        window = kept >= self.movable[1]
        count = np.count_nonzero(window)
        targets[window] = self.budget.cells_to_recall(self.mode) - count + np.arange(count)
        return kept, self.offset + targets

    def arrange(self, wanted: tuple[Indices, Indices]) -> None:
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
        for first, last in self.chunks(len(coming)):
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

    def chunks(self, count: int) -> Iterator[tuple[int, int]]:
        """Even chunks of at most as many tokens as one state call should move."""
        calls = -(-count // self.form.per_call)
        for call in range(calls):
            yield count * call // calls, count * (call + 1) // calls
