"""The one door to Numba: a typed ``jit``, a cache that knows all its sources, the threads."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
from threadpoolctl import ThreadpoolController

F = TypeVar("F", bound=Callable[..., Any])

# Numba's own threads, which sleep while there is nothing to do. Those of OpenMP would count as
# llama.cpp's, and with more of them than cores all sleep between the nodes of a graph: a token then
# takes more than twice as long.
if getattr(numba.config, "THREADING_LAYER") == "default":  # noqa: B009 (untyped)
    setattr(numba.config, "THREADING_LAYER", "workqueue")  # noqa: B010

# This layer aborts the process when two Python threads enter parallel code at once, so the
# wrappers take this lock around every compiled call.
native_lock = threading.Lock()


def _sources_digest() -> str:
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(Path(__file__).parent.glob("*.py")):
        try:
            digest.update(path.read_bytes())
        except OSError:
            digest.update(path.name.encode())
    return digest.hexdigest()


_DIGEST = _sources_digest()


def jit(*, parallel: bool = False, inline: bool = False) -> Callable[[F], F]:
    """``numba.njit``, nogil; with ``inline`` a helper that only exists inside its callers.

    Entry points are cached on disk. Numba's cache only watches the file a function is written in,
    but ours call helpers from other files: the digest of the whole package joins the cache's
    stamp. Where no place for a cache can be written to, functions are compiled per process.
    """

    def decorate(function: F) -> F:
        if inline:
            # Inlined by Numba, before LLVM: a helper compiled on its own would be optimised again
            # in every library that links it, several times the compile time.
            return cast(F, numba.njit(nogil=True, inline="always")(function))
        try:
            compiled = numba.njit(parallel=parallel, nogil=True, cache=True)(function)
        except RuntimeError:  # "no locator available": read-only installation without a home
            return cast(F, numba.njit(parallel=parallel, nogil=True)(function))
        cache_file: Any = getattr(getattr(compiled, "_cache", None), "_cache_file", None)
        if hasattr(cache_file, "_source_stamp"):
            cache_file._source_stamp = (cache_file._source_stamp, _DIGEST)
        return cast(F, compiled)

    return decorate


def set_threads(n: int) -> int:
    """Let the kernels use ``n`` threads, clipped to 1 .. the number Numba was launched with.

    Returns the number now in force. The setting belongs to the calling thread (as in Numba).
    """
    most = int(getattr(numba.config, "NUMBA_NUM_THREADS"))  # noqa: B009 (untyped)
    threads = max(1, min(int(n), most))
    numba.set_num_threads(threads)
    return threads


@contextmanager
def threads(n: int) -> Iterator[None]:
    """Inside, the calling thread's kernels and NumPy's matrix products use at most ``n`` threads.

    Numba's setting belongs to the thread, that of the BLAS library to the process.
    """
    before = threads_in_use()
    set_threads(n)
    try:
        with _libraries().limit(limits=n, user_api="blas"):
            yield
    finally:
        set_threads(before)


@cache
def _libraries() -> ThreadpoolController:
    return ThreadpoolController()


def threads_in_use() -> int:
    """The number of threads the kernels use when called from this thread."""
    return int(numba.get_num_threads())
