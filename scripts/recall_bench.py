"""Ten questions on one novel: what recall brings back, how well and how fast.

    python scripts/recall_bench.py questions --book NOVEL.txt --out FILE.jsonl
        [--tokens 4096 8192] [--ratios 0.1 0.25] [--documents 4] [--questions 10]
    python scripts/recall_bench.py signatures --book NOVEL.txt [--tokens 4096] [--documents 2]
    python scripts/recall_bench.py choose [--tokens 131072] [--layers-tried 2]

`questions` hides sentences with numbers in a stretch of the novel and asks for each, as a first
turn, of: the full cache; laser compressed for the first question and asked all; laser read again
for each; what a question-free reading kept; recall by replay, by shortlist, and by shortlist with a
share for every block. Every row (document, question, method) is one line of the file as soon as it
is there; what the file has is not done again. Prints a Markdown table: numbers found, the gold
sentence's mean log-likelihood, seconds from the question to the first token.

`signatures` compares what signatures choose with what exact scores choose, on the same documents:
the share of the exact choice (pooled by 7) that is among the best 1, 2 or 3 times as many.

`choose` times one choice among the parked tokens of an 8B shape (32 layers, 32 heads, 8 kv heads of
128) with random rows, layer by layer, beside the same in NumPy; the time of the layers tried is
multiplied to 32.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from laserkv_gguf import ContextOptions, Conversation, LaserKV, UserError, kernels, models
from laserkv_gguf.kernels.hamming import SHARE
from laserkv_gguf.llama.chat import ChatTemplate
from laserkv_gguf.llama.context import Context
from laserkv_gguf.llama.model import Model
from laserkv_gguf.llama.sequence import MAIN, PROBE, Sequence
from laserkv_gguf.llama.trial import extra_buffers_work
from laserkv_gguf.recall.signatures import Signatures

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
    "full": {"policy": "full"},
    "first question": {"policy": "laser"},
    "read again": {"policy": "laser"},
    "no question": {"policy": "keydiff"},
    "replay": {"policy": "laser", "recall": "ram", "recall_mode": "replay"},
    "replay after laser": {
        "policy": "laser",
        "recall": "ram",
        "recall_mode": "replay",
        "recall_first": "laser",
    },
    "shortlist": {"policy": "laser", "recall": "ram", "recall_mode": "shortlist"},
    "shortlist, block": {
        "policy": "laser",
        "recall": "ram",
        "recall_mode": "shortlist",
        "recall_share": "block",
    },
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


# ---- questions ---------------------------------------------------------------------------------


def ask_all(options: argparse.Namespace, model: Model) -> None:
    """Runs what the file does not have yet, and prints the table."""
    rows = []
    if options.out.exists():
        rows = [json.loads(line) for line in options.out.read_text("utf-8").splitlines()]
    done = {identity(row) for row in rows}
    book = options.book.read_text("utf-8")
    with options.out.open("a", encoding="utf-8") as file:
        for tokens in options.tokens:
            texts = list(
                documents(model, book, tokens, options.documents, options.questions, options.seed)
            )
            for ratio in options.ratios:
                for method in options.only or METHODS:
                    try:
                        for row in ask_with(options, model, method, tokens, ratio, texts, done):
                            rows.append(row)
                            file.write(json.dumps(row) + "\n")
                            file.flush()
                    except UserError as error:  # what does not fit leaves the others to be asked
                        print(f"{method}, {tokens} tokens, r {ratio:g}: {error}", file=sys.stderr)
    table(rows)


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


# ---- signatures --------------------------------------------------------------------------------


def compare_signatures(options: argparse.Namespace, model: Model) -> None:
    """Prints recall@budget of signatures for several numbers of bits."""
    template = ChatTemplate(model)
    book = options.book.read_text("utf-8")
    tokens = options.tokens[0]
    found: dict[tuple[int, float, int], list[float]] = {}
    with Context(model, tokens + 512, ContextOptions(threads=options.threads)) as context:
        for text in documents(
            model, book, tokens, options.documents, options.questions, options.seed
        ):
            before = template.opening("").before
            sequence = np.concatenate((before, model.tokenize(text.text))).astype(np.int32)
            context.clear()
            keys = context.probe.new("keys", len(sequence), np.float16)
            with context.probe.armed(keys=(keys, 0)):
                context.decode(sequence, 0, MAIN)
            queries = [
                queries_of(context, template, topic, len(sequence)) for topic in text.numbers
            ]
            for bits in options.bits:
                signed = Signatures(
                    model.layers, model.kv_heads, model.head_dim, len(sequence), bits
                )
                block = len(sequence) // 8
                for start in range(0, len(sequence), block):
                    signed.add(start, keys[:, start : start + block])
                for asked in queries:
                    votes = kernels.pool(signed.votes(asked), 7)
                    exact = kernels.pool(kernels.attention_consensus(asked, keys), 7)
                    for ratio in options.ratios:
                        room = int(ratio * len(sequence))
                        best = set(kernels.top_k(exact, room).tolist())
                        for factor in (1, 2, 3):
                            got = best & set(kernels.top_k(votes, factor * room).tolist())
                            found.setdefault((bits, ratio, factor), []).append(len(got) / room)
    print("| bits a head | bytes a token | ratio | best 1× | best 2× | best 3× |")
    print("| --- | --- | --- | --- | --- | --- |")
    for bits in options.bits:
        size = model.layers * model.kv_heads * bits // 8
        for ratio in options.ratios:
            shares = [np.mean(found[bits, ratio, factor]) for factor in (1, 2, 3)]
            said = " | ".join(f"{share:.3f}" for share in shares)
            print(f"| {bits} | {size} | {ratio:g} | {said} |")


def queries_of(context: Context, template: ChatTemplate, topic: str, position: int) -> Any:
    """Queries of a question's end on the full cache (no drafts)."""
    prompt = template.opening(QUESTION.format(topic=topic)).after
    asking = min(8 + prompt.ending, len(prompt))
    queries = context.probe.new("queries", asking)
    Sequence(context, MAIN).share_with(Sequence(context, PROBE))
    try:
        with context.probe.armed(queries=(queries, len(prompt) - asking)):
            context.decode(prompt.tokens, position, PROBE)
    finally:
        Sequence(context, PROBE).remove()
    return queries


