"""Ten questions on one text: what recall brings back, how well and how fast.

    python -m laserkv_gguf.evaluation.recall --book NOVEL.txt --out FILE.jsonl
        [--tokens 4096 8192] [--ratios 0.1 0.25] [--documents 4] [--questions 10]

Hides sentences with numbers in a stretch of the text and asks for each, as a first turn, of: the
full cache; laser compressed for the first question and asked all; laser read again for each; what a
question-free reading kept; recall by replay and by shortlist. Every row (document, question,
method) is one line of the file as soon as it is there; what the file has is not done again. Prints
a Markdown table: numbers found, the gold sentence's mean log-likelihood, seconds from the question
to the first token.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from laserkv_gguf import models
from laserkv_gguf.api import LaserKV
from laserkv_gguf.conversation.conversation import Conversation
from laserkv_gguf.errors import UserError
from laserkv_gguf.evaluation.background import Background
from laserkv_gguf.files.journal import Journal
from laserkv_gguf.llama.context import ContextOptions
from laserkv_gguf.llama.model import Model
from laserkv_gguf.llama.trial import extra_buffers_work

TOPICS = (
    "garden gate",
    "harbour master",
    "old library",
    "water mill",
    "church tower",
    "silver lamp",
    "north bridge",
    "post office",
    "red barn",
    "stone quarry",
)
FACT = "The secret number of the {topic} is {number}."
QUESTION = "What is the secret number of the {topic}?"

METHODS: dict[str, dict[str, Any]] = {
    "full": {"policy": "full", "recall": "off"},
    "first question": {"policy": "laser", "recall": "off"},
    "read again": {"policy": "laser", "recall": "off"},
    "no question": {"policy": "keydiff", "recall": "off"},
    "replay": {"policy": "laser", "recall": "ram", "recall_mode": "replay"},
    "replay after laser": {
        "policy": "laser",
        "recall": "ram",
        "recall_mode": "replay",
        "read_policy": "laser",
    },
    "shortlist": {"policy": "laser", "recall": "ram", "recall_mode": "shortlist"},
}


@dataclass(frozen=True)
class Document:
    """A stretch of the novel with facts in it."""

    text: str
    numbers: dict[str, str]


def documents(
    model: Model, book: str, tokens: int, count: int, questions: int, seed: int
) -> Iterator[Document]:
    """Stretches of about `tokens` tokens, the facts spread over all of each."""
    paragraphs = [p.strip() for p in re.split(r"\n\s*\n", book) if p.strip()]
    lengths = [len(model.tokenize(p + "\n\n")) for p in paragraphs]
    for index in range(count):
        random = Random(f"{seed}/{index}")
        topics = random.sample(TOPICS, questions)
        numbers = {topic: str(random.randrange(1_000_000, 10_000_000)) for topic in topics}
        facts = [FACT.format(topic=topic, number=number) for topic, number in numbers.items()]
        room = tokens - sum(len(model.tokenize(fact + "\n\n")) for fact in facts)
        start = end = random.randrange(len(paragraphs) // 2)
        while end < len(paragraphs) and room >= lengths[end]:
            room -= lengths[end]
            end += 1
        parts = paragraphs[start:end]
        places = sorted(
            (
                round((place + random.random()) * len(parts) / questions)
                for place in range(questions)
            ),
            reverse=True,
        )
        for place, fact in zip(places, facts, strict=True):
            parts.insert(place, fact)
        yield Document("\n\n".join(parts), numbers)


def ask_all(options: argparse.Namespace, model: Model, journal: Journal) -> None:
    """Runs what the journal does not have yet."""
    done = {identity(row) for row in journal.entries}
    book = Background.load(options.book).text
    for tokens in options.tokens:
        texts = list(
            documents(model, book, tokens, options.documents, options.questions, options.seed)
        )
        for ratio in options.ratios:
            for method in options.only or METHODS:
                try:
                    for row in ask_with(options, model, method, tokens, ratio, texts, done):
                        journal.add(row)
                except UserError as error:  # what does not fit leaves the others to be asked
                    print(f"{method}, {tokens} tokens, r {ratio:g}: {error}", file=sys.stderr)


def identity(row: dict[str, Any]) -> tuple[Any, ...]:
    """What a line of the file is about."""
    return tuple(row[name] for name in ("method", "tokens", "ratio", "document", "topic"))


def ask_with(
    options: argparse.Namespace,
    model: Model,
    method: str,
    tokens: int,
    ratio: float,
    texts: list[Document],
    done: set[tuple[Any, ...]],
) -> Iterator[dict[str, Any]]:
    """The questions of all documents, asked in one way."""
    block_size = options.block_size or max(256, tokens // 8)
    todo = [
        (number, text, [t for t in text.numbers if (method, tokens, ratio, number, t) not in done])
        for number, text in enumerate(texts)
    ]
    if not any(topics for _, _, topics in todo):
        return
    context = ContextOptions(batch_size=max(2048, block_size), threads=options.threads)
    with LaserKV(
        model, ratio=ratio, block_size=block_size, context=context, **METHODS[method]
    ) as engine:
        for number, text, topics in todo:
            if not topics:
                continue
            talk = engine.conversation(document=text.text, max_tokens=24)
            if method == "first question":
                talk.read(question=QUESTION.format(topic=next(iter(text.numbers))))
            elif method != "read again":
                talk.read()
            for topic in topics:
                row = one(talk, topic, text.numbers[topic], again=method == "read again")
                yield {
                    "method": method,
                    "tokens": tokens,
                    "ratio": ratio,
                    "document": number,
                    "topic": topic,
                    **row,
                }


def one(talk: Conversation, topic: str, number: str, *, again: bool) -> dict[str, Any]:
    """One question as a first turn, and how likely the right answer was."""
    question = QUESTION.format(topic=topic)
    if not again:
        talk.reset()
    answer = talk.begin(question) if again else talk.ask(question)
    text = "".join(answer)
    account = answer.reply.account
    talk.reset()
    likelihood = talk.log_likelihood(question, FACT.format(topic=topic, number=number))
    return {
        "found": number in text,
        "likelihood": likelihood,
        "seconds": account.first_token_seconds,
        "recall_seconds": account.recall_seconds,
        "kept": account.kept_tokens,
        "document_tokens": account.document_tokens,
        "parked_bytes": account.parked_bytes,
        "recalled": account.recalled_tokens,
        "answer": text,
    }


def table(rows: list[dict[str, Any]]) -> None:
    """Prints one line for every length, ratio and method."""
    print("| tokens | ratio | method | found | log-likelihood | s a question | of it recall |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    order = list(METHODS)
    groups = sorted(
        {(row["tokens"], row["ratio"], order.index(row["method"])) for row in rows},
    )
    for tokens, ratio, place in groups:
        chosen = [
            row
            for row in rows
            if (row["tokens"], row["ratio"], row["method"]) == (tokens, ratio, order[place])
        ]
        found = sum(row["found"] for row in chosen)
        mean = {
            name: sum(row[name] for row in chosen) / len(chosen)
            for name in ("likelihood", "seconds", "recall_seconds")
        }
        print(
            f"| {tokens} | {ratio:g} | {order[place]} | {found} of {len(chosen)} | "
            f"{mean['likelihood']:.2f} | {mean['seconds']:.2f} | {mean['recall_seconds']:.2f} |"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs what is missing and prints the table."""
    parser = argparse.ArgumentParser(
        prog="python -m laserkv_gguf.evaluation.recall",
        description=(__doc__ or "").splitlines()[0],
    )
    parser.add_argument("--book", type=Path, required=True, help="text file, or folder of *.txt")
    parser.add_argument("--out", type=Path, required=True, help="JSONL; a stopped run goes on")
    parser.add_argument("--model")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.1, 0.25])
    parser.add_argument("--documents", type=int, default=4)
    parser.add_argument("--questions", type=int, default=10)
    parser.add_argument("--block-size", type=int, help="default: an eighth of the tokens")
    parser.add_argument("--only", nargs="*", help=f"of: {', '.join(METHODS)}")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    with (
        Model(models.find(options.model), extra_buffers=extra_buffers_work()) as model,
        Journal(options.out) as journal,
    ):
        ask_all(options, model, journal)
        table(journal.entries)


if __name__ == "__main__":
    main()
