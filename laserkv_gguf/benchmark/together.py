"""How many questions are answered in a minute, by how many are asked at a time.

Documents of one length stand in so many cells as `laser` needs to keep all of them. Each is asked
some questions, in a random order, by so many threads; reading them is not counted. The full cache
gets as many cells: of the documents that have no room in it the cells are in memory, and come back
when they are asked. Every answer has the same number of tokens.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from laserkv_gguf.conversation.conversation import Conversation
from laserkv_gguf.engine.engine import Engine
from laserkv_gguf.errors import UserError

ASIDE = 8 << 30  # bytes
_QUESTION = "What does this text say about number {}? Answer in one sentence."


@dataclass(frozen=True)
class Load:
    """What is asked.

    Attributes:
        documents: how many, of `tokens` tokens each.
        questions: asked about each of them.
        predict: tokens of every answer.
        at_a_time: numbers of threads that ask.
    """

    documents: int = 16
    tokens: int = 2048
    questions: int = 2
    predict: int = 32
    at_a_time: tuple[int, ...] = (1, 2, 4, 8, 16)

    def check(self) -> None:
        """Refuses what cannot be measured.

        Raises:
            UserError: with the remedy in one line.
        """
        if not self.at_a_time or min(self.at_a_time) < 1:
            raise UserError("--parallel takes numbers of at least 1, such as 1,2,4,8")
        if min(self.documents, self.tokens, self.questions, self.predict) < 1:
            raise UserError("give at least 1 document, token, question and token of an answer")


@dataclass(frozen=True)
class Row:
    """What came of one number of threads.

    Attributes:
        fit: conversations whose cells fit into the cache at a time.
        seconds: from the first question to the last answer.
        batches: that llama.cpp computed.
    """

    policy: str
    at_a_time: int
    cells: int
    fit: int
    answers: int
    tokens: int
    seconds: float
    batches: int

    @property
    def answers_per_minute(self) -> float:
        return 60 * self.answers / self.seconds

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    def as_dict(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "answers_per_minute": self.answers_per_minute,
            "tokens_per_second": self.tokens_per_second,
        }


def cells_for(engine: Engine, load: Load) -> int:
    """Cells in which an engine's policy keeps all documents, with a question and its answer."""
    probe = Conversation(engine, document="x", max_tokens=load.predict, one_turn=True)
    _, asked, _ = probe.to_read(_QUESTION.format(load.questions))
    assert asked is not None
    # the template and the tokens around the document
    budget = engine.budget(load.tokens + len(asked))
    return load.documents * (budget.kept + len(asked) + load.predict + 16)


def measure(engine: Engine, text: str, load: Load, on_row: Callable[[Row], None]) -> list[Row]:
    """Reads the documents, then asks about them, by each number of threads in turn.

    Args:
        engine: with `parallel` of at least the largest number, and what it puts aside in memory.
        text: is cut into documents, and repeated where it is too short.
        on_row: called as each is measured.
    """
    engine.ignore_end = True
    talks = []
    for document in _documents(engine, text, load):
        talk = Conversation(engine, document=document, max_tokens=load.predict)
        talk.read(question=_QUESTION.format(load.questions))
        talks.append(talk)
    held = max(place.cells for place in engine.residents.inside.values())
    rows = []
    _ask(talks[:1], [(0, 0)], 1)  # the first answer also decides about threads
    for number in load.at_a_time:
        order = [(d, q) for d in range(load.documents) for q in range(load.questions)]
        np.random.default_rng(0).shuffle(order)
        before, started = engine.access.turns.steps, time.perf_counter()
        tokens = _ask(talks, [(int(d), int(q)) for d, q in order], number)
        seconds = time.perf_counter() - started
        cells = engine.ctx_size or 0
        row = Row(
            engine.settings.policy,
            number,
            cells,
            min(cells // held, load.documents),
            len(order),
            tokens,
            seconds,
            engine.access.turns.steps - before,
        )
        rows.append(row)
        on_row(row)
    return rows


def _documents(engine: Engine, text: str, load: Load) -> list[np.ndarray[Any, np.dtype[np.int32]]]:
    tokens = engine.model.tokenize(text)
    wanted = load.documents * load.tokens
    tokens = np.tile(tokens, -(-wanted // len(tokens)))[:wanted].astype(np.int32)
    return list(tokens.reshape(load.documents, load.tokens))


def _ask(talks: Sequence[Conversation], order: list[tuple[int, int]], number: int) -> int:
    """Asks by so many threads; returns the tokens of all answers."""
    left, lock = iter(order), threading.Lock()
    asked = [threading.Lock() for _ in talks]
    counted: list[int] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            while True:
                with lock:
                    found = next(left, None)
                if found is None or errors:
                    return
                talk = talks[found[0]]
                with asked[found[0]]:  # until it has forgotten the question
                    answer = talk.ask(_QUESTION.format(found[1]))
                    with answer:
                        for _ in answer:
                            pass
                    talk.reset()
                counted.append(len(answer.reply.tokens))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, name=f"laserkv-bench-{n}") for n in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return sum(counted)
