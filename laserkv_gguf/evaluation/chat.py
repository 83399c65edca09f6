"""Whether `chat` finds what `ask` finds: four needles in a novel, one question after the other.

    python -m laserkv_gguf.evaluation.chat -o FOLDER --background NOVEL.txt
        [--model MODEL] [--lengths 2048 4096] [--ratios 0.25 0.1] [--samples 20] [--block-size 0]
        [--ways full ask chat off] [--threads N]

Each document is a stretch of the novel with four sentences hidden in it that give numbers away. It
is asked in four ways, each with the defaults of its command:

- full: everything is kept, and each question is the first one;
- ask: the document is read anew for every question, with that question in mind;
- chat: it is read before there is a question; the four questions are turns of one conversation;
- off: as chat, with `--recall off`.

A row (document, way, ratio, turn) is a line of FOLDER/chat.jsonl as soon as it is there; a run that
was stopped goes on. Prints a table: numbers found at the first and at the fourth turn, the mean
log-likelihood (nats a token) of the hidden sentence as the answer, and the time from the question
to the first token in parts of the time that reading took. A time that others shared the machine
with is no measurement of speed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from laserkv_gguf import models
from laserkv_gguf.api import LaserKV
from laserkv_gguf.conversation.conversation import Conversation
from laserkv_gguf.evaluation.background import Background
from laserkv_gguf.evaluation.lengths import interspersed, stretch
from laserkv_gguf.evaluation.runner import BLOCK, BLOCKS
from laserkv_gguf.evaluation.samples import Source, Tokens
from laserkv_gguf.files.journal import Journal
from laserkv_gguf.llama.context import ContextOptions
from laserkv_gguf.llama.model import Model
from laserkv_gguf.llama.trial import extra_buffers_work

TURNS = 4
PREDICT = 32
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

WAYS: dict[str, dict[str, Any]] = {
    "full": {"policy": "full"},
    "ask": {},
    "chat": {},
    "off": {"recall": "off"},
}
Row = dict[str, Any]


@dataclass(frozen=True)
class Document:
    """A stretch of a novel with numbers hidden in it.

    Attributes:
        tokens: int32 ids.
        numbers: by topic, in the order they are asked for.
    """

    tokens: Tokens
    numbers: dict[str, str]


def document(source: Source, tokens: int, number: int) -> Document:
    """The document of that number, of exactly so many tokens, whatever others were made before.

    Raises:
        UserError: the background is too short.
    """
    random = source.random("chat", tokens, number)
    topics = random.sample(TOPICS, TURNS)
    numbers = {topic: str(random.randrange(10**6, 10**7)) for topic in topics}
    facts = [FACT.format(topic=topic, number=value) for topic, value in numbers.items()]
    random.shuffle(facts)
    room = tokens - sum(source.count(" " + fact) for fact in facts)
    sentences, counts = stretch(source, random, max(room, 1))
    _, ids = interspersed(source, sentences, facts, random, tokens, counts=counts)
    return Document(ids, numbers)


def block_size(tokens: int) -> int:
    """As `eval` has it: 4096, or a quarter of the length where that is shorter."""
    return min(BLOCK, -(-tokens // BLOCKS))


def asked(engine: LaserKV, way: str, what: Document) -> Iterator[Row]:
    """The four questions of a document in one way; a row each."""
    if way in ("chat", "off"):
        text = engine.model.text(what.tokens)
        talk = engine.conversation(document=text, max_tokens=PREDICT)
        seconds = _timed(talk)
        for turn, topic in enumerate(what.numbers, 1):
            yield {"turn": turn, "reading": seconds, **_answered(talk, topic, what.numbers[topic])}
        return
    talk = Conversation(engine, document=what.tokens, max_tokens=PREDICT, one_turn=True)
    seconds = _timed(talk) if way == "full" else 0.0
    for turn, topic in enumerate(what.numbers, 1):
        if turn not in (1, TURNS):  # the others would tell nothing that these do not
            continue
        if way == "ask":
            seconds = _timed(talk, QUESTION.format(topic=topic))
        row = _answered(talk, topic, what.numbers[topic])
        yield {"turn": turn, "reading": seconds, **row}
        if way == "full":
            talk.reset()


def _timed(talk: Conversation, question: str | None = None) -> float:
    started = time.perf_counter()
    talk.read(question=question)
    return time.perf_counter() - started


def _answered(talk: Conversation, topic: str, number: str) -> Row:
    """One turn: how likely the right answer was, and what was answered."""
    question = QUESTION.format(topic=topic)
    started = time.perf_counter()
    recalled = talk.recall(question)
    recalling = time.perf_counter() - started if recalled else 0.0
    likelihood = talk.log_likelihood(question, FACT.format(topic=topic, number=number))
    started = time.perf_counter()
    stream = talk.ask(question)
    first = next(iter(stream), "")
    # the rows that it needed came before; asked again they are there already
    seconds = recalling + time.perf_counter() - started - stream.reply.account.recall_seconds
    text = first + "".join(stream)
    account = stream.reply.account
    return {
        "found": number in text,
        "likelihood": likelihood,
        "seconds": seconds,
        "recalling": recalling,
        "kept": account.kept_tokens,
        "read": account.document_tokens,
        "recall": account.recall,
        "parked_bytes": account.parked_bytes,
        "answer": text,
    }


def run(
    model: Model,
    source: Source,
    journal: Journal,
    *,
    lengths: Sequence[int],
    ratios: Sequence[float],
    samples: int,
    ways: Sequence[str],
    block: int = 0,
    threads: int | None = None,
) -> None:
    """Asks what the journal does not have yet, sample by sample."""
    done = {_key(row) for row in journal.entries}
    for number in range(samples):
        for tokens in lengths:
            made: Document | None = None
            for ratio in ratios:
                for way in ways:
                    at = 1.0 if way == "full" else ratio
                    key = (model.path.name, tokens, block, at, way, number)
                    if key in done:
                        continue
                    made = made or document(source, tokens, number)
                    size = block or block_size(tokens)
                    with LaserKV(
                        model,
                        ratio=at,
                        block_size=size,
                        context=ContextOptions(batch_size=max(2048, size), threads=threads),
                        **WAYS[way],
                    ) as engine:
                        rows = list(asked(engine, way, made))
                    for row in rows:
                        journal.add({**dict(zip(KEYS, key, strict=True)), **row})
                    done.add(key)


KEYS = ("model", "tokens", "block", "ratio", "way", "sample")


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in KEYS)


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Markdown: a line for every model, length, ratio and way."""
    yield (
        "| model | tokens | ratio | way | found, 1st | found, 4th | log-likelihood, 1st | 4th "
        "| first token, parts of a reading | samples |"
    )
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    order = list(WAYS)
    groups = sorted(
        {(r["model"], r["tokens"], r["block"], r["ratio"], order.index(r["way"])) for r in rows}
    )
    for model, tokens, block, ratio, place in groups:
        alike = [
            row
            for row in rows
            if (row["model"], row["tokens"], row["block"], row["ratio"], row["way"])
            == (model, tokens, block, ratio, order[place])
        ]
        turns = [[row for row in alike if row["turn"] == turn] for turn in (1, TURNS)]
        found = [f"{sum(row['found'] for row in some)} of {len(some)}" for some in turns]
        likely = [f"{np.mean([row['likelihood'] for row in some]):.2f}" for some in turns]
        parts = np.median([row["seconds"] / row["reading"] for row in alike])
        blocks = f" (blocks of {block})" if block else ""
        yield (
            f"| {model} | {tokens:,}{blocks} | {ratio:g} | {order[place]} | {found[0]} | {found[1]}"
            f" | {likely[0]} | {likely[1]} | {parts:.3f} | {len(turns[0])} |"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; its help is this module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m laserkv_gguf.evaluation.chat",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("-m", "--model")
    parser.add_argument("--background", type=Path)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.25, 0.1])
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--block-size", type=int, default=0)
    parser.add_argument("-s", "--seed", type=int, default=0)
    parser.add_argument("-t", "--threads", type=int)
    given = parser.parse_args(arguments)
    background = Background.load(given.background)
    with (
        Model(models.find(given.model), extra_buffers=extra_buffers_work()) as model,
        Journal(given.out / "chat.jsonl") as journal,
    ):
        run(
            model,
            Source(model, given.seed, background),
            journal,
            lengths=given.lengths,
            ratios=given.ratios,
            samples=given.samples,
            ways=given.ways,
            block=given.block_size,
            threads=given.threads,
        )
        print("\n".join(table(journal.entries)))


if __name__ == "__main__":
    main()
