"""What a task asks, and what samples are made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from random import Random
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from laserkv_gguf.evaluation.background import Background, Prompts

Tokens = NDArray[np.int32]


class Tokenizer(Protocol):
    """What samples need of a model."""

    def tokenize(self, text: str) -> Tokens: ...

    def text(self, tokens: Tokens) -> str: ...


@dataclass(frozen=True)
class Sample:
    """A document, what to ask of it, and what the answer must be.

    Attributes:
        task: the task's name.
        number: of the sample, from 0.
        document: what is read, less `before` and `after`.
        tokens: the document's, int32; as many as were asked for, unless the data is published.
        question: asked after reading.
        golds: what the answer must name.
        answer: an answer in the form the question wants; its log-likelihood is measured.
        prefix: how the answer begins; the model goes on from there.
        before, after: instructions around the document; read, but not counted in its length.
        following: tokens of the text after the document, for `fidelity`.
    """

    task: str
    number: int
    document: str
    tokens: Tokens = field(repr=False, compare=False)
    question: str
    golds: tuple[str, ...]
    answer: str
    prefix: str = ""
    before: str = ""
    after: str = ""
    following: Tokens | None = field(default=None, repr=False, compare=False)


class Source:
    """What samples are made of. One tokenizer and one seed give one set of samples, anywhere.

    Args:
        tokenizer: of the model.
        seed: of everything random in the samples.
        background: text that hides what is asked for.
        babi: folder of bAbI files; None for the published BABILong.
        prompts: BABILong's instructions in other words than ours, by task.
        squad, hotpotqa: files of questions, for `squad`, `qa_1` and `qa_2`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        seed: int,
        background: Background,
        babi: Path | None = None,
        prompts: Prompts | None = None,
        squad: Path | None = None,
        hotpotqa: Path | None = None,
    ) -> None:
        self.tokenizer, self.seed, self.background = tokenizer, seed, background
        self.babi, self.prompts = babi, prompts or {}
        self.squad, self.hotpotqa = squad, hotpotqa
        self.count = cache(self._count)
        self._counts: dict[str, NDArray[np.int64]] = {}

    def _count(self, text: str) -> int:
        return len(self.tokenizer.tokenize(text))

    def sentence_tokens(self) -> NDArray[np.int64]:
        """Tokens of every sentence of the background with a blank in front."""
        if "background" not in self._counts:
            sentences = self.background.sentences
            counts = [self._count(" " + sentence) for sentence in sentences]
            self._counts["background"] = np.array(counts, np.int64)
        return self._counts["background"]

    def random(self, task: str, tokens: int, number: int) -> Random:
        """Seeded by a text: the same on every machine and in every Python."""
        return Random(f"{task}/{tokens}/{self.seed}/{number}")
