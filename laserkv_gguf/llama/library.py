"""llama.cpp as installed: its shared libraries, its log, its identity."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import platform
import re
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import llama_cpp
from llama_cpp import _ctypes_extensions

log = logging.getLogger("llama.cpp")

# enum ggml_log_level; 5 continues the line before
_LEVELS = {
    1: logging.DEBUG,
    2: logging.INFO,
    3: logging.WARNING,
    4: logging.ERROR,
}
_BUFFER = re.compile(r"(\S+) +(model|KV|compute|output) buffer size = +([\d.]+) MiB")
_OFFLOADED = re.compile(r"offloaded (\d+)/\d+ layers to GPU")
_LONGEST = 2000  # characters of a line that is looked through: a model's name may have millions
_recent: deque[tuple[int, str]] = deque(maxlen=200)
_pending: list[str] = []
_pending_level = logging.DEBUG


@llama_cpp.llama_log_callback
def _on_log(level: int, text: bytes, _user: ctypes.c_void_p) -> None:
    global _pending_level
    if level != 5:
        _flush()
        _pending_level = _LEVELS.get(level, logging.DEBUG)
    _pending.append(text.decode("utf-8", "replace"))
    if _pending[-1].endswith("\n"):
        _flush()


def _flush() -> None:
    line = "".join(_pending).strip()
    _pending.clear()
    if line:
        if _pending_level >= logging.INFO:
            _recent.append((_pending_level, line[:_LONGEST]))
        # llama.cpp's errors reach the user as our one line; its warnings are for --debug
        log.log(min(_pending_level, logging.INFO), "%s", line)


@cache
def start() -> None:
    """Initialises llama.cpp once per process and sends its log to logging ("llama.cpp")."""
    llama_cpp.llama_log_set(_on_log, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()


_kept: list[Any] = []  # llama.cpp calls it at any time


def on_abort(act: Callable[[], None]) -> None:
    """Has ggml call this instead of printing where it is, before it ends the process."""
    kind = ctypes.CFUNCTYPE(None, ctypes.c_char_p)

    def said(message: bytes) -> None:
        log.info("ggml aborts: %s", message.decode("utf-8", "replace"))
        act()

    callback = kind(said)
    _kept.append(callback)
    function = ggml_base()["ggml_set_abort_callback"]
    function.restype, function.argtypes = ctypes.c_void_p, [kind]
    function(callback)


@contextmanager
def recorded() -> Iterator[list[str]]:
    """Collects what llama.cpp logs as warning or error while the block runs."""
    _recent.clear()
    lines: list[str] = []
    try:
        yield lines
    finally:
        _flush()
        lines.extend(line for level, line in _recent if level >= logging.WARNING)


def buffers() -> dict[str, int]:
    """Bytes of the buffers that llama.cpp told of since the last `recorded` began.

    By device and purpose, such as "CPU KV" or "CUDA0 model"; to a hundredth of a MiB, as logged.
    """
    sizes: dict[str, int] = {}
    for _, line in _recent:
        if found := _BUFFER.search(line):
            name = f"{found[1]} {found[2]}"
            sizes[name] = sizes.get(name, 0) + round(float(found[3]) * 2**20)
    return sizes


def offloaded() -> int:
    """Layers on a GPU, as llama.cpp told of the model it loaded last; 0 where it told nothing."""
    said = (_OFFLOADED.search(line) for _, line in reversed(_recent))
    return next((int(found[1]) for found in said if found), 0)


@cache
def library_folder() -> Path:
    """Where llama-cpp-python keeps its shared libraries."""
    return Path(llama_cpp.__file__).parent / "lib"


@cache
def ggml_base() -> ctypes.CDLL:
    """libggml-base, which holds tensors and backends' generic functions."""
    return _load("ggml-base")


@cache
def ggml() -> ctypes.CDLL:
    """libggml, which holds the registry of devices."""
    return _load("ggml")


def _load(name: str) -> ctypes.CDLL:
    """The library that libllama uses itself.

    Its own name may lead to a second copy of the file (libggml.so beside libggml.so.0), with a
    registry of devices that libllama does not see. Elsewhere than on Windows a library's handle
    finds the functions of all that it was linked with.
    """
    name = name if sys.platform == "win32" else "llama"
    library: ctypes.CDLL = _ctypes_extensions.load_shared_library(name, library_folder())
    return library


def version() -> str:
    """Which llama.cpp this is, in words."""
    return f"llama-cpp-python {llama_cpp.__version__}"


@cache
def build_identity() -> str:
    """A digest of the shared libraries and the processor: what a crash depends on."""
    digest = hashlib.sha256()
    for path in sorted(library_folder().glob("*ggml*")):
        state = path.stat()
        digest.update(f"{path.name} {state.st_size} {state.st_mtime_ns}\n".encode())
    digest.update(f"{llama_cpp.__version__} {_processor()}".encode())
    return digest.hexdigest()[:32]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(
        sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    )
