"""The commands, and how their errors end: one line on stderr and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from laserkv_gguf.cli import (
    ask,
    batch,
    bench,
    chat,
    doctor,
    plan,
    pull,
    rpc_server,
    serve,
    streams,
    supervised,
    terminal,
)
from laserkv_gguf.cli import eval as evaluation
from laserkv_gguf.errors import LaserKVError
from laserkv_gguf.shown import one_line

FAILED, USAGE, INTERRUPTED = 1, 2, 130

app = typer.Typer(
    name="laserkv_gguf",
    help="Long documents for GGUF models on small memory: LASER-KV on llama.cpp.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(chat.chat)
app.command()(ask.ask)
app.command()(batch.batch)
app.command()(serve.serve)
app.command()(bench.bench)
app.command("eval")(evaluation.evaluate)
app.command()(plan.plan)
app.command()(doctor.doctor)
app.command()(pull.pull)
app.command("rpc-server")(rpc_server.rpc_server)


def _version(wanted: bool) -> None:
    if wanted:
        from laserkv_gguf.version import VERSION

        streams.say(VERSION, end="\n")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version."
    ),
) -> None:
    pass


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code (0, 1, 2 or 130)."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    streams.prepare()
    return streams.settle(_run(given))


def _run(given: list[str]) -> int:
    supervised.remember(given)
    try:
        result = app(args=given or ["--help"], prog_name="laserkv_gguf", standalone_mode=False)
        if not given:
            return USAGE
        return result if isinstance(result, int) else 0
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # whoever read our output has gone
        return FAILED
    except Exception as error:
        if "--debug" in given:
            streams.complain(terminal.trace(error))
        return _fail(*_said(error))


def _said(error: Exception) -> tuple[str, int]:
    """One line about an error, and its exit code."""
    if isinstance(error, LaserKVError):
        return terminal.said(error), error.exit_code
    # Typer's own errors about arguments know how to say themselves; their class has moved
    # between releases
    describe = getattr(error, "format_message", None)
    if describe is not None:
        message = " ".join(describe().split())
        return f"{message.rstrip('.')}; see --help", getattr(error, "exit_code", USAGE)
    return terminal.said(error), FAILED


def _fail(message: str, code: int) -> int:
    streams.complain(f"error: {one_line(message)}")
    return code
