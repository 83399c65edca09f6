"""From scores to kept candidates: pooling over neighbours and the k best."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from laserkv_gguf.timings import step


@step("select")
def top_k(scores: ArrayLike, k: int) -> NDArray[np.int64]:
    """Indices, ascending, of the ``k`` largest scores.

    ``scores`` (n,) of any real dtype; returns (min(max(k, 0), n),) int64. Of equal scores the
    lower index wins; NaN counts as minus infinity, so one bad score loses but never crashes or
    shifts the others. O(n) on average. Raises ValueError unless ``scores`` has one axis.
    """
    values: NDArray[Any] = np.asarray(scores)
    if values.ndim != 1:
        raise ValueError(f"scores must have one axis, got {values.shape}")
    n = values.size
    if k <= 0:
        return np.empty(0, dtype=np.int64)
    if k >= n:
        return np.arange(n, dtype=np.int64)
    if np.issubdtype(values.dtype, np.floating):
        values = np.where(np.isnan(values), -np.inf, values)
    threshold = np.partition(values, n - k)[n - k]
    chosen = values > threshold
    # argpartition would take any of the ties: take the first ones instead.
    tied = np.flatnonzero(values == threshold)[: k - int(np.count_nonzero(chosen))]
    chosen[tied] = True
    return np.flatnonzero(chosen).astype(np.int64, copy=False)


@step("select")
def pool(scores: ArrayLike, width: int, at: NDArray[np.int64] | None = None) -> NDArray[np.float32]:
    """Centred moving average over ``width`` neighbours, so that a phrase is kept whole.

    ``scores`` (n,) -> (n,) float32. SnapKV (arXiv 2404.14469, section 4) pools its votes; it pads
    with zeros, which pulls the ends down. Here the ends average over the neighbours that exist.
    ``width`` <= 1 changes nothing. NaN and infinities reach their neighbours and no further.
    With ``at`` (n,) int64, ascending, the places of the scores, neighbours are those no further
    apart than half of ``width`` there: nothing is averaged over a gap.
    Raises ValueError for an even ``width``, scores with other than one axis, or places that are
    not as many.
    """
    values = np.asarray(scores)
    if values.ndim != 1:
        raise ValueError(f"scores must have one axis, got {values.shape}")
    if at is not None and at.shape != values.shape:
        raise ValueError(f"{values.size} scores cannot be at {at.shape} places")
    if width <= 1:
        return values.astype(np.float32)
    if width % 2 == 0:
        raise ValueError(f"pooling width must be odd, got {width}")
    n = values.size
    if n == 0:
        return np.empty(0, dtype=np.float32)
    reach = min(width // 2, n - 1)
    if at is not None and at[-1] - at[0] == n - 1:
        at = None  # no gaps
    # Shifted additions, not differences of a running sum: those lose small scores beside large
    # ones, and one NaN would spoil everything after it.
    total = values.astype(np.float64)
    wide = total.copy()
    count = np.ones(n, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        for shift in range(1, reach + 1):
            if at is None:
                total[shift:] += wide[:-shift]
                total[:-shift] += wide[shift:]
                count[shift:] += 1.0
                count[:-shift] += 1.0
                continue
            near = np.flatnonzero(at[shift:] - at[:-shift] <= width // 2)
            total[near + shift] += wide[near]
            total[near] += wide[near + shift]
            count[near + shift] += 1.0
            count[near] += 1.0
        return (total / count).astype(np.float32)


@step("select")
def max_pool(scores: ArrayLike, width: int) -> NDArray[Any]:
    """The largest of ``width`` neighbours, centred, along the last axis; the ends have fewer.

    As SnapKV (arXiv 2404.14469) and PyramidKV pool in their published LongBench runs. A ``width``
    of 1 changes nothing. NaN reaches its neighbours. Raises ValueError for an even ``width``.
    """
    values = np.asarray(scores)
    if width > 1 and width % 2 == 0:
        raise ValueError(f"pooling width must be odd, got {width}")
    largest = values.copy()
    for shift in range(1, min(width // 2, values.shape[-1] - 1) + 1):
        np.maximum(largest[..., shift:], values[..., :-shift], out=largest[..., shift:])
        np.maximum(largest[..., :-shift], values[..., shift:], out=largest[..., :-shift])
    return largest
