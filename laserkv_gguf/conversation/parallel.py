"""Questions about one document, answered together: one llama.cpp batch over shared cells.

The document is read into the main sequence. Every question gets a sequence of its own to which all
cells of the document belong too (`llama_memory_seq_cp`, nothing is copied), and from then on each
batch holds one token of every answer under way. An answer that ends leaves its place to the next
question.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace

import numpy as np

from laserkv_gguf.budget import padded
from laserkv_gguf.conversation.cells import Cells
from laserkv_gguf.conversation.conversation import Conversation
from laserkv_gguf.conversation.generation import Generation, Reply
from laserkv_gguf.conversation.ledger import TURN, Ledger, Segment
from laserkv_gguf.conversation.looks import Looks, Watch
from laserkv_gguf.engine.engine import Engine
from laserkv_gguf.engine.residents import sequence_count
from laserkv_gguf.errors import Cancelled, Closed, LaserKVError, OutOfMemory, UserError
from laserkv_gguf.llama import sequence
from laserkv_gguf.llama.chat import Prompt
from laserkv_gguf.llama.context import MAX_SEQUENCES, Context
from laserkv_gguf.llama.model import Tokens
from laserkv_gguf.llama.sampler import Sampling
from laserkv_gguf.reading.reader import Progress

FIRST = sequence.SPARE + 1
"""The first of the sequences that answers are generated in."""
MOST = MAX_SEQUENCES - FIRST


class NotRead(LaserKVError):
    """The document could not be read: what every question about it gets, and none is to blame."""


@dataclass(frozen=True)
class Question:
    """One question and how its answer ends.

    Attributes:
        text: what to ask.
        system: system prompt; None for none.
        max_tokens: of the answer, at least 1.
        stop: the answer ends in front of the first of these strings that it would contain.
        sampling: of this answer; None for what all have.
    """

    text: str
    system: str | None = None
    max_tokens: int = 512
    stop: tuple[str, ...] = ()
    sampling: Sampling | None = None


@dataclass
class Spent:
    """What answering took.

    Attributes:
        reading: seconds spent reading documents, `readings` times.
        answering: seconds spent on questions and answers: decoding and sampling.
        tokens: generated.
    """

    reading: float = 0.0
    readings: int = 0
    answering: float = 0.0
    tokens: int = 0
    _inside: int = field(default=0, repr=False)  # calls that are answering now
    _since: float = field(default=0.0, repr=False)

    @property
    def tokens_per_second(self) -> float:
        """Of all answers under way together."""
        return self.tokens / self.answering if self.answering else 0.0

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Counts the seconds in which at least one call is answering."""
        if not self._inside:
            self._since = time.perf_counter()
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1
            if not self._inside:
                self.answering += time.perf_counter() - self._since


