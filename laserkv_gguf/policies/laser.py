"""`laser`: exact attention and LSH, accumulating; `exact` and `magicpig` are its two ends."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from laserkv_gguf.budget import Budget
from laserkv_gguf.errors import UserError
from laserkv_gguf.policies.base import Candidates, Needs, Policy, check_pool

# LASER-KV as it was published, in the terms of `settings.Settings`
PAPER = {"alpha": 0.75, "lookahead": 0, "probe_tokens": 0}
# and in those of the policy alone; it ranks by the theoretical probability of a collision
PAPER_OPTIONS: dict[str, Any] = {
    "pool": 1,
    "rule": "analytic",
    "values": "none",
    "softmax": "candidates",
    "over": "sum",
    "shares": "equal",
}
VALUES = ("auto", "none", "norm", "output")
SOFTMAX = ("candidates", "ends", "all")
OVER = ("sum", "max")
SHARES = ("equal", "one", "best")
SINKS, RECENT = 4, 32  # of one pool: always kept
RULES = ("fraction", "magicpig", "analytic")
RESIDUALS = ("lsh", "keydiff", "leverage")


@dataclass(frozen=True)
class Laser(Policy):
    """Exact attention fills α of the pool, hash collisions the rest (arXiv 2602.02199).

    A token is kept for all layers and heads or for none, so scores are summed over them: steps 4
    (softmax over the candidates, summed) and 5 (SimHash collisions with keys centred on the
    candidates' mean, as in MagicPIG, arXiv 2410.16179) of the block loop.

    The defaults are what found most in our own tables (docs/selection.md): all by attention, of
    which every probability counts times the length of the value, and one pool that remembers. The
    paper's own are `--preset paper`.

    Attributes:
        alpha: share of the pool chosen by exact attention; the paper's is 0.75.
        pool: scores are averaged over this many neighbours, so that phrases stay whole (SnapKV,
            arXiv 2404.14469); 1 for none, as in the LASER paper.
        hash_bits: bits of a signature (b); a token collides when all of a table's bits agree.
        hash_tables: signatures a key has (R).
        rule: what collisions are worth. "fraction": the share of the tables that collide;
            "magicpig": 1 from two tables on, else 0 (arXiv 2410.16179); "analytic": the fraction's
            expected value, (1 - θ/π)^b with θ the angle of query and centred key, without a hash:
            what the LASER paper ranks by.
        values: what an attention weight counts. "norm": times ‖v‖, the length of the token's value
            in its layer and kv head; "output": times what the value adds to the stream, ‖W_o v‖
            (CriticalKV, arXiv 2502.03805); "none": itself, as in the LASER paper; "auto": as
            "norm", or itself where the model's graph shows no values.
        softmax: over the "candidates" alone, as in the LASER paper; "ends": over anchors, window
            and the question's own tokens as well; "all": over all that the question sees, what was
            kept of earlier blocks among it, whose keys are held on the host for that (of their
            number, as many bytes as in a cache of float16 keys; none with `--scoring device`).
        over: the "sum" over the probe's tokens, as in the LASER paper, or the largest of their
            scores, "max" (KVzip, arXiv 2505.23416).
        shares: "equal": every block keeps its own pool, as in the LASER paper; "one": one pool of
            all that is kept, chosen anew from itself and every block (FINCH, arXiv 2408.00167),
            beside the first 4 and the last 32 tokens; `--protection-divisor` bounds these; "best":
            the same, and a token stands there with the best score that any block's question gave
            it, so that an answer which was found once is not lost to what is read after it; a part
            of the pool is for every block read so far in equal parts.
        even: that part of a pool with "best"; the rest is for the best of all blocks.
        residual: what fills the (1 - α) part. "lsh": collisions, by `rule`; "keydiff": keys least
            like the others (arXiv 2504.15364); "leverage": keys that lie apart (2507.08143).
        seed: of the hash planes, and of leverage's sketch.
    """

    name: ClassVar[str] = "laser"
    needs: ClassVar[Needs] = Needs(
        queries=True,
        attention=True,
        collisions=True,
        value_norms="auto",
        outside=True,
        probe_tokens=8,
        lookahead=16,
        reach=96,
    )  # of both parts; an instance needs what its own parts do

    alpha: float = 1.0
    pool: int = 15
    hash_bits: int = 8
    hash_tables: int = 32
    rule: str = "fraction"
    residual: str = "lsh"
    seed: int = 0
    values: str = "auto"
    softmax: str = "all"
    over: str = "max"
    shares: str = "best"
    even: float = 0.75

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise UserError(f"--alpha is {self.alpha:g}; give a fraction from 0 to 1, such as 0.75")
        check_pool(self.pool)
        if not 0 <= self.even <= 1:
            raise UserError(f"even is {self.even:g}; give a fraction from 0 to 1, such as 0.75")
        for name, known in (
            ("values", VALUES),
            ("softmax", SOFTMAX),
            ("over", OVER),
            ("shares", SHARES),
        ):
            if getattr(self, name) not in known:
                raise UserError(f"{name} is {getattr(self, name)!r}; give {', '.join(known)}")
        needs = replace(
            self.needs,
            attention=self.alpha > 0,
            collisions=self.alpha < 1 and self.residual == "lsh",
            keys=self.alpha < 1 and self.residual != "lsh",  # else, on a device, none leaves it
            value_norms=self.values if self.alpha > 0 else "none",
            outside=self.softmax != "candidates" and self.alpha > 0,
            outside_kept=self.softmax != "ends",
        )
        object.__setattr__(self, "needs", needs)
        if not 1 <= self.hash_bits <= 16:
            raise UserError(f"hash_bits is {self.hash_bits}; give 1 to 16 bits a table")
        if self.hash_tables < 1:
            raise UserError(f"hash_tables is {self.hash_tables}; give at least 1 table")
        if self.rule not in RULES:
            raise UserError(f"rule is {self.rule!r}; give {', '.join(RULES)}")
        if self.residual not in RESIDUALS:
            raise UserError(f"residual is {self.residual!r}; give {', '.join(RESIDUALS)}")

    def budget(self, tokens: int, block_size: int, ratio: float, divisor: int) -> Budget:
        if self.shares == "equal":
            return super().budget(tokens, block_size, ratio, divisor)
        whole = Budget(tokens, block_size, ratio, divisor, shape="recursive")
        most = max(whole.total // divisor, 1)
        return replace(whole, sinks=min(SINKS, most), recent=min(RECENT, most))

    def select(self, candidates: Candidates, budget: int) -> NDArray[np.int64]:
        exact = math.floor(self.alpha * budget + 0.5)
        kept = np.zeros(candidates.count, bool)
        if exact:
            scores = self._attention(candidates)
            if self.shares == "best":
                kept[_of_every_block(scores, candidates, int(self.even * exact))] = True
            _add_best(kept, candidates.noted(scores), exact)
        if exact < budget:
            scores = self._pooled(self._residual(candidates), candidates)
            _add_best(kept, scores if exact else candidates.noted(scores), budget)
        return np.flatnonzero(kept)

    def _attention(self, candidates: Candidates) -> NDArray[np.float32]:
        """Step 4's scores; of a pool that remembers, the best that the tokens ever had."""
        shown = candidates.value_norms is not None
        scores = candidates.attention(
            values=shown if self.values == "auto" else self.values != "none",
            softmax="candidates" if self.softmax == "candidates" else "all",
            over=self.over,
        )
        scores = self._pooled(scores, candidates)
        return _best(scores, candidates) if self.shares == "best" else scores

    def _pooled(self, scores: NDArray[Any], candidates: Candidates) -> NDArray[np.float32]:
        from laserkv_gguf import kernels

        return kernels.pool(scores, self.pool, candidates.tokens)

    def _residual(self, candidates: Candidates) -> NDArray[Any]:
        """Step 5's scores, or what stands in for them."""
        if self.residual == "lsh":
            return candidates.collisions(
                bits=self.hash_bits, tables=self.hash_tables, seed=self.seed, rule=self.rule
            )
        from laserkv_gguf.kernels import geometry

        assert candidates.keys is not None
        if self.residual == "keydiff":
            return geometry.keydiff_scores(candidates.keys)
        return geometry.leverage_scores(candidates.keys, seed=self.seed)


def _best(scores: NDArray[np.float32], candidates: Candidates) -> NDArray[np.float32]:
    """The scores, or better ones that earlier blocks' questions gave the same tokens."""
    tokens, memory = candidates.tokens, candidates.memory
    if "laser" in memory:
        before, known = memory["laser"]
        at = np.minimum(np.searchsorted(before, tokens), len(before) - 1)
        again = before[at] == tokens
        scores = np.where(again, np.fmax(scores, known[at]), scores)
    memory["laser"] = tokens.copy(), scores
    return scores


def _of_every_block(
    scores: NDArray[np.float32], candidates: Candidates, count: int
) -> NDArray[np.int64]:
    """The best candidates of every block read so far, of each as many, `count` at most."""
    from laserkv_gguf import kernels

    starts = (*candidates.memory.get("laser blocks", ()), candidates.block[0])
    candidates.memory["laser blocks"] = starts
    parts = np.split(scores, np.searchsorted(candidates.tokens, starts[1:]))
    sizes = np.cumsum([0, *map(len, parts)])
    best = [kernels.top_k(part, count // len(parts)) for part in parts]
    return np.concatenate([first + part for first, part in zip(sizes, best, strict=False)])


def _add_best(kept: NDArray[np.bool_], scores: NDArray[np.float32], count: int) -> None:
    """Keeps the best of what is not kept yet, until so many are."""
    from laserkv_gguf import kernels

    rest = np.flatnonzero(~kept)
    kept[rest[kernels.top_k(scores[rest], count - len(kept) + len(rest))]] = True


@dataclass(frozen=True)
class Exact(Laser):
    """`laser` with α = 1: attention consensus alone (arXiv 2602.02199, table 1)."""

    name: ClassVar[str] = "exact"

    alpha: float = field(default=1.0, init=False)


@dataclass(frozen=True)
class MagicPig(Laser):
    """`laser` with α = 0: hash collisions alone (arXiv 2602.02199, table 1; 2410.16179)."""

    name: ClassVar[str] = "magicpig"

    alpha: float = field(default=0.0, init=False)
    shares: str = "equal"
