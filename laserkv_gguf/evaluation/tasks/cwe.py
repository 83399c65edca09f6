"""`cwe`: RULER's common words extraction (arXiv 2404.06654).

Ten words stand 30 times each in a numbered list, all others three times; in lists of less than
4,096 tokens six times and once. All words of a list have one form: plain words where there are
enough of them for its length, else pairs of an adjective and a noun, the common ones too. A common
word is known by its number only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from laserkv_gguf.errors import UserError
from laserkv_gguf.evaluation import words
from laserkv_gguf.evaluation.lengths import MARGIN, fit
from laserkv_gguf.evaluation.samples import Sample, Source
from laserkv_gguf.evaluation.tasks.base import Task, all_named

COMMON = 10
LONG = 4096  # tokens
TELL = (
    "Below is a numbered list of words. Some of them stand there more often than others; "
    "remember those that stand there most often."
)
QUESTION = "Which 10 words stand most often in the list above?"
PREFIX = "The 10 words that stand most often in the list are:"


@dataclass(frozen=True)
class Shape:
    """How often words stand in a list: a common one `often` times, another `seldom` times.

    Attributes:
        example: the same of the worked example, and how many other words that has.
    """

    often: int
    seldom: int
    example: tuple[int, int, int]

    @property
    def least(self) -> int:
        """Entries of the shortest list that is worth asking about."""
        return COMMON * self.often * 3 // 2


# RULER's numbers; its examples have 40 and 190 entries
SHORT_LIST = Shape(6, 1, (3, 1, 10))
LONG_LIST = Shape(30, 3, (10, 3, 30))


@dataclass(frozen=True)
class Cwe(Task):
    """The ten words must be named. One worked example comes first, as in RULER."""

    name: str = "cwe"
    max_tokens: int = 120

    def sample(self, source: Source, tokens: int, number: int) -> Sample:
        random = source.random(self.name, tokens, number)
        seed = random.getrandbits(64)
        plain = _plain(random)
        shape = LONG_LIST if tokens >= LONG else SHORT_LIST
        vocabulary, cost = plain, _cost(source, plain, shape, seed)
        if shape is LONG_LIST and tokens < cost * shape.least:  # of very many tokens each
            shape, cost = SHORT_LIST, _cost(source, plain, SHORT_LIST, seed)
        if tokens < cost * shape.least:
            raise UserError(
                f"cwe needs a list of at least {round(cost * shape.least)} tokens, not {tokens}; "
                "use larger --lengths"
            )
        if MARGIN * tokens / cost > _most(plain, shape):
            # an entry is a number, a point and a word: no tokenizer makes less than two of it
            vocabulary = _pairs(random, COMMON + 30 + tokens // (2 * shape.seldom))
            cost = _cost(source, vocabulary, shape, seed)
        often, seldom, others = shape.example
        # of the same form, and none of the list's common words
        example = random.sample(vocabulary[COMMON:], COMMON + others)
        text, ids = fit(
            source,
            lambda count: _list(vocabulary, count, shape.often, shape.seldom, seed),
            tokens,
            round(tokens / cost),
            _most(vocabulary, shape),
            cost,
        )
        shown = _list(example, COMMON * often + others * seldom, often, seldom, seed)
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


def _plain(random: Random) -> list[str]:
    """The words in random order, the common ones first."""
    plain = [*words.ADJECTIVES, *words.NOUNS]
    random.shuffle(plain)
    return plain


def _pairs(random: Random, count: int) -> list[str]:
    """So many pairs in random order, or all there are."""
    pairs = len(words.ADJECTIVES) * len(words.NOUNS)
    made = []
    for number in random.sample(range(pairs), min(pairs, count)):
        adjective, noun = divmod(number, len(words.NOUNS))
        made.append(f"{words.ADJECTIVES[adjective]}-{words.NOUNS[noun]}")
    return made


def _most(vocabulary: Sequence[str], shape: Shape) -> int:
    """Entries of the longest list that can be made."""
    return COMMON * shape.often + (len(vocabulary) - COMMON) * shape.seldom


def _cost(source: Source, vocabulary: Sequence[str], shape: Shape, seed: int) -> float:
    """Tokens of an entry."""
    count = 2 * COMMON * shape.often
    return source.count(_list(vocabulary, count, shape.often, shape.seldom, seed)) / count


def _list(vocabulary: Sequence[str], count: int, often: int, seldom: int, seed: int) -> str:
    """A list of `count` entries; the last of the other words may stand less than `seldom` times."""
    rest = max(0, count - COMMON * often)
    others = vocabulary[COMMON : COMMON + -(-rest // seldom)]
    entries = [*vocabulary[:COMMON]] * often + ([*others] * seldom)[:rest]
    Random(f"cwe/{seed}").shuffle(entries)
    return _numbered(entries)


def _numbered(entries: Sequence[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(entries, 1))
