"""How fast the kernels are beside NumPy, on this machine and in this run.

    python scripts/bench_kernels.py [--threads N] [--json] [--repeat N]

Attention is compared with ``numpy @`` for the product q . k alone (no softmax, no sum), on the
same values laid out as BLAS likes them; SimHash with its NumPy form on one layer, scaled up, and,
where faiss is installed (pip install faiss-cpu), with its IndexLSH: as many bits, keys encoded and
the queries searched for as many as a block keeps.
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

from laserkv_gguf.kernels import (
    analytic_collisions,
    attention_consensus,
    collision_scores,
    planes,
    set_threads,
)

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


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, help="threads of our kernels (NumPy keeps its own)")
    parser.add_argument("--repeat", type=int, default=5, help="runs; the best one counts")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    args = parser.parse_args()
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
