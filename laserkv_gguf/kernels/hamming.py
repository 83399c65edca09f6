"""Which tokens lie near a question, by packed signatures alone: XOR, popcount, a vote.

Every query of every layer and head votes for the tokens whose signatures differ from its own in
the fewest bits, as many as `share` of all. Votes are integers, so that the result depends on
neither the number of threads nor their order.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped,unused-ignore]
from numba import prange, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from laserkv_gguf.kernels._jit import jit, native_lock, threads_in_use

SHARE = 0.03
_TILE = 1024  # tokens looked at while their signatures lie in the first cache
_SAMPLE = 4096  # tokens whose distances say how near is near
_VOTE = 1 << 24  # a query's votes add up to about this many


@intrinsic
def _popcount(_context: Any, value: Any) -> Any:
    def code(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.ctpop(builder.bitcast(arguments[0], ir.IntType(64)))

    return types.int64(value), code


_bits: Any = _popcount


def hamming_votes(
    queries: NDArray[np.uint64], keys: NDArray[np.uint64], *, share: float = SHARE
) -> NDArray[np.float64]:
    """How much of the queries' votes every token gets, (tokens,) float64; all of them add up to 1.

    Args:
        queries: (layers, kv_heads, rows, words): signatures of the queries that ask a kv head.
        keys: (layers, kv_heads, words, tokens): of the keys.
        share: of the tokens a query votes for, those that are nearest; ties vote along, and the
            more votes a query has the less each counts.

    Raises:
        ValueError: shapes that do not fit together, or a share outside (0, 1].
        TypeError: another dtype.
    """
    if queries.dtype != np.uint64 or keys.dtype != np.uint64:
        raise TypeError(f"signatures must be uint64, got {queries.dtype} and {keys.dtype}")
    if queries.ndim != 4 or keys.ndim != 4 or queries.shape[:2] != keys.shape[:2]:
        raise ValueError(f"signatures of shapes {queries.shape} and {keys.shape} do not fit")
    if queries.shape[3] != keys.shape[2]:
        raise ValueError(f"{queries.shape[3]} and {keys.shape[2]} words do not compare")
    if not 0 < share <= 1:
        raise ValueError(f"share must be above 0 and at most 1, got {share}")
    tokens = keys.shape[3]
    if not tokens or not queries.size:
        return np.zeros(tokens)
    tasks = queries.shape[0] * queries.shape[1]
    asked = np.ascontiguousarray(queries).reshape(tasks, *queries.shape[2:])
    codes = keys.reshape(tasks, *keys.shape[2:])
    workers = min(threads_in_use(), tasks)
    votes = np.zeros((workers, tokens), np.int64)
    step = max(1, tokens // _SAMPLE)
    with native_lock:
        _vote(asked, codes, step, share, workers, votes)
    total = votes.sum(axis=0)
    return np.asarray(total / max(int(total.sum()), 1), np.float64)


@jit(parallel=True)
def _vote(
    queries: NDArray[np.uint64],
    keys: NDArray[np.uint64],
    step: int,
    share: float,
    workers: int,
    votes: NDArray[np.int64],
) -> None:
    for worker in prange(workers):
        _vote_share(queries, keys, step, share, worker, workers, votes[worker])


@jit(inline=True)
def _vote_share(
    queries: NDArray[np.uint64],
    keys: NDArray[np.uint64],
    step: int,
    share: float,
    worker: int,
    workers: int,
    votes: NDArray[np.int64],
) -> None:
    """One worker's kv heads: how near is near for each query, then the votes tile by tile."""
    tasks, rows, words = queries.shape
    tokens = keys.shape[2]
    near = np.empty(rows, np.int64)
    weight = np.empty(rows, np.int64)
    counts = np.empty(64 * words + 1, np.int64)
    distance = np.empty(_TILE, np.int64)
    for task in range(worker, tasks, workers):
        for row in range(rows):
            counts[:] = 0
            seen = 0
            for token in range(0, tokens, step):
                apart = 0
                for word in range(words):
                    apart += _bits(queries[task, row, word] ^ keys[task, word, token])
                counts[apart] += 1
                seen += 1
            wanted = max(1, int(share * seen))
            within = 0
            apart = -1
            while within < wanted:
                apart += 1
                within += counts[apart]
            near[row] = apart
            weight[row] = _VOTE // (within * step)
        for first in range(0, tokens, _TILE):
            count = min(_TILE, tokens - first)
            for row in range(rows):
                query = queries[task, row, 0]
                codes = keys[task, 0, first : first + count]
                for i in range(count):
                    distance[i] = _bits(query ^ codes[i])
                for word in range(1, words):
                    query = queries[task, row, word]
                    codes = keys[task, word, first : first + count]
                    for i in range(count):
                        distance[i] += _bits(query ^ codes[i])
                limit, worth = near[row], weight[row]
                into = votes[first : first + count]
                for i in range(count):
                    into[i] += worth if distance[i] <= limit else 0
