"""How a conversation shares its cells: what must be thinned before the next turn fits.

The system prompt stays whole. Then come the documents' kept tokens, what is kept of older turns,
the recent turns whole, and room for the next question and its answer. Turns age, the oldest first,
when these do not fit: half of the history's cells at most then hold what is kept of aged turns, the
other half recent turns. Documents yield only where not even a short question and answer would fit
beside them.

Nothing here knows llama.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass

from laserkv_gguf.errors import UserError

SHORT_ANSWER = 64  # documents yield for a turn of this size
SLACK = 8  # an eighth of the history's cells is freed ahead, so that not every turn has to thin


@dataclass(frozen=True)
class Thinning:
    """What the next turn needs.

    Attributes:
        documents: rows the documents may keep; None where they stay as they are.
        turns: how many of the whole turns age now, oldest first.
        keep: rows that all aged turns, these included, may keep together.
    """

    documents: int | None
    turns: int
    keep: int


@dataclass(frozen=True)
class Space:
    """The cells of a conversation before a turn.

    Attributes:
        capacity: all there are.
        system, documents, aged: rows taken by the system prompt, the documents and aged turns.
        whole: rows of every turn that is still whole, the oldest first.
        prompt: tokens of the next question with the template around it.
        answer: most tokens of its answer.
        ahead: cells that should stay free after it, to ask the question after this one with.
    """

    capacity: int
    system: int
    documents: int
    aged: int
    whole: tuple[int, ...]
    prompt: int
    answer: int
    ahead: int = 0

    def thinning(self) -> Thinning | None:
        """What must go before the turn fits; None where it does.

        Raises:
            UserError: it does not fit whatever goes.
        """
        left = self.capacity - self.system - self.prompt
        least = 2 * min(self.answer, SHORT_ANSWER)
        if not self.whole and not self.aged and self.documents + self.answer <= left:
            return None  # the turn a document was read for; there is no history to make room for
        if left < 2:
            raise UserError(
                f"a question of {self.prompt} tokens does not fit into a context of "
                f"{self.capacity} cells; shorten it, put the long part into a document, "
                "or use a larger --ctx-size"
            )
        documents = min(self.documents, max(left - least, 0))
        yielded = documents if documents < self.documents else None
        left -= documents
        # the answer gets what it asks for, as long as the history has as much
        history = left - min(self.answer, left // 2)
        history -= min(self.ahead, history // 4)
        if self.aged + sum(self.whole) <= history:
            return None if yielded is None else Thinning(yielded, 0, self.aged)
        target = max(history - history // SLACK, 1)
        share = target // 2
        aged, recent, turns = self.aged, sum(self.whole), 0
        while turns < len(self.whole) and min(aged, share) + recent > target:
            aged, recent = aged + self.whole[turns], recent - self.whole[turns]
            turns += 1
        return Thinning(yielded, turns, min(aged, max(target - recent, 1)))
