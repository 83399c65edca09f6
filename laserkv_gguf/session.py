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
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from laserkv_gguf import policies
from laserkv_gguf.budget import (
    LOW_RATIO,
    RATIO,
    Account,
    Budget,
    check_settings,
    largest_ratio_that,
)
from laserkv_gguf.engine import ProbeSettings, Progress, Reader, Reading
from laserkv_gguf.errors import Cancelled, UserError
from laserkv_gguf.llama import rope, rows, trial
from laserkv_gguf.llama.chat import ChatTemplate, Opening, Prompt
from laserkv_gguf.llama.context import Context, ContextOptions
from laserkv_gguf.llama.model import Model, PieceDecoder, Tokens
from laserkv_gguf.llama.sampler import Sampler, Sampling
from laserkv_gguf.llama.sequence import MAIN, Sequence
from laserkv_gguf.recall import Recalled, Recaller, RecallSettings, warm_up
from laserkv_gguf.timings import STEPS

if TYPE_CHECKING:
    from laserkv_gguf.talk import Talk

log = logging.getLogger(__name__)

POSITIONS = ("auto", "original", "compact")
SCORING = ("host", "device")
CONVERSATION_CELLS = 2048  # room for turns beside what is kept, where no --ctx-size says otherwise

__all__ = ["Cancelled", "Conversation", "LaserKV", "Reply", "Sampling", "Settings"]


