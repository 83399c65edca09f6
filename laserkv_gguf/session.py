"""A model that answers about documents: the Python API.

`LaserKV` holds the model and one context sized by what will be kept. `ask` answers one question
about one document; a `Conversation` keeps a document and its turns.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from laserkv_gguf import policies
from laserkv_gguf.budget import (
    LOW_RATIO,
    Budget,
    largest_ratio_that,
    ratio_keeping,
)
from laserkv_gguf.conversation import Answer, Conversation, Reply, Run
from laserkv_gguf.engine import ProbeSettings, Progress, Reader
from laserkv_gguf.errors import Cancelled, UserError
from laserkv_gguf.llama import rope, rows, trial
from laserkv_gguf.llama.chat import ChatTemplate
from laserkv_gguf.llama.context import Context, ContextOptions
from laserkv_gguf.llama.model import Model
from laserkv_gguf.llama.sampler import Sampling
from laserkv_gguf.recall import Recaller, warm_up
from laserkv_gguf.settings import Settings

if TYPE_CHECKING:
    from laserkv_gguf.talk import Talk

log = logging.getLogger(__name__)

__all__ = ["Cancelled", "Conversation", "LaserKV", "Reply", "Sampling", "Settings"]


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
        given = "ratio" in settings or settings.get("keep") is not None
        self.fills_cells = ctx_size is not None and not given
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
        """What of so many tokens is kept, at the settings' ratio or number of tokens."""
        settings = self.settings

        def make(ratio: float) -> Budget:
            budget = self.policy.budget(
                tokens, settings.block_size, ratio, settings.protection_divisor
            )
            return replace(budget, protected=protected)

        keep = settings.keep
        return make(settings.ratio if keep is None else ratio_keeping(keep, tokens, make))

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
    ) -> Run:
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
        return Run(budget, cells, reader, compact)

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

    def recaller(self, run: Run, offset: int = 0, number: int = 0) -> Recaller | None:
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

    def first_reader(self, run: Run) -> Reader:
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
