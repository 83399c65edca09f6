"""`kvzip`: what the model looks at when it says the text again; no question needed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from laserkv_gguf.budget import Budget
from laserkv_gguf.errors import UserError
from laserkv_gguf.policies.base import SHARES, Candidates, Needs, Policy, check_pool, shared_budget

VALUES = ("none", "norm", "output")


@dataclass(frozen=True)
class KVzip(Policy):
    """Keys by the most attention that repeating the text pays them (arXiv 2505.23416, section 3).

    Also snu-mllab/KVzip, and NVIDIA/kvpress, `kvzip_press.py`, whose protected tokens these are.
    While a text is in the cache, a prompt to repeat it and the text itself are decoded behind it.
    With A the softmax of these tokens' attention, the score of key j of a layer and kv head is
    max over i and h of A[i, h, j], over all tokens i of prompt and repetition and over the heads h
    that read the kv head. A long text is repeated in chunks, each after a prompt that quotes the
    last 8 tokens before it, and a chunk's keys are scored by their own repetition. It costs about
    one more reading, and cells for a chunk.

    In llama.cpp a token is kept for all layers and heads or for none, so the scores are summed over
    layers and kv heads, where the paper ranks the keys of all heads among each other. The softmax
    is over all that is visible; the authors' code leaves the other chunks out of it.

    Attributes:
        values: what a key's score counts. "none": itself, as in the paper; "norm": times ‖v‖, the
            length of the token's value in its layer and kv head; "output": times ‖W_o v‖
            (CriticalKV, arXiv 2502.03805), as kvpress has it for KVzip+, though without dividing by
            the length of the hidden state.
        shares: "one": one pool for the whole document; what was kept keeps its scores and competes
            with every block; "equal": every block keeps its own pool, by `--protection-divisor`;
            "whole": one choice after all was read and repeated, as published, for which the cache
            must hold all of it.
        chunk: tokens repeated at a time, no more than a block (2048; the authors' 2000).
        pool: scores are averaged over this many neighbours, though not over gaps; 1 for none, as in
            the paper.
        sinks, recent: first and last tokens that always stay, unless shares are equal, as far as
            they are no more than 1/n of what is kept by `--protection-divisor` (4; the paper has no
            last ones).
    """

    name: ClassVar[str] = "kvzip"
    needs: ClassVar[Needs] = Needs(keys=True, visible=True, repeat=2048)

    values: str = "none"
    shares: str = "one"
    chunk: int = 2048
    pool: int = 1
    sinks: int = 4
    recent: int = 32

    def __post_init__(self) -> None:
        for name, known in (("values", VALUES), ("shares", SHARES)):
            if getattr(self, name) not in known:
                raise UserError(f"{name} is {getattr(self, name)!r}; give {', '.join(known)}")
        if self.chunk < 1:
            raise UserError(f"chunk is {self.chunk}; give at least 1 token, such as 2048")
        check_pool(self.pool)
        if self.sinks < 0:
            raise UserError(f"sinks is {self.sinks}; give a number of tokens, 0 for none")
        if self.recent < 1:
            raise UserError(f"recent is {self.recent}; give at least 1 token, such as 32")
        needs = replace(self.needs, repeat=self.chunk, value_norms=self.values)
        object.__setattr__(self, "needs", needs)

    def budget(self, tokens: int, block_size: int, ratio: float, divisor: int) -> Budget:
        own = Budget(tokens, block_size, ratio, divisor)
        return shared_budget(own, self.shares, self.sinks, self.recent)

    def select(self, candidates: Candidates, budget: int) -> NDArray[np.int64]:
        from laserkv_gguf import kernels

        paid = candidates.repeated
        assert paid is not None
        if self.values != "none":
            assert candidates.value_norms is not None
            paid = paid * candidates.value_norms
        scores = paid.sum(axis=(0, 2), dtype=np.float64)
        scores = kernels.pool(scores, self.pool, candidates.tokens)
        return kernels.top_k(candidates.noted(scores), budget)
