"""The full cache, by llama.cpp alone: its memory is llama.cpp's, so no Numba and no engine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import numpy as np

from laserkv_gguf.benchmark import tuning
from laserkv_gguf.benchmark.job import (
    Job,
    Result,
    decode_times,
    free_device_memory,
    loaded,
    memory_taken,
    of_length,
    opening_of,
    prefill_times,
)
from laserkv_gguf.benchmark.statistics import spread
from laserkv_gguf.errors import UserError
from laserkv_gguf.llama import devices
from laserkv_gguf.llama.bare import Bare, BareSettings
from laserkv_gguf.llama.model import Model, Tokens
from laserkv_gguf.machine import reset_peak_rss

_WARM_TOKENS = 300
_TRIAL_TOKENS = 2048  # read at a time in a search
_TRIAL_BASE = 512  # read first; copied to make a depth
_TRIAL_GENERATED, _TRIAL_ROUNDS = 8, 3
_TRIAL_SECONDS = 5.0  # one trial is repeated unless it took longer


def full(job: Job) -> Result:
    """llama.cpp alone reads everything and answers."""
    free = free_device_memory()
    settings = BareSettings(**job["bare"])
    with loaded(job) as model:
        text = of_length(model, job["text"], job["length"])
        for _ in range(job["warmup"]):
            with Bare(model, 2 * _WARM_TOKENS, settings) as bare:
                bare.read(model.tokenize(text)[:_WARM_TOKENS])
                bare.generate(2)
        opening = opening_of(model, job["question"])
        reset_peak_rss()
        started = time.perf_counter()
        tokens = np.concatenate((opening.before, model.tokenize(text))).astype(np.int32)
        prompt, predict = len(opening.after), job["predict"]
        with Bare(model, len(tokens) + prompt + predict, settings) as bare:
            reading = time.perf_counter()
            bare.read(tokens)
            prefill = time.perf_counter() - reading
            bare.read(opening.after.tokens)
            generated = bare.generate(predict)
            return {
                "document_tokens": len(tokens),
                "kept_tokens": len(tokens),
                "kept_fraction": 1.0,
                "prompt_tokens": prompt,
                "generated_tokens": predict,
                "ctx_cells": bare.cells,
                "kv_bytes": bare.kv_bytes,
                "full_kv_bytes": bare.kv_bytes,
                **prefill_times(len(tokens), prefill, generated.first - started),
                **decode_times(generated.last - generated.first, predict - 1),
                "decode_seconds": prefill,
                "overhead_share": 0.0,
                **memory_taken(bare.buffers, free),
            }


# ---- llama.cpp's fastest settings


def search(job: Job) -> Result:
    """Tries llama.cpp's settings at the length's own depth, see `tuning`."""
    with loaded(job) as model:
        text = of_length(model, job["text"], min(job["length"], _TRIAL_BASE + _TRIAL_TOKENS))
        tokens = model.tokenize(text)
        best, tried = tuning.search(
            job["start"], job["axes"], lambda settings: _cost(model, tokens, settings, job)
        )
    return {"best": best, "tried": tried}


def _cost(
    model: Model, tokens: Tokens, settings: dict[str, Any], job: Job
) -> dict[str, float] | None:
    """Estimated seconds to read `length` tokens and generate `predict`, from a part of each.

    Time grows linearly with what a token looks at, so tokens half-way down stand for all of them.
    None where the settings do not fit into memory.
    """
    length = job["length"]
    size = min(_TRIAL_TOKENS, length // 2)
    base = tokens[: min(_TRIAL_BASE, length - size)]
    cells = length + 1 + _TRIAL_ROUNDS * _TRIAL_GENERATED
    bare = BareSettings(**settings)
    if not bare.flash_attn and not _fits(model, bare, cells):
        return None
    try:
        context = Bare(model, cells, bare, spare=True)
    except UserError:
        return None
    with context:
        context.read(base)
        held = context.deepen(len(base), (length - size) // 2)
        batch = tokens[len(base) : len(base) + size]
        reading = min(_trials(lambda: context.read(batch), lambda: context.rewind(len(base))))
        context.deepen(held, length)
        context.read(batch[:1])

        def generated() -> float:
            made = context.generate(_TRIAL_GENERATED)
            return (made.last - made.first) / (_TRIAL_GENERATED - 1)

        token = min(generated() for _ in range(_TRIAL_ROUNDS))
    return {
        "seconds": reading * length / size + token * job["predict"],
        "prefill_tokens_per_second": size / reading,
        "decode_tokens_per_second": 1 / token,
    }


def _fits(model: Model, settings: BareSettings, cells: int) -> bool:
    """Whether the scores of a micro-batch, kept whole without flash attention, fit into memory."""
    if model.gpu_layers != 0:
        return True
    scores = 4 * model.heads * settings.ubatch_size * cells
    return scores < sum(d.free for d in devices.listed() if d.kind == "cpu") // 2


def _trials(run: Callable[[], object], undo: Callable[[], object]) -> Iterator[float]:
    """Seconds of one run or, where that was short, of two."""
    for _ in range(2):
        started = time.perf_counter()
        run()
        seconds = time.perf_counter() - started
        undo()
        yield seconds
        if seconds > _TRIAL_SECONDS:
            return


def token(job: Job) -> Result:
    """Tokens of the full cache at a length's depth, with settings it is not read with."""
    settings, length = BareSettings(**job["bare"]), job["length"]
    with loaded(job) as model:
        base = model.tokenize(of_length(model, job["text"], min(length, _TRIAL_BASE)))
        with Bare(model, length + 1 + job["predict"], settings, spare=True) as bare:
            bare.read(base)
            bare.generate(2)
            bare.rewind(len(base))
            bare.deepen(len(base), length)
            bare.read(base[:1])
            made = bare.generate(job["predict"])
    return decode_times(made.last - made.first, job["predict"] - 1)


# ---- what cb_eval costs while it is idle


def idle(job: Job) -> Result:
    """The same reading and generating with the probe set but unarmed, and without, A B A B."""
    from laserkv_gguf.llama.capture import Probe

    settings, count = BareSettings(**job["bare"]), job["predict"]
    with loaded(job) as model:
        text = of_length(model, job["text"], job["length"])
        tokens = model.tokenize(text)
        probe = Probe(model.layers, model.heads, model.kv_heads, model.head_dim)
        cells = len(tokens) + count
        times: dict[str, dict[str, list[float]]] = {
            name: {"prefill": [], "token": []} for name in ("with", "without")
        }
        with (
            Bare(model, cells, settings, probe=probe) as watched,
            Bare(model, cells, settings) as alone,
        ):
            contexts = {"with": watched, "without": alone}
            for turn in range(job["repeats"] + 1):  # the first one warms up
                for name, context in contexts.items():
                    started = time.perf_counter()
                    context.read(tokens)
                    reading = time.perf_counter() - started
                    made = context.generate(count)
                    context.rewind(0)
                    if turn:
                        times[name]["prefill"].append(reading)
                        times[name]["token"].append((made.last - made.first) / (count - 1))
    return {
        "tokens": len(tokens),
        "seconds": {
            name: {kind: spread(values) for kind, values in kinds.items()}
            for name, kinds in times.items()
        },
        "overhead": {
            kind: median(times["with"][kind]) / median(times["without"][kind]) - 1
            for kind in ("prefill", "token")
        },
    }


KINDS: dict[str, Callable[[Job], Result]] = {
    "full": full,
    "search": search,
    "token": token,
    "idle": idle,
}
