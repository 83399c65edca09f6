"""Where a chat's lines come from: an editor on a terminal, plain lines from elsewhere."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from laserkv_gguf.shown import harmless, one_line

if TYPE_CHECKING:
    from prompt_toolkit.completion import CompleteEvent, Completer, Completion
    from prompt_toolkit.document import Document
    from prompt_toolkit.formatted_text import StyleAndTextTuples
    from prompt_toolkit.history import History
    from prompt_toolkit.key_binding import KeyBindings

    from laserkv_gguf.cli.background import Work

QUOTES = '"""'
PROMPT = "> "
TAKES_A_FILE = ("/add", "/load", "/save")
TAKES_A_DOCUMENT = ("/drop", "/kept")
_OFTEN = 0.1  # seconds between two looks at the bar


class Lines(Protocol):
    """Where lines come from.

    Attributes:
        edits: whether a line can be typed while something else is under way.
    """

    edits: bool

    def line(self) -> str:
        """What is typed next.

        Raises:
            EOFError, KeyboardInterrupt: the end, or Ctrl-C on an empty line.
        """

    def line_beside(self, work: Work) -> str | None:
        """What is typed while something is under way; None when it has ended before."""

    def key(self, shown: str) -> str:
        """The key that is pressed behind a text, which is then gone; of plain lines the next one.

        Raises:
            EOFError, KeyboardInterrupt: the end, or Ctrl-C.
        """

    def put_back(self, typed: str) -> None:
        """Has the next line begin with what was typed; a plain one is the next line."""

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Nothing of what is typed meanwhile is shown; it stands in the next line instead."""
        yield


def reader(
    commands: Sequence[str],
    settings: Callable[[], Iterable[str]],
    documents: Callable[[], Iterable[str]] = tuple,
) -> Lines:
    """Asks for what to say: with editing and completion on a terminal, plainly from elsewhere.

    Args:
        commands: what a line may begin with.
        settings: the names that /set knows.
        documents: the names of those there are.
    """
    if not sys.stdin.isatty():
        return Plain(_line)
    if os.environ.get("TERM", "dumb") in ("dumb", "unknown", ""):
        return Plain(_plain)
    return Editor(commands, settings, documents)


class Plain:
    """Lines from a pipe, a file, or a terminal that moves no cursor."""

    edits = False

    def __init__(self, line: Callable[[], str]) -> None:
        self._read, self._next = line, ""

    def line(self) -> str:
        line, self._next = self._next, ""
        return line or self._read()

    def line_beside(self, work: Work) -> str | None:
        raise NotImplementedError

    def key(self, shown: str) -> str:
        _show(shown)
        return _line().strip()

    def put_back(self, typed: str) -> None:
        self._next = typed

    @contextmanager
    def quiet(self) -> Iterator[None]:
        yield


class Editor:
    """Lines that are edited, with history and completion; see `reader`."""

    edits = True

    def __init__(
        self,
        commands: Sequence[str],
        settings: Callable[[], Iterable[str]],
        documents: Callable[[], Iterable[str]],
    ) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.output import create_output

        self._typed = ""  # not entered yet
        # answers alone go to stdout
        self._session: PromptSession[str | None] = PromptSession(
            completer=_completer(commands, settings, documents),
            complete_while_typing=False,
            history=_history(),
            multiline=True,
            prompt_continuation="  ",
            key_bindings=_keys(),
            output=create_output(sys.stderr),
        )

    def line(self) -> str:
        typed, self._typed = self._typed, ""
        self._session.app.erase_when_done = False
        line = self._session.prompt(PROMPT, default=typed, refresh_interval=0)
        assert line is not None
        return unquoted(line)

    def line_beside(self, work: Work) -> str | None:
        session, typed = self._session, self._typed
        app = session.app
        self._typed, app.erase_when_done = "", True

        def leave() -> None:
            """The work has ended; what was typed so far goes on in the next line."""
            if app.is_running and not app.is_done:
                self._typed = session.default_buffer.text
                app.exit(result=None)

        def begun() -> None:
            loop = app.loop

            def ended() -> None:
                with contextlib.suppress(RuntimeError):  # a line was entered just now
                    if loop is not None:
                        loop.call_soon_threadsafe(leave)

            work.on_end = ended
            if work.ended:
                ended()

        try:
            line = session.prompt(
                lambda: _above(work, app.output.get_size().columns),
                default=typed,
                refresh_interval=_OFTEN,
                pre_run=begun,
            )
        finally:
            work.on_end = lambda: None
            app.erase_when_done = False
        return None if line is None else unquoted(line)

    def key(self, shown: str) -> str:
        from prompt_toolkit import Application
        from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
        from prompt_toolkit.layout import FormattedTextControl, Layout, Window

        keys = KeyBindings()

        @keys.add("<any>")
        def _(event: KeyPressEvent) -> None:
            event.app.exit(result=event.data)

        @keys.add("enter")
        def _(event: KeyPressEvent) -> None:
            event.app.exit(result="")

        @keys.add("c-c")
        def _(event: KeyPressEvent) -> None:
            event.app.exit(exception=KeyboardInterrupt)

        @keys.add("c-d")
        def _(event: KeyPressEvent) -> None:
            event.app.exit(exception=EOFError)

        waiting: Application[str] = Application(
            layout=Layout(Window(FormattedTextControl(shown), height=1)),
            key_bindings=keys,
            erase_when_done=True,
            output=self._session.output,
        )
        return waiting.run()

    def put_back(self, typed: str) -> None:
        self._typed += typed

    @contextmanager
    def quiet(self) -> Iterator[None]:
        try:
            import termios
        except ImportError:  # Windows
            yield
            return
        handle = sys.stdin.fileno()
        before = termios.tcgetattr(handle)
        mute = termios.tcgetattr(handle)
        mute[3] &= ~(termios.ECHO | termios.ICANON)
        termios.tcsetattr(handle, termios.TCSANOW, mute)
        try:
            yield
        finally:
            self._typed += _pending(handle)
            termios.tcsetattr(handle, termios.TCSANOW, before)


def _pending(handle: int) -> str:
    """What was typed and not read yet, as text that can be edited."""
    import select

    found = b""
    while select.select([handle], [], [], 0)[0]:
        part = os.read(handle, 1 << 16)
        if not part:
            break
        found += part
    text = found.decode("utf-8", "replace").replace("\r\n", "\n").replace("\r", "\n")
    for mark in ("\x1b[200~", "\x1b[201~"):  # around what was pasted
        text = text.replace(mark, "")
    return harmless(text, running=True).strip("\n") if text.strip() else ""


def _above(work: Work, columns: int) -> StyleAndTextTuples:
    """What waits, the bar, and the prompt."""
    room = max(columns - 12, 20)
    shown: Any = []
    for line in list(work.waiting):
        said = one_line(line)
        said = said if len(said) <= room else f"{said[: room - 1]}…"
        shown.append(("class:waiting italic", f"waiting: {said}\n"))
    return [*shown, ("", f"{work.bar.line(columns)}\n"), ("", PROMPT)]


def _show(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        print(text, end="", file=sys.stderr, flush=True)


def _line() -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\n")


def _plain() -> str:
    """A terminal that moves no cursor: its own line editing has to do."""
    text = ""
    while True:
        print(PROMPT if not text else "  ", end="", file=sys.stderr, flush=True)
        text += _line()
        if not unfinished(text):
            return unquoted(text)
        text = text.removesuffix("\\") + "\n"


def unfinished(text: str) -> bool:
    """Whether Enter begins another line: after a backslash, or inside triple quotes."""
    return text.endswith("\\") or (
        text.startswith(QUOTES) and not text[len(QUOTES) :].endswith(QUOTES)
    )


def unquoted(text: str) -> str:
    """A message without the triple quotes around it."""
    if len(text) >= 2 * len(QUOTES) and text.startswith(QUOTES) and text.endswith(QUOTES):
        return text[len(QUOTES) : -len(QUOTES)].strip("\n")
    return text


def _keys() -> KeyBindings:
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if not unfinished(buffer.text):
            buffer.validate_and_handle()
            return
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
        buffer.insert_text("\n")

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c")
    def _(event: KeyPressEvent) -> None:
        """Drops what is typed; on an empty line the chat says what a second one does."""
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt)

    return keys


def history_file() -> Path:
    """Where what was typed is kept."""
    from platformdirs import user_state_dir

    return Path(user_state_dir("laserkv-gguf")) / "history"


def _history() -> History:
    """Of this and earlier chats, readable by the user alone; of this one where that fails."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    path = history_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        path.chmod(0o600)
    except OSError:
        return InMemoryHistory()
    return FileHistory(path)


def _completer(
    commands: Sequence[str],
    settings: Callable[[], Iterable[str]],
    documents: Callable[[], Iterable[str]],
) -> Completer:
    from prompt_toolkit.completion import Completer, Completion, PathCompleter
    from prompt_toolkit.document import Document

    files = PathCompleter(expanduser=True)

    class Commands(Completer):
        """Commands; behind them what they take: files, documents, or names of settings."""

        def get_completions(self, document: Document, event: CompleteEvent) -> Iterator[Completion]:
            before = document.text_before_cursor
            command, space, rest = before.partition(" ")
            if not before.startswith("/") or "\n" in before:
                return
            if not space:
                yield from _beginning(before, commands)
            elif command in TAKES_A_FILE:
                yield from files.get_completions(Document(rest), event)
            elif command in TAKES_A_DOCUMENT:
                yield from _beginning(rest, documents())
            elif command == "/set" and " " not in rest:
                yield from _beginning(rest, settings())

    def _beginning(text: str, words: Iterable[str]) -> Iterator[Completion]:
        for word in sorted(words):
            if word.startswith(text):
                yield Completion(word, start_position=-len(text))

    return Commands()
