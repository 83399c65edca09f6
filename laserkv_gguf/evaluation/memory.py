"""A fact told in turn 2: how often can it be asked for many turns later, and at what cost?

    python -m laserkv_gguf.evaluation.memory --out memory.jsonl [--turns 90] [--samples 10]
        [--ctx-size 2048]

Every way of living with a context that is too small has the same conversations (seeded): a fact in
turn 2, questions from a fixed list until the last turn, which asks for the fact. All answers are
greedy. Found means that the fact's word stands in the answer. Rows are written as they come; a run
that was stopped goes on where it was. Then it prints a Markdown table.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from laserkv_gguf import models
from laserkv_gguf.api import LaserKV
from laserkv_gguf.conversation.ageing import Ageing, Compressing, Growing
from laserkv_gguf.conversation.conversation import Conversation
from laserkv_gguf.files.journal import Journal
from laserkv_gguf.llama.chat import Prompt
from laserkv_gguf.llama.context import ContextOptions
from laserkv_gguf.llama.model import Model
from laserkv_gguf.llama.sampler import Sampling
from laserkv_gguf.llama.trial import extra_buffers_work

SYSTEM = "You are a helpful assistant. Answer in one short sentence."

# What is told, what is asked, and what fills the gap: a few digits, or one of some names. Facts
# that a very small model can repeat a few turns later; many it cannot.
NAMES = "Biscuit Pepper Waffle Juno Olive Mango Pixie Hazel"
FACTS = (
    ("The code of my locker is {}.", "What is the code of my locker?", 4),
    ("The number of my hotel room is {}.", "What is the number of my hotel room?", 3),
    ("My cat is called {}.", "What is my cat called?", NAMES),
    ("The code of my suitcase is {}.", "What is the code of my suitcase?", 5),
)

FILLERS = (
    "What is the capital of France?",
    "How many legs does a spider have?",
    "What is bread made of?",
    "Why is the sky blue?",
    "What do bees make?",
    "Name a large ocean.",
    "What is 12 plus 7?",
    "Who wrote Hamlet?",
    "What is a triangle?",
    "How does a sailing boat move?",
    "What is snow?",
    "Name three fruits.",
    "What does a baker do?",
    "How long is an hour?",
    "What is a volcano?",
    "Name a river in Africa.",
    "What do cows eat?",
    "What is a library for?",
    "How hot is the sun?",
    "What is the opposite of cold?",
    "Name a planet with rings.",
    "What is rain?",
    "What is a verb?",
    "Which animal is the tallest?",
    "How do fish breathe?",
    "What is iron used for?",
    "What is a compass for?",
    "Name two kinds of trees.",
    "What is salt?",
    "How does a clock work?",
    "What is the moon made of?",
    "Who invented the telephone?",
    "What is a desert?",
    "How do birds fly?",
    "Name a musical instrument.",
    "What is paper made of?",
    "What is an island?",
    "What is a hundred divided by four?",
    "How do plants grow?",
    "What is a doctor's job?",
)


@dataclass(frozen=True)
class Row:
    """One conversation with one way."""

    way: str
    sample: int
    turns: int
    found: bool
    answer: str
    wanted: str
    log_likelihood: float
    said: int
    cells: int
    longest_pause: float
    fact: int
    kept_of_fact: int


@dataclass(frozen=True)
class DropOldest:
    """The oldest turns go, whole."""

    endless: bool = True

    def make_room(self, conversation: Growing, asked: Prompt) -> None:
        """See `Ageing`."""
        need = len(conversation.pending) + len(asked) + conversation.max_tokens
        ledger = conversation.ledger
        while len(ledger) + need > conversation.capacity:
            oldest = next(n for n in ledger.numbers("turn") if ledger.count(n))
            conversation.cells.evict(ledger.segment != oldest)
        conversation.move_down(need, always=True)


@dataclass(frozen=True)
class ContextShift:
    """llama.cpp's context shift: after the system prompt half goes, and positions close."""

    endless: bool = True

    def make_room(self, conversation: Growing, asked: Prompt) -> None:
        """See `Ageing`."""
        need = len(conversation.pending) + len(asked) + conversation.max_tokens
        ledger = conversation.ledger
        if len(ledger) + need > conversation.capacity:
            keep = int(ledger.of_kind("system").sum())
            rows = np.arange(len(ledger))
            discard = (len(rows) - keep) // 2
            conversation.cells.evict((rows < keep) | (rows >= keep + discard))
        conversation.move_down(need, always=True)


