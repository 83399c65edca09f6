"""A document as the cache sees it: kept tokens bright, evicted ones dim."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rich.text import Text

from laserkv_gguf.cli import terminal

if TYPE_CHECKING:
    from laserkv_gguf.conversation.conversation import Conversation

POOLS = ("anchor", "long-term", "window")
COLOURS = ("bold cyan", "bold green", "bold yellow")
MARKS = ("a", "l", "w")  # where there are no colours
LEFT_OUT = " … "

Runs = Sequence[tuple[str, int | None]]


def show(talk: Conversation, name: str, key: Callable[[str], str], *, only: bool = False) -> str:
    """Prints a document below its legend, a screen at a time on a terminal.

    Args:
        key: shows a line and returns the key that is pressed, or what is entered.
        only: leaves out what was evicted.

    Returns:
        What was typed that is none of the keys, for the next line.
    """
    from laserkv_gguf.retention.spans import runs

    console = terminal.Console(stderr=True, highlight=False)
    console.running = True
    coloured = console.color_system is not None and not console.no_color
    found = list(runs(talk, name))
    while True:
        console.print(_legend(coloured, only), soft_wrap=True)
        typed = _page(console, _text(found, coloured, only), key, only)
        if typed != "k":
            return typed
        only = not only


def _legend(coloured: bool, only: bool) -> Text:
    text = Text()
    for pool, label in enumerate(POOLS):
        text.append(label if coloured else f"[{MARKS[pool]}:{label}]", COLOURS[pool])
        text.append(" · ")
    return text.append(f"evicted is {LEFT_OUT.strip()}" if only else "evicted", "dim" * coloured)


def _text(found: Runs, coloured: bool, only: bool) -> Text:
    text = Text()
    for part, pool in found:
        if pool is None:
            text.append(LEFT_OUT if only else part, "dim" * coloured)
        elif coloured:
            text.append(part, COLOURS[pool])
        else:
            text.append(f"[{MARKS[pool]}:{part}]")
    return text


def _page(console: terminal.Console, text: Text, key: Callable[[str], str], only: bool) -> str:
    """A screen at a time; "k" where the other view is wanted, else what else was typed."""
    lines = text.wrap(console, max(console.width, 1))
    height = max(console.height - 2, 5)
    for start in range(0, len(lines), height):
        for line in lines[start : start + height]:
            console.print(line, soft_wrap=True)
        left = len(lines) - start - height
        if left <= 0 or not console.is_terminal or not sys.stdin.isatty():
            continue
        other = "k for all" if only else "k for what is kept only"
        try:
            typed = key(f"-- {left} more lines: Enter for more, {other}, q to stop -- ")
        except (EOFError, KeyboardInterrupt):
            return ""
        if typed.lower() in ("q", "\x1b"):
            return ""
        if typed.lower() == "k":
            return "k"
        if typed.strip():
            return typed
    return ""
