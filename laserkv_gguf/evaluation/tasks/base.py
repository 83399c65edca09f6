"""What a task is: it makes samples and scores answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from laserkv_gguf.evaluation.samples import Sample, Source


@dataclass(frozen=True)
class Task(ABC):
    """One task.

    Attributes:
        name: as results name it.
        max_tokens: of an answer.
    """

    name: str
    max_tokens: int

    @abstractmethod
    def sample(self, source: Source, tokens: int, number: int) -> Sample:
        """The sample of that number, whatever others were made before.

        Args:
            tokens: of the document.

        Raises:
            UserError: it cannot be made: data that is missing or broken, background too short.
        """

    @abstractmethod
    def score(self, sample: Sample, prediction: str) -> float:
        """From 0 to 1; 1 is an exact match.

        Args:
            prediction: what the model said after `sample.prefix`.
        """

    def beside(self, sample: Sample, prediction: str) -> dict[str, float]:
        """Other measures of an answer, by name, for its row."""
        return {}


def all_named(golds: Sequence[str], prediction: str) -> float:
    """RULER's string match: the share of the golds that the answer contains, in any case."""
    said = prediction.lower()
    return sum(gold.lower() in said for gold in golds) / len(golds)


def listed(items: Sequence[str]) -> str:
    """`a, b and c`."""
    if len(items) == 1:
        return items[0]
    return f"{', '.join(items[:-1])} and {items[-1]}"
