"""Questions in JSONL in, answers in JSONL out, in input order; what was stopped goes on.

The output grows line by line and always holds the answers to the first so many questions. Questions
are answered document by document, so an answer may come before its turn: until then it waits in
the record, a second file beside the output (`OUTPUT.run`), whose first line says what run this is.
Every line is on disk before the next answer is begun. A kill can tear the last line of either file;
what is torn is cut off at the next start.

A line with an error is final where the question's own line explains it. Where something else does
(no memory, a document that is missing, llama.cpp), it has `"retry": true`, and the next start asks
that question again. The record also says which text of a `document_path` was read, so that no run
mixes two versions of it.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import os
import sys
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from laserkv_gguf.api import LaserKV
from laserkv_gguf.conversation.generation import Reply
from laserkv_gguf.conversation.parallel import Question, Spent, answer
from laserkv_gguf.errors import Cancelled, Closed, LaserKVError, OutOfMemory, UserError
from laserkv_gguf.files.journal import append, decoded, encoded, whole_lines
from laserkv_gguf.files.lock import lock
from laserkv_gguf.llama.sampler import Sampling
from laserkv_gguf.reading.reader import Progress

FIELDS = ["id", "question", "document", "document_path", "system", "max_tokens", "stop", "expected"]
RECORD = ".run"
_MAGIC = b'{"laserkv_gguf batch": '
_PRIVATE = 0o600  # the record: nobody needs it but the run itself
_ELSEWHERE = "give --output a file in a folder that can be written to"


class OutputError(LaserKVError):
    """The output cannot be written any more; everything before stays and can be gone on from."""


class Stopped(LaserKVError):
    """A question failed, and --fail-fast was given."""


# ---- questions in -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Item:
    """One line of the input.

    Attributes:
        line: its number in the file, from 1.
        id: text or a number; None where the line has none that can be used.
        offset: where the line begins in the file, in bytes.
        document: what it is about: a digest of its text, a path, or None for the document of all.
        inline: whether the text stands in the line.
        expected: what a right answer contains, any of them.
        error: why it cannot be asked; empty where it can.
    """

    line: int
    id: str | int | None = None
    offset: int = 0
    question: str = ""
    document: str | None = None
    inline: bool = False
    system: str | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    expected: tuple[str, ...] = ()
    error: str = ""


@dataclass(frozen=True)
class Input:
    """All questions of a file; the documents that stand in it stay there until they are read.

    Attributes:
        items: in the file's order.
        digest: sha256 of the file.
    """

    file: IO[bytes]
    items: list[Item]
    digest: str

    def text(self, item: Item) -> str:
        """The document that stands in a line.

        Raises:
            LaserKVError: the file has changed since it was looked through.
        """
        self.file.seek(item.offset)
        try:
            text = _parse(self.file.readline())["document"]
        except (_Unusable, KeyError):
            text = None
        if not isinstance(text, str) or digest_of(text) != item.document:
            raise LaserKVError("the input file was changed while its questions were answered")
        return text


class _Unusable(Exception):
    """Why a line cannot be asked."""


def read(file: IO[bytes], name: str, folder: Path, *, strict: bool = False) -> Input:
    """Looks through a JSONL file; lines that cannot be used become items with an error.

    Args:
        file: seekable.
        name: what to call it in errors.
        folder: where relative `document_path`s start.
        strict: refuse a file with a line that cannot be used.

    Raises:
        UserError: there is no usable question in it.
    """
    items: list[Item] = []
    seen: dict[tuple[type, Any], int] = {}
    digest, offset = hashlib.sha256(), 0
    for number, raw in enumerate(file, 1):
        digest.update(raw)
        if raw.strip(b" \t\r\n\xef\xbb\xbf"):
            items.append(_item(raw, number, offset, seen, folder))
        offset += len(raw)
    if not items:
        raise UserError(f"{name} is empty; give one JSON object a line, with id and question")
    bad = [item for item in items if item.error]
    if bad and (strict or len(bad) == len(items)):
        raise UserError(f"{name}, line {bad[0].line}: {bad[0].error}")
    return Input(file, items, digest.hexdigest())


def _item(
    raw: bytes, number: int, offset: int, seen: dict[tuple[type, Any], int], folder: Path
) -> Item:
    try:
        values = _parse(raw)
    except _Unusable as error:
        return Item(number, error=str(error))
    name = values.get("id")
    if not isinstance(name, (str, int)) or isinstance(name, bool) or not _sound(name):
        said = 'no "id"' if name is None else f'"id" is {_short(name)}'
        return Item(number, error=f"{said}; give every question a text or whole number of its own")
    key = (type(name), name)
    if key in seen:
        return Item(number, name, error=f"line {seen[key]} has the same id; give it another")
    seen[key] = number
    try:
        return Item(number, name, offset, **_fields(values, folder))
    except _Unusable as error:
        return Item(number, name, error=str(error))


def _parse(raw: bytes) -> dict[str, Any]:
    try:
        values = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise _Unusable(f"not UTF-8 (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise _Unusable(f"not JSON: {error.msg} (column {error.colno})") from None
    except (ValueError, RecursionError) as error:
        raise _Unusable(f"not JSON: {error}") from None
    except MemoryError:
        raise _Unusable("too large to be read as JSON") from None
    if not isinstance(values, dict):
        raise _Unusable("not a JSON object; write {…} with id and question")
    return values


def _fields(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What an item takes, checked."""
    for name in values:
        near = difflib.get_close_matches(name, FIELDS, n=1, cutoff=0.8)
        if name not in FIELDS and near:
            raise _Unusable(f'"{name}" is unknown; did you mean "{near[0]}"?')
    given = {name: value for name, value in values.items() if value is not None}
    for name in ("question", "document", "document_path", "system"):
        if name in given and not (isinstance(given[name], str) and _sound(given[name])):
            raise _Unusable(f'"{name}" is {_short(given[name])}; give a text')
    if not given.get("question", "").strip():
        raise _Unusable('no "question"' if "question" not in given else '"question" is empty')
    if "document" in given and "document_path" in given:
        raise _Unusable('both "document" and "document_path"; give one of them')
    for name in ("document", "document_path"):
        if name in given and not given[name].strip():
            raise _Unusable(f'"{name}" is empty; leave it out for none')
    limit = given.get("max_tokens")
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        raise _Unusable(f'"max_tokens" is {_short(limit)}; give a number of at least 1')
    inline = "document" in given
    path = given.get("document_path")
    return {
        "question": given["question"],
        "document": digest_of(given["document"])
        if inline
        else path and str((folder / path).absolute()),
        "inline": inline,
        "system": given.get("system") or None,
        "max_tokens": limit,
        "stop": _texts("stop", given),
        "expected": _texts("expected", given),
    }


