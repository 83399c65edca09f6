"""Every policy against every other: a needle, and bAbI's first task, in a novel.

    python scripts/policy_table.py --book NOVEL.txt --babi FOLDER --out rows.jsonl

Every policy sees the same seeded samples. For each it prints exact match, the mean log-likelihood
of the gold answer's tokens, the tokens kept, and what share of prefill probing and scoring took.
Rows are written as they come; a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import needles

from laserkv_gguf import LaserKV, models, policies
from laserkv_gguf.errors import UserError
from laserkv_gguf.llama.context import ContextOptions
from laserkv_gguf.llama.model import Model
from laserkv_gguf.llama.trial import extra_buffers_work
from laserkv_gguf.policies.laser import PAPER

# What each step beyond the paper, and each setting, is worth: one change at a time from `laser` as
# it was before this table chose its defaults.
BEFORE = {"alpha": 0.75, "pool": 7}
ABLATIONS: dict[str, dict[str, Any]] = {
    "no lookahead": {"lookahead": 0},
    "lookahead 8": {"lookahead": 8},
    "lookahead 32": {"lookahead": 32},
    "whole question": {"probe_tokens": 0},
    "whole question, no lookahead": {"probe_tokens": 0, "lookahead": 0},
    "no pooling": {"pool": 1},
    "pool 5": {"pool": 5},
    "pool 11": {"pool": 11},
    "alpha 0.5": {"alpha": 0.5},
    "alpha 0.9": {"alpha": 0.9},
    "alpha 1": {"alpha": 1.0},
    "alpha 1, no pooling": {"alpha": 1.0, "pool": 1},
    "alpha 1, pool 11": {"alpha": 1.0, "pool": 11},
    "alpha 1, pool 15": {"alpha": 1.0, "pool": 15},
    "alpha 1, pool 21": {"alpha": 1.0, "pool": 21},
    "pool 15": {"pool": 15},
    "alpha 1, pool 15, whole question": {"alpha": 1.0, "pool": 15, "probe_tokens": 0},
    "alpha 1, pool 15, no lookahead": {"alpha": 1.0, "pool": 15, "lookahead": 0},
    "alpha 1, pool 15, lookahead 8": {"alpha": 1.0, "pool": 15, "lookahead": 8},
    "alpha 1, pool 15, lookahead 32": {"alpha": 1.0, "pool": 15, "lookahead": 32},
    "alpha 1, no lookahead": {"alpha": 1.0, "lookahead": 0},
    "n 3": {"protection_divisor": 3},
    "n 8": {"protection_divisor": 8},
    "n 16": {"protection_divisor": 16},
    "4 bits, 32 tables": {"hash_bits": 4},
    "10 bits, 150 tables": {"hash_bits": 10, "hash_tables": 150},
    "magicpig's rule": {"policy_options": {"rule": "magicpig"}},
    "analytic": {"policy_options": {"rule": "analytic"}},
    "residual keydiff": {"policy_options": {"residual": "keydiff"}},
    "residual leverage": {"policy_options": {"residual": "leverage"}},
    "paper": PAPER,
}
LABELS = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
ASK = "Answer with one word, the name of the place."


@dataclass(frozen=True)
class Sample:
    """A document, what to ask of it, and what the answer must be."""

    task: str
    number: int
    document: str
    question: str
    gold: str

    def is_right(self, answer: str) -> bool:
        """The gold answer is named and, of bAbI's places, no other one."""
        if self.task == "needle":
            return self.gold in answer
        first = re.split(r"[.\n]", answer.strip().lower())[0]
        return {label for label in LABELS if label in first} == {self.gold}


def needle_samples(model: Model, book: str, tokens: int, count: int, seed: int) -> Iterator[Sample]:
    """A seven-digit number in the novel."""
    for index, made in enumerate(needles.samples(model, book, tokens, count, seed)):
        yield Sample("needle", index, made.document, needles.QUESTION, made.number)


