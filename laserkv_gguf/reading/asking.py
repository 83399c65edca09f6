"""The question asks a block: its queries, and those of the answer's drafts after it.

The paper probes a block with the question (arXiv 2602.02199, section 3). Beyond it: the first
tokens of the answer are drafted while the block is whole, so that they ask along (lookahead).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from laserkv_gguf.llama.chat import Prompt
from laserkv_gguf.llama.context import Context
from laserkv_gguf.llama.model import Tokens
from laserkv_gguf.llama.sequence import Sequence, scratch_of
from laserkv_gguf.policies import Needs
from laserkv_gguf.timings import step

# Drafts are copied where so many in a row stand in the text, so many times at most.
COPIED, REPEATED = 4, 3


@dataclass(frozen=True)
class ProbeSettings:
    """How a block is asked what the question needs of it; None for what the policy says.

    Attributes:
        tokens: of the question's own text, the last so many join the probe, and with them what the
            template puts after it; 0 for everything after the document.
        lookahead: tokens drafted after the question while the block is whole; they join too.
        observation: where no question is known, the block's own last tokens ask instead
            (SnapKV, arXiv 2404.14469).
        reach: most drafts while the answer is being copied out of the text: those go on, or a key
            of many digits would be kept as far as `lookahead` only. None for the policy's own, or
            for `lookahead` where that is given.
        rounds: most batches that the question and drafts of one block are decoded in, once a block
            before has drafts: what of those is not checked by then asks as it is. What is being
            copied is always checked.
    """

    tokens: int | None = None
    lookahead: int | None = None
    observation: int | None = None
    reach: int | None = None
    rounds: int = 3

    def completed(self, needs: Needs) -> tuple[int, int, int]:
        """(tokens, lookahead, observation), with the policy's own where none are given."""
        return (
            needs.probe_tokens if self.tokens is None else self.tokens,
            needs.lookahead if self.lookahead is None else self.lookahead,
            needs.observation if self.observation is None else self.observation,
        )

    def most_drafts(self, needs: Needs) -> int:
        """Most tokens drafted after the question: what there must be cells for."""
        most = needs.most_drafts(self.lookahead)
        return max(most, self.reach or 0) if most else 0


@dataclass(frozen=True)
class Asked:
    """What looks at the candidates: the question's end and the drafts, or tokens in their place.

    Attributes:
        queries: (layers, probe tokens, heads, head_dim) float32.
        own: (layers, probe tokens, heads) float32: log-sum-exp over the keys of the question and
            the drafts themselves, each up to the token that asks; None where no policy wants it,
            or where tokens of the block ask.
        at: (probe tokens,) int64, their positions.
    """

    queries: NDArray[np.float32]
    own: NDArray[np.float32] | None = None
    at: NDArray[np.int64] | None = None

    def with_more(self, keys: Iterable[NDArray[Any]]) -> NDArray[np.float32] | None:
        """`own` joined by other keys that all of these tokens see; None where there are none."""
        from laserkv_gguf import kernels

        sums = self.own
        for part in keys:
            seen = kernels.log_sums(self.queries, part)
            with np.errstate(invalid="ignore"):  # keys of a file may be no numbers
                sums = seen if sums is None else np.logaddexp(sums, seen)
        return sums


