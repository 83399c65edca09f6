"""`chat`: a streamed conversation, with or without documents."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Optional, TypeVar

from typer import Option

from laserkv_gguf.cli import documents, terminal
from laserkv_gguf.cli.options import EngineOptions, SamplingOptions, with_options
from laserkv_gguf.errors import LaserKVError, UserError

if TYPE_CHECKING:
    from laserkv_gguf.engine import Progress
    from laserkv_gguf.session import Answer, Conversation, LaserKV, Reply


T = TypeVar("T")


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
    text = documents.load(document or [])
    with options.engine() as engine:
        conversation = engine.conversation(
            document=text,
            system=system,
            max_tokens=sampling.predict,
            sampling=sampling.sampling(options.seed),
        )
        talk = Talk(engine, conversation, _reader())
        talk.open(question)
        talk.run()


def _reader() -> Callable[[], str]:
    """Asks for a line: with editing and completion on a terminal, plainly from a pipe."""
    if not sys.stdin.isatty():
        return _piped_line
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.output import create_output

    # answers alone go to stdout
    session: PromptSession[str] = PromptSession(
        completer=WordCompleter(sorted(COMMANDS), sentence=True),
        complete_while_typing=False,
        output=create_output(sys.stderr),
    )
    return lambda: session.prompt("> ")


def _piped_line() -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\n")


@dataclass
class Talk:
    """The loop of a conversation on a terminal."""

    engine: LaserKV
    conversation: Conversation
    line: Callable[[], str]
    last: Reply | None = None
    running: bool = False

    def open(self, question: str | None) -> None:
        """Reads the documents, and answers the first question if there is one."""
        name = f"{self.engine.model.name} ({self.engine.model.description})"
        terminal.dim(f"{name} · policy {self.engine.settings.policy} · /help lists the commands")
        if question:
            self.read_for(question)
        elif self.conversation.document:
            self.read("")

    def run(self) -> None:
        """Until /quit or the end of the input. Ctrl-C drops what is typed."""
        self.running = True
        while True:
            try:
                line = self.line().strip()
            except KeyboardInterrupt:
                continue
            except EOFError:
                return
            if not line:
                continue
            if line.startswith("/"):
                if not self.command(line):
                    return
            else:
                self.answer(lambda line=line: self.conversation.ask(line))  # type: ignore[misc]

    def answer(self, ask: Callable[[], Answer]) -> None:
        """Streams an answer; Ctrl-C drops the turn, the document stays."""
        try:
            stream = ask()
            for piece in stream:
                print(terminal.printable(piece), end="", flush=True)
            print(flush=True)
        except KeyboardInterrupt:
            print(flush=True)
            terminal.note("(stopped; this turn is dropped)")
            return
        except LaserKVError as error:
            terminal.note(f"error: {error}")
            return
        self.last = stream.reply
        terminal.dim(terminal.account_line(stream.reply.account))

    # commands; their first lines are what /help says

    def command(self, line: str) -> bool:
        """Runs a slash command; False ends the conversation."""
        name, _, rest = line.partition(" ")
        if name not in COMMANDS:
            near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.4)
            terminal.note(f"{name} is unknown; did you mean {near[0] if near else '/help'}?")
            return True
        return COMMANDS[name](self, rest.strip()) is not False

    def help(self, _rest: str) -> None:
        """List the commands."""
        for name, run in COMMANDS.items():
            first = (run.__doc__ or "").strip().splitlines()[0]
            terminal.note(f"{name:<9} {first}")

    def read(self, rest: str) -> None:
        """Read the documents again; /read QUESTION reads with it in mind and answers it."""
        if not self.conversation.document:
            terminal.note("there is no document; start with --document FILE")
            return
        if rest:
            self.read_for(rest)
            return
        reading = self._under_a_bar(self.conversation.read)
        if reading is None:
            return
        terminal.dim(
            f"read {len(reading.tokens):,} tokens in {reading.timings.total:.1f} s, "
            f"kept {len(reading.kept):,}"
        )

    def read_for(self, question: str) -> None:
        """Reads the documents with a question in mind and answers it."""
        from laserkv_gguf.session import Answer

        def begin(on_progress: Callable[[Progress], None]) -> tuple[Answer, str]:
            stream = Answer(
                self.conversation,
                lambda reply: self.conversation.first_turn(question, reply, on_progress),
            )
            return stream, next(iter(stream), "")

        begun = self._under_a_bar(begin)
        if begun is None:
            return
        stream, first = begun
        print(terminal.printable(first), end="", flush=True)
        self.answer(lambda: stream)

    def _under_a_bar(self, read: Callable[[Callable[[Progress], None]], T]) -> T | None:
        """Runs something that reads; None where it was stopped or refused, which is then told."""
        bar = terminal.ReadingBar()
        try:
            with bar.shown() as on_progress:
                return read(on_progress)
        except KeyboardInterrupt:
            self._not_read(bar)
        except LaserKVError as error:
            self._refused(error)
        return None

    def _refused(self, error: LaserKVError) -> None:
        """At the start nothing could follow; later the conversation goes on."""
        if not self.running:
            raise error
        terminal.note(f"error: {error}")

    def _not_read(self, bar: terminal.ReadingBar) -> None:
        self.conversation.without_document()
        terminal.note(f"{bar.stopped}; nothing of it is kept: /read begins again")

    def stats(self, _rest: str) -> None:
        """Show what the last answer cost and how full the cache is."""
        if self.last is None:
            terminal.note("nothing has been answered yet")
            return
        for key, value in self.last.account.as_dict().items():
            shown = f"{value:.3f}" if isinstance(value, float) else value
            terminal.note(f"{key:<26} {shown}")
        terminal.note(f"{'cells_used':<26} {self.conversation.cells_used}")

    def reset(self, _rest: str) -> None:
        """Forget the turns; the documents stay as they were read."""
        self.conversation.reset()
        terminal.note("the turns are forgotten")

    def quit(self, _rest: str) -> bool:
        """Leave; so does Ctrl-D."""
        return False


COMMANDS: dict[str, Callable[[Talk, str], bool | None]] = {
    "/help": Talk.help,
    "/read": Talk.read,
    "/stats": Talk.stats,
    "/reset": Talk.reset,
    "/quit": Talk.quit,
}
