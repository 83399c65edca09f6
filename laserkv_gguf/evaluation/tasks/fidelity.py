"""`fidelity`: how far the model's own predictions move; for any text and any model.

A stretch of the background is read as it is, without a chat template and without a question. Then
the text goes on: its next token is given, and of the 64 after it the model's predictions are
compared with what the full cache predicts. At last a fixed question is asked, which the full cache
answers greedily, and that answer's log-likelihood is measured under the compressed cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from laserkv_gguf.evaluation.lengths import stretch, too_short
from laserkv_gguf.evaluation.samples import Sample, Source
from laserkv_gguf.evaluation.tasks.base import Task

QUESTION = "\n\nSummary: The text is about"


@dataclass(frozen=True)
class Fidelity(Task):
    """The score is the share of places where both caches hold the same token likeliest.

    Attributes:
        max_tokens: of the full cache's answer.
        following: tokens of the continuation that are predicted.
    """

    name: str = "fidelity"
    max_tokens: int = 32
    following: int = 64

    def sample(self, source: Source, tokens: int, number: int) -> Sample:
        random = source.random(self.name, tokens, number)
        needed = tokens + 1 + self.following
        sentences, _ = stretch(source, random, needed)
        ids = source.tokenizer.tokenize(" ".join(sentences))
        if len(ids) < needed:
            raise too_short(source, needed, len(ids))
        document = ids[:tokens]
        return Sample(
            self.name,
            number,
            source.tokenizer.text(document),
            document,
            QUESTION,
            (),
            "",
            following=ids[tokens:needed],
        )

    def score(self, sample: Sample, prediction: str) -> float:
        """There is nothing to be right about."""
        return 0.0


def divergence(reference: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """Mean KL divergence (nats) from one set of predictions to another.

    Args:
        reference, other: (places, vocab) log-probabilities.
    """
    wide = reference.astype(np.float64)
    return float((np.exp(wide) * (wide - other)).sum(axis=1).mean())


def agreement(reference: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """Share of places where both hold the same token likeliest."""
    return float((reference.argmax(axis=1) == other.argmax(axis=1)).mean())


def mean_of(rows: NDArray[np.float32], tokens: NDArray[np.int32]) -> float:
    """Mean log-probability (nats) of the tokens that did follow."""
    return float(rows[np.arange(len(tokens)), tokens].mean(dtype=np.float64))
