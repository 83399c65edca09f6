"""Several groups of questions at a time, each in a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from laserkv_gguf.errors import Cancelled, Closed

if TYPE_CHECKING:
    from laserkv_gguf.engine.engine import Engine

_LOOK = 0.1  # seconds between looks whether something went wrong


class Crew:
    """Threads that answer one group after the other, as many as the engine takes calls.

    Args:
        groups: taken in order, by whichever thread is free.
        answer: answers one; what it raises stops all.
    """

    def __init__(
        self, engine: Engine, groups: Iterator[Any], answer: Callable[[Any], None]
    ) -> None:
        self.engine, self._groups, self._answer = engine, groups, answer
        self._lock = threading.Lock()
        self._errors: list[BaseException] = []
        self._stopped = False

    def work(self) -> None:
        """Answers all groups.

        Raises:
            BaseException: the first that one of the threads raised, or this one; what is under way
                was stopped then.
        """
        threads = [
            threading.Thread(target=self._run, name=f"laserkv-batch-{number}", daemon=True)
            for number in range(self.engine.parallel)
        ]
        for thread in threads:
            thread.start()
        try:
            while not self._errors and any(thread.is_alive() for thread in threads):
                for thread in threads:
                    thread.join(_LOOK)
                    if self._errors:
                        break
        finally:
            self._stopped = bool(self._errors) or any(thread.is_alive() for thread in threads)
            while any(thread.is_alive() for thread in threads):
                self.engine.cancel()  # again: one may just have begun another group
                threads[0].join(_LOOK)
                threads = [thread for thread in threads if thread.is_alive()] or threads[:1]
        if self._errors:
            late = (Cancelled, Closed)  # what others raise because all is stopped
            first = [error for error in self._errors if not isinstance(error, late)]
            raise (first or self._errors)[0]

    def _run(self) -> None:
        try:
            while not self._stopped:
                with self._lock:
                    group = next(self._groups, None)
                if group is None:
                    return
                self._answer(group)
        except BaseException as error:
            self._errors.append(error)
            self._stopped = True
