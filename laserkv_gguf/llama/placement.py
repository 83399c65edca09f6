"""How a model is loaded: where layers, weights and cache go, and how its positions are scaled.

What llama.cpp's flags ask for; nothing here needs llama.cpp.

`placing` gives it to llama.cpp, `planning.fits` counts with it before anything is loaded.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate
from pathlib import Path
from typing import Any

from laserkv_gguf.errors import UserError
from laserkv_gguf.models.identity import identity

SPLIT_MODES = ("none", "layer", "row")
NUMA = ("distribute", "isolate", "numactl")
ROPE_SCALING = ("none", "linear", "yarn")
NO_DEVICE = "none"
CPU_BUFFER = "CPU"
MOST_SERVERS, PORTS = 16, 1 << 16  # GGML_RPC_MAX_SERVERS
EXPERTS = r"\.ffn_(up|down|gate|gate_up)_(ch|)exps"


@dataclass(frozen=True)
class Rope:
    """How positions are scaled; the fields are llama.cpp's flags, None for what the model says."""

    rope_scaling: str | None = None
    rope_freq_base: float | None = None
    rope_freq_scale: float | None = None
    yarn_orig_ctx: int | None = None
    yarn_ext_factor: float | None = None
    yarn_attn_factor: float | None = None
    yarn_beta_slow: float | None = None
    yarn_beta_fast: float | None = None

    def check(self) -> None:
        """Refuses unusable values.

        Raises:
            UserError: with the remedy in one line.
        """
        if self.rope_scaling is not None and self.rope_scaling not in ROPE_SCALING:
            raise UserError(
                f"--rope-scaling {self.rope_scaling} is unknown; use {', '.join(ROPE_SCALING)}"
            )
        if self.rope_freq_scale is not None and not 1e-4 <= self.rope_freq_scale <= 1:
            raise UserError(
                f"--rope-freq-scale {self.rope_freq_scale:g}: give 1 divided by how many times the "
                "context is to grow, such as 0.25"
            )
        if self.rope_freq_base is not None and not 1 <= self.rope_freq_base < 1e12:
            raise UserError(
                f"--rope-freq-base {self.rope_freq_base:g}: give a base such as 1000000"
            )
        if self.yarn_orig_ctx is not None and not 1 <= self.yarn_orig_ctx < 1 << 31:
            raise UserError(f"--yarn-orig-ctx {self.yarn_orig_ctx}: give a number of tokens")
        for name in ("ext_factor", "attn_factor", "beta_slow", "beta_fast"):
            value = getattr(self, f"yarn_{name}")
            if value is not None and not 0 <= value < 1e6:
                flag = f"--yarn-{name.replace('_', '-')}"
                raise UserError(f"{flag} {value:g}: give a number of 0 or more")

    def positions(self, trained: int, scale: float) -> int:
        """How many positions the model takes with this scaling.

        Args:
            trained: positions that its header names.
            scale: the scale of frequencies that its header names, 1 for none.
        """
        wanted = 1.0 if self.rope_scaling == "none" else self.rope_freq_scale
        return trained if wanted is None else round(trained * scale / wanted)

    def given(self) -> dict[str, Any]:
        """The flags that were given, for what depends on them."""
        named = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: value for name, value in named.items() if value is not None}


_AS_TRAINED = Rope()


