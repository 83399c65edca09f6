"""What clients send, checked by name: what is not supported is refused, never ignored."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

MOST_CHOICES, MOST_TOPS, MOST_STOPS = 8, 20, 16
MOST_MESSAGES, MOST_BIASES = 4096, 1024

# What OpenAI knows and this server does not do; the values that mean "leave it" are let through.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "function_call": ("none",),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "reasoning_effort": ("none",),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
}


class _Strict(BaseModel):
    """Refuses names it does not know, and numbers written as text."""

    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(_Strict):
    """A stretch of text."""

    type: Literal["text", "input_text"]
    text: str


class FileAbout(_Strict):
    """A document: uploaded before, or inside the request (base64, also as a data URL)."""

    file_id: str | None = Field(None, max_length=128)
    file_data: str | None = None
    filename: str | None = Field(None, max_length=512)

    @model_validator(mode="after")
    def _one(self) -> FileAbout:
        if (self.file_id is None) == (self.file_data is None):
            raise ValueError("give either file_id or file_data")
        return self


class FilePart(_Strict):
    """A document among the parts of a message."""

    type: Literal["file"]
    file: FileAbout


Part = Annotated[TextPart | FilePart, Field(discriminator="type")]


class Message(_Strict):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    name: str | None = Field(None, max_length=64)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        """Clients send an answer back as they got it, with what it did not have."""
        if not isinstance(value, dict):
            return value
        known = {"refusal", "audio", "function_call", "tool_calls", "annotations"}
        return {k: v for k, v in value.items() if not (k in known and v in (None, []))}


class StreamOptions(_Strict):
    """What a stream also says."""

    include_usage: bool = False
    include_obfuscation: bool = False


class JsonSchema(BaseModel):
    """OpenAI's frame around a schema; JSON schemas name what they like."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)
    name: str = Field("", max_length=64)
    description: str | None = None
    strict: bool | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")


class ResponseFormat(_Strict):
    """Text, any JSON object, or JSON of one schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")

    @model_validator(mode="after")
    def _whole(self) -> ResponseFormat:
        if self.type == "json_schema" and (
            self.json_schema is None or self.json_schema.schema_ is None
        ):
            raise ValueError("json_schema needs a schema")
        return self


class Common(_Strict):
    """What both kinds of request may say."""

    model: str | None = Field(None, max_length=256)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=0, le=1 << 20)
    min_p: float | None = Field(None, ge=0, le=1)
    max_tokens: int | None = Field(None, ge=0, le=1 << 30)
    n: int | None = Field(None, ge=1, le=MOST_CHOICES)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    repeat_penalty: float | None = Field(None, gt=0, le=10)
    logit_bias: dict[str, float] | None = Field(None, max_length=MOST_BIASES)
    grammar: str | None = None
    json_schema: dict[str, Any] | None = None
    cache_prompt: bool | None = None
    cache_salt: str | None = Field(None, max_length=256)
    prompt_cache_key: str | None = Field(None, max_length=256)
    return_progress: bool | None = None
    timings_per_token: Literal[False] | None = None
    question: str | None = None
    ratio: float | None = Field(None, gt=0, le=1)
    policy: str | None = Field(None, max_length=64)
    # names for the client's own use, which change nothing
    user: str | None = Field(None, max_length=512)
    safety_identifier: str | None = Field(None, max_length=512)
    metadata: dict[str, str] | None = Field(None, max_length=64)

    @model_validator(mode="before")
    @classmethod
    def _supported(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        kept = {}
        for name, given in value.items():
            if name in _UNSUPPORTED and (given is None or given in _UNSUPPORTED[name]):
                continue
            if name in _UNSUPPORTED:
                raise ValueError(f"{name} is not supported here; leave it out")
            kept[name] = given
        return kept

    @field_validator("stop")
    @classmethod
    def _stops(cls, value: str | list[str] | None) -> list[str]:
        found = [value] if isinstance(value, str) else value or []
        if len(found) > MOST_STOPS or any(not one for one in found):
            raise ValueError(f"give at most {MOST_STOPS} texts, none of them empty")
        return found

    @field_validator("logit_bias")
    @classmethod
    def _biases(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        for token, bias in (value or {}).items():
            if not token.isascii() or not token.isdigit() or len(token) > 9:
                raise ValueError(f"{token[:20]!r} is no token id")
            if not math.isfinite(bias) or not -100 <= bias <= 100:
                raise ValueError("give numbers from -100 to 100")
        return value

    @property
    def stops(self) -> tuple[str, ...]:
        return tuple(self.stop or ())


class ChatRequest(Common):
    """`POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1, max_length=MOST_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1, le=1 << 30)
    max_tokens: int | None = Field(None, ge=1, le=1 << 30)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_TOPS)
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def _together(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.messages[-1].role != "user":
            raise ValueError("the last message has to be the user's")
        return self

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(Common):
    """`POST /v1/completions`."""

    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MOST_TOPS)
    parse_special: bool | None = None

    @field_validator("prompt")
    @classmethod
    def _prompts(cls, value: Any) -> Any:
        if isinstance(value, list) and not value:
            raise ValueError("the list is empty")
        if isinstance(value, list) and len(value) > 64 and not isinstance(value[0], int):
            raise ValueError("at most 64 prompts in one request")
        return value

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


class TokenizeRequest(_Strict):
    """`POST /tokenize`; `content` and `add_special` are llama-server's names."""

    prompt: str | None = None
    content: str | None = None
    model: str | None = Field(None, max_length=256)
    add_special_tokens: bool | None = None
    add_special: bool | None = None
    parse_special: bool | None = None

    @property
    def text(self) -> str | None:
        return self.content if self.prompt is None else self.prompt


class DetokenizeRequest(_Strict):
    """`POST /detokenize`."""

    tokens: list[int] = Field(max_length=1 << 20)
    model: str | None = Field(None, max_length=256)
