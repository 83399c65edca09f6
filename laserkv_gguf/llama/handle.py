"""Native memory with an end: freed once, by the process that made it, when nobody is inside."""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

from laserkv_gguf.errors import Closed


def closed_at_exit(close: Callable[[Any], None]) -> WeakSet[Any]:
    """A set whose members get `close` when the interpreter ends, while threads still run.

    Later, in `__del__`, nobody can be waited for any more. Of several sets the one that was made
    last is closed first: what is used must be asked for its set before what uses it.
    """
    members: WeakSet[Any] = WeakSet()

    def close_all() -> None:
        for member in list(members):
            with contextlib.suppress(Exception):  # the others still want to be closed
                close(member)

    atexit.register(close_all)
    return members


class Handle:
    """An address that llama.cpp gave out, with the users it has.

    Closing bars new users and frees once the last one has gone, so that no thread loses what it
    works on. A process that was forked off neither uses nor frees it.

    Args:
        address: what was given out.
        free: gives it back.
        what: for the error, such as "the model".
    """

    def __init__(self, address: Any, free: Callable[[Any], None], what: str) -> None:
        self._address, self._give_back, self._what = address, free, what
        self._users, self._closed, self._process = 0, False, os.getpid()
        self._lock = threading.RLock()  # a finaliser may come while its own thread is in here

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def address(self) -> Any:
        """For a call during which nobody else can close it.

        Raises:
            Closed: it was closed, or belongs to another process.
        """
        self._check()
        return self._address

    def _check(self) -> None:
        if os.getpid() != self._process:
            raise Closed(f"{self._what} belongs to the process that this one was forked from")
        if self._closed:
            raise Closed(f"{self._what} is closed")

    def __enter__(self) -> Any:
        """Becomes a user; the address stays valid until `__exit__`.

        Raises:
            Closed: it was closed, or belongs to another process.
        """
        self._check()
        with self._lock:
            self._check()
            self._users += 1
            return self._address

    def __exit__(self, *_: object) -> None:
        if os.getpid() != self._process:  # the lock may be held by a thread that is not here
            return
        with self._lock:
            self._users -= 1
            self._free_unused()

    def close(self) -> None:
        """Bars new users; frees now, or when the last user goes."""
        if os.getpid() != self._process:
            return
        with self._lock:
            self._closed = True
            self._free_unused()

    def _free_unused(self) -> None:
        if not self._closed or self._users:
            return
        address, self._address = self._address, None
        if address is not None:
            self._give_back(address)
