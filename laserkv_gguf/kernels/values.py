"""Lengths of values, as the native probe computes them while it captures (llama/capture.py)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def value_norms(
    values: NDArray[Any], factors: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """‖v‖ of every value, or ‖F v‖, with v as float16 holds it.

    Args:
        values: (layers, n, kv_heads, head_dim) float16 or float32.
        factors: (layers, kv_heads, head_dim, head_dim) float32, symmetric; see llama/output.py.

    Returns:
        (layers, n, kv_heads) float32.
    """
    norms = np.empty(values.shape[:3], np.float32)
    for layer, value in enumerate(values):
        wide = value.astype(np.float16).astype(np.float32)
        if factors is not None:
            wide = np.swapaxes(np.swapaxes(wide, 0, 1) @ factors[layer], 0, 1)
        norms[layer] = np.sqrt(np.einsum("ckd,ckd->ck", wide, wide))
    return norms
