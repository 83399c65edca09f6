"""Several conversations on one context, against conversations that had a context to themselves."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from test_session import DOCUMENT, OPTIONS, TEMPLATE, Loaded, turn
from tiny import TinySpec

from laserkv_gguf.api import LaserKV
from laserkv_gguf.conversation.conversation import Conversation
from laserkv_gguf.errors import UserError
from laserkv_gguf.llama import rows
from laserkv_gguf.llama.context import ContextOptions

MIB = 1 << 20
SPEC = TinySpec(layers=2, ctx_train=4096, chat_template=TEMPLATE)
RECALL = {"recall": "ram", "read_policy": "random", "ratio": 0.3}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    one = Loaded(tmp_path_factory.mktemp("residents"), SPEC)
    yield one
    one.model.close()


def engine_of(loaded: Loaded, **settings: Any) -> LaserKV:
    context = {
        key: settings.pop(key) for key in ("type_k", "type_v", "flash_attn") if key in settings
    }
    settings = {"block_size": 64, "ratio": 0.4, "lookahead": 3, "recall": "off", **settings}
    return LaserKV(loaded.model, context=replace(OPTIONS, **context), **settings)


def document(number: int) -> str:
    """Every conversation's own."""
    return f"The number of house {number} is {number * 37 % 101}. " + DOCUMENT[number * 11 :]


def question(number: int, asked: int) -> str:
    return f"Which number has house {number}, for the {asked}. time?"


def rows_of(conversation: Conversation) -> list[NDArray[Any]]:
    """Positions, keys and values of a conversation's sequence, by position."""
    cells = conversation.cells
    cells.settle()
    form = rows.known(cells.context)
    found = rows.take(cells.context, form, cells.main.number)
    order = np.argsort(found.positions)
    return [found.positions[order], found.keys[:, order], found.values[:, order]]


SETTINGS: dict[str, dict[str, Any]] = {
    "f16": {"type_k": "f16", "type_v": "f16"},
    "flash": {"type_k": "f16", "type_v": "f16", "flash_attn": "on"},
    "q8_0": {"type_k": "q8_0", "type_v": "q8_0", "flash_attn": "on"},
    "replay": {"policy_options": {"shares": "equal"}, **RECALL, "recall_mode": "replay"},
    "shortlist": {**RECALL, "recall_mode": "shortlist"},
    "compact": {"positions": "compact"},
    "compact recall": {**RECALL, "positions": "compact"},
}


def logits(conversation: Conversation) -> NDArray[np.float32]:
    following = np.array([7, 8], np.int32)
    return conversation.log_probabilities(np.array([5, 6], np.int32), following)


