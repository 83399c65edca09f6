"""Whether the compiled kernels are kept on disk, so that only the first use compiles."""

from __future__ import annotations

import os
from typing import Any

from laserkv_gguf.kernels import attention, simhash

NEEDED: tuple[Any, ...] = (attention.COMPILED, simhash.COMPILED)  # what `laser` runs


def state() -> tuple[str, bool, bool]:
    """(folder, writable, warm): where Numba keeps the kernels and whether it has them."""
    caches = [getattr(kernel, "_cache", None) for kernel in NEEDED]
    files: list[Any] = [getattr(cache, "_cache_file", None) for cache in caches]
    if None in files:  # compiled per process: no place for a cache was found
        return "", False, False
    folder = str(NEEDED[0]._cache.cache_path)
    # an index written for other sources counts as empty
    warm = all(file._load_index() for file in files)
    return folder, os.access(folder, os.W_OK), warm
