"""Standard input, output and error, some of which may be closed, full or not UTF-8."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator

from laserkv_gguf.errors import LaserKVError, UserError


class OutputLost(LaserKVError):
    """Standard output takes no more: there is nobody to answer."""


def prepare() -> None:
    """Makes all three usable, whatever they were when the process was started.

    Where one is closed Python has none, and the next file that is opened gets its number: what
    llama.cpp writes to number 2 would go into that file.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    if sys.stdin is None:
        sys.stdin = os.fdopen(os.open(os.devnull, os.O_RDONLY), encoding="utf-8")
    if sys.stdout is None:  # for reading only, so that writing fails as it should
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_RDONLY), "w", encoding="utf-8")
    if sys.stderr is None:
        sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8")
    if isinstance(sys.stdin, io.TextIOWrapper):
        # a file's name may be any bytes; a question is made whole before it is asked
        sys.stdin.reconfigure(errors="surrogateescape")
    for stream in (sys.stdout, sys.stderr):
        # an answer may hold what a terminal cannot show
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def check_output() -> None:
    """Refuses, before anything long is done, to answer where nobody can be answered.

    Raises:
        UserError: standard output is closed.
    """
    try:
        os.write(sys.stdout.fileno(), b"")
    except (io.UnsupportedOperation, ValueError):  # not a file: a program calls us
        return
    except OSError as error:
        if error.errno == errno.EBADF:  # a full disk may have room by then
            raise UserError(
                "standard output is closed; there is nowhere to write the answer"
            ) from None


def say(text: str, end: str = "") -> None:
    """Writes to standard output at once.

    Raises:
        OutputLost: it is closed, or its disk is full.
        BrokenPipeError: its reader has gone, which is nothing to complain about.
    """
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise lost(error) from error


_held: list[str] | None = None  # lines that wait, while the terminal is somebody else's


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Lets what `complain` says wait, for something else draws on the terminal."""
    global _held
    lines: list[str] = []
    _held = lines
    try:
        yield
    finally:
        _held = None
        for line in lines:
            complain(line)


def complain(text: str) -> None:
    """Writes a line to standard error, if it takes one."""
    if _held is not None:
        _held.append(text)
        return
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def settle(code: int) -> int:
    """Writes out what Python still holds back; returns the exit code that is left of `code`."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        code = code or 1
        _drop(1)
    except OSError as error:
        if code == 0:
            complain(f"error: {lost(error)}")
        code = code or 1
        _drop(1)
    except ValueError:  # closed by whoever called us
        pass
    try:
        sys.stderr.flush()
    except (OSError, ValueError):
        _drop(2)
    return code


def _drop(number: int) -> None:
    """What Python still holds back must not fail again when the process ends."""
    stream = sys.stdout if number == 1 else sys.stderr
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        stream.flush()


def lost(error: OSError) -> OutputLost:
    """What a failed write to standard output is."""
    return OutputLost(f"cannot write to standard output: {error.strerror or error}")
