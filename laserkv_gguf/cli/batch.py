"""`batch`: questions in JSONL in, answers in JSONL out."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any, Optional

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from typer import Option

from laserkv_gguf.cli import documents, streams, terminal
from laserkv_gguf.cli.options import EngineOptions, SamplingOptions, log_to_stderr, with_options
from laserkv_gguf.cli.shape import ShapeOptions, shaped
from laserkv_gguf.errors import Cancelled, LaserKVError, UserError

if TYPE_CHECKING:
    from laserkv_gguf.batch.output import Output, Summary
    from laserkv_gguf.batch.questions import Item
    from laserkv_gguf.batch.run import Batch
    from laserkv_gguf.conversation.conversation import Conversation
    from laserkv_gguf.conversation.parallel import Spent
    from laserkv_gguf.reading.reader import Progress as Read

STANDARD_OUTPUT = "-"
TERMINATED = 143
PATIENCE = 1.0  # seconds


@with_options(EngineOptions, SamplingOptions, ShapeOptions)
def batch(
    options: EngineOptions,
    sampling: SamplingOptions,
    shape: ShapeOptions,
    source: Annotated[
        Optional[str],  # noqa: UP045
        Option(
            "-i",
            "--input",
            help="Questions, one JSON object a line, or OpenAI's batch lines; - is standard input. "
            "A document_path may name any file that you can read.",
        ),
    ] = None,
    target: Annotated[
        Optional[str],  # noqa: UP045
        Option(
            "-o",
            "--output",
            help="Answers, one JSON object a line; goes on where it stopped. - is standard output.",
        ),
    ] = None,
    document: Annotated[
        Optional[list[str]],  # noqa: UP045
        Option("-d", "--document", help="For questions that bring none of their own."),
    ] = None,
    system: Annotated[
        Optional[str],  # noqa: UP045
        Option("-sys", "--system", help="System prompt, for questions without their own."),
    ] = None,
    parallel: Annotated[
        int,
        Option(
            "-np", "--parallel", help="Most answers generated together, and documents at a time."
        ),
    ] = 4,
    read_once: Annotated[
        bool,
        Option(
            "--read-once",
            help="Read a document once for all its questions, with none of them in mind.",
        ),
    ] = False,
    report: Annotated[
        Optional[str],  # noqa: UP045
        Option("--report", help="Folder for a page for every answer: what was kept, and why."),
    ] = None,
    ray: Annotated[
        Optional[str],  # noqa: UP045
        Option(
            "--ray",
            help="Answer on a Ray cluster: its address, or nothing to start one on this machine.",
        ),
    ] = None,
    actors: Annotated[
        int,
        Option("--ray-actors", help="Engines on the cluster; 0: one a GPU, or one a node."),
    ] = 0,
    fail_fast: Annotated[
        bool, Option("--fail-fast", help="Stop at the first line or question that fails.")
    ] = False,
    quiet: Annotated[
        bool, Option("--quiet", help="Nothing on stderr unless something is wrong.")
    ] = False,
    as_json: Annotated[bool, Option("--json", help="Print the summary as one object.")] = False,
) -> int:
    """Answer a file of questions; killed and started again, it goes on."""
    if not source or not target:
        raise UserError("batch needs --input FILE with questions and --output FILE for answers")
    if sampling.predict < 1:
        raise UserError(f"-n {sampling.predict}: give at least 1 token for the answer")
    named = document or []
    if [source, *named].count(documents.STANDARD_INPUT) > 1:
        raise UserError("--input and --document are both standard input, which can be read once")
    if as_json and target == STANDARD_OUTPUT:
        raise UserError("--json prints where --output - writes the answers; name a file for them")
    grammar = shape.text()
    if actors < 0 or (actors and not ray):
        raise UserError(f"--ray-actors {actors}: give a number of engines, with --ray")
    if ray and (report or options.rpc or grammar):
        raise UserError("--ray goes without --report, --rpc and a grammar; leave them out")
    with _Signals() as signals, _opened(source) as file:
        from laserkv_gguf.batch.output import check_apart, summary
        from laserkv_gguf.batch.questions import read
        from laserkv_gguf.batch.run import Batch, check_documents

        files = [Path(name) for name in (source, *named) if name != documents.STANDARD_INPUT]
        if target != STANDARD_OUTPUT:
            check_apart(Path(target), files)
        questions = read(file, source, Path(source).parent, strict=fail_fast)
        text = documents.load(named)
        run = _identity(options, sampling, questions.digest, text, system, read_once)
        if grammar:
            run["grammar"] = grammar
        output = _output(target, run, [item.id for item in questions.items])
        output.load()
        check_documents(questions, output, documents.read)
        pages = None if report is None else _folder(report)
        job: Batch | None = None
        bar = _Bar(signals, quiet)
        if not output.complete:
            from laserkv_gguf.conversation.parallel import check

            left = {
                (item.document, item.inline)
                for index, item in enumerate(questions.items)
                if not item.error and index not in output.done
            }
            at_once = 1 if fail_fast else max(1, min(parallel, len(left)))
            bar.documents = len(left)
            with ExitStack() as stack:
                engine = None if ray else stack.enter_context(options.engine(parallel=at_once))
                stack.enter_context(bar.shown(len(questions.items)))
                _warn_once()
                if engine:
                    check(parallel, engine)
                with output:
                    job = Batch(
                        engine,
                        questions,
                        output,
                        documents.read,
                        shaped(sampling.sampling(options.seed), engine.model, grammar)
                        if engine
                        else sampling.sampling(options.seed),
                        sampling.predict,
                        document=text,
                        system=system,
                        parallel=parallel,
                        read_once=read_once,
                        fail_fast=fail_fast,
                        on_kept=None if pages is None else _Pages(pages).write,
                    )
                    if ray:
                        _run_on_ray(job, options, ray, actors, bar, quiet)
                    else:
                        assert engine is not None
                        _run(job, job.run, engine.cancel, bar, quiet)
        counts = summary(questions.items, output)
    _report(counts, job, target, quiet, as_json)
    return 1 if counts.failed else 0


def _folder(name: str) -> Path:
    """A folder for pages, made where it is not there."""
    path = Path(name)
    try:
        path.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write pages to {name}: {error.strerror}; name a folder") from None
    return path


class _Pages:
    """A page for every answer, by the number of its question's line."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._failed = folder, False

    def write(self, item: Item, conversation: Conversation) -> None:
        """Writes a page; where it cannot, that is said once, and no answer is lost for it."""
        from laserkv_gguf.retention import page, spans

        try:
            page.write(self.folder / f"{item.line:04d}.html", [spans.of(conversation)])
        except LaserKVError as error:
            if not self._failed:
                terminal.note(f"{terminal.said(error)}; the answers go on without")
            self._failed = True


