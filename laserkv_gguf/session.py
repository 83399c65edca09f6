"""A model that answers about documents: the Python API.

`LaserKV` holds the model and one context sized by what will be kept. `ask` answers one question
about one document; a `Conversation` keeps a document and its turns.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from laserkv_gguf import policies
from laserkv_gguf.budget import Account, Budget, check_settings, largest_ratio
from laserkv_gguf.engine import ProbeSettings, Progress, Reader, Reading
from laserkv_gguf.errors import Cancelled, UserError
from laserkv_gguf.llama import rope, rows, trial
from laserkv_gguf.llama.chat import ChatTemplate, Opening, Prompt
from laserkv_gguf.llama.context import Context, ContextOptions
from laserkv_gguf.llama.model import Model, PieceDecoder, Tokens
from laserkv_gguf.llama.sampler import Sampler, Sampling
from laserkv_gguf.llama.sequence import MAIN, Sequence
from laserkv_gguf.recall import Recalled, Recaller, RecallSettings, warm_up

log = logging.getLogger(__name__)

POSITIONS = ("auto", "original", "compact")
CONVERSATION_CELLS = 2048  # room for turns beside what is kept, where no --ctx-size says otherwise

__all__ = ["Cancelled", "Conversation", "LaserKV", "Reply", "Sampling", "Settings"]


@dataclass(frozen=True)
class Settings:
    """How documents are compressed; the command line's flags of the same names.

    Attributes:
        policy: a name of `laserkv_gguf.policies`, or `module:Class`.
        ratio: fraction of the tokens to keep, in (0, 1].
        block_size: tokens read at a time (S).
        protection_divisor: n; anchors and window get ``B // n`` tokens each.
        alpha, pool, hash_bits, hash_tables: see `policies.laser.Laser`; None for its defaults.
        lookahead: tokens drafted after the question to ask with; None for the policy's own number.
        probe_tokens: of the question, the last so many ask, 0 for all; None for the policy's own.
        positions: "original", "compact", or "auto": compact only beyond the trained context.
        policy_options: fields of the policy's class, as `policies.parse` gives them.
        recall: "ram" or "disk" to park rows of evicted tokens there and to choose anew among all
            of the document for every question of a conversation; "off" to lose them.
        recall_mode, recall_file, recall_bits, recall_shortlist, recall_share, recall_first: see
            `recall.RecallSettings`.
    """

    policy: str = "laser"
    ratio: float = 0.25
    block_size: int = 4096
    protection_divisor: int = 4
    alpha: float | None = None
    pool: int | None = None
    hash_bits: int | None = None
    hash_tables: int | None = None
    lookahead: int | None = None
    probe_tokens: int | None = None
    positions: str = "auto"
    policy_options: Mapping[str, Any] = field(default_factory=dict)
    recall: str = "off"
    recall_mode: str | None = None
    recall_file: str | None = None
    recall_bits: int = 128
    recall_shortlist: float = 2.0
    recall_share: str = "all"
    recall_first: str = "keydiff"

    @property
    def recalling(self) -> RecallSettings:
        return RecallSettings(
            self.recall,
            self.recall_mode,
            self.recall_file,
            self.recall_bits,
            self.recall_shortlist,
            self.recall_share,
            self.recall_first,
        )

    def check(self) -> None:
        """Refuses unusable values.

        Raises:
            UserError: with the remedy in one line.
        """
        check_settings(self.ratio, self.block_size, self.protection_divisor)
        if self.lookahead is not None and not 0 <= self.lookahead <= self.block_size:
            raise UserError(
                f"--lookahead is {self.lookahead}; give 0 to a block's {self.block_size} tokens"
            )
        if self.probe_tokens is not None and self.probe_tokens < 0:
            raise UserError(f"--probe-tokens is {self.probe_tokens}; give a number, or 0 for all")
        if self.positions not in POSITIONS:
            raise UserError(f"--positions {self.positions} is unknown; use {', '.join(POSITIONS)}")
        self.recalling.check()

    def make_policy(self, seed: int) -> policies.Policy:
        given = {
            "alpha": self.alpha,
            "pool": self.pool,
            "hash_bits": self.hash_bits,
            "hash_tables": self.hash_tables,
            "seed": seed & 0xFFFFFFFF,
        }
        given = {key: value for key, value in given.items() if value is not None}
        return policies.make(self.policy, **{**given, **self.policy_options})


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


class LaserKV:
    """A model and a compressed cache to ask documents with.

    Args:
        model: path of a GGUF, or a loaded `llama.model.Model`.
        gpu_layers: layers on the GPU; None for all where the build and machine can.
        ctx_size: cells of the KV cache; None for what each run needs.
        context: types, batch sizes, threads and flash attention of the context.
        seed: of the sampler and of the policy's randomness.
        **settings: fields of `Settings` (ratio=0.25, policy="laser", …).

    Calls from several threads queue.

    Raises:
        UserError: unusable model or settings.
    """

    def __init__(
        self,
        model: str | Path | Model,
        *,
        gpu_layers: int | None = None,
        ctx_size: int | None = None,
        context: ContextOptions | None = None,
        seed: int = 0,
        **settings: Any,
    ) -> None:
        self.settings = Settings(**settings)
        self.settings.check()
        self.policy = self.settings.make_policy(seed)
        self.settings.recalling.check_policy(self.policy)
        self.options = context or ContextOptions()
        self.options.check()
        block_size = self.settings.block_size
        if context is None and block_size > self.options.batch_size:
            self.options = replace(self.options, batch_size=block_size)
        if block_size > self.options.batch_size:
            raise UserError(
                f"a block of {block_size} tokens is larger than the batch of "
                f"{self.options.batch_size} it is decoded in; "
                f"use -b {block_size}, or --block-size {self.options.batch_size}"
            )
        self.ctx_size, self.seed = ctx_size, seed
        self.ignore_end = False  # llama.cpp's --ignore-eos: generate on past the answer's end
        self._owns_model = not isinstance(model, Model)
        self.model = (
            model
            if isinstance(model, Model)
            else Model(model, gpu_layers=gpu_layers, extra_buffers=trial.extra_buffers_work())
        )
        self.template = ChatTemplate(self.model)
        self._context: Context | None = None
        self._reader: Reader | None = None
        self._format: rows.Format | None = None  # of parked rows, once it has been tried
        self._lock = threading.Lock()
        # The answer that holds the lock; weakly, so that one nobody reads on ends by itself.
        self._active: weakref.ref[Answer] | None = None
        self._owner: Conversation | None = None  # whose cells are in the context
        self._warming: threading.Thread | None = None
        self._cancelled = threading.Event()

    def close(self) -> None:
        """Frees the context, and the model if it was loaded here."""
        if self._warming:
            self._warming.join()
        if self._owner:
            self._owner.forget_parked()
        if self._context:
            self._context.close()
            self._context = self._reader = self._owner = None
        if self._owns_model:
            self.model.close()

    def __enter__(self) -> LaserKV:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def cancel(self) -> None:
        """Stops the reading or answering under way, from any thread: it raises Cancelled."""
        self._cancelled.set()
        if self._context:
            self._context.cancel()

    def _enter(self, answer: Answer | None) -> None:
        """Takes the engine; waits for other threads, and drops what this one left half-way."""
        left = self._active() if self._active else None
        if left is not None and left is not answer and left.thread == threading.get_ident():
            left.close()
        self._lock.acquire()
        self._active = weakref.ref(answer) if answer else None
        self._cancelled.clear()
        if self._context:
            self._context.resume()

    def _leave(self) -> None:
        self._active = None
        self._lock.release()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        self._enter(None)
        try:
            yield
        finally:
            self._leave()

    # answers

    def ask(
        self,
        question: str,
        *,
        document: str | None = None,
        system: str | None = None,
        max_tokens: int = 512,
        sampling: Sampling | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> Reply:
        """Reads the document with the question in mind and answers it.

        Args:
            question: what to ask.
            document: text of any length; None for none.
            max_tokens: of the answer.
            on_progress: called while reading.
            on_text: called with each piece of the answer as it comes.

        Raises:
            UserError: what is asked cannot be done with these settings.
            Cancelled: `cancel` was called.
        """
        stream = self.stream(
            question,
            document=document,
            system=system,
            max_tokens=max_tokens,
            sampling=sampling,
            on_progress=on_progress,
        )
        with stream:
            for piece in stream:
                if on_text:
                    on_text(piece)
        return stream.reply

    def stream(
        self,
        question: str,
        *,
        document: str | None = None,
        system: str | None = None,
        max_tokens: int = 512,
        sampling: Sampling | None = None,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> Answer:
        """Like `ask`, as an iterator over pieces of text; `.reply` is complete at its end."""
        conversation = Conversation(
            self, document=document, system=system, sampling=sampling, max_tokens=max_tokens
        )
        return conversation.begin(question, on_progress=on_progress)

    def conversation(
        self,
        *,
        document: str | None = None,
        system: str | None = None,
        max_tokens: int = 1024,
        sampling: Sampling | None = None,
    ) -> Conversation:
        """A conversation about a document. One lives in the engine at a time."""
        return Conversation(
            self, document=document, system=system, sampling=sampling, max_tokens=max_tokens
        )

    # what a run needs

    def budget(self, tokens: int) -> Budget:
        settings = self.settings
        return self.policy.budget(
            tokens, settings.block_size, settings.ratio, settings.protection_divisor
        )

    def prepare(
        self,
        tokens: int,
        prompt: int,
        reply: int,
        *,
        asked: bool = True,
        budget: Budget | None = None,
        compact: bool | None = None,
    ) -> _Run:
        """Plans a run and makes its reader.

        Args:
            tokens: to be read before the question.
            prompt: the question's, with the template around it.
            reply: cells for what follows the document: question, answer, later turns.
            asked: whether the question is known while reading.
            budget, compact: of a document that was read before; None for what the settings say.

        Raises:
            UserError: the question does not fit a block, the cells do not fit --ctx-size, or the
                positions do not fit what the model was trained for.
        """
        settings = self.settings
        read, budget = budget is not None, budget or self.budget(tokens)
        if prompt > settings.block_size:
            raise UserError(
                f"the question has {prompt} tokens, more than a block of {settings.block_size}; "
                "shorten it, put the long part into a --document, or use a larger --block-size"
            )
        probing = prompt if asked and self.policy.needs.queries else 0
        _, lookahead, _ = self._probe.completed(self.policy.needs)
        drafts = lookahead if probing else 0
        cells = budget.kept + self.recall_cells(budget) + reply
        if not read:
            cells = max(cells, budget.cells(probing, drafts, reply))
        if compact is None:
            compact = self._compacts(budget, tokens + reply)
        if compact:
            rope.check(self.model, self.options)
        if compact and cells > self.model.trained_context:
            most = largest_ratio(
                tokens,
                settings.block_size,
                settings.protection_divisor,
                self.model.trained_context,
                prompt=probing,
                drafts=drafts,
                reply=reply,
                make=self.policy.budget,
            )
            if most:
                remedy = f"use --ratio {most:g} or less"
            elif budget.shape == "one-shot":
                remedy = f"{self.settings.policy} reads all of it before it frees any: use laser"
            else:
                remedy = "use a smaller --block-size"
            raise UserError(
                f"keeping {settings.ratio:g} of {tokens} tokens needs {cells} positions, more than "
                f"the {self.model.trained_context} this model was trained for; {remedy}"
            )
        if self.ctx_size is not None and cells > self.ctx_size:
            raise UserError(
                f"--ctx-size {self.ctx_size} is too small for what must be kept: this run "
                f"needs {cells} cells; use --ctx-size {cells}, a lower --ratio "
                "or a smaller --block-size"
            )
        reader = self._reader_for(self.ctx_size or cells, compact)
        if not budget.keeps_all and self._warming is None:
            self._warming = threading.Thread(target=self._warm_up, name="laserkv-compile")
            self._warming.start()
        return _Run(budget, cells, reader, compact)

    @property
    def _probe(self) -> ProbeSettings:
        return ProbeSettings(self.settings.probe_tokens, self.settings.lookahead)

    def _warm_up(self) -> None:
        """Compiles the policy's kernels while the first block is decoded."""
        try:
            self.policy.warm_up()
            if self.settings.recalling.votes_for(self.policy):
                warm_up()
        except Exception as error:  # the block loop will meet it too, and say so
            log.debug("cannot compile ahead: %s", error)

    def _compacts(self, budget: Budget, positions: int) -> bool:
        wanted = self.settings.positions
        beyond = positions > self.model.trained_context > 0
        if budget.keeps_all or (wanted == "original" or (wanted == "auto" and not beyond)):
            if beyond:
                log.warning(
                    "%d positions are more than the %d this model was trained for: expect nonsense",
                    positions,
                    self.model.trained_context,
                )
            return False
        return True

    def _reader_for(self, cells: int, compact: bool) -> Reader:
        """The reader, over a context that is made anew only when it must grow."""
        if self._context is None or self._context.cells < cells:
            if self._context:
                self._context.close()
                self._context = self._owner = None
            self._context = Context(self.model, cells, self.options)
            self._reader = self._format = None
            from laserkv_gguf import kernels

            kernels.set_threads(self._context.threads)
        self._context.resume()
        if self._cancelled.is_set():
            raise Cancelled("cancelled")
        if self._reader is None or self._reader.compact != compact:
            self._reader = Reader(self._context, self.policy, self._probe, compact=compact)
        return self._reader

    def recall_cells(self, budget: Budget) -> int:
        """Cells beside what is kept and the conversation that recalling needs; 0 without."""
        if self.settings.recall == "off" or budget.keeps_all:
            return 0
        _, lookahead, _ = self._probe.completed(self.policy.needs)
        mode = self.settings.recalling.mode_for(self.policy)
        return Recaller.cells(budget, mode) - budget.kept + lookahead

    def recaller(self, run: _Run) -> Recaller | None:
        """What parks and recalls the document of a run; None without recall, or nothing to recall.

        The context is empty afterwards.

        Raises:
            UserError: neither memory nor disk hold the rows, or they cannot be compacted.
        """
        if self.settings.recall == "off" or run.budget.keeps_all:
            return None
        run.reader.forget()
        try:
            form = self.row_format(run.reader.context)
        except rows.FormatError as error:
            log.warning("recall is off: %s; evicted tokens are lost", error)
            return None
        return Recaller(run.reader, run.budget, form, self.settings.recalling)

    def row_format(self, context: Context) -> rows.Format:
        """The form of the context's rows, tried once.

        Raises:
            FormatError: llama.cpp's state is not what `llama.rows` knows.
        """
        self._format = self._format or rows.check(context)
        return self._format

    def turn_recall_on(self, saved: Mapping[str, Any]) -> None:
        """Recalls from now on, as a saved document's settings have it, unless it does already.

        Raises:
            UserError: not with this policy.
        """
        if self.settings.recall == "off":
            names = ("recall_mode", "recall_bits", "recall_shortlist", "recall_share")
            settings = replace(self.settings, recall="ram", **{name: saved[name] for name in names})
            settings.recalling.check_policy(self.policy)
            self.settings = settings

    def load(
        self, path: str | Path, *, max_tokens: int = 1024, sampling: Sampling | None = None
    ) -> Conversation:
        """A conversation about a document that `Conversation.save` wrote; see `saved.load`."""
        from laserkv_gguf import saved

        return saved.load(self, path, max_tokens=max_tokens, sampling=sampling)

    def first_reader(self, run: _Run) -> Reader:
        """The reader of a document before there is a question, where recall comes later."""
        if self.policy.needs.recall:
            return run.reader
        policy = policies.make(self.settings.recall_first, seed=self.seed & 0xFFFFFFFF)
        return Reader(run.reader.context, policy, self._probe, compact=run.compact)

    @property
    def cell_bytes(self) -> int:
        return self.model.cell_bytes(self.options.type_k, self.options.type_v)


