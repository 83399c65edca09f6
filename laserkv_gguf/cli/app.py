"""The commands, and how their errors end: one line on stderr and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from laserkv_gguf.cli import ask, bench, chat
from laserkv_gguf.errors import LaserKVError

INTERRUPTED = 130

app = typer.Typer(
    name="laserkv_gguf",
    help="Long documents for GGUF models on small memory: LASER-KV on llama.cpp.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(chat.chat)
app.command()(ask.ask)
app.command()(bench.bench)


def _version(wanted: bool) -> None:
    if wanted:
        from laserkv_gguf import __version__

        print(__version__)
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
    debug = "--debug" in given
    try:
        result = app(args=given, prog_name="laserkv_gguf", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except KeyboardInterrupt:
        return INTERRUPTED
    except LaserKVError as error:
        if debug:
            raise
        return _fail(str(error), error.exit_code)
    except BrokenPipeError:
        # whoever read our output has gone: nothing is left to say, and Python must not try either
        sys.stdout = open("/dev/null", "w") if sys.platform != "win32" else sys.stdout  # noqa
        return 1
    except Exception as error:
        # Typer's own errors about arguments know how to say themselves; its class has moved
        # between releases
        describe = getattr(error, "format_message", None)
        if describe is None:
            if debug:
                raise
            return _fail(f"{type(error).__name__}: {error} (--debug shows where)", 1)
        message = describe().replace("\n", " ").strip()
        return _fail(message or "see --help", getattr(error, "exit_code", 2))


def _fail(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code
