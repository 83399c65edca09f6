"""Who may use an engine: one thread at a time, in the process that made it, until it is closed.

An engine is made, in use, and closed. `Access` is where it changes from one to the next, and where
threads wait for their turn:

- `alone` and every step of an `Answer` bring a thread in; an answer that is read piece by piece
  keeps the engine between its steps.
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

from laserkv_gguf.errors import Cancelled, Closed, UserError
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

_PATIENCE = 10.0  # seconds that the end of the process waits for a callback that does not return

_open = closed_at_exit(lambda access: access.close(_PATIENCE))


class Engine(Protocol):
    """What is accessed. All three are called by whoever is inside, `stop` by anybody."""

    def stop(self) -> None:
        """Makes what is decoded now, and anything after it, end soon."""

    def resume(self) -> None:
        """Takes `stop` back."""

    def free(self) -> None:
        """Gives all native memory back; again where it was interrupted."""


class Stream(Protocol):
    """An answer that is read piece by piece."""

    thread: int
    unwanted: bool

    def drop(self, why: Exception | None, timeout: float = -1) -> None:
        """Ends it, so that whoever reads on gets `why`."""


class Access:
    """The door to one engine.

    Args:
        engine: what is accessed; held weakly, as it holds this.

    Attributes:
        closing: whether `close` was called; `closed`: whether everything has been freed.
    """

    def __init__(self, engine: Engine) -> None:
        self.closing = self.closed = False
        self._engine, self._process = ref(engine), os.getpid()
        self._inside = threading.Lock()  # held by whoever is inside, between an answer's steps too
        self._state = threading.RLock()  # for a moment; a signal handler may call close, too
        # The answer that is inside; weakly, so that one nobody reads on ends by itself.
        self._stream: ref[Stream] | None = None
        self._cancelled = threading.Event()
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
        """Has the engine for oneself; waits for other threads.

        Args:
            again: whether a thread may come in that is inside already.

        Raises:
            Closed: it is closed, was while this thread waited, or is while it works.
            UserError: this thread is inside already.
        """
        self.check()
        with self.at_work() as already:
            if already and again:
                yield
                return
            if already:
                raise UserError(BUSY)
            self.enter(None)
            try:
                yield
            except Cancelled:
                self.check()  # whom closing cancels gets told
                raise
            finally:
                self.leave()

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

    def enter(self, stream: ref[Any] | None) -> None:
        """Takes the engine; waits for other threads, and drops what this one left half-way.

        Args:
            stream: what comes in, a `Stream`; None for `alone`.

        Raises:
            Closed: it is closed, or was while this thread waited.
            Cancelled: the stream was closed while it waited.
        """
        self.check()
        left = self._stream() if self._stream else None
        if left is not None and left.thread == threading.get_ident():
            left.drop(Cancelled(DROPPED))
        self._inside.acquire()
        try:
            with self._state:
                self._stream = stream
                self._cancelled.clear()
                if engine := self._engine():
                    engine.resume()
                if (entered := stream() if stream else None) and entered.unwanted:
                    raise Cancelled("cancelled")
                self.check()  # last: a signal handler may have closed it just now
        except BaseException:
            self.leave()
            raise

    def leave(self) -> None:
        """Lets the next thread in."""
        self._stream = None
        self._inside.release()
        if self.closing:
            self._finish(0)

    # stopping

    def cancel(self, stream: object = None) -> None:
        """Stops what is under way, from any thread; nothing where nothing is.

        Args:
            stream: stops only this one, if it is the one inside.
        """
        if self.elsewhere:
            return
        with self._state:
            if stream is not None and (not self._stream or self._stream() is not stream):
                return
            self._cancelled.set()
            if engine := self._engine():
                engine.stop()

    def forget_cancelled(self) -> None:
        """Goes on in spite of `cancel`, to put back what was there."""
        self._cancelled.clear()
        if engine := self._engine():
            engine.resume()

    def check_cancelled(self) -> None:
        """Between decodes, which end by themselves.

        Raises:
            Cancelled: `cancel` was called since this thread came in.
        """
        if self._cancelled.is_set():
            raise Cancelled("cancelled")

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
            stream = self._stream() if self._stream else None
        if stream is not None:
            stream.drop(Closed(CLOSED), timeout)
        if threading.get_ident() not in self._at_work:
            self._finish(timeout)

    def _finish(self, timeout: float) -> None:
        """Frees everything, where nobody is inside; else whoever is does it on leaving."""
        if self.closed or self.elsewhere or not self._inside.acquire(timeout=timeout):
            return
        try:
            if not self.closed and (engine := self._engine()):
                engine.free()
            self.closed = True
        finally:
            self._inside.release()
