"""`fwe`: RULER's frequent words extraction (arXiv 2404.06654).

Coded words whose frequencies fall as 1/k², the most frequent one a row of dots that must be
overlooked; the next three are asked for.
"""

from __future__ import annotations

import math
import string
from dataclasses import dataclass
from random import Random

from laserkv_gguf.evaluation.lengths import fit
from laserkv_gguf.evaluation.samples import Sample, Source
from laserkv_gguf.evaluation.tasks.base import Task, all_named

DOTS, LETTERS, TOKENS_A_WORD = "...", 6, 50
ZETA = math.pi**2 / 6  # of 2
TELL = (
    "The following text is made of coded words. Count how often each of them stands there; "
    "the three most frequent ones will be asked for.\n\n"
)
QUESTION = (
    "Which three coded words stand most often in the text above? The dots are no word. "
    "Give no explanation."
)


@dataclass(frozen=True)
class Fwe(Task):
    """The three words must be named."""

    name: str = "fwe"
    max_tokens: int = 50

    def sample(self, source: Source, tokens: int, number: int) -> Sample:
        random = source.random(self.name, tokens, number)
        words = [DOTS]
        while len(words) < max(tokens // TOKENS_A_WORD, 4):
            word = "".join(random.choice(string.ascii_lowercase) for _ in range(LETTERS))
            if word not in words:
                words.append(word)
        seed = random.getrandbits(64)

        def compose(count: int) -> str:
            stands = [word for k, word in enumerate(words, 1) for _ in range(_times(count, k))]
            Random(f"fwe/{seed}").shuffle(stands)
            return " ".join(stands)

        cost = source.count(compose(tokens)) / tokens
        text, ids = fit(source, compose, tokens, round(tokens / cost), 2 * tokens, cost)
        golds = tuple(words[1:4])
        return Sample(
            self.name,
            number,
            text,
            ids,
            QUESTION,
            golds,
            " " + ", ".join(golds),
            prefix="The three coded words that stand most often in the text are:",
            before=TELL,
        )

    def score(self, sample: Sample, prediction: str) -> float:
        return all_named(sample.golds, prediction)


def _times(count: int, k: int) -> int:
    """How often the word of rank k stands among `count`."""
    return int(count / (ZETA * k * k))
