"""Answers a file of questions in input order. A stopped run continues where it stopped.

Questions are answered in groups, document by document. `Batch.run` is the whole of it: which groups
there are depends on the questions alone, answering a group on the engine alone, and where a line
goes on the output alone, so a group can be answered anywhere.
"""

from __future__ import annotations

import threading
import unicodedata
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any

from laserkv_gguf.api import LaserKV
from laserkv_gguf.batch import openai
from laserkv_gguf.batch.crew import Crew
from laserkv_gguf.batch.output import Output, OutputError
from laserkv_gguf.batch.questions import Input, Item, digest_of
from laserkv_gguf.conversation.conversation import Conversation
from laserkv_gguf.conversation.generation import Reply
from laserkv_gguf.conversation.parallel import Question, Spent, answer
from laserkv_gguf.errors import Cancelled, Closed, LaserKVError, OutOfMemory, UserError
from laserkv_gguf.llama.sampler import Sampling
from laserkv_gguf.reading.reader import Progress


class Stopped(LaserKVError):
    """A question failed, and --fail-fast was given."""


@dataclass(frozen=True)
class Group:
    """Questions about one document.

    Attributes:
        indices: of the questions, in input order.
        answered: those of them that have their line already; cells are planned for them as well.
    """

    indices: tuple[int, ...]
    answered: Set[int] = frozenset()


@dataclass
class Batch:
    """A run: which questions, with what engine, to where.

    Attributes:
        engine: answers; None where groups are answered elsewhere (`cluster`).
        read_document: the text of a path.
        document, system, max_tokens: for questions that bring none of their own.
        parallel, read_once: see `parallel.answer`.
        fail_fast: stop at the first question that cannot be answered.
        spent, documents: what the run took so far, and for how many documents.
        on_progress: called while a document is read.
        on_line: called after each line, with whether it is an answer.
        on_kept: called with a question and the conversation it was answered in, before its line is
            written: for reports of what was kept for it.
    """

    engine: LaserKV | None
    questions: Input
    output: Output
    read_document: Callable[[str], str]
    sampling: Sampling
    max_tokens: int
    document: str | None = None
    system: str | None = None
    parallel: int = 4
    read_once: bool = False
    fail_fast: bool = False
    on_progress: Callable[[Progress], None] | None = None
    on_line: Callable[[bool], None] | None = None
    on_kept: Callable[[Item, Conversation], None] | None = None
    spent: Spent = field(default_factory=Spent)
    documents: int = 0
    _lock: Any = field(default_factory=threading.RLock, repr=False)  # of questions and output

    def run(self) -> None:
        """Answers what has not been answered yet, document by document.

        Several documents at a time where the engine takes several calls.

        Raises:
            OutputError, Cancelled, KeyboardInterrupt: what was answered is kept.
            Stopped: with `fail_fast`; the question that failed has no line, and is asked again.
        """
        assert self.engine is not None
        self.refuse()
        groups = self.groups()
        if min(self.engine.parallel, len(groups)) > 1:
            Crew(self.engine, iter(groups), lambda group: self.answer(group, self.add)).work()
            return
        for group in groups:
            self.answer(group, self.add)

    def refuse(self) -> None:
        """Writes the lines of questions that cannot be asked."""
        done = self.output.done
        for index, item in enumerate(self.questions.items):
            if item.error and index not in done:
                self.add(index, _failed(item, UserError(item.error), retry=False))

    def groups(self) -> list[Group]:
        """Questions that belong together, with one left to answer, by their first question."""
        done, groups = self.output.done, dict[tuple[str | None, bool], list[int]]()
        for index, item in enumerate(self.questions.items):
            if not item.error:
                groups.setdefault((item.document, item.inline), []).append(index)
        return [
            Group(tuple(indices), done.intersection(indices))
            for indices in groups.values()
            if not done.issuperset(indices)
        ]

    def answer(
        self,
        group: Group,
        put: Callable[[int, dict[str, Any]], None],
        text: Callable[[], str | None] | None = None,
    ) -> None:
        """Answers the questions of a group that have no line yet.

        Args:
            put: called with a question's index and its line, as soon as that is complete.
            text: gives the document; None for `document_of`.
        """
        assert self.engine is not None
        left = [index for index in group.indices if index not in group.answered]
        items = {index: self.questions.items[index] for index in group.indices}
        with self._lock:
            self.documents += 1

        def replied(number: int, reply: Reply | Exception) -> None:
            index = group.indices[number]
            line = self._line(items[index], reply)
            left.remove(index)
            put(index, line)

        def kept(number: int, conversation: Conversation) -> None:
            if self.on_kept:
                self.on_kept(items[group.indices[number]], conversation)

        try:
            document = self.document_of(group) if text is None else text()
            answer(
                self.engine,
                [
                    Question(
                        item.question,
                        item.system or self.system,
                        item.max_tokens or self.max_tokens,
                        item.stop,
                        replace(self.sampling, **item.sampling) if item.sampling else None,
                    )
                    for item in items.values()
                ],
                replied,
                document=document,
                sampling=self.sampling,
                parallel=self.parallel,
                read_once=self.read_once,
                answered={
                    number for number, index in enumerate(group.indices) if index in group.answered
                },
                on_progress=self.on_progress,
                on_kept=kept if self.on_kept else None,
                watches=self.on_kept is not None,
                spent=self.spent,
            )
        except (Cancelled, Closed, OutputError, Stopped, BrokenPipeError):
            raise
        except Exception as error:  # none of the questions is to blame
            for index in left:
                put(index, _failed(items[index], error, retry=True))

    def failed(self, group: Group, error: Exception) -> None:
        """Writes that the questions of a group could not be asked, which none is to blame for."""
        for index in group.indices:
            if index not in group.answered:
                self.add(index, _failed(self.questions.items[index], error, retry=True))

    def document_of(self, group: Group) -> str | None:
        """The text, as long as it is the one that other questions about it were answered with.

        Raises:
            LaserKVError: it cannot be read, or was changed meanwhile.
        """
        item = self.questions.items[group.indices[0]]
        with self._lock:
            return self._text(item, begun=bool(group.answered))

    def _text(self, item: Item, *, begun: bool) -> str | None:
        if item.inline:
            return self.questions.text(item)
        if item.document is None:
            return self.document
        text = self.read_document(item.document)
        digest = digest_of(text)
        if begun and self.output.documents.get(item.document, digest) != digest:
            raise _changed(item.document)
        self.output.note_document(item.document, digest)
        return text

    def _line(self, item: Item, reply: Reply | Exception) -> dict[str, Any]:
        """A question's line of the output."""
        if isinstance(reply, Exception):
            own = isinstance(reply, UserError) and not isinstance(reply, OutOfMemory)
            return _failed(item, reply, retry=not own)
        if item.model is not None and item.id is not None:
            assert self.engine is not None
            return openai.answered(item.id, item.model or self.engine.model.name, reply)
        line: dict[str, Any] = {
            "id": item.id,
            "answer": reply.text,
            "finish_reason": reply.finish_reason,
            "account": reply.account.as_dict(),
        }
        if item.expected:
            line["score"] = int(contains(reply.text, item.expected))
        return line

    def add(self, index: int, line: dict[str, Any]) -> None:
        """Writes a line, unless it is an error and none may be."""
        with self._lock:
            self._write(index, line)

    def _write(self, index: int, line: dict[str, Any]) -> None:
        error = line.get("error")
        if self.fail_fast and error is not None:
            said = error if isinstance(error, str) else error["message"]
            raise Stopped(f"line {self.questions.items[index].line}: {said}")
        self.output.add(index, line)
        if self.on_line:
            self.on_line(error is None)


