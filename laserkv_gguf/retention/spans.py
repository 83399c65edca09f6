"""What became of every token of a conversation's documents, as plain data.

`of` reads the ledger and what the last reading, or recalling, has left; nothing is computed but
where each token's text begins. `Retention.as_dict` is the same as JSON, arrays in base64.
"""

from __future__ import annotations

import base64
import codecs
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from laserkv_gguf.conversation.ledger import DOCUMENT, SYSTEM
from laserkv_gguf.errors import UserError
from laserkv_gguf.shown import harmless

if TYPE_CHECKING:
    from laserkv_gguf.conversation.conversation import Conversation
    from laserkv_gguf.conversation.ledger import Segment
    from laserkv_gguf.conversation.looks import Looks
    from laserkv_gguf.llama.model import Model

ANCHOR, POOL, WINDOW, EVICTED = range(4)
UNNAMED = "document"  # what a conversation calls a text without a name
BEFORE = "before the documents"  # the template's tokens and the system prompt
FORMAT = "laserkv-retention 1"


@dataclass(frozen=True)
class Part:
    """A document among the tokens, or what stands before the first one.

    Attributes:
        start, end: its tokens.
        blocks: the first token of each block that it was read in.
    """

    name: str
    start: int
    end: int
    blocks: tuple[int, ...] = ()


@dataclass(frozen=True)
class Retention:
    """What was kept of some documents, and for what.

    Attributes:
        title: one line that tells it from others: policy and share kept.
        pieces: the text of each of n tokens; a character that several tokens share comes with its
            last.
        states: (n,) uint8, 0 to 3: anchor, pool, window or evicted.
        scores: (n,) float32, what the policy scored; NaN where it scored none.
        positions: (n,) int32, where a token stands in the cache; -1 for evicted ones.
        looked: (n,) float32, the share of its attention that the answer paid each, averaged over
            layers, heads and the answer's tokens; None where that was not watched.
        parts: in the order of their tokens.
        question, drafts, answer: as text; `drafts` and `answer` by token.
        most: for each token of the answer, the tokens it looked at most with their shares.
        account: what the answer cost, `Account.as_dict`; empty before there was one.
        model: its name.
    """

    title: str
    pieces: tuple[str, ...]
    states: NDArray[np.uint8]
    scores: NDArray[np.float32]
    positions: NDArray[np.int32]
    looked: NDArray[np.float32] | None = None
    parts: tuple[Part, ...] = ()
    question: str = ""
    drafts: tuple[str, ...] = ()
    answer: tuple[str, ...] = ()
    most: tuple[tuple[tuple[int, float], ...], ...] = ()
    account: Mapping[str, Any] = field(default_factory=dict)
    model: str = ""

    def __len__(self) -> int:
        return len(self.pieces)

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it.

        Arrays are objects of a `type` and little-endian base64 `data`. `text` is all pieces
        together, `lengths` (uint16) says how many UTF-16 units each has, as JavaScript counts them.
        """
        lengths = [len(piece.encode("utf-16-le", "surrogatepass")) // 2 for piece in self.pieces]
        return {
            "format": FORMAT,
            "title": self.title,
            "model": self.model,
            "text": "".join(self.pieces),
            "lengths": _encoded(np.array(lengths, np.uint16)),
            "states": _encoded(self.states),
            "scores": _encoded(self.scores),
            "positions": _encoded(self.positions),
            "looked": None if self.looked is None else _encoded(self.looked),
            "parts": [
                {"name": part.name, "start": part.start, "end": part.end, "blocks": [*part.blocks]}
                for part in self.parts
            ],
            "question": self.question,
            "drafts": [*self.drafts],
            "answer": [*self.answer],
            "most": [[[token, share] for token, share in one] for one in self.most],
            "account": dict(self.account),
        }

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Retention:
        """What `as_dict` gave.

        Raises:
            UserError: it is not of this format.
        """
        if given.get("format") != FORMAT:
            raise UserError("this is no report of this version; write it again with --report")
        units = given["text"].encode("utf-16-le", "surrogatepass")
        ends = np.cumsum(_decoded(given["lengths"]), dtype=np.int64) * 2
        starts = np.concatenate(([0], ends[:-1]))
        return cls(
            given["title"],
            tuple(
                units[start:end].decode("utf-16-le", "surrogatepass")
                for start, end in zip(starts.tolist(), ends.tolist(), strict=True)
            ),
            _decoded(given["states"]),
            _decoded(given["scores"]),
            _decoded(given["positions"]),
            None if given["looked"] is None else _decoded(given["looked"]),
            tuple(Part(**{**part, "blocks": tuple(part["blocks"])}) for part in given["parts"]),
            given["question"],
            tuple(given["drafts"]),
            tuple(given["answer"]),
            tuple(tuple((token, share) for token, share in one) for one in given["most"]),
            given["account"],
            given["model"],
        )


def of(conversation: Conversation, name: str = "") -> Retention:
    """What is kept of a conversation's documents now, with its last question and answer.

    Args:
        name: of a document that has none of its own, as a text given to `LaserKV.ask`.

    Raises:
        UserError: nothing has been read.
    """
    ledger, model = conversation.ledger, conversation.engine.model
    numbers = [n for n in ledger.numbers(SYSTEM, DOCUMENT) if len(ledger.segments[n].tokens)]
    if not numbers:
        raise UserError("nothing has been read that a report could show; ask about a document")
    parts: list[Part] = []
    pieces: list[str] = []
    starts: dict[int, int] = {}
    states, scores, positions = [], [], []
    for number in numbers:
        segment, start = ledger.segments[number], len(pieces)
        starts[number] = start
        pieces += pieces_of(model, segment.tokens)
        where = ledger.where([number])
        states.append(_states(segment, where))
        scores.append(_scores(segment))
        positions.append(where.astype(np.int32))
        own = segment.name if segment.kind == DOCUMENT else BEFORE
        own = name if name and own == UNNAMED else own
        blocks = tuple(start + first for first in segment.blocks.tolist())
        parts.append(Part(harmless(own), start, len(pieces), blocks))
    said = conversation.last
    looked, most = _looked(said.looks if said else None, starts, len(pieces))
    account = said.reply.account.as_dict() if said else {}
    every = np.concatenate(states)
    settings = conversation.engine.settings
    return Retention(
        title=f"{settings.policy}, {np.mean(every != EVICTED):.1%} kept",
        pieces=tuple(pieces),
        states=every,
        scores=np.concatenate(scores),
        positions=np.concatenate(positions),
        looked=looked,
        parts=tuple(parts),
        question=harmless(said.question, running=True) if said else "",
        drafts=tuple(pieces_of(model, said.drafts)) if said else (),
        answer=tuple(pieces_of(model, said.reply.tokens)) if said else (),
        most=most,
        account=account,
        model=harmless(model.name),
    )


def pieces_of(model: Model, tokens: Iterable[int]) -> list[str]:
    """The text of each token, as it may be shown; what several share comes with the last."""
    ids = [int(token) for token in tokens]
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    last = len(ids) - 1
    return [
        harmless(decoder.decode(model.piece(token), index == last), running=True)
        for index, token in enumerate(ids)
    ]


def runs(conversation: Conversation, name: str) -> Iterator[tuple[str, int | None]]:
    """Stretches of a document's text, and the pool that keeps them or None."""
    number = conversation.ledger.document(name)
    assert number is not None
    segment = conversation.ledger.segments[number]
    states = _states(segment, conversation.ledger.where([number])).tolist()
    pieces = pieces_of(conversation.engine.model, segment.tokens)
    for state, group in itertools.groupby(zip(pieces, states, strict=True), lambda one: one[1]):
        yield "".join(piece for piece, _ in group), None if state == EVICTED else state


