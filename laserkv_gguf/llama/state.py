"""The state of one sequence as llama.cpp saves it: bytes out, bytes in.

`rows` knows what the bytes say; here they are only moved. Works on the handle of any context.
"""

from __future__ import annotations

import ctypes
from typing import Any

import llama_cpp as L
import numpy as np
from numpy.typing import NDArray

from laserkv_gguf.errors import LaserKVError

State = NDArray[np.uint8]


def save(handle: Any, sequence: int) -> State:
    """Positions, keys and values of a sequence's cells: (bytes,) uint8.

    Shifts that llama.cpp has not applied yet are not in the keys: decode something first.

    Raises:
        LaserKVError: llama.cpp does not hand the state out.
    """
    size = int(L.llama_state_seq_get_size(handle, sequence))
    state = np.empty(size, np.uint8)
    if not size or L.llama_state_seq_get_data(handle, _pointer(state), size, sequence) != size:
        raise LaserKVError("llama.cpp does not hand out the state of its cache; see --debug")
    return state


def restore(handle: Any, sequence: int, state: State) -> None:
    """Puts a saved state into free cells of a sequence, which loses what it held.

    Raises:
        LaserKVError: there is no room, or the state is of another type or shape.
    """
    state = np.ascontiguousarray(state)
    size = len(state)
    if L.llama_state_seq_set_data(handle, _pointer(state), size, sequence) != size:
        raise LaserKVError(
            "llama.cpp does not take the saved state; use the same -ctk, -ctv and -fa"
        )


def _pointer(state: State) -> Any:
    return state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
