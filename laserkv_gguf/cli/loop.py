"""The loop of a chat: lines in, answers out, until it is left."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from laserkv_gguf.cli import streams, terminal
from laserkv_gguf.shown import whole

if TYPE_CHECKING:
    from laserkv_gguf.api import LaserKV
    from laserkv_gguf.conversation.answer import Answer
    from laserkv_gguf.conversation.conversation import Conversation
    from laserkv_gguf.conversation.generation import Reply
    from laserkv_gguf.reading.reader import Progress


T = TypeVar("T")


@dataclass
class Loop:
    """The loop of a conversation on a terminal.

    Attributes:
        line: reads what is typed next.
        command: runs a line that begins with a slash; returns whether the loop goes on.
        last: the last answer.
        running: whether the loop has begun.
    """

    engine: LaserKV
    talk: Conversation
    line: Callable[[], str]
    command: Callable[[Loop, str], bool]
    last: Reply | None = None
    running: bool = False
    debug: bool = False

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
                line = self.line().strip()
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
            except (BrokenPipeError, streams.OutputLost):
                raise
            except Exception as error:
                terminal.failed(error, self.debug)

    def ask(self, prompt: str) -> str:
        """One line typed in between."""
        with contextlib.suppress(OSError, ValueError):
            print(prompt, end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line

    def answer(self, ask: Callable[[], Answer]) -> None:
        """Streams an answer; Ctrl-C drops the turn, the document stays."""
        try:
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
        terminal.dim(terminal.account_line(stream.reply.account))

    # reading

    def read(self) -> None:
        """Reads the documents; the turns are forgotten."""
        started = time.perf_counter()
        if self._under_a_bar(self.talk.read, self._not_read) is not None:
            terminal.dim(
                f"read {self.talk.ledger.tokens_read:,} tokens in "
                f"{time.perf_counter() - started:.1f} s, kept {self.talk.cells_used:,}"
            )

    def read_for(self, question: str) -> None:
        """Reads the documents with a question in mind and answers it."""

        def begin(on_progress: Callable[[Progress], None]) -> tuple[Answer, str]:
            stream = self.talk.begin(question, on_progress=on_progress)
            return stream, next(iter(stream), "")

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

        added = self._under_a_bar(lambda shown: self.talk.add(name, text, shown), stopped)
        if added is not None:
            terminal.dim(f"read {added.tokens:,} tokens of {name}, kept {added.kept:,}")

    def _under_a_bar(
        self, read: Callable[[Callable[[Progress], None]], T], stopped: Callable[[str], None]
    ) -> T | None:
        """Runs something that reads; None where it was stopped or refused, which is then told."""
        bar = terminal.ReadingBar()
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
