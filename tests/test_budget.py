"""Equation (1), the partition and the cells, against DESIGN.md's figures and set simulations."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from laserkv_gguf.budget import Budget, as_fraction, block_budget, largest_ratio_that
from laserkv_gguf.conversation.account import Account
from laserkv_gguf.errors import UserError
from laserkv_gguf.policies.full import Full
from laserkv_gguf.policies.streamingllm import StreamingLLM

RATIOS = st.integers(1, 999).map(lambda thousandths: thousandths / 1000)
DIVISORS = st.integers(3, 12)


@st.composite
def lengths(draw: st.DrawFn, most: int = 40) -> tuple[int, int]:
    """(tokens, block size): up to `most` whole blocks and a part of one."""
    size = draw(st.integers(1, 5000))
    return draw(st.integers(1, most)) * size + draw(st.integers(0, size - 1)), size


def divisible(budget: Budget) -> bool:
    """Whether anything is evicted at all."""
    return budget.tokens > budget.block_size and budget.ratio < 1


# ---- equation (1) ------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "expected"), [(16384, 1638), (65536, 1927), (131072, 1985)])
def test_budgets_of_the_design(tokens: int, expected: int) -> None:
    budget = Budget(tokens, 4096, 0.25)
    assert block_budget(tokens, 4096, 0.25) == budget.block == expected
    assert budget.anchors == budget.window == expected // 4
    assert budget.long_term == expected - 2 * (expected // 4)


@given(lengths(), RATIOS, DIVISORS)
def test_block_budget_is_floored_exactly(
    shape: tuple[int, int], ratio: float, divisor: int
) -> None:
    """Against integers: thousandths of a ratio are exact, whatever their float is."""
    (tokens, size), thousandths = shape, round(1000 * ratio)
    assert Budget(tokens, size, ratio, divisor).block == (
        2 * thousandths * size * tokens // (1000 * (size + tokens))
    )


@given(lengths(), RATIOS)
def test_identity_at_four(shape: tuple[int, int], ratio: float) -> None:
    """2B/n + (L/S)(B - 2B/n) = rL without rounding, at n = 4 and no other."""
    tokens, size = shape
    exact = as_fraction(ratio)
    block = 2 * exact * size * tokens / (size + tokens)
    total = 2 * block / 4 + Fraction(tokens, size) * (block - 2 * block / 4)
    assert total == exact * tokens == Budget(tokens, size, ratio, 4).nominal(tokens)
    if tokens != size:  # where L = S, anchors, window and pool are all spent once
        for other in (3, 5, 8):
            assert Budget(tokens, size, ratio, other).nominal(tokens) != exact * tokens


def test_ratio_is_what_the_user_wrote() -> None:
    """The binary float next to 0.1 is above 1/10, that next to 0.35 below: neither may show."""
    assert as_fraction(0.1) == Fraction(1, 10)
    assert block_budget(1000, 1000, 0.35) == 350
    assert block_budget(3000, 1000, 0.7) == 1050


# ---- what is kept ------------------------------------------------------------------------------


@given(lengths(), RATIOS)
def test_kept_is_the_ratio_at_four(shape: tuple[int, int], ratio: float) -> None:
    """Against rL: above it by a token a block at most, below it by what rounding takes."""
    budget = Budget(*shape, ratio)
    if not divisible(budget):
        return
    blocks, wanted = len(budget.blocks), as_fraction(ratio) * budget.tokens
    assert budget.kept <= math.ceil(wanted) + blocks
    # B and B // 4 are rounded down: 2 tokens once, half a token a block, one for a short block.
    assert budget.kept > wanted - 3 - blocks / 2


@given(lengths(), RATIOS, DIVISORS)
def test_block_structure(shape: tuple[int, int], ratio: float, divisor: int) -> None:
    """Against sets of tokens, held and dropped as section 2 of DESIGN.md says."""
    budget = Budget(*shape, ratio, divisor)
    anchors = range(budget.anchors)
    held, window, read = 0, range(0), 0  # held: chosen tokens
    for index, block in enumerate(budget.blocks):
        assert (block.index, block.start) == (index, read)
        assert block.end == min(read + budget.block_size, budget.tokens)
        assert block.tokens == block.end - block.start
        read = block.end
        assert block.kept_after <= block.kept_before + block.tokens
        if divisible(budget):
            new = range(max(read - budget.window, 0), read)
            first = max(min(window, default=0), budget.anchors)
            candidates = range(first, max(min(new, default=0), first))
            assert block.candidates == (candidates.start, candidates.stop)
            # none twice, none never: candidates begin where those of the block before ended
            if index:
                assert candidates.start == max(budget.blocks[index - 1].candidates)
            else:
                assert candidates.start == min(budget.anchors, read)
            assert 0 <= block.pool <= len(candidates)
            assert block.evicts == (block.pool < len(candidates))
            held, window = held + block.pool, new
            fixed = len(set(anchors) & set(range(read)) | set(new)) if read < 20000 else None
            assert fixed is None or block.kept_after == fixed + held
        else:
            assert not block.evicts
            assert block.kept_after == read
        before = budget.blocks[index - 1].kept_after if index else 0
        assert block.kept_before == before
    assert read == budget.tokens
    assert budget.kept == budget.blocks[-1].kept_after
    assert budget.kept_fraction == budget.kept / budget.tokens
    assert 1 <= budget.window <= budget.tokens


@given(lengths(), DIVISORS)
def test_whole_sequences(shape: tuple[int, int], divisor: int) -> None:
    """A ratio of 1 and a sequence of one block keep all, with no probe to find room for."""
    tokens, size = shape
    for budget in (
        Budget(tokens, size, 1.0, divisor),
        Budget(min(tokens, size), size, 0.01, divisor),
        Full().budget(tokens, size, 0.1, divisor),
    ):
        assert budget.keeps_all
        assert budget.kept == budget.tokens
        assert budget.kept_fraction == 1
        assert not any(block.evicts for block in budget.blocks)
        assert budget.cells(1000, 100, 7) == budget.tokens + 7
    assert not Budget(size + 1, size, 0.5, divisor).keeps_all


def test_empty_sequence() -> None:
    budget = Budget(0, 512, 0.25)
    assert (budget.block, budget.blocks, budget.kept, budget.kept_fraction) == (0, (), 0, 1.0)
    assert budget.cells(5, 5, 0) == 1
    assert budget.cells(5, 5, 9) == 9


@pytest.mark.parametrize("ratio", [0.9, 0.95, 0.98, 0.99, 0.999])
@given(shape=lengths())
def test_unused_pool_carries_over(ratio: float, shape: tuple[int, int]) -> None:
    """A pool larger than its block (the first has anchors and window too) is spent later."""
    budget = Budget(*shape, ratio)
    if divisible(budget):
        wanted = math.floor(as_fraction(ratio) * budget.tokens)
        assert abs(budget.kept - wanted) <= len(budget.blocks) + 2


def test_first_block_with_more_pool_than_candidates() -> None:
    """Checked by hand: B = 133, 33 anchors, 33 for the window, 67 for the pool of each block."""
    budget = Budget(200, 100, 0.999)
    assert (budget.block, budget.anchors, budget.window, budget.long_term) == (133, 33, 33, 67)
    first, second = budget.blocks
    assert (first.candidates, first.pool, first.kept_after) == ((33, 67), 34, 100)
    assert (second.candidates, second.pool) == ((67, 167), 100)
    assert budget.kept == 200


def test_short_last_block_has_a_pro_rata_pool() -> None:
    """Against the whole blocks before it, whose pool is B_long, or one less where B_long is what
    rounding B // 4 down made it and the sum would pass rL."""
    for rest in (1, 17, 1024, 2048, 4095):
        budget = Budget(15 * 4096 + rest, 4096, 0.25)
        pools = [block.pool for block in budget.blocks]
        assert set(pools[:-1]) <= {budget.long_term, budget.long_term - 1}
        assert budget.blocks[-1].tokens == rest
        assert abs(pools[-1] - budget.long_term * rest / 4096) <= 2


