"""A model that answers about documents: the Python API.

`LaserKV` holds the model and one context sized by what will be kept. `ask` answers one question
about one document; a `Conversation` keeps documents and turns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from laserkv_gguf.conversation.ageing import Compressing
from laserkv_gguf.conversation.answer import Answer
from laserkv_gguf.conversation.conversation import Conversation
from laserkv_gguf.conversation.generation import Reply
from laserkv_gguf.conversation.many import Outcome, Request, ask_many
from laserkv_gguf.engine.engine import Engine
from laserkv_gguf.files import archive
from laserkv_gguf.llama.sampler import Sampling
from laserkv_gguf.reading.reader import Progress
from laserkv_gguf.saving import conversation as saved_conversation
from laserkv_gguf.saving import document as saved_document
from laserkv_gguf.saving import schema
from laserkv_gguf.saving.file import Saved


class LaserKV(Engine):
    """A model and a compressed cache to ask documents with.

    Args:
        model: path of a GGUF, or a loaded `llama.model.Model`.
        gpu_layers: layers on the GPU; None for all where the build and machine can.
        ctx_size: cells of the KV cache; None for what each run needs.
        context: types, batch sizes, threads and flash attention of the context.
        seed: of the sampler and of the policy's randomness.
        placement: which devices are used and what goes where; see `llama.placement.Placement`.
        residents: conversations that stand in the cache at a time; with `ctx_size` each may take
            an equal part of the cells.
        aside: bytes of memory for conversations whose cells others want: they are put aside, the
            oldest beyond that in files, and come back bit for bit when they are asked next. None:
            they lose their cells, and have to be read again.
        parallel: requests that may be under way at a time, from any threads; as many conversations
            at least can stand in the cache.
        queue: calls that may wait to be let in; one more is refused with `Busy`.
        lookup: most tokens of an answer that are guessed at a time by copying from the documents,
            and checked in one batch: faster where answers quote. 0 for none. The answer is the same
            but for the rounding of llama.cpp's kernels, which differ for one token and for several.
        threads: for single tokens; None to try how many are fastest. Others, and batches, are in
            `context`.
        **settings: fields of `Settings` (ratio=0.25, policy="laser", …). With `ctx_size` and
            without a `ratio` each run keeps as much as fits into these cells.

    Calls from several threads run together, as far as `parallel` goes, and queue beyond. Once it is
    closed, and in a process forked off after it was made, every call raises `Closed`.

    Raises:
        UserError: unusable model or settings.
    """

    def __enter__(self) -> LaserKV:
        self.access.check()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(
        self,
        question: str,
        *,
        document: str | None = None,
        system: str | None = None,
        max_tokens: int = 512,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
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
            stop: the answer ends in front of the first of these strings that it would contain.
            on_progress: called while reading, after every micro-batch.
            on_text: called with each piece of the answer as it comes.

        Raises:
            UserError: what is asked cannot be done with these settings.
            Closed: the engine is closed.
            Cancelled: `cancel` was called.
            LaserKVError: llama.cpp failed.
        """
        stream = self.stream(
            question,
            document=document,
            system=system,
            max_tokens=max_tokens,
            sampling=sampling,
            stop=stop,
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
        stop: Sequence[str] = (),
        on_progress: Callable[[Progress], None] | None = None,
    ) -> Answer:
        """Like `ask`, as an iterator over pieces of text; `.reply` is complete at its end.

        Reading begins when the first piece is asked for, and each piece is generated when it is.

            for piece in engine.stream("Who is Jack's mother?", document=text):
                print(piece, end="", flush=True)

        Args:
            question, document, system, max_tokens, sampling, stop, on_progress: as of `ask`.

        Raises:
            UserError, Cancelled: as `ask`, while it is iterated over. `cancel` may come from any
                thread; leaving the loop, or `Answer.close`, drops the answer as well. What is read
                on after its thread has asked the engine something else is Cancelled, too.
        """
        conversation = Conversation(
            self,
            document=document,
            system=system,
            sampling=sampling,
            max_tokens=max_tokens,
            stop=stop,
            one_turn=True,
        )
        return conversation.begin(question, on_progress=on_progress)

    async def aask(
        self,
        question: str,
        *,
        document: str | None = None,
        system: str | None = None,
        max_tokens: int = 512,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        on_progress: Callable[[Progress], None] | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> Reply:
        """As `ask`, for an event loop: it computes in a thread, and a cancelled task drops it.

        For the pieces as they come iterate over `stream` or `Conversation.ask` with `async for`.

        Args:
            question, document, system, max_tokens, sampling, stop: as of `ask`.
            on_progress: called while reading, in the thread that reads.
            on_text: called with each piece of the answer, in the loop's thread.

        Raises:
            UserError, Closed, Cancelled, LaserKVError: as of `ask`.
        """
        stream = self.stream(
            question,
            document=document,
            system=system,
            max_tokens=max_tokens,
            sampling=sampling,
            stop=stop,
            on_progress=on_progress,
        )
        async for piece in stream:
            if on_text:
                on_text(piece)
        return stream.reply

    def ask_many(self, requests: Iterable[Request]) -> Iterator[Outcome]:
        """Answers many questions, `parallel` at a time; what ends first comes first.

            for done in engine.ask_many(Request(q, document=text) for q in questions):
                print(done.index, done.reply.text if done.reply else done.error)

        Requests are taken as places become free, so there may be any number of them. What cannot
        be answered has its error in its outcome, and the others go on. Closing the iterator stops
        what is under way.

        Raises:
            Closed: the engine is closed.
        """
        self.access.check()
        return ask_many(self._begin, requests, self.parallel)

    def _begin(self, request: Request) -> Answer:
        return self.stream(
            request.question,
            document=request.document,
            system=request.system,
            max_tokens=request.max_tokens,
            sampling=request.sampling,
            stop=request.stop,
        )

    def conversation(
        self,
        *,
        document: str | None = None,
        documents: Mapping[str, str] | None = None,
        system: str | None = None,
        max_tokens: int = 1024,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
    ) -> Conversation:
        """A conversation about a document, or several.

        It has no end: what was said is compressed when it outgrows the cache (see `Compressing`).
        With recall on every question also recalls its own tokens of the documents.

        Args:
            document: text to talk about; None for none.
            documents: texts by name, to drop and add later.
            system: system prompt; None for none.
            max_tokens: of one answer, at least 1.
            sampling, stop: as of `ask`.

        Raises:
            UserError: max_tokens below 1.
        """
        return Conversation(
            self,
            document=document,
            documents=documents,
            system=system,
            sampling=sampling,
            max_tokens=max_tokens,
            stop=stop,
            ageing=Compressing(),
        )

    def save(self, conversation: Conversation, path: str | Path) -> int:
        """What `Conversation.save` does."""
        if conversation.ageing.endless:
            return saved_conversation.save(conversation, path)
        return saved_document.save(conversation, path)

    def load(
        self,
        path: str | Path | Saved,
        *,
        max_tokens: int = 1024,
        sampling: Sampling | None = None,
    ) -> Conversation:
        """A document or a conversation that `Conversation.save`, `ask --save` or `/save` wrote.

        A document is as it was read, no turn of it was saved; a conversation goes on after its
        last turn. The file is data that may come from anybody: see `saving.schema`.

        Args:
            path: the file, or what `saving.schema.read` made of it.
            max_tokens, sampling: of the answers.

        Raises:
            UserError: no such file, a damaged one, one of another model, build or cache type, with
                something in it that is not allowed, or one that does not fit the context; the
                message says which, and what the engine holds stays.
        """
        self.access.check()
        with schema.read(path) as file:
            if file.kind == archive.CONVERSATION:
                return saved_conversation.load(self, file, max_tokens=max_tokens, sampling=sampling)
            return saved_document.load(self, file, max_tokens=max_tokens, sampling=sampling)