WAYS: dict[str, tuple[Ageing, dict[str, Any]]] = {
    "full": (Compressing(), {"policy": "full", "ctx_size": None}),
    "laser": (Compressing(), {}),
    "laser, half attention": (Compressing(), {"alpha": 0.5}),
    "exact": (Compressing(), {"policy": "exact"}),
    "keydiff": (Compressing(), {"policy": "keydiff"}),
    "random": (Compressing(), {"policy": "random"}),
    "truncation": (DropOldest(), {}),
    "context shift": (ContextShift(), {}),
}


def conversation(sample: int, turns: int) -> tuple[list[str], str]:
    """What the user says, and the word that the last answer must hold."""
    random = Random(sample)
    told, asked, words = FACTS[sample % len(FACTS)]
    if isinstance(words, int):
        word = str(random.randrange(10 ** (words - 1), 10**words))
    else:
        word = random.choice(words.split())
    said: list[str] = []
    while len(said) < turns - 2:
        said += random.sample(FILLERS, len(FILLERS))
    said = said[: turns - 2]
    said.insert(1, f"Please remember this: {told.format(word)}")
    return [*said, f"Earlier I told you something. {asked}"], word


def run(model: Model, way: str, sample: int, options: argparse.Namespace) -> Row:
    """One conversation."""
    ageing, settings = WAYS[way]
    settings = {"ctx_size": options.ctx_size, **settings}
    if settings["ctx_size"] is None:
        settings["ctx_size"] = model.trained_context
    said, word = conversation(sample, options.turns)
    context = ContextOptions(batch_size=4096, threads=options.threads or None)
    with LaserKV(model, context=context, **settings) as engine:
        talk = Conversation(
            engine, system=SYSTEM, max_tokens=options.predict, sampling=Sampling(), ageing=ageing
        )
        talk.read()
        pause, cells = 0.0, 0
        for question in said[:-1]:
            stream = talk.ask(question)
            started = time.perf_counter()
            next(stream, None)
            pause = max(pause, time.perf_counter() - started)
            for _ in stream:
                pass
            cells = max(cells, talk.cells_used)
        # what the last question finds when it is asked, before anything is answered
        talk.prepare_for(said[-1])
        fact = talk.ledger.numbers("turn")[1]
        kept = talk.ledger.count(fact)
        likelihood = talk.log_likelihood(said[-1], word)
        answer = "".join(talk.ask(said[-1]))
        return Row(
            way,
            sample,
            options.turns,
            word.lower() in answer.lower(),
            answer,
            word,
            likelihood,
            talk.ledger.tokens_read,
            cells,
            pause,
            len(talk.ledger.segments[fact].tokens),
            kept,
        )


def table(rows: list[Row]) -> str:
    """Found of so many, per way."""
    by_way: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_way[row.way].append(row)
    lines = [
        "| way | found | log-likelihood | kept of its turn | said | most cells | longest wait |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for way in WAYS:
        if found := by_way.get(way):
            mean = sum(row.log_likelihood for row in found) / len(found)
            share = sum(row.kept_of_fact for row in found) / sum(row.fact for row in found)
            lines.append(
                f"| {way} | {sum(row.found for row in found)} of {len(found)} | {mean:.2f} "
                f"| {share:.0%} | {sum(row.said for row in found) // len(found):,} "
                f"| {max(row.cells for row in found):,} "
                f"| {max(row.longest_pause for row in found):.1f} s |"
            )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs what is missing and prints the table."""
    parser = argparse.ArgumentParser(
        prog="python -m laserkv_gguf.evaluation.memory",
        description=(__doc__ or "").splitlines()[0],
    )
    parser.add_argument("--model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--turns", type=int, default=90, help="the fact is asked for in the last")
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--ctx-size", type=int, default=2048)
    parser.add_argument("--predict", type=int, default=48, help="most tokens of an answer")
    parser.add_argument("--threads", type=int, default=0, help="0: all cores")
    parser.add_argument("--only", nargs="*", help=f"of: {', '.join(WAYS)}")
    options = parser.parse_args(arguments)
    with (
        Model(models.find(options.model), extra_buffers=extra_buffers_work()) as model,
        Journal(options.out) as journal,
    ):
        done = {(row["way"], row["sample"], row["turns"]) for row in journal.entries}
        for sample in range(options.samples):
            for way in options.only or WAYS:
                if (way, sample, options.turns) in done:
                    continue
                row = run(model, way, sample, options)
                journal.add(asdict(row))
                print(f"{sample} {way}: {row.wanted} | {row.answer!r}", flush=True)
        rows = [Row(**entry) for entry in journal.entries]
    print(table([row for row in rows if row.turns == options.turns]))


if __name__ == "__main__":
    main()