def _output(target: str, run: dict[str, Any], ids: list[Any]) -> Output:
    from laserkv_gguf.batch.output import Output, Stream

    if target != STANDARD_OUTPUT:
        return Output(Path(target), run, ids)
    if sys.stdout is None:
        raise UserError("standard output is closed; name a file with --output")
    sys.stdout.flush()
    return Stream(sys.stdout.buffer, ids)


def _run_on_ray(
    job: Batch, options: EngineOptions, address: str, actors: int, bar: _Bar, quiet: bool
) -> None:
    """The same on actors of a Ray cluster."""
    from laserkv_gguf.batch.cluster import Cluster

    log_to_stderr(options.debug)
    with Cluster(job, options.arguments(), address, actors) as cluster:
        _run(job, cluster.run, cluster.cancel, bar, quiet)


def _run(
    job: Batch, run: Callable[[], None], cancel: Callable[[], None], bar: _Bar, quiet: bool
) -> None:
    """Says where a run stands that was stopped from outside."""
    signals = bar.signals
    job.on_progress, job.on_line = bar.reading, lambda _: bar.advance(job)
    bar.advance(job)
    signals.cancel = cancel
    from laserkv_gguf.batch.output import Stream

    try:
        try:
            run()
        except Cancelled:
            signals.check()
            raise
    except (KeyboardInterrupt, SystemExit):
        signals.ending = True
        if not quiet:
            job.output.load()  # a line may have been written a moment ago
            done, total = len(job.output), len(job.output.ids)
            on = "" if isinstance(job.output, Stream) else "; the same command goes on"
            terminal.note(f"stopped: {done} of {total} are answered{on}")
        raise


def _identity(
    options: EngineOptions,
    sampling: SamplingOptions,
    questions: str,
    document: str | None,
    system: str | None,
    read_once: bool,
) -> dict[str, Any]:
    """What an answer depends on. Threads, batches, cells and the like are no part of it."""
    from laserkv_gguf import models
    from laserkv_gguf.batch.questions import digest_of
    from laserkv_gguf.llama.model import check_file
    from laserkv_gguf.models.identity import identity

    model = models.find(options.model)
    check_file(model)
    names = ("cache_type_k", "cache_type_v", "flash_attn", "seed")
    settings = {**options.settings(), "recall": options.recall != "off"}
    for name in ("recall_file", "recall_limit"):  # no answer depends on where rows lie
        settings.pop(name, None)
    return {
        "input": questions,
        "document": document and digest_of(document),
        "model": str(identity(model)),
        **settings,
        **options.placement().changes(),
        **{name: getattr(options, name) for name in names},
        **asdict(sampling),
        "system": system,
        "read_once": read_once,
    }