def _texts(name: str, given: Mapping[str, Any]) -> tuple[str, ...]:
    """One text or several."""
    value = given.get(name, [])
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(
        isinstance(text, str) and text.strip(None if name == "expected" else "") and _sound(text)
        for text in texts
    ):
        raise _Unusable(f'"{name}" is {_short(value)}; give a text, or a list of texts')
    return tuple(texts)


def _sound(value: Any) -> bool:
    """Whether a text can be written as UTF-8: JSON can name halves of a character."""
    try:
        str(value).encode()
    except UnicodeEncodeError:
        return False
    return True


def _short(value: Any) -> str:
    said = json.dumps(value)
    return said if len(said) <= 40 else f"{said[:39]}…"


def digest_of(text: str) -> str:
    """Tells one text from another."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


# ---- answers out --------------------------------------------------------------------------------


class Output:
    """The answers' file and the record beside it.

    `load` looks at what is there and changes nothing. As a context manager it takes hold of both
    files, heals what was torn, and writes.

    Args:
        path: where the answers go.
        run: what makes this run this one: named values, as JSON has them.
        ids: of all questions, in order.

    Raises:
        UserError: what is there belongs to something else, or nothing can be written there.
    """

    def __init__(self, path: Path, run: Mapping[str, Any], ids: Sequence[Any]) -> None:
        self.path, self.ids = path, ids
        self.record = path.with_name(path.name + RECORD)
        self.run: dict[str, Any] = json.loads(json.dumps(run, default=str))
        self.documents: dict[str, str] = {}  # digests of the texts that paths had
        self._written = 0  # lines of the output
        self._waiting: dict[int, bytes] = {}  # lines whose turn has not come
        self._retry: set[int] = set()  # written or waiting, and to be asked again by the next start
        self._behind: list[bytes] = []  # lines of the output from the first of these on
        self._sizes: dict[Path, int] = {}  # of what is whole, in bytes
        self._files: dict[Path, int] = {}

    # what is there

    @property
    def done(self) -> set[int]:
        """Numbers of the questions that have their line and keep it."""
        return {*range(self._written), *self._waiting}

    def __len__(self) -> int:
        """How many questions have their line and keep it."""
        return self._written + len(self._waiting)

    @property
    def complete(self) -> bool:
        """Whether every question has its line."""
        return self._written == len(self.ids)

    def load(self) -> None:
        """Finds out where the run stands.

        Raises:
            UserError: the files are another run's, or no run's, or cannot be written.
        """
        self._written, self._waiting, self._sizes = 0, {}, {}
        self.documents, self._retry, self._behind = {}, set(), []
        output, record = _contents(self.path), _contents(self.record)
        if record and not record.startswith(_MAGIC[: len(record)]):
            raise UserError(f"{self.record} is in the way: no batch left it; use another --output")
        header, ended, journal = (record or b"").partition(b"\n")
        run = decoded(header).get("run") if ended else None
        run = run if isinstance(run, dict) else None
        answers = b'{"index": ' in journal
        if not output and (output is None or run is None or (run != self.run and not answers)):
            return
        if run is None:
            raise UserError(f"{self.path} is there already, and no batch left it; {self._else}")
        if run != self.run:
            raise UserError(f"{self.path} is of another run: {self._difference(run)}; {self._else}")
        lines, waiting = whole_lines(output or b""), whole_lines(journal)
        again = {number for number, line in enumerate(lines) if self._check(number, line)}
        keep = min(again, default=len(lines))
        self._written, self._behind = keep, lines[keep:]
        for entry in waiting:
            self._note(decoded(entry), len(lines))
        for number in range(keep, len(lines)):
            if number not in again:
                self._waiting[number] = lines[number]
        self._sizes = {
            self.path: sum(map(len, lines)),
            self.record: len(self._header) + sum(map(len, waiting)),
        }

    def _note(self, entry: Mapping[str, Any], written: int) -> None:
        """Takes in an entry of the record: a line that waits, or the digest of a document.

        What is neither, as a damaged line, only costs asking again.
        """
        index, line = entry.get("index"), entry.get("line")
        path, digest = entry.get("document"), entry.get("sha256")
        if isinstance(path, str) and isinstance(digest, str):
            self.documents[path] = digest
        if type(index) is not int or not written <= index < len(self.ids):
            return
        if isinstance(line, dict) and line.get("id", self) == self.ids[index]:
            self._waiting.pop(index, None)  # of two the later one holds
            if line.get("retry") is not True:
                self._waiting[index] = encoded(line)

    @property
    def _else(self) -> str:
        both = f" and {self.record.name}" if self.record.exists() else ""
        return f"use another --output, or remove it{both}"

    def _difference(self, run: Mapping[str, Any]) -> str:
        """The first thing that tells two runs apart."""
        name = next(key for key in {**self.run, **run} if self.run.get(key) != run.get(key))
        if name in ("input", "document"):
            return f"the {name} was different"
        return f"{name} was {_short(run.get(name))} and is {_short(self.run.get(name))}"

    def _check(self, at: int, line: bytes) -> bool:
        """Refuses what somebody else wrote there; says whether it is to be asked again."""
        said = decoded(line)
        if at >= len(self.ids) or said.get("id", self) != self.ids[at]:
            raise UserError(
                f"line {at + 1} of {self.path} is not the answer that belongs there; {self._else}"
            )
        return said.get("retry") is True

    # writing

    def __enter__(self) -> Output:
        try:
            self._hold(self.record)
            # on Windows a lock would keep our own reading out, too
            if sys.platform != "win32" and not lock(self._files[self.record]):
                raise UserError(f"another batch is writing {self.path}; wait until it has ended")
            self.load()  # again: it may have gone on since
            with contextlib.suppress(OSError, AttributeError):  # not ours, or Windows
                os.fchmod(self._files[self.record], _PRIVATE)
            self._hold(self.path)
            self._heal()
            _settle(self.path.parent)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        while self._files:
            os.close(self._files.popitem()[1])

    def _hold(self, path: Path) -> None:
        """Opens a file. Answers are as readable as the umask has it; the record is ours alone."""
        mode = _PRIVATE if path == self.record else 0o666
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
        try:
            self._files[path] = os.open(path, flags, mode)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}; {_ELSEWHERE}") from None

    def _heal(self) -> None:
        """Cuts off what is torn and what is asked again, or begins anew."""
        for path, file in self._files.items():
            os.ftruncate(file, self._sizes.get(path, 0))
        if not self._sizes:
            self._append(self.record, self._header)
        if self._behind:
            # what stays of it waits in the record before it leaves the output
            moved = [
                encoded({"index": index, "line": decoded(line)})
                for index, line in enumerate(self._behind, self._written)
                if index in self._waiting
            ]
            self._append(self.record, b"".join(moved))
            size = self._sizes[self.path] - sum(map(len, self._behind))
            os.ftruncate(self._files[self.path], size)
            self._behind = []
        self._release([])

    @property
    def _header(self) -> bytes:
        return _MAGIC + b"1, " + json.dumps({"run": self.run}).encode()[1:] + b"\n"

    def add(self, index: int, line: Mapping[str, Any]) -> None:
        """Puts a line where it belongs, on disk before this returns.

        Raises:
            OutputError: the disk is full, or gone.
        """
        if index < self._written or index in self._waiting:
            raise ValueError(f"question {index} has its line already")
        if line.get("retry") is True:
            self._retry.add(index)
        if index == self._written:
            self._release([encoded(line)])
            return
        self._append(self.record, encoded({"index": index, "line": line}))
        self._waiting[index] = encoded(line)

    def _release(self, lines: list[bytes]) -> None:
        """Writes lines, and those whose turn has come with them."""
        end = self._written + len(lines)
        while end in self._waiting:
            lines.append(self._waiting[end])
            end += 1
        if lines:
            self._append(self.path, b"".join(lines))
        for index in range(self._written, end):
            self._waiting.pop(index, None)
        self._written = end
        if self.complete and not self._retry:
            self._close_record()

    def _close_record(self) -> None:
        """From now on it only says whose output this is."""
        os.ftruncate(self._files[self.record], len(self._header))

    def note_document(self, path: str, digest: str) -> None:
        """Remembers the text that a path has, before the first answer about it.

        Raises:
            OutputError: the disk is full, or gone.
        """
        if self.documents.get(path) != digest:
            self._append(self.record, encoded({"document": path, "sha256": digest}))
            self.documents[path] = digest

    def _append(self, path: Path, data: bytes) -> None:
        try:
            append(self._files[path], data, sync=True)
        except OSError as error:
            raise OutputError(
                f"cannot write {path}: {error.strerror}; the {len(self)} answers so far are "
                "kept: make room, and the same command goes on after them"
            ) from error

    # what came of it

    def lines(self) -> Iterator[dict[str, Any]]:
        """What stands in the output."""
        with self.path.open("rb") as file:
            yield from map(decoded, file)


class Stream(Output):
    """Answers written to a file that cannot be read again, in order; nothing to go on from.

    Args:
        file: where the answers go, as standard output.
        ids: of all questions, in order.
    """

    def __init__(self, file: IO[bytes], ids: Sequence[Any]) -> None:
        super().__init__(Path("-"), {}, ids)
        self._file = file
        self._counted: list[dict[str, Any]] = []

    def load(self) -> None:
        """There is nothing to look at."""

    def __enter__(self) -> Stream:
        return self

    def _append(self, path: Path, data: bytes) -> None:
        """Writes at once, so that who reads a pipe sees each answer as it comes.

        Raises:
            OutputError: the disk is full, or gone.
            BrokenPipeError: nobody reads any more.
        """
        if path == self.record:  # what waits is in memory
            return
        try:
            self._file.write(data)
            self._file.flush()
        except BrokenPipeError:
            raise
        except (OSError, ValueError) as error:
            said = error.strerror if isinstance(error, OSError) else error
            raise OutputError(
                f"cannot write standard output: {said}; name a file with --output to go on later"
            ) from error
        for line in map(decoded, data.splitlines()):
            names = ("error", "retry", "score")
            self._counted.append({name: line[name] for name in names if name in line})

    def _close_record(self) -> None:
        """There is none."""

    def lines(self) -> Iterator[dict[str, Any]]:
        """Of each line that was written what `summary` counts."""
        yield from self._counted


def _contents(path: Path) -> bytes | None:
    """All of a file; None where there is none yet.

    Raises:
        UserError: it cannot be read again or written.
    """
    if not path.parent.is_dir():
        raise UserError(f"there is no folder {path.parent}; {_ELSEWHERE}")
    if path.is_dir():
        raise UserError(f"{path} is a folder; name the file to write")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"cannot write {path}: no permission; {_ELSEWHERE}")
    if path.exists() and not path.is_file():
        raise UserError(
            f"{path} is no plain file, and could not be gone on from; {_ELSEWHERE}, or -o - for "
            "standard output"
        )
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; {_ELSEWHERE}") from error


def _settle(folder: Path) -> None:
    """Has the names of new files on disk too, where the system can."""
    with contextlib.suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def check_apart(output: Path, inputs: Sequence[Path]) -> None:
    """Refuses to write where the run reads.

    Raises:
        UserError: with the remedy in one line.
    """
    for written in (output, output.with_name(output.name + RECORD)):
        for path in inputs:
            same = os.path.realpath(written) == os.path.realpath(path)
            if same or (written.exists() and path.exists() and written.samefile(path)):
                raise UserError(f"{path} is read and would be written; use another --output")


def fingerprint(model: Path) -> str:
    """Tells one model file from another without reading all of it: name, size, both ends."""
    size, end = model.stat().st_size, 1 << 20
    with model.open("rb") as file:
        ends = file.read(end)
        file.seek(max(0, size - end))
        ends += file.read(end)
    return f"{model.name} {size} {hashlib.sha256(ends).hexdigest()[:16]}"


# ---- what happens in between --------------------------------------------------------------------


@dataclass
class Batch:
    """A run: which questions, with what engine, to where.

    Attributes:
        read_document: the text of a path.
        document, system, max_tokens: for questions that bring none of their own.
        parallel, read_once: see `parallel.answer`.
        fail_fast: stop at the first question that cannot be answered.
        spent, documents: what the run took so far, and for how many documents.
        on_progress: called while a document is read.
        on_line: called after each line, with whether it is an answer.
    """

    engine: LaserKV
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
    spent: Spent = field(default_factory=Spent)
    documents: int = 0

    def run(self) -> None:
        """Answers what has not been answered yet, document by document.

        Raises:
            OutputError, Cancelled, KeyboardInterrupt: what was answered is kept.
            Stopped: with `fail_fast`; the question that failed has no line, and is asked again.
        """
        items, done = self.questions.items, self.output.done
        groups: dict[tuple[str | None, bool], list[int]] = {}
        for index, item in enumerate(items):
            if not item.error:
                groups.setdefault((item.document, item.inline), []).append(index)
            elif index not in done:
                self._failed(index, UserError(item.error), retry=False)
        for indices in groups.values():
            if not done.issuperset(indices):
                self._answer(indices)

    def _answer(self, indices: list[int]) -> None:
        """All questions about one document; those already answered are planned for as well."""
        items = [self.questions.items[index] for index in indices]
        self.documents += 1
        done = self.output.done
        try:
            document = self._document(items[0], begun=not done.isdisjoint(indices))
            answer(
                self.engine,
                [
                    Question(
                        item.question,
                        item.system or self.system,
                        item.max_tokens or self.max_tokens,
                        item.stop,
                    )
                    for item in items
                ],
                lambda number, reply: self._replied(indices[number], reply),
                document=document,
                sampling=self.sampling,
                parallel=self.parallel,
                read_once=self.read_once,
                answered={number for number, index in enumerate(indices) if index in done},
                on_progress=self.on_progress,
                spent=self.spent,
            )
        except (Cancelled, Closed, OutputError, Stopped, BrokenPipeError):
            raise
        except Exception as error:  # none of the questions is to blame
            for index in indices:
                if index not in self.output.done:
                    self._failed(index, error, retry=True)

    def _document(self, item: Item, *, begun: bool) -> str | None:
        """The text, as long as it is the one that other questions about it were answered with."""
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

    def _replied(self, index: int, reply: Reply | Exception) -> None:
        if isinstance(reply, Exception):
            own = isinstance(reply, UserError) and not isinstance(reply, OutOfMemory)
            self._failed(index, reply, retry=not own)
            return
        item = self.questions.items[index]
        line: dict[str, Any] = {
            "id": item.id,
            "answer": reply.text,
            "finish_reason": reply.finish_reason,
            "account": reply.account.as_dict(),
        }
        if item.expected:
            line["score"] = int(contains(reply.text, item.expected))
        self.output.add(index, line)
        if self.on_line:
            self.on_line(True)

    def _failed(self, index: int, error: Exception, *, retry: bool) -> None:
        """Writes an error's line; `retry`: the line of the input alone does not explain it."""
        item = self.questions.items[index]
        known = isinstance(error, LaserKVError)
        said = str(error) if known else f"{type(error).__name__}: {error}"
        if self.fail_fast:
            raise Stopped(f"line {item.line}: {said}") from error
        line = {"id": item.id, "line": item.line, "error": said}
        self.output.add(index, {**line, "retry": True} if retry else line)
        if self.on_line:
            self.on_line(False)


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


@dataclass
class Summary:
    """What stands in a finished output.

    Attributes:
        questions, failed: lines, and those of them with an error.
        retry: of those, the ones that the same command asks again.
        expected, found: answers to questions that came with `expected`, and those that contain it.
    """

    questions: int = 0
    failed: int = 0
    retry: int = 0
    expected: int = 0
    found: int = 0


def summary(items: Sequence[Item], output: Output) -> Summary:
    """Counts the lines of an output.

    A question with `expected` that failed counts as one that was not answered right.
    """
    counts = Summary()
    for item, line in zip(items, output.lines(), strict=False):
        counts.questions += 1
        counts.failed += "error" in line
        counts.retry += line.get("retry") is True
        counts.expected += bool(item.expected)
        counts.found += line.get("score") == 1
    return counts
