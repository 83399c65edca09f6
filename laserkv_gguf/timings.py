"""Where a read spends its time: seconds a step, in all and of each block."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

STEPS = ("decode", "probe", "lookahead", "score", "select", "evict", "park")
OVERHEAD = STEPS[1:]  # all that a read without compression would not do

_running: ContextVar[Timings | None] = ContextVar("laserkv-timings", default=None)


@dataclass
class Timings:
    """Seconds spent in the steps of the block loop.

    Attributes:
        decode: reading the blocks.
        probe: asking them with the question, lookahead: with drafts of the answer.
        score: what a policy computes, select: choosing from its scores.
        evict: freeing cells, moving what is kept, holding on to what the next block looks back at.
        park: copying rows of evicted tokens to the host.
        total: from start to end; more than the sum of the steps.
        blocks: the steps of each block, by name.
    """

    decode: float = 0.0
    probe: float = 0.0
    lookahead: float = 0.0
    score: float = 0.0
    select: float = 0.0
    evict: float = 0.0
    park: float = 0.0
    total: float = 0.0
    blocks: list[dict[str, float]] = field(default_factory=list)
    _step: str | None = field(default=None, repr=False)
    _since: float = field(default=0.0, repr=False)
    _before: dict[str, float] = field(default_factory=dict, repr=False)

    @contextmanager
    def spent(self, step: str) -> Iterator[None]:
        """Charges the block's seconds to a step; those of a step inside it to that one alone."""
        outer, running = self._change(step), _running.set(self)
        try:
            yield
        finally:
            _running.reset(running)
            self._change(outer)

    def _change(self, step: str | None) -> str | None:
        """Goes over to another step; returns the one before."""
        now, before = time.perf_counter(), self._step
        if before is not None:
            setattr(self, before, getattr(self, before) + now - self._since)
        self._step, self._since = step, now
        return before

    def end_block(self) -> None:
        """Adds to `blocks` what was spent since the last one ended."""
        now = {step: float(getattr(self, step)) for step in STEPS}
        self.blocks.append({step: now[step] - self._before.get(step, 0.0) for step in STEPS})
        self._before = now


@contextmanager
def step(name: str) -> Iterator[None]:
    """Charges the block to a step of the read under way in this thread, if there is one."""
    timings = _running.get()
    if timings is None:
        yield
        return
    with timings.spent(name):
        yield
