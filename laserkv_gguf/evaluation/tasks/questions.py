"""Questions about paragraphs, from files in SQuAD's and HotpotQA's own forms."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from laserkv_gguf.errors import UserError
from laserkv_gguf.evaluation.background import read_text


@dataclass(frozen=True)
class Asked:
    """A question.

    Attributes:
        answers: each of them is right.
        needed: paragraphs the answer is in.
        near: paragraphs that are like them; they mislead more than others.
    """

    question: str
    answers: tuple[str, ...]
    needed: tuple[str, ...]
    near: tuple[str, ...]


@dataclass(frozen=True)
class Questions:
    """A file's questions, and all of its paragraphs, each once."""

    name: str
    asked: tuple[Asked, ...]
    paragraphs: tuple[str, ...]


@lru_cache(maxsize=4)
def squad(path: Path) -> Questions:
    """A file of SQuAD 1.1 (arXiv 1606.05250), SQuAD 2.0 (1806.03822) or XQuAD (1910.11856).

    Questions that cannot be answered are left out.

    Raises:
        UserError: it cannot be read, or is none of these.
    """

    def found(data: Any) -> Iterator[Asked]:
        for article in data["data"]:
            texts = tuple(_text(paragraph["context"]) for paragraph in article["paragraphs"])
            for paragraph, text in zip(article["paragraphs"], texts, strict=True):
                near = tuple(dict.fromkeys(other for other in texts if other != text))
                for one in paragraph["qas"]:
                    answers = tuple(dict.fromkeys(_text(a["text"]) for a in one["answers"]))
                    if answers and not one.get("is_impossible", False):
                        yield Asked(_text(one["question"]), answers, (text,), near)

    return _questions(path, found, "--squad", "SQuAD")


@lru_cache(maxsize=4)
def hotpotqa(path: Path) -> Questions:
    """A file of HotpotQA (arXiv 1809.09600) with distractors: ten paragraphs a question.

    Raises:
        UserError: it cannot be read, or is none.
    """

    def found(data: Any) -> Iterator[Asked]:
        for one in data:
            texts = {title: f"{title}\n{_text(''.join(said))}" for title, said in one["context"]}
            facts = {title for title, _ in one.get("supporting_facts", ())}
            needed = tuple(text for title, text in texts.items() if not facts or title in facts)
            near = tuple(text for text in texts.values() if text not in needed)
            yield Asked(_text(one["question"]), (_text(one["answer"]),), needed, near)

    return _questions(path, found, "--hotpotqa", "HotpotQA")


def _questions(path: Path, found: Any, flag: str, kind: str) -> Questions:
    try:
        data = json.loads(read_text(path))
        asked = tuple(found(data))
    except ValueError as error:
        raise UserError(f"{flag} {path} is not JSON: {error}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{flag} {path} is no {kind} file: {type(error).__name__} {error}; see --help"
        ) from error
    if not asked:
        raise UserError(f"{flag} {path} has no question that can be answered")
    every = dict.fromkeys(text for one in asked for text in (*one.needed, *one.near))
    return Questions(f"{flag} {path}", asked, tuple(every))


def _text(value: Any) -> str:
    """A text in one line.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return " ".join(value.split())
