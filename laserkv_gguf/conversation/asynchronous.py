"""An answer's pieces for `async for`: a thread of its own reads it, the event loop gets the pieces.

llama.cpp computes in whatever thread asks, for milliseconds to minutes, which an event loop must
not wait for. So every answer that is iterated over with `async for` has a thread while it lasts.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol


class Pieces(Protocol):
    """What is read: an `Answer`."""

    def __next__(self) -> str: ...

    def stop(self) -> None: ...

    def close(self) -> None: ...


async def pieces(answer: Pieces) -> AsyncIterator[str]:
    """The pieces as they come; raises what reading raises.

    Where the task is cancelled, the loop is left, or this is closed, the answer is stopped and
    dropped, without anybody waiting for it.
    """
    queue: asyncio.Queue[Any] = asyncio.Queue()
    pump = _Pump(answer, asyncio.get_running_loop(), queue)
    try:
        pump.start()
        while not isinstance(piece := await queue.get(), _End):
            yield piece
        if piece.error is not None:
            raise piece.error
    finally:
        answer.stop()


async def in_thread(work: Callable[[], Any]) -> Any:
    """What `work()` returns, run in a thread, for what takes no longer than a step."""
    return await asyncio.get_running_loop().run_in_executor(None, work)


class _End:
    """Comes after the last piece."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


class _Pump(threading.Thread):
    """Reads an answer to its end, and hands every piece to an event loop."""

    def __init__(
        self, answer: Pieces, loop: asyncio.AbstractEventLoop, queue: asyncio.Queue[Any]
    ) -> None:
        super().__init__(name="laserkv-answer", daemon=True)
        self._answer, self._loop, self._queue = answer, loop, queue

    def run(self) -> None:
        error: BaseException | None = None
        try:
            while (piece := next(self._answer, None)) is not None:
                self._hand_over(piece)
        except BaseException as raised:
            error = raised
        try:
            self._answer.close()
            self._hand_over(_End(error))
        except RuntimeError:  # the loop is closed: nobody waits
            pass
        finally:
            del self._answer, error

    def _hand_over(self, piece: str | _End) -> None:
        self._loop.call_soon_threadsafe(self._queue.put_nowait, piece)
