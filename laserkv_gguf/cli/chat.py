"""`chat`: a streamed conversation, with or without documents."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Annotated, Optional

from typer import Option

from laserkv_gguf.cli import commands, documents, editing, streams
from laserkv_gguf.cli.commands import COMMANDS, SETTINGS
from laserkv_gguf.cli.loop import Left, Loop
from laserkv_gguf.cli.options import EngineOptions, SamplingOptions, with_options
from laserkv_gguf.errors import UserError
from laserkv_gguf.shown import one_line

TERMINATED = 143  # what shells say of a process that SIGTERM ended


@with_options(EngineOptions, SamplingOptions)
def chat(
    options: EngineOptions,
    sampling: SamplingOptions,
    document: Annotated[
        Optional[list[str]],  # noqa: UP045
        Option(
            "-d",
            "--document",
            "-f",
            "--file",
            help="Text, Markdown or PDF to talk about; repeatable.",
        ),
    ] = None,
    question: Annotated[
        Optional[str],  # noqa: UP045
        Option("-q", "--question", help="A first question; the document is read with it in mind."),
    ] = None,
    system: Annotated[
        Optional[str],  # noqa: UP045
        Option("-sys", "--system", help="System prompt."),
    ] = None,
) -> None:
    """Talk with a model about documents of any length, or about none."""
    if document and documents.STANDARD_INPUT in document:
        raise UserError("chat reads what you type from standard input; give --document a file")
    streams.check_output()
    if document:
        options.say_embedded()
    texts = _texts(document or [])
    signal.signal(signal.SIGTERM, _terminated)
    talks: list[Loop] = []
    lines = editing.reader(
        list(COMMANDS), lambda: SETTINGS, lambda: [name for one in talks for name in one.talk.texts]
    )
    with ExitStack() as opened:
        with lines.quiet():
            engine = opened.enter_context(options.engine())
            talk = engine.conversation(
                documents=texts,
                system=system,
                max_tokens=sampling.predict,
                sampling=sampling.sampling(options.seed),
            )
        loop = Loop(engine, talk, lines, commands.run, debug=options.debug)
        talks.append(loop)
        opened.enter_context(suppress(Left))
        loop.open(question)
        loop.run()


def _texts(names: Sequence[str]) -> dict[str, str]:
    """The documents by name: the files' own, and their paths where two are the same."""
    short = [one_line(Path(name).name) for name in names]
    texts: dict[str, str] = {}
    of: dict[str, str] = {}
    for name, own in zip(names, short, strict=True):
        said = one_line(name) if short.count(own) > 1 else own
        while of.get(said, name) != name:  # paths that look the same
            said += "'"
        of[said], texts[said] = name, documents.read(name)
    return texts


def _terminated(_number: int, _frame: object) -> None:
    """SIGTERM: what was answered so far is out; the cache goes with the process."""
    raise SystemExit(TERMINATED)