@contextmanager
def _opened(source: str) -> Iterator[IO[bytes]]:
    """The questions as a file that can be read again, which a pipe is copied to."""
    with ExitStack() as stack:
        if source == documents.STANDARD_INPUT:
            if sys.stdin.isatty():
                terminal.note("reading questions from standard input; end with Ctrl-D")
            file: IO[bytes] = sys.stdin.buffer
        else:
            try:
                file = stack.enter_context(Path(source).open("rb"))
            except FileNotFoundError:
                raise UserError(f"no questions at {source}; check the path") from None
            except IsADirectoryError:
                raise UserError(f"{source} is a folder; name the file with questions") from None
            except OSError as error:
                raise UserError(f"cannot read {source}: {error.strerror}") from error
            kind = os.fstat(file.fileno()).st_mode
            if stat.S_ISBLK(kind) or (stat.S_ISCHR(kind) and not file.isatty()):
                raise UserError(f"{source} is a device, which may have no end; name a file")
        if not file.seekable() or source == documents.STANDARD_INPUT:
            copy = stack.enter_context(tempfile.TemporaryFile())
            shutil.copyfileobj(file, copy)
            copy.seek(0)
            file = copy
        yield file


class _Signals:
    """Ctrl-C and SIGTERM end the run, after the line that is being written.

    While the engine works they cancel it: what a handler raises would be lost, and shown, where
    native code had called Python back. Who asks again after a second is not made to wait.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.cancel: Callable[[], None] | None = None
        self.ending = False
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _receive(self, number: int, _: object) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._since = number, now
            if self.cancel:
                self.cancel()
                return
        elif self.ending or now - self._since < PATIENCE:
            return
        self.check()

    def check(self) -> None:
        """Raises what was received.

        Raises:
            KeyboardInterrupt, SystemExit: the latter with 143.
        """
        if self.received == signal.SIGINT:
            raise KeyboardInterrupt
        if self.received == signal.SIGTERM:
            raise SystemExit(TERMINATED)


class _Bar:
    """How far the batch is; on a terminal."""

    def __init__(self, signals: _Signals, quiet: bool) -> None:
        self.signals, self.documents = signals, 0
        self._bar = Progress(
            TextColumn("batch"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(compact=True),
            console=terminal.console,
            transient=True,
            disable=quiet or not terminal.console.is_terminal,
        )

    @contextmanager
    def shown(self, total: int) -> Iterator[None]:
        with self._bar:
            self._task = self._bar.add_task("", total=total, note="")
            yield

    def reading(self, state: Read) -> None:
        self.signals.check()
        self._bar.update(self._task, note=f"reading {state.read:,}/{state.total:,} tokens")

    def advance(self, job: Batch) -> None:
        """After a line."""
        self.signals.check()
        speed = job.spent.tokens_per_second
        note = f"document {job.documents} of {self.documents}" if self.documents > 1 else ""
        note += f" · {speed:.1f} tok/s" if speed else ""
        self._bar.update(self._task, completed=len(job.output), note=note)


def _warn_once() -> None:
    """Of hundreds of questions each may have the same thing wrong."""
    said: set[str] = set()

    def new(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return not (message in said or said.add(message))  # type: ignore[func-returns-value]

    for handler in logging.getLogger().handlers:
        handler.addFilter(new)


def _report(counts: Summary, job: Batch | None, target: str, quiet: bool, as_json: bool) -> None:
    """What came of it, on stderr; as JSON on stdout."""
    if counts.failed:
        streamed = target == STANDARD_OUTPUT
        where = "their lines" if streamed else target
        again = f"; the same command asks {counts.retry} of them again"
        terminal.note(
            f'{counts.failed} of {counts.questions} failed: see "error" in {where}'
            f"{again if counts.retry and not streamed else ''}"
        )
    if as_json:
        said = {**asdict(counts), **(_figures(job.spent) if job else {})}
        streams.say(json.dumps(said), end="\n")
    if quiet:
        return
    if job and job.spent.tokens:
        spent = job.spent
        times = "once" if spent.readings == 1 else f"{spent.readings:,} times"
        again = " (--read-once: once each)" if spent.readings > job.documents else ""
        terminal.note(
            f"{spent.tokens:,} tokens generated in {spent.answering:.1f} s, "
            f"{spent.tokens_per_second:.1f} tok/s · documents read {times}{again} "
            f"in {spent.reading:.1f} s"
        )
    if job is None and not counts.failed:
        terminal.note(f"nothing is left to ask: {target} has all answers")
    if counts.expected:
        terminal.note(
            f"score: {counts.found} of {counts.expected} ({counts.found / counts.expected:.1%}) "
            "answers contain what was expected, whatever its case and spaces"
        )


def _figures(spent: Spent) -> dict[str, float]:
    return {
        "readings": spent.readings,
        "reading_seconds": spent.reading,
        "generated_tokens": spent.tokens,
        "answering_seconds": spent.answering,
        "tokens_per_second": spent.tokens_per_second,
    }
