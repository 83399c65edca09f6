"""What a request is refused with: OpenAI's error object, in one line of JSON."""

from __future__ import annotations

from typing import Any

from laserkv_gguf.errors import Cancelled, Closed, LaserKVError, OutOfMemory, UserError
from laserkv_gguf.shown import one_line

INVALID, SERVER, LIMIT = "invalid_request_error", "server_error", "rate_limit_error"
TOO_LONG = "context_length_exceeded"


class ApiError(Exception):
    """A request that is refused.

    Args:
        status: of HTTP.
        message: what is wrong and what to do about it, in one line.
        kind: OpenAI's "type".
        code: OpenAI's "code"; None for none.
        param: which part of the request it is about; None for none.
        headers: that go with it.
        more: further fields of the object.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
        **more: Any,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers or {}
        self.about = {
            "message": one_line(message),
            "type": kind,
            "param": param,
            "code": code,
            **more,
        }

    @property
    def body(self) -> dict[str, Any]:
        return {"error": self.about}


def refused(param: str, message: str, code: str | None = None) -> ApiError:
    """400 about one parameter."""
    return ApiError(400, message, param=param, code=code)


def too_long(message: str, tokens: int, cells: int) -> ApiError:
    """400 as the clients know it, with llama-server's two numbers."""
    return ApiError(
        400,
        message,
        kind="exceed_context_size_error",
        code=TOO_LONG,
        n_prompt_tokens=tokens,
        n_ctx=cells,
    )


def of(error: BaseException) -> ApiError:
    """What an error of the engine is to a client."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, (Closed, Cancelled)):
        return ApiError(
            503,
            "the server is going down, or the request was cancelled; send it again",
            kind=SERVER,
            code="cancelled",
            headers={"Retry-After": "5"},
        )
    if isinstance(error, OutOfMemory):
        return ApiError(503, str(error), kind=SERVER, headers={"Retry-After": "30"})
    if isinstance(error, UserError):
        return ApiError(400, str(error))
    if isinstance(error, LaserKVError):
        return ApiError(500, str(error), kind=SERVER)
    return ApiError(
        500,
        f"something went wrong here ({type(error).__name__}); see the server's log",
        kind=SERVER,
    )
