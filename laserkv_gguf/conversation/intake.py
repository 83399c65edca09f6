"""What a conversation reads, and the cells that it needs for that and for what follows.

Also where the rows of what is read go, as far as the settings leave that open.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from laserkv_gguf.budget import Budget
from laserkv_gguf.conversation.ageing import Ageing
from laserkv_gguf.conversation.documents import Documents
from laserkv_gguf.conversation.framing import Framing
from laserkv_gguf.conversation.ledger import DOCUMENT, SYSTEM, Segment
from laserkv_gguf.errors import UserError
from laserkv_gguf.llama.chat import Opening, Prompt
from laserkv_gguf.planning.demand import TURNS

if TYPE_CHECKING:
    from laserkv_gguf.engine.engine import Engine
    from laserkv_gguf.llama.model import Tokens

TALKING = 256  # cells for a turn beside its answer, that recall must leave to be on by itself


class Reads(Protocol):
    """A conversation, as it is seen before it reads.

    Attributes:
        recall_given: where its rows are parked, whatever the settings say; None for what they say.
        parks: where rows of what is read go: "ram", "disk" or "off".
    """

    engine: Engine
    sources: Documents
    system: str | None
    framing: Framing
    ageing: Ageing
    max_tokens: int
    one_turn: bool
    recall_given: str | None
    parks: str


@dataclass(frozen=True)
class Intake:
    """What is read, and for what.

    Attributes:
        segments: the opening, and the documents that are read with it.
        asked: the question that asks meanwhile; None for none.
        reply: cells for what follows.
        protected: first tokens that reading never evicts: the system prompt.
    """

    segments: list[Segment]
    asked: Prompt | None
    reply: int
    protected: int

    @property
    def tokens(self) -> Tokens:
        """(n,) int32: all that stands before the question."""
        parts = [segment.tokens for segment in self.segments]
        return np.concatenate(parts).astype(np.int32)


def intake(conversation: Reads, question: str | None) -> Intake:
    """What a conversation reads, once it is decided where its rows go.

    Args:
        question: that is asked next; None for one that is not known.
    """
    engine, sources = conversation.engine, conversation.sources
    place_rows(conversation, sum(len(tokens) for tokens in sources.tokens(engine.model)))
    found = _intake(conversation, question)
    if not recall_is_open(conversation) or conversation.parks == "off":
        return found
    place, conversation.parks = conversation.parks, "off"
    without = _intake(conversation, question)
    least = min(without.reply, conversation.max_tokens + TALKING)
    if engine.share is None and not _fits(conversation, without):
        least = 0  # nor would it fit without: what is refused then is said as it is
    conversation.parks = place
    if _fits(conversation, found) and found.reply >= least:
        return found
    if engine.share is None:
        if not least:
            return found
        recall_is_off(conversation, "there are too few positions for it")
    else:
        recall_is_off(conversation, f"--ctx-size {engine.ctx_size} has no room for it")
    return without


def _intake(conversation: Reads, question: str | None) -> Intake:
    """The same, once it is decided whether rows are parked."""
    before = opening(conversation, question or "")
    segments = [Segment(SYSTEM, before.before), *_documents(conversation)]
    protected = len(before.before) if conversation.system else 0
    tokens = sum(len(segment.tokens) for segment in segments)
    if tokens > len(before.before):
        conversation.engine.settings.check_keep(tokens)
    if question is None:
        return Intake(segments, None, room(conversation, tokens, protected), protected)
    reply = len(before.after) + conversation.max_tokens
    fills = conversation.engine.fills_cells and not conversation.one_turn
    if fills or reads_apart(conversation):  # room for what recalling needs beside later turns, too
        reply = max(reply, room(conversation, tokens, protected))
    return Intake(segments, before.after, reply, protected)


def plan(conversation: Reads, found: Intake) -> Budget:
    """What would be kept.

    Raises:
        UserError: the cells that are given do not hold it; see `Engine.plan`.
    """
    return conversation.engine.plan(
        len(found.tokens),
        0 if found.asked is None else len(found.asked),
        found.reply,
        question_known=found.asked is not None,
        protected=found.protected,
        recall=conversation.parks,
    ).budget


def _fits(conversation: Reads, found: Intake) -> bool:
    try:
        plan(conversation, found)
    except UserError:
        return False
    return True


def opening(conversation: Reads, question: str) -> Opening:
    """What stands before the documents, and the first question after them."""
    return conversation.framing.opening(
        conversation.engine,
        question,
        system=conversation.system,
        document=bool(conversation.sources) and not conversation.sources.left_out,
    )


def _documents(conversation: Reads) -> list[Segment]:
    """The documents that are read with the opening."""
    model, sources = conversation.engine.model, conversation.sources
    segments: list[Segment] = []
    together = list(sources.to_read.items())[: 1 if reads_apart(conversation) else None]
    for name, text in together:
        own = sources.tokens_of(text, model)
        if segments:
            between = conversation.framing.between(conversation.engine)
            own = np.concatenate((between, own)).astype(np.int32)
        segments.append(Segment(DOCUMENT, own, name))
    return segments


def room(conversation: Reads, tokens: int, protected: int = 0, budget: Budget | None = None) -> int:
    """Cells for the turns: what --ctx-size leaves, else enough for a few.

    Args:
        tokens: of the document and what stands before it.
        protected: first tokens of these that stay.
        budget: what was kept of them, where they were read before.
    """
    engine, answer = conversation.engine, conversation.max_tokens
    enough = max(TURNS, 2 * answer)
    if budget is None and engine.fills_cells and engine.share is not None:
        # what is kept will take the rest
        return max(answer, min(enough, engine.share // 4))
    budget = budget or engine.budget(tokens, protected)
    kept = budget.kept + engine.recall_cells(budget, conversation.parks)
    cells = enough if engine.share is None else engine.share - kept
    trained = engine.model.trained_context
    if trained > 0:
        # no position need move where there is room for a few turns behind all that is read
        unmoved = trained - tokens
        if min(cells, enough) <= unmoved:
            cells = min(cells, unmoved)
        elif engine.settings.positions != "original":
            cells = min(cells, trained - kept)
    return max(cells, answer)


# where rows go


def reads_apart(conversation: Reads) -> bool:
    """Whether every document is read, and recalled, by itself."""
    return conversation.parks != "off" and conversation.ageing.endless


def recall_is_open(conversation: Reads) -> bool:
    """Whether it is ours to say if rows are parked."""
    auto = conversation.recall_given is None and conversation.engine.settings.recall == "auto"
    return auto and conversation.ageing.endless


def place_rows(conversation: Reads, tokens: int) -> None:
    """Decides where the rows of so many tokens go."""
    engine = conversation.engine
    if not recall_is_open(conversation):
        conversation.parks = conversation.recall_given or engine.demand.recall
    elif engine.fills_cells and len(conversation.sources.texts) > 1 and engine.can_recall():
        recall_is_off(
            conversation,
            "--ctx-size does not say how much to keep of each of several documents; give --ratio "
            "too",
        )
    else:
        conversation.parks = engine.place_rows(tokens)


def recall_is_off(conversation: Reads, why: str) -> None:
    """Nothing is parked; says why, once."""
    conversation.parks = "off"
    conversation.engine.say_recall_is_off(why)


def moves(conversation: Reads, later: list[str | Tokens], tokens: int) -> bool:
    """Whether positions move in a reading of several documents, one after the other.

    Args:
        later: the documents after the first.
        tokens: of the first, with what stands before it and cells for what follows.

    Raises:
        UserError: --ctx-size alone does not say how much each of them may keep.
    """
    engine = conversation.engine
    trained = engine.model.trained_context
    if engine.fills_cells:
        raise UserError(
            "with --recall and several documents --ctx-size does not say how much to keep of "
            "each; give --ratio too"
        )
    if engine.settings.positions == "auto" and trained > 0:
        tokens += sum(len(conversation.sources.tokens_of(text, engine.model)) for text in later)
    return engine.demand_with(conversation.parks).moves(beyond=0 < trained < tokens)