def _failed(item: Item, error: Exception, *, retry: bool) -> dict[str, Any]:
    """An error's line; `retry`: the line of the input alone does not explain it."""
    said = (
        error.with_flags if isinstance(error, LaserKVError) else f"{type(error).__name__}: {error}"
    )
    line: dict[str, Any] = {"id": item.id, "line": item.line, "error": said}
    if item.model is not None and item.id is not None:
        line = openai.failed(item.id, item.line, said)
    return {**line, "retry": True} if retry else line


def check_documents(questions: Input, output: Output, read_document: Callable[[str], str]) -> None:
    """Refuses to go on with questions about a file that was changed since others were answered.

    Files whose questions have all been answered, or none of them, are not read; one that cannot be
    read is left to its questions.

    Raises:
        UserError: with the remedy in one line.
    """
    done = output.done
    groups: dict[str, list[bool]] = {}
    for index, item in enumerate(questions.items):
        if item.document in output.documents and not item.inline and not item.error:
            groups.setdefault(item.document, []).append(index in done)
    for path, answered in groups.items():
        if any(answered) and not all(answered):
            try:
                digest = digest_of(read_document(path))
            except UserError:
                continue
            if digest != output.documents[path]:
                raise _changed(path)


def _changed(path: str) -> UserError:
    return UserError(
        f"{path} was changed after some of its questions had been answered; put it back as it was, "
        "or use another --output to ask all of them again"
    )


def contains(answer: str, expected: Sequence[str]) -> bool:
    """Whether an answer contains one of the texts, whatever their case, spaces and width (NFKC)."""
    found = _plain(answer)
    return any(_plain(text) in found for text in expected)


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