@dataclass(frozen=True)
class _Run:
    budget: Budget
    cells: int
    reader: Reader
    compact: bool


class Answer:
    """Pieces of an answer as they come; `reply` is complete when the iterator ends.

    An answer that is not read to its end is dropped with its question when it is closed, when the
    same thread asks the next one, or at the end of a `with` block. Until then other threads wait.
    """

    def __init__(self, conversation: Conversation, start: Callable[[Reply], Iterator[str]]) -> None:
        self.reply = Reply()
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
        document: text to talk about; None for none.
        system: system prompt.
        max_tokens: of one answer.
    """

    def __init__(
        self,
        engine: LaserKV,
        *,
        document: str | None = None,
        system: str | None = None,
        sampling: Sampling | None = None,
        max_tokens: int = 1024,
    ) -> None:
        if max_tokens < 1:
            raise UserError(f"-n {max_tokens}: give at least 1 token for the answer")
        self.engine, self.system, self.max_tokens = engine, system, max_tokens
        self.document = document
        self.sampling = sampling or Sampling(seed=engine.seed)
        self.turns = 0
        self.reading: Reading | None = None
        self._run: _Run | None = None
        self._position = 0
        self._pending: list[int] = []  # generated, but not decoded yet
        self._used = 0  # cells
        self._document_tokens: Tokens | None = None
        self._unread = False  # the document is left out, because reading it was stopped
        self._recaller: Recaller | None = None
        self._recalled: Recalled | None = None  # for the last question

    # reading

    def _opening(self, question: str) -> Opening:
        return self.engine.template.opening(
            question, system=self.system, document=bool(self.document) and not self._unread
        )

    def _sequence(self, before: Tokens) -> Tokens:
        """Everything in front of the question."""
        if self._unread:
            return before
        if self._document_tokens is None:
            self._document_tokens = self.engine.model.tokenize(self.document or "")
        return np.concatenate((before, self._document_tokens)).astype(np.int32)

    def read(
        self,
        on_progress: Callable[[Progress], None] | None = None,
        *,
        question: str | None = None,
    ) -> Reading:
        """Reads the document, with a question in mind if one is given.

        Without one each block asks for itself. The next `ask` starts the conversation anew.

        Raises:
            UserError, Cancelled, KeyboardInterrupt: nothing of the document stays in the cache.
        """
        self._unread = False
        with self.engine._alone():
            if question is None:
                return self._read_unasked(on_progress)
            return self._read_asked(question, on_progress)

    def _read_asked(
        self, question: str, on_progress: Callable[[Progress], None] | None = None
    ) -> Reading:
        opening = self._opening(question)
        tokens = self._sequence(opening.before)
        return self._read(tokens, opening.after, len(opening.after) + self.max_tokens, on_progress)

    def _read_unasked(self, on_progress: Callable[[Progress], None] | None = None) -> Reading:
        tokens = self._sequence(self._opening("").before)
        return self._read(tokens, None, self._room(self.engine.budget(len(tokens))), on_progress)

    def _room(self, budget: Budget) -> int:
        """Cells for the turns: what --ctx-size leaves, else enough for a few."""
        engine, tokens = self.engine, budget.tokens
        kept = budget.kept + engine.recall_cells(budget)
        if engine.ctx_size is not None:
            return max(self.max_tokens, engine.ctx_size - kept)
        room = max(CONVERSATION_CELLS, 2 * self.max_tokens)
        limit = engine.model.trained_context - kept
        return (
            room
            if limit <= 0 or tokens + room <= engine.model.trained_context
            else min(room, max(limit, self.max_tokens))
        )

    def _read(
        self,
        tokens: Tokens,
        question: Prompt | None,
        reply: int,
        on_progress: Callable[[Progress], None] | None,
    ) -> Reading:
        engine = self.engine
        self.reading, self.turns, self._pending = None, 0, []
        self.forget_parked()
        if engine._owner:
            engine._owner.forget_parked()
        engine._owner = None
        prompt = 0 if question is None else len(question)
        run = engine.prepare(len(tokens), prompt, reply, asked=question is not None)
        recaller = engine.recaller(run)
        reader = engine.first_reader(run) if recaller and question is None else run.reader
        park = partial(recaller.park, reader=reader) if recaller else None
        try:
            reading = reader.read(tokens, run.budget, question, on_progress=on_progress, park=park)
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
        self._read_asked(question, on_progress)
        yield from self._answer(self._opening(question).after, reply, started)

    def ask(self, question: str) -> Answer:
        """The next turn. An answer that is stopped half-way is dropped with its question."""
        return Answer(self, lambda reply: self._turn(question, reply))

    def _turn(self, question: str, reply: Reply) -> Iterator[str]:
        started = time.perf_counter()
        if self.reading is None:
            self._read_unasked()
        self._check_owner()
        self._recall(self._prompt(question))
        yield from self._answer(self._prompt(question), reply, started)

    def recall(self, question: str) -> Recalled | None:
        """Brings the tokens into the cache that the next turn's question needs; `ask` does it too.

        The conversation so far stays as it is. The document must have been read, or is read now.

        Returns:
            What was moved; None without recall, or where everything is in the cache anyway.
        """
        with self.engine._alone():
            if self.reading is None:
                self._read_unasked()
            self._check_owner()
            self._recall(self._prompt(question))
            return self._recalled

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
        """Writes the document as it was read, to be loaded in seconds; see `saved.save`."""
        from laserkv_gguf import saved

        return saved.save(self, path)

    def _adopt(self, run: _Run, reading: Reading, recaller: Recaller | None) -> None:
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
            assert self._run is not None
            context = self._run.reader.context
            prompt = np.concatenate((self._pending, self._prompt(question).tokens))
            wanted = self.engine.model.tokenize(answer)
            if not len(wanted):
                raise UserError("an empty answer has no likelihood")
            room = min(context.cells - self._used - len(prompt), context.options.outputs)
            if len(wanted) > room:
                raise UserError(
                    f"an answer of {len(wanted)} tokens does not fit: there is room for {room}; "
                    "use a larger --ctx-size or a shorter answer"
                )
            tokens = np.concatenate((prompt, wanted[:-1])).astype(np.int32)
            try:
                context.decode(tokens, self._position, MAIN, outputs=len(wanted))
                total = 0.0
                for index, token in enumerate(wanted):
                    logits = context.logits(index - len(wanted)).astype(np.float64)
                    highest = logits.max()
                    total += logits[token] - highest - np.log(np.exp(logits - highest).sum())
            finally:
                Sequence(context, MAIN).remove(self._position, -1)
            return float(total / len(wanted))

    def _answer(self, asked: Prompt, reply: Reply, started: float) -> Iterator[str]:
        assert self._run is not None
        assert self.reading is not None
        context = self._run.reader.context
        before = (self._position, self._used, list(self._pending))
        prompt = np.concatenate((np.array(self._pending, np.int32), asked.tokens))
        room = context.cells - self._used - len(prompt)
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
        self._fill(reply, len(prompt), started, first)

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

    def _fill(self, reply: Reply, prompt: int, started: float, first: float) -> None:
        """Completes the account of an answer."""
        assert self._run is not None
        assert self.reading is not None
        engine, run, reading = self.engine, self._run, self.reading
        budget, timings = reading.budget, reading.timings
        seconds = time.perf_counter() - first
        whole = len(reading.tokens) + self._used - len(reading.kept)
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
            decode_seconds=timings.decode,
            probe_seconds=timings.probe,
            score_seconds=timings.score,
            evict_seconds=timings.evict,
            first_token_seconds=first - started,
            prompt_tokens=prompt,
            generated_tokens=len(reply.tokens),
            decode_tokens_per_second=len(reply.tokens) / seconds if seconds > 0 else 0.0,
            seed=engine.seed,
            ratio=engine.settings.ratio,
            block_size=engine.settings.block_size,
            protection_divisor=engine.settings.protection_divisor,
            positions="compact" if run.compact else "original",
            kept_per_block=reading.kept_per_block,
        )
        if self._recaller:
            reply.account.recall = self._recaller.store.kind
            reply.account.recall_mode = self._recaller.mode
            reply.account.parked_tokens = self._recaller.store.parked
            reply.account.parked_bytes = self._recaller.bytes
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
    def _owns_cells(self) -> bool:
        """Whether the context still holds what this conversation read and said."""
        return self.engine._owner is self

    @property
    def cells_used(self) -> int:
        """Cells of the cache that are taken."""
        return self._used
