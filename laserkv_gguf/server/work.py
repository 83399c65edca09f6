"""Requests that are worked on in threads, and the many that wait for one."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from laserkv_gguf.api import LaserKV
from laserkv_gguf.conversation.ageing import Compressing
from laserkv_gguf.conversation.answer import Answer
from laserkv_gguf.conversation.conversation import Conversation
from laserkv_gguf.conversation.generation import Reply
from laserkv_gguf.errors import Cancelled, Closed, UserError
from laserkv_gguf.llama.model import Tokens
from laserkv_gguf.llama.sampler import Likelihood, Sampling
from laserkv_gguf.reading.reader import Progress
from laserkv_gguf.server.errors import SERVER, ApiError, of, too_long
from laserkv_gguf.server.prompt import Rendered, Request
from laserkv_gguf.server.store import PATIENCE, Entry, Place, Store

log = logging.getLogger(__name__)

_PROGRESS = 0.25  # seconds between two lines about reading
PLANNED = 2048  # tokens of an answer that cells are set aside for; a longer one makes others age


@dataclass(frozen=True)
class Order:
    """What a client wants.

    Attributes:
        salt: which documents may be used.
        owner: whose request it is.
        anew: whether nothing of earlier requests is used, and nothing kept.
        choices: how many answers.
        question: its text, for reports; what is decoded is the request.
    """

    request: Request
    sampling: Sampling
    max_tokens: int
    stop: tuple[str, ...] = ()
    salt: str = ""
    owner: str = ""
    anew: bool = False
    choices: int = 1
    question: str = ""


@dataclass(frozen=True)
class Text:
    """A piece of an answer, with what the model thought of its tokens if that was asked for."""

    choice: int
    text: str
    likelihoods: tuple[Likelihood, ...] = ()


@dataclass(frozen=True)
class Done:
    """An answer's end.

    Attributes:
        there: tokens of the request that were there already.
        seconds: waiting, until the first token, and in all.
    """

    choice: int
    reply: Reply
    there: int
    found: str
    document: str
    waited: float
    first: float
    whole: float
    thinned: int = 0
    written: int = 0


@dataclass(frozen=True)
class Failed:
    """There will be no more."""

    error: ApiError


@dataclass(frozen=True)
class Ended:
    """All is said."""


class _NoRoom(Exception):
    """One more document does not fit beside those that are there."""


Event = Progress | Text | Done | Failed | Ended


@dataclass(eq=False)
class Job:
    """A request under way; its events come in the loop of the server.

    Attributes:
        begun: when it was its turn; 0 before.
    """

    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)
    arrived: float = field(default_factory=time.perf_counter)
    begun: float = 0.0
    answer: Answer | None = None
    ended: threading.Event = field(default_factory=threading.Event)
    _cancelled: threading.Event = field(default_factory=threading.Event)

    def put(self, event: Event) -> None:
        try:
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)
        except RuntimeError:  # the server has ended
            self._cancelled.set()

    @property
    def wanted(self) -> bool:
        return not self._cancelled.is_set()

    def check(self) -> None:
        """Raises `Cancelled` where nobody waits any more."""
        if not self.wanted:
            raise Cancelled("cancelled")

    def cancel(self) -> None:
        """Stops it within a block, from any thread; returns at once."""
        if self._cancelled.is_set():
            return
        self._cancelled.set()
        if (answer := self.answer) is not None:
            # closing waits for the step that is under way
            threading.Thread(target=answer.close, name="laserkv-cancel", daemon=True).start()


class _Places:
    """Lets so many jobs work at a time; of those that could, the one that arrived first."""

    def __init__(self, count: int) -> None:
        self._free, self._waiting = count, list[Job]()
        self._changed = threading.Condition()

    @contextmanager
    def taken(self, job: Job) -> Iterator[None]:
        """Works meanwhile.

        Raises:
            Cancelled: nobody waits for it any more.
        """
        with self._changed:
            self._waiting.append(job)
            try:
                while not self._free or min(self._waiting, key=lambda one: one.arrived) is not job:
                    job.check()
                    self._changed.wait(PATIENCE)
                self._free -= 1
            finally:
                self._waiting.remove(job)
                self._changed.notify_all()
        job.begun = time.perf_counter()
        try:
            yield
        finally:
            with self._changed:
                self._free += 1
                self._changed.notify_all()


class Works:
    """The threads: one for every request, also for those that wait.

    Who waits for a document that another one asks takes no place from those that could be answered.

    Args:
        workers: requests at a time.
        queue: requests that may wait.
    """

    def __init__(self, engine: LaserKV, store: Store, *, workers: int, queue: int) -> None:
        self.engine, self.store, self.queue, self.workers = engine, store, queue, workers
        self._pool = ThreadPoolExecutor(workers + queue, thread_name_prefix="laserkv-serve")
        self._places = _Places(workers)
        self.jobs: set[Job] = set()
        self.closing = False

    @property
    def running(self) -> int:
        return sum(1 for job in list(self.jobs) if job.begun)

    @property
    def waiting(self) -> int:
        return len(self.jobs) - self.running

    def start(self, work: Callable[[Job], None]) -> Job:
        """Has something done as soon as a thread is free; called in the server's loop.

        Raises:
            ApiError: too many wait already, or the server is going down.
        """
        if self.closing:
            raise of(Closed("the server is going down"))
        if len(self.jobs) >= self.workers + self.queue:
            raise ApiError(
                503,
                f"{self.waiting} requests are waiting already; send it again later",
                kind=SERVER,
                code="queue_full",
                headers={"Retry-After": "5"},
            )
        job = Job(asyncio.get_running_loop())
        self.jobs.add(job)
        self._pool.submit(self._run, job, work)
        return job

    def _run(self, job: Job, work: Callable[[Job], None]) -> None:
        try:
            job.check()
            work(job)
            job.put(Ended())
        except BaseException as error:
            if not isinstance(error, (ApiError, Cancelled, Closed, UserError)):
                log.warning("a request failed: %s: %s", type(error).__name__, error)
                log.debug("at", exc_info=error)
            job.put(Failed(of(error)))
        finally:
            self.jobs.discard(job)
            job.ended.set()

    def cancel_all(self) -> None:
        for job in list(self.jobs):
            job.cancel()

    def close(self) -> None:
        """Ends the threads, once all jobs have ended."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    # answering

    def answer(self, job: Job, order: Order, *, first: int = 0) -> None:
        """Answers a request, in a thread.

        Args:
            first: the number of its first answer.
        """
        try:
            self._answer(job, order, first)
        except _NoRoom:
            self._answer(job, order, first, apart=True)

    def _answer(self, job: Job, order: Order, first: int, *, apart: bool = False) -> None:
        found = self.store.place(
            order.request, order.salt, order.owner, lambda: job.wanted, anew=order.anew, apart=apart
        )
        with found as place, self._places.taken(job):
            for choice in range(order.choices):
                job.put(self._one(job, order, place, choice, first + choice))
            if not order.anew:
                # the client has its answer; the document is safe before it is asked again
                self.store.keep(place.entry)

    def _one(self, job: Job, order: Order, place: Place, choice: int, number: int) -> Done:
        job.check()
        started, entry, request = time.perf_counter(), place.entry, order.request
        conversation, there = entry.conversation, place.there
        first = conversation is None
        if conversation is None:
            conversation = self._conversation(order)
            entry.conversation = conversation
        else:
            if choice:
                there = max(there, request.asked)
            conversation.keep_said(there - len(entry.read) + entry.inner)
            if len(request) - there > self.store.block:
                self._read_on(job, order, entry, conversation, there)
                there = request.asked
            asked = request.after(there)
            conversation.framing = Rendered(plain=True, first=request.before, asked=asked)
        conversation.max_tokens, conversation.stop = order.max_tokens, order.stop
        seed = order.sampling.seed + choice - conversation.turns  # the turn's number is added again
        conversation.sampling = replace(order.sampling, seed=seed)
        if first:
            answer = conversation.begin(order.question, on_progress=_thinned(job.put))
        else:
            answer = conversation.ask(order.question)
        job.answer = answer
        job.check()
        told, since = 0, 0.0
        with answer:
            for piece in answer:
                since = since or time.perf_counter()
                likelihoods = answer.reply.likelihoods
                job.put(Text(number, piece, tuple(likelihoods[told:])))
                told = len(likelihoods)
        job.check()
        now = time.perf_counter()
        if rest := tuple(answer.reply.likelihoods[told:]):
            job.put(Text(number, "", rest))
        return Done(
            number,
            answer.reply,
            there if choice else place.there,
            place.found,
            entry.id,
            job.begun - job.arrived,
            (since or now) - started,
            now - started,
            conversation.thinnings,
        )

    def _read_on(
        self, job: Job, order: Order, entry: Entry, conversation: Conversation, there: int
    ) -> None:
        """Reads what a request has behind what is there, as one more document.

        Raises:
            _NoRoom: it does not fit beside what is there.
            Cancelled: nobody waits any more.
        """
        request = order.request
        asked = request.after(request.asked)
        conversation.framing = Rendered(plain=True, first=request.before, asked=asked)
        conversation.max_tokens = min(order.max_tokens, PLANNED)

        def tell(state: Progress) -> None:
            job.check()
            told(state)

        told = _thinned(job.put)
        name = f"document {len(conversation.texts) + 1}"
        try:
            # what the question needs of the earlier ones is there while this one is read
            conversation.recall(order.question)
            tokens = request.tokens[there : request.asked]
            conversation.add(name, tokens, tell, asks=lambda: order.question)
        except Closed:
            raise
        except UserError as error:
            log.info("documents are read together: %s", error)
            raise _NoRoom from None
        entry.has_read(request.before)

    def _conversation(self, order: Order) -> Conversation:
        """A new one, if it fits.

        Raises:
            ApiError: it does not.
        """
        request, engine = order.request, self.engine
        framing = Rendered(
            plain=True,
            first=request.tokens[: min(request.system or 1, request.asked)],
            asked=request.after(request.asked),
        )
        document = request.tokens[len(framing.first) : request.asked]  # type: ignore[arg-type]
        conversation = Conversation(
            engine,
            document=document if len(document) else None,
            system="system" if request.system else None,
            max_tokens=min(order.max_tokens, PLANNED),
            framing=framing,
            ageing=Compressing(),
        )
        try:
            conversation.check("")
        except Closed:
            raise
        except UserError as error:
            raise too_long(str(error), len(request), self.cells) from None
        return conversation

    @property
    def cells(self) -> int:
        """Tokens that a request may have in the cache at a time."""
        return self.engine.share or self.engine.model.trained_context

    # scoring

    def score(self, job: Job, order: Order, top: int) -> list[Likelihood]:
        """What the model thinks of each token of a request after the first.

        Raises:
            ApiError: they are more than a block, in which nothing is evicted.
        """
        tokens, block = order.request.tokens, self.store.block
        if len(tokens) > block:
            raise too_long(
                f"echo with logprobs takes {block} tokens at most, not {len(tokens)}: "
                "of longer texts tokens are evicted, and what is left has other likelihoods",
                len(tokens),
                block,
            )
        if len(tokens) < 2:
            return []
        with self._places.taken(job):
            return self._scored(order, tokens, top)

    def _scored(self, order: Order, tokens: Tokens, top: int) -> list[Likelihood]:
        framing = Rendered(plain=True, first=tokens[:0], asked=order.request.after(0))
        conversation = Conversation(self.engine, framing=framing, max_tokens=len(tokens))
        try:
            found = conversation.likelihoods(tokens, top)
        finally:
            with self.engine.access.inside(conversation):
                self.engine.leave(conversation)
                conversation.lose_cells()
        return found


def _thinned(put: Callable[[Event], None]) -> Callable[[Progress], None]:
    """Tells how far reading is, but not after every micro-batch."""
    last = 0.0

    def tell(state: Progress) -> None:
        nonlocal last
        now = time.perf_counter()
        if now - last >= _PROGRESS or state.read >= state.total:
            last = now
            put(state)

    return tell
