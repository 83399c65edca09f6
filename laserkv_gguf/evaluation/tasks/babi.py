"""bAbI's files: stories of facts with questions between them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from laserkv_gguf.errors import UserError
from laserkv_gguf.evaluation.background import read_text


@dataclass(frozen=True)
class Story:
    """The facts told before a question, the question, and its answer."""

    facts: tuple[str, ...]
    question: str
    answer: str


@lru_cache(maxsize=16)
def stories(folder: Path, task: str) -> tuple[Story, ...]:
    """All questions of a task's files; the test split's where there is more than one.

    Raises:
        UserError: no such folder or file, or a line that is no bAbI (file and line are named).
    """
    if not folder.is_dir():
        raise UserError(f"--babi {folder} is no folder; name the one with bAbI's qa1_….txt files")
    names = sorted(folder.glob(f"{task}_*.txt"))
    if not names:
        raise UserError(
            f"--babi {folder} has no {task}_*.txt; name the folder with bAbI's task files "
            "(tasks_1-20_v1-2/en)"
        )
    tests = [name for name in names if "_test" in name.name]
    path = (tests or names)[0]
    found = tuple(parse(read_text(path), str(path)))
    if not found:
        raise UserError(f"{path} has no question; is it a bAbI task file?")
    return found


def parse(text: str, name: str = "text") -> list[Story]:
    """Every question with the facts told before it in its story.

    Raises:
        UserError: a line that is neither a fact nor a question; file and line are named.
    """
    found: list[Story] = []
    facts: list[str] = []
    before = 0
    for line, content in enumerate(text.splitlines(), 1):
        if not content.strip():
            continue
        number, _, rest = content.partition(" ")
        if not (number.isdigit() and rest.strip()):
            raise UserError(f"{name}, line {line}: not a bAbI line (a number, then a sentence)")
        if int(number) == 1:
            facts = []
        elif int(number) != before + 1:
            raise UserError(f"{name}, line {line}: number {number} follows {before}")
        before = int(number)
        question, *answer = rest.split("\t")
        if not answer:
            facts.append(question.strip())
        elif not answer[0].strip() or not facts:
            raise UserError(f"{name}, line {line}: a question without an answer or without facts")
        else:
            found.append(Story(tuple(facts), question.strip(), answer[0].strip()))
    return found
