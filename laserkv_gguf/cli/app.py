"""The commands, and how their errors end: one line on stderr and an exit code."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence

import typer

from laserkv_gguf.cli import (
    ask,
    batch,
    bench,
    chat,
    config,
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
from laserkv_gguf.cli.help import Command, Group
from laserkv_gguf.cli.options import settable
from laserkv_gguf.errors import LaserKVError, named_by_flags
from laserkv_gguf.shown import one_line

FAILED, USAGE, INTERRUPTED = 1, 2, 130
PROGRAM = "laserkv-gguf"

app = typer.Typer(
    name=PROGRAM,
    help="Ask GGUF models about documents that do not fit into memory: LASER-KV on llama.cpp.",
    cls=Group,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _name, _command in (
    ("ask", ask.ask),
    ("chat", chat.chat),
    ("batch", batch.batch),
    ("serve", serve.serve),
    ("pull", pull.pull),
    ("plan", plan.plan),
    ("bench", bench.bench),
    ("eval", evaluation.evaluate),
    ("doctor", doctor.doctor),
    ("rpc-server", rpc_server.rpc_server),
):
    app.command(_name, cls=Command)(_command)


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
    given = filled(sys.argv[1:] if arguments is None else arguments)
    streams.prepare()
    with named_by_flags():
        return streams.settle(_run(given))


def filled(arguments: Sequence[str]) -> list[str]:
    """The arguments, with "local" after a --ray that no address follows."""
    found: list[str] = []
    for part, after in itertools.zip_longest(arguments, arguments[1:], fillvalue="-"):
        found += [part, "local"] if part == "--ray" and after.startswith("-") else [part]
    return found


def _run(given: list[str]) -> int:
    supervised.remember(given)
    try:
        helps = not given or not {"-h", "--help"}.isdisjoint(given)
        result = app(
            args=given or ["--help"],
            prog_name=PROGRAM,
            standalone_mode=False,
            default_map={} if helps else config.load(settable()),
        )
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
