"""`infllm`: blocks kept off the device and fetched for each question; needs recall."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from laserkv_gguf.errors import UserError
from laserkv_gguf.policies.base import Candidates, Policy


@dataclass(frozen=True)
class InfLLM(Policy):
    """Blocks looked up by representative tokens, and fetched (arXiv 2402.04617).

    The paper fetches other blocks in every layer; with shared cells all layers and heads would
    fetch the same ones. Fetching needs evicted tokens that can come back, which this version does
    not have, so the policy is listed and cannot be made.
    """

    name: ClassVar[str] = "infllm"

    def __post_init__(self) -> None:
        raise UserError(
            "--policy infllm needs recall, which this version does not have; "
            "use laser or quest, which also look for what the question needs"
        )

    def select(self, candidates: Candidates, budget: int) -> NDArray[np.int64]:
        raise NotImplementedError
