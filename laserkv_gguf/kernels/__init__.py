"""Scoring kernels: NumPy arrays in, arrays out, no llama.cpp. Compiled by Numba at first call."""

from __future__ import annotations

from laserkv_gguf.kernels._jit import set_threads, threads
from laserkv_gguf.kernels.attention import (
    attention_by_layer,
    attention_consensus,
    attention_peaks,
    log_sums,
)
from laserkv_gguf.kernels.select import max_pool, pool, top_k
from laserkv_gguf.kernels.simhash import (
    analytic_collisions,
    collision_scores,
    planes,
    signatures,
)
from laserkv_gguf.kernels.values import value_norms

__all__ = [
    "analytic_collisions",
    "attention_by_layer",
    "attention_consensus",
    "attention_peaks",
    "collision_scores",
    "log_sums",
    "max_pool",
    "planes",
    "pool",
    "set_threads",
    "signatures",
    "threads",
    "top_k",
    "value_norms",
]
