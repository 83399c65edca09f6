"""A document and the turns about it, in an engine's context."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from laserkv_gguf.budget import Account, Budget
from laserkv_gguf.engine import Progress, Reader, Reading
from laserkv_gguf.errors import Cancelled, UserError
from laserkv_gguf.llama.chat import Opening, Prompt
from laserkv_gguf.llama.context import Context
from laserkv_gguf.llama.model import PieceDecoder, Tokens
from laserkv_gguf.llama.sampler import Sampler, Sampling
from laserkv_gguf.llama.sequence import MAIN, Sequence
from laserkv_gguf.recall import Recalled, Recaller
from laserkv_gguf.timings import STEPS

if TYPE_CHECKING:
    from laserkv_gguf.session import LaserKV

CONVERSATION_CELLS = 2048  # room for turns beside what is kept, where no --ctx-size says otherwise


@dataclass
class Reply:
    """An answer.

    Attributes:
        text: what the model said.
        finish_reason: "stop" where it ended by itself, "length" where the limit ended it.
        account: what it cost.
        tokens: the generated tokens.
    """

    text: str = ""
    finish_reason: str = ""
    account: Account = field(default_factory=Account)
    tokens: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Run:
    """What a reading was planned for, and whose context it lies in."""

    budget: Budget
    cells: int
    reader: Reader
    compact: bool


class Answer:
    """Pieces of an answer as they come; `reply` is complete when the iterator ends.

    `conversation` is the one it belongs to.

    An answer that is not read to its end is dropped with its question when it is closed, when the
    same thread asks the next one, or at the end of a `with` block. Until then other threads wait.
    """

    def __init__(self, conversation: Conversation, start: Callable[[Reply], Iterator[str]]) -> None:
        self.conversation, self.reply = conversation, Reply()
        self.thread = 0
        self._pieces = self._run(conversation.engine, start)

    def _run(
        self, engine: LaserKV, start: Callable[[Reply], Iterator[str]]
    ) -> Generator[str, None, None]:
        engine._enter(self)
        try:
            yield from start(self.reply)
        finally:
            engine._leave()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        self.thread = threading.get_ident()
        return next(self._pieces)

    def close(self) -> None:
        """Drops the rest, and with it the turn."""
        self._pieces.close()

    def __enter__(self) -> Answer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Conversation:
    """A document and the turns about it, in the engine's context.

    Args:
        engine: the engine; a new conversation or `ask` takes its context over.
        document: text to talk about, or its tokens (int32); None for none.
        system: system prompt.
        max_tokens: of one answer.
        answer_prefix: how the answer to the first question begins; the model goes on from there.
        plain: read and ask without the chat template.
    """

    def __init__(
        self,
        engine: LaserKV,
        *,
        document: str | Tokens | None = None,
        system: str | None = None,
        sampling: Sampling | None = None,
        max_tokens: int = 1024,
        answer_prefix: str = "",
        plain: bool = False,
    ) -> None:
        if max_tokens < 1:
            raise UserError(f"-n {max_tokens}: give at least 1 token for the answer")
        self.engine, self.system, self.max_tokens = engine, system, max_tokens
        self.document = document
        self.answer_prefix, self.plain = answer_prefix, plain
        self.sampling = sampling or Sampling(seed=engine.seed)
        self.turns = 0
        self.goes_on = True  # whether cells are left for turns after the first
        self.reading: Reading | None = None
        self._run: Run | None = None
        self._position = 0
        self._pending: list[int] = []  # generated, but not decoded yet
        self._used = 0  # cells
        self._document_tokens = None if isinstance(document, str | None) else document
        self._unread = False  # the document is left out, because reading it was stopped
        self._protected = 0  # first tokens that reading never evicts: the system prompt
        self._recaller: Recaller | None = None
        self._recalled: Recalled | None = None  # for the last question

    # reading

    def _opening(self, question: str) -> Opening:
        template = self.engine.template
        if self.plain:
            opening = template.plain(question)
        else:
            has_document = self.document is not None and len(self.document) > 0
            opening = template.opening(
                question, system=self.system, document=has_document and not self._unread
            )
        if not self.answer_prefix:
            return opening
        begun = self.engine.model.tokenize(self.answer_prefix)
        tokens = np.concatenate((opening.after.tokens, begun)).astype(np.int32)
        return replace(opening, after=Prompt(tokens, opening.after.ending + len(begun)))

    def _sequence(self, before: Tokens) -> Tokens:
        """Everything in front of the question."""
        self._protected = len(before) if self.system else 0
        if self._unread:
            return before
        if self._document_tokens is None:
            assert isinstance(self.document, str | None)
            self._document_tokens = self.engine.model.tokenize(self.document or "")
        return np.concatenate((before, self._document_tokens)).astype(np.int32)

    def read(
        self,
        on_progress: Callable[[Progress], None] | None = None,
        *,
        question: str | None = None,
        whole: bool = False,
    ) -> Reading:
        """Reads the document, with a question in mind if one is given.

        Without one each block asks for itself. The next `ask` starts the conversation anew. With
        `whole` a one-shot policy can `choose_again`.

        Raises:
            UserError, Cancelled, KeyboardInterrupt: nothing of the document stays in the cache.
        """
        self._unread = False
        with self.engine._alone():
            return self._read(*self._wanted(question), on_progress, whole=whole)

    def check(self, question: str | None = None) -> Budget:
        """Refuses what `read` would refuse, without reading; returns what it would keep to."""
        tokens, asked, reply = self._wanted(question)
        prompt = 0 if asked is None else len(asked)
        return self.engine.plan(
            len(tokens), prompt, reply, asked=asked is not None, protected=self._protected
        ).budget

    def choose_again(self, ratio: float) -> bool:
        """Goes on as if the document had just been read at another ratio.

        Returns:
            Whether that could be done: only with a one-shot policy, after `read(whole=True)`.
        """
        with self.engine._alone():
            if not self._owns_cells or self._run is None or not self._run.reader.holds_whole:
                return False
            assert self.reading is not None
            settings = replace(self.engine.settings, ratio=ratio, keep=None)
            settings.check()
            self.engine.settings = settings
            budget = self.engine.budget(len(self.reading.tokens), self._protected)
            self.reading = self._run.reader.choose_again(budget)
            self._run = replace(self._run, budget=budget)
            self.turns, self._pending = 0, []
            self._position, self._used = self.reading.next_position, len(self.reading.kept)
            return True

    def _wanted(self, question: str | None) -> tuple[Tokens, Prompt | None, int]:
        """What is read, what asks, and cells for what follows."""
        opening = self._opening(question or "")
        tokens = self._sequence(opening.before)
        if self._document_tokens is not None and len(self._document_tokens) and not self._unread:
            self.engine.settings.check_keep(len(tokens))
        if question is None:
            return tokens, None, self._room(len(tokens))
        reply = len(opening.after) + self.max_tokens
        if self.engine.fills_cells and self.goes_on:
            reply = max(reply, self._room(len(tokens)))
        return tokens, opening.after, reply

    def _read_unasked(self) -> Reading:
        return self._read(*self._wanted(None), None)

    def _room(self, tokens: int, budget: Budget | None = None) -> int:
        """Cells for the turns: what --ctx-size leaves, else enough for a few.

        Args:
            tokens: of the document and what stands before it.
            budget: what was kept of them, where they were read before.
        """
        engine = self.engine
        room = max(CONVERSATION_CELLS, 2 * self.max_tokens)
        if budget is None and engine.fills_cells and engine.ctx_size is not None:
            # what is kept will take the rest
            return max(self.max_tokens, min(room, engine.ctx_size // 4))
        budget = budget or engine.budget(tokens, self._protected)
        kept = budget.kept + engine.recall_cells(budget)
        cells = room if engine.ctx_size is None else engine.ctx_size - kept
        trained = engine.model.trained_context
        if trained > 0:
            # no position need move where there is room for a few turns behind all that is read
            unmoved = trained - tokens
            if min(cells, room) <= unmoved:
                cells = min(cells, unmoved)
            elif engine.settings.positions != "original":
                cells = min(cells, trained - kept)
        return max(cells, self.max_tokens)

    def _read(
        self,
        tokens: Tokens,
        question: Prompt | None,
        reply: int,
        on_progress: Callable[[Progress], None] | None,
        *,
        beside: int = 0,
        whole: bool = False,
        compact: bool | None = None,
    ) -> Reading:
        engine = self.engine
        self.reading, self.turns, self._pending, self._recalled = None, 0, [], None
        self.forget_parked()
        if engine._owner:
            engine._owner.forget_parked()
        engine._owner = None
        prompt = 0 if question is None else len(question)
        run = engine.prepare(
            len(tokens),
            prompt,
            reply,
            asked=question is not None,
            beside=beside,
            protected=self._protected,
            whole=whole,
            compact=compact,
        )
        recaller = engine.recaller(run)
        whole = whole and not recaller and run.reader.context.cells >= len(tokens) + reply
        reader = engine.first_reader(run) if recaller and question is None else run.reader
        park = partial(recaller.park, reader=reader) if recaller else None
        try:
            reading = reader.read(
                tokens, run.budget, question, on_progress=on_progress, whole=whole, park=park
            )
            if recaller:
                recaller.settle(reading)
        except BaseException:
            if recaller:
                recaller.close()
            raise
        self._recaller, self._run, self.reading, engine._owner = recaller, run, reading, self
        self._position, self._used = reading.next_position, len(reading.kept)
        return reading

    # turns

    def begin(
        self, question: str, *, on_progress: Callable[[Progress], None] | None = None
    ) -> Answer:
        """The first turn: reads with the question in mind and answers it."""
        return Answer(self, lambda reply: self.first_turn(question, reply, on_progress))

    def first_turn(
        self,
        question: str,
        reply: Reply,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> Iterator[str]:
        """Reads with the question in mind and answers it."""
        started = time.perf_counter()
        self._unread = False
        asked = self._read_for(question, on_progress)
        yield from self._answer(asked, reply, started)

    def _read_for(self, question: str, on_progress: Callable[[Progress], None] | None) -> Prompt:
        """Reads with the question in mind; returns what is decoded before the answer starts."""
        self._read(*self._wanted(question), on_progress)
        return self._opening(question).after

    def ask(self, question: str) -> Answer:
        """The next turn. An answer that is stopped half-way is dropped with its question.

        Raises:
            UserError: the context is full, or the engine was asked something else meanwhile.
            Cancelled: `LaserKV.cancel` was called. Both while the answer is iterated over.
        """
        return Answer(self, lambda reply: self._turn(question, reply))

    def _turn(self, question: str, reply: Reply) -> Iterator[str]:
        started = time.perf_counter()
        if self.reading is None:
            self._read_unasked()
        self._check_owner()
        asked = self._prompt(question)
        self._recall(asked)
        yield from self._answer(asked, reply, started)

    def recall(self, question: str) -> Recalled | None:
        """Brings the tokens into the cache that the next turn's question needs; `ask` does it too.

        The document must have been read, or is read now. The conversation so far stays as it is; a
        `Talk` makes room for the question first.

        Returns:
            What was moved; None without recall, or where everything is in the cache anyway.
        """
        with self.engine._alone():
            if self.reading is None:
                self._read_unasked()
            self._check_owner()
            self._recall(self._prompt(question))
            return self._recalled

    def recall_for(self, asked: Prompt) -> None:
        """As if nothing had been asked or recalled since the document was read."""
        if self._recaller and self.reading:
            self._recaller.begin_again()
            self._used += len(self._recaller.kept) - len(self.reading.kept)
            self.reading.kept = self._recaller.kept
        self._recall(asked)

    def _recall(self, asked: Prompt) -> None:
        self._recalled = None
        if self._recaller is None or self.reading is None:
            return
        pending = np.array(self._pending, np.int32)
        asked = Prompt(np.concatenate((pending, asked.tokens)), asked.ending)
        recalled = self._recaller.recall(asked, self._position, self._used)
        self._used += len(recalled.kept) - len(self.reading.kept)
        self.reading.kept, self._recalled = recalled.kept, recalled

    def save(self, path: str | Path) -> int:
        """Writes the document as it was read, to be loaded in seconds; see `saved_document`."""
        from laserkv_gguf import saved_document

        return saved_document.save(self, path)

    def _adopt(self, run: Run, reading: Reading, recaller: Recaller | None) -> None:
        """Takes over a document that lies in the context already."""
        head = len(self.engine.template.opening("", system=self.system).before)
        self._document_tokens = reading.tokens[head:]
        self.document = self.engine.model.text(self._document_tokens)
        self._recaller, self._run, self.reading = recaller, run, reading
        self._position, self._used = reading.next_position, len(reading.kept)
        self.engine._owner = self

    def forget_parked(self) -> None:
        """Gives back the memory or file of parked rows; nothing can be recalled afterwards."""
        if self._recaller:
            self._recaller.close()
        self._recaller = None

    def _check_owner(self) -> None:
        """Refuses to go on in cells that hold something else by now."""
        if not self._owns_cells:
            raise UserError(
                "this conversation's cache is gone, because the engine was asked something else; "
                "read() starts it again"
            )

    def _prompt(self, question: str) -> Prompt:
        """What the next turn decodes before its answer starts."""
        if self.turns == 0:
            return self._opening(question).after
        return self.engine.template.next_turn(question, system=self.system)

    def log_likelihood(self, question: str, answer: str) -> float:
        """Mean log-probability (nats) of an answer's tokens, were it given to the next question.

        Leaves the conversation as it is. The document must have been read, or is read now.

        Raises:
            UserError: an empty answer, or one with its question that the context cannot hold.
        """
        with self.engine._alone():
            if self.reading is None:
                self._read_unasked()
            self._check_owner()
            prompt = np.concatenate((self._pending, self._prompt(question).tokens))
            wanted = self.engine.model.tokenize(answer)
            if not len(wanted):
                raise UserError("an empty answer has no likelihood")
            rows = self._log_probabilities(prompt, wanted)
            return float(rows[np.arange(len(wanted)), wanted].mean(dtype=np.float64))

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
        with self.engine._alone():
            if self.reading is None:
                self._read_unasked()
            self._check_owner()
            return self._log_probabilities(np.concatenate((self._pending, prompt)), following)

    def _log_probabilities(self, prompt: NDArray[Any], following: Tokens) -> NDArray[np.float32]:
        assert self._run is not None
        context = self._run.reader.context
        room = self._room_left() - len(prompt) + 1
        if len(following) > room:
            raise UserError(
                f"an answer of {len(following)} tokens does not fit: there is room for {room}; "
                "use a larger --ctx-size or a shorter answer"
            )
        tokens = np.concatenate((prompt, following[:-1])).astype(np.int32)
        rows = np.empty((len(following), self.engine.model.vocab_size), np.float32)
        most = min(context.options.outputs, context.batch_size)
        start, done = 0, 0  # of the tokens, of the rows
        try:
            while done < len(rows):
                count = min(most, len(rows) - done)
                end = len(prompt) - 1 + done + count
                context.decode(tokens[start:end], self._position + start, MAIN, outputs=count)
                for index in range(-count, 0):
                    logits = context.logits(index).astype(np.float64)
                    logits -= logits.max()
                    rows[done + count + index] = logits - np.log(np.exp(logits).sum())
                start, done = end, done + count
        finally:
            Sequence(context, MAIN).remove(self._position, -1)
        return rows

    def _answer(self, asked: Prompt, reply: Reply, started: float) -> Iterator[str]:
        assert self._run is not None
        assert self.reading is not None
        context = self._run.reader.context
        before = (self._position, self._used, list(self._pending))
        prompt = np.concatenate((np.array(self._pending, np.int32), asked.tokens))
        room = self._room_left() - len(prompt)
        if room < 1:
            raise UserError(
                f"the conversation has filled the context of {context.cells} cells; "
                "use /reset, or a larger --ctx-size"
            )
        try:
            context.decode(prompt, self._position, MAIN, outputs=1)
            self._position += len(prompt)
            self._used += len(prompt)
            self._pending = []
            first = time.perf_counter()
            yield from self._generate(context, reply, min(self.max_tokens, room))
        except BaseException:
            # the turn is dropped, the document and earlier turns stay
            self._position, self._used, self._pending = before
            if self._owns_cells:
                context.resume()
                Sequence(context, MAIN).remove(self._position, -1)
            raise
        self.turns += 1
        assert self.reading is not None
        self._fill(reply, len(prompt), started, first, self._used - len(self.reading.kept))

    def _room_left(self) -> int:
        """Cells that the next question and its answer may take.

        A whole sequence kept for `choose_again` takes its own.
        """
        assert self._run is not None
        assert self.reading is not None
        reader, reading = self._run.reader, self.reading
        held = len(reading.tokens) - len(reading.kept) if reader.holds_whole else 0
        return reader.context.cells - self._used - held

    def _generate(self, context: Context, reply: Reply, limit: int) -> Iterator[str]:
        model, decoder = self.engine.model, PieceDecoder(self.engine.model)
        with Sampler(replace(self.sampling, seed=self.sampling.seed + self.turns)) as sampler:
            while True:
                if self.engine._cancelled.is_set():
                    raise Cancelled("cancelled")
                token = sampler.sample(context.handle)
                if model.ends_generation(token) and not self.engine.ignore_end:
                    reply.finish_reason = "stop"
                    break
                reply.tokens.append(token)
                text = decoder.feed(token)
                reply.text += text
                if text:
                    yield text
                if len(reply.tokens) >= limit:
                    reply.finish_reason = "length"
                    self._pending = [token]
                    break
                context.decode(np.array([token], np.int32), self._position, MAIN, outputs=1)
                self._position += 1
                self._used += 1
        rest = decoder.finish()
        reply.text += rest
        if rest:
            yield rest

    def _fill(self, reply: Reply, prompt: int, started: float, first: float, followed: int) -> None:
        """Completes the account of an answer; `followed`: tokens decoded after the document."""
        assert self._run is not None
        assert self.reading is not None
        engine, run, reading = self.engine, self._run, self.reading
        budget, timings = reading.budget, reading.timings
        seconds = time.perf_counter() - first
        whole = len(reading.tokens) + followed
        reply.account = Account(
            policy=engine.policy.name or engine.settings.policy,
            document_tokens=len(reading.tokens),
            kept_tokens=len(reading.kept),
            kept_fraction=len(reading.kept) / max(len(reading.tokens), 1),
            blocks=len(budget.blocks),
            budget=budget.block,
            anchors=budget.anchors,
            window=budget.window,
            long_term=budget.long_term,
            ctx_cells=run.cells,
            kv_bytes=run.reader.context.kv_bytes,
            full_kv_bytes=whole * engine.cell_bytes,
            prefill_seconds=timings.total,
            **{f"{step}_seconds": getattr(timings, step) for step in STEPS},
            first_token_seconds=first - started,
            prompt_tokens=prompt,
            generated_tokens=len(reply.tokens),
            decode_tokens_per_second=len(reply.tokens) / seconds if seconds > 0 else 0.0,
            seed=engine.seed,
            ratio=engine.settings.ratio
            if engine.settings.keep is None and not engine.fills_cells
            else budget.ratio,
            block_size=engine.settings.block_size,
            protection_divisor=engine.settings.protection_divisor,
            positions="compact" if run.compact else "original",
            scoring=run.reader.scoring,
            kept_per_block=reading.kept_per_block,
        )
        parked = self._parked
        if parked:
            reply.account.recall = parked[0].store.kind
            reply.account.recall_mode = parked[0].mode
            reply.account.parked_tokens = self.parked_tokens
            reply.account.parked_bytes = self.parked_bytes
        if self._recalled:
            reply.account.recalled_tokens = self._recalled.moved_in
            reply.account.recall_calls = self._recalled.state_calls
            reply.account.recall_seconds = self._recalled.seconds

    def reset(self) -> None:
        """Forgets the turns; the document stays as it was read."""
        with self.engine._alone():
            self._pending, self.turns = [], 0
            if self._run is None or self.reading is None or not self._owns_cells:
                self.reading = None
                return
            self._position, self._used = self.reading.next_position, len(self.reading.kept)
            Sequence(self._run.reader.context, MAIN).remove(self._position, -1)

    def without_document(self) -> None:
        """Goes on without the document until `read` is called; nothing of it is in the cache."""
        self.reading, self.turns, self._pending = None, 0, []
        self._unread = True
        self.forget_parked()

    @property
    def _parked(self) -> list[Recaller]:
        """What is parked, in the order of its positions."""
        return [self._recaller] if self._recaller else []

    @property
    def parked_tokens(self) -> int:
        """Tokens whose rows are parked."""
        return sum(recaller.store.parked for recaller in self._parked)

    @property
    def parked_bytes(self) -> int:
        """What parked rows take, with what finds them."""
        return sum(recaller.bytes for recaller in self._parked)

    @property
    def _owns_cells(self) -> bool:
        """Whether the context still holds what this conversation read and said."""
        return self.engine._owner is self

    @property
    def cells_used(self) -> int:
        """Cells of the cache that are taken."""
        return self._used
