"""A conversation without an end: what was said is compressed when it outgrows the cache.

Before a turn that would not fit, the newest question is decoded after everything that was said, in
a scratch sequence that shares the cells (step 2 of the block loop), and drafts its answer. The
policy then chooses among the turns that age now and what is kept of those before them (steps 3 to
5), by the queries of that probe and the keys as they stand in the cache, and the rest is evicted
(step 6). Nothing is decoded twice but the question, so no pause is longer than a block's prefill.
`history` says how much of what may stay.

With recall every document is read and parked by itself, and once there is room for a question it
recalls its own tokens of each in turn. The positions of a parked document are its own: what was
said after the last one moves together, documents do not move.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from laserkv_gguf import policies
from laserkv_gguf.budget import Budget
from laserkv_gguf.conversation import CONVERSATION_CELLS, Conversation, Reply
from laserkv_gguf.engine import Progress, Reader, Reading
from laserkv_gguf.errors import UserError
from laserkv_gguf.history import SHORT_ANSWER, Space, Thinning
from laserkv_gguf.ledger import DOCUMENT, SYSTEM, TURN, Ledger, Segment
from laserkv_gguf.llama import rope, stored
from laserkv_gguf.llama.chat import SEPARATOR, Prompt
from laserkv_gguf.llama.sequence import MAIN, Sequence
from laserkv_gguf.policies import Candidates, checked
from laserkv_gguf.policies.laser import Laser
from laserkv_gguf.recall import Recalled, Recaller

if TYPE_CHECKING:
    from laserkv_gguf.llama.context import Context
    from laserkv_gguf.llama.model import Tokens
    from laserkv_gguf.llama.sampler import Sampling
    from laserkv_gguf.session import LaserKV

ATTENTION = 0.25  # share of what is kept of turns that the newest question's attention chooses
LONG_QUESTION = 128  # tokens; the next question is taken to be like this one, but not longer
LEAST_BLOCK = 64  # tokens; smaller blocks than this read too badly to be worth trying


@dataclass(frozen=True)
class Document:
    """What a conversation knows about one of its documents.

    Attributes:
        tokens: how many were read; 0 where it was not read yet.
        kept: how many of them are in the cache.
    """

    name: str
    tokens: int
    kept: int


class Talk(Conversation):
    """Documents and turns that share the cells of one context, however long they grow.

    Args:
        engine: the engine; a new conversation or `ask` takes its context over.
        document: text to talk about; None for none.
        documents: several of them by name.
        system: system prompt; never compressed.
        max_tokens: of one answer.
    """

    def __init__(
        self,
        engine: LaserKV,
        *,
        document: str | None = None,
        documents: Mapping[str, str] | None = None,
        system: str | None = None,
        sampling: Sampling | None = None,
        max_tokens: int = 1024,
    ) -> None:
        super().__init__(
            engine, document=None, system=system, sampling=sampling, max_tokens=max_tokens
        )
        self.texts: dict[str, str] = {}
        given = {} if document is None else {"document": document}
        for name, text in {**given, **(documents or {})}.items():
            self.texts[name] = text
        self.thinnings = 0  # how often the conversation was compressed
        self.ledger = Ledger()
        self._turn_open: int | None = None  # the turn whose question is still to come
        self._bounds: list[tuple[str, int, int]] = []
        self._adding: str | None = None
        self._compact = False
        self._settled = True  # whether llama.cpp has turned all keys to where they stand
        self._added: dict[int, Recaller] = {}  # by the number of their document's segment
        self._sync()

    def _sync(self) -> None:
        """What the parent class calls the document: all of them."""
        self.document = "".join(self.texts.values()) or None

    # reading everything anew

    def _wanted(self, question: str | None) -> tuple[Tokens, Prompt | None, int]:
        tokens, asked, reply = super()._wanted(question)
        if self._recalls:  # room for what recalling needs beside the turns after the first, too
            reply = max(reply, self._room(len(tokens)))
        return tokens, asked, reply

    def _sequence(self, before: Tokens) -> Tokens:
        """The opening and the documents, whose places are remembered."""
        tokenize = self.engine.model.tokenize
        self._protected = len(before) if self.system else 0
        parts, end, self._bounds = [before], len(before), []
        together = list(self.texts.items())[: 1 if self._recalls else None]
        for name, text in () if self._unread else together:
            own = tokenize(text)
            if self._bounds:
                own = np.concatenate((tokenize(SEPARATOR), own))
            parts.append(own)
            self._bounds.append((name, end, end + len(own)))
            end += len(own)
        return np.concatenate(parts).astype(np.int32)

    def _read(
        self,
        tokens: Tokens,
        question: Prompt | None,
        reply: int,
        on_progress: Callable[[Progress], None] | None,
        **reserved: Any,
    ) -> Reading:
        later = [] if self._unread or not self._recalls else list(self.texts.items())[1:]
        if later:
            reserved["compact"] = self._compacts_with(later, len(tokens) + reply)
        self.ledger, self._turn_open = Ledger(), None
        reading = super()._read(tokens, question, reply, on_progress, **reserved)
        assert self._run is not None
        self.engine._warm_up_beside()
        self._compact = self._run.compact
        self._settled = not self._compact
        pools = _pools(reading.budget)
        first = self._bounds[0][1] if self._bounds else len(tokens)
        segments = [(Segment(SYSTEM, tokens[:first]), 0, first)]
        for name, start, end in self._bounds:
            segment = Segment(DOCUMENT, tokens[start:end], name, pools[start:end])
            segments.append((segment, start, end))
        position = np.arange(len(reading.kept)) if self._compact else reading.kept
        if self._recaller:
            position = self._recaller.where[reading.kept]
            if not self._bounds:  # a system prompt alone stays as it is
                super().forget_parked()
        for segment, start, end in segments:
            inside = (reading.kept >= start) & (reading.kept < end)
            number = self.ledger.new(segment)
            self.ledger.append(number, reading.kept[inside] - start, position[inside])
        try:
            for name, text in later:
                self._read_onto(name, text, on_progress)
        except BaseException:
            self.without_document()
            raise
        return reading

    def _compacts_with(self, later: list[tuple[str, str]], tokens: int) -> bool:
        """Whether positions move in a reading of several documents, one after the other.

        Raises:
            UserError: --ctx-size alone does not say how much each of them may keep.
        """
        settings, trained = self.engine.settings, self.engine.model.trained_context
        if self.engine.fills_cells:
            raise UserError(
                "with --recall and several documents --ctx-size does not say how much to keep of "
                "each; give --ratio too"
            )
        beyond = tokens + sum(len(self.engine.model.tokenize(text)) for _, text in later)
        return settings.positions == "compact" or (
            settings.positions == "auto" and 0 < trained < beyond
        )

    def save(self, path: str | Path) -> int:
        """Writes documents, turns and parked rows; see `saved_talk`. Returns the file's bytes."""
        from laserkv_gguf import saved_talk

        return saved_talk.save(self, path)

    def without_document(self) -> None:
        super().without_document()
        self.ledger, self._turn_open = Ledger(), None

    # recall

    @property
    def _recalls(self) -> bool:
        return self.engine.settings.recall != "off"

    @property
    def _parked(self) -> list[Recaller]:
        return [*super()._parked, *self._added.values()]

    @property
    def parked_by(self) -> dict[int, Recaller]:
        """What parks documents, by the numbers of their segments."""
        first = {self.ledger.numbers(DOCUMENT)[0]: self._recaller} if self._recaller else {}
        return {**first, **self._added}

    def forget_parked(self) -> None:
        super().forget_parked()
        for recaller in self._added.values():
            recaller.close()
        self._added = {}

    @property
    def _fixed(self) -> int:
        """Positions below this one do not move: they are parked documents' or stand before them."""
        return max((recaller.next_position for recaller in self._parked), default=0)

    @property
    def _beside(self) -> int:
        """Cells that recalling needs while it goes through one document after the other."""
        if not self._parked:
            return 0
        _, drafts, _ = self.engine._probe.completed(self.engine.policy.needs)
        return max(recaller.beside for recaller in self._parked) + drafts

    def _read_for(self, question: str, on_progress: Callable[[Progress], None] | None) -> Prompt:
        # where each document is read by itself, a question recalls of each in turn
        alone = not self._recalls or len(self.texts) < 2
        self._read(*self._wanted(question if alone else None), on_progress)
        asked = self._opening(question).after
        if alone:
            self._make_room(asked)
        else:
            self._recall(asked)
        return asked

    def _recall(self, asked: Prompt) -> None:
        """Makes room for a question, and then recalls its tokens of one document after the other.

        Whatever goes wrong, all documents' tokens in the cache are those of the question before.
        """
        self._recalled = None
        self._make_room(asked)
        parked = self._parked
        if not parked:
            return
        self._settle()
        prompt = np.concatenate((np.array(self._pending, np.int32), asked.tokens))
        before = [recaller.kept for recaller in parked]
        done: list[Recalled] = []
        try:
            for number, recaller in enumerate(parked):
                hidden = [other.inner for other in parked[number + 1 :]]
                now = sum(len(r.kept) - len(kept) for r, kept in zip(parked, before, strict=True))
                done.append(
                    recaller.recall(
                        Prompt(prompt, asked.ending), self._position, self._used + now, hidden
                    )
                )
        except BaseException:
            for recaller, kept in zip(parked, before, strict=True):
                if recaller.kept is not kept:
                    recaller.go_back(kept)
            raise
        finally:
            with _uninterrupted():
                self._take_over()
        starts = np.cumsum([0, *(recaller.budget.tokens for recaller in parked)])
        self._recalled = Recalled(
            np.concatenate([one.kept + start for one, start in zip(done, starts, strict=False)]),
            sum(one.moved_in for one in done),
            sum(one.moved_out for one in done),
            sum(one.state_calls for one in done),
            sum(one.seconds for one in done),
        )

    def _take_over(self) -> None:
        """Enters into the ledger where recalled tokens stand."""
        assert self.reading is not None
        for number, recaller in self.parked_by.items():
            count = len(self.ledger.segments[number].tokens)
            kept = np.flatnonzero(recaller.where >= 0)
            head = recaller.budget.tokens - count  # what opens the turn, before the first document
            if head:
                system = kept[kept < head]
                self.ledger.put(self.ledger.numbers(SYSTEM)[0], system, recaller.where[system])
            own = kept[kept >= head]
            self.ledger.put(number, own - head, recaller.where[own])
            recaller.kept = kept
        if self._recaller:
            self.reading.kept = self._recaller.kept
        self._place()

    # turns

    def _prompt(self, question: str) -> Prompt:
        if self.turns == 0 and self._turn_open is None:
            template, documents = self.engine.template, self.ledger.numbers(DOCUMENT)
            return template.opening(question, system=self.system, document=bool(documents)).after
        around = self.engine.template.next_turn("", system=self.system)
        if self._turn_open is None:
            return self.engine.template.next_turn(question, system=self.system)
        asked = self.engine.model.tokenize(SEPARATOR + question)
        ending = around.tokens[len(around) - around.ending :]
        return Prompt(np.concatenate((asked, ending)).astype(np.int32), around.ending)

    def _answer(self, asked: Prompt, reply: Reply, started: float) -> Iterator[str]:
        start, prompt = self._position, [*self._pending, *asked.tokens]
        yield from super()._answer(asked, reply, started)
        self._settled = True
        said = reply.tokens[: len(reply.tokens) - len(self._pending)]
        number = self._turn_open
        if number is None:
            number = self.ledger.new(Segment(TURN, np.empty(0, np.int32)))
        self.ledger.extend(number, np.array([*prompt, *said], np.int32), start)
        self._turn_open = None

    def _fill(self, reply: Reply, prompt: int, started: float, first: float, followed: int) -> None:
        super()._fill(reply, prompt, started, first, followed)
        ledger = self.ledger
        documents = [n for n in ledger.segments if ledger.segments[n].kind != TURN]
        read = sum(len(ledger.segments[n].tokens) for n in documents)
        kept = sum(ledger.count(n) for n in documents)
        whole = ledger.tokens_read + prompt + len(reply.tokens) - len(self._pending)
        reply.account = replace(
            reply.account,
            document_tokens=read,
            kept_tokens=kept,
            kept_fraction=kept / max(read, 1),
            ctx_cells=self._context.cells,
            full_kv_bytes=whole * self.engine.cell_bytes,
            positions="compact" if self._compact else "original",
        )

    def reset(self) -> None:
        """Forgets the turns; the documents stay as they stand in the cache."""
        with self.engine._alone():
            if self._run is None or self.reading is None or not self._owns_cells:
                self._pending, self.turns, self.reading = [], 0, None
                self.ledger, self._turn_open = Ledger(), None
                return
            with _uninterrupted():
                self._remove(~self.ledger.of_kind(TURN))
                for number in self.ledger.numbers(TURN):
                    self.ledger.forget(number)
                self._pending, self.turns, self._turn_open = [], 0, None
                self._place()

    # room for the next turn

    @property
    def _context(self) -> Context:
        assert self._run is not None
        return self._run.reader.context

    @property
    def _trained(self) -> int:
        """Positions there are; 0 for any number."""
        if self.engine.settings.positions == "original":
            return 0
        return max(self.engine.model.trained_context, 0)

    @property
    def capacity(self) -> int:
        """Cells, but no more than there are positions the model was trained for.

        Where documents are parked positions are counted by themselves: not all of them can move.
        """
        cells = self._context.cells - self._beside
        return cells if self._parked or not self._trained else min(cells, self._trained)

    def _room_left(self) -> int:
        left = self._context.cells - self._used
        return min(left, self._trained - self._position) if self._trained else left

    @property
    def space(self) -> Space:
        """The cells as they are taken, with no question asked yet.

        Of parked documents what a question recalls counts, where the one before had less room.
        """
        recalled = sum(recaller.budget.kept - len(recaller.kept) for recaller in self._parked)
        return replace(
            self._turns_from(0),
            capacity=self.capacity,
            system=int(self.ledger.of_kind(SYSTEM).sum()),
            documents=int(self.ledger.of_kind(DOCUMENT).sum()) + recalled,
        )

    def _turns_from(self, start: int) -> Space:
        """The turns' rows from a position on."""
        ledger, turns = self.ledger, self.ledger.numbers(TURN)
        after = ledger.segment[ledger.position >= start]
        rows = {n: int((after == n).sum()) for n in turns}
        aged = sum(rows[n] for n in turns if not ledger.segments[n].whole)
        whole = tuple(rows[n] for n in turns if ledger.segments[n].whole)
        return Space(0, 0, 0, aged, whole, 0, self.max_tokens)

    def _make_room(self, asked: Prompt) -> None:
        """Compresses the conversation where the question and its answer would not fit.

        Raises:
            UserError: they never would, or the policy keeps everything.
        """
        prompt = len(self._pending) + len(asked)
        _, drafts, _ = self.engine._probe.completed(self.engine.policy.needs)
        ahead = min(prompt, LONG_QUESTION) + drafts
        self._compress(self._shared(replace(self.space, prompt=prompt, ahead=ahead)), asked, 0)
        if self._parked and self._trained:
            left, start = self._trained - self._fixed, self._fixed
            if left < prompt + drafts + 2:
                raise UserError(
                    f"a question of {prompt} tokens does not fit after the documents, which take "
                    f"{start} of the {self._trained} positions this model was trained for; "
                    "shorten it, or /drop the last document"
                )
            space = replace(
                self._turns_from(start), capacity=left, prompt=prompt + drafts, ahead=ahead
            )
            self._compress(space.thinning(), asked, start)
        self._move_down(prompt + self.max_tokens)

    def _shared(self, space: Space) -> Thinning | None:
        """What must be thinned; how much every parked document may recall is set along the way.

        Raises:
            UserError: the question does not fit beside anchors and windows.
        """
        for recaller in self._parked:
            recaller.most = recaller.budget.kept
        while True:
            beside = self._beside
            thinning = replace(space, capacity=self.capacity).thinning()
            if thinning is None or thinning.documents is None:
                return thinning
            for recaller in self._parked:
                fewer = (space.documents - thinning.documents) * recaller.budget.kept
                recaller.most = recaller.budget.kept - -(-fewer // max(space.documents, 1))
                if recaller.most < recaller.least:
                    raise UserError(
                        f"a question of {space.prompt} tokens does not fit beside what is always "
                        f"kept of the documents into {self._context.cells} cells; shorten it, "
                        "/drop a document, or use a larger --ctx-size"
                    )
            if self._beside <= beside:
                return thinning

    def _compress(self, thinning: Thinning | None, asked: Prompt, start: int) -> None:
        """Thins what stands from a position on."""
        if thinning is None:
            return
        policy = self._policy()
        turns = self.ledger.numbers(TURN)
        whole = [n for n in turns if self.ledger.segments[n].whole]
        aged = [n for n in turns if n not in whole[thinning.turns :]]
        choices = [(aged, thinning.keep)]
        if thinning.documents is not None:
            recalled = sum(recaller.most for recaller in self._parked)
            choices.append((self._unparked, max(thinning.documents - recalled, 0)))
            self._shrink()
        queries = None
        if policy.needs.queries:
            numbers = [n for some, _ in choices for n in some]
            queries = self._asked(policy, asked, numbers, start)
            policy = policy if queries is not None else policies.make("keydiff")
        self._thin(policy, choices, queries, start)
        self.thinnings += 1
        for number in aged:
            self.ledger.segments[number].whole = False

    @property
    def _unparked(self) -> list[int]:
        """Documents that are thinned like turns: what goes of them does not come back."""
        documents = self.ledger.numbers(DOCUMENT)
        return [n for n in documents[bool(self._recaller) :] if n not in self._added]

    def _shrink(self) -> None:
        """Frees cells that parked documents may not have for this question."""
        if self._parked:
            try:
                for recaller in self._parked:
                    recaller.shrink()
            finally:
                with _uninterrupted():
                    self._take_over()

    def _asked(
        self, policy: policies.Policy, asked: Prompt, numbers: list[int], start: int
    ) -> NDArray[np.float32] | None:
        """The queries of the question and its drafts; None where it has no room to be asked.

        Where an answer has just filled the cache, room is made first, by the keys alone.
        """
        asker = Reader(self._context, policy, self.engine._probe)
        prompt = np.concatenate((self._pending, asked.tokens)).astype(np.int32)
        wanted = len(prompt) + asker.lookahead
        self._free(wanted - self._left(start), numbers, start)
        asker.lookahead = min(asker.lookahead, self._left(start) - len(prompt))
        if asker.lookahead < 0:
            return None
        self._move_down(wanted)
        queries = asker.ask(Prompt(prompt, asked.ending), self._position)
        self._settled = True
        return queries

    def _left(self, start: int) -> int:
        """Cells that are left; from a position on, positions too."""
        left = self.capacity - self._used
        if not start:
            return left
        return min(left, self._trained - start - int((self.ledger.position >= start).sum()))

    def _free(self, count: int, numbers: list[int], start: int = 0) -> None:
        """Frees so many rows of some segments without a question: the keys most like the others."""
        ledger = self.ledger
        rows = int((ledger.of(numbers) & (ledger.position >= start)).sum())
        if count > 0 and rows:
            self._thin(policies.make("keydiff"), [(numbers, max(rows - count, 0))], None, start)

    def _thin(
        self,
        policy: policies.Policy,
        choices: list[tuple[list[int], int]],
        queries: NDArray[np.float32] | None,
        start: int = 0,
    ) -> None:
        """Evicts what the policy does not choose.

        Args:
            choices: segments, and how many of their rows may stay together.
            start: only rows from this position on count, and go.
        """
        ledger, stays = self.ledger, np.ones(len(self.ledger), bool)
        for numbers, keep in choices:
            rows = np.flatnonzero(ledger.of(numbers) & (ledger.position >= start))
            # a batch must start right after the last token of the sequence, which stays
            if len(rows) and rows[-1] == len(ledger) - 1:
                rows, keep = rows[:-1], keep - 1
            if keep < len(rows):
                stays[rows] = False
                stays[self._chosen(policy, rows, max(keep, 0), queries)] = True
        if stays.all():
            return
        with _uninterrupted():
            self._remove(stays)

    def _chosen(
        self,
        policy: policies.Policy,
        rows: NDArray[np.int64],
        keep: int,
        queries: NDArray[np.float32] | None,
    ) -> NDArray[np.int64]:
        if keep == 0:
            return rows[:0]
        views: dict[str, Any] = {}
        needs = policy.needs
        wanted = {"keys": needs.host_keys, "values": needs.values}
        if any(wanted.values()):
            self._settle()
            found = stored.read(self._context, MAIN, self.ledger.position[rows])
            for kind in (kind for kind, is_wanted in wanted.items() if is_wanted):
                view = getattr(found, kind)
                views[kind] = view.astype(np.float32) if needs.precise else view
        block = (int(rows[0]), int(rows[-1]) + 1)
        candidates = Candidates(rows, block, self.thinnings, queries, **views)
        return rows[checked(policy, policy.select(candidates, keep), candidates, keep)]

    def _policy(self) -> policies.Policy:
        """The run's own policy, or `laser` where that must see a block while it is decoded.

        What the newest question does not attend to may be what a later one asks for: most of
        `laser`'s pool goes to keys least like the others here, instead of to what attracts this
        question.

        Raises:
            UserError: the run keeps everything.
        """
        policy = self.engine.policy
        if policy.budget(2, 1, 0.5, 4).keeps_all:
            raise UserError(
                f"the conversation has filled the context of {self._context.cells} cells, and "
                f"--policy {self.engine.settings.policy} keeps everything; use /reset, a larger "
                "--ctx-size, or --policy laser"
            )
        if policy.needs.block_queries:
            policy = replace(self.engine.settings, policy="laser").make_policy(self.engine.seed)
        if not isinstance(policy, Laser) or policy.name != "laser":
            return policy
        alpha = self.engine.settings.alpha
        return replace(policy, alpha=ATTENTION if alpha is None else alpha, residual="keydiff")

    # where tokens stand

    def _remove(self, stays: NDArray[np.bool_]) -> None:
        """Frees the cells of all other rows."""
        Sequence(self._context, MAIN).remove_all(self.ledger.position[~stays])
        self.ledger.keep(stays)
        self._place()

    def _place(self) -> None:
        self._position, self._used = self.ledger.next_position, len(self.ledger)

    def _move_down(self, room: int, *, always: bool = False) -> None:
        """Moves all tokens together where so many more would pass the trained context.

        Parked documents stay where they are, and with them what stands before the last of them.

        Raises:
            UserError: llama.cpp cannot move them.
        """
        trained, wanted = self.engine.model.trained_context, self.engine.settings.positions
        beyond = wanted == "auto" and 0 < trained < self._position + room
        if not (always or beyond or wanted == "compact" or self._compact):
            return
        start = self._fixed
        rows = self.ledger.position >= start
        moved = start + np.arange(int(rows.sum()))
        if np.array_equal(self.ledger.position[rows], moved):  # there are no gaps
            return
        rope.check(self.engine.model, self.engine.options)
        with _uninterrupted():
            Sequence(self._context, MAIN).compact(self.ledger.position[rows], start)
            self.ledger.position[rows] = moved
            self._settled = False
            self._place()

    def _settle(self) -> None:
        """Lets llama.cpp turn keys that were moved."""
        if self._settled:
            return
        stored.settle(self._context)
        self._settled = True

    # documents

    @property
    def documents(self) -> list[Document]:
        """The documents in the order they were added."""
        numbers = {self.ledger.segments[n].name: n for n in self.ledger.numbers(DOCUMENT)}
        found = []
        for name in self.texts:
            if name in numbers:
                number = numbers[name]
                tokens = len(self.ledger.segments[number].tokens)
                found.append(Document(name, tokens, self.ledger.count(number)))
            else:
                found.append(Document(name, 0, 0))
        return found

    def add(
        self, name: str, text: str, on_progress: Callable[[Progress], None] | None = None
    ) -> Document:
        """Reads one more document, block by block, after what was said so far.

        The next question is asked about it. Every block asks for itself, for that question is not
        known yet.

        Raises:
            UserError: it does not fit, or one of this name is here already.
            Cancelled, KeyboardInterrupt: it was stopped, or dropped; nothing of it stays.
        """
        if name in self.texts:
            raise UserError(f"there is a document {name} already; /drop it first")
        with self.engine._alone():
            if self.reading is None:
                self._unread = True  # what was stopped before waits for read()
                self._read_unasked()
            self._check_owner()
            self._adding = name
            try:
                self._read_onto(name, text, on_progress)
            finally:
                self._adding = None
            self.texts[name] = text
            self._sync()
        return self.documents[-1]

    def _read_onto(
        self, name: str, text: str, on_progress: Callable[[Progress], None] | None
    ) -> None:
        tokenize, opens = self.engine.model.tokenize, self._turn_open is None and self.turns > 0
        glue = np.array(self._pending, np.int32)
        if opens:
            around = self.engine.template.next_turn("", system=self.system)
            glue = np.concatenate((glue, around.tokens[: len(around) - around.ending]))
        tokens = tokenize(text)
        if not opens and self._documents_in_turn():
            tokens = np.concatenate((tokenize(SEPARATOR), tokens))
        budget, cells, compact = self._planned(name, len(tokens), len(glue))
        self._grow(cells)
        if compact:
            self._move_down(len(glue) + len(tokens), always=True)
        assert self._run is not None
        reader = self.engine._reader_for(self._context.cells, compact)
        run = replace(self._run, budget=budget, reader=reader, compact=compact)
        before, start = self._position, self._position + len(glue)
        recaller, park = None, None
        try:
            if len(glue):
                self._context.decode(glue.astype(np.int32), before, MAIN)
            recaller = self.engine.recaller(run, start, self.ledger.next_number + opens)
            if recaller:
                reader = self.engine.first_reader(run)
                park = partial(recaller.park, reader=reader)
            reading = reader.read(tokens, budget, on_progress=on_progress, start=start, park=park)
            if recaller:
                recaller.settle(reading)
        except BaseException:
            if recaller:
                recaller.close()
            if self._owns_cells:
                self._context.resume()
                Sequence(self._context, MAIN).remove(before, -1)
            raise
        with _uninterrupted():
            if self._pending:
                self.ledger.extend(self.ledger.numbers(TURN)[-1], glue[:1], before)
            if opens:
                first = len(self._pending)
                self._turn_open = self.ledger.new(Segment(TURN, np.empty(0, np.int32)))
                self.ledger.extend(self._turn_open, glue[first:], before + first)
            number = self.ledger.new(Segment(DOCUMENT, tokens, name, _pools(budget)))
            position = start + (np.arange(len(reading.kept)) if compact else reading.kept)
            if recaller:
                self._added[number], position = recaller, recaller.where[reading.kept]
            self.ledger.append(number, reading.kept, position)
            self._pending, self._compact = [], self._compact or compact
            self._settled = not compact  # the last block's eviction may have moved tokens
            self._place()

    def _documents_in_turn(self) -> bool:
        """Whether a document stands in the turn whose question is still to come."""
        first = -1 if self._turn_open is None else self._turn_open
        return any(number > first for number in self.ledger.numbers(DOCUMENT))

    def _planned(self, name: str, tokens: int, glue: int) -> tuple[Budget, int, bool]:
        """Budget, cells and whether positions move, for one more document.

        Where the cells are given, smaller blocks are tried before history must make room.
        """
        settings, trained = self.engine.settings, self.engine.model.trained_context
        beyond = 0 < trained < self._position + glue + tokens + self.max_tokens
        compact = settings.positions == "compact" or (settings.positions == "auto" and beyond)
        limits = [(self.engine.ctx_size, "cells")] if self.engine.ctx_size else []
        limits += [(trained - self._gaps, "positions")] if compact else []
        limit, of = min(limits, default=(None, ""))
        space = self.space
        stays = space.system + space.documents
        talk = 2 * min(self.max_tokens, SHORT_ANSWER) + SHORT_ANSWER

        def needed(budget: Budget, used: int) -> int:
            beside = max(self._beside, self.engine.recall_cells(budget))
            return max(used + glue + budget.cells(0, 0, 0), stays + budget.kept + beside + talk)

        def planned(ratio: float, used: int) -> Budget | None:
            size = settings.block_size
            while size >= min(LEAST_BLOCK, settings.block_size):
                divisor = settings.protection_divisor
                budget = self.engine.policy.budget(tokens, size, ratio, divisor)
                if limit is None or needed(budget, used) <= limit:
                    return budget
                size //= 2
            return None

        spoken = self.ledger.numbers(TURN)
        movable = self._fixed if compact else 0
        turns = self._turns_from(movable)
        history = turns.aged + sum(turns.whole)
        settings.check_keep(tokens)
        ratio = self.engine.budget(tokens).ratio if settings.keep else settings.ratio
        budget = planned(ratio, self._used)
        if budget is None:
            budget = planned(ratio, self._used - history // 2)
            if budget is not None and limit is not None:
                self._free(needed(budget, self._used) - limit, spoken, movable)
        if budget is None:
            remedy = "start with a larger --ctx-size"
            if of == "positions":  # parked documents do not move
                shorter = "--positions compact" if self._parked else "a lower --ratio"
                remedy = f"start with {shorter}"
            for thousandths in range(int(ratio * 1000), 0, -1):
                if planned(thousandths / 1000, self._used - history // 2):
                    remedy = f"/set ratio {thousandths / 1000:g} keeps less, or {remedy}"
                    break
            raise UserError(
                f"{name} ({tokens} tokens) does not fit beside what is here into {limit} {of}; "
                f"/drop a document, or {remedy}"
            )
        room = max(CONVERSATION_CELLS, 2 * self.max_tokens)
        room += max(self._beside, self.engine.recall_cells(budget))
        wanted = max(needed(budget, self._used), stays + budget.kept + room)
        return budget, wanted if limit is None else min(wanted, limit), compact

    @property
    def _gaps(self) -> int:
        """Positions without a token that cannot be closed: parked documents keep them."""
        return self._fixed - int((self.ledger.position < self._fixed).sum())

    def _grow(self, cells: int) -> None:
        """Moves what the cache holds into a larger context."""
        context = self._context
        if self.engine.ctx_size is not None or cells <= context.cells:
            return
        self._settle()
        blob, run = stored.save(context, MAIN), self._run
        assert run is not None
        before = context.cells
        try:
            reader = self.engine._reader_for(cells, run.compact)
        except UserError:
            reader = self.engine._reader_for(before, run.compact)
            raise
        finally:
            stored.restore(reader.context, MAIN, blob)
            self._run = replace(run, reader=reader, cells=reader.context.cells)
            for recaller in self._parked:
                recaller.use(reader)
            self.engine._owner = self

    def drop(self, name: str) -> None:
        """Takes a document out of the cache; one that is being read is stopped.

        Raises:
            UserError: there is no such document.
        """
        if name == self._adding:
            self.engine.cancel()
            return
        if name not in self.texts:
            raise UserError(f"there is no document {name}; /docs lists them")
        with self.engine._alone():
            del self.texts[name]
            self._sync()
            numbers = self.ledger.numbers(DOCUMENT)
            number = next((n for n in numbers if self.ledger.segments[n].name == name), None)
            if number is None or not self._owns_cells:
                return
            with _uninterrupted():
                self._forget_rows(number)
                self._remove(self.ledger.segment != number)
                self.ledger.forget(number)
                if self._turn_open is not None and not self._documents_in_turn():
                    # the turn was opened for it
                    self._remove(self.ledger.segment != self._turn_open)
                    self.ledger.forget(self._turn_open)
                    self._turn_open = None

    def _forget_rows(self, number: int) -> None:
        """Gives back what a document's parked rows take."""
        if number in self._added:
            self._added.pop(number).close()
        elif self._recaller and number == self.ledger.numbers(DOCUMENT)[0]:
            super().forget_parked()


def _pools(budget: Budget) -> NDArray[np.int8]:
    """The part of the budget every token would be kept by: anchor 0, long-term 1, window 2."""
    pools = np.ones(budget.tokens, np.int8)
    if not budget.keeps_all:
        pools[: budget.anchors] = 0
        pools[budget.tokens - budget.window :] = 2
    return pools


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Lets Ctrl-C and SIGTERM wait until cells and ledger agree again (milliseconds)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[int] = []
    before = {
        kind: signal.signal(kind, lambda number, _frame: waiting.append(number))
        for kind in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
    for number in waiting:
        signal.raise_signal(number)
