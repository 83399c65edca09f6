"""A night in small: two thousand questions, many of them stopped; nothing is left of them."""

from __future__ import annotations

import gc
import os
import random
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_session import DOCUMENT, OPTIONS, SPEC, Loaded

from laserkv_gguf.api import LaserKV
from laserkv_gguf.errors import Cancelled

PATIENCE = 3000.0
MIB = 1 << 20
DOCUMENTS, THREADS, STAY = 200, 8, 20


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    one = Loaded(tmp_path_factory.mktemp("night"), SPEC)
    yield one
    one.model.close()


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


class Night:
    """Asks by several threads; a fifth of the answers, and some readings, are stopped."""

    def __init__(self, engine: LaserKV) -> None:
        self.engine, self.random = engine, random.Random(1)
        self.talks: dict[int, Any] = {}
        self.lock = threading.Lock()
        self.stopped = self.answered = 0

    def ask(self, count: int) -> None:
        """So many questions; what was read before stays only while there is room for it."""
        left = iter(range(count))
        errors: list[BaseException] = []

        def work() -> None:
            try:
                while not errors:
                    with self.lock:
                        if next(left, None) is None:
                            return
                        draw = [self.random.random() for _ in range(4)]
                    self.one(*draw)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, daemon=True) for _ in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
            assert not thread.is_alive(), "hangs"
        assert errors == []

    def one(self, which: float, kind: float, stop: float, when: float) -> None:
        number = int(which * DOCUMENTS)
        text = f"House {number} has {number * 7} doors. " + DOCUMENT[number % 150 :][:120]
        seen = [0]
        limit = 1 + int(when * 6) if stop < 0.2 else 0

        def count(_: Any) -> None:
            seen[0] += 1
            if seen[0] == limit:
                answer.stop()

        if kind < 0.5:
            answer = self.engine.stream("How many?", document=text, max_tokens=4, on_progress=count)
        else:
            with self.lock:
                talk = self.talks.pop(number, None)
            if talk is None:
                talk = self.engine.conversation(document=text, max_tokens=4)
            answer = talk.ask("How many?")
        try:
            with answer:
                for piece in answer:
                    count(piece)
            with self.lock:
                self.answered += 1
        except Cancelled:
            with self.lock:
                self.stopped += 1
        if kind >= 0.5:
            with self.lock:
                self.talks[number] = talk
                while len(self.talks) > STAY:
                    del self.talks[next(iter(self.talks))]

    def taken(self) -> tuple[int, int, int]:
        """Bytes of memory, open files and threads, when everybody has gone."""
        self.talks.clear()
        self.engine.configure()
        gc.collect()
        return resident(), len(list(Path("/proc/self/fd").iterdir())), threading.active_count()


@pytest.mark.long
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc")
def test_a_night_in_small(loaded: Loaded, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with LaserKV(
        loaded.model,
        context=OPTIONS,
        ctx_size=4096,
        residents=5,
        parallel=4,
        aside=MIB,
        block_size=64,
        ratio=0.4,
        lookahead=3,
        lookup=4,
    ) as engine:
        night = Night(engine)
        night.ask(100)
        before = night.taken()
        night.ask(1900)
        after = night.taken()
        print(f"\nanswered {night.answered}, stopped {night.stopped}: {before} -> {after}")
        assert night.answered + night.stopped == 2000
        assert night.stopped > 100
        assert after[0] < before[0] + 16 * MIB
        assert after[1:] == before[1:]
