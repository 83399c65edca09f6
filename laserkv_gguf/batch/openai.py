"""OpenAI's batch lines: a request to `/v1/chat/completions` in each, and its answer as an object.

Input: `{"custom_id": …, "method": "POST", "url": "/v1/chat/completions", "body": {…}}`. What a body
may say is what `batch` can do; all else is refused by name.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from laserkv_gguf.conversation.question import MOST, TAIL, Limits, split
from laserkv_gguf.errors import UserError

if TYPE_CHECKING:
    from laserkv_gguf.conversation.generation import Reply

URL = "/v1/chat/completions"
_CHARACTERS = 4  # of a token, in English
_LINE = {"custom_id", "method", "url", "body"}
_SAMPLED = {  # what a body may say of sampling, and the values that go
    "temperature": (0.0, 2.0),
    "top_p": (0.0, 1.0),
    "frequency_penalty": (-2.0, 2.0),
    "presence_penalty": (-2.0, 2.0),
}
_BODY = {
    "model",
    "messages",
    "max_tokens",
    "max_completion_tokens",
    "stop",
    "seed",
    "n",
    "stream",
    "logit_bias",
    "response_format",
    "user",
    *_SAMPLED,
}


class Unusable(Exception):
    """Why a line cannot be asked."""


def is_request(values: Mapping[str, Any]) -> bool:
    """Whether a line is one of OpenAI's."""
    return "custom_id" in values or "body" in values


def fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same question as `batch` has it, with `sampling` and `model` beside.

    Raises:
        Unusable: something in it is wrong, or not supported.
    """
    for name in values:
        if name not in _LINE:
            raise Unusable(f'"{name}" is unknown beside custom_id, method, url and body')
    if values.get("method", "POST") != "POST" or values.get("url", URL) != URL:
        raise Unusable(f'"url" has to be {URL}, and "method" POST')
    body = values.get("body")
    if not isinstance(body, dict):
        raise Unusable('no "body"; give the request')
    body = {name: value for name, value in body.items() if value is not None}
    for name in body:
        if name not in _BODY:
            raise Unusable(f'"{name}" in "body" is not supported by batch; leave it out')
    if body.get("n", 1) != 1 or body.get("stream", False) is not False:
        raise Unusable('"n" has to be 1 in a batch, and "stream" false')
    system, document, question = _said(body.get("messages"))
    found: dict[str, Any] = {"id": values.get("custom_id"), "question": question}
    if document.strip():
        found["document"] = document
    if system.strip():
        found["system"] = system
    limit = body.get("max_completion_tokens", body.get("max_tokens"))
    if limit is not None:
        found["max_tokens"] = limit
    if "stop" in body:
        found["stop"] = body["stop"]
    return {**found, "sampling": _sampling(body), "model": str(body.get("model", ""))[:256]}


def _said(messages: Any) -> tuple[str, str, str]:
    """System prompt, document and question."""
    if not isinstance(messages, list) or not messages:
        raise Unusable('no "messages" in "body"')
    system, asked = "", []
    for number, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        if role in ("system", "developer") and number == 0:
            system = _text(message)
        elif role == "user":
            asked.append(_text(message))
        else:
            raise Unusable(
                f"message {number + 1} is not supported by batch, which takes one system prompt "
                "and then the user's messages; serve takes whole conversations"
            )
    if not asked:
        raise Unusable('"messages" has no message of the user\'s')
    # the model is not loaded yet, so characters are counted in place of tokens
    limits = Limits(MOST * _CHARACTERS, TAIL * _CHARACTERS)
    document, question = split(asked[-1], len, limits)
    before = "\n\n".join(asked[:-1])
    if before and document:
        before += "\n\n"
    return system, (before + document).rstrip("\n"), question


def _text(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
        for part in content
    ):
        return "\n\n".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise Unusable('"content" of a message has to be a text, or parts of type text')
    return content


def _sampling(body: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, (least, most) in _SAMPLED.items():
        if name in body:
            value = body[name]
            if not _number(value) or not least <= value <= most:
                raise Unusable(f'"{name}" has to be a number from {least:g} to {most:g}')
            found[name] = float(value)
    if "seed" in body:
        if not isinstance(body["seed"], int) or isinstance(body["seed"], bool):
            raise Unusable('"seed" has to be a whole number')
        found["seed"] = body["seed"]
    if "logit_bias" in body:
        found["logit_bias"] = _biases(body["logit_bias"])
    if "response_format" in body:
        found["grammar"] = _grammar(body["response_format"])
    return found


def _biases(given: Any) -> tuple[tuple[int, float], ...]:
    if not isinstance(given, dict) or not all(
        token.isascii() and token.isdigit() and len(token) < 10 and _number(bias)
        for token, bias in given.items()
    ):
        raise Unusable('"logit_bias" has to be an object of token ids with numbers')
    return tuple((int(token), float(bias)) for token, bias in given.items())


def _grammar(given: Any) -> str:
    kind = given.get("type") if isinstance(given, dict) else None
    if kind == "text":
        return ""
    schema = None
    if kind == "json_schema":
        about = given.get("json_schema")
        schema = about.get("schema") if isinstance(about, dict) else None
    if kind not in ("json_schema", "json_object") or (
        kind == "json_schema" and not isinstance(schema, dict)
    ):
        raise Unusable(
            '"response_format" has to be text, json_object, or json_schema with a schema'
        )
    from laserkv_gguf.llama import grammar

    try:
        return grammar.of_schema(schema)
    except UserError as error:
        raise Unusable(str(error)) from None


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


# ---- answers ------------------------------------------------------------------------------------


def answered(name: str | int, model: str, reply: Reply) -> dict[str, Any]:
    """The line of an answer; the account is under one key, as the server has it."""
    account = reply.account
    prompt = account.document_tokens + account.prompt_tokens
    generated = len(reply.tokens)
    body = {
        "id": f"chatcmpl-{_digest(name)}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": reply.text, "refusal": None},
                "logprobs": None,
                "finish_reason": reply.finish_reason,
            }
        ],
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
        },
        "laserkv": account.as_dict(),
    }
    response = {"status_code": 200, "request_id": f"req-{_digest(name)}", "body": body}
    return {"id": name, "custom_id": name, "response": response, "error": None}


def failed(name: str | int, line: int, said: str) -> dict[str, Any]:
    """The line of what could not be asked."""
    return {
        "id": name,
        "custom_id": name,
        "response": None,
        "error": {"code": "failed", "message": said, "line": line},
    }


def _digest(name: str | int) -> str:
    return hashlib.sha256(str(name).encode()).hexdigest()[:24]
