"""A request as tokens: what was said before, and what asks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from laserkv_gguf.conversation.framing import Framing
from laserkv_gguf.conversation.question import ASKING, Limits, ends_in_label, instruction, split
from laserkv_gguf.engine.engine import Engine
from laserkv_gguf.llama.chat import Opening, Piece, Prompt
from laserkv_gguf.llama.model import Model, Tokens


@dataclass(frozen=True)
class Request:
    """All that is put to the model, in its order.

    Attributes:
        tokens: (n,) int32 of everything up to where the answer begins.
        system: how many of the first are the system prompt, which is never evicted.
        asked: where the question begins.
        ending: how many of the last are the template's, after the question's own text.
        asking: how many of the question's last tokens look at a document; None for the settings'.
        probe: tokens that do so in the question's place; None for the question.
    """

    tokens: Tokens
    system: int
    asked: int
    ending: int
    asking: int | None = None
    probe: Tokens | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def before(self) -> Tokens:
        """What is read before the question."""
        return self.tokens[: self.asked]

    def after(self, start: int) -> Prompt:
        """What is decoded where so many tokens stand already."""
        ending = min(self.ending, len(self.tokens) - start)
        probe = None
        if self.probe is not None:
            end = self.tokens[len(self.tokens) - ending :]
            tokens = np.concatenate((self.probe, end)).astype(np.int32)
            probe = Prompt(tokens, ending, self.asking)
        return Prompt(self.tokens[start:], ending, self.asking, probe)


@dataclass(frozen=True)
class Rendered(Framing):
    """What a request says, as it is; in place of a template around a text.

    Attributes:
        first: what stands before the document.
        asked: what is decoded before the answer starts.
    """

    first: Tokens | None = None
    asked: Prompt | None = None

    def opening(
        self, engine: Engine, question: str, *, system: str | None, document: bool
    ) -> Opening:
        assert self.asked is not None
        before = np.empty(0, np.int32) if self.first is None else self.first
        return Opening(before, self.asked)

    def next_turn(self, engine: Engine, question: str, *, system: str | None) -> Prompt:
        assert self.asked is not None
        return self.asked

    def between(self, engine: Engine) -> Tokens:
        return np.empty(0, np.int32)

    def opens_turn(self, engine: Engine, *, system: str | None) -> Tokens:
        return np.empty(0, np.int32)


def of_messages(
    engine: Engine,
    messages: Sequence[tuple[str, Sequence[str]]],
    limits: Limits,
    question: str | None = None,
) -> Request:
    """What a conversation is to the model.

    Every user's message is cut where its question begins, also the earlier ones: so the same
    document has the same tokens, whatever was asked about it before.

    Args:
        messages: of each its role and its texts: documents first.
        question: what looks at a document in place of the last user's question; None for that.

    Raises:
        UserError: the model's template cannot say it.
    """
    model = engine.model
    parted = [
        (role, _parts(model, list(texts), limits) if role == "user" else ["\n\n".join(texts)])
        for role, texts in messages
    ]
    pieces = engine.template.messages(parted)
    last = len(parted) - 1, len(parted[-1][1]) - 1
    at = next(n for n, piece in enumerate(pieces) if (piece.message, piece.part) == last)
    system = 0
    if parted[0][0] == "system":
        system = next(n for n, piece in enumerate(pieces) if piece.message == 0) + 1
    tokens = _joined(pieces)
    asked = len(_joined(pieces[:at]))
    if not asked:  # a template with nothing in front: something has to be read before it is asked
        asked = min(1, len(tokens) - 1)
    asking, probe = _asks(model, parted[-1][1], limits, question)
    return Request(
        tokens,
        len(_joined(pieces[:system])),
        asked,
        len(_joined(pieces[at + 1 :])),
        asking,
        probe,
    )


def _asks(
    model: Model, parts: Sequence[str], limits: Limits, question: str | None
) -> tuple[int | None, Tokens | None]:
    """How many tokens look at a document, and which in place of the question."""
    if question is not None:
        return None, model.tokenize(question)[-limits.most :]
    asked = model.tokenize(parts[-1])
    if first := instruction(parts[0]) if len(parts) > 1 else "":
        said = model.tokenize(first)
        if len(said) <= ASKING:
            tokens = np.concatenate((said, model.tokenize("\n\n"), asked)).astype(np.int32)
            return min(len(tokens), 2 * ASKING), tokens[-limits.most :]
    if ends_in_label(parts[-1]):
        return min(len(asked), ASKING), None
    return None, None


def of_text(model: Model, text: str | Sequence[int], limits: Limits, *, special: bool) -> Request:
    """A text as it is, or token ids, which the model goes on from.

    Args:
        special: read control tokens such as <|im_end|> written in the text as such.
    """
    if isinstance(text, str):
        before, after = split(text, lambda part: len(model.tokenize(part)), limits)
        parts = [model.tokenize(part, special=special) for part in (before, after)]
        bos = [model.bos] if model.adds_bos and model.bos >= 0 else []
        if special and len(first := np.concatenate(parts)) and bos and first[0] == bos[0]:
            bos = []
        head = np.concatenate((np.array(bos, np.int32), parts[0])).astype(np.int32)
        tokens, asked = np.concatenate((head, parts[1])).astype(np.int32), len(head)
    else:
        tokens = np.array(text, np.int32)
        asked = len(tokens) - limits.tail if len(tokens) > limits.most else 0
    asked = min(max(asked, 1), max(len(tokens) - 1, 0))
    return Request(tokens, 0, asked, 0)


def _parts(model: Model, texts: list[str], limits: Limits) -> list[str]:
    """A message's documents as one text, and its question."""
    before, question = split(texts[-1], lambda part: len(model.tokenize(part)), limits)
    documents = [*texts[:-1], before] if before else texts[:-1]
    if not documents:
        return [question]
    document = "\n\n".join(documents)
    return [document if before else document + "\n\n", question]


def _joined(pieces: Sequence[Piece]) -> Tokens:
    found = [piece.tokens for piece in pieces]
    return np.concatenate(found).astype(np.int32) if found else np.empty(0, np.int32)
