"""How long a fuzzer may run: `LASERKV_FUZZ_SECONDS`, or a short while that is always the same."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, given, seed, settings
from hypothesis.strategies import SearchStrategy

SECONDS = float(os.environ.get("LASERKV_FUZZ_SECONDS") or 0)


def run(
    check: Callable[[Any], None],
    cases: SearchStrategy[Any],
    examples: int,
    counts: Counter[str] | None = None,
) -> None:
    """Tries cases within the budget.

    Args:
        check: raises where a case does harm.
        cases: what it is given.
        examples: of one round; without the variable there is one round, always the same.
        counts: what `check` has counted, to be said during a long run and at its end.
    """
    limits = settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=not SECONDS,
        suppress_health_check=list(HealthCheck),
    )

    def one_round(number: int | None) -> None:
        def one(case: Any) -> None:
            check(case)

        tried = limits(given(cases)(one))
        (tried if number is None else seed(number)(tried))()

    if not SECONDS:
        one_round(None)
        return
    first, started, told, rounds = time.time_ns() % (1 << 32), time.monotonic(), 0.0, 0
    name = getattr(check, "__name__", "fuzz")
    while time.monotonic() - started < SECONDS:
        one_round(first + rounds)
        rounds += 1
        seconds = time.monotonic() - started
        if seconds - told > 60 or seconds >= SECONDS:
            told = seconds
            said = f", {dict(sorted(counts.items()))}" if counts else ""
            print(
                f"{name}: {rounds} rounds of up to {examples} cases in {seconds:.0f} s, "
                f"seeds from {first}{said}",
                file=sys.stderr,
                flush=True,
            )
