"""The server's life: bound, running, and ended without losing what is under way."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import signal
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from laserkv_gguf.api import LaserKV
from laserkv_gguf.errors import UserError
from laserkv_gguf.server import app
from laserkv_gguf.server.serving import Serving
from laserkv_gguf.server.settings import ServerSettings

log = logging.getLogger(__name__)

_HEAD = 30.0  # seconds for the first request of a connection to begin
_IDLE = 60  # seconds that a connection may be silent between two requests
_BACKLOG = 1024
_CONNECTIONS = 2000
_LAST = 5.0  # seconds for what was cancelled to end


class _Protocol(H11Protocol):
    """Closes connections whose request's head does not come: uvicorn would wait for ever."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.loop.call_later(_HEAD, self._check_head, transport)

    def _check_head(self, transport: asyncio.Transport) -> None:
        begun: object = self.cycle
        if begun is None and not transport.is_closing():
            transport.close()


class _Server(uvicorn.Server):
    """Stops by steps: no new requests, a grace for those that run, then they are cancelled."""

    def __init__(self, config: uvicorn.Config, serving: Serving, said: Callable[[], None]) -> None:
        super().__init__(config)
        self.serving, self._said = serving, said

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._said()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        works = self.serving.works
        works.closing = True
        ends = time.monotonic() + self.serving.settings.grace
        while works.jobs and time.monotonic() < ends and not self.force_exit:
            await asyncio.sleep(0.02)
        works.cancel_all()
        ends = time.monotonic() + _LAST
        while works.jobs and time.monotonic() < ends:
            await asyncio.sleep(0.02)
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, but what was caught is not raised again: the end is a plain one."""
        before = {
            number: signal.signal(number, self.handle_exit)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def bound(settings: ServerSettings) -> socket.socket:
    """A socket that listens where the settings say.

    Raises:
        UserError: it cannot be had.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((settings.host, settings.port))
        made.listen(_BACKLOG)
    except (OSError, OverflowError) as error:
        made.close()
        reason = getattr(error, "strerror", None) or str(error)
        remedy = "give an address of this machine with --host"
        if getattr(error, "errno", 0) in (errno.EADDRINUSE, errno.EACCES):
            remedy = "give another --port"
        raise UserError(
            f"cannot listen at {settings.host}, port {settings.port}: {reason}; {remedy}"
        ) from None
    return made


def address(listening: socket.socket) -> str:
    """Where a page finds it."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(
    engine: LaserKV,
    settings: ServerSettings,
    listening: socket.socket,
    on_start: Callable[[str], None],
) -> None:
    """Serves until SIGINT or SIGTERM.

    Args:
        listening: of `bound`; closed at the end.
        on_start: called with the address, once requests are taken.

    Raises:
        LaserKVError: documents cannot be kept where the settings say.
    """
    _many_files()
    # a document that is found on disk is not read: nothing else would pass the time meanwhile
    engine.warm_up_beside()
    serving = Serving(engine, settings)
    where = address(listening)
    config = uvicorn.Config(
        app.make(serving),
        http=_Protocol,
        loop="asyncio",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=_CONNECTIONS,
        timeout_keep_alive=_IDLE,
        timeout_graceful_shutdown=5,
    )
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    server = _Server(config, serving, lambda: on_start(where))
    try:
        server.run(sockets=[listening])
    finally:
        listening.close()
        serving.works.cancel_all()
        serving.close()


def _many_files() -> None:
    """A connection is an open file, of which a process may have few unless it asks for more."""
    try:
        import resource
    except ImportError:  # Windows
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4096 if hard == resource.RLIM_INFINITY else min(4096, hard)
    if soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