def answer(
    engine: Engine,
    questions: Sequence[Question],
    on_reply: Callable[[int, Reply | Exception], None],
    *,
    document: str | None = None,
    sampling: Sampling | None = None,
    parallel: int = 4,
    read_once: bool = False,
    answered: Container[int] = (),
    on_progress: Callable[[Progress], None] | None = None,
    on_kept: Callable[[int, Conversation], None] | None = None,
    watches: bool = False,
    spent: Spent | None = None,
) -> Spent:
    """Answers questions about one document, several at a time.

    The document is tokenised once, and read once where reading does not depend on the question:
    where the policy looks at no queries of a probe, or evicts nothing. Else it is read for each
    question, with that question in mind, and one question is answered at a time. With recall, which
    several questions about a document have by default, it is read once, without a question, and
    every question recalls its own tokens, one at a time.

    Greedy answers are those of `LaserKV.ask`, but for ties so close that the rounding of
    llama.cpp's kernels decides them: these differ for one token and for several.

    Accounts are as of `ask`, and but for the seconds and what recalling moved depend on the
    questions and on `parallel` alone: `kv_bytes` is what the planned `ctx_cells` take. Questions
    that share a reading all carry its seconds in `prefill_seconds`, and `first_token_seconds`
    leaves it out; `decode_tokens_per_second` is what one answer got of the batch.

    Args:
        questions: all of them, also those already answered: cells are planned for all.
        on_reply: called with a question's number and its reply, as soon as that is complete; with
            the error of a question that cannot be answered: a `UserError` is that question's own
            (`OutOfMemory` may not be one elsewhere), `NotRead` is the document's. The engine is
            busy until it returns.
        document: text of any length; None for none.
        sampling: every answer has a sampler of its own with this seed.
        parallel: most answers under way at a time; fewer where --ctx-size holds no more.
        read_once: read once also where the policy would ask the question: `read_policy` chooses
            instead. Faster with many questions, and what only one of them would have kept is more
            easily lost.
        answered: numbers of the questions to leave out.
        on_progress: called while reading.
        on_kept: called with a question's number and the conversation it was answered in, before
            `on_reply`: for reports of what was kept for it. Its `last` is the question.
        watches: whether `last` has what the answer looked at, too. As `Conversation.watches` it
            takes a look at every token's queries, and at all keys at an answer's end.
        spent: added to while answers are generated, and returned.

    Raises:
        UserError: `parallel` cannot be.
        Cancelled: `cancel` was called; answers under way are dropped.
        Closed: the engine is closed; likewise.
    """
    check(parallel, engine)
    with engine.access.inside():
        together = _BatchedAnswers(engine, document, sampling, parallel, on_reply, on_progress)
        together.on_kept, together.watches = on_kept, watches
        together.spent = together.spent if spent is None else spent
        try:
            together.run(questions, read_once, answered)
        finally:
            together.leave()
        return together.spent


def check(parallel: int, engine: Engine) -> None:
    """Refuses a number of answers that llama.cpp cannot generate at a time.

    Raises:
        UserError: with the remedy in one line.
    """
    most = min(MOST, engine.options.batch)
    if not 1 <= parallel <= most:
        raise UserError(f"--parallel {parallel}: give 1 to {most} answers at a time")


def _figure(number: int) -> str:
    """A number of any size, in a line."""
    return str(number) if number < 10**20 else "over 10^20"


@dataclass(frozen=True)
class _Planned:
    """A question that fits."""

    index: int
    question: Question
    before: Tokens
    prompt: Prompt
    asked: bool
    recalls: bool
    compact: bool
    kept: int

    @property
    def cells(self) -> int:
        """For its prompt and its answer."""
        return len(self.prompt) + self.question.max_tokens


@dataclass
class _Live:
    """An answer under way, in its own sequence."""

    planned: _Planned
    cells: sequence.Sequence
    position: int
    generation: Generation
    started: float
    watch: Watch | None = None
    first: float = 0.0
    decoded: int = 0
    error: Exception | None = None

    @property
    def ended(self) -> bool:
        return bool(self.error or self.generation.ended)

    def looks(self, read: Cells) -> Looks | None:
        """What it looked at; its cells are still there.

        Args:
            read: of the conversation that has read the document.
        """
        if self.watch is None or self.error is not None:
            return None
        prompt, said = self.planned.prompt.tokens, self.generation.reply.tokens
        ledger = Ledger.of_rows(dict(read.ledger.segments), read.ledger.rows)
        number = ledger.new(Segment(TURN))
        ledger.extend(number, prompt.astype(np.int32), self.position)
        before = len(ledger)
        ledger.extend(number, np.array(said, np.int32), ledger.next_position)
        cells = Cells(read.context, self.cells.number, ledger=ledger)
        return self.watch.looks(cells, before, len(said))

    def leave(self) -> None:
        """Frees its cells; the document's stay."""
        self.generation.close()
        self.cells.remove()


