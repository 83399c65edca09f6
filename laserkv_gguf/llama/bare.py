"""llama.cpp as its own programs drive it, to be measured against: no callback, no policy.

Nothing here imports Numba or what needs it, so that the memory of a process that measures the full
cache is llama.cpp's own.
"""

from __future__ import annotations

import ctypes
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import llama_cpp as L
import numpy as np

from laserkv_gguf.budget import padded
from laserkv_gguf.errors import LaserKVError, UserError
from laserkv_gguf.llama import devices, library, placing
from laserkv_gguf.llama.model import CACHE_TYPES, Model, Tokens
from laserkv_gguf.llama.state import State, restore, save

if TYPE_CHECKING:
    from laserkv_gguf.llama.capture import Probe

_SPARE = 1
_CHUNK = 4096  # cells copied at a time where a depth is made


@dataclass(frozen=True)
class BareSettings:
    """llama.cpp's flags -fa (None: auto), -b, -ub, -t, -tb (0: as -t), -ctk and -ctv."""

    flash_attn: bool | None = False
    batch_size: int = 2048
    ubatch_size: int = 512
    threads: int = 1
    threads_batch: int = 0
    type_k: str = "f16"
    type_v: str = "f16"


@dataclass(frozen=True)
class Generated:
    """Greedy tokens, and when the first and the last were chosen (`time.perf_counter`)."""

    tokens: list[int]
    first: float
    last: float


class Bare:
    """A context with one sequence to read and generate with. Close it, or use `with`.

    Args:
        model: the model; it must outlive the context.
        cells: cells of the KV cache.
        settings: see BareSettings.
        probe: sets this probe as `cb_eval`; never armed, it shows what an idle one costs.
        spare: a second sequence, which `deepen` needs.

    Raises:
        UserError: the cache does not fit into memory.
    """

    def __init__(
        self,
        model: Model,
        cells: int,
        settings: BareSettings,
        *,
        probe: Probe | None = None,
        spare: bool = False,
    ) -> None:
        self.model, self.cells, self.settings, self.probe = model, cells, settings, probe
        self.kv_bytes = padded(cells) * model.cell_bytes(settings.type_k, settings.type_v)
        self._copies: list[tuple[int, State]] = []
        self.handle: Any = None
        params: L.llama_context_params = L.llama_context_default_params()
        params.n_ctx = cells
        params.n_batch = settings.batch_size
        params.n_ubatch = min(settings.ubatch_size, settings.batch_size)
        params.n_seq_max = 2 if spare else 1
        params.kv_unified = True
        params.n_outputs_max = params.n_seq_max  # only the last token's logits are asked for
        params.n_threads = settings.threads
        params.n_threads_batch = settings.threads_batch or settings.threads
        params.type_k, params.type_v = CACHE_TYPES[settings.type_k], CACHE_TYPES[settings.type_v]
        flash = settings.flash_attn
        params.flash_attn_type = L.LLAMA_FLASH_ATTN_TYPE_AUTO if flash is None else int(flash)
        params.offload_kqv = model.placement.kv_offload
        placing.scale_positions(params, model.placement.rope)
        params.no_perf = True
        if probe:
            params.cb_eval = L.ggml_backend_sched_eval_callback(probe.callback)
            params.cb_eval_user_data = ctypes.c_void_p(probe.user_data)
        self._check_memory()
        with library.recorded() as lines:
            self.handle = L.llama_init_from_model(model.handle, params)
        if not self.handle:
            detail = lines[-1].split(": ", 1)[-1] if lines else "no reason given"
            raise UserError(f"llama.cpp makes no full cache of {cells} cells: {detail}")
        placing.use_adapters(self.handle, model.adapters)
        self.buffers = library.buffers()
        self.memory = L.llama_get_memory(self.handle)

    def _check_memory(self) -> None:
        """Asks before allocating: Linux grants more than there is and kills the process later."""
        total = sum(device.total for device in devices.listed() if device.kind == "cpu")
        if self.model.gpu_layers == 0 and total and self.kv_bytes > total:
            raise UserError(
                f"no memory for a full KV cache of {self.cells} cells: {self.kv_bytes} bytes"
            )

    def close(self) -> None:
        if self.handle:
            L.llama_free(self.handle)
            self.handle = None

    def __enter__(self) -> Bare:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self, tokens: Tokens) -> None:
        """Decodes tokens after those in the cache, batch by batch, and waits for the result.

        Raises:
            LaserKVError: llama.cpp failed, or no cells are free.
        """
        read(self.handle, tokens, self.settings.batch_size)

    def generate(self, count: int) -> Generated:
        """Greedy tokens after what was read."""
        return generate(self.handle, count)

    def rewind(self, position: int) -> None:
        """Forgets positions from `position` on."""
        L.llama_memory_seq_rm(self.memory, 0, position, -1)

    def deepen(self, held: int, cells: int) -> int:
        """Fills the cache with copies of what was read, computing nothing; needs `spare`.

        The copies keep their positions, so the next token goes where it would have gone; it
        attends to all of them, which is what a time at that depth depends on.

        Args:
            held: cells held now.
            cells: how many to hold at most.

        Returns:
            How many are held now: short of `cells` by less than were read at first.
        """
        if not self._copies:
            self._copies = [(held, save(self.handle, 0))]
        while held + self._copies[0][0] <= cells:
            if self._copies[-1][0] < held <= _CHUNK:  # fewer, larger copies
                self._copies.append((held, save(self.handle, 0)))
            size, state = next(c for c in reversed(self._copies) if held + c[0] <= cells)
            restore(self.handle, _SPARE, state)
            L.llama_memory_seq_cp(self.memory, _SPARE, 0, -1, -1)
            L.llama_memory_seq_rm(self.memory, _SPARE, -1, -1)
            held += size
        return held


def read(context: Any, tokens: Tokens, batch_size: int) -> None:
    """Decodes tokens after the last position of sequence 0; the last one's logits are ready.

    Raises:
        LaserKVError: llama.cpp failed, or no cells are free.
    """
    tokens = np.ascontiguousarray(tokens, np.int32)
    for begin in range(0, len(tokens), batch_size):
        part = tokens[begin : begin + batch_size]
        pointer = part.ctypes.data_as(L.llama_token_p)
        status = L.llama_decode(context, L.llama_batch_get_one(pointer, len(part)))
        if status:
            raise LaserKVError(f"llama.cpp failed to decode (status {status}); see --debug")
    L.llama_synchronize(context)


def generate(context: Any, count: int) -> Generated:
    """Greedy tokens from the logits of what was decoded last: llama.cpp's loop, and no more."""
    sampler = L.llama_sampler_init_greedy()
    token, tokens = (L.llama_token * 1)(), []
    try:
        token[0] = L.llama_sampler_sample(sampler, context, -1)
        tokens.append(token[0])
        first = time.perf_counter()
        while len(tokens) < count:
            status = L.llama_decode(context, L.llama_batch_get_one(token, 1))
            if status:
                raise LaserKVError(f"llama.cpp failed to decode (status {status}); see --debug")
            token[0] = L.llama_sampler_sample(sampler, context, -1)
            tokens.append(token[0])
        return Generated(tokens, first, time.perf_counter())
    finally:
        L.llama_sampler_free(sampler)
