"""A conversation's part of the cache: a sequence and its ledger, changed together or not at all."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from laserkv_gguf.conversation.ledger import Indices, Ledger
from laserkv_gguf.errors import UserError
from laserkv_gguf.llama import moving, rope, rows, state
from laserkv_gguf.llama.sequence import MAIN, Sequence

if TYPE_CHECKING:
    from laserkv_gguf.llama.context import Context
    from laserkv_gguf.llama.model import Tokens
    from laserkv_gguf.llama.state import State


@dataclass(frozen=True)
class Mark:
    """What `Cells.revert` goes back to: rows, the next position, and the length of each segment."""

    rows: int
    position: int
    lengths: dict[int, int]


class Cells:
    """The cells of one conversation.

    Args:
        context: llama.cpp's.
        sequence: number of the conversation's own sequence in it.
        limit: most cells it may take; None for all there are.

    Attributes:
        ledger: what stands in them.
        settled: whether llama.cpp has turned all keys to where they stand.
    """

    def __init__(
        self,
        context: Context,
        sequence: int = MAIN,
        limit: int | None = None,
        ledger: Ledger | None = None,
    ) -> None:
        self.ledger = Ledger() if ledger is None else ledger
        self.settled = True
        self._place(context, sequence, limit)

    def _place(self, context: Context, sequence: int, limit: int | None) -> None:
        self.context, self.main = context, Sequence(context, sequence)
        self.limit = context.cells if limit is None else limit

    @property
    def position(self) -> int:
        """Where the next token goes."""
        return self.ledger.next_position

    @property
    def used(self) -> int:
        return len(self.ledger)

    def decode(self, tokens: NDArray[np.int32], number: int, *, outputs: int = 0) -> None:
        """Decodes tokens at the end, as the next ones of a segment.

        Args:
            number: of the segment.
            outputs: of how many of the last tokens logits are wanted.

        Raises:
            Cancelled, KeyboardInterrupt, LaserKVError: as `Context.decode`; `revert` then.
        """
        start = self.position
        self.context.decode(tokens, start, self.main.number, outputs=outputs)
        self.settled = True
        self.ledger.extend(number, tokens, start)

    # undo

    def take_back(self, count: int, number: int) -> None:
        """Drops the last tokens of a segment, which stand at the end."""
        if count:
            with uninterrupted():
                self.main.remove(self.position - count, -1)
                self.ledger.keep(np.arange(self.used) < self.used - count)
                segment = self.ledger.segments[number]
                segment.tokens = segment.tokens[:-count]

    def mark(self) -> Mark:
        """Notes where all stands, for `revert`."""
        segments = self.ledger.segments.items()
        return Mark(self.used, self.position, {n: len(s.tokens) for n, s in segments})

    def revert(self, mark: Mark) -> None:
        """Drops what was decoded since a mark, also what the ledger does not know of yet."""
        self.context.resume()
        with uninterrupted():
            self.main.remove(mark.position, -1)
            self.ledger.keep(np.arange(self.used) < mark.rows)
            for number in list(self.ledger.segments):
                if number not in mark.lengths:
                    self.ledger.forget(number)
                else:
                    segment = self.ledger.segments[number]
                    segment.tokens = segment.tokens[: mark.lengths[number]]

    # what stays, and where

    def evict(self, stays: NDArray[np.bool_]) -> None:
        """Frees the cells of all other rows."""
        with uninterrupted():
            self.main.remove_all(self.ledger.position[~stays])
            self.ledger.keep(stays)

    def close_gaps(self, start: int = 0) -> None:
        """Moves all tokens from a position on together.

        Raises:
            UserError: llama.cpp cannot move them.
        """
        chosen = self.ledger.position >= start
        moved = start + np.arange(int(chosen.sum()))
        if np.array_equal(self.ledger.position[chosen], moved):
            return
        rope.check(self.context.model, self.context.options)
        with uninterrupted():
            self.main.compact(self.ledger.position[chosen], start)
            self.ledger.position[chosen] = moved
            self.settled = False

    def settle(self) -> None:
        """Lets llama.cpp turn keys that were moved."""
        if not self.settled:
            moving.settle(self.context)
            self.settled = True

    # what they hold

    def rows(self, which: Indices) -> rows.Held:
        """Keys and values of some rows of the ledger, copied.

        Raises:
            FormatError: llama.cpp's state is not what `llama.rows` knows.
        """
        self.settle()
        form = rows.known(self.context)
        return rows.read(self.context, form, self.main.number, self.ledger.position[which])

    def state(self) -> State:
        """All of it as llama.cpp saves it."""
        self.settle()
        return state.save(self.context.handle, self.main.number)

    def restore(
        self, saved: State, context: Context, sequence: int, limit: int | None = None
    ) -> None:
        """Puts what `state` gave into a sequence of a context, bit for bit, and goes on there.

        Raises:
            LaserKVError: there is no room, or the context is of another type.
        """
        if len(saved):
            state.restore(context.handle, sequence, saved)
        self._place(context, sequence, limit)

    def log_probabilities(
        self, prompt: NDArray[Any], following: Tokens, room: int
    ) -> NDArray[np.float32]:
        """What the model thinks of tokens that might follow; the cells stay as they are.

        Args:
            prompt: (n,) int32, at least one token, decoded right after what stands there.
            following: tokens that follow it.
            room: cells that the prompt and all but the last of these may take.

        Returns:
            (len(following), vocab): log-probabilities (nats) of what stands at each token's place.

        Raises:
            UserError: there is no room for them.
        """
        found = np.empty((len(following), self.context.model.vocab_size), np.float32)
        for number, logits in enumerate(self.logits_of(prompt, following, room)):
            scores = logits.astype(np.float64)
            scores -= scores.max()
            found[number] = scores - np.log(np.exp(scores).sum())
        return found

    def logits_of(
        self, prompt: NDArray[Any], following: Tokens, room: int
    ) -> Iterator[NDArray[np.float32]]:
        """(vocab,) logits of what stands at the place of each following token, one at a time.

        Arguments, and what is raised, as of `log_probabilities`.
        """
        room = room - len(prompt) + 1
        if len(following) > room:
            raise UserError(
                f"an answer of {len(following)} tokens does not fit: there is room for {room}; "
                "use a larger --ctx-size or a shorter answer"
            )
        context, begin = self.context, self.position
        tokens = np.concatenate((prompt, following[:-1])).astype(np.int32)
        most = min(context.options.outputs, context.batch_size)
        start, done = 0, 0  # of the tokens, of the rows
        try:
            while done < len(following):
                count = min(most, len(following) - done)
                end = len(prompt) - 1 + done + count
                context.decode(tokens[start:end], begin + start, self.main.number, outputs=count)
                for index in range(-count, 0):
                    yield context.logits(index)
                start, done = end, done + count
        finally:
            self.main.remove(begin, -1)
            self.settled = True


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Lets Ctrl-C and SIGTERM wait until sequence and ledger agree again (milliseconds)."""
    # at the end of the interpreter nothing can wait any more
    if threading.current_thread() is not threading.main_thread() or sys.is_finalizing():
        yield
        return
    waiting: list[int] = []
    before = {
        kind: signal.signal(kind, lambda number, _frame: waiting.append(number))
        for kind in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, signal.SIG_DFL if handler is None else handler)
    for number in waiting:
        signal.raise_signal(number)
