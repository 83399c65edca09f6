"""Where a chat's lines come from: an editor on a terminal, plain lines from elsewhere."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prompt_toolkit.completion import CompleteEvent, Completer, Completion
    from prompt_toolkit.document import Document
    from prompt_toolkit.history import History
    from prompt_toolkit.key_binding import KeyBindings

QUOTES = '"""'
PROMPT = "> "
TAKES_A_FILE = ("/add", "/load", "/save")


def reader(commands: Sequence[str], settings: Callable[[], Iterable[str]]) -> Callable[[], str]:
    """Asks for what to say: with editing and completion on a terminal, plainly from elsewhere.

    Args:
        commands: what a line may begin with.
        settings: the names that /set knows.
    """
    if not sys.stdin.isatty():
        return _line
    if os.environ.get("TERM", "dumb") in ("dumb", "unknown", ""):
        return _plain
    from prompt_toolkit import PromptSession
    from prompt_toolkit.output import create_output

    # answers alone go to stdout
    session: PromptSession[str] = PromptSession(
        completer=_completer(commands, settings),
        complete_while_typing=False,
        history=_history(),
        multiline=True,
        prompt_continuation="  ",
        key_bindings=_keys(),
        output=create_output(sys.stderr),
    )
    return lambda: unquoted(session.prompt(PROMPT))


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


def _completer(commands: Sequence[str], settings: Callable[[], Iterable[str]]) -> Completer:
    from prompt_toolkit.completion import Completer, Completion, PathCompleter
    from prompt_toolkit.document import Document

    files = PathCompleter(expanduser=True)

    class Commands(Completer):
        """Commands; behind some of them files, behind /set its names."""

        def get_completions(self, document: Document, event: CompleteEvent) -> Iterator[Completion]:
            before = document.text_before_cursor
            command, space, rest = before.partition(" ")
            if not before.startswith("/") or "\n" in before:
                return
            if not space:
                yield from _beginning(before, commands)
            elif command in TAKES_A_FILE:
                yield from files.get_completions(Document(rest), event)
            elif command == "/set" and " " not in rest:
                yield from _beginning(rest, settings())

    def _beginning(text: str, words: Iterable[str]) -> Iterator[Completion]:
        for word in sorted(words):
            if word.startswith(text):
                yield Completion(word, start_position=-len(text))

    return Commands()
