"""Where a question begins in what clients send, on texts whose answer is plain to see."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from laserkv_gguf.conversation.question import Limits, ends_in_label, instruction, split

BOOK = "Once there was a house. It stood on a hill.\n\n" * 400
LIMITS = Limits()


def words(text: str) -> int:
    return len(text.split())


@pytest.mark.parametrize(
    ("text", "question"),
    [
        ("What is ore?", "What is ore?"),
        ("A short note.\n\nWhat is it?", "A short note.\n\nWhat is it?"),
        (BOOK + "Who lived there?", "Who lived there?"),
        (BOOK + "Who lived there?\n\n", "Who lived there?\n\n"),
        (BOOK + "Who lived there?\n\nAnswer:", "Who lived there?\n\nAnswer:"),
        (BOOK + "Question: who?\nAnswer:", "Question: who?\nAnswer:"),
        (BOOK + "<user_query>\nWho?\n\nAnd why?\n</user_query>",
         "<user_query>\nWho?\n\nAnd why?\n</user_query>"),
        (BOOK + "a b  \n \t\n c d", "c d"),
    ],
)  # fmt: skip
def test_the_question_is_found(text: str, question: str) -> None:
    assert split(text, words, LIMITS) == (text.removesuffix(question), question)


def test_without_an_empty_line_the_end_asks() -> None:
    text = "word " * 5000 + "who is it?"
    document, question = split(text, words, LIMITS)
    assert document + question == text
    assert question.endswith("who is it?")
    assert LIMITS.tail // 2 <= words(question) <= LIMITS.tail


@given(st.text(alphabet="ab:.\n <>?/", max_size=400), st.integers(1, 40), st.integers(1, 40))
def test_nothing_is_lost(text: str, most: int, tail: int) -> None:
    """Whatever is cut, both parts are the text, and the question is not longer than it may be."""
    limits = Limits(max(most, tail), tail)
    document, question = split(text * 8, len, limits)
    assert document + question == text * 8
    if document:
        assert question
        assert len(question) <= limits.most


def test_instructions_and_labels() -> None:
    assert instruction("Summarise this for a child:\n\n" + BOOK) == "Summarise this for a child:"
    assert instruction("Alice in Wonderland\n\n" + BOOK) == ""
    assert instruction("What is it?") == ""
    assert ends_in_label("Who lived there?\nAnswer:")
    assert not ends_in_label("Who lived there?")
    assert not ends_in_label("Answer:")
