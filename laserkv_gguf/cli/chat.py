"""`chat`: a streamed conversation, with or without documents."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional, TypeVar

from typer import Option

from laserkv_gguf.cli import commands, documents, editing, streams, terminal
from laserkv_gguf.cli.commands import COMMANDS, SETTINGS
from laserkv_gguf.cli.options import EngineOptions, SamplingOptions, with_options
from laserkv_gguf.errors import UserError
from laserkv_gguf.shown import one_line, whole

if TYPE_CHECKING:
    from laserkv_gguf.api import LaserKV
    from laserkv_gguf.conversation.answer import Answer
    from laserkv_gguf.conversation.conversation import Conversation
    from laserkv_gguf.conversation.generation import Reply
    from laserkv_gguf.reading.reader import Progress


T = TypeVar("T")
TERMINATED = 143  # what shells say of a process that SIGTERM ended


@with_options(EngineOptions, SamplingOptions)
def chat(
    options: EngineOptions,
    sampling: SamplingOptions,
    document: Annotated[
        Optional[list[str]],  # noqa: UP045
        Option("-d", "--document", help="Text, Markdown or PDF to talk about."),
    ] = None,
    question: Annotated[
        Optional[str],  # noqa: UP045
        Option("-q", "--question", help="A first question; the document is read with it in mind."),
    ] = None,
    system: Annotated[
        Optional[str],  # noqa: UP045
        Option("-sys", "--system", help="System prompt."),
    ] = None,
) -> None:
    """Talk with a model, about documents of any length or none; /help lists its commands."""
    if document and documents.STANDARD_INPUT in document:
        raise UserError("chat reads what you type from standard input; give --document a file")
    streams.check_output()
    texts = _texts(document or [])
    signal.signal(signal.SIGTERM, _terminated)
    with options.engine() as engine:
        talk = engine.conversation(
            documents=texts,
            system=system,
            max_tokens=sampling.predict,
            sampling=sampling.sampling(options.seed),
        )
        read = editing.reader(list(COMMANDS), lambda: SETTINGS)
        loop = Loop(engine, talk, read, debug=options.debug)
        loop.open(question)
        loop.run()


def _texts(names: Sequence[str]) -> dict[str, str]:
    """The documents by name: the files' own, and their paths where two are the same."""
    short = [one_line(Path(name).name) for name in names]
    texts: dict[str, str] = {}
    of: dict[str, str] = {}
    for name, own in zip(names, short, strict=True):
        said = one_line(name) if short.count(own) > 1 else own
        while of.get(said, name) != name:  # paths that look the same
            said += "'"
        of[said], texts[said] = name, documents.read(name)
    return texts


def _terminated(_number: int, _frame: object) -> None:
    """SIGTERM: what was answered so far is out; the cache goes with the process."""
    raise SystemExit(TERMINATED)


@dataclass
class Loop:
    """The loop of a conversation on a terminal."""

    engine: LaserKV
    talk: Conversation
    line: Callable[[], str]
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
                if not commands.run(self, line):
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
