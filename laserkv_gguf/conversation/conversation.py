"""Documents and the turns about them, in an engine's cells."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from laserkv_gguf.budget import Budget
from laserkv_gguf.conversation import account
from laserkv_gguf.conversation.adding import addition
from laserkv_gguf.conversation.ageing import Ageing, Refusing
from laserkv_gguf.conversation.answer import Answer
from laserkv_gguf.conversation.cells import Cells, uninterrupted
from laserkv_gguf.conversation.documents import Document, Documents, Parked
from laserkv_gguf.conversation.framing import Framing
from laserkv_gguf.conversation.generating import generate
from laserkv_gguf.conversation.generation import Generation, Reply, check_stop
from laserkv_gguf.conversation.given import check_answer, check_document
from laserkv_gguf.conversation.intake import (
    Intake,
    intake,
    moves,
    opening,
    place_rows,
    plan,
    reads_apart,
    recall_is_open,
    room,
)
from laserkv_gguf.conversation.ledger import DOCUMENT, SYSTEM, TURN, Ledger, Segment
from laserkv_gguf.conversation.looks import Looks, Watch
from laserkv_gguf.conversation.lookup import Lookup
from laserkv_gguf.conversation.parking import Parking
from laserkv_gguf.conversation.recalling import recall, share_room
from laserkv_gguf.conversation.space import Space, Thinning
from laserkv_gguf.engine.engine import Engine, Run
from laserkv_gguf.errors import UserError, check_type
from laserkv_gguf.llama.chat import Prompt
from laserkv_gguf.llama.model import Tokens
from laserkv_gguf.llama.sampler import Likelihood, Sampling, likelihood
from laserkv_gguf.policies import Policy
from laserkv_gguf.reading.reader import Progress, Reader, Reading
from laserkv_gguf.recall.recaller import Recalled, Recaller
from laserkv_gguf.timings import Timings


@dataclass
class State:
    """All that a conversation is, but for its settings: what saving writes.

    Attributes:
        ledger: what stands in the cells; `saved`: the cells as llama.cpp saves them.
        reading: of the document that was read last.
        pending: tokens that were generated but not decoded yet.
        open_turn: number of the turn whose question is still to come; None for none.
        compact: whether positions were moved together.
        without_document: whether the document is left out, because reading it was stopped.
    """

    ledger: Ledger
    saved: NDArray[np.uint8]
    budget: Budget
    pending: list[int]
    turns: int
    thinnings: int
    open_turn: int | None
    compact: bool
    without_document: bool


@dataclass(frozen=True)
class Exchange:
    """A question and its answer.

    Attributes:
        drafts: tokens of the answer that were guessed while reading, or recalling, for it.
        looks: what the answer looked at, where that was watched.
    """

    question: str
    reply: Reply
    drafts: tuple[int, ...] = ()
    looks: Looks | None = None


class Conversation:
    """Documents and turns that share the cells of one context.

    It is in one of five places:

    | place           | what is there                    | how it gets there, and on         |
    | --------------- | -------------------------------- | --------------------------------- |
    | nowhere         | nothing                          | made, or stopped; `read` or `ask` |
    | in the cache    | `cells`: its sequence and ledger | read; others may want its cells   |
    | aside in memory | ledger, and its cells as bytes   | put aside; back with the next ask |
    | aside on disk   | ledger, and its cells in a file  | as above, beyond the limit        |
    | lost            | texts alone                      | nothing is put aside; `read`      |

    Args:
        engine: the engine.
        document: a text to talk about, or its int32 token ids; None for none.
        documents: several of them by name.
        system: system prompt, which is never compressed; None for none.
        sampling: of the answers; None for greedy.
        max_tokens: of one answer, at least 1.
        stop: an answer ends in front of the first of these strings.
        framing: the chat template around texts, or none.
        ageing: how room is made for turns that do not fit; by default none is, and the conversation
            ends when the cells are full.
        one_turn: whether no cells are kept for turns after the first.
        recall: where rows are parked, whatever the settings say; None for what they say.

    Attributes:
        parks: where rows of what is read go: "ram", "disk" or "off".
        turns: answered so far.
        thinnings: how often turns were compressed.
        recalled: what was moved for the last question; None for nothing.
        last: the last question with its answer; None before there was one.
        watches: whether it is recorded what answers look at, for `last`. Off unless it is set: it
            takes a look at every token's queries, and at all keys at the end.

    Raises:
        UserError: max_tokens below 1, an empty stop string.
        Closed: the engine is closed.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        document: str | Tokens | None = None,
        documents: Mapping[str, str | Tokens] | None = None,
        system: str | None = None,
        sampling: Sampling | None = None,
        max_tokens: int = 1024,
        stop: Sequence[str] = (),
        framing: Framing | None = None,
        ageing: Ageing | None = None,
        one_turn: bool = False,
        recall: str | None = None,
    ) -> None:
        check_answer(system, max_tokens)
        for name, text in {"document": document, **(documents or {})}.items():
            if text is not None:
                check_document(name, text)
        if max_tokens < 1:
            raise UserError(f"-n {max_tokens}: give at least 1 token for the answer")
        engine.access.check()
        self.engine, self.system, self.max_tokens = engine, system, max_tokens
        self.sampling = sampling or Sampling(seed=engine.seed)
        self.stop = check_stop(stop)
        self.framing, self.ageing = framing or Framing(), ageing or Refusing()
        self.one_turn, self.recall_given = one_turn, recall
        self.parks = recall or engine.demand.recall
        given = {} if document is None else {"document": document}
        self.sources = Documents({**given, **(documents or {})})
        self.turns = self.thinnings = 0
        self.pending: list[int] = []  # generated, but not decoded yet
        self.recalled: Recalled | None = None
        self._run: Run | None = None
        self._read_last: Reading | None = None
        self._read_parts: dict[int, int] = {}  # segments it covered, and where each begins in it
        self._cells: Cells | None = None
        self._ledger = Ledger()
        self._open_turn: int | None = None  # the turn whose question is still to come
        self._compact = False
        self._adding: str | None = None
        self.last: Exchange | None = None
        self.watches = False
        self._drafts: list[int] = []

    # what it is made of

    @property
    def texts(self) -> dict[str, str | Tokens]:
        """The documents' texts by name, in the order they were added."""
        return self.sources.texts

    @property
    def documents(self) -> list[Document]:
        """What became of each document, in the order they were added."""
        return self.sources.listed(self.ledger)

    @property
    def ledger(self) -> Ledger:
        """What stands in the cells."""
        return self._ledger

    @property
    def cells(self) -> Cells:
        """The cells, where something has been read."""
        assert self._cells is not None
        return self._cells

    @property
    def run(self) -> Run:
        """What the last reading was planned for."""
        assert self._run is not None
        return self._run

    @property
    def reading(self) -> Reading | None:
        """The last reading, with what is in the cache of it now; None before there was one."""
        if self._read_last is None:
            return None
        kept = [start + self.ledger.kept(number) for number, start in self._read_parts.items()]
        return replace(self._read_last, kept=np.concatenate(kept))

    @property
    def cells_used(self) -> int:
        """Cells of the cache that are taken."""
        return len(self.ledger)

    @property
    def parked_tokens(self) -> int:
        """Tokens whose rows are parked."""
        return self.sources.parked_tokens

    @property
    def parked_bytes(self) -> int:
        """What parked rows take, with what finds them."""
        return self.sources.parked_bytes

    @property
    def drafts(self) -> int:
        """Lookahead tokens that a question drafts."""
        return self.engine.drafts

    # reading

    def read(
        self,
        on_progress: Callable[[Progress], None] | None = None,
        *,
        question: str | None = None,
        asks: Callable[[], str | None] | None = None,
        keep_all_cells: bool = False,
    ) -> Reading:
        """Reads the documents, with a question in mind if one is given.

        Without one `read_policy` chooses. The next `ask` starts the conversation anew.

        Args:
            on_progress: called after every micro-batch.
            question: what the next turn will ask.
            asks: called with every block where no question is known: from the first one that it
                returns, the rest is read with that question in mind.
            keep_all_cells: of a one-shot policy, so that it can `choose_again`.

        Raises:
            UserError, Cancelled, KeyboardInterrupt: nothing of the documents stays in the cache.
        """
        self.sources.left_out = False
        with self.engine.access.inside(self):
            self._read(
                intake(self, question), on_progress, keep_all_cells=keep_all_cells, asks=asks
            )
            reading = self.reading
            assert reading is not None
            return reading

    def read_for_many(
        self,
        asked: Prompt | None,
        reply: int,
        on_progress: Callable[[Progress], None] | None,
        *,
        extra_cells: int,
    ) -> Reading:
        """As `read`, for a caller that has the engine and counts cells itself.

        Args:
            asked: the question that asks while the document is read; None where there are several.
            reply: cells for what follows the document.
            extra_cells: for answers to other questions, generated at the same time.
        """
        wanted = replace(intake(self, ""), asked=asked, reply=reply)
        self._read(wanted, on_progress, extra_cells=extra_cells)
        assert self._read_last is not None
        return self._read_last

    def check(self, question: str | None = None) -> Budget:
        """Refuses what `read` would refuse, without reading; returns what it would keep to."""
        return plan(self, intake(self, question))

    def choose_again(self, ratio: float) -> bool:
        """Goes on as if the document had just been read at another ratio.

        Returns:
            Whether that could be done: only with a one-shot policy, after
            `read(keep_all_cells=True)`.
        """
        with self.engine.access.inside(self):
            reading = self._read_last
            if reading is None or not self.owns_cells or not self.run.reader.holds_all:
                return False
            settings = replace(self.engine.settings, ratio=ratio, keep=None)
            settings.check()
            self.engine.settings = settings
            budget = self.engine.budget(len(reading.tokens), reading.budget.protected)
            self._read_last = self.run.reader.choose_again(budget)
            self._run = replace(self.run, budget=budget)
            self.turns, self.pending = 0, []
            for number in self.ledger.numbers(TURN):
                self.ledger.forget(number)
            where = self._read_last.where(self._compact)
            self.ledger.put(self.ledger.numbers(SYSTEM, DOCUMENT), where)
            for number, start in self._read_parts.items():
                segment = self.ledger.segments[number]
                segment.scores = self._read_last.scores[start : start + len(segment.tokens)]
            return True

    def to_read(self, question: str | None = None) -> tuple[Tokens, Prompt | None, int]:
        """What `read` would read: all before the question, the question, and cells after it."""
        wanted = intake(self, question)
        return wanted.tokens, wanted.asked, wanted.reply

    def room_after(self, budget: Budget) -> int:
        """Cells for turns after a document that was read before."""
        return room(self, budget.tokens, budget.protected, budget)

    def _forget(self) -> None:
        """Nothing has been read or said."""
        self._read_last, self._cells, self._ledger = None, None, Ledger()
        self._read_parts = {}
        self.turns, self.pending, self.recalled, self._open_turn = 0, [], None, None
        self.last = None
        self.sources.forget_parked()

    def _read(
        self,
        wanted: Intake,
        on_progress: Callable[[Progress], None] | None,
        *,
        extra_cells: int = 0,
        keep_all_cells: bool = False,
        asks: Callable[[], str | None] | None = None,
    ) -> None:
        engine, tokens, question, reply = self.engine, wanted.tokens, wanted.asked, wanted.reply
        later = list(self.sources.to_read.items())[len(wanted.segments) - 1 :]
        compact = None
        if later:
            compact = moves(self, [text for _, text in later], len(tokens) + reply)
        self._forget()
        engine.leave(self)
        run = engine.prepare(
            self,
            len(tokens),
            0 if question is None else max(len(question), len(question.probing)),
            reply,
            question_known=question is not None,
            extra_cells=extra_cells,
            protected=wanted.protected,
            keep_all_cells=keep_all_cells,
            compact=compact,
            recall=self.parks,
        )
        fits = run.reader.context.cells >= len(tokens) + reply
        parking = Parking(None)
        try:
            run.reader.forget()
            if self.ageing.endless or self.watches:
                # while cells are free to try it: rows will be read later
                engine.try_row_format(run.reader)
            parking.recaller = recaller = engine.recaller(run, recall=self.parks)
            place = self.parks if recaller else "off"
            asks, unasked = self._hearing(place, None if question else asks)
            known = question is not None or asks is not None
            reader = run.reader if known else engine.reader_without_question(run, place)
            parking.reader, parking.may_end = reader, recall_is_open(self)
            reading = reader.read(
                tokens,
                run.budget,
                None if question is None else question.probing,
                on_progress=on_progress,
                keep_all_cells=keep_all_cells and reader is run.reader and not recaller and fits,
                park=parking if recaller else None,
                asks=self._prompts(asks, lambda question: opening(self, question).after),
                unasked=unasked,
            )
            recaller = parking.recaller
            if recaller:
                recaller.settle(reading)
        except BaseException:
            parking.close()
            engine.leave(self)
            raise
        self._run, self._compact = run, run.compact
        if not later and not run.reader.holds_all:
            engine.give_back(
                self, run.budget.kept + engine.recall_cells(run.budget) + reply + extra_cells
            )
        self._enter(wanted.segments, reading, recaller)
        if self.ageing.endless:
            engine.warm_up_beside()
        try:
            for name, text in later:
                self._read_onto(name, text, on_progress, asks)
        except BaseException:
            self.without_document()
            raise

    def _hearing(
        self, recall: str, asks: Callable[[], str | None] | None
    ) -> tuple[Callable[[], str | None] | None, Policy | None]:
        """What may bring a question while a document is read, and the policy until it does."""
        if asks is None:
            return None, None
        hears, policy = self.engine.hears(recall)
        return (asks, policy) if hears else (None, None)

    def _prompts(
        self, asks: Callable[[], str | None] | None, render: Callable[[str], Prompt]
    ) -> Callable[[], Prompt | None] | None:
        """The same with the template around what is asked; a question is rendered once."""
        rendered: dict[str, Prompt] = {}

        def prompt() -> Prompt | None:
            question = asks() if asks else None
            if question is None:
                return None
            if question not in rendered:
                rendered[question] = render(question)
            return rendered[question]

        return prompt if asks else None

    def _enter(self, segments: list[Segment], reading: Reading, recaller: Recaller | None) -> None:
        """Writes down what a reading from an empty cache has left."""
        ledger = self._ledger
        pools, start = reading.all_pools, 0
        for segment in segments:
            end = start + len(segment.tokens)
            if segment.kind == DOCUMENT:
                segment.pools = pools[start:end]
            segment.scores = reading.scores[start:end]
            firsts = [block.start for block in reading.budget.blocks if block.end > start]
            segment.blocks = np.array([max(first - start, 0) for first in firsts if first < end])
            self._read_parts[ledger.new(segment)] = start
            start = end
        self._read_last, self._drafts = reading, reading.drafts
        where = recaller.position_of if recaller else reading.where(self._compact)
        ledger.put(ledger.segments, where)
        run = self.run
        self._cells = Cells(run.reader.context, run.reader.main.number, run.reader.limit, ledger)
        self._cells.settled = not self._compact
        if recaller and len(segments) > 1:
            recaller.follow(ledger, list(ledger.segments))
            self.sources.parked.append(Parked(tuple(ledger.segments), recaller))
        elif recaller:  # a system prompt alone stays as it is
            recaller.close()

    def without_document(self) -> None:
        """Goes on without the documents until `read` is called; nothing of them is in the cache."""
        self._forget()
        self.engine.leave(self)
        self.sources.left_out = True

    # turns

    def begin(
        self, question: str, *, on_progress: Callable[[Progress], None] | None = None
    ) -> Answer:
        """The first turn: reads with the question in mind and answers it.

        Raises:
            UserError: the question is no text.
        """
        check_type("question", question, str)
        return Answer(
            self.engine.access, lambda reply: self._first_turn(question, reply, on_progress), self
        )

    def _first_turn(
        self, question: str, reply: Reply, on_progress: Callable[[Progress], None] | None
    ) -> Generator[str, None, None]:
        started = time.perf_counter()
        self.sources.left_out = False
        # where each document is read by itself, a question recalls of each in turn
        wanted = intake(self, question)
        asked = wanted.asked
        assert asked is not None
        apart = reads_apart(self) and len(self.texts) > 1
        self._read(replace(wanted, asked=None) if apart else wanted, on_progress)
        if apart:
            self._recall(asked)
        else:
            self.ageing.make_room(self, asked)
        yield from self._answer(question, asked, reply, started)

    def ask(self, question: str) -> Answer:
        """The next turn. An answer that is stopped half-way is dropped with its question.

        Raises:
            UserError: the context is full, or the conversation's cells are lost.
            Cancelled: `LaserKV.cancel` was called. Both while the answer is iterated over.
        """
        check_type("question", question, str)
        return Answer(self.engine.access, lambda reply: self._turn(question, reply), self)

    def _turn(self, question: str, reply: Reply) -> Generator[str, None, None]:
        started = time.perf_counter()
        self._be_there()
        asked = self._prompt(question)
        self._recall(asked)
        yield from self._answer(question, asked, reply, started)

    def _be_there(self) -> None:
        """Has something read and in the cache.

        Raises:
            UserError: what was read is lost.
        """
        if self._read_last is None:
            self._read(intake(self, None), None)
        self.engine.come_back(self)

    @property
    def owns_cells(self) -> bool:
        """Whether the cache holds what this conversation read and said."""
        return self.engine.residents.holds(self)

    def _prompt(self, question: str) -> Prompt:
        """What the next turn decodes before its answer starts."""
        if self._open_turn is not None:
            return self.framing.go_on(self.engine, question, system=self.system)
        if self.turns == 0:
            prompt: Prompt = self._opening_after(question)
            return prompt
        return self.framing.next_turn(self.engine, question, system=self.system)

    def _opening_after(self, question: str) -> Prompt:
        document = any(len(self.ledger.segments[n].tokens) for n in self.ledger.numbers(DOCUMENT))
        opening = self.framing.opening(self.engine, question, system=self.system, document=document)
        return opening.after

    def _answer(
        self, question: str, asked: Prompt, reply: Reply, started: float
    ) -> Generator[str, None, None]:
        cells, engine = self.cells, self.engine
        prompt = np.concatenate((np.array(self.pending, np.int32), asked.tokens))
        room = self._room_left() - len(prompt)
        if room < 1:
            raise UserError(
                f"the conversation has filled the context of {cells.limit} cells; "
                "use /reset, or a larger --ctx-size"
            )
        mark, before = cells.mark(), (self.pending, self._open_turn)
        sampling = replace(self.sampling, seed=self.sampling.seed + self.turns)
        generation = Generation(
            engine.model,
            sampling,
            min(self.max_tokens, room),
            stop=self.stop,
            ignore_end=engine.ignore_end,
            reply=reply,
        )
        watch = Watch(cells.context) if self.watches else None
        lookup = self._lookup() if engine.lookup and not watch else None
        try:
            with generation:
                number = self._open_turn
                if number is None:
                    number = self.ledger.new(Segment(TURN))
                self.pending, self._open_turn = [], None
                first = yield from generate(
                    cells,
                    generation,
                    prompt.astype(np.int32),
                    number,
                    lookup=lookup,
                    watch=watch,
                    check=engine.access.check_cancelled,
                )
        except BaseException:
            # the turn is dropped, the documents and earlier turns stay
            self.pending, self._open_turn = before
            if self.owns_cells:
                cells.revert(mark)
            raise
        if reply.finish_reason == "length":
            self.pending = [generation.last]
        self.turns += 1
        self.fill(reply, len(prompt), started, first)
        looks = None
        if watch:
            looks = watch.looks(cells, mark.rows + len(prompt), len(reply.tokens))
        self.note(question, reply, looks)

    def _lookup(self) -> Lookup | None:
        """What answers may copy from; None without documents."""
        numbers = self.ledger.numbers(DOCUMENT)
        texts = [self.ledger.segments[number].tokens for number in numbers]
        if not any(len(text) for text in texts):
            return None
        most = min(self.engine.lookup, self.cells.context.options.outputs - 1)
        return Lookup(np.concatenate(texts).astype(np.int32), most)

    def note(self, question: str, reply: Reply, looks: Looks | None = None) -> None:
        """Remembers the last question and its answer, with what was drafted for it."""
        self.last = Exchange(question, reply, tuple(self._drafts), looks)
        self._drafts = []

    def _room_left(self) -> int:
        """Cells that the next question and its answer may take.

        All cells of a sequence kept for `choose_again` are taken.
        """
        left = self.cells.limit - self.cells.used
        if self.ageing.endless:
            return min(left, self.trained - self.cells.position) if self.trained else left
        if self.run.reader.holds_all:
            assert self._read_last is not None
            left -= len(self._read_last.tokens) - len(self._read_last.kept)
        return left

    def fill(
        self, reply: Reply, prompt: int, started: float, first: float, *, apart: int = 0
    ) -> None:
        """Completes the account of an answer.

        Args:
            prompt: tokens of the question with the template around it.
            started, first: when the turn began, and its first token was there
                (`time.perf_counter`).
            apart: tokens decoded in another sequence than the conversation's own.
        """
        engine, run, ledger = self.engine, self.run, self.ledger
        assert self._read_last is not None
        read, kept = ledger.tokens_of(SYSTEM, DOCUMENT), int(ledger.of_kind(SYSTEM, DOCUMENT).sum())
        limit = self.cells.limit if self.ageing.endless else run.cells
        account.fill(
            reply.account,
            self._read_last,
            engine.settings,
            policy=engine.policy.name or engine.settings.policy,
            document_tokens=read,
            kept_tokens=kept,
            ctx_cells=limit,
            kv_bytes=run.reader.context.kv_bytes,
            full_kv_bytes=(ledger.tokens_read + apart) * engine.cell_bytes,
            first_token_seconds=first - started,
            prompt_tokens=prompt,
            generated_tokens=len(reply.tokens),
            seconds=time.perf_counter() - first,
            seed=engine.seed,
            ratio=run.budget.ratio
            if engine.fills_cells or engine.settings.keep is not None
            else engine.settings.ratio,
            positions="compact" if self._compact else "original",
            scoring=run.reader.scoring,
            used_cells=self.cells.used + apart,
            used_bytes=(self.cells.used + apart) * engine.cell_bytes,
            text_tokens=ledger.tokens_of(DOCUMENT),
            text_kept=int(ledger.of_kind(DOCUMENT).sum()),
        )
        if self.sources.parked:
            recaller = self.sources.recallers[0]
            reply.account.recall = recaller.store.kind
            reply.account.recall_mode = recaller.mode
            reply.account.parked_tokens = self.parked_tokens
            reply.account.parked_bytes = self.parked_bytes
        if self.recalled:
            reply.account.recalled_tokens = self.recalled.moved_in
            reply.account.recall_calls = self.recalled.state_calls
            reply.account.recall_seconds = self.recalled.seconds

    def reset(self) -> None:
        """Forgets the turns; the documents stay as they stand in the cache."""
        with self.engine.access.inside(self):
            if self._read_last is None or not self.engine.residents.can_come_back(self):
                self._forget()
                return
            self._be_there()
            with uninterrupted():
                self.cells.evict(~self.ledger.of_kind(TURN))
                for number in self.ledger.numbers(TURN):
                    self.ledger.forget(number)
                self.cells.main.remove(self.cells.position, -1)  # what others decoded there
                self.pending, self.turns, self._open_turn = [], 0, None

    @property
    def said(self) -> Tokens:
        """All tokens of the turns, questions and answers as they were decoded, int32."""
        turns = [self.ledger.segments[number].tokens for number in self.ledger.numbers(TURN)]
        return np.concatenate([*turns, np.array(self.pending, np.int32)]).astype(np.int32)

    def keep_said(self, tokens: int) -> None:
        """Forgets what was said after the first so many tokens of `said`.

        Raises:
            UserError: the conversation's cells are lost.
        """
        with self.engine.access.inside(self):
            self._be_there()
            ledger, left = self.ledger, tokens
            stays = np.ones(len(ledger), bool)
            lengths = {}
            for number in ledger.numbers(TURN):
                lengths[number] = min(left, len(ledger.segments[number].tokens))
                left -= lengths[number]
                stays &= (ledger.segment != number) | (ledger.index < lengths[number])
            with uninterrupted():
                self.cells.evict(stays)
                for number, length in lengths.items():
                    segment = ledger.segments[number]
                    segment.tokens = segment.tokens[:length]
                    if not length:
                        ledger.forget(number)
                self.cells.main.remove(self.cells.position, -1)  # what others decoded there
                self.pending = self.pending[:left]
                self.turns = len(ledger.numbers(TURN))
                self._open_turn = None

    # likelihoods

    def log_likelihood(self, question: str, answer: str) -> float:
        """Mean log-probability (nats) of an answer's tokens, were it given to the next question.

        Leaves the conversation as it is. The document must have been read, or is read now.

        Raises:
            UserError: an empty answer, or one with its question that the context cannot hold.
        """
        with self.engine.access.inside(self):
            self._be_there()
            prompt = np.concatenate((self.pending, self._prompt(question).tokens))
            wanted = self.engine.model.tokenize(answer)
            if not len(wanted):
                raise UserError("an empty answer has no likelihood")
            found = self.cells.log_probabilities(prompt, wanted, self._room_left())
            return float(found[np.arange(len(wanted)), wanted].mean(dtype=np.float64))

    def log_probabilities(self, prompt: Tokens, following: Tokens) -> NDArray[np.float32]:
        """What the model thinks of tokens that might follow.

        Leaves the conversation as it is. The document must have been read, or is read now.

        Args:
            prompt: at least one token, decoded right after what was read and said.
            following: tokens that follow it.

        Returns:
            (len(following), vocab): log-probabilities (nats) of what stands at each token's place.

        Raises:
            UserError: the context cannot hold them.
        """
        with self.engine.access.inside(self):
            self._be_there()
            prompt = np.concatenate((self.pending, prompt))
            return self.cells.log_probabilities(prompt, following, self._room_left())

    def likelihoods(self, following: Tokens, top: int) -> list[Likelihood]:
        """As `log_probabilities`, but of each token only its own and those of the likeliest.

        The first token is decoded right after what was read and said; the list begins with the
        second one's.

        Raises:
            UserError: the context cannot hold them.
        """
        with self.engine.access.inside(self):
            self._be_there()
            prompt = np.concatenate((self.pending, following[:1]))
            rows = self.cells.logits_of(prompt, following[1:], self._room_left())
            return [
                likelihood(row, int(token), top)
                for row, token in zip(rows, following[1:], strict=True)
            ]

    # recall

    def recall(self, question: str) -> Recalled | None:
        """Brings the tokens into the cache that the next turn's question needs; `ask` does it too.

        The document must have been read, or is read now. Room is made for the question first.

        Returns:
            What was moved; None without recall, or where everything is in the cache anyway.
        """
        with self.engine.access.inside(self):
            self._be_there()
            self._recall(self._prompt(question))
            return self.recalled

    def recall_for(self, asked: Prompt) -> None:
        """Recalls for a question as if it were the first: what earlier ones recalled is undone."""
        for recaller in self.sources.recallers:
            recaller.begin_again()
        self._recall(asked)

    def _recall(self, asked: Prompt) -> None:
        """Makes room for a question, and then recalls its tokens of one document after the other.

        Whatever goes wrong, all documents' tokens in the cache are those of the question before.
        """
        self.recalled = None
        self.ageing.make_room(self, asked)
        if self.sources.parked:
            self.recalled = recall(self.sources, self.cells, self.pending, asked)
            self._drafts = self.sources.recallers[-1].drafts

    # room for the next turn

    def prepare_for(self, question: str) -> None:
        """Makes the room that the next turn's question needs; `ask` does it too."""
        with self.engine.access.inside(self):
            self._be_there()
            self.ageing.make_room(self, self._prompt(question))

    @property
    def trained(self) -> int:
        """Positions there are; 0 for any number."""
        if self.engine.settings.positions == "original":
            return 0
        return max(self.engine.model.trained_context, 0)

    @property
    def capacity(self) -> int:
        """Cells, but no more than there are positions the model was trained for.

        Where documents are parked positions are counted by themselves: not all of them can move.
        """
        cells = self.cells.limit - self.sources.extra_cells(self.drafts)
        return cells if self.sources.parked or not self.trained else min(cells, self.trained)

    @property
    def space(self) -> Space:
        """The cells as they are taken, with no question asked yet.

        Of parked documents what a question recalls counts, where the one before had less room.
        """
        recallers = self.sources.recallers
        recalled = sum(recaller.budget.kept - len(recaller.kept) for recaller in recallers)
        return replace(
            self.turns_from(0),
            capacity=self.capacity,
            system=int(self.ledger.of_kind(SYSTEM).sum()),
            documents=int(self.ledger.of_kind(DOCUMENT).sum()) + recalled,
        )

    def turns_from(self, start: int) -> Space:
        """The turns' rows from a position on."""
        ledger, turns = self.ledger, self.ledger.numbers(TURN)
        after = ledger.segment[ledger.position >= start]
        rows = {n: int((after == n).sum()) for n in turns}
        aged = sum(rows[n] for n in turns if ledger.segments[n].aged)
        whole = tuple(rows[n] for n in turns if not ledger.segments[n].aged)
        return Space(0, 0, 0, aged, whole, 0, self.max_tokens)

    def share_room(self, space: Space) -> Thinning | None:
        """What must be thinned; how much every parked document may recall is set along the way.

        Raises:
            UserError: the question does not fit beside anchors and windows.
        """
        return share_room(self, space)

    def shrink_parked(self) -> None:
        """Frees cells that parked documents may not have for this question."""
        for recaller in self.sources.recallers:
            recaller.shrink()

    def move_down(self, room: int, *, always: bool = False) -> None:
        """Moves all tokens together where so many more would pass the trained context.

        Parked documents stay where they are, and with them what stands before the last of them.

        Raises:
            UserError: llama.cpp cannot move them.
        """
        trained, wanted = self.engine.model.trained_context, self.engine.settings.positions
        beyond = wanted == "auto" and 0 < trained < self.cells.position + room
        if always or beyond or wanted == "compact" or self._compact:
            self.cells.close_gaps(self.sources.first_movable)

    # documents that come and go

    def add(
        self,
        name: str,
        text: str | Tokens,
        on_progress: Callable[[Progress], None] | None = None,
        *,
        asks: Callable[[], str | None] | None = None,
    ) -> Document:
        """Reads one more document, block by block, after what was said so far.

        The next question is asked about it. As that is not known yet, `read_policy` chooses; `asks`
        may bring it, as of `read`.

        Raises:
            UserError: it does not fit, or one of this name is here already.
            Cancelled, KeyboardInterrupt: it was stopped, or dropped; nothing of it stays.
        """
        check_document(name, text)
        if name in self.texts:
            raise UserError(f"there is a document {name} already; /drop it first")
        with self.engine.access.inside(self):
            if self._read_last is None:
                self.sources.left_out = True  # what was stopped before waits for read()
            self._be_there()
            self._adding = name
            place_rows(self, len(self.sources.tokens_of(text, self.engine.model)))
            try:
                self._read_onto(name, text, on_progress, asks)
            finally:
                self._adding = None
            self.texts[name] = text
        return self.documents[-1]

    def _read_onto(
        self,
        name: str,
        text: str | Tokens,
        on_progress: Callable[[Progress], None] | None,
        asks: Callable[[], str | None] | None = None,
    ) -> None:
        engine, opening = self.engine, np.empty(0, np.int32)
        if self._open_turn is None and self.turns > 0:
            opening = self.framing.opens_turn(engine, system=self.system)
        opens, tokens = len(opening) > 0, self.sources.tokens_of(text, engine.model)
        if not opens and self._documents_in_turn():
            tokens = np.concatenate((self.framing.between(engine), tokens)).astype(np.int32)
        glue = len(self.pending) + len(opening)
        added = addition(self, name, len(tokens), glue)
        budget, compact = added.budget, added.compact
        self._grow(added.cells)
        if compact:
            self.move_down(glue + len(tokens), always=True)
        cells, run = self.cells, self.run
        reader = engine.reader_for(self, compact)
        run = replace(run, budget=budget, reader=reader, compact=compact)
        mark, before, parking = cells.mark(), (self.pending, self._open_turn), Parking(None)
        try:
            if self.pending:
                last = self.ledger.numbers(TURN)[-1]
                cells.decode(np.array(self.pending, np.int32), last)
            if opens:
                self._open_turn = self.ledger.new(Segment(TURN))
                cells.decode(opening, self._open_turn)
            start = cells.position
            recaller = engine.recaller(run, start, self.ledger.next_number, self.parks)
            place = self.parks if recaller else "off"
            asks, unasked = self._hearing(place, asks)
            reader = run.reader if asks else engine.reader_without_question(run, place)
            parking = Parking(recaller, reader, recall_is_open(self))
            reading = reader.read(
                tokens,
                budget,
                on_progress=on_progress,
                start=start,
                park=parking if recaller else None,
                asks=self._prompts(asks, self._prompt),
                unasked=unasked,
            )
            recaller = parking.recaller
            if recaller:
                recaller.settle(reading)
        except BaseException:
            parking.close()
            self.pending, self._open_turn = before
            if self.owns_cells:
                cells.revert(mark)
            raise
        with uninterrupted():
            segment = Segment(DOCUMENT, tokens, name, reading.all_pools, scores=reading.scores)
            segment.blocks = np.array([block.start for block in budget.blocks])
            number = self.ledger.new(segment)
            where = recaller.position_of if recaller else reading.where(compact, start)
            self.ledger.put([number], where)
            if recaller:
                recaller.follow(self.ledger, [number])
                self.sources.parked.append(Parked((number,), recaller))
            self.pending, self._compact = [], self._compact or compact
            cells.settled = not compact  # the last block's eviction may have moved tokens

    def _documents_in_turn(self) -> bool:
        """Whether a document stands in the turn whose question is still to come."""
        first = -1 if self._open_turn is None else self._open_turn
        return any(number > first for number in self.ledger.numbers(DOCUMENT))

    def _grow(self, cells: int) -> None:
        """Has more cells, in a larger context where this one has no more."""
        if self.engine.share is None and cells > self.cells.limit:
            self.engine.grow(self, cells)

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
        with self.engine.access.inside(self):
            self.sources.forget_text(name)
            number = self.ledger.document(name)
            if number is None or not self.engine.residents.can_come_back(self):
                return
            self._be_there()
            with uninterrupted():
                self.sources.forget_parked(number)
                self._remove(number)
                if self._open_turn is not None and not self._documents_in_turn():
                    # the turn was opened for it
                    self._remove(self._open_turn)
                    self._open_turn = None

    def _remove(self, number: int) -> None:
        self.cells.evict(self.ledger.segment != number)
        self.ledger.forget(number)

    # in the engine, aside, and in a file

    def save(self, path: str | Path) -> int:
        """Writes what was read; with all turns where the conversation has no end.

        Returns:
            Bytes written.

        Raises:
            UserError: nothing has been read, what was read is lost, or the place cannot be written
                to.
            LaserKVError: the disk is full; nothing is left behind.
        """
        return self.engine.save(self, path)

    def lose_cells(self) -> None:
        """Called when others take the cells and nothing is put aside."""
        self.sources.forget_parked()

    def take_out(self) -> NDArray[np.uint8]:
        """The cells as llama.cpp saves them, before they are put aside."""
        return self.cells.state()

    def put_back(self, saved: NDArray[np.uint8], reader: Reader) -> None:
        """Goes on in other cells, which then hold, bit for bit, what was taken out."""
        self.cells.restore(saved, reader.context, reader.main.number, reader.limit)
        self._run = replace(self.run, reader=reader)
        for recaller in self.sources.recallers:
            recaller.use(reader)

    def state(self) -> State:
        """What saving writes; reads the documents where that has not been done.

        Raises:
            UserError: what was read is lost.
        """
        self._be_there()
        assert self._read_last is not None
        return State(
            self.ledger,
            self.cells.state(),
            self._read_last.budget,
            self.pending,
            self.turns,
            self.thinnings,
            self._open_turn,
            self._compact,
            self.sources.left_out,
        )

    def adopt(
        self, run: Run, reading: Reading, recaller: Recaller | None, head: int | None = None
    ) -> None:
        """Takes over a document that stands in its cells already; its segments are made anew.

        Args:
            head: how many of the first tokens are the opening; None: as the template's is.
        """
        if head is None:
            head = len(self.engine.template.opening("", system=self.system).before)
        tokens = reading.tokens[head:]
        self.texts["document"] = self.engine.model.text(tokens)
        segments = [
            Segment(SYSTEM, reading.tokens[:head]),
            Segment(DOCUMENT, tokens, "document"),
        ]
        self._run, self._compact = run, run.compact
        self._enter(segments, reading, recaller)
        self.cells.settled = True

    def take_over(self, state: State, run: Run) -> None:
        """Becomes what was saved, in a run whose cells hold it already."""
        self._run, self._ledger, self._compact = run, state.ledger, state.compact
        reader = run.reader
        self._cells = Cells(reader.context, reader.main.number, reader.limit, state.ledger)
        self.pending, self.turns, self.thinnings = state.pending, state.turns, state.thinnings
        self._open_turn, self.sources.left_out = state.open_turn, state.without_document
        ledger = state.ledger
        numbers = ledger.numbers(SYSTEM, DOCUMENT)
        tokens = np.concatenate([ledger.segments[number].tokens for number in numbers])
        starts = np.cumsum([0, *(len(ledger.segments[number].tokens) for number in numbers)])
        self._read_parts = dict(zip(numbers, starts.tolist(), strict=False))
        self._read_last = Reading(
            tokens, state.budget, np.empty(0, np.int64), ledger.next_position, Timings()
        )
