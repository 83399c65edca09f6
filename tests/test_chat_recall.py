"""Recall as conversations have it by themselves: where rows go, and what happens without room."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray
from test_engine import standing
from test_session import DOCUMENT, SPEC, Loaded, turn

from laserkv_gguf import machine, policies
from laserkv_gguf.api import LaserKV
from laserkv_gguf.conversation.parallel import Question, answer
from laserkv_gguf.llama.sequence import PROBE
from laserkv_gguf.planning import parking
from laserkv_gguf.planning.parking import Room
from laserkv_gguf.policies import Candidates, Needs, Policy
from laserkv_gguf.policies.laser import PAPER_OPTIONS
from laserkv_gguf.reading.asking import Asker
from laserkv_gguf.recall import disk

ROOT = Path(__file__).resolve().parents[1]
QUESTIONS = ("What is ore?", "Where is tin9?", "And copper17, where?")
ROW = 2 * SPEC.layers * SPEC.kv_heads * SPEC.head_dim * 4  # keys and values of a token, float32
NONE, AMPLE = Room(0, 0), Room(1 << 40, 1 << 40)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    one = Loaded(tmp_path_factory.mktemp("chat-recall"), SPEC)
    yield one
    one.model.close()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files of parked rows go here."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def talked(engine: LaserKV) -> list[Any]:
    talk = engine.conversation(document=DOCUMENT, max_tokens=4)
    talk.read()
    return [turn(talk, question) for question in QUESTIONS]


# ---- where rows go -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "place"), [(0, "ram"), (10, "ram"), (11, "disk"), (99, "disk"), (100, "off")]
)
def test_memory_then_disk_then_nowhere(size: int, place: str) -> None:
    assert Room(10, 99).place(size) == place


@pytest.mark.parametrize(
    ("limit", "held", "coming", "memory"),
    [
        (None, 0, 0, 250),
        (None, 200, 0, 100),  # of the 1200 that would be free without them
        (None, 0, 600, 100),
        (None, 0, 5000, 0),
        (None, 900, 0, 0),
        (400, 0, 0, 400),
        (400, 300, 0, 100),
        (0, 0, 0, 0),
        (5000, 0, 0, 1000),  # no more than there is
    ],
)
def test_a_quarter_of_what_is_free(
    limit: int | None, held: int, coming: int, memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "free_ram", lambda: 1000)
    assert parking.room(limit, held=held, coming=coming).memory == memory


def test_where_free_memory_is_not_known_rows_go_to_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "free_ram", lambda: None)
    found = parking.room()
    assert found.memory == 0 < found.disk


def test_conversations_recall_and_single_questions_do_not(loaded: Loaded) -> None:
    with loaded.engine() as engine:
        found = talked(engine)
        alone = engine.ask(QUESTIONS[0], document=DOCUMENT, max_tokens=4)
    with loaded.engine(recall="ram") as engine:
        wanted = talked(engine)
    with loaded.engine(recall="off") as engine:
        without = talked(engine)
        asked = engine.ask(QUESTIONS[0], document=DOCUMENT, max_tokens=4)
    assert [reply.tokens for reply in found] == [reply.tokens for reply in wanted]
    assert [reply.account.recall for reply in found] == ["ram"] * 3
    assert found[0].account.recalled_tokens > 0
    assert [reply.account.recall for reply in without] == ["off"] * 3
    assert (alone.account.recall, alone.tokens) == ("off", asked.tokens)
    assert alone.account.ctx_cells == asked.account.ctx_cells


def test_beyond_the_limit_on_disk(loaded: Loaded) -> None:
    with loaded.engine() as engine:
        wanted = talked(engine)
    with loaded.engine(recall_limit=ROW * 100) as engine:
        found = talked(engine)
    assert {reply.account.recall for reply in found} == {"disk"}
    assert [reply.tokens for reply in found] == [reply.tokens for reply in wanted]


def test_rows_of_all_documents_count_together(loaded: Loaded) -> None:
    with loaded.engine(recall_limit=ROW * 500) as engine:
        talk = engine.conversation(documents={"a": DOCUMENT, "b": DOCUMENT[:300]}, max_tokens=4)
        talk.read()
        talk.add("c", DOCUMENT[:400])
        kinds = [recaller.store.kind for recaller in talk.sources.recallers]
        assert kinds == ["disk", "disk", "ram"] or kinds == ["ram", "ram", "disk"]
        in_memory = sum(
            recaller.store.bytes
            for recaller in talk.sources.recallers
            if recaller.store.kind == "ram"
        )
        assert in_memory <= ROW * 500


def test_without_room_one_line_says_what_follows(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(parking, "room", lambda *_, **__: NONE)
    with loaded.engine() as engine:
        found = talked(engine)
        talked(engine)  # is not told again
    assert {reply.account.recall for reply in found} == {"off"}
    (line,) = [r.getMessage() for r in caplog.records if "recall is off" in r.getMessage()]
    assert "/read QUESTION" in line
    assert "\n" not in line


def test_counted_cells_that_are_too_few(loaded: Loaded, caplog: pytest.LogCaptureFixture) -> None:
    """Recall would need a whole block beside the turns: the conversation goes on without."""
    with loaded.engine(ctx_size=176, ratio=0.25) as engine:
        found = talked(engine)
    assert {reply.account.recall for reply in found} == {"off"}
    assert "--ctx-size 176 has no room for it" in caplog.text


@pytest.mark.parametrize("name", ["keydiff", "streamingllm", "full"])
def test_policies_that_nothing_comes_back_for(
    name: str, loaded: Loaded, caplog: pytest.LogCaptureFixture
) -> None:
    with loaded.engine(policy=name) as engine:
        assert {reply.account.recall for reply in talked(engine)} == {"off"}
    assert "recall" not in caplog.text


def test_a_policy_that_is_nothing_without(loaded: Loaded) -> None:
    with loaded.engine(policy="infllm") as engine:
        assert engine.ask(QUESTIONS[0], document=DOCUMENT, max_tokens=2).account.recall == "ram"
        assert {reply.account.recall for reply in talked(engine)} == {"ram"}


# ---- a disk that fills, memory that is short ---------------------------------------------------


def test_the_disk_fills_in_the_middle(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What was asked for is refused; what is on by itself goes on without, and says so."""
    real, written = disk._write_at, 0

    def full(handle: int, rows: Any, at: int) -> None:
        nonlocal written
        written += rows.nbytes
        if written > ROW * 150:  # in the third block
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle, rows, at)

    monkeypatch.setattr(disk, "_write_at", full)
    with loaded.engine(recall_limit=0) as engine:
        found = talked(engine)
        assert engine._context is not None
    assert {reply.account.recall for reply in found} == {"off"}
    assert [len(reply.tokens) for reply in found] == [4, 4, 4]
    assert "recall is off from here on" in caplog.text
    assert "is full" in caplog.text
    # as if nothing had ever been parked
    with loaded.engine(recall="off", policy="keydiff") as engine:
        expected = talked(engine)[0]
    assert found[0].account.kept_tokens == expected.account.kept_tokens


