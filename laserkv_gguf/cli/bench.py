"""`bench`: policies against llama.cpp's full cache at its best, in the same run."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional, TypeVar

from rich.table import Table
from typer import Option

from laserkv_gguf.cli import documents, streams, terminal
from laserkv_gguf.cli.options import EngineOptions, tokens_of, with_options
from laserkv_gguf.errors import UserError

if TYPE_CHECKING:
    from laserkv_gguf.benchmark.together import Load

Number = TypeVar("Number", int, float)

QUESTION = "What happens in this text? Answer in one sentence."


@with_options(
    EngineOptions, hide=("recall", "recall_mode", "recall_file", "recall_limit", "keep", "lookup")
)
def bench(
    options: EngineOptions,
    tokens: Annotated[
        Optional[list[str]],  # noqa: UP045
        Option(
            "--tokens", "--lengths", help="Lengths of the document: 4096,8192; repeatable. (4096)"
        ),
    ] = None,
    policies: Annotated[
        Optional[list[str]],  # noqa: UP045
        Option("--policies", help="Several policies: laser,snapkv; else --policy."),
    ] = None,
    ratios: Annotated[
        Optional[list[str]],  # noqa: UP045
        Option("--ratios", help="Several ratios: 0.25,0.1; else --ratio."),
    ] = None,
    document: Annotated[
        Optional[list[str]],  # noqa: UP045
        Option("-d", "--document", help="Text to read; repeated or cut to --tokens."),
    ] = None,
    question: Annotated[str, Option("-q", "--question", help="What to ask.")] = QUESTION,
    predict: Annotated[int, Option("-n", "--predict", help="Tokens to generate.")] = 64,
    repeats: Annotated[int, Option("--repeats", help="Runs of each, in turn.")] = 3,
    warmup: Annotated[int, Option("--warmup", help="Short runs before each measured one.")] = 1,
    tune: Annotated[
        bool, Option(help="Search llama.cpp's fastest settings for the full cache first.")
    ] = True,
    generation: Annotated[
        int, Option("--generation", help="Answers to compare with a bare loop; 0 for none.")
    ] = 3,
    probe_cost: Annotated[
        bool, Option("--probe-cost", help="Measure what the idle probe (cb_eval) costs, too.")
    ] = False,
    parallel: Annotated[
        Optional[list[str]],  # noqa: UP045
        Option(
            "-np",
            "--parallel",
            help="Instead: answers a minute with so many questions at a time, 1,2,4,8: about "
            "documents of --tokens that were read before, beside the full cache in as many cells.",
        ),
    ] = None,
    count: Annotated[int, Option("--documents", help="Documents that --parallel asks about.")] = 16,
    as_json: Annotated[bool, Option("--json", help="Print rows and ratios as JSON.")] = False,
    markdown: Annotated[
        Optional[Path],  # noqa: UP045
        Option("--markdown", help="Write the tables to this file."),
    ] = None,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        Option(
            "--out",
            help="Folder for bench.json, bench.md, bench.png and .svg, and for every run as it "
            "comes: the same command goes on where it was stopped.",
        ),
    ] = None,
) -> None:
    """Measure speed and memory against the full cache on this machine."""
    options.refuse_recall("bench", "ask with it")
    options.refuse_keep("bench")
    from laserkv_gguf import models
    from laserkv_gguf.benchmark import report
    from laserkv_gguf.benchmark.plan import Benchmark, Plan
    from laserkv_gguf.benchmark.processes import Processes

    if parallel:
        from laserkv_gguf.benchmark.together import Load

        load = Load(
            count,
            (_numbers("--tokens", tokens, int) or (2048,))[0],
            predict=predict,
            at_a_time=_numbers("--parallel", parallel, int),
        )
        _together(options, document, load, as_json)
        return
    text = documents.load(document or [str(files("laserkv_gguf") / "data" / "sample.txt")])
    assert text is not None
    report.check(out)
    plan = Plan(
        model=str(models.find(options.model)),
        text=text,
        question=question,
        lengths=_numbers("--tokens", tokens, tokens_of) or (4096,),
        configurations=tuple(
            replace(options, policy=policy, ratio=ratio).settings()
            for policy in _parts(policies) or [options.policy]
            for ratio in _numbers("--ratios", ratios, float) or (options.known_ratio,)
            if policy != "full"
        ),
        predict=predict,
        repeats=repeats,
        warmup=warmup,
        gpu_layers=options.gpu_layers if options.gpu_layers >= 0 else None,
        placement=asdict(options.placement()),
        ctx_size=options.ctx_size or None,
        context=options.context(),
        seed=options.seed,
        tune=tune,
        generation=generation,
        probe_cost=probe_cost,
        debug=options.debug,
    )
    store = None if out is None else out / report.RUNS
    result = Benchmark(plan, Processes(store), terminal.progress).run()
    report.write(result, markdown, out)
    if as_json:
        streams.say(json.dumps(result), end="\n")
        return
    _print(result)


def _together(
    options: EngineOptions, document: list[str] | None, load: Load, as_json: bool
) -> None:
    """Answers a minute, by how many are asked at a time."""
    from laserkv_gguf.benchmark.together import ASIDE, cells_for, measure

    load.check()
    text = documents.load(document or [str(files("laserkv_gguf") / "data" / "sample.txt")])
    assert text is not None
    most = max(2, *load.at_a_time)
    if not options.ctx_size:
        with replace(options, ratio=options.known_ratio).engine() as engine:
            options = replace(options, ctx_size=cells_for(engine, load))
    rows = []
    for policy in dict.fromkeys((options.policy, "full")):
        chosen = replace(options, policy=policy, ratio=options.known_ratio)
        with chosen.engine(parallel=most, residents=load.documents, aside=ASIDE) as engine:
            rows += measure(
                engine,
                text,
                load,
                lambda row: terminal.note(
                    f"{row.policy}, {row.at_a_time} at a time: "
                    f"{row.answers_per_minute:.1f} answers a minute"
                ),
            )
    if as_json:
        streams.say(json.dumps([row.as_dict() for row in rows]), end="\n")
        return
    table = Table(title=f"{load.documents} documents of {load.tokens} tokens, read before")
    for name in ("policy", "at a time", "fit", "answers/min", "× one", "tok/s", "batches"):
        table.add_column(name, justify="left" if name == "policy" else "right")
    for row in rows:
        first = next(one for one in rows if one.policy == row.policy)
        table.add_row(
            row.policy,
            str(row.at_a_time),
            str(row.fit),
            f"{row.answers_per_minute:.1f}",
            f"{row.answers_per_minute / first.answers_per_minute:.2f}",
            f"{row.tokens_per_second:.1f}",
            str(row.batches),
        )
    console = terminal.Console()
    console.print(table)
    console.print(f"all in {rows[0].cells:,} cells; answers of {load.predict} tokens")


def _parts(given: list[str] | None) -> list[str]:
    """Values given one by one or with commas between them, each once."""
    parts = (part.strip() for value in given or [] for part in value.split(","))
    return list(dict.fromkeys(part for part in parts if part))


def _numbers(
    flag: str, given: list[str] | None, kind: Callable[[str], Number]
) -> tuple[Number, ...]:
    try:
        return tuple(kind(part) for part in _parts(given))
    except ValueError:
        example = "0.25,0.1" if kind is float else "4096,8k"
        raise UserError(f"{flag} {','.join(given or [])}: give numbers such as {example}") from None


LINES = (
    ("tokens read", "document_tokens", "{:,}"),
    ("tokens kept", "kept_tokens", "{:,}"),
    ("prefill, s", "prefill_seconds", "{:.2f}"),
    ("first token, s", "first_token_seconds", "{:.2f}"),
    ("decode, tok/s", "decode_tokens_per_second", "{:.1f}"),
    ("KV cache", "kv_bytes", None),
    ("context", "context_bytes", None),
    ("peak RSS", "peak_rss_bytes", None),
    ("GPU memory", "device_memory_bytes", None),
    ("probe, score, evict: share of prefill", "overhead_share", "{:.1%}"),
)


def _print(result: dict[str, Any]) -> None:
    """One table for each length: medians, and in brackets the least and the most."""
    from laserkv_gguf.benchmark.report import fastest, label

    console = terminal.Console()
    for length in result["settings"]["lengths"]:
        rows = [row for row in result["rows"] if row["length"] == length]
        table = Table("")
        for row in rows:
            table.add_column(label(row), justify="right")
            if row["policy"] != "full":
                table.add_column("gain", justify="right")
        for title, key, form in LINES:
            if all(row.get(key) is None for row in rows):
                continue
            cells = []
            for row in rows:
                cells.append(_cell(row, key, form))
                if row["policy"] != "full":
                    name = "decode_seconds_per_token" if key.startswith("decode") else key
                    gain = row["ratios"].get(name)
                    cells.append(f"{gain:.2f}x" if gain else "")
            table.add_row(title, *cells)
        console.print(table)
    for found in result["generation"]:
        console.print(
            f"a token at {found['ctx_cells']:,} cells takes {found['overhead']['loop']:+.1%} "
            "beside llama.cpp's bare loop"
        )
    console.print(f"the full cache had: {fastest(result)}")
    if result["idle_probe"]:
        more = result["idle_probe"]["overhead"]
        console.print(f"idle probe: reading {more['prefill']:+.2%}, a token {more['token']:+.2%}")
    for note in result["notes"]:
        console.print(note)


def _cell(row: dict[str, Any], key: str, form: str | None) -> str:
    def said(value: float) -> str:
        return terminal.size(value) if form is None else form.format(value)

    if row.get(key) is None:
        return ""
    found = row["spread"].get(key)
    if found is None or len(row["runs"]) == 1 or found["min"] == found["max"]:
        return said(row[key])
    return f"{said(row[key])} ({said(found['min'])}–{said(found['max'])})"
