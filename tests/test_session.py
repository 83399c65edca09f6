"""Documents, turns and answers of `LaserKV`, against plain llama.cpp and the NumPy forward pass.

The tiny models have a token a character, so what the chat template makes of a turn is written down
here by hand. They never end an answer by themselves (unless a test makes them).
"""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import llama_cpp as L
import numpy as np
import pytest
from numpy.typing import NDArray
from tiny import BOS, FIRST_BYTE, TinySpec, forward, make, token_of, visibility

from laserkv_gguf import policies
from laserkv_gguf.api import LaserKV
from laserkv_gguf.budget import Budget
from laserkv_gguf.conversation.conversation import Conversation
from laserkv_gguf.conversation.generation import Reply
from laserkv_gguf.errors import Cancelled, Closed, UserError
from laserkv_gguf.llama.context import ContextOptions
from laserkv_gguf.llama.model import Model
from laserkv_gguf.llama.sampler import Sampling
from laserkv_gguf.llama.sequence import MAIN, PROBE, Sequence

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
SPEC = TinySpec(layers=2, ctx_train=4096, chat_template=TEMPLATE)
OPTIONS = ContextOptions(
    batch_size=128, ubatch_size=32, type_k="f32", type_v="f32", flash_attn="off", threads=1
)
DOCUMENT = " ".join(f"{word}{number}" for number in range(20) for word in ("tin", "copper", "ore"))
QUESTION = "What is ore?"
PATIENCE = 300.0  # seconds, after which a test gives up on what hangs
SETTINGS: dict[str, Any] = {"block_size": 64, "ratio": 0.4, "lookahead": 3}


class Loaded:
    def __init__(self, directory: Path, spec: TinySpec) -> None:
        self.path, self.spec, self.weights = make(directory, spec=spec)
        self.model = Model(self.path, gpu_layers=0, extra_buffers=False)

    def engine(self, **settings: Any) -> LaserKV:
        return LaserKV(self.model, context=OPTIONS, **{**SETTINGS, **settings})


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    one = Loaded(tmp_path_factory.mktemp("session"), SPEC)
    yield one
    one.model.close()


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    """A model trained for 512 tokens only."""
    spec = TinySpec(layers=1, ctx_train=512, chat_template=TEMPLATE)
    one = Loaded(tmp_path_factory.mktemp("short"), spec)
    yield one
    one.model.close()


def chars(text: str) -> list[int]:
    return [FIRST_BYTE + 10 if char == "\n" else token_of(char) for char in text]


def first_turn(question: str, document: str = DOCUMENT) -> tuple[list[int], list[int]]:
    """What is read, and what is asked after it."""
    separator = "\n\n" if document else ""
    return [BOS, *chars("[user]" + document)], chars(f"{separator}{question}\n[assistant]")


def next_turn(question: str) -> list[int]:
    return chars(f"\n[user]{question}\n[assistant]")


def greedy(one: Loaded, tokens: list[int], count: int) -> list[int]:
    """What plain llama.cpp answers, through its C API alone."""
    params = L.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = 2048
    params.n_threads = params.n_threads_batch = 1
    params.type_k = params.type_v = L.GGML_TYPE_F32
    params.flash_attn_type = L.LLAMA_FLASH_ATTN_TYPE_DISABLED
    handle = L.llama_init_from_model(one.model.handle, params)
    answer: list[int] = []
    try:
        new = np.array(tokens, np.int32)
        for _ in range(count):
            pointer = new.ctypes.data_as(L.llama_token_p)
            assert L.llama_decode(handle, L.llama_batch_get_one(pointer, len(new))) == 0
            logits = np.ctypeslib.as_array(L.llama_get_logits_ith(handle, -1), (one.spec.vocab,))
            answer.append(int(logits.argmax()))
            new = np.array(answer[-1:], np.int32)
    finally:
        L.llama_free(handle)
    return answer


def said(one: Loaded, tokens: list[int]) -> str:
    return b"".join(one.model.piece(token) for token in tokens).decode("utf-8", "replace")


def turn(conversation: Conversation, question: str) -> Reply:
    answer = conversation.ask(question)
    text = "".join(answer)
    assert text == answer.reply.text
    return answer.reply


