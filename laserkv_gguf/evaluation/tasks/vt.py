"""`vt`: RULER's variable tracking (arXiv 2404.06654): one chain of four hops in noise."""

from __future__ import annotations

import string
from dataclasses import dataclass
from random import Random

from laserkv_gguf.evaluation.lengths import interspersed
from laserkv_gguf.evaluation.samples import Sample, Source
from laserkv_gguf.evaluation.tasks.base import Task, all_named
from laserkv_gguf.evaluation.tasks.niah import NOISE, noise

TELL = "The following text assigns values to variables, some by way of others. Keep track of them."


@dataclass(frozen=True)
class VariableTracking(Task):
    """All variables that hold a value must be named. One worked example comes first, as in RULER.

    Attributes:
        hops: assignments of one variable to the next.
    """

    name: str = "vt"
    max_tokens: int = 30
    hops: int = 4

    def sample(self, source: Source, tokens: int, number: int) -> Sample:
        random = source.random(self.name, tokens, number)
        lines, names, value = self._chain(random, 5)
        text, ids = interspersed(source, noise(source, tokens), lines, random, tokens, join="\n")
        question, prefix = self._asked(value)
        return Sample(
            self.name,
            number,
            text,
            ids,
            question,
            tuple(names),
            " " + ", ".join(names),
            prefix=prefix,
            before=self._example(random),
        )

    def score(self, sample: Sample, prediction: str) -> float:
        return all_named(sample.golds, prediction)

    def _chain(self, random: Random, letters: int) -> tuple[list[str], list[str], str]:
        """The assignments, the variables, and the value."""
        names: list[str] = []
        while len(names) <= self.hops:
            name = "".join(random.choice(string.ascii_uppercase) for _ in range(letters))
            if name not in names:
                names.append(name)
        value = str(random.randrange(10000, 100000))
        given = [value, *(f"VAR {name}" for name in names[:-1])]
        lines = [f"VAR {name} = {what}" for name, what in zip(names, given, strict=True)]
        return lines, names, value

    def _asked(self, value: str) -> tuple[str, str]:
        return (
            f"Which variables hold the value {value} in the text above?",
            f"The value {value} is held by {self.hops + 1} variables, which are:",
        )

    def _example(self, random: Random) -> str:
        lines, names, value = self._chain(random, 3)
        text = "\n".join(
            line for pair in zip([NOISE] * len(lines), lines, strict=True) for line in pair
        )
        question, prefix = self._asked(value)
        return f"{TELL}\n\n{text}\n{question} {prefix} {', '.join(names)}\n\n{TELL}\n\n"
