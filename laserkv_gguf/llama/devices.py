"""The devices that llama.cpp computes on: listed, and chosen from, in one place."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from typing import Any

import llama_cpp

from laserkv_gguf.llama import library


@dataclass(frozen=True)
class Device:
    """A compute device of this build: `kind` is "cpu", "gpu", "igpu" or "accel"; bytes."""

    name: str
    description: str
    kind: str
    free: int
    total: int


@cache
def _functions() -> tuple[Any, ...]:
    base, registry = library.ggml_base(), library.ggml()
    count, get = registry.ggml_backend_dev_count, registry.ggml_backend_dev_get
    count.restype = ctypes.c_size_t
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    name, about = base.ggml_backend_dev_name, base.ggml_backend_dev_description
    for function in (name, about):
        function.restype, function.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
    kind, memory = base.ggml_backend_dev_type, base.ggml_backend_dev_memory
    kind.restype, kind.argtypes = ctypes.c_int, [ctypes.c_void_p]
    size_p = ctypes.POINTER(ctypes.c_size_t)
    memory.restype, memory.argtypes = None, [ctypes.c_void_p, size_p, size_p]
    return count, get, name, about, kind, memory


def listed() -> list[Device]:
    """The devices llama.cpp sees, CPUs included."""
    library.start()
    count, get, name, about, kind, memory = _functions()
    found = []
    for index in range(count()):
        device = get(index)
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        memory(device, ctypes.byref(free), ctypes.byref(total))
        kinds = {0: "cpu", 1: "gpu", 2: "igpu"}
        found.append(
            Device(
                name(device).decode(),
                about(device).decode("utf-8", "replace"),
                kinds.get(kind(device), "accel"),
                free.value,
                total.value,
            )
        )
    return found


def cpu() -> int:
    """The address of the CPU's device; 0 where a build has none."""
    library.start()
    count, get, _, _, kind, _ = _functions()
    found = (get(index) for index in range(count()))
    return next((device for device in found if kind(device) == 0), 0)


def can_offload() -> bool:
    """Whether this build can put layers on a GPU and one is there."""
    library.start()
    return bool(llama_cpp.llama_supports_gpu_offload()) and any(
        device.kind in ("gpu", "igpu") for device in listed()
    )
