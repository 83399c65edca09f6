"""What stands around questions and documents: the model's chat template, or nothing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from laserkv_gguf.llama.chat import SEPARATOR, Opening, Prompt

if TYPE_CHECKING:
    from laserkv_gguf.engine.engine import Engine


@dataclass(frozen=True)
class Framing:
    """How a conversation is put to the model.

    Attributes:
        plain: documents and questions go in as they are, without the chat template.
        answer_prefix: how the answer to the first question begins; the model goes on from there.
    """

    plain: bool = False
    answer_prefix: str = ""

    def opening(
        self, engine: Engine, question: str, *, system: str | None, document: bool
    ) -> Opening:
        """What stands before a document, and the first question after it."""
        if self.plain:
            opening = engine.template.plain(question)
        else:
            opening = engine.template.opening(question, system=system, document=document)
        if not self.answer_prefix:
            return opening
        begun = engine.model.tokenize(self.answer_prefix)
        tokens = np.concatenate((opening.after.tokens, begun)).astype(np.int32)
        return replace(opening, after=Prompt(tokens, opening.after.ending + len(begun)))

    def next_turn(self, engine: Engine, question: str, *, system: str | None) -> Prompt:
        """A later question, with what the template puts around it."""
        return engine.template.next_turn(question, system=system)

    def go_on(self, engine: Engine, question: str, *, system: str | None) -> Prompt:
        """A question in a turn that documents have opened."""
        around = self.next_turn(engine, "", system=system)
        asked = engine.model.tokenize(SEPARATOR + question)
        ending = around.tokens[len(around) - around.ending :]
        return Prompt(np.concatenate((asked, ending)).astype(np.int32), around.ending)

    def between(self, engine: Engine) -> np.ndarray:
        """What stands between two documents of a turn: (n,) int32."""
        return engine.model.tokenize(SEPARATOR)

    def opens_turn(self, engine: Engine, *, system: str | None) -> np.ndarray:
        """What stands before a document that opens a turn: (n,) int32; empty: it opens none."""
        around = self.next_turn(engine, "", system=system)
        return around.tokens[: len(around) - around.ending]
