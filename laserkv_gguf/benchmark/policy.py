"""The engine with a policy: what it takes to read and to answer."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

from laserkv_gguf.api import LaserKV
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
from laserkv_gguf.conversation.conversation import Conversation
from laserkv_gguf.conversation.generation import Reply
from laserkv_gguf.llama import devices, state
from laserkv_gguf.llama.bare import Bare, BareSettings, generate, read
from laserkv_gguf.llama.context import ContextOptions
from laserkv_gguf.llama.model import Model
from laserkv_gguf.machine import reset_peak_rss

_WARM_TOKENS, _WARM_BLOCK, _WARM_QUESTION = 300, 128, "Why?"


def facts(job: Job) -> Result:
    """What the model and the machine are; refuses what cannot be measured before anything is.

    Raises:
        UserError: settings or a document that a run of one of the lengths would refuse.
    """
    with loaded(job) as model:
        for settings in job["configurations"]:  # what no length can do is told first
            _engine(job, model, settings).close()
        for length in job["lengths"]:
            text = of_length(model, job["text"], length)
            for settings in job["configurations"]:
                with _engine(job, model, settings) as engine:
                    opening = engine.template.opening(job["question"], system=None, document=True)
                    tokens = len(opening.before) + len(model.tokenize(text))
                    prompt = len(opening.after)
                    reply = prompt + job["predict"]
                    engine.prepare(Conversation(engine), tokens, prompt, reply)
        return {
            "name": model.name,
            "file": model.path.name,
            "description": model.description,
            "trained_context": model.trained_context,
            "weights_bytes": model.weights_bytes,
            "layers": model.layers,
            "offloaded_layers": model.offloaded_layers,
            "model_buffers": model.buffers,
            "devices": [
                {"name": d.description or d.name, "kind": d.kind, "bytes": d.total}
                for d in devices.listed()
            ],
        }


def _engine(job: Job, model: Model, settings: dict[str, Any]) -> LaserKV:
    engine = LaserKV(
        model,
        ctx_size=job["ctx_size"],
        context=ContextOptions(**job["context"]),
        seed=job["seed"],
        **settings,
    )
    engine.ignore_end = True  # every policy generates as many tokens
    return engine


def _warm_up(job: Job, model: Model, text: str) -> None:
    """Compiles what is compiled and touches what is touched, with blocks of a short text."""
    settings = job["settings"]
    block = max(_WARM_BLOCK, settings["lookahead"] or 0)
    small = {**settings, "block_size": min(block, settings["block_size"]), "positions": "original"}
    short = model.text(model.tokenize(text)[:_WARM_TOKENS])
    with _engine(job, model, small) as engine:
        engine.policy.warm_up()
        engine.ask(_WARM_QUESTION, document=short, max_tokens=2)


def policy(job: Job) -> Result:
    """The engine reads with a policy and answers."""
    free = free_device_memory()
    question, predict = job["question"], job["predict"]
    with loaded(job) as model:
        text = of_length(model, job["text"], job["length"])
        for _ in range(job["warmup"]):
            _warm_up(job, model, text)
        with _engine(job, model, job["settings"]) as engine:
            reset_peak_rss()
            started = time.perf_counter()
            conversation = Conversation(engine, document=text, max_tokens=predict)
            reading = conversation.read(question=question)
            answer = _answered(conversation, question)
            context, account = engine.context, answer.reply.account
            assert context is not None
            result = {
                **account.as_dict(),
                **prefill_times(len(reading.tokens), reading.timings.total, answer.first - started),
                **decode_times(answer.last - answer.first, predict - answer.at_first),
                "overhead_share": account.overhead_share,
                "block_seconds": reading.timings.blocks,
                **memory_taken(context.buffers, free),
            }
            if job["generation"]:
                result["generation"] = _generation(job, engine, conversation)
            return result


@dataclass(frozen=True)
class _Answered:
    """An answer, when its first text and its end came, and how many tokens that first text took."""

    reply: Reply
    first: float
    last: float
    at_first: int

    @property
    def seconds_per_token(self) -> float:
        return (self.last - self.first) / max(len(self.reply.tokens) - self.at_first, 1)


def _answered(conversation: Conversation, question: str) -> _Answered:
    first, at_first = 0.0, 0
    with conversation.ask(question) as answer:
        for _ in answer:
            if not at_first:
                first, at_first = time.perf_counter(), len(answer.reply.tokens)
    last = time.perf_counter()
    return _Answered(answer.reply, first or last, last, at_first)


# ---- generation against a bare loop


def _generation(job: Job, engine: LaserKV, conversation: Conversation) -> Result:
    """The engine's answers beside llama.cpp's greedy loop, A B C A B C.

    `loop` runs in the engine's own context, over the very cells that the answers use; `packed` in
    one without callbacks, which holds the same keys and values side by side.
    """
    context, reading = engine.context, conversation.reading
    assert context is not None
    assert reading is not None
    question, count = job["question"], job["predict"]
    prompt = opening_of(engine.model, question).after.tokens
    settings = BareSettings(
        flash_attn={0: False, 1: True}.get(
            context.options.flash_type(engine.model.gpu_layers != 0)
        ),
        batch_size=context.batch_size,
        ubatch_size=context.ubatch_size,
        threads=context.pace.count,
        threads_batch=context.threads,
        type_k=context.options.type_k,
        type_v=context.options.type_v,
    )
    times: dict[str, list[float]] = {"engine": [], "loop": [], "packed": []}
    same = True
    conversation.reset()
    with Bare(engine.model, len(reading.kept) + len(prompt) + count, settings) as packed:
        state.restore(packed.handle, 0, state.save(context.handle, 0))
        for _ in range(job["generation"]):
            answer = _answered(conversation, question)
            times["engine"].append(answer.seconds_per_token)
            conversation.reset()
            context.on_worker(read, context.handle, prompt, context.batch_size)
            loop = context.on_worker(generate, context.handle, count)
            times["loop"].append((loop.last - loop.first) / (count - 1))
            conversation.reset()
            context.on_worker(packed.read, prompt)
            other = context.on_worker(packed.generate, count)
            times["packed"].append((other.last - other.first) / (count - 1))
            packed.rewind(reading.next_position)
            same = same and answer.reply.tokens == loop.tokens
    engine_seconds = median(times["engine"])
    return {
        "kept_tokens": len(reading.kept),
        "ctx_cells": context.cells,
        "tokens": count,
        "same_tokens": same,
        "seconds_per_token": {name: spread(values) for name, values in times.items()},
        # how much longer the engine takes for a token: 0.03 is 3 %
        "overhead": {name: engine_seconds / median(times[name]) - 1 for name in ("loop", "packed")},
    }


KINDS: dict[str, Callable[[Job], Result]] = {"facts": facts, "policy": policy}