@given(lengths(), RATIOS, st.sampled_from([3, 5, 8, 16]))
def test_other_divisors_report_the_true_fraction(
    shape: tuple[int, int], ratio: float, divisor: int
) -> None:
    """Against equation (1) without rounding, which gives no rL where n is not 4."""
    budget = Budget(*shape, ratio, divisor)
    if not divisible(budget):
        return
    wanted = min(budget.nominal(budget.tokens), budget.tokens)
    assert budget.kept <= math.ceil(wanted) + len(budget.blocks)
    assert budget.kept_fraction == budget.kept / budget.tokens
    assert 0 < budget.kept_fraction <= 1


def test_a_larger_divisor_keeps_more_over_many_blocks() -> None:
    """By hand: L = 16 S, so at n = 8 it is B/4 + 16 · 3B/4 = 12.25 B, and 8.5 B at n = 4."""
    kept = {n: Budget(65536, 4096, 0.25, n).kept_fraction for n in (3, 4, 8)}
    assert kept[4] == pytest.approx(0.25, abs=1e-3)
    assert kept[8] == pytest.approx(0.25 * 12.25 / 8.5, abs=1e-3)
    assert kept[3] == pytest.approx(0.25 * 6 / 8.5, abs=1e-3)


# ---- sinks and a window ------------------------------------------------------------------------


