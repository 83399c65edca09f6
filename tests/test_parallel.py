"""Answers generated together, against `ask` one at a time and against plain llama.cpp.

Keys and values are f32 here, so that what rounding does to the order of a sum decides nothing.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from typing import Any

import llama_cpp as L
import numpy as np
import pytest
from numpy.typing import NDArray
from test_session import DOCUMENT, OPTIONS, SPEC, Loaded, first_turn, greedy, turn

from laserkv_gguf.api import LaserKV
from laserkv_gguf.conversation import parallel
from laserkv_gguf.conversation.account import Account
from laserkv_gguf.conversation.generation import Reply
from laserkv_gguf.conversation.parallel import Question, Spent, answer
from laserkv_gguf.errors import Cancelled, LaserKVError, UserError
from laserkv_gguf.llama.context import SEQUENCES
from laserkv_gguf.llama.sampler import Sampling
from laserkv_gguf.llama.sequence import Sequence

# Of different lengths, so that they end at different steps and others take their places.
QUESTIONS = [
    Question("What is ore?", max_tokens=5),
    Question("Where is tin11?", max_tokens=13),
    Question("Why?", max_tokens=1),
    Question("How many coppers are there in all of it?", max_tokens=9),
    Question("Who asks?", max_tokens=2),
    Question("What is ore?", max_tokens=11),
    Question("And then?", max_tokens=7),
    Question("tin0", max_tokens=6),
    Question("ore19", max_tokens=8),
    Question("Is it?", max_tokens=10),
    Question("What else?", max_tokens=3),
]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    one = Loaded(tmp_path_factory.mktemp("parallel"), SPEC)
    yield one
    one.model.close()


class Answers(dict[int, Any]):
    """Replies and errors by number, each given once."""

    spent: Spent

    def take(self, index: int, reply: Reply | Exception) -> None:
        assert index not in self
        self[index] = reply

    @property
    def tokens(self) -> list[list[int]]:
        return [self[index].tokens for index in sorted(self)]


def answered(engine: LaserKV, questions: list[Question] = QUESTIONS, **options: Any) -> Answers:
    answers = Answers()
    options = {"document": DOCUMENT, **options}
    answers.spent = answer(engine, questions, answers.take, **options)
    assert nothing_but_the_document_is_left(engine)
    return answers


def nothing_but_the_document_is_left(engine: LaserKV) -> bool:
    context = engine._context
    return context is None or all(
        Sequence(context, number).last == -1 for number in range(1, engine.options.sequences)
    )


def alone(engine: LaserKV, question: Question, **options: Any) -> Reply:
    options = {"document": DOCUMENT, **options}
    return engine.ask(
        question.text, system=question.system, max_tokens=question.max_tokens, **options
    )


def counts(account: Account) -> dict[str, Any]:
    """What is no time."""
    return {key: value for key, value in account.as_dict().items() if "second" not in key}


@pytest.mark.parametrize("mode", ["replay", "shortlist"])
def test_recall_reads_once_and_asks_each_question_anew(mode: str, loaded: Loaded) -> None:
    """As a conversation of its own for every question, whatever was asked before."""
    questions = QUESTIONS[:4]
    with loaded.engine(recall="ram", recall_mode=mode) as engine:
        expected = []
        for question in questions:
            talk = engine.conversation(document=DOCUMENT, max_tokens=question.max_tokens)
            talk.read()
            expected.append(turn(talk, question.text))
        again = answered(engine, questions, answered={0, 2})
        answers = answered(engine, questions, parallel=3)
    assert answers.spent.readings == 1
    assert answers.tokens == [reply.tokens for reply in expected]
    assert again.tokens == [expected[1].tokens, expected[3].tokens]
    for index, reply in enumerate(expected):
        account = answers[index].account
        assert account.recall == "ram"
        assert account.parked_tokens == account.document_tokens
        assert account.kept_tokens == reply.account.kept_tokens
        assert account.recalled_tokens > 0
        assert account.recall_seconds > 0


# ---- the same answers --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "positions"),
    [
        ("keydiff", "original"),
        ("keydiff", "compact"),
        ("streamingllm", "compact"),
        ("h2o", "original"),
        ("full", "original"),
    ],
)
def test_together_as_one_at_a_time(policy: str, positions: str, loaded: Loaded) -> None:
    """Read once, for more answers at a time than a context has sequences by itself."""
    with loaded.engine(policy=policy, positions=positions) as engine:
        expected = [alone(engine, question) for question in QUESTIONS]
        for together in (1, 3, SEQUENCES + 2):
            answers = answered(engine, parallel=together)
            assert answers.tokens == [reply.tokens for reply in expected]
            assert [answers[i].text for i in range(len(answers))] == [r.text for r in expected]
            assert answers.spent.readings == 1
            assert answers.spent.tokens == sum(question.max_tokens for question in QUESTIONS)
            for index, reply in enumerate(expected):
                assert answers[index].finish_reason == "length"
                found, known = counts(answers[index].account), counts(reply.account)
                for key in ("ctx_cells", "kv_bytes"):
                    assert found.pop(key) >= known.pop(key)
                assert found == known


def test_nothing_evicted_equals_plain_llama_cpp(loaded: Loaded) -> None:
    with loaded.engine(policy="full") as engine:
        answers = answered(engine, parallel=4)
    for index, question in enumerate(QUESTIONS):
        before, after = first_turn(question.text)
        assert answers[index].tokens == greedy(loaded, before + after, question.max_tokens)


def test_without_a_document_and_with_system_prompts(loaded: Loaded) -> None:
    questions = [
        Question("one?", max_tokens=5),
        Question("two?", system="Be brief.", max_tokens=6),
        Question("three?", max_tokens=7),
        Question("four?", system="Be brief.", max_tokens=4),
    ]
    with loaded.engine(recall="off") as engine:
        for document in (None, DOCUMENT):
            answers = answered(engine, questions, document=document, read_once=False, parallel=2)
            expected = [alone(engine, question, document=document) for question in questions]
            assert answers.tokens == [reply.tokens for reply in expected]
            # laser asks: of the long document each question has its own reading
            assert answers.spent.readings == (4 if document else 2)


@pytest.mark.parametrize("policy", ["laser", "snapkv", "tova"])
def test_policies_that_ask_read_for_each_question(policy: str, loaded: Loaded) -> None:
    with loaded.engine(policy=policy, recall="off") as engine:
        expected = [alone(engine, question) for question in QUESTIONS[:4]]
        answers = answered(engine, QUESTIONS[:4], parallel=3)
        assert answers.tokens == [reply.tokens for reply in expected]
        assert answers.spent.readings == 4
        for index, reply in enumerate(expected):
            assert counts(answers[index].account) == counts(reply.account)
            assert answers[index].account.prefill_seconds > 0
            times = answers[index].account
            assert times.prefill_seconds < times.first_token_seconds


@pytest.mark.parametrize("positions", ["original", "compact"])
def test_read_once_is_the_reading_of_a_conversation(positions: str, loaded: Loaded) -> None:
    """Which does not know its questions either."""
    with loaded.engine(policy="laser", positions=positions, recall="off") as engine:
        expected = []
        for question in QUESTIONS:
            conversation = engine.conversation(document=DOCUMENT, max_tokens=question.max_tokens)
            conversation.read()
            expected.append(turn(conversation, question.text).tokens)
        answers = answered(engine, parallel=4, read_once=True)
        assert answers.tokens == expected
        assert answers.spent.readings == 1
        asking = [alone(engine, question).tokens for question in QUESTIONS]
        assert asking != expected  # else this shows nothing


def test_what_evicts_nothing_is_read_once_by_any_policy(loaded: Loaded) -> None:
    document = DOCUMENT[:40]  # one block
    with loaded.engine(policy="laser") as engine:
        expected = [alone(engine, question, document=document).tokens for question in QUESTIONS]
        answers = answered(engine, document=document, parallel=4)
        assert answers.tokens == expected
        assert answers.spent.readings == 1


def test_a_document_is_tokenised_once(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    real, seen = loaded.model.tokenize, []

    def tokenize(text: str, **options: Any) -> NDArray[np.int32]:
        seen.append(text)
        return real(text, **options)

    monkeypatch.setattr(loaded.model, "tokenize", tokenize)
    with loaded.engine(policy="laser") as engine:
        answered(engine, QUESTIONS[:3], parallel=2)
    assert seen.count(DOCUMENT) == 1


def test_sampling_is_each_answer_s_own(loaded: Loaded) -> None:
    sampling = Sampling(temperature=2.0, top_k=0, top_p=1.0, min_p=0.0, seed=3)
    with loaded.engine(policy="keydiff") as engine:
        expected = [alone(engine, question, sampling=sampling).tokens for question in QUESTIONS]
        assert answered(engine, parallel=4, sampling=sampling).tokens == expected


def test_a_step_is_one_batch(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of llama.cpp's calls: after the questions, one for every token of the longest answer."""
    real, sizes = L.llama_decode, []

    def decode(handle: Any, batch: Any) -> int:
        sizes.append(batch.n_tokens)
        return int(real(handle, batch))

    questions = [Question(f"number {i}?", max_tokens=6) for i in range(8)]
    with loaded.engine(policy="keydiff") as engine:
        answered(engine, questions[:1], parallel=8)
        monkeypatch.setattr(L, "llama_decode", decode)
        answered(engine, questions, parallel=8)
    assert sizes[-5:] == [8] * 5
    blocks = -(-len(first_turn("")[0]) // 32)
    assert len(sizes) <= blocks + 3 + len(questions) + 5


# ---- where answers end -------------------------------------------------------------------------


def test_stop_strings(loaded: Loaded) -> None:
    """A token is a character or a byte here: every longer string straddles tokens."""
    question = Question("Where is tin11?", max_tokens=40)
    with loaded.engine(policy="keydiff") as engine:
        whole = alone(engine, question).text
        stops = [(whole[at : at + 3],) for at in (0, 2, 9, 17)]
        stops += [(whole[20:24], whole[8:10]), ("never said",), (whole[5], whole[4:7])]
        questions = [Question(question.text, max_tokens=40, stop=stop) for stop in stops]
        answers = answered(engine, questions, parallel=3)
    for index, stop in enumerate(stops):
        places = [whole.find(text) for text in stop if text in whole]
        reply = answers[index]
        if not places:
            assert (reply.text, reply.finish_reason) == (whole, "length")
            continue
        assert reply.finish_reason == "stop"
        # the first to be complete ends it
        end = min(whole.find(text) + len(text) for text in stop if text in whole)
        cut = min(at for at in map(whole[:end].find, stop) if at >= 0)
        assert reply.text == whole[:cut]
        assert not any(text in reply.text for text in stop)
        assert len(reply.tokens) < 40


def test_answers_end_by_themselves(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = [Question(f"{name}?", max_tokens=30) for name in "abcdef"]
    with loaded.engine(policy="keydiff") as engine:
        free = [alone(engine, question).tokens for question in questions]
        ending = free[0][3]
        monkeypatch.setattr(loaded.model, "ends_generation", lambda token: token == ending)
        answers = answered(engine, questions, parallel=2)
    assert answers[0].finish_reason == "stop"
    for index, tokens in enumerate(free):
        end = tokens.index(ending) if ending in tokens else len(tokens)
        assert answers[index].tokens == tokens[:end]
        assert answers[index].finish_reason == ("stop" if end < len(tokens) else "length")


# ---- cells -------------------------------------------------------------------------------------


def planned(question: Question) -> int:
    return len(first_turn(question.text)[1]) + question.max_tokens


@pytest.mark.parametrize("together", [1, 2, 5, 30])
def test_cells_are_planned_for_whoever_meets(together: int, loaded: Loaded) -> None:
    with loaded.engine(policy="streamingllm") as engine:
        kept = alone(engine, QUESTIONS[0]).account.kept_tokens
        engine._context.close()  # type: ignore[union-attr]
        engine._context = None
        account = answered(engine, parallel=together)[0].account
        largest = sorted(map(planned, QUESTIONS), reverse=True)[:together]
        reading = max(kept + 64, 128)
        assert account.ctx_cells == max(kept + sum(largest), reading)
        assert engine._context is not None
        assert engine._context.cells == account.ctx_cells
        assert account.kv_bytes == engine._context.kv_bytes


def test_fewer_at_a_time_where_cells_are_few(loaded: Loaded) -> None:
    """What is enough for one is enough for all."""
    with loaded.engine(policy="random") as engine:
        expected = [alone(engine, question).tokens for question in QUESTIONS]
        longest = max(QUESTIONS, key=planned)
        needed = alone(engine, longest).account.ctx_cells
    for cells in (needed, needed + 30, needed + 100):
        with loaded.engine(policy="random", ctx_size=cells) as engine:
            assert answered(engine, parallel=8).tokens == expected
    with loaded.engine(policy="random", ctx_size=needed - 1) as engine:
        answers = answered(engine, parallel=8)
        for index, question in enumerate(QUESTIONS):
            if planned(question) == planned(longest):
                assert re.search(f"use ctx_size={needed}", str(answers[index]))
            else:
                assert answers[index].tokens == expected[index]


def test_what_is_already_answered_changes_no_account(loaded: Loaded) -> None:
    """Else a run that was interrupted would differ from one that was not."""
    with loaded.engine(policy="keydiff") as engine:
        whole = answered(engine, parallel=3)
    for done in ({0, 1, 2}, {1, 3, 5, 7, 9}, set(range(10))):
        with loaded.engine(policy="keydiff") as engine:
            rest = answered(engine, parallel=3, answered=done)
        assert set(rest) == set(range(len(QUESTIONS))) - done
        for index, reply in rest.items():
            assert reply.tokens == whole[index].tokens
            assert counts(reply.account) == counts(whole[index].account)


# ---- what goes wrong ---------------------------------------------------------------------------


def test_one_question_that_cannot_be_asked(loaded: Loaded) -> None:
    """Too long for a block, as `ask` says; the others are answered."""
    questions = [QUESTIONS[0], Question("x" * 100, max_tokens=4), QUESTIONS[1]]
    with loaded.engine(policy="keydiff") as engine:
        expected = [alone(engine, questions[index]).tokens for index in (0, 2)]
        with pytest.raises(UserError) as caught:
            alone(engine, questions[1])
        answers = answered(engine, questions, parallel=2)
        assert [answers[0].tokens, answers[2].tokens] == expected
        assert str(answers[1]) == str(caught.value)


@pytest.mark.parametrize("at", ["reading", "question", "step"])
def test_what_fails_fails_alone(at: str, loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failing decode is the error of those in it; the engine is as good as new afterwards."""
    with loaded.engine(policy="keydiff") as engine:
        expected = answered(engine, parallel=2).tokens
        assert engine._context is not None
        name = "decode_parallel" if at == "step" else "decode"
        real, calls = getattr(engine._context, name), []

        def failing(*arguments: Any, **options: Any) -> None:
            asking = options.get("outputs") == 1
            if at == "step" or asking == (at == "question"):
                calls.append(1)
                if len(calls) == 2:
                    raise LaserKVError("no more")
            real(*arguments, **options)

        monkeypatch.setattr(engine._context, name, failing)
        answers = answered(engine, parallel=2)
        failed = [index for index, reply in answers.items() if isinstance(reply, Exception)]
        assert (
            sorted(failed)
            == {"reading": list(range(len(QUESTIONS))), "question": [1], "step": [0, 1]}[at]
        )
        for index, tokens in enumerate(expected):
            if index not in failed:
                assert answers[index].tokens == tokens
        monkeypatch.undo()
        assert answered(engine, parallel=2).tokens == expected


@pytest.mark.parametrize("raised", [Cancelled, KeyboardInterrupt])
def test_cancel_and_what_the_caller_raises(raised: type[BaseException], loaded: Loaded) -> None:
    """It ends there, and the engine is as good as new."""
    with loaded.engine(policy="keydiff") as engine:
        expected = answered(engine, parallel=3).tokens
        seen: list[int] = []

        def on_reply(index: int, _: Any) -> None:
            seen.append(index)
            if len(seen) == 3 and raised is KeyboardInterrupt:
                raise KeyboardInterrupt
            if len(seen) == 3:
                engine.cancel()

        with pytest.raises(raised):
            answer(engine, QUESTIONS, on_reply, document=DOCUMENT, parallel=3)
        assert len(seen) <= 5  # those that ended in the same step
        assert nothing_but_the_document_is_left(engine)
        assert answered(engine, parallel=3).tokens == expected


@pytest.mark.parametrize("number", [0, -1, 254, 1000])
def test_numbers_that_cannot_be(number: int, loaded: Loaded) -> None:
    with loaded.engine() as engine, pytest.raises(UserError, match=f"parallel={number}:"):
        answered(engine, parallel=number)
    assert OPTIONS.batch_size == 128 < parallel.MOST


def test_other_threads_wait(loaded: Loaded) -> None:
    with loaded.engine(policy="keydiff") as engine:
        expected = alone(engine, QUESTIONS[1]).tokens
        found: list[list[int]] = []
        threads = [
            threading.Thread(target=lambda: found.append(alone(engine, QUESTIONS[1]).tokens))
            for _ in range(2)
        ]

        def on_reply(index: int, _: Any) -> None:
            if index == 2:
                for thread in threads:
                    thread.start()

        answer(engine, QUESTIONS, on_reply, document=DOCUMENT, parallel=3)
        for thread in threads:
            thread.join(300)
        assert found == [expected, expected]
