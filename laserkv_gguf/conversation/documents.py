"""The documents of a conversation: their texts, how they were read, and what parks their rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from laserkv_gguf.conversation.ledger import DOCUMENT, Ledger

if TYPE_CHECKING:
    from laserkv_gguf.llama.model import Model, Tokens
    from laserkv_gguf.recall.recaller import Recaller


@dataclass(frozen=True)
class Document:
    """What a conversation knows about one of its documents.

    Attributes:
        tokens: how many were read; 0 where it was not read yet.
        kept: how many of them are in the cache.
    """

    name: str
    tokens: int
    kept: int


@dataclass(frozen=True)
class Parked:
    """What parks the rows of one reading.

    Attributes:
        numbers: of the segments that the reading covered, in order: the opening of the turn, where
            it was read along, and the document.
    """

    numbers: tuple[int, ...]
    recaller: Recaller


class Documents:
    """Documents in the order they were added.

    Args:
        texts: by name; int32 token ids in place of a text are read as they are.

    Attributes:
        left_out: whether they are not read, because reading them was stopped.
        parked: what parks them, in the order of their positions.
    """

    def __init__(self, texts: Mapping[str, str | Tokens]) -> None:
        self.texts: dict[str, str | Tokens] = dict(texts)
        self.left_out = False
        self.parked: list[Parked] = []
        self._tokenized: dict[str, Tokens] = {}

    def __bool__(self) -> bool:
        """Whether there is anything to read."""
        return any(len(text) for text in self.texts.values())

    @property
    def to_read(self) -> dict[str, str | Tokens]:
        """The texts that are read, by name."""
        return {} if self.left_out else self.texts

    def tokens(self, model: Model) -> list[Tokens]:
        """(n,) int32 of each text that is read."""
        return [self.tokens_of(text, model) for text in self.to_read.values()]

    def tokens_of(self, text: str | Tokens, model: Model) -> Tokens:
        """(n,) int32; a text is tokenised once."""
        if not isinstance(text, str):
            return text
        if text not in self._tokenized:
            self._tokenized[text] = model.tokenize(text)
        return self._tokenized[text]

    def forget_text(self, name: str) -> None:
        """It is none of them any more."""
        text = self.texts.pop(name)
        if isinstance(text, str):
            self._tokenized.pop(text, None)

    def listed(self, ledger: Ledger) -> list[Document]:
        """What became of each."""
        found = []
        for name in self.texts:
            number = ledger.document(name)
            if number is None:
                found.append(Document(name, 0, 0))
            else:
                tokens = len(ledger.segments[number].tokens)
                found.append(Document(name, tokens, ledger.count(number)))
        return found

    # parked rows

    @property
    def recallers(self) -> list[Recaller]:
        return [parked.recaller for parked in self.parked]

    def forget_parked(self, number: int | None = None) -> None:
        """Gives back the memory or files of parked rows; nothing of them is recalled afterwards.

        Args:
            number: of the document's segment; None for all documents.
        """
        for parked in list(self.parked):
            if number is None or number in parked.numbers:
                self.parked.remove(parked)
                parked.recaller.close()

    def unparked(self, ledger: Ledger) -> list[int]:
        """Documents without parked rows. They are thinned like turns, for good."""
        held = {number for parked in self.parked for number in parked.numbers}
        return [number for number in ledger.numbers(DOCUMENT) if number not in held]

    @property
    def first_movable(self) -> int:
        """The first position that may change: parked documents, and all before, keep theirs."""
        return max((recaller.next_position for recaller in self.recallers), default=0)

    def extra_cells(self, drafts: int) -> int:
        """Cells that recalling needs while it goes through one document after the other.

        Args:
            drafts: lookahead tokens of the probe.
        """
        return max((recaller.extra_cells + drafts for recaller in self.recallers), default=0)

    @property
    def parked_tokens(self) -> int:
        """Tokens whose rows are parked."""
        return sum(recaller.store.parked for recaller in self.recallers)

    @property
    def parked_bytes(self) -> int:
        """What parked rows take, with what finds them."""
        return sum(recaller.bytes for recaller in self.recallers)
