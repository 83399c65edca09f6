"""`cwe`: RULER's common words extraction (arXiv 2404.06654).

Ten words stand 30 times each in a numbered list, all others three times. Where a list is too short
for that, the ten stand less often, at least five times, and the others once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from laserkv_gguf.errors import UserError
from laserkv_gguf.evaluation import words
from laserkv_gguf.evaluation.lengths import fit
from laserkv_gguf.evaluation.samples import Sample, Source
from laserkv_gguf.evaluation.tasks.base import Task, all_named

COMMON, OFTEN, LEAST, SELDOM = 10, 30, 5, 3
TELL = (
    "Below is a numbered list of words. Some of them stand there more often than others; "
    "remember those that stand there most often."
)
QUESTION = "Which 10 words stand most often in the list above?"
PREFIX = "The 10 words that stand most often in the list are:"


@dataclass(frozen=True)
class Cwe(Task):
    """The ten words must be named. One worked example comes first, as in RULER."""

    name: str = "cwe"
    max_tokens: int = 120

    def sample(self, source: Source, tokens: int, number: int) -> Sample:
        random = source.random(self.name, tokens, number)
        vocabulary, example = _vocabulary(random, tokens), _vocabulary(random, 0)
        seed = random.getrandbits(64)
        fewest = 2 * COMMON * LEAST
        cost = source.count(_list(vocabulary, 2 * fewest, seed)) / (2 * fewest)
        if tokens < cost * fewest:
            raise UserError(
                f"cwe needs a list of at least {round(cost * fewest)} tokens, not {tokens}; "
                "use larger --lengths"
            )
        text, ids = fit(
            source,
            lambda count: _list(vocabulary, count, seed),
            tokens,
            round(tokens / cost),
            SELDOM * len(vocabulary),
            cost,
        )
        shown = _list(example, fewest, seed)
        return Sample(
            self.name,
            number,
            text,
            ids,
            QUESTION,
            tuple(vocabulary[:COMMON]),
            " " + _numbered(vocabulary[:COMMON]),
            prefix=PREFIX,
            before=f"{TELL}\n\n{shown}\n\n{QUESTION} {PREFIX} {_numbered(example[:COMMON])}\n\n"
            f"{TELL}\n\n",
        )

    def score(self, sample: Sample, prediction: str) -> float:
        return all_named(sample.golds, prediction)


def _vocabulary(random: Random, tokens: int) -> list[str]:
    """Words in random order, the common ones first; enough for a list of so many tokens."""
    simple = [*words.ADJECTIVES, *words.NOUNS]
    random.shuffle(simple)
    pairs = len(words.ADJECTIVES) * len(words.NOUNS)
    # an entry is a number, a point and a word: no tokenizer makes less than two tokens of it
    drawn = random.sample(range(pairs), min(pairs, tokens // (2 * SELDOM)))
    for number in drawn:
        adjective, noun = divmod(number, len(words.NOUNS))
        simple.append(f"{words.ADJECTIVES[adjective]}-{words.NOUNS[noun]}")
    return simple


def _list(vocabulary: Sequence[str], count: int, seed: int) -> str:
    """A list of `count` entries."""
    often = min(OFTEN, max(LEAST, count // (2 * COMMON)))
    seldom = SELDOM if often > 2 * SELDOM else 1
    rest = max(0, count - COMMON * often)
    others = vocabulary[COMMON : COMMON + -(-rest // seldom)]
    entries = [*vocabulary[:COMMON]] * often + ([*others] * seldom)[:rest]
    Random(f"cwe/{seed}").shuffle(entries)
    return _numbered(entries)


def _numbered(entries: Sequence[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(entries, 1))
