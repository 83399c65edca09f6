"""One measurement in a process of its own: a job in JSON on stdin, its result on stdout.

    python -m laserkv_gguf.benchmark.child < job.json

What reads the full cache imports neither Numba nor the engine: its memory is llama.cpp's.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from laserkv_gguf.benchmark import tuning
from laserkv_gguf.benchmark.statistics import spread
from laserkv_gguf.errors import LaserKVError, UserError
from laserkv_gguf.llama import library, state
from laserkv_gguf.llama.bare import Bare, BareSettings, generate, read
from laserkv_gguf.llama.model import Model, Tokens
from laserkv_gguf.machine import peak_rss, reset_peak_rss
from laserkv_gguf.shown import Formatter

if TYPE_CHECKING:
    from laserkv_gguf.api import LaserKV
    from laserkv_gguf.conversation.conversation import Conversation
    from laserkv_gguf.conversation.generation import Reply
    from laserkv_gguf.llama.chat import Opening

Job = dict[str, Any]
Result = dict[str, Any]

WARM_TOKENS, WARM_BLOCK, WARM_QUESTION = 300, 128, "Why?"
_TRIAL_TOKENS = 2048  # read at a time in a search
_TRIAL_BASE = 512  # read first; copied to make a depth
_TRIAL_GENERATED, _TRIAL_ROUNDS = 8, 3
_TRIAL_SECONDS = 5.0  # one trial is repeated unless it took longer


# ---- the text ----------------------------------------------------------------------------------


def of_length(model: Model, text: str, tokens: int) -> str:
    """The text repeated or cut to a number of tokens (give or take those at the seam)."""
    found = model.tokenize(text)
    while len(found) < tokens:
        text = f"{text}\n\n{text}"
        found = model.tokenize(text)
    return model.text(found[:tokens])


def _loaded(job: Job) -> Model:
    return Model(job["model"], gpu_layers=job["gpu_layers"], extra_buffers=job["extra_buffers"])


def _opening(model: Model, question: str) -> Opening:
    from laserkv_gguf.llama.chat import ChatTemplate

    return ChatTemplate(model).opening(question, system=None, document=True)


def free_device_memory() -> int | None:
    """Bytes free on all GPUs together; None where there is none."""
    free = [device.free for device in library.devices() if device.kind == "gpu"]
    return sum(free) if free else None


def _used(before: int | None) -> int | None:
    now = free_device_memory()
    return None if before is None or now is None else before - now


# ---- what there is -----------------------------------------------------------------------------


def facts(job: Job) -> Result:
    """What the model and the machine are; refuses what cannot be measured before anything is.

    Raises:
        UserError: settings or a document that a run of one of the lengths would refuse.
    """
    with _loaded(job) as model:
        from laserkv_gguf.conversation.conversation import Conversation

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
                for d in library.devices()
            ],
        }


# ---- the full cache ----------------------------------------------------------------------------


def full(job: Job) -> Result:
    """llama.cpp alone reads everything and answers."""
    free = free_device_memory()
    settings = BareSettings(**job["bare"])
    with _loaded(job) as model:
        text = of_length(model, job["text"], job["length"])
        for _ in range(job["warmup"]):
            with Bare(model, 2 * WARM_TOKENS, settings) as bare:
                bare.read(model.tokenize(text)[:WARM_TOKENS])
                bare.generate(2)
        opening = _opening(model, job["question"])
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
                **_times(len(tokens), prefill, generated.first - started),
                **_decoding(generated.last - generated.first, predict - 1),
                "decode_seconds": prefill,
                "overhead_share": 0.0,
                **_memory(bare.buffers, free),
            }


def _times(tokens: int, prefill: float, first_token: float) -> Result:
    return {
        "prefill_seconds": prefill,
        "prefill_tokens_per_second": tokens / prefill if prefill > 0 else None,
        "first_token_seconds": first_token,
    }


def _decoding(seconds: float, tokens: int) -> Result:
    """Of the tokens after the first: what each took, None where there were none."""
    each = seconds / tokens if tokens > 0 and seconds > 0 else None
    return {
        "decode_seconds_per_token": each,
        "decode_tokens_per_second": 1 / each if each else None,
    }


def _memory(buffers: dict[str, int], free_before: int | None) -> Result:
    return {
        "buffers": buffers,  # as llama.cpp reports them
        "context_bytes": sum(buffers.values()),
        "peak_rss_bytes": peak_rss(),
        "device_memory_bytes": _used(free_before),
    }


# ---- a policy ----------------------------------------------------------------------------------


def _engine(job: Job, model: Model, settings: dict[str, Any]) -> LaserKV:
    from laserkv_gguf.api import LaserKV
    from laserkv_gguf.llama.context import ContextOptions

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
    block = max(WARM_BLOCK, settings["lookahead"] or 0)
    small = {**settings, "block_size": min(block, settings["block_size"]), "positions": "original"}
    short = model.text(model.tokenize(text)[:WARM_TOKENS])
    with _engine(job, model, small) as engine:
        engine.policy.warm_up()
        engine.ask(WARM_QUESTION, document=short, max_tokens=2)


def policy(job: Job) -> Result:
    """The engine reads with a policy and answers."""
    from laserkv_gguf.conversation.conversation import Conversation

    free = free_device_memory()
    question, predict = job["question"], job["predict"]
    with _loaded(job) as model:
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
                **_times(len(reading.tokens), reading.timings.total, answer.first - started),
                **_decoding(answer.last - answer.first, predict - answer.at_first),
                "overhead_share": account.overhead_share,
                "block_seconds": reading.timings.blocks,
                **_memory(context.buffers, free),
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


# ---- generation against a bare loop ------------------------------------------------------------


def _generation(job: Job, engine: LaserKV, conversation: Conversation) -> Result:
    """The engine's answers beside llama.cpp's greedy loop, A B C A B C.

    `loop` runs in the engine's own context, over the very cells that the answers use; `packed` in
    one without callbacks, which holds the same keys and values side by side.
    """
    context, reading = engine.context, conversation.reading
    assert context is not None
    assert reading is not None
    question, count = job["question"], job["predict"]
    prompt = _opening(engine.model, question).after.tokens
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


# ---- llama.cpp's fastest settings --------------------------------------------------------------


def search(job: Job) -> Result:
    """Tries llama.cpp's settings at the length's own depth, see `tuning`."""
    with _loaded(job) as model:
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
    return scores < sum(d.free for d in library.devices() if d.kind == "cpu") // 2


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
    with _loaded(job) as model:
        base = model.tokenize(of_length(model, job["text"], min(length, _TRIAL_BASE)))
        with Bare(model, length + 1 + job["predict"], settings, spare=True) as bare:
            bare.read(base)
            bare.generate(2)
            bare.rewind(len(base))
            bare.deepen(len(base), length)
            bare.read(base[:1])
            made = bare.generate(job["predict"])
    return _decoding(made.last - made.first, job["predict"] - 1)


# ---- what cb_eval costs while it is idle -------------------------------------------------------


def idle(job: Job) -> Result:
    """The same reading and generating with the probe set but unarmed, and without, A B A B."""
    from laserkv_gguf.llama.capture import Probe

    settings, count = BareSettings(**job["bare"]), job["predict"]
    with _loaded(job) as model:
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


# ---- the process -------------------------------------------------------------------------------

KINDS: dict[str, Callable[[Job], Result]] = {
    "facts": facts,
    "full": full,
    "policy": policy,
    "search": search,
    "token": token,
    "idle": idle,
}


def main() -> int:
    """Does the job; an error is told in the result, with its exit code."""
    job = json.load(sys.stdin)
    level = logging.DEBUG if job["debug"] else logging.WARNING
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Formatter("warning: %(message)s"))
    logging.basicConfig(handlers=[handler], level=level)
    logging.getLogger("numba").setLevel(logging.WARNING)
    if job["kind"] != "facts" and not job["debug"]:
        # what it warns of is said once, with the facts
        logging.getLogger("laserkv_gguf").setLevel(logging.ERROR)
    try:
        result = KINDS[job["kind"]](job)
    except LaserKVError as error:
        result = {"error": str(error), "code": error.exit_code}
    except Exception as error:
        traceback.print_exc()
        result = {"error": f"{type(error).__name__}: {error}", "code": 1}
    print(json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
