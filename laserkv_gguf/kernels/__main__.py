"""`python -m laserkv_gguf.kernels`: compile every kernel now, so that the first use need not."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import numpy as np

from laserkv_gguf.kernels import (
    analytic_collisions,
    attention_consensus,
    collision_scores,
    log_sums,
)
from laserkv_gguf.kernels.hamming import hamming_votes

PACKAGE = "laserkv_gguf.kernels"
_VECTORS = np.ones((1, 16, 1, 8), np.float32)
_CODES = np.ones((1, 1, 1, 16), np.uint64)

KERNELS: dict[str, Callable[[], object]] = {
    "attention": lambda: attention_consensus(_VECTORS, _VECTORS),
    "largest": lambda: attention_consensus(_VECTORS, _VECTORS, over="max"),
    "sums": lambda: log_sums(_VECTORS, _VECTORS),
    "collisions": lambda: collision_scores(_VECTORS, _VECTORS, bits=8, tables=8, seed=0),
    "analytic": lambda: analytic_collisions(_VECTORS, _VECTORS, bits=8),
    "votes": lambda: hamming_votes(_CODES[..., :1], _CODES),
}


def main(names: list[str]) -> int:
    """Compiles the named kernels; without names all, each in a process of its own."""
    if names:
        for name in names:
            KERNELS[name]()
        return 0
    # Numba compiles one function at a time in a process
    children = [subprocess.Popen([sys.executable, "-m", PACKAGE, name]) for name in KERNELS]
    return max(child.wait() for child in children)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