@pytest.mark.parametrize(
    ("kind", "residents", "questions"),
    [
        *((kind, 1, 24) for kind in SETTINGS),
        *((kind, 2, 100 if kind == "f16" else 24) for kind in SETTINGS),
        *(pytest.param(kind, 1, 100, marks=pytest.mark.long) for kind in SETTINGS),
    ],
)
def test_eight_conversations_where_not_all_have_room(
    kind: str, residents: int, questions: int, loaded: Loaded
) -> None:
    """Asked in random order, each answers as if it had a context to itself.

    One at a time the logits are equal bit for bit. One of two stands in other cells than alone.
    Without flash attention llama.cpp adds up 16 cells or more at a time, each in a lane of its own:
    logits differ by rounding where a token comes into another lane, and tokens do not. Flash
    attention passes over other conversations' cells and adds in the order of cells: bit for bit
    again with one thread, for as long as that order is as it was alone, which it is here. (Several
    threads share the cells out by how many are in use.) Of a hundred questions to two, 11 have
    other last bits with flash attention and 93 without (f16); all have the same tokens.
    """
    settings, eight = SETTINGS[kind], range(8)
    order = np.random.default_rng(7).integers(0, 8, questions).tolist()
    alone: dict[int, list[tuple[list[int], NDArray[np.float32]]]] = {n: [] for n in eight}
    for number in eight:
        with engine_of(loaded, **settings) as engine:
            talk = engine.conversation(document=document(number), max_tokens=4)
            for asked in range(order.count(number)):
                tokens = turn(talk, question(number, asked)).tokens
                alone[number].append((tokens, logits(talk)))
    with engine_of(loaded, residents=residents, aside=MIB // 4, **settings) as engine:
        talks = [engine.conversation(document=document(n), max_tokens=4) for n in eight]
        done, places = [0] * 8, set[str]()
        for number in order:
            talk, (tokens, expected) = talks[number], alone[number][done[number]]
            assert turn(talk, question(number, done[number])).tokens == tokens
            found = logits(talk)
            if residents == 1 or settings.get("flash_attn") == "on":
                assert np.array_equal(found, expected)
            else:
                assert np.allclose(found, expected, atol=1e-3)
            done[number] += 1
            assert len(engine.residents.inside) <= residents
            places |= {engine.residents.where(one) for one in talks}
        assert {"cache", "memory", "disk"} <= places


@pytest.mark.parametrize("kind", list(SETTINGS))
@pytest.mark.parametrize("limit", [1 << 30, 0])
def test_what_was_put_aside_comes_back_bit_for_bit(kind: str, limit: int, loaded: Loaded) -> None:
    with engine_of(loaded, aside=limit, **SETTINGS[kind]) as engine:
        first = engine.conversation(document=document(1), max_tokens=6)
        turn(first, question(1, 0))
        before, ledger = rows_of(first), first.ledger.rows
        engine.ask("And?", document=document(2), max_tokens=4)
        assert engine.residents.where(first) == ("memory" if limit else "disk")
        with engine.access.alone():
            engine.come_back(first)
        assert engine.residents.where(first) == "cache"
        for given, found in zip(before, rows_of(first), strict=True):
            assert np.array_equal(given, found)
        assert np.array_equal(ledger, first.ledger.rows)


def test_without_aside_cells_are_lost_as_before(loaded: Loaded) -> None:
    with engine_of(loaded) as engine:
        talk = engine.conversation(document=document(1), max_tokens=4)
        turn(talk, "What?")
        engine.ask("And?", document=document(2), max_tokens=4)
        assert engine.residents.where(talk) == "lost"
        with pytest.raises(UserError, match="cache is gone"):
            turn(talk, "What?")
        talk.read()
        assert turn(talk, "What?").tokens


def test_each_may_take_an_equal_part_of_the_cells(loaded: Loaded) -> None:
    """Two grow as far as half of the context, and turns age within it."""
    with engine_of(loaded, ctx_size=1200, residents=2, aside=MIB, ratio=0.2) as engine:
        talks = [engine.conversation(document=document(n), max_tokens=12) for n in (1, 2)]
        for asked in range(30):
            for number, talk in enumerate(talks, 1):
                turn(talk, question(number, asked))
                assert talk.cells_used <= 600
                assert sum(one.cells_used for one in talks) <= 1200
        assert all(talk.thinnings for talk in talks)
        assert {engine.residents.where(talk) for talk in talks} == {"cache"}


def test_cells_that_are_too_few_are_said_in_all(loaded: Loaded) -> None:
    with (
        engine_of(loaded, ctx_size=400, residents=2, ratio=0.9) as engine,
        pytest.raises(UserError, match=r"use ctx_size=\d+") as refused,
    ):
        engine.ask("What?", document=document(1), max_tokens=100)
    wanted = int(str(refused.value).split("use ctx_size=")[1].split(",")[0])
    with engine_of(loaded, ctx_size=wanted, residents=2, ratio=0.9) as engine:
        engine.ask("What?", document=document(1), max_tokens=100)


def test_a_context_that_grows_takes_everybody_along(loaded: Loaded) -> None:
    with engine_of(loaded, residents=3, aside=0) as engine:
        first = engine.conversation(document=document(1)[:300], max_tokens=4)
        turn(first, "What?")
        before, cells = rows_of(first), engine.context.cells  # type: ignore[union-attr]
        second = engine.conversation(document=document(2), max_tokens=4)
        turn(second, "What?")
        second.add("more", document(3) * 4)
        assert engine.context.cells > cells  # type: ignore[union-attr]
        assert engine.residents.where(first) == "cache"
        for given, found in zip(before, rows_of(first), strict=True):
            assert np.array_equal(given, found)
        assert turn(first, "What?").tokens


def test_a_conversation_nobody_knows_is_not_kept_aside(loaded: Loaded) -> None:
    with engine_of(loaded, aside=1 << 30) as engine:
        talk = engine.conversation(document=document(1), max_tokens=4)
        turn(talk, "What?")
        del talk
        for number in range(2, 6):
            engine.ask("What?", document=document(number), max_tokens=4)
            gc.collect()
        kept = engine.conversation(document=document(1), max_tokens=4)
        turn(kept, "What?")
        engine.ask("What?", document=document(2), max_tokens=4)
        assert engine.residents.aside is not None
        assert engine.residents.aside.bytes <= len(kept.ledger) * engine.cell_bytes * 1.5 + 4096


def test_a_full_disk_loses_that_conversation_alone(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    with engine_of(loaded, aside=0) as engine:
        first = engine.conversation(document=document(1), max_tokens=4)
        turn(first, "What?")
        aside = engine.residents.aside
        assert aside is not None

        def full(_state: Any) -> Any:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patched:
            patched.setattr(aside, "_written", full)
            second = engine.conversation(document=document(2), max_tokens=4)
            expected = turn(second, "What?").tokens
        assert engine.residents.where(first) == "lost"
        with pytest.raises(UserError, match="cache is gone"):
            turn(first, "What?")
        assert engine.residents.where(second) == "cache"
        second.reset()
        assert turn(second, "What?").tokens == expected


def test_answers_beside_others_that_stand_in_the_cache(loaded: Loaded) -> None:
    """`parallel` has sequences of its own; residents keep theirs."""
    from laserkv_gguf.conversation.parallel import Question, answer

    questions = [Question(f"Which {n}?", max_tokens=4) for n in range(5)]
    options = {"document": document(4), "parallel": 3, "read_once": True}
    with engine_of(loaded) as engine:
        expected: dict[int, Any] = {}
        answer(engine, questions, expected.__setitem__, **options)
    with engine_of(loaded, residents=3, aside=0) as engine:
        talks = [engine.conversation(document=document(n), max_tokens=4) for n in (1, 2)]
        for talk in talks:
            turn(talk, "What?")
        before = [rows_of(talk) for talk in talks]
        found: dict[int, Any] = {}
        answer(engine, questions, found.__setitem__, **options)
        assert {n: r.tokens for n, r in found.items()} == {n: r.tokens for n, r in expected.items()}
        for talk, held in zip(talks, before, strict=True):
            with engine.access.alone():
                engine.come_back(talk)
            for given, now in zip(held, rows_of(talk), strict=True):
                assert np.array_equal(given, now)


def test_refused(loaded: Loaded) -> None:
    with pytest.raises(UserError, match="at least 1 conversation"):
        engine_of(loaded, residents=0)
    with pytest.raises(UserError, match="bytes of memory"):
        engine_of(loaded, aside=-1)


KILLED = """
import os, signal, sys
from laserkv_gguf import ContextOptions, LaserKV
engine = LaserKV(sys.argv[1], context=ContextOptions(threads=1), block_size=64, aside=0)
talk = engine.conversation(document="tin and ore. " * 60, max_tokens=4)
"".join(talk.ask("What?"))
talk.save(sys.argv[2])
aside = engine.residents.aside
real = aside._written
def written(state):
    file = real(state)
    os.kill(os.getpid(), signal.SIGKILL)
    return file
aside._written = written
engine.ask("And?", document="sea. " * 100, max_tokens=2)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_killed_while_one_is_put_aside(loaded: Loaded, tmp_path: Path) -> None:
    """Files put aside have no names, so nothing is left behind; what was saved before is whole."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    saved = tmp_path / "talk.laserkv"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(loaded.model.path), str(saved)],
        env=environment,
        capture_output=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    folder = tmp_path / "laserkv-gguf" / "aside"
    assert folder.is_dir()
    assert list(folder.iterdir()) == []
    options = ContextOptions(threads=1)
    with LaserKV(loaded.model, context=options, block_size=64) as engine:
        talk = engine.conversation(document="tin and ore. " * 60, max_tokens=4)
        turn(talk, "What?")
        expected = turn(talk, "And?").tokens
        assert turn(engine.load(saved, max_tokens=4), "And?").tokens == expected
