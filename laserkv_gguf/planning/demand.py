"""What a run needs: cells, positions, and the largest ratio that fits.

The one place where this is counted, for a run that begins as for a plan before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from laserkv_gguf.budget import Budget, largest_ratio_that
from laserkv_gguf.policies import Policy

TURNS = 2048  # cells for turns beside what is kept, where no --ctx-size says otherwise


@dataclass(frozen=True)
class Demand:
    """How documents will be read; the fields are flags' names.

    Attributes:
        policy: chooses what is kept.
        block_size: S, tokens read at a time.
        divisor: n; anchors and window get ``B // n`` tokens each.
        lookahead: tokens drafted after the question; None for the policy's own number.
        positions: "original", "compact", or "auto": compact only beyond the trained context.
        recall: where rows are parked: "ram", "disk", or "off".
        recall_mode: "replay" or "shortlist", where there is recall.
        movable: whether llama.cpp can turn cached keys to other positions.
        exact_keys: whether cached keys are float16 or float32.
        read_policy: chooses while no question is known; None for `policy`.
        repeat_prompt: tokens that ask for a repetition, where a policy wants one.
        any_cells: whether there will be as many cells as are needed; of a cache of given size the
            drafts that are copied take what is left.
    """

    policy: Policy
    block_size: int = 4096
    divisor: int = 4
    lookahead: int | None = None
    positions: str = "auto"
    recall: str = "off"
    recall_mode: str = ""
    movable: bool = True
    exact_keys: bool = True
    any_cells: bool = True
    read_policy: Policy | None = None
    repeat_prompt: int = 32

    def budget(self, tokens: int, ratio: float, protected: int = 0) -> Budget:
        """What of so many tokens is kept.

        Args:
            protected: first tokens that stay whole (a system prompt).
        """
        budget = self.policy.budget(tokens, self.block_size, ratio, self.divisor)
        return replace(budget, protected=protected) if protected else budget

    @property
    def drafts(self) -> int:
        """Tokens that a question drafts after it, as far as there must be cells for them."""
        needs = self.policy.needs
        if self.any_cells:
            return needs.most_drafts(self.lookahead)
        return needs.lookahead if self.lookahead is None else self.lookahead

    def parks(self, budget: Budget) -> bool:
        """Whether there is anything to recall."""
        return self.recall != "off" and not budget.keeps_all

    def turns(self, budget: Budget, most: int, trained: int) -> int:
        """Cells for the turns of a conversation whose cells nobody has counted.

        Args:
            most: tokens of an answer.
            trained: positions the model was trained for; 0 for any number.
        """
        cells = max(TURNS, 2 * most)
        # no position need move where there is room for a few turns behind all that is read
        if 0 < trained < budget.tokens + cells and self.positions != "original":
            cells = min(cells, trained - budget.kept - self.recall_cells(budget))
        return max(cells, most)

    def recall_cells(self, budget: Budget) -> int:
        """Cells beside what is kept and the conversation that recalling needs; 0 without."""
        if not self.parks(budget):
            return 0
        return budget.cells_to_recall(self.recall_mode) - budget.kept + self.drafts

    def cells(
        self,
        budget: Budget,
        prompt: int,
        reply: int,
        *,
        question_known: bool = True,
        is_read: bool = False,
    ) -> int:
        """Cells that a run needs at most.

        Args:
            prompt: tokens of the question with the template around it.
            reply: cells for what follows the document: question, answer, later turns.
            question_known: whether the question asks while the document is read.
            is_read: whether the document was read before.
        """
        later = budget.kept + self.recall_cells(budget) + reply
        if is_read:
            return later
        probing = self.probing(budget, prompt, question_known=question_known)
        return max(budget.cells(probing, 0, reply), later)

    def probing(self, budget: Budget, prompt: int = 0, *, question_known: bool = False) -> int:
        """Cells that are taken behind a whole block: a question and drafts, or its repetition.

        Args:
            prompt, question_known: as of `cells`.
        """
        policy, asking, repeating = self.policy, 0, 0
        if not question_known:
            policy = self.read_policy or policy
        needs = policy.needs
        if question_known and needs.queries and prompt:
            asking = prompt + self.drafts
        if needs.repeat:
            repeating = min(needs.repeat, budget.block_size, budget.tokens) + self.repeat_prompt
        return max(asking, repeating)

    def compacts(self, budget: Budget, positions: int, trained: int) -> bool:
        """Whether positions are moved together.

        Args:
            positions: that a run takes where they are not.
            trained: positions the model was trained for; 0 for any number.
        """
        return not budget.keeps_all and self.moves(beyond=positions > trained > 0)

    def moves(self, *, beyond: bool) -> bool:
        """Whether kept tokens are moved together, by --positions.

        Args:
            beyond: whether positions would pass what the model was trained for.
        """
        if self.positions != "auto":
            return self.positions == "compact"
        if beyond or self.policy.positions != "compact":
            return beyond
        # the policy was published so; where it cannot be, tokens stay where they were read
        return self.movable and (self.exact_keys or self.recall == "off")

    def largest_ratio(
        self, fits: Callable[[Budget], bool], tokens: int, protected: int = 0
    ) -> float:
        """The largest ratio (in thousandths) whose budget fits; 0 if none does."""

        def make(tokens: int, _block_size: int, ratio: float, _divisor: int) -> Budget:
            return self.budget(tokens, ratio, protected)

        return largest_ratio_that(fits, tokens, self.block_size, self.divisor, make)
