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
from typing import Any

import numpy as np
from numpy.typing import NDArray

from laserkv_gguf import policies
from laserkv_gguf.budget import Block, Budget
from laserkv_gguf.engine import Asked, Drafts, Reader, Reading
from laserkv_gguf.errors import UserError
from laserkv_gguf.llama import output, rope, rows, stored
from laserkv_gguf.llama.chat import Prompt
from laserkv_gguf.llama.sequence import MAIN, SPARE, Sequence
from laserkv_gguf.policies import Candidates, Held, Policy, checked
from laserkv_gguf.store import DiskStore, Store

WHERE = ("off", "ram", "disk")
MODES = ("replay", "shortlist")
SHARES = ("all", "block")

_AT_ONCE = 512  # tokens signed at a time, so that they stay in the processor's cache

Tokens = NDArray[np.int64]


@dataclass(frozen=True)
class RecallSettings:
    """How evicted tokens come back.

    Attributes:
        where: "ram" or "disk" to park rows in, "off" for no recall.
        mode: "replay" or "shortlist"; None for the policy's own way.
        file: of "disk"; None for one of our own.
        bits: of a token's signature per layer and kv head, a multiple of 64.
        shortlist: tokens looked at exactly, in multiples of what is chosen.
        share: whether all tokens of the document compete for all room ("all"), or those of each
            block for its own ("block").
        first: the policy a document is read with before there is a question.
    """

    where: str = "off"
    mode: str | None = None
    file: str | None = None
    bits: int = 128
    shortlist: float = 2.0
    share: str = "all"
    first: str = "keydiff"

    def check(self) -> None:
        """Refuses unusable values.

        Raises:
            UserError: with the remedy in one line.
        """
        if self.where not in WHERE:
            raise UserError(f"--recall {self.where} is unknown; use {', '.join(WHERE)}")
        if self.mode is not None and self.mode not in MODES:
            raise UserError(f"--recall-mode {self.mode} is unknown; use {' or '.join(MODES)}")
        if self.file is not None and self.where != "disk":
            raise UserError("--recall-file is where --recall disk parks rows; give that too")
        if self.bits < 64 or self.bits % 64:
            raise UserError(f"recall_bits is {self.bits}; give a multiple of 64")
        if not self.shortlist >= 1:
            raise UserError(f"recall_shortlist is {self.shortlist:g}; give 1 or more")
        if self.share not in SHARES:
            raise UserError(f"recall_share is {self.share!r}; give {' or '.join(SHARES)}")

    def check_policy(self, policy: Policy) -> None:
        """Refuses policies that recall cannot serve, and one that is nothing without it.

        Raises:
            UserError: with the remedy in one line.
        """
        needs, name = policy.needs, policy.name
        if self.where == "off":
            if needs.recall:
                raise UserError(
                    f"--policy {name} needs recall: it fetches evicted tokens for every question; "
                    "add --recall ram, or --recall disk"
                )
            return
        if policy.budget(8, 2, 0.5, 4).keeps_all:  # `full`: there will be nothing to recall
            return
        if not needs.queries:
            raise UserError(
                f"--policy {name} does not look at the question, so nothing would be recalled "
                "for it; use --policy laser, or --recall off"
            )
        if needs.values or ((needs.visible or needs.block_queries) and not policy.unit):
            raise UserError(
                f"--policy {name} needs more of a token than the keys that are parked; "
                "use --policy laser, or --recall off"
            )
        if needs.recall and self.mode == "replay":
            raise UserError(
                f"--policy {name} looks all of the document up at once; "
                "use --recall-mode shortlist, or leave it out"
            )

    def mode_for(self, policy: Policy) -> str:
        """The mode that was asked for, or the policy's own."""
        return self.mode or ("shortlist" if policy.unit else "replay")

    def votes_for(self, policy: Policy) -> bool:
        """Whether signatures find what a question needs."""
        return self.where != "off" and self.mode_for(policy) == "shortlist" and not policy.unit


