"""Needle in a novel: how often each way of keeping a quarter still finds a seven-digit number.

    python scripts/needles.py --book NOVEL.txt [--tokens 2048] [--samples 10] [--ratio 0.25]

Every configuration sees the same samples (seeded). One sentence with a number is put between two
paragraphs of the novel at a random depth; the question asks for it in the model's own chat format.
Found means that the number stands in the answer. Prints a Markdown table; --json FILE keeps every
answer.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from laserkv_gguf import LaserKV, models
from laserkv_gguf.llama.model import Model
from laserkv_gguf.llama.trial import extra_buffers_work

NEEDLE = "The special magic number mentioned in this book is {number}."
QUESTION = "What is the special magic number mentioned in this book?"

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "full": {"policy": "full"},
    "laser, no lookahead, no pooling": {"policy": "laser", "lookahead": 0, "pool": 1},
    "laser, no lookahead": {"policy": "laser", "lookahead": 0},
    "laser": {"policy": "laser"},
    "laser, whole question": {"policy": "laser", "probe_tokens": 0},
    "exact": {"policy": "exact"},
    "exact, no lookahead": {"policy": "exact", "lookahead": 0},
    "magicpig": {"policy": "magicpig"},
    "streamingllm": {"policy": "streamingllm"},
    "random": {"policy": "random"},
}


@dataclass(frozen=True)
class Sample:
    """A document with a needle in it."""

    document: str
    number: str


def samples(model: Model, book: str, tokens: int, count: int, seed: int) -> list[Sample]:
    """Stretches of the novel of about `tokens` tokens, each with its needle."""
    made = []
    paragraphs = [p.strip() for p in re.split(r"\n\s*\n", book) if p.strip()]
    lengths = [len(model.tokenize(p + "\n\n")) for p in paragraphs]
    for index in range(count):
        random = Random(f"{seed}/{index}")
        number = str(random.randrange(1_000_000, 10_000_000))
        needle = NEEDLE.format(number=number)
        start = random.randrange(len(paragraphs) // 2)
        room = tokens - len(model.tokenize(needle + "\n\n"))
        end = start
        while end < len(paragraphs) and room >= lengths[end]:
            room -= lengths[end]
            end += 1
        chosen = paragraphs[start:end]
        chosen.insert(random.randrange(1, len(chosen)), needle)
        made.append(Sample("\n\n".join(chosen), number))
    return made


def main() -> None:
    """Runs the configurations and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--book", type=Path, required=True)
    parser.add_argument("--model")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--ratio", type=float, default=0.25)
    parser.add_argument("--block-size", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", help=f"of: {', '.join(CONFIGURATIONS)}")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    path = models.find(options.model)
    with Model(path, extra_buffers=extra_buffers_work()) as model:
        book = options.book.read_text("utf-8")
        tasks = samples(model, book, options.tokens, options.samples, options.seed)
        rows = []
        print("| configuration | found | kept | s a sample | probe + score + evict |")
        print("| --- | --- | --- | --- | --- |")
        for name in options.only or CONFIGURATIONS:
            settings = CONFIGURATIONS[name]
            found, kept, share, started = 0, 0.0, 0.0, time.perf_counter()
            with LaserKV(
                model, ratio=options.ratio, block_size=options.block_size, **settings
            ) as engine:
                for task in tasks:
                    reply = engine.ask(QUESTION, document=task.document, max_tokens=24)
                    hit = task.number in reply.text
                    found += hit
                    kept += reply.account.kept_fraction
                    share += reply.account.overhead_share
                    rows.append(
                        {
                            "configuration": name,
                            "number": task.number,
                            "answer": reply.text,
                            "found": hit,
                            "account": reply.account.as_dict(),
                        }
                    )
            seconds = (time.perf_counter() - started) / len(tasks)
            print(
                f"| {name} | {found} of {len(tasks)} | {kept / len(tasks):.1%} "
                f"| {seconds:.1f} | {share / len(tasks):.1%} |",
                flush=True,
            )
    if options.json:
        options.json.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


if __name__ == "__main__":
    main()
