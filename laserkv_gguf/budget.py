"""How many tokens are kept, where, and what a run cost.

LASER-KV (arXiv 2602.02199), equation (1): with `L` tokens read in blocks of `S` and a fraction `r`
to keep, a block's budget is the harmonic mean ``B = floor(2 r S L / (S + L))``. It is split into
anchors ``B // n`` (the first tokens of the sequence), a local window ``B // n`` (the last tokens
read so far, sliding) and a long-term pool ``B - 2 (B // n)``. Anchors and window are counted once,
the pool is spent anew in every block; at ``n = 4`` that makes ``2B/n + (L/S)(B - 2B/n) = r L``.

Nothing here knows llama.cpp or Numba.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

from laserkv_gguf.errors import UserError

MIN_DIVISOR = 3
RATIO = 0.25  # kept where nobody says otherwise, as in the paper
LOW_RATIO = 0.05  # below this answers suffer


PADDING = 256  # llama.cpp rounds the number of cells up to a multiple of this


def padded(cells: int) -> int:
    """Cells llama.cpp allocates where `cells` are asked for."""
    return -(-cells // PADDING) * PADDING


def as_fraction(ratio: float) -> Fraction:
    """The ratio as the user wrote it: 0.1 is 1/10, not the binary float next to it."""
    return Fraction(repr(float(ratio)))


def block_budget(tokens: int, block_size: int, ratio: float) -> int:
    """Equation (1) of arXiv 2602.02199: ``floor(2 r S L / (S + L))`` tokens for one block."""
    return math.floor(_harmonic(tokens, block_size, as_fraction(ratio)))


def _harmonic(tokens: int, block_size: int, ratio: Fraction) -> Fraction:
    return 2 * ratio * block_size * tokens / (block_size + tokens) if tokens else Fraction(0)


@dataclass(frozen=True)
class Block:
    """One step of the block loop, in token indices of the whole sequence.

    Attributes:
        index: number of the block, from 0.
        start, end: the block's tokens, half-open.
        candidates: (start, end): the tokens in the cache with such an index are scored. In an
            accumulating run that is the previous window and the block, without anchors and without
            the new window: one run of tokens.
        count: how many candidates that are.
        pool: how many of the candidates are kept.
        kept_before, kept_after: tokens in the cache before the block and after its eviction.
    """

    index: int
    start: int
    end: int
    candidates: tuple[int, int]
    count: int
    pool: int
    kept_before: int
    kept_after: int

    @property
    def tokens(self) -> int:
        return self.end - self.start

    @property
    def evicts(self) -> bool:
        return self.pool < self.count


SHAPES = ("accumulating", "recursive", "one-shot")


@dataclass(frozen=True)
class Budget:
    """How many tokens of a sequence of known length are kept, and when the others go.

    Attributes:
        tokens: L, tokens of the sequence (chat template, system prompt and document).
        block_size: S, tokens a block.
        ratio: r in (0, 1], fraction of tokens to keep.
        divisor: n >= 3; anchors and window get ``B // n`` each.
        shape: "accumulating": equation (1), every block adds its pool and is never touched again;
            "recursive": a summary of ``floor(r L)`` tokens is chosen anew from summary and block
            (FINCH, arXiv 2408.00167); "one-shot": everything is read, then chosen from once.
        sinks, recent: first and last tokens that a recursive or one-shot run always keeps.
        grows: the summary of a recursive run has ``floor(r · read)`` tokens, not all of them from
            the beginning (FINCH).
        protected: first tokens that stay whole (a system prompt): more anchors where they are
            more, paid for by the pools as long as these have anything.

    A sequence of one block, or a ratio of 1, is kept whole: evicting would free nothing that the
    run did not already need. What a block does not use of its pool (it has fewer candidates than
    that) the next blocks may spend.

    Raises:
        UserError: ratio outside (0, 1], divisor below 3, block size below 1.
    """

    tokens: int
    block_size: int = 4096
    ratio: float = RATIO
    divisor: int = 4
    shape: str = "accumulating"
    sinks: int = 0
    recent: int = 1
    protected: int = 0
    grows: bool = False

    def __post_init__(self) -> None:
        check_settings(self.ratio, self.block_size, self.divisor)
        if self.shape not in SHAPES:
            raise ValueError(f"shape must be one of {SHAPES}, not {self.shape!r}")

    @property
    def accumulates(self) -> bool:
        return self.shape == "accumulating"

    @property
    def keeps_all(self) -> bool:
        return self.tokens <= self.block_size or self.ratio >= 1

    @cached_property
    def block(self) -> int:
        """B, tokens a block; of the other shapes the whole summary."""
        if not self.accumulates:
            return self.total
        return block_budget(self.tokens, self.block_size, self.ratio)

    @property
    def anchors(self) -> int:
        if not self.accumulates:
            return min(max(self.sinks, self.protected), self.total - 1)
        return min(max(self.block // self.divisor, self.protected), self.tokens)

    @property
    def window(self) -> int:
        """At least 1: a batch must start right after the last token of the sequence."""
        if not self.accumulates:
            return max(1, min(self.recent, self.total - self.anchors))
        return min(max(self.block // self.divisor, 1), self.tokens)

    @property
    def long_term(self) -> int:
        """B_long: spent anew in every block, or the whole choice of the other shapes."""
        if not self.accumulates:
            return self.total - self.anchors - self.window
        return self.block - 2 * (self.block // self.divisor)

    @property
    def total(self) -> int:
        """floor(r L), at least 1: what recursive and one-shot runs end with."""
        least = min(self.protected + 1, self.tokens)
        return max(1, least, math.floor(as_fraction(self.ratio) * self.tokens))

    def summary(self, read: int) -> int:
        """Tokens that a recursive or one-shot run keeps of the first `read`."""
        if not self.grows:
            return self.total
        share = math.floor(as_fraction(self.ratio) * read)
        return min(self.total, max(share, self.anchors + self.window))

    @property
    def rows(self) -> int:
        """Tokens whose keys are held on the host at a time, for policies that look at keys."""
        if self.keeps_all:
            return 0
        before = {"accumulating": self.window, "recursive": self.total}.get(self.shape)
        return self.tokens if before is None else before + self.block_size

    @property
    def rows_and_anchors(self) -> int:
        """`rows` with the anchors among them."""
        if self.keeps_all or not self.accumulates:
            return self.rows
        return self.rows + self.anchors

    @property
    def most_visible(self) -> int:
        """Tokens in the cache at most, while a block is whole."""
        if self.keeps_all:
            return 0
        return max(block.kept_before + block.tokens for block in self.blocks)

    def nominal(self, read: int) -> Fraction:
        """``2B/n + (read/S)(B - 2B/n)`` without rounding: what equation (1) allows so far."""
        share, rest = self._shares
        return share + Fraction(read, self.block_size) * rest

    @cached_property
    def _shares(self) -> tuple[Fraction, Fraction]:
        """Anchors and window together, and the pool, without rounding."""
        block = _harmonic(self.tokens, self.block_size, as_fraction(self.ratio))
        share = 2 * block / self.divisor
        return share, block - share

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        if self.keeps_all or not self.accumulates:
            return tuple(self._choosing_from_all())
        return tuple(self._accumulating())

    def _spans(self) -> Iterator[tuple[int, int, int]]:
        for index, start in enumerate(range(0, self.tokens, self.block_size)):
            yield index, start, min(start + self.block_size, self.tokens)

    def _choosing_from_all(self) -> Iterator[Block]:
        """Recursive and one-shot runs, and those that keep everything."""
        kept = 0
        for index, start, end in self._spans():
            held = kept + end - start
            waits = self.shape == "one-shot" and end < self.tokens
            total = self.summary(end)
            if self.keeps_all or waits or held <= total:
                yield Block(index, start, end, (end, end), 0, 0, kept, held)
                kept = held
                continue
            protected = self.anchors + self.window
            candidates = (self.anchors, end - self.window)
            count, pool = held - protected, total - protected
            yield Block(index, start, end, candidates, count, pool, kept, total)
            kept = total

    def _accumulating(self) -> Iterator[Block]:
        kept = spent = granted = 0
        for index, start, end in self._spans():
            # The window slides over everything read, also over the edge of a short last block.
            first = max(self.anchors, start - self.window)
            last = max(first, end - self.window)
            granted += self.long_term * (end - start) // self.block_size
            # Rounding B to n parts may grant up to 1.5 tokens a block more than r L allows.
            ceiling = math.ceil(self.nominal(end)) + index + 1 - self.anchors - self.window
            pool = max(0, min(min(granted, ceiling) - spent, last - first))
            spent += pool
            # in a block shorter than both together, anchors and window overlap
            after = min(end, self.anchors + self.window) + spent
            yield Block(index, start, end, (first, last), last - first, pool, kept, after)
            kept = after

    @property
    def kept(self) -> int:
        """Tokens in the cache when the sequence has been read."""
        return self.blocks[-1].kept_after if self.blocks else 0

    @property
    def kept_fraction(self) -> float:
        """The true fraction, which differs from `ratio` where n is not 4."""
        return self.kept / self.tokens if self.tokens else 1.0

    def cells_to_recall(self, mode: str) -> int:
        """Cells that recalling ("replay" or "shortlist") needs for the tokens themselves.

        In replay a block goes in whole, beside what was kept before it and the last window.
        """
        if mode != "replay":
            return self.kept
        whole = (block.kept_before + block.tokens for block in self.blocks if block.evicts)
        return max(self.kept, max(whole, default=0) + self.window)

    def cells(self, prompt: int, drafts: int, reply: int) -> int:
        """Cells of the KV cache a run needs at most.

        Args:
            prompt: tokens of the question with the template around it.
            drafts: lookahead tokens drafted after it while a block is whole.
            reply: tokens that follow the document: the question and its answer, or a conversation.
        """
        probing = prompt + drafts
        reading = max(
            (b.kept_before + b.tokens + (probing if b.evicts else 0) for b in self.blocks),
            default=0,
        )
        return max(reading, self.kept + reply, 1)


def check_settings(ratio: float, block_size: int, divisor: int) -> None:
    """Refuses settings no budget can be made of.

    Raises:
        UserError: with the remedy in one line.
    """
    if not 0 < ratio <= 1:  # also catches NaN
        raise UserError(
            f"--ratio is {ratio:g}; give a fraction above 0 and at most 1, such as 0.25"
        )
    if block_size < 1:
        raise UserError(f"--block-size is {block_size}; give a number of tokens such as 4096")
    if divisor < MIN_DIVISOR:
        raise UserError(
            f"--protection-divisor is {divisor}; it must be at least {MIN_DIVISOR}, "
            "or anchors and window leave nothing for the long-term pool"
        )


def largest_ratio_that(
    fits: Callable[[Budget], bool],
    tokens: int,
    block_size: int,
    divisor: int,
    make: Callable[[int, int, float, int], Budget] | None = None,
) -> float:
    """The largest ratio (in thousandths) whose budget passes `fits`; 0 if none does.

    Args:
        fits: says no to large budgets and yes to small ones.
        tokens, block_size, divisor: as in Budget.
        make: a policy's `budget`; None for equation (1).
    """
    make = make or Budget

    def passes(thousandths: int) -> bool:
        return fits(make(tokens, block_size, thousandths / 1000, divisor))

    if passes(1000):
        return 1.0
    low, high = 0, 1000
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if passes(middle) else (low, middle)
    # Rounding makes cells grow not quite steadily with the ratio: by up to a token a block, where
    # a thousandth is at least L / 1500 tokens. Look twice as far.
    reach = math.ceil(3000 / block_size + 3000 / max(tokens, 1)) + 1
    for thousandths in range(min(low + reach, 999), low, -1):
        if passes(thousandths):
            return thousandths / 1000
    return low / 1000


def ratio_keeping(keep: int, tokens: int, make: Callable[[float], Budget]) -> float:
    """The ratio of --keep: the largest whose run ends with at most `keep` tokens in the cache.

    Ratios are tried in steps of a quarter of a token. Where even the smallest keeps more, because
    the budget keeps all or protects more than that, it is `keep / tokens`.

    Args:
        keep: tokens, at least 1.
        tokens: of the sequence, the template's included.
        make: a budget for these tokens at a ratio in (0, 1].
    """
    if keep >= tokens:
        return 1.0
    steps = 4 * tokens

    def passes(step: int) -> bool:
        return make(step / steps).kept <= keep

    low, high = 0, steps
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if passes(middle) else (low, middle)
    # equation (1) rounds down in every block, so that a larger ratio may keep a token less
    for step in range(min(low + 8, steps - 1), low, -1):
        if passes(step):
            return step / steps
    return low / steps if low else keep / tokens
