"""How a conversation makes room for its next turn.

`Compressing` lets turns age. Before a turn that would not fit, the newest question is decoded after
everything that was said, in a scratch sequence that shares the cells (step 2 of the block loop),
and drafts its answer. The policy then chooses among the turns that age now and what is kept of
those before them (steps 3 to 5), by the queries of that probe and the keys as they stand in the
cache, and the rest is evicted (step 6). Nothing is decoded twice but the question, so no pause is
longer than a block's prefill. `space` says how much of what may stay.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from laserkv_gguf import policies
from laserkv_gguf.conversation.cells import Cells
from laserkv_gguf.conversation.documents import Documents
from laserkv_gguf.conversation.ledger import TURN, Ledger
from laserkv_gguf.conversation.space import Space, Thinning
from laserkv_gguf.engine.engine import Engine
from laserkv_gguf.errors import UserError
from laserkv_gguf.llama import output, rows
from laserkv_gguf.llama.chat import Prompt
from laserkv_gguf.llama.sequence import runs
from laserkv_gguf.policies import Candidates, Policy, checked
from laserkv_gguf.policies.laser import Laser
from laserkv_gguf.reading.asking import Asked, Asker

ATTENTION = 0.25  # share of what is kept of turns that the newest question's attention chooses
LONG_QUESTION = 128  # tokens; the next question is taken to be like this one, but not longer


class Growing(Protocol):
    """A conversation, as ageing sees it."""

    engine: Engine
    sources: Documents
    pending: list[int]
    thinnings: int
    max_tokens: int

    @property
    def ledger(self) -> Ledger: ...

    @property
    def cells(self) -> Cells: ...

    @property
    def drafts(self) -> int: ...

    @property
    def trained(self) -> int: ...

    @property
    def capacity(self) -> int: ...

    @property
    def space(self) -> Space: ...

    def turns_from(self, start: int) -> Space: ...

    def share_room(self, space: Space) -> Thinning | None: ...

    def shrink_parked(self) -> None: ...

    def move_down(self, room: int, *, always: bool = False) -> None: ...


class Ageing(Protocol):
    """How room is made; `endless`: whether turns may go on past the cells."""

    @property
    def endless(self) -> bool: ...

    def make_room(self, conversation: Growing, asked: Prompt) -> None:
        """Frees cells until a question and its answer fit.

        Args:
            asked: the question with the template around it, not decoded yet.

        Raises:
            UserError: they never would.
        """


@dataclass(frozen=True)
class Refusing:
    """Makes no room: a conversation ends when the cells are full."""

    endless: bool = False

    def make_room(self, conversation: Growing, asked: Prompt) -> None:
        pass


@dataclass(frozen=True)
class Compressing:
    """Turns age, the oldest first; of aged ones the policy keeps what matters.

    Parked documents yield cells only for as long as a question needs them; documents without parked
    rows are thinned like turns, for good, where not even a short turn would fit beside them.
    """

    endless: bool = True

    def make_room(self, conversation: Growing, asked: Prompt) -> None:
        """See `Ageing`.

        Raises:
            UserError: the question never fits, or the policy keeps everything.
        """
        prompt, drafts = len(conversation.pending) + len(asked), conversation.drafts
        ahead = min(prompt, LONG_QUESTION) + drafts
        space = replace(conversation.space, prompt=prompt, ahead=ahead)
        self._compress(conversation, conversation.share_room(space), asked, 0)
        trained, start = conversation.trained, conversation.sources.first_movable
        if conversation.sources.parked and trained:
            left = trained - start
            if left < prompt + drafts + 2:
                raise UserError(
                    f"a question of {prompt} tokens does not fit after the documents, which take "
                    f"{start} of the {trained} positions this model was trained for; "
                    "shorten it, or /drop the last document"
                )
            space = replace(
                conversation.turns_from(start), capacity=left, prompt=prompt + drafts, ahead=ahead
            )
            self._compress(conversation, space.thinning(), asked, start)
        conversation.move_down(prompt + conversation.max_tokens)

    def _compress(
        self, conversation: Growing, thinning: Thinning | None, asked: Prompt, start: int
    ) -> None:
        """Thins what stands from a position on."""
        if thinning is None:
            return
        policy, ledger = self._policy(conversation), conversation.ledger
        turns = ledger.numbers(TURN)
        whole = [n for n in turns if not ledger.segments[n].aged]
        aged = [n for n in turns if n not in whole[thinning.turns :]]
        choices = [(aged, thinning.keep)]
        if thinning.documents is not None:
            documents = conversation.sources
            recalled = sum(recaller.limit for recaller in documents.recallers)
            choices.append((documents.unparked(ledger), max(thinning.documents - recalled, 0)))
            conversation.shrink_parked()
        seen = None
        if policy.needs.queries:
            numbers = [n for some, _ in choices for n in some]
            seen = self._ask(conversation, policy, asked, numbers, start)
            policy = policy if seen is not None else policies.make("keydiff")
        thin(conversation, policy, choices, seen, start)
        conversation.thinnings += 1
        for number in aged:
            ledger.segments[number].aged = True

    def _ask(
        self,
        conversation: Growing,
        policy: Policy,
        asked: Prompt,
        numbers: list[int],
        start: int,
    ) -> Asked | None:
        """The question and its drafts; None where it has no room to be asked.

        Where an answer has just filled the cache, room is made first, by the keys alone.
        """
        cells = conversation.cells
        settings = conversation.engine.probe_settings
        asker = Asker(cells.context, cells.main, policy.needs, settings)
        prompt = np.concatenate((conversation.pending, asked.tokens)).astype(np.int32)
        wanted = len(prompt) + asker.lookahead
        free(conversation, wanted - self._left(conversation, start), numbers, start)
        asker.reach = min(asker.reach, self._left(conversation, start) - len(prompt))
        asker.lookahead = min(asker.lookahead, self._left(conversation, start) - len(prompt))
        if asker.lookahead < 0:
            return None
        conversation.move_down(len(prompt) + max(asker.lookahead, asker.reach))
        found = asker.ask(Prompt(prompt, asked.ending), cells.position)
        cells.settled = True
        return found

    @staticmethod
    def _left(conversation: Growing, start: int) -> int:
        """Cells that are left; from a position on, positions too."""
        left = conversation.capacity - conversation.cells.used
        if not start:
            return left
        behind = int((conversation.ledger.position >= start).sum())
        return min(left, conversation.trained - start - behind)

    @staticmethod
    def _policy(conversation: Growing) -> Policy:
        """The run's own policy, or `laser` where that must see a block while it is decoded.

        What the newest question does not attend to may be what a later one asks for: most of
        `laser`'s pool goes to keys least like the others here, instead of to what attracts this
        question.

        Raises:
            UserError: the run keeps everything.
        """
        engine = conversation.engine
        policy = engine.policy
        if policy.budget(2, 1, 0.5, 4).keeps_all:
            raise UserError(
                f"the conversation has filled the context of {conversation.cells.limit} cells, and "
                f"--policy {engine.settings.policy} keeps everything; use /reset, a larger "
                "--ctx-size, or --policy laser"
            )
        if policy.needs.block_queries or policy.needs.repeat:
            policy = replace(engine.settings, policy="laser").make_policy(engine.seed)
        if not isinstance(policy, Laser) or policy.name != "laser":
            return policy
        alpha = engine.settings.alpha
        return replace(policy, alpha=ATTENTION if alpha is None else alpha, residual="keydiff")


def free(conversation: Growing, count: int, numbers: list[int], start: int = 0) -> None:
    """Frees so many rows of some segments without a question: the keys most like the others."""
    ledger = conversation.ledger
    rows = int((ledger.of(numbers) & (ledger.position >= start)).sum())
    if count > 0 and rows:
        choices = [(numbers, max(rows - count, 0))]
        thin(conversation, policies.make("keydiff"), choices, None, start)


def thin(
    conversation: Growing,
    policy: Policy,
    choices: list[tuple[list[int], int]],
    asked: Asked | None,
    start: int = 0,
) -> None:
    """Evicts what the policy does not choose.

    Args:
        choices: segments, and how many of their rows may stay together.
        asked: what looks at them, for a policy that wants that.
        start: only rows from this position on count, and go.
    """
    ledger = conversation.ledger
    stays = np.ones(len(ledger), bool)
    for numbers, keep in choices:
        among = np.flatnonzero(ledger.of(numbers) & (ledger.position >= start))
        # a batch must start right after the last token of the sequence, which stays
        if len(among) and among[-1] == len(ledger) - 1:
            among, keep = among[:-1], keep - 1
        if keep < len(among):
            stays[among] = False
            stays[_chosen(conversation, policy, among, max(keep, 0), asked)] = True
    if not stays.all():
        conversation.cells.evict(stays)


def _chosen(
    conversation: Growing,
    policy: Policy,
    among: NDArray[np.int64],
    keep: int,
    asked: Asked | None,
) -> NDArray[np.int64]:
    if keep == 0:
        return among[:0]
    views: dict[str, Any] = {}
    needs = policy.needs
    wanted = {"keys": needs.host_keys, "values": needs.values}
    if any(wanted.values()):
        found = conversation.cells.rows(among)
        for kind in (kind for kind, is_wanted in wanted.items() if is_wanted):
            view = getattr(found, kind)
            views[kind] = view.astype(np.float32) if needs.precise else view
        if needs.value_norms != "none":
            from laserkv_gguf import kernels

            factors = None
            if needs.value_norms == "output":
                factors = output.factors(conversation.engine.model)
            views["value_norms"] = kernels.value_norms(found.values, factors)
        if needs.outside and asked is not None:
            views["outside"] = _outside(conversation.cells, among, asked)
    block = (int(among[0]), int(among[-1]) + 1)
    queries = None if asked is None else asked.queries
    candidates = Candidates(among, block, conversation.thinnings, queries, **views)
    return among[checked(policy, policy.select(candidates, keep), candidates, keep)]


def _outside(cells: Cells, among: NDArray[np.int64], asked: Asked) -> NDArray[np.float32] | None:
    """`Candidates.outside` of some rows of the ledger: the question itself and all others."""
    from laserkv_gguf import kernels

    others = np.delete(cells.ledger.position, among)
    spans = [(int(start), int(end)) for start, end in runs(others)]
    with kernels.threads(cells.context.threads):
        return asked.with_more(rows.keys_between(cells.main, spans))
