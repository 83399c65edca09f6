"""Scoring where the keys are: a small ggml graph over llama.cpp's own cache, on its own backend.

The host path (Numba, `kernels`) copies every candidate's key to the host. Here they stay: the
probe notes which tensors hold the cached keys and into which cells the tokens went; the graph
gathers the candidates' rows, multiplies them with the queries, and sums what the softmax gives.
One number a candidate comes back, or one for each of the few tokens that ask. What goes there
beside the queries is small: lengths of values, and the log-sum of keys that only the host has.
Keys that llama.cpp has re-rotated or quantised are looked at as they are now, as the model's own
attention does.

Everything is called through libggml's C functions. Two things no function tells, the cells a node
writes and the buffer a tensor lies in, are read out of `struct ggml_tensor`, whose layout is
measured on tensors of our own. `open_scorer` checks the whole way on a few tokens of the model at
hand before it is trusted; the host path is always there instead.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import gguf
import llama_cpp as L
import numpy as np
from numpy.typing import NDArray

from laserkv_gguf.errors import LaserKVError
from laserkv_gguf.llama import devices, hadamard, library
from laserkv_gguf.llama.capture import CaptureError
from laserkv_gguf.llama.colliding import Colliding, Collisions
from laserkv_gguf.llama.context import Context
from laserkv_gguf.llama.model import CACHE_TYPES, row_bytes
from laserkv_gguf.llama.sequence import SPARE, Sequence

log = logging.getLogger(__name__)

WORK_BYTES = 64 << 20  # scores and gathered keys computed at a time, unless one kv head needs more
# How far off the check may find scores, as a share of the largest. GPUs multiply with TF32's 11
# bits, as they do for the model itself: that is felt where queries and keys are large.
TOLERANCE, GPU_TOLERANCE = 1e-3, 2e-2
_F32, _I32, _I64 = 0, 26, 27  # enum ggml_type
_FULL_PRECISION = 10  # GGML_PREC_F32
_CHECK_TOKENS = 24
_ON_HOST = "scoring on the host, not where the cache is: %s"


class DeviceError(LaserKVError):
    """Scores cannot be computed on the device; the message says why."""


# ---- libggml -----------------------------------------------------------------------------------


class _InitParams(ctypes.Structure):
    _fields_ = (
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    )


_P, _N, _SIZE, _I = ctypes.c_void_p, ctypes.c_int64, ctypes.c_size_t, ctypes.c_int
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "ggml_init": (_P, [_InitParams]),
    "ggml_free": (None, [_P]),
    "ggml_tensor_overhead": (_SIZE, []),
    "ggml_graph_overhead_custom": (_SIZE, [_SIZE, ctypes.c_bool]),
    "ggml_get_name": (ctypes.c_char_p, [_P]),
    "ggml_nbytes": (_SIZE, [_P]),
    "ggml_nelements": (_N, [_P]),
    "ggml_op_desc": (ctypes.c_char_p, [_P]),
    "ggml_new_tensor_1d": (_P, [_P, _I, _N]),
    "ggml_new_tensor_2d": (_P, [_P, _I, _N, _N]),
    "ggml_new_tensor_3d": (_P, [_P, _I, _N, _N, _N]),
    "ggml_new_tensor_4d": (_P, [_P, _I, _N, _N, _N, _N]),
    "ggml_set_input": (None, [_P]),
    "ggml_set_output": (None, [_P]),
    "ggml_view_1d": (_P, [_P, _P, _N, _SIZE]),
    "ggml_view_2d": (_P, [_P, _P, _N, _N, _SIZE, _SIZE]),
    "ggml_view_3d": (_P, [_P, _P, _N, _N, _N, _SIZE, _SIZE, _SIZE]),
    "ggml_view_4d": (_P, [_P, _P, _N, _N, _N, _N, _SIZE, _SIZE, _SIZE, _SIZE]),
    "ggml_reshape_3d": (_P, [_P, _P, _N, _N, _N]),
    "ggml_permute": (_P, [_P, _P, _I, _I, _I, _I]),
    "ggml_concat": (_P, [_P, _P, _P, _I]),
    "ggml_mul": (_P, [_P, _P, _P]),
    "ggml_cont": (_P, [_P, _P]),
    "ggml_get_rows": (_P, [_P, _P, _P]),
    "ggml_set_rows": (_P, [_P, _P, _P, _P]),
    "ggml_mul_mat": (_P, [_P, _P, _P]),
    "ggml_mul_mat_set_prec": (None, [_P, _I]),
    "ggml_soft_max_ext": (_P, [_P, _P, _P, ctypes.c_float, ctypes.c_float]),
    "ggml_sum_rows": (_P, [_P, _P]),
    "ggml_add": (_P, [_P, _P, _P]),
    "ggml_sub": (_P, [_P, _P, _P]),
    "ggml_mean": (_P, [_P, _P]),
    "ggml_abs": (_P, [_P, _P]),
    "ggml_sqrt": (_P, [_P, _P]),
    "ggml_step": (_P, [_P, _P]),
    "ggml_clamp": (_P, [_P, _P, ctypes.c_float, ctypes.c_float]),
    "ggml_l2_norm": (_P, [_P, _P, ctypes.c_float]),
    "ggml_scale_bias": (_P, [_P, _P, ctypes.c_float, ctypes.c_float]),
    "ggml_new_graph_custom": (_P, [_P, _SIZE, ctypes.c_bool]),
    "ggml_build_forward_expand": (None, [_P, _P]),
    "ggml_gallocr_new": (_P, [_P]),
    "ggml_gallocr_free": (None, [_P]),
    "ggml_gallocr_alloc_graph": (ctypes.c_bool, [_P, _P]),
    "ggml_gallocr_get_buffer_size": (_SIZE, [_P, _I]),
    "ggml_backend_alloc_ctx_tensors_from_buft": (_P, [_P, _P]),
    "ggml_backend_cpu_buffer_type": (_P, []),
    "ggml_backend_buffer_free": (None, [_P]),
    "ggml_backend_buffer_get_type": (_P, [_P]),
    "ggml_backend_buft_get_device": (_P, [_P]),
    "ggml_backend_buft_is_host": (ctypes.c_bool, [_P]),
    "ggml_backend_dev_init": (_P, [_P, ctypes.c_char_p]),
    "ggml_backend_dev_name": (ctypes.c_char_p, [_P]),
    "ggml_backend_dev_supports_op": (ctypes.c_bool, [_P, _P]),
    "ggml_backend_dev_backend_reg": (_P, [_P]),
    "ggml_backend_reg_get_proc_address": (_P, [_P, ctypes.c_char_p]),
    "ggml_backend_free": (None, [_P]),
    "ggml_backend_get_default_buffer_type": (_P, [_P]),
    "ggml_backend_graph_compute": (_I, [_P, _P]),
    "ggml_backend_tensor_set": (None, [_P, _P, _SIZE, _SIZE]),
    "ggml_backend_tensor_get": (None, [_P, _P, _SIZE, _SIZE]),
}


class _Ggml:
    """The functions above by their names without `ggml_`; addresses are plain numbers."""

    def __init__(self) -> None:
        base = library.ggml_base()
        for name, (result, arguments) in _FUNCTIONS.items():
            try:
                function = base[name]  # an object of our own: its types bind nobody else
            except AttributeError:
                raise DeviceError(f"this build of llama.cpp has no {name}") from None
            function.restype, function.argtypes = result, arguments
            setattr(self, name.removeprefix("ggml_"), function)

    def __getattr__(self, name: str) -> Any:  # for the type checker: all are set above
        raise AttributeError(name)


@cache
def _ggml() -> _Ggml:
    library.start()
    return _Ggml()


class _Arena:
    """A ggml context for the descriptions of so many tensors, and of a graph if asked for."""

    def __init__(self, tensors: int, nodes: int = 0) -> None:
        self.ggml, self.handle = _ggml(), None
        size = tensors * self.ggml.tensor_overhead()
        if nodes:
            size += self.ggml.graph_overhead_custom(nodes, False)
        self.handle = self.ggml.init(_InitParams(size, None, True))
        if not self.handle:
            raise DeviceError("no memory for a ggml context")

    def close(self) -> None:
        if self.handle:
            self.ggml.free(self.handle)
            self.handle = None

    def __del__(self) -> None:
        self.close()


@dataclass(frozen=True)
class _Layout:
    """Where `struct ggml_tensor` has what no function gives; bytes from its start."""

    rows: int  # the second source
    base: int  # the tensor that a view is of
    buffer: int


@cache
def _layout() -> _Layout:
    """Finds the fields by values that only they can have.

    Raises:
        DeviceError: one is not there, or in more than one place.
    """
    ggml = _ggml()
    arena = _Arena(8)
    stored = ggml.new_tensor_2d(arena.handle, _F32, 4, 8)
    values = ggml.new_tensor_2d(arena.handle, _F32, 4, 2)
    rows = ggml.new_tensor_1d(arena.handle, _I64, 2)
    node = ggml.set_rows(arena.handle, stored, values, rows)
    part = ggml.view_1d(arena.handle, stored, 16, 16)
    view = ggml.view_1d(arena.handle, part, 4, 16)  # its source is `part`, its base `stored`
    buffer = ggml.backend_alloc_ctx_tensors_from_buft(arena.handle, ggml.backend_cpu_buffer_type())
    if not buffer:
        raise DeviceError("no memory for a few tensors")
    try:
        places = []
        for tensor, value in ((node, rows), (view, stored), (stored, buffer)):
            # an object of the arena is the tensor and a header, so this stays inside it
            words = ggml.tensor_overhead() // 8 - 4
            seen = np.frombuffer((ctypes.c_uint64 * words).from_address(tensor), np.uint64)
            found = np.flatnonzero(seen == value)
            if len(found) != 1:
                raise DeviceError("this build's tensors are laid out in an unknown way")
            places.append(int(found[0]) * 8)
    finally:
        ggml.backend_buffer_free(buffer)
        arena.close()
    return _Layout(*places)


def _field(tensor: int, offset: int) -> int:
    return int(ctypes.c_uint64.from_address(tensor + offset).value)


# ---- scoring -----------------------------------------------------------------------------------


class Scorer:
    """Attention of queries over cached keys, computed where the cache is.

    Made by `open_scorer` for one context; of no use once that is closed. Buffers are made at the
    first use and grow only when they must.

    Attributes:
        refusal: why collisions are not counted here; empty where they are.
        told: whether the user knows.
    """

    def __init__(self, context: Context, *, turned: bool = False) -> None:
        model = context.model
        self.context, self.turned = context, turned
        self.refusal, self.told = "", False
        self.heads, self.kv_heads, self.dim = model.heads, model.kv_heads, model.head_dim
        layers: dict[int, list[int]] = {}
        for layer, tensor in enumerate(context.probe.cache):
            layers.setdefault(_device_of(int(tensor)), []).append(layer)
        self._parts = [_Part(device, numbers, context) for device, numbers in layers.items()]

    @property
    def devices(self) -> list[str]:
        """Names of the devices that score, as llama.cpp calls them."""
        return [part.name for part in self._parts]

    @property
    def bytes(self) -> int:
        """Bytes of the buffers on all devices."""
        return sum(part.bytes for part in self._parts)

    def attention(
        self,
        queries: NDArray[np.float32],
        cells: NDArray[np.int64],
        *,
        weights: NDArray[np.float32] | None = None,
        over: str = "sum",
        others: NDArray[np.int64] | None = None,
        beside: NDArray[np.float32] | None = None,
    ) -> NDArray[np.float32]:
        """As `kernels.attention_consensus`, over the keys in the given cells.

        Args:
            queries: (layers, tokens, heads, head_dim) float32.
            cells: (C,) int64.
            weights: (layers, C, kv_heads) float32: what each weight counts; None for 1.
            over: "sum" over the tokens, or "max", the largest of their scores.
            others: (O,) int64: cells of keys that the softmax counts and that get no score.
            beside: (layers, tokens, heads) float32: log-sum-exp of keys that are in none of these
                cells and that the softmax counts, finite; None for none.

        Returns:
            (C,) float32, in attention weights; of the plain ones the sum is layers * heads *
            tokens.

        Raises:
            DeviceError: the device failed.
        """
        _, tokens, _, dim = queries.shape
        if not len(cells) or not tokens:
            return np.zeros(len(cells), np.float32)
        asked = self._asked(queries)
        seen = cells if others is None else np.concatenate((cells, others))
        shape = _Shape(
            asked.shape[2],
            len(cells),
            len(seen) - len(cells),
            tokens if over == "max" else 1,
            beside is not None,
            weights is not None,
        )
        total = np.zeros((shape.kept, len(cells)))
        added = None if beside is None else self._rows(beside) * np.float32(dim**0.5)
        factors = None if weights is None else np.swapaxes(weights, 1, 2)
        for part in self._parts:
            total += part.scores(
                shape,
                (
                    seen.astype(np.int32),
                    asked[part.layers],
                    None if added is None else added[part.layers],
                    None if factors is None else factors[part.layers],
                    None,
                ),
            )
        scores: NDArray[np.float32] = total.max(axis=0).astype(np.float32)
        return scores

    def collisions(
        self, queries: NDArray[np.float32], cells: NDArray[np.int64], how: Collisions
    ) -> NDArray[np.float32]:
        """As `kernels.collision_scores`, or `analytic_collisions`, over the keys in the cells.

        Args:
            queries: (layers, tokens, heads, head_dim) float32.
            cells: (C,) int64, over whose keys these are centred.
            how: what counts as a collision.

        Returns:
            (C,) float32 in 0 … 1.

        Raises:
            DeviceError: the device failed.
        """
        layers, tokens, heads, dim = queries.shape
        if not len(cells) or not tokens:
            return np.zeros(len(cells), np.float32)
        asked = self._asked(queries)
        drawn = how.planes(dim)
        planes = None if drawn is None else self._turn(drawn)
        shape = _Shape(asked.shape[2], len(cells), 0, 1, False, False, how)
        total = np.zeros(len(cells))
        for part in self._parts:
            total += part.scores(
                shape, (cells.astype(np.int32), asked[part.layers], None, None, planes)
            )[0]
        worth = how.tables if how.rule == "fraction" else 1
        scores: NDArray[np.float32] = (total / (layers * tokens * heads * worth)).astype(np.float32)
        return scores

    def _asked(self, queries: NDArray[np.float32]) -> NDArray[np.float32]:
        """Queries as `_rows`, once all keys that were decoded are in the cache."""
        L.llama_synchronize(self.context.handle)
        return self._rows(self._turn(queries))

    def _turn(self, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        """As the cache's keys are; products with these stay what they were."""
        return vectors @ hadamard.whole(vectors.shape[-1]) if self.turned else vectors

    def _rows(self, array: NDArray[np.float32]) -> NDArray[np.float32]:
        """(layers, kv_heads, rows, …): the rows that read one kv head, its heads' tokens."""
        layers, tokens, heads = array.shape[:3]
        shape = layers, tokens, self.kv_heads, heads // self.kv_heads, -1
        turned = array.reshape(shape).transpose(0, 2, 3, 1, 4)
        return np.ascontiguousarray(turned, np.float32).reshape(
            layers, self.kv_heads, tokens * heads // self.kv_heads, -1
        )

    def close(self) -> None:
        for part in self._parts:
            part.close()
        self._parts = []

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class Attention:
    """`Candidates.scorer`: a scorer with all that it is to look at.

    Attributes:
        cells: (C,) of the candidates.
        others, beside: as in `Scorer.attention`, for a softmax over all; `beside` of all tokens of
            the probe.
    """

    scorer: Scorer
    cells: NDArray[np.int64]
    others: NDArray[np.int64] | None = None
    beside: NDArray[np.float32] | None = None

    def __call__(
        self,
        queries: NDArray[np.float32],
        *,
        weights: NDArray[np.float32] | None = None,
        whole: bool = False,
        over: str = "sum",
    ) -> NDArray[np.float32]:
        others = self.others if whole else None
        beside = self.beside if whole else None
        if beside is not None:
            beside = beside[:, -queries.shape[1] :]
        return self.scorer.attention(
            queries, self.cells, weights=weights, over=over, others=others, beside=beside
        )

    def collisions(
        self, queries: NDArray[np.float32], *, bits: int, tables: int, seed: int, rule: str
    ) -> NDArray[np.float32]:
        how = Collisions(rule, bits, tables, seed)
        return self.scorer.collisions(queries, self.cells, how)


