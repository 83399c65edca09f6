"""The life of an engine: made, in use, closed; by any thread, at any moment, to the very end.

What could kill or hang a process runs in one of its own, which must end with exit code 0: the
child asserts, the parent looks at the code. Nothing waits for a clock; `PATIENCE` only ends what
would hang for ever.
"""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import inspect
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_session import DOCUMENT, OPTIONS, QUESTION, SETTINGS, SPEC, Loaded, in_cache

import laserkv_gguf
from laserkv_gguf.api import LaserKV
from laserkv_gguf.conversation import parallel
from laserkv_gguf.conversation.answer import Answer
from laserkv_gguf.conversation.conversation import Conversation
from laserkv_gguf.conversation.generation import Reply
from laserkv_gguf.engine.access import BUSY, DROPPED
from laserkv_gguf.errors import Cancelled, Closed, LaserKVError, UserError
from laserkv_gguf.llama.context import Context
from laserkv_gguf.llama.handle import Handle
from laserkv_gguf.llama.model import Model
from laserkv_gguf.llama.worker import Worker

PATIENCE = 300.0  # seconds, after which a test gives up on what hangs
TOKENS = 6
LONG = 100_000  # tokens of an answer that is never read to its end

HEAD = """
import faulthandler, logging, os, signal, sys, threading
logging.disable(logging.WARNING)  # that so long an answer is nonsense
faulthandler.dump_traceback_later({patience}, exit=True)
from test_session import DOCUMENT, OPTIONS, QUESTION, SETTINGS
from laserkv_gguf.errors import Cancelled, Closed, LaserKVError, UserError
from laserkv_gguf.llama.model import Model
from laserkv_gguf.api import LaserKV
path = {path!r}

def made(**settings):
    model = Model(path, gpu_layers=0, extra_buffers=False)
    engine = LaserKV(model, context=OPTIONS, **{{**SETTINGS, "positions": "original", **settings}})
    engine._owns_model = True
    return engine

def forked():
    faulthandler.cancel_dump_traceback_later()  # a fork waits for its thread, which it lacks
    pid = os.fork()
    if pid == 0:
        signal.alarm(int({patience}))
    return pid

def refused(call, *arguments):
    try:
        call(*arguments)
    except Closed as error:
        assert str(error) and "\\n" not in str(error)
        return str(error)
    raise AssertionError(f"{{call}} was not refused")
"""


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    one = Loaded(tmp_path_factory.mktemp("life"), SPEC)
    yield one
    one.model.close()


