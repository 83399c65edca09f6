"""Many requests at a time: what each of them gets, whatever the others do."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from test_session import DOCUMENT, QUESTION, SPEC, Loaded

from laserkv_gguf import LaserKV, Request
from laserkv_gguf.errors import Cancelled, Closed, UserError

LONG = 100_000
PATIENCE = 300.0
TEXTS = [f"The number of house {n} is {n * 37 % 101}. " + DOCUMENT[11 * n :] for n in range(8)]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    one = Loaded(tmp_path_factory.mktemp("many"), SPEC)
    yield one
    one.model.close()


@pytest.fixture(params=[1, 4])
def engine(request: pytest.FixtureRequest, loaded: Loaded) -> Iterator[LaserKV]:
    with loaded.engine(parallel=request.param, positions="original") as one:
        yield one


def alone(loaded: Loaded, text: str | None, count: int, **options: Any) -> list[int]:
    with loaded.engine(positions="original") as engine:
        return engine.ask(QUESTION, document=text, max_tokens=count, **options).tokens


def waited(work: Any) -> Any:
    """What a coroutine returns, unless it hangs."""
    return asyncio.run(asyncio.wait_for(work, PATIENCE))


# ---- async --------------------------------------------------------------------------------------


def test_awaited_as_asked(engine: LaserKV, loaded: Loaded) -> None:
    """Several at a time; the loop goes on meanwhile, and gets the pieces."""
    expected = [alone(loaded, text, 6) for text in TEXTS]

    async def all_of_them() -> list[Any]:
        said: list[list[str]] = [[] for _ in TEXTS]
        replies = await asyncio.gather(
            *(
                engine.aask(QUESTION, document=text, max_tokens=6, on_text=said[n].append)
                for n, text in enumerate(TEXTS)
            )
        )
        assert ["".join(one) for one in said] == [reply.text for reply in replies]
        return replies

    assert [reply.tokens for reply in waited(all_of_them())] == expected


def test_pieces_of_a_turn(engine: LaserKV) -> None:
    async def turns() -> None:
        talk = engine.conversation(document=DOCUMENT, max_tokens=6)
        for _ in range(2):
            answer = talk.ask(QUESTION)
            text = "".join([piece async for piece in answer])
            assert text == answer.reply.text
            assert len(answer.reply.tokens) == 6
        assert talk.turns == 2

    waited(turns())


@pytest.mark.parametrize("how", ["task", "break", "stop", "close", "with"])
def test_a_task_that_is_cancelled_drops_its_answer(how: str, engine: LaserKV) -> None:
    """The turn with it; the conversation goes on, and the engine is free."""

    async def work() -> None:
        talk = engine.conversation(document=DOCUMENT, max_tokens=LONG)
        begun = asyncio.Event()
        answers = []

        async def read() -> None:
            answer = talk.ask(QUESTION)
            answers.append(answer)
            async with answer:
                async for _ in answer:
                    begun.set()
                    if how == "break":
                        break
                    if how == "with":
                        raise ZeroDivisionError

        task = asyncio.create_task(read())
        await begun.wait()
        if how == "task":
            task.cancel()
        elif how == "stop":
            answers[0].stop()
        elif how == "close":
            await answers[0].aclose()
        expected: Any = {
            "task": asyncio.CancelledError,
            "stop": Cancelled,
            "with": ZeroDivisionError,
        }
        if how in expected:
            with pytest.raises(expected[how]):
                await task
        else:
            with contextlib.suppress(Cancelled):  # closed between two pieces it just ends
                await task
        talk.max_tokens = 3
        answer = talk.ask(QUESTION)
        assert [piece async for piece in answer]
        assert talk.turns == 1

    waited(work())


def test_errors_and_the_end_reach_who_awaits(loaded: Loaded) -> None:
    engine = loaded.engine(positions="original")

    async def work() -> None:
        with pytest.raises(UserError, match="max_tokens=0"):
            await engine.aask(QUESTION, max_tokens=0)
        begun = asyncio.Event()
        task = asyncio.create_task(
            engine.aask(QUESTION, document=DOCUMENT, max_tokens=LONG, on_text=lambda _: begun.set())
        )
        await begun.wait()
        await asyncio.to_thread(engine.close)
        with pytest.raises(Closed):
            await task

    waited(work())


# ---- many ---------------------------------------------------------------------------------------


def test_many_are_answered_as_alone(engine: LaserKV, loaded: Loaded) -> None:
    """As they end; what cannot be answered ends alone, and requests are taken one by one."""
    expected = [alone(loaded, text, 3 + n) for n, text in enumerate(TEXTS)]
    taken: list[int] = []

    def requests() -> Iterator[Request]:
        for n, text in enumerate(TEXTS):
            taken.append(n)
            yield Request(QUESTION, document=text, max_tokens=3 + n)
        yield Request(QUESTION, max_tokens=0)
        yield Request("x" * 200, document=DOCUMENT)

    found = {}
    for done in engine.ask_many(requests()):
        assert len(taken) <= len(found) + 1 + engine.parallel
        found[done.index] = done
        assert (done.reply is None) != (done.error is None)
    assert sorted(found) == list(range(10))
    assert [found[n].reply.tokens for n in range(8)] == expected
    assert all(isinstance(found[n].error, UserError) for n in (8, 9))


def test_many_that_nobody_waits_for_are_stopped(engine: LaserKV) -> None:
    before = threading.active_count()
    requests = (Request(QUESTION, document=TEXTS[n % 8], max_tokens=LONG) for n in range(100))
    first = Request(QUESTION, max_tokens=1)
    outcomes = engine.ask_many([first, *requests])
    assert next(outcomes).index == 0
    outcomes.close()
    assert threading.active_count() <= before + 1
    assert len(engine.ask(QUESTION, max_tokens=2).tokens) == 2
