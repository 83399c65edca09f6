"""Many clients, several keys, and a server that is killed: on this machine alone, and bounded.

`LASERKV_LOAD` says for how many seconds, and `LASERKV_KILLS` how often it is killed.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections import Counter
from pathlib import Path

import openai
import pytest
from serving import Served
from test_server import FLAGS, SPEC, account, ask, cached, user
from tiny import make

SECONDS = float(os.environ.get("LASERKV_LOAD", "120"))
KILLS = int(os.environ.get("LASERKV_KILLS", "5"))
KEYS = ("one", "two")
BOOKS = [" ".join(f"Shelf {b} holds the jar {n * b}." for n in range(30)) for b in range(2, 8)]
GROWTH = 400 << 20  # bytes that a server may take beyond what it has after its first answers


class Load:
    """What the clients know together.

    Attributes:
        asked: how often (key, book) was sent so far: another key's are none of its.
        safe: those that were answered from what was kept, so that they are on disk.
        wrong: what must not be.
    """

    def __init__(self) -> None:
        self.url = ""
        self.asked: Counter[tuple[str, int]] = Counter()
        self.safe: set[tuple[str, int]] = set()
        self.wrong: list[str] = []
        self.answers = self.lost = 0
        self.lock = threading.Lock()
        self.ended = threading.Event()

    def client(self, number: int) -> None:
        rng = random.Random(number)
        while not self.ended.is_set():
            key, url = rng.choice(KEYS), self.url
            client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=300)
            try:
                rng.choice((self.question, self.question, self.chat, self.leave))(client, key, rng)
                with self.lock:
                    self.answers += 1
            except (openai.APIConnectionError, openai.InternalServerError):
                with self.lock:
                    self.lost += 1  # it was killed, or is about to start
                time.sleep(0.2)
            except Exception as error:
                self.wrong.append(f"{type(error).__name__}: {error}")

    def question(self, client: openai.OpenAI, key: str, rng: random.Random) -> None:
        book = rng.randrange(len(BOOKS))
        with self.lock:
            safe = (key, book) in self.safe
            self.asked[key, book] += 1
        answer = ask(client, user(f"{BOOKS[book]}\n\nWhich jar is {rng.randrange(99)}?"))
        with self.lock:
            alone = self.asked[key, book] == 1  # a question sent later may have come first
        if cached(answer) and alone:
            self.wrong.append(f"book {book} was found before {key} sent it")
        if safe and not cached(answer):
            self.wrong.append(f"book {book} of {key} was lost: {account(answer)['found']}")
        if cached(answer):
            with self.lock:
                self.safe.add((key, book))

    def chat(self, client: openai.OpenAI, key: str, rng: random.Random) -> None:
        ask(client, user(f"I say {rng.random()}"), temperature=1.0, seed=rng.randrange(99))

    def leave(self, client: openai.OpenAI, key: str, rng: random.Random) -> None:
        book = " ".join(f"Page {n} of {rng.random()}." for n in range(60))
        stream = ask(client, user(f"{book}\n\nWhat?"), stream=True, max_tokens=64)
        for _, _ in zip(range(rng.randrange(3)), stream, strict=False):
            pass
        stream.close()


def memory(served: Served) -> int:
    """Resident bytes of a server."""
    for line in Path(f"/proc/{served.process.pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


@pytest.mark.long
def test_mixed_load_and_kills(tmp_path: Path) -> None:
    tiny, load = make(tmp_path, spec=SPEC), Load()
    flags = [*FLAGS, "--cache-dir", str(tmp_path / "cache"), "--parallel", "3"]
    for key in KEYS:
        flags += ["--api-key", key]
    rng = random.Random(0)
    # daemons: they would go on for ever where this fails
    clients = [threading.Thread(target=load.client, args=(n,), daemon=True) for n in range(6)]
    most: list[int] = []
    ends = time.monotonic() + SECONDS
    for life in range(KILLS + 1):
        with Served(tiny.path, *flags) as one:
            load.url = one.url
            if not life:
                for thread in clients:
                    thread.start()
            span = (ends - time.monotonic()) / (KILLS + 1 - life)
            until = time.monotonic() + span * (1 if life == KILLS else rng.uniform(0.5, 1.2))
            first = 0
            while time.monotonic() < until:
                time.sleep(0.5)
                first = first or memory(one)
                most.append(memory(one) - first)
            assert "Traceback" not in one.said, one.said
            if life == KILLS:
                load.ended.set()
                for thread in clients:
                    thread.join()
                # at rest again
                assert not load.wrong, load.wrong[:5]
                assert one.end() == 0
    print(
        f"{load.answers} answers, {load.lost} cut off by {KILLS} kills, "
        f"{len(load.safe)} documents safe, grew by {max(most) >> 20} MiB at most"
    )
    assert load.answers
    assert max(most) < GROWTH
