"""`bench`: LASER against llama.cpp's full cache, in the same run."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import TYPE_CHECKING, Annotated, Any, Optional

from rich.table import Table
from typer import Option

from laserkv_gguf.cli import documents, terminal
from laserkv_gguf.cli.options import EngineOptions, with_options
from laserkv_gguf.errors import UserError
from laserkv_gguf.memory import peak_rss, reset_peak_rss

if TYPE_CHECKING:
    from laserkv_gguf.session import LaserKV

QUESTION = "What happens in this text? Answer in one sentence."
RATIOS = (
    "first_token_seconds",
    "prefill_seconds",
    "decode_tokens_per_second",
    "decode_seconds_per_token",
    "kv_bytes",
    "peak_rss_bytes",
)


@with_options(EngineOptions)
def bench(
    options: EngineOptions,
    tokens: Annotated[int, Option("--tokens", help="Length of the document in tokens.")] = 4096,
    document: Annotated[
        Optional[list[str]],  # noqa: UP045
        Option("-d", "--document", help="Text to read; repeated or cut to --tokens."),
    ] = None,
    question: Annotated[str, Option("-q", "--question", help="What to ask.")] = QUESTION,
    predict: Annotated[int, Option("-n", "--predict", help="Tokens to generate.")] = 64,
    as_json: Annotated[bool, Option("--json", help="Print rows and ratios as JSON.")] = False,
) -> None:
    """Measure speed and memory of a policy against the full cache, in the same run."""
    if tokens < 1 or predict < 1:
        raise UserError("--tokens and -n must be at least 1")
    text = documents.load(document or [str(files("laserkv_gguf") / "data" / "sample.txt")])
    assert text is not None
    with options.engine() as shared:
        text = _of_length(shared, text, tokens)
        _row(options, shared, "full", _of_length(shared, text, 64), question, 1)  # warm-up
        names = ["full"] if options.policy == "full" else ["full", options.policy]
        rows = [_row(options, shared, name, text, question, predict) for name in names]
    # full ÷ policy: above 1 is a gain, but for tokens per second, where it is a loss
    ratios = {key: _ratio(rows[0][key], rows[-1][key]) for key in RATIOS}
    if as_json:
        print(json.dumps({"rows": rows, "ratios": ratios}))
        return
    _print(rows, ratios)


def _of_length(engine: LaserKV, text: str, tokens: int) -> str:
    """The text repeated or cut to a number of tokens (give or take those at the seam)."""
    found = engine.model.tokenize(text)
    while len(found) < tokens:
        text = f"{text}\n\n{text}"
        found = engine.model.tokenize(text)
    return engine.model.text(found[:tokens])


def _row(
    options: EngineOptions, shared: LaserKV, policy: str, text: str, question: str, predict: int
) -> dict[str, Any]:
    """Runs one policy over the shared model; its context is made for it and freed after."""
    reset_peak_rss()
    with options.engine(model=shared.model, policy=policy) as engine:
        engine.ignore_end = True  # every policy generates as many tokens
        account = engine.ask(question, document=text, max_tokens=predict).account
    return {
        **account.as_dict(),
        "decode_seconds_per_token": 1 / account.decode_tokens_per_second,
        "peak_rss_bytes": peak_rss(),
        "overhead_share": account.overhead_share,
    }


def _ratio(full: float, other: float) -> float | None:
    return full / other if full and other else None


def _print(rows: list[dict[str, Any]], ratios: dict[str, float | None]) -> None:
    from rich.console import Console

    table = Table()
    table.add_column("")
    for row in rows:
        table.add_column(row["policy"], justify="right")
    table.add_column("gain", justify="right")
    lines = (
        ("tokens read", "document_tokens", "{:,}"),
        ("tokens kept", "kept_tokens", "{:,}"),
        ("prefill, s", "prefill_seconds", "{:.2f}"),
        ("first token, s", "first_token_seconds", "{:.2f}"),
        ("decode, tok/s", "decode_tokens_per_second", "{:.1f}"),
        ("KV cache", "kv_bytes", None),
        ("peak RSS", "peak_rss_bytes", None),
        ("probe, score, evict: share of prefill", "overhead_share", "{:.1%}"),
    )
    for title, key, form in lines:
        values = [
            terminal.size(row[key] or 0) if form is None else form.format(row[key]) for row in rows
        ]
        gain = ratios.get("decode_seconds_per_token" if key.startswith("decode") else key)
        table.add_row(title, *values, f"{gain:.2f}x" if gain else "")
    Console().print(table)
