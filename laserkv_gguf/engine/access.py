"""Who may use an engine: so many calls at a time, in the process that made it, until it is closed.

An engine is made, in use, and closed. `Access` is where it changes from one to the next, and the
door where calls wait to be let in, by arrival:

- `alone`, `inside` and every `Answer` are let in; an answer that is read piece by piece stays in
  between its pieces. What several of them do inside, one at a time, `Turns` sees to.
- `close` bars the door, stops what is under way, and frees once nobody is inside. Where it is
  called by the very thread that is inside (a callback, a signal handler), that thread frees on its
  way out.
- A process that was forked off is refused at the door, before it could wait for a thread that it
  does not have.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol
from weakref import ref

from laserkv_gguf.engine.turns import Turn, Turns
from laserkv_gguf.errors import Busy, Cancelled, Closed, LaserKVError, UserError
from laserkv_gguf.llama.handle import closed_at_exit

CLOSED = "the engine is closed; make a new LaserKV"
FORKED = (
    "this engine belongs to the process that this one was forked from; make a LaserKV here, or "
    "start processes with multiprocessing's spawn"
)
BUSY = (
    "the engine is at work in this thread: what it calls back cannot ask it; "
    "ask again once that has returned"
)
DROPPED = (
    "this answer was dropped: its thread asked the engine something else before it had ended; "
    "read it to its end first"
)

QUEUE = 1024  # calls that may wait to be let in
_PATIENCE = 10.0  # seconds that the end of the process waits for a callback that does not return

_open = closed_at_exit(lambda access: access.close(_PATIENCE))


class Engine(Protocol):
    """What is accessed."""

    def free(self) -> None:
        """Gives all native memory back; again where it was interrupted."""


class Stream(Protocol):
    """An answer that is read piece by piece."""

    thread: int
    unwanted: bool
    conversation: Any

    def drop(self, why: Exception | None, timeout: float = -1) -> None:
        """Ends it, so that whoever reads on gets `why`."""


class Access:
    """The door to one engine.

    Args:
        engine: what is accessed; held weakly, as it holds this.
        most: calls inside at a time.
        queue: calls that may wait outside.

    Attributes:
        closing: whether `close` was called; `closed`: whether everything has been freed.
        turns: of those who are inside.
    """

    def __init__(self, engine: Engine, most: int = 1, queue: int = QUEUE) -> None:
        self.closing = self.closed = False
        self._engine, self._process = ref(engine), os.getpid()
        self._most, self._limit = most, queue
        # held for moments; again by the same thread: a signal handler may call close, too
        self._state = threading.RLock()
        self.turns = Turns(self._state)
        self._inside: list[Turn] = []
        self._queue: list[Turn] = []  # in the order they came
        self._came = 0
        self._empty = threading.Condition(self._state)
        self._freeing, self._freer = threading.Lock(), 0  # and the thread that has it
        self._at_work: set[int] = set()  # threads that are inside, or wait for it
        _open.add(self)

    @property
    def elsewhere(self) -> bool:
        """Whether this process was forked off: it has no threads, and its locks may be held."""
        return os.getpid() != self._process

    def check_process(self) -> None:
        """Refuses a process that was forked off.

        Raises:
            Closed: it was.
        """
        if self.elsewhere:
            raise Closed(FORKED)

    def check(self) -> None:
        """Refuses whoever may not come in.

        Raises:
            Closed: the engine is closed, or of another process.
        """
        self.check_process()
        if self.closing:
            raise Closed(CLOSED)

    # in and out

    @contextmanager
    def alone(self, *, again: bool = False) -> Iterator[None]:
        """Has the engine for oneself: nobody else is inside.

        Args:
            again: whether a thread may come in that is inside already.

        Raises:
            Closed: it is closed, was while this thread waited, or is while it works.
            Busy: too many wait already.
            UserError: this thread is inside already.
        """
        self.check()
        with self.at_work() as already:
            if already and again:
                yield
                return
            with self._one(already, None, alone=True):
                yield

    @contextmanager
    def inside(self, resident: Any = None) -> Iterator[None]:
        """Works with the engine, while others may, too; errors as of `alone`.

        Args:
            resident: the conversation it is for, which nobody else works with meanwhile.
        """
        self.check()
        with self.at_work() as already, self._one(already, resident, alone=False):
            yield

    @contextmanager
    def _one(self, already: bool, resident: Any, *, alone: bool) -> Iterator[None]:
        if already:
            raise UserError(BUSY)
        turn = self.enter(None, resident, alone=alone)
        try:
            yield
        except Cancelled:
            self.check()  # whom closing cancels gets told
            raise
        finally:
            self.leave(turn)

    @contextmanager
    def at_work(self) -> Iterator[bool]:
        """Marks this thread as one that `close` need not wait for; yields whether it was before."""
        me = threading.get_ident()
        already = me in self._at_work
        self._at_work.add(me)
        try:
            yield already
        finally:
            if not already:
                self._at_work.discard(me)
                if self.closing:
                    self._finish(0)

    def enter(self, stream: ref[Any] | None, resident: Any = None, *, alone: bool = False) -> Turn:
        """Is let in, and has the turn; waits for that, and drops what this thread left half-way.

        Args:
            stream: what comes in, a `Stream`; None for a call.
            resident: the conversation it is for, which nobody else works with meanwhile.
            alone: whether nobody else may be inside.

        Raises:
            Closed: it is closed, or was while this thread waited.
            Cancelled: the stream was closed while it waited.
            Busy: too many wait already.
        """
        self.check()
        self.turns.close_left()
        self._drop_left()
        turn = Turn(stream, resident, alone=alone)
        with self._state:
            if len(self._queue) >= self._limit:
                raise Busy(
                    f"{len(self._queue)} calls wait for this engine already; ask again later"
                )
            turn.number = self._came = self._came + 1
            self._queue.append(turn)
            self._admit()
        try:
            self.turns.wait(turn)
            if turn.refused is not None:
                raise turn.refused
            if (entered := stream() if stream else None) and entered.unwanted:
                raise Cancelled("cancelled")
            self.check()  # last: a signal handler may have closed it just now
        except BaseException:
            self.leave(turn)
            raise
        return turn

    def _drop_left(self) -> None:
        """Drops answers that this thread has not read to their end."""
        me = threading.get_ident()
        with self._state:
            streams = [turn.stream() for turn in self._inside if turn.stream]
        for stream in streams:
            if stream is not None and stream.thread == me:
                stream.drop(Cancelled(DROPPED))

    def _admit(self) -> None:
        """Lets in whoever may, by arrival; the lock is held."""
        for turn in list(self._queue):
            alone = any(one.alone for one in self._inside)
            if alone or len(self._inside) >= self._most or (turn.alone and self._inside):
                return
            if turn.residents & self._residents():
                continue  # its conversation is being asked; those behind it need not wait
            self._queue.remove(turn)
            self._inside.append(turn)
            self.turns.join(turn)

    def _residents(self) -> set[Any]:
        return {resident for turn in self._inside for resident in turn.residents}

    def leave(self, turn: Turn) -> None:
        """Goes out, from inside or from the queue; others may come in for it."""
        with self._state:
            if turn in self._queue:
                self._queue.remove(turn)
            if turn in self._inside:
                self.turns.leave(turn)
                self._inside.remove(turn)
            self._admit()
            self.turns.cells_are_free()
            if not self._inside:
                self._empty.notify_all()
        if self.closing:
            self._finish(0)

    def holds_elsewhere(self, resident: Any) -> bool:
        """Whether another call than the one at work works with a conversation."""
        with self._state:
            others = [turn for turn in self._inside if turn is not self.turns.holder]
            return any(resident in turn.residents for turn in others)

    @property
    def turns_before(self) -> bool:
        """Whether a call that came before the one at work waits for cells."""
        turn = self.turns.holder
        return turn is not None and self.turns.waits_before(turn)

    def works_with(self, resident: Any) -> None:
        """From now on the call at work has this conversation, whatever it had before."""
        if self.turns.holder is not None:
            self.turns.holder.residents = {resident}

    def wait_for_cells(self, cells: int) -> None:
        """Waits until another call has left, which may leave cells.

        Raises:
            Cancelled: the call was cancelled meanwhile.
            LaserKVError: nobody else is there who could leave.
        """
        turn = self.turns.holder
        with self._state:
            waiting = self.turns.waiting_for_cells()
            if turn is None or all(one is turn or one in waiting for one in self._inside):
                raise LaserKVError(
                    f"this needs {cells} cells, and others of the same kind hold theirs and wait; "
                    "give a larger --ctx-size"
                )
        self.turns.wait_for_cells(turn)

    # stopping

    def cancel(self, stream: object = None) -> None:
        """Stops what is under way, from any thread; nothing where nothing is.

        Args:
            stream: stops only this one, also where it waits to be let in.
        """
        if self.elsewhere:
            return
        with self._state:
            if stream is None:
                self.turns.cancel(self._inside)
                return
            for turn in [*self._inside, *self._queue]:
                if turn.stream is None or turn.stream() is not stream:
                    continue
                if turn in self._queue:
                    self._refuse(turn, Cancelled("cancelled"))
                else:
                    self.turns.cancel([turn])

    def _refuse(self, turn: Turn, why: Exception) -> None:
        self._queue.remove(turn)
        turn.refused = why
        turn.wake()

    def forget_cancelled(self) -> None:
        """Goes on in spite of `cancel`, to put back what was there."""
        if self.turns.holder is not None:
            self.turns.holder.cancelled = False

    def check_cancelled(self) -> None:
        """Between decodes, which end by themselves.

        Raises:
            Cancelled: `cancel` was called since this call came in.
        """
        if self.turns.holder is not None:
            self.turns.check(self.turns.holder)

    # the end

    def close(self, timeout: float = -1) -> None:
        """Ends the engine's life, from any thread, at any moment, any number of times.

        Returns when everything is freed; before that where this very thread is inside, or the
        process is another one.

        Args:
            timeout: seconds to wait for whoever is inside; negative for as long as it takes.
        """
        if self.elsewhere:
            return
        with self._state:
            self.closing = True
            self.cancel()
            for turn in list(self._queue):
                self._refuse(turn, Closed(CLOSED))
            streams = [turn.stream() for turn in self._inside if turn.stream]
        for stream in streams:
            if stream is not None:
                stream.drop(Closed(CLOSED), timeout)
        self.turns.close_left()
        if threading.get_ident() not in self._at_work:
            self._finish(timeout)

    def _finish(self, timeout: float) -> None:
        """Frees everything, where nobody is inside; else whoever is does it on leaving."""
        if self.closed or self.elsewhere or self._freer == threading.get_ident():
            return
        with self._state:
            limit = None if timeout < 0 else timeout
            if not self._empty.wait_for(lambda: not self._inside, limit):
                return
        if not self._freeing.acquire(timeout=timeout):
            return
        self._freer = threading.get_ident()
        try:
            if not self.closed and (engine := self._engine()):
                engine.free()
            self.closed = True
        finally:
            self._freer = 0
            self._freeing.release()
