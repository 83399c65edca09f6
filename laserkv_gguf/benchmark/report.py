"""The results as JSON, as Markdown and as a plot."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from laserkv_gguf.errors import UserError
from laserkv_gguf.evaluation import drawing
from laserkv_gguf.timings import STEPS

Result = dict[str, Any]

RUNS = "runs.jsonl"  # in the folder of results: every run as it came
NONE = "–"


def check(out: Path | None) -> None:
    """Refuses, before anything is measured, a folder of results whose plot cannot be drawn.

    Raises:
        UserError: matplotlib is missing.
    """
    if out is not None and find_spec("matplotlib") is None:
        raise UserError(
            "--out draws a plot, which needs matplotlib; install it with "
            "pip install 'laserkv-gguf[plot]', or use --markdown FILE and --json"
        )


def write(result: Result, markdown_file: Path | None = None, out: Path | None = None) -> None:
    """Writes the tables to a file, and all of it to a folder.

    Raises:
        UserError: they cannot be written.
    """
    text = markdown(result)
    try:
        if markdown_file is not None:
            replace(markdown_file, text)
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            replace(out / "bench.json", json.dumps(result, indent=1) + "\n")
            replace(out / "bench.md", text)
            plot(result, out / "bench.png", out / "bench.svg")
    except OSError as error:
        raise UserError(f"cannot write {error.filename}: {error.strerror}") from error


def replace(path: Path, text: str) -> None:
    """Writes a file beside and renames it, so that none is ever half-written."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text, "utf-8")
    beside.replace(path)


def size(number: float | None) -> str:
    """Bytes in MiB or GiB."""
    if not number:
        return NONE
    mib = number / 2**20
    return f"{mib:,.1f} MiB" if mib < 1024 else f"{mib / 1024:,.2f} GiB"


def gain(number: float | None) -> str:
    """A ratio, full ÷ policy."""
    return f"{number:.2f}" if number else NONE


def _number(row: Result, name: str, form: str) -> str:
    """A median and, where there were several runs, the least and the most."""
    value = row.get(name)
    if value is None:
        return NONE
    found = row["spread"].get(name)
    said = format(value, form)
    if found is None or len(row["runs"]) < 2:
        return said
    return f"{said} ({format(found['min'], form)}–{format(found['max'], form)})"