@dataclass(frozen=True)
class Placement:
    """How a model is loaded; the fields are llama.cpp's flags.

    Attributes:
        device: names of the devices to use, in order; ("none",) for none, () for all there are.
        split_mode: "layer" spreads layers over the devices, "none" puts all on `main_gpu`, "row"
            splits matrices where a backend can.
        tensor_split: each device's share of the layers; () for shares by free memory.
        main_gpu: which device "none" uses, counted from 0.
        override_tensor: "PATTERN=BUFFER": tensors whose names match lie in that device's memory.
        n_cpu_moe: of the first so many layers the experts stay in RAM.
        kv_offload: whether a layer's cache lies where the layer does; else it lies in RAM.
        mlock: keep what is in RAM from being swapped out.
        mmap: map the file; else it is read.
        numa: "distribute", "isolate" or "numactl"; None for nothing.
        lora: adapters (GGUF files) that are added to the weights.
        rpc: servers, "HOST:PORT", whose devices come before all others.
        rope: how positions are scaled.
    """

    device: tuple[str, ...] = ()
    split_mode: str = "layer"
    tensor_split: tuple[float, ...] = ()
    main_gpu: int = 0
    override_tensor: tuple[str, ...] = ()
    n_cpu_moe: int = 0
    kv_offload: bool = True
    mlock: bool = False
    mmap: bool = True
    numa: str | None = None
    lora: tuple[str, ...] = ()
    rpc: tuple[str, ...] = ()
    rope: Rope = _AS_TRAINED

    @staticmethod
    def of(given: Mapping[str, Any]) -> Placement:
        """From what `asdict` and JSON made of one."""
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in given.items()
        }
        rope: Mapping[str, Any] = given.get("rope", {})
        values["rope"] = Rope(**rope)
        return Placement(**values)

    def check(self) -> None:
        """Refuses what no machine could do.

        Raises:
            UserError: with the remedy in one line.
        """
        if self.split_mode not in SPLIT_MODES:
            raise UserError(
                f"--split-mode {self.split_mode} is unknown here; use {', '.join(SPLIT_MODES)}"
            )
        if self.numa is not None and self.numa not in NUMA:
            raise UserError(f"--numa {self.numa} is unknown; use {', '.join(NUMA)}")
        split = self.tensor_split
        if split and not (all(0 <= one < float("inf") for one in split) and sum(split) > 0):
            raise UserError(f"--tensor-split {_said(split)}: give each device's share, such as 3,1")
        if self.n_cpu_moe < 0:
            raise UserError(f"--n-cpu-moe {self.n_cpu_moe}: give a number of layers")
        if NO_DEVICE in self.device and len(self.device) > 1:
            raise UserError("--device none stands alone; leave the other devices out, or none")
        if len(set(self.device)) < len(self.device):
            raise UserError(f"--device {','.join(self.device)} names a device twice")
        for pattern, _ in map(override, self.override_tensor):
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(
                    f"--override-tensor {pattern} is no regular expression: {error}; "
                    r"write one such as 'blk\.[0-9]\.ffn_.*=CPU'"
                ) from None
        if len(self.rpc) > MOST_SERVERS:
            raise UserError(f"--rpc takes at most {MOST_SERVERS} servers, not {len(self.rpc)}")
        for server in self.rpc:
            address(server)
        self.rope.check()

    def changes(self) -> dict[str, Any]:
        """What of it an answer depends on: how positions are scaled, and adapters by contents.

        Raises:
            UserError: an adapter cannot be read.
        """
        found = self.rope.given()
        if self.lora:
            try:
                found["lora"] = [str(identity(Path(name))) for name in self.lora]
            except OSError as error:
                raise UserError(
                    f"cannot read {error.filename}: {error.strerror}; check --lora"
                ) from None
        return found

    @property
    def overrides(self) -> list[tuple[str, str]]:
        """(pattern, buffer) of all tensors that go elsewhere than their layer; the first counts."""
        experts = [(rf"blk\.{layer}{EXPERTS}", CPU_BUFFER) for layer in range(self.n_cpu_moe)]
        return [*map(override, self.override_tensor), *experts]

    def check_devices(self, devices: Sequence[str], *, wanted: bool) -> None:
        """Refuses what these devices cannot do.

        Args:
            devices: names of those that will be used, in llama.cpp's order.
            wanted: whether layers were asked to go there.

        Raises:
            UserError: with the remedy in one line.
        """
        split, count = self.tensor_split, len(devices)
        if not wanted:
            return
        if split and len(split) != count:
            raise UserError(
                f"--tensor-split {_said(split)} has {len(split)} shares for {count} "
                f"device{'s' * (count != 1)} ({', '.join(devices) or 'none'}); give one a device"
            )
        if self.split_mode == "none" and count and not 0 <= self.main_gpu < count:
            raise UserError(
                f"--main-gpu {self.main_gpu}: there are {count} devices ({', '.join(devices)}), "
                "counted from 0; see --list-devices"
            )


AS_IT_COMES = Placement()
"""Where llama.cpp puts things by itself."""


def _said(split: Iterable[float]) -> str:
    return ",".join(f"{one:g}" for one in split)


def override(text: str) -> tuple[str, str]:
    """The two parts of PATTERN=BUFFER.

    Raises:
        UserError: one is missing.
    """
    pattern, found, buffer = text.rpartition("=")
    if not (found and pattern and buffer):
        raise UserError(f"--override-tensor {text}: write PATTERN=BUFFER, such as 'exps=CPU'")
    return pattern, buffer


def address(server: str) -> tuple[str, int]:
    """Host and port of HOST:PORT.

    Raises:
        UserError: it is none.
    """
    host, found, port = server.rpartition(":")
    if not (found and host and port.isascii() and port.isdigit() and 0 < int(port) < PORTS):
        raise UserError(f"--rpc {server}: write HOST:PORT, such as 192.168.1.7:50052")
    if ":" in host:
        raise UserError(f"--rpc {server}: llama.cpp takes IPv4 addresses and names only")
    return host, int(port)


def assigned(layers: int, gpu_layers: int, shares: Sequence[float]) -> list[int | None]:
    """Which device each layer goes to, the output layer last; None for RAM.

    As `llama_model_base::load_tensors` has it: the last layers go to the devices, in their order.

    Args:
        layers: of the model, without the output layer.
        gpu_layers: how many go to devices, the output layer counted.
        shares: of every device, in any unit, with a sum above 0; empty for no device.
    """
    total = sum(shares)
    wanted = min(gpu_layers, layers + 1) if total > 0 else 0
    first = layers + 1 - wanted
    bounds = [one / total for one in accumulate(shares)] if wanted else []
    return [
        None
        if layer < first
        else min(bisect_right(bounds, (layer - first) / wanted), len(shares) - 1)
        for layer in range(layers + 1)
    ]
