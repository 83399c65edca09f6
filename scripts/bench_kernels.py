"""How fast the kernels are beside NumPy, on this machine and in this run.

    python scripts/bench_kernels.py [--threads N] [--json] [--repeat N]
    python scripts/bench_kernels.py signatures --book NOVEL.txt [--tokens 4096] [--documents 2]
    python scripts/bench_kernels.py choose [--tokens 131072] [--layers-tried 2]

Attention is compared with ``numpy @`` for the product q . k alone (no softmax, no sum), on the
same values laid out as BLAS likes them; SimHash with its NumPy form on one layer, scaled up, and,
where faiss is installed (pip install faiss-cpu), with its IndexLSH: as many bits, keys encoded and
the queries searched for as many as a block keeps.

`signatures` compares what recall's signatures choose with what exact scores choose, on documents
made of the novel: the share of the exact choice (pooled by 7) that is among the best 1, 2 or 3
times as many.

`choose` times one choice among the parked tokens of an 8B shape (32 layers, 32 heads, 8 kv heads of
128) with random rows, layer by layer, beside the same in NumPy; the time of the layers tried is
multiplied to 32.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from laserkv_gguf import ContextOptions, kernels, models
from laserkv_gguf.evaluation import recall
from laserkv_gguf.kernels import (
    analytic_collisions,
    attention_consensus,
    collision_scores,
    planes,
    set_threads,
)
from laserkv_gguf.kernels.hamming import SHARE
from laserkv_gguf.llama.chat import ChatTemplate
from laserkv_gguf.llama.context import Context
from laserkv_gguf.llama.model import Model
from laserkv_gguf.llama.sequence import MAIN, PROBE, Sequence
from laserkv_gguf.llama.trial import extra_buffers_work
from laserkv_gguf.recall.signatures import Signatures

Array = NDArray[Any]

# layers, tokens, heads, kv heads, head_dim, candidates
SHAPES = {
    "Llama-3-8B": (32, 32, 32, 8, 128, 4096),
    "SmolLM2-135M": (30, 24, 9, 3, 64, 1024),
}
BITS, TABLES = 8, 16


def seconds(run: Callable[[], object], repeat: int) -> float:
    """The best of ``repeat`` runs after one to warm up."""
    run()
    best = float("inf")
    for _ in range(repeat):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


def numpy_products(queries: Array, keys: Array) -> Callable[[], object]:
    """Q . k of every layer and kv head by ``@``, everything copied into place beforehand."""
    layers, tokens, heads, dim = queries.shape
    kv_heads = keys.shape[2]
    rows = queries.reshape(layers, tokens, kv_heads, heads // kv_heads, dim)
    rows = np.ascontiguousarray(rows.transpose(0, 2, 3, 1, 4)).reshape(layers, kv_heads, -1, dim)
    columns = np.ascontiguousarray(keys.transpose(0, 2, 3, 1))
    out = np.empty((layers, kv_heads, rows.shape[2], keys.shape[1]), dtype=np.float32)
    return lambda: np.matmul(rows, columns, out=out)


def numpy_collisions(queries: Array, keys: Array) -> Array:
    """SimHash as one writes it in NumPy: signs, fields as integers, one comparison a table."""
    group = queries.shape[2] // keys.shape[2]
    directions = planes(queries.shape[-1], BITS, TABLES, 0).T
    keys = keys - keys.mean(axis=1, keepdims=True)
    powers = 1 << np.arange(BITS, dtype=np.uint16)

    def codes(vectors: Array) -> Array:
        signs = (vectors @ directions >= 0).reshape(*vectors.shape[:-1], TABLES, BITS)
        packed: Array = (signs * powers).sum(-1, dtype=np.uint16)
        return packed

    mine, theirs = codes(queries), codes(keys)
    total = np.zeros(keys.shape[1])
    for layer in range(queries.shape[0]):
        for head in range(queries.shape[2]):
            for token in range(queries.shape[1]):
                total += (theirs[layer, :, head // group] == mine[layer, token, head]).sum(-1)
    return total


def faiss_search(queries: Array, keys: Array, wanted: int) -> Callable[[], object] | None:
    """One IndexLSH for every layer and kv head: keys encoded, queries encoded and searched."""
    try:
        import faiss
    except ImportError:
        return None
    layers, tokens, heads, dim = queries.shape
    kv_heads = keys.shape[2]
    rows = queries.reshape(layers, tokens, kv_heads, heads // kv_heads, dim)
    rows = np.ascontiguousarray(rows.transpose(0, 2, 1, 3, 4)).reshape(layers, kv_heads, -1, dim)
    points = np.ascontiguousarray((keys - keys.mean(axis=1, keepdims=True)).transpose(0, 2, 1, 3))

    def run() -> None:
        for layer in range(layers):
            for head in range(kv_heads):
                index = faiss.IndexLSH(dim, BITS * TABLES, True, False)
                index.add(points[layer, head])
                index.search(rows[layer, head], wanted)

    return run


def measure(name: str, repeat: int) -> dict[str, Any]:
    """One row of the table: seconds and ratios (NumPy's time over ours) for one shape."""
    layers, tokens, heads, kv_heads, dim, candidates = SHAPES[name]
    rng = np.random.default_rng(0)
    queries = rng.standard_normal((layers, tokens, heads, dim), dtype=np.float32)
    keys = rng.standard_normal((layers, candidates, kv_heads, dim), dtype=np.float32)
    halves = keys.astype(np.float16)
    # Turn about, so that a busy spell of the machine falls on both.
    best = dict.fromkeys(("numpy_qk", "attention_f32", "attention_f16"), float("inf"))
    runs: dict[str, Callable[[], object]] = {
        "numpy_qk": numpy_products(queries, keys),
        "attention_f32": lambda: attention_consensus(queries, keys),
        "attention_f16": lambda: attention_consensus(queries, halves),
    }
    for _ in range(repeat):
        for key, run in runs.items():
            best[key] = min(best[key], seconds(run, 1))
    hashed: dict[str, Any] = {"bits": BITS, "tables": TABLES, "seed": 0}
    one = (queries[:1], keys[:1])
    searched = faiss_search(queries, keys, candidates // 5)
    if searched is not None:
        best["faiss_lsh"] = seconds(searched, repeat)
    best["numpy_simhash"] = seconds(lambda: numpy_collisions(*one), 1) * layers
    best["simhash_f32"] = seconds(lambda: collision_scores(queries, keys, **hashed), repeat)
    best["simhash_f16"] = seconds(lambda: collision_scores(queries, halves, **hashed), repeat)
    best["analytic_f32"] = seconds(lambda: analytic_collisions(queries, keys, bits=BITS), repeat)
    product = 2e-9 * layers * tokens * heads * dim * candidates
    return {
        "shape": name,
        "seconds": best,
        "numpy_qk_gflops": product / best["numpy_qk"],
        "ratios": {
            "attention_f32": best["numpy_qk"] / best["attention_f32"],
            "attention_f16": best["numpy_qk"] / best["attention_f16"],
            "simhash_f32": best["numpy_simhash"] / best["simhash_f32"],
            "simhash_f16": best["numpy_simhash"] / best["simhash_f16"],
            "analytic_f32": best["numpy_qk"] / best["analytic_f32"],
            **(
                {"simhash_f32_faiss": best["faiss_lsh"] / best["simhash_f32"]}
                if "faiss_lsh" in best
                else {}
            ),
        },
    }


# ---- signatures --------------------------------------------------------------------------------


def compare_signatures(options: argparse.Namespace, model: Model) -> None:
    """Prints recall@budget of signatures for several numbers of bits."""
    template = ChatTemplate(model)
    book, tokens = options.book.read_text("utf-8"), options.tokens
    found: dict[tuple[int, float, int], list[float]] = {}
    with Context(model, tokens + 512, ContextOptions(threads=options.threads)) as context:
        for text in recall.documents(
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
    prompt = template.opening(recall.QUESTION.format(topic=topic)).after
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
    tokens, tried, words = options.tokens, options.layers_tried, options.bits[0] // 64
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
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument(
        "what", nargs="?", choices=("kernels", "signatures", "choose"), default="kernels"
    )
    parser.add_argument("--book", type=Path, help="of `signatures`")
    parser.add_argument("--model", help="of `signatures`")
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.1, 0.25])
    parser.add_argument("--documents", type=int, default=4)
    parser.add_argument("--questions", type=int, default=10)
    parser.add_argument("--bits", type=int, nargs="+")
    parser.add_argument("--layers-tried", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="threads of our kernels (NumPy keeps its own)")
    parser.add_argument("--repeat", type=int, default=5, help="runs; the best one counts")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    args = parser.parse_args()
    if args.what == "choose":
        args.tokens, args.bits = args.tokens or 131_072, args.bits or [128]
        time_choice(args)
        return
    if args.what == "signatures":
        if args.book is None:
            parser.error("signatures needs --book")
        args.tokens, args.bits = args.tokens or 4096, args.bits or [64, 128, 256, 512]
        with Model(models.find(args.model), extra_buffers=extra_buffers_work()) as model:
            compare_signatures(args, model)
        return
    threads = set_threads(args.threads if args.threads is not None else 1 << 16)
    rows = [measure(name, max(1, args.repeat)) for name in SHAPES]
    if args.json:
        print(json.dumps({"threads": threads, "rows": rows}))
        return
    print(f"{threads} threads; ratio = NumPy's time / ours, higher is better")
    print("attention and analytic against `@` for q . k alone, simhash against its NumPy form")
    print("and, in the rows named faiss, against IndexLSH of faiss")
    for row in rows:
        print(f"\n{row['shape']}: numpy q . k {row['numpy_qk_gflops']:.0f} GFLOP/s")
        for key, ratio in row["ratios"].items():
            own = row["seconds"][key.removesuffix("_faiss")]
            print(f"  {key:18} {own * 1e3:9.1f} ms   ratio {ratio:7.2f}")


if __name__ == "__main__":
    main()
