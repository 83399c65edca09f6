"""What clients get back: OpenAI's objects, llama-server's timings, and the account."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from laserkv_gguf.llama.model import Model
from laserkv_gguf.llama.sampler import Likelihood
from laserkv_gguf.server.work import Done

ACCOUNT = "laserkv"
"""The key of the account."""


@dataclass
class Head:
    """What every object of one answer begins with."""

    kind: str
    model: str
    prefix: str = "chatcmpl"
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.id = self.id or f"{self.prefix}-{secrets.token_hex(12)}"

    def of(self, **more: Any) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": self.kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": None,
            **more,
        }


def usage(prompt: int, answers: Sequence[Done]) -> dict[str, Any]:
    """Tokens, and how many of the prompt were there already."""
    generated = sum(len(done.reply.tokens) for done in answers)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {
            "cached_tokens": min((done.there for done in answers), default=0)
        },
    }


def timings(prompt: int, done: Done) -> dict[str, Any]:
    """As llama-server has them."""
    fresh, first = prompt - done.there, done.first * 1000
    count, rest = len(done.reply.tokens), (done.whole - done.first) * 1000
    return {
        "cache_n": done.there,
        "prompt_n": fresh,
        "prompt_ms": first,
        "prompt_per_token_ms": first / max(fresh, 1),
        "prompt_per_second": fresh / max(done.first, 1e-9),
        "predicted_n": count,
        "predicted_ms": rest,
        "predicted_per_token_ms": rest / max(count, 1),
        "predicted_per_second": count / max(done.whole - done.first, 1e-9),
    }


def account(prompt: int, done: Done, limit: int) -> dict[str, Any]:
    """What was read, kept, cached and parked, and how long it took."""
    return {
        "document": done.document,
        "found": done.found,
        "cached_tokens": done.there,
        "decoded_tokens": prompt - done.there,
        "waited_seconds": done.waited,
        "first_seconds": done.first,
        "whole_seconds": done.whole,
        "max_tokens": limit,
        "times_turns_were_thinned": done.thinned,
        **done.reply.account.as_dict(),
    }


def chat_logprobs(model: Model, found: Sequence[Likelihood]) -> dict[str, Any]:
    """Of generated tokens; what ended the answer is none."""

    def told(token: int, logprob: float) -> dict[str, Any]:
        data = model.piece(token, special=True)
        return {
            "token": data.decode("utf-8", "replace"),
            "logprob": max(logprob, -9999.0),
            "bytes": list(data),
        }

    return {
        "content": [
            {
                **told(one.token, one.logprob),
                "top_logprobs": [told(token, logprob) for token, logprob in one.top],
            }
            for one in found
            if not model.ends_generation(one.token)
        ],
        "refusal": None,
    }


def text_logprobs(
    model: Model, found: Sequence[Likelihood | int], offset: int = 0
) -> dict[str, Any]:
    """As `/v1/completions` has them; a bare token is the first of all, which has none."""
    tokens, offsets = [], []
    logprobs: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    for one in found:
        token = one if isinstance(one, int) else one.token
        data = model.piece(token, special=True).decode("utf-8", "replace")
        tokens.append(data)
        offsets.append(offset)
        offset += len(data)
        if isinstance(one, int):
            logprobs.append(None)
            tops.append(None)
            continue
        logprobs.append(max(one.logprob, -9999.0))
        top: dict[str, float] = {}
        for other, logprob in one.top:
            said = model.piece(other, special=True).decode("utf-8", "replace")
            top.setdefault(said, max(logprob, -9999.0))
        tops.append(top)
    return {
        "tokens": tokens,
        "token_logprobs": logprobs,
        "top_logprobs": tops,
        "text_offset": offsets,
    }
