"""How the model's RoPE turns keys, measured rather than derived.

Compacting positions re-rotates keys inside llama.cpp. Keys of the window that we hold on the host
must turn with them. Frequencies follow from base, scaling and factors in more ways than one
(linear, YaRN, Llama 3's table), so they are read off: one token decoded alone in several empty
sequences has, before RoPE, the same key in every layer, whatever its position.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import llama_cpp as L
import numpy as np
from numpy.typing import NDArray

from laserkv_gguf.errors import UserError
from laserkv_gguf.llama.context import SEQUENCES, Context, ContextOptions
from laserkv_gguf.llama.model import Model
from laserkv_gguf.llama.sequence import Sequence

# Each distance resolves the turns that the one before it left open.
_DISTANCES = (0, 1, 32, 1024)


@dataclass(frozen=True)
class Rotation:
    """Angles of RoPE.

    Attributes:
        angles: (dims / 2,) float64, radians per position of every pair of dimensions.
        halves: pairs are (i, i + dims/2) as in NeoX, else neighbours (2i, 2i + 1).
    """

    angles: NDArray[np.float64]
    halves: bool

    def _pairs(self, vectors: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        half = len(self.angles)
        if self.halves:
            return vectors[..., :half], vectors[..., half : 2 * half]
        return vectors[..., 0 : 2 * half : 2], vectors[..., 1 : 2 * half : 2]

    def turn(self, vectors: NDArray[Any], positions: NDArray[np.int64] | int) -> None:
        """Rotates vectors (…, head_dim) in place, as if they stood `positions` further on.

        Args:
            vectors: float32 or float16.
            positions: a number, or an array that broadcasts to all but the last axis.
        """
        if not np.any(positions):
            return
        angles = self.angles * np.asarray(positions)[..., None]
        cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        x, y = self._pairs(vectors)
        turned = x * cos - y * sin
        y[...] = x * sin + y * cos
        x[...] = turned


def check(model: Model, options: ContextOptions) -> None:
    """Refuses models and cache types whose keys llama.cpp cannot re-rotate.

    Raises:
        UserError: with the remedy in one line.
    """
    if model.rope_type not in (L.LLAMA_ROPE_TYPE_NORM, L.LLAMA_ROPE_TYPE_NEOX):
        raise UserError(
            f"{model.architecture} uses a position encoding that cannot be compacted; "
            "use --positions original"
        )
    # llama.cpp aborts on bf16, and for quantised keys uses a Hadamard matrix that it makes only
    # for head sizes in steps of 64
    quantised = options.type_k not in ("f32", "f16")
    if options.type_k == "bf16" or (quantised and model.head_dim % 64):
        raise UserError(
            f"llama.cpp cannot move cached keys of type {options.type_k} (head size "
            f"{model.head_dim}); use -ctk f16, or --positions original"
        )


def movable(model: Model, options: ContextOptions) -> bool:
    """Whether llama.cpp can re-rotate such keys; see `check`."""
    try:
        check(model, options)
    except UserError:
        return False
    return True


def known(context: Context) -> Rotation | None:
    """The model's RoPE, to take it back from captured keys; None where it is of no known kind.

    Raises:
        CaptureError: as of `measure`.
    """
    if context.model.rope_type not in (L.LLAMA_ROPE_TYPE_NORM, L.LLAMA_ROPE_TYPE_NEOX):
        return None
    return _read_off(context)


def measure(context: Context) -> Rotation:
    """Reads the model's RoPE off an empty context (one tiny batch).

    Also the check that the graph shows its keys at all.

    Raises:
        UserError: see `check`.
        CaptureError: the graph does not name its keys as expected.
    """
    check(context.model, context.options)
    return _read_off(context)


def _read_off(context: Context) -> Rotation:
    model = context.model
    spare = [SEQUENCES - 1 - i for i in range(len(_DISTANCES))]
    keys = context.probe.new("keys", len(_DISTANCES))
    token = model.vocab_size // 2
    try:
        with context.at_once(), context.probe.armed(keys=(keys, 0)):
            context.decode_parallel([token] * len(spare), list(_DISTANCES), spare)
    finally:
        for number in spare:
            Sequence(context, number).remove()
    rotation = Rotation(
        np.zeros(model.rotated_dims // 2), model.rope_type == L.LLAMA_ROPE_TYPE_NEOX
    )
    x, y = (part.astype(np.float64) for part in rotation._pairs(keys))
    angles = np.zeros(model.rotated_dims // 2)
    for index, distance in enumerate(_DISTANCES[1:], 1):
        dot = (x[:, 0] * x[:, index] + y[:, 0] * y[:, index]).sum(axis=(0, 1))
        cross = (x[:, 0] * y[:, index] - y[:, 0] * x[:, index]).sum(axis=(0, 1))
        seen = np.arctan2(cross, dot)
        turns = np.round((angles * distance - seen) / (2 * np.pi))
        angles = (seen + 2 * np.pi * turns) / distance
    return Rotation(angles, rotation.halves)
