"""The fastest settings of llama.cpp itself on this machine: one flag after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Settings = dict[str, Any]

WORTH = 0.98  # a change must take this much of the time or less, or it is noise

_TOKEN = "decode_tokens_per_second"

SHORTEST = 256  # tokens; below that there is nothing to be found


def search(
    start: Settings,
    axes: Sequence[tuple[str, Sequence[Any]]],
    cost: Callable[[Settings], Mapping[str, float] | None],
) -> tuple[Settings, list[dict[str, Any]]]:
    """Goes through the flags once and keeps what makes a run faster.

    Args:
        start: values to begin with.
        axes: (flag, values to try), the one that matters most first.
        cost: measures settings; "seconds" in it is what counts; None where they cannot be used.

    Returns:
        The best settings, and all that was tried: settings and what they cost, in order.
    """
    tried: list[dict[str, Any]] = []

    def seconds(settings: Settings) -> float:
        found = cost(settings)
        tried.append({**settings, **(found or {"seconds": None})})
        return float("inf") if found is None else found["seconds"]

    best, least = dict(start), seconds(start)
    for name, values in axes:
        for value in values:
            if value == start[name]:
                continue
            changed = {**best, name: value}
            spent = seconds(changed)
            if spent < least * WORTH:
                best, least = changed, spent
    return best, tried


def fastest_token(best: Settings, tried: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The entry of a search that generates fastest; None where the best settings do, too.

    What reads a long document fastest need not generate fastest: on CPUs flash attention is such.
    """
    measured = [entry for entry in tried if entry.get(_TOKEN)]
    used = [entry for entry in measured if all(entry[name] == best[name] for name in best)]
    fastest = max(measured, key=lambda entry: float(entry[_TOKEN]), default=None)
    if fastest is None or any(fastest[_TOKEN] * WORTH <= entry[_TOKEN] for entry in used):
        return None
    return dict(fastest)


def axes(
    *,
    threads: Sequence[int],
    threads_batch: Sequence[int],
    ubatches: Sequence[int],
    flash: bool,
) -> list[tuple[str, Sequence[Any]]]:
    """What is tried, the flag that matters most first.

    Args:
        threads: numbers of them for a token.
        threads_batch: and for reading.
        ubatches: sizes of a micro-batch.
        flash: whether flash attention can be chosen; a quantised V decides it.
    """
    return [
        ("threads", threads),
        *([("flash_attn", (False, True))] if flash else []),
        ("ubatch_size", ubatches),
        ("threads_batch", threads_batch),
    ]
