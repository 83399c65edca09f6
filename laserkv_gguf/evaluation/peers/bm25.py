"""`bm25`: the passages that share words with the question, in the prompt instead of all of it."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np

from laserkv_gguf.conversation.conversation import Conversation
from laserkv_gguf.errors import UserError
from laserkv_gguf.evaluation import measure
from laserkv_gguf.evaluation.peers.base import Case, Peer
from laserkv_gguf.evaluation.samples import Tokens

PASSAGE = 100  # tokens, about; less where the prompt has no room for four of them
MERGED = 2  # tokens that a passage may have less beside others than alone
_PARAGRAPH = re.compile(r"\n\s*\n\s*")
# where a text can be parted: after a line, or after a sentence
_PART = re.compile(r"(?<=\n)|(?<=[.!?])\s+|(?<=[.!?][\"'”’)\]])\s+")

Span = tuple[int, int]


class Bm25(Peer):
    """Retrieval with Okapi BM25 (the bm25s library) in place of reading.

    The document is parted into passages. Those that the question scores highest are taken as long
    as the whole prompt (template, instructions and passages) has no more tokens than a policy
    would keep; they stand in the order of the document, and only they are read, in full.
    """

    name: ClassVar[str] = "bm25"

    def check(self, case: Case) -> None:
        self._prompt(case)

    def read(self, case: Case) -> Conversation:
        sample = case.sample
        _, tokens = self._prompt(case)
        talk = measure.conversation(case.engine, case.task, sample, case.predict, tokens)
        talk.read(question=case.question)
        return talk

    def _prompt(self, case: Case) -> tuple[str, Tokens]:
        """The passages as one text, and its tokens.

        Raises:
            UserError: nothing is asked, nothing fits, or no word of the question is in the text.
        """
        sample, engine = case.sample, case.engine
        if case.question is None:
            raise UserError("bm25 has nothing to look for: no question is asked of this document")
        if not sample.document.strip():
            raise UserError("bm25 has nothing to retrieve: the document is empty")
        around = len(case.sequence) - len(sample.tokens)
        room = case.tokens - around
        if room < 1:
            raise UserError(
                f"bm25 has no room: {case.tokens} tokens are kept, and the instructions alone have "
                f"{around}; use a larger --ratio"
            )
        if room >= len(sample.tokens):
            return sample.document, sample.tokens

        def count(text: str) -> int:
            return len(engine.model.tokenize(text))

        found = passages(sample.document, min(PASSAGE, max(room // 4, 1)), count)
        scores = _scores([sample.document[start:end] for start, end in found], sample.question)
        if not (scores > 0).any():
            raise UserError(
                "bm25 has nothing to retrieve: no word of the question is in the document"
            )
        taken: list[Span] = []
        size = 0
        for index in np.argsort(-scores, kind="stable"):
            start, end = found[index]
            if scores[index] <= 0:
                break
            if count(sample.document[start:end]) > room - size + MERGED:
                continue
            more = sorted([*taken, (start, end)])
            together = count(joined(sample.document, more))
            if together <= room:
                taken, size = more, together
        if not taken:  # the best passage is one long sentence
            start, end = found[int(scores.argmax())]
            tokens = engine.model.tokenize(sample.document[start:end])[:room]
            return engine.model.text(tokens), tokens
        text = joined(sample.document, taken)
        return text, engine.model.tokenize(text)


def passages(text: str, most: int, count: Callable[[str], int]) -> list[Span]:
    """Paragraphs, longer ones parted at sentences or lines: where they start and end in the text.

    Args:
        most: tokens of a passage; a single sentence may have more.
        count: tokens of a text.
    """
    found: list[Span] = []
    for first, last in _between(text, _PARAGRAPH, 0, len(text)):
        if count(text[first:last]) <= most:
            found.append((first, last))
            continue
        begun: Span | None = None
        for start, end in _between(text, _PART, first, last):
            if begun and count(text[begun[0] : end]) <= most:
                begun = (begun[0], end)
                continue
            if begun:
                found.append(begun)
            begun = (start, end)
        if begun:
            found.append(begun)
    return found


def _between(text: str, separator: re.Pattern[str], first: int, last: int) -> list[Span]:
    """What stands between separators, less what is blank."""
    cuts = [(first, first), *((m.start(), m.end()) for m in separator.finditer(text, first, last))]
    spans = [(one[1], other[0]) for one, other in pairwise([*cuts, (last, last)])]
    return [(start, end) for start, end in spans if text[start:end].strip()]


def joined(text: str, spans: Sequence[Span]) -> str:
    """Passages in the order they are given; neighbours as they stand in the text."""
    parts: list[str] = []
    before = None
    for start, end in spans:
        if before is not None:
            between = text[before:start]
            parts.append(between if not between.strip() else "\n\n")
        parts.append(text[start:end])
        before = end
    return "".join(parts)


def _scores(texts: Sequence[str], question: str) -> Any:
    """BM25 of every passage for the question; 0 where they share no word.

    Raises:
        UserError: bm25s is not installed.
    """
    try:
        import bm25s
    except ImportError as error:
        raise UserError("bm25 needs bm25s; pip install 'laserkv-gguf[peers]'") from error
    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it asks for its own debug messages
    words = {"stopwords": "en", "show_progress": False, "return_ids": False}
    corpus, asked = bm25s.tokenize(list(texts), **words), bm25s.tokenize(question, **words)[0]
    known = {word for passage in corpus for word in passage}
    asked = [word for word in asked if word in known]
    if not asked:
        return np.zeros(len(texts), np.float32)
    index = bm25s.BM25()
    index.index(corpus, show_progress=False)
    return index.get_scores(asked)