@dataclass
class Drafts:
    """What the model drafted when it was last asked, and how far that is worth guessing again.

    Attributes:
        tokens: the drafts.
        trust: the most that are guessed at a time.
        seen: tokens that an answer may copy from: those that the question sees.
    """

    tokens: list[int] = field(default_factory=list)
    trust: int = sys.maxsize
    seen: Tokens = field(default_factory=lambda: np.empty(0, np.int32))

    def following(self, drafts: list[int]) -> list[int]:
        """What may come next: what followed the last of these drafts before, or in the text."""
        if not drafts:
            return self.tokens[: self.trust]
        before = np.array(self.tokens, np.int32)
        for text, width in ((before, 2), (self.seen, 3), (self.seen, 2), (before, 1)):
            found = _after(text, drafts[-width:]) if len(drafts) >= width else -1
            if found >= 0:
                return [int(token) for token in text[found : found + self.trust]]
        return []

    def copied(self, drafts: list[int]) -> list[int] | None:
        """What comes next in the text, where these drafts are being copied out of it; else None.

        The last few stand there as they are; but a text that says the same over and over (noise, a
        table's heads) is not an answer.
        """
        if len(drafts) < COPIED:
            return None
        found = _all_after(self.seen, drafts[-COPIED:])
        if not 0 < len(found) <= REPEATED:
            return None
        start = int(found[-1])
        return [int(token) for token in self.seen[start : start + self.trust]]


def _after(text: Tokens, words: list[int]) -> int:
    """Where the text goes on after the last time that these tokens stand in it; -1 if nowhere."""
    ends = _all_after(text, words)
    return int(ends[-1]) if len(ends) else -1


def _all_after(text: Tokens, words: list[int]) -> NDArray[np.int64]:
    """Where the text goes on after all the times that these tokens stand in it, ascending."""
    ends = np.arange(len(words), len(text))
    for back, token in enumerate(reversed(words), 1):
        ends = ends[text[ends - back] == token]
    return ends


# arrays that have the shape of others
_LIKE = {"block_queries": "queries", "own_keys": "keys", "repeated": "value_norms"}


class Arrays:
    """Arrays that captured tensors are copied to; each is made once and grows only when it must.

    Args:
        context: whose shapes they have.
        precise: float32 throughout; else what is not asked with is float16.
    """

    def __init__(self, context: Context, *, precise: bool) -> None:
        self.context, self.precise = context, precise
        self.held: dict[str, NDArray[Any]] = {}

    def of(self, kind: str, tokens: int) -> NDArray[Any]:
        """A view of `tokens` rows of an array: (layers, tokens, heads or kv_heads, head_dim)."""
        array = self.held.get(kind)
        if array is None or array.shape[1] < tokens:
            precise = kind in ("queries", "own_keys") or self.precise
            array = self.held[kind] = self.context.probe.new(
                _LIKE.get(kind, kind),
                tokens,
                np.float32 if precise else np.float16,
            )
        return array[:, :tokens]