# ---- choosing ----------------------------------------------------------------------------------


def time_choice(options: argparse.Namespace) -> None:
    """Prints seconds and GB/s of the steps of a choice among parked tokens."""
    layers, kv_heads, heads, dim, probes = 32, 8, 32, 128, 28
    tokens, tried, words = options.tokens[0], options.layers_tried, options.bits[0] // 64
    threads = kernels.set_threads(options.threads or 1)
    random = np.random.default_rng(options.seed)
    room = int(options.ratios[-1] * tokens)
    times: dict[str, tuple[float, float]] = {}

    def timed(name: str, size: int, work: Any, *given: Any, **options: Any) -> Any:
        started = time.perf_counter()
        result = work(*given, **options)
        seconds, bytes_ = times.get(name, (0.0, 0.0))
        times[name] = (seconds + time.perf_counter() - started, bytes_ + size)
        return result

    warm = Signatures(1, 1, dim, 64, 64 * words)
    warm.add(0, np.ones((1, 64, 1, dim), np.float16))
    warm.votes(np.ones((1, 2, 1, dim), np.float32))
    kernels.attention_consensus(
        np.ones((1, 2, 1, dim), np.float32), np.ones((1, 64, 1, dim), np.float16)
    )
    for _ in range(tried):
        keys = random.standard_normal((1, tokens, kv_heads, dim), np.float32).astype(np.float16)
        queries = random.standard_normal((1, probes, heads, dim), np.float32)
        signed = Signatures(1, kv_heads, dim, tokens, 64 * words)
        timed("sign the keys (once, while reading)", keys.nbytes, signed.add, 0, keys)
        votes = timed("signatures: votes", signed.codes.nbytes, signed.votes, queries)
        best = kernels.top_k(votes, min(tokens, 2 * room))
        size = len(best) * kv_heads * dim * 2
        taken = timed("gather the shortlist's keys", size, np.take, keys, best, axis=1)
        score = kernels.attention_consensus
        timed("exact scores of the shortlist", size, score, queries, taken)
        timed("exact scores of all tokens", keys.nbytes, score, queries, keys)
        timed("NumPy: votes", signed.codes.nbytes, numpy_votes, signed, queries)
        timed("NumPy: exact scores of all", keys.nbytes, numpy_exact, queries[0], keys[0])
    print(f"{tokens} tokens, {probes} probe tokens, {64 * words} bits, {threads} threads, ", end="")
    print(f"{tried} of {layers} layers timed, seconds for {layers}")
    print("| step | seconds | GB/s |\n| --- | --- | --- |")
    for name, (seconds, size) in times.items():
        print(f"| {name} | {seconds / tried * layers:.1f} | {size / seconds / 1e9:.2f} |")


