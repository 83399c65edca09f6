"""What an answer's tokens look at while they are generated: for reports, off unless asked for."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from laserkv_gguf.conversation.ledger import Indices
from laserkv_gguf.errors import LaserKVError
from laserkv_gguf.llama import rows

if TYPE_CHECKING:
    from laserkv_gguf.conversation.cells import Cells
    from laserkv_gguf.llama.context import Context

log = logging.getLogger(__name__)

MOST = 12  # rows that are named for each token of the answer


@dataclass(frozen=True)
class Looks:
    """What an answer looked at, of what stood in the cache when it began.

    A share is a softmax over all that a token sees, averaged over layers and heads. What is missing
    to 1 went to the answer's own tokens.

    Attributes:
        segment, index: (rows,) int64, the ledger's rows at that time.
        share: (rows,) float32, averaged over the answer's tokens.
        most: (answer tokens, up to 12) int64, the rows that each token looked at most, the first
            first.
        weights: the same shape, float32: their shares.
    """

    segment: Indices
    index: Indices
    share: NDArray[np.float32]
    most: Indices
    weights: NDArray[np.float32]


class Watch:
    """Keeps the queries of an answer's tokens, as (layers, 1, heads, head_dim) float32 each."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._queries: list[NDArray[Any]] = []

    @contextmanager
    def last_of(self, tokens: int) -> Iterator[None]:
        """Keeps the query of the last of so many tokens, which are decoded in the block."""
        kept = self._context.probe.new("queries", 1)
        with self._context.probe.armed(queries=(kept, tokens - 1)):
            yield
        self._queries.append(kept)

    @staticmethod
    @contextmanager
    def one_each(watches: Sequence[Watch]) -> Iterator[None]:
        """Keeps a query for each of some answers of one context.

        In the block one token of each is decoded, in one batch and in this order.
        """
        if not watches:
            yield
            return
        probe = watches[0]._context.probe
        kept = probe.new("queries", len(watches))
        with probe.armed(queries=(kept, 0)):
            yield
        for number, watch in enumerate(watches):
            watch._queries.append(kept[:, number : number + 1].copy())

    def looks(self, cells: Cells, before: int, answered: int) -> Looks | None:
        """What the answer looked at.

        Args:
            before: rows of the ledger that were there when it began.
            answered: its tokens.

        Returns:
            None for an empty answer, or where llama.cpp does not show its keys (which is logged).
        """
        if not answered or not before:
            return None
        try:
            return self._looks(cells, before, answered)
        except LaserKVError as error:
            log.warning("what the answer looked at is not known: %s", error)
            return None

    def _looks(self, cells: Cells, before: int, answered: int) -> Looks:
        from laserkv_gguf import kernels

        ledger = cells.ledger
        queries = np.concatenate(self._queries[:answered], axis=1)
        with kernels.threads(self._context.threads):
            sums = [
                kernels.log_sums(queries, keys, visible=visible)
                for keys, visible in self._seen(cells, before, answered)
            ]
            found = np.zeros((answered, before), np.float32)
            start = 0
            for number, (keys, _) in enumerate(self._seen(cells, before, answered)):
                outside = np.logaddexp.reduce(
                    [np.full_like(sums[0], -np.inf), *sums[:number], *sums[number + 1 :]]
                )
                # of this part, what stands behind the rows that are counted
                end = min(start + keys.shape[1], before)
                if end < start + keys.shape[1]:
                    visible = np.clip(before + np.arange(answered) - end, 0, None)
                    late = kernels.log_sums(queries, keys[:, end - start :], visible=visible)
                    outside = np.logaddexp(outside, late)
                for token in range(answered if end > start else 0):
                    one = slice(token, token + 1)
                    found[token, start:end] = kernels.attention_consensus(
                        queries[:, one], keys[:, : end - start], outside=outside[:, one]
                    )
                start += keys.shape[1]
        found /= queries.shape[0] * queries.shape[2]
        most = np.argsort(-found, axis=1, kind="stable")[:, :MOST]
        weights = np.take_along_axis(found, most, axis=1)
        share = found.mean(axis=0)
        return Looks(
            ledger.segment[:before].copy(), ledger.index[:before].copy(), share, most, weights
        )

    def _seen(
        self, cells: Cells, before: int, answered: int
    ) -> Iterator[tuple[NDArray[Any], NDArray[np.int64]]]:
        """Keys of all rows that any of the tokens sees, and how many of them each sees."""
        form, seen = rows.known(self._context), before + np.arange(answered)
        count = before + answered - 1
        for start in range(0, count, form.per_call):
            keys = cells.rows(np.arange(start, min(start + form.per_call, count))).keys
            yield keys, np.clip(seen - start, 0, keys.shape[1])
