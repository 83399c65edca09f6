"""Recall against a session on paper: NumPy forward passes in which evicted tokens are hidden.

`Paper` reads a document, chooses for every question what recall should choose, and answers, with
nothing of the code under test but the policies' own `select` (tested elsewhere) and SimHash planes.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import llama_cpp as L
import numpy as np
import pytest
import tiny
from numpy.typing import NDArray
from test_session import (
    DOCUMENT,
    OPTIONS,
    SPEC,
    Loaded,
    first_turn,
    in_cache,
    next_turn,
    turn,
)
from tiny import forward

from laserkv_gguf import machine as memory
from laserkv_gguf import policies
from laserkv_gguf.api import LaserKV
from laserkv_gguf.budget import Budget
from laserkv_gguf.cli.app import run
from laserkv_gguf.conversation.conversation import Conversation
from laserkv_gguf.errors import Cancelled, LaserKVError, UserError
from laserkv_gguf.kernels import planes, pool, top_k
from laserkv_gguf.kernels.hamming import hamming_votes
from laserkv_gguf.llama import rows
from laserkv_gguf.llama.context import Context
from laserkv_gguf.llama.sequence import MAIN, SPARE, Sequence
from laserkv_gguf.planning.settings import RecallSettings
from laserkv_gguf.policies import Candidates
from laserkv_gguf.policies.laser import PAPER_OPTIONS
from laserkv_gguf.reading.asking import Asked
from laserkv_gguf.recall import disk
from laserkv_gguf.recall.disk import DiskStore
from laserkv_gguf.recall.recaller import Recaller
from laserkv_gguf.recall.store import Store

WHOLE = {"values": "norm", "softmax": "all", "over": "max"}
ENDING = len("\n[assistant]")
QUESTIONS = ("What is ore?", "Where is tin9?", "And copper17, where?")
RECALL: dict[str, Any] = {
    "block_size": 64,
    "ratio": 0.3,
    "lookahead": 2,
    "recall": "ram",
    "read_policy": "random",
}
TEXT = DOCUMENT[:130]  # for `Paper`, whose forward passes take their time
ANSWER = 2


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    one = Loaded(tmp_path_factory.mktemp("recall"), SPEC)
    yield one
    one.model.close()


def recalling(loaded: Loaded, **settings: Any) -> LaserKV:
    return LaserKV(loaded.model, context=OPTIONS, **{**RECALL, **settings})


class Paper:
    """A conversation as it should be."""

    def __init__(self, loaded: Loaded, mode: str, **settings: Any) -> None:
        self.loaded, self.mode = loaded, mode
        options = settings.get("policy_options", {})
        self.policy = policies.make(settings.get("policy", "laser"), seed=0, **options)
        self.tokens = list(first_turn("", TEXT)[0])
        self.count = len(self.tokens)
        self.budget = self.policy.budget(self.count, 40, 0.3, 4)
        assert isinstance(self.budget, Budget)
        self.sees = np.tri(self.count, dtype=bool)
        self.kept: set[int] = set()
        self.pending: list[int] = []
        self._read()

    def _read(self) -> None:
        """With the seeded policy `random`, which needs nothing but the candidates' numbers."""
        chooser = policies.make("random", seed=0)
        inside: set[int] = set()
        for block in self.budget.blocks:
            inside |= set(range(block.start, block.end))
            if block.evicts:
                first, last = block.candidates
                tokens = np.array(sorted(t for t in inside if first <= t < last))
                seen = Candidates(tokens, (block.start, block.end), block.index)
                chosen = {int(tokens[i]) for i in chooser.select(seen, block.pool)}
                gone = set(tokens.tolist()) - chosen
                self.sees[np.ix_(range(block.end, self.count), sorted(gone))] = False
                inside -= gone
        self.kept = inside

    def forward(self, more: list[int], seen: set[int]) -> tiny.Forward:
        """Everything so far and more tokens, which see only these of the document."""
        before = len(self.sees)
        sees = np.tri(before + len(more), dtype=bool)
        sees[:before, :before] = self.sees
        hidden = [token for token in range(self.count) if token not in seen]
        sees[before:, hidden] = False
        self.last = sees
        tokens = self.tokens + more
        return forward(self.loaded.weights, self.loaded.spec, tokens, visible=sees)

    def queries(self, asked: list[int], seen: set[int], drafts: int) -> NDArray[np.float32]:
        """Of the question's end and its drafts; `probed` is what their forward pass computed."""
        asking = len(asked)
        if self.policy.needs.probe_tokens:
            asking = min(self.policy.needs.probe_tokens + ENDING, asking)
        tokens = list(asked)
        for _ in range(drafts):
            tokens.append(int(self.forward(tokens, seen).logits[-1].argmax()))
        self.probed = self.forward(tokens, seen)
        found = self.probed.queries[:, -(asking + drafts) :]
        return np.ascontiguousarray(found, np.float32)

    @property
    def read(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Keys of the document's tokens, as they were read, and lengths of their values."""
        seen = self.sees[: self.count, : self.count]
        tokens = self.tokens[: self.count]
        found = forward(self.loaded.weights, self.loaded.spec, tokens, visible=seen)
        norms = np.linalg.norm(found.values, axis=-1)
        return np.asarray(found.keys, np.float32), np.asarray(norms, np.float32)

    def candidates(
        self,
        tokens: NDArray[np.int64],
        block: tuple[int, int, int],
        queries: NDArray[np.float32],
        others: set[int],
        memory: dict[str, Any],
    ) -> Candidates:
        """What the policy sees: `others` of the document count, the conversation and the asking."""
        keys, norms = self.read
        total, asking = self.probed.keys.shape[1], queries.shape[1]
        columns = np.array([*sorted(others), *range(self.count, total)])
        wide = np.repeat(self.probed.keys[:, columns], SPEC.heads // SPEC.kv_heads, axis=2)
        logits = np.einsum("lthd,lchd->lthc", queries.astype(float), wide) / SPEC.head_dim**0.5
        rows = np.arange(total - asking, total)
        hidden = (columns[None] > rows[:, None])[None, :, None]
        outside = np.log(np.where(hidden, 0, np.exp(logits)).sum(axis=-1))
        return Candidates(
            tokens,
            block[:2],
            block[2],
            queries,
            keys[:, tokens],
            memory=memory,
            value_norms=norms[:, tokens],
            outside=outside.astype(np.float32),
        )

    def ask(self, question: str) -> list[int]:
        prompt = first_turn(question)[1] if len(self.tokens) == self.count else next_turn(question)
        asked = self.pending + prompt
        self.kept = self.replay(asked) if self.mode == "replay" else self.shortlist(asked)
        answer = list(asked)
        for _ in range(ANSWER):
            answer.append(int(self.forward(answer, self.kept).logits[-1].argmax()))
        self.forward(answer[:-1], self.kept)
        self.sees, self.tokens = self.last, self.tokens + answer[:-1]
        self.pending = answer[-1:]
        return answer[-ANSWER:]

    def replay(self, asked: list[int]) -> set[int]:
        inside: set[int] = set()
        memory: dict[str, Any] = {}  # of this question alone
        window = set(range(self.count - self.budget.window, self.count))
        for block in self.budget.blocks:
            inside |= set(range(block.start, block.end))
            if not block.evicts:
                continue
            first, last = block.candidates
            queries = self.queries(asked, inside | window, 2)
            tokens = np.array(sorted(t for t in inside if first <= t < last))
            others = (inside | window) - set(range(first, last))
            span = block.start, block.end, block.index
            seen = self.candidates(tokens, span, queries, others, memory)
            chosen = {int(tokens[i]) for i in self.policy.select(seen, block.pool)}
            inside = (inside - set(tokens.tolist())) | chosen
        return inside

    def shortlist(self, asked: list[int]) -> set[int]:
        anchors, end = self.budget.anchors, self.count - self.budget.window
        ends = {*range(anchors), *range(end, self.count)}
        room, keys = self.budget.kept - len(ends), self.read[0]
        for drafts in (0, 2):
            queries = self.queries(asked, self.kept, drafts)
            votes = pool(self.votes(queries, keys), 15)
            near = anchors + top_k(votes[anchors:end], 2 * room)
            seen = self.candidates(near, (anchors, end, 0), queries, ends, {})
            self.kept = ends | {int(near[i]) for i in self.policy.select(seen, room)}
        return self.kept

    def votes(self, queries: NDArray[np.float32], keys: NDArray[np.float32]) -> NDArray[Any]:
        """Every query votes for the tokens nearest to it by the signs of 128 projections."""
        layers, count, kv_heads, dim = keys.shape
        directions = planes(dim, 64, 2, 0)
        centred = keys - keys[:, :40].mean(axis=1, keepdims=True)
        votes = np.zeros(count)
        for layer in range(layers):
            for head in range(queries.shape[2]):
                kv_head = head // (queries.shape[2] // kv_heads)
                signs = centred[layer, :, kv_head] @ directions.T >= 0
                for query in queries[layer, :, head]:
                    apart = (signs != (directions @ query >= 0)).sum(axis=1)
                    limit = np.sort(apart)[max(1, int(0.03 * count)) - 1]
                    near = apart <= limit
                    votes += near * ((1 << 24) // int(near.sum()))
        result: NDArray[Any] = votes / votes.sum()
        return result


# ---- what is chosen, and what is answered ------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "settings"),
    [
        ("replay", {}),
        ("replay", {"policy": "finch", "positions": "original"}),
        ("replay", {"policy": "snapkv"}),
        ("replay", {"policy_options": PAPER_OPTIONS}),
        ("replay", {"policy_options": {**WHOLE, "shares": "equal"}}),
        ("replay", {"policy_options": {**WHOLE, "shares": "one", "over": "sum"}}),
        ("shortlist", {}),
        ("shortlist", {"policy_options": {**PAPER_OPTIONS, "pool": 15}}),
        ("shortlist", {"policy_options": {**WHOLE, "shares": "equal"}}),
    ],
    ids=str,
)
def test_every_question_gets_its_own_tokens(
    mode: str, settings: dict[str, Any], loaded: Loaded
) -> None:
    """Two turns: what is kept for each, and the greedy answers."""
    with recalling(loaded, block_size=40, recall_mode=mode, **settings) as engine:
        talk = engine.conversation(document=TEXT, max_tokens=ANSWER)
        talk.read()
        assert talk.reading is not None
        paper = Paper(loaded, mode, **settings)
        assert set(talk.reading.kept.tolist()) == paper.kept
        held = []
        for question in QUESTIONS[:2]:
            reply = turn(talk, question)
            expected = paper.ask(question)
            assert set(talk.reading.kept.tolist()) == paper.kept
            assert reply.tokens == expected
            assert in_cache(engine) == talk.cells_used
            held.append(frozenset(paper.kept))
    assert len(set(held)) == 2


@pytest.mark.parametrize("positions", ["original", "compact"])
def test_earlier_questions_leave_no_trace(positions: str, loaded: Loaded) -> None:
    """Replay: a question asked again, with others in between, keeps and says the same."""
    with recalling(loaded, positions=positions) as engine:
        talk = engine.conversation(document=DOCUMENT, max_tokens=8)
        kept, answers = [], []
        for question in (QUESTIONS[0], QUESTIONS[1], QUESTIONS[2], QUESTIONS[0]):
            talk.reset()
            answers.append(turn(talk, question).tokens)
            assert talk.reading is not None
            kept.append(talk.reading.kept.tolist())
    assert kept[0] == kept[3] != kept[1]
    assert answers[0] == answers[3]


def test_what_ask_read_for_its_question_is_recalled_for_the_next(loaded: Loaded) -> None:
    with recalling(loaded) as engine:
        talk = engine.conversation(document=DOCUMENT, max_tokens=4)
        first = "".join(talk.begin(QUESTIONS[0]))
        assert first
        recalled = talk.recall(QUESTIONS[1])
        assert recalled is not None
        assert recalled.moved_in == recalled.moved_out > 0
        assert talk.reading is not None
        assert np.array_equal(recalled.kept, talk.reading.kept)
    with recalling(loaded, recall="off") as engine:
        talk = engine.conversation(document=DOCUMENT, max_tokens=4)
        assert "".join(talk.begin(QUESTIONS[0])) == first
        assert talk.recall(QUESTIONS[1]) is None


def test_a_short_document_is_all_there(loaded: Loaded) -> None:
    with recalling(loaded) as engine:
        talk = engine.conversation(document=DOCUMENT[:30], max_tokens=4)
        account = turn(talk, QUESTIONS[0]).account
        assert (account.recall, account.parked_tokens) == ("off", 0)


def test_account(loaded: Loaded) -> None:
    tokens = len(first_turn("")[0])
    with recalling(loaded, recall_mode="shortlist") as engine:
        talk = engine.conversation(document=DOCUMENT, max_tokens=4)
        account = turn(talk, QUESTIONS[0]).account
        row = 2 * SPEC.kv_heads * SPEC.head_dim * 4 + SPEC.kv_heads * 4  # and its value's length
        signatures = SPEC.kv_heads * 128 // 8
        assert account.parked_bytes == tokens * SPEC.layers * (row + signatures)
        assert account.parked_tokens == account.document_tokens == tokens
        assert (account.recall, account.recall_mode) == ("ram", "shortlist")
        assert 0 < account.recalled_tokens <= account.kept_tokens
        assert 1 <= account.recall_calls <= 2
        assert 0 < account.recall_seconds < account.first_token_seconds


# ---- moving --------------------------------------------------------------------------------------


def whole(recaller: Recaller) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """What the main sequence holds: positions in order, keys, values."""
    taken = rows.take(recaller.reader.context, recaller.form, MAIN)
    order = np.argsort(taken.positions)
    return taken.positions[order], taken.keys[:, order], taken.values[:, order]


@pytest.mark.parametrize(
    "types", [("f16", "f16", "off"), ("f16", "f16", "on"), ("q8_0", "q8_0", "on")], ids="-".join
)
@pytest.mark.parametrize("where", ["ram", "disk"])
def test_any_number_of_moves_is_no_move(
    types: tuple[str, str, str], where: str, loaded: Loaded
) -> None:
    """Three hundred arrangements; with everything back, logits are those of never evicting."""
    keys, values, flash = types
    options = replace(OPTIONS, type_k=keys, type_v=values, flash_attn=flash)
    random = np.random.default_rng(2)
    document, asked = (np.array(part, np.int32) for part in first_turn(QUESTIONS[0]))
    settings = {**RECALL, "recall": where}
    with LaserKV(loaded.model, context=options, ctx_size=1024, **settings) as engine:
        run = engine.prepare(Conversation(engine), len(document), 0, 64, question_known=False)
        recaller = engine.recaller(run)
        assert recaller is not None
        context, count = run.reader.context, len(document)
        for block in run.budget.blocks:  # read without evicting
            context.decode(document[block.start : block.end], block.start, MAIN)
            recaller.park(block, block.start)
        recaller._position_of[:] = np.arange(count)
        before = [part.copy() for part in whole(recaller)]
        Sequence(context, MAIN).share_with(Sequence(context, SPARE))
        context.decode(asked, count, SPARE, outputs=1)
        expected = context.logits()
        Sequence(context, SPARE).remove()
        first, last = recaller.movable
        for move in range(300):
            inside = random.random(count) < random.random()
            inside[:first] = inside[last:] = True
            tokens = np.flatnonzero(inside)
            recaller.arrange((tokens, tokens))
            if move % 50 == 0:
                positions, *now = whole(recaller)
                assert np.array_equal(positions, tokens)
                for given, found in zip(before[1:], now, strict=True):
                    assert np.array_equal(given[:, tokens], found)
        recaller.restore(np.arange(count))
        for given, found in zip(before, whole(recaller), strict=True):
            assert np.array_equal(given, found)
        context.clear()
        recaller._position_of[:] = -1
        recaller.restore(np.arange(count))
        context.decode(asked, count, MAIN, outputs=1)
        assert np.array_equal(context.logits(), expected)
        recaller.close()


def test_only_what_changes_is_moved(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """One state call for tokens that come, one removal a run of those that go, else none."""
    with recalling(loaded) as engine:
        talk = engine.conversation(document=DOCUMENT, max_tokens=4)
        talk.read()
        recaller = talk.sources.recallers[0]
        assert recaller is not None
        put: list[list[int]] = []
        removed: list[tuple[int, int]] = []
        original_put, original_remove = rows.put, Sequence.remove

        def watched_put(context: Context, built: rows.Rows, sequence: int) -> None:
            put.append(built.positions.tolist())
            original_put(context, built, sequence)

        def watched_remove(self: Sequence, start: int = -1, end: int = -1) -> None:
            if self.number == MAIN:
                removed.append((start, end))
            original_remove(self, start, end)

        monkeypatch.setattr(rows, "put", watched_put)
        monkeypatch.setattr(Sequence, "remove", watched_remove)
        kept = recaller.kept
        recaller.arrange((kept, kept))
        assert not put
        assert not removed
        first, last = recaller.movable
        inner = kept[(kept >= first) & (kept < last)]
        out = np.setdiff1d(np.arange(first, last), kept)
        changed = np.sort(np.concatenate((np.setdiff1d(kept, inner[:3]), out[[0, 5, 9]])))
        recaller.arrange((changed, changed))
        assert put == [out[[0, 5, 9]].tolist()]
        assert sum(end - start for start, end in removed) == 3


def test_compacted_rows_are_turned_once(loaded: Loaded) -> None:
    """Keys in the cache are parked keys, rotated from where they stood; values are the same bits.

    And the turns in between are not touched.
    """
    with recalling(loaded, positions="compact") as engine:
        talk = engine.conversation(document=DOCUMENT, max_tokens=6)
        turn(talk, QUESTIONS[0])
        recaller = talk.sources.recallers[0]
        assert recaller is not None
        begins = recaller.next_position
        positions, keys, values = whole(recaller)
        turns = [part[:, positions >= begins].copy() for part in (keys, values)]
        assert np.array_equal(
            positions[positions >= begins], np.arange(begins, talk.cells.position)
        )
        talk.recall(QUESTIONS[1])
        positions, keys, values = whole(recaller)
        for given, part in zip(turns, (keys, values), strict=True):
            assert np.array_equal(given, part[:, positions >= begins])
        assert talk.reading is not None
        kept = talk.reading.kept
        held = positions < begins
        anchors_and_pool = recaller.movable[1]
        early = int(np.count_nonzero(kept < anchors_and_pool))
        assert positions[held][:early].tolist() == list(range(early))  # no gaps
        assert positions[held][-1] == begins - 1
        parked = recaller.form.keys(recaller.store.keys(kept))
        angles = tiny._angles(SPEC, positions[held] - recaller.store.positions[kept], None)
        expected = np.stack([tiny._rope(SPEC, layer.astype(float), angles) for layer in parked])
        now = recaller.form.keys(keys[:, held])
        assert np.abs(expected - now).max() < 1e-3 * np.abs(expected).max()
        flat = np.ascontiguousarray(values[:, held]).reshape(SPEC.layers, len(kept), -1)
        assert np.array_equal(flat, recaller.store._values[:, kept])
        assert int(positions.max()) < engine._context.cells  # type: ignore[union-attr]


def test_compacted_and_quantised_is_refused(tmp_path: Path) -> None:
    one = Loaded(tmp_path, replace(SPEC, head_dim=64))
    options = replace(OPTIONS, type_k="q8_0", type_v="q8_0", flash_attn="on")
    with LaserKV(one.model, context=options, positions="compact", **RECALL) as engine:
        talk = engine.conversation(document=DOCUMENT)
        with pytest.raises(UserError, match=r'quantised keys.*type_k="f16".*recall="off"'):
            talk.read()
        assert not engine.residents.inside
    with LaserKV(one.model, context=options, positions="original", **RECALL) as engine:
        assert turn(engine.conversation(document=DOCUMENT, max_tokens=3), QUESTIONS[0]).tokens
    one.model.close()


@pytest.mark.parametrize("mode", ["replay", "shortlist"])
@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("failure", ["interrupt", "cancel", "full"])
def test_stopped_half_way_the_cache_is_what_it_was(
    mode: str, positions: str, failure: str, loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    with recalling(loaded, recall_mode=mode, positions=positions) as engine:
        talk = engine.conversation(document=DOCUMENT, max_tokens=4)
        turn(talk, QUESTIONS[0])
        recaller, context = talk.sources.recallers[0], engine._context
        assert recaller is not None
        assert context is not None
        before, likely = whole(recaller), talk.log_likelihood(QUESTIONS[1], "tin")
        original_decode, original_put = Context.decode, rows.put
        decodes = puts = 0

        def decode(self: Context, *args: Any, **options: Any) -> None:
            nonlocal decodes
            decodes += 1
            if decodes == (5 if mode == "replay" else 2):
                if failure == "interrupt":
                    raise KeyboardInterrupt
                if failure == "cancel":
                    engine.cancel()
            original_decode(self, *args, **options)

        def put(*args: Any) -> None:
            nonlocal puts
            puts += 1
            if puts == (3 if mode == "replay" else 2) and failure == "full":
                raise LaserKVError("no room")
            original_put(*args)

        monkeypatch.setattr(Context, "decode", decode)
        monkeypatch.setattr(rows, "put", put)
        stopped = {"interrupt": KeyboardInterrupt, "cancel": Cancelled, "full": LaserKVError}
        with pytest.raises(stopped[failure]):
            turn(talk, QUESTIONS[1])
        monkeypatch.undo()
        for given, found in zip(before, whole(recaller), strict=True):
            assert np.array_equal(given, found)
        assert in_cache(engine) == talk.cells_used
        context.resume()
        assert talk.log_likelihood(QUESTIONS[1], "tin") == pytest.approx(likely, abs=1e-5)
        assert turn(talk, QUESTIONS[1]).tokens


def test_little_room_is_enough(loaded: Loaded) -> None:
    """With just the cells that are planned, the last question's tokens make way; same choice."""
    kept = []
    for size in (None, 1500):
        with recalling(loaded, ctx_size=size) as engine:
            talk = Conversation(engine, document=DOCUMENT, max_tokens=30)
            for question in QUESTIONS:
                turn(talk, question)
            assert talk.reading is not None
            kept.append(talk.reading.kept.tolist())
    with recalling(loaded) as engine:
        tokens = len(first_turn("")[0])
        budget = engine.budget(tokens)
        least = budget.kept + engine.recall_cells(budget) + 170
    with recalling(loaded, ctx_size=least) as engine:
        talk = Conversation(engine, document=DOCUMENT, max_tokens=30)
        for question in QUESTIONS:
            turn(talk, question)
        assert talk.reading is not None
        kept.append(talk.reading.kept.tolist())
    assert kept[0] == kept[1] == kept[2]
    with recalling(loaded, ctx_size=budget.kept + 40) as engine:
        talk = Conversation(engine, document=DOCUMENT, max_tokens=30)
        with pytest.raises(UserError, match=r"ctx_size=\d+ is too small"):
            talk.read()


# ---- where rows are parked -----------------------------------------------------------------------


def test_ram_and_disk_are_the_same(loaded: Loaded, tmp_path: Path) -> None:
    path = tmp_path / "rows"
    answers = []
    for settings in ({}, {"recall": "disk"}, {"recall": "disk", "recall_file": str(path)}):
        with recalling(loaded, **settings) as engine:
            talk = engine.conversation(document=DOCUMENT, max_tokens=6)
            answers.append([turn(talk, question).tokens for question in QUESTIONS])
            assert path.exists() == ("recall_file" in settings)
            if path.exists():
                assert path.stat().st_mode & 0o077 == 0
    assert answers[0] == answers[1] == answers[2]
    assert not path.exists()


def test_reading_again_starts_the_file_anew(loaded: Loaded, tmp_path: Path) -> None:
    path = tmp_path / "rows"
    with recalling(loaded, recall="disk", recall_file=str(path)) as engine:
        talk = engine.conversation(document=DOCUMENT, max_tokens=4)
        first = turn(talk, QUESTIONS[0]).tokens
        talk.read()
        assert turn(talk, QUESTIONS[0]).tokens == first
        other = engine.conversation(document=DOCUMENT, max_tokens=4)
        assert turn(other, QUESTIONS[0]).tokens == first
        with pytest.raises(UserError, match="cache is gone"):
            turn(talk, QUESTIONS[0])
    assert not path.exists()


def test_memory_that_cannot_hold_the_rows(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_ram", lambda: 1 << 20)
    with recalling(loaded) as engine:
        talk = engine.conversation(document=DOCUMENT * 4)
        with pytest.raises(UserError) as raised:
            talk.read()
    tokens = len(first_turn("", DOCUMENT * 4)[0])
    size = tokens * SPEC.layers * 2 * SPEC.kv_heads * SPEC.head_dim * 4
    message = str(raised.value)
    assert "\n" not in message
    for part in (f"{tokens} tokens", f"{size} bytes", "1.0 MiB", 'recall="disk"', 'type_k="q8_0"'):
        assert part in message


def test_memory_is_told_on_linux() -> None:
    if not Path("/proc/meminfo").exists():
        assert memory.free_ram() is None
        return
    free = memory.free_ram()
    assert free is not None
    assert 1 << 20 < free < 1 << 50


FULL = """
import resource, sys
import numpy as np
from laserkv_gguf.errors import LaserKVError
from laserkv_gguf.recall.disk import DiskStore
if sys.argv[2] == "start":
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    store = DiskStore(100, 2, 600, 600, path=sys.argv[1])
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    rows = np.ones((2, 50, 600), np.uint8)
    store.write(rows, rows, np.arange(50))
    store.write(rows, rows, np.arange(50))
except LaserKVError as error:
    print(error.exit_code, error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit of file sizes")
@pytest.mark.parametrize("when", ["start", "later"])
def test_a_disk_that_is_full(when: str, tmp_path: Path) -> None:
    """The system refuses to write beyond 100,000 bytes, before or while rows are parked."""
    path = tmp_path / "rows"
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(path), when], capture_output=True, text=True, check=True
    )
    assert done.stdout.count("\n") == 1
    if when == "start":
        assert done.stdout.startswith("2 parking 100 tokens takes 240000 bytes on disk")
        assert not path.exists()
    else:
        assert done.stdout.startswith("1 the disk of")
        assert "full after 0 of 100" in done.stdout
    for part in ("recall_file", str(path)):
        assert part in done.stdout


def test_a_disk_that_fills_while_reading(
    loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reading ends with one line; the file is gone, and the engine works on."""
    path, writes, original = tmp_path / "rows", 0, os.pwrite

    def pwrite(*args: Any) -> int:
        nonlocal writes
        writes += 1
        if writes > 10:
            raise OSError(28, "No space left on device")
        return original(*args)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with recalling(loaded, recall="disk", recall_file=str(path)) as engine:
        talk = engine.conversation(document=DOCUMENT, max_tokens=4)
        with pytest.raises(LaserKVError, match=r"disk of .* is full after 128 of") as raised:
            talk.read()
        assert raised.value.exit_code == 1
        assert not path.exists()
        assert talk.reading is None
        monkeypatch.undo()
        assert turn(talk, QUESTIONS[0]).tokens


HOLD = """
import sys
from laserkv_gguf.recall.disk import DiskStore
store = DiskStore(10, 2, 64, 64, path=sys.argv[1])
print("held", flush=True)
sys.stdin.readline()
"""


def test_two_processes_on_one_file(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    content = path.read_bytes()
    with pytest.raises(UserError, match=r"in use by another process; give another recall_file"):
        DiskStore(10, 2, 64, 64, path=path)
    assert path.read_bytes() == content
    child.kill()  # what it leaves behind is ours to take over
    child.communicate()
    one = DiskStore(10, 2, 64, 64, path=path)
    one.close()
    assert not path.exists()


def test_a_file_of_something_else_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "novel.txt"
    path.write_text("It was a dark and stormy night.")
    with pytest.raises(UserError, match="left as it is"):
        DiskStore(10, 2, 64, 64, path=path)
    assert path.read_text() == "It was a dark and stormy night."
    with pytest.raises(UserError, match=r"cannot park rows in .*nowhere"):
        DiskStore(10, 2, 64, 64, path=tmp_path / "nowhere" / "rows")


@pytest.mark.parametrize("gap", [1, 1 << 10, 1 << 14, 1 << 30])
def test_rows_of_a_file(
    gap: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Neighbours, some near each other and some far apart, by themselves and all of them."""
    monkeypatch.setattr(disk, "_GAP", gap)
    monkeypatch.setattr(disk, "_PART", 1 << 15)
    count, random = 1024, np.random.default_rng(0)
    one = DiskStore(count, 3, 256, 128, path=tmp_path / "rows")
    request.addfinalizer(one.close)
    keys = random.integers(0, 256, (3, count, 256), np.uint8)
    values = random.integers(0, 256, (3, count, 32, 4), np.uint8)
    for first, last in ((0, 100), (100, 101), (101, count)):
        one.write(keys[:, first:last], values[:, first:last], np.arange(first, last))
    chosen: list[NDArray[np.int64]] = [
        np.empty(0, np.int64),
        np.array([7]),
        np.arange(20, 300),
        np.sort(random.choice(count, 200, replace=False)),
        np.array([0, 1, 2, 40, 41, 500, 1000, 1023]),
    ]
    for tokens in chosen:
        got = np.zeros((3, len(tokens), 256), np.uint8), np.zeros((3, len(tokens), 32, 4), np.uint8)
        one.copy(tokens, *got)
        assert np.array_equal(got[0], keys[:, tokens])
        assert np.array_equal(got[1], values[:, tokens])
        assert np.array_equal(one.keys(tokens), keys[:, tokens])
    for kind, rows_of in (("keys", keys), ("values", values)):
        assert np.concatenate(list(one.all(kind))).tobytes() == rows_of.tobytes()


@pytest.mark.parametrize("left", [0, 5000, -1])
def test_a_file_that_was_cut_short(
    left: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    path = tmp_path / "rows"
    one = DiskStore(64, 2, 256, 256, path=path)
    request.addfinalizer(one.close)
    rows_of = np.ones((2, 32, 256), np.uint8)
    one.write(rows_of, rows_of, np.arange(32))
    os.truncate(path, left % path.stat().st_size)
    for use in (
        lambda: one.keys(np.arange(3)),
        lambda: one.copy(np.arange(32), rows_of.copy(), rows_of.copy()),
        lambda: one.write(rows_of, rows_of, np.arange(32)),
        lambda: list(one.all("values")),
    ):
        with pytest.raises(LaserKVError, match=r"cut short.*read the document again") as caught:
            use()
        assert "\n" not in str(caught.value)


def test_a_store_takes_no_more_than_it_was_made_for() -> None:
    one = Store(10, 2, 8, 8)
    part = np.zeros((2, 8, 8), np.uint8)
    one.write(part, part, np.arange(8))
    with pytest.raises(ValueError, match="16 tokens"):
        one.write(part, part, np.arange(8))
    assert one.parked == 8
    assert one.bytes == 10 * 2 * 16


# ---- a llama.cpp whose state is another ---------------------------------------------------------


def test_another_format_turns_recall_off(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And nothing else: reading, turns and answers are those without recall."""
    original = L.llama_state_seq_get_data

    def other(handle: Any, pointer: Any, size: int, sequence: int) -> int:
        written = int(original(handle, pointer, size, sequence))
        ctypes.memset(pointer, 7, 4)
        return written

    monkeypatch.setattr(L, "llama_state_seq_get_data", other)
    with recalling(loaded) as engine:
        talk = engine.conversation(document=DOCUMENT, max_tokens=6)
        replies = [turn(talk, question) for question in QUESTIONS]
        assert talk.recall(QUESTIONS[0]) is None
    assert {reply.account.recall for reply in replies} == {"off"}
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert sum("recall is off" in warning for warning in warnings) == 1
    with recalling(loaded, recall="off") as engine:
        talk = engine.conversation(document=DOCUMENT, max_tokens=6)
        assert [turn(talk, question).tokens for question in QUESTIONS] == [
            reply.tokens for reply in replies
        ]


# ---- policies that look up units ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["quest", "infllm"])
@pytest.mark.parametrize("positions", ["original", "compact"])
def test_units_of_the_whole_document(name: str, positions: str, loaded: Loaded) -> None:
    """What is kept is the best units by brute force, over the parked keys.

    What stands for `infllm`'s units is looked at in test_policies_originals.
    """
    size, local = 16, 20
    options = {"page": size} if name == "quest" else {"size": size, "local": local}
    settings = {"policy": name, "policy_options": options, "positions": positions}
    with recalling(loaded, **settings) as engine:
        talk = engine.conversation(document=DOCUMENT, max_tokens=4)
        talk.read()
        recaller = talk.sources.recallers[0]
        assert recaller is not None
        assert recaller.mode == "shortlist"
        seen: list[Asked] = []
        original = recaller.reader.asker.ask

        def ask(*args: Any, **more: Any) -> Asked:
            asked = original(*args, **more)
            seen.append(replace(asked, queries=asked.queries.copy()))
            return asked

        recaller.reader.asker.ask = ask  # type: ignore[method-assign]
        recalled = talk.recall(QUESTIONS[0])
        recaller.reader.asker.ask = original  # type: ignore[method-assign]
        assert recalled is not None
        budget = recaller.budget
        keys = recaller.form.keys(recaller.store.keys(np.arange(budget.tokens))).astype(float)
        kv, group = SPEC.kv_heads, SPEC.heads // SPEC.kv_heads
        queries, at = seen[-1].queries.astype(float), seen[-1].at
        assert at is not None
        end = talk.cells.position if positions == "original" else recaller.next_position
        assert at[-1] == at[0] + queries.shape[1] - 1
        assert at[0] >= end - 1
        # before RoPE, and then all from one angle
        angles = tiny._angles(SPEC, local - 1 - at, None)
        plain = np.stack([tiny._rope(SPEC, layer, angles) for layer in queries])
        units = [
            (start, min(start + size, block.end))
            for block in budget.blocks
            for start in range(block.start, block.end, size)
        ]
        if name == "quest":  # of two layers both have a say
            upper = np.empty((SPEC.layers, SPEC.heads, queries.shape[1], len(units)))
            for number, (start, end) in enumerate(units):
                for head in range(SPEC.heads):
                    inside = keys[:, start:end, head // group]
                    low, high = inside.min(axis=1), inside.max(axis=1)
                    each = np.maximum(
                        queries[:, :, head] * low[:, None], queries[:, :, head] * high[:, None]
                    )
                    upper[:, head, :, number] = each.sum(axis=2) / np.sqrt(SPEC.head_dim)
            weights = np.exp(upper - upper.max(axis=3, keepdims=True))
            weights /= weights.sum(axis=3, keepdims=True)
            scores = weights.max(axis=2).sum(axis=(0, 1))
        else:
            means = recaller.way.index["means"].astype(float)
            assert means.shape == (SPEC.layers, len(units), kv * group, SPEC.head_dim)
            # they are turned the other way
            back = tiny._angles(SPEC, np.array([local - 1]), None)
            means = np.stack([tiny._rope(SPEC, layer, back) for layer in means])
            scores = np.einsum("lqhd,luhd->u", plain, means)
        first, last = recaller.movable
        room = budget.kept - first - (budget.tokens - last)
        best: list[int] = []
        for unit in np.argsort(-np.array(scores), kind="stable"):
            start, end = units[unit]
            best += [t for t in range(start, end) if first <= t < last][: room - len(best)]
        expected = {*range(first), *best, *range(last, budget.tokens)}
        assert set(recalled.kept.tolist()) == expected


# ---- votes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [1, 2, 3, 8])
@pytest.mark.parametrize("tokens", [1, 37, 1024, 5000])
def test_votes_are_counted_bits(words: int, tokens: int) -> None:
    random = np.random.default_rng(words * tokens)
    keys = random.integers(0, 1 << 64, (2, 2, words, tokens), dtype=np.uint64)
    asked = random.integers(0, 1 << 64, (2, 2, 3, words), dtype=np.uint64)
    asked[0, 0, 0] = keys[0, 0, :, tokens // 2]  # one that is there
    step = max(1, tokens // 4096)
    expected = np.zeros(tokens)
    for layer, head, row in np.ndindex(2, 2, 3):
        apart = np.zeros(tokens, int)
        for word in range(words):
            differ = keys[layer, head, word] ^ asked[layer, head, row, word]
            apart += np.unpackbits(differ.view(np.uint8)).reshape(tokens, 64).sum(axis=1, dtype=int)
        sample = np.sort(apart[::step])
        limit = sample[max(1, int(0.05 * len(sample))) - 1]
        expected += (apart <= limit) * ((1 << 24) // (int((sample <= limit).sum()) * step))
    votes = hamming_votes(asked, keys, share=0.05)
    assert np.allclose(votes, expected / expected.sum(), rtol=1e-12)
    assert votes[tokens // 2] > 0


def test_votes_of_nothing_and_of_nonsense() -> None:
    codes = np.zeros((1, 1, 2, 10), np.uint64)
    asked = np.zeros((1, 1, 3, 2), np.uint64)
    assert not hamming_votes(asked[:, :, :0], codes).any()
    assert len(hamming_votes(asked, codes[..., :0])) == 0
    with pytest.raises(TypeError):
        hamming_votes(asked.astype(np.int64), codes)
    for wrong in (asked[0], asked[..., :1], np.zeros((2, 1, 3, 2), np.uint64)):
        with pytest.raises(ValueError, match=r"signatures|words"):
            hamming_votes(wrong, codes)
    with pytest.raises(ValueError, match="share"):
        hamming_votes(asked, codes, share=0)


# ---- settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said_so"),
    [
        ({"recall": "tape"}, "recall tape is unknown; use auto, ram, disk, off"),
        ({"recall_mode": "fast"}, "recall_mode fast is unknown; use replay or shortlist"),
        ({"recall_file": "x"}, 'recall="disk"'),
        ({"policy": "random"}, "does not look at the question"),
        ({"policy": "lagkv"}, "does not look at the question"),
        ({"policy": "compactor"}, "laser"),
        ({"policy": "h2o"}, "laser"),
        ({"policy": "infllm", "recall": "off"}, r'policy infllm .*add recall="ram"'),
        ({"policy": "infllm", "recall_mode": "replay"}, 'recall_mode="shortlist"'),
        ({"policy": "infllm", "policy_options": {"size": 0}}, "size is 0"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], said_so: str, loaded: Loaded) -> None:
    with pytest.raises(UserError, match=said_so) as raised:
        recalling(loaded, **settings)
    assert "\n" not in str(raised.value)


def test_the_policy_has_its_own_way() -> None:
    for name, mode in (("laser", "replay"), ("quest", "shortlist"), ("infllm", "shortlist")):
        assert RecallSettings("ram").mode_for(policies.make(name)) == mode
    assert RecallSettings("ram", "replay").mode_for(policies.make("quest")) == "replay"


@pytest.mark.parametrize("command", [("bench",)])
def test_commands_that_cannot_recall_say_so(
    command: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*command, "--recall", "ram"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {command[0]} cannot recall yet: leave --recall out, or ")
    assert error.count("\n") == 1


def test_settings_turned_on_later_count_from_the_next_reading(loaded: Loaded) -> None:
    with recalling(loaded) as engine:
        expected = turn(engine.conversation(document=DOCUMENT, max_tokens=4), QUESTIONS[0]).tokens
    with recalling(loaded, recall="off") as engine:
        talk = engine.conversation(document=DOCUMENT, max_tokens=4)
        assert turn(talk, QUESTIONS[0]).account.recall == "off"
        engine.configure(recall="ram")
        talk.read()
        reply = turn(talk, QUESTIONS[0])
        assert (reply.account.recall, reply.tokens) == ("ram", expected)