@dataclass(frozen=True)
class Settings:
    """How documents are compressed; the command line's flags of the same names.

    Attributes:
        policy: a name of `laserkv_gguf.policies`, or `module:Class`.
        ratio: fraction of the tokens to keep, in (0, 1]. Where it is not given but `ctx_size` is,
            `LaserKV` takes the largest that fits instead.
        block_size: tokens read at a time (S).
        protection_divisor: n; anchors and window get ``B // n`` tokens each.
        alpha, pool, hash_bits, hash_tables: see `policies.laser.Laser`; None for its defaults.
        lookahead: tokens drafted after the question to ask with; None for the policy's own number.
        probe_tokens: of the question, the last so many ask, 0 for all; None for the policy's own.
        positions: "original", "compact", or "auto": compact only beyond the trained context.
        scoring: where attention is computed: "host", or "device": where the cache is.
        policy_options: fields of the policy's class, as `policies.parse` gives them.
        recall: "ram" or "disk" to park rows of evicted tokens there and to choose anew among all
            of the document for every question of a conversation; "off" to lose them.
        recall_mode, recall_file, recall_bits, recall_shortlist, recall_share, recall_first: see
            `recall.RecallSettings`.
    """

    policy: str = "laser"
    ratio: float = RATIO
    block_size: int = 4096
    protection_divisor: int = 4
    alpha: float | None = None
    pool: int | None = None
    hash_bits: int | None = None
    hash_tables: int | None = None
    lookahead: int | None = None
    probe_tokens: int | None = None
    positions: str = "auto"
    scoring: str = "host"
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
        if self.scoring not in SCORING:
            raise UserError(f"--scoring {self.scoring} is unknown; use {', '.join(SCORING)}")
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
        **settings: fields of `Settings` (ratio=0.25, policy="laser", …). With `ctx_size` and
            without a `ratio` each run keeps as much as fits into these cells.

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
        self.ctx_size, self.seed = ctx_size, seed
        if settings.get("ratio", 0.0) is None:
            del settings["ratio"]
        self.fills_cells = ctx_size is not None and "ratio" not in settings
        self.options = context or ContextOptions()
        self.options.check()
        wanted = Settings(**settings)
        if context is None and wanted.block_size > self.options.batch_size:
            self.options = replace(self.options, batch_size=wanted.block_size)
        self._use(wanted)
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

    def _use(self, settings: Settings) -> None:
        settings.check()
        if settings.block_size > self.options.batch_size:
            raise UserError(
                f"a block of {settings.block_size} tokens is larger than the batch of "
                f"{self.options.batch_size} it is decoded in; "
                f"use -b {settings.block_size}, or --block-size {self.options.batch_size}"
            )
        policy = settings.make_policy(self.seed)
        settings.recalling.check_policy(policy)
        self.policy, self.settings = policy, settings

    def configure(self, **changes: Any) -> None:
        """Changes settings; what was read stays readable only in the answers already given.

        The context stays, so that several policies can be compared without making it anew.

        Raises:
            UserError: unusable settings; the old ones stay.
        """
        with self._alone():
            self._use(replace(self.settings, **changes))
            if self._owner:
                self._owner.forget_parked()
            self._reader = self._owner = None
            if self._warming:
                self._warming.join()
                self._warming = None

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
        """Stops the reading or answering under way, from any thread: it raises Cancelled.

        Calls of other threads that wait for their turn are not stopped, and with nothing under way
        nothing is. The engine can be used as before.
        """
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
            system: system prompt; None for none.
            max_tokens: of the answer, at least 1.
            sampling: temperature and the like; None for greedy.
            on_progress: called while reading, after every micro-batch.
            on_text: called with each piece of the answer as it comes.

        Raises:
            UserError: what is asked cannot be done with these settings.
            Cancelled: `cancel` was called.
            LaserKVError: llama.cpp failed.
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
        """Like `ask`, as an iterator over pieces of text; `.reply` is complete at its end.

        Reading begins when the first piece is asked for, and each piece is generated when it is.

            for piece in engine.stream("Who is Jack's mother?", document=text):
                print(piece, end="", flush=True)

        Args:
            question, document, system, max_tokens, sampling, on_progress: as of `ask`.

        Raises:
            UserError, Cancelled: as `ask`, while it is iterated over. `cancel` may come from any
                thread; leaving the loop, or `Answer.close`, drops the answer as well.
        """
        conversation = Conversation(
            self, document=document, system=system, sampling=sampling, max_tokens=max_tokens
        )
        conversation.goes_on = False
        return conversation.begin(question, on_progress=on_progress)

    def conversation(
        self,
        *,
        document: str | None = None,
        documents: Mapping[str, str] | None = None,
        system: str | None = None,
        max_tokens: int = 1024,
        sampling: Sampling | None = None,
    ) -> Talk:
        """A conversation about a document, or several. One lives in the engine at a time.

        It has no end: what was said is compressed when it outgrows the cache (see `talk.Talk`).
        With recall on every question also recalls its own tokens of the documents.

        Args:
            document: text to talk about; None for none.
            documents: texts by name, to drop and add later.
            system: system prompt; None for none.
            max_tokens: of one answer, at least 1.
            sampling: as of `ask`.

        Raises:
            UserError: max_tokens below 1.
        """
        from laserkv_gguf.talk import Talk

        return Talk(
            self,
            document=document,
            documents=documents,
            system=system,
            sampling=sampling,
            max_tokens=max_tokens,
        )

    # what a run needs

    def budget(self, tokens: int, protected: int = 0) -> Budget:
        """What of so many tokens is kept, at the settings' ratio."""
        settings = self.settings
        budget = self.policy.budget(
            tokens, settings.block_size, settings.ratio, settings.protection_divisor
        )
        return replace(budget, protected=protected)

    def plan(
        self,
        tokens: int,
        prompt: int,
        reply: int,
        *,
        asked: bool = True,
        beside: int = 0,
        protected: int = 0,
        budget: Budget | None = None,
        compact: bool | None = None,
    ) -> _Plan:
        """What a run needs; nothing is made.

        Args:
            tokens: to be read before the question.
            prompt: the question's, with the template around it.
            reply: cells for what follows the document: question, answer, later turns.
            asked: whether the question is known while reading.
            beside: cells for answers to other questions, generated at the same time.
            protected: first tokens that stay whole (a system prompt).
            budget, compact: of a document that was read before; None for what the settings say.

        Returns:
            The budget, the cells, and whether positions are compacted.

        Raises:
            UserError: the question does not fit a block, the cells do not fit --ctx-size, or the
                positions do not fit what the model was trained for.
        """
        settings = self.settings

        def make(*shape: Any) -> Budget:
            return replace(self.policy.budget(*shape), protected=protected)

        def needed(budget: Budget) -> int:
            return max(
                0 if read else budget.cells(probing, drafts, reply),
                budget.kept + self.recall_cells(budget) + reply,
            )

        if prompt > settings.block_size:
            raise UserError(
                f"the question has {prompt} tokens, more than a block of {settings.block_size}; "
                "shorten it, put the long part into a --document, or use a larger --block-size"
            )
        probing = prompt if asked and self.policy.needs.queries else 0
        _, lookahead, _ = self._probe.completed(self.policy.needs)
        drafts = lookahead if probing else 0
        read = budget is not None
        if budget is None and self.fills_cells:
            budget = make(
                tokens,
                settings.block_size,
                self._ratio(tokens, reply, needed, make),
                settings.protection_divisor,
            )
        budget = budget or self.budget(tokens, protected)
        cells = needed(budget)
        if compact is None:
            compact = self._compacts(budget, tokens + reply)
        if compact:
            rope.check(self.model, self.options)
        if compact and cells > self.model.trained_context:
            most = largest_ratio_that(
                lambda budget: needed(budget) <= self.model.trained_context,
                tokens,
                settings.block_size,
                settings.protection_divisor,
                make,
            )
            if most:
                remedy = f"use --ratio {most:g} or less"
            elif budget.shape == "one-shot":
                remedy = f"{self.settings.policy} reads all of it before it frees any: use laser"
            else:
                remedy = "use a smaller --block-size"
            raise UserError(
                f"keeping {budget.ratio:g} of {tokens} tokens needs {cells} positions, more than "
                f"the {self.model.trained_context} this model was trained for; {remedy}"
            )
        cells = max(cells, budget.kept + reply + beside)
        if self.ctx_size is not None and cells > self.ctx_size:
            raise UserError(
                f"--ctx-size {self.ctx_size} is too small for what must be kept: this run "
                f"needs {cells} cells; use --ctx-size {cells}, a lower --ratio "
                "or a smaller --block-size"
            )
        return _Plan(budget, cells, compact)

    def prepare(
        self,
        tokens: int,
        prompt: int,
        reply: int,
        *,
        asked: bool = True,
        beside: int = 0,
        protected: int = 0,
        whole: bool = False,
        budget: Budget | None = None,
        compact: bool | None = None,
    ) -> _Run:
        """Plans a run and makes its reader; arguments and errors as of `plan`.

        Args:
            whole: with cells for all tokens beside the reply, if --ctx-size has them.
        """
        plan = self.plan(
            tokens,
            prompt,
            reply,
            asked=asked,
            beside=beside,
            protected=protected,
            budget=budget,
            compact=compact,
        )
        budget, cells, compact = plan.budget, plan.cells, plan.compact
        if whole and tokens + reply <= (self.ctx_size or tokens + reply):
            cells = max(cells, tokens + reply)
        if not compact and tokens + reply > self.model.trained_context > 0:
            log.warning(
                "%d positions are more than the %d this model was trained for: expect nonsense",
                tokens + reply,
                self.model.trained_context,
            )
        reader = self._reader_for(self.ctx_size or cells, compact)
        if not budget.keeps_all:
            self._warm_up_beside()
        return _Run(budget, cells, reader, compact)

    def _ratio(
        self,
        tokens: int,
        reply: int,
        needed: Callable[[Budget], int],
        make: Callable[[int, int, float, int], Budget],
    ) -> float:
        """The largest ratio whose run fits --ctx-size; the least there is where none does."""
        cells, settings = self.ctx_size or 0, self.settings
        if settings.positions != "original" and tokens + reply > self.model.trained_context > 0:
            cells = min(cells, self.model.trained_context)
        ratio = largest_ratio_that(
            lambda budget: needed(budget) <= cells,
            tokens,
            settings.block_size,
            settings.protection_divisor,
            make,
        )
        if 0 < ratio < LOW_RATIO:
            log.warning(
                "--ctx-size %d leaves room for %g of %d tokens: expect poor answers",
                self.ctx_size,
                ratio,
                tokens,
            )
        return ratio or 0.001

    @property
    def _probe(self) -> ProbeSettings:
        return ProbeSettings(self.settings.probe_tokens, self.settings.lookahead)

    def _warm_up_beside(self) -> None:
        if self._warming is None:
            self._warming = threading.Thread(target=self._warm_up, name="laserkv-compile")
            self._warming.start()

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
        return not budget.keeps_all and (wanted == "compact" or (wanted == "auto" and beyond))

    def _reader_for(self, cells: int, compact: bool) -> Reader:
        """The reader, over a context that is made anew only when it must grow."""
        if self._context is None or self._context.cells < cells:
            if self._context:
                self._context.close()
                self._context = self._owner = None
            self._context = Context(self.model, cells, self.options)
            self._reader = self._format = None
        self._context.resume()
        if self._cancelled.is_set():
            raise Cancelled("cancelled")
        if self._reader is None or self._reader.compact != compact:
            self._reader = Reader(
                self._context,
                self.policy,
                self._probe,
                compact=compact,
                scoring=self.settings.scoring,
            )
        return self._reader

    def recall_cells(self, budget: Budget) -> int:
        """Cells beside what is kept and the conversation that recalling needs; 0 without."""
        if self.settings.recall == "off" or budget.keeps_all:
            return 0
        _, lookahead, _ = self._probe.completed(self.policy.needs)
        mode = self.settings.recalling.mode_for(self.policy)
        return budget.cells_to_recall(mode) - budget.kept + lookahead

    def recaller(self, run: _Run, offset: int = 0, number: int = 0) -> Recaller | None:
        """What parks and recalls the document of a run; None without recall, or nothing to recall.

        The context is empty afterwards, unless the document has an offset.

        Args:
            offset: the position where it begins.
            number: of the document where others are parked beside it, for its file's name.

        Raises:
            UserError: neither memory nor disk hold the rows, or they cannot be compacted.
        """
        if self.settings.recall == "off" or run.budget.keeps_all:
            return None
        if not offset:
            run.reader.forget()
        try:
            form = self.row_format(run.reader.context)
        except rows.FormatError as error:
            log.warning("recall is off: %s; evicted tokens are lost", error)
            return None
        settings = self.settings.recalling
        if number and settings.file is not None:
            settings = replace(settings, file=f"{settings.file}.{number}")
        return Recaller(run.reader, run.budget, form, settings, offset)

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
        """A document or a conversation that `Conversation.save`, `ask --save` or `/save` wrote.

        A document is as it was read, no turn of it was saved (`saved_document`); a conversation
        goes on after its last turn (`saved_talk`).

        Raises:
            UserError: no such file, a damaged one, one of another model, build or cache type, or
                one that does not fit the context; the message says which.
        """
        from laserkv_gguf import saved, saved_document, saved_talk

        if saved.kind(path) == saved.CONVERSATION:
            return saved_talk.load(self, path, max_tokens=max_tokens, sampling=sampling)
        return saved_document.load(self, path, max_tokens=max_tokens, sampling=sampling)

    def first_reader(self, run: _Run) -> Reader:
        """The reader of a document before there is a question, where recall comes later."""
        if self.policy.needs.recall:
            return run.reader
        policy = policies.make(self.settings.recall_first, seed=self.seed & 0xFFFFFFFF)
        return Reader(run.reader.context, policy, self._probe, compact=run.compact)

    @property
    def context(self) -> Context | None:
        """llama.cpp's context, once a run has needed one."""
        return self._context

    @property
    def cell_bytes(self) -> int:
        return self.model.cell_bytes(self.options.type_k, self.options.type_v)


@dataclass(frozen=True)
class _Plan:
    budget: Budget
    cells: int
    compact: bool


@dataclass(frozen=True)
class _Run:
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
        self._run: _Run | None = None
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
            settings = replace(self.engine.settings, ratio=ratio)
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
            ratio=budget.ratio if engine.fills_cells else engine.settings.ratio,
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
