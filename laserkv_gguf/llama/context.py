"""A llama.cpp context with one shared pool of cells, and batched decoding into it."""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import llama_cpp as L
import numpy as np
from numpy.typing import NDArray

from laserkv_gguf.budget import PADDING, padded
from laserkv_gguf.errors import Cancelled, Closed, LaserKVError, OutOfMemory, UserError
from laserkv_gguf.llama import devices, library, placing
from laserkv_gguf.llama.capture import AbortFlag, Armed, Probe
from laserkv_gguf.llama.handle import closed_at_exit
from laserkv_gguf.llama.model import CACHE_TYPES, Model, Tokens
from laserkv_gguf.llama.threads import TokenThreads
from laserkv_gguf.llama.worker import Worker

log = logging.getLogger(__name__)

T = TypeVar("T")

SEQUENCES = 8  # main, probe, and spares
BATCH = 2048  # tokens decoded in one call, as llama.cpp has it
MAX_SEQUENCES = 256  # LLAMA_MAX_SEQ
MAX_CELLS = 2**31 - PADDING  # cells and positions are 32-bit numbers
MAX_THREADS = 512  # ggml's own limit
MICRO_BATCH, CPU_MICRO_BATCH = 512, 128  # the first is llama.cpp's default
_SHORT = 8  # batches up to this size get the threads of a single token

_open = closed_at_exit(lambda context: context.close())


