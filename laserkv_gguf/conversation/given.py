"""What people give in place of a text, and what is said about it."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np

from laserkv_gguf.errors import UserError, check_type

log = logging.getLogger(__name__)

_LONGEST = 4096  # characters of a path


def check_document(name: str, text: object) -> None:
    """Refuses what is no document, and warns of a text that is the path of a file.

    Args:
        name: what the text was given as.
        text: a text, or its tokens.

    Raises:
        UserError: a path, or something else that is no text; with the remedy.
    """
    if isinstance(text, os.PathLike):
        raise UserError(
            f"{name} is a path, and a text is wanted; give {_contents(os.fspath(text))}"
        )
    if isinstance(text, np.ndarray):
        return
    if isinstance(text, bytes):
        raise UserError(f"{name} is bytes; give a text: .decode('utf-8')")
    check_type(name, text, str)
    assert isinstance(text, str)
    if _is_file(text):
        log.warning(
            "the %s is the text %r itself, not the file of that name; for the file give %s",
            name,
            text,
            _contents(text),
        )


def check_answer(system: object, max_tokens: object) -> None:
    """Refuses other types than an answer is asked for with.

    Raises:
        UserError: with the remedy.
    """
    check_type("system", system, str | None)
    check_type("max_tokens", max_tokens, int)


def _contents(path: str | bytes) -> str:
    return f"Path({os.fsdecode(path)!r}).read_text('utf-8')"


def _is_file(text: str) -> bool:
    if not text or len(text) > _LONGEST or "\n" in text or "\0" in text:
        return False
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # too long a name, or none that a file can have
        return False