def numpy_votes(signed: Signatures, queries: Any) -> Any:
    """The votes of one layer, with NumPy's own XOR and popcount (2.0 and later)."""
    kv_heads, _, tokens = signed.codes.shape[1:]
    rows = queries.reshape(len(queries[0]), kv_heads, -1, queries.shape[-1]).transpose(1, 0, 2, 3)
    asked = kernels.signatures(rows.reshape(kv_heads, -1, rows.shape[-1]), signed.planes, bits=64)
    votes = np.zeros(tokens)
    for head in range(kv_heads):
        for query in asked[head]:
            apart = np.bitwise_count(query[:, None] ^ signed.codes[0, head]).sum(axis=0)
            near = np.partition(apart, int(SHARE * tokens))[int(SHARE * tokens)]
            votes += apart <= near
    return votes


def numpy_exact(queries: Any, keys: Any) -> Any:
    """Attention consensus of one layer: softmax of all rows, summed."""
    kv_heads, dim = keys.shape[1:]
    total = np.zeros(len(keys), np.float32)
    for head in range(kv_heads):
        group = queries.reshape(len(queries), kv_heads, -1, dim)[:, head].reshape(-1, dim)
        scores = group @ keys[:, head].astype(np.float32).T / np.float32(np.sqrt(dim))
        np.exp(scores - scores.max(axis=1, keepdims=True), out=scores)
        total += (scores / scores.sum(axis=1, keepdims=True)).sum(axis=0)
    return total


def main() -> None:
    """Runs one of the experiments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("questions", "signatures", "choose"))
    parser.add_argument("--book", type=Path)
    parser.add_argument("--out", type=Path, help="JSONL of `questions`; resumed")
    parser.add_argument("--model")
    parser.add_argument("--tokens", type=int, nargs="+")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.1, 0.25])
    parser.add_argument("--documents", type=int, default=4)
    parser.add_argument("--questions", type=int, default=10)
    parser.add_argument("--block-size", type=int, help="default: an eighth of the tokens")
    parser.add_argument("--bits", type=int, nargs="+")
    parser.add_argument("--layers-tried", type=int, default=2)
    parser.add_argument("--only", nargs="*", help=f"of: {', '.join(METHODS)}")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.what == "choose":
        options.tokens = options.tokens or [131_072]
        options.bits = options.bits or [128]
        time_choice(options)
        return
    if options.book is None or (options.what == "questions" and options.out is None):
        parser.error("--book is needed, and --out for `questions`")
    with Model(models.find(options.model), extra_buffers=extra_buffers_work()) as model:
        if options.what == "questions":
            options.tokens = options.tokens or [4096, 8192]
            ask_all(options, model)
        else:
            options.tokens = options.tokens or [4096]
            options.bits = options.bits or [64, 128, 256, 512]
            compare_signatures(options, model)


if __name__ == "__main__":
    main()
