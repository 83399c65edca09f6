"""`niah_…`: RULER's needles in a haystack (arXiv 2404.06654).

Kinds, haystacks, numbers of needles and scoring are RULER's; the wording and the word lists are
ours, and the length is the document's alone, without instruction, question and answer. The essays
that RULER hides needles in are here the sentences of --background.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from random import Random

from laserkv_gguf.evaluation import words
from laserkv_gguf.evaluation.lengths import MARGIN, interspersed, stretch
from laserkv_gguf.evaluation.samples import Sample, Source
from laserkv_gguf.evaluation.tasks.base import Task, all_named, listed

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


def noise(source: Source, tokens: int) -> list[str]:
    """The passage as often as so many tokens need."""
    return [NOISE] * (round(MARGIN * tokens) // max(source.count("\n" + NOISE), 1) + 2)


@dataclass(frozen=True)
class Needles(Task):
    """Needles `key: value`, of which some are asked for.

    Attributes:
        haystack: "noise" (one passage repeated), "text" (of the background), or "needles" (others
            of the same kind).
        key, value: "word", "number" or "uuid".
        keys, values, queries: how many keys, values a key, and keys asked for.
    """

    haystack: str = "text"
    key: str = "word"
    value: str = "number"
    keys: int = 1
    values: int = 1
    queries: int = 1

    def sample(self, source: Source, tokens: int, number: int) -> Sample:
        random = source.random(self.name, tokens, number)
        values: dict[str, list[str]] = {}
        taken: set[str] = set()  # keys and values that stand in the text
        for _ in range(self.keys):
            values[self._other(random, self.key, taken)] = self._values(random, taken)
        needles = [self._needle(key, value) for key in values for value in values[key]]
        random.shuffle(needles)
        asked = random.sample(list(values), self.queries)
        golds = tuple(value for key in asked for value in values[key])
        if self.haystack == "text":
            room = tokens - sum(source.count(" " + needle) for needle in needles)
            sentences, counts = stretch(source, random, max(room, 1))
            text, ids = interspersed(source, sentences, needles, random, tokens, counts=counts)
        else:
            sentences = self._others(source, random, tokens, taken)
            text, ids = interspersed(source, sentences, needles, random, tokens, join="\n")
        plural = "s" if len(golds) > 1 else ""
        what = f"special magic {self.value}{plural} for {listed(asked)}"
        are, the_text = ("are", "mentions") if plural else ("is", "mentions")
        return Sample(
            self.name,
            number,
            text,
            ids,
            f"What {are} the {what} that the text {the_text}?",
            golds,
            " " + ", ".join(golds) + ".",
            prefix=f"The {what} that the text {the_text} {are}",
            before=f"Special magic {self.value}s are hidden in the following text. Remember them; "
            "you will be asked about them afterwards.\n\n",
        )

    def score(self, sample: Sample, prediction: str) -> float:
        return all_named(sample.golds, prediction)

    def _needle(self, key: str, value: str) -> str:
        article = "A" if self.values > 1 else "The"
        return f"{article} special magic {self.value} for {key} is {value}."

    def _values(self, random: Random, taken: set[str]) -> list[str]:
        return [self._other(random, self.value, taken) for _ in range(self.values)]

    def _others(
        self, source: Source, random: Random, tokens: int, taken: Iterable[str]
    ) -> list[str]:
        """The haystack's sentences: enough for so many tokens.

        Args:
            taken: keys and values that no needle of the haystack has, or the question would have
                more than one answer.
        """
        if self.haystack == "noise":
            return noise(source, tokens)
        made, size = [], 0
        while size <= MARGIN * tokens:
            key, value = (self._other(random, kind, set(taken)) for kind in (self.key, self.value))
            needle = self._needle(key, value)
            made.append(needle)
            size += len(source.tokenizer.tokenize("\n" + needle))
        return made

    def _other(self, random: Random, kind: str, taken: set[str]) -> str:
        """One that is not taken, which it is from now on."""
        made = self._new(random, kind)
        while made in taken:
            made = self._new(random, kind)
        taken.add(made)
        return made

    @staticmethod
    def _new(random: Random, kind: str) -> str:
        if kind == "word":
            return f"{random.choice(words.ADJECTIVES)}-{random.choice(words.NOUNS)}"
        if kind == "uuid":
            return str(uuid.UUID(int=random.getrandbits(128), version=4))
        return str(random.randrange(10**6, 10**7))


TOKENS = 128  # RULER's for an answer

NIAH = (
    Needles("niah_single_1", TOKENS, haystack="noise"),
    Needles("niah_single_2", TOKENS),
    Needles("niah_single_3", TOKENS, value="uuid"),
    Needles("niah_multikey_1", TOKENS, keys=4),
    Needles("niah_multikey_2", TOKENS, haystack="needles"),
    Needles("niah_multikey_3", TOKENS, haystack="needles", key="uuid", value="uuid"),
    Needles("niah_multivalue", TOKENS, values=4),
    Needles("niah_multiquery", TOKENS, keys=4, queries=4),
)