class _BatchedAnswers:
    """One call of `answer`."""

    def __init__(
        self,
        engine: Engine,
        document: str | None,
        sampling: Sampling | None,
        parallel: int,
        on_reply: Callable[[int, Reply | Exception], None],
        on_progress: Callable[[Progress], None] | None,
    ) -> None:
        self.engine, self.document, self.parallel = engine, document, parallel
        self.sampling = sampling or Sampling(seed=engine.seed)
        self.on_reply, self.on_progress = on_reply, on_progress
        self.spent = Spent()
        self.tokens = engine.model.tokenize(document or "")
        self.conversation: Conversation | None = None
        self.on_kept: Callable[[int, Conversation], None] | None = None
        self.watches = False
        self.recall = engine.demand.recall

    def leave(self) -> None:
        """Frees what the document takes."""
        if self.conversation is not None:
            self.engine.leave(self.conversation)
            self.conversation.lose_cells()

    def run(self, questions: Sequence[Question], read_once: bool, answered: Container[int]) -> None:
        """Sorts the questions by what is read before them, and answers those of one kind."""
        place = self._place_rows(len(questions), read_once)
        self.recall = "off" if self._without_recall(questions, place) else place
        kinds: dict[tuple[str | None, bool], list[_Planned]] = {}
        for index, question in enumerate(questions):
            try:
                planned = self._plan(index, question, read_once)
            except (Cancelled, Closed):
                raise
            except Exception as error:
                if index not in answered:
                    self.on_reply(index, error)
                continue
            kinds.setdefault((question.system, planned.compact), []).append(planned)
        for (system, _), alike in kinds.items():
            self.leave()
            waiting = [planned for planned in alike if planned.index not in answered]
            conversation = self._conversation(system)
            if alike[0].recalls:
                self._answer_recalling(conversation, alike, waiting)
            elif alike[0].asked:
                for planned in waiting:
                    self._answer(conversation, [planned], [planned])
            elif waiting:
                self._answer(conversation, alike, waiting)

    def _conversation(self, system: str | None) -> Conversation:
        """What reads the document for questions of one kind, in place of the one before."""
        self.leave()
        made = Conversation(
            self.engine, document=self.tokens, system=system, one_turn=True, recall=self.recall
        )
        made.watches = self.watches
        self.conversation = made
        return made

    def _place_rows(self, questions: int, read_once: bool) -> str:
        """Where rows go: as the settings say, or where several questions share a document.

        Reading once and choosing anew for each takes a fraction of reading once for each.
        """
        engine = self.engine
        if engine.settings.recall != "auto" or questions < 2 or read_once:
            return engine.demand.recall
        if not engine.policy.needs.queries or not len(self.tokens):
            return engine.demand.recall
        if engine.policy.budget(8, 2, 0.5, 4).keeps_all:
            return "off"
        return engine.place_rows(len(self.tokens))

    def _without_recall(self, questions: Sequence[Question], place: str) -> bool:
        """Whether cells that the user has counted are too few for it, which is told."""
        if place == "off" or self.engine.settings.recall != "auto" or self.engine.share is None:
            return False
        self.recall = place
        try:
            for index, question in enumerate(questions):
                self._plan(index, question, False)
        except (Cancelled, Closed):
            raise
        except Exception as refused:
            self.recall = "off"
            try:  # is it the question's own fault?
                self._plan(index, question, False)
            except (Cancelled, Closed):
                raise
            except Exception:
                return False
            self.engine.say_recall_is_off(str(refused))
            return True
        return False

    def _plan(self, index: int, question: Question, read_once: bool) -> _Planned:
        """Alone, as `ask` would."""
        engine = self.engine
        if question.max_tokens < 1:
            raise UserError(f"-n {question.max_tokens}: give at least 1 token for the answer")
        most = engine.model.trained_context
        if question.max_tokens > most > 0:
            raise UserError(
                f"an answer of {_figure(question.max_tokens)} tokens is longer than the {most} "
                f"this model was trained for; give at most {most}"
            )
        opening = engine.template.opening(
            question.text, system=question.system, document=bool(self.document)
        )
        prompt, tokens = len(opening.after), len(opening.before) + len(self.tokens)
        if len(self.tokens):
            engine.settings.check_keep(tokens)
        recalls = self.recall != "off"
        asked = engine.policy.needs.queries and not read_once and not recalls
        plan = engine.plan(
            tokens,
            prompt,
            prompt + question.max_tokens,
            question_known=asked,
            protected=len(opening.before) if question.system else 0,
            recall=self.recall,
        )
        asked = asked and any(block.evicts for block in plan.budget.blocks)
        return _Planned(
            index,
            question,
            opening.before,
            opening.after,
            asked,
            recalls and not plan.budget.keeps_all,
            plan.compact,
            plan.budget.kept,
        )

    def _answer(
        self, conversation: Conversation, alike: list[_Planned], waiting: list[_Planned]
    ) -> None:
        """Reads, then answers all that are waiting; cells are planned for all that are alike."""
        began = time.perf_counter()
        ready, places = self._read(conversation, alike, waiting, self.parallel)
        if ready:
            self._generate(conversation, ready, places, began if ready[0].asked else None)

    def _answer_recalling(
        self, conversation: Conversation, alike: list[_Planned], waiting: list[_Planned]
    ) -> None:
        """Reads once; then each question recalls its own tokens and is answered alone."""
        ready, _ = self._read(conversation, alike, waiting, 1)
        if not conversation.sources.parked and self.engine.settings.recall == "auto":
            # nothing could be parked, which was told: each has to read for itself
            self.recall = "off"
            conversation = self._conversation(conversation.system)
            for planned in ready:
                alone = replace(planned, asked=True, recalls=False)
                self._answer(conversation, [alone], [alone])
            return
        for planned in ready:
            began = time.perf_counter()
            try:
                conversation.recall_for(planned.prompt)
            except (Cancelled, Closed):
                raise
            except Exception as error:
                self.on_reply(planned.index, error)
                continue
            self._generate(conversation, [planned], 1, began)

    def _read(
        self,
        conversation: Conversation,
        alike: list[_Planned],
        waiting: list[_Planned],
        together: int,
    ) -> tuple[list[_Planned], int]:
        """Reads the document with cells for as many answers at a time as there is memory for.

        Where memory does not hold even one, the question that wants most is refused alone, and the
        others are tried without it. No cell is filled before the memory is there, so trying costs
        no reading. Any other error is the answer to all that wait.

        Returns:
            The questions that can be answered now, and how many at a time.
        """
        most = together
        while waiting:
            cells = self._places(alike, most)
            try:
                self._make_ready(conversation, waiting[0], cells)
            except (Cancelled, Closed):
                raise
            except OutOfMemory as error:
                if len(cells) > 1:
                    most = len(cells) // 2
                    continue
                for planned in waiting:
                    if planned.cells == cells[0]:
                        self.on_reply(planned.index, error)
                alike = [planned for planned in alike if planned.cells < cells[0]]
                waiting = [planned for planned in waiting if planned.cells < cells[0]]
                most = together
            except Exception as error:
                said: Exception = error
                if isinstance(error, UserError) and len(alike) > 1:
                    said = NotRead(str(error))
                for planned in waiting:
                    self.on_reply(planned.index, said)
                break
            else:
                return waiting, len(cells)
        return [], 0

    def _places(self, alike: list[_Planned], most: int) -> list[int]:
        """For each answer under way the cells it may need: the largest there are, in that order.

        Whichever questions meet, they need no more than this.
        """
        cells = sorted((planned.cells for planned in alike), reverse=True)[:most]
        limit = self.engine.share
        while limit is not None and len(cells) > 1 and alike[0].kept + sum(cells) > limit:
            cells.pop()
        return cells

    def _make_ready(self, conversation: Conversation, planned: _Planned, cells: list[int]) -> None:
        """Has what belongs to the document in the main sequence, for a question or for all."""
        self._reserve()
        reading = conversation.read_for_many(
            planned.prompt if planned.asked else None,
            cells[0],
            self.on_progress,
            extra_cells=sum(cells[1:]),
        )
        self.spent.reading += reading.timings.total
        self.spent.readings += 1

    def _reserve(self) -> None:
        """Enough sequences; a context that was made with fewer is made anew."""
        engine, needed = self.engine, self._first_sequence + self.parallel
        if engine.parallel == 1 and engine.options.sequences < needed:
            engine.options = replace(engine.options, sequences=needed)

    @property
    def _first_sequence(self) -> int:
        """The first of the sequences that answers are generated in; conversations have others."""
        most = self.engine.residents.most
        return FIRST if most == 1 else sequence_count(most)

    def _numbers(self, most: int) -> list[int]:
        """Sequences for answers; where calls share them as many as are free, at least one."""
        engine = self.engine
        if engine.parallel == 1:
            return list(range(self._first_sequence, self._first_sequence + most))
        while not (numbers := engine.residents.take_numbers(most)):
            engine.access.wait_for_cells(1)
        return numbers

    # answering

    def _generate(
        self,
        conversation: Conversation,
        waiting: list[_Planned],
        places: int,
        began: float | None,
    ) -> None:
        """Answers as many at a time as there are places; `began`: when reading for one did."""
        context = conversation.cells.context
        queue = deque(waiting)
        numbers = self._numbers(min(places, len(queue)))
        free = list(numbers)
        live: list[_Live] = []
        try:
            while queue or live:
                while queue and free:
                    try:
                        one = self._begin(conversation, context, queue[0], free[0])
                    except Exception as error:
                        self.on_reply(queue.popleft().index, error)
                        continue
                    queue.popleft()
                    free.pop(0)
                    one.started = began or one.started
                    live.append(one)
                    with self.spent.timed():
                        self._ask(context, conversation.cells.main, one)
                with self.spent.timed():
                    self._step(context, [one for one in live if not one.ended])
                for one in [one for one in live if one.ended]:
                    looks = one.looks(conversation.cells)
                    live.remove(one)
                    one.leave()
                    free.append(one.cells.number)
                    self._deliver(conversation, one, looks)
        finally:
            for one in live:
                one.leave()
            if self.engine.parallel > 1:
                self.engine.residents.give_numbers(numbers)
                self.engine.access.turns.cells_are_free()

    def _begin(
        self, conversation: Conversation, context: Context, planned: _Planned, number: int
    ) -> _Live:
        question, engine = planned.question, self.engine
        generation = Generation(
            engine.model,
            question.sampling or self.sampling,
            question.max_tokens,
            stop=question.stop,
            ignore_end=engine.ignore_end,
        )
        return _Live(
            planned,
            sequence.Sequence(context, number),
            conversation.cells.position,
            generation,
            time.perf_counter(),
            Watch(context) if self.watches else None,
        )

    def _ask(self, context: Context, main: sequence.Sequence, one: _Live) -> None:
        """Decodes the question behind the document, and samples the answer's first token."""
        tokens = one.planned.prompt.tokens
        try:
            main.share_with(one.cells)
            with one.watch.last_of(len(tokens)) if one.watch else nullcontext():
                context.decode(tokens, one.position, one.cells.number, outputs=1)
            one.first = time.perf_counter()
            one.decoded = len(tokens)
            self._sample(context, one, -1)
        except (Cancelled, Closed):
            raise
        except Exception as error:
            one.error = error

    def _step(self, context: Context, live: list[_Live]) -> None:
        """One more token for every answer, in one batch."""
        self.engine.access.check_cancelled()
        if not live:
            return
        try:
            with Watch.one_each([one.watch for one in live if one.watch]):
                context.decode_parallel(
                    [one.generation.last for one in live],
                    [one.position + one.decoded for one in live],
                    [one.cells.number for one in live],
                )
            for row, one in enumerate(live):
                one.decoded += 1
                self._sample(context, one, row)
        except (Cancelled, Closed):
            raise
        except Exception as error:
            for one in live:
                if not one.ended:
                    one.error = error

    def _sample(self, context: Context, one: _Live, row: int) -> None:
        before = len(one.generation.reply.tokens)
        one.generation.sample(context.handle, context.row(row))
        self.spent.tokens += len(one.generation.reply.tokens) - before

    def _deliver(self, conversation: Conversation, one: _Live, looks: Looks | None) -> None:
        reply, planned = one.generation.reply, one.planned
        if one.error is not None:
            self.on_reply(planned.index, one.error)
            return
        conversation.fill(reply, len(planned.prompt), one.started, one.first, apart=one.decoded)
        # the context may be larger, for what was asked before; that is no cost of this answer
        reply.account.kv_bytes = padded(conversation.run.cells) * self.engine.cell_bytes
        conversation.note(planned.question.text, reply, looks)
        if self.on_kept:
            self.on_kept(planned.index, conversation)
        self.on_reply(planned.index, reply)
