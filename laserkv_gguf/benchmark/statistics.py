"""From repeated measurements to figures: medians, spread, ratios, exponents of growth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median, quantiles
from typing import Any

RATIOS = (
    "first_token_seconds",
    "prefill_seconds",
    "decode_tokens_per_second",
    "decode_seconds_per_token",
    "fastest_decode_seconds_per_token",
    "kv_bytes",
    "context_bytes",
    "peak_rss_bytes",
    "device_memory_bytes",
)
"""What a policy's row is compared in with the full cache's."""

GROWING = (
    "first_token_seconds",
    "prefill_seconds",
    "decode_seconds_per_token",
    "kv_bytes",
    "context_bytes",
    "peak_rss_bytes",
    "device_memory_bytes",
)
"""What is fitted against the length."""


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles, least and most of at least one value."""
    low, high = min(values), max(values)
    first, third = low, high
    if len(values) > 1:
        first, _, third = quantiles(values, n=4, method="inclusive")
    return {"median": median(values), "q1": first, "q3": third, "min": low, "max": high}


def ratio(full: float | None, other: float | None) -> float | None:
    """Full ÷ other; None where either is missing or zero."""
    return full / other if full and other else None


def ratios(full: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, float | None]:
    """Full ÷ other by the names of `RATIOS`: above 1 is a gain, but for tokens per second.

    None where one of them was not measured; names that neither has are left out.
    """
    measured = (n for n in RATIOS if full.get(n) is not None or other.get(n) is not None)
    return {name: ratio(full.get(name), other.get(name)) for name in measured}


def exponent(lengths: Sequence[float], values: Sequence[float | None]) -> float | None:
    """The k of ``value = c · length^k`` that fits best: least squares in logarithms.

    None where there are fewer than two lengths with a positive value.
    """
    import numpy as np

    points = [(n, v) for n, v in zip(lengths, values, strict=True) if v is not None and v > 0]
    if len({n for n, _ in points}) < 2:
        return None
    x, y = np.log(np.array(points, float).T)
    slope = float(np.polyfit(x, y, 1)[0])
    return slope if math.isfinite(slope) else None
