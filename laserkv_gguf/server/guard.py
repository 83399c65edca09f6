"""Who may call, and how much they may send: before a request is looked at."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from laserkv_gguf.server.errors import ApiError
from laserkv_gguf.server.metrics import Metrics
from laserkv_gguf.server.settings import LOOPBACK, ServerSettings

OPEN = ("/", "/health", "/v1/health")  # without a key: what says no more than that it is there
REPORTS = "/report/"
_PAGE = "/page/"
_METHODS = "GET, POST, DELETE, OPTIONS"
_SAFE = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
    "content-security-policy": "default-src 'self'; img-src 'self' data:; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
}


class Guard:
    """Refuses what may not come in, and hands the rest on with its body whole.

    - A page of another origin is refused unless `cors_origins` names it: a browser would send its
      requests, even where it does not let it read what comes back.
    - Bound to this machine alone, the server goes by names of this machine alone.
    - Keys are compared in constant time.
    - A body is bounded in bytes and in seconds.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings, metrics: Metrics) -> None:
        self.app, self.settings, self.metrics = app, settings, metrics
        self._keys = [(_digest(key.encode()), owner_of(key)) for key in settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        more = self._cors(origin)

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "other")
                self.metrics.requests.labels(route, str(message["status"])).inc()
                held = list(message.get("headers", []))
                names = {name.lower() for name, _ in held}
                for name, value in {**_SAFE, **more}.items():
                    if name.encode() not in names:
                        held.append((name.encode(), value.encode("latin-1")))
                message = {**message, "headers": held}
            await send(message)

        try:
            self._check_names(scope, headers, origin)
            if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
                await JSONResponse(None, 204)(scope, receive, answer)
                return
            path: str = scope["path"]
            if not (path in OPEN or path.startswith((_PAGE, REPORTS))):
                scope.setdefault("state", {})["owner"] = self._owner(headers)
            body = await self._body(headers, receive)
        except ApiError as error:
            close = {"connection": "close", **error.headers}
            await JSONResponse(error.body, error.status, close)(scope, receive, answer)
            return
        except _Gone:
            return
        sent = False

        async def replay() -> Message:
            nonlocal sent
            if sent:
                return await receive()
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, replay, answer)

    def _cors(self, origin: str | None) -> dict[str, str]:
        allowed = self.settings.cors_origins
        if origin is None or not (origin in allowed or "*" in allowed):
            return {}
        return {
            "access-control-allow-origin": origin,
            "access-control-allow-methods": _METHODS,
            "access-control-allow-headers": "Authorization, Content-Type, X-Api-Key",
            "access-control-max-age": "600",
            "vary": "Origin",
        }

    def _check_names(self, scope: Scope, headers: Headers, origin: str | None) -> None:
        settings = self.settings
        host = _host(headers.get("host", ""))
        if settings.local and host not in (*LOOPBACK, *settings.allowed_hosts):
            raise ApiError(
                403,
                "this server is bound to its own machine, and goes by that name; "
                "start it with --allowed-host for another",
            )
        if origin is None or self._cors(origin):
            return
        if origin != f"{scope.get('scheme', 'http')}://{headers.get('host', '')}":
            raise ApiError(
                403, "a page of another origin may not call; start with --cors-origin to allow it"
            )

    def _owner(self, headers: Headers) -> str:
        """Whose key this is; empty where none is asked for."""
        if not self._keys:
            return ""
        given = headers.get("authorization", "")
        scheme, _, key = given.partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            key = headers.get("x-api-key", "")
        digest, owner = _digest(key.strip().encode("utf-8", "replace")), ""
        for known, whose in self._keys:  # all of them, so that no time tells which was close
            if hmac.compare_digest(known, digest):
                owner = whose
        if not owner:
            raise ApiError(
                401,
                "the API key is missing or wrong; send it as Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return owner

    async def _body(self, headers: Headers, receive: Receive) -> bytes:
        most = self.settings.body
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length[:20]) > most:
            raise _too_large(most)
        try:
            return await asyncio.wait_for(_read(receive, most), self.settings.body_seconds)
        except asyncio.TimeoutError:
            raise ApiError(
                408,
                f"the request did not arrive within {self.settings.body_seconds:g} s; send it "
                "faster, or start the server with --body-timeout",
            ) from None


async def _read(receive: Receive, most: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _Gone
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > most:
            raise _too_large(most)
        if not message.get("more_body", False):
            return b"".join(parts)


class _Gone(Exception):
    """The client has."""


def _too_large(most: int) -> ApiError:
    return ApiError(
        413,
        f"the request is larger than {most} bytes; send less, or start with --max-body",
        code="request_too_large",
    )


def owner_of(key: str) -> str:
    """What stands for a key where things are kept."""
    return hashlib.sha256(b"owner\0" + key.encode()).hexdigest()[:16]


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _host(given: str) -> str:
    try:
        return urlsplit(f"//{given}").hostname or ""
    except ValueError:
        return ""


def refusal(error: ApiError) -> JSONResponse:
    """An error as a response."""
    return JSONResponse(error.body, error.status, error.headers)


def owner(state: Any) -> str:
    """Whose key came with a request."""
    return str(getattr(state, "owner", ""))
