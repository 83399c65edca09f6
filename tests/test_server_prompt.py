"""A request as tokens: what is read, what asks, and what looks at the document for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_session import OPTIONS, TEMPLATE
from tiny import TinySpec, make

from laserkv_gguf.api import LaserKV
from laserkv_gguf.conversation.conversation import Conversation
from laserkv_gguf.conversation.question import Limits
from laserkv_gguf.server.prompt import Rendered, of_messages

BOOK = "\n\n".join(f"House {n} has the number {n * 37 % 101}." for n in range(60))
LIMITS = Limits(40, 20)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LaserKV]:
    folder: Path = tmp_path_factory.mktemp("prompt")
    model = make(folder, spec=TinySpec(layers=2, ctx_train=4096, chat_template=TEMPLATE)).path
    with LaserKV(model, context=OPTIONS, block_size=64, ratio=0.25, lookahead=3) as one:
        yield one


def said(engine: LaserKV, tokens: np.ndarray) -> str:
    return engine.model.text(tokens)


def test_a_request_is_cut_where_it_asks(engine: LaserKV) -> None:
    messages = [("system", ["Be brief."]), ("user", [BOOK + "\n\nWhich is it?"])]
    request = of_messages(engine, messages, LIMITS)
    assert said(engine, request.tokens[: request.system]) == "[system]Be brief."
    assert said(engine, request.before) == f"[system]Be brief.\n[user]{BOOK}\n\n"
    assert said(engine, request.tokens[request.asked :]) == "Which is it?\n[assistant]"
    assert said(engine, request.tokens[-request.ending :]) == "\n[assistant]"
    # the next turn begins with the same tokens
    later = of_messages(
        engine, [*messages, ("assistant", ["Ore."]), ("user", ["And why?"])], LIMITS
    )
    np.testing.assert_array_equal(later.tokens[: len(request)], request.tokens)
    assert said(engine, later.tokens[later.asked :]) == "And why?\n[assistant]"


def test_what_looks_at_the_document(engine: LaserKV) -> None:
    def probing(text: str, question: str | None = None) -> tuple[str, int | None]:
        request = of_messages(engine, [("user", [text])], LIMITS, question)
        probe = request.after(request.asked).probing
        return said(engine, probe.tokens), probe.asking

    assert probing(BOOK + "\n\nWhich?") == ("Which?\n[assistant]", None)
    assert probing(BOOK + "\n\nWhich?", "Where is it?") == ("Where is it?\n[assistant]", None)
    assert probing(BOOK + "\n\nWhich?\nAnswer:") == ("Which?\nAnswer:\n[assistant]", 14)
    first = "Find a house:\n\n"
    asked, count = probing(first + BOOK + "\n\nWhich?")
    assert asked == "Find a house:\n\nWhich?\n[assistant]"
    assert count == len("Find a house:\n\nWhich?")


def test_a_document_is_read_for_what_looks_at_it(engine: LaserKV) -> None:
    """With a probe beside the question as if the probe had been asked."""

    def kept(text: str, question: str | None = None) -> list[int]:
        request = of_messages(engine, [("user", [BOOK + "\n\n" + text])], LIMITS, question)
        framing = Rendered(plain=True, first=request.tokens[:1], asked=request.after(request.asked))
        document = request.tokens[1 : request.asked]
        conversation = Conversation(engine, document=document, framing=framing, max_tokens=8)
        return list(conversation.read(question="").kept)

    asked = kept("Where is it?")
    assert kept("Which is red?") != asked
    assert kept("Which is red?", "Where is it?") == asked


def test_more_of_a_question_can_ask(engine: LaserKV) -> None:
    request = of_messages(engine, [("user", [BOOK + "\n\nWhere is the red one?"])], LIMITS)
    found = {}
    for asking in (None, 1, 12):
        prompt = replace(request.after(request.asked), asking=asking)
        framing = Rendered(plain=True, first=request.tokens[:1], asked=prompt)
        document = request.tokens[1 : request.asked]
        conversation = Conversation(engine, document=document, framing=framing, max_tokens=8)
        found[asking] = list(conversation.read(question="").kept)
    assert found[1] != found[12]
    assert len(found[1]) == len(found[12])
