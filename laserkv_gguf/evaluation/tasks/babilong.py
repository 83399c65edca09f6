"""`babilong_qa1` … `babilong_qa10`: bAbI's facts among the sentences of books (arXiv 2406.10149).

Structure of the prompt, construction and scoring are the published ones; the instructions are
worded by us (`prompts.py`), --prompts takes the published ones.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from laserkv_gguf.errors import UserError
from laserkv_gguf.evaluation.background import read_text
from laserkv_gguf.evaluation.lengths import interspersed, stretch
from laserkv_gguf.evaluation.samples import Sample, Source
from laserkv_gguf.evaluation.tasks import babi, prompts
from laserkv_gguf.evaluation.tasks.base import Task

REPOSITORY = "RMT-team/babilong"
SHORTEST = 10  # tokens of a background sentence, the published construction's

_PLACES = frozenset({"bathroom", "bedroom", "garden", "hallway", "kitchen", "office"})
LABELS = {
    **{f"qa{number}": _PLACES for number in (1, 2, 3, 4)},
    "qa5": frozenset({"bill", "fred", "jeff", "mary", "apple", "football", "milk"}),
    "qa6": frozenset({"yes", "no"}),
    "qa7": frozenset({"none", "one", "two", "three"}),
    "qa8": frozenset({"apple", "football", "milk", "nothing"}),
    "qa9": frozenset({"yes", "no"}),
    "qa10": frozenset({"yes", "no", "maybe"}),
}


@dataclass(frozen=True)
class Babilong(Task):
    """One of bAbI's first ten tasks, `kind` "qa1" to "qa10"."""

    kind: str = "qa1"

    def sample(self, source: Source, tokens: int, number: int) -> Sample:
        if source.babi is None:
            row = published(self.kind, tokens, number)
            text, question, gold = row["input"], row["question"], row["target"]
            ids = source.tokenizer.tokenize(text)
        else:
            random = source.random(self.name, tokens, number)
            told = fitting(source, babi.stories(source.babi, self.kind), tokens)
            story = told[random.randrange(len(told))]
            question, gold = story.question, story.answer
            room = tokens - sum(source.count(" " + fact) for fact in story.facts)
            sentences, counts = stretch(source, random, max(room, 1), least=SHORTEST)
            text, ids = interspersed(source, sentences, story.facts, random, tokens, counts=counts)
        parts = {**prompts.PROMPTS[self.kind], **source.prompts.get(self.kind, {})}
        return Sample(
            self.name,
            number,
            text,
            ids,
            f"Question: {question}",
            tuple(part.strip() for part in gold.split(",")),
            prompts.answer(self.kind, question, gold),
            before="{instruction}\n\n{examples}\n\n{post_prompt}\n\n<context>\n".format(**parts),
            after="\n</context>",
        )

    def score(self, sample: Sample, prediction: str) -> float:
        return float(is_right(self.kind, sample.golds, sample.question, prediction))


def fitting(source: Source, told: tuple[babi.Story, ...], tokens: int) -> list[babi.Story]:
    """The stories that leave a quarter of the text to the background.

    Raises:
        UserError: there is none.
    """
    most = 0.75 * tokens
    found = [
        story for story in told if sum(source.count(" " + fact) for fact in story.facts) <= most
    ]
    if not found:
        raise UserError(f"no story of this task fits {tokens} tokens; use larger --lengths")
    return found


def is_right(kind: str, golds: tuple[str, ...], question: str, prediction: str) -> bool:
    """The published rule: the first sentence names the gold label and no other.

    Labels that the question names do not count. Where qa8 has two golds, both must be named. A
    label counts wherever its letters stand: "none" names "one" as well, so that no answer is right
    where qa7's gold is "none". That is how the published scores were counted.
    """
    said = prediction.lower().split(".")[0]
    for mark in ("<context>", "<example>"):
        said = said.split(mark)[0]
    asked = question.lower()
    named = {label for label in LABELS[kind] if label in said and label not in asked}
    return named == {gold.lower() for gold in golds}


@lru_cache(maxsize=16)
def _rows(kind: str, size: str) -> list[dict[str, Any]]:
    """The published samples of a task and a length, fetched once and cached by huggingface_hub."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    name = f"data/{kind}/{size}.json"
    try:
        try:
            path = hf_hub_download(REPOSITORY, name, repo_type="dataset", local_files_only=True)
        except LocalEntryNotFoundError:
            path = hf_hub_download(REPOSITORY, name, repo_type="dataset")
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"cannot fetch {name} of {REPOSITORY}, and it is not cached; "
            "connect to the internet once, or use --babi DIR --background DIR"
        ) from error
    except EntryNotFoundError as error:
        raise UserError(
            f"{REPOSITORY} has no {name}; use --lengths such as 4096 or 16384, "
            "or --babi DIR --background DIR for any length"
        ) from error
    except Exception as error:  # whatever else a network can do
        raise UserError(
            f"cannot fetch {name} of {REPOSITORY}: {str(error).splitlines()[0]}; "
            "or use --babi DIR --background DIR"
        ) from error
    text = read_text(Path(path))
    try:
        rows = json.loads(text) if text.lstrip().startswith("[") else _lines(text)
    except ValueError as error:
        raise UserError(f"{path} is broken: {error}; delete it to have it fetched again") from error
    wanted = {"input", "question", "target"}
    if not rows or not all(isinstance(row, dict) and wanted <= row.keys() for row in rows):
        raise UserError(f"{path} is broken: no rows of {', '.join(sorted(wanted))}; delete it")
    return list(rows)


def _lines(text: str) -> list[Any]:
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def published(kind: str, tokens: int, number: int) -> dict[str, Any]:
    """A row of the published data.

    Raises:
        UserError: it has none of that length or number, or it cannot be had.
    """
    if tokens % 1024:
        raise UserError(
            f"the published BABILong has no texts of {tokens} tokens; use --lengths such as 4096 "
            "or 16384, or --babi DIR --background DIR for any length"
        )
    rows = _rows(kind, f"{tokens // 1024}k")
    if number >= len(rows):
        raise UserError(
            f"the published BABILong has {len(rows)} samples of {kind}; use --samples {len(rows)}"
        )
    return {
        key: re.sub(r"\s+$", "", str(rows[number][key])) for key in ("input", "question", "target")
    }


TOKENS = 20  # the published evaluation's for an answer

BABILONG = tuple(Babilong(f"babilong_{kind}", TOKENS, kind) for kind in LABELS)
