"""`squad`, `qa_1` and `qa_2`: questions people wrote, and paragraphs that answer them among others.

`squad` hides one paragraph of SQuAD or XQuAD among others of the file, drawn at random. `qa_1` and
`qa_2` are RULER's (arXiv 2404.06654) with SQuAD and HotpotQA: numbered documents in random order,
at first those of the same article, or those that HotpotQA itself gives as distractors.

The score is whether the answer holds a right one; beside it stands F1, as SQuAD counts it.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random

from laserkv_gguf.errors import UserError
from laserkv_gguf.evaluation.lengths import MARGIN, interspersed
from laserkv_gguf.evaluation.samples import Sample, Source
from laserkv_gguf.evaluation.tasks.base import Task
from laserkv_gguf.evaluation.tasks.questions import Asked, Questions, hotpotqa, squad

TOKENS = 32  # RULER's for an answer
MOST = 0.75  # of the document, for the paragraphs that must be in it
SOURCES = {
    "squad": "SQuAD's dev-v1.1.json or dev-v2.0.json, or xquad.en.json",
    "hotpotqa": "hotpot_dev_distractor_v1.json",
}


@dataclass(frozen=True)
class Answering(Task):
    """Questions from a file.

    Attributes:
        data: "squad" or "hotpotqa".
        numbered: paragraphs are documents with numbers, and near ones come first, as in RULER.
    """

    max_tokens: int = TOKENS
    data: str = "squad"
    numbered: bool = False

    def sample(self, source: Source, tokens: int, number: int) -> Sample:
        known = self._known(source)
        asked = self._asked(source, known, tokens, number)
        random = source.random(self.name, tokens, number)
        text, ids = interspersed(
            source,
            self._others(source, known, asked, random, tokens),
            random.sample(asked.needed, len(asked.needed)),
            random,
            tokens,
            join="\n\n",
            form=numbered if self.numbered else None,
        )
        what = "documents" if self.numbered else "text"
        return Sample(
            self.name,
            number,
            text,
            ids,
            f"Answer with a few words of the {what} above, and write nothing else.\n\n"
            f"Question: {asked.question}",
            asked.answers,
            " " + asked.answers[0],
            prefix="Answer:",
            before=f"Read the following {what}; a question will be asked about a part.\n\n",
        )

    def score(self, sample: Sample, prediction: str) -> float:
        return contains(sample.golds, prediction)

    def beside(self, sample: Sample, prediction: str) -> dict[str, float]:
        return {"f1": f1(sample.golds, prediction)}

    def _known(self, source: Source) -> Questions:
        path = source.squad if self.data == "squad" else source.hotpotqa
        if path is None:
            raise UserError(
                f"{self.name} asks what a file has; name it with --{self.data} FILE "
                f"({SOURCES[self.data]})"
            )
        return squad(path) if self.data == "squad" else hotpotqa(path)

    def _asked(self, source: Source, known: Questions, tokens: int, number: int) -> Asked:
        """A question of its own for every number, the same at every length where it fits."""
        order = _order(self.name, source.seed, len(known.asked))
        for index in range(len(order)):
            asked = known.asked[order[(number + index) % len(order)]]
            needed = sum(source.count("\n\n" + text) for text in asked.needed)
            if needed <= MOST * tokens:
                return asked
        raise UserError(
            f"{tokens} tokens have no room for any paragraph of {known.name}; use larger --lengths"
        )

    def _others(
        self, source: Source, known: Questions, asked: Asked, random: Random, tokens: int
    ) -> list[str]:
        """Paragraphs for so many tokens, those that mislead most surely among them.

        Raises:
            UserError: the file has too few.
        """
        first = asked.near if self.numbered else ()
        out = {*asked.needed, *first}
        rest = [text for text in known.paragraphs if text not in out]
        room = tokens - sum(source.count("\n\n" + text) for text in asked.needed)
        made, size, whole = [], 0, 0
        for text in (*random.sample(first, len(first)), *random.sample(rest, len(rest))):
            made.append(text)
            size += source.count("\n\n" + text)
            whole += size <= room
            if size > MARGIN * tokens:
                break
        if size < room:
            raise UserError(
                f"{known.name} has paragraphs of about {size} tokens beside a question's own, not "
                f"{room}; use smaller --lengths, or a larger file"
            )
        # what is there for sure, in random order
        return [*random.sample(made[:whole], whole), *made[whole:]]


@lru_cache(maxsize=8)
def _order(name: str, seed: int, count: int) -> tuple[int, ...]:
    return tuple(Random(f"{name}/{seed}").sample(range(count), count))


def numbered(paragraphs: Sequence[str]) -> str:
    """Documents with their numbers above them."""
    return "\n\n".join(f"Document {number}:\n{text}" for number, text in enumerate(paragraphs, 1))


# scores, as SQuAD's evaluation counts


def normalised(text: str) -> list[str]:
    """Lower-case words without punctuation and articles."""
    lower = "".join(char for char in text.lower() if char not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", lower).split()


def contains(golds: Sequence[str], prediction: str) -> float:
    """1 where the words of a right answer stand in a row, else 0."""
    said = f" {' '.join(normalised(prediction))} "
    wanted = (" ".join(normalised(gold)) for gold in golds)
    return float(any(f" {words} " in said for words in wanted if words))


def f1(golds: Sequence[str], prediction: str) -> float:
    """Harmonic mean of precision and recall in words; of the right answer that is nearest."""
    said = Counter(normalised(prediction))
    return max(_f1(Counter(normalised(gold)), said) for gold in golds)


def _f1(gold: Counter[str], said: Counter[str]) -> float:
    both = (gold & said).total()
    return 2 * both / (gold.total() + said.total()) if both else 0.0


QA = (
    Answering("squad"),
    Answering("qa_1", numbered=True),
    Answering("qa_2", data="hotpotqa", numbered=True),
)
