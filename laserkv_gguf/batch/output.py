"""Answers out: a file of JSON lines in input order, and the record of the run beside it.

The output grows line by line and always holds the answers to the first so many questions. An answer
that comes before its turn waits in the record, a second file beside the output (`OUTPUT.run`),
whose first line says what run this is. Every line is on disk before the next answer is begun. A
kill can tear the last line of either file; what is torn is cut off at the next start.

A line with an error is final where the question's own line explains it. Where something else does
(no memory, a document that is missing, llama.cpp), it has `"retry": true`, and the next start asks
that question again. The record also says which text of a `document_path` was read, so that no run
mixes two versions of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from laserkv_gguf.batch.questions import Item, short
from laserkv_gguf.errors import LaserKVError, UserError
from laserkv_gguf.files.journal import append, decoded, encoded, whole_lines
from laserkv_gguf.files.lock import lock

RECORD = ".run"
_MAGIC = b'{"laserkv_gguf batch": '
_PRIVATE = 0o600  # the record: nobody needs it but the run itself
_ELSEWHERE = "give --output a file in a folder that can be written to"


class OutputError(LaserKVError):
    """The output cannot be written any more; everything before stays and can be gone on from."""


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
        return f"{name} was {short(run.get(name))} and is {short(self.run.get(name))}"

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
            self._counted.append({name: line[name] for name in names if line.get(name) is not None})

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
        counts.failed += line.get("error") is not None
        counts.retry += line.get("retry") is True
        counts.expected += bool(item.expected)
        counts.found += line.get("score") == 1
    return counts
