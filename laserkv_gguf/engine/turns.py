"""Who works with the context when, where several calls are under way: turns and batches.

Every call has a `Turn`. Only one of them works at a time; it gives the others a turn where it
decodes, and between the pieces of an answer. So its code is the same as if it were alone. What is
to be decoded waits as a `Job`, and once nobody has anything else to do, the next batch is made:

- The next tokens of all conversations that are generating are one batch (`Job.generates`).
- Anything else (a micro-batch that is read, a question, a probe with its drafts) is a batch of its
  own, one at most between two of the former. Of several the one comes first whose call has decoded
  least so far, as in Linux's scheduler: readings take turns, and a short question does not wait for
  a document. None is passed over more than `_PATIENCE` times.

The thread that computes a batch is one of those that wait for it.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from laserkv_gguf.errors import Cancelled
from laserkv_gguf.llama.context import Context, Interrupted, Job

_PATIENCE = 4  # batches of others that may go before a job that came first
_CREDIT = 256  # tokens by which a new call is ahead of those that are under way
_LINGER, _LONGEST = 0.1, 0.002  # of the last batch's time, and seconds at most; see `_linger`


class Turn:
    """A call, or an answer that is read piece by piece.

    Attributes:
        number: how many came before.
        cancelled: whether it is to end; seen where it decodes next.
        residents: conversations that it works with.
        refused: why it does not get a turn at all.
    """

    def __init__(self, stream: Any = None, resident: Any = None, *, alone: bool = False) -> None:
        self.stream, self.alone = stream, alone
        self.number = 0
        self.cancelled = False
        self.residents: set[Any] = set() if resident is None else {resident}
        self.refused: Exception | None = None
        self.served = 0  # tokens decoded in batches of its own
        self.thread = 0  # that works, or waits
        self._asleep = threading.Lock()
        self._asleep.acquire()

    def wake(self) -> None:
        """Once is enough, before or after `sleep`."""
        with contextlib.suppress(RuntimeError):  # it was woken, and has not seen it yet
            self._asleep.release()

    def sleep(self) -> None:
        """Until `wake`; may also end without."""
        self._asleep.acquire()


class _Posted:
    """A job whose turn has not come."""

    def __init__(self, turn: Turn, job: Job) -> None:
        self.turn, self.job = turn, job
        self.done = False
        self.error: Exception | None = None
        self.passed = 0
        self.alone = False  # its batch with others failed


class Turns:
    """Hands the context from one call to the next, and makes their batches.

    Args:
        lock: guards all this, with whatever its owner guards by it; held for moments only.

    Attributes:
        holder: the turn that works now, or computes a batch; None where nobody does.
        steps: batches computed so far.
    """

    def __init__(self, lock: Any) -> None:
        self.holder: Turn | None = None
        self.steps = 0
        self._lock, self._arrived = lock, threading.Condition(lock)
        self._ready: deque[Turn] = deque()
        self._posted: list[_Posted] = []
        self._running: list[_Posted] = []
        self._context: Context | None = None  # that computes `_running`
        self._for_cells: list[Turn] = []  # those that sleep until somebody leaves
        self._want_cells: set[Turn] = set()  # these, and those that are about to look again
        self._between: set[Turn] = set()  # answers whose last piece was taken a moment ago
        self._generated = False  # whether the last batch went on with answers
        self._seconds = 0.0  # that it took
        self._floor = 0  # `served` of the last job that was alone
        self._left: deque[Callable[[], None]] = deque()

    # a turn begins and ends

    def join(self, turn: Turn) -> None:
        """Lets a new turn in, which `wait`s; the lock is held."""
        turn.served = max(self._floor - _CREDIT, 0)
        self._line_up(turn)

    def leave(self, turn: Turn) -> None:
        """Ends a turn, whoever has the context."""
        if self.holder is turn:
            self._close_left()
        with self._lock:
            self._between.discard(turn)
            if turn in self._ready:
                self._ready.remove(turn)
            if self.holder is turn:
                self._pass_on()

    def wait(self, turn: Turn) -> None:
        """Waits until a turn that is lined up works, or was refused.

        Raises:
            KeyboardInterrupt: Ctrl-C, once it works, or was refused.
        """
        interrupted: BaseException | None = None
        while self.holder is not turn and turn.refused is None:
            try:
                turn.sleep()
            except BaseException as error:
                interrupted = error
        turn.thread = threading.get_ident()
        if interrupted is not None:
            raise interrupted

    def pause(self, turn: Turn) -> None:
        """Lets others have the context while a piece of an answer is looked at."""
        self._close_left()
        with self._lock:
            self._between.add(turn)
            self._pass_on()

    def go_on(self, turn: Turn) -> None:
        """Has the context again, after `pause`; KeyboardInterrupt as `wait`."""
        with self._lock:
            self._between.discard(turn)
            self._line_up(turn)
            self._arrived.notify_all()
        self.wait(turn)

    def others_first(self) -> None:
        """Lets all others go on that have something to do other than to decode.

        Before something is decoded out of turn: they may still have to read their logits.
        """
        turn = self.holder
        if turn is None:
            return
        self._close_left()
        with self._lock:
            if not self._ready:
                return
            self._ready.append(turn)
            self._pass_on()
        self.wait(turn)

    @property
    def here(self) -> bool:
        """Whether this very thread works, or is about to, so that it cannot wait for a turn."""
        holder = self.holder
        works = holder is not None and holder.thread == threading.get_ident()
        return works or bool(self._lock._is_owned())

    def later(self, close: Callable[[], None]) -> None:
        """Has something closed by whoever works next, before anything is decoded."""
        self._left.append(close)

    def close_left(self) -> None:
        """Closes now what waits for that, where nobody works."""
        with self._lock:
            if self.holder is None:
                self._close_left()

    def _close_left(self) -> None:
        while self._left:
            self._left.popleft()()

    def _line_up(self, turn: Turn) -> None:
        if self.holder is None:
            self.holder = turn
            turn.wake()
        elif self.holder is not turn and turn not in self._ready:
            self._ready.append(turn)

    def _pass_on(self) -> Turn | None:
        """Hands the context to whoever is next; to one that has posted a job where nobody else is.

        The lock is held.
        """
        self.holder = None
        if self._ready:
            self.holder = self._ready.popleft()
        elif self._posted:
            self.holder = self._posted[0].turn
        if self.holder is not None:
            self.holder.wake()
        return self.holder

    # cells

    def wait_for_cells(self, turn: Turn) -> None:
        """Lets others work until one of them has left.

        Raises:
            Cancelled: it was cancelled meanwhile.
        """
        self._close_left()
        with self._lock:
            self._want_cells.add(turn)
            if not turn.cancelled:
                self._for_cells.append(turn)
            else:
                self._ready.append(turn)
            self._pass_on()
        try:
            self.wait(turn)
        finally:
            self._want_cells.discard(turn)
        self.check(turn)

    def waits_before(self, turn: Turn) -> bool:
        """Whether somebody who came earlier waits for cells."""
        with self._lock:
            return any(one.number < turn.number for one in self._want_cells)

    def waiting_for_cells(self) -> list[Turn]:
        with self._lock:
            return list(self._for_cells)

    def cells_are_free(self) -> None:
        """Those that wait for cells look again."""
        with self._lock:
            self._line_up_for_cells()

    def _line_up_for_cells(self) -> None:
        waiting, self._for_cells = self._for_cells, []
        for turn in sorted(waiting, key=lambda one: one.number):
            self._line_up(turn)

    # batches

    def check(self, turn: Turn) -> None:
        """Raises Cancelled where a turn is to end."""
        if turn.cancelled:
            raise Cancelled("cancelled")

    def decode(self, context: Context, job: Job) -> None:
        """As `llama.context.Turns.decode`, for the turn that works."""
        turn = self.holder
        if turn is None:  # nobody who came through the door: a test, or a tool
            context.compute([job])
            return
        self._close_left()
        self.check(turn)
        posted = _Posted(turn, job)
        job.probe = context.probe.disarm()
        interrupted: BaseException | None = None
        with self._lock:
            self._posted.append(posted)
            self._pass_on()
        while True:
            try:
                self.wait(turn)
                if not posted.done:
                    self._lead(context, posted)
            except BaseException as error:
                interrupted = error
                with self._lock:
                    if posted in self._posted:
                        self._posted.remove(posted)
                        posted.done = True
            if posted.done:
                break
            with self._lock:
                self._pass_on()
        context.probe.arm(job.probe)
        if interrupted is not None:
            raise interrupted
        self.check(turn)
        if posted.error is not None:
            raise posted.error

    def _lead(self, context: Context, own: _Posted) -> None:
        """Computes the next batch, as nobody has anything else to do.

        Where somebody comes meanwhile, it is their turn first.

        Raises:
            KeyboardInterrupt: Ctrl-C; what others have in the batch was computed, or is posted.
        """
        chosen: list[_Posted] = []
        try:
            with self._lock:
                self._linger()
                if self._ready:
                    return
                chosen = self._choose(context)
                for one in chosen:
                    self._posted.remove(one)
            started = time.perf_counter()
            self._compute(context, chosen, own)
            self._seconds = time.perf_counter() - started
            self.steps += 1
        finally:
            with self._lock:
                for one in chosen:
                    if not one.done:
                        self._posted.insert(0, one)
                    elif one is not own:
                        self._ready.append(one.turn)

    def _linger(self) -> None:
        """Waits a moment for answers whose piece is being looked at, so that they are in the batch.

        Else two halves of them could take turns for ever, each in batches of its own.
        """
        until = time.perf_counter() + min(_LINGER * self._seconds, _LONGEST)
        while self._between and not self._ready:
            left = until - time.perf_counter()
            if left <= 0 or not self._arrived.wait(left):
                self._between.clear()  # these are slow

    def _choose(self, context: Context) -> list[_Posted]:
        generating = [one for one in self._posted if one.job.generates and not one.alone]
        others = [one for one in self._posted if one not in generating]
        if generating and not (others and self._generated):
            self._generated = True
            return _within(generating, min(context.ubatch_size, context.most_outputs))
        self._generated = False
        least = min(others, key=lambda one: (one.turn.served, one.turn.number))
        passed_over = [one for one in others if one.passed >= _PATIENCE]
        chosen = min(passed_over, key=lambda one: one.turn.number) if passed_over else least
        for one in others:
            one.passed += one is not chosen
        self._floor = max(self._floor, chosen.turn.served)
        chosen.turn.served += len(chosen.job)
        return [chosen]

    def _compute(self, context: Context, chosen: list[_Posted], own: _Posted) -> None:
        """Computes a batch; each job of it is done then, with its error if it failed.

        Where several fail together none is done: each will be tried alone.
        """
        with self._lock:
            self._running, self._context = chosen, context
            context.resume()
            if all(one.turn.cancelled for one in chosen):
                context.cancel()
        alone = len(chosen) == 1
        probe, job = context.probe, chosen[0].job
        if alone:
            probe.arm(job.probe)
        failed: Exception | None = None
        done = alone
        try:
            context.compute([one.job for one in chosen], interrupt=chosen == [own])
            done = True
        except Interrupted:
            done = True
            raise
        except Exception as error:
            failed = error
        except BaseException:
            done = chosen == [own]
            raise
        finally:
            if alone:
                job.probe = probe.disarm()
            with self._lock:
                self._running, self._context = [], None
                context.resume()
                for one in chosen:
                    one.alone, one.done, one.error = not done, done, failed

    def cancel(self, turns: Iterable[Turn]) -> None:
        """Makes turns end where they decode next, or now where nobody else is decoding."""
        with self._lock:
            for turn in turns:
                turn.cancelled = True
                for posted in [one for one in self._posted if one.turn is turn]:
                    if self.holder is not turn:  # it leads: it will see
                        self._posted.remove(posted)
                        posted.done = True
                        self._line_up(turn)
                if turn in self._for_cells:
                    self._for_cells.remove(turn)
                    self._line_up(turn)
            self._arrived.notify_all()
            if self._context and all(one.turn.cancelled for one in self._running):
                self._context.cancel()


def _within(posted: list[_Posted], most: int) -> list[_Posted]:
    """As many as one batch takes, in the order they came."""
    chosen: list[_Posted] = []
    for one in posted:
        most -= len(one.job)
        if most < 0 and chosen:
            break
        chosen.append(one)
    return chosen
