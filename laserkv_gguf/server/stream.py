"""Events of a job as they come, to a client that may go away."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from laserkv_gguf.reading.reader import Progress
from laserkv_gguf.server.errors import SERVER, ApiError
from laserkv_gguf.server.work import Ended, Event, Failed, Job

Chunks = Callable[[Event], Iterable[dict[str, Any]]]
"""What a client is told of an event, each an object of its own."""


class _Late(Exception):
    """The time for a request is over."""


async def _events(job: Job, seconds: float, pause: float) -> AsyncIterator[Event | None]:
    """What a job says; None where it said nothing for a while.

    Raises:
        _Late: it has taken too long.
    """
    while True:
        left = seconds - (time.perf_counter() - job.arrived)
        if left <= 0:
            raise _Late
        try:
            event = await asyncio.wait_for(job.events.get(), min(pause, left))
        except asyncio.TimeoutError:
            yield None
            continue
        yield event
        if isinstance(event, (Ended, Failed)):
            return


def _late(seconds: float) -> ApiError:
    return ApiError(
        504,
        f"the request took more than {seconds:g} s; start the server with a larger --timeout",
        kind=SERVER,
        code="timeout",
    )


async def _cancel_when_gone(job: Job, receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    job.cancel()


async def collected(job: Job, receive: Receive, seconds: float) -> list[Event]:
    """All that a job says, once it has ended; it is cancelled when the client goes away.

    Raises:
        ApiError: it failed, or took too long.
    """
    watch = asyncio.ensure_future(_cancel_when_gone(job, receive))
    found: list[Event] = []
    try:
        async for event in _events(job, seconds, seconds):
            if isinstance(event, Failed):
                raise event.error
            if event is not None and not isinstance(event, Progress):
                found.append(event)
        return found
    except _Late:
        raise _late(seconds) from None
    finally:
        watch.cancel()
        job.cancel()


class EventStream(Response):
    """Server-sent events.

    While nothing is generated there is a comment now and then, so that no proxy takes the
    connection for dead; while a document is read it says how far that is.

    Args:
        chunks: what is told of each event.
        seconds: for all of it.
        pause: the longest silence.
    """

    media_type = "text/event-stream"

    def __init__(self, job: Job, chunks: Chunks, *, seconds: float, pause: float) -> None:
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self.job, self.chunks, self.seconds, self.pause = job, chunks, seconds, pause

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        job = self.job
        watch = asyncio.ensure_future(_cancel_when_gone(job, receive))
        try:
            # what fails before there is anything to say fails with a status of its own
            events = _events(job, self.seconds, self.pause)
            first = await self._first(events)
            await send(self._start())
            if first is not None:
                await self._tell(first, send)
            if not isinstance(first, (Ended, Failed)):
                async for event in events:
                    await self._tell(event, send)
        except _Late:
            await send(_data(_late(self.seconds).body))
        except ApiError as error:
            response = Response(
                json.dumps(error.body), error.status, error.headers, "application/json"
            )
            await response(scope, receive, send)
            return
        finally:
            watch.cancel()
            job.cancel()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _first(self, events: AsyncIterator[Event | None]) -> Event | None:
        try:
            async for event in events:
                if isinstance(event, Failed):
                    raise event.error
                return event
        except _Late:
            raise _late(self.seconds) from None
        return None

    def _start(self) -> Message:
        return {
            "type": "http.response.start",
            "status": self.status_code,
            "headers": self.raw_headers,
        }

    async def _tell(self, event: Event | None, send: Send) -> None:
        if event is None:
            await send(_comment("still here"))
        elif isinstance(event, Failed):
            await send(_data(event.error.body))
        else:
            if isinstance(event, Progress):
                await send(_comment(f"read {event.read} of {event.total} tokens"))
            for chunk in self.chunks(event):
                await send(_data(chunk))
            if isinstance(event, Ended):
                await send(_body("data: [DONE]\n\n"))


def _body(text: str) -> Message:
    return {"type": "http.response.body", "body": text.encode(), "more_body": True}


def _comment(text: str) -> Message:
    return _body(f": {text}\n\n")


def _data(value: dict[str, Any]) -> Message:
    return _body(f"data: {json.dumps(value, ensure_ascii=False)}\n\n")