def _states(segment: Segment, where: NDArray[np.int64]) -> NDArray[np.uint8]:
    pools = segment.pools if len(segment.pools) else np.full(len(where), ANCHOR)
    return np.where(where < 0, EVICTED, pools).astype(np.uint8)


def _scores(segment: Segment) -> NDArray[np.float32]:
    if len(segment.scores) == len(segment.tokens):
        return segment.scores.astype(np.float32)
    return np.full(len(segment.tokens), np.nan, np.float32)


def _looked(
    looks: Looks | None, starts: Mapping[int, int], count: int
) -> tuple[NDArray[np.float32] | None, tuple[tuple[tuple[int, float], ...], ...]]:
    """Shares by token of the documents; what went to turns is left out."""
    if looks is None:
        return None, ()
    first = np.array([starts.get(number, -1) for number in looks.segment.tolist()])
    token = np.where(first >= 0, first + looks.index, -1)
    looked = np.zeros(count, np.float32)
    looked[token[token >= 0]] = looks.share[token >= 0]
    most = [
        tuple(
            (int(token[row]), float(weight))
            for row, weight in zip(rows, weights, strict=True)
            if token[row] >= 0
        )
        for rows, weights in zip(looks.most, looks.weights, strict=True)
    ]
    return looked, tuple(most)


def _encoded(array: NDArray[Any]) -> dict[str, str]:
    dense = np.ascontiguousarray(array)
    little = dense.astype(dense.dtype.newbyteorder("<"), copy=False)
    return {"type": dense.dtype.name, "data": base64.b64encode(little.tobytes()).decode()}


def _decoded(given: Mapping[str, str]) -> NDArray[Any]:
    kind = np.dtype(given["type"])
    little = np.frombuffer(base64.b64decode(given["data"]), kind.newbyteorder("<"))
    return little.astype(kind)


def same_text(reports: Sequence[Retention]) -> None:
    """Refuses reports of other texts: side by side there is one text.

    Raises:
        UserError: their tokens differ.
    """
    for other in reports[1:]:
        if other.pieces != reports[0].pieces:
            raise UserError("only reports of the same documents stand side by side")