def in_cache(engine: LaserKV) -> int:
    """Cells of the main sequence, asked of llama.cpp one by one."""
    assert engine._context is not None
    memory, found = engine._context.memory, 0
    for position in range(int(L.llama_memory_seq_pos_max(memory, MAIN)) + 1):
        L.llama_memory_seq_cp(memory, MAIN, 7, position, position + 1)
        found += int(L.llama_memory_seq_pos_max(memory, 7)) == position
        L.llama_memory_seq_rm(memory, 7, -1, -1)
    return found


# ---- one question ------------------------------------------------------------------------------


def test_nothing_evicted_equals_plain_llama_cpp(loaded: Loaded) -> None:
    """Greedy tokens of one question, by three ways to keep everything."""
    before, after = first_turn(QUESTION)
    expected = greedy(loaded, before + after, 12)
    for settings in ({"ratio": 1.0}, {"policy": "full"}, {"block_size": 128, "ratio": 0.999}):
        with loaded.engine(**settings) as engine:
            reply = engine.ask(QUESTION, document=DOCUMENT[:120], max_tokens=12)
            short_before, short_after = first_turn(QUESTION, DOCUMENT[:120])
            assert reply.tokens == greedy(loaded, short_before + short_after, 12)
            if settings.get("block_size") is None:
                reply = engine.ask(QUESTION, document=DOCUMENT, max_tokens=12)
                assert reply.tokens == expected
                assert reply.account.kept_fraction == 1


def test_without_a_document(loaded: Loaded) -> None:
    before, after = first_turn(QUESTION, "")
    with loaded.engine() as engine:
        reply = engine.ask(QUESTION, max_tokens=9)
    assert reply.tokens == greedy(loaded, before + after, 9)


def test_system_prompt(loaded: Loaded) -> None:
    head = [BOS, *chars("[system]Be brief.\n[user]" + DOCUMENT[:60])]
    with loaded.engine(ratio=1.0) as engine:
        reply = engine.ask(QUESTION, document=DOCUMENT[:60], system="Be brief.", max_tokens=9)
    assert reply.tokens == greedy(loaded, head + first_turn(QUESTION)[1], 9)


def test_evicted_tokens_are_hidden_from_the_answer(loaded: Loaded) -> None:
    """Greedy tokens against the forward pass whose mask is the seeded policy's choices."""
    before, after = first_turn(QUESTION)
    with loaded.engine(policy="random", seed=3) as engine:
        reply = engine.ask(QUESTION, document=DOCUMENT, max_tokens=8)
        assert in_cache(engine) == reply.account.kept_tokens + len(after) + 7
    policy, budget = policies.make("random", seed=3), Budget(len(before), 64, 0.4)
    evicted: dict[int, int] = {}
    for block in budget.blocks:
        first, end = block.candidates
        seen = policies.Candidates(np.arange(first, end), (block.start, block.end), block.index)
        chosen = {first + int(index) for index in policy.select(seen, block.pool)}
        evicted |= dict.fromkeys({*range(first, end)} - chosen, block.end)
    tokens = before + after
    for _ in range(8):
        mask = visibility(len(tokens), evicted)
        logits = forward(loaded.weights, loaded.spec, tokens, visible=mask).logits
        tokens.append(int(logits[-1].argmax()))
    assert reply.tokens == tokens[-8:]
    assert reply.tokens != greedy(loaded, before + after, 8)  # it is felt


@pytest.mark.parametrize("policy", ["laser", "exact", "magicpig", "random", "streamingllm", "full"])
@pytest.mark.parametrize("positions", ["original", "compact"])
def test_asking_twice(policy: str, positions: str, loaded: Loaded) -> None:
    """The same engine, with another document in between, and a fresh one."""
    replies = []
    for _ in range(2):
        with loaded.engine(policy=policy, positions=positions) as engine:
            for document in (DOCUMENT, DOCUMENT[::-1] * 2, DOCUMENT):
                reply = engine.ask(QUESTION, document=document, max_tokens=10)
                if document == DOCUMENT:
                    replies.append(reply)
    assert len({tuple(reply.tokens) for reply in replies}) == 1
    assert len({reply.text for reply in replies}) == 1
    assert len({tuple(reply.account.kept_per_block) for reply in replies}) == 1
    assert replies[0].text == said(loaded, replies[0].tokens)


