"""Text that hides what is asked for: sentences of files."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path

from laserkv_gguf.errors import UserError

Prompts = Mapping[str, Mapping[str, str]]

_GUTENBERG = re.compile(r"\*\*\* ?START OF.*?\*\*\*(.*)\*\*\* ?END OF", re.DOTALL)
# white space after a full stop that ends no title, in front of a capital
_SENTENCE = re.compile(
    r"(?:(?<=[.!?])|(?<=[.!?][\"'”’)\]]))(?<!\bMr\.)(?<!\bMrs\.)(?<!\bDr\.)(?<!\bSt\.)"
    r"\s+(?=[\"'“‘(\[_]*[A-Z0-9])"
)


@dataclass(frozen=True)
class Background:
    """A text in sentences.

    Attributes:
        name: where it comes from, as messages call it.
        text: all of it.
    """

    name: str
    text: str

    @classmethod
    def load(cls, path: Path | None) -> Background:
        """A file, the text files of a folder in the order of their names, or the packaged story.

        Raises:
            UserError: nothing there, or not UTF-8.
        """
        if path is None:
            story = files("laserkv_gguf") / "data" / "sample.txt"
            return cls("the packaged story", story.read_text("utf-8"))
        names = sorted(path.glob("*.txt")) if path.is_dir() else [path]
        if not names:
            raise UserError(f"--background {path} has no *.txt files; name a folder of texts")
        return cls(str(path), "\n\n".join(_body(read_text(name)) for name in names))

    @cached_property
    def sentences(self) -> list[str]:
        """In order, white space made single blanks."""
        found = []
        for paragraph in re.split(r"\n\s*\n", self.text):
            found += [" ".join(part.split()) for part in _SENTENCE.split(paragraph)]
        return [sentence for sentence in found if sentence]

    @property
    def digest(self) -> str:
        """Of the text, to tell one background from another."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def _body(text: str) -> str:
    """Without Project Gutenberg's licence around it."""
    found = _GUTENBERG.search(text)
    return found.group(1) if found else text


def read_text(path: Path) -> str:
    """A UTF-8 file.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the path") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 (byte {error.start}); "
            "convert it, for example with iconv -f latin1 -t utf-8"
        ) from error


def read_prompts(path: Path) -> Prompts:
    """BABILong's instructions, in the form of its own `DEFAULT_PROMPTS`.

    Raises:
        UserError: no JSON of {"qa1": {"instruction": …, "examples": …, "post_prompt": …}, …}.
    """
    try:
        prompts = json.loads(read_text(path))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    wanted = {"instruction", "examples", "post_prompt"}
    if not isinstance(prompts, dict):
        raise UserError(f"{path} holds no object of tasks; see --help")
    for task, parts in prompts.items():
        given = parts if isinstance(parts, dict) else {}
        if not all(isinstance(given.get(key), str) for key in wanted):
            raise UserError(f"{path}: {task} needs the texts {', '.join(sorted(wanted))}")
    return prompts