CHILD = """
import logging, resource, sys
from pathlib import Path
from laserkv_gguf import ContextOptions, LaserKV
model, spare, text = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]).read_text()
logging.basicConfig(format="%(message)s")
options = ContextOptions(batch_size=1024, type_k="f32", type_v="f32", threads=1)
with LaserKV(model, gpu_layers=0, block_size=1024, ratio=0.1, context=options) as engine:
    warm = engine.conversation(document=text[:3000], max_tokens=2)  # threads, kernels, the cache
    "".join(warm.ask("What?"))
    warm.drop("document")
    lines = Path("/proc/self/status").read_text().splitlines()
    size = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmSize:"))
    resource.setrlimit(resource.RLIMIT_AS, (size + spare, resource.RLIM_INFINITY))
    talk = engine.conversation(document=text, max_tokens=2)
    answer = talk.ask("What?")
    "".join(answer)
    print(answer.reply.account.recall, answer.reply.account.recalled_tokens > 0)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits as Linux has them")
@pytest.mark.parametrize(("disk_there", "place"), [(True, "disk"), (False, "off")])
def test_a_limit_on_address_space(
    disk_there: bool, place: str, loaded: Loaded, tmp_path: Path
) -> None:
    """Rows of 12 MiB where 40 MiB are left: more than a quarter, so they do not go to memory."""
    text, spare = tmp_path / "text", 40 << 20
    tokens = (12 << 20) // ROW
    text.write_text((DOCUMENT * (tokens // len(DOCUMENT) + 1))[:tokens])
    folder = tmp_path / "cache"
    if not disk_there:  # a file where the folder would be: nothing can be written below it
        folder = Path("/proc/none")
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(loaded.path), str(spare), str(text)],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "XDG_CACHE_HOME": str(folder),
            "OPENBLAS_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.stdout.split() == [place, str(place == "disk")], done.stderr
    assert ("recall is off" in done.stderr) == (place == "off")


# ---- a question in the middle of a reading -----------------------------------------------------


@dataclass(frozen=True)
class Switching(Policy):
    """On paper: `keydiff` before a block, `laser` from there on."""

    name: ClassVar[str] = "switching"
    needs: ClassVar[Needs] = policies.make("laser", **PAPER_OPTIONS).needs
    at: int = 2

    def select(self, candidates: Candidates, budget: int) -> NDArray[np.int64]:
        late = policies.make("laser", **PAPER_OPTIONS)
        return (late if candidates.index >= self.at else policies.make("keydiff")).select(
            candidates, budget
        )


@pytest.mark.parametrize("at", [0, 2, 5])
def test_the_rest_is_read_with_the_question(at: int, loaded: Loaded) -> None:
    """As if it had been known all along, to a policy that looked at it from a block on only."""
    settings: dict[str, Any] = {"lookahead": 0, "read_policy": "keydiff"}
    with loaded.engine(**settings, policy_options=PAPER_OPTIONS) as engine:
        blocks: list[int] = []

        def asks() -> str | None:
            blocks.append(1)
            return QUESTIONS[1] if len(blocks) > at else None

        talk = engine.conversation(document=DOCUMENT, max_tokens=4)
        found = talk.read(asks=asks).kept
        assert len(blocks) == at + 1  # once it is there nobody asks for it again
        assert turn(talk, QUESTIONS[1]).account.recall == "ram"
    policy = f"{__name__}:Switching"
    with loaded.engine(
        **settings, policy=policy, policy_options={"at": at}, recall="off"
    ) as engine:
        talk = engine.conversation(document=DOCUMENT, max_tokens=4)
        wanted = talk.read(question=QUESTIONS[1]).kept
    np.testing.assert_array_equal(found, wanted)


def test_a_question_that_never_comes(loaded: Loaded) -> None:
    with loaded.engine() as engine:
        talk = engine.conversation(document=DOCUMENT, max_tokens=4)
        found = talk.read(asks=lambda: None).kept
        np.testing.assert_array_equal(found, talk.read().kept)


def test_a_question_without_room_waits(loaded: Loaded) -> None:
    """A question that does not fit beside a block is answered all the same, later."""
    long = "What " * 40
    with loaded.engine(ctx_size=330, ratio=0.25, recall="off") as engine:
        talk = engine.conversation(document=DOCUMENT, max_tokens=4)
        talk.read(asks=lambda: long)
        assert len(turn(talk, "What?").tokens) == 4


# ---- follow-ups, and many questions ------------------------------------------------------------


def test_the_probe_of_a_later_question_sees_the_conversation(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []
    real = Asker.ask

    def ask(self: Asker, *args: Any, **options: Any) -> Any:
        if options.get("shared"):
            seen.append(standing(self.context, PROBE))
        return real(self, *args, **options)

    monkeypatch.setattr(Asker, "ask", ask)
    with loaded.engine() as engine:
        talk = engine.conversation(document=DOCUMENT, max_tokens=4)
        talk.read()
        turn(talk, QUESTIONS[0])
        ledger = talk.ledger
        said = ledger.position[ledger.of_kind("turn")].tolist()
        seen.clear()
        turn(talk, "and where is that?")
    assert said
    assert seen
    assert all(set(said) <= set(positions) for positions in seen)


def test_many_questions_read_their_document_once(loaded: Loaded) -> None:
    """Each answered as a conversation's first one is; one alone is asked while reading."""
    questions = [Question(text, max_tokens=4) for text in QUESTIONS]
    replies: dict[int, Any] = {}
    with loaded.engine() as engine:
        spent = answer(engine, questions, replies.__setitem__, document=DOCUMENT)
        assert spent.readings == 1
        for number, text in enumerate(QUESTIONS):
            talk = engine.conversation(document=DOCUMENT, max_tokens=4)
            talk.read()
            wanted = turn(talk, text)
            assert replies[number].tokens == wanted.tokens
            assert replies[number].account.recall == "ram"
        alone: dict[int, Any] = {}
        answer(engine, questions[:1], alone.__setitem__, document=DOCUMENT)
        assert alone[0].account.recall == "off"
        assert alone[0].tokens == engine.ask(QUESTIONS[0], document=DOCUMENT, max_tokens=4).tokens


def test_many_questions_where_nothing_can_be_parked(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The document is read for each of them, as before."""
    monkeypatch.setattr(parking, "room", lambda *_, **__: NONE)
    replies: dict[int, Any] = {}
    with loaded.engine() as engine:
        questions = [Question(text, max_tokens=4) for text in QUESTIONS]
        spent = answer(engine, questions, replies.__setitem__, document=DOCUMENT)
        assert spent.readings == 3
        for number, text in enumerate(QUESTIONS):
            wanted = engine.ask(text, document=DOCUMENT, max_tokens=4)
            assert replies[number].tokens == wanted.tokens
