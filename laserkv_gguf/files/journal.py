"""Lines that survive a kill: each is whole in the file, or not there.

A line is one write; where it cannot be written whole, what was written of it is cut off again. A
process that is killed in the middle leaves a torn last line, which is cut off before the next one
is added.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from laserkv_gguf.errors import LaserKVError, UserError


def encoded(line: Mapping[str, Any]) -> bytes:
    """One line of JSON. What UTF-8 cannot say (a strange file name) is escaped."""
    return json.dumps(line, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def decoded(line: bytes) -> dict[str, Any]:
    """The object of a line; empty where there is none."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def whole_lines(data: bytes) -> list[bytes]:
    """Lines with their ends, without what stands after the last one: a line that was torn."""
    return [line + b"\n" for line in data.split(b"\n")[:-1]]


def append(handle: int, data: bytes, *, sync: bool = False) -> None:
    """Writes lines at the end of a file that is open for appending.

    Args:
        sync: whether they must be on disk when this returns.

    Raises:
        OSError: they cannot be written; what was written of them is cut off.
    """
    size = os.fstat(handle).st_size
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(handle, rest) :]
        if sync:
            os.fsync(handle)
    except OSError:
        with contextlib.suppress(OSError):
            os.ftruncate(handle, size)
        raise


class Journal:
    """A file of lines of JSON that a stopped run goes on from. Close it, or use `with`.

    Args:
        path: made where it is missing, with its folder.

    Attributes:
        entries: the objects that it holds, in order.

    Raises:
        UserError: it cannot be read or written, or a line that is not the last is broken.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, flags, 0o666)
            lines = whole_lines(path.read_bytes())
            os.ftruncate(self._file, sum(map(len, lines)))
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from error
        self.entries = [decoded(line) for line in lines]
        for number, entry in enumerate(self.entries, 1):
            if not entry:
                self.close()
                raise UserError(
                    f"{path}, line {number} is broken; delete that line, and what it was the "
                    "result of runs again"
                )

    def add(self, entry: Mapping[str, Any]) -> None:
        """Appends a line.

        Raises:
            LaserKVError: it cannot be written; the lines before it stay whole.
        """
        try:
            append(self._file, encoded(entry))
        except OSError as error:
            raise LaserKVError(
                f"cannot write {self.path}: {error.strerror}; what is there stays valid, "
                "and the same command goes on from it"
            ) from error
        self.entries.append(dict(entry))

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self.close()
