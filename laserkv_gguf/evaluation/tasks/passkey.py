"""`passkey`: a key of 64 digits in noise, as LagKV (arXiv 2504.04704) measures it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from laserkv_gguf.evaluation.lengths import interspersed
from laserkv_gguf.evaluation.samples import Sample, Source
from laserkv_gguf.evaluation.tasks.base import Task
from laserkv_gguf.evaluation.tasks.niah import noise


@dataclass(frozen=True)
class Passkey(Task):
    """All digits must be said. The score is the share of them that is right before the first error.

    Attributes:
        digits: of the key.
    """

    name: str = "passkey"
    max_tokens: int = 80
    digits: int = 64

    def sample(self, source: Source, tokens: int, number: int) -> Sample:
        random = source.random(self.name, tokens, number)
        key = "".join(random.choice("0123456789") for _ in range(self.digits))
        hidden = [f"The pass key is {key}. Remember it."]
        text, ids = interspersed(source, noise(source, tokens), hidden, random, tokens, join="\n")
        return Sample(
            self.name,
            number,
            text,
            ids,
            "What is the pass key?",
            (key,),
            f" {key}",
            prefix="The pass key is",
            before="A pass key is hidden in a lot of text that does not matter. Find it and "
            "remember it; you will be asked for it.\n\n",
        )

    def score(self, sample: Sample, prediction: str) -> float:
        """Digits of the first number said, blanks between them left out, against the key's."""
        (key,) = sample.golds
        found = re.search(r"\d[\d\s]*", prediction)
        said = re.sub(r"\s", "", found.group()) if found else ""
        if said == key:
            return 1.0
        right = 0
        while right < min(len(said), len(key)) and said[right] == key[right]:
            right += 1
        # a key with digits after its end is not the key
        return min(right, len(key) - 1) / len(key)
