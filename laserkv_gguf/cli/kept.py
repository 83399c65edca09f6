"""A document as the cache sees it: kept tokens bright, evicted ones dim."""

from __future__ import annotations

import codecs
import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from rich.text import Text

from laserkv_gguf.cli import terminal
from laserkv_gguf.shown import harmless

if TYPE_CHECKING:
    from laserkv_gguf.conversation.conversation import Conversation

POOLS = ("anchor", "long-term", "window")
COLOURS = ("bold cyan", "bold green", "bold yellow")
MARKS = ("a", "l", "w")  # where there are no colours


def show(talk: Conversation, name: str, ask: Callable[[str], str]) -> None:
    """Prints a document, a screen at a time on a terminal.

    Args:
        ask: shows a prompt and returns what is typed.
    """
    coloured = terminal.console.color_system is not None and not terminal.console.no_color
    text = Text()
    for part, pool in runs(talk, name):
        if coloured:
            text.append(part, "dim" if pool is None else COLOURS[pool])
        else:
            text.append(part if pool is None else f"[{MARKS[pool]}:{part}]")
    text.append("\n")
    for pool, label in enumerate(POOLS):
        text.append(label if coloured else f"[{MARKS[pool]}:{label}]", COLOURS[pool])
        text.append(" · ")
    text.append("evicted", "dim" if coloured else "")
    _page(text, ask)


def runs(talk: Conversation, name: str) -> Iterator[tuple[str, int | None]]:
    """Stretches of the document's text, and the pool that keeps them or None."""
    number = talk.ledger.document(name)
    assert number is not None
    segment = talk.ledger.segments[number]
    kept = set(talk.ledger.kept(number).tolist())
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    last = len(segment.tokens) - 1

    def pieces() -> Iterator[tuple[str, int | None]]:
        for index, token in enumerate(segment.tokens.tolist()):
            # a character that several tokens share comes with its last
            said = decoder.decode(talk.engine.model.piece(token), index == last)
            yield harmless(said, running=True), int(segment.pools[index]) if index in kept else None

    for pool, group in itertools.groupby(pieces(), key=lambda piece: piece[1]):
        yield "".join(said for said, _ in group), pool


def _page(text: Text, ask: Callable[[str], str]) -> None:
    console = terminal.Console(stderr=True, highlight=False)
    console.running = True
    lines = text.wrap(console, max(console.width, 1))
    height = max(console.height - 2, 5)
    for start in range(0, len(lines), height):
        for line in lines[start : start + height]:
            console.print(line, soft_wrap=True)
        left = len(lines) - start - height
        if left <= 0 or not console.is_terminal:
            continue
        try:
            if ask(f"-- {left} more lines: Enter for more, q to stop -- ").strip().lower() == "q":
                return
        except (EOFError, KeyboardInterrupt):
            return
