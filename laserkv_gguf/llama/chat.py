"""The chat template of the GGUF, cut where documents, questions and answers stand."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from laserkv_gguf.errors import UserError
from laserkv_gguf.llama.model import Model, Tokens
from laserkv_gguf.llama.template import ChatFormatter

log = logging.getLogger(__name__)

# What llama.cpp falls back to where a file has no template.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_MARK = "\u2063"
_DOCUMENT, _QUESTION, _ANSWER, _SYSTEM = (f"{_MARK}{name}{_MARK}" for name in "DQAS")
MESSAGE = 300  # most characters of a template's error that are passed on
SEPARATOR = "\n\n"  # between document and question, inside the user's turn


@dataclass(frozen=True)
class Prompt:
    """What is decoded up to where an answer starts.

    Attributes:
        tokens: int32 ids of the question with the template around it.
        ending: how many of them come after the question's own text: the template's part that ends
            the turn and begins the answer.
        asking: how many of the tokens before these look at a document, in place of as many as the
            settings say; None for those.
        probe: what looks at a document in its place; None for itself.
    """

    tokens: Tokens
    ending: int = 0
    asking: int | None = None
    probe: Prompt | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def probing(self) -> Prompt:
        """What looks at a document."""
        return self.probe or self


@dataclass(frozen=True)
class Opening:
    """The first turn: the tokens before the document, and what follows it."""

    before: Tokens
    after: Prompt


@dataclass(frozen=True)
class Piece:
    """A stretch of a rendered conversation.

    Attributes:
        tokens: int32 ids.
        message, part: which message it is of, and which part of that; -1 for the template's own.
    """

    tokens: Tokens
    message: int = -1
    part: int = -1


class ChatTemplate:
    """Renders turns with the model's own template.

    Contents are put in as marks first, so that a text which contains control tokens is never read
    as such: only the template's own parts are tokenised with control tokens.

    Raises:
        UserError: the template cannot be read or rendered.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        template = model.metadata("tokenizer.chat_template")
        self.from_model = template is not None
        if template is None:
            log.warning("%s has no chat template; using ChatML as llama.cpp does", model.path.name)
        try:
            self._format = ChatFormatter(
                template or CHATML, eos_token=model.eos_text, bos_token=model.bos_text
            )
        except Exception as error:  # the compiler may run into anything
            raise UserError(
                f"the chat template of {model.path.name} is broken: {_said(error)}"
            ) from error

    def opening(
        self, question: str, *, system: str | None = None, document: bool = True
    ) -> Opening:
        """The first turn, cut at the document (or where one would stand)."""
        turn = {"role": "user", "content": _DOCUMENT + _QUESTION}
        before, after = _cut(self._render([*self._system(system), turn]), _DOCUMENT)
        head = self._tokens(before, system)
        bos = self.model.bos
        if self.model.adds_bos and bos >= 0 and (not len(head) or head[0] != bos):
            head = np.concatenate(([np.int32(bos)], head))
        return Opening(head, self._prompt(after, SEPARATOR + question if document else question))

    def plain(self, question: str) -> Opening:
        """Document and question as they are, without the template; BOS where the model wants it."""
        bos = [self.model.bos] if self.model.adds_bos and self.model.bos >= 0 else []
        return Opening(np.array(bos, np.int32), Prompt(self.model.tokenize(question)))

    def next_turn(self, question: str, *, system: str | None = None) -> Prompt:
        """What follows an answer up to the next one, from the token that ends the answer."""
        rendered = self._render(
            [
                *self._system(system),
                {"role": "user", "content": _DOCUMENT},
                {"role": "assistant", "content": _ANSWER},
                {"role": "user", "content": _QUESTION},
            ]
        )
        return self._prompt(_cut(rendered, _ANSWER)[1], question)

    def messages(self, messages: Sequence[tuple[str, Sequence[str]]]) -> list[Piece]:
        """A whole conversation up to where the next answer begins, in pieces.

        Every part of a message is tokenised by itself, so that what stands before it has the same
        tokens whatever comes after.

        Args:
            messages: of each its role and its text, in parts that follow one another.

        Raises:
            UserError: the template fails, or leaves one of the messages out.
        """
        marks = {
            f"{_MARK}{at}.{number}{_MARK}": (at, number)
            for at, (_, parts) in enumerate(messages)
            for number in range(len(parts))
        }
        names = iter(marks)
        marked = [
            {"role": role, "content": "".join(next(names) for _ in parts)}
            for role, parts in messages
        ]
        rendered = self._render_all(marked)
        pieces, rest = [], rendered
        for mark, (at, number) in marks.items():
            before, found, rest = rest.partition(mark)
            if not found:
                raise UserError(
                    f"the chat template of {self.model.path.name} leaves out message {at + 1}, "
                    f"of the {messages[at][0]}"
                )
            if before:
                pieces.append(Piece(self.model.tokenize(before, special=True)))
            text = messages[at][1][number]
            pieces.append(Piece(self.model.tokenize(text), at, number))
        pieces.append(Piece(self.model.tokenize(rest, special=True)))
        bos, first = self.model.bos, pieces[0].tokens
        if self.model.adds_bos and bos >= 0 and (not len(first) or first[0] != bos):
            pieces.insert(0, Piece(np.array([bos], np.int32)))
        return pieces

    def _render_all(self, messages: list[dict[str, str]]) -> str:
        """Some templates know no system role: then the first turn says what it would."""
        system = messages[0]["role"] == "system" and len(messages) > 1
        said: Exception | None = None
        try:
            rendered = self._format(messages)
        except Exception as error:  # a template is a program: anything may go wrong in it
            said = error
        else:
            if not system or messages[0]["content"] in rendered:
                return rendered
        if not system:
            raise UserError(
                f"the chat template of {self.model.path.name} fails: {_said(said or ValueError())}"
            ) from said
        rest = [dict(message) for message in messages[1:]]
        rest[0]["content"] = messages[0]["content"] + SEPARATOR + rest[0]["content"]
        return self._render_all(rest)

    def _prompt(self, rendered: str, question: str) -> Prompt:
        before, ending = (self._tokens(part, None) for part in _cut(rendered, _QUESTION))
        asked = self.model.tokenize(question)
        return Prompt(np.concatenate((before, asked, ending)).astype(np.int32), len(ending))

    def _system(self, system: str | None) -> list[dict[str, str]]:
        return [{"role": "system", "content": _SYSTEM}] if system else []

    def _render(self, messages: list[dict[str, str]]) -> str:
        """Some templates know no system role: then the first turn says what it would."""
        with_system = messages[0]["role"] == "system"
        try:
            rendered = self._format(messages)
        except Exception as error:  # a template is a program: anything may go wrong in it
            if not with_system:
                raise UserError(
                    f"the chat template of {self.model.path.name} fails: {_said(error)}"
                ) from error
        else:
            if not with_system or _SYSTEM in rendered:
                return rendered
        rest = [dict(message) for message in messages[1:]]
        rest[0]["content"] = _SYSTEM + SEPARATOR + rest[0]["content"]
        return self._render(rest)

    def _tokens(self, rendered: str, system: str | None) -> Tokens:
        """Tokenises the template's parts with control tokens, and the system prompt without."""
        before, found, after = rendered.partition(_SYSTEM)
        parts = [self.model.tokenize(before, special=True)]
        if found:
            parts.append(self.model.tokenize(system or ""))
            parts.append(self.model.tokenize(after, special=True))
        return np.concatenate(parts)


def _said(error: Exception) -> str:
    """One line: a template writes what it likes into its errors."""
    return " ".join(str(error).split())[:MESSAGE] or type(error).__name__


def _cut(rendered: str, mark: str) -> tuple[str, str]:
    before, found, after = rendered.rpartition(mark)
    if not found:
        raise UserError("the model's chat template drops what the user says; it cannot be used")
    return before, after
