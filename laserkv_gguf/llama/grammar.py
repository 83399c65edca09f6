"""llama.cpp's grammars (GBNF), and JSON schemas as such."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import llama_cpp as L
from llama_cpp import llama_grammar

from laserkv_gguf.errors import UserError
from laserkv_gguf.shown import one_line

if TYPE_CHECKING:
    from laserkv_gguf.llama.model import Model

SIZE = 1 << 17  # characters of a grammar: parsing one and following it cost by its size
SCHEMA = 1 << 15  # characters of a schema
REPEATS = 256  # llama.cpp writes a repetition out, once for each time
_ROOT = b"root"


def of_schema(schema: Mapping[str, Any] | None) -> str:
    """The grammar of JSON that a schema describes; of any JSON object where there is none.

    Raises:
        UserError: a schema that cannot be made a grammar of.
    """
    if schema is None:
        return str(llama_grammar.JSON_GBNF)
    text = json.dumps(schema)
    if len(text) > SCHEMA:
        raise UserError(f"the JSON schema has {len(text):,} characters; at most {SCHEMA:,} do")
    _check(schema)
    try:
        grammar = str(llama_grammar.json_schema_to_gbnf(text))
    except RecursionError:
        raise UserError("the JSON schema is nested too deeply") from None
    except Exception as error:  # the converter asserts, and takes what it finds for granted
        said = one_line(str(error))[:200] or type(error).__name__
        raise UserError(f"the JSON schema cannot be made a grammar of: {said}") from None
    if len(grammar) > SIZE:
        raise UserError("the JSON schema describes too much for a grammar; make it simpler")
    return grammar


def _check(value: Any, depth: int = 0) -> None:
    """Refuses what would make a grammar without an end: all else the converter refuses itself."""
    if depth > 64:
        raise UserError("the JSON schema is nested too deeply")
    if isinstance(value, Mapping):
        for name, inner in value.items():
            counts = name in ("minItems", "maxItems", "minLength", "maxLength")
            if counts and isinstance(inner, (int, float)) and inner > REPEATS:
                raise UserError(f"{name} of a JSON schema is at most {REPEATS} here")
            if name == "$ref" and isinstance(inner, str) and not inner.startswith("#"):
                raise UserError("$ref of a JSON schema can only point into itself (#/…)")
            _check(inner, depth + 1)
    elif isinstance(value, list):
        for inner in value:
            _check(inner, depth + 1)


def make(model: Model, grammar: str) -> Any:
    """llama.cpp's sampler of a grammar; whoever asks frees it.

    Raises:
        UserError: it cannot be read.
    """
    if len(grammar) > SIZE:
        raise UserError(f"the grammar has {len(grammar):,} characters; at most {SIZE:,} do")
    if "\0" in grammar:
        raise UserError("the grammar has a NUL in it")
    text = grammar.encode("utf-8", "replace")
    with _silence:
        made = L.llama_sampler_init_grammar(model.vocab, text, _ROOT)
    if not made:
        raise UserError(
            'the grammar cannot be read; write it in GBNF with a rule "root", '
            'such as root ::= "yes" | "no"'
        )
    return made


class _Silence:
    """Keeps what llama.cpp's parser writes to standard error, past its own log, to itself."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._before: int | None = None

    def __enter__(self) -> None:
        self._lock.acquire()
        self._before = None
        with suppress(OSError, ValueError, AttributeError):
            sys.stderr.flush()
            before = os.dup(2)
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 2)
            os.close(nowhere)
            self._before = before

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            os.dup2(self._before, 2)
            os.close(self._before)
        self._lock.release()


_silence = _Silence()


def check(model: Model, grammar: str) -> None:
    """Refuses a grammar that llama.cpp cannot read.

    Raises:
        UserError: likewise.
    """
    L.llama_sampler_free(make(model, grammar))
