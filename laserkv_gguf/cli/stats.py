"""What the last answer of a chat took: six lines, or every figure there is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from laserkv_gguf.cli import terminal
from laserkv_gguf.shown import counted

if TYPE_CHECKING:
    from laserkv_gguf.conversation.account import Account
    from laserkv_gguf.conversation.conversation import Conversation

# what reading is made of, in words
_STEPS = (
    ("reading", ("decode",)),
    ("asking", ("probe", "lookahead")),
    ("choosing", ("score", "select", "evict")),
    ("parking", ("park",)),
)
_TOKENS = ("budget", "anchors", "window", "long_term", "block_size", "text_kept")


def lines(account: Account, talk: Conversation) -> Iterator[tuple[str, str]]:
    """What each line is about, and what it says."""
    read, kept = account.text_tokens, account.text_kept
    if read:
        said = f"{kept:,} of {counted(read, 'token')} of the document ({kept / read:.0%})"
        yield "saw", f"{said}, chosen by {account.policy}"
    else:
        yield "saw", "no document"
    # both sides without the cells that wait for turns
    yield (
        "cache",
        f"{account.used_cells:,} of {counted(account.ctx_cells, 'cell')} used, "
        f"{terminal.size(account.used_bytes)}; with everything kept it would be "
        f"{terminal.size(account.full_kv_bytes)}",
    )
    spent = [
        (label, sum(getattr(account, f"{step}_seconds") for step in steps))
        for label, steps in _STEPS
    ]
    parts = ", ".join(f"{label} {seconds:.1f} s" for label, seconds in spent if seconds >= 0.05)
    yield (
        "reading",
        f"{account.prefill_seconds:.1f} s in {counted(account.blocks, 'block')}"
        + (f": {parts}" if parts else ""),
    )
    if talk.parked_tokens:
        yield (
            "recall",
            f"looked again at {counted(account.parked_tokens, 'token')} in "
            f"{account.recall_seconds:.1f} s; they take {terminal.size(talk.parked_bytes)} "
            f"{'on disk' if account.recall == 'disk' else 'of memory'}",
        )
    else:
        yield "recall", "nothing is parked" + (": what was evicted is lost" if kept < read else "")
    speed = f"{account.decode_tokens_per_second:.1f} a second"
    yield (
        "answer",
        f"{counted(account.generated_tokens, 'token')}, the first after "
        f"{account.first_token_seconds:.2f} s, then {speed}",
    )
    times = talk.thinnings
    yield (
        "talk",
        counted(talk.turns, "turn")
        + (f"; older ones were compressed {counted(times, 'time')}" if times else ""),
    )


def figures(account: Account, talk: Conversation) -> Iterator[tuple[str, str]]:
    """Every figure by its name, as `ask --json` has it, with its unit."""
    said: dict[str, Any] = {
        **account.as_dict(),
        "turns": talk.turns,
        "times_compressed": talk.thinnings,
        "cells_used": talk.cells_used,
        "parked_tokens": talk.parked_tokens,
        "parked_bytes": talk.parked_bytes,
    }
    for name, value in said.items():
        yield name, _with_unit(name, value)


def _with_unit(name: str, value: Any) -> str:
    if name.endswith("_seconds"):
        return f"{value:.3f} s"
    if name.endswith("_per_second"):
        return f"{value:.1f} tokens a second"
    if name.endswith("_bytes"):
        return f"{value} bytes ({terminal.size(value)})"
    if name.endswith("_tokens") or name in _TOKENS:
        return f"{value} tokens"
    if name.endswith("_cells") or name == "cells_used":
        return f"{value} cells"
    return f"{value:.3f}" if isinstance(value, float) else f"{value}"
