"""Many questions at a time: each in a thread of its own, answers as they are complete."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from laserkv_gguf.conversation.answer import Answer
    from laserkv_gguf.conversation.generation import Reply
    from laserkv_gguf.llama.sampler import Sampling


@dataclass(frozen=True)
class Request:
    """One question; the fields are `LaserKV.ask`'s arguments."""

    question: str
    document: str | None = None
    system: str | None = None
    max_tokens: int = 512
    sampling: Sampling | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What came of a request: a reply, or the error it ended with.

    Attributes:
        index: its number among all requests, from 0.
    """

    index: int
    request: Request
    reply: Reply | None = None
    error: Exception | None = None


def ask_many(
    begin: Callable[[Request], Answer], requests: Iterable[Request], most: int
) -> Iterator[Outcome]:
    """Answers requests, `most` at a time, in the order in which they are complete.

    The next request is taken when one has ended. What is still under way where the iterator is
    closed is stopped and dropped.

    Args:
        begin: makes the answer of a request, which has not begun then.
    """
    ended: SimpleQueue[Outcome] = SimpleQueue()
    waiting, left = enumerate(requests), True
    under_way: dict[int, tuple[Answer, threading.Thread]] = {}
    try:
        while left or under_way:
            while left and len(under_way) < most:
                index, request = next(waiting, (-1, None))
                if request is None:
                    left = False
                    break
                try:
                    answer = begin(request)
                except Exception as error:
                    yield Outcome(index, request, error=error)
                    continue
                thread = threading.Thread(
                    target=_answer,
                    args=(index, request, answer, ended),
                    name=f"laserkv-ask-{index}",
                    daemon=True,
                )
                under_way[index] = answer, thread
                thread.start()
            if under_way:
                outcome = ended.get()
                under_way.pop(outcome.index)[1].join()
                yield outcome
    finally:
        for answer, _ in under_way.values():
            answer.stop()
        for _, thread in under_way.values():
            thread.join()


def _answer(index: int, request: Request, answer: Answer, ended: SimpleQueue[Outcome]) -> None:
    try:
        with answer:
            for _ in answer:
                pass
        ended.put(Outcome(index, request, reply=answer.reply))
    except Exception as error:
        ended.put(Outcome(index, request, error=error))
