"""`ask`: one question, one answer."""

from __future__ import annotations

import json
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

from typer import Argument, Option

from laserkv_gguf.cli import documents, streams, terminal
from laserkv_gguf.cli.options import EngineOptions, SamplingOptions, with_options
from laserkv_gguf.cli.shape import ShapeOptions, shaped
from laserkv_gguf.errors import UserError
from laserkv_gguf.shown import one_line, whole

if TYPE_CHECKING:
    from laserkv_gguf.conversation.generation import Reply
    from laserkv_gguf.saving.file import Saved


@with_options(EngineOptions, SamplingOptions, ShapeOptions)
def ask(
    options: EngineOptions,
    sampling: SamplingOptions,
    shape: ShapeOptions,
    words: Annotated[
        Optional[list[str]],  # noqa: UP045
        Argument(metavar="QUESTION", help="What to ask; or -q.", show_default=False),
    ] = None,
    question: Annotated[
        Optional[str],  # noqa: UP045
        Option("-q", "--question", "-p", "--prompt", help="What to ask."),
    ] = None,
    document: Annotated[
        Optional[list[str]],  # noqa: UP045
        Option(
            "-d",
            "--document",
            "-f",
            "--file",
            help="Text, Markdown or PDF to ask about; repeatable; - is standard input.",
        ),
    ] = None,
    system: Annotated[
        Optional[str],  # noqa: UP045
        Option("-sys", "--system", help="System prompt."),
    ] = None,
    save: Annotated[
        Optional[str],  # noqa: UP045
        Option("--save", help="Keep the read document in this file, for --load."),
    ] = None,
    load: Annotated[
        Optional[str],  # noqa: UP045
        Option("--load", help="What --save or chat's /save kept, instead of --document."),
    ] = None,
    report: Annotated[
        Optional[str],  # noqa: UP045
        Option("--report", help="Write a page of what was kept and why: FILE.html."),
    ] = None,
    against: Annotated[
        Optional[str],  # noqa: UP045
        Option(
            "--against",
            help="With --report: show another policy or ratio beside it, such as snapkv, 0.1 or "
            "'snapkv 0.1'. The document is read once more.",
        ),
    ] = None,
    as_json: Annotated[
        bool, Option("--json", help="Print one object: answer, finish_reason, account.")
    ] = False,
) -> None:
    """Ask one question about documents of any length, or about none."""
    question = _asked(words or [], question, bool(document or load))
    if not question or not question.strip():
        raise UserError('no question; use --question "…"')
    if load is not None and (document or system):
        raise UserError("--load brings its own document and system prompt; leave the others out")
    for flag, value in (("--save", save), ("--load", load)):
        if value == "":
            raise UserError(f"{flag} is empty; name a file")
    if save and not (document or load):
        raise UserError("--save keeps a read document; give one with --document")
    other = _prepare_report(report, against, load, document)
    question, system = whole(question), whole(system) if system else system
    streams.check_output()
    if document:
        options.say_embedded()
    grammar, text = shape.text(), documents.load(document or [])
    file = _prepare_saved(options, save, load)
    bar = terminal.ReadingBar()
    with file or nullcontext(), options.engine() as engine:
        answer_with: dict[str, Any] = {
            "max_tokens": sampling.predict,
            "sampling": shaped(sampling.sampling(options.seed), engine.model, grammar),
        }
        try:
            with bar.shown() as on_progress:
                if file:
                    talk = engine.load(file, **answer_with)
                    talk.watches = report is not None
                    stream = talk.ask(question)
                else:
                    stream = engine.stream(
                        question,
                        document=text,
                        system=system,
                        on_progress=on_progress,
                        **answer_with,
                    )
                    stream.conversation.watches = report is not None
                first = next(iter(stream), "")
            for piece in chain([first], stream):
                if not as_json:
                    streams.say(terminal.printable(piece))
        except KeyboardInterrupt:
            if bar.read < bar.total:
                terminal.note(bar.stopped)
            elif not as_json:
                streams.say("\n")
            raise
        try:
            _print(stream.reply, as_json)
        finally:  # neither the answer nor the read document is lost with the other
            if save:
                stream.conversation.save(save)
        if report:
            from laserkv_gguf.retention import page, spans

            name = ", ".join(one_line(Path(given).name) for given in document or [])
            shown = [spans.of(stream.conversation, name)]
            page.write(report, shown)  # it is there, whatever becomes of the other side
            if other:
                engine.configure(**other)
                terminal.progress(f"reading again, for {against}")
                with terminal.ReadingBar().shown() as on_progress:
                    second = engine.stream(
                        question,
                        document=text,
                        system=system,
                        on_progress=on_progress,
                        **answer_with,
                    )
                    second.conversation.watches = True
                    for _ in second:
                        pass
                page.write(report, [*shown, spans.of(second.conversation, name)])
            terminal.progress(f"report in {report}; open it in a browser")


def _asked(words: list[str], question: str | None, about: bool) -> str | None:
    """The question, as it stands alone or behind -q.

    Args:
        about: whether there is a document.
    """
    files = [word for word in words if Path(word).is_file()]
    if files and (len(words) > 1 or question is not None or not about):
        raise UserError(f"{files[0]} is a file; give documents with -d {files[0]}")
    if len(words) > 1:
        raise UserError("the question is several words; put it in quotes")
    if words and question is not None:
        raise UserError("the question stands there twice; give it once, with -q or without")
    return words[0] if words else question


def _prepare_report(
    report: str | None, against: str | None, load: str | None, document: list[str] | None
) -> dict[str, Any]:
    """Refuses a report that could not be written; returns the settings of the other side."""
    if report is None:
        if against is not None:
            raise UserError("--against shows another policy in a report; add --report FILE.html")
        return {}
    from laserkv_gguf.files import archive

    archive.check_target(report)
    if against is None:
        return {}
    if load is not None or not document:
        raise UserError("--against reads the document again; give one with --document")
    from laserkv_gguf import policies

    settings: dict[str, Any] = {}
    for word in against.split():
        try:
            settings["ratio"], settings["keep"] = float(word), None
        except ValueError:
            policies.find(word)
            settings["policy"], settings["policy_options"] = word, {}
    if not settings:
        raise UserError("--against is empty; name a policy or a ratio, such as snapkv or 0.1")
    return settings


def _print(reply: Reply, as_json: bool) -> None:
    """The answer as one object, or the end of one that is on the screen already."""
    if as_json:
        answer = {"answer": reply.text, "finish_reason": reply.finish_reason}
        said = json.dumps({**answer, "account": reply.account.as_dict()}, ensure_ascii=False)
        streams.say(terminal.printable(said), end="\n")
        return
    streams.say("\n")
    for line in terminal.account_lines(reply):
        terminal.dim(line)


def _prepare_saved(options: EngineOptions, save: str | None, load: str | None) -> Saved | None:
    """Refuses files that cannot be written or read before anything long is done.

    Returns:
        The file to load, whose settings the options have taken over.
    """
    if save:
        from laserkv_gguf.files import archive

        archive.check_target(save)
    if not load:
        return None
    from laserkv_gguf.saving import schema

    file = schema.read(load)
    try:
        schema.check_policy(file, options.policy)
        options.take_over({**file.about["settings"], **file.about["context"]})
    except BaseException:
        file.close()
        raise
    return file
