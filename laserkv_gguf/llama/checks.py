"""What `doctor` tries on a model: does this llama.cpp do what is relied upon?"""

from __future__ import annotations

from typing import Any

import llama_cpp as L
import numpy as np
from numpy.typing import NDArray

from laserkv_gguf.llama import library, state
from laserkv_gguf.llama.context import Context, ContextOptions
from laserkv_gguf.llama.model import Model
from laserkv_gguf.llama.sequence import MAIN, SPARE, Sequence

_TOKENS = 48


def system_info() -> str:
    """What llama.cpp was compiled for: "CPU : AVX2 = 1 | …"."""
    library.start()
    return (L.llama_print_system_info() or b"").decode("utf-8", "replace")


def _tokens(model: Model) -> NDArray[np.int32]:
    rng = np.random.default_rng(0)
    return rng.integers(0, min(model.vocab_size, 1000), _TOKENS).astype(np.int32)


def state_round_trip(model: Model) -> float:
    """The largest difference in logits between a sequence and its copy from saved rows.

    Reads tokens, saves the rows of the sequence, frees them, puts them into another sequence,
    shares that with the first one and reads on: recall and saved chats do the same. 0.0 is right.

    Raises:
        LaserKVError: llama.cpp does not save or take the rows.
    """
    tokens = _tokens(model)
    with Context(model, 2 * _TOKENS, ContextOptions(ubatch_size=64, threads=1)) as context:
        main, spare = Sequence(context, MAIN), Sequence(context, SPARE)
        context.decode(tokens[:-1], 0, MAIN)
        rows = state.save(context.handle, MAIN)
        context.decode(tokens[-1:], _TOKENS - 1, MAIN, outputs=1)
        before = context.logits()
        main.remove()
        state.restore(context.handle, SPARE, rows)
        spare.share_with(main)
        spare.remove()
        context.decode(tokens[-1:], _TOKENS - 1, MAIN, outputs=1)
        return float(np.abs(context.logits() - before).max())


def flash_attention(model: Model) -> float:
    """The correlation of logits with flash attention and without; 1 is the same."""
    found = []
    for switch in ("off", "on"):
        options = ContextOptions(ubatch_size=64, threads=1, flash_attn=switch)
        with Context(model, 2 * _TOKENS, options) as context:
            context.decode(_tokens(model), 0, MAIN, outputs=1)
            found.append(context.logits())
    correlations: Any = np.corrcoef(found)
    return float(correlations[0, 1])
