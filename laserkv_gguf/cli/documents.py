"""Documents from files and standard input: UTF-8 text, Markdown, PDF."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from laserkv_gguf.cli import streams
from laserkv_gguf.cli.terminal import size as human
from laserkv_gguf.errors import UserError
from laserkv_gguf.files import texts

STANDARD_INPUT = "-"


def load(names: Sequence[str]) -> str | None:
    """The text of all documents, a blank line between them; None where none are named.

    Raises:
        UserError: missing, no regular file, too large, empty, not UTF-8, binary, or a PDF that has
            no text, is damaged or needs an extra. Paths are not confined to any folder.
    """
    if not names:
        return None
    if list(names).count(STANDARD_INPUT) > 1:
        raise UserError("--document - was given twice; standard input can be read once")
    return "\n\n".join(read(name) for name in names)


def read(name: str) -> str:
    """The text of one document; `-` is standard input."""
    data = _bytes(name)
    said = "standard input" if name == STANDARD_INPUT else name
    return texts.of_bytes(said, data)


def _bytes(name: str) -> bytes:
    if name == STANDARD_INPUT:
        if sys.stdin.isatty():
            streams.complain("reading the document from standard input; end with Ctrl-D")
        return _limited("standard input", sys.stdin.buffer, 0)
    try:
        _check_kind(name, Path(name).stat().st_mode)
        # what is swapped for a pipe meanwhile must not make us wait for its other end
        flags = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        number = os.open(name, os.O_RDONLY | flags)
        try:
            found = os.fstat(number)
            _check_kind(name, found.st_mode)
            with os.fdopen(number, "rb", closefd=False) as file:
                return _limited(name, file, found.st_size)
        finally:
            os.close(number)
    except FileNotFoundError:
        raise UserError(f"no document at {name}; check the path") from None
    except OSError as error:
        raise UserError(f"cannot read {name}: {error.strerror}") from error
    except ValueError:  # a NUL
        raise UserError(f"{name} is no name of a file; check the path") from None


def _check_kind(name: str, mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise UserError(f"{name} is a folder; name the file to read")
    if not stat.S_ISREG(mode):
        kind = "a pipe" if stat.S_ISFIFO(mode) else "a device, not a file"
        raise UserError(f"{name} is {kind}; name a file, or pipe it into ask with --document -")


def _limited(name: str, file: IO[bytes], size: int) -> bytes:
    """A file's bytes.

    Args:
        size: bytes that it says it has.

    Raises:
        UserError: they are more than what is read.
    """
    head = (
        file.read(len(texts.PDF)) or b""
    )  # None where a file of the system has nothing to say yet
    most = texts.MOST_PDF if head == texts.PDF else texts.limit()
    data = head if size > most else head + (file.read(most + 1 - len(head)) or b"")
    if max(size, len(data)) > most:
        has = f"has {human(size)}" if size > most else f"has more than {human(most)}"
        if head == texts.PDF:
            raise UserError(f"{name} {has}; at most {human(texts.MOST_PDF)} of a PDF are read")
        raise UserError(
            f"{name} {has}; at most {human(most)} of text are read, for {texts.MEMORY} times as "
            "much memory goes into making tokens of it: give a part of it"
        )
    return data