class Asker:
    """Asks questions of what a sequence holds, in a scratch sequence that shares its cells.

    Args:
        context: that holds it.
        sequence: what is asked.
        needs: the policy's.
        settings: see ProbeSettings.

    Attributes:
        asking, lookahead, observation: `ProbeSettings` with the policy's own where none were given.
        reach, rounds: likewise.
        scratch: the sequence that questions are decoded in.
    """

    def __init__(
        self, context: Context, sequence: Sequence, needs: Needs, settings: ProbeSettings
    ) -> None:
        self.context, self.main = context, sequence
        self.scratch = Sequence(context, scratch_of(sequence.number))
        self.asking, self.lookahead, self.observation = settings.completed(needs)
        self.reach, self.rounds = settings.most_drafts(needs), settings.rounds
        self._outside = needs.outside
        self._arrays = Arrays(context, precise=True)

    def ask(
        self,
        question: Prompt,
        position: int,
        drafts: Drafts | None = None,
        *,
        lookahead: int | None = None,
        shared: bool = False,
        room: int | None = None,
    ) -> Asked:
        """Queries of the question's end and of drafts after it, asked at a position.

        In the scratch sequence, which is dropped whatever happens.

        Args:
            position: right after the last token that is seen.
            drafts: of the time the same was asked before, replaced by this time's.
            lookahead: tokens drafted; None for as many as the settings say, and 0 for none,
                which is when nothing is copied either.
            shared: the scratch sequence has what the question is to see; else it sees all.
            room: free cells; where they are few, what is copied ends earlier. None for enough.
        """
        lookahead = self.lookahead if lookahead is None else lookahead
        asking, wanted = len(question), self.asking
        if question.asking is not None:
            wanted = question.asking
        if wanted:
            asking = min(wanted + question.ending, asking)
        reach = self.reach if room is None else min(self.reach, room - len(question))
        most = max(lookahead, reach) if lookahead else 0
        queries, keys = self._arrays.of("queries", asking + most), None
        if self._outside:
            keys = self._arrays.of("own_keys", len(question) + most)
        if not shared:
            self.main.share_with(self.scratch)
        try:
            drafted = self._draft(
                question, position, asking, lookahead, queries, keys, drafts or Drafts()
            )
        finally:
            self.scratch.remove()
        found = np.ascontiguousarray(queries[:, : asking + drafted])
        at = position + len(question) - asking + np.arange(asking + drafted)
        if keys is None:
            return Asked(found, at=at)
        from laserkv_gguf import kernels

        seen = len(question) - asking + 1 + np.arange(asking + drafted)
        with kernels.threads(self.context.threads):
            own = kernels.log_sums(found, keys[:, : len(question) + drafted], visible=seen)
        return Asked(found, own, at)

    def _draft(
        self,
        question: Prompt,
        start: int,
        asking: int,
        lookahead: int,
        queries: NDArray[np.float32],
        keys: NDArray[np.float32] | None,
        before: Drafts,
    ) -> int:
        """Decodes the question, then greedy drafts until the answer ends; returns their number.

        What was drafted a block ago is decoded along as a guess, for most blocks change little
        about the answer: the tokens that the model would draft again stay, and cost one batch
        instead of one decode each. The last of `rounds` batches takes the rest of them unchecked:
        where an answer can be worded in many ways, drafting it anew for every block would cost
        more than all else and find nothing more. An answer that is being copied out of the text has
        one wording: what follows there is the guess, and drafting goes on as long as it is right.
        """
        context, most = self.context, int(queries.shape[1]) - asking
        drafts: list[int] = []
        fed, first = question.tokens.tolist(), len(question) - asking
        rounds = self.rounds if before.tokens else lookahead + 1
        while True:
            rounds -= 1
            copied = before.copied(drafts) if most > lookahead else None
            limit = lookahead if copied is None else most
            left = min(max(limit - len(drafts), 0), context.options.outputs - 1)
            checks = rounds > 0 or copied is not None
            if copied is not None:
                guess = copied
            else:
                guess = before.following(drafts) if checks else before.tokens[len(drafts) :]
            guess = guess[:left]
            row = asking + len(drafts) - 1 if drafts else 0
            rows = queries[:, row : row + len(fed) - first + len(guess)]
            position = start + (len(question) + len(drafts) - 1 if drafts else 0)
            outputs = len(guess) + 1 if left and checks else 0
            own = None
            if keys is not None:
                own = (keys[:, position - start : position - start + len(fed) + len(guess)], 0)
            armed = context.probe.armed(queries=(rows, first), keys=own)
            with step("lookahead" if drafts else "probe"), armed:
                tokens = np.array([*fed, *guess], np.int32)
                context.decode(tokens, position, self.scratch.number, outputs=outputs)
            agreed = 0
            for index in range(outputs):
                token = int(context.logits(index - outputs).argmax())
                if context.model.ends_generation(token):
                    left = 0
                    break
                if index == len(guess) or token != guess[index]:
                    break
                drafts.append(token)
                agreed += 1
            if not checks:
                drafts += guess
                left = 0
            elif guess:
                before.trust = 2 + 2 * agreed
            if left and len(drafts) >= lookahead:  # what comes next may be copied all the same
                goes_on = len(drafts) < most and before.copied([*drafts, token]) is not None
                left = left if goes_on else 0
            if not left:
                before.tokens = drafts
                return len(drafts)
            if agreed < len(guess):
                self.scratch.remove(position + len(fed) + agreed, -1)
            drafts.append(token)
            fed, first = [token], 0
