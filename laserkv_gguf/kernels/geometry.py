"""Scores in plain NumPy: how keys lie among themselves, and attention with no more than a matrix.

Keys are (layers, candidates, kv_heads, head_dim), float16 or float32, and are widened one head at
a time. A key with a NaN or an infinity scores NaN, which loses in `top_k`, and is left out of what
the other keys are measured by.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

_TINY = 1e-12  # keeps vectors of norm 0 at 0
_LEAST_SPREAD = 1e-6  # of scores that are to be told apart
_RIDGE = 1e-2  # on the sketched keys' Gram matrix, which may be singular


def keydiff_scores(keys: NDArray[Any]) -> NDArray[np.float64]:
    """How little each key is like all of them: (candidates,), summed over layers and heads.

    KeyDiff (arXiv 2504.15364): minus the cosine of a key and the mean of the normalised keys.
    """
    total = np.zeros(keys.shape[1])
    for layer in keys:
        for rows, sound in _heads(layer):
            unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), _TINY)
            mean = unit.sum(axis=0) / max(int(sound.sum()), 1)
            cosine = unit @ (mean / max(float(np.linalg.norm(mean)), _TINY))
            total -= np.where(sound, cosine, np.nan)
    return total


def leverage_scores(keys: NDArray[Any], *, sketch: int = 48, seed: int = 0) -> NDArray[np.float64]:
    """Approximate leverage of each key: (candidates,), z-scores summed over layers and heads.

    Compactor (arXiv 2507.08143): with X the centred keys of a head times a Gaussian matrix of
    `sketch` columns, the diagonal of X (XᵀX)⁻¹ Xᵀ, standardised over a layer's heads and tokens.

    Args:
        keys: as for the whole module.
        sketch: columns of the Gaussian matrix, at least 1.
        seed: of that matrix, the same one for all layers and heads.
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    gaussian = generator.standard_normal((keys.shape[3], sketch)) / np.sqrt(sketch)
    ridge = _RIDGE * np.eye(sketch)
    total = np.zeros(keys.shape[1])
    for layer in keys:
        scores = np.empty((keys.shape[2], keys.shape[1]))
        for head, (rows, sound) in enumerate(_heads(layer)):
            rows -= rows.sum(axis=0) / max(int(sound.sum()), 1)
            rows[~sound] = 0
            sketched = rows @ gaussian
            solved = np.linalg.solve(sketched.T @ sketched + ridge, sketched.T)
            scores[head] = np.maximum((sketched * solved.T).sum(axis=1), 0)
            scores[head, ~sound] = np.nan
        total += z_scores(scores).sum(axis=0)
    return total


def z_scores(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Scores with mean 0 and standard deviation 1; 0 where they hardly differ, NaN stays NaN."""
    sound = scores[np.isfinite(scores)]
    if sound.size == 0:
        return scores
    standard: NDArray[np.float64] = (scores - sound.mean()) / max(sound.std(), _LEAST_SPREAD)
    return standard


def attention(
    queries: NDArray[np.float32],
    keys: NDArray[np.float32],
    scale: float,
    outside: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """softmax(scale · Q Kᵀ) of (queries, head_dim) and (keys, head_dim): (queries, keys).

    A product that is no number counts as no attention; a row of nothing else is 0.

    Args:
        outside: (queries,): log-sum-exp of scale · q · k over keys that are seen but not given
            here, which take their part of the softmax; None for none.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        weights = queries @ keys.T
        weights *= np.float32(scale)
    weights[~np.isfinite(weights)] = -np.inf
    peak = weights.max(axis=1, keepdims=True)
    if outside is not None:
        beside = np.where(np.isfinite(outside), outside, np.float32(-np.inf))[:, None]
        peak = np.maximum(peak, beside)
    peak = np.where(np.isfinite(peak), peak, np.float32(0))
    weights -= peak
    np.exp(weights, out=weights)
    total = weights.sum(axis=1, keepdims=True)
    if outside is not None:
        total += np.exp(beside - peak)
    weights /= np.where(total > 0, total, np.float32(1))
    return weights


def attention_by_head(
    queries: NDArray[np.float32], keys: NDArray[Any], outside: NDArray[np.float32] | None = None
) -> Iterator[NDArray[np.float32]]:
    """What every head pays each key, summed over its queries: a layer at a time, (heads, keys).

    Args:
        queries: (layers, tokens, heads, head_dim).
        keys: (layers, keys, kv_heads, head_dim).
        outside: (layers, tokens, heads), as of `attention`.
    """
    heads, dim = queries.shape[2:]
    group = heads // keys.shape[2]
    for layer, (asked, held) in enumerate(zip(queries, keys, strict=True)):
        received = np.empty((heads, held.shape[0]), np.float32)
        for kv_head in range(held.shape[1]):
            wide = held[:, kv_head].astype(np.float32)
            for head in range(kv_head * group, (kv_head + 1) * group):
                beside = None if outside is None else outside[layer, :, head]
                weights = attention(asked[:, head], wide, dim**-0.5, beside)
                received[head] = weights.sum(axis=0)
        yield received


def _heads(layer: NDArray[Any]) -> Iterator[tuple[NDArray[np.float64], NDArray[np.bool_]]]:
    """Every head's keys (candidates, head_dim), unsound ones as 0, and which of them are sound."""
    for head in range(layer.shape[1]):
        rows = layer[:, head].astype(np.float64)
        sound = np.asarray(np.isfinite(rows).all(axis=1))
        rows[~sound] = 0
        yield rows, sound