@given(lengths(), RATIOS, st.integers(0, 64))
def test_sinks_and_window_keep_exactly_the_ratio(
    shape: tuple[int, int], ratio: float, sinks: int
) -> None:
    budget = StreamingLLM(sinks=sinks).budget(*shape, ratio, 4)
    if not divisible(budget):
        assert budget.kept == budget.tokens
        return
    wanted = max(1, math.floor(as_fraction(ratio) * budget.tokens))
    assert budget.kept == budget.anchors + budget.window == wanted
    assert budget.anchors == min(sinks, wanted - 1)
    assert budget.long_term == 0
    for block in budget.blocks:
        assert block.pool == 0
        assert block.kept_after == min(block.end, wanted)


# ---- cells -------------------------------------------------------------------------------------


def peak(budget: Budget, prompt: int, drafts: int, reply: int) -> int:
    """Decodes token by token, counting: the most cells ever taken."""
    used = most = 0
    for start in range(0, budget.tokens, budget.block_size):
        block = budget.blocks[start // budget.block_size]
        for _ in range(start, min(start + budget.block_size, budget.tokens)):
            used += 1
            most = max(most, used)
        if block.evicts:
            asked = used
            for _ in range(prompt + drafts):
                asked += 1
                most = max(most, asked)
            used -= block.count - block.pool
    for _ in range(reply):
        used += 1
        most = max(most, used)
    return most


@settings(deadline=None)
@given(
    st.integers(1, 60),
    st.integers(1, 400),
    RATIOS | st.just(1.0),
    DIVISORS,
    st.tuples(st.integers(0, 40), st.integers(0, 20), st.integers(0, 400)),
)
def test_cells_are_the_peak_of_a_run(
    size: int, tokens: int, ratio: float, divisor: int, asked: tuple[int, int, int]
) -> None:
    """Against a count over every token: never fewer, and no more than a probe too many.

    Where blocks that evict nothing (all of their candidates fit) are the fullest, no probe
    follows them, and only there may cells() be above the peak.
    """
    budget = Budget(tokens, size, ratio, divisor)
    cells, most = budget.cells(*asked), peak(budget, *asked)
    assert most <= cells <= most + asked[0] + asked[1]
    if budget.keeps_all or all(block.evicts for block in budget.blocks):
        assert cells == max(most, 1)


@settings(deadline=None)
@given(lengths(12), DIVISORS, st.integers(0, 200_000), st.integers(0, 64), st.integers(0, 3000))
def test_largest_ratio_is_the_largest(
    shape: tuple[int, int], divisor: int, cells: int, prompt: int, reply: int
) -> None:
    tokens, size = shape

    def needed(ratio: float) -> int:
        return Budget(tokens, size, ratio, divisor).cells(prompt, 16, reply)

    most = largest_ratio_that(
        lambda budget: budget.cells(prompt, 16, reply) <= cells, tokens, size, divisor
    )
    if most:
        assert needed(most) <= cells
    if most < 1:
        assert needed(round(most + 0.001, 3)) > cells


@pytest.mark.parametrize(("tokens", "size"), [(500, 16), (60, 7)])
def test_largest_ratio_is_the_largest_of_all(tokens: int, size: int) -> None:
    """Many small blocks: rounding makes a smaller ratio need more cells than a larger one."""
    needed = [Budget(tokens, size, i / 1000).cells(5, 2, 9) for i in range(1, 1001)]
    assert sorted(needed) != needed
    for cells in range(size, tokens + 20, tokens // 7):
        most = max((i for i, need in enumerate(needed, 1) if need <= cells), default=0)

        def fits(budget: Budget, cells: int = cells) -> bool:
            return budget.cells(5, 2, 9) <= cells

        assert largest_ratio_that(fits, tokens, size, 4) == most / 1000


# ---- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"ratio": 0.0}, "ratio"),
        ({"ratio": -0.1}, "ratio"),
        ({"ratio": 1.0001}, "ratio"),
        ({"ratio": math.nan}, "ratio"),
        ({"ratio": math.inf}, "ratio"),
        ({"block_size": 0}, "block_size"),
        ({"block_size": -4096}, "block_size"),
        ({"divisor": 2}, "protection_divisor"),
        ({"divisor": 0}, "protection_divisor"),
    ],
)
def test_bad_settings_name_their_flag(change: dict[str, float], flag: str) -> None:
    with pytest.raises(UserError, match=f"^{flag}") as caught:
        Budget(1000, **change)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_overhead_share() -> None:
    account = Account(prefill_seconds=10, probe_seconds=1, score_seconds=2, evict_seconds=0.5)
    assert account.overhead_share == 0.35
    account.decode_seconds = 5  # what a read without compression would spend too
    account.lookahead_seconds, account.select_seconds, account.park_seconds = 1, 0.25, 0.25
    assert account.overhead_share == 0.5
    assert Account().overhead_share == 0
    assert account.as_dict()["probe_seconds"] == 1
