"""`serve`: OpenAI's clients ask about documents of any length."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated, Any, Optional

from typer import Option

from laserkv_gguf.cli import streams, terminal
from laserkv_gguf.cli.options import EngineOptions, SamplingOptions, with_options
from laserkv_gguf.errors import UserError

NEEDED = ("fastapi", "uvicorn", "prometheus_client", "python_multipart")
SIZES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
LEAST_BLOCK = 256  # a document's share, and not a question, is what has to be short


@with_options(EngineOptions, SamplingOptions)
def serve(
    options: EngineOptions,
    sampling: SamplingOptions,
    host: Annotated[
        str, Option("--host", help="Where to listen; 127.0.0.1 is this machine alone.")
    ] = "127.0.0.1",
    port: Annotated[int, Option("--port", help="0: any free one, which is printed.")] = 8080,
    api_key: Annotated[
        Optional[list[str]],  # noqa: UP045
        Option(
            "--api-key",
            envvar="LASERKV_API_KEY",
            help="Asked of every request; repeatable: each has documents of its own.",
        ),
    ] = None,
    cors_origin: Annotated[
        Optional[list[str]],  # noqa: UP045
        Option("--cors-origin", help="A page's origin that may call, or *; repeatable."),
    ] = None,
    allowed_host: Annotated[
        Optional[list[str]],  # noqa: UP045
        Option("--allowed-host", help="A name that 127.0.0.1 goes by as well; repeatable."),
    ] = None,
    alias: Annotated[str, Option("-a", "--alias", help="The model's name for clients.")] = "",
    parallel: Annotated[
        int, Option("-np", "--parallel", help="Requests at a time, and conversations in the cache.")
    ] = 4,
    queue: Annotated[int, Option("--queue", help="Requests that may wait; then 503.")] = 64,
    cache_dir: Annotated[
        Optional[str],  # noqa: UP045
        Option("--cache-dir", help="Where read documents stay; else in your cache folder."),
    ] = None,
    cache_limit: Annotated[
        str, Option("--cache-limit", help="Bytes there (16G); 0: keep none on disk.")
    ] = "16G",
    memory_limit: Annotated[
        str, Option("--memory-limit", help="Bytes of evicted tokens' rows in memory.")
    ] = "4G",
    aside_limit: Annotated[
        str, Option("--aside-limit", help="Bytes of conversations aside in memory.")
    ] = "1G",
    conversations: Annotated[
        int, Option("--conversations", help="Conversations known at a time.")
    ] = 64,
    max_body: Annotated[str, Option("--max-body", help="Largest request.")] = "64M",
    body_timeout: Annotated[
        float, Option("--body-timeout", help="Seconds for a request to arrive.")
    ] = 60.0,
    timeout: Annotated[float, Option("--timeout", help="Seconds to answer a request.")] = 3600.0,
    keep_alive: Annotated[
        float, Option("--keep-alive", help="Longest silence of a stream, in seconds.")
    ] = 10.0,
    grace: Annotated[
        float, Option("--grace", help="Seconds that answers may go on after SIGTERM.")
    ] = 10.0,
) -> None:
    """Serve documents of any length to OpenAI clients and to a browser."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"serve needs {', '.join(missing)}; install with pip install 'laserkv-gguf[serve]'"
        )
    from laserkv_gguf.server.settings import ServerSettings

    folder = _folder(cache_dir)
    settings = ServerSettings(
        host=host,
        port=port,
        api_keys=tuple(api_key or ()),
        cors_origins=tuple(cors_origin or ()),
        allowed_hosts=tuple(allowed_host or ()),
        model_name=alias,
        workers=parallel,
        queue=queue,
        sampling=sampling.sampling(options.seed),
        max_tokens=sampling.predict,
        body=_bytes("--max-body", max_body),
        body_seconds=body_timeout,
        request_seconds=timeout,
        keep_alive=keep_alive,
        grace=max(grace, 0.0),
        cache_dir=folder,
        cache_bytes=_bytes("--cache-limit", cache_limit),
        memory=_bytes("--memory-limit", memory_limit),
        conversations=conversations,
    )
    settings.check()
    _serve(options, settings, _bytes("--aside-limit", aside_limit))


def _serve(options: EngineOptions, settings: Any, aside: int) -> None:
    from laserkv_gguf.server.run import bound, serve

    _fit(options, settings.workers)
    listening = bound(settings)
    try:
        if not settings.local:
            streams.complain(
                f"warning: {settings.host} may be reached from other machines"
                + ("" if settings.api_keys else ", and no --api-key is asked for")
                + "; the connection is not encrypted"
            )
        with options.engine(parallel=settings.workers, aside=aside) as engine:
            serve(engine, settings, listening, _started)
    finally:
        listening.close()


def _started(where: str) -> None:
    streams.say(f"serving at {where}", end="\n")
    terminal.note(f"open {where}/ for the page; OpenAI's clients take {where}/v1")


def _fit(options: EngineOptions, parallel: int) -> None:
    """What suits a server, where a flag was left at its default.

    Every question recalls its own tokens; and a block fits a conversation's part of --ctx-size.
    """
    from laserkv_gguf.planning.settings import block_for

    defaults = EngineOptions()
    if options.recall == defaults.recall:
        options.recall = "ram"
    if options.ctx_size and options.block_size is None:
        options.block_size = block_for(options.ctx_size // parallel, part=4, least=LEAST_BLOCK)


def _folder(given: str | None) -> Path:
    if given == "":
        raise UserError("--cache-dir is empty; name a folder, or use --cache-limit 0 for none")
    if given is not None:
        return Path(given)
    import platformdirs

    return Path(platformdirs.user_cache_dir("laserkv-gguf")) / "serve"


def _bytes(flag: str, given: str) -> int:
    """Bytes, as a number with K, M, G or T behind it, or without."""
    text = given.strip().upper().removesuffix("IB").removesuffix("B")
    number, unit = (text[:-1], text[-1:]) if text[-1:] in ("K", "M", "G", "T") else (text, "")
    try:
        size = int(float(number) * SIZES[unit])
    except (ValueError, OverflowError):
        raise UserError(f"{flag} {given}: give bytes, such as 500M or 16G") from None
    if size < 0:
        raise UserError(f"{flag} {given}: give bytes, such as 500M or 16G")
    return size