class Job:
    """Tokens that one call decodes at a time: a llama.cpp batch, or a part of one.

    Args:
        tokens, positions, sequences: (n,) int32 each.
        outputs: (n,) int8: of which tokens logits are wanted.

    Attributes:
        first: the place of its first token in the batch, once it was decoded.
        probe: what is captured meanwhile; None for nothing.
    """

    def __init__(
        self,
        tokens: NDArray[np.int32],
        positions: NDArray[np.int32],
        sequences: NDArray[np.int32],
        outputs: NDArray[np.int8],
    ) -> None:
        self.tokens, self.positions = tokens, positions
        self.sequences, self.outputs = sequences, outputs
        self.first = 0
        self.probe: Armed | None = None
        self.rows = np.flatnonzero(outputs)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def generates(self) -> bool:
        """Whether it only goes on with answers: logits are wanted of all, and nothing is captured.

        Such jobs of several conversations can be one batch.
        """
        return self.probe is None and len(self.rows) == len(self.tokens)

    def row(self, index: int) -> int:
        """The place in the batch of a token whose logits were wanted.

        Args:
            index: negative: counted from the last output; else the token's place in the job.
        """
        return self.first + (int(self.rows[index]) if index < 0 else index)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C while a batch was decoded, which is complete."""


class Turns(Protocol):
    """Who decodes when, where several calls share a context."""

    def decode(self, context: Context, job: Job) -> None:
        """Has a job decoded, perhaps together with others' and after theirs.

        Raises:
            Cancelled, KeyboardInterrupt, LaserKVError: as `Context.compute`.
        """

    def others_first(self) -> None:
        """Lets others read what was computed for them, before it is overwritten."""


@dataclass(frozen=True)
class ContextOptions:
    """What a context is made with; the names are llama.cpp's flags.

    Attributes:
        batch_size: most tokens one `llama_decode` may get (-b).
        ubatch_size: tokens computed at a time (-ub); None for what `micro_batch` says.
        type_k, type_v: types of the cache (-ctk, -ctv); see `CACHE_TYPES`.
        flash_attn: "on", "off" or "auto" (-fa): on a CPU auto means off, unless V is quantised.
        threads: for single tokens and batches of a few (-t); None to try on the first tokens how
            many of `threads_batch` are fastest, where flash attention is off.
        threads_batch: for reading and scoring (-tb); None for `threads`, or where that is not given
            either for the number of physical cores.
        outputs: most tokens of one batch whose logits can be asked for.
        sequences: how many there can be, numbered from 0, in one pool of cells.
    """

    batch_size: int | None = None
    ubatch_size: int | None = None
    type_k: str = "f16"
    type_v: str = "f16"
    flash_attn: str = "auto"
    threads: int | None = None
    threads_batch: int | None = None
    outputs: int = 64
    sequences: int = SEQUENCES

    def check(self) -> None:
        """Refuses unusable values.

        Raises:
            UserError: with the remedy in one line.
        """
        for flag, value in (("-ctk", self.type_k), ("-ctv", self.type_v)):
            if value not in CACHE_TYPES:
                raise UserError(f"{flag} {value} is unknown; use one of {', '.join(CACHE_TYPES)}")
        if self.flash_attn not in ("on", "off", "auto"):
            raise UserError(f"-fa {self.flash_attn} is unknown; use on, off or auto")
        if self.quantised_v and self.flash_attn == "off":
            raise UserError(f"-ctv {self.type_v} needs flash attention; use -fa on, or -ctv f16")
        for flag, number in (("-b", self.batch_size), ("-ub", self.ubatch_size)):
            if number is not None and number < 1:
                raise UserError(f"{flag} {number}: give at least 1")
        for flag, threads in (("-t", self.threads), ("-tb", self.threads_batch)):
            if threads is not None and not 1 <= threads <= MAX_THREADS:
                raise UserError(f"{flag} {threads}: give 1 to {MAX_THREADS} threads")
        if not SEQUENCES <= self.sequences <= MAX_SEQUENCES:
            raise ValueError(f"{self.sequences} sequences; {SEQUENCES} to {MAX_SEQUENCES} can be")

    def on(self, model: Model) -> ContextOptions:
        """What a context of this model is made with.

        Without flash attention values are stored transposed: over RPC every row that is moved then
        takes a message for each of its numbers.

        Raises:
            UserError: -fa off with RPC devices.
        """
        if not model.remote or self.flash_attn == "on":
            return self
        if self.flash_attn == "off":
            raise UserError(
                "-fa off cannot be with --rpc: moving tokens would take minutes; leave it out"
            )
        return replace(self, flash_attn="on")

    @property
    def batch(self) -> int:
        """Most tokens decoded in one call."""
        return BATCH if self.batch_size is None else self.batch_size

    @property
    def quantised_v(self) -> bool:
        return self.type_v not in ("f32", "f16", "bf16")

    def flash_type(self, offloaded: bool) -> int:
        """llama.cpp's value. On CPUs flash attention is slow for small batches: off by default."""
        if self.flash_attn == "on" or self.quantised_v:
            return int(L.LLAMA_FLASH_ATTN_TYPE_ENABLED)
        if self.flash_attn == "off" or not offloaded:
            return int(L.LLAMA_FLASH_ATTN_TYPE_DISABLED)
        return int(L.LLAMA_FLASH_ATTN_TYPE_AUTO)

    def micro_batch(self, offloaded: bool) -> int:
        """Tokens computed at a time.

        Without flash attention every token of a micro-batch is scored against all cells up to the
        last one's, so on a CPU small ones are faster: there is less to mask, and it stays in cache.

        Args:
            offloaded: whether a GPU computes; large batches also where no layer is offloaded.
        """
        plain = self.flash_type(offloaded) == L.LLAMA_FLASH_ATTN_TYPE_DISABLED
        size = self.ubatch_size or (CPU_MICRO_BATCH if plain and not offloaded else MICRO_BATCH)
        return min(size, self.batch)

    def said(self, offloaded: bool) -> str:
        """The flags that decide how llama.cpp lays out the cache, with the flash attention used."""
        names = {L.LLAMA_FLASH_ATTN_TYPE_ENABLED: "on", L.LLAMA_FLASH_ATTN_TYPE_DISABLED: "off"}
        flash = names.get(self.flash_type(offloaded), "auto")
        return f"-ctk {self.type_k} -ctv {self.type_v} -fa {flash}"


def default_threads() -> int:
    """Physical cores this process may use, as llama.cpp counts them."""
    try:
        cpus = os.sched_getaffinity(0)
    except AttributeError:  # macOS, Windows
        return max(1, os.cpu_count() or 1)
    cores = set()
    for cpu in cpus:
        path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            cores.add(path.read_text().strip())
        except OSError:
            cores.add(str(cpu))
    return max(1, len(cores))