@pytest.fixture(autouse=True)
def _no_hang() -> Iterator[None]:
    faulthandler.dump_traceback_later(3 * PATIENCE, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


def process(loaded: Loaded, code: str, first: str = "") -> str:
    """What a process of its own says; it must end well, and without a word on stderr.

    Args:
        first: done before anything is imported.
    """
    paths = [Path(__file__).parent, Path(laserkv_gguf.__file__).parents[1]]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    head = HEAD.format(path=str(loaded.path), patience=PATIENCE)
    done = subprocess.run(
        [sys.executable, "-c", first + head + code],
        capture_output=True,
        text=True,
        env=environment,
        timeout=2 * PATIENCE,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


def made(loaded: Loaded, **settings: Any) -> LaserKV:
    """An engine whose answers may be as long as they like."""
    return loaded.engine(**{"positions": "original", **settings})


def together(*works: Callable[[], Any]) -> list[Any]:
    """Runs each in a thread of its own; what they return, or the exceptions that they raise."""
    found: list[Any] = [None] * len(works)

    def run(number: int) -> None:
        try:
            found[number] = works[number]()
        except Exception as error:
            found[number] = error

    threads = [threading.Thread(target=run, args=(n,), daemon=True) for n in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()
    return found


# ---- closing while others are at work ----------------------------------------------------------

CLOSES = """
class Gate:
    # One thread works, the others wait for it; closing comes at that very moment.
    def __init__(self):
        self.open = threading.Event()
    def __call__(self, _):
        self.open.set()

for round in range({rounds}):
    for count in (1, 2, 8):
        for moment in ("reading", "answering", "generating", "at once"):
            engine, gate, ended = made(), Gate(), []
            def work(number):
                options = {{}}
                if moment == "reading":
                    options["on_progress"] = gate
                if moment == "answering":
                    options["on_text"] = gate
                if moment == "at once":
                    gate.open.set()
                try:
                    if moment != "generating" and (number % 2 or moment == "answering"):
                        engine.ask(QUESTION, document=DOCUMENT * 3, max_tokens={long}, **options)
                    else:
                        talk = engine.conversation(document=DOCUMENT * 3, max_tokens={long})
                        for piece in talk.begin(QUESTION, **options):
                            gate(piece)
                except Closed as error:
                    ended.append(str(error))
                except BaseException as error:
                    ended.append(repr(error))
            threads = [threading.Thread(target=work, args=(n,)) for n in range(count)]
            for thread in threads:
                thread.start()
            gate.open.wait()
            engine.close()
            assert engine.access.closed and engine.context is None
            engine.close()
            for thread in threads:
                thread.join()
            assert ended == ["the engine is closed; make a new LaserKV"] * count, (moment, ended)
            refused(engine.ask, QUESTION)
"""


def test_closes_under_load(loaded: Loaded) -> None:
    """One, two and eight threads; while one reads, answers, generates, and before any may."""
    process(loaded, CLOSES.format(rounds=1, long=LONG))


@pytest.mark.long
def test_many_closes_under_load(loaded: Loaded) -> None:
    process(loaded, CLOSES.format(rounds=25, long=LONG))


def test_closes_from_many_threads(loaded: Loaded) -> None:
    """All of them return once everything has been freed, and it is freed once."""
    freed: list[bool] = []
    engine = made(loaded)
    engine.ask(QUESTION, document=DOCUMENT, max_tokens=TOKENS)
    real = engine.free

    def free() -> None:
        real()
        freed.append(True)

    engine.free = free  # type: ignore[method-assign]
    begin = threading.Barrier(8)

    def close() -> bool:
        begin.wait()
        engine.close()
        return engine.access.closed

    assert together(*[close] * 8) == [True] * 8
    assert freed == [True]


def test_a_caller_that_waits_is_told(loaded: Loaded) -> None:
    """It waits for an answer that another thread has stopped reading."""
    engine, waits = made(loaded), threading.Event()
    talk = engine.conversation(document=DOCUMENT, max_tokens=LONG)
    pieces = talk.begin(QUESTION)
    next(pieces)
    real = engine.access.enter

    def enter(stream: Any, resident: Any = None) -> Any:
        waits.set()
        return real(stream, resident)

    engine.access.enter = enter  # type: ignore[method-assign]

    def close() -> None:
        waits.wait()
        engine.close()

    asked, _ = together(lambda: list(talk.ask(QUESTION)), close)
    assert isinstance(asked, Closed)
    with pytest.raises(Closed):
        next(pieces)


def test_a_with_block_and_a_half_read_answer(loaded: Loaded) -> None:
    with made(loaded) as engine:
        pieces = engine.stream(QUESTION, document=DOCUMENT, max_tokens=LONG)
        said = next(pieces)
        unread = engine.stream(QUESTION, document=DOCUMENT, max_tokens=LONG)
    for _ in range(2):
        with pytest.raises(Closed, match="the engine is closed"):
            next(pieces)
    with pytest.raises(Closed, match="the engine is closed"):
        next(unread)
    assert pieces.reply.text.startswith(said)
    pieces.close()
    engine.close()
    with pytest.raises(Closed), engine:
        pass


def test_an_answer_that_had_ended_stays(loaded: Loaded) -> None:
    with made(loaded) as engine:
        pieces = engine.stream(QUESTION, document=DOCUMENT, max_tokens=TOKENS)
        text = "".join(pieces)
    assert list(pieces) == []
    assert pieces.reply.text == text
    assert len(pieces.reply.tokens) == TOKENS


@pytest.mark.parametrize("how", ["on_progress", "on_text", "read", "together"])
def test_closed_by_what_it_calls_back(how: str, loaded: Loaded) -> None:
    """By the thread that is inside, which cannot wait for itself. It is stopped, then frees."""
    engine = made(loaded)
    freed: list[bool] = []

    def close(*_: object) -> None:
        engine.close()
        freed.append(engine.access.closed)

    def ask() -> None:
        if how == "read":
            engine.conversation(document=DOCUMENT).read(close)
        elif how == "together":
            questions = [parallel.Question(QUESTION, max_tokens=n) for n in (1, LONG)]
            parallel.answer(engine, questions, close, document=DOCUMENT, read_once=True)
        else:
            calls: dict[str, Any] = {how: close}
            engine.ask(QUESTION, document=DOCUMENT, max_tokens=LONG, **calls)

    with pytest.raises(Closed, match="the engine is closed"):
        ask()
    assert engine.access.closed
    assert engine.context is None
    assert freed[0] is (how == "on_text")  # between two pieces nobody is inside


@pytest.mark.parametrize("read_once", [True, False])
def test_questions_together_are_not_answered_by_closed(read_once: bool, loaded: Loaded) -> None:
    """No question gets the end of the engine for its answer."""
    engine, replies = made(loaded), []
    questions = [parallel.Question(f"{QUESTION}{n}", max_tokens=1 + n * n) for n in range(20)]

    def on_reply(number: int, reply: Any) -> None:
        replies.append(reply)
        engine.close()

    with pytest.raises(Closed):
        parallel.answer(engine, questions, on_reply, document=DOCUMENT, read_once=read_once)
    assert 0 < len(replies) < 10
    assert all(isinstance(reply, Reply) for reply in replies)


def test_asked_by_what_it_calls_back(loaded: Loaded) -> None:
    """One line instead of waiting for itself for ever."""
    with made(loaded) as engine:
        said: list[str] = []

        def ask(*_: object) -> None:
            for call in (lambda: engine.ask(QUESTION), lambda: engine.configure(ratio=0.5)):
                with pytest.raises(UserError) as caught:
                    call()
                said.append(str(caught.value))

        expected = engine.ask(QUESTION, document=DOCUMENT, max_tokens=TOKENS).tokens
        found = engine.ask(QUESTION, document=DOCUMENT, max_tokens=TOKENS, on_progress=ask)
        assert found.tokens == expected
        engine.conversation(document=DOCUMENT).read(ask)
        assert set(said) == {BUSY}


# ---- after closing ------------------------------------------------------------------------------

ENGINE_CALLS: dict[str, Callable[[LaserKV, Path], Any]] = {
    "__enter__": lambda engine, _: engine.__enter__(),
    "ask": lambda engine, _: engine.ask(QUESTION),
    "stream": lambda engine, _: engine.stream(QUESTION),
    "aask": lambda engine, _: asyncio.run(engine.aask(QUESTION)),
    "ask_many": lambda engine, _: engine.ask_many([]),
    "conversation": lambda engine, _: engine.conversation(document=DOCUMENT),
    "configure": lambda engine, _: engine.configure(ratio=0.5),
    "budget": lambda engine, _: engine.budget(100),
    "plan": lambda engine, _: engine.plan(100, 10, 10),
    "prepare": lambda engine, _: engine.prepare(None, 100, 10, 10),
    "load": lambda engine, path: engine.load(path),
    "turn_recall_on": lambda engine, _: engine.turn_recall_on({}),
}
# They do nothing to a closed engine, or tell what Python itself knows.
ENGINE_QUIET = {"close", "cancel", "__exit__", "context", "cell_bytes", "free"}
ENGINE_QUIET |= {"share", "demand", "probe_settings", "drafts", "recall_cells"}
# They are for whoever is inside: with what only an open engine gives.
ENGINE_INSIDE = {
    "recaller",
    "try_row_format",
    "reader_without_question",
    "reader_for",
    "reader_at",
    "place",
}
ENGINE_INSIDE |= {
    "room_for_a_file",
    "come_back",
    "leave",
    "give_back",
    "grow",
    "keeping_others",
    "warm_up_beside",
    "save",
    # where rows go, and what reads without a question: conversations ask
    "demand_with",
    "read_policy",
    "hears",
    "can_recall",
    "place_rows",
    "room_for_rows",
    "row_bytes",
    "say_recall_is_off",
}

TALK_CALLS: dict[str, Callable[[Any, Path], Any]] = {
    "read": lambda talk, _: talk.read(),
    "check": lambda talk, _: talk.check(),
    "choose_again": lambda talk, _: talk.choose_again(0.5),
    "begin": lambda talk, _: talk.begin(QUESTION),
    "ask": lambda talk, _: talk.ask(QUESTION),
    "recall": lambda talk, _: talk.recall(QUESTION),
    "save": lambda talk, path: talk.save(path.with_suffix(".new")),
    "log_likelihood": lambda talk, _: talk.log_likelihood(QUESTION, "tin"),
    "log_probabilities": lambda talk, _: talk.log_probabilities([3], [4]),
    "likelihoods": lambda talk, _: talk.likelihoods([3, 4], 1),
    "keep_said": lambda talk, _: talk.keep_said(1),
    "reset": lambda talk, _: talk.reset(),
    "prepare_for": lambda talk, _: talk.prepare_for(QUESTION),
}
TALK_ADDED: dict[str, Callable[[Any, Path], Any]] = {
    "add": lambda talk, _: talk.add("more", DOCUMENT),
    "drop": lambda talk, _: talk.drop("document"),
}
TALK_QUIET = {"texts", "documents", "ledger", "cells", "run", "reading", "cells_used", "drafts"}
TALK_QUIET |= {"said"}
TALK_QUIET |= {"parked_tokens", "parked_bytes", "owns_cells", "trained", "capacity", "space"}
TALK_INSIDE = {"without_document", "read_for_many", "to_read", "room_after", "recall_for", "fill"}
TALK_INSIDE |= {"turns_from", "share_room", "shrink_parked", "move_down", "lose_cells", "adopt"}
TALK_INSIDE |= {"take_out", "put_back", "state", "take_over", "note"}


def public(kind: type) -> set[str]:
    return {
        name
        for name, member in inspect.getmembers(kind)
        if not name.startswith("_") and (inspect.isfunction(member) or isinstance(member, property))
    }


def test_every_public_call_is_looked_at() -> None:
    """Whoever adds one says here what it does once the engine is closed."""
    known = ENGINE_CALLS.keys() | ENGINE_QUIET | ENGINE_INSIDE
    assert public(LaserKV) == {name for name in known if not name.startswith("_")}
    known = TALK_CALLS.keys() | TALK_QUIET | TALK_INSIDE
    assert public(Conversation) == known | TALK_ADDED.keys()


@pytest.fixture(scope="module")
def saved_file(loaded: Loaded, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "talk.laserkv"
    with made(loaded) as engine:
        talk = engine.conversation(document=DOCUMENT, max_tokens=TOKENS)
        talk.read()
        talk.save(path)
    return path


@pytest.mark.parametrize("recall", ["off", "ram"])
def test_after_closing_every_call_says_so(recall: str, loaded: Loaded, saved_file: Path) -> None:
    with made(loaded, recall=recall) as engine:
        alone = Conversation(engine, document=DOCUMENT, max_tokens=TOKENS)
        alone.read()
        talk = engine.conversation(document=DOCUMENT, max_tokens=TOKENS)
        list(talk.ask(QUESTION))
        context, used = engine.context, talk.cells_used
    assert isinstance(context, Context)
    calls = [(engine, call) for call in ENGINE_CALLS.values()]
    calls += [(one, call) for one in (alone, talk) for call in TALK_CALLS.values()]
    calls += [(talk, call) for call in TALK_ADDED.values()]
    calls += [(context, call) for call in CONTEXT_CALLS]
    for subject, call in calls:
        with pytest.raises(Closed) as caught:
            call(subject, saved_file)
        assert "\n" not in str(caught.value)
    for name in ("texts", "turns", "parked_tokens", "documents", "space", "capacity"):
        getattr(talk, name)
    assert talk.cells_used == used
    assert engine.context is None
    assert not saved_file.with_suffix(".new").exists()
    engine.cancel()
    engine.close()
    context.close()
    talk.without_document()


CONTEXT_CALLS: list[Callable[[Any, Path], Any]] = [
    lambda context, _: context.handle,
    lambda context, _: context.memory,
    lambda context, _: context.decode([3], 0, 0),
    lambda context, _: context.clear(),
    lambda context, _: context.logits(),
    lambda context, _: context.on_worker(int),
]


def test_after_closing_a_model_every_call_says_so(loaded: Loaded) -> None:
    model = Model(loaded.path, gpu_layers=0, extra_buffers=False)
    model.close()
    model.close()
    uses: list[Callable[[], Any]] = [
        lambda: model.handle,
        lambda: model.metadata("general.name"),
        lambda: model.tokenize("tin"),
        lambda: model.piece(5),
        lambda: model.ends_generation(5),
        lambda: model.adds_bos,
        lambda: model.bos,
        lambda: model.description,
        lambda: Context(model, 64, OPTIONS),
        lambda: LaserKV(model),
    ]
    for use in uses:
        with pytest.raises(Closed, match=r"the model .* is closed"):
            use()


def test_a_model_is_freed_after_its_contexts(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closing it first bars what is new; what is under way is not robbed."""
    import llama_cpp as L

    order: list[str] = []
    for name in ("llama_free", "llama_model_free"):
        real = getattr(L, name)

        def free(address: Any, name: str = name, real: Any = real) -> None:
            order.append(name)
            real(address)

        monkeypatch.setattr(L, name, free)
    gc.collect()  # contexts of tests before
    model = Model(loaded.path, gpu_layers=0, extra_buffers=False)
    context = Context(model, 64, OPTIONS)
    with LaserKV(model, context=OPTIONS, **SETTINGS) as engine:
        engine.ask(QUESTION, max_tokens=1)
        model.close()
        assert order == []
        with pytest.raises(Closed, match=r"the model .* is closed"):
            engine.ask(QUESTION)
    assert order == ["llama_free"]
    context.close()
    assert order == ["llama_free", "llama_free", "llama_model_free"]


@pytest.mark.parametrize("of", ["engine", "context"])
def test_a_decode_has_returned_before_anything_is_freed(
    of: str, loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that looks at the flag late."""
    import llama_cpp as L

    gc.collect()  # contexts of tests before
    order: list[str] = []
    begun, decode, free = threading.Event(), L.llama_decode, L.llama_free

    def slow(*arguments: Any) -> int:
        begun.set()
        context = one.context if isinstance(one, LaserKV) else one
        while not (context and context.abort):
            time.sleep(0)
        status = int(decode(*arguments))
        order.append("decoded")
        return status

    monkeypatch.setattr(L, "llama_decode", slow)
    monkeypatch.setattr(L, "llama_free", lambda address: (order.append("freed"), free(address)))

    one = made(loaded) if of == "engine" else Context(loaded.model, 64, OPTIONS)

    def work() -> None:
        if isinstance(one, LaserKV):
            one.ask(QUESTION, document=DOCUMENT)
        else:
            one.decode(np.arange(3, 20, dtype=np.int32), 0, 0)

    def close() -> None:
        begun.wait()
        one.close()

    worked, _ = together(work, close)
    assert isinstance(worked, Closed if of == "engine" else Cancelled)
    assert order == ["decoded", "freed"]


def test_a_handle_waits_for_its_users() -> None:
    freed: list[int] = []
    handle = Handle(7, freed.append, "it")
    with handle as address, handle:
        handle.close()
        assert (address, freed) == (7, [])
        with pytest.raises(Closed), handle:
            pass
    assert freed == [7]
    handle.close()
    assert freed == [7]


# ---- answers and who reads them ------------------------------------------------------------------


def test_an_answer_left_for_another_question(loaded: Loaded) -> None:
    """Reading on is told; it does not end as if that had been all."""
    with made(loaded) as engine:
        expected = engine.ask(QUESTION, document=DOCUMENT, max_tokens=30)
        pieces = engine.stream(QUESTION, document=DOCUMENT, max_tokens=30)
        said = next(pieces)
        assert engine.ask(QUESTION, document=DOCUMENT, max_tokens=30).tokens == expected.tokens
        for _ in range(2):
            with pytest.raises(Cancelled) as caught:
                next(pieces)
            assert str(caught.value) == DROPPED
        assert expected.text.startswith(said)
        pieces.close()
        assert in_cache(engine) > 0


def test_an_answer_that_is_closed_just_ends(loaded: Loaded) -> None:
    with made(loaded) as engine:
        pieces = engine.stream(QUESTION, document=DOCUMENT, max_tokens=30)
        next(pieces)
        pieces.close()
        assert list(pieces) == []
        unread = engine.stream(QUESTION, document=DOCUMENT, max_tokens=30)
        unread.close()
        assert list(unread) == []
        assert len(engine.ask(QUESTION, max_tokens=3).tokens) == 3


def test_an_answer_that_is_closed_by_another_thread(loaded: Loaded) -> None:
    """As a server does whose client has gone, while the document is still read."""
    begun = threading.Event()
    with made(loaded) as engine:
        expected = engine.ask(QUESTION, document=DOCUMENT, max_tokens=TOKENS).tokens
        pieces = engine.stream(
            QUESTION, document=DOCUMENT * 30, on_progress=lambda _: begun.set(), max_tokens=LONG
        )

        def close() -> None:
            begun.wait()
            pieces.close()

        read, _ = together(lambda: list(pieces), close)
        assert isinstance(read, Cancelled)
        assert engine.ask(QUESTION, document=DOCUMENT, max_tokens=TOKENS).tokens == expected


def test_an_answer_that_is_closed_before_its_turn(loaded: Loaded) -> None:
    """It is not read when its turn comes, and the one whose turn it is goes on."""
    with made(loaded) as engine:
        begun, waits, read = threading.Event(), threading.Event(), []
        first = engine.stream(QUESTION, document=DOCUMENT, max_tokens=TOKENS)
        later = engine.stream(QUESTION, document=DOCUMENT, on_progress=read.append)
        real = engine.access.enter

        def enter(stream: Any, resident: Any = None) -> Any:
            waits.set()
            return real(stream, resident)

        def one() -> int:
            next(first)
            begun.set()
            engine.access.enter = enter  # type: ignore[method-assign]
            waits.wait()
            later.unwanted = True  # `close` waits until it has seen that
            return 1 + len(list(first))

        def other() -> list[str]:
            begun.wait()
            return list(later)

        got, cancelled = together(one, other)
        assert got > 1
        assert isinstance(cancelled, Cancelled)
        assert read == []


def test_nobody_waits_for_an_answer_that_is_forgotten(loaded: Loaded) -> None:
    """It ends with its last reference, not when the garbage is collected."""
    gc.disable()
    try:
        with made(loaded) as engine:
            pieces: Answer | None = engine.stream(QUESTION, document=DOCUMENT, max_tokens=LONG)
            assert pieces is not None
            next(pieces)
            pieces = None
            asked = together(lambda: engine.ask(QUESTION, max_tokens=3))
            assert len(asked[0].tokens) == 3
    finally:
        gc.enable()


@pytest.mark.parametrize("together_with_streams", [False, True])
def test_many_calls_from_many_threads(together_with_streams: bool, loaded: Loaded) -> None:
    """96 from 8 threads, as one thread alone gets them."""
    documents = [DOCUMENT[n : n + 150] for n in range(8)]
    with made(loaded) as engine:
        expected = [engine.ask(QUESTION, document=d, max_tokens=4).tokens for d in documents]

        def work(number: int) -> list[list[int]]:
            found = []
            for turn in range(12):
                document = documents[(number + turn) % 8]
                pieces = engine.stream(QUESTION, document=document, max_tokens=4)
                if together_with_streams and turn % 3 == 0:
                    next(engine.stream(QUESTION, document=document, max_tokens=LONG))
                list(pieces)
                found.append(pieces.reply.tokens)
            return found

        got = together(*[lambda number=number: work(number) for number in range(8)])  # type: ignore[misc]
    for number, found in enumerate(got):
        assert found == [expected[(number + turn) % 8] for turn in range(12)]


class Moment:
    """Lets another thread act when it has been called so often."""

    def __init__(self, calls: int, act: Callable[[], Any]) -> None:
        self.calls, self.act, self.passed = calls, act, False

    def __call__(self, _: object = None) -> None:
        self.calls -= 1
        if self.calls < 0 and not self.passed:
            self.passed = True
            self.act()


def cancelled_again_and_again(engine: LaserKV, times: int) -> int:
    """Asks, is cancelled by another thread at ever other moments, and asks again."""
    settings: dict[str, Any] = {"document": DOCUMENT[:200], "max_tokens": TOKENS}
    expected = engine.ask(QUESTION, **settings).tokens
    stopped = 0
    begin, ended = threading.Barrier(2), threading.Barrier(2)

    def cancel() -> None:
        for _ in range(times):
            begin.wait(PATIENCE)
            engine.cancel()
            ended.wait(PATIENCE)

    thread = threading.Thread(target=cancel, daemon=True)
    thread.start()
    for number in range(times):
        moment = Moment(number % 12, lambda: begin.wait(PATIENCE))
        try:
            reply = engine.ask(QUESTION, on_progress=moment, on_text=moment, **settings)
            assert reply.tokens == expected
        except Cancelled:
            stopped += 1
        if not moment.passed:  # it ended before
            moment.calls = 0
            moment()
        ended.wait(PATIENCE)
        if number % 10 == 9:
            assert engine.ask(QUESTION, **settings).tokens == expected
    thread.join(PATIENCE)
    assert not thread.is_alive()
    return stopped


def test_many_cancels(loaded: Loaded) -> None:
    """300: while it reads, while it answers, and after its end; never a wrong answer."""
    with made(loaded) as engine:
        assert 100 < cancelled_again_and_again(engine, 300) <= 300


@pytest.mark.long
@pytest.mark.parametrize("policy", ["laser", "snapkv", "full"])
def test_thousands_of_cancels(policy: str, loaded: Loaded) -> None:
    with made(loaded, policy=policy) as engine:
        assert cancelled_again_and_again(engine, 3000) > 1000


def test_cancelled_while_the_cache_grows(loaded: Loaded) -> None:
    """The conversation keeps what it had: it is moved into the larger context all the same."""
    with made(loaded, ratio=1.0) as engine:
        talk = engine.conversation(document=DOCUMENT[:100], max_tokens=TOKENS)
        talk.read()
        before = engine.context
        real = engine._open_context

        def open_context(cells: int) -> None:
            engine.cancel()
            real(cells)

        engine._open_context = open_context  # type: ignore[method-assign]
        with pytest.raises(Cancelled):
            talk.add("more", DOCUMENT * 12)
        engine._open_context = real  # type: ignore[method-assign]
        assert engine.context is not before
        asked = talk.ask(QUESTION)
        list(asked)
        with made(loaded, ratio=1.0) as other:
            alone = other.conversation(document=DOCUMENT[:100], max_tokens=TOKENS)
            alone.read()
            expected = alone.ask(QUESTION)
            list(expected)
        assert asked.reply.tokens == expected.reply.tokens


# ---- other processes ----------------------------------------------------------------------------

FORKS = """
engine = made(recall="disk", recall_file={file!r})
expected = engine.ask(QUESTION, document=DOCUMENT, max_tokens=6).tokens
talk = engine.conversation(document=DOCUMENT, max_tokens=6)
talk.read()
half = engine.stream(QUESTION, document=DOCUMENT, max_tokens=1000) if {half} else None
if half:
    next(half)
else:
    talk.read()

def child(way):
    for call in (
        lambda: engine.ask(QUESTION),
        lambda: engine.stream(QUESTION),
        lambda: engine.conversation(document=DOCUMENT),
        lambda: engine.configure(ratio=0.5),
        lambda: engine.load({file!r}),
        lambda: engine.plan(10, 1, 1),
        lambda: engine.__enter__(),
        lambda: talk.read(),
        lambda: list(talk.ask(QUESTION)),
        lambda: talk.reset(),
        lambda: talk.save({file!r}),
        lambda: next(half or talk.ask(QUESTION)),
        lambda: engine.context.on_worker(int),
        lambda: engine.model.tokenize("tin"),
    ):
        assert "process" in refused(call)
    engine.cancel()
    engine.close()
    engine.context.close()
    if half:
        half.close()
    if way == 1:  # everything goes by itself
        global_names = globals()
        for name in ("engine", "talk", "half"):
            global_names[name] = None
    with made() as own:
        assert own.ask(QUESTION, document=DOCUMENT, max_tokens=6).tokens == expected
    if way == 2:
        os._exit(0)
    sys.exit(0)

for way in range(4):
    sys.stdout.flush()
    pid = forked()
    if pid == 0:
        child(way)
    _, status = os.waitpid(pid, 0)
    assert status == 0, status
    assert os.path.exists({file!r})
    if half and way < 3:
        next(half)  # the parent's answer goes on
    elif not half:
        list(talk.ask(QUESTION))
assert engine.ask(QUESTION, document=DOCUMENT, max_tokens=6).tokens == expected
engine.close()
assert not os.path.exists({file!r})
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("half", [False, True])
def test_forks(half: bool, loaded: Loaded, tmp_path: Path) -> None:
    """Four each: the child is told by every call, and ends; the parent goes on."""
    path = str(tmp_path / "rows")
    process(loaded, FORKS.format(half=half, file=path, patience=PATIENCE))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_while_another_thread_asks(loaded: Loaded) -> None:
    """Its locks are held in the child by a thread that is not there."""
    process(
        loaded,
        f"""
engine, begun = made(), threading.Event()
def ask():
    try:
        engine.ask(QUESTION, document=DOCUMENT, max_tokens={LONG}, on_text=lambda _: begun.set())
    except Closed:
        pass
thread = threading.Thread(target=ask)
thread.start()
begun.wait()
engine.access._state.acquire()
engine.model.memory._lock.acquire()
pid = forked()
if pid == 0:
    other = threading.Thread(  # not the thread that holds the locks
        target=lambda: [refused(engine.ask, QUESTION), refused(engine.model.tokenize, "tin"),
                        engine.cancel(), engine.close()]
    )
    other.start()
    other.join()
    sys.exit(0)
engine.model.memory._lock.release()
engine.access._state.release()
assert os.waitpid(pid, 0)[1] == 0
engine.close()
thread.join()
""",
    )


EXITS = {
    "nothing under way": "engine.ask(QUESTION, document=DOCUMENT, max_tokens=6)",
    "an open stream": """
stream = engine.stream(QUESTION, document=DOCUMENT, max_tokens=LONG)
next(stream)
""",
    "an open stream in a cycle": """
class Holder: pass
holder = Holder()
holder.me, holder.stream = holder, engine.stream(QUESTION, document=DOCUMENT, max_tokens=LONG)
next(holder.stream)
del engine
""",
    "a thread that asks": """
begun = threading.Event()
def ask():
    engine.ask(QUESTION, document=DOCUMENT, max_tokens=LONG, on_text=lambda _: begun.set())
threading.excepthook = lambda error: None
thread = threading.Thread(target=ask, daemon=True)
thread.start()
begun.wait()
""",
    "a thread that is waited for": """
begun = threading.Event()
def ask():
    engine.ask(QUESTION, document=DOCUMENT, max_tokens=60, on_text=lambda _: begun.set())
threading.Thread(target=ask).start()
begun.wait()
""",
    "a callback that never returns": """
import laserkv_gguf.engine.access
laserkv_gguf.engine.access._PATIENCE = 0.1
begun = threading.Event()
def block(_):
    begun.set()
    threading.Event().wait()
def ask():
    engine.ask(QUESTION, document=DOCUMENT, on_progress=block)
threading.Thread(target=ask, daemon=True).start()
begun.wait()
""",
    "a context without an engine": """
from laserkv_gguf.llama.context import Context
context = Context(engine.model, 64, OPTIONS)
context.on_worker(int)
""",
    "used at the very end": """
class Last:
    def __del__(self, refused=refused, engine=engine):
        assert refused(engine.ask, "?") == "the engine is closed; make a new LaserKV"
last = Last()
engine.ask(QUESTION, document=DOCUMENT, max_tokens=6)
""",
    "an exception": """
import atexit
stream = engine.stream(QUESTION, document=DOCUMENT, max_tokens=LONG)
next(stream)
sys.exit(0)
""",
}

EXIT = """
for name, code in {exits!r}.items():
    pid = forked()  # from a process without a thread, which saves importing everything again
    if pid == 0:
        engine, LONG = made(), {long}
        exec(code, globals())
        sys.exit(0)
    print(name, os.waitpid(pid, 0)[1], flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_the_end_of_the_process(loaded: Loaded) -> None:
    said = process(loaded, EXIT.format(exits=EXITS, patience=PATIENCE, long=LONG))
    assert said.splitlines() == [f"{name} 0" for name in EXITS]


@pytest.mark.parametrize("how", ["an open stream", "a thread that asks"])
def test_the_end_of_a_process_of_its_own(how: str, loaded: Loaded) -> None:
    assert process(loaded, f"engine, LONG = made(), {LONG}\n{EXITS[how]}") == ""


def test_made_when_the_process_has_ended(loaded: Loaded) -> None:
    """After everything that was open has been closed: nobody waits for its threads."""
    late = """
import atexit
@atexit.register
def late():
    global engine
    try:
        engine = made()
        engine.ask(QUESTION, document=DOCUMENT, max_tokens=6)
    except RuntimeError:  # newer Pythons start no thread any more
        pass
"""
    process(loaded, "", late)


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
def test_closed_by_a_signal_handler(loaded: Loaded) -> None:
    """As a service does on SIGTERM; while the main thread reads, answers, and waits its turn."""
    process(
        loaded,
        f"""
for moment in ("on_progress", "on_text", "waiting"):
    engine = made()
    signal.signal(signal.SIGTERM, lambda *_: engine.close())
    kill = lambda *_: os.kill(os.getpid(), signal.SIGTERM)
    if moment == "waiting":
        stream, begun = engine.stream(QUESTION, document=DOCUMENT, max_tokens={LONG}), []
        thread = threading.Thread(target=lambda: begun.append(next(stream)))
        thread.start()
        thread.join()
        real = engine.access.enter
        def enter(*answer):
            threading.Thread(target=kill).start()
            return real(*answer)
        engine.access.enter = enter
        refused(engine.ask, QUESTION)
    else:
        refused(lambda: engine.ask(
            QUESTION, document=DOCUMENT, max_tokens={LONG}, **{{moment: kill}}
        ))
    assert engine.access.closed
""",
    )


# ---- the thread that decodes --------------------------------------------------------------------


def dead(worker: Worker) -> Worker:
    """As if it had died: it ends without having been told to by `close`."""
    worker._jobs.put(None)
    worker._thread.join()
    return worker


def test_a_dead_worker_is_noticed() -> None:
    worker = dead(Worker("dies"))
    with pytest.raises(LaserKVError, match="the thread that decodes has died") as caught:
        worker.run(int)
    assert "\n" not in str(caught.value)
    worker.close()
    worker.close()
    with pytest.raises(Closed):
        worker.run(int)


def test_a_worker_that_dies_at_its_work() -> None:
    worker, begun = Worker("dies"), threading.Event()
    worker._jobs.put(None)  # it is gone when it comes to the job
    worker._thread.join()
    begun.set()
    for _ in range(2):
        with pytest.raises(LaserKVError, match="has died"):
            worker.run(begun.wait)


def test_an_engine_whose_worker_died(loaded: Loaded) -> None:
    """One line for every question, and it can be closed."""
    with made(loaded) as engine:
        engine.ask(QUESTION, document=DOCUMENT, max_tokens=TOKENS)
        assert engine.context is not None
        dead(engine.context._worker)
        for _ in range(2):
            with pytest.raises(LaserKVError, match="has died; close the engine"):
                engine.ask(QUESTION, document=DOCUMENT, max_tokens=TOKENS)


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
def test_ctrl_c_twice_waits_for_the_work(loaded: Loaded) -> None:
    """What is being written to must not be let go of."""
    process(
        loaded,
        """
import time
from laserkv_gguf.llama.worker import Worker
worker, stopped, pressed, ended = Worker("w"), threading.Event(), threading.Event(), []
def work():
    os.kill(os.getpid(), signal.SIGINT)
    pressed.wait()
    ended.append("work")
def stop():
    stopped.set()
def press():
    stopped.wait()
    for _ in range(3):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)  # longer than one wait; if shorter, nothing is tested and nothing fails
    pressed.set()
threading.Thread(target=press).start()
try:
    worker.run(work, stop=stop)
except KeyboardInterrupt:
    ended.append("raised")
assert ended == ["work", "raised"], ended
""",
    )


# ---- what is parked on a disk -------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "truncate"), reason="needs truncate")
@pytest.mark.parametrize("mode", ["replay", "shortlist"])
def test_a_recall_file_that_is_cut_short(mode: str, loaded: Loaded, tmp_path: Path) -> None:
    """One line instead of SIGBUS, for every question until the document is read again."""
    path = tmp_path / "rows"
    process(
        loaded,
        f"""
engine = made(recall="disk", recall_mode={mode!r}, recall_file={str(path)!r})
talk = engine.conversation(document=DOCUMENT, max_tokens=6)
talk.read()
first = "".join(talk.ask(QUESTION))
for size in (5000, 0):
    os.truncate({str(path)!r}, size)
    for question in ("What of tin?", "And copper?"):
        try:
            list(talk.ask(question))
        except LaserKVError as error:
            assert "cut short while it was in use" in str(error) and "\\n" not in str(error)
        else:
            raise AssertionError("not noticed")
talk.read()
assert "".join(talk.ask(QUESTION)) == first
engine.close()
assert not os.path.exists({str(path)!r})
""",
    )