class Signatures:
    """Packed signatures of all keys of a document, and votes of a question's queries by them."""

    def __init__(self, layers: int, kv_heads: int, head_dim: int, tokens: int, bits: int) -> None:
        from laserkv_gguf import kernels

        self.planes = kernels.planes(head_dim, 64, bits // 64, seed=0)
        self.centre: NDArray[np.float32] | None = None
        self.codes = np.zeros((layers, kv_heads, bits // 64, tokens), np.uint64)

    def add(self, start: int, keys: NDArray[Any]) -> None:
        """Signs keys (layers, n, kv_heads, head_dim), of the tokens from `start` on.

        They are centred (arXiv 2410.16179) on the mean key of what was signed first.
        """
        from laserkv_gguf import kernels

        if self.centre is None:
            self.centre = np.stack([layer.mean(axis=0, dtype=np.float32) for layer in keys])
        for layer, (one, centre) in enumerate(zip(keys, self.centre, strict=True)):
            for first in range(0, len(one), _AT_ONCE):
                part = np.subtract(one[first : first + _AT_ONCE], centre, dtype=np.float32)
                signed = kernels.signatures(part, self.planes, bits=64).transpose(1, 2, 0)
                at = start + first
                self.codes[layer, :, :, at : at + len(part)] = signed

    def votes(self, queries: NDArray[np.float32]) -> NDArray[np.float64]:
        """Scores (tokens,) for queries (layers, n, heads, head_dim)."""
        from laserkv_gguf import kernels
        from laserkv_gguf.kernels.hamming import hamming_votes

        layers, kv_heads = self.codes.shape[:2]
        count, heads, dim = queries.shape[1:]
        grouped = queries.reshape(layers, count, kv_heads, heads // kv_heads, dim)
        grouped = grouped.transpose(0, 2, 1, 3, 4).reshape(layers, kv_heads, -1, dim)
        return hamming_votes(kernels.signatures(grouped, self.planes, bits=64), self.codes)


def warm_up() -> None:
    """Compiles what recall needs beside a policy's own kernels."""
    signed = Signatures(1, 1, 8, 16, 64)
    signed.add(0, np.ones((1, 16, 1, 8), np.float32))
    signed.votes(np.ones((1, 2, 1, 8), np.float32))


@dataclass(frozen=True)
class Recalled:
    """What recalling for a question did.

    Attributes:
        kept: indices of the document's tokens that are in the cache now.
        moved_in, moved_out: tokens that the question before did not have, or had and lost.
        state_calls: calls into llama.cpp that put rows in.
        seconds: all of it, the probes included.
    """

    kept: Tokens
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
        most: tokens that a question may leave in the cache; below the budget's where the
            conversation needs the room.

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
        self.offset, self.most = offset, budget.kept
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
                form.layers, form.kv_heads, form.head_dim, budget.tokens, settings.bits
            )
        # norms of parked values, NaN until they are asked for
        self.norms: NDArray[np.float32] | None = None
        self.index: dict[str, NDArray[Any]] = {}
        self.units = np.empty(0, np.int64)  # first tokens of the policy's units
        self.kept: Tokens = np.empty(0, np.int64)
        self.tokens = np.empty(0, np.int32)
        self.read = self.kept  # what the reading kept, before any question
        # the position in the cache of every token of the document, -1 for those that are out
        self.where = np.full(budget.tokens, -1, np.int64)
        self.state_calls = 0

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
    def beside(self) -> int:
        """Cells that recalling needs beside the `most` tokens that it leaves."""
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
        return max(0, whole + self.budget.window - self.most)

    @property
    def least(self) -> int:
        """Anchors and window: what every question leaves."""
        first, last = self._protected
        return self.budget.tokens - (last - first)

    def _pool(self, block: Block) -> int:
        """A block's pool; its share of what there is room for, where that is less."""
        inner = self.budget.kept - self.least
        return block.pool if inner <= 0 else block.pool * (self.most - self.least) // inner

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
                queries, around = reader._block_queries(block), reader.held_with(block)
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
            self._arrange(self._final(self.read))
            self.kept = self.read

    def settle(self, reading: Reading) -> None:
        """Takes over what a reading has left in the cache.

        Compacted tokens are put anew, turned once from where they were parked, with room between
        them and the window for a block to stand in.
        """
        self.tokens, self.kept, self.read = reading.tokens, reading.kept, reading.kept
        if self._rotation is None:
            self.where[self.kept] = self.offset + self.kept
            return
        self.restore(self.kept)
        reading.next_position = self.next_position

    def restore(self, kept: Tokens) -> None:
        """Puts the given tokens into a main sequence that holds nothing from `offset` on."""
        self.main.remove(self.offset, -1)
        self.where[:] = -1
        self._arrange(self._final(kept))
        self.kept = self.read = kept

    @property
    def next_position(self) -> int:
        """Where the conversation about the document begins."""
        return int(self.where[self.budget.tokens - 1]) + 1

    @property
    def inner(self) -> tuple[int, int]:
        """Positions between anchors and window, half-open: where tokens come and go."""
        first, last = self._protected
        start = int(self.where[first - 1]) + 1 if first else self.offset
        return start, int(self.where[last])

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
                kept = self._shortlist(question, position, self.reader.context.cells - cells)
        except BaseException:
            self.go_back(before)
            raise
        self.kept = kept
        return Recalled(
            kept,
            len(np.setdiff1d(kept, before, assume_unique=True)),
            len(np.setdiff1d(before, kept, assume_unique=True)),
            self.state_calls - calls,
            time.perf_counter() - started,
        )

    def go_back(self, kept: Tokens) -> None:
        """Makes the cache what it was, wherever the work was stopped."""
        self.reader.scratch.remove()
        self.spare.remove()
        first, last = self._protected
        if last > first:
            self.main.remove(*self.inner)
            self.where[first:last] = -1
            self._arrange(self._final(kept))
        self.kept = kept

    def shrink(self) -> None:
        """Leaves `most` tokens for now: beside anchors and window keys least like the others."""
        if len(self.kept) <= self.most:
            return
        first, last = self._protected
        inside = (self.kept >= first) & (self.kept < last)
        tokens, room = self.kept[inside], self.most - self.least
        if room:
            policy = policies.make("keydiff")
            seen = Candidates(tokens, (first, last), keys=self._keys(tokens))
            tokens = tokens[checked(policy, policy.select(seen, room), seen, room)]
        kept = np.sort(np.concatenate((self.kept[~inside], tokens[:room])))
        self._arrange(self._final(kept))
        self.kept = kept

    @property
    def _protected(self) -> tuple[int, int]:
        """Tokens between the anchors and the last window: those that move."""
        anchors, budget = self.budget.anchors, self.budget
        return anchors, max(anchors, budget.tokens - budget.window)

    # the block loop over parked rows

    def _replay(
        self, question: Prompt, position: int, others: int, hidden: tuple[tuple[int, int], ...]
    ) -> Tokens:
        """The block loop of `Reader.read`, with rows that are parked in place of decoding."""
        budget, reader = self.budget, self.reader
        inside = np.zeros(budget.tokens, bool)  # what a reading for this question would hold
        memory: dict[str, Any] = {}
        drafts = Drafts()
        # room for all drafts, whatever stands there from the question before
        probing = len(question) + max(reader.lookahead, reader.reach) + others
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
                taken = others + int(np.count_nonzero(self.where >= 0))
                room = reader.context.allocated_cells - taken
                asked = reader.ask(question, position, drafts, shared=True, room=room)
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
            stored.settle(self.reader.context)
        return list(stored.keys_between(self.reader.context, MAIN, spans))

    def _candidates(
        self,
        tokens: Tokens,
        block: Block | tuple[int, int, int],
        asked: Asked,
        others: Tokens,
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

    def _norms(self, tokens: Tokens) -> NDArray[np.float32]:
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
        later = self.where >= 0
        later[: block.end] = False
        cells = int(np.count_nonzero(wanted | later)) + others
        if self._rotation is None and cells <= self.reader.context.allocated_cells:
            wanted |= later
        tokens = np.flatnonzero(wanted)
        if self._rotation is None:
            self._arrange((tokens, self.offset + tokens))
        else:
            ranks = self.offset + np.arange(len(tokens))
            window = tokens >= self._protected[1]
            ranks[window] = self.where[tokens[window]]
            self._arrange((tokens, ranks))

    def _show(self, block: Block, hidden: tuple[tuple[int, int], ...]) -> None:
        """Makes the scratch sequence what the question sees with this block."""
        scratch = self.reader.scratch
        if self._rotation is not None:
            self.main.share_with(scratch)
        else:
            window = self.offset + max(block.end, self._protected[1])
            self.main.share_with(scratch, 0, self.offset + block.end)
            self.main.share_with(scratch, window, -1)
        for start, end in hidden:
            scratch.remove(start, end)

    # shortlist

    def _shortlist(self, question: Prompt, position: int, room: int) -> Tokens:
        """Chooses among all tokens at once: with the question, then with its drafts too.

        Args:
            room: cells that are free.
        """
        first, last = self._protected
        ends = np.arange(self.budget.tokens)
        ends = ends[(ends < first) | (ends >= last)]
        kept, beside = self.kept, self._beside(position, ())
        for lookahead in (0, self.reader.lookahead) if self.reader.lookahead else (0,):
            asked = self.reader.ask(question, position, lookahead=lookahead, room=room)
            if self._rope is not None and asked.at is not None:
                self._rope.turn(asked.queries, -asked.at[:, None])
            kept = np.sort(np.concatenate((ends, self._choose(asked, ends, beside))))
            self._arrange(self._final(kept))
        return kept

    def _choose(self, asked: Asked, ends: Tokens, beside: list[NDArray[Any]]) -> Tokens:
        """As many tokens as a reading leaves between the anchors and the last window.

        A softmax over all counts the shortlist, the `ends` and what is `beside` the document.
        """
        first, last = self._protected
        room = self.most - self.least
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
            near = start + kernels.top_k(votes[start:end], round(self.settings.shortlist * part))
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

    def _whole_units(self, queries: NDArray[np.float32], room: int) -> Tokens:
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

    def _select(self, seen: Candidates, budget: int) -> Tokens:
        return seen.tokens[checked(self.policy, self.policy.select(seen, budget), seen, budget)]

    # rows

    def _keys(self, tokens: Tokens) -> NDArray[Any]:
        """Keys (layers, n, kv_heads, head_dim) as they stand in the cache, or were parked."""
        keys = self.form.keys(self.store.keys(tokens))
        if self._rotation is not None:
            here = self.where[tokens]
            shifts = np.where(here >= 0, here - self.store.positions[tokens], 0)
            keys = keys.copy()
            self._rotation.turn(keys, shifts[:, None])
        keys.flags.writeable = False
        return keys

    def _final(self, kept: Tokens) -> tuple[Tokens, Tokens]:
        """Tokens to keep and where they stand when nothing is being probed."""
        if self._rotation is None:
            return kept, self.offset + kept
        targets = np.arange(len(kept))
        window = kept >= self._protected[1]
        count = np.count_nonzero(window)
        targets[window] = self.budget.cells_to_recall(self.mode) - count + np.arange(count)
        return kept, self.offset + targets

    def _arrange(self, wanted: tuple[Tokens, Tokens]) -> None:
        """Makes the document's part of the main sequence just these tokens at these positions.

        Tokens that are there already stay untouched.
        """
        tokens, targets = wanted
        there = np.full(self.budget.tokens, -1, np.int64)
        there[tokens] = targets
        changed = there != self.where
        leaving = np.flatnonzero(changed & (self.where >= 0))
        self.main.remove_all(np.sort(self.where[leaving]))
        self.where[leaving] = -1
        coming = np.flatnonzero(changed & (there >= 0))
        for first, last in self._chunks(len(coming)):
            self._put(coming[first:last], there[coming[first:last]])

    def _put(self, tokens: Tokens, targets: Tokens) -> None:
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
        self.where[tokens] = targets
        self.state_calls += 1

    def _chunks(self, count: int) -> Iterator[tuple[int, int]]:
        """Even chunks of at most as many tokens as one state call should move."""
        calls = -(-count // self.form.per_call)
        for call in range(calls):
            yield count * call // calls, count * (call + 1) // calls
