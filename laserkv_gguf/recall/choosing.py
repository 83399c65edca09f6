"""What a policy chooses from, out of a document's parked rows."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from laserkv_gguf.budget import Block
from laserkv_gguf.errors import UserError
from laserkv_gguf.llama import moving, output, rows
from laserkv_gguf.policies import Candidates, checked
from laserkv_gguf.reading.asking import Asked
from laserkv_gguf.recall.parked import Parked
from laserkv_gguf.recall.store import Indices


class Choosing:
    """Has the document's policy choose among parked tokens.

    Attributes:
        norms: (layers, tokens, kv_heads) float32, of parked values; NaN until they are asked for.

    Raises:
        UserError: the policy weighs values that cannot be told from what is parked.
    """

    def __init__(self, parked: Parked) -> None:
        self.parked, self.policy = parked, parked.policy
        self.norms: NDArray[np.float32] | None = None
        self._factors: NDArray[np.float32] | None = None
        if self.policy.needs.value_norms == "output":
            context = parked.reader.context
            if context.options.quantised_v:
                raise UserError(
                    "values=output cannot be recalled from a quantised V cache; use -ctv f16, "
                    "--policy-option values=norm or --recall off"
                )
            self._factors = output.factors(context.model)

    @property
    def bytes(self) -> int:
        """Of `norms`, whether a question has asked for them yet or not."""
        if not self._weighs:
            return 0
        form = self.parked.form
        return (
            form.layers * self.parked.budget.tokens * form.kv_heads * np.dtype(np.float32).itemsize
        )

    @property
    def _weighs(self) -> bool:
        """As the reading did, though what is parked has values in any case."""
        return self.policy.needs.value_norms != "none" and self.parked.reader.weighs

    def beside(self, position: int, hidden: tuple[tuple[int, int], ...]) -> list[NDArray[Any]]:
        """Keys of what a question at a position sees beside the document."""
        if not self.policy.needs.outside:
            return []
        parked = self.parked
        spans, start = [(0, parked.offset)], parked.next_position
        for first, last in sorted(hidden):
            spans.append((start, first))
            start = last
        spans.append((start, position))
        if parked.compact:
            moving.settle(parked.reader.context)
        return list(rows.keys_between(parked.main, spans))

    def candidates(
        self,
        tokens: Indices,
        block: Block | tuple[int, int, int],
        asked: Asked,
        others: Indices,
        beside: list[NDArray[Any]],
        memory: dict[str, Any],
    ) -> Candidates:
        """What a policy chooses from, out of what is parked.

        Args:
            tokens: the candidates.
            block: they are of, or its start, end and index.
            asked: what looks at them.
            others: tokens of the document that are seen beside them.
            beside: keys of what is seen beside the document.
            memory: the policy's notes.
        """
        needs, outside, norms = self.policy.needs, None, None
        if isinstance(block, Block):
            block = block.start, block.end, block.index
        if needs.outside:
            outside = asked.with_more((self.parked.keys(others), *beside))
        if self._weighs:
            norms = self._norms(tokens)
        return Candidates(
            tokens,
            block[:2],
            block[2],
            asked.queries,
            keys=self.parked.keys(tokens),
            memory=memory,
            value_norms=norms,
            outside=outside,
            scores=self.parked.scores,
        )

    def select(self, seen: Candidates, budget: int) -> Indices:
        """The policy's choice, checked: which `budget` of the candidates."""
        return seen.tokens[checked(self.policy, self.policy.select(seen, budget), seen, budget)]

    def _norms(self, tokens: Indices) -> NDArray[np.float32]:
        """`Candidates.value_norms` of parked tokens, computed once each."""
        from laserkv_gguf import kernels

        parked, form = self.parked, self.parked.form
        if self.norms is None:
            shape = form.layers, parked.budget.tokens, form.kv_heads
            self.norms = np.full(shape, np.nan, np.float32)
        missing = tokens[np.isnan(self.norms[0, tokens, 0])]
        for first, last in parked.chunks(len(missing)):
            part = missing[first:last]
            values = form.values(parked.store.values(part))
            self.norms[:, part] = kernels.value_norms(values, self._factors)
        return self.norms[:, tokens]
