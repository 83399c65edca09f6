"""Where in a user's message the question begins.

Clients send document and question as one string (`llm -f`), or as parts of a message. What stands
before the question is the document: it is read for the question, in blocks, and stays for the next.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

MOST = 512  # tokens of a question that stands behind an empty line
ASKING = 64  # tokens that look at a document, where a few would not say what is asked
TAIL = 256  # tokens of the text's end that are taken where no empty line says where it begins

_WRAPPED = re.compile(r"<user_query>.*?</user_query>\s*\Z", re.DOTALL)
_EMPTY_LINE = re.compile(r"\n[ \t\r]*\n\s*")
_LABEL = re.compile(r"\s*[^\s.!?]+(?:[ \t]+[^\s.!?]+){0,2}[ \t]*[:：]\s*\Z")
_WORD = 8  # characters of a token at most, on the way to where to cut; more is cut exactly


@dataclass(frozen=True)
class Limits:
    """How long a question is.

    Attributes:
        most: tokens behind an empty line.
        tail: tokens where there is no such line.
    """

    most: int = MOST
    tail: int = TAIL

    @classmethod
    def of_block(cls, block: int) -> Limits:
        """A question, with the template around it, goes into a block."""
        return cls(min(MOST, max(block // 2, 1)), min(TAIL, max(block // 4, 1)))


def split(text: str, count: Callable[[str], int], limits: Limits) -> tuple[str, str]:
    """A document and the question behind it.

    The question is what `<user_query>` wraps at the end; else all of a short text; else what stands
    behind the last empty line; else the last tokens. Where that is a mere label, such as `Answer:`,
    the paragraph in front of it belongs to it.

    Args:
        count: tokens of a text.

    Returns:
        Both, which together are the text; the document may be empty.
    """
    if found := _WRAPPED.search(text):
        at = found.start()
        if count(text[at:]) <= limits.most:
            return text[:at], text[at:]
    if len(text) <= limits.most or (
        len(text) <= limits.most * _WORD * 2 and count(text) <= limits.most
    ):
        return "", text
    ends = len(text.rstrip())
    cut = None
    for found in reversed(list(_EMPTY_LINE.finditer(text, 0, ends))):
        at = found.end()
        if at >= ends:
            continue
        if ends - at > limits.most * _WORD * 2 or count(text[at:]) > limits.most:
            break
        cut = at
        if not _LABEL.fullmatch(text, at):
            break
    if cut is not None:
        return text[:cut], text[cut:]
    at = max(0, len(text) - limits.tail * _WORD)
    while count(text[at:]) > limits.tail:
        at += max(1, (len(text) - at) // 8)
    space = re.compile(r"\s").search(text, at)  # no word is cut in two, where there are words
    if space and space.end() < ends and space.end() - at < limits.tail:
        at = space.end()
    return text[:at], text[at:]


def ends_in_label(question: str) -> bool:
    """Whether a question's last line is a mere label such as `Answer:`, which asks nothing."""
    lines = question.rstrip().splitlines()
    return len(lines) > 1 and _LABEL.fullmatch(lines[-1]) is not None


def instruction(document: str) -> str:
    """What a document begins with, if that tells or asks who reads it something; else nothing.

    Titles and a document's own sentences do not end in a colon or a question mark.
    """
    first = _EMPTY_LINE.split(document.lstrip(), maxsplit=1)[0].strip()
    short = 0 < len(first) <= ASKING * _WORD and len(first) < len(document.strip())
    return first if short and first[-1] in ":?" and "\n" not in first else ""
