"""A document as the cache sees it: kept tokens bright, evicted ones dim."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from rich.text import Text

from laserkv_gguf.cli import terminal

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
    from laserkv_gguf.retention.spans import runs

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