@pytest.mark.parametrize("policy", ["laser", "streamingllm", "full"])
@pytest.mark.parametrize("divisor", [4, 8])
def test_account_adds_up(policy: str, divisor: int, loaded: Loaded) -> None:
    """Against Budget, the tokens counted here, and llama.cpp's own allocation."""
    before, after = first_turn(QUESTION)
    with loaded.engine(policy=policy, protection_divisor=divisor, seed=5) as engine:
        pieces: list[str] = []
        reply = engine.ask(QUESTION, document=DOCUMENT, max_tokens=10, on_text=pieces.append)
        context = engine._context
        assert context is not None
        assert reply.account.kv_bytes == context.allocated_cells * engine.cell_bytes
        assert in_cache(engine) == reply.account.kept_tokens + len(after) + 9 <= context.cells
        budget = engine.policy.budget(len(before), 64, 0.4, divisor)
        cell_bytes = engine.cell_bytes
    account, spec = reply.account, loaded.spec
    assert "".join(pieces) == reply.text
    assert cell_bytes == spec.layers * 2 * spec.kv_heads * spec.head_dim * 4
    asked = len(after) if policy == "laser" else 0
    assert account.ctx_cells == budget.cells(asked, 3 if asked else 0, len(after) + 10)
    assert account.kv_bytes == -(-account.ctx_cells // 256) * 256 * cell_bytes
    # the last generated token is never decoded
    assert account.full_kv_bytes == (len(before) + len(after) + 9) * cell_bytes
    assert account.policy == policy
    assert account.document_tokens == len(before)
    assert account.kept_tokens == budget.kept == account.kept_per_block[-1]
    assert account.kept_per_block == [block.kept_after for block in budget.blocks]
    assert account.kept_fraction == budget.kept / len(before)
    assert account.blocks == len(budget.blocks) == -(-len(before) // 64)
    assert (account.budget, account.anchors) == (budget.block, budget.anchors)
    assert (account.window, account.long_term) == (budget.window, budget.long_term)
    assert (account.prompt_tokens, account.generated_tokens) == (len(after), 10)
    assert (account.ratio, account.block_size) == (0.4, 64)
    assert (account.protection_divisor, account.seed) == (divisor, 5)
    assert account.positions == ("compact" if policy == "streamingllm" else "original")
    steps = account.decode_seconds, account.probe_seconds, account.score_seconds
    assert sum(steps) + account.evict_seconds <= account.prefill_seconds
    assert account.prefill_seconds < account.first_token_seconds
    assert (account.probe_seconds > 0) == (policy == "laser")
    assert account.decode_tokens_per_second > 0
    if policy == "streamingllm":
        assert account.kept_tokens == len(before) * 4 // 10


def test_answers_end(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """By length at the limit, by themselves at a token that ends generation."""
    with loaded.engine() as engine:
        for limit in (1, 2, 7):
            reply = engine.ask(QUESTION, document=DOCUMENT, max_tokens=limit)
            assert (reply.finish_reason, len(reply.tokens)) == ("length", limit)
        end = reply.tokens[3]
        before = reply.tokens[: reply.tokens.index(end)]
        monkeypatch.setattr(loaded.model, "ends_generation", lambda token: token == end)
        stopped = engine.ask(QUESTION, document=DOCUMENT, max_tokens=7)
        if engine.settings.lookahead == 3 and end not in before:
            assert stopped.finish_reason == "stop"
            assert end not in stopped.tokens
        with pytest.raises(UserError, match="max_tokens=0"):
            engine.ask(QUESTION, max_tokens=0)


def test_sampling_is_seeded(loaded: Loaded) -> None:
    answers = []
    for seed in (1, 1, 2):
        with loaded.engine() as engine:
            sampling = Sampling(temperature=2.0, top_k=0, top_p=1.0, min_p=0.0, seed=seed)
            reply = engine.ask(QUESTION, document=DOCUMENT, max_tokens=12, sampling=sampling)
            answers.append(reply.tokens)
    assert answers[0] == answers[1] != answers[2]


def test_a_path_is_loaded_and_closed(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("laserkv_gguf.llama.trial.extra_buffers_work", lambda: False)
    with LaserKV(loaded.path, gpu_layers=0, context=OPTIONS, **SETTINGS) as engine:
        reply = engine.ask(QUESTION, document=DOCUMENT, max_tokens=5)
    with pytest.raises(Closed, match="is closed"):
        _ = engine.model.handle
    with loaded.engine() as engine:
        assert engine.ask(QUESTION, document=DOCUMENT, max_tokens=5).tokens == reply.tokens
    assert loaded.model.handle is not None  # a model that was handed over stays open


# ---- conversations -----------------------------------------------------------------------------


def test_turns_equal_plain_llama_cpp(loaded: Loaded) -> None:
    """The whole sequence of four turns, put together here, greedily continued."""
    with loaded.engine(ratio=1.0) as engine:
        conversation = engine.conversation(document=DOCUMENT, max_tokens=7)
        conversation.read()
        before, after = first_turn("one?")
        sequence = before + after
        for number, question in enumerate(("one?", "two, please", "three", "")):
            if number:
                sequence += next_turn(question)
            reply = turn(conversation, question)
            assert reply.tokens == greedy(loaded, sequence, 7)
            sequence += reply.tokens
            assert conversation.cells_used == len(sequence) - 1 == in_cache(engine)
            assert reply.account.generated_tokens == 7


def test_turns_after_an_answer_that_ended(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ending token is the template's, never decoded twice."""
    with loaded.engine(ratio=1.0) as engine:
        before, after = first_turn("one?")
        free = greedy(loaded, before + after, 9)
        end = next(token for token in free[2:] if token not in free[:2])
        monkeypatch.setattr(loaded.model, "ends_generation", lambda token: token == end)
        conversation = engine.conversation(document=DOCUMENT, max_tokens=9)
        reply = turn(conversation, "one?")
        assert reply.finish_reason == "stop"
        assert reply.tokens == free[: free.index(end)]
        monkeypatch.undo()
        sequence = before + after + reply.tokens + next_turn("two?")
        assert turn(conversation, "two?").tokens == greedy(loaded, sequence, 9)


def drop_by_closing(conversation: Conversation) -> None:
    pieces = iter(conversation.ask("a turn that is dropped"))
    for _ in range(3):
        next(pieces)
    pieces.close()  # type: ignore[attr-defined]


def drop_by_raising(conversation: Conversation) -> None:
    def stopped() -> None:
        for _ in conversation.ask("a turn that is dropped"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    gc.collect()


def drop_by_cancelling(conversation: Conversation) -> None:
    pieces = iter(conversation.ask("a turn that is dropped"))
    next(pieces)
    thread = threading.Thread(target=conversation.engine.cancel)
    thread.start()
    thread.join()
    with pytest.raises(Cancelled):
        list(pieces)


def drop_by_failing(conversation: Conversation) -> None:
    with pytest.MonkeyPatch.context() as patch:
        calls: list[int] = []

        def piece(token: int, **options: Any) -> bytes:
            calls.append(token)
            if len(calls) == 4:
                raise KeyboardInterrupt
            return b"x"

        patch.setattr(conversation.engine.model, "piece", piece)
        with pytest.raises(KeyboardInterrupt):
            list(conversation.ask("a turn that is dropped"))


def drop_unstarted(conversation: Conversation) -> None:
    iter(conversation.ask("a turn that never began"))


@pytest.mark.parametrize(
    "drop", [drop_by_closing, drop_by_raising, drop_by_cancelling, drop_by_failing, drop_unstarted]
)
@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_dropped_turn_has_never_been(
    drop: Callable[[Conversation], None], positions: str, at: int, loaded: Loaded
) -> None:
    """Against the same conversation without it."""
    answers: list[list[list[int]]] = []
    for dropping in (False, True):
        with loaded.engine(positions=positions) as engine:
            conversation = engine.conversation(document=DOCUMENT, max_tokens=6)
            conversation.read()
            answers.append([])
            for number, question in enumerate(("one?", "two, please", "three")):
                if dropping and number == at:
                    used = conversation.cells_used
                    drop(conversation)
                    assert conversation.cells_used == used == in_cache(engine)
                    assert conversation.turns == number
                answers[-1].append(turn(conversation, question).tokens)
    assert answers[0] == answers[1]


def test_a_turn_left_suspended_has_never_been(loaded: Loaded) -> None:
    """A `for` loop left by an exception keeps its iterator while the traceback lives."""
    answers: list[list[int]] = []
    for dropping in (False, True):
        with loaded.engine() as engine:
            conversation = engine.conversation(document=DOCUMENT, max_tokens=6)
            turn(conversation, "one?")
            if dropping:
                pieces = iter(conversation.ask("a turn that is dropped"))
                next(pieces)
            answers.append(turn(conversation, "two, please").tokens)
            if dropping:
                pieces.close()  # type: ignore[attr-defined]
            answers.append(turn(conversation, "three").tokens)
    assert answers[:2] == answers[2:]


def test_an_old_answer_does_not_touch_a_new_conversation(loaded: Loaded) -> None:
    answers: list[list[int]] = []
    for dropping in (False, True):
        with loaded.engine(ctx_size=1024) as engine:  # one context for all
            if dropping:
                pieces = iter(engine.stream(QUESTION, document=DOCUMENT[:70], max_tokens=6))
                next(pieces)
            conversation = engine.conversation(document=DOCUMENT, max_tokens=6)
            conversation.read()
            if dropping:
                pieces.close()  # type: ignore[attr-defined]
            answers.append(turn(conversation, "one?").tokens)
    assert answers[0] == answers[1]


@pytest.mark.parametrize("user", ["answer", "conversation", "reset"])
def test_a_closed_context_is_not_used(user: str, loaded: Loaded) -> None:
    """In a process of its own. The second question needs a larger context than the first."""
    code = f"""
from laserkv_gguf.errors import UserError
from laserkv_gguf.llama.context import ContextOptions
from laserkv_gguf.llama.model import Model
from laserkv_gguf.api import LaserKV
import llama_cpp

model = Model({str(loaded.path)!r}, gpu_layers=0, extra_buffers=False)
engine = LaserKV(model, context=ContextOptions(512, 512, threads=1), block_size=512, policy="full")
conversation = engine.conversation(document="tin " * 20, max_tokens=6)
conversation.read()
pieces = iter(conversation.ask("what?"))
next(pieces)
before = engine._context
engine.ask("what?", document="tin " * 640, max_tokens=6)
assert engine._context is not before
# else whether it crashes depends on what malloc made of the memory
real, known = llama_cpp.llama_memory_seq_rm, engine._context.memory
def checked(memory, *arguments):
    assert memory == known, "a freed context was used"
    return real(memory, *arguments)
llama_cpp.llama_memory_seq_rm = checked
try:
    if {user!r} == "answer":
        pieces.close()
    elif {user!r} == "reset":
        conversation.reset()
    else:
        list(conversation.ask("what?"))
except UserError:
    pass
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, check=False)
    assert ended.returncode == 0


@pytest.mark.parametrize("after", ["first", "second"])
def test_a_conversation_taken_over_reads_again_or_says_so(after: str, loaded: Loaded) -> None:
    """Never an answer from another document's cache, which its user would not notice."""
    with loaded.engine(ctx_size=1024) as engine:  # one context for all
        alone = engine.conversation(document=DOCUMENT, max_tokens=6)
        alone.read()
        expected = [turn(alone, question).tokens for question in ("one?", "two?")]
        conversation = engine.conversation(document=DOCUMENT, max_tokens=6)
        conversation.read()
        if after == "second":
            turn(conversation, "one?")
        engine.ask(QUESTION, document=DOCUMENT[::-1], max_tokens=6)
        try:
            tokens = turn(conversation, "two?" if after == "second" else "one?").tokens
        except UserError:
            return
        assert tokens == expected[after == "second"]


def test_reset_forgets_the_turns(loaded: Loaded) -> None:
    with loaded.engine() as engine:
        conversation = engine.conversation(document=DOCUMENT, max_tokens=6)
        conversation.reset()  # nothing to forget
        kept = len(conversation.read().kept)
        first, _second = turn(conversation, "one?").tokens, turn(conversation, "two?").tokens
        conversation.reset()
        assert conversation.cells_used == kept == in_cache(engine)
        assert turn(conversation, "one?").tokens == first


def test_going_on_without_the_document(loaded: Loaded) -> None:
    before, after = first_turn("one?", "")
    with loaded.engine() as engine:
        conversation = engine.conversation(document=DOCUMENT, max_tokens=6)
        conversation.read()
        with_document = turn(conversation, "one?").tokens
        conversation.without_document()
        assert turn(conversation, "one?").tokens == greedy(loaded, before + after, 6)
        conversation.read()
        assert turn(conversation, "one?").tokens == with_document


def test_a_stopped_reading_leaves_nothing(loaded: Loaded) -> None:
    with loaded.engine() as engine:
        expected = engine.ask(QUESTION, document=DOCUMENT, max_tokens=6).tokens

        def stop(progress: Any) -> None:
            if progress.read > 150:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            engine.ask(QUESTION, document=DOCUMENT, max_tokens=6, on_progress=stop)
        assert in_cache(engine) == 0
        conversation = engine.conversation(document=DOCUMENT)
        with pytest.raises(KeyboardInterrupt):
            conversation.read(on_progress=stop)
        assert conversation.reading is None
        assert in_cache(engine) == 0
        assert engine.ask(QUESTION, document=DOCUMENT, max_tokens=6).tokens == expected


# ---- what fits ---------------------------------------------------------------------------------


def named(error: pytest.ExceptionInfo[UserError], argument: str) -> float:
    found = re.search(rf"use {argument}=([0-9.]+)", str(error.value))
    assert found, str(error.value)
    assert "\n" not in str(error.value)
    return float(found[1])


@pytest.mark.parametrize("policy", ["laser", "streamingllm", "full"])
@pytest.mark.parametrize("limit", [8, 300])
def test_ctx_size_too_small_names_one_that_will_do(policy: str, limit: int, loaded: Loaded) -> None:
    """That one works, one less does not."""
    with (
        loaded.engine(policy=policy, ctx_size=50) as engine,
        pytest.raises(UserError) as caught,
    ):
        engine.ask(QUESTION, document=DOCUMENT, max_tokens=limit)
    cells = int(named(caught, "ctx_size"))
    with loaded.engine(policy=policy, ctx_size=cells) as engine:
        reply = engine.ask(QUESTION, document=DOCUMENT, max_tokens=limit)
        assert len(reply.tokens) == limit
        assert reply.account.ctx_cells == cells
        assert in_cache(engine) <= cells
    with (
        loaded.engine(policy=policy, ctx_size=cells - 1) as engine,
        pytest.raises(UserError, match=f"use ctx_size={cells},"),
    ):
        engine.ask(QUESTION, document=DOCUMENT, max_tokens=limit)
    with loaded.engine(policy=policy, ctx_size=10) as engine:
        with pytest.raises(UserError) as caught:
            engine.conversation(document=DOCUMENT, max_tokens=limit).read()
        engine.ctx_size = int(named(caught, "ctx_size"))
        engine.conversation(document=DOCUMENT, max_tokens=limit).read()


@pytest.mark.parametrize("cells", [224, 240, 256])
def test_a_conversation_never_exceeds_its_cells(cells: int, loaded: Loaded) -> None:
    """The answer that fills them is cut short, the next turn refused, and earlier ones stay.

    So it is where nothing said is compressed; `Talk` goes on (test_talk.py).
    """
    with loaded.engine(ctx_size=cells) as engine:
        conversation = Conversation(engine, document=DOCUMENT, max_tokens=16)
        kept = len(conversation.read().kept)
        answers: list[list[int]] = []

        def go_on() -> None:
            for _ in range(20):
                reply = turn(conversation, "go on")
                answers.append(reply.tokens)
                assert conversation.cells_used == in_cache(engine) <= cells
                assert reply.finish_reason == "length"

        with pytest.raises(UserError, match="ctx_size"):
            go_on()
        # by hand: a turn's question, its answer, and of the answer before it the last token
        expected, used = [], kept + len(first_turn("go on")[1])
        while used < cells:
            expected.append(min(16, cells - used))
            used += expected[-1] + len(next_turn("go on"))
        assert [len(answer) for answer in answers] == expected
        assert len(expected) > 1
        used = conversation.cells_used
        assert used == in_cache(engine)
        with pytest.raises(UserError, match="ctx_size"):
            turn(conversation, "go on")
        assert used == conversation.cells_used == in_cache(engine)
        conversation.reset()
        assert turn(conversation, "go on").tokens == answers[0]


@pytest.mark.parametrize("policy", ["laser", "random", "streamingllm"])
@pytest.mark.parametrize("reply", [8, 200])
def test_ratio_too_large_for_the_trained_context(policy: str, reply: int, short: Loaded) -> None:
    """The ratio that is named works, with positions below what the model was trained for."""
    document = DOCUMENT * 6
    with short.engine(policy=policy, ratio=0.9) as engine, pytest.raises(UserError) as caught:
        engine.ask(QUESTION, document=document, max_tokens=reply)
    assert "512" in str(caught.value)
    ratio = named(caught, "ratio")
    assert 0 < ratio < 0.9
    with short.engine(policy=policy, ratio=ratio) as engine:
        answer = engine.ask(QUESTION, document=document, max_tokens=reply)
        assert engine._context is not None
        assert Sequence(engine._context, MAIN).last < 512
    assert answer.account.positions == "compact"
    assert answer.account.ctx_cells <= 512
    assert len(answer.tokens) == reply


def test_positions_move_only_beyond_the_trained_context(short: Loaded) -> None:
    for document, positions, used in (
        (DOCUMENT, "auto", "original"),
        (DOCUMENT * 6, "auto", "compact"),
        (DOCUMENT, "compact", "compact"),
        (DOCUMENT * 6, "original", "original"),
        (DOCUMENT[:30], "compact", "original"),  # one block: nothing is evicted
    ):
        with short.engine(positions=positions, ratio=0.1) as engine:
            reply = engine.ask(QUESTION, document=document, max_tokens=4)
            assert reply.account.positions == used
            last = 4 + len(first_turn(QUESTION)[1]) - 2
            last += reply.account.kept_tokens if used == "compact" else 7 + len(document)
            assert engine._context is not None
            assert Sequence(engine._context, MAIN).last == last


def test_a_question_longer_than_a_block(loaded: Loaded) -> None:
    """64 tokens with the template around it are asked, 65 refused before anything is read."""
    around = len(first_turn("")[1])
    with loaded.engine() as engine:
        fits = engine.ask("x" * (64 - around), document=DOCUMENT, max_tokens=3)
        assert fits.account.prompt_tokens == 64
        with pytest.raises(UserError, match="65 tokens, more than a block of 64"):
            engine.ask("x" * (65 - around), document=DOCUMENT, max_tokens=3, on_progress=never)
        # where nothing is evicted nothing is asked for that
        assert engine.ask("x" * (90 - around), max_tokens=3).account.prompt_tokens > 64
        short = engine.ask("x" * (90 - around), document="x", max_tokens=3).account
        assert short.kept_tokens == short.document_tokens


def never(_: object) -> None:
    pytest.fail("something was read")


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        ({"ratio": 0}, "ratio"),
        ({"block_size": 0}, "block_size"),
        ({"block_size": 129}, "batch_size=129"),
        ({"protection_divisor": 2}, "protection_divisor"),
        ({"lookahead": -1}, "lookahead"),
        ({"probe_tokens": -1}, "probe_tokens"),
        ({"positions": "somewhere"}, "positions"),
        ({"policy": "lazer"}, "laser"),
        ({"alpha": 1.5}, "alpha"),
        ({"pool": 2}, "pool is 2"),
        ({"hash_bits": 17}, "hash_bits is 17"),
        ({"hash_tables": 0}, "hash_tables is 0"),
    ],
)
def test_unusable_settings_name_their_flag(
    settings: dict[str, Any], flag: str, loaded: Loaded
) -> None:
    with pytest.raises(UserError, match=flag) as caught:
        loaded.engine(**settings)
    assert "\n" not in str(caught.value)


# ---- threads -----------------------------------------------------------------------------------


def test_two_threads_at_once(loaded: Loaded) -> None:
    """Against the same questions one after the other."""
    documents = [DOCUMENT, DOCUMENT[::-1]]
    with loaded.engine() as engine:
        expected = [engine.ask(QUESTION, document=d, max_tokens=16).tokens for d in documents]
        found: dict[int, list[list[int]]] = {0: [], 1: []}
        begin = threading.Barrier(2)

        def work(number: int) -> None:
            begin.wait()
            for _ in range(4):
                reply = engine.ask(QUESTION, document=documents[number], max_tokens=16)
                found[number].append(reply.tokens)

        threads = [threading.Thread(target=work, args=(number,)) for number in found]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()
    assert found == {number: [expected[number]] * 4 for number in found}


def test_a_failed_ask_lets_other_threads_in(loaded: Loaded) -> None:
    """Also while its exception, and with it the traceback, is kept."""

    def fail(_: str) -> None:
        raise ZeroDivisionError

    with loaded.engine() as engine:
        with pytest.raises(ZeroDivisionError) as caught:
            engine.ask(QUESTION, document=DOCUMENT, max_tokens=6, on_text=fail)
        thread = threading.Thread(
            target=lambda: engine.ask(QUESTION, document=DOCUMENT, max_tokens=6), daemon=True
        )
        thread.start()
        thread.join(PATIENCE)
        waiting = thread.is_alive()
        del caught
        gc.collect()
        thread.join(PATIENCE)
        assert not waiting


def test_an_answer_goes_from_thread_to_thread(loaded: Loaded) -> None:
    """As web servers do it: every piece is fetched by whichever thread of a pool is free."""
    with loaded.engine() as engine:
        expected = engine.ask(QUESTION, document=DOCUMENT, max_tokens=4).text
        pieces = iter(engine.stream(QUESTION, document=DOCUMENT, max_tokens=4))
        found: list[str] = []
        with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
            while piece := (other if found else one).submit(next, pieces, "").result(PATIENCE):
                found.append(piece)
        assert "".join(found) == expected


def after_cancelling(engine: LaserKV, run: Callable[[Callable[[Any], None]], Any]) -> int:
    """How often `run` calls what it is given once `cancel` has returned; it runs until then."""
    begun, calls, until = threading.Event(), list[Any](), list[int]()

    def cancel() -> None:
        begun.wait(PATIENCE)
        time.sleep(0.1)  # in the middle of something
        engine.cancel()
        until.append(len(calls))

    def call(given: Any) -> None:
        calls.append(given)
        begun.set()

    thread = threading.Thread(target=cancel)
    thread.start()
    with pytest.raises(Cancelled):
        run(call)
    thread.join(PATIENCE)
    return len(calls) - until[0]


def test_cancel_stops_at_once(loaded: Loaded) -> None:
    """While reading and while answering; the engine is as good as new afterwards."""

    def read(begun: Callable[[Any], None]) -> None:
        engine.ask(QUESTION, document=DOCUMENT * 100, max_tokens=6, on_progress=begun)

    def answer(begun: Callable[[Any], None]) -> None:
        engine.ask(QUESTION, document=DOCUMENT, max_tokens=30_000, on_text=begun)

    with loaded.engine(positions="original") as engine:
        expected = engine.ask(QUESTION, document=DOCUMENT, max_tokens=6).tokens
        assert after_cancelling(engine, read) <= 1
        assert in_cache(engine) == 0
        assert engine.ask(QUESTION, document=DOCUMENT, max_tokens=6).tokens == expected
        assert after_cancelling(engine, answer) <= 1
        assert engine.ask(QUESTION, document=DOCUMENT, max_tokens=6).tokens == expected


def test_cancel_without_anything_under_way(loaded: Loaded) -> None:
    """It stops what is under way, and nothing is."""
    with loaded.engine() as engine:
        engine.cancel()
        expected = engine.ask(QUESTION, document=DOCUMENT, max_tokens=6).tokens
        engine.cancel()
        assert engine.ask(QUESTION, document=DOCUMENT, max_tokens=6).tokens == expected


def test_cancel_between_turns(loaded: Loaded) -> None:
    """A cancel that comes when the answer has just ended does not stop the next one."""
    with loaded.engine() as engine:
        conversation = engine.conversation(document=DOCUMENT, max_tokens=6)
        turn(conversation, "one?")
        engine.cancel()
        assert len(turn(conversation, "two?").tokens) == 6


def test_cancel_before_the_first_block(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a long document is tokenised: nothing of it is read after that."""
    real = loaded.model.tokenize
    with loaded.engine() as engine:
        engine.ask(QUESTION, max_tokens=1)

        def tokenize(text: str, **options: Any) -> NDArray[np.int32]:
            if text == DOCUMENT:
                engine.cancel()
            return real(text, **options)

        monkeypatch.setattr(loaded.model, "tokenize", tokenize)
        read: list[int] = []
        with pytest.raises(Cancelled):
            engine.ask(
                QUESTION,
                document=DOCUMENT,
                max_tokens=6,
                on_progress=lambda progress: read.append(progress.read),
            )
        assert read == []


def test_nothing_is_left_in_scratch_sequences(loaded: Loaded) -> None:
    with loaded.engine() as engine:
        engine.ask(QUESTION, document=DOCUMENT, max_tokens=3)
        assert engine._context is not None
        for number in range(PROBE, 8):
            assert Sequence(engine._context, number).last == -1
