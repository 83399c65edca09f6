"""One thread that does whatever it is given, in order."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from laserkv_gguf.errors import Closed, LaserKVError

T = TypeVar("T")

_Job = tuple[Callable[..., Any], tuple[Any, ...], "SimpleQueue[tuple[Any, BaseException | None]]"]

_GONE = "the thread that decodes was ended: its context is closed"
_ELSEWHERE = "the thread that decodes belongs to the process that this one was forked from"
_DEAD = "the thread that decodes has died; close the engine and make a new one"


class Worker:
    """A thread of its own for work that must always be done by the same one.

    A `ThreadPoolExecutor` of one thread does the same, but takes much longer to hand over a job and
    its result, which counts where there is one for every token.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        # not our method: a thread that knew this object would keep it alive
        self._thread = threading.Thread(target=_work, args=(self._jobs,), name=name, daemon=True)
        self._closed, self._process = False, os.getpid()
        self._thread.start()

    def run(
        self,
        work: Callable[..., T],
        *arguments: Any,
        stop: Callable[[], object] = lambda: None,
        resume: Callable[[], object] = lambda: None,
    ) -> T:
        """What `work(*arguments)` returns, or raises.

        Args:
            stop: called where Ctrl-C comes first; it makes the work end soon, which is waited for.
            resume: called then.

        Raises:
            KeyboardInterrupt: Ctrl-C, which Python hands to the main thread alone.
            Closed: `close` was called, or this process was forked off and lacks the thread.
            LaserKVError: the thread has died.
        """
        if self._closed or os.getpid() != self._process:
            raise Closed(_GONE if self._closed else _ELSEWHERE)
        done: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()
        try:
            self._jobs.put((work, arguments, done))
            result, error = self._wait(done)
        except BaseException:
            stop()
            self._finish_at_last()
            resume()
            raise
        if error is not None:
            raise error
        found: T = result
        return found

    def finish(self) -> None:
        """Waits until all that was handed over has been done."""
        done: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()
        self._jobs.put((lambda: None, (), done))
        self._wait(done)

    def _finish_at_last(self) -> None:
        """However often Ctrl-C comes: what is worked on must not be freed before."""
        while True:
            try:
                self.finish()
            except KeyboardInterrupt:
                continue
            except LaserKVError:  # the thread has died, and the work with it
                pass
            return

    def close(self) -> None:
        """Ends the thread after what was handed over; a process forked off has none to end."""
        self._closed = True
        if os.getpid() != self._process:
            return
        self._jobs.put(None)
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _wait(
        self, done: SimpleQueue[tuple[Any, BaseException | None]]
    ) -> tuple[Any, BaseException | None]:
        while True:
            try:
                # Windows hears Ctrl-C only between waits
                return done.get(timeout=0.1)
            except Empty:
                if self._thread.is_alive():
                    continue
            try:
                return done.get_nowait()  # the last thing it did
            except Empty:
                raise Closed(_GONE) if self._closed else LaserKVError(_DEAD) from None


def _work(jobs: SimpleQueue[_Job | None]) -> None:
    while job := jobs.get():
        work, arguments, done = job
        try:
            done.put((work(*arguments), None))
        except BaseException as error:
            done.put((None, error))
        del job, work, arguments, done  # nothing is kept alive while it waits