def babi_samples(
    model: Model, book: str, folder: Path, tokens: int, count: int, seed: int
) -> Iterator[Sample]:
    """Stories of qa1 whose facts stand, in order, at random places of the novel."""
    stories = list(_stories((folder / "qa1_single-supporting-fact_test.txt").read_text("utf-8")))
    paragraphs = [p.strip() for p in re.split(r"\n\s*\n", book) if p.strip()]
    for index in range(count):
        random = Random(f"babi/{seed}/{index}")
        facts, question, gold = stories[random.randrange(len(stories))]
        room = tokens - len(model.tokenize("\n\n".join(facts)))
        start = random.randrange(len(paragraphs) // 2)
        chosen: list[str] = []
        while room > 0 and start < len(paragraphs):
            room -= len(model.tokenize(paragraphs[start] + "\n\n"))
            if room > 0:
                chosen.append(paragraphs[start])
            start += 1
        places = sorted(random.randrange(len(chosen) + 1) for _ in facts)
        for shift, (place, fact) in enumerate(zip(places, facts, strict=True)):
            chosen.insert(place + shift, fact)
        yield Sample("babi-qa1", index, "\n\n".join(chosen), f"{question} {ASK}", gold)


def _stories(text: str) -> Iterator[tuple[list[str], str, str]]:
    """(facts so far, question, answer) of a bAbI file."""
    facts: list[str] = []
    for line in text.splitlines():
        number, _, rest = line.partition(" ")
        if number == "1":
            facts = []
        if "\t" in rest:
            question, answer, _ = rest.split("\t")
            yield list(facts), question.strip(), answer.strip()
        else:
            facts.append(rest.strip())


def run(options: argparse.Namespace) -> None:
    """Runs what the results file does not hold yet."""
    done = {(row["policy"], row["ratio"], row["task"], row["number"]) for row in rows(options.out)}
    with Model(models.find(options.model), extra_buffers=extra_buffers_work()) as model:
        book = options.book.read_text("utf-8")
        tasks = [
            *needle_samples(model, book, options.tokens, options.samples, options.seed),
            *babi_samples(model, book, options.babi, options.tokens, options.samples, options.seed),
        ]
        tasks = [task for task in tasks if task.task in options.tasks]
        if options.ablations:
            chosen = {
                f"laser, {label}": ("laser", BEFORE | given) for label, given in ABLATIONS.items()
            }
        else:
            chosen = {name: (name, dict[str, Any]()) for name in policies.available()}
        for label, (policy, given) in chosen.items():
            if options.only and label not in options.only:
                continue
            for ratio in options.ratios if policy != "full" else [1.0]:
                todo = [t for t in tasks if (label, ratio, t.task, t.number) not in done]
                settings = {"policy": policy, "ratio": ratio, **given}
                for row in answers(model, label, settings, todo, options):
                    with options.out.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(row) + "\n")


def answers(
    model: Model,
    label: str,
    settings: dict[str, Any],
    tasks: list[Sample],
    options: argparse.Namespace,
) -> Iterator[dict[str, Any]]:
    """One row a sample; a policy that refuses gives none."""
    try:
        engine = LaserKV(
            model,
            block_size=options.block_size,
            context=ContextOptions(threads=options.threads),
            **settings,
        )
    except UserError as error:
        print(f"{label}: {error}")
        return
    with engine:
        for task in tasks:
            talk = engine.conversation(document=task.document, max_tokens=24)
            talk.read(question=task.question)
            likelihood = talk.log_likelihood(task.question, task.gold)
            stream = talk.ask(task.question)
            for _ in stream:
                pass
            account = stream.reply.account
            yield {
                "policy": label,
                "ratio": settings["ratio"],
                **{k: v for k, v in asdict(task).items() if k != "document"},
                "answer": stream.reply.text,
                "right": task.is_right(stream.reply.text),
                "log_likelihood": likelihood,
                "kept": account.kept_tokens,
                "read": account.document_tokens,
                "share": account.overhead_share,
            }


def rows(path: Path) -> list[dict[str, Any]]:
    """What a results file holds; a torn last line is left out."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text("utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def table(path: Path) -> str:
    """The Markdown table of a results file."""
    groups = defaultdict(list)
    for row in rows(path):
        groups[row["task"], row["ratio"], row["policy"]].append(row)
    lines = ["| task | r | policy | exact match | gold log-likelihood | kept | scoring share |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    for (task, ratio, policy), group in sorted(
        groups.items(), key=lambda g: (g[0][0], -g[0][1], -sum(r["log_likelihood"] for r in g[1]))
    ):
        count = len(group)
        likelihood = sum(r["log_likelihood"] for r in group) / count
        kept = sum(r["kept"] for r in group) / sum(r["read"] for r in group)
        share = sum(r["share"] for r in group) / count
        right = sum(r["right"] for r in group)
        lines.append(
            f"| {task} | {ratio:g} | {policy} | {right} of {count} | {likelihood:.2f} "
            f"| {kept:.1%} | {share:.1%} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Runs, then prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--book", type=Path, required=True)
    parser.add_argument("--babi", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model")
    parser.add_argument("--ablations", action="store_true", help="laser with one thing changed")
    parser.add_argument("--only", nargs="*", help="these policies or ablations (laser, …)")
    parser.add_argument("--tasks", nargs="*", default=["needle", "babi-qa1"])
    parser.add_argument("--ratios", nargs="*", type=float, default=[0.25, 0.1])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--block-size", type=int, default=512)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    run(options)
    print(table(options.out))


if __name__ == "__main__":
    main()