def label(row: Result) -> str:
    """A row's policy and, unless it keeps everything, the share it was asked to keep."""
    name: str = row["policy"]
    return name if name == "full" else f"{name} {row['ratio']:g}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column to the left, the others to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def markdown(result: Result) -> str:
    """Everything a reader needs to judge the figures: what ran where, and all of the tables."""
    parts = [_heading(result), *(f"- {note}" for note in result["notes"])]
    parts += ["## Full ÷ policy (above 1 is a gain)", gains([result])]
    parts += ["## Times and memory", _times(result)]
    parts += ["## Where reading spends its time", _breakdown(result)]
    if result["growth"]:
        parts += ["## Growth with the length (k of length^k)", _growth(result)]
    if result["generation"]:
        parts += ["## Generation beside llama.cpp's bare loop", _generation(result)]
    if result["idle_probe"]:
        parts += ["## The probe while it is idle", _idle(result)]
    parts += ["## The full cache's settings", _baselines(result)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _heading(result: Result) -> str:
    model = result["model"]
    return (
        f"# {model['file']}, {result['date']}\n\n{_place(result)} {model['description']}, "
        f"{model['offloaded_layers']} of {model['layers'] + 1} layers on a GPU."
    )


def _place(result: Result) -> str:
    """Where and how it was measured."""
    where, settings = result["machine"], result["settings"]
    gpus = ", ".join(gpu["name"] for gpu in where["gpus"]) or "no GPU"
    load = "" if where["load"] is None else f", load {where['load']:.1f} at the end"
    runs = f"{settings['repeats']} run{'s' if settings['repeats'] > 1 else ''}"
    return (
        f"{where['processor']}, {where['processors']} processors, {size(where['memory_bytes'])}, "
        f"{gpus}{load}; {where['system']}, Python {where['python']}, llama-cpp-python "
        f"{where['llama_cpp_python']}. {settings['predict']} tokens generated; {runs} of each in "
        "turn (A B A B), every one in a process of its own: medians, in brackets the least and "
        "the most."
    )


def summary(results: Sequence[Result], command: str) -> str:
    """Several models in short, for a README: what was run, gains, where the time goes."""
    first = results[0]
    parts = [f"**Speed.** `{command}`, {first['date']}. {_place(first)}"]
    parts += [f"- {note}" for result in results for note in result["notes"]]
    parts += [
        "Full ÷ policy, above 1 is a gain; *decode, fastest*: beside the full cache with whichever "
        "settings generate fastest, where those are not the ones that answer soonest:",
        gains(results),
    ]
    steps = table(
        ["model", "tokens", "policy", *STEPS],
        [
            [result["model"]["file"], f"{row['document_tokens']:,}", label(row), *_shares(row)]
            for result in results
            for row in result["rows"]
            if row.get("block_seconds")
        ],
    )
    parts += ["Where reading spends its time, of prefill:", steps]
    heads = {"engine − loop": "loop", "engine − packed": "packed"}
    compared = [
        [
            result["model"]["file"],
            f"{found['kept_tokens']:,}",
            _milliseconds(found["seconds_per_token"]["engine"]),
            *(f"{found['overhead'][name]:+.1%}" for name in heads.values()),
        ]
        for result in results
        for found in result["generation"]
    ]
    if compared:
        parts += [
            "A generated token beside llama.cpp's bare loop, over the same cells and over as many "
            "side by side:",
            table(["model", "tokens kept", "ms a token", *heads], compared),
        ]
    parts += [
        f"The idle probe (`cb_eval`), {result['model']['file']}: "
        f"reading {result['idle_probe']['overhead']['prefill']:+.2%}, "
        f"a token {result['idle_probe']['overhead']['token']:+.2%}."
        for result in results
        if result["idle_probe"]
    ]
    parts += ["The full cache had: " + "; ".join(fastest(result) for result in results) + "."]
    return "\n\n".join(parts) + "\n"


def _shares(row: Result) -> list[str]:
    return [f"{(row.get(f'{step}_seconds') or 0) / row['prefill_seconds']:.1%}" for step in STEPS]


def fastest(result: Result) -> str:
    """The settings found for the full cache, where they differ by length each of them."""
    said: dict[str, list[str]] = {}
    for found in result["baselines"]:
        settings = found["settings"]
        flash = {None: "auto", True: "on", False: "off"}[settings["flash_attn"]]
        repacking = "on" if found["extra_buffers"] else "off"
        text = (
            f"flash attention {flash}, micro-batches of {settings['ubatch_size']}, "
            f"{settings['threads_batch']} threads ({settings['threads']} for a token), "
            f"repacking {repacking}"
        )
        said.setdefault(text, []).append(f"{found['document_tokens']:,}")
    each = (f"{text} ({', '.join(at)} tokens)" for text, at in said.items())
    return f"{result['model']['file']} {', '.join(each)}"


def gains(results: Sequence[Result]) -> str:
    """The table of full ÷ policy, for one model or several."""
    head = ["tokens", "policy", "first token", "decode", "decode, fastest", "KV bytes", "context"]
    head += ["peak memory", "probe, score, evict"]
    many = len(results) > 1
    rows = []
    for result in results:
        for row in result["rows"]:
            if row["policy"] == "full" and "error" not in row:
                continue
            found = row["ratios"]
            values = [
                f"{row['document_tokens']:,}",
                label(row),
                gain(found.get("first_token_seconds")),
                gain(found.get("decode_seconds_per_token")),
                gain(found.get("fastest_decode_seconds_per_token")),
                gain(found.get("kv_bytes")),
                gain(found.get("context_bytes")),
                gain(found.get("peak_rss_bytes")),
                share(row),
            ]
            rows.append([result["model"]["file"], *values] if many else values)
    return table(["model", *head] if many else head, rows)


def share(row: Result) -> str:
    """What part of reading a policy's own work takes."""
    value = row.get("overhead_share")
    return NONE if value is None else f"{value:.1%} of prefill"


def _times(result: Result) -> str:
    head = ["tokens", "policy", "kept", "first token, s", "prefill, tok/s", "decode, tok/s"]
    head += ["KV cache", "context", "peak RSS", "GPU memory"]
    rows = [
        [
            f"{row['document_tokens']:,}",
            label(row),
            f"{row['kept_tokens']:,}" if "kept_tokens" in row else NONE,
            _number(row, "first_token_seconds", ",.2f"),
            _number(row, "prefill_tokens_per_second", ",.0f"),
            _number(row, "decode_tokens_per_second", ",.1f"),
            size(row["kv_bytes"]),
            size(row.get("context_bytes")),
            size(row["peak_rss_bytes"]),
            size(row["device_memory_bytes"]),
        ]
        for row in result["rows"]
    ]
    return table(head, rows) + (
        "\n\nContext: KV cache, compute and output buffers as llama.cpp reports them."
    )


def _breakdown(result: Result) -> str:
    rows = []
    for row in result["rows"]:
        blocks = row.get("block_seconds")
        if not blocks:
            continue
        for name, blocks_shown in (("all", blocks), ("median block", [_median_block(blocks)])):
            total = [sum(block[step] for block in blocks_shown) for step in STEPS]
            rows.append(
                [f"{row['document_tokens']:,}", label(row), name, *(f"{t:.3f}" for t in total)]
            )
    if not rows:
        return ""
    return table(["tokens", "policy", "blocks", *(f"{step}, s" for step in STEPS)], rows) + (
        "\n\nOf one run; bench.json has every block of every run."
    )


def _median_block(blocks: Sequence[dict[str, float]]) -> dict[str, float]:
    from statistics import median

    return {step: median(block[step] for block in blocks) for step in STEPS}


def _growth(result: Result) -> str:
    names = {
        "first_token_seconds": "first token",
        "decode_seconds_per_token": "time a token",
        "kv_bytes": "KV cache",
        "context_bytes": "context",
        "peak_rss_bytes": "peak RSS",
    }
    rows = [
        [label(entry), *(NONE if entry[n] is None else f"{entry[n]:.2f}" for n in names)]
        for entry in result["growth"]
    ]
    return table(["policy", *names.values()], rows)


def _generation(result: Result) -> str:
    head = ["tokens kept", "cells", "engine, ms a token", "bare loop, same cells"]
    head += ["engine − loop", "bare loop, cells packed", "engine − packed"]
    rows = []
    for entry in result["generation"]:
        times, more = entry["seconds_per_token"], entry["overhead"]
        rows.append(
            [
                f"{entry['kept_tokens']:,}",
                f"{entry['ctx_cells']:,}",
                _milliseconds(times["engine"]),
                _milliseconds(times["loop"]),
                f"{more['loop']:+.1%}",
                _milliseconds(times["packed"]),
                f"{more['packed']:+.1%}",
            ]
        )
    return table(head, rows) + (
        "\n\nSame cells: llama_decode and the greedy sampler called from ctypes, in the engine's "
        "own context. Packed: in a context without callbacks, the same keys and values side by "
        "side."
    )


def _milliseconds(found: dict[str, float]) -> str:
    low, high = 1000 * found["min"], 1000 * found["max"]
    return f"{1000 * found['median']:.2f} ({low:.2f}–{high:.2f})"


def _idle(result: Result) -> str:
    found = result["idle_probe"]
    head = ["", "with cb_eval, unarmed, ms", "without, ms", "difference"]
    rows = [
        [
            said,
            _milliseconds(found["seconds"]["with"][kind]),
            _milliseconds(found["seconds"]["without"][kind]),
            f"{found['overhead'][kind]:+.2%}",
        ]
        for kind, said in (
            ("prefill", f"reading {found['tokens']:,} tokens"),
            ("token", "a token"),
        )
    ]
    return table(head, rows)


def _baselines(result: Result) -> str:
    head = ["tokens", "flash attention", "ubatch", "threads", "for a token", "repacking"]
    head += ["estimate, s", "prefill, tok/s", "decode, tok/s", ""]
    rows = []
    for found in result["baselines"]:
        choices = [("used", found), ("tokens", found["for_token"])]
        tried = found["tried"] or [{**found["settings"], "extra_buffers": found["extra_buffers"]}]
        for entry in tried:
            used = [word for word, chosen in choices if _is(entry, chosen)]
            rows.append(
                [
                    f"{found['document_tokens']:,}",
                    {None: "auto", True: "on", False: "off"}[entry["flash_attn"]],
                    str(entry["ubatch_size"]),
                    str(entry["threads_batch"]),
                    str(entry["threads"]),
                    "on" if entry["extra_buffers"] else "off",
                    *(
                        NONE if entry.get(name) is None else f"{entry[name]:,.1f}"
                        for name in (
                            "seconds",
                            "prefill_tokens_per_second",
                            "decode_tokens_per_second",
                        )
                    ),
                    ", ".join(used),
                ]
            )
    said = (
        "Found at each length's own depth before it was measured. The fastest is used; where other "
        'settings generate faster, their tokens are what "decode, fastest" compares with.'
    )
    if not any(found["tried"] for found in result["baselines"]):
        said = "No search was made: the full cache has the engine's settings."
    return table(head, rows) + "\n\n" + said


def _is(entry: dict[str, Any], chosen: dict[str, Any] | None) -> bool:
    """Whether settings that were tried are those chosen."""
    if chosen is None:
        return False
    wanted = {**chosen["settings"], "extra_buffers": chosen["extra_buffers"]}
    return all(entry[name] == value for name, value in wanted.items())


# ---- the plot ----------------------------------------------------------------------------------

PANELS = (
    ("first_token_seconds", "first token, s", 1),
    ("decode_seconds_per_token", "time a token, ms", 1000),
    ("context_bytes", "context, MiB", 2**-20),
    ("peak_rss_bytes", "peak RSS, MiB", 2**-20),
)


def plot(result: Result, *files: Path) -> None:
    """Time and memory against the length, one line for each policy; format by each file's name."""
    from matplotlib.figure import Figure

    groups: dict[str, list[Result]] = {}
    for row in result["rows"]:
        groups.setdefault(label(row), []).append(row)
    wanted = [panel for panel in PANELS if any(row.get(panel[0]) for row in result["rows"])]
    if not wanted:
        return
    lengths = sorted({row["document_tokens"] for row in result["rows"]})
    columns = min(len(wanted), 2)
    with drawing.styled():
        figure = Figure(figsize=(9, 0.6 + 3.2 * -(-len(wanted) // 2)), layout="constrained")
        grid = figure.subplots(-(-len(wanted) // columns), columns, squeeze=False)
        for axes, (name, title, scale) in zip(grid.flat, wanted, strict=False):
            for said, rows in groups.items():
                shown = [(r["document_tokens"], r, scale * r[name]) for r in rows if r.get(name)]
                if not shown:
                    continue
                x, y = [s[0] for s in shown], [s[2] for s in shown]
                bounds = [r["spread"].get(name, {}) for _, r, _ in shown]
                low = [v - scale * b["min"] if b else 0 for v, b in zip(y, bounds, strict=True)]
                high = [scale * b["max"] - v if b else 0 for v, b in zip(y, bounds, strict=True)]
                style = drawing.marked(said, list(groups))
                axes.errorbar(x, y, yerr=[low, high], capsize=3, label=said, **style)
            axes.set(title=title, xlabel="tokens", xscale="log", yscale="log")
            axes.set_xticks(lengths, [f"{n:,}" for n in lengths])
            axes.minorticks_off()
        drawing.only_drawn(grid)
        figure.legend(*grid.flat[0].get_legend_handles_labels(), loc="outside right upper")
        figure.suptitle(f"{result['model']['file']}, {result['date']}")
        for file in files:
            drawing.write(figure, file)
