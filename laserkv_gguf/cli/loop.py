"""The loop of a chat: lines in, answers out, until it is left."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from laserkv_gguf.cli import streams, terminal
from laserkv_gguf.cli.background import Work
from laserkv_gguf.shown import whole

if TYPE_CHECKING:
    from laserkv_gguf.api import LaserKV
    from laserkv_gguf.cli.editing import Lines
    from laserkv_gguf.conversation.answer import Answer
    from laserkv_gguf.conversation.conversation import Conversation
    from laserkv_gguf.conversation.generation import Reply
    from laserkv_gguf.reading.reader import Progress


T = TypeVar("T")
AT_ONCE = ("/help", "/quit")  # what need not wait until a document is read


class Left(Exception):
    """The chat was left while something was under way, which is stopped."""


@dataclass
class Loop:
    """The loop of a conversation on a terminal.

    Attributes:
        lines: what is typed.
        command: runs a line that begins with a slash; returns whether the loop goes on.
        last: the last answer.
        running: whether the loop has begun.
        early: lines that were entered while a document was read, in order.
    """

    engine: LaserKV
    talk: Conversation
    lines: Lines
    command: Callable[[Loop, str], bool]
    last: Reply | None = None
    running: bool = False
    debug: bool = False
    early: list[str] = field(default_factory=list)

    def open(self, question: str | None) -> None:
        """Reads the documents, and answers the first question if there is one."""
        name = f"{self.engine.model.name} ({self.engine.model.description})"
        terminal.dim(f"{name} · policy {self.engine.settings.policy} · /help lists the commands")
        if question:
            self.read_for(whole(question))
        elif self.talk.texts:
            self.read()

    def run(self) -> None:
        """Until /quit or the end of the input; Ctrl-C drops what is typed, twice it leaves.

        Whatever goes wrong in a command or an answer is one line; the conversation stays.
        """
        self.running, leaving = True, False
        while True:
            try:
                line = self._line().strip()
            except KeyboardInterrupt:
                if leaving:
                    return
                leaving = True
                terminal.note("(Ctrl-C again leaves; so do /quit and Ctrl-D)")
                continue
            except EOFError:
                return
            leaving = False
            if not line:
                continue
            if not line.startswith("/"):
                asked = whole(line)
                self.answer(lambda asked=asked: self.talk.ask(asked))  # type: ignore[misc]
                continue
            try:
                if not self.command(self, line):
                    return
            except KeyboardInterrupt:
                terminal.note("(stopped)")
            except (BrokenPipeError, streams.OutputLost, Left):
                raise
            except Exception as error:
                terminal.failed(error, self.debug)

    def _line(self) -> str:
        """What was entered early, or is typed next."""
        if not self.early:
            return self.lines.line()
        line = self.early.pop(0)
        terminal.note(f"> {line}")
        return line

    def answer(self, ask: Callable[[], Answer]) -> None:
        """Streams an answer; Ctrl-C drops the turn, the document stays."""
        try:
            with self.lines.quiet():
                stream = ask()
                for piece in stream:
                    streams.say(terminal.printable(piece))
                streams.say("\n")
        except KeyboardInterrupt:
            streams.say("\n")
            terminal.note("(stopped; this turn is dropped)")
            return
        except (BrokenPipeError, streams.OutputLost):
            raise
        except Exception as error:
            terminal.failed(error, self.debug)
            return
        self.last = stream.reply
        for line in terminal.account_lines(stream.reply):
            terminal.dim(line)

    # reading

    def read(self) -> None:
        """Reads the documents; the turns are forgotten."""
        started = time.perf_counter()

        def read(shown: Callable[[Progress], None], asks: Callable[[], str | None] | None) -> Any:
            return self.talk.read(shown, asks=asks)

        if self._beside(read, self._not_read) is not None:
            terminal.dim(
                f"read {self.talk.ledger.tokens_read:,} tokens in "
                f"{time.perf_counter() - started:.1f} s, kept {self.talk.cells_used:,}"
            )

    def read_for(self, question: str) -> None:
        """Reads the documents with a question in mind and answers it."""

        def begin(on_progress: Callable[[Progress], None]) -> tuple[Answer, str]:
            stream = self.talk.begin(question, on_progress=on_progress)
            return stream, next(iter(stream), "")

        with self.lines.quiet():
            begun = self._under_a_bar(begin, self._not_read)
        if begun is None:
            return
        stream, first = begun
        streams.say(terminal.printable(first))
        self.answer(lambda: stream)

    def add(self, name: str, text: str) -> None:
        """Reads one more document."""

        def stopped(said: str) -> None:
            terminal.note(f"{said}; nothing of {name} is kept")

        def add(shown: Callable[[Progress], None], asks: Callable[[], str | None] | None) -> Any:
            return self.talk.add(name, text, shown, asks=asks)

        added = self._beside(add, stopped)
        if added is not None:
            terminal.dim(f"read {added.tokens:,} tokens of {name}, kept {added.kept:,}")

    def _beside(
        self,
        read: Callable[[Callable[[Progress], None], Callable[[], str | None] | None], T],
        stopped: Callable[[str], None],
    ) -> T | None:
        """Runs something that reads while its user types; None where it was stopped or refused.

        What is entered meanwhile waits in sight; the first question is asked along while the rest
        is read. Ctrl-C drops what waits, the last line first, and then the reading.

        Raises:
            Left: the chat was left.
        """
        if not self.lines.edits:
            return self._under_a_bar(lambda shown: read(shown, None), stopped)
        work = Work(read)
        left = False
        with streams.held():
            while not (left or work.stopped):
                try:
                    line = self.lines.line_beside(work)
                except KeyboardInterrupt:
                    if work.waiting:
                        work.waiting.pop()
                    else:
                        work.stopped = True
                    continue
                except EOFError:
                    left = True
                    continue
                except BaseException:
                    work.stop(self.engine.cancel)
                    raise
                if line is None:
                    break
                line = line.strip()
                if line == "/quit":
                    left = True
                elif line == "/help":
                    self.command(self, line)
                elif line:
                    work.waiting.append(whole(line))
            if left or work.stopped:
                work.stop(self.engine.cancel)
        if left:
            raise Left

        def ended(_shown: Callable[[Progress], None]) -> T:
            found: T = work.end()
            return found

        found = self._told(ended, stopped, work.bar)
        self.early = work.waiting + self.early
        return found

    def _under_a_bar(
        self, read: Callable[[Callable[[Progress], None]], T], stopped: Callable[[str], None]
    ) -> T | None:
        """Runs something that reads; None where it was stopped or refused, which is then told."""
        return self._told(read, stopped, terminal.ReadingBar())

    def _told(
        self,
        read: Callable[[Callable[[Progress], None]], T],
        stopped: Callable[[str], None],
        bar: terminal.ReadingBar,
    ) -> T | None:
        try:
            with bar.shown() as on_progress:
                return read(on_progress)
        except KeyboardInterrupt:
            stopped(bar.stopped)
        except Exception as error:
            # at the start nothing could follow; later the conversation goes on
            if not self.running:
                raise
            terminal.failed(error, self.debug)
        return None

    def _not_read(self, said: str) -> None:
        self.talk.without_document()
        terminal.note(f"{said}; nothing of it is kept: /read begins again")
