"""The routes, and how their errors end."""

from __future__ import annotations

import logging
import time
from importlib import resources
from typing import Annotated, Any

from fastapi import FastAPI, File, Form, UploadFile
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from laserkv_gguf.errors import LaserKVError
from laserkv_gguf.llama import library
from laserkv_gguf.server import chat, completions
from laserkv_gguf.server.errors import ApiError, of, refused
from laserkv_gguf.server.guard import REPORTS, Guard, owner, refusal
from laserkv_gguf.server.reports import HEADERS
from laserkv_gguf.server.serving import Serving
from laserkv_gguf.server.wire import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from laserkv_gguf.version import VERSION

log = logging.getLogger(__name__)

_PAGES = {
    "index.html": "text/html; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
    "script.js": "text/javascript; charset=utf-8",
}
_NAME = 120  # characters of a path in the metrics


def make(serving: Serving) -> FastAPI:
    """The application of a server."""
    app = FastAPI(
        title="laserkv-gguf",
        version=VERSION,
        summary="Documents of any length for OpenAI's clients.",
        docs_url=None,
        redoc_url=None,
    )
    _errors(app)
    _answers(app, serving)
    _tokens(app, serving)
    _about(app, serving)
    _files(app, serving)
    _reports(app, serving)
    _page(app)
    app.add_middleware(Guard, settings=serving.settings, metrics=serving.metrics)
    return app


def _errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def _api(_: Request, error: ApiError) -> JSONResponse:
        return refusal(error)

    @app.exception_handler(LaserKVError)
    async def _ours(_: Request, error: LaserKVError) -> JSONResponse:
        return refusal(of(error))

    @app.exception_handler(RequestValidationError)
    async def _invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return refusal(_said(error))

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        known = {404: f"there is nothing at {request.url.path[:_NAME]}"}
        message = known.get(error.status_code, str(error.detail))
        return refusal(ApiError(error.status_code, message, headers=dict(error.headers or {})))

    @app.exception_handler(Exception)
    async def _unforeseen(_: Request, error: Exception) -> JSONResponse:
        log.warning("a request failed: %s: %s", type(error).__name__, error)
        return refusal(of(error))


def _said(error: RequestValidationError) -> ApiError:
    """The first thing that is wrong, with the name of where it is."""
    first = error.errors()[0]
    kind, where = first["type"], [str(part) for part in first["loc"] if part != "body"]
    if kind == "json_invalid":
        reason = first.get("ctx", {}).get("error", "")
        return ApiError(400, f"the request is not JSON: {reason}".rstrip(": "))
    name = ".".join(where[:8])[:_NAME]
    if kind == "extra_forbidden":
        return refused(name, f"{name} is not supported here; leave it out", "unsupported")
    if kind == "missing":
        what = f"{name} is missing" if name else "the request has no body; send one object of JSON"
        return refused(name, what)
    message = str(first["msg"]).removeprefix("Value error, ")
    given = first.get("input")
    got = f" (got {given!r:.40})" if isinstance(given, (str, int, float, bool)) else ""
    return refused(name, f"{name}: {message}{got}" if name else message)


def _answers(app: FastAPI, serving: Serving) -> None:
    refusals: dict[int | str, dict[str, Any]] = {
        status: {"description": said}
        for status, said in {
            400: "Refused, by name.",
            401: "Without a key.",
            403: "From another origin or by another name.",
            404: "No such file.",
            408: "It did not arrive in time.",
            413: "Too large.",
            500: "Something failed here.",
            503: "Too many wait.",
            504: "It took too long.",
        }.items()
    }

    @app.post("/v1/chat/completions", responses=refusals)
    async def _chat(wanted: ChatRequest, request: Request) -> Response:
        return await chat.answer(serving, wanted, request)

    @app.post("/v1/completions", responses=refusals)
    async def _completions(wanted: CompletionRequest, request: Request) -> Response:
        return await completions.answer(serving, wanted, request)


def _tokens(app: FastAPI, serving: Serving) -> None:
    model = serving.engine.model

    @app.post("/tokenize", responses={400: {"description": "Refused, by name."}})
    async def _tokenize(wanted: TokenizeRequest) -> dict[str, Any]:
        text = wanted.text
        if text is None:
            raise refused("prompt", "prompt is missing; give the text")
        special = wanted.add_special_tokens
        special = bool(wanted.add_special) if special is None else special
        with_special = wanted.parse_special is not False
        tokens = await serving.apart(
            lambda: model.tokenize(text, bos=special, special=with_special).tolist()
        )
        return {
            "tokens": tokens,
            "count": len(tokens),
            "max_model_len": model.trained_context,
        }

    @app.post("/detokenize", responses={400: {"description": "Refused, by name."}})
    async def _detokenize(wanted: DetokenizeRequest) -> dict[str, Any]:
        if any(not 0 <= token < model.vocab_size for token in wanted.tokens):
            raise refused("tokens", f"a token id is not in 0 to {model.vocab_size - 1}")
        text = await serving.apart(
            lambda: b"".join(model.piece(token, special=True) for token in wanted.tokens)
        )
        said = text.decode("utf-8", "replace")
        return {"prompt": said, "content": said}

    @app.get("/tokenizer_info")
    async def _info() -> dict[str, Any]:
        return {
            "tokenizer_class": "GGUF",
            "vocab_size": model.vocab_size,
            "model_max_length": model.trained_context,
            "bos_token": model.bos_text or None,
            "eos_token": model.eos_text or None,
            "pad_token": model.eos_text or None,
            "chat_template": model.metadata("tokenizer.chat_template"),
        }


