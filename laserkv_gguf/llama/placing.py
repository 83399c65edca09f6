"""Gives llama.cpp what a placement asks for: devices, splits, overrides, adapters."""

from __future__ import annotations

import ctypes
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import llama_cpp as L

from laserkv_gguf.errors import UserError
from laserkv_gguf.llama import devices, library, rpc
from laserkv_gguf.llama.placement import Placement, Rope
from laserkv_gguf.models import adapter

log = logging.getLogger(__name__)

_SPLIT_MODES = {
    "none": L.LLAMA_SPLIT_MODE_NONE,
    "layer": L.LLAMA_SPLIT_MODE_LAYER,
    "row": L.LLAMA_SPLIT_MODE_ROW,
}
_NUMA = {
    "distribute": L.GGML_NUMA_STRATEGY_DISTRIBUTE,
    "isolate": L.GGML_NUMA_STRATEGY_ISOLATE,
    "numactl": L.GGML_NUMA_STRATEGY_NUMACTL,
}
_SCALING = {
    "none": L.LLAMA_ROPE_SCALING_TYPE_NONE,
    "linear": L.LLAMA_ROPE_SCALING_TYPE_LINEAR,
    "yarn": L.LLAMA_ROPE_SCALING_TYPE_YARN,
}
_LOAD_AUTO, _LOAD_NONE, _LOAD_MLOCK, _LOAD_MMAP_MLOCK = -1, 0, 2, 3  # enum llama_load_mode


class _Override(ctypes.Structure):
    _fields_ = (("pattern", ctypes.c_char_p), ("buffer", ctypes.c_void_p))


@cache
def _use_numa(strategy: str) -> None:
    """Once a process, as llama.cpp has it."""
    L.llama_numa_init(_NUMA[strategy])


@dataclass
class Loading:
    """llama.cpp's parameters for a model, with all that they point to.

    Attributes:
        devices: that are used, in order.
    """

    params: Any
    devices: list[devices.Found]
    _alive: list[Any] = field(default_factory=list)

    def keep(self, array: Any) -> None:
        """Has an array live as long as this."""
        self._alive.append(array)


def loading(placement: Placement, gpu_layers: int | None, names: Sequence[str]) -> Loading:
    """Makes the parameters.

    Args:
        gpu_layers: layers on devices; None for all, where there is one.
        names: of the model's tensors, which overrides are held against.

    Raises:
        UserError: with the remedy in one line.
    """
    library.start()
    rpc.add(placement.rpc)
    found = devices.used(placement)
    if gpu_layers and not found:
        raise UserError(
            f"--gpu-layers {gpu_layers} asks for a GPU, but this build of llama-cpp-python or "
            "this machine has none; drop the flag, or install a build with CUDA"
        )
    if placement.tensor_split and not found:
        raise UserError(
            "--tensor-split shares layers among devices, and there is none; see --list-devices"
        )
    if placement.numa:
        _use_numa(placement.numa)
    params = L.llama_model_default_params()
    result = Loading(params, found)
    params.n_gpu_layers = (-1 if gpu_layers is None else gpu_layers) if found else 0
    params.split_mode = _SPLIT_MODES[placement.split_mode]
    if placement.split_mode == "none":  # `used` has chosen it
        params.main_gpu = 0
    addresses = [one.address for one in found]
    array = (ctypes.c_void_p * (len(addresses) + 1))(*addresses, None)
    result.keep(array)
    params.devices = ctypes.cast(array, ctypes.c_void_p)
    if placement.tensor_split:
        most = int(L.llama_max_devices())
        shares = (ctypes.c_float * most)(*placement.tensor_split)
        result.keep(shares)
        params.tensor_split = ctypes.cast(shares, ctypes.POINTER(ctypes.c_float))
    overrides = _overrides(placement, names)
    if overrides:
        table = (_Override * (len(overrides) + 1))(*overrides, _Override(None, None))
        result.keep(table)
        params.tensor_buft_overrides = ctypes.cast(table, ctypes.c_void_p)
    if placement.mlock:
        params.load_mode = _LOAD_MMAP_MLOCK if placement.mmap else _LOAD_MLOCK
    else:
        params.load_mode = _LOAD_AUTO if placement.mmap else _LOAD_NONE
    if placement.mlock and not L.llama_supports_mlock():
        raise UserError("--mlock: this system cannot keep memory from being swapped; leave it out")
    return result


def _overrides(placement: Placement, names: Sequence[str]) -> list[_Override]:
    wanted = placement.overrides
    if not wanted:
        return []
    buffers = devices.buffers()
    for pattern, buffer in wanted:
        if buffer not in buffers:
            there = ", ".join(buffers)
            raise UserError(f"--override-tensor {pattern}={buffer}: there is only {there} here")
    for given in placement.override_tensor:
        pattern = given.rpartition("=")[0]
        if not any(re.search(pattern, name) for name in names):
            log.warning("--override-tensor %s: no tensor of the model has such a name", given)
    if placement.n_cpu_moe and not any("exps" in name for name in names):
        log.warning("--n-cpu-moe %d: this model has no experts", placement.n_cpu_moe)
    return [_Override(pattern.encode(), buffers[buffer]) for pattern, buffer in wanted]


def adapters(placement: Placement, model: Any) -> list[Any]:
    """Loads the adapters onto a loaded model, which frees them.

    Raises:
        UserError: llama.cpp cannot load one.
    """
    found = []
    for name in placement.lora:
        with library.recorded() as lines:
            one = L.llama_adapter_lora_init(model, os.fsencode(name))
        if not one:
            detail = lines[-1].split(": ", 1)[-1] if lines else "no reason given"
            raise UserError(f"llama.cpp cannot load --lora {Path(name).name}: {detail}")
        found.append(one)
    return found


def check_adapters(placement: Placement, model: Path) -> None:
    """Refuses adapters of other models, before anything is loaded.

    Raises:
        UserError: with the remedy in one line.
    """
    for name in placement.lora:
        adapter.check(Path(name), model)


def use_adapters(context: Any, found: Sequence[Any]) -> None:
    """Has a context add adapters to its weights, each whole."""
    if not found:
        return
    kind = type(found[0])
    scales = (ctypes.c_float * len(found))(*[1.0] * len(found))
    if L.llama_set_adapters_lora(context, (kind * len(found))(*found), len(found), scales):
        raise UserError("llama.cpp cannot use the --lora adapters together; give one of them")


def scale_positions(params: Any, rope: Rope) -> None:
    """Sets the fields of a context's parameters; those that were not given stay."""
    if rope.rope_scaling is not None:
        params.rope_scaling_type = _SCALING[rope.rope_scaling]
    for name, value in rope.given().items():
        if name != "rope_scaling":
            setattr(params, name, value)
