"""What is measured, in which order, and the rows that come of it."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from laserkv_gguf.benchmark import tuning
from laserkv_gguf.benchmark.processes import Processes
from laserkv_gguf.benchmark.statistics import (
    GROWING,
    RATIOS,
    exponent,
    ratio,
    ratios,
    spread,
)
from laserkv_gguf.errors import LaserKVError, UserError
from laserkv_gguf.timings import STEPS

Row = dict[str, Any]
FULL = "full"
FASTEST = "fastest_decode_seconds_per_token"

MEASURED = (
    "prefill_seconds",
    "prefill_tokens_per_second",
    "first_token_seconds",
    "decode_seconds_per_token",
    "decode_tokens_per_second",
    FASTEST,
    "peak_rss_bytes",
    "device_memory_bytes",
    "overhead_share",
    *(f"{step}_seconds" for step in STEPS),
)
"""What differs from run to run: a row has the median of each, and its spread."""

_BATCH = 2048  # of the full cache; llama.cpp's default, and the largest micro-batch tried
_IDLE = 2048  # tokens that the idle probe is measured with, many times
_UBATCHES = (128, 256, 512, 1024, 2048)


@dataclass(frozen=True)
class Plan:
    """A benchmark.

    Attributes:
        model: path of the GGUF.
        text: to be read, repeated or cut to a length.
        lengths: of the document, in tokens.
        configurations: settings of the engine (fields of `Settings`), one for each row; the
            full cache is measured beside them.
        predict: tokens to generate.
        repeats: runs of each configuration and length.
        warmup: short runs before each that is measured.
        placement: fields of `Placement`.
        context: fields of `ContextOptions` for the engine.
        tune: search llama.cpp's fastest settings for the full cache; else it gets the engine's.
        generation: answers compared with a bare loop; 0 for none.
        probe_cost: measure what the idle probe costs.
    """

    model: str
    text: str
    question: str
    lengths: tuple[int, ...]
    configurations: tuple[dict[str, Any], ...]
    predict: int = 64
    repeats: int = 3
    warmup: int = 1
    gpu_layers: int | None = None
    placement: dict[str, Any] = field(default_factory=dict)
    ctx_size: int | None = None
    context: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    tune: bool = True
    generation: int = 3
    probe_cost: bool = False
    debug: bool = False

    def check(self) -> None:
        """Refuses unusable values.

        Raises:
            UserError: with the remedy in one line.
        """
        if not self.lengths or min(self.lengths) < 1 or self.predict < 1:
            raise UserError("--tokens and -n must be at least 1")
        if self.repeats < 1 or self.warmup < 0:
            raise UserError("--repeats must be at least 1, --warmup at least 0")


def turns(
    lengths: Sequence[int], configurations: int, repeats: int
) -> Iterator[tuple[int, int, int]]:
    """(length, configuration, repeat) in the order of measuring: A B A B, length by length.

    Configuration 0 is the full cache.
    """
    for length in lengths:
        for repeat in range(repeats):
            for number in range(configurations + 1):
                yield length, number, repeat


class Benchmark:
    """Runs a plan.

    Args:
        plan: what to measure.
        processes: runs jobs, and remembers them where it was given a file.
        say: told what is measured now.

    Raises:
        UserError: unusable values in the plan.
    """

    def __init__(
        self, plan: Plan, processes: Processes, say: Callable[[str], None] = lambda _: None
    ) -> None:
        plan.check()
        self.plan, self.processes, self.say = plan, processes, say
        self.extra_buffers = True
        self.facts: dict[str, Any] = {}

    def run(self) -> dict[str, Any]:
        """Measures everything.

        Returns:
            What `bench --json` prints. `rows`: one for each policy and length, medians under the
            contract's names, `spread` and `runs` behind them, `ratios` (full ÷ this row).
            `ratios`: those of the last row. Besides `growth`, `baselines`, `generation`,
            `idle_probe`, `model`, `machine`, `settings`, `notes`, `date`.

        Raises:
            UserError: the plan cannot be run with this model.
            LaserKVError: a measurement failed.
        """
        from laserkv_gguf.llama import trial

        plan = self.plan
        self.extra_buffers = trial.extra_buffers_work()
        self.say("the model, the machine")
        self.facts = self._job(
            "facts", lengths=plan.lengths, configurations=list(plan.configurations)
        )
        baselines: dict[int, dict[str, Any]] = {}
        runs: dict[tuple[int, int], list[Row]] = {}
        for length, number, repeat in turns(plan.lengths, len(plan.configurations), plan.repeats):
            if length not in baselines:
                baselines[length] = self._baseline(length)
            name = FULL if number == 0 else plan.configurations[number - 1]["policy"]
            self.say(f"{length:,} tokens, {name}, run {repeat + 1} of {plan.repeats}")
            if number == 0:
                run = self._full(length, repeat, baselines[length])
            else:
                run = self._policy(length, repeat, number)
            runs.setdefault((length, number), []).append(run)
        rows = [self._row(*key, found) for key, found in runs.items()]
        compare(rows)
        idle = None
        if plan.probe_cost and plan.predict > 1:
            self.say("the idle probe")
            least = min(plan.lengths)
            idle = self._job(
                "idle", length=min(least, _IDLE), bare=baselines[least]["settings"], repeats=5
            )
        return {
            "rows": rows,
            "ratios": rows[-1]["ratios"],
            "growth": growth(rows),
            "baselines": list(baselines.values()),
            "generation": [row["generation"] for row in rows if row.get("generation")],
            "idle_probe": idle,
            "model": {**self.facts, "extra_buffers": self.extra_buffers},
            "machine": machine(self.facts["devices"]),
            "settings": self._settings(),
            "notes": self._notes(rows),
            "date": datetime.now(timezone.utc).date().isoformat(),
        }

    # jobs

    def _job(self, kind: str, **fields: Any) -> dict[str, Any]:
        plan = self.plan
        return self.processes.run(
            {
                "kind": kind,
                "model": plan.model,
                "gpu_layers": plan.gpu_layers,
                "placement": plan.placement,
                "extra_buffers": self.extra_buffers,
                "text": plan.text,
                "question": plan.question,
                "predict": plan.predict,
                "warmup": plan.warmup,
                "ctx_size": plan.ctx_size,
                "context": plan.context,
                "seed": plan.seed,
                "debug": plan.debug,
                **fields,
            }
        )

    def _full(self, length: int, repeat: int, baseline: dict[str, Any]) -> Row:
        """A run of the full cache; where it does not fit that is a result, too.

        Where other settings generate faster than those that answer soonest, their tokens are
        measured as well, so that both are compared with llama.cpp at its best.
        """
        try:
            run = self._job(
                FULL,
                length=length,
                repeat=repeat,
                bare=baseline["settings"],
                extra_buffers=baseline["extra_buffers"],
            )
        except LaserKVError as error:
            return {"error": str(error), "document_tokens": length}
        token, other = run, baseline["for_token"]
        if other and self.plan.predict > 1:
            token = self._job(
                "token",
                length=run["document_tokens"] + run["prompt_tokens"],
                repeat=repeat,
                bare=other["settings"],
                extra_buffers=other["extra_buffers"],
            )
        return {**run, FASTEST: token["decode_seconds_per_token"]}

    def _policy(self, length: int, repeat: int, number: int) -> Row:
        plan = self.plan
        compared = number == 1 and repeat == plan.repeats - 1 and plan.predict > 1
        run = self._job(
            "policy",
            length=length,
            repeat=repeat,
            settings=plan.configurations[number - 1],
            generation=plan.generation if compared else 0,
        )
        return {**run, FASTEST: run["decode_seconds_per_token"]}

    # llama.cpp at its best

    def _baseline(self, length: int) -> dict[str, Any]:
        """The settings the full cache is measured with, and what else was tried."""
        from laserkv_gguf.llama.context import ContextOptions, default_threads

        options = ContextOptions(**self.plan.context)
        offloaded = self.facts["offloaded_layers"] > 0
        flash = {0: False, 1: True}.get(options.flash_type(offloaded))
        for_token = options.threads or default_threads()
        for_batch = options.threads_batch or for_token
        given = {
            "flash_attn": flash,
            "batch_size": _BATCH,
            "ubatch_size": min(options.micro_batch(offloaded), _BATCH),
            "threads": for_token,
            "threads_batch": for_batch,
            "type_k": options.type_k,
            "type_v": options.type_v,
        }
        found: dict[str, Any] = {
            "document_tokens": length,
            "settings": given,
            "extra_buffers": self.extra_buffers,
            "tried": [],
            "for_token": None,
        }
        if not self.plan.tune or length < tuning.SHORTEST:
            return found
        self.say(f"{length:,} tokens, llama.cpp's fastest settings")
        start = {**given, "flash_attn": offloaded or options.quantised_v, "ubatch_size": 512}
        threads, reading = [for_token], [for_batch]
        if not offloaded and options.threads is None:
            threads = [available_processors()]
            while threads[-1] > 1:
                threads.append(threads[-1] // 2)
            reading.append(available_processors())
        axes = tuning.axes(
            flash=not options.quantised_v,
            ubatches=[u for u in _UBATCHES if u <= max(512, length // 2)],
            threads=threads,
            threads_batch=reading,
        )
        search = self._search(length, start, axes, self.extra_buffers)
        found.update(settings=search["best"], tried=search["tried"])
        if self.extra_buffers and not offloaded:
            plain = self._search(length, search["best"], [], False)
            found["tried"] = search["tried"] + plain["tried"]
            if _seconds(plain["tried"]) < _seconds(search["tried"]) * tuning.WORTH:
                found["extra_buffers"] = False
        best = {**found["settings"], "extra_buffers": found["extra_buffers"]}
        if fastest := tuning.fastest_token(best, found["tried"]):
            found["for_token"] = {
                "settings": {name: fastest[name] for name in given},
                "extra_buffers": fastest["extra_buffers"],
            }
        return found

    def _search(
        self, length: int, start: dict[str, Any], axes: list[Any], extra_buffers: bool
    ) -> dict[str, Any]:
        try:
            found = self._job(
                "search", length=length, start=start, axes=axes, extra_buffers=extra_buffers
            )
        except LaserKVError as error:
            found = {"best": start, "tried": [{**start, "seconds": None, "error": str(error)}]}
        for entry in found["tried"]:
            entry["extra_buffers"] = extra_buffers
        return found

    # rows

    def _row(self, length: int, number: int, runs: list[Row]) -> Row:
        """Counts of the first run, medians of all."""
        settings = None if number == 0 else self.plan.configurations[number - 1]
        good = [run for run in runs if "error" not in run]
        first = (good or runs)[0]
        row: Row = {**first, "policy": FULL if settings is None else settings["policy"]}
        row["ratio"] = 1.0 if settings is None else settings["ratio"]
        row["length"] = length
        row["spread"] = {}
        for name in MEASURED:
            values = [run[name] for run in good if run.get(name) is not None]
            row[name] = None
            if values:
                row["spread"][name] = spread(values)
                row[name] = row["spread"][name]["median"]
        row["runs"] = [
            {name: run[name] for name in (*MEASURED, "block_seconds") if name in run}
            for run in runs
        ]
        row.setdefault("kv_bytes", None)
        row["generation"] = next((r["generation"] for r in runs if r.get("generation")), None)
        return row

    def _settings(self) -> dict[str, Any]:
        """What the plan says, without the text and without paths."""
        plan = self.plan
        hidden = {"model", "text", "generation", "probe_cost", "debug"}
        given = {f.name: getattr(plan, f.name) for f in fields(plan) if f.name not in hidden}
        return {"model": Path(plan.model).name, **given}

    def _notes(self, rows: list[Row]) -> list[str]:
        """What a reader of the table must know."""
        notes = []
        trained = self.facts["trained_context"]
        beyond = [n for n in self.plan.lengths if n > trained > 0]
        if beyond:
            notes.append(
                f"Beyond the {trained:,} tokens this model was trained for speed is measured as "
                "well as anywhere, but answers of the full cache, and with original positions, "
                "mean nothing."
            )
        notes += [
            f"{row['length']:,} tokens, {row['policy']}: not measured, {row['error']}."
            for row in rows
            if "error" in row
        ]
        return notes


def compare(rows: Sequence[Row]) -> None:
    """Gives every row its `ratios` to the full cache's of the same length, and their spread.

    A ratio is that of the medians; its spread is over the pairs that were run in turn.
    """
    full = {row["length"]: row for row in rows if row["policy"] == FULL}
    for row in rows:
        base = full[row["length"]]
        row["ratios"] = ratios(base, row)
        row["ratio_spread"] = {}
        for name in RATIOS:
            pairs = zip(base["runs"], row["runs"], strict=True)
            found = [ratio(one.get(name), other.get(name)) for one, other in pairs]
            values = [value for value in found if value is not None]
            if values:
                row["ratio_spread"][name] = spread(values)


def growth(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """How time and memory grow with the length: k of ``length^k``, for every policy and ratio."""
    groups: dict[tuple[str, float], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["policy"], row["ratio"]), []).append(row)
    return [
        {
            "policy": policy,
            "ratio": kept,
            **{
                name: exponent([r["document_tokens"] for r in group], [r.get(name) for r in group])
                for name in GROWING
            },
        }
        for (policy, kept), group in groups.items()
        if len(group) > 1
    ]


def _seconds(tried: Sequence[dict[str, Any]]) -> float:
    """The least time of a search."""
    return min((t["seconds"] for t in tried if t["seconds"] is not None), default=float("inf"))


def available_processors() -> int:
    """Logical processors this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS, Windows
        return os.cpu_count() or 1


def machine(devices: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The machine in words, and how busy it was; no name of it."""
    from importlib.metadata import version

    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "processor": next((d["name"] for d in devices if d["kind"] == "cpu"), platform.machine()),
        "processors": available_processors(),
        "memory_bytes": next((d["bytes"] for d in devices if d["kind"] == "cpu"), None),
        "gpus": [d for d in devices if d["kind"] in ("gpu", "igpu")],
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "llama_cpp_python": version("llama-cpp-python"),
        "load": load,
    }
