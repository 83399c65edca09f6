"""`rpc-server`: lends this machine's devices to llama.cpp on other machines."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Annotated, Optional

from typer import Option

from laserkv_gguf.cli import terminal
from laserkv_gguf.cli.options import log_to_stderr
from laserkv_gguf.errors import UserError

_PORTS = 1 << 16


def rpc_server(
    host: Annotated[
        str, Option("-H", "--host", help="Address to listen at; others than your own are open.")
    ] = "127.0.0.1",
    port: Annotated[int, Option("-p", "--port", help="Port to listen at.")] = 50052,
    device: Annotated[
        Optional[str],  # noqa: UP045
        Option("-d", "-dev", "--device", help="Devices to lend; else all GPUs, or the CPU."),
    ] = None,
    threads: Annotated[
        int, Option("-t", "--threads", help="Threads of a CPU; 0: the physical cores.")
    ] = 0,
    cache: Annotated[
        bool, Option("-c", "--cache", help="Keep weights that were sent, for the next time.")
    ] = False,
    debug: Annotated[bool, Option("--debug", help="llama.cpp's log, and tracebacks.")] = False,
) -> None:
    """Lend this machine's devices to other machines (ask … --rpc HOST:PORT), until Ctrl-C."""
    log_to_stderr(debug)
    if not 0 < port < _PORTS:
        raise UserError(f"--port {port}: give 1 to {_PORTS - 1}")
    if threads < 0:
        raise UserError(f"--threads {threads}: give a number, or 0 for the physical cores")
    from laserkv_gguf.llama import rpc
    from laserkv_gguf.llama.context import default_threads

    names = [part.strip() for part in (device or "").split(",") if part.strip()]
    kept = _kept() if cache else None
    if not _is_own(host):
        terminal.note(
            f"warning: whoever reaches {host}:{port} can read and write this process's memory: the "
            "protocol has no passwords and no encryption; use it in a network of your own only"
        )
    terminal.note(f"lending devices at {host}:{port}; Ctrl-C ends it")
    os.dup2(2, 1)  # what llama.cpp says there is no answer
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)  # the call below does not come back
    rpc.serve(host, port, names, threads or default_threads(), kept)


def _is_own(host: str) -> bool:
    return host.startswith("127.") or host in ("localhost", "::1")


def _kept() -> Path:
    import platformdirs

    folder = Path(platformdirs.user_cache_dir("laserkv-gguf")) / "rpc-weights"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}; leave --cache out") from error
    return folder
