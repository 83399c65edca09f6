"""Prompt lookup: what is guessed changes how fast an answer comes, not the answer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from test_session import DOCUMENT, OPTIONS, SPEC, Loaded

from laserkv_gguf.api import LaserKV
from laserkv_gguf.cli.options import EngineOptions
from laserkv_gguf.conversation.lookup import Lookup
from laserkv_gguf.errors import UserError
from laserkv_gguf.llama.context import Context
from laserkv_gguf.llama.sampler import Sampling

SETTINGS = {"block_size": 64, "ratio": 0.4, "lookahead": 3}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    one = Loaded(tmp_path_factory.mktemp("lookup"), SPEC)
    yield one
    one.model.close()


def test_what_followed_last_time() -> None:
    text = np.array([1, 2, 3, 9, 1, 2, 3, 8, 7, 6, 5], np.int32)
    lookup = Lookup(text, 8)
    assert lookup.drafts([4, 1, 2, 3], 8) == [8, 7, 6, 5]
    assert lookup.drafts([4, 1, 2, 3], 2) == [8, 7]
    assert lookup.drafts([9, 1, 2, 3], 8) == [8, 7, 6, 5]
    assert lookup.drafts([1, 2], 8) == []  # too little to tell by
    assert lookup.drafts([7, 6, 5], 8) == []  # nothing follows
    assert lookup.drafts([1, 2, 4], 8) == []
    assert lookup.drafts([1, 2, 3], 0) == []
    assert Lookup(text[:0], 8).drafts([1, 2, 3], 8) == []


def test_it_rests_where_it_does_not_pay() -> None:
    text = np.arange(100, dtype=np.int32)
    lookup = Lookup(text, 8)
    sizes = []
    for at in range(3, 60):
        drafts = lookup.drafts([at - 2, at - 1, at], 8)
        sizes.append(len(drafts))
        if drafts:
            lookup.judge(len(drafts), 0)
    assert sizes[0] == 4
    assert sizes.count(0) > 40
    for at in range(3, 40):
        drafts = lookup.drafts([at - 2, at - 1, at], 8)
        if drafts:
            lookup.judge(len(drafts), len(drafts))
    assert len(lookup.drafts([1, 2, 3], 8)) == 8


@pytest.mark.parametrize("right", [0, 1, 2, 9])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("recall", ["off", "ram"])
def test_answers_are_as_without(
    right: int,
    temperature: float,
    recall: str,
    loaded: Loaded,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever is guessed: of every guess so many tokens are right. So are the turns after it."""

    def turns(engine: LaserKV) -> list[Any]:
        talk = engine.conversation(
            document=DOCUMENT, max_tokens=12, sampling=Sampling(temperature, seed=3)
        )
        found = []
        for number in range(3):
            answer = talk.ask(f"What of {number}?")
            text = "".join(answer)
            assert text == answer.reply.text
            found.append((answer.reply.tokens, talk.pending, talk.ledger.rows.tolist()))
        return found

    options: dict[str, Any] = {**SETTINGS, "recall": recall, "positions": "original"}
    with LaserKV(loaded.model, context=OPTIONS, **options) as engine:
        expected = turns(engine)
    answers = [tokens for tokens, _, _ in expected]

    def drafts(_: Lookup, said: list[int], room: int) -> list[int]:
        answer = next(one for one in answers if one[: len(said)] == said)
        guess = answer[len(said) : len(said) + right]
        return [*guess, *[5] * (4 - len(guess))][: min(room, 4)]

    monkeypatch.setattr(Lookup, "drafts", drafts)
    widths: list[int] = []
    real = Context.compute

    def compute(context: Context, jobs: Any, **given: Any) -> None:
        widths.extend(len(job) for job in jobs if job.generates)
        real(context, jobs, **given)

    monkeypatch.setattr(Context, "compute", compute)
    with LaserKV(loaded.model, context=OPTIONS, lookup=8, **options) as engine:
        assert turns(engine) == expected
    assert max(widths) == 5
    assert (len(widths) < 12) == (right > 2)


def test_evicted_tokens_can_be_copied(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = []
    real = Lookup.__init__

    def init(self: Lookup, text: Any, most: int) -> None:
        texts.append(text)
        real(self, text, most)

    monkeypatch.setattr(Lookup, "__init__", init)
    options: dict[str, Any] = {**SETTINGS, "lookup": 8}
    with LaserKV(loaded.model, context=OPTIONS, **options) as engine:
        talk = engine.conversation(documents={"a": DOCUMENT, "b": "iron"}, max_tokens=2)
        list(talk.ask("What?"))
        assert len(talk.ledger) < len(DOCUMENT)
        list(engine.conversation(max_tokens=2).ask("What?"))  # nothing to copy from
    assert len(texts) == 1
    assert engine.model.text(texts[0]) == DOCUMENT + "\n\niron"


def test_refused(loaded: Loaded) -> None:
    with pytest.raises(UserError, match="lookup is -1"):
        LaserKV(loaded.model, context=OPTIONS, lookup=-1)


def test_the_flag(loaded: Loaded) -> None:
    with EngineOptions(lookup=8).engine(model=loaded.model) as engine:
        assert engine.lookup == 8
