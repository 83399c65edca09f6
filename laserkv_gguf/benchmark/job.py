"""What all measurements share: the text they read, the model, and what a result holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from laserkv_gguf.llama import devices
from laserkv_gguf.llama.model import Model
from laserkv_gguf.llama.placement import Placement
from laserkv_gguf.machine import peak_rss

if TYPE_CHECKING:
    from laserkv_gguf.llama.chat import Opening

Job = dict[str, Any]
Result = dict[str, Any]


def of_length(model: Model, text: str, tokens: int) -> str:
    """The text repeated or cut to a number of tokens (give or take those at the seam)."""
    found = model.tokenize(text)
    while len(found) < tokens:
        text = f"{text}\n\n{text}"
        found = model.tokenize(text)
    return model.text(found[:tokens])


def loaded(job: Job) -> Model:
    """A job's model; close it, or use `with`."""
    return Model(
        job["model"],
        gpu_layers=job["gpu_layers"],
        extra_buffers=job["extra_buffers"],
        placement=Placement.of(job["placement"]),
    )


def opening_of(model: Model, question: str) -> Opening:
    """A document's and a question's tokens in the model's template."""
    from laserkv_gguf.llama.chat import ChatTemplate

    return ChatTemplate(model).opening(question, system=None, document=True)


def free_device_memory() -> int | None:
    """Bytes free on all GPUs together; None where there is none."""
    free = [device.free for device in devices.listed() if device.kind == "gpu"]
    return sum(free) if free else None


def _used(before: int | None) -> int | None:
    now = free_device_memory()
    return None if before is None or now is None else before - now


def prefill_times(tokens: int, prefill: float, first_token: float) -> Result:
    """Of reading `tokens` tokens, and seconds from the start to the answer's first token."""
    return {
        "prefill_seconds": prefill,
        "prefill_tokens_per_second": tokens / prefill if prefill > 0 else None,
        "first_token_seconds": first_token,
    }


def decode_times(seconds: float, tokens: int) -> Result:
    """Of the tokens after the first: what each took, None where there were none."""
    each = seconds / tokens if tokens > 0 and seconds > 0 else None
    return {
        "decode_seconds_per_token": each,
        "decode_tokens_per_second": 1 / each if each else None,
    }


def memory_taken(buffers: dict[str, int], free_before: int | None) -> Result:
    """Bytes of a context's buffers, of this process at most, and of GPUs since `free_before`."""
    return {
        "buffers": buffers,  # as llama.cpp reports them
        "context_bytes": sum(buffers.values()),
        "peak_rss_bytes": peak_rss(),
        "device_memory_bytes": _used(free_before),
    }
