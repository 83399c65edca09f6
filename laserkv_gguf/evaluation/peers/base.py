"""What a peer is: another way to have a model answer about a document in as little memory."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from laserkv_gguf.api import LaserKV
from laserkv_gguf.budget import as_fraction
from laserkv_gguf.conversation.conversation import Conversation
from laserkv_gguf.evaluation import measure
from laserkv_gguf.evaluation.samples import Sample, Tokens
from laserkv_gguf.evaluation.tasks import Task


@dataclass(frozen=True)
class Case:
    """A sample that a peer is to answer.

    Attributes:
        engine: configured with the policy `full`, without recall.
        predict: most tokens of the answer.
        ratio: of the sequence, so many tokens may be in the cache when the question comes.
        keep: the number itself, where that was given.
    """

    engine: LaserKV
    task: Task
    sample: Sample
    predict: int
    ratio: float
    keep: int | None = None

    @property
    def question(self) -> str | None:
        """What the document is read for; None where that is not known while it is read."""
        return measure.question(self.task, self.sample)

    def conversation(self) -> Conversation:
        """About the sample, with nothing read yet."""
        return measure.conversation(self.engine, self.task, self.sample, self.predict)

    @cached_property
    def sequence(self) -> Tokens:
        """All that a policy would read: template, instructions and document, int32."""
        return self.conversation().to_read(self.question)[0]

    @property
    def tokens(self) -> int:
        """How many may be in the cache: floor(r L) of the sequence's L, as for the policies."""
        if self.keep is not None:
            return min(self.keep, len(self.sequence))
        return max(1, math.floor(as_fraction(self.ratio) * len(self.sequence)))


class Peer(ABC):
    """Reads a document in its own way; the question is asked as it is of every policy."""

    name: ClassVar[str]

    def ratios(self, engine: LaserKV, asked: Sequence[float]) -> list[float]:
        """What it runs at where these ratios are asked for."""
        return list(asked)

    @abstractmethod
    def check(self, case: Case) -> None:
        """Refuses what `read` would refuse, without reading.

        Raises:
            UserError: with the remedy in one line.
        """

    @abstractmethod
    def read(self, case: Case) -> Conversation:
        """A conversation whose cache holds what this peer keeps of the document.

        Raises:
            UserError: it has nothing to offer for this sample.
            LaserKVError, Cancelled: as when any document is read.
        """

    def close(self) -> None:  # noqa: B027 - most have nothing to free
        """Frees what it made for itself."""