def _about(app: FastAPI, serving: Serving) -> None:
    started, engine = int(time.time()), serving.engine

    def model() -> dict[str, Any]:
        return {
            "id": serving.model,
            "object": "model",
            "created": started,
            "owned_by": "laserkv-gguf",
            "meta": {
                "n_vocab": engine.model.vocab_size,
                "n_ctx_train": engine.model.trained_context,
                "size": engine.model.weights_bytes,
                "description": engine.model.description,
            },
        }

    @app.get("/v1/models")
    async def _models() -> dict[str, Any]:
        return {"object": "list", "data": [model()]}

    @app.get("/v1/models/{name:path}", responses={404: {"description": "No such model."}})
    async def _model(name: str) -> dict[str, Any]:
        if name != serving.model:
            raise ApiError(404, f"this server has {serving.model} alone", code="model_not_found")
        return model()

    @app.get("/health")
    @app.get("/v1/health", include_in_schema=False)
    async def _health() -> Response:
        if serving.works.closing:
            return JSONResponse({"status": "closing"}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics", response_class=PlainTextResponse)
    async def _metrics() -> Response:
        text = await serving.apart(serving.metrics.text)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/props")
    async def _props() -> dict[str, Any]:
        settings, sampling = engine.settings, serving.settings.sampling
        return {
            "model_path": engine.model.path.name,
            "model_alias": serving.model,
            "total_slots": serving.settings.workers,
            "chat_template": engine.model.metadata("tokenizer.chat_template") or "",
            "bos_token": engine.model.bos_text,
            "eos_token": engine.model.eos_text,
            "build_info": f"laserkv-gguf {VERSION}, {library.version()}",
            "default_generation_settings": {
                "n_ctx": serving.works.cells,
                "params": {
                    "temperature": sampling.temperature,
                    "top_k": sampling.top_k,
                    "top_p": sampling.top_p,
                    "min_p": sampling.min_p,
                    "n_predict": serving.settings.max_tokens,
                },
            },
            "laserkv": {
                "policy": settings.policy,
                "ratio": None if engine.fills_cells else settings.ratio,
                "keep": settings.keep,
                "block_size": settings.block_size,
                "recall": settings.recall,
                "longest_answer": serving.longest,
            },
        }


def _files(app: FastAPI, serving: Serving) -> None:
    uploads, gone = serving.uploads, {404: {"description": "No such file."}}
    refusals: dict[int | str, dict[str, Any]] = {
        400: {"description": "It cannot be read."},
        413: {"description": "Too large."},
    }

    @app.post("/v1/files", responses=refusals)
    async def _add(
        request: Request,
        file: Annotated[UploadFile, File()],
        purpose: Annotated[str, Form(max_length=64)] = "user_data",
    ) -> dict[str, Any]:
        data, name, who = await file.read(), file.filename or "document", owner(request.state)
        about: dict[str, Any] = await serving.apart(lambda: uploads.add(who, name, purpose, data))
        return about

    @app.get("/v1/files")
    async def _list(request: Request) -> dict[str, Any]:
        return {"object": "list", "data": uploads.listed(owner(request.state)), "has_more": False}

    @app.get("/v1/files/{file}", responses=gone)  # type: ignore[arg-type]
    async def _one(file: str, request: Request) -> dict[str, Any]:
        return uploads.about(owner(request.state), file)

    @app.get(
        "/v1/files/{file}/content",
        response_class=PlainTextResponse,
        responses=gone,  # type: ignore[arg-type]
    )
    async def _content(file: str, request: Request) -> Response:
        text = uploads.text(owner(request.state), file)
        return PlainTextResponse(text.encode("utf-8", "replace"))

    @app.delete("/v1/files/{file}", responses=gone)  # type: ignore[arg-type]
    async def _delete(file: str, request: Request) -> dict[str, Any]:
        return uploads.delete(owner(request.state), file)


def _reports(app: FastAPI, serving: Serving) -> None:
    gone: dict[int | str, dict[str, Any]] = {404: {"description": "No such document any more."}}

    @app.post("/v1/documents/{document}/report", responses=gone)
    async def _make(document: str, request: Request) -> dict[str, Any]:
        who = owner(request.state)
        name = await serving.apart(lambda: serving.reports.make(who, document))
        return {"object": "report", "url": f"{REPORTS}{name}"}

    @app.get(REPORTS + "{name}", include_in_schema=False)
    async def _report(name: str) -> Response:
        text = serving.reports.text(name)
        return Response(text, headers=HEADERS, media_type="text/html; charset=utf-8")


def _page(app: FastAPI) -> None:
    folder = resources.files("laserkv_gguf.server") / "page"

    @app.get("/", include_in_schema=False)
    async def _index() -> Response:
        return Response((folder / "index.html").read_bytes(), media_type=_PAGES["index.html"])

    @app.get("/page/{name}", include_in_schema=False)
    async def _part(name: str) -> Response:
        if name not in _PAGES:
            raise HTTPException(404)
        return Response((folder / name).read_bytes(), media_type=_PAGES[name])
