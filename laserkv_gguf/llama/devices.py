"""The devices that llama.cpp computes on: listed, and chosen from, in one place."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import llama_cpp

from laserkv_gguf.errors import UserError
from laserkv_gguf.llama import library
from laserkv_gguf.llama.placement import AS_IT_COMES, NO_DEVICE, Placement


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


def _addresses() -> list[int]:
    library.start()
    count, get, *_ = _functions()
    return [int(get(index)) for index in range(count())]


# ---- choosing ----------------------------------------------------------------------------------

RPC = "RPC"


class _Props(ctypes.Structure):
    """struct ggml_backend_dev_props; `caps` with room to spare."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("description", ctypes.c_char_p),
        ("free", ctypes.c_size_t),
        ("total", ctypes.c_size_t),
        ("kind", ctypes.c_int),
        ("device_id", ctypes.c_char_p),
        ("caps", ctypes.c_uint8 * 16),
    )


_P = ctypes.c_void_p
_BASE: dict[str, tuple[Any, list[Any]]] = {
    "backend_dev_buffer_type": (_P, [_P]),
    "backend_buft_name": (ctypes.c_char_p, [_P]),
    "backend_dev_backend_reg": (_P, [_P]),
    "backend_reg_name": (ctypes.c_char_p, [_P]),
    "backend_dev_get_props": (None, [_P, ctypes.POINTER(_Props)]),
}


@cache
def _function(name: str) -> Any:
    result, arguments = _BASE[name]
    function = library.ggml_base()[f"ggml_{name}"]  # an object of our own
    function.restype, function.argtypes = result, arguments
    return function


@dataclass(frozen=True)
class Found:
    """A device that layers can go to.

    Attributes:
        address: llama.cpp's pointer.
        backend: such as "CUDA" or "RPC".
        buffer: the name of its memory, as --override-tensor has it.
        same_as: tells a card that two backends see; empty where unknown.
    """

    device: Device
    address: int
    backend: str
    buffer: str
    same_as: str

    @property
    def name(self) -> str:
        return self.device.name


def _found(device: Device, address: int) -> Found:
    kind = _function("backend_dev_buffer_type")(address)
    registry = _function("backend_dev_backend_reg")(address)
    props = _Props()
    _function("backend_dev_get_props")(address, ctypes.byref(props))
    return Found(
        device,
        address,
        _function("backend_reg_name")(registry).decode(),
        _function("backend_buft_name")(kind).decode() if kind else "",
        (props.device_id or b"").decode("utf-8", "replace"),
    )


def present() -> list[Found]:
    """All devices but the CPU and what helps it."""
    pairs = zip(listed(), _addresses(), strict=True)
    return [_found(device, at) for device, at in pairs if device.kind in ("gpu", "igpu")]


def buffers() -> dict[str, int]:
    """llama.cpp's pointers to the devices' kinds of memory, by device and by llama.cpp's name."""
    found: dict[str, int] = {}
    for device, address in zip(listed(), _addresses(), strict=True):
        if kind := _function("backend_dev_buffer_type")(address):
            found.setdefault(device.name, kind)
            found.setdefault(_function("backend_buft_name")(kind).decode(), kind)
    return found


def used(placement: Placement) -> list[Found]:
    """The devices that llama.cpp will use for a placement, in its order.

    As `llama_prepare_model_devices` has it: RPC servers first, then GPUs, each once, and GPUs that
    share the host's memory only where there are no others.

    Raises:
        UserError: there is no device of that name, or --main-gpu is none.
    """
    here = present()
    if placement.device:
        chosen = [] if placement.device == (NO_DEVICE,) else _named(placement.device, here)
    else:
        servers = [one for one in here if one.backend == RPC]
        servers = [one for one in servers if one.device.description in placement.rpc]
        cards: list[Found] = []
        for one in here:
            if one.device.kind == "gpu" and one.backend != RPC:
                known = {card.same_as for card in cards if card.same_as}
                cards += [one] if one.same_as not in known else []
        shared = [one for one in here if one.device.kind == "igpu"]
        shared = [one for one in shared if one.backend == shared[0].backend]
        chosen = [*servers, *(cards or shared)]
    placement.check_devices([one.name for one in chosen], wanted=True)
    if placement.split_mode == "none" and chosen:
        chosen = [chosen[placement.main_gpu]]
    return chosen


def _named(names: Sequence[str], here: Iterable[Found]) -> list[Found]:
    by_name = {one.name.lower(): one for one in here}
    for name in names:
        if name.lower() not in by_name:
            there = ", ".join(one.name for one in by_name.values()) or "no device but the CPU"
            raise UserError(
                f"there is no device {name}; --list-devices shows {there}; "
                "name one of these, or none"
            )
    return [by_name[name.lower()] for name in names]


def to_lend(names: Sequence[str]) -> list[int]:
    """llama.cpp's pointers to devices that an RPC server is to lend.

    Args:
        names: also the CPU's; none for all GPUs of this machine, or the CPU where there is none.

    Raises:
        UserError: there is no device of that name.
    """
    pairs = [*zip(listed(), _addresses(), strict=True)]
    if names:
        by_name = {device.name.lower(): at for device, at in pairs}
        for name in names:
            if name.lower() not in by_name:
                there = ", ".join(device.name for device, _ in pairs)
                raise UserError(f"there is no device {name} to lend; name some of {there}")
        return [by_name[name.lower()] for name in names]
    return [one.address for one in used(AS_IT_COMES)] or [cpu()]


def table() -> str:
    """The devices, one a line, as llama.cpp's programs list them."""
    lines = [
        f"  {one.name}: {one.device.description} "
        f"({one.device.total >> 20} MiB, {one.device.free >> 20} MiB free)"
        for one in present()
    ]
    return "\n".join(["Available devices:", *(lines or ["  (none)"])])