@dataclass(frozen=True)
class _Shape:
    """What a graph is made for: rows of queries a kv head, candidates, other keys, …"""

    rows: int
    count: int
    others: int
    kept: int  # scores a candidate: 1, or one a token that asks
    beside: bool
    weighs: bool
    how: Collisions | None = None  # attention otherwise

    @property
    def keys(self) -> int:
        return self.count + self.others


class _Part:
    """The layers whose keys lie on one device, and the graph that scores them."""

    def __init__(self, device: int, layers: list[int], context: Context) -> None:
        self.ggml, self.device, self.layers = _ggml(), device, layers
        model, options = context.model, context.options
        self.kv_heads, self.dim = model.kv_heads, model.head_dim
        self.tensors = [int(context.probe.cache[layer]) for layer in layers]
        self.cells = context.allocated_cells
        self.row = row_bytes(options.type_k, self.kv_heads * self.dim)
        self.head = row_bytes(options.type_k, self.dim)
        self.name = self.ggml.backend_dev_name(device).decode()
        self._process = os.getpid()
        self._shape: _Shape | None = None
        self._arena: _Arena | None = None
        self._graph = self._cells = self._queries = self._scores = 0
        self._beside = self._factors = self._planes = 0
        self._memory = 0
        self._backend = self.ggml.backend_dev_init(device, None) or 0
        if not self._backend:
            raise DeviceError(f"{self.name} cannot be opened")
        self._use_threads(context.threads)
        self._memory = self.ggml.gallocr_new(
            self.ggml.backend_get_default_buffer_type(self._backend)
        )

    def _use_threads(self, threads: int) -> None:
        """Of a CPU; other backends have no such function."""
        registry = self.ggml.backend_dev_backend_reg(self.device)
        address = self.ggml.backend_reg_get_proc_address(registry, b"ggml_backend_set_n_threads")
        if address:
            ctypes.CFUNCTYPE(None, _P, _I)(address)(self._backend, threads)

    @property
    def bytes(self) -> int:
        return int(self.ggml.gallocr_get_buffer_size(self._memory, 0)) if self._memory else 0

    def scores(self, shape: _Shape, given: tuple[NDArray[Any] | None, ...]) -> NDArray[np.float32]:
        """Scores (kept, C).

        Args:
            shape: of all this.
            given: the cells (C + O,), the candidates' first; queries (layers, kv_heads, rows,
                head_dim); beside (layers, kv_heads, rows, 1), divided by the scale of the products;
                factors (layers, kv_heads, C); planes (tables * bits, head_dim). None for none.
        """
        self._build(shape)
        ggml, scores = self.ggml, np.empty((shape.kept, shape.count), np.float32)
        inputs = self._cells, self._queries, self._beside, self._factors, self._planes
        for tensor, array in zip(inputs, given, strict=True):
            if array is not None:
                dense = np.ascontiguousarray(array)
                ggml.backend_tensor_set(tensor, dense.ctypes.data, 0, dense.nbytes)
        if ggml.backend_graph_compute(self._backend, self._graph):
            raise DeviceError(f"{self.name} failed to score; use --scoring host")
        ggml.backend_tensor_get(self._scores, scores.ctypes.data, 0, scores.nbytes)
        return scores

    def _build(self, shape: _Shape) -> None:
        """Describes the graph for such a shape, if it is not there."""
        if self._shape == shape:
            return
        self._shape = None
        per_head = 4 * shape.keys * (2 * shape.rows + self.dim)
        if shape.beside or shape.weighs:
            per_head += 4 * shape.keys * shape.rows
        rows, nodes = shape.rows, 24
        if shape.how:
            # what is computed of a row: one value a key, or one a key and table
            per_row = shape.how.copies * 4 * shape.count
            rows = min(max(WORK_BYTES // per_row, 1), shape.rows)
            per_head = rows * per_row + 12 * shape.count * (self.dim + shape.how.signs)
            nodes = 32 + shape.how.nodes * -(-shape.rows // rows)
        together = min(max(WORK_BYTES // per_head, 1), self.kv_heads)
        groups = -(-self.kv_heads // together)
        tensors = 16 + nodes * groups * len(self.layers)
        self._arena = arena = _Arena(tensors, tensors)
        ggml, at, layers = self.ggml, arena.handle, len(self.layers)
        self._cells = ggml.new_tensor_1d(at, _I32, shape.keys)
        self._queries = ggml.new_tensor_4d(at, _F32, self.dim, shape.rows, self.kv_heads, layers)
        inputs = [self._cells, self._queries]
        if shape.beside:
            self._beside = ggml.new_tensor_3d(at, _F32, shape.rows, self.kv_heads, layers)
            inputs.append(self._beside)
        if shape.weighs:
            self._factors = ggml.new_tensor_3d(at, _F32, shape.count, self.kv_heads, layers)
            inputs.append(self._factors)
        if shape.how and shape.how.signs:
            self._planes = ggml.new_tensor_2d(at, _F32, self.dim, shape.how.signs)
            inputs.append(self._planes)
        for tensor in inputs:
            ggml.set_input(tensor)
        total = 0
        for layer in range(layers):
            for first in range(0, self.kv_heads, together):
                heads = min(together, self.kv_heads - first)
                if shape.how:
                    scores = self._collide(at, layer, first, heads, shape, shape.how, rows)
                else:
                    scores = self._attend(at, layer, first, heads, shape)
                total = ggml.add(at, total, scores) if total else scores
        ggml.set_output(total)
        self._graph = ggml.new_graph_custom(at, tensors, False)
        ggml.build_forward_expand(self._graph, total)
        if not ggml.gallocr_alloc_graph(self._memory, self._graph):
            raise DeviceError(
                f"{self.name} has no memory for scoring {shape.keys} tokens; use --scoring host"
            )
        self._scores, self._shape = total, shape

    def _attend(self, at: Any, layer: int, first: int, heads: int, shape: _Shape) -> int:
        """What one layer's kv heads first … first + heads - 1 add to the scores: (1, C, kept)."""
        ggml, dim, rows, count = self.ggml, self.dim, shape.rows, shape.count
        head = layer * self.kv_heads + first
        queries = self._asked(at, layer, first, heads, shape, 0, rows)
        keys, by_head = self._keys(at, layer, first, heads, shape)
        products = ggml.mul_mat(at, by_head, queries)  # (C + O, rows, heads)
        ggml.mul_mat_set_prec(products, _FULL_PRECISION)
        nodes, width = [keys, products], shape.keys
        if shape.beside:  # one more key, as heavy as all that only the host has
            sums = ggml.view_3d(at, self._beside, 1, rows, heads, 4, 4 * rows, 4 * rows * head)
            products, width = ggml.concat(at, products, sums, 0), width + 1
            nodes.append(products)
        weights = ggml.soft_max_ext(at, products, None, dim**-0.5, 0.0)
        nodes.append(weights)
        if width > count:
            weights = ggml.view_3d(at, weights, count, rows, heads, 4 * width, 4 * width * rows, 0)
            weights = ggml.cont(at, weights)
            nodes.append(weights)
        if shape.weighs:
            counts = ggml.view_3d(
                at, self._factors, count, 1, heads, 4 * count, 4 * count, 4 * count * head
            )
            weights = ggml.mul(at, weights, counts)
            nodes.append(weights)
        # a kv head's rows are the tokens of its heads, one head after another
        flat = ggml.reshape_3d(at, weights, count, shape.kept, rows * heads // shape.kept)
        across = ggml.cont(at, ggml.permute(at, flat, 1, 2, 0, 3))
        summed = ggml.sum_rows(at, across)
        self._refuse_unknown((*nodes, across, summed))
        return int(summed)

    def _collide(
        self, at: Any, layer: int, first: int, heads: int, shape: _Shape, how: Collisions, rows: int
    ) -> int:
        """The same for collisions: (1, C); so many rows at a time."""
        keys, by_head = self._keys(at, layer, first, heads, shape)
        graph = Colliding(self.ggml, at, how, self._planes)
        graph.nodes.append(keys)
        graph.use_keys(by_head, self.dim, shape.count, heads)
        total = 0
        for row in range(0, shape.rows, rows):
            count = min(rows, shape.rows - row)
            queries = self._asked(at, layer, first, heads, shape, row, count)
            scores = graph.scores(queries, count)
            total = self.ggml.add(at, total, scores) if total else scores
        self._refuse_unknown(graph.nodes)
        return total

    def _keys(self, at: Any, layer: int, first: int, heads: int, shape: _Shape) -> tuple[int, int]:
        """The keys that are looked at, and the same by heads: (C + O, heads, head_dim) reversed."""
        ggml, dim = self.ggml, self.dim
        stored = ggml.view_2d(
            at, self.tensors[layer], heads * dim, self.cells, self.row, first * self.head
        )
        keys = ggml.get_rows(at, stored, self._cells)  # float32, whatever the cache's type
        by_head = ggml.view_3d(at, keys, dim, shape.keys, heads, 4 * dim * heads, 4 * dim, 0)
        return keys, by_head

    def _asked(
        self, at: Any, layer: int, first: int, heads: int, shape: _Shape, row: int, count: int
    ) -> int:
        """So many rows of queries of each of these heads, from a row on."""
        of_row = 4 * self.dim
        of_head = of_row * shape.rows
        start = of_head * (layer * self.kv_heads + first) + of_row * row
        return int(
            self.ggml.view_3d(at, self._queries, self.dim, count, heads, of_row, of_head, start)
        )

    def _refuse_unknown(self, nodes: Iterable[int]) -> None:
        for node in nodes:
            if not self.ggml.backend_dev_supports_op(self.device, node):
                operation = self.ggml.op_desc(node).decode()
                raise DeviceError(f"{self.name} cannot compute {operation} for this cache")

    def close(self) -> None:
        if self._memory:
            self.ggml.gallocr_free(self._memory)
            self._memory = 0
        if self._backend:
            self.ggml.backend_free(self._backend)
            self._backend = 0
        self._shape, self._arena = None, None

    def __del__(self) -> None:
        # a process that was forked off must not touch the device
        if hasattr(self, "_backend") and os.getpid() == self._process:
            self.close()


def _device_of(tensor: int) -> int:
    """The device in whose memory a tensor lies."""
    ggml = _ggml()
    kind = ggml.backend_buffer_get_type(_field(tensor, _layout().buffer))
    device = ggml.backend_buft_get_device(kind)
    if not device and ggml.backend_buft_is_host(kind):  # plain memory belongs to none
        device = devices.cpu()
    if not device:
        raise DeviceError("the cache lies in memory of no known device")
    return int(device)


# ---- the check ---------------------------------------------------------------------------------


def prepare(context: Context, *, collisions: bool = False) -> bool:
    """Gives an empty context its scorer, once; says where it cannot be used, and returns that.

    Args:
        collisions: whether these are to be counted, which less devices may be able to.
    """
    if context.scorer is None:
        try:
            context.scorer = open_scorer(context)
        except DeviceError as error:
            log.warning(_ON_HOST, error)
            context.scorer = False
    if not context.scorer:
        return False
    refusal: str = context.scorer.refusal
    if collisions and refusal and not context.scorer.told:
        log.warning(_ON_HOST, refusal)
        context.scorer.told = True
    return not (collisions and refusal)


def open_scorer(context: Context) -> Scorer:
    """Makes a scorer for an empty context after it has scored a few tokens as NumPy does.

    Raises:
        DeviceError: this build, device or cache cannot be scored on.
    """
    layout = _layout()
    probe, count = context.probe, min(_CHECK_TOKENS, context.cells)
    asking = count // 2
    probe.watch_cache(layout.rows, layout.base)
    probe.cache[:] = 0
    tokens = np.linspace(1, context.model.vocab_size - 1, count).astype(np.int32)
    queries, keys = probe.new("queries", asking), probe.new("keys", count)
    cells = probe.new("cells", count)
    scratch = Sequence(context, SPARE)
    try:
        wanted = {"queries": (queries, count - asking), "keys": (keys, 0), "cells": (cells, 0)}
        with context.at_once(), probe.armed(**wanted):
            context.decode(tokens, 0, SPARE)
        L.llama_synchronize(context.handle)
        _check_cache(context)
        stored = stored_keys(context, cells[0])
        scorer = Scorer(context, turned=_are_turned(stored, keys))
        asked = queries @ hadamard.whole(context.model.head_dim) if scorer.turned else queries
        error = max(_errors(scorer, queries, asked, cells[0], stored))
        tolerance = TOLERANCE if scorer.devices == ["CPU"] else GPU_TOLERANCE
        keys = stored @ hadamard.whole(stored.shape[-1]).T if scorer.turned else stored
        scorer.refusal = _refusal(scorer, queries, cells[0], keys, tolerance)
    except CaptureError as error_seen:
        raise DeviceError(str(error_seen)) from error_seen
    finally:
        scratch.remove()
    if not error <= tolerance:
        scorer.close()
        raise DeviceError(
            f"{', '.join(scorer.devices)} computes scores that are off by {error:.2g}"
        )
    return scorer


def _check_cache(context: Context) -> None:
    """Whether the tensors found are the cache's keys, each of the size that is expected."""
    ggml, model = _ggml(), context.model
    values = context.allocated_cells * model.kv_heads * model.head_dim
    size = row_bytes(context.options.type_k, values)
    for layer, tensor in enumerate(map(int, context.probe.cache)):
        if not tensor or ggml.get_name(tensor) != f"cache_k_l{layer}".encode():
            raise DeviceError(f"layer {layer} does not show where its keys are")
        if ggml.nelements(tensor) != values or ggml.nbytes(tensor) != size:
            raise DeviceError(f"the cache of layer {layer} has another size than expected")


def stored_keys(context: Context, cells: NDArray[np.int64]) -> NDArray[np.float32]:
    """What the cache holds in the given cells: (layers, cells, kv_heads, head_dim) float32.

    For checks: every row is copied to the host. `Probe.cache` must have been filled.
    """
    model, type_k = context.model, context.options.type_k
    size = row_bytes(type_k, model.kv_heads * model.head_dim)
    raw = np.empty((model.layers, len(cells), size), np.uint8)
    for layer, tensor in enumerate(map(int, context.probe.cache)):
        for row, cell in zip(raw[layer], cells.tolist(), strict=True):
            _ggml().backend_tensor_get(tensor, row.ctypes.data, cell * size, size)
    kind = gguf.GGMLQuantizationType(CACHE_TYPES[type_k])
    if type_k in ("f32", "f16"):
        wide = raw.view(np.float32 if type_k == "f32" else np.float16)
    else:
        wide = gguf.quants.dequantize(raw, kind)
    return wide.astype(np.float32).reshape(*raw.shape[:2], model.kv_heads, model.head_dim)


def _are_turned(stored: NDArray[np.float32], keys: NDArray[np.float32]) -> bool:
    """Whether stored keys are rotated, as llama.cpp does before it quantises them.

    Raises:
        DeviceError: they are neither the keys nor the rotated keys.
    """
    for turned in (False, True):
        expected = keys @ hadamard.whole(keys.shape[-1]) if turned else keys
        if np.linalg.norm(stored - expected) < 0.3 * np.linalg.norm(expected):
            return turned
    raise DeviceError("the cache holds other keys than the model computed")


def _errors(
    scorer: Scorer,
    queries: NDArray[np.float32],
    asked: NDArray[np.float32],
    cells: NDArray[np.int64],
    stored: NDArray[np.float32],
) -> Iterator[float]:
    """How far scores of a few cells are from the formula, as shares of the largest; never NaN.

    Plain ones, and the largest over the tokens with all that can be added.

    Args:
        queries, asked: as the scorer takes them, and turned as the cache's keys are.
        stored: keys (layers, cells, kv_heads, head_dim).
    """
    few = max(len(cells) // 2, 1)
    shape = stored[:, :few, :, 0].shape
    weights = (1 + np.arange(np.prod(shape)) % 5).astype(np.float32).reshape(shape)
    beside = np.linspace(-1, 1, queries[..., 0].size).astype(np.float32).reshape(queries.shape[:3])
    by_token = _attention(asked, stored).sum(axis=(0, 2))
    group = queries.shape[2] // stored.shape[2]
    counted = np.repeat(weights, group, axis=2).transpose(0, 2, 1)[:, None]
    all_seen = _attention(asked, stored, beside)[..., :few]
    for truth, found in (
        (by_token.sum(axis=0), scorer.attention(queries, cells)),
        (
            (all_seen * counted).sum(axis=(0, 2)).max(axis=0),
            scorer.attention(
                queries, cells[:few], weights=weights, over="max", others=cells[few:], beside=beside
            ),
        ),
    ):
        error = float(np.abs(found - truth).max() / truth.max())
        yield error if error == error else np.inf


def _refusal(
    scorer: Scorer,
    queries: NDArray[np.float32],
    cells: NDArray[np.int64],
    keys: NDArray[np.float32],
    tolerance: float,
) -> str:
    """Why a scorer's collisions are not to be used; empty where they are the formula's."""
    try:
        for rule in ("analytic", "fraction", "magicpig"):
            how = Collisions(rule, 4, 8, 0)
            found, truth = scorer.collisions(queries, cells, how), _collisions(queries, keys, how)
            # in all: a projection of next to nothing may have either sign
            error = float(np.abs(found - truth).sum() / truth.sum())
            if not error <= tolerance:
                devices_ = ", ".join(scorer.devices)
                return f"{devices_} counts collisions that are off by {error:.2g}"
    except DeviceError as error_seen:
        return str(error_seen)
    return ""


def _collisions(
    queries: NDArray[np.float32], keys: NDArray[np.float32], how: Collisions
) -> NDArray[np.float64]:
    """By their definition, for a few tokens: (C,)."""
    wide = (keys - keys.mean(axis=1, keepdims=True)).astype(np.float64)
    wide = np.repeat(wide, queries.shape[2] // keys.shape[2], axis=2)
    planes = how.planes(queries.shape[-1])
    if planes is None:
        products = np.einsum("lthd,lchd->lthc", queries, wide)
        products /= np.linalg.norm(queries, axis=-1)[..., None]
        products /= np.linalg.norm(wide, axis=-1).transpose(0, 2, 1)[:, None]
        worth = (1 - np.arccos(np.clip(products, -1, 1)) / np.pi) ** how.bits
        return np.asarray(worth.mean(axis=(0, 1, 2)), np.float64)
    tables = how.tables, how.bits
    asked = (queries @ planes.T >= 0).reshape(*queries.shape[:3], *tables)
    seen = (wide @ planes.T >= 0).reshape(*wide.shape[:3], *tables)
    hits = (asked[:, :, None] == seen[:, None]).all(axis=-1).sum(axis=-1)
    worth = hits / how.tables if how.rule == "fraction" else hits >= 2
    return np.asarray(worth.mean(axis=(0, 1, 3)), np.float64)


def _attention(
    queries: NDArray[np.float32],
    keys: NDArray[np.float32],
    beside: NDArray[np.float32] | None = None,
) -> NDArray[np.float64]:
    """The formula, for a few tokens: (layers, tokens, heads, C)."""
    wide = np.repeat(keys, queries.shape[2] // keys.shape[2], axis=2).astype(np.float64)
    scores = np.einsum("lthd,lchd->lthc", queries, wide) / np.sqrt(queries.shape[3])
    if beside is not None:
        scores = np.concatenate((scores, beside[..., None]), axis=-1)
    weights: NDArray[np.float64] = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return weights
