"""What a policy is: a few settings, what it needs to see, and a choice among candidates.

A policy never touches the engine. It is a frozen dataclass; its fields are its options.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from laserkv_gguf.budget import Budget
from laserkv_gguf.errors import LaserKVError, UserError

if TYPE_CHECKING:
    from laserkv_gguf.llama.rope import Rotation


@dataclass(frozen=True)
class Needs:
    """What the engine captures for a policy, and how it asks where the user does not say.

    Attributes:
        queries: of the probe: the question's last tokens and the drafts after it, or the last
            tokens read where no question is known.
        block_queries: of all tokens of the block (the costly one: layers × heads × head_dim × S).
        attention: `Candidates.attention` of the probe. Where a device computes it the keys stay
            there, and `Candidates.keys` is None unless they are needed as well.
        collisions: `Candidates.collisions` of the probe, the same with keys.
        keys, values: of every candidate.
        value_norms: one number for every candidate's value, so that none is held: "norm" for its
            length, "output" for what it adds to the stream at that length (see `Candidates`),
            "none" for none, "auto" for its length where the model's graph shows values.
        outside: `Candidates.outside`, for a softmax over all that the probe sees.
        outside_kept: whether that counts what was kept of earlier blocks, too. Their keys are then
            held (on the host, or read where they are on a device) as long as blocks come.
        visible: `Candidates.visible_keys`, for other softmaxes over all that is seen.
        precise: keys, values and block queries in float32; else they are kept as float16.
        probe_tokens: the question's last so many tokens ask, with what the template puts after
            them; 0 for everything after the document.
        lookahead: tokens drafted after the question that ask along.
        reach: most of them while the answer is being copied out of the text.
        observation: where no question is known, the last tokens read ask instead (SnapKV, arXiv
            2404.14469).
        recall: evicted tokens that can come back (`--recall`), without which it is not the method.
        recent_queries: of the block queries, only the last so many tokens'; 0 for all of them.
        repeat: `Candidates.repeated`: the text is decoded once more behind itself, in parts of so
            many tokens but no more than a block, which need cells for as long; 0 for no repetition.
            Wants `visible`.
        every_block: `Policy.observe` is called with the blocks after which nothing is evicted.
        unrotated: `Candidates.rotation`, to take RoPE back; `Policy.look_up` gets queries without.
    """

    queries: bool = False
    block_queries: bool = False
    attention: bool = False
    collisions: bool = False
    keys: bool = False
    values: bool = False
    value_norms: str = "none"
    outside: bool = False
    outside_kept: bool = True
    visible: bool = False
    precise: bool = False
    probe_tokens: int = 0
    lookahead: int = 0
    reach: int = 0
    observation: int = 32
    recall: bool = False
    recent_queries: int = 0
    repeat: int = 0
    every_block: bool = False
    unrotated: bool = False

    def with_those_of(self, other: Needs | None) -> Needs:
        """Needs of a reading in which another policy chooses first: what it looks at, too."""
        if other is None:
            return self
        return replace(
            self,
            keys=self.keys or other.keys,
            attention=self.attention or other.attention,
            collisions=self.collisions or other.collisions,
            values=self.values or other.values,
            value_norms=self.value_norms if self.value_norms != "none" else other.value_norms,
            outside=self.outside or other.outside,
            outside_kept=self.outside_kept or other.outside_kept,
            visible=self.visible or other.visible,
            unrotated=self.unrotated or other.unrotated,
            recent_queries=self.recent_queries if self.block_queries else other.recent_queries,
        )

    @property
    def host_keys(self) -> bool:
        """Whether the host must have the keys; scores need them unless a device computes these."""
        return self.keys or self.visible or self.scores

    @property
    def scores(self) -> bool:
        """Whether there is anything that a device may compute where the keys are."""
        return self.attention or self.collisions

    def most_drafts(self, lookahead: int | None = None) -> int:
        """Most tokens drafted: what there must be cells for.

        Args:
            lookahead: what the user says, who then gets no more; None for the policy's own.
        """
        if lookahead is not None:
            return lookahead
        return max(self.lookahead, self.reach) if self.lookahead else 0

    def rows(self, budget: Budget) -> int:
        """Tokens whose keys or values are held at most, at a time."""
        if self.holds_all:
            return budget.most_visible
        return budget.rows_and_anchors if self.outside else budget.rows

    @property
    def holds_all(self) -> bool:
        """Whether what was kept of earlier blocks is looked at again."""
        return (self.outside and self.outside_kept) or self.visible


class DeviceAttention(Protocol):
    """Attention computed where the keys are, for `Candidates.attention`."""

    def __call__(
        self,
        queries: NDArray[np.float32],
        *,
        weights: NDArray[np.float32] | None = None,
        whole: bool = False,
        over: str = "sum",
    ) -> NDArray[np.float32]:
        """Scores (C,) of the candidates, as `kernels.attention_consensus`.

        Args:
            queries: the probe's, or the last of them.
            weights: (layers, C, kv_heads) float32, or None.
            whole: softmax over all that the probe sees, not over the candidates alone.
            over: "sum" or "max".
        """
        ...

    def collisions(
        self, queries: NDArray[np.float32], *, bits: int, tables: int, seed: int, rule: str
    ) -> NDArray[np.float32]:
        """As `Candidates.collisions`, of these queries."""
        ...


@dataclass(frozen=True)
class Held:
    """What the host holds of the cache: the candidates in the middle, and what stands around them.

    In a recursive or one-shot run, and where a policy needs `visible`, that is all of the sequence
    in the cache; in an accumulating one the window before the block, the block, and with it the
    new window.

    Attributes:
        tokens: (H,) int64, ascending: which tokens of the sequence these are.
        positions: (H,) int64: where each stands in the cache, which is what its RoPE says.
        first: number of the first candidate among them.
        keys, values: as of `Candidates`, of all H; None if not asked for.
    """

    tokens: NDArray[np.int64]
    positions: NDArray[np.int64]
    first: int = 0
    keys: NDArray[Any] | None = None
    values: NDArray[Any] | None = None


@dataclass(frozen=True)
class Candidates:
    """A read-only view of what can be kept: everything after RoPE.

    Attributes:
        tokens: (C,) int64, ascending: which tokens of the sequence the candidates are.
        block: (start, end) of the block that was just read, in the same numbers.
        index: number of the block, from 0.
        queries: (layers, probe tokens, heads, head_dim) float32, or None if not asked for.
        keys, values: (layers, C, kv_heads, head_dim) float16 or float32, or None.
        block_queries: (layers, end - start, heads, head_dim) float16 or float32, or None; of
            `Needs.recent_queries` the block's last tokens only.
        memory: a policy's own notes; empty at the start of a sequence, kept from block to block.
        scorer: attention of queries over the candidates' keys where these are (see
            `DeviceAttention`); None on the host.
        value_norms: (layers, C, kv_heads) float32, or None: ‖v‖ of every candidate; of "output" the
            root mean square over the kv head's query heads of ‖W_o v‖ (arXiv 2502.03805). Of
            "auto" None where the model's graph shows no values.
        repeated: (layers, C, kv_heads) float32, or None: the most attention that a token paid each
            candidate when the text was decoded again, over these tokens and over the heads that
            share its key. Every candidate has it of the part that repeats itself.
        outside: (layers, probe tokens, heads) float32, or None: log-sum-exp of q · k / √head_dim
            over all that the query sees and that is no candidate: anchors, what was kept (unless
            `Needs.outside_kept` says no), the window, what stands before the sequence, and of the
            question and drafts, or the tokens that ask in their place, those up to itself. None
            where a device computes attention.
        visible: (V,) int64 or None: which tokens `visible_keys` are, ascending; the candidates are
            among them as one run.
        visible_keys: (layers, V, kv_heads, head_dim) or None: keys of all that is in the cache of
            the sequence.
        held: see Held; None where nothing but the candidates is known.
        asked_at: (probe tokens,) int64, the positions of `queries`; None where there are none.
        rotation: of the model's RoPE; None if not asked for, or not known.
        scores: (tokens of the sequence,) float32: where `noted` writes; None where nobody reads it.
    """

    tokens: NDArray[np.int64]
    block: tuple[int, int]
    index: int = 0
    queries: NDArray[np.float32] | None = None
    keys: NDArray[Any] | None = None
    values: NDArray[Any] | None = None
    block_queries: NDArray[Any] | None = None
    memory: dict[str, Any] = field(default_factory=dict)
    scorer: DeviceAttention | None = None
    value_norms: NDArray[np.float32] | None = None
    repeated: NDArray[np.float32] | None = None
    outside: NDArray[np.float32] | None = None
    visible: NDArray[np.int64] | None = None
    visible_keys: NDArray[Any] | None = None
    held: Held | None = None
    asked_at: NDArray[np.int64] | None = None
    rotation: Rotation | None = None
    scores: NDArray[np.float32] | None = None

    def noted(self, scores: NDArray[Any]) -> NDArray[Any]:
        """Writes down what the candidates score, for reports of what was kept and why.

        A policy that does not call it is reported without scores. Nothing that is chosen depends
        on it.

        Args:
            scores: (C,), the higher the sooner kept.

        Returns:
            The same scores.
        """
        if self.scores is not None:
            self.scores[self.tokens] = scores
        return scores

    @property
    def around(self) -> Held:
        """What is held; where that is not known the candidates alone, never moved."""
        return self.held or Held(self.tokens, self.tokens, 0, self.keys, self.values)

    @property
    def positions(self) -> NDArray[np.int64]:
        """(C,) int64: where the candidates stand in the cache."""
        held = self.around
        return held.positions[held.first : held.first + self.count]

    def turned(self, vectors: NDArray[Any], by: NDArray[np.int64] | int) -> NDArray[np.float32]:
        """A float32 copy of queries or keys, as if they stood so many positions further on.

        Minus their positions gives them before RoPE. Without `rotation` nothing is turned.

        Args:
            vectors: (…, heads, head_dim) float16 or float32.
            by: positions, of a shape that broadcasts to all but the last axis.
        """
        copied: NDArray[np.float32] = np.array(vectors, np.float32)
        if self.rotation is not None:
            self.rotation.turn(copied, by)
        return copied

    @property
    def count(self) -> int:
        """Number of candidates, C."""
        return len(self.tokens)

    def attention(
        self,
        last: int | None = None,
        *,
        values: bool = False,
        softmax: str = "candidates",
        over: str = "sum",
    ) -> NDArray[np.float32]:
        """Attention the probe pays each candidate: (C,), as `kernels.attention_consensus`.

        Args:
            last: of only so many last tokens of the probe.
            values: multiply each weight by the candidate's `value_norms` (`Needs.value_norms`).
            softmax: over the "candidates" alone, or over "all" that `outside` counts as well
                (`Needs.outside`).
            over: the "sum" over the probe's tokens, or the largest of their scores, "max".
        """
        assert self.queries is not None
        asking = slice(None) if last is None else slice(-last, None)
        queries = self.queries[:, asking]
        weights = self.value_norms if values else None
        assert not values or weights is not None, "a policy that weighs values needs value_norms"
        if self.scorer is not None:
            return self.scorer(queries, weights=weights, whole=softmax == "all", over=over)
        from laserkv_gguf import kernels

        assert self.keys is not None
        outside = None
        if softmax == "all":
            assert self.outside is not None, "a softmax over all needs outside"
            outside = self.outside[:, asking]
        return kernels.attention_consensus(
            queries, self.keys, weights=weights, outside=outside, over=over
        )

    def collisions(self, *, bits: int, tables: int, seed: int, rule: str) -> NDArray[np.float32]:
        """How often the candidates' keys share the probe's signatures: (C,) float32 in 0 … 1.

        Args:
            bits, tables, seed: as of `kernels.collision_scores`.
            rule: "fraction" or "magicpig", as there; "analytic" for `kernels.analytic_collisions`.
        """
        assert self.queries is not None
        if self.scorer is not None:
            return self.scorer.collisions(
                self.queries, bits=bits, tables=tables, seed=seed, rule=rule
            )
        from laserkv_gguf import kernels

        assert self.keys is not None
        if rule == "analytic":
            return kernels.analytic_collisions(self.queries, self.keys, bits=bits)
        return kernels.collision_scores(
            self.queries,
            self.keys,
            bits=bits,
            tables=tables,
            seed=seed,
            rule="magicpig" if rule == "magicpig" else "fraction",
        )


@dataclass(frozen=True)
class Policy(ABC):
    """Base of all policies. Subclass it as a frozen dataclass and set `name` and `needs`."""

    name: ClassVar[str] = ""
    needs: ClassVar[Needs] = Needs()
    flexible: ClassVar[bool] = False
    """Whether `select` may keep fewer than its budget."""
    positions: ClassVar[str] = "original"
    """Where kept tokens stand as the method was published: what `--positions auto` means."""

    def observe(self, block: Candidates) -> None:
        """Looks at a block after which nothing is evicted, in the order of the blocks.

        Called if `needs.every_block`; what is to be remembered goes into `block.memory`, as new
        objects: a one-shot choice may be made again from what was there before it.

        Args:
            block: its candidates are the block's tokens, with what the policy needs of them;
                there are no queries of a probe.
        """
        raise NotImplementedError

    @abstractmethod
    def select(self, candidates: Candidates, budget: int) -> NDArray[np.int64]:
        """Which candidates to keep.

        Args:
            candidates: what was captured.
            budget: how many to keep; at least 1 and less than `candidates.count`.

        Returns:
            `budget` distinct numbers in 0 … count - 1, in any order; fewer if `flexible`.
        """

    # A policy that knows whole documents by units of neighbouring tokens, so that no key need be
    # looked at again when a question comes, says so here; the others score tokens by their keys.

    @property
    def unit(self) -> int:
        """Tokens of a unit; 0 for a policy that keeps no index."""
        return 0

    def index(self, block: Candidates) -> dict[str, NDArray[Any]]:
        """What to remember of a block when its tokens are parked.

        Args:
            block: all of the block's tokens with their keys, and block queries if the policy needs
                them and the block was read with them.

        Returns:
            Arrays whose second axis is the block's units: every `unit` tokens from its first one.
        """
        raise NotImplementedError

    def look_up(
        self, queries: NDArray[np.float32], index: Mapping[str, NDArray[Any]]
    ) -> NDArray[Any]:
        """Scores (units,) for a question's queries (layers, tokens, heads, head_dim).

        Args:
            queries: before RoPE if `needs.unrotated`.
            index: what `index` returned for the blocks, one after the other along the second axis.
        """
        raise NotImplementedError

    def warm_up(self) -> None:
        """Chooses once among next to nothing, so that what Numba must compile is compiled.

        The first use after an installation takes seconds; they pass while a block is decoded.
        """
        needs, count = self.needs, 16  # enough for every part of a budget to get some
        asked = np.ones((1, count, 1, 8), np.float32)
        seen = asked if needs.precise else asked.astype(np.float16)
        if needs.outside:
            from laserkv_gguf import kernels

            kernels.log_sums(asked, seen)
        if needs.repeat:
            from laserkv_gguf import kernels

            beside = kernels.log_sums(asked, seen, visible=np.arange(1, count + 1))
            kernels.attention_peaks(
                asked, seen, np.zeros((1, 1, count), np.float32), outside=beside
            )
        self.select(
            Candidates(
                np.arange(count),
                (0, count),
                queries=asked if needs.queries else None,
                keys=seen if needs.host_keys else None,
                values=seen if needs.values else None,
                block_queries=seen if needs.block_queries else None,
                value_norms=None if needs.value_norms == "none" else asked[..., 0],
                repeated=asked[..., 0] if needs.repeat else None,
                outside=asked[..., 0] if needs.outside else None,
                visible=np.arange(count) if needs.visible else None,
                visible_keys=seen if needs.visible else None,
            ),
            count // 2,
        )

    def budget(self, tokens: int, block_size: int, ratio: float, divisor: int) -> Budget:
        """The partition for a sequence of `tokens`; equation (1) unless a method has its own."""
        return Budget(tokens, block_size, ratio, divisor)


def checked(
    policy: Policy, chosen: NDArray[Any], candidates: Candidates, budget: int
) -> NDArray[np.int64]:
    """The choice in ascending order, or an error that names the policy.

    Raises:
        PolicyError: too many or too few, repeated or foreign candidates.
    """
    kept = np.unique(np.asarray(chosen, np.int64))
    if len(kept) != np.size(chosen):
        raise PolicyError(f"policy {policy.name!r} chose candidates more than once")
    if len(kept) > budget or (len(kept) < budget and not policy.flexible):
        raise PolicyError(f"policy {policy.name!r} chose {len(kept)} candidates, not {budget}")
    if len(kept) and (kept[0] < 0 or kept[-1] >= candidates.count):
        raise PolicyError(f"policy {policy.name!r} chose a token that is no candidate")
    return kept


SHARES = ("one", "equal", "whole")


def shared_budget(budget: Budget, shares: str, sinks: int, recent: int) -> Budget:
    """The budget of a method that scores tokens one by one and may share what is kept in any way.

    Args:
        budget: of equation (1).
        shares: "equal" for that; "one" for one pool, chosen anew with every block; "whole" for one
            choice after everything was read.
        sinks, recent: first and last tokens that always stay where shares are not equal, no more
            of each than 1/n of what is kept.
    """
    if shares == "equal":
        return budget
    whole = replace(budget, shape="recursive" if shares == "one" else "one-shot")
    most = max(whole.total // budget.divisor, 1)
    return replace(whole, sinks=min(sinks, most), recent=min(recent, most))


def check_pool(pool: int) -> None:
    """Refuses a number of neighbours that has no middle.

    Raises:
        UserError: with the remedy in one line.
    """
    if pool < 1 or pool % 2 == 0:
        raise UserError(f"pool is {pool}; give an odd number of neighbours, 1 for none")


class PolicyError(LaserKVError):
    """A policy broke its contract; nothing was evicted."""