class Context:
    """A context over a model. Close it, or use it as a context manager.

    Once closed it raises `Closed` wherever llama.cpp would be asked.

    Args:
        model: the model; closing it before the context bars it from everything new.
        cells: cells of the KV cache, shared by all sequences.
        options: see ContextOptions.

    Raises:
        OutOfMemory: the cache does not fit into memory.
        UserError: llama.cpp makes no context, or one without a cache.
    """

    def __init__(self, model: Model, cells: int, options: ContextOptions | None = None) -> None:
        options = (options or ContextOptions()).on(model)
        options.check()
        self.model, self.options, self.cells = model, options, cells
        self.threads = options.threads_batch or options.threads or default_threads()
        self.ubatch_size = options.micro_batch(bool(model.devices))
        # On a GPU the number hardly matters; flash attention adds up by threads, so that trying
        # would change the last bits of an answer.
        plain = options.flash_type(False) == L.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.pace = TokenThreads(
            options.threads or self.threads,
            fixed=options.threads is not None or model.gpu_layers != 0 or not plain,
        )
        self._threads_now = 0
        self.most_outputs = max(options.sequences, min(options.outputs, cells))  # of one batch
        self.turns: Turns | None = None  # None where one call at a time has the context
        self._at_once = 0
        self._last: Job | None = None
        self.probe = Probe(
            model.layers, model.heads, model.kv_heads, model.head_dim, model.value_dim
        )
        self.abort = AbortFlag()
        self.kv_bytes = padded(cells) * model.cell_bytes(options.type_k, options.type_v)
        self._handle: Any = None
        self._process, self._closing = os.getpid(), threading.Lock()
        # Whether rows came from a file. They may be no numbers, and those spoil every attention
        # over their cells, masked or freed: 0 · NaN is NaN. So clearing overwrites them.
        self.doubtful = False
        self.scorer: Any = None  # of scorer.py, if it was asked for; it goes with the context
        self.row_format: Any = None  # of rows.py, once it was tried
        self._check_memory()
        address = model.memory.__enter__()  # until `close`
        try:
            with library.recorded() as lines:
                self._handle = L.llama_init_from_model(address, self._params())
            if not self._handle:
                raise self._why_not_made(lines)
            placing.use_adapters(self._handle, model.adapters)
            self._worker = Worker("llama-decode")
        except BaseException:
            if self._handle:
                L.llama_free(self._handle)
            model.memory.__exit__()
            raise
        _open.add(self)
        self.buffers = library.buffers()
        self._memory = L.llama_get_memory(self.handle)
        if not self._memory:
            self.close()
            raise UserError(
                f"{model.path.name} has no KV cache: an embedding model cannot answer questions"
            )
        self._abort_callback = L.ggml_abort_callback(self.abort.callback)
        L.llama_set_abort_callback(
            self.handle, self._abort_callback, ctypes.c_void_p(self.abort.address)
        )
        self.batch_size = int(L.llama_n_batch(self.handle))
        self.allocated_cells = int(L.llama_n_ctx(self.handle))
        self._batch = _Batch(self.batch_size)

    def _params(self) -> L.llama_context_params:
        options = self.options
        params: L.llama_context_params = L.llama_context_default_params()
        params.n_ctx = self.cells
        params.n_batch = options.batch
        params.n_ubatch = self.ubatch_size
        params.n_seq_max = options.sequences
        params.kv_unified = True
        params.n_outputs_max = self.most_outputs
        params.n_threads, params.n_threads_batch = self.pace.count, self.threads
        params.type_k = CACHE_TYPES[options.type_k]
        params.type_v = CACHE_TYPES[options.type_v]
        params.flash_attn_type = options.flash_type(self.model.gpu_layers != 0)
        params.cb_eval = L.ggml_backend_sched_eval_callback(self.probe.callback)
        params.cb_eval_user_data = ctypes.c_void_p(self.probe.user_data)
        params.offload_kqv = self.model.placement.kv_offload
        placing.scale_positions(params, self.model.placement.rope)
        params.no_perf = True
        return params

    def _check_memory(self) -> None:
        """Asks before allocating: Linux grants more than there is and kills the process later."""
        if padded(self.cells) > MAX_CELLS:  # the number would not arrive whole
            raise OutOfMemory(self._out_of_memory())
        if self.model.gpu_layers != 0 and self.model.placement.kv_offload:
            return
        total = sum(device.total for device in devices.listed() if device.kind == "cpu")
        if total and self.kv_bytes > total:
            raise OutOfMemory(self._out_of_memory())

    def _out_of_memory(self) -> str:
        size = self.kv_bytes
        said = f"{size / 2**30:.1f} GiB ({size} bytes)" if size >= 2**30 else f"{size} bytes"
        return (
            f"no memory for a KV cache of {padded(self.cells)} cells: {said} were asked for; "
            "lower --ctx-size, --ratio or --block-size, or use -ctk q8_0 -ctv q8_0"
        )

    def _why_not_made(self, lines: list[str]) -> UserError:
        said = " ".join(lines)
        if "alloc" in said or "out of memory" in said:
            return OutOfMemory(self._out_of_memory())
        detail = lines[-1].split(": ", 1)[-1] if lines else "see --debug"
        return UserError(f"llama.cpp cannot make a context of {self.cells} cells: {detail}")

    @property
    def cache_is_elsewhere(self) -> bool:
        """Whether cells lie in the memory of a device that is not the host."""
        model = self.model
        return bool(model.devices) and model.gpu_layers != 0 and model.placement.kv_offload

    @property
    def handle(self) -> Any:
        """llama.cpp's pointer.

        Raises:
            Closed: there is none any more.
        """
        if self._handle is None:
            raise Closed("this context is closed")
        return self._handle

    @property
    def memory(self) -> Any:
        """llama.cpp's pointer to the cells; likewise."""
        if self._handle is None:
            raise Closed("this context is closed")
        return self._memory

    def close(self) -> None:
        """Ends what is being decoded, waits for it, and frees; once, in the process that made it.

        Where the interpreter is at its end, nothing is: the thread cannot be waited for any more.
        """
        if not hasattr(self, "_worker") or os.getpid() != self._process or sys.is_finalizing():
            return
        if not self._closing.acquire(blocking=False):
            return
        self.cancel()
        try:
            self._worker.close()
        except BaseException:  # Ctrl-C; what may still be decoding is not freed
            self._closing.release()
            raise
        handle, self._handle = self._handle, None
        if self.scorer:
            self.scorer.close()
            self.scorer = None
        L.llama_free(handle)
        self.model.memory.__exit__()

    def __enter__(self) -> Context:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    # decoding

    def decode(
        self,
        tokens: Tokens,
        start: int,
        sequence: int,
        *,
        outputs: int = 0,
        on_chunk: Callable[[int], None] | None = None,
    ) -> None:
        """Decodes tokens of one sequence at positions start, start + 1, …

        Args:
            tokens: int32 token ids.
            outputs: of how many of the last tokens logits are wanted.
            on_chunk: called with the number of tokens decoded after each micro-batch.

        Raises:
            Cancelled: `cancel` was called; tokens of finished chunks stay in the cache.
            KeyboardInterrupt: Ctrl-C; likewise.
            LaserKVError: llama.cpp failed, or no cells are free.
        """
        if outputs > self.options.outputs:
            raise ValueError(f"{outputs} outputs asked for, the context has {self.options.outputs}")
        count = len(tokens)
        if outputs > min(count, self.batch_size):
            raise ValueError(f"{outputs} outputs asked for of {count} tokens")
        size = min(self.batch_size, max(self.ubatch_size, outputs))
        begin = 0
        while begin < count:
            # all outputs must come from one batch: llama.cpp forgets those of the batch before
            end = min(begin + size, count)
            if end < count and count - end < outputs:
                end = count - outputs
            numbers = np.arange(end - begin, dtype=np.int32)
            wanted = np.zeros(end - begin, np.int8)
            if end == count and outputs:
                wanted[end - begin - outputs :] = 1
            part = np.asarray(tokens[begin:end], np.int32)
            self._decode(Job(part, numbers + start + begin, numbers * 0 + sequence, wanted))
            if on_chunk:
                on_chunk(end - begin)
            begin = end

    def decode_parallel(
        self, tokens: list[int], positions: list[int], sequences: list[int]
    ) -> None:
        """Decodes tokens of one or several sequences, with logits for all.

        Args:
            tokens, positions, sequences: of one length, at most the batch size. The logits of
                ``tokens[i]`` are those of index i.

        Raises:
            Cancelled, KeyboardInterrupt, LaserKVError: as `decode`.
        """
        ids, at, of = (np.array(each, np.int32) for each in (tokens, positions, sequences))
        self._decode(Job(ids, at, of, np.ones(len(ids), np.int8)))

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Nobody else has a turn in the block: for what uses the spare sequences meanwhile."""
        if self.turns is not None and not self._at_once:
            self.turns.others_first()
        self._at_once += 1
        try:
            yield
        finally:
            self._at_once -= 1

    def _decode(self, job: Job) -> None:
        if self.turns is None or self._at_once:
            self.compute([job])
        else:
            self.turns.decode(self, job)
        self._last = job

    def compute(self, jobs: Sequence[Job], *, interrupt: bool = True) -> None:
        """Decodes jobs as one batch.

        Args:
            interrupt: whether Ctrl-C ends it; else it is raised when it has been decoded.

        Raises:
            Cancelled: `cancel` was called.
            KeyboardInterrupt: Ctrl-C.
            LaserKVError: llama.cpp failed, or no cells are free.
        """
        handle = self.handle  # closed is said before cancelled, which closing does, too
        if self.abort:
            raise Cancelled("cancelled")
        batch = self._batch.fill(jobs)
        threads = self.pace.count if batch.n_tokens <= _SHORT else self.threads
        if threads != self._threads_now:
            L.llama_set_n_threads(handle, threads, threads)
            self._threads_now = threads
        started = time.perf_counter()
        done: list[int] = []

        def work() -> None:
            done.append(int(L.llama_decode(handle, batch)))

        try:
            if interrupt:
                self.on_worker(work)
            else:
                self._worker.run(work)
        except KeyboardInterrupt:
            if interrupt or done != [0]:
                raise
            raise Interrupted from None
        status = done[0]
        if status == 0:
            if batch.n_tokens == 1:
                self.pace.took(time.perf_counter() - started)
            return
        if status == 2 or self.abort:
            raise Cancelled("cancelled")
        if status == 1:
            raise LaserKVError(
                f"the KV cache of {self.allocated_cells} cells is full; use a larger --ctx-size"
            )
        raise LaserKVError(f"llama.cpp failed to decode (status {status}); see --debug")

    def on_worker(self, work: Callable[..., T], *arguments: Any) -> T:
        """What `work(*arguments)` returns, run in the thread that all decoding is done in.

        OpenMP keeps a team of threads for every thread that calls it. With two teams there are more
        threads than cores, so they sleep while they wait, which makes a token twice as slow.

        Raises:
            KeyboardInterrupt: Ctrl-C, which reaches Python only between C calls; decoding stops.
        """
        abort = self.abort
        return self._worker.run(work, *arguments, stop=abort.set, resume=abort.clear)

    def cancel(self) -> None:
        """Stops the decode under way (from another thread) and every later one until `resume`."""
        self.abort.set()

    def resume(self) -> None:
        self.abort.clear()

    def row(self, index: int = -1) -> int:
        """Where llama.cpp has the logits of what this call decoded last.

        Args:
            index: negative: counted from the last output; else the token's place in what it was.
        """
        return index if self._last is None else self._last.row(index)

    def logits(self, index: int = -1) -> NDArray[np.float32]:
        """A copy of the logits (vocab,) of the last batch.

        Args:
            index: see `row`.
        """
        pointer = L.llama_get_logits_ith(self.handle, self.row(index))
        if not pointer:
            raise ValueError(f"the last batch has no logits for {index}")
        return np.ctypeslib.as_array(pointer, (self.model.vocab_size,)).copy()

    def clear(self) -> None:
        """Forgets every sequence."""
        L.llama_memory_clear(self.memory, self.doubtful)
        self.doubtful = False


class _Batch:
    """A llama_batch whose arrays are made once."""

    def __init__(self, size: int) -> None:
        self.tokens = np.zeros(size, np.int32)
        self.positions = np.zeros(size, np.int32)
        self.logits = np.zeros(size, np.int8)
        self._ones = np.ones(size, np.int32)
        self._sequences = np.zeros(size, np.int32)
        self._pointers = self._sequences.ctypes.data + 4 * np.arange(size, dtype=np.uint64)
        self.batch = L.llama_batch()
        batch: Any = self.batch
        int32_p = ctypes.POINTER(ctypes.c_int32)
        batch.token = self.tokens.ctypes.data_as(int32_p)
        batch.pos = self.positions.ctypes.data_as(int32_p)
        batch.n_seq_id = self._ones.ctypes.data_as(int32_p)
        batch.seq_id = self._pointers.ctypes.data_as(ctypes.POINTER(int32_p))
        batch.logits = self.logits.ctypes.data_as(ctypes.POINTER(ctypes.c_int8))

    def fill(self, jobs: Sequence[Job]) -> L.llama_batch:
        end = 0
        for job in jobs:
            job.first, end = end, end + len(job)
            self.tokens[job.first : end] = job.tokens
            self.positions[job.first : end] = job.positions
            self._sequences[job.first : end] = job.sequences
            self.logits[job.first : end] = job.outputs
        self.batch.n_tokens = end
        return self.batch
