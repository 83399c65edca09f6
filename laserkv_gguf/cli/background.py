"""Reading that goes on in a thread of its own, while its user types."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from laserkv_gguf.cli import terminal


class Work:
    """What is under way, and what waits for its end.

    Args:
        read: does it, in a thread; it gets what it is to call with its progress, and what it is to
            call for a question.

    Attributes:
        bar: how far it is.
        waiting: lines that were entered meanwhile, in order.
        on_end: called in the thread, when all is done.
        stopped: whether its user has stopped it.
    """

    def __init__(
        self, read: Callable[[Callable[..., None], Callable[[], str | None]], Any]
    ) -> None:
        self.bar = terminal.ReadingBar()
        self.waiting: list[str] = []
        self.on_end: Callable[[], None] = lambda: None
        self.stopped = False
        self._result: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(read,), name="laserkv-reading")
        self._thread.start()

    def _run(self, read: Callable[[Callable[..., None], Callable[[], str | None]], Any]) -> None:
        try:
            self._result = read(self.bar.update, self.question)
        except BaseException as error:  # told by whoever waits for the end
            self._error = error
        self.on_end()

    @property
    def ended(self) -> bool:
        return not self._thread.is_alive() or self._result is not None or self._error is not None

    def question(self) -> str | None:
        """The question that the rest is to be read with: the first line that waits, if it is one.

        A command in front of it may change what is asked.
        """
        first = next(iter(list(self.waiting)), "/")
        return None if first.startswith("/") else first

    def stop(self, cancel: Callable[[], None]) -> None:
        """Has it stopped; `cancel` is called until it is, for it may just be about to begin."""
        while self._thread.is_alive():
            cancel()
            self._thread.join(0.05)

    def end(self) -> Any:
        """Waits for the end; returns what came of it.

        Raises:
            KeyboardInterrupt: its user has stopped it.
            Exception: whatever went wrong.
        """
        self._thread.join()
        if self._error is None:
            return self._result
        if self.stopped:
            raise KeyboardInterrupt from self._error
        raise self._error
