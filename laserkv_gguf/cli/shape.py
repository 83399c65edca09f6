"""`--grammar` and `--json-schema`: what an answer looks like."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

from typer import Option

from laserkv_gguf.errors import UserError

if TYPE_CHECKING:
    from laserkv_gguf.llama.model import Model
    from laserkv_gguf.llama.sampler import Sampling

_MOST = 1 << 20  # bytes that are read of a file


@dataclass
class ShapeOptions:
    """What an answer looks like."""

    json_schema: Annotated[
        Optional[str],  # noqa: UP045
        Option("--json-schema", help="File with a JSON schema, which the answer then follows."),
    ] = None
    grammar: Annotated[
        Optional[str],  # noqa: UP045
        Option("--grammar", help="File with a grammar of llama.cpp's (GBNF) for the answer."),
    ] = None

    def text(self) -> str:
        """The grammar of an answer; empty for none.

        Raises:
            UserError: both flags, or a file that cannot be used.
        """
        if self.json_schema is not None and self.grammar is not None:
            raise UserError("--json-schema and --grammar both shape the answer; give one of them")
        if self.grammar is not None:
            return _read("--grammar", self.grammar)
        if self.json_schema is None:
            return ""
        try:
            schema = json.loads(_read("--json-schema", self.json_schema))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.json_schema} is not JSON: {error}") from None
        if not isinstance(schema, dict):
            raise UserError(f"{self.json_schema} holds no JSON schema, which is an object")
        from laserkv_gguf.llama import grammar

        return grammar.of_schema(schema)


def shaped(sampling: Sampling, model: Model, text: str) -> Sampling:
    """Sampling whose answers are sentences of a grammar, if there is one.

    Raises:
        UserError: it cannot be read.
    """
    if not text:
        return sampling
    from laserkv_gguf.llama import grammar

    grammar.check(model, text)
    return replace(sampling, grammar=text)


def _read(flag: str, name: str) -> str:
    try:
        with Path(name).open("rb") as file:
            data = file.read(_MOST + 1)
    except FileNotFoundError:
        raise UserError(f"no file at {name}; check the path after {flag}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read {name}: {reason}") from None
    if len(data) > _MOST:
        raise UserError(f"{name} has more than {_MOST} bytes; that is no grammar")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{name} is not UTF-8") from None
    if not text.strip():
        raise UserError(f"{name} is empty; give a file for {flag} with something in it")
    return text
