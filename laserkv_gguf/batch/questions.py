"""Questions in: a file of JSON lines, each looked at before anything is asked.

A line that cannot be used becomes an item with an error. Documents that stand in the file stay
there until they are read.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from laserkv_gguf.batch import openai
from laserkv_gguf.batch.openai import Unusable
from laserkv_gguf.errors import LaserKVError, UserError

FIELDS = ["id", "question", "document", "document_path", "system", "max_tokens", "stop", "expected"]


@dataclass(frozen=True)
class Item:
    """One line of the input.

    Attributes:
        line: its number in the file, from 1.
        id: text or a number; None where the line has none that can be used.
        offset: where the line begins in the file, in bytes.
        document: what it is about: a digest of its text, a path, or None for the document of all.
        inline: whether the text stands in the line.
        expected: what a right answer contains, any of them.
        error: why it cannot be asked; empty where it can.
        sampling: fields of `Sampling` that are its own.
        model: the name in one of OpenAI's batch lines, which is answered by such a line; None for a
            line of our own.
    """

    line: int
    id: str | int | None = None
    offset: int = 0
    question: str = ""
    document: str | None = None
    inline: bool = False
    system: str | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    expected: tuple[str, ...] = ()
    error: str = ""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    model: str | None = None


@dataclass(frozen=True)
class Input:
    """All questions of a file; the documents that stand in it stay there until they are read.

    Attributes:
        items: in the file's order.
        digest: sha256 of the file.
    """

    file: IO[bytes]
    items: list[Item]
    digest: str

    def text(self, item: Item) -> str:
        """The document that stands in a line.

        Raises:
            LaserKVError: the file has changed since it was looked through.
        """
        self.file.seek(item.offset)
        try:
            text = _native(_parse(self.file.readline()))["document"]
        except (Unusable, KeyError):
            text = None
        if not isinstance(text, str) or digest_of(text) != item.document:
            raise LaserKVError("the input file was changed while its questions were answered")
        return text


def read(file: IO[bytes], name: str, folder: Path, *, strict: bool = False) -> Input:
    """Looks through a JSONL file; lines that cannot be used become items with an error.

    Args:
        file: seekable.
        name: what to call it in errors.
        folder: where relative `document_path`s start.
        strict: refuse a file with a line that cannot be used.

    Raises:
        UserError: there is no usable question in it.
    """
    items: list[Item] = []
    seen: dict[tuple[type, Any], int] = {}
    digest, offset = hashlib.sha256(), 0
    for number, raw in enumerate(file, 1):
        digest.update(raw)
        if raw.strip(b" \t\r\n\xef\xbb\xbf"):
            items.append(_item(raw, number, offset, seen, folder))
        offset += len(raw)
    if not items:
        raise UserError(f"{name} is empty; give one JSON object a line, with id and question")
    bad = [item for item in items if item.error]
    if bad and (strict or len(bad) == len(items)):
        raise UserError(f"{name}, line {bad[0].line}: {bad[0].error}")
    return Input(file, items, digest.hexdigest())


def _item(
    raw: bytes, number: int, offset: int, seen: dict[tuple[type, Any], int], folder: Path
) -> Item:
    try:
        values = _parse(raw)
    except Unusable as error:
        return Item(number, error=str(error))
    theirs = openai.is_request(values)
    name = values.get("custom_id" if theirs else "id")
    model = "" if theirs else None
    if not isinstance(name, (str, int)) or isinstance(name, bool) or not _sound(name):
        called = "custom_id" if theirs else "id"
        said = f'no "{called}"' if name is None else f'"{called}" is {short(name)}'
        return Item(number, error=f"{said}; give every question a text or whole number of its own")
    key = (type(name), name)
    if key in seen:
        return Item(
            number, name, error=f"line {seen[key]} has the same id; give it another", model=model
        )
    seen[key] = number
    try:
        own: dict[str, Any] = {}
        if theirs:
            values = _native(values)
            own = {key: values.pop(key) for key in ("sampling", "model")}
        return Item(number, name, offset, **_fields(values, folder), **own)
    except Unusable as error:
        return Item(number, name, error=str(error), model=model)


def _parse(raw: bytes) -> dict[str, Any]:
    try:
        values = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise Unusable(f"not UTF-8 (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise Unusable(f"not JSON: {error.msg} (column {error.colno})") from None
    except (ValueError, RecursionError) as error:
        raise Unusable(f"not JSON: {error}") from None
    except MemoryError:
        raise Unusable("too large to be read as JSON") from None
    if not isinstance(values, dict):
        raise Unusable("not a JSON object; write {…} with id and question")
    return values


def _native(values: dict[str, Any]) -> dict[str, Any]:
    """A line as our own, also where it is one of OpenAI's."""
    return openai.fields(values) if openai.is_request(values) else values


# what others call a question
_OTHERS = ("prompt", "query", "instruction", "input", "ask", "text", "q")


def _fields(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What an item takes, checked."""
    for name in values:
        near = difflib.get_close_matches(name, FIELDS, n=1, cutoff=0.8)
        if name not in FIELDS and near:
            raise Unusable(f'"{name}" is unknown; did you mean "{near[0]}"?')
    given = {name: value for name, value in values.items() if value is not None}
    for name in ("question", "document", "document_path", "system"):
        if name in given and not (isinstance(given[name], str) and _sound(given[name])):
            raise Unusable(f'"{name}" is {short(given[name])}; give a text')
    if not given.get("question", "").strip():
        if "question" in given:
            raise Unusable('"question" is empty')
        other = next((name for name in _OTHERS if name in given), "")
        raise Unusable(
            f'no "question"; did you mean that by "{other}"?' if other else 'no "question"'
        )
    if "document" in given and "document_path" in given:
        raise Unusable('both "document" and "document_path"; give one of them')
    for name in ("document", "document_path"):
        if name in given and not given[name].strip():
            raise Unusable(f'"{name}" is empty; leave it out for none')
    limit = given.get("max_tokens")
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        raise Unusable(f'"max_tokens" is {short(limit)}; give a number of at least 1')
    inline = "document" in given
    path = given.get("document_path")
    return {
        "question": given["question"],
        "document": digest_of(given["document"])
        if inline
        else path and str((folder / path).absolute()),
        "inline": inline,
        "system": given.get("system") or None,
        "max_tokens": limit,
        "stop": _texts("stop", given),
        "expected": _texts("expected", given),
    }


def _texts(name: str, given: Mapping[str, Any]) -> tuple[str, ...]:
    """One text or several."""
    value = given.get(name, [])
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(
        isinstance(text, str) and text.strip(None if name == "expected" else "") and _sound(text)
        for text in texts
    ):
        raise Unusable(f'"{name}" is {short(value)}; give a text, or a list of texts')
    return tuple(texts)


def _sound(value: Any) -> bool:
    """Whether a text can be written as UTF-8: JSON can name halves of a character."""
    try:
        str(value).encode()
    except UnicodeEncodeError:
        return False
    return True


def short(value: Any) -> str:
    """A value in a line of an error."""
    said = json.dumps(value)
    return said if len(said) <= 40 else f"{said[:39]}…"


def digest_of(text: str) -> str:
    """Tells one text from another."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
